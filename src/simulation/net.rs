//! A network of hosts in memory: TCP as a program sees it, on a clock that the test owns.
//!
//! What TCP promises is kept: bytes come whole, in order and once, or the connection breaks. What
//! it doesn't promise is drawn by chance: how long they take, and in which pieces they come. Faults
//! are those of real networks, as programs see them:
//!
//! * A direction between two hosts is *blocked*: nothing passes, connects hang. When it opens
//!   again, what was lost is sent anew after a while, as a kernel's retransmission timer doubles.
//!   If only one direction is blocked, data still come the other way, but their acknowledgements
//!   don't: the sender's buffer fills.
//! * A connection is *cut* after so many bytes: reset, gone silent, or told to the test, which then
//!   kills one of its ends.
//! * A host *crashes*: its programs' sockets are gone at once. Its peers are told by the kernel
//!   (a process died), or not before the host is back and is sent something (a power cut).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes};
use slab::Slab;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::random::Random;

/// How much a sender's kernel holds that the receiver's program hasn't taken.
const BUFFER: usize = 64 * 1024;

/// The largest piece in which bytes travel.
const SEGMENT: usize = 1460 * 10;

/// The longest that a retransmission waits after a link is back.
const LONGEST_RETRANSMISSION: Duration = Duration::from_secs(20);

/// A host, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Host(pub(crate) u8);

impl Host {
    fn address(self, port: u16) -> SocketAddr {
        (Ipv4Addr::new(10, 0, 0, self.0), port).into()
    }
}

/// What is done to a connection when so many bytes have been sent one way.
#[derive(Debug)]
pub(crate) struct Cut {
    /// By whom the bytes are sent that are counted.
    pub(crate) sender: Side,
    /// After how many.
    pub(crate) after: usize,
    /// What happens then.
    pub(crate) how: How,
}

/// See [`Cut`].
#[derive(Debug)]
pub(crate) enum How {
    /// Both ends are reset.
    Reset,
    /// Nothing passes any more, either way.
    Silence,
    /// The test is told.
    Tell(oneshot::Sender<()>),
}

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// See the module. Clones are the same network.
#[derive(Clone)]
pub(crate) struct Net(Arc<Mutex<World>>);

struct World {
    random: Random,
    /// How long bytes take, in milliseconds.
    delay: std::ops::Range<u64>,
    /// Since when nothing passes from one host to another.
    blocked: BTreeMap<(Host, Host), Instant>,
    /// Hosts without power.
    down: BTreeSet<Host>,
    listeners: BTreeMap<(Host, u16), Backlog>,
    connections: Slab<Connection>,
    /// For the next connections from a host, the first first.
    cuts: BTreeMap<Host, VecDeque<Cut>>,
    next_port: u16,
    next_number: u64,
}

#[derive(Default)]
struct Backlog {
    number: u64,
    waiting: VecDeque<(Socket, SocketAddr)>,
    waker: Option<Waker>,
}

struct Connection {
    number: u64,
    hosts: [Host; 2],
    /// What is sent by each end.
    lanes: [Lane; 2],
    ends: [End; 2],
    cut: Option<Cut>,
    /// Nothing passes any more.
    silent: bool,
}

/// One direction.
#[derive(Default)]
struct Lane {
    flight: VecDeque<(Instant, Item)>,
    arrived: VecDeque<Bytes>,
    sent: usize,
    /// Sent, and not known to have been taken.
    unacked: usize,
    /// Of those, taken by the receiver, whose word doesn't get through.
    unheard: usize,
    finished: bool,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

enum Item {
    Bytes(Bytes),
    End,
    Reset,
}

#[derive(Debug, Default, Clone, Copy)]
struct End {
    /// Its program has let go of it.
    closed: bool,
    /// Broken, as its program knows or will when it looks.
    broken: bool,
}

impl Net {
    pub(crate) fn new(random: Random, delay: std::ops::Range<u64>) -> Self {
        Self(Arc::new(Mutex::new(World {
            random,
            delay,
            blocked: BTreeMap::new(),
            down: BTreeSet::new(),
            listeners: BTreeMap::new(),
            connections: Slab::new(),
            cuts: BTreeMap::new(),
            next_port: 30_000,
            next_number: 1,
        })))
    }

    /// Listens on a port.
    pub(crate) fn listen(&self, host: Host, port: u16) -> io::Result<Listener> {
        let mut world = self.lock();
        if world.listeners.contains_key(&(host, port)) {
            return Err(rustix::io::Errno::ADDRINUSE.into());
        }
        let number = world.number();
        let backlog = Backlog {
            number,
            ..Backlog::default()
        };
        world.listeners.insert((host, port), backlog);
        Ok(Listener {
            net: self.clone(),
            at: (host, port),
            number,
        })
    }

    /// Connects; hangs as long as nothing passes.
    pub(crate) async fn connect(&self, from: Host, to: Host, port: u16) -> io::Result<Socket> {
        let mut retry = Duration::from_secs(1);
        loop {
            let delay = {
                let world = self.lock();
                let passes = world.passes(from, to) && world.passes(to, from);
                passes.then(|| world.delay() + world.delay())
            };
            if let Some(delay) = delay {
                sleep(delay).await;
                let mut world = self.lock();
                if world.passes(from, to) && world.passes(to, from) {
                    return world.establish(self, from, to, port);
                }
            }
            // As Linux sends a SYN again.
            sleep(retry).await;
            retry *= 2;
        }
    }

    /// Cuts the next connection from `host` that isn't cut by an earlier call.
    pub(crate) fn cut_next(&self, host: Host, cut: Cut) {
        self.lock().cuts.entry(host).or_default().push_back(cut);
    }

    /// Nothing passes from one host to another, until [`Net::open`].
    pub(crate) fn block(&self, from: Host, to: Host) {
        let mut world = self.lock();
        let now = Instant::now();
        // What has come in time lies at the receiver.
        for (_, connection) in &mut world.connections {
            for side in [Side::Client, Side::Server] {
                if connection.is_lane(side, from, to) {
                    connection.deliver(side, now);
                }
            }
        }
        world.blocked.entry((from, to)).or_insert(now);
    }

    /// Everything passes again.
    pub(crate) fn open(&self, from: Host, to: Host) {
        let mut world = self.lock();
        let now = Instant::now();
        let Some(since) = world.blocked.remove(&(from, to)) else {
            return;
        };
        let outage = (now - since).min(LONGEST_RETRANSMISSION);
        let random = world.random.clone();
        for (_, connection) in &mut world.connections {
            for side in [Side::Client, Side::Server] {
                if connection.is_lane(side, from, to) {
                    let again = now + random.millis(0..outage.as_millis() as u64 + 1);
                    let lane = &mut connection.lanes[side as usize];
                    for (due, _) in &mut lane.flight {
                        *due = (*due).max(again);
                    }
                    lane.wake_reader();
                }
                if connection.is_lane(side, to, from) {
                    let lane = &mut connection.lanes[side as usize];
                    lane.unacked -= std::mem::take(&mut lane.unheard);
                    lane.wake_writer();
                }
            }
        }
    }

    /// Ends everything on a host. If it is `silent`, no kernel is left that could tell the peers.
    pub(crate) fn crash(&self, host: Host, silent: bool) {
        let orphans = {
            let mut world = self.lock();
            if silent {
                world.down.insert(host);
            }
            let delay = world.delay();
            for (_, connection) in &mut world.connections {
                for side in [Side::Client, Side::Server] {
                    if connection.hosts[side as usize] == host {
                        connection.lose(side, (!silent).then_some(delay));
                    }
                }
            }
            let on_host = |(at, _): &&(Host, u16)| *at == host;
            let at: Vec<_> = world.listeners.keys().filter(on_host).copied().collect();
            let removed = at.iter().filter_map(|at| world.listeners.remove(at));
            removed.collect::<Vec<_>>()
        };
        // Sockets nobody has accepted lock the world when they are dropped.
        drop(orphans);
    }

    /// A crashed host is back, and knows nothing of its connections.
    pub(crate) fn reboot(&self, host: Host) {
        let mut world = self.lock();
        world.down.remove(&host);
        let delay = world.delay();
        let lag = world.random.millis(0..2_000);
        for (_, connection) in &mut world.connections {
            for side in [Side::Client, Side::Server] {
                let orphan = connection.hosts[side as usize] == host
                    && connection.ends[side as usize].broken;
                let peer = side.other();
                if orphan && connection.silent && !connection.ends[peer as usize].broken {
                    connection.silent = false;
                    // What the peer has sent meanwhile is sent again, and found to be for nobody.
                    if connection.lanes[peer as usize].unacked > 0 {
                        connection.put(side, Instant::now() + lag + delay, Item::Reset);
                    }
                }
            }
        }
    }

    /// Sets how long bytes take, in milliseconds.
    pub(crate) fn set_delay(&self, delay: std::ops::Range<u64>) {
        self.lock().delay = delay;
    }

    /// Everything passes, fast, and nothing will be cut. What has fallen silent stays so.
    pub(crate) fn heal(&self) {
        let blocked: Vec<_> = self.lock().blocked.keys().copied().collect();
        for (from, to) in blocked {
            self.open(from, to);
        }
        let mut world = self.lock();
        world.cuts.clear();
        for (_, connection) in &mut world.connections {
            connection.cut = None;
        }
        world.delay = 0..5;
    }

    /// How many sockets programs hold.
    pub(crate) fn sockets_open(&self) -> usize {
        let world = self.lock();
        let ends = world
            .connections
            .iter()
            .flat_map(|(_, connection)| connection.ends);
        ends.filter(|end| !end.closed).count()
    }

    /// The ports on which a host listens.
    pub(crate) fn listening(&self, host: Host) -> Vec<u16> {
        let world = self.lock();
        let on_host = world.listeners.keys().filter(|(at, _)| *at == host);
        on_host.map(|(_, port)| *port).collect()
    }

    /// How many bytes each end of the newest connection between two hosts has sent.
    pub(crate) fn sent(&self, client: Host, server: Host) -> [usize; 2] {
        let world = self.lock();
        let between = world
            .connections
            .iter()
            .filter(|(_, connection)| connection.hosts == [client, server]);
        let newest = between.max_by_key(|(_, connection)| connection.number);
        newest.map_or([0; 2], |(_, connection)| {
            [connection.lanes[0].sent, connection.lanes[1].sent]
        })
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

impl World {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn delay(&self) -> Duration {
        self.random.millis(self.delay.clone())
    }

    fn passes(&self, from: Host, to: Host) -> bool {
        !self.blocked.contains_key(&(from, to))
            && !self.down.contains(&from)
            && !self.down.contains(&to)
    }

    fn establish(&mut self, net: &Net, from: Host, to: Host, port: u16) -> io::Result<Socket> {
        if !self.listeners.contains_key(&(to, port)) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let cut = self.cuts.get_mut(&from).and_then(VecDeque::pop_front);
        let number = self.number();
        let key = self.connections.insert(Connection {
            number,
            hosts: [from, to],
            lanes: [Lane::default(), Lane::default()],
            ends: [End::default(); 2],
            cut,
            silent: false,
        });
        self.next_port = self.next_port.checked_add(1).unwrap_or(30_000);
        let peer = from.address(self.next_port);
        let socket = |side| Socket {
            net: net.clone(),
            key,
            side,
            timer: None,
        };
        // The server's end is another task's to accept.
        if let Some(backlog) = self.listeners.get_mut(&(to, port)) {
            backlog.waiting.push_back((socket(Side::Server), peer));
            backlog.waker.take().into_iter().for_each(Waker::wake);
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.cut_if_due(Side::Client, Instant::now());
            connection.cut_if_due(Side::Server, Instant::now());
        }
        Ok(socket(Side::Client))
    }
}

impl Connection {
    /// Whether what this end sends goes from one host to the other.
    fn is_lane(&self, side: Side, from: Host, to: Host) -> bool {
        self.hosts[side as usize] == from && self.hosts[side.other() as usize] == to
    }

    /// Takes off the lane what has come by now.
    fn deliver(&mut self, side: Side, now: Instant) {
        if self.silent {
            return;
        }
        let lane = &mut self.lanes[side as usize];
        while let Some((due, _)) = lane.flight.front()
            && *due <= now
        {
            match lane.flight.pop_front() {
                Some((_, Item::Bytes(bytes))) => lane.arrived.push_back(bytes),
                Some((_, Item::End)) => lane.ended = true,
                Some((_, Item::Reset)) => {
                    lane.arrived.clear();
                    let receiver = side.other();
                    self.ends[receiver as usize].broken = true;
                    self.lanes[receiver as usize].wake_writer();
                    return;
                }
                None => {}
            }
        }
    }

    /// Sends something, behind what was sent before.
    fn put(&mut self, side: Side, due: Instant, item: Item) {
        let lane = &mut self.lanes[side as usize];
        let last = lane.flight.back().map_or(due, |(last, _)| *last);
        lane.flight.push_back((due.max(last), item));
        lane.wake_reader();
    }

    /// One end is no more, without a word of its program's. With a delay its kernel resets the
    /// connection.
    fn lose(&mut self, side: Side, reset: Option<Duration>) {
        let end = &mut self.ends[side as usize];
        if end.broken {
            return;
        }
        end.broken = true;
        match reset {
            Some(_) if end.closed => {}
            Some(delay) => self.put(side, Instant::now() + delay, Item::Reset),
            None => self.silent = true,
        }
        self.lanes[side as usize].wake_writer();
        self.lanes[side.other() as usize].wake_reader();
    }

    /// Cuts the connection, if this end has sent as much as that takes.
    fn cut_if_due(&mut self, side: Side, due: Instant) {
        let is_due = |cut: &Cut| cut.sender == side && self.lanes[side as usize].sent >= cut.after;
        if !self.cut.as_ref().is_some_and(is_due) {
            return;
        }
        match self.cut.take().map(|cut| cut.how) {
            Some(How::Reset) => {
                self.put(side, due, Item::Reset);
                self.put(side.other(), due, Item::Reset);
            }
            Some(How::Silence) => self.silent = true,
            Some(How::Tell(tell)) => {
                let _ = tell.send(());
            }
            None => {}
        }
    }
}

impl Lane {
    fn wake_reader(&mut self) {
        self.reader.take().into_iter().for_each(Waker::wake);
    }

    fn wake_writer(&mut self) {
        self.writer.take().into_iter().for_each(Waker::wake);
    }
}

/// A port that is listened on until this is dropped.
pub(crate) struct Listener {
    net: Net,
    at: (Host, u16),
    number: u64,
}

impl Listener {
    /// Waits for the next connection; none if the host has crashed.
    pub(crate) async fn accept(&self) -> Option<(Socket, SocketAddr)> {
        poll_fn(|cx| {
            let mut world = self.net.lock();
            let backlog = world.listeners.get_mut(&self.at);
            let Some(backlog) = backlog.filter(|backlog| backlog.number == self.number) else {
                return Poll::Ready(None);
            };
            match backlog.waiting.pop_front() {
                Some(accepted) => Poll::Ready(Some(accepted)),
                None => {
                    backlog.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut world = self.net.lock();
        let ours = world.listeners.get(&self.at);
        let removed = match ours.is_some_and(|backlog| backlog.number == self.number) {
            true => world.listeners.remove(&self.at),
            false => None,
        };
        drop(world);
        // Each of its sockets locks the world.
        drop(removed);
    }
}

/// One end of a connection.
pub(crate) struct Socket {
    net: Net,
    key: usize,
    side: Side,
    /// For what is on its way.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    /// Waits until something can be read, the end included.
    fn poll_readable(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut VecDeque<Bytes>) -> usize,
    ) -> Poll<io::Result<()>> {
        loop {
            let now = Instant::now();
            let mut world = self.net.lock();
            let sender = self.side.other();
            let connection = &world.connections[self.key];
            let [from, to] = [sender, self.side].map(|side| connection.hosts[side as usize]);
            let passes = world.passes(from, to);
            let heard = world.passes(to, from);
            let connection = &mut world.connections[self.key];
            if passes && !connection.ends[self.side as usize].broken {
                connection.deliver(sender, now);
            }
            if connection.ends[self.side as usize].broken {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let silent = connection.silent;
            let lane = &mut connection.lanes[sender as usize];
            if !lane.arrived.is_empty() {
                let taken = take(&mut lane.arrived);
                if heard && !silent {
                    lane.unacked -= taken;
                    lane.wake_writer();
                } else {
                    lane.unheard += taken;
                }
                return Poll::Ready(Ok(()));
            }
            if lane.ended {
                return Poll::Ready(Ok(()));
            }
            lane.reader = Some(cx.waker().clone());
            let due = lane.flight.front().map(|(due, _)| *due);
            drop(world);
            let Some(due) = due.filter(|_| passes && !silent) else {
                return Poll::Pending;
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timer = None;
        }
    }

    /// Waits for something to come, and copies what fits.
    pub(crate) async fn peek(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut copied = 0;
            let outcome = self.poll_readable(cx, |arrived| {
                if let Some(bytes) = arrived.front() {
                    copied = bytes.len().min(buffer.len());
                    buffer[..copied].copy_from_slice(&bytes[..copied]);
                }
                0
            });
            outcome.map_ok(|()| copied)
        })
        .await
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_readable(cx, |arrived| {
            let mut taken = 0;
            if let Some(bytes) = arrived.front_mut() {
                taken = bytes.len().min(buffer.remaining());
                buffer.put_slice(&bytes[..taken]);
                bytes.advance(taken);
                if bytes.is_empty() {
                    arrived.pop_front();
                }
            }
            taken
        })
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let now = Instant::now();
        let mut world = self.net.lock();
        let random = world.random.clone();
        let delay = world.delay();
        let down = world.down.clone();
        let connection = &mut world.connections[self.key];
        let peer = connection.ends[self.side.other() as usize];
        let peer_host = connection.hosts[self.side.other() as usize];
        let lane = &mut connection.lanes[self.side as usize];
        if connection.ends[self.side as usize].broken || lane.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = BUFFER.saturating_sub(lane.unacked);
        if room == 0 {
            lane.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut length = bytes.len().min(room).min(1 + random.below(SEGMENT));
        if let Some(cut) = &connection.cut
            && cut.sender == self.side
        {
            length = length.min((cut.after - lane.sent).max(1));
        }
        lane.sent += length;
        lane.unacked += length;
        let piece = Bytes::copy_from_slice(&bytes[..length]);
        connection.put(self.side, now + delay, Item::Bytes(piece));
        if (peer.closed || peer.broken) && !down.contains(&peer_host) {
            // Nobody is there whom it could be for.
            connection.put(self.side.other(), now + delay * 2, Item::Reset);
        }
        connection.cut_if_due(self.side, now + delay);
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut world = self.net.lock();
        let delay = world.delay();
        let connection = &mut world.connections[self.key];
        if !std::mem::replace(&mut connection.lanes[self.side as usize].finished, true) {
            connection.put(self.side, Instant::now() + delay, Item::End);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let Ok(mut world) = self.net.0.lock() else {
            return;
        };
        let delay = world.delay();
        let Some(connection) = world.connections.get_mut(self.key) else {
            return;
        };
        connection.ends[self.side as usize].closed = true;
        if !connection.ends[self.side as usize].broken {
            let theirs = &connection.lanes[self.side.other() as usize];
            let is_data = |item: &(Instant, Item)| matches!(item.1, Item::Bytes(_));
            let unread = !theirs.arrived.is_empty() || theirs.flight.iter().any(is_data);
            let finished = connection.lanes[self.side as usize].finished;
            match (unread, finished) {
                (true, _) => connection.put(self.side, Instant::now() + delay, Item::Reset),
                (false, false) => connection.put(self.side, Instant::now() + delay, Item::End),
                (false, true) => {}
            }
        }
        connection.lanes[self.side as usize].finished = true;
        if connection.ends.iter().all(|end| end.closed) {
            world.connections.remove(self.key);
        }
    }
}
