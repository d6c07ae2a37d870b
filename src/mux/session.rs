use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::budget::Budget;
use super::error::{OpenError, ProtocolError, Reason, SessionError};
use super::exchange::{Cancel, Ending, Exchange, HeadOut, Read};
use super::frame::Frame;
use super::queue::IndexQueue;
use super::store::{Key, Store};
use super::{MAX_HEAD, MAX_WINDOW, RESERVED_WINDOW};
use crate::head::{Lines, RequestHead, ResponseHead};
use crate::id::ExchangeId;

/// What both ends of a tunnel agree upon in the handshake.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The most exchanges under way at once.
    pub max_exchanges: u32,
    /// How often a heartbeat is sent.
    pub heartbeat_interval: Duration,
    /// How long a silent peer counts as alive. Any frame is a sign of life.
    pub heartbeat_timeout: Duration,
}

/// Something happened to an exchange that a task may be waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The [`Key::index`] of the exchange.
    pub index: usize,
    /// What happened.
    pub what: Events,
}

/// What happened since the last event of the exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    /// A head, data, or the end has come.
    pub readable: bool,
    /// There is capacity again, or there will never be: see [`Session::stopped`].
    pub writable: bool,
}

/// What an opener learns of the answer's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadRead {
    /// An interim answer (1xx); others and the final one may follow.
    Interim(ResponseHead),
    /// The final answer; its body follows.
    Answer(ResponseHead),
    /// There won't be an answer.
    Reset(Reason),
    /// Nothing yet.
    Pending,
}

/// A larger interim answer isn't passed on: it needs no credit, so it has to be small.
const MAX_INTERIM: usize = 8 * 1024;

/// The bytes an exchange may send before the next one has its turn.
const QUANTUM: usize = 16 * 1024;

/// What a new exchange may borrow at once for its answer: with the reserved window, 64 KiB, as
/// much as HTTP/2 grants a stream by default.
const FIRST_LOAN: usize = 48 * 1024;

/// The most bytes that wait in one exchange's outbox before its source is asked to wait. Enough
/// to fill a batch while the next piece is being read.
const OUTBOX_LIMIT: usize = 128 * 1024;

#[cfg(any(test, fuzzing))]
mod audit;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Opener,
    Acceptor,
}

/// One end of a tunnel.
#[derive(Debug)]
pub struct Session {
    role: Role,
    config: Config,
    budget: Budget,
    store: Store,
    /// Exchanges that are not over: the number the agreement limits.
    live: u32,
    /// Exchanges with something to send, in the order of their turns.
    ready: IndexQueue,
    /// Exchanges with credit or a reset to send.
    control: IndexQueue,
    /// Exchanges with an event to report.
    events: IndexQueue,
    /// Exchanges the application hasn't accepted yet. They are in the store, which admits no more
    /// than the agreed number.
    accepted: VecDeque<(Key, RequestHead)>,
    heartbeat: Heartbeat,
    drain: Drain,
    closed: bool,
}

#[derive(Debug)]
struct Heartbeat {
    last_heard: Duration,
    next_ping: Duration,
    ping_due: bool,
    pong_due: Option<u64>,
    nonce: u64,
    /// When the newest ping went out, while its answer is awaited.
    sent_at: Option<Duration>,
    round_trip: Option<Duration>,
}

#[derive(Debug, Default)]
struct Drain {
    ours: bool,
    frame_due: bool,
    peers: bool,
}

impl Session {
    /// The end that opens exchanges: the server's.
    pub fn opener(config: Config, budget: Budget, now: Duration) -> Self {
        Self::new(Role::Opener, Store::opener(), config, budget, now)
    }

    /// The end that accepts exchanges: the agent's.
    pub fn acceptor(config: Config, budget: Budget, now: Duration) -> Self {
        Self::new(Role::Acceptor, Store::acceptor(), config, budget, now)
    }

    fn new(role: Role, store: Store, config: Config, budget: Budget, now: Duration) -> Self {
        Self {
            role,
            config,
            budget,
            store,
            live: 0,
            ready: IndexQueue::default(),
            control: IndexQueue::default(),
            events: IndexQueue::default(),
            accepted: VecDeque::new(),
            heartbeat: Heartbeat {
                last_heard: now,
                next_ping: now + config.heartbeat_interval,
                ping_due: false,
                pong_due: None,
                nonce: 0,
                sent_at: None,
                round_trip: None,
            },
            drain: Drain::default(),
            closed: false,
        }
    }

    // --- The application's side -------------------------------------------------------------

    /// Opens an exchange. With `expects_body` unset the request ends with its head.
    pub fn open(&mut self, head: RequestHead, expects_body: bool) -> Result<Key, OpenError> {
        debug_assert_eq!(self.role, Role::Opener);
        if self.closed {
            return Err(OpenError::TunnelLost);
        }
        if self.drain.ours || self.drain.peers {
            return Err(OpenError::Draining);
        }
        let reserved = 2 * RESERVED_WINDOW as usize + head.size();
        if self.live >= self.config.max_exchanges || head.size() > MAX_HEAD {
            return Err(OpenError::Overloaded);
        }
        // A released exchange that the peer hasn't ended yet still holds its slot, so the store
        // may not outgrow the agreement either: the peer rejects higher slots.
        if self.store.len() >= self.config.max_exchanges as usize || !self.budget.reserve(reserved)
        {
            return Err(OpenError::Overloaded);
        }
        let loan = self.budget.lend(FIRST_LOAN);
        let key = self.store.insert_named(|id| {
            let window = RESERVED_WINDOW + loan as u32;
            let mut exchange = Exchange::new(id, window, reserved + loan);
            exchange.head_out = Some(HeadOut::Open(head, loan as u32));
            exchange.head_given = true;
            if !expects_body {
                exchange.ending_out = Some(Ending::Complete(None));
            }
            exchange
        });
        self.live += 1;
        self.schedule(key.index);
        Ok(key)
    }

    /// The next exchange that the peer has opened, and hasn't given up meanwhile.
    pub fn accept(&mut self) -> Option<(Key, RequestHead)> {
        loop {
            let (key, head) = self.accepted.pop_front()?;
            if self.stopped(key).is_none() {
                return Some((key, head));
            }
            self.release(key);
        }
    }

    /// Whether exchanges wait for [`Session::accept`].
    pub fn has_accepted(&self) -> bool {
        !self.accepted.is_empty()
    }

    /// Takes the next head of the answer.
    pub fn read_head(&mut self, key: Key) -> HeadRead {
        let Some(exchange) = self.store.get(key) else {
            return HeadRead::Reset(Reason::Cancelled);
        };
        if let Some(reason) = exchange.refused {
            return HeadRead::Reset(reason);
        }
        if std::mem::take(&mut exchange.go_ahead_in) {
            return HeadRead::Interim(ResponseHead::GO_AHEAD);
        }
        if let Some(head) = exchange.interim_in.take() {
            return HeadRead::Interim(head);
        }
        if let Some(head) = exchange.head_in.take() {
            return HeadRead::Answer(head);
        }
        match &exchange.ending_in {
            Some(Ending::Reset(reason)) => HeadRead::Reset(*reason),
            Some(Ending::Complete(_)) => HeadRead::Reset(Reason::UpstreamError),
            // Nobody who has given up needs the peer to say that it heard of it.
            None if exchange.aborted => HeadRead::Reset(Reason::Cancelled),
            None => HeadRead::Pending,
        }
    }

    /// Takes the next piece of the peer's body. What is taken counts as consumed: credit for as
    /// much goes back to the peer, and the window grows while the reader keeps up.
    pub fn read(&mut self, key: Key) -> Read {
        let Some(exchange) = self.store.get(key) else {
            return Read::Reset(Reason::Cancelled);
        };
        if let Some(reason) = exchange.refused {
            return Read::Reset(reason);
        }
        let chunk = exchange.inbox.pop(usize::MAX);
        if chunk.is_empty() {
            return match &exchange.ending_in {
                Some(Ending::Complete(trailers)) => Read::End(trailers.clone()),
                Some(Ending::Reset(reason)) => Read::Reset(*reason),
                None => Read::Pending,
            };
        }
        exchange.receive_window.consume(chunk.len());
        if exchange.ending_in.is_none() && exchange.receive_window.grant_is_due() {
            let size = exchange.receive_window.size();
            if exchange.receive_window.reader_keeps_up() && size < MAX_WINDOW {
                let loan = self.budget.lend(size.min(MAX_WINDOW - size) as usize);
                exchange.receive_window.grow(loan as u32);
                exchange.promised += loan;
            }
            exchange.credit_due = true;
            self.schedule_control(key.index);
        }
        Read::Data(chunk)
    }

    /// Queues an interim answer (1xx). One that hasn't been sent yet is replaced, since a later
    /// one says more, and is dropped if it is larger than 8 KiB; they carry nothing a visitor may
    /// rely upon (RFC 9110, section 15.2). But for 100, which a visitor may wait for: it arrives in
    /// any case, without lines, which mean nothing there. After the final answer none is sent.
    pub fn interim(&mut self, key: Key, head: ResponseHead) {
        debug_assert_eq!(self.role, Role::Acceptor);
        if let Some(exchange) = self.store.get(key)
            && exchange.ending_out.is_none()
            && !exchange.sent_end
            && !exchange.head_given
            && is_interim(head.status)
        {
            if head.status == ResponseHead::GO_AHEAD.status {
                exchange.go_ahead_out = true;
            } else if head.size() <= MAX_INTERIM {
                exchange.interim_out = Some(head);
            }
            self.schedule(key.index);
        }
    }

    /// Answers an exchange, once; the body follows by [`Session::send`] and [`Session::finish`].
    /// A head beyond [`MAX_HEAD`], or with a status that no final answer has, ends the exchange
    /// with [`Reason::UpstreamError`].
    pub fn answer(&mut self, key: Key, head: ResponseHead) {
        debug_assert_eq!(self.role, Role::Acceptor);
        if let Some(exchange) = self.store.get(key)
            && exchange.ending_out.is_none()
            && !exchange.sent_end
            && !exchange.head_given
        {
            if !is_final(head.status) || head.size() > MAX_HEAD {
                self.abort_index(key.index, Reason::UpstreamError);
                return;
            }
            exchange.head_given = true;
            exchange.head_out = Some(HeadOut::Answer(head));
            self.schedule(key.index);
        }
    }

    /// How many body bytes the exchange can take now. With zero, a `writable` event follows when
    /// that changes. An error says why nothing can be sent ever again.
    pub fn capacity(&mut self, key: Key) -> Result<usize, Reason> {
        let Some(exchange) = self.store.get(key) else {
            return Err(Reason::Cancelled);
        };
        exchange.check_sendable()?;
        let waiting = exchange.outbox.len();
        // Beyond the reserved window, what waits is promised out of the budget while it waits.
        let own = RESERVED_WINDOW as usize;
        let limit = if self.budget.has_room(OUTBOX_LIMIT) {
            OUTBOX_LIMIT
        } else {
            own
        };
        let limit = limit.min(exchange.send_window.available());
        let capacity = limit.saturating_sub(waiting);
        exchange.wants_capacity = capacity == 0;
        Ok(capacity)
    }

    /// Queues body bytes. They may exceed [`Session::capacity`] by what the source handed out in
    /// one piece; the caller asks for capacity before it takes the next piece. The bytes of an
    /// answer wait for its head.
    pub fn send(&mut self, key: Key, chunk: Bytes) -> Result<(), Reason> {
        let Some(exchange) = self.store.get(key) else {
            return Err(Reason::Cancelled);
        };
        exchange.check_sendable()?;
        exchange.outbox.push(chunk);
        settle_outbox_loan(exchange, &mut self.budget);
        self.schedule(key.index);
        Ok(())
    }

    /// Ends our side after what is queued. Trailers beyond [`MAX_HEAD`] are discarded, as they may
    /// be (RFC 9110, section 6.5.1). An answer without a head ends with
    /// [`Reason::UpstreamError`] instead.
    pub fn finish(&mut self, key: Key, trailers: Option<Lines>) {
        let fits = |lines: &Lines| !lines.is_empty() && lines.size() <= MAX_HEAD;
        self.end(key, Ending::Complete(trailers.filter(fits)));
    }

    /// Ends our side early, but after what is queued: the source broke off.
    pub fn fail(&mut self, key: Key, reason: Reason) {
        self.end(key, Ending::Reset(reason));
    }

    fn end(&mut self, key: Key, ending: Ending) {
        if let Some(exchange) = self.store.get(key)
            && exchange.ending_out.is_none()
            && !exchange.sent_end
        {
            match ending {
                _ if exchange.head_given => {
                    exchange.ending_out = Some(ending);
                    self.schedule(key.index);
                }
                Ending::Reset(reason) => self.abort_index(key.index, reason),
                Ending::Complete(_) => self.abort_index(key.index, Reason::UpstreamError),
            }
        }
    }

    /// Ends the exchange at once; what is queued is dropped, and the peer is told to stop if it
    /// hasn't ended its side.
    pub fn abort(&mut self, key: Key, reason: Reason) {
        if self.store.get(key).is_some() {
            self.abort_index(key.index, reason);
        }
    }

    /// Why the peer wants no more of our side, once it has said so or the tunnel is lost. A
    /// `writable` event tells when that happens.
    pub fn stopped(&mut self, key: Key) -> Option<Reason> {
        match self.store.get(key) {
            Some(exchange) => exchange.stopped,
            None => Some(Reason::Cancelled),
        }
    }

    fn abort_index(&mut self, index: usize, reason: Reason) {
        let role = self.role;
        let Some(exchange) = self.store.by_index(index) else {
            return;
        };
        if exchange.sent_end || exchange.aborted {
            self.cancel(index, reason);
            return;
        }
        exchange.outbox.clear();
        settle_outbox_loan(exchange, &mut self.budget);
        exchange.go_ahead_out = false;
        exchange.interim_out = None;
        exchange.ending_out = Some(Ending::Reset(reason));
        if let Some(HeadOut::Open(..)) = exchange.head_out.take() {
            // The peer never heard of it, so there is nobody to tell or to wait for.
            exchange.sent_end = true;
            if exchange.ending_in.is_none() {
                exchange.ending_in = Some(Ending::Reset(reason));
            }
            exchange.readable = true;
            exchange.writable = true;
            self.live -= 1;
            self.schedule_event(index);
            self.free_if_over(index);
        } else {
            exchange.aborted = true;
            // Whoever waits for a head or for capacity needn't wait any longer.
            exchange.readable |= role == Role::Opener && !exchange.head_seen;
            exchange.writable |= exchange.wants_capacity;
            if exchange.readable || exchange.writable {
                self.schedule_event(index);
            }
            self.schedule_control(index);
        }
    }

    /// Has the peer told that what it still sends isn't wanted, once our own side has ended.
    fn cancel(&mut self, index: usize, reason: Reason) {
        if let Some(exchange) = self.store.by_index(index)
            && exchange.ending_in.is_none()
            && exchange.cancel == Cancel::No
        {
            exchange.cancel = Cancel::Due(reason);
            self.schedule_control(index);
        }
    }

    /// Lets go of an exchange. Whichever side hasn't ended is cancelled, and whatever still comes
    /// from the peer is dropped. What was queued before [`Session::finish`] is still sent, except
    /// where it is a request whose answer nobody will read.
    pub fn release(&mut self, key: Key) {
        let role = self.role;
        let Some(exchange) = self.store.get(key) else {
            return;
        };
        exchange.released = true;
        exchange.inbox.clear();
        exchange.head_in = None;
        exchange.go_ahead_in = false;
        exchange.interim_in = None;
        exchange.readable = false;
        exchange.writable = false;
        let moot = role == Role::Opener && exchange.ending_in.is_none();
        let reason = match exchange.ending_out {
            Some(Ending::Reset(reason)) => reason,
            _ => Reason::Cancelled,
        };
        if exchange.ending_out.is_none() || moot {
            self.abort_index(key.index, reason);
        } else {
            self.cancel(key.index, reason);
        }
        self.end_promise(key);
        self.free_if_over(key.index);
    }

    /// Nothing of what still comes for a released exchange is kept, so only what waits to be sent
    /// stays promised: a peer that doesn't end its side holds a slot, but nobody's memory.
    fn end_promise(&mut self, key: Key) {
        let Some(exchange) = self.store.get(key) else {
            return;
        };
        if let Some(Ending::Complete(trailers)) = &mut exchange.ending_in {
            *trailers = None;
        }
        let keep = if exchange.outbox.is_empty() {
            0
        } else {
            exchange.promised.min(RESERVED_WINDOW as usize)
        };
        self.budget.give_back(exchange.promised - keep);
        exchange.promised = keep;
    }

    /// Tells the peer that no new exchanges are wanted. Those under way go on.
    pub fn drain(&mut self) {
        if !self.drain.ours {
            self.drain.ours = true;
            self.drain.frame_due = true;
        }
    }

    /// Whether the peer has said that it wants no new exchanges.
    pub fn peer_is_draining(&self) -> bool {
        self.drain.peers
    }

    /// Ends the session: every exchange that isn't over ends with [`Reason::TunnelLost`].
    pub fn close(&mut self) {
        if self.closed {
            return;
        }
        self.closed = true;
        for (key, _) in std::mem::take(&mut self.accepted) {
            self.release(key);
        }
        for index in self.store.indexes() {
            let Some(exchange) = self.store.by_index(index) else {
                continue;
            };
            if !exchange.is_over() {
                self.live -= 1;
            }
            if !exchange.sent_end {
                exchange.stopped.get_or_insert(Reason::TunnelLost);
            }
            exchange.sent_end = true;
            exchange.outbox.clear();
            settle_outbox_loan(exchange, &mut self.budget);
            if exchange.ending_in.is_none() {
                exchange.ending_in = Some(Ending::Reset(Reason::TunnelLost));
            }
            exchange.readable = true;
            exchange.writable = true;
            self.schedule_event(index);
            self.free_if_over(index);
        }
    }

    /// The exchanges that hold a slot.
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// Whether no exchange holds a slot.
    pub fn is_empty(&self) -> bool {
        self.store.len() == 0
    }

    /// The bytes promised to the exchanges under way.
    pub fn promised_bytes(&self) -> usize {
        self.budget.used()
    }

    /// The last measured round trip of a heartbeat.
    pub fn round_trip(&self) -> Option<Duration> {
        self.heartbeat.round_trip
    }

    // --- The stream's side ------------------------------------------------------------------

    /// Takes a frame from the peer. An error ends the session: the caller is to
    /// [close](Session::close) it. What comes after that is dropped.
    pub fn receive(&mut self, frame: Frame, now: Duration) -> Result<(), ProtocolError> {
        if self.closed {
            return Ok(());
        }
        self.heartbeat.last_heard = now;
        match frame {
            Frame::Open {
                id,
                head,
                body,
                end,
                credit,
            } => {
                self.role_must_be(Role::Acceptor)?;
                if head.size() > MAX_HEAD {
                    return Err(ProtocolError::HeadTooLarge);
                }
                if id.slot >= self.config.max_exchanges || self.live >= self.config.max_exchanges {
                    return Err(ProtocolError::TooManyExchanges);
                }
                if let Some(index) = self.store.in_slot(id.slot)
                    && self.store.by_index(index).is_some_and(|old| !old.is_over())
                {
                    return Err(ProtocolError::SlotTaken);
                }
                self.opened(id, head, body, end, credit)
            }
            Frame::Interim { id, head } => {
                self.role_must_be(Role::Opener)?;
                if !is_interim(head.status) {
                    return Err(ProtocolError::BadStatus);
                }
                let Some((index, exchange)) = live_exchange(&mut self.store, id)? else {
                    return Ok(());
                };
                if exchange.head_seen {
                    return Err(ProtocolError::OutOfOrder);
                }
                let missing = head.size().saturating_sub(exchange.interim_promised);
                if head.status == ResponseHead::GO_AHEAD.status {
                    exchange.go_ahead_in = !exchange.discards();
                    self.note_readable(index);
                // Dropped where there is no room: nobody may rely upon it.
                } else if !exchange.discards()
                    && head.size() <= MAX_INTERIM
                    && self.budget.reserve(missing)
                {
                    exchange.promised += missing;
                    exchange.interim_promised += missing;
                    exchange.interim_in = Some(head);
                    self.note_readable(index);
                }
                Ok(())
            }
            Frame::Answer {
                id,
                head,
                body,
                end,
            } => {
                self.role_must_be(Role::Opener)?;
                if !is_final(head.status) {
                    return Err(ProtocolError::BadStatus);
                }
                if head.size() > MAX_HEAD {
                    return Err(ProtocolError::HeadTooLarge);
                }
                let size = head.size();
                let Some((index, exchange)) = live_exchange(&mut self.store, id)? else {
                    return Ok(());
                };
                if exchange.head_seen {
                    return Err(ProtocolError::OutOfOrder);
                }
                exchange.head_seen = true;
                if !exchange.discards() {
                    if self.budget.reserve(size) {
                        exchange.promised += size;
                        exchange.head_in = Some(head);
                    } else {
                        exchange.refused = Some(Reason::Overloaded);
                        exchange.stopped = Some(Reason::Overloaded);
                        exchange.writable = true;
                        self.abort_index(index, Reason::Overloaded);
                    }
                }
                self.received_body(index, body, end)
            }
            Frame::Data { id, body, end } => match live_exchange(&mut self.store, id)? {
                Some((_, exchange)) if !exchange.head_seen => Err(ProtocolError::OutOfOrder),
                Some((index, _)) => self.received_body(index, body, end),
                None => Ok(()),
            },
            Frame::Trailers { id, lines } => {
                if lines.size() > MAX_HEAD {
                    return Err(ProtocolError::HeadTooLarge);
                }
                match live_exchange(&mut self.store, id)? {
                    Some((_, exchange)) if !exchange.head_seen => Err(ProtocolError::OutOfOrder),
                    Some((index, exchange)) => {
                        // Trailers may be discarded on the way (RFC 9110, section 6.5.1).
                        let keep = !exchange.discards() && self.budget.reserve(lines.size());
                        let lines = keep.then(|| {
                            exchange.promised += lines.size();
                            lines
                        });
                        self.end_incoming(index, Ending::Complete(lines));
                        Ok(())
                    }
                    None => Ok(()),
                }
            }
            Frame::Reset { id, reason } => {
                let Some(index) = self.store.find(id) else {
                    return Ok(());
                };
                let Some(exchange) = self.store.by_index(index) else {
                    return Ok(());
                };
                if matches!(exchange.head_out, Some(HeadOut::Open(..)))
                    || matches!(exchange.ending_in, Some(Ending::Reset(_)))
                {
                    return Err(ProtocolError::OutOfOrder);
                }
                let answer = !exchange.sent_end;
                if answer && !exchange.aborted {
                    exchange.stopped = Some(reason);
                    exchange.writable = true;
                    self.schedule_event(index);
                }
                // After its own end, a peer's reset only says that it wants no more of ours.
                if !self.has_ended(index) {
                    self.end_incoming(index, Ending::Reset(reason));
                }
                if answer {
                    self.abort_index(index, Reason::Cancelled);
                }
                Ok(())
            }
            Frame::Credit { id, bytes } => {
                // After the peer's end too: it may still read what we send.
                let Some(index) = self.store.find(id) else {
                    return Ok(());
                };
                let Some(exchange) = self.store.by_index(index) else {
                    return Ok(());
                };
                exchange.send_window.grant(bytes)?;
                let wakes = exchange.wants_capacity;
                if wakes {
                    exchange.writable = true;
                }
                if exchange.is_ready() {
                    self.schedule(index);
                }
                if wakes {
                    self.schedule_event(index);
                }
                Ok(())
            }
            Frame::Ping { nonce } => {
                self.heartbeat.pong_due = Some(nonce);
                Ok(())
            }
            Frame::Pong { nonce } => {
                if nonce == self.heartbeat.nonce
                    && let Some(sent_at) = self.heartbeat.sent_at.take()
                {
                    self.heartbeat.round_trip = Some(now.saturating_sub(sent_at));
                }
                Ok(())
            }
            Frame::Drain => {
                self.drain.peers = true;
                Ok(())
            }
        }
    }

    /// Notes a sign of life that carries no frame, or none this version knows.
    pub fn heard(&mut self, now: Duration) {
        self.heartbeat.last_heard = now;
    }

    /// Fills `frames` with what is to be sent next, about `limit` bytes of it. Control goes
    /// first; exchanges take turns by bytes. Nothing added means nothing to send.
    pub fn transmit(&mut self, now: Duration, limit: usize, frames: &mut Vec<Frame>) {
        if self.closed {
            return;
        }
        if let Some(nonce) = self.heartbeat.pong_due.take() {
            frames.push(Frame::Pong { nonce });
        }
        if std::mem::take(&mut self.heartbeat.ping_due) {
            self.heartbeat.nonce += 1;
            self.heartbeat.sent_at = Some(now);
            frames.push(Frame::Ping {
                nonce: self.heartbeat.nonce,
            });
        }
        if std::mem::take(&mut self.drain.frame_due) {
            frames.push(Frame::Drain);
        }
        let mut spent: usize = frames.iter().map(Frame::cost).sum();
        while spent < limit
            && let Some(index) = self.control.pop()
        {
            spent += self.transmit_control(index, frames);
        }
        while spent < limit
            && let Some(index) = self.ready.pop()
        {
            let alone = self.ready.is_empty();
            let quantum = if alone {
                limit - spent
            } else {
                QUANTUM.min(limit - spent)
            };
            spent += self.transmit_turn(index, quantum, frames);
        }
    }

    /// Whether [`Session::transmit`] would add anything.
    pub fn wants_transmit(&self) -> bool {
        !self.closed
            && (!self.ready.is_empty()
                || !self.control.is_empty()
                || self.heartbeat.ping_due
                || self.heartbeat.pong_due.is_some()
                || self.drain.frame_due)
    }

    /// The next event, until there is none.
    pub fn poll_event(&mut self) -> Option<Event> {
        while let Some(index) = self.events.pop() {
            let Some(exchange) = self.store.by_index(index) else {
                continue;
            };
            let what = Events {
                readable: std::mem::take(&mut exchange.readable),
                writable: std::mem::take(&mut exchange.writable),
            };
            if what.readable || what.writable {
                return Some(Event { index, what });
            }
        }
        None
    }

    /// When [`Session::handle_timeout`] is to be called.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let dead_at = self.heartbeat.last_heard + self.config.heartbeat_timeout;
        (!self.closed).then(|| self.heartbeat.next_ping.min(dead_at))
    }

    /// Lets time pass: sends a heartbeat when one is due, and finds a silent peer dead.
    pub fn handle_timeout(&mut self, now: Duration) -> Result<(), SessionError> {
        if self.closed {
            return Ok(());
        }
        let silent = now.saturating_sub(self.heartbeat.last_heard);
        if silent >= self.config.heartbeat_timeout {
            return Err(SessionError::Silent(silent));
        }
        if now >= self.heartbeat.next_ping {
            self.heartbeat.next_ping = now + self.config.heartbeat_interval;
            self.heartbeat.ping_due = true;
        }
        Ok(())
    }

    // --- Details ----------------------------------------------------------------------------

    fn role_must_be(&self, role: Role) -> Result<(), ProtocolError> {
        if self.role == role {
            Ok(())
        } else {
            Err(ProtocolError::WrongDirection)
        }
    }

    fn opened(
        &mut self,
        id: ExchangeId,
        head: RequestHead,
        body: Bytes,
        end: bool,
        credit: u32,
    ) -> Result<(), ProtocolError> {
        let mut exchange = Exchange::new(id, RESERVED_WINDOW, 0);
        exchange.head_seen = true;
        exchange.send_window.grant(credit)?;
        let reserved = 2 * RESERVED_WINDOW as usize + head.size();
        // Exchanges that are over on the wire, but that the application still works on, count: a
        // peer that resets fast gets no more work done than one that waits.
        let admitted =
            self.store.len() < self.config.max_exchanges as usize && self.budget.reserve(reserved);
        if admitted {
            exchange.promised = reserved;
        }
        let key = self.store.insert(exchange);
        self.live += 1;
        if self.drain.ours || !admitted {
            let reason = if admitted {
                Reason::Draining
            } else {
                Reason::Overloaded
            };
            self.abort_index(key.index, reason);
            if let Some(exchange) = self.store.by_index(key.index) {
                exchange.released = true;
            }
        } else {
            self.accepted.push_back((key, head));
        }
        self.received_body(key.index, body, end)
    }

    fn received_body(&mut self, index: usize, body: Bytes, end: bool) -> Result<(), ProtocolError> {
        let Some(exchange) = self.store.by_index(index) else {
            return Ok(());
        };
        exchange.receive_window.receive(body.len())?;
        if !exchange.discards() {
            exchange.inbox.push(body);
        }
        if end {
            self.end_incoming(index, Ending::Complete(None));
        } else {
            self.note_readable(index);
        }
        Ok(())
    }

    /// Whether the peer has ended its side.
    fn has_ended(&mut self, index: usize) -> bool {
        self.store
            .by_index(index)
            .is_none_or(|exchange| exchange.ending_in.is_some())
    }

    /// The peer has ended its side. The caller has checked that it hadn't before.
    fn end_incoming(&mut self, index: usize, ending: Ending) {
        let Some(exchange) = self.store.by_index(index) else {
            return;
        };
        exchange.ending_in = Some(ending);
        exchange.credit_due = false;
        if exchange.is_over() {
            self.live -= 1;
        }
        self.note_readable(index);
        self.free_if_over(index);
    }

    fn transmit_control(&mut self, index: usize, frames: &mut Vec<Frame>) -> usize {
        let Some(exchange) = self.store.by_index(index) else {
            return 0;
        };
        let before = frames.len();
        let id = exchange.id;
        if std::mem::take(&mut exchange.credit_due) && exchange.ending_in.is_none() {
            let bytes = exchange.receive_window.grant();
            if bytes > 0 {
                frames.push(Frame::Credit { id, bytes });
            }
        }
        if exchange.aborted && !exchange.sent_end {
            exchange.sent_end = true;
            exchange.cancel = Cancel::Sent;
            let reason = match exchange.ending_out.take() {
                Some(Ending::Reset(reason)) => reason,
                _ => Reason::Cancelled,
            };
            frames.push(Frame::Reset { id, reason });
            if exchange.is_over() {
                self.live -= 1;
            }
            self.free_if_over(index);
        } else if let Cancel::Due(reason) = exchange.cancel
            && exchange.sent_end
            && exchange.ending_in.is_none()
        {
            exchange.cancel = Cancel::Sent;
            frames.push(Frame::Reset { id, reason });
        }
        frames[before..].iter().map(Frame::cost).sum()
    }

    fn transmit_turn(&mut self, index: usize, quantum: usize, frames: &mut Vec<Frame>) -> usize {
        let Some(exchange) = self.store.by_index(index) else {
            return 0;
        };
        if !exchange.is_ready() {
            return 0;
        }
        let cost = exchange.take_turn(quantum, frames);
        settle_outbox_loan(exchange, &mut self.budget);
        if exchange.sent_end {
            if exchange.is_over() {
                self.live -= 1;
            }
            self.schedule_control(index);
            self.free_if_over(index);
            return cost;
        }
        if exchange.wants_capacity
            && exchange.send_window.available() > exchange.outbox.len()
            && exchange.outbox.len() <= OUTBOX_LIMIT / 2
        {
            exchange.writable = true;
            self.schedule_event(index);
        }
        if self
            .store
            .by_index(index)
            .is_some_and(|exchange| exchange.is_ready())
        {
            self.schedule(index);
        }
        cost
    }

    fn schedule(&mut self, index: usize) {
        if let Some(exchange) = self.store.by_index(index)
            && exchange.is_ready()
        {
            self.ready.push(index);
        }
    }

    fn schedule_control(&mut self, index: usize) {
        if let Some(exchange) = self.store.by_index(index)
            && exchange.has_control()
        {
            self.control.push(index);
        }
    }

    fn note_readable(&mut self, index: usize) {
        if let Some(exchange) = self.store.by_index(index) {
            exchange.readable = true;
            self.schedule_event(index);
        }
    }

    fn schedule_event(&mut self, index: usize) {
        if let Some(exchange) = self.store.by_index(index)
            && !exchange.released
        {
            self.events.push(index);
        }
    }

    /// Frees the slot when both sides have ended and the application has let go.
    fn free_if_over(&mut self, index: usize) {
        let over = self
            .store
            .by_index(index)
            .is_some_and(|exchange| exchange.is_over() && exchange.released);
        if over && let Some(mut exchange) = self.store.remove(index) {
            exchange.outbox.clear();
            settle_outbox_loan(&mut exchange, &mut self.budget);
            self.budget.give_back(exchange.promised);
            if self.store.len() == 0 {
                self.forget_bursts();
            }
        }
    }

    /// What a burst has grown, an idle tunnel doesn't keep.
    fn forget_bursts(&mut self) {
        const KEEP: usize = 64;
        for queue in [&mut self.ready, &mut self.control, &mut self.events] {
            queue.reset(KEEP);
        }
        self.accepted.shrink_to(KEEP);
    }
}

fn is_interim(status: u16) -> bool {
    (100..200).contains(&status) && status != 101
}

/// 101 is final here: what follows it is the upgraded connection's.
fn is_final(status: u16) -> bool {
    (200..1000).contains(&status) || status == 101
}

/// The exchange a frame speaks of, if it exists. A frame after the peer's own end is an error; a
/// frame for an exchange that is gone isn't.
fn live_exchange(
    store: &mut Store,
    id: ExchangeId,
) -> Result<Option<(usize, &mut Exchange)>, ProtocolError> {
    let Some(index) = store.find(id) else {
        return Ok(None);
    };
    let Some(exchange) = store.by_index(index) else {
        return Ok(None);
    };
    if matches!(exchange.head_out, Some(HeadOut::Open(..))) {
        // The peer can't know of it yet: it guesses names.
        return Err(ProtocolError::OutOfOrder);
    }
    if exchange.ending_in.is_some() {
        return Err(ProtocolError::OutOfOrder);
    }
    Ok(Some((index, exchange)))
}

/// Brings what the budget has promised for the outbox in line with what lies there beyond the
/// reserved window. If the budget is spent the bytes lie there unpromised: they are one piece of
/// one source at most, and [`Session::capacity`] asks for no more.
fn settle_outbox_loan(exchange: &mut Exchange, budget: &mut Budget) {
    let beyond = exchange
        .outbox
        .len()
        .saturating_sub(RESERVED_WINDOW as usize);
    if beyond > exchange.outbox_loan {
        let more = beyond - exchange.outbox_loan;
        if budget.reserve(more) {
            exchange.outbox_loan = beyond;
        }
    } else if beyond < exchange.outbox_loan {
        budget.give_back(exchange.outbox_loan - beyond);
        exchange.outbox_loan = beyond;
    }
}
