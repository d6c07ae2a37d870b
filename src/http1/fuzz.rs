//! Bytes as they may come from a visitor or from a service, read whole and in pieces, and written
//! again as the other side would get them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::net::{IpAddr, Ipv4Addr};

use bytes::BytesMut;

use super::*;
use crate::fuzz::Tape;
use crate::head::Lines;
use crate::headers::{
    Direction, Forwarding, Framing, RequestIds, Version, check_request, check_response,
    forward_request, forward_response, sendable,
};

/// Small enough that small inputs reach them.
const LIMITS: HeadLimits = HeadLimits {
    line: 256,
    head: 2048,
    lines: 16,
};

/// What has been written again has a few lines more.
const REWRITTEN: HeadLimits = HeadLimits {
    line: LIMITS.line + 64,
    head: 2 * LIMITS.head,
    lines: 2 * LIMITS.lines,
};

/// Reads a connection's bytes as requests or as answers; the first bytes of `data` say as which,
/// and in what pieces. However they are cut, the same messages come out; and whatever is taken for
/// a message is one to everybody when it has been written again.
pub fn messages(data: &[u8]) {
    let mut tape = Tape::new(data);
    let kind = [Kind::Request, Kind::Answer, Kind::AnswerToHead][tape.below(3)];
    let step = usize::from(tape.byte()).max(1);
    let stream = tape.rest();

    let (whole, end) = read(kind, LIMITS, stream, stream.len().max(1));
    let (pieces, end_of_pieces) = read(kind, LIMITS, stream, step);
    assert_eq!(pieces, whole, "cut into pieces of {step}");
    // How soon something is found to be no head depends on when it is looked at.
    if end != End::Implausible && end_of_pieces != End::Implausible {
        assert_eq!(end_of_pieces, end, "cut into pieces of {step}");
    }

    for message in whole {
        let wire = message.write();
        let (again, end) = read(kind, REWRITTEN, &wire, wire.len());
        assert_eq!(again.len(), 1, "{message:?} became {end:?}");
        assert_eq!(end, End::Open);
        assert_eq!(again[0].first, message.first);
        assert_eq!(again[0].body, message.body);
        assert_eq!(again[0].trailers, message.trailers);
        assert_eq!(again[0].framing, message.framing, "{message:?}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Answer,
    AnswerToHead,
}

/// A message that has been read to its end.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    first: First,
    /// As they would travel through the tunnel.
    lines: Lines,
    framing: Framing,
    body: Vec<u8>,
    trailers: Option<Lines>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum First {
    Request(Vec<u8>, Vec<u8>),
    Answer(u16),
}

/// How the reading ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// More could come.
    Open,
    TooLarge(TooLarge),
    Malformed(Malformed),
    /// A head that is well-formed, and not taken all the same.
    Refused,
    /// Found out before the head's end.
    Implausible,
    Body,
}

/// The messages of a connection whose bytes come in pieces of `step`, until there is one that
/// can't be taken.
fn read(kind: Kind, limits: HeadLimits, stream: &[u8], step: usize) -> (Vec<Message>, End) {
    let mut messages = Vec::new();
    let mut scan = HeadScan::default();
    let mut input = BytesMut::new();
    let mut pieces = stream.chunks(step);
    let mut unfinished: Option<(Message, BodyDecoder)> = None;
    let end = loop {
        if let Some((message, decoder)) = &mut unfinished {
            match decoder.decode(&mut input) {
                Ok(Piece::Data(data)) => {
                    assert!(!data.is_empty());
                    message.body.extend_from_slice(&data);
                    continue;
                }
                Ok(Piece::End(trailers)) => {
                    message.trailers = trailers;
                    messages.extend(unfinished.take().map(|(message, _)| message));
                    continue;
                }
                Ok(Piece::Partial) => {}
                Err(MalformedBody) => break End::Body,
            }
        } else {
            match scan.scan(&input, limits) {
                Ok(Some(end)) => match head(kind, limits, &input.split_to(end)) {
                    Ok(message) => {
                        let decoder = BodyDecoder::new(message.framing);
                        unfinished = Some((message, decoder));
                        continue;
                    }
                    Err(end) => break end,
                },
                Ok(None) => {
                    let plausible = match kind {
                        Kind::Request => scan.may_be_request(&input),
                        Kind::Answer | Kind::AnswerToHead => scan.may_be_response(&input),
                    };
                    if !plausible {
                        break End::Implausible;
                    }
                }
                Err(too_large) => break End::TooLarge(too_large),
            }
        }
        match pieces.next() {
            Some(piece) => input.extend_from_slice(piece),
            None => break End::Open,
        }
    };
    if let Some((message, mut decoder)) = unfinished
        && end == End::Open
        && decoder.close()
    {
        messages.push(message);
    }
    (messages, end)
}

/// The head of a message, as it would be taken by a server or an agent.
fn head(kind: Kind, limits: HeadLimits, head: &[u8]) -> Result<Message, End> {
    let (first, lines, framing) = match kind {
        Kind::Request => parse_request(head, limits.lines, |line, fields| {
            let facts = check_request(line.method, line.target, line.version, fields.iter())
                .map_err(|_| End::Refused)?;
            let first = First::Request(line.method.to_vec(), line.target.to_vec());
            let peer = Forwarding::new(IpAddr::V4(Ipv4Addr::LOCALHOST), false);
            let id = || RequestIds::new([7; 16]).next_id();
            let lines = forward_request(fields.iter(), &peer, facts.upgrades, id).unwrap();
            Ok((first, lines, facts.framing))
        }),
        Kind::Answer | Kind::AnswerToHead => parse_response(head, limits.lines, |line, fields| {
            let to_head = kind == Kind::AnswerToHead;
            let facts = check_response(line.status, line.version, to_head, fields.iter())
                .map_err(|_| End::Refused)?;
            let lines = forward_response(line.status, fields.iter()).unwrap();
            Ok((First::Answer(line.status), lines, facts.framing))
        }),
    }
    .map_err(End::Malformed)??;
    Ok(Message {
        first,
        lines,
        framing,
        body: Vec::new(),
        trailers: None,
    })
}

impl Message {
    /// What the service or the visitor would get.
    fn write(&self) -> BytesMut {
        let mut out = BytesMut::new();
        let direction = match &self.first {
            First::Request(method, target) => {
                write_request_line(&mut out, method, target);
                Direction::Request
            }
            First::Answer(status) => {
                write_status_line(&mut out, Version::Http11, *status);
                Direction::Response
            }
        };
        let facts = sendable(&self.lines, direction, |name, value| {
            write_line(&mut out, name, value);
        });
        let facts = facts.unwrap_or_else(|error| panic!("{error}: {self:?}"));
        if direction == Direction::Request && !facts.has_host {
            write_line(&mut out, b"host", b"service");
        }
        match self.framing {
            Framing::Length(length) => {
                // Without it, an answer would last as long as its connection.
                if length > 0 || direction == Direction::Response {
                    write_length(&mut out, length);
                }
                out.extend_from_slice(b"\r\n");
                out.extend_from_slice(&self.body);
            }
            Framing::UntilClose => {
                out.extend_from_slice(b"\r\n");
                out.extend_from_slice(&self.body);
            }
            Framing::Chunked => {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
                for chunk in self.body.chunks(100) {
                    write_chunk_head(&mut out, chunk.len());
                    out.extend_from_slice(chunk);
                    out.extend_from_slice(b"\r\n");
                }
                write_last_chunk(&mut out, self.trailers.as_ref());
            }
        }
        out
    }
}
