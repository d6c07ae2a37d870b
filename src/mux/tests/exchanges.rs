//! One exchange at a time, and what may become of it.

use super::*;

#[test]
fn the_queue_of_turns_does_not_grow_with_exchanges_that_never_went_out() {
    let mut pair = Pair::new();
    let _kept = pair.opener.open(get("/kept"), true).unwrap();
    for _ in 0..1000 {
        let key = pair.opener.open(get("/left"), true).unwrap();
        pair.opener.abort(key, Reason::Cancelled);
        pair.opener.release(key);
    }
    assert!(pair.opener.longest_queue() <= 2);
}

#[test]
fn a_visitor_who_leaves_before_the_answer_cancels_it() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(false);
    events(&mut pair.acceptor, theirs);
    assert_eq!(pair.acceptor.stopped(theirs), None);
    pair.opener.release(ours);
    pair.settle();
    assert_eq!(events(&mut pair.acceptor, theirs), (false, true));
    assert_eq!(pair.acceptor.stopped(theirs), Some(Reason::Cancelled));
    assert_eq!(pair.acceptor.capacity(theirs), Err(Reason::Cancelled));
    assert_eq!(pair.acceptor.read(theirs), Read::End(None));
    assert_eq!(pair.opener.len(), 0, "the slot is free again");
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_visitor_who_leaves_amid_the_answer_cancels_it() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(false);
    pair.acceptor.answer(theirs, status(200));
    pair.acceptor.send(theirs, zeros(1 << 20)).unwrap();
    pair.settle();
    assert_eq!(pair.acceptor.capacity(theirs), Ok(0));
    pair.opener.release(ours);
    pair.settle();
    assert!(events(&mut pair.acceptor, theirs).1);
    assert_eq!(pair.acceptor.send(theirs, zeros(1)), Err(Reason::Cancelled));
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn an_abort_after_the_own_end_tells_its_reason() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(false);
    pair.opener.abort(ours, Reason::UpstreamTimeout);
    pair.opener.abort(ours, Reason::Cancelled);
    let frames = pair.request();
    assert_eq!(frames.len(), 1, "told once: {frames:?}");
    pair.settle();
    assert_eq!(pair.acceptor.stopped(theirs), Some(Reason::UpstreamTimeout));
    assert_eq!(
        pair.opener.read_head(ours),
        HeadRead::Reset(Reason::Cancelled)
    );
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_request_that_never_went_out_is_not_sent_for_a_visitor_who_left() {
    let mut pair = Pair::new();
    let key = pair.opener.open(get("/"), false).unwrap();
    pair.opener.release(key);
    pair.settle();
    assert_eq!(pair.acceptor.accept(), None);
    pair.assert_empty();
}

#[test]
fn an_answer_that_is_complete_stops_the_rest_of_the_request() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.opener.send(ours, zeros(1 << 20)).unwrap();
    assert_eq!(pair.opener.capacity(ours), Ok(0));
    pair.acceptor.answer(theirs, status(200));
    pair.acceptor.send(theirs, zeros(100_000)).unwrap();
    pair.acceptor.finish(theirs, None);
    pair.acceptor.release(theirs);
    pair.settle();
    let mut read = 0;
    let end = loop {
        let (bytes, end) = read_all(&mut pair.opener, ours);
        read += bytes;
        if end != Read::Pending {
            break end;
        }
        pair.settle();
    };
    assert_eq!((read, end), (100_000, Read::End(None)));
    assert!(events(&mut pair.opener, ours).1, "the writer learns of it");
    assert_eq!(pair.opener.capacity(ours), Err(Reason::Cancelled));
    pair.opener.release(ours);
    pair.assert_empty();
}

#[test]
fn what_was_queued_before_the_end_is_sent_after_release() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.acceptor.answer(theirs, status(101));
    pair.acceptor.finish(theirs, None);
    pair.settle();
    assert!(matches!(pair.opener.read_head(ours), HeadRead::Answer(_)));
    assert_eq!(pair.opener.read(ours), Read::End(None));
    // Half-closed the other way: the answer is complete, the rest of the request counts still.
    pair.opener.send(ours, zeros(100_000)).unwrap();
    pair.opener.finish(ours, None);
    pair.opener.release(ours);
    let mut read = 0;
    while let (bytes, end) = read_all(&mut pair.acceptor, theirs)
        && {
            read += bytes;
            end == Read::Pending
        }
    {
        pair.settle();
    }
    assert_eq!(read, 100_000);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_reset_wakes_who_reads_and_who_writes() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    events(&mut pair.acceptor, theirs);
    pair.opener.fail(ours, Reason::BodyIncomplete);
    pair.settle();
    assert_eq!(events(&mut pair.acceptor, theirs), (true, true));
    assert_eq!(
        pair.acceptor.read(theirs),
        Read::Reset(Reason::BodyIncomplete)
    );
    assert_eq!(pair.acceptor.capacity(theirs), Err(Reason::BodyIncomplete));
    assert_eq!(
        pair.opener.read_head(ours),
        HeadRead::Reset(Reason::Cancelled)
    );
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn an_answer_without_room_for_its_head_wakes_both_and_stops_the_peer() {
    let limit = 2 * RESERVED_WINDOW as usize + 1000;
    let mut pair = Pair::with(config(), budget(limit), budget(PLENTY));
    let (ours, theirs) = pair.open(true);
    while let Ok(free @ 1..) = pair.opener.capacity(ours) {
        pair.opener.send(ours, zeros(free)).unwrap();
        pair.request();
    }
    pair.acceptor.answer(
        theirs,
        ResponseHead {
            status: 200,
            lines: big_lines(2000),
        },
    );
    pair.settle();
    assert_eq!(events(&mut pair.opener, ours), (true, true));
    assert_eq!(
        pair.opener.read_head(ours),
        HeadRead::Reset(Reason::Overloaded)
    );
    assert_eq!(pair.opener.capacity(ours), Err(Reason::Overloaded));
    assert_eq!(pair.acceptor.stopped(theirs), Some(Reason::Overloaded));
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_lost_tunnel_is_named_to_who_sends_after_the_peers_end() {
    let mut pair = Pair::new();
    let (_, theirs) = pair.open(false);
    pair.acceptor.close();
    assert_eq!(
        pair.acceptor.send(theirs, zeros(1)),
        Err(Reason::TunnelLost)
    );
    assert_eq!(pair.acceptor.stopped(theirs), Some(Reason::TunnelLost));
}

#[test]
fn an_abort_wakes_who_waits_in_the_other_direction() {
    let mut pair = Pair::new();
    // Not sent yet: no answer will ever come.
    let key = pair.opener.open(get("/"), true).unwrap();
    assert_eq!(pair.opener.read_head(key), HeadRead::Pending);
    pair.opener.abort(key, Reason::BodyIncomplete);
    assert_eq!(events(&mut pair.opener, key), (true, true));
    assert_eq!(
        pair.opener.read_head(key),
        HeadRead::Reset(Reason::BodyIncomplete)
    );
    pair.opener.release(key);

    let (ours, theirs) = pair.open(true);
    pair.opener.send(ours, zeros(1 << 20)).unwrap();
    assert_eq!(pair.opener.capacity(ours), Ok(0));
    pair.opener.abort(ours, Reason::Cancelled);
    assert_eq!(events(&mut pair.opener, ours), (true, true));
    assert_eq!(
        pair.opener.read_head(ours),
        HeadRead::Reset(Reason::Cancelled),
        "without waiting for the peer's word"
    );
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_request_given_up_before_it_was_accepted_is_not_accepted() {
    let mut pair = Pair::new();
    let left = pair.opener.open(get("/left"), true).unwrap();
    let stays = pair.opener.open(get("/stays"), true).unwrap();
    pair.settle();
    pair.opener.release(left);
    pair.settle();
    let (theirs, head) = pair.acceptor.accept().unwrap();
    assert_eq!(&head.target[..], b"/stays");
    assert_eq!(pair.acceptor.accept(), None);
    pair.acceptor.release(theirs);
    pair.opener.release(stays);
    pair.assert_empty();
}

#[test]
fn closing_lets_go_of_what_nobody_accepted() {
    let mut pair = Pair::new();
    let key = pair.opener.open(get("/"), true).unwrap();
    pair.settle();
    pair.acceptor.close();
    pair.opener.close();
    pair.opener.release(key);
    pair.assert_empty();
}

#[test]
fn a_closed_session_takes_nothing_in() {
    let mut pair = Pair::new();
    let key = pair.opener.open(get("/"), true).unwrap();
    pair.acceptor.close();
    pair.settle();
    assert_eq!(pair.acceptor.accept(), None);
    pair.opener.close();
    pair.opener.release(key);
    pair.assert_empty();
}

/// What an application does in a wrong order, or too large, ends its exchange and no other.
#[test]
fn an_applications_mistake_costs_one_exchange() {
    let big = |status| ResponseHead {
        status,
        lines: big_lines(MAX_HEAD + 1),
    };
    type Mistake = fn(&mut Session, Key, ResponseHead);
    let mistakes: [Mistake; 5] = [
        |session, key, _| session.finish(key, None),
        |session, key, _| {
            session.send(key, zeros(10)).unwrap();
            session.finish(key, None);
        },
        |session, key, _| session.answer(key, status(103)),
        |session, key, _| session.answer(key, status(1000)),
        |session, key, big| session.answer(key, big),
    ];
    for mistake in mistakes {
        let mut pair = Pair::new();
        let (ours, theirs) = pair.open(true);
        mistake(&mut pair.acceptor, theirs, big(200));
        pair.settle();
        assert_eq!(
            pair.opener.read_head(ours),
            HeadRead::Reset(Reason::UpstreamError)
        );
        pair.opener.release(ours);
        pair.acceptor.release(theirs);
        pair.assert_empty();
    }
}

#[test]
fn what_comes_too_late_or_too_large_beside_an_answer_is_dropped() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(false);
    for interim in [101, 200] {
        pair.acceptor.interim(theirs, status(interim));
    }
    pair.acceptor.interim(
        theirs,
        ResponseHead {
            status: 103,
            lines: big_lines(10_000),
        },
    );
    pair.acceptor.send(theirs, zeros(10)).unwrap();
    pair.settle();
    assert_eq!(pair.opener.read_head(ours), HeadRead::Pending);
    pair.acceptor.interim(theirs, status(100));
    pair.acceptor.interim(theirs, status(102));
    pair.settle();
    pair.acceptor.interim(theirs, status(103));
    pair.acceptor.answer(theirs, status(200));
    pair.settle();
    pair.acceptor.answer(theirs, status(404));
    pair.acceptor.interim(theirs, status(103));
    pair.acceptor
        .finish(theirs, Some(big_lines(MAX_HEAD + 100)));
    pair.settle();
    // A 100 is kept in any case. For the others there is one place: the newer one is there.
    let go_ahead = HeadRead::Interim(ResponseHead::GO_AHEAD);
    assert_eq!(pair.opener.read_head(ours), go_ahead);
    assert_eq!(pair.opener.read_head(ours), HeadRead::Interim(status(103)));
    assert_eq!(pair.opener.read_head(ours), HeadRead::Answer(status(200)));
    assert_eq!(read_all(&mut pair.opener, ours), (10, Read::End(None)));
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

/// Found by `chaos`.
#[test]
fn a_reset_that_is_out_is_not_followed_by_another() {
    let mut pair = Pair::new();
    let ours = pair.opener.open(get("/"), true).unwrap();
    pair.opener.fail(ours, Reason::BodyIncomplete);
    pair.request();
    pair.opener.release(ours);
    assert_eq!(pair.request(), []);
    pair.settle();
    assert_eq!(pair.acceptor.accept(), None);
    pair.assert_empty();
}

#[test]
fn an_upload_whose_answer_nobody_will_read_is_dropped_at_once() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.opener.send(ours, zeros(100_000)).unwrap();
    pair.opener.finish(ours, None);
    pair.settle();
    // Without credit the rest can't go out, and the service doesn't read.
    pair.opener.release(ours);
    pair.settle();
    assert_eq!(pair.acceptor.stopped(theirs), Some(Reason::Cancelled));
    assert_eq!(pair.opener.len(), 0, "the slot is free again");
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

/// Who waits for the peer to stop, and not for capacity, is woken as well.
#[test]
fn a_refused_answer_wakes_who_waits_for_the_peer_to_stop() {
    let limit = 2 * RESERVED_WINDOW as usize + 1000;
    let mut pair = Pair::with(config(), budget(limit), budget(PLENTY));
    let (ours, theirs) = pair.open(true);
    assert_eq!(pair.opener.stopped(ours), None);
    let head = ResponseHead {
        status: 200,
        lines: big_lines(2000),
    };
    pair.acceptor.answer(theirs, head);
    pair.settle();
    assert_eq!(events(&mut pair.opener, ours), (true, true));
    assert_eq!(pair.opener.stopped(ours), Some(Reason::Overloaded));
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}
