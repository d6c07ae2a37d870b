//! The end of a session: drain, and close at any step.

use super::*;

#[test]
fn a_draining_opener_opens_nothing_more_and_finishes_the_rest() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.opener.drain();
    pair.opener.drain();
    assert_eq!(pair.opener.open(get("/"), false), Err(OpenError::Draining));
    assert_eq!(pair.request(), [Frame::Drain]);
    assert!(pair.acceptor.peer_is_draining());
    finish_both(&mut pair, ours, theirs);
}

#[test]
fn a_draining_acceptor_refuses_what_is_on_its_way_and_finishes_the_rest() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    let early = pair.opener.open(get("/early"), false).unwrap();
    let upload = pair.opener.open(get("/upload"), true).unwrap();
    pair.opener.send(upload, zeros(5000)).unwrap();
    pair.acceptor.drain();
    pair.settle();
    assert!(pair.opener.peer_is_draining());
    assert_eq!(pair.acceptor.accept(), None);
    for key in [early, upload] {
        assert_eq!(events(&mut pair.opener, key).0, key == early);
        assert_eq!(
            pair.opener.read_head(key),
            HeadRead::Reset(Reason::Draining)
        );
        pair.opener.release(key);
    }
    assert_eq!(pair.opener.open(get("/"), false), Err(OpenError::Draining));
    finish_both(&mut pair, ours, theirs);
}

/// An exchange under way comes to its end in spite of a drain.
fn finish_both(pair: &mut Pair, ours: Key, theirs: Key) {
    pair.opener.send(ours, zeros(100)).unwrap();
    pair.opener.finish(ours, Some(lines("request")));
    pair.settle();
    assert_eq!(
        read_all(&mut pair.acceptor, theirs),
        (100, Read::End(Some(lines("request"))))
    );
    pair.acceptor.answer(theirs, status(200));
    pair.acceptor.send(theirs, zeros(200)).unwrap();
    pair.acceptor.finish(theirs, Some(lines("answer")));
    pair.settle();
    assert_eq!(pair.opener.read_head(ours), HeadRead::Answer(status(200)));
    assert_eq!(
        read_all(&mut pair.opener, ours),
        (200, Read::End(Some(lines("answer"))))
    );
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

/// One step of an exchange's life.
type Step = fn(&mut Pair, &mut Vec<Key>, &mut Vec<Key>);

const LIFE: [Step; 12] = [
    |pair, ours, _| ours.push(pair.opener.open(get("/"), true).unwrap()),
    |pair, ours, _| pair.opener.send(ours[0], zeros(50_000)).unwrap(),
    |pair, _, _| drop(pair.request()),
    |pair, _, theirs| theirs.push(pair.acceptor.accept().unwrap().0),
    |pair, _, theirs| assert!(matches!(pair.acceptor.read(theirs[0]), Read::Data(_))),
    |pair, _, theirs| pair.acceptor.interim(theirs[0], status(103)),
    |pair, _, _| drop(pair.answer()),
    |pair, _, theirs| pair.acceptor.answer(theirs[0], status(200)),
    |pair, _, theirs| pair.acceptor.send(theirs[0], zeros(100_000)).unwrap(),
    |pair, ours, _| pair.opener.finish(ours[0], None),
    |pair, _, _| pair.settle(),
    |pair, _, theirs| pair.acceptor.finish(theirs[0], Some(lines("end"))),
];

#[test]
fn a_tunnel_lost_at_any_step_ends_every_exchange() {
    for steps in 0..=LIFE.len() {
        let mut pair = Pair::new();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for step in &LIFE[..steps] {
            step(&mut pair, &mut ours, &mut theirs);
            pair.opener.assert_consistent();
            pair.acceptor.assert_consistent();
        }
        pair.opener.close();
        pair.acceptor.close();
        assert!(!pair.opener.wants_transmit());
        assert_eq!(pair.opener.open(get("/"), true), Err(OpenError::TunnelLost));
        for (session, keys) in [(&mut pair.opener, &ours), (&mut pair.acceptor, &theirs)] {
            for key in keys {
                assert_eq!(events(session, *key), (true, true), "after {steps} steps");
                let (_, end) = read_all(session, *key);
                assert_eq!(end, Read::Reset(Reason::TunnelLost));
                assert_eq!(session.capacity(*key), Err(Reason::TunnelLost));
                assert_eq!(session.send(*key, zeros(1)), Err(Reason::TunnelLost));
                session.finish(*key, None);
                session.abort(*key, Reason::Cancelled);
                session.release(*key);
                session.release(*key);
            }
        }
        pair.assert_empty();
    }
}
