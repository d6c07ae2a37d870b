//! Two cores against each other, and one core against a peer that keeps no rules.

use std::time::Duration;

use bytes::Bytes;

use super::fuzz::{PLENTY, big_lines, budget, config, get, lines, zeros};
use super::*;
use crate::head::{Lines, RequestHead, ResponseHead};

mod chaos;
mod ending;
mod exchanges;
mod fairness;
mod heartbeat;
mod limits;
mod tasks;

/// Counterexamples become tests of their own instead of seeds in a file. The cheaper generator,
/// because in a debug build the other one takes most of the time.
fn proptest_config() -> proptest::test_runner::Config {
    proptest::test_runner::Config {
        failure_persistence: None,
        rng_algorithm: proptest::test_runner::RngAlgorithm::XorShift,
        ..proptest::test_runner::Config::default()
    }
}

fn status(status: u16) -> ResponseHead {
    ResponseHead {
        status,
        lines: lines("answer"),
    }
}

/// Two sessions and nothing between them: what one transmits the other receives at once.
struct Pair {
    now: Duration,
    opener: Session,
    acceptor: Session,
}

impl Pair {
    fn new() -> Self {
        Self::with(config(), budget(PLENTY), budget(PLENTY))
    }

    fn with(config: Config, opener: Budget, acceptor: Budget) -> Self {
        let now = Duration::ZERO;
        Self {
            now,
            opener: Session::opener(config, opener, now),
            acceptor: Session::acceptor(config, acceptor, now),
        }
    }

    /// One batch from the opener to the acceptor.
    fn request(&mut self) -> Vec<Frame> {
        transfer(self.now, &mut self.opener, &mut self.acceptor)
    }

    /// One batch from the acceptor to the opener.
    fn answer(&mut self) -> Vec<Frame> {
        transfer(self.now, &mut self.acceptor, &mut self.opener)
    }

    /// Batches to and fro until both ends have nothing more to say.
    fn settle(&mut self) {
        while self.opener.wants_transmit() || self.acceptor.wants_transmit() {
            self.request();
            self.answer();
        }
    }

    /// Opens an exchange and accepts it at the other end.
    fn open(&mut self, expects_body: bool) -> (Key, Key) {
        let ours = self.opener.open(get("/"), expects_body).unwrap();
        self.settle();
        let (theirs, _) = self.acceptor.accept().unwrap();
        (ours, theirs)
    }

    /// After everything was let go, nothing may be left.
    #[track_caller]
    fn assert_empty(&mut self) {
        self.settle();
        for session in [&self.opener, &self.acceptor] {
            session.assert_consistent();
            assert_eq!(session.len(), 0, "exchanges are left");
            assert_eq!(session.promised_bytes(), 0, "promises are left");
            assert_eq!(session.live(), 0);
        }
    }
}

fn transfer(now: Duration, from: &mut Session, to: &mut Session) -> Vec<Frame> {
    let mut frames = Vec::new();
    from.transmit(now, BATCH_BYTES, &mut frames);
    for frame in &frames {
        to.receive(frame.clone(), now).unwrap();
    }
    frames
}

/// Everything there is to read now, and how it stands then.
fn read_all(session: &mut Session, key: Key) -> (usize, Read) {
    let mut bytes = 0;
    loop {
        match session.read(key) {
            Read::Data(chunk) => bytes += chunk.len(),
            other => return (bytes, other),
        }
    }
}

/// The events there are now, of one exchange: readable and writable.
fn events(session: &mut Session, key: Key) -> (bool, bool) {
    let mut seen = (false, false);
    while let Some(event) = session.poll_event() {
        if event.index == key.index() {
            seen.0 |= event.what.readable;
            seen.1 |= event.what.writable;
        }
    }
    seen
}
