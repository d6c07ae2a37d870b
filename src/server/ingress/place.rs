//! A visitor's connection as others see it: its place among those that are allowed, and what it
//! waits for.
//!
//! No connection has a timer. Each notes in [`Watched`] what it is waiting for and since when, in
//! ticks of its worker's coarse clock, and the worker's sweep looks at all of them twice a second.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use futures_util::task::AtomicWaker;

use crate::config::HttpConfig;
use crate::metrics::{Failure, Refusal, StatusClass};
use crate::server::tenancy::Tenancy;
use crate::server::worker::{Shared, TICK, Worker};

/// A visitor's place among the connections that are allowed, to be given back.
pub(super) struct Place {
    pub(super) worker: Arc<Worker>,
    pub(super) tenancy: Arc<Tenancy>,
    pub(super) watched: Arc<Watched>,
    key: usize,
    /// The address it is counted under, if those were limited when it came.
    address: Option<IpAddr>,
    /// A request is being served, and counts.
    serves: bool,
}

impl Place {
    pub(super) fn take(
        worker: &Arc<Worker>,
        tenancy: &Arc<Tenancy>,
        address: IpAddr,
    ) -> Result<Self, Refusal> {
        let shared = worker.shared();
        let config = shared.config();
        let limits = &config.http;
        let watched = Watched::new(tenancy.clone(), worker.now());
        let all = shared.visitors.fetch_add(1, Relaxed);
        tenancy.stats.connections_open.inc();
        worker.metrics().connections_open.inc();
        let address = limits.max_connections_per_address.map(|_| address);
        let of_address = address.map_or(0, |address| count_address(shared, address));
        // From here on dropping it undoes the counting.
        let place = Self {
            worker: worker.clone(),
            tenancy: tenancy.clone(),
            key: worker.watch(watched.clone()),
            watched,
            address,
            serves: false,
        };
        let of_agent = usize::try_from(tenancy.stats.connections_open.get()).unwrap_or(0);
        if all >= limits.max_connections {
            Err(Refusal::LimitTotal)
        } else if of_agent > limits.max_connections_per_agent {
            Err(Refusal::LimitAgent)
        } else if limits
            .max_connections_per_address
            .is_some_and(|limit| of_address > limit)
        {
            Err(Refusal::LimitAddress)
        } else {
            Ok(place)
        }
    }

    /// The beginning of a head has come.
    pub(super) fn head_begins(&self) {
        if self.watched.phase() != Phase::Head {
            self.watched.enter(Phase::Head, self.worker.now());
        }
    }

    /// A request is being served, until [`Place::exchange_ends`].
    pub(super) fn exchange_begins(&mut self) {
        self.serves = true;
        count_begin(&self.worker, &self.tenancy);
        self.watched.enter(Phase::Exchange, self.worker.now());
    }

    /// The request has been served, or not.
    pub(super) fn exchange_ends(&mut self) {
        self.serves = false;
        count_end(&self.worker, &self.tenancy);
        self.watched.enter(Phase::Idle, self.worker.now());
    }

    /// No request is being served, on a connection that serves several at once.
    pub(super) fn rests(&self) {
        if self.watched.phase() != Phase::Idle {
            self.watched.enter(Phase::Idle, self.worker.now());
        }
    }

    /// One request of several begins that the connection serves at once.
    pub(super) fn part_begins(&self) -> Part {
        count_begin(&self.worker, &self.tenancy);
        self.watched.enter(Phase::Exchange, self.worker.now());
        let watched = Watched::new(self.tenancy.clone(), self.worker.now());
        watched.enter(Phase::Exchange, self.worker.now());
        Part {
            key: self.worker.watch(watched.clone()),
            worker: self.worker.clone(),
            tenancy: self.tenancy.clone(),
            watched,
        }
    }

    /// See [`Watched::reading`].
    pub(super) fn reading(&self, awaited: bool) {
        self.watched.reading(awaited, self.worker.now());
    }

    /// See [`Watched::writing`].
    pub(super) fn writing(&self, blocked: bool) {
        self.watched.writing(blocked, self.worker.now());
    }

    /// Counts bytes of a request's body.
    pub(super) fn count_in(&self, bytes: usize) {
        self.worker.metrics().body_bytes_in.add(bytes as u64);
        self.tenancy.stats.bytes_in.add(bytes as u64);
    }

    /// Counts bytes of an answer's body.
    pub(super) fn count_out(&self, bytes: usize) {
        self.worker.metrics().body_bytes_out.add(bytes as u64);
        self.tenancy.stats.bytes_out.add(bytes as u64);
    }

    /// Counts an answer.
    pub(super) fn answered(&self, status: u16) {
        let metrics = self.worker.metrics();
        metrics.answers.inc(StatusClass::of(status));
    }

    /// Counts a failure.
    pub(super) fn failed(&self, failure: Failure) {
        self.worker.metrics().failures.inc(failure);
    }
}

/// One request of several that a connection serves at once, and what it waits for: the sweep looks
/// at each apart from the others. It counts as under way until it is dropped.
pub(super) struct Part {
    pub(super) worker: Arc<Worker>,
    tenancy: Arc<Tenancy>,
    pub(super) watched: Arc<Watched>,
    key: usize,
}

impl Part {
    /// See [`Watched::reading`].
    pub(super) fn reading(&self, awaited: bool) {
        self.watched.reading(awaited, self.worker.now());
    }

    /// See [`Watched::writing`].
    pub(super) fn writing(&self, blocked: bool) {
        self.watched.writing(blocked, self.worker.now());
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.worker.unwatch(self.key);
        count_end(&self.worker, &self.tenancy);
    }
}

fn count_begin(worker: &Worker, tenancy: &Tenancy) {
    let metrics = worker.metrics();
    metrics.requests.inc();
    metrics.exchanges_open.inc();
    tenancy.stats.requests.inc();
    tenancy.stats.exchanges_open.inc();
}

fn count_end(worker: &Worker, tenancy: &Tenancy) {
    worker.metrics().exchanges_open.dec();
    tenancy.stats.exchanges_open.dec();
}

/// Notes since when something is waited for, or that it isn't.
fn since(place: &AtomicU32, waits: bool, now: u32) {
    if !waits {
        place.store(0, Relaxed);
    } else if place.load(Relaxed) == 0 {
        place.store(now, Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.serves {
            // The task was cut off, by a panic or with its runtime.
            self.exchange_ends();
        }
        let shared = self.worker.shared();
        self.worker.unwatch(self.key);
        shared.visitors.fetch_sub(1, Relaxed);
        self.tenancy.stats.connections_open.dec();
        self.worker.metrics().connections_open.dec();
        if let Some(address) = &self.address {
            shared.addresses.remove_if_mut(address, |_, count| {
                *count = count.saturating_sub(1);
                *count == 0
            });
        }
    }
}

/// Counts one more connection from an address, and says how many there are.
fn count_address(shared: &Shared, address: IpAddr) -> usize {
    let mut count = shared.addresses.entry(address).or_default();
    *count += 1;
    *count
}

/// What a connection waits for, as the worker's sweep sees it. Times are in [`TICK`]s of the
/// worker's clock; 0 stands for "not waiting".
///
/// All of it is written by the connection's task but for `order` and `look`, which are the
/// sweep's, and nothing else is ordered by it: hence relaxed.
#[derive(Debug)]
pub(in crate::server) struct Watched {
    tenancy: Arc<Tenancy>,
    phase: AtomicU8,
    phase_since: AtomicU32,
    /// Waiting for the next bytes of a body that can be passed on.
    reading_since: AtomicU32,
    /// Waiting for the visitor to take bytes.
    writing_since: AtomicU32,
    /// The task doesn't read, because what has come can't be passed on yet: only a look at the
    /// socket tells that the visitor left.
    unread: AtomicBool,
    /// The sweep asks for that look.
    look: AtomicBool,
    /// What the sweep wants of the task.
    order: AtomicU8,
    pub(super) task: AtomicWaker,
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Accepted; nothing has come yet.
    Fresh,
    /// The beginning of a head has come.
    Head,
    /// A request is being served.
    Exchange,
    /// Between two requests.
    Idle,
}

impl Phase {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Fresh,
            1 => Self::Head,
            2 => Self::Exchange,
            _ => Self::Idle,
        }
    }
}

/// What the sweep wants of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    None,
    /// To end after what it is doing.
    WindDown,
    /// To end now.
    Cut,
}

impl Watched {
    fn new(tenancy: Arc<Tenancy>, now: u32) -> Arc<Self> {
        Arc::new(Self {
            tenancy,
            phase: AtomicU8::new(Phase::Fresh as u8),
            phase_since: AtomicU32::new(now),
            reading_since: AtomicU32::new(0),
            writing_since: AtomicU32::new(0),
            unread: AtomicBool::new(false),
            look: AtomicBool::new(false),
            order: AtomicU8::new(Order::None as u8),
            task: AtomicWaker::new(),
        })
    }

    /// The connection does something else from `now` on.
    fn enter(&self, phase: Phase, now: u32) {
        self.phase.store(phase as u8, Relaxed);
        self.phase_since.store(now, Relaxed);
    }

    /// Whether bytes of a body are awaited. Bytes that came begin the time anew.
    fn reading(&self, awaited: bool, now: u32) {
        since(&self.reading_since, awaited, now);
    }

    /// Whether bytes wait for the visitor to take them. Bytes he took begin the time anew.
    fn writing(&self, blocked: bool, now: u32) {
        since(&self.writing_since, blocked, now);
    }

    /// The visitor has taken bytes: if more wait, the time begins anew.
    pub(super) fn took(&self, now: u32) {
        if self.writing_since.load(Relaxed) != 0 {
            self.writing_since.store(now, Relaxed);
        }
    }

    fn phase(&self) -> Phase {
        Phase::of(self.phase.load(Relaxed))
    }

    /// Whether what comes is left unread for now.
    pub(super) fn holding_back(&self, unread: bool) {
        self.unread.store(unread, Relaxed);
    }

    /// Whether the sweep has asked for a look at the socket since the last time.
    pub(super) fn take_look(&self) -> bool {
        self.look.load(Relaxed) && self.look.swap(false, Relaxed)
    }

    pub(super) fn ordered(&self) -> Order {
        match self.order.load(Relaxed) {
            0 => Order::None,
            1 => Order::WindDown,
            _ => Order::Cut,
        }
    }

    /// The sweep's look at the connection.
    pub(in crate::server) fn inspect(&self, now: u32, limits: &HttpConfig) {
        if self.tenancy.is_over() {
            self.wind_down();
        }
        let since = self.phase_since.load(Relaxed);
        let late = match self.phase() {
            Phase::Fresh | Phase::Head => is_late(now, since, limits.head_timeout),
            Phase::Idle => is_late(now, since, limits.idle_timeout),
            Phase::Exchange => false,
        };
        let waits = |since: &AtomicU32, limit| match since.load(Relaxed) {
            0 => false,
            since => is_late(now, since, limit),
        };
        if late
            || waits(&self.reading_since, limits.body_timeout)
            || waits(&self.writing_since, limits.send_timeout)
        {
            self.order(Order::Cut);
        } else if self.unread.load(Relaxed) && !self.look.swap(true, Relaxed) {
            self.task.wake();
        }
    }

    /// Has the connection end after what it is doing; at once, if it is doing nothing.
    pub(in crate::server) fn wind_down(&self) {
        self.order(match self.phase() {
            Phase::Exchange => Order::WindDown,
            Phase::Fresh | Phase::Head | Phase::Idle => Order::Cut,
        });
    }

    fn order(&self, order: Order) {
        if self.order.fetch_max(order as u8, Relaxed) < order as u8 {
            self.task.wake();
        }
    }
}

fn is_late(now: u32, since: u32, limit: Duration) -> bool {
    // One tick more, as the tick in which waiting began counts in full.
    let ticks = limit.as_millis().div_ceil(TICK.as_millis()) + 1;
    u128::from(now.wrapping_sub(since)) >= ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kept_to_a_tick() {
        let limit = Duration::from_secs(10);
        let ticks = 20;
        assert!(!is_late(100 + ticks, 100, limit));
        assert!(is_late(100 + ticks + 1, 100, limit));
        // The clock may wrap.
        assert!(is_late(5, u32::MAX - 20, limit));
        assert!(!is_late(5, u32::MAX, limit));
    }
}
