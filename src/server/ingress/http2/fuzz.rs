//! Requests as a visitor who speaks HTTP/2 may send them, with what a service that speaks HTTP/1
//! is given for them; and answers off the tunnel, as a visitor who speaks HTTP/1 gets them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::HeaderMap;
use http::request::Parts;
use tokio::io::{AsyncWrite, DuplexStream, duplex};

use super::super::reply::{Asked, Reply};
use super::head::Head;
use super::{PREFACE, Piece as Unsent, builder};
use crate::config::{HttpConfig, ServerConfig, Sources};
use crate::fuzz::Tape;
use crate::fuzz::stream::{self, Line, Said};
use crate::head::{RequestHead, ResponseHead};
use crate::headers::{
    Framing, RequestIds, Version, check_request, forward_request, forward_trailers,
};
use crate::http1::{BodyDecoder, HeadLimits, HeadScan, Outgoing, Piece, parse_request};
use crate::http2::{fields_of, joined_cookie};
use crate::mux::Read;

/// What an agent makes of a request: the bytes that the service gets, or none if it refuses.
pub type FarEnd = fn(&RequestHead, Vec<Read>) -> Option<Vec<u8>>;

/// What a service gets may have been lengthened.
const LIMITS: HeadLimits = HeadLimits {
    line: 128 * 1024,
    head: 256 * 1024,
    lines: 256,
};

/// Sends one request through h2 and the server's checks to a `far_end`. `data` says what: lines
/// with names that mean something, lines with any name, and pieces of a body; lines behind a piece
/// are trailers. Whatever is let through has to be exactly one request to a strict reader of
/// HTTP/1, the same one, and nothing in it may be the visitor's that he hasn't said.
pub fn requests(data: &[u8], far_end: FarEnd) {
    let said = Said::read(Tape::new(data));
    let Some((parts, mut body, _connection)) = received(&said) else {
        return;
    };
    let is_bodiless = body.is_end_stream();
    let Some(head) = forwarded(&parts) else {
        return;
    };
    let Some((reads, bytes, trailers)) = read(&mut body, is_bodiless) else {
        return;
    };
    let written = far_end(&head, reads)
        .unwrap_or_else(|| panic!("the far end refuses what was let through: {head:?}"));
    Seen::read(&written).compare(&parts, &bytes, trailers.as_ref());
}

/// What h2 takes for the request, and the connection on which it is read.
fn received(said: &Said) -> Option<(Parts, RecvStream, impl Sized + use<>)> {
    let (mut visitor, socket) = duplex(ROOM);
    let mut bytes = BytesMut::from(PREFACE);
    stream::settings(&mut bytes);
    said.write(&mut bytes);
    send(&mut visitor, &bytes);
    let cx = &mut Context::from_waker(Waker::noop());
    let mut handshake = builder(&SETTINGS).handshake::<DuplexStream, Unsent>(socket);
    let Poll::Ready(Ok(mut connection)) = Pin::new(&mut handshake).poll(cx) else {
        panic!("no handshake");
    };
    let Poll::Ready(Some(Ok((request, respond)))) = connection.poll_accept(cx) else {
        return None;
    };
    let (parts, body) = request.into_parts();
    Some((parts, body, (visitor, connection, respond)))
}

/// More than any input becomes.
const ROOM: usize = 1 << 20;

static SETTINGS: LazyLock<HttpConfig> =
    LazyLock::new(|| ServerConfig::load(&Sources::none()).unwrap().http);

fn send(visitor: &mut DuplexStream, bytes: &[u8]) {
    let cx = &mut Context::from_waker(Waker::noop());
    let written = Pin::new(visitor).poll_write(cx, bytes);
    assert!(
        matches!(written, Poll::Ready(Ok(count)) if count == bytes.len()),
        "{written:?}"
    );
}

/// A request's head on its way to an agent, unless it is refused.
fn forwarded(parts: &Parts) -> Option<RequestHead> {
    let cookie = joined_cookie(&parts.headers);
    let head = Head::new(parts, cookie.as_deref());
    head.check(&SETTINGS).ok()?;
    let peer = crate::headers::Forwarding::new(IpAddr::V4(Ipv4Addr::LOCALHOST), false);
    let id = || RequestIds::new([7; 16]).next_id();
    Some(RequestHead {
        method: Bytes::copy_from_slice(head.method),
        target: Bytes::copy_from_slice(head.target),
        lines: forward_request(head.fields(), &peer, false, id).unwrap(),
    })
}

/// A body as it goes through the tunnel, as it is, and with its trailers; none if it broke off.
fn read(
    body: &mut RecvStream,
    is_bodiless: bool,
) -> Option<(Vec<Read>, Vec<u8>, Option<HeaderMap>)> {
    let cx = &mut Context::from_waker(Waker::noop());
    let mut reads = Vec::new();
    let mut bytes = Vec::new();
    if is_bodiless {
        return Some((vec![Read::End(None)], bytes, None));
    }
    loop {
        match body.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) if data.is_empty() => {}
            Poll::Ready(Some(Ok(data))) => {
                bytes.extend_from_slice(&data);
                reads.push(Read::Data(data));
            }
            Poll::Ready(None) => break,
            Poll::Ready(Some(Err(_))) | Poll::Pending => return None,
        }
    }
    let trailers = match body.poll_trailers(cx) {
        Poll::Ready(Ok(trailers)) => trailers,
        Poll::Ready(Err(_)) | Poll::Pending => return None,
    };
    let lines = forward_trailers(fields_of(&trailers.clone().unwrap_or_default())).unwrap();
    reads.push(Read::End(Some(lines).filter(|lines| !lines.is_empty())));
    Some((reads, bytes, trailers))
}

/// The one request that a service got.
struct Seen {
    method: Vec<u8>,
    target: Vec<u8>,
    lines: Vec<Line>,
    body: Vec<u8>,
    trailers: Vec<Line>,
}

impl Seen {
    fn read(written: &[u8]) -> Self {
        let text = written.escape_ascii();
        let mut input = BytesMut::from(written);
        let end = HeadScan::default()
            .scan(&input, LIMITS)
            .unwrap_or_else(|error| panic!("{error:?}: {text}"))
            .unwrap_or_else(|| panic!("the head doesn't end: {text}"));
        let (mut seen, framing) =
            parse_request(&input.split_to(end), LIMITS.lines, |line, fields| {
                let facts = check_request(line.method, line.target, line.version, fields.iter())
                    .unwrap_or_else(|error| panic!("{error}: {text}"));
                assert_eq!(line.version, Version::Http11);
                assert!(!facts.upgrades && facts.persistent, "{text}");
                let seen = Self {
                    method: line.method.to_vec(),
                    target: line.target.to_vec(),
                    lines: (fields.iter().map(owned)).collect(),
                    body: Vec::new(),
                    trailers: Vec::new(),
                };
                (seen, facts.framing)
            })
            .unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_ne!(framing, Framing::UntilClose);
        let mut decoder = BodyDecoder::new(framing);
        loop {
            match decoder.decode(&mut input) {
                Ok(Piece::Data(data)) => seen.body.extend_from_slice(&data),
                Ok(Piece::End(trailers)) => {
                    let lines = trailers.iter().flat_map(|lines| lines.iter());
                    seen.trailers = lines.map(owned).collect();
                    break;
                }
                Ok(Piece::Partial) => panic!("the body doesn't end: {text}"),
                Err(error) => panic!("{error}: {text}"),
            }
        }
        assert!(input.is_empty(), "something follows the request: {text}");
        seen
    }

    /// It is what came from the visitor, and what proxies add.
    fn compare(&self, parts: &Parts, body: &[u8], trailers: Option<&HeaderMap>) {
        assert_eq!(self.method, parts.method.as_str().as_bytes());
        let target = parts.uri.path_and_query().expect("a target").as_str();
        assert_eq!(self.target, target.as_bytes());
        assert_eq!(self.body, body);

        let mut sent: Vec<Line> = fields_of(&parts.headers).map(owned).collect();
        // A reader doesn't see the blank that stands before a last crumb that is empty.
        let cookie = joined_cookie(&parts.headers);
        sent.extend(cookie.map(|cookie| (b"cookie".to_vec(), cookie.trim_ascii().to_vec())));
        let authority = parts.uri.authority().map(|name| name.as_str());
        let host = authority.map(|name| (b"host".to_vec(), name.into()));
        for line in &self.lines {
            let (name, value) = (&line.0[..], &line.1[..]);
            let is_added = match name {
                b"host" => host.as_ref().is_none_or(|host| host == line),
                b"te" => value == b"trailers",
                b"connection" => value == b"te",
                b"transfer-encoding" => !sent.iter().any(|(name, _)| name == b"content-length"),
                b"content-length" => value == body.len().to_string().as_bytes(),
                b"x-forwarded-for" => value == b"127.0.0.1",
                b"x-forwarded-proto" => value == b"http",
                b"x-forwarded-host" => self.lines.contains(&(b"host".to_vec(), value.to_vec())),
                b"x-request-id" => true,
                _ => sent.contains(line),
            };
            assert!(is_added, "{}", value.escape_ascii());
        }
        let sent: Vec<Line> = trailers
            .into_iter()
            .flat_map(fields_of)
            .map(owned)
            .collect();
        for line in &self.trailers {
            assert!(sent.contains(line), "{line:?}");
        }
    }
}

/// The bytes of an answer and of the interim ones before it, on a connection that can be used
/// again.
pub fn answered(
    interim: &[ResponseHead],
    head: &ResponseHead,
    body: Vec<Read>,
    to_head: bool,
) -> Vec<u8> {
    let asked = Asked {
        version: Version::Http11,
        to_head,
        persistent: true,
    };
    let mut out = Outgoing::default();
    for head in interim {
        Reply::interim(&mut out, head);
    }
    let mut reply = Reply::begin(&mut out, asked, head, None)
        .unwrap_or_else(|error| panic!("{error}: {head:?}"));
    for read in body {
        reply
            .take(&mut out, read)
            .expect("the length that the head declares");
    }
    assert!(reply.is_complete() && reply.persistent && !reply.ends_by_close());
    out.into_bytes()
}

fn owned((name, value): (&[u8], &[u8])) -> Line {
    (name.to_vec(), value.to_vec())
}
