//! Two ends of a tunnel, the stream between them, and all that can happen to them: any call of an
//! application in any order, and a peer that keeps no rules. After every step nothing may have
//! drifted, and in the end nothing may be left.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::fuzz::Tape;
use crate::head::{Lines, LinesBuilder, RequestHead, ResponseHead};
use crate::id::ExchangeId;

/// Does with two sessions what `data` says. The first bytes say how much they may hold and whether
/// a hostile peer is among them.
pub fn session(data: &[u8]) {
    let mut tape = Tape::new(data);
    let hostile = tape.flag();
    let limit = [PLENTY, 100_000, 1_000_000, 10_000_000][tape.below(4)];
    let max_exchanges = 1 + tape.below(5) as u32;
    let mut ops = Vec::new();
    while !tape.is_empty() && ops.len() < MAX_OPS {
        ops.push(op(&mut tape, hostile));
    }
    run(limit, max_exchanges, hostile, ops);
}

/// Gives one end frames that may be anything, as `to_agent` or from one, and a few exchanges that
/// they may speak of.
pub fn receive(to_agent: bool, frames: impl IntoIterator<Item = Frame>) {
    let now = Duration::ZERO;
    let mut session = if to_agent {
        Session::acceptor(config(), budget(PLENTY), now)
    } else {
        Session::opener(config(), budget(PLENTY), now)
    };
    let mut keys: Vec<Key> = Vec::new();
    if !to_agent {
        keys.extend((0..4).map(|number| session.open(get("/"), number > 1).unwrap()));
        session.transmit(now, BATCH_BYTES, &mut Vec::new());
    }
    for frame in frames {
        let outcome = session.receive(frame, now);
        session.assert_consistent();
        assert!(session.held_bytes() <= session.promised_bytes());
        if outcome.is_err() {
            break;
        }
        while let Some((key, _)) = session.accept() {
            keys.push(key);
        }
        while session.poll_event().is_some() {}
        session.transmit(now, BATCH_BYTES, &mut Vec::new());
        for key in &keys {
            session.read(*key);
        }
        session.assert_consistent();
    }
    session.close();
    for key in keys {
        session.release(key);
    }
    while let Some((key, _)) = session.accept() {
        session.release(key);
    }
    assert!(session.is_empty());
    assert_eq!(session.promised_bytes(), 0);
}

/// Longer runs find what shorter ones find, later.
const MAX_OPS: usize = 400;

fn op(tape: &mut Tape<'_>, hostile: bool) -> Op {
    match tape.below(if hostile { 24 } else { 19 }) {
        0 => Op::Open {
            expects_body: tape.flag(),
            head: head_size(tape),
        },
        1 => Op::Accept,
        2 => Op::Interim(
            pick(tape),
            [100, 103, 101, 200][tape.below(4)],
            head_size(tape),
        ),
        3 => Op::Answer(
            pick(tape),
            [200, 101, 100, 999][tape.below(4)],
            head_size(tape),
        ),
        4 => Op::Send(end(tape), pick(tape), size(tape)),
        5 => Op::Finish(end(tape), pick(tape), tape.flag().then(|| head_size(tape))),
        6 => Op::Fail(end(tape), pick(tape)),
        7 => Op::Abort(end(tape), pick(tape)),
        8 => Op::Release(end(tape), pick(tape)),
        9 => Op::ReadHead(pick(tape)),
        10 => Op::Read(end(tape), pick(tape)),
        11 => Op::Capacity(end(tape), pick(tape)),
        12 => Op::Events(end(tape)),
        13 => Op::Transmit(end(tape), BATCH_BYTES),
        14 => Op::Transmit(end(tape), tape.word().into()),
        15 => Op::Deliver(end(tape), 1 + tape.below(4)),
        16 => Op::Deliver(end(tape), 1000),
        17 => Op::Wait(tape.word().into()),
        18 => match tape.below(8) {
            0 => Op::Close(end(tape)),
            1 => Op::Drain(end(tape)),
            _ => Op::Accept,
        },
        _ => Op::Hostile(end(tape), hostile_id(tape), hostile_frame_of(tape)),
    }
}

fn end(tape: &mut Tape<'_>) -> End {
    if tape.flag() {
        End::Acceptor
    } else {
        End::Opener
    }
}

fn pick(tape: &mut Tape<'_>) -> Pick {
    tape.below(8)
}

fn size(tape: &mut Tape<'_>) -> usize {
    match tape.below(6) {
        0 => 0,
        1 => tape.byte().into(),
        2 => RESERVED_WINDOW as usize,
        3 => RESERVED_WINDOW as usize + 1,
        4 => tape.word().into(),
        _ => tape.long() as usize % 200_000,
    }
}

fn head_size(tape: &mut Tape<'_>) -> usize {
    match tape.below(16) {
        0 => 9000,
        1 => MAX_HEAD,
        2 => MAX_HEAD + 100,
        _ => usize::from(tape.byte()) * 2,
    }
}

fn hostile_id(tape: &mut Tape<'_>) -> HostileId {
    match tape.below(8) {
        0 => HostileId::Any(u64::from(tape.long()) << 32 | u64::from(tape.long())),
        1 | 2 => HostileId::Guessed(tape.below(6) as u32, tape.below(6) as u32),
        _ => HostileId::Known(pick(tape)),
    }
}

fn hostile_frame_of(tape: &mut Tape<'_>) -> HostileFrame {
    match tape.below(10) {
        0 => HostileFrame::Open(head_size(tape), body_size(tape), tape.flag(), credit(tape)),
        1 => HostileFrame::Interim(tape.word() % 1100, head_size(tape)),
        2 => {
            let status = 100 + tape.word() % 900;
            HostileFrame::Answer(status, head_size(tape), body_size(tape), tape.flag())
        }
        3 => HostileFrame::Data(body_size(tape), tape.flag()),
        4 => HostileFrame::Trailers(head_size(tape)),
        5 => HostileFrame::Reset(tape.below(12) as u32),
        6 => HostileFrame::Credit(credit(tape)),
        7 => HostileFrame::Ping(tape.byte().into()),
        8 => HostileFrame::Pong(tape.below(4) as u64),
        _ => HostileFrame::Drain,
    }
}

fn body_size(tape: &mut Tape<'_>) -> usize {
    match tape.below(8) {
        0 => 1 << 20,
        _ => tape.word().into(),
    }
}

fn credit(tape: &mut Tape<'_>) -> u32 {
    match tape.below(4) {
        0 => u32::MAX - RESERVED_WINDOW,
        1 => u32::MAX - RESERVED_WINDOW + 1,
        2 => tape.long(),
        _ => tape.word().into(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Opener,
    Acceptor,
}

/// One of the exchanges an end has had so far, modulo their number.
pub(super) type Pick = usize;

#[derive(Debug, Clone)]
pub(super) enum Op {
    Open {
        expects_body: bool,
        head: usize,
    },
    Accept,
    Interim(Pick, u16, usize),
    Answer(Pick, u16, usize),
    Send(End, Pick, usize),
    Finish(End, Pick, Option<usize>),
    Fail(End, Pick),
    Abort(End, Pick),
    Release(End, Pick),
    ReadHead(Pick),
    Read(End, Pick),
    Capacity(End, Pick),
    Events(End),
    /// The stream takes a batch of about so many bytes.
    Transmit(End, usize),
    /// So many frames arrive from this end.
    Deliver(End, usize),
    Wait(u64),
    Drain(End),
    /// The tunnel is lost, and this end learns of it first.
    Close(End),
    /// A frame that no rule has let through arrives at this end.
    Hostile(End, HostileId, HostileFrame),
}

#[derive(Debug, Clone)]
pub(super) enum HostileId {
    /// The name of an exchange that this end has, or had.
    Known(Pick),
    Guessed(u32, u32),
    Any(u64),
}

#[derive(Debug, Clone)]
pub(super) enum HostileFrame {
    Open(usize, usize, bool, u32),
    Interim(u16, usize),
    Answer(u16, usize, usize, bool),
    Data(usize, bool),
    Trailers(usize),
    Reset(u32),
    Credit(u32),
    Ping(u64),
    Pong(u64),
    Drain,
}

struct World {
    now: Duration,
    limit: usize,
    hostile: bool,
    lost: bool,
    opener: Side,
    acceptor: Side,
}

struct Side {
    session: Session,
    keys: Vec<Key>,
    /// On the way to the other end.
    wire: VecDeque<Frame>,
}

impl Side {
    fn new(session: Session) -> Self {
        Self {
            session,
            keys: Vec::new(),
            wire: VecDeque::new(),
        }
    }

    fn pick(&self, pick: Pick) -> Option<Key> {
        // The newest are the most interesting.
        let place = self
            .keys
            .len()
            .checked_sub(1 + pick % self.keys.len().max(1))?;
        self.keys.get(place).copied()
    }

    /// Body bytes and credit that are on the way for an exchange.
    fn on_the_way(&self, exchange: ExchangeId) -> (usize, usize) {
        let mut sum = (0, 0);
        for frame in &self.wire {
            match frame {
                Frame::Open { id, body, .. }
                | Frame::Answer { id, body, .. }
                | Frame::Data { id, body, .. }
                    if *id == exchange =>
                {
                    sum.0 += body.len();
                }
                Frame::Credit { id, bytes } if *id == exchange => sum.1 += *bytes as usize,
                _ => {}
            }
        }
        sum
    }
}

impl World {
    fn new(limit: usize, max_exchanges: u32, hostile: bool) -> Self {
        let config = Config {
            max_exchanges,
            ..config()
        };
        let now = Duration::ZERO;
        Self {
            now,
            limit,
            hostile,
            lost: false,
            opener: Side::new(Session::opener(config, budget(limit), now)),
            acceptor: Side::new(Session::acceptor(config, budget(limit), now)),
        }
    }

    fn sides(&mut self, end: End) -> (&mut Side, &mut Side) {
        match end {
            End::Opener => (&mut self.opener, &mut self.acceptor),
            End::Acceptor => (&mut self.acceptor, &mut self.opener),
        }
    }

    fn act(&mut self, end: End, pick: Pick, action: impl FnOnce(&mut Session, Key)) {
        let side = self.sides(end).0;
        if let Some(key) = side.pick(pick) {
            action(&mut side.session, key);
        }
    }

    fn apply(&mut self, op: Op) {
        let now = self.now;
        match op {
            Op::Open { expects_body, head } => {
                let head = RequestHead {
                    lines: big_lines(head),
                    ..get("/")
                };
                if let Ok(key) = self.opener.session.open(head, expects_body) {
                    self.opener.keys.push(key);
                }
            }
            Op::Accept => {
                if let Some((key, _)) = self.acceptor.session.accept() {
                    self.acceptor.keys.push(key);
                }
            }
            Op::Interim(pick, status, size) => self.act(End::Acceptor, pick, |session, key| {
                let lines = big_lines(size);
                session.interim(key, ResponseHead { status, lines });
            }),
            Op::Answer(pick, status, size) => self.act(End::Acceptor, pick, |session, key| {
                let lines = big_lines(size);
                session.answer(key, ResponseHead { status, lines });
            }),
            Op::Send(end, pick, size) => self.act(end, pick, |session, key| {
                let sent = session.send(key, zeros(size));
                assert_eq!(sent.err(), session.capacity(key).err());
            }),
            Op::Finish(end, pick, trailers) => self.act(end, pick, |session, key| {
                session.finish(key, trailers.map(big_lines));
                assert!(session.send(key, zeros(1)).is_err());
            }),
            Op::Fail(end, pick) => self.act(end, pick, |session, key| {
                session.fail(key, Reason::UpstreamError);
                assert!(session.send(key, zeros(1)).is_err());
            }),
            Op::Abort(end, pick) => self.act(end, pick, |session, key| {
                session.abort(key, Reason::UpstreamTimeout);
                assert!(session.send(key, zeros(1)).is_err());
            }),
            Op::Release(end, pick) => self.act(end, pick, Session::release),
            Op::ReadHead(pick) => self.act(End::Opener, pick, |session, key| {
                session.read_head(key);
            }),
            Op::Read(end, pick) => self.act(end, pick, |session, key| {
                session.read(key);
            }),
            Op::Capacity(end, pick) => self.act(end, pick, |session, key| {
                let _ = session.capacity(key);
            }),
            Op::Events(end) => {
                let side = self.sides(end).0;
                let events: Vec<_> = std::iter::from_fn(|| side.session.poll_event()).collect();
                assert!(events.len() <= side.session.len(), "more than one each");
            }
            Op::Transmit(end, limit) => self.transmit(end, limit),
            Op::Deliver(end, frames) => self.deliver(end, frames),
            Op::Wait(ms) => {
                self.now += Duration::from_millis(ms);
                let now = self.now;
                for side in [&mut self.opener, &mut self.acceptor] {
                    if side.session.handle_timeout(now).is_err() {
                        side.session.close();
                        self.lost = true;
                    }
                }
            }
            Op::Drain(end) => self.sides(end).0.session.drain(),
            Op::Close(end) => {
                self.sides(end).0.session.close();
                self.opener.wire.clear();
                self.acceptor.wire.clear();
                self.lost = true;
            }
            Op::Hostile(end, id, frame) => {
                let side = self.sides(end).0;
                let id = match id {
                    HostileId::Known(pick) => match side.pick(pick) {
                        Some(key) => key.id(),
                        None => ExchangeId::from_u64(pick as u64),
                    },
                    HostileId::Guessed(slot, generation) => ExchangeId { slot, generation },
                    HostileId::Any(number) => ExchangeId::from_u64(number),
                };
                if side.session.receive(hostile_frame(id, frame), now).is_err() {
                    side.session.close();
                    self.lost = true;
                }
            }
        }
    }

    fn transmit(&mut self, end: End, limit: usize) {
        let now = self.now;
        let side = self.sides(end).0;
        let wanted = side.session.wants_transmit();
        let mut frames = Vec::new();
        side.session.transmit(now, limit, &mut frames);
        assert!(wanted || frames.is_empty());
        side.wire.extend(frames);
    }

    fn deliver(&mut self, end: End, frames: usize) {
        let now = self.now;
        let hostile = self.hostile;
        let (from, to) = self.sides(end);
        let count = frames.min(from.wire.len());
        let arriving: Vec<_> = from.wire.drain(..count).collect();
        for frame in arriving {
            let received = to.session.receive(frame.clone(), now);
            if received.is_err() {
                assert!(hostile, "{received:?} for {frame:?}");
                to.session.close();
                self.lost = true;
                return;
            }
        }
    }

    #[track_caller]
    fn check(&self) {
        for side in [&self.opener, &self.acceptor] {
            side.session.assert_consistent();
            assert!(side.session.promised_bytes() <= self.limit);
            let held = side.session.held_bytes();
            assert!(held <= side.session.promised_bytes(), "held, not promised");
            let slices = side.session.held_slices();
            assert!(slices <= held / 200 + 3 * side.session.len());
            assert!(side.session.longest_queue() <= 2 * self.opener.session.config_max());
            assert!(side.session.len() <= 2 * self.opener.session.config_max());
        }
        if !self.hostile && !self.lost {
            for key in &self.opener.keys {
                assert_conserved(&self.opener, &self.acceptor, key.id());
                assert_conserved(&self.acceptor, &self.opener, key.id());
            }
        }
    }

    /// Everybody lets go of everything; what is under way arrives, or the tunnel is lost.
    fn finish(mut self) {
        if self.lost {
            self.opener.session.close();
            self.acceptor.session.close();
        }
        for side in [&mut self.opener, &mut self.acceptor] {
            for key in std::mem::take(&mut side.keys) {
                side.session.release(key);
            }
        }
        loop {
            self.check();
            while let Some((key, _)) = self.acceptor.session.accept() {
                self.acceptor.session.release(key);
            }
            for end in [End::Opener, End::Acceptor] {
                self.transmit(end, BATCH_BYTES);
            }
            if self.opener.wire.is_empty() && self.acceptor.wire.is_empty() {
                break;
            }
            for end in [End::Opener, End::Acceptor] {
                self.deliver(end, usize::MAX);
            }
        }
        if self.hostile {
            // What a hostile peer never ends goes with its tunnel.
            self.opener.session.close();
            self.acceptor.session.close();
        }
        for side in [&self.opener, &self.acceptor] {
            side.session.assert_consistent();
            assert_eq!(side.session.len(), 0, "exchanges are left");
            assert_eq!(side.session.promised_bytes(), 0, "promises are left");
            assert!(!side.session.wants_transmit());
        }
    }
}

/// Credit is neither lost nor made: what the receiver counts on is what the sender has, and what
/// is on the way.
#[track_caller]
fn assert_conserved(sender: &Side, receiver: &Side, id: ExchangeId) {
    if let (Some(sending), Some(receiving)) =
        (sender.session.credit(id), receiver.session.credit(id))
    {
        let (bytes, _) = sender.on_the_way(id);
        let (_, credit) = receiver.on_the_way(id);
        assert_eq!(receiving.to_receive, sending.to_send + bytes + credit);
    }
}

fn hostile_frame(id: ExchangeId, frame: HostileFrame) -> Frame {
    let body = Bytes::from_static(&[b'!'; 1 << 20]);
    match frame {
        HostileFrame::Open(head, size, end, credit) => Frame::Open {
            id,
            head: RequestHead {
                lines: big_lines(head),
                ..get("/hostile")
            },
            body: body.slice(..size),
            end,
            credit,
        },
        HostileFrame::Interim(status, head) => Frame::Interim {
            id,
            head: ResponseHead {
                status,
                lines: big_lines(head),
            },
        },
        HostileFrame::Answer(status, head, size, end) => Frame::Answer {
            id,
            head: ResponseHead {
                status,
                lines: big_lines(head),
            },
            body: body.slice(..size),
            end,
        },
        HostileFrame::Data(size, end) => Frame::Data {
            id,
            body: body.slice(..size),
            end,
        },
        HostileFrame::Trailers(size) => Frame::Trailers {
            id,
            lines: big_lines(size),
        },
        HostileFrame::Reset(code) => Frame::Reset {
            id,
            reason: Reason::from_code(code),
        },
        HostileFrame::Credit(bytes) => Frame::Credit { id, bytes },
        HostileFrame::Ping(nonce) => Frame::Ping { nonce },
        HostileFrame::Pong(nonce) => Frame::Pong { nonce },
        HostileFrame::Drain => Frame::Drain,
    }
}

pub(super) fn run(limit: usize, max_exchanges: u32, hostile: bool, ops: Vec<Op>) {
    let mut world = World::new(limit, max_exchanges, hostile);
    for op in ops {
        world.apply(op);
        world.check();
    }
    world.finish();
}

/// Room enough for everything.
pub(super) const PLENTY: usize = 1 << 30;

pub(super) fn config() -> Config {
    Config {
        max_exchanges: 1024,
        heartbeat_interval: Duration::from_secs(10),
        heartbeat_timeout: Duration::from_secs(30),
    }
}

pub(super) fn budget(limit: usize) -> Budget {
    Budget::new(Pool::new(limit), limit)
}

pub(super) fn lines(text: &str) -> Lines {
    let mut builder = LinesBuilder::default();
    builder.push(b"x-test", text.as_bytes()).unwrap();
    builder.finish()
}

/// Header lines of `size` bytes.
pub(super) fn big_lines(size: usize) -> Lines {
    let mut builder = LinesBuilder::default();
    let mut left = size;
    while left > 4 {
        let value = (left - 4).min(60_000);
        builder.push(b"", &vec![b'x'; value]).unwrap();
        left -= 4 + value;
    }
    builder.finish()
}

pub(super) fn get(target: &str) -> RequestHead {
    RequestHead {
        method: Bytes::from_static(b"GET"),
        target: Bytes::copy_from_slice(target.as_bytes()),
        lines: lines(target),
    }
}

pub(super) fn zeros(size: usize) -> Bytes {
    const ZEROS: &[u8] = &[0; 16 << 20];
    Bytes::from_static(&ZEROS[..size])
}
