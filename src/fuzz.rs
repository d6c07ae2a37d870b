//! What the fuzz targets and the replay of their corpora share.
//!
//! A target is a function from bytes to nothing that panics when something is wrong. Each stands in
//! the room it tries: [`mux::fuzz`](crate::mux::fuzz), [`ports::fuzz`](crate::ports::fuzz),
//! [`http1::fuzz`](crate::http1::fuzz), [`config::fuzz`](crate::config::fuzz),
//! [`wire::fuzz`](crate::wire::fuzz), [`grpc::fuzz`](crate::grpc::fuzz), and [`server::fuzz`](crate::server::fuzz) with
//! [`agent::fuzz`](crate::agent::fuzz) as its far end. They are compiled for tests, and where
//! `cfg(fuzzing)` is set: nothing else ever sees them.

/// Bytes taken as what a state machine is told, one small number after the other. Beyond the end
/// all of them are 0.
#[derive(Debug)]
pub struct Tape<'a>(&'a [u8]);

impl<'a> Tape<'a> {
    /// From the first byte on.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether all has been taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    /// One byte as a choice.
    pub fn flag(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    /// One byte as one of `count` choices, from 0.
    pub fn below(&mut self, count: u8) -> usize {
        usize::from(self.byte() % count)
    }

    /// Two bytes, the higher one first.
    pub fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// Four bytes, the highest one first.
    pub fn long(&mut self) -> u32 {
        u32::from(self.word()) << 16 | u32::from(self.word())
    }

    /// One byte as a length, and as many bytes, or fewer where they end.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        piece
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

#[cfg(test)]
mod seeds;
pub mod stream;
#[cfg(test)]
mod tests;
