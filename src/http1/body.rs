use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

use super::head::parse_trailers;
use crate::head::Lines;
use crate::headers::{Framing, forward_trailers, trim};

/// The longest line with a chunk's size and its extensions. Nobody sends extensions; 16 digits
/// are the largest size that 64 bits hold.
const MAX_SIZE_LINE: usize = 256;

/// The largest trailer section, in bytes.
const MAX_TRAILERS: usize = 16 * 1024;

/// The most lines of a trailer section.
const MAX_TRAILER_LINES: usize = 64;

/// A piece of a body up to this long is copied: it would keep a whole read buffer in memory, and
/// the buffer couldn't be used again.
const COPIED: usize = 4096;

/// What there is of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// The next bytes, never none.
    Data(Bytes),
    /// The body is complete; the lines of its trailer section that may be passed on, where there
    /// are any.
    End(Option<Lines>),
    /// Nothing more until more bytes come.
    Partial,
}

/// A body that broke the rules of its framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the body's framing is malformed")]
pub struct MalformedBody;

/// Takes a body off the bytes of a connection (RFC 9112, sections 6 and 7).
///
/// ```text
///              size line             data                  CRLF
///   Size ─────────────────► Chunk ──────────► ChunkEnd ──────────► Size
///    │ size 0
///    └──────► Trailers ──── empty line ────► Done ◄──── last byte ── Length
/// ```
///
/// Chunk extensions are dropped (RFC 9112, section 7.1.1). Line ends are CRLF and nothing else:
/// two parties that disagree on where a size line ends disagree on where the next request begins.
#[derive(Debug, Clone)]
pub struct BodyDecoder(State);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So much is left.
    Length(u64),
    Size,
    /// So much is left of a chunk.
    Chunk(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
    Done,
}

impl BodyDecoder {
    /// For a body that is framed so.
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size,
            Framing::UntilClose => State::UntilClose,
        })
    }

    /// Whether the whole body has been taken.
    pub fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// How much of the body is still to come at least.
    pub fn left(&self) -> u64 {
        match self.0 {
            State::Length(left) | State::Chunk(left) => left,
            State::Size | State::ChunkEnd | State::Trailers => 0,
            State::UntilClose | State::Done => 0,
        }
    }

    /// Takes what there is of the body off the front of `bytes`. After [`Piece::End`] what is
    /// left there is the next message's.
    ///
    /// # Errors
    /// [`MalformedBody`]: where the body ends can't be told any more, so nothing on the
    /// connection can be used.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Piece, MalformedBody> {
        loop {
            match self.0 {
                State::Done => return Ok(Piece::End(None)),
                State::UntilClose => return Ok(take(bytes, u64::MAX)),
                State::Length(left) => {
                    let piece = take(bytes, left);
                    self.0 = match left - length(&piece) {
                        0 => State::Done,
                        left => State::Length(left),
                    };
                    return Ok(piece);
                }
                State::Chunk(left) => {
                    let piece = take(bytes, left);
                    self.0 = match left - length(&piece) {
                        0 => State::ChunkEnd,
                        left => State::Chunk(left),
                    };
                    return Ok(piece);
                }
                State::ChunkEnd => match bytes.first_chunk::<2>() {
                    Some(b"\r\n") => {
                        bytes.advance(2);
                        self.0 = State::Size;
                    }
                    None if b"\r\n".starts_with(bytes) => return Ok(Piece::Partial),
                    _ => return Err(MalformedBody),
                },
                State::Size => {
                    let Some(end) = line_end(bytes, MAX_SIZE_LINE)? else {
                        return Ok(Piece::Partial);
                    };
                    let size = chunk_size(&bytes[..end - 2])?;
                    bytes.advance(end);
                    self.0 = match size {
                        0 => State::Trailers,
                        size => State::Chunk(size),
                    };
                }
                State::Trailers => {
                    let Some(end) = section_end(bytes)? else {
                        return Ok(Piece::Partial);
                    };
                    let lines = match end {
                        2 => None,
                        _ => Some(trailers(&bytes[..end])?),
                    };
                    bytes.advance(end);
                    self.0 = State::Done;
                    return Ok(Piece::End(lines.filter(|lines| !lines.is_empty())));
                }
            }
        }
    }

    /// Notes that the connection has ended, and says whether the body is complete by that.
    pub fn close(&mut self) -> bool {
        if self.0 == State::UntilClose {
            self.0 = State::Done;
        }
        self.is_done()
    }
}

/// Up to `most` bytes off the front.
fn take(bytes: &mut BytesMut, most: u64) -> Piece {
    let length = usize::try_from(most).map_or(bytes.len(), |most| most.min(bytes.len()));
    match length {
        0 => Piece::Partial,
        1..=COPIED => {
            let piece = Bytes::copy_from_slice(&bytes[..length]);
            bytes.advance(length);
            Piece::Data(piece)
        }
        _ => Piece::Data(bytes.split_to(length).freeze()),
    }
}

fn length(piece: &Piece) -> u64 {
    match piece {
        Piece::Data(data) => data.len() as u64,
        Piece::End(_) | Piece::Partial => 0,
    }
}

/// Where the first line ends, CRLF included, if its end is there. A CR or LF by itself is no end
/// of a line and may not stand in one.
fn line_end(bytes: &[u8], limit: usize) -> Result<Option<usize>, MalformedBody> {
    match memchr::memchr2(b'\r', b'\n', bytes) {
        Some(at) if at > limit => Err(MalformedBody),
        None if bytes.len() > limit => Err(MalformedBody),
        None => Ok(None),
        Some(at) => match &bytes[at..] {
            [b'\r', b'\n', ..] => Ok(Some(at + 2)),
            [b'\r'] => Ok(None),
            _ => Err(MalformedBody),
        },
    }
}

/// The number in a chunk's size line: `1*HEXDIG [ chunk-ext ]`.
fn chunk_size(line: &[u8]) -> Result<u64, MalformedBody> {
    let digits = line
        .iter()
        .position(|byte| !byte.is_ascii_hexdigit())
        .unwrap_or(line.len());
    let (digits, extensions) = line.split_at(digits);
    // Blanks before the semicolon are "bad" but meant to be taken (RFC 9112, section 7.1.1), and
    // there are servers that fill the line up with them.
    let ends_well = match trim(extensions) {
        [] => true,
        [b';', rest @ ..] => rest
            .iter()
            .all(|byte| *byte == b'\t' || !byte.is_ascii_control()),
        _ => false,
    };
    if digits.is_empty() || !ends_well {
        return Err(MalformedBody);
    }
    // As with a length: what takes more than 63 bits is a mistake or a trick.
    digits.iter().try_fold(0_u64, |size, digit| {
        let digit = char::from(*digit).to_digit(16).ok_or(MalformedBody)?;
        let size = size.checked_mul(16).ok_or(MalformedBody)? | u64::from(digit);
        i64::try_from(size).map_err(|_| MalformedBody)?;
        Ok(size)
    })
}

/// Where a trailer section ends, the empty line included, if its end is there.
fn section_end(bytes: &[u8]) -> Result<Option<usize>, MalformedBody> {
    let mut end = 0;
    loop {
        let Some(line) = line_end(&bytes[end..], MAX_TRAILERS)? else {
            return Ok(None);
        };
        end += line;
        if end > MAX_TRAILERS {
            return Err(MalformedBody);
        }
        if line == 2 {
            return Ok(Some(end));
        }
    }
}

fn trailers(section: &[u8]) -> Result<Lines, MalformedBody> {
    parse_trailers(section, MAX_TRAILER_LINES, |fields| {
        forward_trailers(fields.iter())
    })
    .map_err(|_| MalformedBody)?
    .map_err(|_| MalformedBody)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Body, trailers and what follows, or why not; fed in pieces of `step` bytes.
    fn decode(
        framing: Framing,
        wire: &[u8],
        step: usize,
    ) -> Option<(Vec<u8>, Option<Lines>, Vec<u8>)> {
        let mut decoder = BodyDecoder::new(framing);
        let mut bytes = BytesMut::new();
        let mut body = Vec::new();
        let mut rest = wire;
        loop {
            match decoder.decode(&mut bytes).ok()? {
                Piece::Data(data) => body.extend_from_slice(&data),
                Piece::End(trailers) => {
                    bytes.extend_from_slice(rest);
                    return Some((body, trailers, bytes.to_vec()));
                }
                Piece::Partial if rest.is_empty() => {
                    return decoder.close().then(|| (body, None, Vec::new()));
                }
                Piece::Partial => {
                    let (next, after) = rest.split_at(step.min(rest.len()));
                    bytes.extend_from_slice(next);
                    rest = after;
                }
            }
        }
    }

    fn chunked(wire: &str) -> Option<(String, String)> {
        let whole = decode(Framing::Chunked, wire.as_bytes(), wire.len());
        for step in [1, 2, 3, 7] {
            assert_eq!(
                decode(Framing::Chunked, wire.as_bytes(), step),
                whole,
                "{wire:?}"
            );
        }
        let (body, _, rest) = whole?;
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Some((text(body), text(rest)))
    }

    #[test]
    fn a_length_is_kept_to() {
        let with = |length, wire: &str| decode(Framing::Length(length), wire.as_bytes(), 3);
        let (body, trailers, rest) = with(5, "helloGET /").unwrap();
        assert_eq!(
            (&body[..], trailers, &rest[..]),
            (&b"hello"[..], None, &b"GET /"[..])
        );
        assert_eq!(with(0, "GET /").unwrap().2, b"GET /");
        assert_eq!(with(6, "hello"), None);
        assert_eq!(with(u64::MAX, "hello"), None);
    }

    #[test]
    fn without_framing_the_end_of_the_connection_is_the_end() {
        let (body, _, rest) = decode(Framing::UntilClose, b"anything", 3).unwrap();
        assert_eq!((&body[..], &rest[..]), (&b"anything"[..], &b""[..]));
    }

    #[test]
    fn chunks_become_a_body() {
        for (wire, body) in [
            ("0\r\n\r\n", ""),
            ("5\r\nhello\r\n0\r\n\r\n", "hello"),
            ("1\r\nh\r\n4\r\nello\r\n000\r\n\r\n", "hello"),
            ("a\r\n0123456789\r\n0\r\n\r\n", "0123456789"),
            ("A;x=y\r\n0123456789\r\n0;z\r\n\r\n", "0123456789"),
            ("5 ;a=\"b c\"\r\nhello\r\n0\r\n\r\n", "hello"),
            (
                "0000000000000006\r\n\r\n\r\n\r\n\r\n0\r\n\r\n",
                "\r\n\r\n\r\n",
            ),
            ("5  \r\nhello\r\n0 \r\n\r\n", "hello"),
        ] {
            let expected = (body.to_owned(), "NEXT".to_owned());
            assert_eq!(chunked(&format!("{wire}NEXT")), Some(expected), "{wire:?}");
        }
    }

    #[test]
    fn tricks_with_chunks_are_refused() {
        for wire in [
            "\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\rhello\r\n0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhelloX\r\n0\r\n\r\n",
            "+5\r\nhello\r\n0\r\n\r\n",
            "-1\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
            "5\x0c\r\nhello\r\n0\r\n\r\n",
            "5\r\n\r\n\r\n\r\n\r\n0\r\n\r\n",
            "5 5\r\nhello\r\n0\r\n\r\n",
            "5_\r\nhello\r\n0\r\n\r\n",
            "5;a\nb\r\nhello\r\n0\r\n\r\n",
            "5;a\0b\r\nhello\r\n0\r\n\r\n",
            "8000000000000000\r\n",
            "10000000000000000\r\n",
            "ffffffffffffffffff\r\n",
            "0\r\nX\r\n\r\n",
            "0\r\nX : y\r\n\r\n",
            "0\r\n X: y\r\n\r\n",
            "0\r\nX: y\n\r\n",
            "0\r\nX: y\r\n z\r\n\r\n",
            "0\r\nX: \0\r\n\r\n",
            "0\n\n",
        ] {
            assert_eq!(chunked(wire), None, "{wire:?}");
        }
        let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(MAX_SIZE_LINE));
        assert_eq!(chunked(&long), None);
        let endless = format!("0\r\n{}", "X: y\r\n".repeat(MAX_TRAILERS));
        assert_eq!(decode(Framing::Chunked, endless.as_bytes(), 4096), None);
    }

    #[test]
    fn trailers_come_with_the_end() {
        let wire = b"1\r\na\r\n0\r\nX-Sum: 1\r\nContent-Length: 5\r\nX-Sum:  2 \r\n\r\nNEXT";
        for step in [1, 5, wire.len()] {
            let (body, trailers, rest) = decode(Framing::Chunked, wire, step).unwrap();
            assert_eq!((&body[..], &rest[..]), (&b"a"[..], &b"NEXT"[..]));
            let trailers = trailers.unwrap();
            let lines: Vec<_> = trailers.iter().collect();
            assert_eq!(lines, [(&b"X-Sum"[..], &b"1"[..]), (b"X-Sum", b"2")]);
        }
        let (_, trailers, _) = decode(Framing::Chunked, b"0\r\nHost: a\r\n\r\n", 9).unwrap();
        assert_eq!(trailers, None);
    }

    #[test]
    fn a_small_piece_keeps_no_buffer() {
        let mut bytes = BytesMut::with_capacity(64 * 1024);
        bytes.extend_from_slice(&[b'x'; 100]);
        let start = bytes.as_ptr();
        let mut decoder = BodyDecoder::new(Framing::Length(u64::MAX));
        let Piece::Data(piece) = decoder.decode(&mut bytes).unwrap() else {
            unreachable!("there is data");
        };
        assert_ne!(piece.as_ptr(), start);
        // The buffer is ours alone, so all of it can be had back.
        assert!(bytes.try_reclaim(64 * 1024));
    }

    proptest! {
        /// However a body is cut into chunks and reads, it arrives.
        #[test]
        fn what_is_chunked_arrives(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..8),
            step in 1_usize..400,
        ) {
            let mut wire = BytesMut::new();
            for chunk in &chunks {
                super::super::write_chunk_head(&mut wire, chunk.len());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            super::super::write_last_chunk(&mut wire, None);
            wire.extend_from_slice(b"NEXT");
            let (body, trailers, rest) = decode(Framing::Chunked, &wire, step).unwrap();
            prop_assert_eq!(body, chunks.concat());
            prop_assert_eq!(trailers, None);
            prop_assert_eq!(rest, b"NEXT");
        }

        /// Any bytes are judged, and in the same way however they come.
        #[test]
        fn any_bytes_are_judged(wire in "[0-9a-fx;\r\n :]{0,40}", step in 1_usize..5) {
            let whole = decode(Framing::Chunked, wire.as_bytes(), wire.len().max(1));
            prop_assert_eq!(decode(Framing::Chunked, wire.as_bytes(), step), whole);
        }
    }
}
