//! A server on the network of [`crate::simulation`]: the registry, the workers and their sweeps,
//! sessions, tenancies and limits are the real ones. Left out is what belongs to a real host: the
//! accept task's `epoll`, threads, the admin port, and the state file's disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::balance::Load;
use super::directory::{Directory, RowState};
pub(crate) use super::ingress::simulated::{Outcome, Visitor};
use super::registry::Registry;
use super::state_file::{self, Moment, Signal};
use super::worker::{JobSender, Shared, TunnelSocket, Worker};
use crate::config::ServerConfig;
use crate::headers::RequestIds;
use crate::id::Generation;
use crate::metrics::{Metrics, PortState, Refusal};
use crate::mux::Pool;
use crate::net::acceptor::{AcceptorHandle, Command};
use crate::simulation::net::Socket;
use crate::simulation::random::Random;

impl TunnelSocket for Socket {
    fn peek(&mut self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send {
        Socket::peek(self, buffer)
    }
}

/// An agent as the directory shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) agent_id: String,
    pub(crate) port: u16,
    pub(crate) generation: Generation,
    pub(crate) is_connected: bool,
}

/// See the module. It ends when it is dropped, but for tasks that wait for their sockets.
pub(crate) struct Server {
    shared: Arc<Shared>,
    workers: Vec<Arc<Worker>>,
    directory: Arc<Directory>,
    acceptor: AcceptorHandle,
    /// Never used, but without them the workers end.
    _queues: Vec<JobSender>,
    loops: Vec<AbortHandle>,
}

impl Server {
    /// A server that is told what the former one has written to its disk, at this time of the
    /// calendar's.
    pub(crate) fn start(
        config: ServerConfig,
        disk: Option<&str>,
        calendar: SystemTime,
        random: &Random,
    ) -> Self {
        let count = config.server.workers.unwrap_or(1);
        let here = Duration::ZERO;
        let memory = disk.map(|text| state_file::parse(text, Moment { here, calendar }).unwrap());
        let metrics = Metrics::new(count, calendar);
        let directory = Directory::new();
        let registry = Registry::new(
            &config,
            BTreeSet::new(),
            directory.clone(),
            metrics.clone(),
            memory,
            Some(Arc::new(Signal::default())),
        );
        let shared = Arc::new(Shared {
            access: None,
            pool: Pool::new(config.server.max_buffered),
            tls: None,
            visitors: AtomicUsize::new(0),
            addresses: DashMap::new(),
            handshakes: Mutex::new(BTreeMap::new()),
            loads: (0..count).map(|_| Load::default()).collect(),
            sweeps: (0..count).map(|_| Arc::new(Notify::new())).collect(),
            metrics,
            registry: registry.unwrap(),
            config: ArcSwap::from_pointee(config),
        });
        let mut server = Self {
            workers: Vec::new(),
            directory: directory.clone(),
            acceptor: AcceptorHandle::without_acceptor(),
            _queues: Vec::new(),
            loops: Vec::new(),
            shared: shared.clone(),
        };
        shared.registry.set_acceptor(server.acceptor.clone());
        for index in 0..count {
            let mut seed = [0; 16];
            seed[..8].copy_from_slice(&random.number().to_le_bytes());
            let (worker, queue, jobs) = Worker::new(index, shared.clone(), RequestIds::new(seed));
            server.run(worker.clone().run(jobs));
            server.workers.push(worker);
            server._queues.push(queue);
        }
        server.run(async move { directory.keep_current().await });
        server.run(async move { shared.registry.keep_house().await });
        server
    }

    fn run(&mut self, future: impl Future<Output = ()> + Send + 'static) {
        self.loops.push(tokio::spawn(future).abort_handle());
    }

    /// Serves a connection of an agent's, on one of the workers.
    pub(crate) fn admit(&self, socket: Socket, peer: SocketAddr, random: &Random) {
        let index = random.below(self.workers.len());
        self.shared.loads[index].add(1);
        self.workers[index].admit_stream(socket, peer);
    }

    /// What the accept task would be asked to do next.
    pub(crate) async fn next_command(&self) -> Command {
        loop {
            match self.shared.registry.next_command() {
                Some(command) => return command,
                None => self.acceptor.woken().await,
            }
        }
    }

    /// What became of a bind.
    pub(crate) fn opened(&self, port: u16, key: u64, outcome: io::Result<()>) {
        self.shared.registry.opened(port, key, outcome);
    }

    /// A visitor whose connection was accepted from a port that was bound under this key.
    pub(crate) fn visit(&self, port: u16, key: u64, peer: SocketAddr) -> Result<Visitor, Refusal> {
        let tenancy = self.shared.registry.route(port, key);
        let tenancy = tenancy.ok_or(Refusal::NoTenant)?;
        Visitor::admit(&self.workers[tenancy.worker()], &tenancy, peer)
    }

    /// What the state file would hold, at this time of the calendar's.
    pub(crate) fn memory(&self, calendar: SystemTime) -> (u64, String) {
        let (revision, ports, now) = self.shared.registry.memory();
        let moment = Moment { calendar, ..now };
        (revision, state_file::format(&ports, moment))
    }

    /// Who is here, as the directory shows it.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let snapshot = self.directory.read();
        let rows = snapshot.rows().iter();
        rows.map(|row| Listed {
            agent_id: row.agent_id.to_string(),
            port: row.port,
            generation: row.generation,
            is_connected: row.state == RowState::Serving,
        })
        .collect()
    }

    /// Ends as [`super::Server::shutdown`] does, but for the threads.
    pub(crate) async fn drain(&self) {
        let sessions = self.shared.registry.drain();
        for session in &sessions {
            session.link().drain();
        }
        for worker in &self.workers {
            worker.wind_down();
        }
        let metrics = &self.shared.metrics;
        let end = Instant::now() + self.shared.config().server.grace;
        while metrics.level(|worker| &worker.connections_open) > 0 && Instant::now() < end {
            tokio::time::sleep(super::REST_INTERVAL).await;
        }
        for session in &sessions {
            session.shut_down();
        }
        let end = Instant::now() + Duration::from_secs(1);
        while metrics.level(|worker| &worker.tunnels_open) > 0 && Instant::now() < end {
            tokio::time::sleep(super::REST_INTERVAL).await;
        }
    }

    /// What isn't given back by now, of all that agents and visitors can hold.
    pub(crate) fn left_over(&self) -> Vec<String> {
        let Shared {
            pool,
            visitors,
            addresses,
            handshakes,
            loads,
            metrics,
            ..
        } = &*self.shared;
        let ports = |state| metrics.ports.get(state);
        let figures = [
            ("agents listed", self.directory.read().rows().len() as u64),
            ("bytes promised", pool.used() as u64),
            ("visitors counted", visitors.load(Relaxed) as u64),
            ("addresses counted", addresses.len() as u64),
            ("handshakes", handshakes.lock().unwrap().len() as u64),
            ("tunnels", metrics.level(|worker| &worker.tunnels_open)),
            ("exchanges", metrics.level(|worker| &worker.exchanges_open)),
            (
                "connections",
                metrics.level(|worker| &worker.connections_open),
            ),
            ("ports opening", ports(PortState::Opening) as u64),
            ("ports serving", ports(PortState::Serving) as u64),
            ("ports leased", ports(PortState::Leased) as u64),
            (
                "tunnels counted",
                loads.iter().map(|load| load.tunnels() as u64).sum(),
            ),
        ];
        let mut left: Vec<_> = figures
            .iter()
            .filter(|(_, figure)| *figure != 0)
            .map(|(what, figure)| format!("{figure} {what}"))
            .collect();
        let watched: usize = self.workers.iter().map(|worker| worker.watching()).sum();
        if watched != 0 {
            left.push(format!("{watched} visitors watched"));
        }
        left
    }

    /// Its process dies: nobody binds ports any more, so nobody may wait for one.
    pub(crate) fn crash(&self) {
        self.shared.registry.drain();
    }

    /// Tells whether anything is left of it when it is gone.
    pub(crate) fn remains(&self) -> Remains {
        Remains(Arc::downgrade(&self.shared))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.loops.iter().for_each(AbortHandle::abort);
    }
}

/// What holds a server that was dropped, which are tasks of its sessions and visitors.
pub(crate) struct Remains(Weak<Shared>);

impl Remains {
    pub(crate) fn are_there(&self) -> bool {
        self.0.strong_count() > 0
    }
}
