//! Forwards exchanges to the local service: at most so many at once, the others in order.
//!
//! Each connection to the service has one task, its *worker*, which drives the connection and the
//! exchange that it carries, so that nothing is handed from task to task on the way of a request.
//! A worker whose exchange is done takes the next one that waits, else it lies down on top of a
//! stack: the one that lay down last is called first, and those below grow old and leave. A worker
//! whose connection is upgraded carries bytes until that ends, and doesn't count any more.
//!
//! What goes to the service as HTTP/2 has a worker too, but shares its connection: see [`http2`].

mod connection;
mod exchange;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http2;
mod request;
mod service;
mod upgraded;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::poll_fn;
use slab::Slab;

use crate::config::LocalConfig;
use crate::head::RequestHead;
use crate::link::Exchange;
use crate::mux::Reason;

use connection::Connection;

pub(super) use service::Service;
pub use service::ServiceError;

/// Forwards exchanges. When it is dropped, the workers that have nothing to do end; the others
/// end with their exchanges.
pub(super) struct Forwarder(ArcSwap<Shared>);

struct Shared {
    service: Arc<Service>,
    limits: Limits,
    /// The coarse clock: ticks since the start. It stands still while there is no worker.
    now: AtomicU64,
    state: Mutex<State>,
}

/// Times are in ticks.
struct Limits {
    max_workers: usize,
    tick: Duration,
    response: u64,
    idle: u64,
}

struct State {
    /// Exchanges that wait for a worker, in order. The agreement of the session bounds them.
    waiting: VecDeque<Waiting>,
    workers: Slab<Entry>,
    /// Workers that have nothing to do and since when; the last one lay down last.
    idle: Vec<(usize, u64)>,
    /// For what goes to the service as HTTP/2.
    http2: http2::Connections,
    /// A task moves the clock.
    ticking: bool,
    closed: bool,
}

struct Waiting {
    task: Task,
    since: u64,
}

/// An exchange to be forwarded.
struct Task {
    exchange: Exchange,
    head: RequestHead,
}

/// What is known of a worker outside of its task.
struct Entry {
    /// What it is called for.
    call: Option<Call>,
    waker: Option<Waker>,
    deadline: Arc<Deadline>,
}

enum Call {
    Forward(Task),
    Leave,
}

/// When the answer's head must be there, in ticks.
///
/// Relaxed throughout: it is a time, and guards no other memory.
#[derive(Debug)]
struct Deadline {
    at: AtomicU64,
    /// It can't pass, as the visitor is to send more of his body.
    held: AtomicBool,
}

impl Deadline {
    const NONE: u64 = u64::MAX;
    const OVER: u64 = u64::MAX - 1;

    fn new() -> Self {
        Self {
            at: AtomicU64::new(Self::NONE),
            held: AtomicBool::new(false),
        }
    }

    fn set(&self, deadline: u64) {
        self.at.store(deadline, Ordering::Relaxed);
    }

    fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    fn clear(&self) {
        self.set(Self::NONE);
    }

    fn is_over(&self) -> bool {
        self.at.load(Ordering::Relaxed) == Self::OVER
    }

    /// Notes that time is up, if it is by now and wasn't before.
    fn expire(&self, now: u64) -> bool {
        let expired = |deadline| (deadline <= now && !self.is_held()).then_some(Self::OVER);
        self.at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, expired)
            .is_ok()
    }
}

impl Limits {
    fn new(config: &LocalConfig) -> Self {
        // Timeouts are late by one tick at most: a sixteenth, or a quarter of a second.
        let shortest = config.response_timeout.min(config.idle_timeout);
        let tick = (shortest / 16).clamp(Duration::from_millis(5), Duration::from_millis(250));
        // The clock may stand just before its next tick: one more, so that nothing is early.
        let ticks = |time: Duration| time.as_nanos().div_ceil(tick.as_nanos()) as u64 + 1;
        Self {
            max_workers: config.max_connections.max(1),
            tick,
            response: ticks(config.response_timeout),
            idle: ticks(config.idle_timeout),
        }
    }
}

impl Forwarder {
    pub(super) fn new(service: Arc<Service>, config: &LocalConfig) -> Self {
        Self(ArcSwap::from_pointee(Shared::new(service, config)))
    }

    /// Forwards what comes from now on to this service. What has come before is served as before,
    /// by the workers that have it or that it waits for, and then these are gone.
    pub(super) fn replace(&self, service: Arc<Service>, config: &LocalConfig) {
        let old = self.0.swap(Arc::new(Shared::new(service, config)));
        old.close();
    }

    /// Forwards an exchange as soon as a worker is free.
    pub(super) fn submit(&self, exchange: Exchange, head: RequestHead) {
        let shared = &*self.0.load();
        let task = Task { exchange, head };
        let mut state = shared.lock();
        while let Some((index, _)) = state.idle.pop() {
            if let Some(entry) = state.workers.get_mut(index) {
                let waker = entry.call(Call::Forward(task));
                drop(state);
                waker.into_iter().for_each(Waker::wake);
                return;
            }
        }
        if state.workers.len() >= shared.limits.max_workers {
            let since = shared.now();
            state.waiting.push_back(Waiting { task, since });
            return;
        }
        shared.employ(state, task);
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        let shared = self.0.load();
        let waiting = std::mem::take(&mut shared.lock().waiting);
        shared.close();
        // Outside of the lock: it locks the link.
        drop(waiting);
    }
}

impl Shared {
    fn new(service: Arc<Service>, config: &LocalConfig) -> Self {
        Self {
            service,
            limits: Limits::new(config),
            now: AtomicU64::new(0),
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                workers: Slab::new(),
                idle: Vec::new(),
                http2: http2::Connections::default(),
                ticking: false,
                closed: false,
            }),
        }
    }

    /// Starts a worker. Needs a tokio runtime.
    fn employ(self: &Arc<Self>, mut state: MutexGuard<'_, State>, task: Task) {
        let deadline = Arc::new(Deadline::new());
        let index = state.workers.insert(Entry {
            call: None,
            waker: None,
            deadline: deadline.clone(),
        });
        let starts_ticking = !std::mem::replace(&mut state.ticking, true);
        drop(state);
        if starts_ticking {
            tokio::spawn(tick(Arc::downgrade(self), self.limits.tick));
        }
        let worker = Worker {
            shared: self.clone(),
            index: Some(index),
            deadline,
        };
        tokio::spawn(worker.run(task));
    }

    /// Has the workers end that have nothing to do; the others end when they have nothing more.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let wakers: Vec<_> = std::mem::take(&mut state.idle)
            .into_iter()
            .filter_map(|(index, _)| state.workers.get_mut(index)?.call(Call::Leave))
            .collect();
        let unused = state.http2.give_up_unused_since(u64::MAX);
        drop(state);
        drop(unused);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under this lock is a bug, but no reason to stop forwarding.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one tick pass: calls off what has waited too long. Says whether the clock is still
    /// needed.
    fn tick(&self) -> bool {
        let now = self.now() + 1;
        self.now.store(now, Ordering::Relaxed);
        let mut state = self.lock();
        let State {
            waiting,
            workers,
            idle,
            http2,
            ..
        } = &mut *state;
        let mut wakers = Vec::new();
        let mut over = Vec::new();

        let old = idle.partition_point(|(_, since)| since + self.limits.idle <= now);
        for (index, _) in idle.drain(..old) {
            wakers.extend(
                workers
                    .get_mut(index)
                    .and_then(|entry| entry.call(Call::Leave)),
            );
        }
        for (_, entry) in workers.iter() {
            if entry.deadline.expire(now) {
                wakers.extend(entry.waker.clone());
            }
        }
        while let Some(first) = waiting.front()
            && first.since + self.limits.response <= now
        {
            over.extend(waiting.pop_front());
        }
        // Who has been cancelled needn't wait for a turn.
        let mut unwoken = Context::from_waker(Waker::noop());
        if waiting
            .iter()
            .any(|one| one.task.exchange.poll_reset(&mut unwoken).is_ready())
        {
            let (gone, still): (VecDeque<_>, _) = std::mem::take(waiting)
                .into_iter()
                .partition(|one| one.task.exchange.poll_reset(&mut unwoken).is_ready());
            *waiting = still;
            over.extend(gone);
        }
        let unused = now.checked_sub(self.limits.idle);
        let unused = unused.map(|then| http2.give_up_unused_since(then));
        let needed = !workers.is_empty() || !http2.is_empty();
        state.ticking = needed;
        drop(state);
        drop(unused);

        wakers.into_iter().for_each(Waker::wake);
        for one in over {
            one.task.exchange.abort(Reason::UpstreamTimeout);
        }
        needed
    }
}

/// Moves the clock while there are workers.
async fn tick(shared: Weak<Shared>, period: Duration) {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval.tick().await;
    loop {
        interval.tick().await;
        if !shared.upgrade().is_some_and(|shared| shared.tick()) {
            return;
        }
    }
}

impl Entry {
    fn call(&mut self, call: Call) -> Option<Waker> {
        self.call = Some(call);
        self.waker.clone()
    }
}

/// The task of one exchange after the other, and of the connection that they leave behind.
struct Worker {
    shared: Arc<Shared>,
    /// Where its entry is, until it has left or stepped aside.
    index: Option<usize>,
    deadline: Arc<Deadline>,
}

enum Next {
    Task(Task),
    Idle,
    Leave,
}

impl Worker {
    async fn run(mut self, first: Task) {
        // A task keeps its waker, so it is enough to leave it once.
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        if let Some(entry) = self.entry(&mut self.shared.lock()) {
            entry.waker = Some(waker);
        }
        let mut connection = None;
        let mut next = Some(first);
        while let Some(task) = next {
            if self.service().takes_http2(&task.head) {
                // In a box, as most services need no room for it.
                Box::pin(http2::forward(&self, task)).await;
            } else {
                connection = exchange::forward(&mut self, connection, task).await;
            }
            self.deadline.clear();
            next = match self.next(connection.is_some()) {
                Next::Task(task) => Some(task),
                Next::Idle => self.idle(&mut connection).await,
                Next::Leave => None,
            };
        }
    }

    fn service(&self) -> &Service {
        &self.shared.service
    }

    /// The answer's head is to be there in `local.response_timeout` from now, or from the next
    /// piece of the request that the service gets.
    fn start_deadline(&self) {
        let limits = &self.shared.limits;
        self.deadline.set(self.shared.now() + limits.response);
    }

    /// Gives its turn to the next exchange that waits: what this worker has to carry is no request
    /// any more, and may go on for days.
    fn step_aside(&mut self) {
        let Some(index) = self.index.take() else {
            return;
        };
        let mut state = self.shared.lock();
        state.workers.try_remove(index);
        if let Some(next) = state.waiting.pop_front() {
            self.shared.employ(state, next.task);
        }
    }

    /// What a worker does that has done its task.
    fn next(&mut self, connected: bool) -> Next {
        if self.index.is_none() {
            // It has stepped aside.
            return Next::Leave;
        }
        let shared = self.shared.clone();
        let mut state = shared.lock();
        if connected
            && !state.closed
            && state.waiting.is_empty()
            && let Some(index) = self.index
        {
            state.idle.push((index, shared.now()));
            return Next::Idle;
        }
        match self.leave(&mut state) {
            Some(task) => Next::Task(task),
            None => Next::Leave,
        }
    }

    /// Waits for the next task, while the service keeps the connection open.
    async fn idle(&mut self, connection: &mut Option<Box<Connection>>) -> Option<Task> {
        let shared = self.shared.clone();
        poll_fn(|cx| {
            let closed = connection
                .as_mut()
                .is_none_or(|connection| connection.poll_closed(cx).is_ready());
            if closed {
                *connection = None;
            }
            let mut state = shared.lock();
            match self.entry(&mut state).and_then(|entry| entry.call.take()) {
                Some(Call::Forward(task)) => Poll::Ready(Some(task)),
                Some(Call::Leave) => Poll::Ready(self.leave(&mut state)),
                None if closed => {
                    state.idle.retain(|(index, _)| Some(*index) != self.index);
                    Poll::Ready(self.leave(&mut state))
                }
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Leaves, unless a task waits: whoever has submitted it has counted on this worker.
    fn leave(&mut self, state: &mut State) -> Option<Task> {
        if let Some(next) = state.waiting.pop_front() {
            return Some(next.task);
        }
        if let Some(index) = self.index.take() {
            state.workers.try_remove(index);
        }
        None
    }

    fn entry<'a>(&self, state: &'a mut State) -> Option<&'a mut Entry> {
        state.workers.get_mut(self.index?)
    }
}

impl Drop for Worker {
    /// For the worker whose task is cut off with its runtime, or by a panic: then another one takes
    /// its place for those who wait.
    fn drop(&mut self) {
        if let Some(index) = self.index {
            let mut state = self.shared.lock();
            let entry = state.workers.try_remove(index);
            state.idle.retain(|(idle, _)| *idle != index);
            let next = match std::thread::panicking() {
                true => state.waiting.pop_front(),
                false => None,
            };
            match next {
                Some(next) => self.shared.employ(state, next.task),
                None => drop(state),
            }
            // It may hold an exchange, which locks its link when it is let go.
            drop(entry);
        }
    }
}
