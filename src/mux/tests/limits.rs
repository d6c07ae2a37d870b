//! How much may be under way, and that it can't be got round.

use super::*;

fn small_config(max_exchanges: u32) -> Config {
    Config {
        max_exchanges,
        ..config()
    }
}

#[test]
fn no_more_exchanges_than_agreed() {
    let mut pair = Pair::with(small_config(3), budget(PLENTY), budget(PLENTY));
    let keys: Vec<_> = (0..3)
        .map(|_| pair.opener.open(get("/"), false).unwrap())
        .collect();
    assert_eq!(
        pair.opener.open(get("/"), false),
        Err(OpenError::Overloaded)
    );
    pair.settle();
    let (theirs, _) = pair.acceptor.accept().unwrap();
    pair.acceptor.answer(theirs, status(204));
    pair.acceptor.finish(theirs, None);
    pair.acceptor.release(theirs);
    pair.settle();
    assert_eq!(
        pair.opener.open(get("/"), false),
        Err(OpenError::Overloaded),
        "ended by both, but not released"
    );
    pair.opener.release(keys[0]);
    let again = pair.opener.open(get("/"), false).unwrap();
    for key in [again, keys[1], keys[2]] {
        pair.opener.release(key);
    }
    pair.settle();
    while let Some((key, _)) = pair.acceptor.accept() {
        pair.acceptor.release(key);
    }
    pair.assert_empty();
}

/// CVE-2023-44487: opening and resetting in a loop must not get more work started than waiting.
#[test]
fn a_peer_that_resets_fast_gets_no_more_work_done() {
    const LIMIT: u32 = 8;
    let mut pair = Pair::with(small_config(LIMIT), budget(PLENTY), budget(PLENTY));
    let mut at_work = Vec::new();
    for _ in 0..100 {
        while let Ok(key) = pair.opener.open(get("/"), true) {
            pair.request();
            // The service is slow: it starts what it is given and doesn't look back.
            at_work.extend(std::iter::from_fn(|| pair.acceptor.accept()).map(|(key, _)| key));
            pair.opener.abort(key, Reason::Cancelled);
            pair.opener.release(key);
            assert!(pair.opener.live() <= LIMIT);
            assert!(pair.acceptor.live() <= LIMIT);
        }
        pair.settle();
        assert!(at_work.len() <= LIMIT as usize);
        assert!(pair.acceptor.len() <= 2 * LIMIT as usize);
        assert!(pair.acceptor.longest_queue() <= 2 * LIMIT as usize);
        pair.acceptor.assert_consistent();
    }
    assert_eq!(at_work.len(), LIMIT as usize);
    for key in at_work {
        pair.acceptor.release(key);
    }
    while let Some((key, _)) = pair.acceptor.accept() {
        pair.acceptor.release(key);
    }
    pair.assert_empty();
}

/// Larger than this the other end refuses a message: see `wire::MAX_MESSAGE`.
const MAX_MESSAGE: usize = 256 * 1024;

#[test]
fn a_batch_fits_in_a_message_however_large_heads_and_trailers_are() {
    let mut pair = Pair::new();
    let lines = || big_lines(MAX_HEAD - 100);
    let mut keys = Vec::new();
    for _ in 0..8 {
        let head = RequestHead {
            lines: lines(),
            ..get("/")
        };
        let key = pair.opener.open(head, true).unwrap();
        pair.opener.send(key, zeros(15_000)).unwrap();
        pair.opener.finish(key, Some(lines()));
        keys.push(key);
    }
    let mut largest = 0;
    while pair.opener.wants_transmit() {
        let frames = pair.request();
        largest = largest.max(frames.iter().map(Frame::cost).sum());
    }
    assert!(largest < MAX_MESSAGE * 9 / 10, "a batch of {largest} bytes");
    let mut answered = 0;
    while let Some((key, _)) = pair.acceptor.accept() {
        let (bytes, end) = read_all(&mut pair.acceptor, key);
        assert_eq!((bytes, end), (15_000, Read::End(Some(lines()))));
        let interim = ResponseHead {
            status: 103,
            lines: big_lines(8000),
        };
        pair.acceptor.interim(key, interim);
        let head = ResponseHead {
            status: 200,
            lines: lines(),
        };
        pair.acceptor.answer(key, head);
        pair.acceptor.send(key, zeros(15_000)).unwrap();
        pair.acceptor.finish(key, Some(lines()));
        pair.acceptor.release(key);
        answered += 1;
    }
    assert_eq!(answered, 8);
    let mut largest = 0;
    while pair.acceptor.wants_transmit() {
        let frames = pair.answer();
        largest = largest.max(frames.iter().map(Frame::cost).sum());
    }
    assert!(largest < MAX_MESSAGE * 9 / 10, "a batch of {largest} bytes");
    for key in keys {
        pair.opener.release(key);
    }
    pair.assert_empty();
}

#[test]
fn where_nothing_can_be_lent_a_source_is_not_asked_for_more_than_was_reserved() {
    let limit = 3 * (2 * RESERVED_WINDOW as usize + 1000);
    let mut pair = Pair::with(config(), budget(limit), budget(PLENTY));
    let (ours, theirs) = pair.open(true);
    // The reader's window grows: more could be sent than fits here.
    while pair.acceptor.credit(theirs.id()).unwrap().to_receive < 200_000 {
        let free = pair.opener.capacity(ours).unwrap();
        assert!(free <= RESERVED_WINDOW as usize);
        pair.opener.send(ours, zeros(free)).unwrap();
        pair.settle();
        assert!(read_all(&mut pair.acceptor, theirs).0 > 0);
        pair.settle();
    }
    let more = pair.opener.open(get("/"), true).unwrap();
    for key in [ours, more] {
        pair.opener.release(key);
    }
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn interim_answers_are_paid_for() {
    let limit = 2 * RESERVED_WINDOW as usize + 1000;
    let mut pair = Pair::with(config(), budget(limit), budget(PLENTY));
    let (ours, theirs) = pair.open(false);
    let early = |size| ResponseHead {
        status: 103,
        lines: big_lines(size),
    };
    pair.acceptor.interim(theirs, early(5000));
    pair.settle();
    assert_eq!(pair.opener.read_head(ours), HeadRead::Pending);
    for _ in 0..10 {
        pair.acceptor.interim(theirs, early(500));
        pair.settle();
        assert!(matches!(pair.opener.read_head(ours), HeadRead::Interim(_)));
    }
    pair.opener.release(ours);
    pair.settle();
    pair.acceptor.release(theirs);
    pair.assert_empty();
}

#[test]
fn a_spent_budget_refuses_exchanges_and_takes_them_again() {
    let ten = |each: usize| 10 * (2 * RESERVED_WINDOW as usize + each);
    // Here at the opener, there at the acceptor, who has to tell it by a reset.
    for here in [true, false] {
        let (opener, acceptor) = if here {
            // The opener lends some 42 KiB to the first few for their answers.
            (ten(5000), PLENTY)
        } else {
            (PLENTY, ten(1000))
        };
        let mut pair = Pair::with(config(), budget(opener), budget(acceptor));
        let mut keys = Vec::new();
        let mut refused = 0;
        for _ in 0..30 {
            match pair.opener.open(get("/"), true) {
                Ok(key) => keys.push(key),
                Err(error) => {
                    assert_eq!(error, OpenError::Overloaded);
                    refused += 1;
                }
            }
        }
        pair.settle();
        keys.retain(|key| match pair.opener.read_head(*key) {
            HeadRead::Pending => true,
            other => {
                assert_eq!(other, HeadRead::Reset(Reason::Overloaded));
                pair.opener.release(*key);
                refused += 1;
                false
            }
        });
        assert_eq!(refused, 20);
        assert!(pair.opener.promised_bytes() <= opener);
        assert!(pair.acceptor.promised_bytes() <= acceptor);
        // One ends, another has its place.
        let freed = keys.pop().unwrap();
        pair.opener.release(freed);
        pair.settle();
        while let Some((key, _)) = pair.acceptor.accept() {
            if key.id() == freed.id() {
                pair.acceptor.release(key);
            }
        }
        let again = pair.opener.open(get("/"), true).unwrap();
        pair.settle();
        assert_eq!(pair.opener.read_head(again), HeadRead::Pending);
    }
}

/// Readers that stop reading with as large a window as they can get leave the others enough to
/// open, to be answered, and to make progress.
#[test]
fn stalled_readers_do_not_starve_the_others() {
    const LIMIT: usize = 8 << 20;
    let mut pair = Pair::with(config(), budget(LIMIT), budget(LIMIT));
    let mut stalled = Vec::new();
    for _ in 0..64 {
        let (ours, theirs) = pair.open(true);
        pair.acceptor.answer(theirs, status(200));
        // It reads well for a while, so that its window grows, in both directions.
        for _ in 0..40 {
            for (session, key) in [(&mut pair.opener, ours), (&mut pair.acceptor, theirs)] {
                while let Ok(free @ 1..) = session.capacity(key) {
                    session.send(key, zeros(free.min(30_000))).unwrap();
                }
            }
            pair.settle();
            read_all(&mut pair.opener, ours);
            read_all(&mut pair.acceptor, theirs);
        }
        // Then it stops, with all that fits on its way.
        for _ in 0..100 {
            for (session, key) in [(&mut pair.opener, ours), (&mut pair.acceptor, theirs)] {
                while let Ok(free @ 1..) = session.capacity(key) {
                    session.send(key, zeros(free.min(30_000))).unwrap();
                }
            }
            pair.settle();
        }
        stalled.push((ours, theirs));
        assert!(pair.opener.promised_bytes() <= LIMIT);
        assert!(pair.acceptor.promised_bytes() <= LIMIT);
    }
    let mut bytes = 0;
    for _ in 0..20 {
        let (ours, theirs) = pair.open(false);
        pair.acceptor.answer(theirs, status(200));
        let mut left = 300_000;
        while left > 0 {
            let free = pair.acceptor.capacity(theirs).unwrap().min(left);
            assert!(free > 0, "a reader that reads makes progress");
            pair.acceptor.send(theirs, zeros(free)).unwrap();
            left -= free;
            pair.settle();
            bytes += read_all(&mut pair.opener, ours).0;
            pair.settle();
        }
        pair.acceptor.finish(theirs, None);
        pair.acceptor.release(theirs);
        pair.settle();
        assert_eq!(pair.opener.read(ours), Read::End(None));
        pair.opener.release(ours);
    }
    assert_eq!(bytes, 20 * 300_000);
    for (ours, theirs) in stalled {
        pair.opener.release(ours);
        pair.acceptor.release(theirs);
    }
    pair.assert_empty();
}

#[test]
fn windows_grow_to_their_limit_and_not_beyond() {
    let mut pair = Pair::new();
    let (ours, theirs) = pair.open(true);
    pair.acceptor.answer(theirs, status(200));
    let mut largest = 0;
    for _ in 0..200 {
        while let Ok(free @ 1..) = pair.acceptor.capacity(theirs) {
            pair.acceptor.send(theirs, zeros(free)).unwrap();
        }
        pair.settle();
        read_all(&mut pair.opener, ours);
        pair.settle();
        let credit = pair.acceptor.credit(theirs.id()).unwrap();
        largest = largest.max(credit.to_send);
        pair.opener.assert_consistent();
    }
    assert!(largest > MAX_WINDOW as usize / 2 && largest <= MAX_WINDOW as usize);
    pair.opener.release(ours);
    pair.acceptor.release(theirs);
    pair.assert_empty();
}
