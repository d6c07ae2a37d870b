//! Chance that a seed decides.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Numbers that look random and are the same for the same seed (splitmix64). Clones draw from the
/// same sequence.
#[derive(Debug, Clone)]
pub(crate) struct Random(Arc<Mutex<u64>>);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(seed)))
    }

    /// A sequence of its own.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.number())
    }

    /// Uniform over all of `u64`.
    pub(crate) fn number(&self) -> u64 {
        let mut state = self.0.lock().unwrap();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which isn't 0.
    pub(crate) fn below(&self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    /// True once in `of` times.
    pub(crate) fn one_in(&self, of: usize) -> bool {
        self.below(of) == 0
    }

    /// Some milliseconds out of the range.
    pub(crate) fn millis(&self, range: Range<u64>) -> Duration {
        let span = (range.end - range.start).max(1);
        Duration::from_millis(range.start + self.number() % span)
    }

    /// One of them.
    pub(crate) fn pick<'a, T>(&self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}
