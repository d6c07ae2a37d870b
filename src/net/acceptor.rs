//! The one task that accepts connections, for the whole port range and the tunnel's port.
//!
//! It owns every listening socket. An `epoll` of its own tells which of them are ready, so that
//! a turn costs as much as there is to accept, however many ports are bound. It binds and closes
//! ports as its [`Sink`] asks, reports how that went, and hands connections over in batches; it
//! waits for nobody else.
//!
//! ```text
//!   AcceptorHandle::wake ──► commands from Sink::next_command ──► bind, close ──► Sink::opened
//!                                                                    │
//!   epoll over all listeners ──► ready list ──► accept, in turns ◄───┘──► Sink::accepted
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mio::{Events, Interest, Poll, Registry, Token};
use rustix::io::Errno;
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::net::{listen, out_of_descriptors};

/// How many connections one listener may hand over before the next one has its turn.
const PER_LISTENER: usize = 64;

/// How many connections are accepted before commands are looked at again and, on a shared
/// runtime, other tasks run: about a millisecond's worth.
const PER_TURN: usize = 256;

/// How many commands are performed before accepting goes on: a bind costs some 10 µs.
const COMMANDS_PER_TURN: usize = 128;

/// How many listeners one look at the kernel can report; the others come with the next look.
const EVENTS: usize = 1024;

/// The first pause when accepting finds no descriptor left; it doubles from failure to failure.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause: a freed descriptor is found within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An episode without descriptors is over when none was missing for this long. At the limit they
/// come and go one by one, which shouldn't fill the log.
const CALM: Duration = Duration::from_secs(2);

/// Which listening socket is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Listener {
    /// One that [`Command::Bind`] asked for.
    Port {
        /// The port it listens on.
        port: u16,
        /// The caller's number for this use of the port (its tenancy), never reused.
        key: u64,
    },
    /// One that was bound elsewhere, under the number given to [`Acceptor::adopt`].
    Adopted(u64),
}

/// What a [`Sink`] can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Listen on a port; [`Sink::opened`] is told how that went.
    Bind {
        /// The port; not 0.
        port: u16,
        /// The number by which to speak of it.
        key: u64,
    },
    /// Close a listener. Connections that the kernel holds in its backlog are reset; those
    /// accepted live on. What isn't open, or open under another key, is left alone.
    Close(Listener),
}

/// A connection as it was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// The socket: nonblocking, closed on exec, on Linux with `TCP_NODELAY`.
    pub stream: TcpStream,
    /// The visitor's address; an IPv4 visitor of a dual-stack socket has an IPv4 address.
    pub peer: SocketAddr,
}

/// Whoever tells an [`Acceptor`] what to listen on, and takes what it accepts.
///
/// All methods are called from the accept task and hold up every port while they run: they must
/// neither block nor take a lock that is held for long.
pub trait Sink: Send {
    /// The next thing to do, oldest first, or `None` when there is nothing now. It is asked after
    /// every [`AcceptorHandle::wake`] and between turns.
    ///
    /// The queue of commands is the sink's own, so it is the sink that bounds it: with the
    /// allocator's effects as queue, it holds what the allocator emitted since the last turn.
    fn next_command(&mut self) -> Option<Command>;

    /// How [`Command::Bind`] went. `net::bind_failure` sorts the errors.
    fn opened(&mut self, port: u16, key: u64, outcome: io::Result<()>);

    /// Connections of one listener, at least one, oldest first. What the sink can't take, it
    /// drops, which closes it.
    fn accepted(&mut self, listener: Listener, batch: Vec<Accepted>);
}

/// What the accept task counts, for the metrics. Counters only grow.
#[derive(Debug, Default)]
pub struct AcceptorStats {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections that broke before they could be accepted.
    pub aborted: AtomicU64,
    /// Times that accepting failed for want of descriptors or memory.
    pub exhausted: AtomicU64,
    /// Times that accepting failed for a reason that isn't known to pass.
    pub failed: AtomicU64,
    /// Whether accepting is paused now for want of descriptors.
    pub paused: AtomicBool,
}

/// Wakes an [`Acceptor`] from any thread, ends it, and reads its counters. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct AcceptorHandle {
    shared: Arc<Shared>,
}

impl AcceptorHandle {
    /// The sink has commands. Call it after they are where [`Sink::next_command`] finds them;
    /// any number of calls before the acceptor gets to look are one.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Ends [`Acceptor::run`], which closes every listener. Commands not yet performed are not.
    pub fn shutdown(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }

    /// The counters.
    pub fn stats(&self) -> &AcceptorStats {
        &self.shared.stats
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Holds at most one permit: that there may be commands.
    wake: Notify,
    stopped: AtomicBool,
    stats: AcceptorStats,
}

/// Owns the listening sockets; see the module.
#[derive(Debug)]
pub struct Acceptor<S> {
    poll: Poll,
    core: Core<S>,
}

impl<S: Sink> Acceptor<S> {
    /// An acceptor that listens nowhere yet. Ports will be bound on `host`; `::` means every
    /// address, IPv4 included. Fails if there is no descriptor for its `epoll`.
    pub fn new(host: IpAddr, sink: S) -> io::Result<(Self, AcceptorHandle)> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        let shared = Arc::new(Shared::default());
        let acceptor = Self {
            poll,
            core: Core {
                host,
                sink,
                registry,
                sockets: Slab::new(),
                open: HashMap::new(),
                ready: VecDeque::new(),
                shortage: None,
                shared: Arc::clone(&shared),
            },
        };
        Ok((acceptor, AcceptorHandle { shared }))
    }

    /// Takes a listener that is bound already, to accept from it as [`Listener::Adopted`] with
    /// this number. Close it by [`Command::Close`].
    pub fn adopt(&mut self, listener: TcpListener, id: u64) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.core.register(listener, Listener::Adopted(id))
    }

    /// Accepts until [`AcceptorHandle::shutdown`]. Then, or when it is dropped, every listener
    /// is closed. Needs a tokio runtime with I/O and time.
    ///
    /// Nothing that a visitor does and no lack of descriptors ends it. It returns an error only
    /// if the kernel refuses to tell which listeners are ready; the server can't go on then.
    pub async fn run(self) -> io::Result<()> {
        let Self { poll, mut core } = self;
        let mut poll = AsyncFd::with_interest(poll, tokio::io::Interest::READABLE)?;
        let mut events = Events::with_capacity(EVENTS);
        let shared = Arc::clone(&core.shared);

        while !shared.stopped.load(Ordering::Acquire) {
            core.note_time(Instant::now());
            let more_commands = core.perform_commands();
            core.accept_turn();

            if more_commands || core.has_work() {
                // Listeners that became ready meanwhile join the round.
                core.collect(poll.get_mut(), &mut events)?;
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = shared.wake.notified() => {}
                // Left alone during a pause: visitors who knock must not cost CPU then.
                readiness = poll.readable_mut(), if !core.paused() => {
                    let mut readiness = readiness?;
                    if core.collect(readiness.get_inner_mut(), &mut events)? {
                        readiness.clear_ready();
                    }
                }
                () = reached(core.deadline()) => {}
            }
        }
        Ok(())
    }
}

/// Ends at the deadline; never, if there is none.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Everything but the `epoll` that tells what is ready.
#[derive(Debug)]
struct Core<S> {
    host: IpAddr,
    sink: S,
    registry: Registry,
    /// Every listening socket; the key is its token.
    sockets: Slab<Socket>,
    open: HashMap<Listener, usize>,
    /// Listeners that may have connections waiting, in the order of their turns. Readiness is
    /// told once (edge-triggered), so it is remembered here until `accept` would block. A closed
    /// listener leaves its entry behind; `Socket::queued` tells the next owner of the key apart.
    ready: VecDeque<usize>,
    shortage: Option<Shortage>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Socket {
    name: Listener,
    listener: mio::net::TcpListener,
    /// Whether it waits in `Core::ready`.
    queued: bool,
}

/// An episode without descriptors.
#[derive(Debug)]
struct Shortage {
    since: Instant,
    last: Instant,
    /// When accepting is tried again; `None` while it goes on.
    resume_at: Option<Instant>,
    next_pause: Duration,
}

/// Why a listener's turn ended.
enum TurnEnd {
    /// Nothing waits there now.
    Drained,
    /// There may be more.
    Unfinished,
    Exhausted(io::Error),
    Failed(io::Error),
}

impl<S: Sink> Core<S> {
    /// Performs what the sink asks for; true if it may have asked for more.
    fn perform_commands(&mut self) -> bool {
        for _ in 0..COMMANDS_PER_TURN {
            match self.sink.next_command() {
                Some(Command::Bind { port, key }) => {
                    let outcome = self.bind(port, key);
                    self.sink.opened(port, key, outcome);
                }
                Some(Command::Close(name)) => self.close(name),
                None => return false,
            }
        }
        true
    }

    fn bind(&mut self, port: u16, key: u64) -> io::Result<()> {
        // Port 0 would be any port, and nobody would know which.
        if port == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let listener = listen(SocketAddr::new(self.host, port))?;
        self.register(listener, Listener::Port { port, key })
    }

    fn register(&mut self, listener: TcpListener, name: Listener) -> io::Result<()> {
        if self.open.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut listener = mio::net::TcpListener::from_std(listener);
        let vacant = self.sockets.vacant_entry();
        self.registry
            .register(&mut listener, Token(vacant.key()), Interest::READABLE)?;
        self.open.insert(name, vacant.key());
        vacant.insert(Socket {
            name,
            listener,
            queued: false,
        });
        Ok(())
    }

    fn close(&mut self, name: Listener) {
        if let Some(key) = self.open.remove(&name) {
            let mut socket = self.sockets.remove(key);
            // Closing the descriptor takes it out of the poll as well; an error changes nothing.
            let _ = self.registry.deregister(&mut socket.listener);
        }
    }

    /// Puts the listeners that became ready on the list. True if the kernel has no more of them.
    fn collect(&mut self, poll: &mut Poll, events: &mut Events) -> io::Result<bool> {
        if let Err(error) = poll.poll(events, Some(Duration::ZERO)) {
            if error.kind() == io::ErrorKind::Interrupted {
                return Ok(false);
            }
            return Err(error);
        }
        let mut count = 0;
        for event in events.iter() {
            count += 1;
            let Token(key) = event.token();
            if let Some(socket) = self.sockets.get_mut(key)
                && !socket.queued
            {
                socket.queued = true;
                self.ready.push_back(key);
            }
        }
        Ok(count < EVENTS)
    }

    /// Accepts from the ready listeners in turn, up to [`PER_TURN`] connections.
    fn accept_turn(&mut self) {
        let mut budget = PER_TURN;
        while budget > 0 && !self.paused() {
            let Some(key) = self.ready.pop_front() else {
                return;
            };
            let Some(socket) = self.sockets.get_mut(key) else {
                continue;
            };
            if !socket.queued {
                continue;
            }
            let name = socket.name;
            let mut batch = Vec::new();
            let (attempts, end) = accept_some(
                &socket.listener,
                PER_LISTENER.min(budget),
                &mut batch,
                &self.shared.stats,
            );
            budget -= attempts;
            socket.queued = matches!(end, TurnEnd::Unfinished | TurnEnd::Exhausted(_));
            if !batch.is_empty() {
                self.sink.accepted(name, batch);
            }
            match end {
                TurnEnd::Drained => self.note_success(),
                TurnEnd::Unfinished => {
                    self.ready.push_back(key);
                    self.note_success();
                }
                TurnEnd::Exhausted(error) => {
                    // It didn't have its turn: it is the first when accepting goes on.
                    self.ready.push_front(key);
                    self.pause(&error);
                }
                // Not tried again before the next connection, lest it spins.
                TurnEnd::Failed(error) => {
                    warn!(listener = ?name, %error, "can't accept connections");
                }
            }
        }
    }

    fn pause(&mut self, error: &io::Error) {
        let now = Instant::now();
        self.shared.stats.paused.store(true, Ordering::Relaxed);
        let shortage = self.shortage.get_or_insert_with(|| {
            warn!(%error, "out of file descriptors or memory: accepting connections is paused");
            Shortage {
                since: now,
                last: now,
                resume_at: None,
                next_pause: SHORTEST_PAUSE,
            }
        });
        shortage.last = now;
        shortage.resume_at = Some(now + shortage.next_pause);
        shortage.next_pause = (shortage.next_pause * 2).min(LONGEST_PAUSE);
    }

    fn note_success(&mut self) {
        if let Some(shortage) = &mut self.shortage {
            shortage.next_pause = SHORTEST_PAUSE;
        }
    }

    /// Ends a pause, or an episode, whose time is over.
    fn note_time(&mut self, now: Instant) {
        let Some(shortage) = &mut self.shortage else {
            return;
        };
        match shortage.resume_at {
            Some(at) if at <= now => {
                shortage.resume_at = None;
                self.shared.stats.paused.store(false, Ordering::Relaxed);
            }
            Some(_) => {}
            None if shortage.last + CALM <= now => {
                let seconds = (shortage.last - shortage.since).as_secs_f32();
                info!(seconds, "accepting connections again without a pause");
                self.shortage = None;
            }
            None => {}
        }
    }

    fn paused(&self) -> bool {
        self.shortage
            .as_ref()
            .is_some_and(|shortage| shortage.resume_at.is_some())
    }

    fn has_work(&self) -> bool {
        !self.ready.is_empty() && !self.paused()
    }

    /// When [`Core::note_time`] has something to do.
    fn deadline(&self) -> Option<Instant> {
        self.shortage
            .as_ref()
            .map(|shortage| shortage.resume_at.unwrap_or(shortage.last + CALM))
    }
}

/// Accepts up to `limit` connections into `batch`; returns how many times it tried.
fn accept_some(
    listener: &mio::net::TcpListener,
    limit: usize,
    batch: &mut Vec<Accepted>,
    stats: &AcceptorStats,
) -> (usize, TurnEnd) {
    for attempt in 1..=limit {
        let error = match listener.accept() {
            Ok((stream, mut peer)) => {
                stats.accepted.fetch_add(1, Ordering::Relaxed);
                peer.set_ip(peer.ip().to_canonical());
                let stream = TcpStream::from(OwnedFd::from(stream));
                batch.push(Accepted { stream, peer });
                continue;
            }
            Err(error) => error,
        };
        match Errno::from_io_error(&error) {
            Some(Errno::AGAIN) => return (attempt, TurnEnd::Drained),
            // The connection broke while it waited, or the firewall objects to it; Linux also
            // reports errors of the new connection's route here (accept(2)).
            Some(
                Errno::INTR
                | Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::PERM
                | Errno::ACCESS
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::OPNOTSUPP
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH,
            ) => {
                stats.aborted.fetch_add(1, Ordering::Relaxed);
            }
            Some(errno) if out_of_descriptors(errno) => {
                stats.exhausted.fetch_add(1, Ordering::Relaxed);
                return (attempt, TurnEnd::Exhausted(error));
            }
            _ => {
                stats.failed.fetch_add(1, Ordering::Relaxed);
                return (attempt, TurnEnd::Failed(error));
            }
        }
    }
    (limit, TurnEnd::Unfinished)
}
