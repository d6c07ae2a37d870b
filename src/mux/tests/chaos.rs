//! Anything an application may call, in any order, on both ends; and on top of that a peer that
//! keeps no rules. After every step nothing may have drifted, and in the end nothing may be left.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::id::ExchangeId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Opener,
    Acceptor,
}

/// One of the exchanges an end has had so far, modulo their number.
type Pick = usize;

#[derive(Debug, Clone)]
enum Op {
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
enum HostileId {
    /// The name of an exchange that this end has, or had.
    Known(Pick),
    Guessed(u32, u32),
    Any(u64),
}

#[derive(Debug, Clone)]
enum HostileFrame {
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

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Opener), Just(End::Acceptor)]
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0),
        1usize..2000,
        Just(16_384usize),
        Just(16_385usize),
        1usize..200_000,
    ]
}

fn head_size() -> impl Strategy<Value = usize> {
    prop_oneof![20 => 10usize..500, 1 => Just(9000usize), 1 => Just(MAX_HEAD), 1 => Just(MAX_HEAD + 100)]
}

fn op() -> impl Strategy<Value = Op> {
    let pick = 0usize..8;
    prop_oneof![
        6 => (any::<bool>(), head_size()).prop_map(|(expects_body, head)| Op::Open { expects_body, head }),
        6 => Just(Op::Accept),
        1 => (pick.clone(), prop_oneof![Just(100u16), Just(103), Just(101), Just(200)], head_size())
            .prop_map(|(pick, status, head)| Op::Interim(pick, status, head)),
        5 => (pick.clone(), prop_oneof![9 => Just(200u16), 1 => Just(101), 1 => Just(100)], head_size())
            .prop_map(|(pick, status, head)| Op::Answer(pick, status, head)),
        8 => (end(), pick.clone(), size()).prop_map(|(end, pick, size)| Op::Send(end, pick, size)),
        3 => (end(), pick.clone(), proptest::option::of(head_size()))
            .prop_map(|(end, pick, trailers)| Op::Finish(end, pick, trailers)),
        1 => (end(), pick.clone()).prop_map(|(end, pick)| Op::Fail(end, pick)),
        1 => (end(), pick.clone()).prop_map(|(end, pick)| Op::Abort(end, pick)),
        2 => (end(), pick.clone()).prop_map(|(end, pick)| Op::Release(end, pick)),
        3 => pick.clone().prop_map(Op::ReadHead),
        8 => (end(), pick.clone()).prop_map(|(end, pick)| Op::Read(end, pick)),
        3 => (end(), pick).prop_map(|(end, pick)| Op::Capacity(end, pick)),
        3 => end().prop_map(Op::Events),
        10 => (end(), prop_oneof![4 => Just(BATCH_BYTES), 1 => 0usize..40_000])
            .prop_map(|(end, limit)| Op::Transmit(end, limit)),
        10 => (end(), prop_oneof![3 => Just(1000usize), 1 => 1usize..5])
            .prop_map(|(end, frames)| Op::Deliver(end, frames)),
        2 => (0u64..9000).prop_map(Op::Wait),
    ]
}

fn rare_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        200 => op(),
        2 => end().prop_map(Op::Drain),
        1 => end().prop_map(Op::Close),
    ]
}

fn hostile_op() -> impl Strategy<Value = Op> {
    let id = prop_oneof![
        8 => (0usize..8).prop_map(HostileId::Known),
        4 => (0u32..6, 0u32..6).prop_map(|(slot, generation)| HostileId::Guessed(slot, generation)),
        1 => any::<u64>().prop_map(HostileId::Any),
    ];
    let body = prop_oneof![10 => 0usize..3000, 1 => 0usize..70_000, 1 => Just(1usize << 20)];
    let credit = prop_oneof![
        4 => 0u32..100_000,
        1 => Just(u32::MAX),
        1 => Just(u32::MAX - RESERVED_WINDOW),
        1 => Just(u32::MAX - RESERVED_WINDOW + 1),
    ];
    let frame = prop_oneof![
        6 => (head_size(), body.clone(), any::<bool>(), credit.clone())
            .prop_map(|(head, body, end, credit)| HostileFrame::Open(head, body, end, credit)),
        1 => (0u16..1100, head_size()).prop_map(|(status, head)| HostileFrame::Interim(status, head)),
        2 => (100u16..1000, head_size(), body.clone(), any::<bool>())
            .prop_map(|(status, head, body, end)| HostileFrame::Answer(status, head, body, end)),
        4 => (body, any::<bool>()).prop_map(|(body, end)| HostileFrame::Data(body, end)),
        1 => head_size().prop_map(HostileFrame::Trailers),
        2 => (0u32..12).prop_map(HostileFrame::Reset),
        3 => credit.prop_map(HostileFrame::Credit),
        1 => any::<u64>().prop_map(HostileFrame::Ping),
        1 => (0u64..4).prop_map(HostileFrame::Pong),
        1 => Just(HostileFrame::Drain),
    ];
    (end(), id, frame).prop_map(|(end, id, frame)| Op::Hostile(end, id, frame))
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

fn run(limit: usize, max_exchanges: u32, hostile: bool, ops: Vec<Op>) {
    let mut world = World::new(limit, max_exchanges, hostile);
    for op in ops {
        world.apply(op);
        world.check();
    }
    world.finish();
}

fn limit() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(PLENTY),
        Just(100_000),
        Just(1_000_000),
        Just(10_000_000)
    ]
}

proptest! {
    #![proptest_config(proptest_config())]

    #[test]
    fn nothing_drifts_and_nothing_is_left(
        limit in limit(),
        max_exchanges in 1u32..6,
        ops in proptest::collection::vec(rare_op(), 1..150),
    ) {
        run(limit, max_exchanges, false, ops);
    }

    #[test]
    fn a_peer_without_rules_breaks_nothing(
        limit in limit(),
        max_exchanges in 1u32..6,
        ops in proptest::collection::vec(prop_oneof![op(), hostile_op()], 1..100),
    ) {
        run(limit, max_exchanges, true, ops);
    }
}
