//! Several processes with one agent id: who of them has it.
//!
//! The newest has it: whoever restarts an agent, or starts it on another host, wants that one to
//! serve. But the loser goes on trying, and if its next attempt counted as the newest, the two
//! would drive each other out for ever. So a process that has lost an id doesn't get it back
//! while the one that took it is connected.

use std::collections::VecDeque;

/// How many processes that lost an id are known: 1 KiB. With more of them than that the one that
/// lost first is forgotten, and counts as new when it comes again.
const LOSERS: usize = 64;

/// Names one process of an agent: random, chosen when it starts, the same in all its hellos.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instance([u8; 16]);

impl Instance {
    /// What a hello says. None if that is no instance; then nothing is known of the process.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// What a new session is to the one that its agent id has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Newcomer {
    /// The same process again: its older session is dead, though we haven't noticed.
    Reconnect,
    /// A process that hasn't had the id, or not against this one.
    Successor,
    /// A process that has lost the id to the one that is connected.
    Loser,
}

/// The processes that an agent id has been used by.
#[derive(Debug, Default)]
pub(super) struct Rivals {
    /// Who has the id, or had it last.
    holder: Option<Instance>,
    /// Who has lost it, the earliest first; never the holder.
    losers: VecDeque<Instance>,
}

impl Rivals {
    /// What a session of this process is to the holder's.
    pub(super) fn judge(&self, instance: Option<Instance>) -> Newcomer {
        match instance {
            Some(_) if instance == self.holder => Newcomer::Reconnect,
            Some(instance) if self.losers.contains(&instance) => Newcomer::Loser,
            _ => Newcomer::Successor,
        }
    }

    /// Forgets who has lost the id: what counted against them may not count any more.
    pub(super) fn pardon(&mut self) {
        self.losers.clear();
    }

    /// Makes a process the holder; the former holder has lost.
    pub(super) fn admit(&mut self, instance: Option<Instance>) {
        let former = std::mem::replace(&mut self.holder, instance);
        self.losers.retain(|loser| Some(*loser) != instance);
        if let Some(former) = former
            && Some(former) != instance
        {
            if self.losers.len() == LOSERS {
                self.losers.pop_front();
            }
            self.losers.push_back(former);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(number: u8) -> Option<Instance> {
        Instance::read(&[number; 16])
    }

    #[test]
    fn the_newest_process_has_the_id_and_keeps_it() {
        let mut rivals = Rivals::default();
        assert_eq!(rivals.judge(instance(1)), Newcomer::Successor);
        rivals.admit(instance(1));
        assert_eq!(rivals.judge(instance(1)), Newcomer::Reconnect);
        for newer in 2..=10 {
            assert_eq!(rivals.judge(instance(newer)), Newcomer::Successor);
            rivals.admit(instance(newer));
            for older in 1..newer {
                assert_eq!(rivals.judge(instance(older)), Newcomer::Loser);
            }
        }
        assert_eq!(rivals.judge(instance(10)), Newcomer::Reconnect);
    }

    #[test]
    fn a_loser_that_gets_the_id_in_the_holders_absence_has_it() {
        let mut rivals = Rivals::default();
        rivals.admit(instance(1));
        rivals.admit(instance(2));
        rivals.admit(instance(1));
        assert_eq!(rivals.judge(instance(1)), Newcomer::Reconnect);
        assert_eq!(rivals.judge(instance(2)), Newcomer::Loser);
    }

    #[test]
    fn of_a_process_without_an_instance_nothing_is_known() {
        assert_eq!(Instance::read(b""), None);
        assert_eq!(Instance::read(&[0; 17]), None);
        let mut rivals = Rivals::default();
        rivals.admit(None);
        assert_eq!(rivals.judge(None), Newcomer::Successor);
        rivals.admit(instance(1));
        rivals.admit(None);
        assert_eq!(rivals.judge(None), Newcomer::Successor);
        assert_eq!(rivals.judge(instance(1)), Newcomer::Loser);
    }

    #[test]
    fn what_is_known_of_losers_is_bounded() {
        let mut rivals = Rivals::default();
        for number in 0..=LOSERS as u8 + 1 {
            rivals.admit(instance(number));
        }
        assert_eq!(rivals.losers.len(), LOSERS);
        assert_eq!(rivals.judge(instance(0)), Newcomer::Successor);
        assert_eq!(rivals.judge(instance(1)), Newcomer::Loser);
    }
}
