//! Which worker a new tunnel goes to.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A thread that is on a core all the time, in the unit of [`Load`] and [`Meter`].
const WHOLE: u32 = 1_000_000;

/// How many looks at a thread's time its share goes by, about: at two a second, four seconds. A
/// burst of requests doesn't decide, a download does.
const LOOKS: i64 = 8;

/// What a worker has to do. A tunnel stays on its worker, so this decides only where new ones go.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Tunnel connections, welcomed or not. The accept task counts them in, so that those which
    /// come at once are spread without waiting for what they will need; each counts itself out.
    tunnels: AtomicUsize,
    /// The share of a core that the thread had of late, in millionths. Written by the worker's
    /// sweep, read by the accept task.
    busy: AtomicU32,
}

impl Load {
    /// So many tunnel connections go to this worker.
    pub(super) fn add(&self, tunnels: usize) {
        self.tunnels.fetch_add(tunnels, Relaxed);
    }

    /// So many of them are no more.
    pub(super) fn remove(&self, tunnels: usize) {
        self.tunnels.fetch_sub(tunnels, Relaxed);
    }

    /// How many tunnel connections it has.
    #[cfg(test)]
    pub(super) fn tunnels(&self) -> usize {
        self.tunnels.load(Relaxed)
    }

    /// The thread's share of a core, as a [`Meter`] tells it.
    pub(super) fn set_busy(&self, share: u32) {
        self.busy.store(share, Relaxed);
    }
}

/// The worker that new tunnels go to: the one with the least sum of its share of a core and its
/// share of all tunnels.
///
/// Going by load alone, a crowd that comes between two looks would meet on one worker, and an idle
/// server would go by noise; going by count alone, one busy agent would be as good as one that
/// nobody visits. In the sum a worker that is on a core all the time has taken as much as one with
/// all tunnels; small differences of load matter little, and every new tunnel counts at once.
pub(super) fn least_loaded(loads: &[Load]) -> usize {
    let figures: Vec<_> = loads
        .iter()
        .map(|load| (load.busy.load(Relaxed), load.tunnels.load(Relaxed)))
        .collect();
    choose(&figures)
}

/// The index of the least of `(share of a core, tunnels)`; the first of equals.
fn choose(loads: &[(u32, usize)]) -> usize {
    let all: u128 = loads.iter().map(|(_, tunnels)| *tunnels as u128).sum();
    let weight = |(busy, tunnels): (u32, usize)| {
        // Both shares times all tunnels, which leaves nothing to round.
        u128::from(busy) * all + u128::from(WHOLE) * tunnels as u128
    };
    (0..loads.len())
        .min_by_key(|index| weight(loads[*index]))
        .unwrap_or(0)
}

/// Turns what a thread has used of a core by now into the share that it has had of late.
#[derive(Debug, Default)]
pub(super) struct Meter {
    /// The last look: when, and what had been used by then.
    last: Option<(Instant, Duration)>,
    share: u32,
}

impl Meter {
    /// The share of a core in millionths, old looks counting less and less. `used` is the
    /// processor time of the thread since its start, the kernel's work for it included.
    pub(super) fn look(&mut self, now: Instant, used: Duration) -> u32 {
        if let Some((then, before)) = self.last.replace((now, used)) {
            let elapsed = now.saturating_duration_since(then).as_nanos().max(1);
            let used = used.saturating_sub(before).as_nanos();
            let share = (used * u128::from(WHOLE) / elapsed).min(u128::from(WHOLE)) as i64;
            let step = (share - i64::from(self.share)) / LOOKS;
            self.share = (i64::from(self.share) + step) as u32;
        }
        self.share
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Where so many tunnels go that come one after the other, before anything is known of them.
    fn spread(mut loads: Vec<(u32, usize)>, tunnels: usize) -> Vec<usize> {
        let mut came = vec![0; loads.len()];
        for _ in 0..tunnels {
            let index = choose(&loads);
            loads[index].1 += 1;
            came[index] += 1;
        }
        came
    }

    #[test]
    fn a_crowd_is_spread_evenly() {
        assert_eq!(spread(vec![(0, 0); 4], 8_000), [2_000; 4]);
        // An idle server's noise moves a few of thousands.
        let came = spread(vec![(2_000, 0), (4_000, 0)], 8_000);
        assert!(came[0].abs_diff(came[1]) <= 20, "{came:?}");
    }

    #[test]
    fn new_tunnels_avoid_a_busy_worker() {
        // One agent that takes a whole core, and one that nobody visits.
        assert_eq!(choose(&[(WHOLE, 1), (0, 1)]), 1);
        assert_eq!(spread(vec![(WHOLE, 1), (0, 1)], 100), [0, 100]);
        // Half a core is worth half of all tunnels.
        assert_eq!(spread(vec![(WHOLE / 2, 0), (0, 0)], 1_000), [250, 750]);
        // All busy alike: the count decides.
        assert_eq!(choose(&[(WHOLE, 3), (WHOLE, 2)]), 1);
        assert_eq!(choose(&[(0, 5)]), 0);
        assert_eq!(choose(&[]), 0);
    }

    #[test]
    fn tunnels_are_counted_on_their_worker() {
        let loads = [Load::default(), Load::default()];
        loads[0].add(2);
        assert_eq!(least_loaded(&loads), 1);
        loads[1].add(2);
        loads[1].set_busy(WHOLE / 10);
        assert_eq!(least_loaded(&loads), 0);
        loads[1].remove(1);
        assert_eq!(least_loaded(&loads), 1);
    }

    #[test]
    fn a_share_follows_what_a_thread_does() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let mut used = Duration::ZERO;
        let mut look = |second: u64, busy_ms: u64| {
            used += Duration::from_millis(busy_ms);
            meter.look(start + Duration::from_secs(second), used)
        };
        // What was before the first look doesn't count.
        assert_eq!(look(0, 5_000), 0);
        let one = look(1, 1_000);
        assert_eq!(one, WHOLE / LOOKS as u32);
        let many = (2..60).map(|second| look(second, 1_000)).last();
        assert!(
            many.is_some_and(|share| share > WHOLE / 100 * 99),
            "{many:?}"
        );
        let idle = (60..120).map(|second| look(second, 0)).last();
        assert!(idle.is_some_and(|share| share < WHOLE / 100), "{idle:?}");
    }

    proptest! {
        /// The chosen one is never beaten in both by another.
        #[test]
        fn nobody_has_less_of_both(
            loads in proptest::collection::vec((0..=WHOLE, 0_usize..60_000), 1..20),
        ) {
            let chosen = loads[choose(&loads)];
            prop_assert!(!loads.iter().any(|load| load.0 < chosen.0 && load.1 < chosen.1));
        }

        /// However odd the clocks, a share is a share.
        #[test]
        fn a_share_stays_within_a_core(
            looks in proptest::collection::vec((0_u64..2_000, 0_u64..5_000), 1..50),
        ) {
            let (mut now, mut used, mut meter) = (Instant::now(), Duration::ZERO, Meter::default());
            for (elapsed, more) in looks {
                now += Duration::from_millis(elapsed);
                used += Duration::from_millis(more);
                prop_assert!(meter.look(now, used) <= WHOLE);
            }
        }
    }
}
