//! Signs of life.

use super::*;

const INTERVAL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(30);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn sent(session: &mut Session, now: Duration) -> Vec<Frame> {
    let mut frames = Vec::new();
    session.transmit(now, BATCH_BYTES, &mut frames);
    frames
}

#[test]
fn a_ping_goes_out_at_every_interval() {
    let mut session = Session::opener(config(), budget(PLENTY), Duration::ZERO);
    let mut pings = Vec::new();
    for _ in 0..5 {
        let now = session.poll_timeout().unwrap();
        session.handle_timeout(now).unwrap();
        for frame in sent(&mut session, now) {
            let Frame::Ping { nonce } = frame else {
                panic!("{frame:?}")
            };
            pings.push((now.as_secs(), nonce));
            session.receive(Frame::Pong { nonce }, now).unwrap();
        }
    }
    assert_eq!(pings, [(10, 1), (20, 2), (30, 3), (40, 4), (50, 5)]);
}

#[test]
fn a_silent_peer_is_dead_exactly_after_the_timeout() {
    let mut session = Session::acceptor(config(), budget(PLENTY), ms(500));
    let (now, error) = loop {
        let now = session.poll_timeout().unwrap();
        if let Err(error) = session.handle_timeout(now) {
            break (now, error);
        }
        assert!(session.poll_timeout().unwrap() > now, "time stands still");
        sent(&mut session, now);
    };
    assert_eq!(error, SessionError::Silent(TIMEOUT));
    assert_eq!(now, ms(500) + TIMEOUT);
    assert_eq!(
        session.handle_timeout(now - ms(1)),
        Ok(()),
        "not a moment earlier"
    );
    session.close();
    assert_eq!(session.poll_timeout(), None);
}

#[test]
fn every_frame_is_a_sign_of_life() {
    let mut session = Session::opener(config(), budget(PLENTY), Duration::ZERO);
    let late = TIMEOUT - ms(1);
    session.receive(Frame::Drain, late).unwrap();
    session.handle_timeout(TIMEOUT + ms(1)).unwrap();
    session.heard(2 * late);
    session.handle_timeout(3 * late).unwrap();
    assert!(session.handle_timeout(2 * late + TIMEOUT).is_err());
}

#[test]
fn the_round_trip_is_measured_from_the_moment_of_sending() {
    let mut pair = Pair::new();
    assert_eq!(pair.opener.round_trip(), None);
    pair.opener.handle_timeout(INTERVAL).unwrap();
    // The stream was blocked for a second.
    let frames = sent(&mut pair.opener, INTERVAL + ms(1000));
    for frame in frames {
        pair.acceptor.receive(frame, INTERVAL + ms(1040)).unwrap();
    }
    let answers = sent(&mut pair.acceptor, INTERVAL + ms(1040));
    assert_eq!(answers, [Frame::Pong { nonce: 1 }]);
    for nonce in [0, 2, u64::MAX] {
        let pong = Frame::Pong { nonce };
        pair.opener.receive(pong, INTERVAL + ms(1050)).unwrap();
        assert_eq!(pair.opener.round_trip(), None, "not asked for");
    }
    for frame in answers {
        pair.opener.receive(frame, INTERVAL + ms(1080)).unwrap();
    }
    assert_eq!(pair.opener.round_trip(), Some(ms(80)));
}

/// However many heartbeats come while the stream is blocked, one answer is owed.
#[test]
fn answers_to_heartbeats_do_not_pile_up() {
    let mut session = Session::opener(config(), budget(PLENTY), Duration::ZERO);
    for nonce in 0..1000 {
        session
            .receive(Frame::Ping { nonce }, Duration::ZERO)
            .unwrap();
    }
    for minute in 1..10 {
        session.heard(minute * TIMEOUT);
        session.handle_timeout(minute * TIMEOUT).unwrap();
    }
    assert_eq!(
        sent(&mut session, 10 * TIMEOUT),
        [Frame::Pong { nonce: 999 }, Frame::Ping { nonce: 1 }]
    );
}
