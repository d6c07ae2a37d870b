//! Counters, kept per worker and summed when read.
//!
//! Each worker writes figures that no other worker's cache lines hold, with relaxed atomics;
//! nothing is ordered by them, and a scrape may see one figure a moment older than another.
//! A figure may be changed from any thread all the same: sums stay right, it only costs speed.
//!
//! No figure here carries an agent's id: one host holds thousands of agents, and a time series
//! for each of them and each figure would cost the one who stores them more than the proxy
//! costs its host. The live figures of one agent are [`AgentStats`]; the admin port shows them in
//! `GET /agents`.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// All figures of one server process.
#[derive(Debug)]
pub struct Metrics {
    /// One block for each worker; never empty.
    workers: Box<[WorkerMetrics]>,
    /// When the process started, for `silo_start_time_seconds`.
    started: SystemTime,
    /// Sessions welcomed.
    pub registrations: Counter,
    /// Agents turned away, by reason.
    pub rejections: Tally<Rejection, { Rejection::COUNT }>,
    /// Ports that couldn't be bound, mostly because another program holds them.
    pub bind_failures: Counter,
    /// Ports of the range by state. Set by the registry, the only writer.
    pub ports: PortGauges,
    /// Panics that were caught at the edge of a task, so that the process went on.
    pub panics: Counter,
}

/// The figures of one worker. The alignment keeps two workers off each other's cache lines;
/// 128 bytes because the CPU fetches lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerMetrics {
    /// Visitors' connections that a worker took.
    pub connections_accepted: Counter,
    /// Visitors' connections open now.
    pub connections_open: Gauge,
    /// Visitors' connections closed unserved, by reason.
    pub connections_refused: Tally<Refusal, { Refusal::COUNT }>,
    /// Requests whose head was read and accepted.
    pub requests: Counter,
    /// Exchanges between a request's head and the end of both directions.
    pub exchanges_open: Gauge,
    /// Answer heads written to visitors, by status class; the server's own answers included.
    pub answers: Tally<StatusClass, { StatusClass::COUNT }>,
    /// Exchanges that failed, by kind.
    pub failures: Tally<Failure, { Failure::COUNT }>,
    /// Bytes of request bodies read from visitors.
    pub body_bytes_in: Counter,
    /// Bytes of answer bodies written to visitors.
    pub body_bytes_out: Counter,
    /// Tunnels open now.
    pub tunnels_open: Gauge,
    /// gRPC messages sent to agents.
    pub messages_sent: Counter,
    /// gRPC messages received from agents.
    pub messages_received: Counter,
    /// Frames sent to agents.
    pub frames_sent: Counter,
    /// Frames received from agents.
    pub frames_received: Counter,
    /// Agents' connections that ended before a hello was understood, by reason.
    pub handshakes_failed: Tally<HandshakeFailure, { HandshakeFailure::COUNT }>,
}

impl Metrics {
    /// Figures for `workers` workers (at least one block is kept), all at zero.
    pub fn new(workers: usize, started: SystemTime) -> Arc<Self> {
        Arc::new(Self {
            workers: (0..workers.max(1))
                .map(|_| WorkerMetrics::default())
                .collect(),
            started,
            registrations: Counter::default(),
            rejections: Tally::default(),
            bind_failures: Counter::default(),
            ports: PortGauges::default(),
            panics: Counter::default(),
        })
    }

    /// The block of a worker. A number beyond the last worker shares a block with another one.
    pub fn worker(&self, index: usize) -> &WorkerMetrics {
        &self.workers[index % self.workers.len()]
    }

    /// The sum of one counter over all workers.
    pub fn sum(&self, counter: impl Fn(&WorkerMetrics) -> &Counter) -> u64 {
        self.workers
            .iter()
            .fold(0, |sum, worker| sum.wrapping_add(counter(worker).get()))
    }

    /// The sum of one gauge over all workers. What one worker opened another may have closed, so
    /// a single worker's gauge may be negative; the sum is not, but for a moment.
    pub fn level(&self, gauge: impl Fn(&WorkerMetrics) -> &Gauge) -> u64 {
        let sum: i64 = self.workers.iter().map(|worker| gauge(worker).get()).sum();
        sum.max(0).unsigned_abs()
    }
}

/// A number that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Counts `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// A number that grows and shrinks.
#[derive(Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// One more.
    pub fn inc(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// One less.
    pub fn dec(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    /// Exactly `value`.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// A small closed set of things that are counted apart.
pub trait Kind: Copy + 'static {
    /// All of them, in the order of [`Kind::index`].
    const ALL: &'static [Self];
    /// The place in [`Kind::ALL`].
    fn index(self) -> usize;
    /// The value of the label, in snake_case.
    fn as_str(self) -> &'static str;
}

/// One counter for each of `N` kinds.
pub struct Tally<K, const N: usize> {
    counters: [Counter; N],
    kind: PhantomData<fn(K)>,
}

impl<K: Kind, const N: usize> Tally<K, N> {
    /// Counts one of `kind`.
    pub fn inc(&self, kind: K) {
        self.counters[kind.index()].inc();
    }

    /// How many of `kind` were counted.
    pub fn get(&self, kind: K) -> u64 {
        self.counters[kind.index()].get()
    }
}

impl<K, const N: usize> Default for Tally<K, N> {
    fn default() -> Self {
        Self {
            counters: std::array::from_fn(|_| Counter::default()),
            kind: PhantomData,
        }
    }
}

impl<K: Kind, const N: usize> fmt::Debug for Tally<K, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(K::ALL.iter().map(|kind| (kind.as_str(), self.get(*kind))))
            .finish()
    }
}

/// How many ports of the range are in each state.
#[derive(Debug, Default)]
pub struct PortGauges([Gauge; PortState::COUNT]);

impl PortGauges {
    /// There are `count` ports in `state`.
    pub fn set(&self, state: PortState, count: usize) {
        self.0[state.index()].set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many ports are in `state`.
    pub fn get(&self, state: PortState) -> i64 {
        self.0[state.index()].get()
    }
}

/// Writes an enum whose members are counted apart, with the word each is shown by.
macro_rules! kinds {
    ($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$member_doc])* $member,)+
        }

        impl $name {
            /// How many members there are.
            pub const COUNT: usize = [$($word),+].len();

            /// The word that stands for it in labels, headers and logs.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$member => $word,)+
                }
            }
        }

        impl Kind for $name {
            const ALL: &'static [Self] = &[$(Self::$member),+];

            fn index(self) -> usize {
                self as usize
            }

            fn as_str(self) -> &'static str {
                self.as_str()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

kinds! {
    /// Why an exchange failed. The words of those that have an answer of their own stand in the
    /// answer's `X-Silo-Error` too.
    Failure {
        /// No agent behind the port now: it is leased, or the agent drains.
        AgentOffline = "agent_offline",
        /// The tunnel was lost before the answer's head.
        TunnelLost = "tunnel_lost",
        /// The local service refused the connection.
        UpstreamRefused = "upstream_refused",
        /// The local service broke its answer before the head was complete.
        UpstreamError = "upstream_error",
        /// The local service sent no head in time, or the request waited too long for a turn.
        UpstreamTimeout = "upstream_timeout",
        /// Too many exchanges or bytes in flight.
        Overloaded = "overloaded",
        /// The request line or the head is too large.
        HeadTooLarge = "head_too_large",
        /// The request's body is larger than `http.max_body`.
        BodyTooLarge = "body_too_large",
        /// The request is malformed or refused by the strict check.
        BadRequest = "bad_request",
        /// The answer was lost after its head; the visitor's connection was cut.
        CutAfterHead = "cut_after_head",
        /// The visitor left before the exchange was complete.
        VisitorLeft = "visitor_left",
    }
}

kinds! {
    /// Why a visitor's connection was closed unserved.
    Refusal {
        /// The limit of connections in all was reached.
        LimitTotal = "limit_total",
        /// The limit of connections to one agent was reached.
        LimitAgent = "limit_agent",
        /// The limit of connections from one address was reached.
        LimitAddress = "limit_address",
        /// The port belonged to nobody any more when the connection came.
        NoTenant = "no_tenant",
        /// The worker's queue of new connections was full.
        QueueFull = "queue_full",
        /// The process or the host had no file descriptor left.
        Descriptors = "descriptors",
    }
}

kinds! {
    /// Why an agent was turned away. The words are those of the rejection on the wire.
    Rejection {
        /// The credential is missing, wrong, or not good for this id.
        Auth = "auth",
        /// No port of the range is left.
        PortExhausted = "port_exhausted",
        /// Another session of the id stands.
        Duplicate = "duplicate",
        /// A newer session of the id took over.
        Replaced = "replaced",
        /// The server is shutting down.
        Draining = "draining",
        /// The agent speaks a version that the server doesn't.
        Version = "version",
        /// The hello can't be understood.
        Malformed = "malformed",
    }
}

kinds! {
    /// Why an agent's connection ended before a hello was understood.
    HandshakeFailure {
        /// The hello, or the TLS handshake before it, took too long.
        Timeout = "timeout",
        /// The TLS handshake failed.
        Tls = "tls",
        /// The bytes aren't HTTP/2 and gRPC.
        Protocol = "protocol",
        /// The peer closed the connection.
        Closed = "closed",
        /// Too many connections that hadn't authenticated yet.
        Limit = "limit",
    }
}

kinds! {
    /// The class of an answer's status code (RFC 9110, section 15).
    StatusClass {
        /// 100 to 199.
        Informational = "1xx",
        /// 200 to 299.
        Successful = "2xx",
        /// 300 to 399.
        Redirection = "3xx",
        /// 400 to 499.
        ClientError = "4xx",
        /// 500 and more; a code above 599 is treated as a server error (RFC 9110, section 15).
        ServerError = "5xx",
    }
}

impl StatusClass {
    /// The class of a status code.
    pub fn of(status: u16) -> Self {
        match status {
            0..=199 => Self::Informational,
            200..=299 => Self::Successful,
            300..=399 => Self::Redirection,
            400..=499 => Self::ClientError,
            500.. => Self::ServerError,
        }
    }
}

kinds! {
    /// What a port of the range is doing.
    PortState {
        /// Nobody's.
        Free = "free",
        /// Being bound for an agent.
        Opening = "opening",
        /// An agent's, with a session.
        Serving = "serving",
        /// An agent's, without a session for the time of the lease.
        Leased = "leased",
        /// Held by another program.
        Foreign = "foreign",
    }
}

/// The live figures of one agent's tenancy. Its session's worker writes them; the admin port reads
/// them when it writes an answer. They outlive a session that another of the same id replaces.
///
/// The alignment keeps two agents of different workers off one cache line; one costs 128 bytes.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct AgentStats {
    /// When anything was last received from the agent, in milliseconds since the UNIX epoch.
    last_seen_ms: AtomicU64,
    /// The last measured round trip through the tunnel in microseconds; 0 before the first.
    rtt_us: AtomicU64,
    /// Requests passed to the agent.
    pub requests: Counter,
    /// Exchanges open now.
    pub exchanges_open: Gauge,
    /// Visitors' connections to the agent's port open now.
    pub connections_open: Gauge,
    /// Bytes of request bodies read from visitors.
    pub bytes_in: Counter,
    /// Bytes of answer bodies written to visitors.
    pub bytes_out: Counter,
}

impl AgentStats {
    /// Figures at zero of an agent seen at `now`.
    pub fn new(now: SystemTime) -> Arc<Self> {
        let stats = Self::default();
        stats.seen(now);
        Arc::new(stats)
    }

    /// Something was received from the agent at `now`. A time before the UNIX epoch counts as it.
    pub fn seen(&self, now: SystemTime) {
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        self.last_seen_ms.store(ms, Relaxed);
    }

    /// When anything was last received from the agent, in milliseconds since the UNIX epoch.
    pub fn last_seen_ms(&self) -> u64 {
        self.last_seen_ms.load(Relaxed)
    }

    /// A round trip through the tunnel took `rtt`.
    pub fn measured_rtt(&self, rtt: Duration) {
        // Zero means "never measured", so a round trip is one microsecond at least.
        let us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1);
        self.rtt_us.store(us, Relaxed);
    }

    /// The last measured round trip, with a resolution of a microsecond.
    pub fn rtt(&self) -> Option<Duration> {
        match self.rtt_us.load(Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }
}
