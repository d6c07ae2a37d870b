//! The server: accepts agents and their visitors, and carries the visitors' requests to the agents.
//!
//! ```text
//!            accept task                        worker threads, a one-thread runtime each
//!   :9090 ─┐                     ┌─ Agents ───► HTTP/2 ─► session ─► registry.join ─► link
//!   :8100 ─┼─► acceptor ─► route ┤                                                     │
//!   :8101 ─┘        ▲            └─ Visitors ─► HTTP/1 ─► ingress ─► tenancy.tunnel() ─┘
//!                   │ bind, close
//!               registry (allocator, members) ── each change ──► directory ◄── admin thread
//! ```

mod access;
pub mod admin;
mod balance;
pub mod directory;
mod ingress;
mod registry;
mod respond;
mod rivals;
mod session;
#[cfg(test)]
pub(crate) mod simulated;
mod state_file;
mod tenancy;
mod worker;

#[cfg(any(test, fuzzing))]
pub use ingress::fuzz;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, mpsc as mpsc_std};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use thiserror::Error;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::access::AccessLog;
use self::admin::{Admin, AdminState, Readiness};
use self::balance::{Load, least_loaded};
use self::directory::Directory;
use self::registry::Registry;
pub use self::state_file::StateFileError;
use self::state_file::{Moment, Signal, StateFile};
use self::worker::{Job, JobSender, Shared, Worker};
use crate::auth::ApiKey;
use crate::config::{Changes, ConfigError, ServerConfig};
use crate::headers::RequestIds;
use crate::metrics::{Metrics, Refusal};
use crate::mux::Pool;
use crate::net::acceptor::{Accepted, Acceptor, AcceptorHandle, Command, Listener, Sink};
use crate::net::tls::{ServerTls, TlsFault};
use crate::ports::PinError;

/// Under this number the accept task knows the tunnel port.
const TUNNEL_LISTENER: u64 = 0;

/// How often a draining server looks whether everything has come to rest.
const REST_INTERVAL: Duration = Duration::from_millis(10);

/// How often the files of `grpc.tls` are looked at: a few system calls.
const CERTIFICATES_INTERVAL: Duration = Duration::from_secs(2);

/// How often a certificate that is about to expire is spoken of.
const WARNING_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// How long the server's end may wait for the last write of the state file. It was begun when the
/// drain was; a disk that takes longer shall not hold the process.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// Why a server could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// A port of the server's own could not be bound.
    #[error("cannot listen on {address} ({setting}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting that names it.
        setting: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The pinned ports contradict each other or the server's own.
    #[error("http.static_ports: {0}")]
    Pins(#[from] PinError),
    /// The files of `grpc.tls` can't be used.
    #[error(transparent)]
    Tls(#[from] TlsFault),
    /// The state file can't be used.
    #[error("cannot use http.state_file: {0}")]
    StateFile(#[from] StateFileError),
    /// The file of the access log could not be opened.
    #[error("cannot write the access log to {output} (http.access_log): {source}")]
    AccessLog {
        /// The file, or the stream.
        output: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A thread or its runtime could not be set up.
    #[error("cannot start: {0}")]
    Threads(#[from] io::Error),
}

/// Why new settings could not be taken up; the old ones still hold, all of them.
#[derive(Debug, Error)]
pub enum ReloadError {
    /// What can't change while the server runs contradicts what can.
    #[error("what needs a restart to change contradicts the rest: {0}")]
    Contradiction(#[from] ConfigError),
    /// The pinned ports contradict each other or the server's own.
    #[error("http.static_ports: {0}")]
    Pins(#[from] PinError),
}

/// What became of new settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// Which settings have changed, and which would have to.
    pub changes: Changes,
    /// How many agents are on a port that the settings wouldn't give them any more: they keep it
    /// until they leave. Always 0 unless something about ports has changed.
    pub draining: usize,
}

/// A running server. Dropping it leaves its threads running; end it by [`Server::shutdown`].
pub struct Server {
    admin_address: SocketAddr,
    tunnel_address: SocketAddr,
    shared: Arc<Shared>,
    readiness: Arc<Readiness>,
    acceptor: AcceptorHandle,
    workers: Vec<Arc<Worker>>,
    stop_workers: CancellationToken,
    stop_admin: CancellationToken,
    vitals: Vitals,
    /// Dropped to end the thread that looks at the certificates' files.
    _stop_looking: Option<mpsc_std::SyncSender<Infallible>>,
    threads: Vec<JoinHandle<()>>,
    /// To the thread that writes the state file, if there is one.
    saver: Option<Arc<Signal>>,
    admin: Admin,
    /// The admin port's, to be replaced.
    api_key: Arc<ArcSwap<ApiKey>>,
}

impl Server {
    /// Reads the certificates, binds the admin and the tunnel port, and starts the threads. It
    /// serves when this returns.
    pub fn start(config: ServerConfig) -> Result<Self, StartError> {
        let tls = config.grpc.tls.as_ref().map(ServerTls::load).transpose()?;
        let tls = tls.map(Arc::new);
        let (state_file, memory) = match &config.http.state_file {
            Some(path) => {
                let now = Moment {
                    here: Duration::ZERO,
                    calendar: SystemTime::now(),
                };
                let (file, memory) = StateFile::open(path, now)?;
                (Some(file), memory)
            }
            None => (None, None),
        };
        let saver = state_file.as_ref().map(|_| Arc::new(Signal::default()));
        let admin_listener = listen(config.http.host, config.http.port, "http.port")?;
        let tunnel_listener = listen(config.grpc.host, config.grpc.port, "grpc.port")?;
        let admin_address = admin_listener.local_addr()?;
        let tunnel_address = tunnel_listener.local_addr()?;

        let worker_count = config.server.workers.map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            |count| count.max(1),
        );
        let metrics = Metrics::new(worker_count, SystemTime::now());
        let directory = Directory::new();
        let readiness = Readiness::new();
        let serving = readiness.step("acceptor");
        let reserved = BTreeSet::from([admin_address.port(), tunnel_address.port()]);
        let registry = Registry::new(
            &config,
            reserved,
            directory.clone(),
            metrics.clone(),
            memory,
            saver.clone(),
        )?;
        let access = config.http.access_log.as_ref().map(|output| {
            AccessLog::open(output, config.log.format, &metrics).map_err(|source| {
                let output = output.to_string();
                StartError::AccessLog { output, source }
            })
        });
        let shared = Arc::new(Shared {
            access: access.transpose()?,
            pool: Pool::new(config.server.max_buffered),
            tls: tls.clone(),
            visitors: AtomicUsize::new(0),
            addresses: DashMap::new(),
            handshakes: Mutex::new(BTreeMap::new()),
            loads: (0..worker_count).map(|_| Load::default()).collect(),
            sweeps: (0..worker_count).map(|_| Arc::new(Notify::new())).collect(),
            metrics: metrics.clone(),
            registry: registry.clone(),
            config: ArcSwap::from_pointee(config),
        });

        let mut workers = Vec::new();
        let mut queues = Vec::new();
        let mut receivers = Vec::new();
        for index in 0..worker_count {
            let (worker, sender, jobs) = Worker::new(index, shared.clone(), request_ids()?);
            workers.push(worker);
            queues.push(sender);
            receivers.push(jobs);
        }
        let dispatcher = Dispatcher {
            shared: shared.clone(),
            queues,
        };
        let (mut acceptor, handle) = Acceptor::new(shared.config().http.agent_host, dispatcher)?;
        acceptor.set_receive_buffer(shared.config().http.receive_buffer);
        acceptor.adopt(tunnel_listener, TUNNEL_LISTENER)?;
        registry.set_acceptor(handle.clone());

        let stop_workers = CancellationToken::new();
        let stop_admin = CancellationToken::new();
        let vitals = Vitals::default();
        let house_registry = registry.clone();
        let vital = vitals.begin("the accept task");
        let accept = async move {
            let _vital = vital;
            let house = std::pin::pin!(house_registry.keep_house());
            let accepting = std::pin::pin!(acceptor.run());
            let ended = futures_util::future::select(accepting, house).await;
            if let futures_util::future::Either::Left((Err(error), _)) = ended {
                error!(%error, "the accept task failed; no more connections are taken");
            }
        };
        let mut accept = Some(accept);
        let mut threads = Vec::new();
        for (worker, jobs) in workers.iter().zip(receivers) {
            // With one worker the accept task runs beside it: a thread of its own would only
            // take turns with it.
            let accept = (worker_count == 1).then(|| accept.take()).flatten();
            let (worker, stop) = (worker.clone(), stop_workers.clone());
            let name = format!("silo-worker-{}", worker.index());
            let vital = vitals.begin("a worker thread");
            threads.push(spawn(name, async move {
                let _vital = vital;
                if let Some(accept) = accept {
                    tokio::spawn(accept);
                }
                tokio::select! {
                    () = worker.run(jobs) => {}
                    () = stop.cancelled() => {}
                }
            })?);
        }
        if let Some(accept) = accept {
            let stop = stop_workers.clone();
            threads.push(spawn("silo-accept".into(), async move {
                tokio::select! {
                    () = accept => {}
                    () = stop.cancelled() => {}
                }
            })?);
        }
        let stop_looking = tls.map(look_at_certificates).transpose()?;
        if let (Some(file), Some(saver)) = (state_file, saver.clone()) {
            let registry = registry.clone();
            let keep = move || state_file::keep(&file, &saver, || registry.memory());
            // Not among the threads that are joined: a disk may hold it.
            std::thread::Builder::new()
                .name("silo-state".into())
                .spawn(keep)?;
        }
        let api_key = ApiKey::new(shared.config().http.admin_api_key.clone());
        let api_key = Arc::new(ArcSwap::from_pointee(api_key));
        let state = AdminState {
            directory,
            metrics,
            readiness: readiness.clone(),
            api_key: api_key.clone(),
        };
        let vital = vitals.begin("the admin thread");
        let stop = stop_admin.clone();
        let admin = Admin::start(admin_listener, state, async move {
            let _vital = vital;
            stop.cancelled().await;
        })?;
        serving.release();
        info!(
            admin = %admin_address,
            tunnel = %tunnel_address,
            ports = %format_args!(
                "{}-{}",
                shared.config().http.agent_port_range.start(),
                shared.config().http.agent_port_range.end()
            ),
            workers = worker_count,
            "server started"
        );
        if shared.config().grpc.auth.is_open() && !tunnel_address.ip().is_loopback() {
            info!("no credential is configured: agents are accepted from this host only");
        }
        Ok(Self {
            admin_address,
            tunnel_address,
            shared,
            readiness,
            acceptor: handle,
            workers,
            stop_workers,
            stop_admin,
            vitals,
            _stop_looking: stop_looking,
            threads,
            saver,
            admin,
            api_key,
        })
    }

    /// The admin port.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The tunnel port.
    pub fn tunnel_address(&self) -> SocketAddr {
        self.tunnel_address
    }

    /// TLS on the tunnel port, if it has any: to have the certificates read again.
    pub fn tls(&self) -> Option<&Arc<ServerTls>> {
        self.shared.tls.as_ref()
    }

    /// The counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// The settings that hold now.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.shared.config_to_keep()
    }

    /// Goes by `new` settings from now on, except for those that can't change while the server
    /// runs; on an error by none of them. Requests and sessions that have begun keep their limits,
    /// and a session whose credential has changed goes on; the times of visitors' connections
    /// count for those that are open, too. `log.level` is left to whoever started the log.
    ///
    /// # Errors
    /// See [`ReloadError`].
    pub fn reload(&mut self, new: ServerConfig) -> Result<Reloaded, ReloadError> {
        let (config, changes) = self.config().replaced_by(new)?;
        let mut draining = 0;
        if changes.touch(&[
            "http.agent_port_range.start",
            "http.agent_port_range.end",
            "http.static_ports",
            "http.port_lease",
        ]) {
            draining = self.shared.registry.reconfigure(&config)?;
        }
        // From here on nothing can fail.
        self.shared.pool.set_limit(config.server.max_buffered);
        let api_key = ApiKey::new(config.http.admin_api_key.clone());
        self.api_key.store(Arc::new(api_key));
        self.shared.config.store(Arc::new(config));
        if changes.touch(&["grpc.auth.shared_token", "grpc.auth.tokens"]) {
            self.shared.registry.pardon();
        }
        // Visitors of ports that have been released are to notice.
        self.shared.sweep_all();
        Ok(Reloaded { changes, draining })
    }

    /// Opens the file of the access log again, after something such as logrotate has moved it
    /// away. Until then its lines go to the old one.
    pub fn reopen_logs(&self) {
        if let Some(access) = &self.shared.access {
            access.reopen();
        }
    }

    /// Is over when the server can't do its work any more: a panic has ended the accept task, a
    /// worker thread or the admin thread, or the accept task can't ask the kernel. What is left of
    /// the server goes on meanwhile, but it won't mend: end it, and start another.
    pub fn failed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.vitals.failed.clone().cancelled_owned()
    }

    /// Drains and ends the server: it isn't ready any more, its ports close, kept-alive
    /// connections are told to, running exchanges have `server.grace` to finish, the rest is cut.
    /// Returns as soon as nothing is running.
    pub async fn shutdown(self) {
        info!("draining");
        self.vitals.ending.cancel();
        self.readiness.drain();
        let sessions = self.shared.registry.drain();
        self.acceptor.wake();
        for session in &sessions {
            session.link().drain();
        }
        for worker in &self.workers {
            worker.wind_down();
        }
        let at_rest = async {
            let mut looks = tokio::time::interval(REST_INTERVAL);
            let metrics = &self.shared.metrics;
            while metrics.level(|worker| &worker.connections_open) > 0 {
                looks.tick().await;
            }
        };
        if tokio::time::timeout(self.shared.config().server.grace, at_rest)
            .await
            .is_err()
        {
            let cut = self.shared.metrics.level(|worker| &worker.exchanges_open);
            warn!(exchanges = cut, "grace is over, the rest is cut");
        }
        for session in &sessions {
            session.shut_down();
        }
        // The farewells are a write each; a peer that doesn't take it shall not hold us up.
        let _ = tokio::time::timeout(Duration::from_secs(1), async {
            let mut looks = tokio::time::interval(REST_INTERVAL);
            let metrics = &self.shared.metrics;
            while metrics.level(|worker| &worker.tunnels_open) > 0 {
                looks.tick().await;
            }
        })
        .await;
        self.acceptor.shutdown();
        self.stop_workers.cancel();
        self.stop_admin.cancel();
        let Self {
            shared,
            threads,
            saver,
            admin,
            ..
        } = self;
        let joined = tokio::task::spawn_blocking(move || {
            if saver.is_some_and(|saver| !saver.finish(LAST_WRITE)) {
                warn!("http.state_file: the disk doesn't take the last write");
            }
            for thread in threads {
                if thread.join().is_err() {
                    error!("a worker thread panicked");
                }
            }
            admin.join();
            // The last requests ended with their workers.
            if let Some(access) = &shared.access {
                access.flush();
            }
        });
        if joined.await.is_err() {
            error!("could not wait for the threads' end");
        }
        info!("stopped");
    }
}

/// Whether all is running that a server can't do without.
#[derive(Default)]
struct Vitals {
    /// What ends from now on is meant to.
    ending: CancellationToken,
    /// Something has ended that isn't meant to.
    failed: CancellationToken,
}

impl Vitals {
    fn begin(&self, name: &'static str) -> Vital {
        Vital {
            name,
            ending: self.ending.clone(),
            failed: self.failed.clone(),
        }
    }
}

/// Lives as long as one of the things that a server can't do without, however that ends.
struct Vital {
    name: &'static str,
    ending: CancellationToken,
    failed: CancellationToken,
}

impl Drop for Vital {
    fn drop(&mut self) {
        if !self.ending.is_cancelled() {
            error!("{} has ended: this server can't go on", self.name);
            self.failed.cancel();
        }
    }
}

/// Hands what is accepted to the workers.
struct Dispatcher {
    shared: Arc<Shared>,
    queues: Vec<JobSender>,
}

impl Sink for Dispatcher {
    fn next_command(&mut self) -> Option<Command> {
        self.shared.registry.next_command()
    }

    fn opened(&mut self, port: u16, key: u64, outcome: io::Result<()>) {
        self.shared.registry.opened(port, key, outcome);
    }

    fn accepted(&mut self, listener: Listener, batch: Vec<Accepted>) {
        let count = batch.len();
        let (index, job) = match listener {
            Listener::Port { port, key } => match self.shared.registry.route(port, key) {
                Some(tenancy) => (tenancy.worker(), Job::Visitors(tenancy, batch)),
                None => return self.refused(0, Refusal::NoTenant, count),
            },
            Listener::Adopted(_) => {
                let index = least_loaded(&self.shared.loads);
                self.shared.loads[index].add(count);
                (index, Job::Agents(batch))
            }
        };
        let job = match self.queues[index].try_send(job) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(job)) => {
                self.refused(index, Refusal::QueueFull, count);
                job
            }
            // The server is ending.
            Err(mpsc::error::TrySendError::Closed(job)) => job,
        };
        if matches!(job, Job::Agents(_)) {
            self.shared.loads[index].remove(count);
        }
    }
}

impl Dispatcher {
    fn refused(&self, worker: usize, reason: Refusal, count: usize) {
        for _ in 0..count {
            self.shared
                .metrics
                .worker(worker)
                .connections_refused
                .inc(reason);
        }
    }
}

fn listen(
    host: IpAddr,
    port: u16,
    setting: &'static str,
) -> Result<std::net::TcpListener, StartError> {
    let address = SocketAddr::new(host, port);
    crate::net::listen(address).map_err(|source| StartError::Listen {
        address,
        setting,
        source,
    })
}

fn request_ids() -> io::Result<RequestIds> {
    let mut seed = [0; 16];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    Ok(RequestIds::new(seed))
}

/// Says what is to be said of the certificates' time, now and once a day, and has the files read
/// again when they have changed: on a thread of its own, since files can be slow, and for that
/// reason not waited for either. It ends when the sender is dropped.
fn look_at_certificates(tls: Arc<ServerTls>) -> io::Result<mpsc_std::SyncSender<Infallible>> {
    let warn_of_expiry = |tls: &ServerTls| {
        for warning in tls.warnings(SystemTime::now()) {
            warn!("{warning}");
        }
    };
    warn_of_expiry(&tls);
    let (stop, stopped) = mpsc_std::sync_channel(0);
    std::thread::Builder::new()
        .name("silo-certificates".into())
        .spawn(move || {
            let mut warned = Instant::now();
            while let Err(mpsc_std::RecvTimeoutError::Timeout) =
                stopped.recv_timeout(CERTIFICATES_INTERVAL)
            {
                tls.look();
                if warned.elapsed() >= WARNING_INTERVAL {
                    warned = Instant::now();
                    warn_of_expiry(&tls);
                }
            }
        })?;
    Ok(stop)
}

/// Runs a future on a thread and one-thread runtime of its own. When it ends, so do the tasks it
/// has spawned.
fn spawn(
    name: String,
    future: impl Future<Output = ()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name(name)
        .spawn(move || runtime.block_on(future))
}
