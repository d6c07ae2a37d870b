//! The head of a request or an answer as it travels through the tunnel.
//!
//! A head is the project's own type, so that the rooms between the visitors' HTTP engine and
//! the services' know neither of them. Header lines are one blob of length-prefixed fields:
//! copied once, passed on as they are, parsed only where they are used.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The head of a request: the request line and the header section (RFC 9112, section 2.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The method, a token (RFC 9110, section 9.1).
    pub method: Bytes,
    /// The request target as the visitor wrote it, never decoded or normalised.
    pub target: Bytes,
    /// The header lines.
    pub lines: Lines,
}

/// The head of an answer, interim (1xx) or final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status code, 100 to 999.
    pub status: u16,
    /// The header lines.
    pub lines: Lines,
}

impl RequestHead {
    /// What the head costs to hold, in bytes.
    pub fn size(&self) -> usize {
        self.method.len() + self.target.len() + self.lines.size()
    }
}

impl ResponseHead {
    /// Asks for the request's body (RFC 9110, section 15.2.1). Header lines mean nothing in it.
    pub const GO_AHEAD: Self = Self {
        status: 100,
        lines: Lines(Bytes::new()),
    };

    /// What the head costs to hold, in bytes.
    pub fn size(&self) -> usize {
        self.lines.size()
    }
}

/// Header or trailer lines in one blob, in the order in which they were sent.
///
/// Each line is the name's length (16 bits, big-endian), the name, the value's length (16 bits,
/// big-endian) and the value. A value of this type is well formed in that sense; whether names
/// are tokens and values free of line breaks is for the HTTP engine that writes them to refuse.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines(Bytes);

/// A blob that isn't a sequence of length-prefixed lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("malformed header lines")]
pub struct MalformedLines;

/// A name or value longer than 65,535 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a header line is too long for the tunnel")]
pub struct LineTooLong;

impl Lines {
    /// Takes a blob off the wire after walking over it once.
    pub fn parse(blob: Bytes) -> Result<Self, MalformedLines> {
        let mut rest = &blob[..];
        while !rest.is_empty() {
            let (_, after_name) = field(rest).ok_or(MalformedLines)?;
            let (_, after_value) = field(after_name).ok_or(MalformedLines)?;
            rest = after_value;
        }
        Ok(Self(blob))
    }

    /// The blob for the wire.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }

    /// The blob's size in bytes.
    pub fn size(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no line.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The lines as (name, value), in order. Slices of the blob, nothing is copied.
    pub fn iter(&self) -> LinesIter<'_> {
        LinesIter { rest: &self.0 }
    }

    /// The same memory as `part`, which must have come from [`Lines::iter`], as shared bytes.
    pub fn share(&self, part: &[u8]) -> Bytes {
        self.0.slice_ref(part)
    }
}

/// Iterates over the lines of [`Lines`].
#[derive(Debug, Clone)]
pub struct LinesIter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for LinesIter<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = field(self.rest)?;
        let (value, rest) = field(rest)?;
        self.rest = rest;
        Some((name, value))
    }
}

fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

/// Writes [`Lines`].
#[derive(Debug, Default)]
pub struct LinesBuilder(BytesMut);

impl LinesBuilder {
    /// A builder with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        Self(BytesMut::with_capacity(bytes))
    }

    /// Appends a line.
    pub fn push(&mut self, name: &[u8], value: &[u8]) -> Result<(), LineTooLong> {
        let name_len = u16::try_from(name.len()).map_err(|_| LineTooLong)?;
        let value_len = u16::try_from(value.len()).map_err(|_| LineTooLong)?;
        self.0.reserve(4 + name.len() + value.len());
        self.0.put_u16(name_len);
        self.0.put_slice(name);
        self.0.put_u16(value_len);
        self.0.put_slice(value);
        Ok(())
    }

    /// The finished lines.
    pub fn finish(self) -> Lines {
        Lines(self.0.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_built_parses_to_the_same(lines in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..40), proptest::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let mut builder = LinesBuilder::default();
            for (name, value) in &lines {
                builder.push(name, value).unwrap();
            }
            let parsed = Lines::parse(builder.finish().into_bytes()).unwrap();
            let again: Vec<_> = parsed.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
            prop_assert_eq!(again, lines);
        }

        #[test]
        fn any_blob_parses_or_is_refused(blob in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(lines) = Lines::parse(blob.clone().into()) {
                let walked: usize = lines.iter().map(|(n, v)| 4 + n.len() + v.len()).sum();
                prop_assert_eq!(walked, blob.len());
            }
        }
    }

    #[test]
    fn a_line_longer_than_its_prefix_can_say_is_refused() {
        let mut builder = LinesBuilder::default();
        assert_eq!(builder.push(b"a", &[b'x'; 65_536]), Err(LineTooLong));
        assert_eq!(builder.push(b"a", &[b'x'; 65_535]), Ok(()));
    }
}
