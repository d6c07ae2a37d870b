use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The bytes that all tunnels of a process together may promise to hold.
#[derive(Debug)]
pub struct Pool {
    limit: AtomicUsize,
    used: AtomicUsize,
}

impl Pool {
    /// A pool of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            used: AtomicUsize::new(0),
        })
    }

    /// Sets another limit. What is promised beyond it stays promised; nothing more is until enough
    /// has been given back.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// The bytes promised now, in whole blocks per tunnel.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        // Relaxed throughout: the numbers guard memory use, not other memory.
        let limit = self.limit();
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|total| *total <= limit)
            })
            .is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What one tunnel may promise to hold, out of a [`Pool`].
///
/// It has two uses. `reserve` is for what an exchange must have to make progress: it is
/// given in full or refused, and then the exchange isn't admitted. `lend` is for larger
/// windows: loans come out of half of the budget, and each is at most an eighth of what is free of
/// that half, so that however many readers stall with their loans, some is left for the next one (the dynamic threshold of Choudhury and Hahne,
/// "Dynamic queue length thresholds for shared-memory packet switches", 1998).
#[derive(Debug)]
pub struct Budget {
    pool: Arc<Pool>,
    limit: usize,
    used: usize,
    /// Taken from the pool; at least `used`. In blocks, so that the counter that all workers
    /// share isn't touched by every request.
    taken: usize,
}

/// How much a tunnel takes from the pool at a time: about what one request promises, so that ten
/// thousand tunnels with a request each don't hold more of the pool than they need.
const BLOCK: usize = 32 * 1024;

/// A loan is at most this part of what is free.
const LOAN_DIVISOR: usize = 8;

impl Budget {
    /// A budget of `limit` bytes out of `pool`.
    pub fn new(pool: Arc<Pool>, limit: usize) -> Self {
        Self {
            pool,
            limit,
            used: 0,
            taken: 0,
        }
    }

    /// The bytes promised now.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Promises all of `bytes`, or nothing.
    pub(super) fn reserve(&mut self, bytes: usize) -> bool {
        let Some(used) = self.used.checked_add(bytes) else {
            return false;
        };
        if used > self.limit {
            return false;
        }
        if used > self.taken {
            let missing = used - self.taken;
            // When the pool has no whole block left, what it has still counts.
            let taken = [missing.next_multiple_of(BLOCK), missing]
                .into_iter()
                .find(|bytes| self.pool.take(*bytes));
            let Some(taken) = taken else {
                return false;
            };
            self.taken += taken;
        }
        self.used = used;
        true
    }

    /// Promises up to `want` bytes and says how many; fewer, or none, when little is left.
    pub(super) fn lend(&mut self, want: usize) -> usize {
        let loan = want.min(self.lendable() / LOAN_DIVISOR);
        if loan > 0 && self.reserve(loan) {
            loan
        } else {
            0
        }
    }

    /// Whether a loan of `want` would be given in full.
    pub(super) fn has_room(&self, want: usize) -> bool {
        want <= self.lendable() / LOAN_DIVISOR
    }

    /// Loans stop when half of everything is promised: the other half is for new exchanges.
    fn lendable(&self) -> usize {
        let here = (self.limit / 2).saturating_sub(self.used);
        let there = (self.pool.limit() / 2).saturating_sub(self.pool.used());
        here.min(there)
    }

    /// Ends promises of `bytes`.
    pub(super) fn give_back(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.used, "more given back than promised");
        self.used = self.used.saturating_sub(bytes);
        // A block is kept while any is in use, so that going to and fro across a block's edge
        // doesn't touch the pool each time.
        let keep = if self.used == 0 {
            0
        } else {
            self.used.next_multiple_of(BLOCK) + BLOCK
        };
        if self.taken > keep {
            self.pool.give_back(self.taken - keep);
            self.taken = keep;
        }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.pool.give_back(self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_are_whole_or_refused() {
        let pool = Pool::new(4 * BLOCK);
        let mut one = Budget::new(pool.clone(), 2 * BLOCK);
        assert!(one.reserve(2 * BLOCK));
        assert!(!one.reserve(1), "the tunnel's own limit");
        let mut two = Budget::new(pool.clone(), 100 * BLOCK);
        assert!(two.reserve(2 * BLOCK));
        assert!(!two.reserve(1), "the pool's limit");
        one.give_back(2 * BLOCK);
        assert!(two.reserve(1));
        drop(two);
        drop(one);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_pool_is_used_to_its_last_byte() {
        let pool = Pool::new(BLOCK + 10);
        let mut one = Budget::new(pool.clone(), PLENTY);
        let mut two = Budget::new(pool.clone(), PLENTY);
        assert!(one.reserve(1));
        assert!(two.reserve(10));
        assert!(!two.reserve(1));
        assert!(one.reserve(BLOCK - 1));
        one.give_back(BLOCK);
        two.give_back(10);
        assert_eq!(pool.used(), 0);
    }

    const PLENTY: usize = 1 << 40;

    #[test]
    fn loans_never_take_the_last_of_it() {
        let pool = Pool::new(64 * BLOCK);
        let mut budget = Budget::new(pool, 64 * BLOCK);
        for _ in 0..1000 {
            budget.lend(BLOCK);
        }
        assert!(budget.used() <= 32 * BLOCK, "half is for reservations");
        assert!(budget.reserve(32 * BLOCK));
    }
}
