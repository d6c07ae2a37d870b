//! Requests off the tunnel, written for the service, and answers of a service that speaks HTTP/2.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, Uri};
use tokio::io::{AsyncWrite, DuplexStream, duplex};

use super::http2::{RecvStream, builder, head_of, request as as_http2};
use super::request::Upload;
use super::service::Service;
use crate::config::{AgentConfig, Sources};
use crate::fuzz::Tape;
use crate::fuzz::stream::{self, Line, Said};
use crate::head::{RequestHead, ResponseHead};
use crate::headers::{Framing, check_response, forward_trailers};
use crate::http1::{BodyDecoder, HeadLimits, HeadScan, Piece, parse_response};
use crate::http2::fields_of;
use crate::mux::Read;

static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let settings = [
        ("SILO_GRPC_SERVER_ADDRESS", "127.0.0.1:1"),
        ("SILO_GRPC_AGENT_ID", "a"),
        ("SILO_LOCAL_SERVICE_URL", "http://127.0.0.1:2"),
    ];
    let config = AgentConfig::load(&Sources::none().environment(settings)).unwrap();
    Service::new(&config.local).unwrap()
});

/// The bytes of a request for a service that speaks HTTP/1, none if it is refused. A service that
/// speaks HTTP/2 would get the same one.
pub fn written(head: &RequestHead, body: Vec<Read>) -> Option<Vec<u8>> {
    let mut reads = body.into_iter();
    let mut upload = Upload::begin(&SERVICE, head, reads.next()?).ok()?;
    for read in reads {
        upload.take(read).ok()?;
    }
    let (request, _) = as_http2(&SERVICE, head).unwrap();
    assert_eq!(request.method().as_str().as_bytes(), head.method);
    if head.target.starts_with(b"/") {
        assert_eq!(
            request.uri().path_and_query().unwrap().as_str(),
            head.target
        );
    }
    for (name, value) in fields_of(request.headers()) {
        assert_ne!(name, b"host");
        let given =
            |(given, bytes): (&[u8], &[u8])| given.eq_ignore_ascii_case(name) && bytes == value;
        assert!(head.lines.iter().any(given), "{}", name.escape_ascii());
    }

    Some(upload.into_waiting().into_bytes())
}

/// What a visitor's side makes of an answer on a connection that is kept: the bytes of the interim
/// ones, of the head, and of the body, which there may be none of if it answers a HEAD.
pub type FarEnd = fn(&[ResponseHead], &ResponseHead, Vec<Read>, bool) -> Vec<u8>;

/// Has a service that speaks HTTP/2 answer one request. `data` says with what, and its first byte
/// whether the request is a HEAD. Whatever of that is let through has to be exactly one answer, and
/// the interim ones before it, to a strict reader of HTTP/1.
pub fn answers(data: &[u8], far_end: FarEnd) {
    let mut tape = Tape::new(data);
    let to_head = tape.flag();
    let Some(answer) = Answer::received(to_head, &Said::read(tape)) else {
        return;
    };
    let written = far_end(&answer.interim, &answer.head, answer.reads.clone(), to_head);
    answer.compare(&written, to_head);
}

/// An answer as it goes through the tunnel.
struct Answer {
    interim: Vec<ResponseHead>,
    head: ResponseHead,
    /// As they came.
    lines: Vec<Line>,
    reads: Vec<Read>,
    body: Vec<u8>,
    trailers: Vec<Line>,
}

impl Answer {
    /// The answer, if h2 takes it for one, it can be passed on, and it comes to its end.
    fn received(to_head: bool, said: &Said) -> Option<Self> {
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut service, socket) = duplex(ROOM);
        let mut bytes = BytesMut::new();
        stream::settings(&mut bytes);
        send(&mut service, &bytes);
        let handshake = pin!(builder(1).handshake::<DuplexStream, Bytes>(socket));
        let Poll::Ready(Ok((mut sender, mut connection))) = handshake.poll(cx) else {
            return None;
        };
        let mut request = Request::new(());
        *request.uri_mut() = Uri::from_static("http://a/");
        if to_head {
            *request.method_mut() = Method::HEAD;
        }
        let (mut response, _) = sender.send_request(request, true).unwrap();
        let sent = Pin::new(&mut connection).poll(cx);
        assert!(sent.is_pending());
        bytes.clear();
        said.write(&mut bytes);
        send(&mut service, &bytes);
        // Whether it broke is seen by the stream too.
        let _ = Pin::new(&mut connection).poll(cx);

        let mut interim = Vec::new();
        while let Poll::Ready(Some(Ok(answer))) = response.poll_informational(cx) {
            interim.push(head_of(&answer, to_head).ok()?);
        }
        if interim.iter().any(|head| head.status == 101) {
            return None;
        }
        let Poll::Ready(Ok(answer)) = Pin::new(&mut response).poll(cx) else {
            return None;
        };
        let (parts, body) = answer.into_parts();
        let lines = fields_of(&parts.headers).map(owned).collect();
        let head = head_of(&Response::from_parts(parts, ()), to_head).ok()?;
        let mut answer = Self {
            interim,
            head,
            lines,
            reads: Vec::new(),
            body: Vec::new(),
            trailers: Vec::new(),
        };
        answer.take(body)?;
        Some(answer)
    }

    /// Reads the body to its end.
    fn take(&mut self, mut body: RecvStream) -> Option<()> {
        let cx = &mut Context::from_waker(Waker::noop());
        if body.is_end_stream() {
            self.reads.push(Read::End(None));
            return Some(());
        }
        loop {
            match body.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) if data.is_empty() => {}
                Poll::Ready(Some(Ok(data))) => {
                    self.body.extend_from_slice(&data);
                    self.reads.push(Read::Data(data));
                }
                Poll::Ready(None) => break,
                Poll::Ready(Some(Err(_))) | Poll::Pending => return None,
            }
        }
        let Poll::Ready(Ok(trailers)) = body.poll_trailers(cx) else {
            return None;
        };
        let trailers = trailers.unwrap_or_default();
        self.trailers = fields_of(&trailers).map(owned).collect();
        let lines = forward_trailers(fields_of(&trailers)).unwrap();
        self.reads
            .push(Read::End(Some(lines).filter(|lines| !lines.is_empty())));
        Some(())
    }

    /// What was written is this, and no more.
    fn compare(&self, written: &[u8], to_head: bool) {
        let text = written.escape_ascii();
        let mut input = BytesMut::from(written);
        for interim in &self.interim {
            let (status, framing, _) = read_head(&mut input, to_head);
            assert_eq!(
                (status, framing),
                (interim.status, Framing::Length(0)),
                "{text}"
            );
        }
        let (status, framing, lines) = read_head(&mut input, to_head);
        assert_eq!(status, self.head.status, "{text}");
        for line in &lines {
            let is_added = match &line.0[..] {
                b"transfer-encoding" => {
                    !self.lines.iter().any(|(name, _)| name == b"content-length")
                }
                // Written anew.
                b"content-length" => self.lines.iter().any(|(name, _)| name == b"content-length"),
                b"connection" => status == 426 && line.1 == b"upgrade",
                _ => self.lines.contains(line),
            };
            assert!(is_added, "{}: {text}", line.0.escape_ascii());
        }
        let has_body = !to_head && !matches!(status, 204 | 304);
        let mut body = Vec::new();
        let mut decoder = BodyDecoder::new(framing);
        let trailers = loop {
            match decoder
                .decode(&mut input)
                .unwrap_or_else(|error| panic!("{error}: {text}"))
            {
                Piece::Data(data) => body.extend_from_slice(&data),
                Piece::End(trailers) => break trailers,
                Piece::Partial => panic!("the body doesn't end: {text}"),
            }
        };
        assert!(input.is_empty(), "something follows the answer: {text}");
        assert_eq!(body, if has_body { &self.body[..] } else { b"" }, "{text}");
        for line in trailers.iter().flat_map(|lines| lines.iter()).map(owned) {
            assert!(self.trailers.contains(&line), "{line:?}");
        }
    }
}

/// Takes the next head off the input: its status, what it says of the body, and its lines.
fn read_head(input: &mut BytesMut, to_head: bool) -> (u16, Framing, Vec<Line>) {
    const LIMITS: HeadLimits = HeadLimits {
        line: 128 * 1024,
        head: 256 * 1024,
        lines: 256,
    };
    let end = HeadScan::default().scan(input, LIMITS).unwrap();
    let head = input.split_to(end.unwrap());
    parse_response(&head, LIMITS.lines, |line, fields| {
        let facts = check_response(line.status, line.version, to_head, fields.iter())
            .unwrap_or_else(|error| panic!("{error}: {}", head.escape_ascii()));
        assert_ne!(facts.framing, Framing::UntilClose);
        (
            line.status,
            facts.framing,
            fields.iter().map(owned).collect(),
        )
    })
    .unwrap_or_else(|error| panic!("{error}: {}", head.escape_ascii()))
}

/// More than any input becomes.
const ROOM: usize = 1 << 20;

fn send(service: &mut DuplexStream, bytes: &[u8]) {
    let cx = &mut Context::from_waker(Waker::noop());
    let written = Pin::new(service).poll_write(cx, bytes);
    assert!(matches!(written, Poll::Ready(Ok(count)) if count == bytes.len()));
}

/// Without the blanks around a value, which a service should leave out (RFC 9113, section 8.2.1)
/// and a reader of HTTP/1 doesn't see.
fn owned((name, value): (&[u8], &[u8])) -> Line {
    let mut value = value;
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    (name.to_vec(), value.to_vec())
}
