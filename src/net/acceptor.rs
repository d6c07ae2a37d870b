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

use crate::net::{bound_unread, listen, out_of_descriptors};
use crate::telemetry::{Told, Who, may_say};

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

    /// Wakes nobody but whoever waits for [`woken`](Self::woken).
    #[cfg(test)]
    pub(crate) fn without_acceptor() -> Self {
        Self {
            shared: Arc::default(),
        }
    }

    /// Waits until the sink has commands.
    #[cfg(test)]
    pub(crate) async fn woken(&self) {
        self.shared.wake.notified().await;
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
                receive_buffer: None,
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

    /// Bounds what the kernel takes that nobody reads, of each connection to a port that is bound
    /// from now on; `None` leaves it to the kernel. See [`bound_unread`].
    pub fn set_receive_buffer(&mut self, bytes: Option<usize>) {
        self.core.receive_buffer = bytes;
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
        #[expect(
            deprecated,
            reason = "its successor is unsafe: the descriptor must neither change nor close while \
                      it is registered, and a `Poll` keeps its own for life"
        )]
        let poll = AsyncFd::with_interest(poll, tokio::io::Interest::READABLE);
        let mut poll = poll?;
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
    receive_buffer: Option<usize>,
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
        if let Some(bytes) = self.receive_buffer {
            bound_unread(&listener, bytes)?;
        }
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
                    if let Some(Told { repeated, others }) = may_say("accept", "", Who::Anybody) {
                        warn!(listener = ?name, %error, repeated, others, "can't accept connections");
                    }
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU16;

    use tokio::io::AsyncReadExt;
    use tokio::sync::mpsc;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;
    use crate::net::{bind_failure, raise_descriptor_limit};
    use crate::ports::BindFailure;

    type Opened = (u16, u64, io::Result<()>);
    type Batch = (Listener, Vec<Accepted>);

    /// Far beyond what any step takes: a test that waits this long has failed.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct TestSink {
        commands: Arc<Mutex<VecDeque<Command>>>,
        opened: mpsc::Sender<Opened>,
        accepted: mpsc::Sender<Batch>,
    }

    impl Sink for TestSink {
        fn next_command(&mut self) -> Option<Command> {
            self.commands.lock().unwrap().pop_front()
        }

        fn opened(&mut self, port: u16, key: u64, outcome: io::Result<()>) {
            self.opened.try_send((port, key, outcome)).unwrap();
        }

        fn accepted(&mut self, listener: Listener, batch: Vec<Accepted>) {
            assert!(!batch.is_empty());
            self.accepted.try_send((listener, batch)).unwrap();
        }
    }

    struct Harness {
        handle: AcceptorHandle,
        commands: Arc<Mutex<VecDeque<Command>>>,
        opened: mpsc::Receiver<Opened>,
        accepted: mpsc::Receiver<Batch>,
        task: JoinHandle<io::Result<()>>,
    }

    impl Harness {
        fn start() -> Self {
            Self::start_with(|_| {})
        }

        fn start_with(prepare: impl FnOnce(&mut Acceptor<TestSink>)) -> Self {
            let commands = Arc::new(Mutex::new(VecDeque::new()));
            let (opened_tx, opened) = mpsc::channel(20_000);
            let (accepted_tx, accepted) = mpsc::channel(20_000);
            let sink = TestSink {
                commands: Arc::clone(&commands),
                opened: opened_tx,
                accepted: accepted_tx,
            };
            let (mut acceptor, handle) = Acceptor::new(Ipv6Addr::UNSPECIFIED.into(), sink).unwrap();
            prepare(&mut acceptor);
            Self {
                handle,
                commands,
                opened,
                accepted,
                task: tokio::spawn(acceptor.run()),
            }
        }

        fn command(&self, command: Command) {
            self.commands.lock().unwrap().push_back(command);
            self.handle.wake();
        }

        async fn bind(&mut self, port: u16, key: u64) -> io::Result<()> {
            self.command(Command::Bind { port, key });
            let (answered, number, outcome) = timeout(PATIENCE, self.opened.recv())
                .await
                .unwrap()
                .unwrap();
            assert_eq!((answered, number), (port, key));
            outcome
        }

        /// Binds some port that nobody holds.
        async fn bind_any(&mut self, key: u64) -> u16 {
            loop {
                let port = candidate();
                match self.bind(port, key).await {
                    Ok(()) => return port,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrInUse),
                }
            }
        }

        async fn close(&mut self, listener: Listener) {
            self.command(Command::Close(listener));
            // Commands are performed in order: once this one is answered, that one is done.
            assert!(self.bind(0, 0).await.is_err());
        }

        async fn batch(&mut self) -> Batch {
            timeout(PATIENCE, self.accepted.recv())
                .await
                .unwrap()
                .unwrap()
        }
    }

    /// Ports below the kernel's ephemeral ones, so that no client's socket sits there; others
    /// may, so the caller tries until one is free.
    fn candidate() -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let offset = std::process::id() as u16 % 64 * 300 + NEXT.fetch_add(1, Ordering::Relaxed);
        10_000 + offset % 20_000
    }

    fn connect(port: u16) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap()
    }

    #[tokio::test]
    async fn a_port_is_bound_accepts_over_both_families_and_is_closed() {
        let mut harness = Harness::start();
        let port = harness.bind_any(7).await;
        let name = Listener::Port { port, key: 7 };

        let mut addresses = vec![IpAddr::from(Ipv4Addr::LOCALHOST)];
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            addresses.push(Ipv6Addr::LOCALHOST.into());
        }
        for address in addresses {
            let client = TcpStream::connect((address, port)).unwrap();
            let (listener, batch) = harness.batch().await;
            assert_eq!(listener, name);
            let [visitor] = batch.as_slice() else {
                panic!("{batch:?}");
            };
            assert_eq!(visitor.peer, client.local_addr().unwrap());
            assert_eq!(visitor.peer.ip(), address);
            let nothing_yet = visitor.stream.peek(&mut [0]).unwrap_err();
            assert_eq!(nothing_yet.kind(), io::ErrorKind::WouldBlock);
            if cfg!(target_os = "linux") {
                assert!(visitor.stream.nodelay().unwrap());
            }
        }

        // Under another key, nothing is closed.
        harness.close(Listener::Port { port, key: 8 }).await;
        connect(port);
        assert_eq!(harness.batch().await.0, name);

        harness.close(name).await;
        let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

        // The connections of its last life don't keep the port from its next one.
        harness.bind(port, 9).await.unwrap();
        connect(port);
        assert_eq!(harness.batch().await.0, Listener::Port { port, key: 9 });
    }

    #[tokio::test]
    async fn a_port_that_another_program_holds_is_found_in_use() {
        let mut harness = Harness::start();
        let holders: [IpAddr; 4] = [
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv6Addr::LOCALHOST.into(),
            Ipv6Addr::UNSPECIFIED.into(),
        ];
        for (key, address) in (0..).zip(holders) {
            // Like most programs, std's listener sets SO_REUSEADDR.
            let holder = match TcpListener::bind((address, 0)) {
                Ok(holder) => holder,
                Err(error) if address.is_ipv6() => {
                    eprintln!("no IPv6 here, not tested with {address}: {error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            let port = holder.local_addr().unwrap().port();
            let error = harness.bind(port, key).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
            assert_eq!(bind_failure(&error), BindFailure::InUse);
        }

        // So is our own, for another key.
        let port = harness.bind_any(100).await;
        let error = harness.bind(port, 101).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn an_adopted_listener_is_served_beside_the_ports() {
        let tunnel = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = tunnel.local_addr().unwrap();
        let mut harness = Harness::start_with(|acceptor| acceptor.adopt(tunnel, 3).unwrap());
        let client = TcpStream::connect(address).unwrap();
        let (listener, batch) = harness.batch().await;
        assert_eq!(listener, Listener::Adopted(3));
        assert_eq!(batch[0].peer, client.local_addr().unwrap());
        harness.close(Listener::Adopted(3)).await;
        assert!(TcpStream::connect(address).is_err());
    }

    #[tokio::test]
    async fn connections_on_many_ports_arrive_under_their_port() {
        let limit = raise_descriptor_limit().unwrap().now.unwrap_or(u64::MAX);
        // Other tests of this binary need descriptors at the same time.
        let ports = if limit >= 4_096 { 1_000 } else { 200 };
        let mut harness = Harness::start();
        let mut bound = Vec::new();
        for key in 0..ports {
            bound.push((harness.bind_any(key).await, key));
        }

        // A walk that visits ports in no order, some of them often.
        // Connections to different ports may share a client's port, so both are looked at.
        let mut expected = HashSet::new();
        let mut clients = Vec::new();
        for step in 0..200_usize {
            let (port, key) = bound[step * step * 7 % bound.len()];
            let client = connect(port);
            expected.insert((client.local_addr().unwrap(), Listener::Port { port, key }));
            clients.push(client);
        }
        while !expected.is_empty() {
            let (listener, batch) = harness.batch().await;
            for visitor in batch {
                assert!(expected.remove(&(visitor.peer, listener)));
            }
        }
        let accepted = harness.handle.stats().accepted.load(Ordering::Relaxed);
        assert_eq!(accepted, 200);

        for (port, key) in bound {
            harness.command(Command::Close(Listener::Port { port, key }));
        }
        assert!(harness.bind(0, 0).await.is_err());
        assert!(harness.accepted.is_empty());
    }

    #[tokio::test]
    async fn closing_a_port_resets_the_connections_that_wait_there() {
        let mut harness = Harness::start();
        let port = harness.bind_any(1).await;
        let other = harness.bind_any(2).await;
        // On this one-thread runtime the acceptor can't run before we await.
        let waiting: Vec<_> = (0..10).map(|_| connect(port)).collect();
        harness.close(Listener::Port { port, key: 1 }).await;
        for client in waiting {
            client.set_nonblocking(true).unwrap();
            let mut client = tokio::net::TcpStream::from_std(client).unwrap();
            let read = timeout(PATIENCE, client.read_u8()).await.unwrap();
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        assert!(harness.accepted.is_empty());

        connect(other);
        let (listener, _) = harness.batch().await;
        assert_eq!(
            listener,
            Listener::Port {
                port: other,
                key: 2
            }
        );
    }

    #[tokio::test]
    async fn a_busy_port_takes_turns_with_a_quiet_one() {
        let mut harness = Harness::start();
        let busy = harness.bind_any(1).await;
        let quiet = harness.bind_any(2).await;
        let crowd: Vec<_> = (0..3 * PER_LISTENER).map(|_| connect(busy)).collect();
        let lone = connect(quiet);

        let mut before = 0;
        loop {
            let (listener, batch) = harness.batch().await;
            assert!(batch.len() <= PER_LISTENER);
            match listener {
                Listener::Port { key: 2, .. } => break,
                _ => before += batch.len(),
            }
        }
        assert!(before <= PER_LISTENER, "{before} connections came first");
        let mut rest = crowd.len() - before;
        while rest > 0 {
            rest -= harness.batch().await.1.len();
        }
        drop(lone);
    }

    #[tokio::test]
    async fn shutdown_closes_every_listener() {
        let mut harness = Harness::start();
        let port = harness.bind_any(1).await;
        harness.handle.shutdown();
        timeout(PATIENCE, harness.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    }
}
