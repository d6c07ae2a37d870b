//! The agent: holds a session with the server and forwards its exchanges to the local service.
//!
//! ```text
//!  Agent::run ── one session at a time ──> session: dial, hello, welcome
//!     │                                       │ drives the link, accepts exchanges
//!     │ waits between sessions                v
//!     └── reconnect                        Forwarder ──> one task a service connection
//! ```
//!
//! An agent is light while it is idle: its session's task, the three that hyper starts for an
//! HTTP/2 connection, and no timer but the session's. Thousands live on one thread.

mod forward;
mod reconnect;
mod session;

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use http::uri::{Authority, InvalidUri};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::config::{AgentConfig, Changes, HostPort};
use crate::head::RequestHead;
use crate::id::{AgentId, Generation};
use crate::link::Exchange;
use crate::net;
use crate::net::tls::{AgentTls, Failed, Refused, TlsFault};
use crate::wire::RejectionReason;

#[cfg(any(test, fuzzing))]
pub use forward::fuzz;
use forward::{Forwarder, Service};
use reconnect::Reconnect;

pub use forward::ServiceError;
pub use session::Lost;

/// An agent that isn't running yet.
pub struct Agent {
    id: AgentId,
    instance: [u8; 16],
    live: Arc<Live>,
    observer: Option<Arc<dyn Fn(Event) + Send + Sync>>,
}

/// What can change while an agent runs.
struct Live {
    /// Read at each dial, replaced as a whole.
    shared: ArcSwap<Shared>,
    /// Takes the exchanges of whichever session there is.
    forwarder: Forwarder,
    /// There is another token: an agent that waits because of the former one needn't.
    redial: Notify,
}

/// Has a running agent go by other settings.
#[derive(Clone)]
pub struct Reloader(Arc<Live>);

/// What agents with the same settings have in common.
struct Shared {
    config: AgentConfig,
    /// The server's address, as calls name it.
    authority: Authority,
    service: Arc<Service>,
    /// TLS to the server, if it has any.
    tls: Option<Arc<AgentTls>>,
}

/// Why an agent can't be made of its settings.
#[derive(Debug, Error)]
pub enum AgentError {
    /// `grpc.server_address` can't be the authority of a URL.
    #[error("grpc.server_address: {0}")]
    ServerAddress(InvalidUri),
    /// The local service can't be reached as the settings say.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The files of `grpc.tls` can't be used.
    #[error(transparent)]
    Tls(#[from] TlsFault),
    /// The operating system gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
}

/// What happens to a running agent, in the order in which it happens.
#[derive(Debug)]
pub enum Event {
    /// The server has welcomed the agent: visitors can come.
    Connected {
        /// The agent's port on the server.
        port: u16,
        /// Where visitors reach it.
        public_url: String,
        /// The server's number for the session.
        generation: Generation,
    },
    /// The server doesn't want the agent now, or no longer. No session is left.
    Rejected {
        /// The typed reason.
        reason: RejectionReason,
        /// The server's words.
        detail: String,
        /// When the agent tries again.
        retry_in: Duration,
    },
    /// The session was lost, or none came about.
    Disconnected {
        /// What failed.
        why: Lost,
        /// When the agent tries again.
        retry_in: Duration,
    },
}

impl Agent {
    /// Prepares an agent: reads the certificates that `grpc.tls` and `local.tls` need, connects
    /// nowhere.
    ///
    /// # Errors
    /// See [`AgentError`]; all of them are faults of the settings or of the host.
    pub fn new(config: AgentConfig) -> Result<Self, AgentError> {
        let tls = config.grpc.tls.as_ref().map(AgentTls::load).transpose()?;
        if let Some(tls) = &tls {
            for warning in tls.warnings(SystemTime::now()) {
                warn!("{warning}");
            }
        }
        let address = config.grpc.server_address.to_string();
        let authority = address.parse().map_err(AgentError::ServerAddress)?;
        let service = Arc::new(Service::new(&config.local)?);
        let id = config.grpc.agent_id.clone();
        let shared = Arc::new(Shared {
            config,
            authority,
            service,
            tls: tls.map(Arc::new),
        });
        Self::with_shared(id, shared)
    }

    /// Another agent with the same settings but for the id. They share certificates and settings,
    /// and nothing else.
    ///
    /// # Errors
    /// [`AgentError::Random`].
    pub fn with_id(&self, id: AgentId) -> Result<Self, AgentError> {
        Self::with_shared(id, self.live.shared.load_full())
    }

    fn with_shared(id: AgentId, shared: Arc<Shared>) -> Result<Self, AgentError> {
        let mut instance = [0; 16];
        getrandom::fill(&mut instance).map_err(AgentError::Random)?;
        let live = Live {
            forwarder: Forwarder::new(shared.service.clone(), &shared.config.local),
            shared: ArcSwap::new(shared),
            redial: Notify::new(),
        };
        Ok(Self {
            id,
            instance,
            live: Arc::new(live),
            observer: None,
        })
    }

    /// What changes the agent's settings while it runs; those of others, made by
    /// [`with_id`](Self::with_id), stay as they are.
    pub fn reloader(&self) -> Reloader {
        Reloader(self.live.clone())
    }

    /// Calls `observer` with each [`Event`], on the agent's own task: it must not block.
    pub fn on_event(mut self, observer: impl Fn(Event) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// The agent's id.
    pub fn id(&self) -> &AgentId {
        &self.id
    }

    /// Holds a session with the server, again and again, until `shutdown` is over. Then no new
    /// exchanges are taken, those under way may go on for `agent.grace`, and the session ends.
    ///
    /// Dropping the future ends the session and every exchange at once.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        let host = Host(self.live.clone());
        self.run_on(&host, shutdown).await;
    }

    /// The same with other surroundings.
    pub(crate) async fn run_on(
        self,
        outside: &impl Outside,
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let mut shutdown = pin!(shutdown);
        let mut reconnect = Reconnect::new(|| outside.random());
        let mut last_port = 0;
        loop {
            let mut lived = Duration::ZERO;
            // A token of before is used now.
            let _ = self.live.redial.notified().now_or_never();
            let dial = pin!(session::dial(&self, outside, last_port));
            let ended = match select(dial, shutdown.as_mut()).await {
                Either::Right(((), _)) => return,
                Either::Left((Err(lost), _)) => lost,
                Either::Left((Ok(session), _)) => {
                    let welcome = &session.welcome;
                    last_port = welcome.port;
                    let since = Instant::now();
                    info!(agent_id = %self.id, port = welcome.port, url = %welcome.public_url, "connected");
                    self.report(Event::Connected {
                        port: welcome.port,
                        public_url: welcome.public_url.clone(),
                        generation: welcome.generation,
                    });
                    let grace = || self.live.shared.load().config.agent.grace;
                    let outcome = session.run(outside, shutdown.as_mut(), grace).await;
                    lived = since.elapsed();
                    // Whoever was welcomed doesn't wait for its token.
                    let _ = self.live.redial.notified().now_or_never();
                    match outcome {
                        session::Outcome::Stopped => return,
                        session::Outcome::Lost(lost) => lost,
                    }
                }
            };
            let retry_in = reconnect.after(&ended, lived);
            self.report_end(ended, retry_in);
            tokio::select! {
                biased;
                () = shutdown.as_mut() => return,
                () = self.live.redial.notified() => {}
                () = tokio::time::sleep(retry_in) => {}
            }
        }
    }

    fn report_end(&self, ended: Lost, retry_in: Duration) {
        let agent_id = &self.id;
        let retry = Seconds(retry_in);
        let (reason, detail) = match ended {
            Lost::Rejected { reason, detail, .. } => (reason, detail),
            why => {
                match tls_advice(&why) {
                    Some(advice) => {
                        error!(%agent_id, %why, retry_in = %retry, "no tunnel; {advice}");
                    }
                    None => info!(%agent_id, %why, retry_in = %retry, "disconnected"),
                }
                return self.report(Event::Disconnected { why, retry_in });
            }
        };
        match advice(reason) {
            Some((true, advice)) => {
                error!(%agent_id, reason = %reason.as_str(), detail, retry_in = %retry, "rejected; {advice}");
            }
            Some((false, advice)) => {
                warn!(%agent_id, reason = %reason.as_str(), detail, retry_in = %retry, "rejected; {advice}");
            }
            None => {
                info!(%agent_id, reason = %reason.as_str(), detail, retry_in = %retry, "rejected")
            }
        }
        self.report(Event::Rejected {
            reason,
            detail,
            retry_in,
        });
    }

    fn report(&self, event: Event) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}

/// What is around an agent: the way to the server, the service, and chance.
pub(crate) trait Outside: Send + Sync {
    /// A connection to the server.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to the server's tunnel port; whoever calls sets a limit of time.
    fn connect(&self, server: &HostPort) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Has a visitor's request answered. Needs a tokio runtime.
    fn forward(&self, exchange: Exchange, head: RequestHead);

    /// A number at random, uniform over all of `u64`.
    fn random(&self) -> u64;
}

/// The host that the agent runs on.
struct Host(Arc<Live>);

impl Outside for Host {
    type Stream = TcpStream;

    async fn connect(&self, server: &HostPort) -> io::Result<TcpStream> {
        net::dial::connect(&server.host, server.port).await
    }

    fn forward(&self, exchange: Exchange, head: RequestHead) {
        self.0.forwarder.submit(exchange, head);
    }

    fn random(&self) -> u64 {
        // Without random numbers the whole wait is still a wait, only not a spread one.
        getrandom::u64().unwrap_or(u64::MAX)
    }
}

impl Reloader {
    /// The settings that hold now.
    pub fn config(&self) -> AgentConfig {
        self.0.shared.load().config.clone()
    }

    /// Goes by `new` settings from now on, except for those that can't change while the agent
    /// runs; on an error by none of them. The session stays: what concerns the way to the server
    /// counts from the next dial on, what concerns the local service for the next request. With
    /// another token an agent that waits between sessions dials at once. Requests that have come
    /// already are served by the old settings, so that for as long as that takes the service may
    /// get more at once than `local.max_connections`. `log.level` is left to whoever started the
    /// log.
    ///
    /// # Errors
    /// [`AgentError::Service`].
    pub fn reload(&self, new: AgentConfig) -> Result<Changes, AgentError> {
        let Live {
            shared, forwarder, ..
        } = &*self.0;
        let old = shared.load_full();
        let (config, changes) = old.config.replaced_by(new);
        let local = changes
            .applied
            .iter()
            .any(|path| path.starts_with("local."));
        let service = match local {
            true => Arc::new(Service::new(&config.local)?),
            false => old.service.clone(),
        };
        if local {
            forwarder.replace(service.clone(), &config.local);
        }
        shared.store(Arc::new(Shared {
            config,
            authority: old.authority.clone(),
            service,
            tls: old.tls.clone(),
        }));
        if changes.touch(&["grpc.token"]) {
            self.0.redial.notify_one();
        }
        Ok(changes)
    }
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reloader")
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// What a person has to do about a rejection, and whether nothing helps without it.
fn advice(reason: RejectionReason) -> Option<(bool, &'static str)> {
    match reason {
        RejectionReason::Auth => Some((
            true,
            "set grpc.token (SILO_GRPC_TOKEN) to the token the server has for this agent's id, or \
             where it wants a certificate, grpc.tls.cert_file and key_file to one for this id",
        )),
        RejectionReason::Version => Some((
            true,
            "install the version of silo-proxy that the server runs",
        )),
        RejectionReason::Malformed => Some((
            true,
            "check that grpc.server_address is a silo-proxy server of a version near this one",
        )),
        RejectionReason::Duplicate => {
            Some((false, "another agent holds this id: give each its own"))
        }
        RejectionReason::Replaced => Some((
            false,
            "another agent with this id has connected: give each its own",
        )),
        RejectionReason::PortExhausted => {
            Some((false, "widen http.agent_port_range on the server"))
        }
        RejectionReason::Unavailable => Some((
            false,
            "on the server's host, free the port or raise the limit of open files",
        )),
        RejectionReason::Unspecified | RejectionReason::Draining => None,
    }
}

/// What a person has to do about a tunnel that TLS keeps from coming about. With `None` it may come
/// about by itself.
fn tls_advice(lost: &Lost) -> Option<&'static str> {
    Some(match lost {
        Lost::ServerSpeaksTls => "set grpc.tls.enabled, and grpc.tls.ca_file to its authority",
        Lost::Tls(Failed::NotTls) => {
            "set grpc.tls.enabled on the server too, or check that grpc.server_address is its tunnel \
             port"
        }
        Lost::Tls(Failed::Refused(refused)) => match refused {
            Refused::Expired { .. } => {
                "give the server a new certificate, or set this host's clock"
            }
            Refused::NotYetValid { .. } => "compare the clocks of both hosts",
            Refused::UnknownIssuer { .. } => {
                "set grpc.tls.ca_file to the authority that has signed the server's certificate"
            }
            Refused::WrongName { .. } => {
                "set grpc.tls.server_name to a name in the certificate, or give the server one that \
                 names its host"
            }
            Refused::Purpose(_) | Refused::Other(_) => "give the server another certificate",
        },
        Lost::Tls(Failed::Alert(_) | Failed::Tls(_)) => {
            "compare grpc.tls of both sides, and the versions"
        }
        _ => return None,
    })
}

/// A wait as people read it: `1.5s`.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1}s", self.0.as_secs_f64())
    }
}
