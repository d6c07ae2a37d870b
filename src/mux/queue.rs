use std::collections::VecDeque;

/// Slab keys in the order they came, each at most once, so the queue is never longer than the
/// slab. A key whose exchange has gone stays until its turn; an exchange that is put into that
/// place meanwhile has the turn instead.
#[derive(Debug, Default)]
pub(super) struct IndexQueue {
    order: VecDeque<usize>,
    /// By slab key, whether it is in `order`.
    queued: Vec<bool>,
}

impl IndexQueue {
    pub(super) fn push(&mut self, index: usize) {
        if self.queued.len() <= index {
            self.queued.resize(index + 1, false);
        }
        if !std::mem::replace(&mut self.queued[index], true) {
            self.order.push_back(index);
        }
    }

    pub(super) fn pop(&mut self) -> Option<usize> {
        let index = self.order.pop_front()?;
        self.queued[index] = false;
        Some(index)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Forgets everything, and keeps memory for at most `keep` keys.
    pub(super) fn reset(&mut self, keep: usize) {
        self.order.clear();
        self.order.shrink_to(keep);
        self.queued.clear();
        self.queued.shrink_to(keep);
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn contains(&self, index: usize) -> bool {
        self.queued.get(index).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_queued_once_and_comes_out_in_order() {
        let mut queue = IndexQueue::default();
        for index in [3, 1, 3, 2, 1] {
            queue.push(index);
        }
        assert_eq!(queue.pop(), Some(3));
        queue.push(3);
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest, [1, 2, 3]);
    }
}
