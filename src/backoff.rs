//! How long to wait before trying again.

use std::time::Duration;

/// Waits that double, each drawn at random from the whole range up to its ceiling.
///
/// Drawing from the whole range ("full jitter") spreads thousands of agents, cut off at the same
/// moment, evenly over the wait, instead of sending them back in waves. When to [`reset`] is the
/// caller's decision: a connection that is accepted and dropped at once is no success.
///
/// [`reset`]: Backoff::reset
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    /// The longest the next wait may be; always within `min..=max`.
    ceiling: Duration,
}

impl Backoff {
    /// A first wait of at most `min`, then of at most twice as long each time, up to `max`.
    ///
    /// A `max` below `min` counts as `min`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max: max.max(min),
            ceiling: min,
        }
    }

    /// The next wait. `random` is uniform over all of `u64`: 0 gives no wait, `u64::MAX` the ceiling.
    pub fn next(&mut self, random: u64) -> Duration {
        let ceiling = self.ceiling;
        self.ceiling = ceiling.saturating_mul(2).min(self.max);
        share_of(ceiling, random)
    }

    /// Starts again from the shortest wait.
    pub fn reset(&mut self) {
        self.ceiling = self.min;
    }
}

impl Default for Backoff {
    /// 0.2 s doubling to 20 s: a restart of the server is bridged within a second, and 10,000
    /// agents that can't reach it cost it about 1,000 attempts a second.
    fn default() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(20))
    }
}

/// `ceiling` times `random / u64::MAX`, exact to the nanosecond.
fn share_of(ceiling: Duration, random: u64) -> Duration {
    // Seconds and nanoseconds apart: the product of all nanoseconds and a u64 can exceed u128.
    let scale = |amount: u128| amount * u128::from(random);
    let whole = u128::from(u64::MAX);
    let seconds = scale(u128::from(ceiling.as_secs()));
    let rest = (seconds % whole) * 1_000_000_000 + scale(u128::from(ceiling.subsec_nanos()));
    // Both quotients are at most those of `ceiling` itself, so they fit.
    Duration::from_secs((seconds / whole) as u64) + Duration::from_nanos((rest / whole) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn the_ceiling_doubles_from_min_to_max() {
        let mut backoff = Backoff::new(200 * MILLI, 20_000 * MILLI);
        let ceilings = [
            200, 400, 800, 1_600, 3_200, 6_400, 12_800, 20_000, 20_000, 20_000,
        ];
        for ceiling in ceilings {
            assert_eq!(backoff.next(u64::MAX), ceiling * MILLI);
        }
        assert_eq!(
            Backoff::default(),
            Backoff::new(200 * MILLI, 20_000 * MILLI)
        );
    }

    #[test]
    fn jitter_covers_the_whole_range() {
        for (random, wait) in [
            (0, 0),
            (u64::MAX / 4, 49),
            (u64::MAX / 2, 99),
            (u64::MAX, 200),
        ] {
            let drawn = Backoff::new(200 * MILLI, 200 * MILLI).next(random);
            assert_eq!(drawn.as_millis(), wait, "{random}");
        }
    }

    #[test]
    fn reset_starts_again() {
        let mut backoff = Backoff::new(MILLI, 100 * MILLI);
        for _ in 0..5 {
            backoff.next(0);
        }
        backoff.reset();
        assert_eq!(backoff.next(u64::MAX), MILLI);
    }

    #[test]
    fn a_max_below_min_counts_as_min() {
        let mut backoff = Backoff::new(10 * MILLI, MILLI);
        assert_eq!(backoff.next(u64::MAX), 10 * MILLI);
        assert_eq!(backoff.next(u64::MAX), 10 * MILLI);
    }

    proptest! {
        #[test]
        fn a_wait_is_never_above_its_ceiling(min: Duration, max: Duration, draws: Vec<u64>) {
            let mut backoff = Backoff::new(min, max);
            for random in draws {
                let ceiling = backoff.clone().next(u64::MAX);
                prop_assert!(ceiling >= min && ceiling <= max.max(min));
                prop_assert!(backoff.next(random) <= ceiling);
            }
        }
    }
}
