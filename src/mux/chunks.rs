use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Slices up to this size are joined while they wait: a slice costs memory of its own, and a peer
/// that sends single bytes must not make us hold a hundred times of what it sent.
const JOINED: usize = 512;

/// A queue of byte slices that allocates nothing for the first one: most bodies are one slice.
/// Any two neighbours after that are longer than [`JOINED`] together.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    first: Bytes,
    rest: VecDeque<Bytes>,
    bytes: usize,
}

impl Chunks {
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        self.bytes += chunk.len();
        if self.first.is_empty() {
            self.first = chunk;
            return;
        }
        if let Some(last) = self.rest.back_mut()
            && last.len() + chunk.len() <= JOINED
        {
            let mut joined = BytesMut::with_capacity(last.len() + chunk.len());
            joined.extend_from_slice(last);
            joined.extend_from_slice(&chunk);
            *last = joined.freeze();
            return;
        }
        self.rest.push_back(chunk);
    }

    /// Takes the first slice, cut to `limit` bytes. Empty when there is none.
    pub(super) fn pop(&mut self, limit: usize) -> Bytes {
        let chunk = if self.first.len() > limit {
            self.first.split_to(limit)
        } else {
            let next = self.rest.pop_front().unwrap_or_default();
            std::mem::replace(&mut self.first, next)
        };
        self.bytes -= chunk.len();
        chunk
    }

    /// How many slices there are.
    #[cfg(any(test, fuzzing))]
    pub(super) fn slices(&self) -> usize {
        self.rest.len() + usize::from(!self.first.is_empty())
    }

    /// Forgets everything and says how many bytes that were.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(self).bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn single_bytes_are_joined() {
        let mut queue = Chunks::default();
        for _ in 0..100_000 {
            queue.push(Bytes::from_static(b"x"));
        }
        assert!(queue.slices() <= 2 + 100_000 / JOINED);
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..10),
            limit in 1usize..8,
        ) {
            let mut queue = Chunks::default();
            for chunk in &chunks {
                queue.push(Bytes::copy_from_slice(chunk));
            }
            let expected = chunks.concat();
            prop_assert_eq!(queue.len(), expected.len());
            let mut seen = Vec::new();
            while !queue.is_empty() {
                let chunk = queue.pop(limit);
                prop_assert!(!chunk.is_empty() && chunk.len() <= limit);
                seen.extend_from_slice(&chunk);
            }
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(queue.pop(limit), Bytes::new());
        }
    }
}
