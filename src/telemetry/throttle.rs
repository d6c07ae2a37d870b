//! What strangers can make us log, and how often.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::id::AgentId;

/// How often the same is said at most.
const INTERVAL: Duration = Duration::from_secs(60);

/// How long what was said is remembered, so that its repetitions can be counted.
const MEMORY: Duration = Duration::from_secs(120);

/// How many lines are said in any second, for all strangers together.
const PER_SECOND: usize = 10;

/// Whom a line is about: the same line about another one isn't a repetition.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    /// Nobody in particular.
    Anybody,
    /// Who claims this id.
    Agent(AgentId),
    /// Who comes from this address.
    Address(IpAddr),
    /// Who uses this port.
    Port(u16),
}

impl From<u16> for Who {
    fn from(port: u16) -> Self {
        Self::Port(port)
    }
}

impl From<&AgentId> for Who {
    fn from(id: &AgentId) -> Self {
        Self::Agent(id.clone())
    }
}

impl From<IpAddr> for Who {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

/// The word to say a line, and what wasn't said before it.
///
/// Both are fields for that line; an empty one isn't written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use = "the line is to be said"]
pub struct Told {
    /// The same lines about the same one that were left out since the last one.
    pub repeated: Option<u64>,
    /// Lines about others that were left out for being too many.
    pub others: Option<u64>,
}

/// Decides which of the lines that strangers cause are said: the first of a kind about somebody
/// at once, then one a minute; ten a second in all.
///
/// It remembers what was said for two minutes only, so it holds `PER_SECOND` times that many
/// seconds at most, 1,200 entries. Repetitions that nothing followed are counted among the others
/// when they are forgotten, so every line left out is counted in one that is said.
#[derive(Debug, Default)]
pub struct Throttle {
    said: HashMap<Key, Said>,
    /// What was said when, oldest first. What has been said again stands here twice.
    order: VecDeque<(Duration, Key)>,
    /// Lines left out that belong to no entry.
    others: u64,
}

/// What a line says, hashed, as the text may be long; and about whom.
type Key = (u64, Who);

#[derive(Debug)]
struct Said {
    at: Duration,
    repeated: u64,
}

impl Throttle {
    /// Asks for the word to say `what` about `who`. `now` counts from any fixed moment and doesn't
    /// go back.
    pub fn ask(&mut self, what: &str, who: Who, now: Duration) -> Option<Told> {
        self.forget(now);
        let second_full = self
            .order
            .len()
            .checked_sub(PER_SECOND)
            .and_then(|index| self.order.get(index))
            .is_some_and(|(at, _)| now.saturating_sub(*at) < Duration::from_secs(1));
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        let key = (hasher.finish(), who);
        let repeated = match self.said.get_mut(&key) {
            Some(said) if second_full || now.saturating_sub(said.at) < INTERVAL => {
                said.repeated += 1;
                return None;
            }
            Some(said) => said.repeated,
            None if second_full => {
                self.others += 1;
                return None;
            }
            None => 0,
        };
        self.order.push_back((now, key.clone()));
        let said = Said {
            at: now,
            repeated: 0,
        };
        self.said.insert(key, said);
        let count = |count: u64| Some(count).filter(|count| *count > 0);
        Some(Told {
            repeated: count(repeated),
            others: count(std::mem::take(&mut self.others)),
        })
    }

    fn forget(&mut self, now: Duration) {
        while let Some((at, _)) = self.order.front()
            && now.saturating_sub(*at) >= MEMORY
            && let Some((at, key)) = self.order.pop_front()
        {
            if self.said.get(&key).is_some_and(|said| said.at == at)
                && let Some(said) = self.said.remove(&key)
            {
                self.others += said.repeated;
            }
        }
    }
}

/// Asks for the word to log `text` about `who`, which a stranger has caused; the text is news when
/// it changes, but for the digits in it, which may be a clock's. Each `kind` of line has a
/// [`Throttle`] of its own for the whole process, so that a flood of one kind hides no other.
pub fn may_say(kind: &'static str, text: &str, who: impl Into<Who>) -> Option<Told> {
    type ByKind = HashMap<&'static str, Throttle>;
    /// Held for a look-up, by whoever has turned a stranger away.
    static THROTTLES: LazyLock<(Instant, Mutex<ByKind>)> =
        LazyLock::new(|| (Instant::now(), Mutex::default()));
    let (epoch, throttles) = &*THROTTLES;
    let now = epoch.elapsed();
    let text: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
    let mut throttles = throttles.lock().unwrap_or_else(PoisonError::into_inner);
    throttles
        .entry(kind)
        .or_default()
        .ask(&text, who.into(), now)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(repeated: u64, others: u64) -> Option<Told> {
        let count = |count: u64| Some(count).filter(|count| *count > 0);
        Some(Told {
            repeated: count(repeated),
            others: count(others),
        })
    }

    fn second(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_first_is_said_at_once_and_then_one_a_minute_with_the_rest_counted() {
        let mut throttle = Throttle::default();
        let mut ask = |at| throttle.ask("auth", Who::Port(1), second(at));
        assert_eq!(ask(0), told(0, 0));
        assert_eq!((ask(1), ask(59)), (None, None));
        assert_eq!(ask(60), told(2, 0));
        assert_eq!(ask(119), None);
        assert_eq!(ask(120), told(1, 0));
        assert_eq!(ask(400), told(0, 0));
    }

    #[test]
    fn another_kind_or_another_one_is_no_repetition() {
        let mut throttle = Throttle::default();
        let address = IpAddr::from([127, 0, 0, 1]);
        let id: AgentId = "a".parse().unwrap();
        for kind in ["auth", "version"] {
            for who in [Who::Anybody, Who::Port(1), Who::from(&id), address.into()] {
                assert_eq!(throttle.ask(kind, who, second(0)), told(0, 0));
            }
        }
    }

    #[test]
    fn many_strangers_together_get_ten_lines_a_second() {
        let mut throttle = Throttle::default();
        let flood = |throttle: &mut Throttle, at| {
            (0..1000)
                .filter(|port| throttle.ask("auth", Who::Port(*port), at).is_some())
                .count()
        };
        assert_eq!(flood(&mut throttle, second(0)), PER_SECOND);
        assert_eq!(flood(&mut throttle, Duration::from_millis(999)), 0);
        // Of the first ten, the repetitions; of the rest, all.
        assert_eq!(throttle.ask("x", Who::Anybody, second(1)), told(0, 2 * 990));
        // A minute later the ten have their say again, each with its repetition.
        assert_eq!(throttle.ask("auth", Who::Port(0), second(60)), told(1, 0));
        // The other nine are forgotten, and counted.
        assert_eq!(throttle.ask("y", Who::Anybody, second(200)), told(0, 9));
    }

    proptest! {
        #[test]
        fn never_more_than_allowed_and_nothing_uncounted(
            asked in prop::collection::vec((0_u16..40, 0_u64..20_000), 1..2000),
        ) {
            let mut throttle = Throttle::default();
            let mut now = Duration::ZERO;
            let mut lines: Vec<(Duration, u16)> = Vec::new();
            let (mut asks, mut counted) = (0, 0);
            for (port, wait) in asked {
                // Mostly close to each other, seldom far.
                now += Duration::from_millis(if wait < 19_000 { wait / 100 } else { wait });
                asks += 1;
                if let Some(told) = throttle.ask("auth", Who::Port(port), now) {
                    lines.push((now, port));
                    counted += 1 + told.repeated.unwrap_or(0) + told.others.unwrap_or(0);
                }
                let memory = throttle.said.len().max(throttle.order.len());
                prop_assert!(memory <= PER_SECOND * MEMORY.as_secs() as usize);
            }
            for window in lines.windows(PER_SECOND + 1) {
                prop_assert!(window[PER_SECOND].0 - window[0].0 >= Duration::from_secs(1));
            }
            for (index, (at, port)) in lines.iter().enumerate() {
                let next = lines[index + 1..].iter().find(|(_, other)| other == port);
                prop_assert!(next.is_none_or(|(next, _)| *next - *at >= INTERVAL));
            }
            let left: u64 = throttle.said.values().map(|said| said.repeated).sum();
            prop_assert_eq!(asks, counted + left + throttle.others);
        }
    }
}
