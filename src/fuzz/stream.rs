//! What a peer may say on a stream of HTTP/2, in bytes.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use bytes::BytesMut;

use super::Tape;

/// A line's name and value.
pub type Line = (Vec<u8>, Vec<u8>);

/// A message as a peer says it.
#[derive(Debug)]
pub struct Said {
    head: Vec<Line>,
    body: Vec<Vec<u8>>,
    trailers: Vec<Line>,
}

impl Said {
    /// Lines with names that mean something, lines with any name, and pieces of a body; lines
    /// behind a piece are trailers.
    pub fn read(mut tape: Tape<'_>) -> Self {
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

    /// Appends the frames of stream 1.
    pub fn write(&self, out: &mut BytesMut) {
        let is_last = self.body.is_empty() && self.trailers.is_empty();
        section(out, &self.head, is_last);
        for (number, piece) in self.body.iter().enumerate() {
            let is_last = number + 1 == self.body.len() && self.trailers.is_empty();
            let flags = if is_last { END_STREAM } else { 0 };
            frame(out, DATA, flags, 1, piece);
        }
        if !self.trailers.is_empty() {
            section(out, &self.trailers, true);
        }
    }
}

/// Names that are one byte of an input each: those that mean something to somebody.
pub(super) const NAMES: &[&str] = &[
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

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Appends the settings with which each side begins: none.
pub fn settings(out: &mut BytesMut) {
    frame(out, SETTINGS, 0, 0, b"");
}

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
