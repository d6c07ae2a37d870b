//! The server's end of one agent's session: the gRPC service, the handshake, and the outgoing
//! stream.

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::registry::{Applicant, DEFAULT_HOST, JoinError, Joined};
use super::rivals::Instance;
use super::worker::Worker;
use crate::auth::Shown;
use crate::config::ServerConfig;
use crate::id::{AgentId, MAX_LABEL_LEN, MAX_LABELS};
use crate::link::{Ended, Link, Observer};
use crate::metrics::{
    AgentStats, HandshakeFailure, PortState, Rejection as RejectionKind, WorkerMetrics,
};
use crate::mux::{Budget, Config, Frame};
use crate::net::tls::PeerCertificate;
use crate::ports;
use crate::telemetry::{Told, Who, may_say};
use crate::wire::{
    AgentMessage, Hello, OLDEST_VERSION, Rejection, RejectionReason, ServerMessage, UPGRADE,
    VERSION, Welcome, tunnel_server,
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
    fn new(link: Link) -> Arc<Self> {
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

/// What the requests of one tunnel connection share.
#[derive(Debug)]
pub(super) struct Connection {
    /// Where it comes from.
    pub peer: SocketAddr,
    /// What it has shown in the TLS handshake, if there was one.
    pub certificate: PeerCertificate,
    /// The host by which the agent reached us, for its public URL.
    pub host: Mutex<Option<String>>,
    /// Whether a session has begun; a connection carries one at most.
    taken: AtomicBool,
    /// The agent has shown who it is, so the deadline for that is off.
    pub welcomed: CancellationToken,
    /// The session is over, and so is the connection.
    pub over: CancellationToken,
}

impl Connection {
    /// A connection on which nothing has happened yet but TLS; `welcomed` is cancelled when its
    /// agent is.
    pub(super) fn new(
        peer: SocketAddr,
        certificate: PeerCertificate,
        welcomed: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            peer,
            certificate,
            host: Mutex::new(None),
            taken: AtomicBool::new(false),
            welcomed,
            over: CancellationToken::new(),
        })
    }

    /// Notes the host by which the agent reached us.
    pub(super) fn reached_by(&self, host: &str) {
        *self.host.lock().unwrap_or_else(PoisonError::into_inner) = Some(host.to_owned());
    }
}

/// The gRPC service of one tunnel connection.
pub(super) struct TunnelService {
    /// Where the connection lives.
    pub worker: Arc<Worker>,
    /// The connection.
    pub connection: Arc<Connection>,
}

#[tonic::async_trait]
impl tunnel_server::Tunnel for TunnelService {
    type ConnectStream = Outbound;

    async fn connect(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Outbound>, Status> {
        if self.connection.taken.swap(true, Ordering::Relaxed) {
            return Err(Status::failed_precondition(
                "a connection carries one session",
            ));
        }
        let (first, outbound) = Outbound::new(self.worker.clone());
        tokio::spawn(run(
            self.worker.clone(),
            self.connection.clone(),
            request.into_inner(),
            first,
        ));
        Ok(Response::new(outbound))
    }
}

/// The session's life, from the hello to the end.
async fn run(
    worker: Arc<Worker>,
    connection: Arc<Connection>,
    mut messages: Streaming<AgentMessage>,
    first: oneshot::Sender<First>,
) {
    let over = connection.over.clone();
    // However this ends, the connection ends with it.
    let _over = over.drop_guard();
    // The connection's deadline covers the wait for the hello.
    let hello = match messages.message().await {
        Ok(Some(AgentMessage {
            hello: Some(hello), ..
        })) => hello,
        Ok(Some(_)) => {
            let rejection = Turned::malformed("the first message has no hello");
            return turn_away(&worker, &connection, ShownId::of(""), rejection, first);
        }
        Ok(None) | Err(_) => {
            let failed = &worker.metrics().handshakes_failed;
            failed.inc(HandshakeFailure::Protocol);
            return;
        }
    };
    let shown_id = ShownId::of(&hello.agent_id);
    // The session goes by what holds now, in all of its parts.
    let config = worker.shared().config_to_keep();
    let (agent_id, session, joined) = match welcome(&worker, &connection, &config, hello).await {
        Ok(welcomed) => welcomed,
        Err(rejection) => return turn_away(&worker, &connection, shown_id, rejection, first),
    };
    connection.welcomed.cancel();
    let Joined {
        generation,
        port,
        public_url,
        stats,
    } = joined;
    let _membership = Membership {
        worker: &worker,
        session: &session,
        agent_id: &agent_id,
        generation,
    };
    info!(%agent_id, port, generation = generation.0, peer = %connection.peer, "agent registered");
    let since = tokio::time::Instant::now();
    let welcome = Welcome {
        version: VERSION,
        port: port.into(),
        public_url,
        generation: generation.0,
        heartbeat_interval_ms: millis(config.grpc.heartbeat_interval),
        heartbeat_timeout_ms: millis(config.grpc.heartbeat_timeout),
        max_exchanges: max_exchanges(&config),
        capabilities: Vec::new(),
    };
    // It may be replaced while this session lives.
    drop(config);
    let sent = first.send(First {
        message: ServerMessage {
            welcome: Some(welcome),
            ..ServerMessage::default()
        },
        session: Some(session.clone()),
    });
    let ended = match sent {
        Ok(()) => {
            let mut observer = Statistics {
                metrics: worker.metrics(),
                stats: &stats,
            };
            session.link.drive(messages, &mut observer).await
        }
        Err(_) => Ended::Closed,
    };
    info!(
        %agent_id,
        port,
        generation = generation.0,
        peer = %connection.peer,
        why = %ended,
        seconds = since.elapsed().as_secs(),
        requests = stats.requests.get(),
        bytes_in = stats.bytes_in.get(),
        bytes_out = stats.bytes_out.get(),
        "agent deregistered"
    );
}

/// Closes the tunnel and gives the port back when the session ends, in whatever way; fenced by the
/// generation. A panic in the session's task is such a way: it ends this tunnel, and the agent comes
/// back with a new one.
struct Membership<'a> {
    worker: &'a Worker,
    session: &'a Session,
    agent_id: &'a AgentId,
    generation: crate::id::Generation,
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        self.session.link.close();
        let shared = self.worker.shared();
        if shared.registry.leave(self.agent_id, self.generation) {
            // The port is released: its visitors' connections are to notice.
            shared.sweep_all();
        }
    }
}

/// Checks the hello and joins, or says why not.
async fn welcome(
    worker: &Arc<Worker>,
    connection: &Connection,
    config: &ServerConfig,
    hello: Hello,
) -> Result<(AgentId, Arc<Session>, Joined), Turned> {
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
        certificate: connection.certificate.shown(),
        from_loopback: connection.peer.ip().to_canonical().is_loopback(),
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
    let public_host = match &config.http.public_host {
        Some(host) => host.clone(),
        None => {
            let host = connection
                .host
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            host.clone().unwrap_or_else(|| DEFAULT_HOST.into())
        }
    };
    let joined = shared
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
            peer: connection.peer,
            software: hello.software,
            labels: hello.labels,
            public_host,
        })
        .await?;
    Ok((agent_id, session, joined))
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

fn turn_away(
    worker: &Worker,
    connection: &Connection,
    agent_id: ShownId,
    turned: Turned,
    first: oneshot::Sender<First>,
) {
    worker.shared().metrics.rejections.inc(turned.kind);
    log_rejection(worker, connection, &agent_id, &turned);
    // If the stream is gone already there is nobody to tell.
    let _ = first.send(First {
        message: ServerMessage {
            rejection: Some(turned.rejection),
            ..ServerMessage::default()
        },
        session: None,
    });
}

/// Says who was turned away and what mends it; once a minute for each id and text, so that who mends
/// one thing after the other sees what is next.
fn log_rejection(worker: &Worker, connection: &Connection, agent_id: &ShownId, turned: &Turned) {
    let Turned { kind, rejection } = turned;
    let (reason, detail) = (kind.as_str(), &rejection.detail);
    let who = match agent_id {
        ShownId::Valid(id) => id.into(),
        ShownId::Invalid(_) => Who::Address(connection.peer.ip()),
    };
    let Some(Told { repeated, others }) = may_say(reason, detail, who) else {
        return;
    };
    let peer = connection.peer;
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

    fn round_trip(&mut self, round_trip: Duration) {
        self.stats.measured_rtt(round_trip);
    }
}

/// The first message of a session, and the session if it is a welcome.
struct First {
    message: ServerMessage,
    session: Option<Arc<Session>>,
}

/// The stream of messages to the agent: the welcome or a rejection first, then frames in batches
/// as large as there is to send, then the farewell if there is one.
pub(super) struct Outbound {
    state: OutboundState,
    worker: Arc<Worker>,
}

enum OutboundState {
    Handshake(oneshot::Receiver<First>),
    Session(Arc<Session>),
    Ended,
}

impl Outbound {
    fn new(worker: Arc<Worker>) -> (oneshot::Sender<First>, Self) {
        let (first, receiver) = oneshot::channel();
        let state = OutboundState::Handshake(receiver);
        (first, Self { state, worker })
    }
}

impl Stream for Outbound {
    type Item = Result<ServerMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.state {
            OutboundState::Handshake(first) => {
                let Ok(first) = std::task::ready!(Pin::new(first).poll(cx)) else {
                    self.state = OutboundState::Ended;
                    return Poll::Ready(None);
                };
                self.state = match first.session {
                    Some(session) => OutboundState::Session(session),
                    None => OutboundState::Ended,
                };
                Poll::Ready(Some(Ok(first.message)))
            }
            OutboundState::Session(session) => {
                let mut frames: Vec<Frame> = Vec::new();
                if std::task::ready!(session.link.poll_transmit(cx, &mut frames)) {
                    let metrics = self.worker.metrics();
                    metrics.messages_sent.inc();
                    metrics.frames_sent.add(frames.len() as u64);
                    return Poll::Ready(Some(Ok(frames.into())));
                }
                let farewell = session.lock().take();
                self.state = OutboundState::Ended;
                Poll::Ready(farewell.map(|rejection| {
                    Ok(ServerMessage {
                        rejection: Some(rejection),
                        ..ServerMessage::default()
                    })
                }))
            }
            OutboundState::Ended => Poll::Ready(None),
        }
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        // The peer has reset the stream: nothing can be sent any more.
        if let OutboundState::Session(session) = &self.state {
            session.link.close();
        }
    }
}
