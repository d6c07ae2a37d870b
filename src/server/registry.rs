//! Who is connected, on which port: the one owner of sessions, tenancies and the port allocator.
//!
//! A session joins, and gets its port; it leaves, and gives it back. What the allocator wants
//! bound or closed is kept here for the accept task, which asks for it, and what became of it
//! comes back as [`Registry::opened`]. Everything happens under one short lock: the work is a few map
//! operations for each coming and going of an agent, and no request touches it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use thiserror::Error;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::directory::{Directory, Row, RowState, RowText};
use super::rivals::{Instance, Newcomer, Rivals};
use super::session::Session;
use super::state_file::{Memory, Moment, Signal};
use super::tenancy::{Tenancy, Tunnel};
use crate::config::ServerConfig;
use crate::id::{AgentId, Generation};
use crate::metrics::{AgentStats, Metrics, PortState};
use crate::net::acceptor::{AcceptorHandle, Command, Listener};
use crate::ports::{self, Allocation, Allocator, Answer, Effect, PinError, Remembered};
use crate::telemetry::{Told, Who, may_say};

/// The host of an agent's URL when neither the settings nor the agent named one.
pub(super) const DEFAULT_HOST: &str = "localhost";

/// An agent that has shown who it is and asks for its port.
pub(super) struct Applicant {
    /// Who it is.
    pub agent_id: AgentId,
    /// Which process of that agent.
    pub instance: Option<Instance>,
    /// The port it had last, as far as it knows.
    pub last_port: Option<u16>,
    /// Its session.
    pub session: Arc<Session>,
    /// The worker its tunnel lives on.
    pub worker: usize,
    /// It knows what to do with a request that asks for another protocol.
    pub upgrades: bool,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Its software, for people.
    pub software: String,
    /// What it says of itself.
    pub labels: BTreeMap<String, String>,
    /// The host part of the URL that visitors use.
    pub public_host: String,
}

/// What a session got when it joined.
#[derive(Debug)]
pub(super) struct Joined {
    /// Its number, which whoever cleans up after it has to show.
    pub generation: Generation,
    /// Its port.
    pub port: u16,
    /// Where visitors reach it.
    pub public_url: String,
    /// The agent's live figures.
    pub stats: Arc<AgentStats>,
}

/// Why a session couldn't join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum JoinError {
    /// There is no port for it.
    #[error("{0}")]
    Port(#[from] ports::Refusal),
    /// A newer session of the same agent came while this one waited.
    #[error("a newer session of this agent took over")]
    Replaced,
    /// This process has lost the id to one that is connected.
    #[error("the agent that took this id over is still connected; two agents must not share an id")]
    Duplicate,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
}

/// See the module.
pub(super) struct Registry {
    /// Held for a few map operations, never across I/O or an await.
    state: Mutex<State>,
    /// From the local port to whose it is: read by the accept task for each connection.
    routes: DashMap<u16, Arc<Tenancy>>,
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    acceptor: OnceLock<AcceptorHandle>,
    /// Wakes whoever keeps house: another timer is the first.
    changed: Notify,
    /// Time in the allocator counts from here.
    epoch: Instant,
    /// The server's own ports.
    reserved: BTreeSet<u16>,
    /// The word to whoever writes the state file, if there is one.
    saver: Option<Arc<Signal>>,
    /// For the rows of leases from before a restart: when they were written, and the host of
    /// their URLs.
    restored: (SystemTime, String),
}

struct State {
    allocator: Allocator,
    /// The allocator's memory that the saver has been told of.
    told_revision: u64,
    /// What was to be remembered when the drain began, which released every port.
    last_memory: Option<Vec<Remembered>>,
    /// The newest session of each agent that holds a port, connected or not.
    members: BTreeMap<AgentId, Member>,
    /// Sessions whose port is being bound. One at most for each tenancy.
    waiting: HashMap<Allocation, Waiting>,
    /// For the accept task. It holds what the allocator emitted since that looked last: two for
    /// each port at most.
    commands: VecDeque<Command>,
    /// Sessions that were replaced and may be finishing what they had under way.
    replaced: Vec<Weak<Session>>,
    next_generation: u64,
    /// The allocator's first timer, as whoever keeps house was told last.
    timer: Option<Duration>,
    draining: bool,
}

fn ports_config(config: &ServerConfig, reserved: BTreeSet<u16>) -> ports::Config {
    ports::Config {
        range: config.http.agent_port_range.clone(),
        pinned: config.http.static_ports.clone(),
        reserved,
        lease: config.http.port_lease,
        foreign_retry: ports::Config::FOREIGN_RETRY,
    }
}

struct Member {
    tenancy: Arc<Tenancy>,
    /// Who cleans up must show this.
    generation: Generation,
    /// None while the port is leased.
    session: Option<Arc<Session>>,
    rivals: Rivals,
    row: Arc<Row>,
}

struct Waiting {
    applicant: Applicant,
    /// With those whom the applicant has turned out while they waited.
    rivals: Rivals,
    reply: oneshot::Sender<Result<Joined, JoinError>>,
}

impl Registry {
    /// A registry without members. What `memory` says of ports is taken over: leases that still
    /// run are bound again. `saver` is told whenever what is to be remembered has changed.
    pub(super) fn new(
        config: &ServerConfig,
        reserved: BTreeSet<u16>,
        directory: Arc<Directory>,
        metrics: Arc<Metrics>,
        memory: Option<Memory>,
        saver: Option<Arc<Signal>>,
    ) -> Result<Arc<Self>, PinError> {
        let mut allocator = Allocator::new(ports_config(config, reserved.clone()))?;
        let restored_at = memory
            .as_ref()
            .map_or(SystemTime::now(), |memory| memory.written);
        let public_host = config.http.public_host.clone();
        if let Some(memory) = memory {
            allocator.restore(memory.ports, Duration::ZERO);
        }
        let registry = Arc::new(Self {
            state: Mutex::new(State {
                allocator,
                told_revision: 0,
                last_memory: None,
                members: BTreeMap::new(),
                waiting: HashMap::new(),
                commands: VecDeque::new(),
                replaced: Vec::new(),
                next_generation: 1,
                timer: None,
                draining: false,
            }),
            routes: DashMap::new(),
            directory,
            metrics,
            acceptor: OnceLock::new(),
            changed: Notify::new(),
            epoch: Instant::now(),
            reserved,
            saver,
            restored: (
                restored_at.min(SystemTime::now()),
                public_host.unwrap_or_else(|| DEFAULT_HOST.into()),
            ),
        });
        registry.settle(&mut registry.lock());
        Ok(registry)
    }

    /// Says whom to wake when there is something to bind or to close.
    pub(super) fn set_acceptor(&self, acceptor: AcceptorHandle) {
        // Set once, at start.
        let _ = self.acceptor.set(acceptor);
    }

    /// Goes by the range, pins and lease of new settings from now on, or by none of them if the
    /// pins can't hold. Says how many agents are where these wouldn't put them, and stay there
    /// until they leave.
    pub(super) fn reconfigure(&self, config: &ServerConfig) -> Result<usize, PinError> {
        let config = ports_config(config, self.reserved.clone());
        let mut state = self.lock();
        let now = self.epoch.elapsed();
        let draining = state.allocator.reconfigure(config, now)?;
        self.settle(&mut state);
        Ok(draining)
    }

    /// Lets every process that lost its id ask for it again. For when credentials have changed:
    /// whoever holds an id by an old one gives way to whoever shows the new one.
    pub(super) fn pardon(&self) {
        for member in self.lock().members.values_mut() {
            member.rivals.pardon();
        }
    }

    /// Takes a session in: waits until its port is bound, or says why there is none. A session
    /// that the agent already has is replaced, and its port isn't bound anew, unless it is the one
    /// that has replaced this process before.
    pub(super) async fn join(&self, applicant: Applicant) -> Result<Joined, JoinError> {
        let answer = {
            let mut state = self.lock();
            if state.draining {
                return Err(JoinError::Draining);
            }
            let member = state.members.get(&applicant.agent_id);
            if let Some(member) = member
                && member.session.is_some()
                && member.rivals.judge(applicant.instance) == Newcomer::Loser
            {
                return Err(JoinError::Duplicate);
            }
            let now = self.epoch.elapsed();
            let answer =
                match state
                    .allocator
                    .request(&applicant.agent_id, applicant.last_port, now)
                {
                    Answer::Refused(refusal) => {
                        self.settle(&mut state);
                        return Err(refusal.into());
                    }
                    Answer::Ready { allocation, port } => {
                        let none = Rivals::default();
                        let joined = self.admit(&mut state, applicant, allocation, port, none);
                        self.settle(&mut state);
                        return Ok(joined);
                    }
                    Answer::Opening { allocation } => {
                        let (reply, answer) = oneshot::channel();
                        let mut rivals = Rivals::default();
                        if let Some(older) = state.waiting.remove(&allocation) {
                            rivals = older.rivals;
                            let _ = older.reply.send(Err(JoinError::Replaced));
                        }
                        rivals.admit(applicant.instance);
                        let waiting = Waiting {
                            applicant,
                            rivals,
                            reply,
                        };
                        state.waiting.insert(allocation, waiting);
                        answer
                    }
                };
            self.settle(&mut state);
            answer
        };
        // The sender goes without an answer only when everything ends.
        answer.await.unwrap_or(Err(JoinError::Draining))
    }

    /// Gives a session's port back, if it is still that session's. Says whether the port has been
    /// released by that.
    pub(super) fn leave(&self, agent_id: &AgentId, generation: Generation) -> bool {
        let mut state = self.lock();
        let Some(member) = state.members.get(agent_id) else {
            return false;
        };
        if member.generation != generation || member.session.is_none() {
            return false;
        }
        let tenancy = member.tenancy.clone();
        self.lose(&mut state, agent_id);
        self.settle(&mut state);
        tenancy.is_over()
    }

    /// The tenancy that a connection accepted from `port` under `key` belongs to.
    pub(super) fn route(&self, port: u16, key: u64) -> Option<Arc<Tenancy>> {
        let tenancy = self.routes.get(&port)?;
        (tenancy.allocation == Allocation(key)).then(|| Arc::clone(&tenancy))
    }

    /// The accept task's next command.
    pub(super) fn next_command(&self) -> Option<Command> {
        self.lock().commands.pop_front()
    }

    /// What became of a bind.
    pub(super) fn opened(&self, port: u16, key: u64, outcome: io::Result<()>) {
        let mut state = self.lock();
        let allocation = Allocation(key);
        match outcome {
            Ok(()) => state
                .allocator
                .bound(port, allocation, self.epoch.elapsed()),
            Err(error) => {
                self.metrics.bind_failures.inc();
                if crate::net::bind_failure(&error) == ports::BindFailure::Descriptors
                    && let Some(Told { repeated, others }) =
                        may_say("descriptors", "", Who::Anybody)
                {
                    warn!(
                        port,
                        %error,
                        repeated,
                        others,
                        "port could not be bound: raise the limit of open files"
                    );
                } else {
                    debug!(port, %error, "port could not be bound");
                }
                let now = self.epoch.elapsed();
                let failure = crate::net::bind_failure(&error);
                state.allocator.bind_failed(port, allocation, failure, now);
            }
        }
        self.settle(&mut state);
    }

    /// Lets leases end, and ports of other programs be tried again, until the future is dropped.
    pub(super) async fn keep_house(&self) {
        loop {
            let timeout = self.lock().allocator.poll_timeout();
            let due = async {
                match timeout {
                    Some(at) => tokio::time::sleep_until(self.epoch + at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.changed.notified() => {}
                () = due => {
                    let mut state = self.lock();
                    let now = self.epoch.elapsed();
                    state.allocator.handle_timeout(now);
                    self.settle(&mut state);
                }
            }
        }
    }

    /// What a restart should know, as [`state_file::keep`](super::state_file::keep) wants it.
    pub(super) fn memory(&self) -> (u64, Vec<Remembered>, Moment) {
        let state = self.lock();
        let ports = match &state.last_memory {
            Some(last) => last.clone(),
            None => state.allocator.memory(),
        };
        let now = Moment {
            here: self.epoch.elapsed(),
            calendar: SystemTime::now(),
        };
        (state.told_revision, ports, now)
    }

    /// Closes every port and takes nobody in any more. Sessions go on until they are ended;
    /// returned are those that are connected, replaced ones included.
    pub(super) fn drain(&self) -> Vec<Arc<Session>> {
        let mut state = self.lock();
        state.draining = true;
        let sessions = state
            .members
            .values()
            .filter_map(|member| member.session.clone())
            .chain(state.replaced.iter().filter_map(Weak::upgrade))
            .collect();
        // Whoever is connected has its port again after a restart.
        state.last_memory = Some(state.allocator.memory());
        state.allocator.release_all();
        self.settle(&mut state);
        sessions
    }

    /// Performs what the allocator wants, until it wants nothing.
    fn settle(&self, state: &mut State) {
        while let Some(effect) = state.allocator.poll_effect() {
            match effect {
                Effect::Bind { port, allocation } => state.commands.push_back(Command::Bind {
                    port,
                    key: allocation.0,
                }),
                Effect::Close { port, allocation } => {
                    state.commands.push_back(Command::Close(Listener::Port {
                        port,
                        key: allocation.0,
                    }));
                }
                Effect::Granted { allocation, port } => self.granted(state, allocation, port),
                Effect::Refused {
                    allocation,
                    refusal,
                } => {
                    if let Some(waiting) = state.waiting.remove(&allocation) {
                        let _ = waiting.reply.send(Err(refusal.into()));
                    }
                }
                Effect::Reclaimed {
                    allocation,
                    port,
                    agent,
                } => self.reclaimed(state, allocation, port, agent),
                Effect::Released { allocation, port } => self.released(state, allocation, port),
                Effect::Foreign { port, failure } => {
                    if let Some(Told { repeated, others }) = may_say("foreign", "", port) {
                        let reason = match failure {
                            ports::BindFailure::InUse => "another program holds it",
                            ports::BindFailure::Denied => "not allowed to bind it",
                            _ => "it can't be bound",
                        };
                        warn!(
                            port,
                            reason, repeated, others, "port is not ours, skipped for a while"
                        );
                    }
                }
            }
        }
        let counts = state.allocator.counts();
        let gauges = &self.metrics.ports;
        gauges.set(PortState::Free, counts.free);
        gauges.set(PortState::Opening, counts.opening);
        gauges.set(PortState::Serving, counts.serving);
        gauges.set(PortState::Leased, counts.leased);
        gauges.set(PortState::Foreign, counts.foreign);
        if !state.commands.is_empty()
            && let Some(acceptor) = self.acceptor.get()
        {
            acceptor.wake();
        }
        let revision = state.allocator.memory_revision();
        if let Some(saver) = &self.saver
            && std::mem::replace(&mut state.told_revision, revision) != revision
        {
            saver.changed();
        }
        let timer = state.allocator.poll_timeout();
        if std::mem::replace(&mut state.timer, timer) != timer {
            self.changed.notify_one();
        }
    }

    fn granted(&self, state: &mut State, allocation: Allocation, port: u16) {
        let Some(waiting) = state.waiting.remove(&allocation) else {
            return;
        };
        let Waiting {
            applicant,
            rivals,
            reply,
        } = waiting;
        let agent_id = applicant.agent_id.clone();
        info!(port, %agent_id, "port opened");
        let joined = self.admit(state, applicant, allocation, port, rivals);
        if reply.send(Ok(joined)).is_err() {
            // The session ended while it waited.
            self.lose(state, &agent_id);
        }
    }

    /// Ends the hold of an agent's session on its port, which the allocator then leases or
    /// releases.
    fn lose(&self, state: &mut State, agent_id: &AgentId) {
        let Some(member) = state.members.get_mut(agent_id) else {
            return;
        };
        member.session = None;
        member.tenancy.disconnect(member.generation);
        member.row = Arc::new(Row {
            state: RowState::Leased,
            peer: None,
            ..Row::clone(&member.row)
        });
        self.directory.replace(member.row.clone());
        let allocation = member.tenancy.allocation;
        let now = self.epoch.elapsed();
        state.allocator.agent_lost(allocation, now);
    }

    /// Makes the applicant the agent's session on a port that is bound. `rivals` are those of the
    /// wait for the port, if there was one.
    fn admit(
        &self,
        state: &mut State,
        applicant: Applicant,
        allocation: Allocation,
        port: u16,
        mut rivals: Rivals,
    ) -> Joined {
        let generation = Generation(state.next_generation);
        state.next_generation += 1;
        self.metrics.registrations.inc();

        let agent_id = applicant.agent_id;
        let older = state.members.remove(&agent_id);
        let is_listed = older.is_some();
        let tenancy = match &older {
            Some(member) if member.tenancy.allocation == allocation => member.tenancy.clone(),
            _ => Tenancy::new(
                agent_id.clone(),
                allocation,
                port,
                AgentStats::new(SystemTime::now()),
            ),
        };
        tenancy.connect(Tunnel {
            link: applicant.session.link().clone(),
            generation,
            worker: applicant.worker,
            upgrades: applicant.upgrades,
        });
        self.routes.insert(port, tenancy.clone());
        if let Some(member) = older {
            rivals = member.rivals;
            match (member.session, rivals.judge(applicant.instance)) {
                (None, _) => {}
                (Some(session), Newcomer::Reconnect) => {
                    info!(%agent_id, generation = generation.0, "agent reconnected; its older session is ended");
                    session.outlived();
                }
                (Some(session), Newcomer::Successor | Newcomer::Loser) => {
                    info!(%agent_id, generation = generation.0, "session replaced by a newer one of the same agent");
                    state.replaced.retain(|session| session.strong_count() > 0);
                    state.replaced.push(Arc::downgrade(&session));
                    session.replace();
                }
            }
        }
        rivals.admit(applicant.instance);
        let public_url = format!("http://{}:{port}/", applicant.public_host);
        let row = Arc::new(Row {
            agent_id: agent_id.clone(),
            port,
            generation,
            state: RowState::Serving,
            peer: Some(applicant.peer),
            connected_at: SystemTime::now(),
            version: applicant.software,
            labels: applicant.labels,
            public_url: public_url.clone(),
            stats: tenancy.stats.clone(),
            text: RowText::default(),
        });
        match is_listed {
            true => self.directory.replace(row.clone()),
            false => self.directory.add(row.clone()),
        }
        let stats = tenancy.stats.clone();
        state.members.insert(
            agent_id,
            Member {
                tenancy,
                generation,
                session: Some(applicant.session),
                rivals,
                row,
            },
        );
        Joined {
            generation,
            port,
            public_url,
            stats,
        }
    }

    /// Lets visitors of a lease from before the restart know that the agent is away.
    fn reclaimed(&self, state: &mut State, allocation: Allocation, port: u16, agent_id: AgentId) {
        let (seen, host) = &self.restored;
        let stats = AgentStats::new(*seen);
        let tenancy = Tenancy::new(agent_id.clone(), allocation, port, stats.clone());
        self.routes.insert(port, tenancy.clone());
        info!(port, %agent_id, "port opened for an agent that is away");
        // No session has this number.
        let generation = Generation(0);
        let row = Arc::new(Row {
            agent_id: agent_id.clone(),
            port,
            generation,
            state: RowState::Leased,
            peer: None,
            connected_at: *seen,
            version: String::new(),
            labels: BTreeMap::new(),
            public_url: format!("http://{host}:{port}/"),
            stats,
            text: RowText::default(),
        });
        let member = Member {
            tenancy,
            generation,
            session: None,
            rivals: Rivals::default(),
            row,
        };
        self.directory.add(member.row.clone());
        state.members.insert(agent_id, member);
    }

    fn released(&self, state: &mut State, allocation: Allocation, port: u16) {
        if let Some(waiting) = state.waiting.remove(&allocation) {
            let _ = waiting.reply.send(Err(JoinError::Draining));
        }
        let Some((_, tenancy)) = self
            .routes
            .remove_if(&port, |_, tenancy| tenancy.allocation == allocation)
        else {
            return;
        };
        tenancy.end();
        info!(port, agent_id = %tenancy.agent_id, "port closed");
        if state
            .members
            .get(&tenancy.agent_id)
            .is_some_and(|member| member.tenancy.allocation == allocation)
        {
            state.members.remove(&tenancy.agent_id);
            self.directory.remove(&tenancy.agent_id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
