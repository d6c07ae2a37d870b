//! One session with the server: from the TCP connection to its end.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{Either, poll_fn, select};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::id::Generation;
use crate::link::tunnel::{self, Tunnel};
use crate::link::{Ended, Link, Observer};
use crate::mux::{self, Budget, Pool};
use crate::net::tls::{Failed, Sniffed, Stream, TLS_ALERT};
use crate::wire::{self, AgentMessage, Hello, Rejection, RejectionReason, ServerMessage};

use super::{Agent, Outside, Shared};

/// For the TCP connection. A server that is there answers within a second even from far away;
/// one that isn't should be given up before the kernel does (about two minutes).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// From the TCP connection to the welcome, unless `grpc.heartbeat_timeout` is shorter: the server
/// says something at once, or it is as dead as one that falls silent later.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the server has to end its side after the agent has ended its own.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// The most exchanges an agent lets a server agree upon: each may hold 32 KiB, and slots are
/// numbered.
const MAX_EXCHANGES: u32 = 1 << 16;

/// The longest wait that a server can ask for: an hour. A mistaken one shall not put an agent out
/// of action for weeks.
const LONGEST_RETRY_MS: u32 = 60 * 60 * 1000;

/// What all exchanges of a session together may hold beyond what is reserved for each: windows
/// that have grown for fast bodies, and heads.
const LOANS: usize = 256 * 1024 * 1024;

/// Why there is no session.
#[derive(Debug, Error)]
pub enum Lost {
    /// The server can't be reached.
    #[error("can't connect to the server: {0}")]
    Connect(#[source] io::Error),
    /// The server's end of TLS isn't what it should be; see there.
    #[error("{0}")]
    Tls(#[from] Failed),
    /// The server wants TLS, and this agent has none.
    #[error("the server speaks TLS, and this agent doesn't")]
    ServerSpeaksTls,
    /// The call failed before the welcome: whoever listens there may be no silo-proxy server.
    #[error("the call to the server failed: {0}")]
    Call(#[source] tunnel::Error),
    /// No answer to the hello in time.
    #[error("no welcome within {:.1} s", .0.as_secs_f64())]
    NoWelcome(Duration),
    /// The welcome makes no sense.
    #[error("the server's welcome can't be understood: {0}")]
    BadWelcome(&'static str),
    /// The server doesn't want the agent.
    #[error("rejected: {detail}")]
    Rejected {
        /// The typed reason.
        reason: RejectionReason,
        /// The server's words.
        detail: String,
        /// The least wait the server asks for.
        retry_after: Option<Duration>,
    },
    /// The session has ended.
    #[error("{0}")]
    Ended(#[from] Ended),
}

impl From<Rejection> for Lost {
    fn from(rejection: Rejection) -> Self {
        let retry_after = rejection.retry_after_ms.min(LONGEST_RETRY_MS);
        Self::Rejected {
            reason: rejection.reason(),
            detail: rejection.detail,
            retry_after: (retry_after > 0).then(|| Duration::from_millis(retry_after.into())),
        }
    }
}

/// How a session's run ended.
pub(super) enum Outcome {
    /// By the agent's own shutdown.
    Stopped,
    /// Otherwise.
    Lost(Lost),
}

/// A session that the server has welcomed.
pub(super) struct Session<S> {
    pub(super) welcome: Welcome,
    link: Link,
    tunnel: Tunnel<Stream<Sniffed<S>>>,
}

/// What the server says of the session.
#[derive(Debug)]
pub(super) struct Welcome {
    pub(super) port: u16,
    pub(super) public_url: String,
    pub(super) generation: Generation,
    config: mux::Config,
}

/// Connects to the server and says hello.
pub(super) async fn dial<O: Outside>(
    agent: &Agent,
    outside: &O,
    last_port: u16,
) -> Result<Session<O::Stream>, Lost> {
    // The same settings from the first byte to the welcome.
    let shared = agent.live.shared.load_full();
    let connect = outside.connect(&shared.config.grpc.server_address);
    let stream = match timeout(CONNECT_TIMEOUT, connect).await {
        Ok(connected) => connected.map_err(Lost::Connect)?,
        Err(_) => return Err(Lost::Connect(io::ErrorKind::TimedOut.into())),
    };
    let patience = WELCOME_TIMEOUT.min(shared.config.grpc.heartbeat_timeout);
    let stream = Sniffed::new(stream);
    let first_byte = stream.first_byte();
    let greeted = async {
        let stream = match &shared.tls {
            None => Stream::Left(stream),
            Some(tls) => {
                tls.look();
                tls.connect(stream).await?
            }
        };
        greet(agent, &shared, stream, last_port).await
    };
    timeout(patience, greeted)
        .await
        .unwrap_or(Err(Lost::NoWelcome(patience)))
        .map_err(|lost| match first_byte() {
            // An alert is the answer of TLS to what isn't TLS.
            Some(TLS_ALERT) if shared.tls.is_none() => Lost::ServerSpeaksTls,
            _ => lost,
        })
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    agent: &Agent,
    shared: &Shared,
    stream: Stream<Sniffed<S>>,
    last_port: u16,
) -> Result<Session<S>, Lost> {
    let secure = shared.tls.is_some();
    let mut tunnel = Tunnel::client(stream, secure, shared.authority.as_str());
    let hello = AgentMessage::from(hello(agent, shared, last_port));
    tunnel.send(&hello).await.map_err(Lost::Call)?;
    let first: ServerMessage = tunnel.message().await.map_err(Lost::Call)?;
    if let Some(rejection) = first.rejection {
        return Err(rejection.into());
    }
    let welcome = first
        .welcome
        .ok_or(Lost::BadWelcome("neither a welcome nor a rejection"))?;
    let welcome = Welcome::read(welcome)?;
    let exchanges = welcome.config.max_exchanges as usize;
    let reserved = exchanges.saturating_mul(2 * mux::RESERVED_WINDOW as usize);
    let limit = reserved.saturating_add(LOANS);
    let link = Link::acceptor(welcome.config, Budget::new(Pool::new(limit), limit));
    Ok(Session {
        welcome,
        link,
        tunnel,
    })
}

fn hello(agent: &Agent, shared: &Shared, last_port: u16) -> Hello {
    let token = &shared.config.grpc.token;
    Hello {
        version: wire::VERSION,
        agent_id: agent.id.to_string(),
        credential: token
            .as_ref()
            .map(|token| token.expose().as_bytes().to_vec().into())
            .unwrap_or_default(),
        instance: agent.instance.to_vec().into(),
        software: concat!("silo-proxy/", env!("CARGO_PKG_VERSION")).into(),
        labels: shared.config.agent.labels.clone(),
        last_port: last_port.into(),
        capabilities: vec![wire::UPGRADE.into()],
    }
}

impl Welcome {
    fn read(welcome: wire::Welcome) -> Result<Self, Lost> {
        if !(wire::OLDEST_VERSION..=wire::VERSION).contains(&welcome.version) {
            return Err(Lost::BadWelcome(
                "a protocol version that isn't spoken here",
            ));
        }
        let port = u16::try_from(welcome.port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or(Lost::BadWelcome("an impossible port"))?;
        if !(1..=MAX_EXCHANGES).contains(&welcome.max_exchanges) {
            return Err(Lost::BadWelcome("an impossible number of exchanges"));
        }
        let interval = welcome.heartbeat_interval_ms;
        if interval == 0 || welcome.heartbeat_timeout_ms <= interval {
            return Err(Lost::BadWelcome("impossible heartbeats"));
        }
        Ok(Self {
            port,
            public_url: welcome.public_url,
            generation: Generation(welcome.generation),
            config: mux::Config {
                max_exchanges: welcome.max_exchanges,
                heartbeat_interval: Duration::from_millis(interval.into()),
                heartbeat_timeout: Duration::from_millis(welcome.heartbeat_timeout_ms.into()),
            },
        })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// Carries exchanges until the session ends, the server asks to end it, or `shutdown` is
    /// over. In the last two cases the exchanges under way may go on for `grace`.
    pub(super) async fn run(
        self,
        outside: &impl Outside,
        shutdown: Pin<&mut (impl Future<Output = ()> + Send)>,
        grace: impl Fn() -> Duration,
    ) -> Outcome {
        let Self {
            link, mut tunnel, ..
        } = self;
        let (tell, mut told) = oneshot::channel();
        let mut observer = Rejected(Some(tell));
        let mut drive = pin!(tunnel.drive::<ServerMessage, AgentMessage>(&link, &mut observer));
        let mut carry = pin!(poll_fn(|cx| {
            let ended = drive.as_mut().poll(cx);
            // Exchanges come only while the line above runs: nobody has to wake this task for them.
            let mut unwoken = Context::from_waker(Waker::noop());
            while let Poll::Ready(Some((exchange, head))) = link.poll_accept(&mut unwoken) {
                outside.forward(exchange, head);
            }
            ended
        }));

        let first = select(carry.as_mut(), select(shutdown, &mut told)).await;
        let rejection = match first {
            // The rejection and the end that follows it may arrive together.
            Either::Left((ended, _)) => {
                let rejection = told.try_recv().map(Lost::from);
                return Outcome::Lost(rejection.unwrap_or_else(|_| ended.into()));
            }
            Either::Right((Either::Left(_), _)) => None,
            // The sender lives as long as this function, so there is a rejection.
            Either::Right((Either::Right((rejection, _)), _)) => rejection.ok(),
        };

        link.drain();
        let idle = pin!(timeout(grace(), link.idle()));
        if let Either::Right(_) = select(carry.as_mut(), idle).await {
            // What is still to be sent goes first, then the stream ends, then the server's does.
            link.finish();
            let _ = timeout(FAREWELL_TIMEOUT, carry).await;
        }
        link.close();
        match rejection {
            None => Outcome::Stopped,
            Some(rejection) => Outcome::Lost(rejection.into()),
        }
    }
}

/// Passes on the rejection that ends a session.
struct Rejected(Option<oneshot::Sender<Rejection>>);

impl Observer for Rejected {
    fn received(&mut self, _frames: usize) {}

    fn round_trip(&mut self, _round_trip: Duration) {}

    fn rejected(&mut self, rejection: Rejection) {
        if let Some(tell) = self.0.take() {
            // Nobody listens any more if the session is ending anyway.
            let _ = tell.send(rejection);
        }
    }
}
