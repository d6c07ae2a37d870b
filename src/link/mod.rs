//! The tunnel as tasks see it: a [`mux::Session`] behind a short lock, and a waker for each task
//! that waits for something in it.
//!
//! A [`Link`] is shared by the tasks of all exchanges and by the one that drives the tunnel's
//! connection ([`Tunnel::drive`]). Nothing is handed from task to task through a channel: whoever
//! has something to say locks the session, says it, and wakes whoever has to act on it. The lock is
//! never held across an await, and every use of it is short: it covers memory, no I/O. A tunnel and
//! its visitors live on one worker thread, so it is all but never contended; from another thread the
//! same calls work, only slower.

mod gather;
pub mod tunnel;

pub use gather::Gather;
pub use tunnel::Tunnel;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::poll_fn;
use thiserror::Error;
use tokio::time::Instant;

use crate::head::{Lines, RequestHead, ResponseHead};
use crate::mux::{
    self, BATCH_BYTES, Budget, Config, Frame, HeadRead, Key, OpenError, Read, Reason, Session,
    SessionError,
};
use crate::wire::{Frames, Rejection, WireError};

/// One end of a tunnel, to be cloned into every task that uses it.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

struct Shared {
    /// Time in the session counts from here.
    epoch: Instant,
    state: Mutex<State>,
}

struct State {
    session: Session,
    /// The tasks that wait for an exchange, by [`Key::index`].
    waiting: Vec<Waiting>,
    /// The agent's task that waits for exchanges.
    acceptor: Option<Waker>,
    /// The task that drives the connection; woken when there is something to send, and to end.
    driver: Option<Waker>,
    /// The task that waits for the last exchange to end.
    drainer: Option<Waker>,
    /// No more is sent than there is now.
    finishing: bool,
    closed: bool,
}

/// What is to be sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transmission {
    /// Frames.
    Batch,
    /// Nothing more, after all that was sent. Said once.
    Last,
    /// Nothing: the tunnel has ended.
    Closed,
}

/// The tasks that wait for one exchange: one at most for each direction.
#[derive(Default)]
struct Waiting {
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Why a tunnel ended.
#[derive(Debug, Error)]
pub enum Ended {
    /// The peer ended the stream in good order.
    #[error("the peer closed the session")]
    Closed,
    /// This side ended it by [`Link::close`].
    #[error("closed here")]
    ClosedHere,
    /// The connection failed, or the call on it.
    #[error("the connection failed: {0}")]
    Connection(#[from] tunnel::Error),
    /// The peer broke the protocol, or fell silent.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// The peer sent something that can't be understood.
    #[error("{0}")]
    Wire(#[from] WireError),
}

impl From<mux::ProtocolError> for Ended {
    fn from(error: mux::ProtocolError) -> Self {
        Self::Session(error.into())
    }
}

/// What a tunnel carried, for the statistics of its owner.
pub trait Observer {
    /// A message came with this many frames.
    fn received(&mut self, frames: usize);
    /// A message goes with this many.
    fn sent(&mut self, frames: usize) {
        let _ = frames;
    }
    /// A heartbeat came back.
    fn round_trip(&mut self, round_trip: Duration);
    /// The server said why it is about to end the session. Exchanges go on until it does.
    fn rejected(&mut self, rejection: Rejection) {
        let _ = rejection;
    }
}

impl Link {
    /// The server's end, which opens exchanges.
    pub fn opener(config: Config, budget: Budget) -> Self {
        Self::new(Session::opener(config, budget, Duration::ZERO))
    }

    /// The agent's end, which accepts them.
    pub fn acceptor(config: Config, budget: Budget) -> Self {
        Self::new(Session::acceptor(config, budget, Duration::ZERO))
    }

    fn new(session: Session) -> Self {
        Self(Arc::new(Shared {
            epoch: Instant::now(),
            state: Mutex::new(State {
                session,
                waiting: Vec::new(),
                acceptor: None,
                driver: None,
                drainer: None,
                finishing: false,
                closed: false,
            }),
        }))
    }

    /// Opens an exchange; without `expects_body` the request ends with its head.
    pub fn open(&self, head: RequestHead, expects_body: bool) -> Result<Exchange, OpenError> {
        let key = self.act(|session| session.open(head, expects_body))?;
        Ok(self.exchange(key))
    }

    /// Waits for the next exchange that the peer opens; none when the tunnel has ended.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Option<(Exchange, RequestHead)>> {
        let mut state = self.lock();
        if let Some((key, head)) = state.session.accept() {
            drop(state);
            return Poll::Ready(Some((self.exchange(key), head)));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        set_waker(&mut state.acceptor, cx);
        Poll::Pending
    }

    /// Fills `frames` with what is to be sent next, if that is a batch.
    fn poll_transmit(&self, cx: &mut Context<'_>, frames: &mut Vec<Frame>) -> Poll<Transmission> {
        let now = self.now();
        let mut state = self.lock();
        if state.closed {
            return Poll::Ready(Transmission::Closed);
        }
        state.session.transmit(now, BATCH_BYTES, frames);
        if frames.is_empty() {
            if std::mem::take(&mut state.finishing) {
                return Poll::Ready(Transmission::Last);
            }
            set_waker(&mut state.driver, cx);
            return Poll::Pending;
        }
        // Having sent makes room for writers, and may have ended the last exchange.
        let wakers = state.take_wakers();
        drop(state);
        wakers.wake();
        Poll::Ready(Transmission::Batch)
    }

    /// Waits for the tunnel's end by [`Link::close`].
    fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.closed {
            return Poll::Ready(());
        }
        set_waker(&mut state.driver, cx);
        Poll::Pending
    }

    fn handle_timeout(&self) -> Result<(), SessionError> {
        self.act(|session| session.handle_timeout(self.now()))
    }

    /// Notes a sign of life that is no message.
    fn heard(&self) {
        let now = self.now();
        self.lock().session.heard(now);
    }

    fn receive(&self, message: impl Frames) -> Result<Received, Ended> {
        let now = self.now();
        let mut frames = 0;
        let mut state = self.lock();
        state.session.heard(now);
        let mut outcome = Ok(());
        for frame in message.into_frames() {
            frames += 1;
            outcome = frame
                .map_err(Ended::from)
                .and_then(|frame| state.session.receive(frame, now).map_err(Ended::from));
            if outcome.is_err() {
                break;
            }
        }
        let round_trip = state.session.round_trip();
        let wakers = state.take_wakers();
        drop(state);
        wakers.wake();
        outcome.map(|()| Received { frames, round_trip })
    }

    /// Asks the peer for no new exchanges, and refuses to open any here.
    pub fn drain(&self) {
        self.act(Session::drain);
    }

    /// Whether the peer asked for no new exchanges.
    pub fn peer_is_draining(&self) -> bool {
        self.lock().session.peer_is_draining()
    }

    /// Waits until no exchange is under way, or the tunnel has ended.
    pub async fn idle(&self) {
        poll_fn(|cx| {
            let mut state = self.lock();
            if state.closed || state.session.is_empty() {
                return Poll::Ready(());
            }
            set_waker(&mut state.drainer, cx);
            Poll::Pending
        })
        .await;
    }

    /// Ends our side of the tunnel once all that is to be sent now has been; then the peer ends its
    /// own.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.finishing = true;
        let driver = state.driver.take();
        drop(state);
        driver.into_iter().for_each(Waker::wake);
    }

    /// Ends the tunnel at once. Exchanges under way end with [`Reason::TunnelLost`].
    pub fn close(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.closed, true) {
            return;
        }
        state.session.close();
        let mut wakers = state.take_wakers();
        wakers.push(state.acceptor.take());
        wakers.push(state.driver.take());
        wakers.push(state.drainer.take());
        drop(state);
        wakers.wake();
    }

    /// The exchanges that hold a slot now.
    pub fn exchanges(&self) -> usize {
        self.lock().session.len()
    }

    fn exchange(&self, key: Key) -> Exchange {
        Exchange(Arc::new(Held {
            link: self.clone(),
            key,
        }))
    }

    fn now(&self) -> Duration {
        self.0.epoch.elapsed()
    }

    fn next_timeout(&self) -> Instant {
        let timeout = self.lock().session.poll_timeout();
        self.0.epoch + timeout.unwrap_or(Duration::MAX / 4)
    }

    /// Does something to the session and wakes whoever has to act on it.
    fn act<T>(&self, action: impl FnOnce(&mut Session) -> T) -> T {
        let mut state = self.lock();
        let result = action(&mut state.session);
        let wakers = state.take_all_wakers();
        drop(state);
        wakers.wake();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside the core is a bug, but no reason to take the other exchanges down.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

struct Received {
    frames: usize,
    round_trip: Option<Duration>,
}

struct CloseOnDrop<'a>(&'a Link);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl State {
    /// The tasks that have something to do now, but for the one that drives the connection. To be
    /// woken when the lock is free again.
    fn take_wakers(&mut self) -> Wakers {
        let mut wakers = Wakers::default();
        while let Some(event) = self.session.poll_event() {
            let Some(waiting) = self.waiting.get_mut(event.index) else {
                continue;
            };
            if event.what.readable {
                wakers.push(waiting.reader.take());
            }
            if event.what.writable {
                wakers.push(waiting.writer.take());
            }
        }
        if self.session.has_accepted() {
            wakers.push(self.acceptor.take());
        }
        if self.drainer.is_some() && self.session.is_empty() {
            wakers.push(self.drainer.take());
        }
        wakers
    }

    /// The same with the one that drives the connection, for any other task's use.
    fn take_all_wakers(&mut self) -> Wakers {
        let mut wakers = self.take_wakers();
        if self.session.wants_transmit() {
            wakers.push(self.driver.take());
        }
        wakers
    }

    fn waiting(&mut self, key: Key) -> &mut Waiting {
        let index = key.index();
        if self.waiting.len() <= index {
            self.waiting.resize_with(index + 1, Waiting::default);
        }
        &mut self.waiting[index]
    }
}

/// Wakers to be woken outside of the lock; the first needs no allocation.
#[derive(Default)]
struct Wakers {
    first: Option<Waker>,
    list: Vec<Waker>,
}

impl Wakers {
    fn push(&mut self, waker: Option<Waker>) {
        if self.first.is_none() {
            self.first = waker;
        } else {
            self.list.extend(waker);
        }
    }

    fn wake(self) {
        self.first
            .into_iter()
            .chain(self.list)
            .for_each(Waker::wake);
    }
}

/// Keeps the newest waker, without cloning one that would wake the same task.
fn set_waker(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

/// One request and its answer, seen from one end. When the last clone is dropped the exchange is
/// let go: if our side hasn't ended it is cancelled.
///
/// In each direction at most one task may wait at a time: one polls the head and reads, one
/// polls for capacity and writes. They may be the same.
#[derive(Clone)]
pub struct Exchange(Arc<Held>);

struct Held {
    link: Link,
    key: Key,
}

impl Exchange {
    /// Waits for the next head of the answer; never [`HeadRead::Pending`].
    pub fn poll_head(&self, cx: &mut Context<'_>) -> Poll<HeadRead> {
        let mut state = self.0.link.lock();
        match state.session.read_head(self.0.key) {
            HeadRead::Pending => {
                set_waker(&mut state.waiting(self.0.key).reader, cx);
                Poll::Pending
            }
            head => Poll::Ready(head),
        }
    }

    /// Waits for the next piece of the peer's body; never [`Read::Pending`]. Reading returns
    /// credit to the peer, so read only what can be passed on.
    pub fn poll_read(&self, cx: &mut Context<'_>) -> Poll<Read> {
        let mut state = self.0.link.lock();
        let read = state.session.read(self.0.key);
        match read {
            Read::Pending => {
                set_waker(&mut state.waiting(self.0.key).reader, cx);
                Poll::Pending
            }
            Read::Data(_) => {
                let wakers = state.take_all_wakers();
                drop(state);
                wakers.wake();
                Poll::Ready(read)
            }
            read => Poll::Ready(read),
        }
    }

    /// Waits until body bytes can be sent and says how many. An error says why there is no use
    /// in waiting.
    pub fn poll_capacity(&self, cx: &mut Context<'_>) -> Poll<Result<usize, Reason>> {
        let mut state = self.0.link.lock();
        match state.session.capacity(self.0.key) {
            Ok(0) => {
                set_waker(&mut state.waiting(self.0.key).writer, cx);
                Poll::Pending
            }
            capacity => Poll::Ready(capacity),
        }
    }

    /// Waits until the peer, or the end of the tunnel, has made it useless to send anything, and
    /// says why. Only for an exchange whose own side isn't ended yet.
    pub fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<Reason> {
        let mut state = self.0.link.lock();
        match state.session.capacity(self.0.key) {
            Ok(_) => {
                set_waker(&mut state.waiting(self.0.key).writer, cx);
                Poll::Pending
            }
            Err(reason) => Poll::Ready(reason),
        }
    }

    /// Sends an interim answer (1xx).
    pub fn interim(&self, head: ResponseHead) {
        self.act(|session, key| session.interim(key, head));
    }

    /// Sends the final answer's head.
    pub fn answer(&self, head: ResponseHead) {
        self.act(|session, key| session.answer(key, head));
    }

    /// Sends body bytes; ask [`Exchange::poll_capacity`] before taking them from their source.
    pub fn send(&self, chunk: Bytes) -> Result<(), Reason> {
        self.act(|session, key| session.send(key, chunk))
    }

    /// Ends our side after what was sent, with a trailer section or without.
    pub fn finish(&self, trailers: Option<Lines>) {
        self.act(|session, key| session.finish(key, trailers));
    }

    /// Ends our side early, but after what was sent: the source broke off.
    pub fn fail(&self, reason: Reason) {
        self.act(|session, key| session.fail(key, reason));
    }

    /// Ends our side at once; what wasn't sent yet is dropped.
    pub fn abort(&self, reason: Reason) {
        self.act(|session, key| session.abort(key, reason));
    }

    fn act<T>(&self, action: impl FnOnce(&mut Session, Key) -> T) -> T {
        self.0.link.act(|session| action(session, self.0.key))
    }
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Exchange").field(&self.0.key.id()).finish()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.session.release(self.key);
        // The place is the next exchange's; its wakers, if any are left, are this one's.
        if let Some(waiting) = state.waiting.get_mut(self.key.index()) {
            *waiting = Waiting::default();
        }
        if state.session.is_empty() && state.waiting.capacity() > 64 {
            state.waiting = Vec::new();
        }
        let wakers = state.take_all_wakers();
        drop(state);
        wakers.wake();
    }
}
