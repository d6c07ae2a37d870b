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

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

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
    /// Lines of the access log that were never written. Counted by its thread and by whoever
    /// finds its queue full.
    pub access_log_dropped: Arc<Counter>,
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
            access_log_dropped: Arc::default(),
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

    /// All figures as OpenMetrics text, to be sent as [`CONTENT_TYPE`].
    pub fn render(self: &Arc<Self>) -> String {
        let mut registry = Registry::with_prefix("silo");
        registry.register_collector(Box::new(Scrape(Arc::clone(self))));
        let mut text = String::with_capacity(16 * 1024);
        // Neither a `String` nor a figure above can fail to be written.
        let written = encode(&mut text, &registry);
        debug_assert!(written.is_ok());
        text
    }
}

/// Panics of this process so far, on whatever thread. Counted by the hook that
/// [`telemetry::init`](crate::telemetry::init) sets; without it they aren't.
pub static PANICS: Counter = Counter(AtomicU64::new(0));

/// The media type of [`Metrics::render`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

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
        /// The request is malformed, or refused by the strict check.
        BadRequest = "bad_request",
        /// The answer was lost after its head; the visitor's connection was cut.
        CutAfterHead = "cut_after_head",
        /// The visitor left before the exchange was complete, or stood still for longer than a
        /// limit of time allows.
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
        /// The agent's own port can't be bound now, or no descriptor is left for one.
        Unavailable = "unavailable",
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

/// Sums the figures at the moment they are asked for.
#[derive(Debug)]
struct Scrape(Arc<Metrics>);

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let metrics = &*self.0;
        let mut out = Exposition { encoder };
        out.build_info()?;
        let started = metrics.started.duration_since(UNIX_EPOCH);
        out.seconds(
            "start_time_seconds",
            "When the process started, in seconds since the UNIX epoch",
            started.unwrap_or_default().as_secs_f64(),
        )?;

        out.counter(
            "connections_accepted",
            "Visitor connections taken by a worker",
            metrics.sum(|worker| &worker.connections_accepted),
        )?;
        out.gauge(
            "connections_open",
            "Visitor connections open now",
            metrics.level(|worker| &worker.connections_open),
        )?;
        out.tally(
            "connections_refused",
            "Visitor connections closed unserved",
            "reason",
            |kind| metrics.sum_kind(kind, |worker| &worker.connections_refused),
        )?;
        out.counter(
            "requests",
            "Requests whose head was read and accepted",
            metrics.sum(|worker| &worker.requests),
        )?;
        out.gauge(
            "exchanges_open",
            "Requests in progress now",
            metrics.level(|worker| &worker.exchanges_open),
        )?;
        out.tally(
            "answers",
            "Answer heads written to visitors, by class of status code",
            "class",
            |kind| metrics.sum_kind(kind, |worker| &worker.answers),
        )?;
        out.tally("failures", "Requests that failed", "kind", |kind| {
            metrics.sum_kind(kind, |worker| &worker.failures)
        })?;
        out.counter(
            "body_bytes_in",
            "Bytes of request bodies read from visitors",
            metrics.sum(|worker| &worker.body_bytes_in),
        )?;
        out.counter(
            "body_bytes_out",
            "Bytes of answer bodies written to visitors",
            metrics.sum(|worker| &worker.body_bytes_out),
        )?;

        out.gauge(
            "tunnels_open",
            "Tunnels to agents open now",
            metrics.level(|worker| &worker.tunnels_open),
        )?;
        out.counter(
            "tunnel_messages_sent",
            "gRPC messages sent to agents",
            metrics.sum(|worker| &worker.messages_sent),
        )?;
        out.counter(
            "tunnel_messages_received",
            "gRPC messages received from agents",
            metrics.sum(|worker| &worker.messages_received),
        )?;
        out.counter(
            "tunnel_frames_sent",
            "Frames sent to agents",
            metrics.sum(|worker| &worker.frames_sent),
        )?;
        out.counter(
            "tunnel_frames_received",
            "Frames received from agents",
            metrics.sum(|worker| &worker.frames_received),
        )?;
        out.tally(
            "handshakes_failed",
            "Agent connections that ended before a hello was understood",
            "reason",
            |kind| metrics.sum_kind(kind, |worker| &worker.handshakes_failed),
        )?;

        out.counter(
            "registrations",
            "Agent sessions welcomed",
            metrics.registrations.get(),
        )?;
        out.tally("rejections", "Agents turned away", "reason", |kind| {
            metrics.rejections.get(kind)
        })?;
        out.counter(
            "port_bind_failures",
            "Attempts to bind a port of the range that failed",
            metrics.bind_failures.get(),
        )?;
        out.ports(&metrics.ports)?;
        out.counter("panics", "Panics of the process, each a bug", PANICS.get())?;
        out.counter(
            "access_log_dropped",
            "Lines of the access log that were never written",
            metrics.access_log_dropped.get(),
        )
    }
}

impl Metrics {
    fn sum_kind<K: Kind, const N: usize>(
        &self,
        kind: K,
        tally: impl Fn(&WorkerMetrics) -> &Tally<K, N>,
    ) -> u64 {
        self.sum(|worker| &tally(worker).counters[kind.index()])
    }
}

/// Writes metric families; the encoder adds the prefix, and `_total` to counters.
struct Exposition<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Exposition<'_> {
    fn build_info(&mut self) -> fmt::Result {
        let labels = [("version", env!("CARGO_PKG_VERSION"))];
        self.encoder
            .encode_descriptor("build", "The running program", None, MetricType::Info)?
            .encode_info(&labels)
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?
            .encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?
            .encode_gauge(&value)
    }

    /// One counter for each kind, at zero too, so that a rate has a start.
    fn tally<K: Kind>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        value: impl Fn(K) -> u64,
    ) -> fmt::Result {
        let mut family = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for &kind in K::ALL {
            family
                .encode_family(&[(label, kind.as_str())])?
                .encode_counter::<NoLabelSet, _, u64>(&value(kind), None)?;
        }
        Ok(())
    }

    fn ports(&mut self, ports: &PortGauges) -> fmt::Result {
        let help = "Ports of the range by state";
        let mut family = self
            .encoder
            .encode_descriptor("ports", help, None, MetricType::Gauge)?;
        for &state in PortState::ALL {
            family
                .encode_family(&[("state", state.as_str())])?
                .encode_gauge(&ports.get(state))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Arc<Metrics> {
        Metrics::new(2, UNIX_EPOCH + Duration::from_millis(1_500))
    }

    #[test]
    fn workers_are_summed_when_read() {
        let metrics = metrics();
        metrics.worker(0).requests.add(2);
        metrics.worker(1).requests.inc();
        metrics.worker(0).failures.inc(Failure::TunnelLost);
        metrics.worker(1).failures.inc(Failure::TunnelLost);
        metrics.worker(1).answers.inc(StatusClass::of(502));
        let text = metrics.render();
        for line in [
            "silo_requests_total 3",
            r#"silo_failures_total{kind="tunnel_lost"} 2"#,
            r#"silo_failures_total{kind="agent_offline"} 0"#,
            r#"silo_answers_total{class="5xx"} 1"#,
            "silo_start_time_seconds 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_gauge_may_rise_on_one_worker_and_fall_on_another() {
        let metrics = metrics();
        metrics.worker(0).connections_open.inc();
        metrics.worker(0).connections_open.inc();
        metrics.worker(1).connections_open.dec();
        assert_eq!(metrics.level(|worker| &worker.connections_open), 1);
        metrics.worker(1).connections_open.dec();
        metrics.worker(1).connections_open.dec();
        assert_eq!(metrics.level(|worker| &worker.connections_open), 0);
    }

    #[test]
    fn the_text_is_a_well_formed_exposition() {
        let metrics = metrics();
        metrics.ports.set(PortState::Serving, 7);
        metrics.rejections.inc(Rejection::PortExhausted);
        let text = metrics.render();
        assert!(text.ends_with("# EOF\n"));
        let mut family = "";
        let mut families = std::collections::HashSet::new();
        for line in text.lines().filter(|line| *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(families.insert(name), "{name} twice");
                assert!(
                    name.starts_with("silo_") && !name.ends_with("_total"),
                    "{name}"
                );
                assert!(!help.is_empty());
                family = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(rest.starts_with(family));
            } else {
                assert!(line.starts_with(family), "{line} outside of {family}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok());
            }
        }
        assert!(text.contains("silo_ports{state=\"serving\"} 7\n"));
        assert!(text.contains("silo_rejections_total{reason=\"port_exhausted\"} 1\n"));
        assert!(text.contains(concat!(
            "silo_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1\n"
        )));
    }

    #[test]
    fn kinds_stand_at_their_index() {
        fn check<K: Kind + PartialEq + fmt::Debug>() {
            for (index, kind) in K::ALL.iter().enumerate() {
                assert_eq!(kind.index(), index, "{kind:?}");
            }
        }
        check::<Failure>();
        check::<Refusal>();
        check::<Rejection>();
        check::<HandshakeFailure>();
        check::<StatusClass>();
        check::<PortState>();
    }

    #[test]
    fn workers_and_agents_share_no_cache_line() {
        assert_eq!(align_of::<WorkerMetrics>(), 128);
        assert_eq!(
            (align_of::<AgentStats>(), size_of::<AgentStats>()),
            (64, 64)
        );
    }

    #[test]
    fn an_agent_is_seen_and_measured() {
        let stats = AgentStats::new(UNIX_EPOCH + Duration::from_millis(1_234));
        assert_eq!((stats.last_seen_ms(), stats.rtt()), (1_234, None));
        stats.measured_rtt(Duration::ZERO);
        assert_eq!(stats.rtt(), Some(Duration::from_micros(1)));
        stats.seen(UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!(stats.last_seen_ms(), 0);
    }
}
