//! Requests as a visitor who speaks HTTP/2 may send them, and what a service that speaks HTTP/1
//! is given for them.
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

use super::head::Head;
use super::{PREFACE, Piece as Unsent, builder};
use crate::config::{HttpConfig, ServerConfig, Sources};
use crate::fuzz::Tape;
use crate::head::RequestHead;
use crate::headers::{
    Framing, RequestIds, Version, check_request, forward_request, forward_trailers,
};
use crate::http1::{BodyDecoder, HeadLimits, HeadScan, Piece, parse_request};
use crate::http2::{fields_of, joined_cookie};
use crate::mux::Read;

/// A line's name and value.
type Line = (Vec<u8>, Vec<u8>);

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
    let said = Said::read(data);
    let Some((parts, mut body, _connection)) = said.received() else {
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

/// What a visitor sends on one stream.
struct Said {
    head: Vec<Line>,
    body: Vec<Vec<u8>>,
    trailers: Vec<Line>,
}

impl Said {
    fn read(data: &[u8]) -> Self {
        let mut tape = Tape::new(data);
        let mut said = Self {
            head: Vec::new(),
            body: Vec::new(),
            trailers: Vec::new(),
        };
        while !tape.is_empty() {
            let name = match tape.below(NAMES.len() as u8 + 2) {
                0 => {
                    said.body.push(tape.piece().to_vec());
                    continue;
                }
                1 => tape.piece(),
                known => NAMES[known - 2].as_bytes(),
            };
            let line = (name.to_vec(), tape.piece().to_vec());
            if said.body.is_empty() {
                said.head.push(line);
            } else {
                said.trailers.push(line);
            }
        }
        said
    }

    /// The request, if h2 takes it for one, and the connection on which it is read.
    fn received(&self) -> Option<(Parts, RecvStream, impl Sized + use<>)> {
        let (mut visitor, socket) = duplex(ROOM);
        send(&mut visitor, &self.frames());
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

    /// The bytes of a connection with this one request.
    fn frames(&self) -> BytesMut {
        let mut out = BytesMut::from(PREFACE);
        frame(&mut out, SETTINGS_FRAME, 0, 0, b"");
        let is_last = self.body.is_empty() && self.trailers.is_empty();
        section(&mut out, &self.head, is_last);
        for (number, piece) in self.body.iter().enumerate() {
            let is_last = number + 1 == self.body.len() && self.trailers.is_empty();
            let flags = if is_last { END_STREAM } else { 0 };
            frame(&mut out, DATA, flags, 1, piece);
        }
        if !self.trailers.is_empty() {
            section(&mut out, &self.trailers, true);
        }
        out
    }
}

/// Names that are one byte of an input each: those that mean something to somebody.
const NAMES: &[&str] = &[
    ":method",
    ":scheme",
    ":authority",
    ":path",
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "upgrade",
    "te",
    "trailer",
    "expect",
    "cookie",
    "x-forwarded-for",
    "x-forwarded-host",
    "x_forwarded_proto",
    "x-request-id",
    "forwarded",
    ":protocol",
    ":status",
];

/// More than any input becomes.
const ROOM: usize = 1 << 20;

static SETTINGS: LazyLock<HttpConfig> =
    LazyLock::new(|| ServerConfig::load(&Sources::none()).unwrap().http);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS_FRAME: u8 = 4;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Appends a frame (RFC 9113, section 4.1).
fn frame(out: &mut BytesMut, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Appends lines, in as many frames as they need.
fn section(out: &mut BytesMut, lines: &[Line], is_last: bool) {
    /// The least that every peer takes in one frame.
    const MAX_FRAME: usize = 16_384;
    let mut block = Vec::new();
    for (name, value) in lines {
        // Not indexed, and with a name of its own (RFC 7541, section 6.2.2).
        block.push(0);
        for text in [name, value] {
            put_length(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    let mut pieces: Vec<&[u8]> = block.chunks(MAX_FRAME).collect();
    if pieces.is_empty() {
        pieces.push(&[]);
    }
    for (number, piece) in pieces.iter().enumerate() {
        let (kind, first) = match number {
            0 => (HEADERS, if is_last { END_STREAM } else { 0 }),
            _ => (CONTINUATION, 0),
        };
        let last = if number + 1 == pieces.len() {
            END_HEADERS
        } else {
            0
        };
        frame(out, kind, first | last, 1, piece);
    }
}

/// Appends a length with a prefix of seven bits (RFC 7541, section 5.1).
fn put_length(block: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        return block.push(length as u8);
    };
    block.push(127);
    while rest >= 128 {
        block.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    block.push(rest as u8);
}

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

fn owned((name, value): (&[u8], &[u8])) -> Line {
    (name.to_vec(), value.to_vec())
}
