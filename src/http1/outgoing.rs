use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// A piece of a body up to this long is copied behind what stands before it: cheaper than one
/// more part of a write.
const COPIED: usize = 1024;

/// The most parts that one write takes.
const PARTS: usize = 16;

/// What waits to be written to a connection, in order: texts of our own, such as heads, and pieces
/// of bodies, of which only small ones are copied.
///
/// It takes whatever it is given; whoever fills it looks at [`Outgoing::len`] before.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// The front: pieces, and the texts between them.
    parts: VecDeque<Bytes>,
    /// The back.
    text: BytesMut,
    /// Bytes in `parts`.
    length: usize,
}

impl Outgoing {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.length + self.text.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where to append text.
    pub fn text(&mut self) -> &mut BytesMut {
        &mut self.text
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: Bytes) {
        if piece.len() <= COPIED {
            self.text.extend_from_slice(&piece);
            return;
        }
        let text = self.text.split().freeze();
        self.length += text.len() + piece.len();
        self.parts
            .extend([text, piece].into_iter().filter(|part| !part.is_empty()));
    }

    /// Hands the first parts that wait to `write`.
    pub fn with_slices<T>(&self, write: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let mut slices = [IoSlice::new(&[]); PARTS];
        let waiting = self.parts.iter().map(|part| &part[..]);
        let mut count = 0;
        let text = Some(&self.text[..]).filter(|text| !text.is_empty());
        for (slice, part) in slices.iter_mut().zip(waiting.chain(text)) {
            *slice = IoSlice::new(part);
            count += 1;
        }
        write(&slices[..count])
    }

    /// So many bytes are written.
    pub fn advance(&mut self, bytes: usize) {
        let mut left = bytes;
        while let Some(part) = self.parts.front_mut() {
            let of_part = left.min(part.len());
            part.advance(of_part);
            self.length -= of_part;
            left -= of_part;
            if !part.is_empty() {
                return;
            }
            self.parts.pop_front();
        }
        self.text.advance(left.min(self.text.len()));
    }

    /// All that waits.
    #[cfg(any(test, fuzzing))]
    pub fn into_bytes(self) -> Vec<u8> {
        let mut bytes = self.parts.into_iter().collect::<Vec<_>>().concat();
        bytes.extend_from_slice(&self.text);
        bytes
    }

    /// Gives memory back that isn't in use.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_however_many_are_taken() {
        let large = vec![b'x'; COPIED + 1];
        let mut expected = b"head".to_vec();
        for step in [1, 2, 3, 700, 1024, 5000, 100_000] {
            let mut out = Outgoing::default();
            out.text().extend_from_slice(b"head");
            expected.truncate(4);
            for _ in 0..20 {
                for piece in [&b"small"[..], &large, &large, b""] {
                    out.push(Bytes::copy_from_slice(piece));
                    out.text().extend_from_slice(b"\r\n");
                    expected.extend_from_slice(piece);
                    expected.extend_from_slice(b"\r\n");
                }
            }
            let mut written = Vec::new();
            while !out.is_empty() {
                let before = out.len();
                let taken = out.with_slices(|slices| {
                    let parts: Vec<u8> = slices.iter().flat_map(|part| part.to_vec()).collect();
                    let taken = step.min(parts.len());
                    written.extend_from_slice(&parts[..taken]);
                    taken
                });
                out.advance(taken);
                assert_eq!(out.len(), before - taken);
            }
            assert!(written == expected, "{step}");
        }
    }
}
