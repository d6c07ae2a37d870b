//! Anything an application may call, in any order, on both ends; and on top of that a peer that
//! keeps no rules.

use proptest::prelude::*;

use super::*;
use crate::mux::fuzz::{End, HostileFrame, HostileId, Op, run};

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
