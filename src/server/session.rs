//! The server's end of one agent's session: who may have one, what it carries, and its end.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite};
use tracing::{info, warn};

use super::registry::{Applicant, DEFAULT_HOST, JoinError, Joined};
use super::rivals::Instance;
use super::worker::Worker;
use crate::auth::Shown;
use crate::config::ServerConfig;
use crate::id::{AgentId, Generation, MAX_LABEL_LEN, MAX_LABELS};
use crate::link::{Ended, Link, Observer, Tunnel};
use crate::metrics::{AgentStats, PortState, Rejection as RejectionKind, WorkerMetrics};
use crate::mux::{Budget, Config};
use crate::net::tls::PeerCertificate;
use crate::ports;
use crate::telemetry::{Told, Who, may_say};
use crate::wire::{
    AgentMessage, Hello, OLDEST_VERSION, Rejection, RejectionReason, ServerMessage, UPGRADE,
    VERSION, Welcome,
};

/// How long a session that has been replaced may finish its exchanges.
const REPLACED_GRACE: Duration = Duration::from_secs(5);

/// When an agent that was replaced may try again: two that fight over an id shall settle.
const REPLACED_RETRY: Duration = Duration::from_secs(30);

/// When an agent may try again that was turned away for what it is or says.
const REFUSED_RETRY: Duration = Duration::from_secs(30);

/// When an agent may try again that met a server shutting down.
const DRAINING_RETRY: Duration = Duration::from_secs(1);

/// The longest name and version of its software that an agent's hello may have us keep, in bytes.
const MAX_SOFTWARE_LEN: usize = 128;

/// The part of a session that others may use: to open exchanges, and to end it.
#[derive(Debug)]
pub(super) struct Session {
    link: Link,
    /// Sent last, after the link has been closed.
    farewell: Mutex<Option<Rejection>>,
}

impl Session {
    /// A session in this tunnel.
    pub(super) fn new(link: Link) -> Arc<Self> {
        Arc::new(Self {
            link,
            farewell: Mutex::new(None),
        })
    }

    /// Its tunnel.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Ends the session because a newer one of the same agent took over. What is under way may
    /// finish for some seconds. Needs a tokio runtime.
    pub(super) fn replace(self: Arc<Self>) {
        self.link.drain();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(REPLACED_GRACE, self.link.idle()).await;
            self.end(reject(
                RejectionReason::Replaced,
                "another session of this agent id took over; two agents must not share an id",
                REPLACED_RETRY,
            ));
        });
    }

    /// Ends the session at once because the same process has opened a newer one: nobody is left at
    /// its other end, and what is under way can't finish.
    pub(super) fn outlived(&self) {
        self.link.close();
    }

    /// Ends the session because the server shuts down.
    pub(super) fn shut_down(&self) {
        self.end(reject(
            RejectionReason::Draining,
            "the server is shutting down",
            DRAINING_RETRY,
        ));
    }

    fn end(&self, farewell: Rejection) {
        *self.lock() = Some(farewell);
        self.link.close();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Rejection>> {
        self.farewell.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who calls, and what it says first.
pub(super) struct Caller {
    /// Where it comes from.
    pub peer: SocketAddr,
    /// What it has shown in the TLS handshake, if there was one.
    pub certificate: PeerCertificate,
    /// The host by which it reached us, for its public URL.
    pub host: Option<String>,
    /// Its first message.
    pub first: AgentMessage,
}

/// A session that has a port, and whose agent is about to be told so.
pub(super) struct Welcomed {
    membership: Membership,
    peer: SocketAddr,
    port: u16,
    stats: Arc<AgentStats>,
    welcome: Welcome,
}

/// Checks who calls, and has it join; or counts and logs why not, and says it.
pub(super) async fn admit(worker: &Arc<Worker>, mut caller: Caller) -> Result<Welcomed, Rejection> {
    let hello = caller.first.hello.take();
    let shown_id = ShownId::of(hello.as_ref().map_or("", |hello| &hello.agent_id));
    // The session goes by what holds now, in all of its parts.
    let config = worker.shared().config_to_keep();
    let welcomed = match hello {
        Some(hello) => welcome(worker, &caller, &config, hello).await,
        None => Err(Turned::malformed("the first message has no hello")),
    };
    welcomed.map_err(|turned| {
        worker.shared().metrics.rejections.inc(turned.kind);
        log_rejection(worker, caller.peer, &shown_id, &turned);
        turned.rejection
    })
}

impl Welcomed {
    /// The session's life: the welcome, which has to be taken before `deadline`, and all that is
    /// carried until one side ends. Gives what the agent is to be told last.
    pub(super) async fn run<T>(
        self,
        tunnel: &mut Tunnel<T>,
        deadline: impl Future<Output = ()>,
    ) -> Option<Rejection>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let Self {
            membership,
            peer,
            port,
            stats,
            welcome,
        } = self;
        let Membership {
            worker,
            session,
            agent_id,
            generation,
        } = &membership;
        let since = tokio::time::Instant::now();
        // The welcome isn't kept for as long as the session lasts.
        let welcomed = {
            let welcome = ServerMessage::from(welcome);
            tokio::select! {
                // Whoever waited long for a port is welcome even if no time is left.
                biased;
                welcomed = tunnel.send(&welcome) => welcomed.map_err(Ended::from),
                () = deadline => {
                    let late = io::Error::new(io::ErrorKind::TimedOut, "it didn't take its welcome");
                    Err(Ended::Connection(late.into()))
                }
            }
        };
        let ended = match welcomed {
            Ok(()) => {
                let mut observer = Statistics {
                    metrics: worker.metrics(),
                    stats: &stats,
                };
                let drive =
                    tunnel.drive::<AgentMessage, ServerMessage>(&session.link, &mut observer);
                drive.await
            }
            Err(ended) => ended,
        };
        info!(
            %agent_id,
            port,
            generation = generation.0,
            %peer,
            why = %ended,
            seconds = since.elapsed().as_secs(),
            requests = stats.requests.get(),
            bytes_in = stats.bytes_in.get(),
            bytes_out = stats.bytes_out.get(),
            "agent deregistered"
        );
        session.lock().take()
    }
}

/// Closes the tunnel and gives the port back when the session ends, in whatever way; fenced by the
/// generation. A panic in the session's task is such a way: it ends this tunnel, and the agent comes
/// back with a new one.
struct Membership {
    worker: Arc<Worker>,
    session: Arc<Session>,
    agent_id: AgentId,
    generation: Generation,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.session.link.close();
        let shared = self.worker.shared();
        if shared.registry.leave(&self.agent_id, self.generation) {
            // The port is released: its visitors' connections are to notice.
            shared.sweep_all();
        }
    }
}

/// Checks the hello and joins, or says why not.
async fn welcome(
    worker: &Arc<Worker>,
    caller: &Caller,
    config: &ServerConfig,
    hello: Hello,
) -> Result<Welcomed, Turned> {
    let shared = worker.shared();
    if !(OLDEST_VERSION..=VERSION).contains(&hello.version) {
        return Err(Turned {
            kind: RejectionKind::Version,
            rejection: reject(
                RejectionReason::Version,
                &format!(
                    "this server speaks versions {OLDEST_VERSION} to {VERSION} of the protocol, \
                     the agent version {}: update the older of the two",
                    hello.version
                ),
                REFUSED_RETRY,
            ),
        });
    }
    let agent_id: AgentId = hello
        .agent_id
        .parse()
        .map_err(|error| Turned::malformed(&format!("{error}")))?;
    let too_long = hello.software.len() > MAX_SOFTWARE_LEN
        || hello.labels.len() > MAX_LABELS
        || hello
            .labels
            .iter()
            .any(|(name, value)| name.len() > MAX_LABEL_LEN || value.len() > MAX_LABEL_LEN);
    if too_long {
        return Err(Turned::malformed(
            "the hello's texts or labels are too long",
        ));
    }
    let shown = Shown {
        token: Some(&hello.credential[..]),
        certificate: caller.certificate.shown(),
        from_loopback: caller.peer.ip().to_canonical().is_loopback(),
    };
    config
        .grpc
        .auth
        .check(&agent_id, shown)
        .map_err(|denied| Turned {
            kind: RejectionKind::Auth,
            rejection: reject(RejectionReason::Auth, &denied.to_string(), REFUSED_RETRY),
        })?;

    let link = Link::opener(
        Config {
            max_exchanges: max_exchanges(config),
            heartbeat_interval: config.grpc.heartbeat_interval,
            heartbeat_timeout: config.grpc.heartbeat_timeout,
        },
        Budget::new(shared.pool.clone(), config.server.max_buffered_per_agent),
    );
    let session = Session::new(link);
    let reached = || caller.host.as_deref().unwrap_or(DEFAULT_HOST);
    let public_host = config.http.public_host.as_deref().unwrap_or_else(reached);
    let Joined {
        generation,
        port,
        public_url,
        stats,
    } = shared
        .registry
        .join(Applicant {
            agent_id: agent_id.clone(),
            instance: Instance::read(&hello.instance),
            last_port: u16::try_from(hello.last_port)
                .ok()
                .filter(|port| *port != 0),
            session: session.clone(),
            worker: worker.index(),
            upgrades: hello.capabilities.iter().any(|word| word == UPGRADE),
            peer: caller.peer,
            software: hello.software,
            labels: hello.labels,
            public_host: public_host.to_owned(),
        })
        .await?;
    let peer = caller.peer;
    info!(%agent_id, port, generation = generation.0, %peer, "agent registered");
    Ok(Welcomed {
        membership: Membership {
            worker: worker.clone(),
            session,
            agent_id,
            generation,
        },
        peer,
        port,
        stats,
        welcome: Welcome {
            version: VERSION,
            port: port.into(),
            public_url,
            generation: generation.0,
            heartbeat_interval_ms: millis(config.grpc.heartbeat_interval),
            heartbeat_timeout_ms: millis(config.grpc.heartbeat_timeout),
            max_exchanges: max_exchanges(config),
            capabilities: Vec::new(),
        },
    })
}

/// The most exchanges a tunnel carries at once.
fn max_exchanges(config: &ServerConfig) -> u32 {
    u32::try_from(config.http.max_exchanges_per_agent).unwrap_or(u32::MAX)
}

/// A session that isn't welcome, and why.
struct Turned {
    kind: RejectionKind,
    rejection: Rejection,
}

impl Turned {
    fn malformed(detail: &str) -> Self {
        Self {
            kind: RejectionKind::Malformed,
            rejection: reject(RejectionReason::Malformed, detail, REFUSED_RETRY),
        }
    }
}

impl From<JoinError> for Turned {
    fn from(error: JoinError) -> Self {
        let (kind, reason, retry_after) = match error {
            JoinError::Port(refusal) => {
                let (kind, reason) = match refusal {
                    ports::Refusal::Exhausted { .. } => {
                        (RejectionKind::PortExhausted, RejectionReason::PortExhausted)
                    }
                    ports::Refusal::PinUnavailable { .. } | ports::Refusal::Descriptors { .. } => {
                        (RejectionKind::Unavailable, RejectionReason::Unavailable)
                    }
                };
                (kind, reason, refusal.retry_after())
            }
            JoinError::Replaced => (
                RejectionKind::Replaced,
                RejectionReason::Replaced,
                REPLACED_RETRY,
            ),
            JoinError::Duplicate => (
                RejectionKind::Duplicate,
                RejectionReason::Duplicate,
                REPLACED_RETRY,
            ),
            JoinError::Draining => (
                RejectionKind::Draining,
                RejectionReason::Draining,
                DRAINING_RETRY,
            ),
        };
        Self {
            kind,
            rejection: reject(reason, &error.to_string(), retry_after),
        }
    }
}

/// Says who was turned away and what mends it; once a minute for each id and text, so that who mends
/// one thing after the other sees what is next.
fn log_rejection(worker: &Worker, peer: SocketAddr, agent_id: &ShownId, turned: &Turned) {
    let Turned { kind, rejection } = turned;
    let (reason, detail) = (kind.as_str(), &rejection.detail);
    let who = match agent_id {
        ShownId::Valid(id) => id.into(),
        ShownId::Invalid(_) => Who::Address(peer.ip()),
    };
    let Some(Told { repeated, others }) = may_say(reason, detail, who) else {
        return;
    };
    let mends = match kind {
        RejectionKind::PortExhausted => {
            let shared = worker.shared();
            let config = shared.config();
            let range = &config.http.agent_port_range;
            let ports = |state| shared.metrics.ports.get(state);
            warn!(
                %agent_id,
                %peer,
                %reason,
                range = %format_args!("{}-{}", range.start(), range.end()),
                serving = ports(PortState::Serving) + ports(PortState::Opening),
                leased = ports(PortState::Leased),
                foreign = ports(PortState::Foreign),
                repeated,
                others,
                "agent rejected: {detail}; widen http.agent_port_range"
            );
            return;
        }
        // They are on their way to another server, or back to this one.
        RejectionKind::Draining => {
            info!(%agent_id, %peer, %reason, repeated, others, "agent rejected: {detail}");
            return;
        }
        RejectionKind::Malformed => {
            "; check that it is a silo-proxy agent of a version near this one"
        }
        RejectionKind::Duplicate | RejectionKind::Replaced => "; give each agent an id of its own",
        RejectionKind::Unavailable => "; free the port, or raise the limit of open files",
        // Their details say it.
        RejectionKind::Auth | RejectionKind::Version => "",
    };
    warn!(%agent_id, %peer, %reason, repeated, others, "agent rejected: {detail}{mends}");
}

/// What a peer calls itself, for the log.
enum ShownId {
    /// An id.
    Valid(AgentId),
    /// Something else, which may hold anything: it is escaped, and cut to what a line should
    /// carry.
    Invalid(String),
}

impl ShownId {
    fn of(text: &str) -> Self {
        match text.parse() {
            Ok(id) => Self::Valid(id),
            Err(_) => Self::Invalid(format!("{:?}", shorten(text))),
        }
    }
}

impl fmt::Display for ShownId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Valid(id) => id.fmt(f),
            Self::Invalid(text) => f.write_str(text),
        }
    }
}

fn reject(reason: RejectionReason, detail: &str, retry_after: Duration) -> Rejection {
    Rejection {
        reason: reason.into(),
        detail: detail.to_owned(),
        retry_after_ms: millis(retry_after),
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// What a peer calls itself, cut to what a log line should carry.
fn shorten(text: &str) -> &str {
    let end = (0..=text.len().min(AgentId::MAX_LEN))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

struct Statistics<'a> {
    metrics: &'a WorkerMetrics,
    stats: &'a AgentStats,
}

impl Observer for Statistics<'_> {
    fn received(&mut self, frames: usize) {
        self.metrics.messages_received.inc();
        self.metrics.frames_received.add(frames as u64);
        self.stats.seen(SystemTime::now());
    }

    fn sent(&mut self, frames: usize) {
        self.metrics.messages_sent.inc();
        self.metrics.frames_sent.add(frames as u64);
    }

    fn round_trip(&mut self, round_trip: Duration) {
        self.stats.measured_rtt(round_trip);
    }
}
