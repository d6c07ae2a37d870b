//! Who is sent first.

use super::*;
use crate::id::ExchangeId;

const NOW: Duration = Duration::ZERO;

/// What an exchange may send before the next one has its turn.
const TURN: usize = 16 * 1024;

/// An acceptor with this many exchanges, answered, whose peer reads without end.
fn sender(exchanges: u32) -> (Session, Vec<Key>) {
    let mut session = Session::acceptor(config(), budget(PLENTY), NOW);
    let keys = (0..exchanges)
        .map(|slot| {
            let open = Frame::Open {
                id: ExchangeId {
                    slot,
                    generation: slot,
                },
                head: get("/"),
                body: Bytes::new(),
                end: true,
                credit: 1 << 30,
            };
            session.receive(open, NOW).unwrap();
            session.accept().unwrap().0
        })
        .collect();
    (session, keys)
}

fn batch(session: &mut Session) -> Vec<Frame> {
    let mut frames = Vec::new();
    session.transmit(NOW, BATCH_BYTES, &mut frames);
    frames
}

fn body_bytes(frames: &[Frame], key: Key) -> usize {
    frames
        .iter()
        .map(|frame| match frame {
            Frame::Answer { id, body, .. } | Frame::Data { id, body, .. } if *id == key.id() => {
                body.len()
            }
            _ => 0,
        })
        .sum()
}

#[test]
fn small_answers_wait_for_one_turn_of_a_large_one() {
    let (mut session, keys) = sender(101);
    let (bulk, small) = keys.split_first().unwrap();
    session.answer(*bulk, status(200));
    session.send(*bulk, zeros(10 << 20)).unwrap();
    let alone = body_bytes(&batch(&mut session), *bulk);
    assert!(alone > 3 * TURN, "alone it has the batch for itself");
    for key in small {
        session.answer(*key, status(200));
        session.send(*key, zeros(100)).unwrap();
        session.finish(*key, None);
    }
    let mut frames = Vec::new();
    for _ in 0..2 {
        frames.extend(batch(&mut session));
    }
    let last = frames
        .iter()
        .rposition(|frame| matches!(frame, Frame::Answer { .. }))
        .unwrap();
    for key in small {
        assert_eq!(body_bytes(&frames[..=last], *key), 100);
    }
    assert!(body_bytes(&frames[..=last], *bulk) <= TURN);
}

#[test]
fn turns_are_by_bytes() {
    let (mut session, keys) = sender(7);
    for (number, key) in keys.iter().enumerate() {
        session.answer(*key, status(200));
        // As many bytes, but in slices of very different sizes.
        let slice = zeros(10_000 >> number);
        for _ in 0..(4 << 20) / slice.len() {
            session.send(*key, slice.clone()).unwrap();
        }
    }
    let mut sent = [0; 7];
    for _ in 0..100 {
        let frames = batch(&mut session);
        for (sent, key) in sent.iter_mut().zip(&keys) {
            *sent += body_bytes(&frames, *key);
        }
    }
    let (least, most) = (sent.iter().min().unwrap(), sent.iter().max().unwrap());
    assert!(most - least <= 4 * TURN, "{sent:?}");
    assert!(*least > 50 * BATCH_BYTES / 7);
}

#[test]
fn control_goes_before_data() {
    let (mut session, keys) = sender(3);
    for key in &keys[..2] {
        session.answer(*key, status(200));
        session.send(*key, zeros(10 << 20)).unwrap();
    }
    batch(&mut session);
    session.abort(keys[2], Reason::UpstreamRefused);
    session.drain();
    session.handle_timeout(config().heartbeat_interval).unwrap();
    session.receive(Frame::Ping { nonce: 7 }, NOW).unwrap();
    let frames = batch(&mut session);
    assert_eq!(
        frames[..4],
        [
            Frame::Pong { nonce: 7 },
            Frame::Ping { nonce: 1 },
            Frame::Drain,
            Frame::Reset {
                id: keys[2].id(),
                reason: Reason::UpstreamRefused
            },
        ]
    );
    assert!(matches!(frames[4], Frame::Data { .. }));
}

#[test]
fn credit_goes_before_data() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.acceptor.answer(theirs, status(200));
    pair.acceptor.send(theirs, zeros(60_000)).unwrap();
    pair.answer();
    pair.opener.send(ours, zeros(10_000)).unwrap();
    assert_eq!(read_all(&mut pair.opener, ours).0, 60_000);
    let frames = pair.request();
    assert!(matches!(frames[0], Frame::Credit { .. }), "{frames:?}");
    assert!(matches!(frames[1], Frame::Data { .. }));
    assert_eq!(frames.len(), 2);
}

#[test]
fn a_batch_is_about_as_long_as_it_was_asked_to_be() {
    let (mut session, keys) = sender(50);
    for key in &keys {
        session.answer(*key, status(200));
        session.send(*key, zeros(1 << 20)).unwrap();
    }
    for limit in [1, 100, 10_000, BATCH_BYTES] {
        let mut frames = Vec::new();
        session.transmit(NOW, limit, &mut frames);
        let cost: usize = frames.iter().map(Frame::cost).sum();
        assert!(cost >= limit && cost <= limit + 200, "{cost} of {limit}");
    }
}
