//! Two ends with tasks on them, on a clock that the test owns.
//!
//! Each exchange has a task that reads and a task that writes at each end. As in the real thing a
//! task acts when it is first polled, and from then on only when an event of its exchange, or its
//! own timer, says so: whoever is never woken never finishes, and the test fails. Between the ends
//! lie streams with latency and bandwidth, which may be lost.

use std::collections::{BTreeMap, VecDeque};
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

/// What is to happen in one run.
#[derive(Debug, Clone)]
struct Scene {
    exchanges: Vec<Script>,
    latency: u64,
    /// Bytes a millisecond; none for as fast as memory.
    bandwidth: Option<u64>,
    budgets: [usize; 2],
    max_exchanges: u32,
    drain: Option<(End, u64)>,
    loss: Option<(Loss, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// Both ends learn of it at once.
    Known,
    /// Nothing arrives any more; both ends have to find out.
    Silent,
}

/// What is to happen in one exchange. Times are in milliseconds.
#[derive(Debug, Clone)]
struct Script {
    start: u64,
    request: Option<Body>,
    request_reader: Pace,
    interims: usize,
    answer_delay: u64,
    answer_waits_for_request: bool,
    response: Body,
    response_reader: Pace,
    /// After the start at this end.
    opener_leaves: Option<u64>,
    acceptor_leaves: Option<u64>,
}

#[derive(Debug, Clone)]
struct Body {
    /// Sizes, and how long the source takes for each.
    pieces: Vec<(usize, u64)>,
    ending: Ending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Finish,
    Trailers,
    Fail,
    Abort,
    /// The whole exchange is let go.
    Leave,
}

#[derive(Debug, Clone)]
struct Pace {
    /// How long the reader takes for a piece.
    delay: u64,
    /// It stops reading after so many bytes, gives up a minute later, and lets go of the whole
    /// exchange yet a minute later.
    stops_after: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Opener,
    Acceptor,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Opener => Self::Acceptor,
            Self::Acceptor => Self::Opener,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Start,
    Read,
    Write,
    Leave,
}

/// A task: of which exchange, at which end, doing what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Task(usize, End, Job);

/// One end of one exchange.
#[derive(Debug, Default)]
struct Half {
    key: Option<Key>,
    head_read: bool,
    received: usize,
    read_ended: Option<ReadEnded>,
    /// The reader waits for a `readable` event.
    reader_waits: bool,
    piece: usize,
    piece_is_due: Option<Duration>,
    answered: bool,
    sent: usize,
    wrote: Option<Wrote>,
    wrote_at: Duration,
    /// The writer waits for a `writable` event.
    writer_waits: bool,
    left: bool,
    released: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ReadEnded {
    Complete(Option<Lines>),
    Reset(Reason),
    GaveUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrote {
    Nothing,
    All(Ending),
    Stopped(Reason),
}

struct World {
    now: Duration,
    scene: Scene,
    ends: [Side; 2],
    halves: Vec<[Half; 2]>,
    refused: Vec<Option<OpenError>>,
    runnable: VecDeque<Task>,
    timers: BTreeMap<(Duration, u64), Task>,
    timer_number: u64,
    lost: bool,
    silent: bool,
}

struct Side {
    session: Session,
    /// The exchange whose key has this index.
    table: BTreeMap<usize, usize>,
    /// On the way to the other end, with the time of arrival.
    wire: VecDeque<(Duration, Vec<Frame>)>,
    busy_until: Duration,
}

/// Later than this, virtually, a task is taken to wait for ever.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

const GIVES_UP_AFTER: u64 = 60_000;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The bodies are cut from here, each from a place of its own, so that a crossed or misplaced byte
/// shows.
static PATTERN: LazyLock<Bytes> = LazyLock::new(|| {
    let mut state = 1u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(2 << 20).collect()
});

fn body(exchange: usize, sender: End, offset: usize, size: usize) -> Bytes {
    let base = (exchange * 2 + sender as usize) * 7919;
    PATTERN.slice(base + offset..base + offset + size)
}

fn trailers(exchange: usize, sender: End) -> Lines {
    lines(&format!("trailers of {exchange} by {sender:?}"))
}

fn target(exchange: usize) -> String {
    format!("/{exchange}")
}

fn answer_head(exchange: usize, status: u16) -> ResponseHead {
    ResponseHead {
        status,
        lines: lines(&format!("{status} for {exchange}")),
    }
}

impl World {
    fn new(scene: Scene) -> Self {
        let config = Config {
            max_exchanges: scene.max_exchanges,
            ..config()
        };
        let now = Duration::ZERO;
        let side = |session| Side {
            session,
            table: BTreeMap::new(),
            wire: VecDeque::new(),
            busy_until: now,
        };
        let mut world = Self {
            now,
            ends: [
                side(Session::opener(config, budget(scene.budgets[0]), now)),
                side(Session::acceptor(config, budget(scene.budgets[1]), now)),
            ],
            halves: scene.exchanges.iter().map(|_| Default::default()).collect(),
            refused: vec![None; scene.exchanges.len()],
            scene,
            runnable: VecDeque::new(),
            timers: BTreeMap::new(),
            timer_number: 0,
            lost: false,
            silent: false,
        };
        for exchange in 0..world.scene.exchanges.len() {
            let start = world.scene.exchanges[exchange].start;
            world.timer(start, Task(exchange, End::Opener, Job::Start));
        }
        world
    }

    fn timer(&mut self, delay: u64, task: Task) {
        self.timer_number += 1;
        let at = (self.now + ms(delay), self.timer_number);
        self.timers.insert(at, task);
    }

    fn half(&mut self, exchange: usize, end: End) -> &mut Half {
        &mut self.halves[exchange][end as usize]
    }

    /// Does something to a session, and wakes whoever its events concern.
    fn act<T>(&mut self, end: End, action: impl FnOnce(&mut Session) -> T) -> T {
        let side = &mut self.ends[end as usize];
        let result = action(&mut side.session);
        while let Some(event) = side.session.poll_event() {
            let Some(&exchange) = side.table.get(&event.index) else {
                continue;
            };
            let half = &mut self.halves[exchange][end as usize];
            if event.what.readable && std::mem::take(&mut half.reader_waits) {
                self.runnable.push_back(Task(exchange, end, Job::Read));
            }
            if event.what.writable && std::mem::take(&mut half.writer_waits) {
                self.runnable.push_back(Task(exchange, end, Job::Write));
            }
        }
        result
    }

    fn run(mut self) -> Self {
        loop {
            while let Some(task) = self.runnable.pop_front() {
                self.poll(task);
            }
            for end in [End::Opener, End::Acceptor] {
                self.transmit(end);
                self.ends[end as usize].session.assert_consistent();
            }
            if !self.runnable.is_empty() {
                continue;
            }
            let Some(next) = self.next_time() else {
                break;
            };
            assert!(next < FOR_EVER, "somebody waits for ever: {self:#?}");
            self.now = next.max(self.now);
            self.pass_time();
        }
        self
    }

    /// When something happens next; none when all is done.
    fn next_time(&self) -> Option<Duration> {
        let closed = |side: &Side| side.session.poll_timeout().is_none();
        let quiet = self.silent
            || self
                .ends
                .iter()
                .all(|side| side.wire.is_empty() && !side.session.wants_transmit());
        let lost = self.lost || !self.silent;
        if quiet && lost && self.timers.is_empty() && self.all_done() {
            return None;
        }
        let timers = self.timers.keys().next().map(|(at, _)| *at);
        let streams = self.ends.iter().flat_map(|side| {
            let arrival = side.wire.front().map(|(at, _)| *at);
            let sender = side.session.wants_transmit().then_some(side.busy_until);
            let heartbeat = side.session.poll_timeout();
            [arrival, sender, heartbeat]
        });
        let next = timers.into_iter().chain(streams.flatten()).min();
        if self.ends.iter().all(closed) && next.is_none() {
            assert!(self.all_done(), "the tunnel is lost, and somebody waits");
        }
        next
    }

    fn all_done(&self) -> bool {
        self.halves
            .iter()
            .flatten()
            .all(|half| half.key.is_none() || half.released)
    }

    fn pass_time(&mut self) {
        let now = self.now;
        if let Some((kind, at)) = self.scene.loss
            && now >= ms(at)
            && !self.silent
        {
            self.silent = true;
            for side in &mut self.ends {
                side.wire.clear();
            }
            if kind == Loss::Known {
                self.close(End::Opener);
                self.close(End::Acceptor);
            }
        }
        if let Some((end, at)) = self.scene.drain
            && now >= ms(at)
        {
            self.act(end, Session::drain);
        }
        for end in [End::Opener, End::Acceptor] {
            while self.ends[end as usize]
                .wire
                .front()
                .is_some_and(|(at, _)| *at <= now)
            {
                let Some((_, frames)) = self.ends[end as usize].wire.pop_front() else {
                    break;
                };
                self.receive(end.other(), frames);
            }
            if self.ends[end as usize].session.poll_timeout() <= Some(now)
                && self
                    .act(end, |session| session.handle_timeout(now))
                    .is_err()
            {
                assert!(self.silent, "dead in spite of heartbeats");
                self.close(end);
            }
        }
        while let Some(entry) = self.timers.first_entry()
            && entry.key().0 <= now
        {
            let task = entry.remove();
            self.runnable.push_back(task);
        }
    }

    fn close(&mut self, end: End) {
        self.lost = true;
        self.act(end, Session::close);
    }

    fn transmit(&mut self, end: End) {
        let now = self.now;
        let side = &self.ends[end as usize];
        if now < side.busy_until || !side.session.wants_transmit() {
            return;
        }
        let mut frames = Vec::new();
        self.act(end, |session| {
            session.transmit(now, BATCH_BYTES, &mut frames);
        });
        let bytes: usize = frames.iter().map(Frame::cost).sum();
        let taken = self.scene.bandwidth.map_or(0, |rate| bytes as u64 / rate);
        let arrival = now + ms(taken + self.scene.latency);
        let side = &mut self.ends[end as usize];
        side.busy_until = now + ms(taken);
        if !self.silent {
            side.wire.push_back((arrival, frames));
        }
    }

    fn receive(&mut self, end: End, frames: Vec<Frame>) {
        let now = self.now;
        for frame in frames {
            let received = self.act(end, |session| session.receive(frame.clone(), now));
            assert_eq!(received, Ok(()), "{frame:?}");
        }
        while self.ends[end as usize].session.has_accepted() {
            let Some((key, head)) = self.act(end, Session::accept) else {
                continue;
            };
            let exchange: usize = std::str::from_utf8(&head.target[1..])
                .unwrap()
                .parse()
                .unwrap();
            assert_eq!(head, get(&target(exchange)), "the head has changed");
            self.start(exchange, end, key);
        }
    }

    fn start(&mut self, exchange: usize, end: End, key: Key) {
        let script = &self.scene.exchanges[exchange];
        let leaves = match end {
            End::Opener => script.opener_leaves,
            End::Acceptor => script.acceptor_leaves,
        };
        let writes = end == End::Acceptor || script.request.is_some();
        let waits = end == End::Acceptor && script.answer_waits_for_request;
        let old = self.ends[end as usize].table.insert(key.index(), exchange);
        assert_eq!(old, None, "a place is taken twice");
        let half = self.half(exchange, end);
        assert!(half.key.is_none(), "accepted twice");
        half.key = Some(key);
        if !writes {
            half.wrote = Some(Wrote::Nothing);
        }
        self.runnable.push_back(Task(exchange, end, Job::Read));
        if writes && !waits {
            self.runnable.push_back(Task(exchange, end, Job::Write));
        }
        if let Some(after) = leaves {
            self.timer(after, Task(exchange, end, Job::Leave));
        }
    }

    fn poll(&mut self, Task(exchange, end, job): Task) {
        if job == Job::Start {
            let expects_body = self.scene.exchanges[exchange].request.is_some();
            let head = get(&target(exchange));
            match self.act(end, |session| session.open(head, expects_body)) {
                Ok(key) => self.start(exchange, end, key),
                Err(error) => self.refused[exchange] = Some(error),
            }
            return;
        }
        let half = self.half(exchange, end);
        let Some(key) = half.key else {
            return;
        };
        if half.released {
            return;
        }
        match job {
            Job::Start => {}
            Job::Read => self.read(exchange, end, key),
            Job::Write => self.write(exchange, end, key),
            Job::Leave => self.leave(exchange, end, key),
        }
        let half = self.half(exchange, end);
        if half.read_ended.is_some() && half.wrote.is_some() {
            self.release(exchange, end, key);
        }
    }

    fn leave(&mut self, exchange: usize, end: End, key: Key) {
        self.half(exchange, end).left = true;
        self.release(exchange, end, key);
    }

    fn release(&mut self, exchange: usize, end: End, key: Key) {
        let half = self.half(exchange, end);
        if !std::mem::replace(&mut half.released, true) {
            self.act(end, |session| session.release(key));
            self.ends[end as usize].table.remove(&key.index());
        }
    }

    fn read(&mut self, exchange: usize, end: End, key: Key) {
        let script = &self.scene.exchanges[exchange];
        let pace = match end {
            End::Opener => script.response_reader.clone(),
            End::Acceptor => script.request_reader.clone(),
        };
        while end == End::Opener && !self.half(exchange, end).head_read {
            match self.act(end, |session| session.read_head(key)) {
                HeadRead::Interim(head) => assert_eq!(head, answer_head(exchange, 103)),
                HeadRead::Answer(head) => {
                    assert_eq!(head, answer_head(exchange, 200));
                    self.half(exchange, end).head_read = true;
                }
                HeadRead::Reset(reason) => {
                    self.read_ended(exchange, end, ReadEnded::Reset(reason));
                    return;
                }
                HeadRead::Pending => {
                    self.half(exchange, end).reader_waits = true;
                    return;
                }
            }
        }
        loop {
            if self.half(exchange, end).read_ended.is_some() {
                return;
            }
            let received = self.half(exchange, end).received;
            if pace.stops_after.is_some_and(|limit| received >= limit) {
                // The second time it gives up.
                let waited = std::mem::replace(&mut self.half(exchange, end).reader_waits, true);
                if waited {
                    self.read_ended(exchange, end, ReadEnded::GaveUp);
                    self.timer(GIVES_UP_AFTER, Task(exchange, end, Job::Leave));
                } else {
                    self.timer(GIVES_UP_AFTER, Task(exchange, end, Job::Read));
                }
                return;
            }
            match self.act(end, |session| session.read(key)) {
                Read::Data(chunk) => {
                    let expected = body(exchange, end.other(), received, chunk.len());
                    assert!(chunk == expected, "the body has changed");
                    self.half(exchange, end).received += chunk.len();
                    if pace.delay > 0 {
                        self.timer(pace.delay, Task(exchange, end, Job::Read));
                        return;
                    }
                }
                Read::End(trailers) => {
                    self.read_ended(exchange, end, ReadEnded::Complete(trailers));
                    return;
                }
                Read::Reset(reason) => {
                    self.read_ended(exchange, end, ReadEnded::Reset(reason));
                    return;
                }
                Read::Pending => {
                    self.half(exchange, end).reader_waits = true;
                    return;
                }
            }
        }
    }

    fn read_ended(&mut self, exchange: usize, end: End, ended: ReadEnded) {
        self.half(exchange, end).read_ended = Some(ended);
        if end == End::Acceptor && self.scene.exchanges[exchange].answer_waits_for_request {
            self.runnable.push_back(Task(exchange, end, Job::Write));
        }
    }

    fn write(&mut self, exchange: usize, end: End, key: Key) {
        let script = &self.scene.exchanges[exchange];
        let (body_script, interims, answer_delay) = match end {
            End::Opener => (script.request.clone(), 0, 0),
            End::Acceptor => (
                Some(script.response.clone()),
                script.interims,
                script.answer_delay,
            ),
        };
        let Some(body_script) = body_script else {
            return;
        };
        if self.half(exchange, end).wrote.is_some() {
            return;
        }
        let now = self.now;
        loop {
            if let Some(reason) = self.act(end, |session| session.stopped(key)) {
                self.wrote(exchange, end, Wrote::Stopped(reason));
                return;
            }
            let half = self.half(exchange, end);
            let piece = half.piece;
            // First the service, then the source, takes its time.
            let delay = if end == End::Acceptor && !half.answered {
                answer_delay
            } else {
                body_script.pieces.get(piece).map_or(0, |(_, delay)| *delay)
            };
            match half.piece_is_due {
                None if delay > 0 => {
                    half.piece_is_due = Some(now + ms(delay));
                    half.writer_waits = true;
                    self.timer(delay, Task(exchange, end, Job::Write));
                    for _ in 0..interims {
                        let early = answer_head(exchange, 103);
                        self.act(end, |session| session.interim(key, early));
                    }
                    return;
                }
                Some(due) if now < due => {
                    half.writer_waits = true;
                    return;
                }
                _ => {}
            }
            if end == End::Acceptor && !half.answered {
                half.answered = true;
                half.piece_is_due = None;
                let head = answer_head(exchange, 200);
                self.act(end, |session| session.answer(key, head));
                continue;
            }
            let Some((size, _)) = body_script.pieces.get(piece).copied() else {
                self.end(exchange, end, key, body_script.ending);
                return;
            };
            match self.act(end, |session| session.capacity(key)) {
                Err(reason) => {
                    self.wrote(exchange, end, Wrote::Stopped(reason));
                    return;
                }
                Ok(0) => {
                    self.half(exchange, end).writer_waits = true;
                    return;
                }
                Ok(_) => {
                    let half = self.half(exchange, end);
                    half.piece += 1;
                    half.piece_is_due = None;
                    let chunk = body(exchange, end, half.sent, size);
                    half.sent += size;
                    let sent = self.act(end, |session| session.send(key, chunk));
                    assert_eq!(sent, Ok(()), "there was capacity");
                }
            }
        }
    }

    fn end(&mut self, exchange: usize, end: End, key: Key, ending: Ending) {
        match ending {
            Ending::Finish => self.act(end, |session| session.finish(key, None)),
            Ending::Trailers => self.act(end, |session| {
                session.finish(key, Some(trailers(exchange, end)));
            }),
            Ending::Fail => self.act(end, |session| session.fail(key, Reason::UpstreamError)),
            Ending::Abort => self.act(end, |session| session.abort(key, Reason::UpstreamTimeout)),
            Ending::Leave => self.leave(exchange, end, key),
        }
        self.wrote(exchange, end, Wrote::All(ending));
    }

    fn wrote(&mut self, exchange: usize, end: End, wrote: Wrote) {
        let now = self.now;
        let half = self.half(exchange, end);
        half.wrote = Some(wrote);
        half.wrote_at = now;
    }

    /// When all is over: what came is what was sent, and whatever is missing has its reason.
    fn check(mut self) {
        for end in [End::Opener, End::Acceptor] {
            if self.silent {
                self.ends[end as usize].session.close();
            }
            let session = &self.ends[end as usize].session;
            assert_eq!(session.len(), 0, "exchanges are left");
            assert_eq!(session.promised_bytes(), 0, "promises are left");
            session.assert_consistent();
        }
        for (exchange, halves) in self.halves.iter().enumerate() {
            for reader in [End::Opener, End::Acceptor] {
                self.check_direction(exchange, &halves[reader as usize], reader, halves);
            }
            let [ours, theirs] = halves;
            if let Some(error) = self.refused[exchange] {
                assert!(theirs.key.is_none());
                assert!(
                    match error {
                        OpenError::Overloaded => self.is_tight(),
                        OpenError::Draining => self.scene.drain.is_some(),
                        OpenError::TunnelLost => self.lost,
                    },
                    "{error}"
                );
                continue;
            }
            if !self.is_disturbed(exchange) {
                assert!(ours.key.is_some() && theirs.key.is_some());
                for half in halves {
                    assert!(
                        matches!(half.wrote, Some(Wrote::All(_) | Wrote::Nothing)),
                        "stopped without a reason: {half:?}"
                    );
                    assert!(
                        matches!(half.read_ended, Some(ReadEnded::Complete(_))),
                        "incomplete without a reason: {half:?}"
                    );
                }
            }
        }
    }

    fn is_tight(&self) -> bool {
        self.scene.max_exchanges < 100 || self.scene.budgets.iter().any(|limit| *limit != PLENTY)
    }

    /// Whether there is any reason for an exchange not to be carried out in full.
    fn is_disturbed(&self, exchange: usize) -> bool {
        let script = &self.scene.exchanges[exchange];
        let complete = |ending| matches!(ending, Ending::Finish | Ending::Trailers);
        self.lost
            || self.is_tight()
            || self.scene.drain.is_some()
            || !complete(script.response.ending)
            || !script
                .request
                .as_ref()
                .is_none_or(|body| complete(body.ending))
            || self.halves[exchange]
                .iter()
                .any(|half| half.left || half.read_ended == Some(ReadEnded::GaveUp))
    }

    fn check_direction(&self, exchange: usize, half: &Half, reader: End, halves: &[Half; 2]) {
        let sender = &halves[reader.other() as usize];
        // An exchange that never arrived there has sent nothing back.
        let finished = match sender.wrote {
            Some(Wrote::Nothing) => Some(None),
            Some(Wrote::All(Ending::Finish)) => Some(None),
            Some(Wrote::All(Ending::Trailers)) => Some(Some(trailers(exchange, reader.other()))),
            _ => None,
        };
        assert!(half.received <= sender.sent);
        match &half.read_ended {
            None => assert!(half.key.is_none() || half.left, "never read to its end"),
            Some(ReadEnded::GaveUp) => {}
            Some(ReadEnded::Complete(trailers)) => {
                assert_eq!(half.received, sender.sent, "complete, but not all of it");
                let tight = self.is_tight() && trailers.is_none() && finished.is_some();
                assert!(finished.as_ref() == Some(trailers) || tight);
            }
            Some(ReadEnded::Reset(reason)) => {
                let broke = |half: &Half, reason| match half.wrote {
                    Some(Wrote::All(Ending::Fail)) => reason == Reason::UpstreamError,
                    Some(Wrote::All(Ending::Abort)) => reason == Reason::UpstreamTimeout,
                    _ => false,
                };
                let gone = |half: &Half| half.left || half.read_ended == Some(ReadEnded::GaveUp);
                let broke_itself =
                    broke(half, Reason::UpstreamError) || broke(half, Reason::UpstreamTimeout);
                let explained = match reason {
                    Reason::TunnelLost => self.lost,
                    Reason::Overloaded => self.is_tight(),
                    Reason::Draining => self.scene.drain.is_some() && reader == End::Opener,
                    Reason::Cancelled => gone(sender) || broke_itself || self.is_tight(),
                    // Aborted here before it went out, the other end never heard of it.
                    reason if sender.key.is_none() => broke(half, *reason),
                    reason => broke(sender, *reason),
                };
                assert!(explained, "{reason}: {half:?} from {sender:?}");
                let failed = sender.wrote == Some(Wrote::All(Ending::Fail));
                if failed && *reason == Reason::UpstreamError && !broke_itself && !gone(sender) {
                    assert_eq!(half.received, sender.sent, "what was sent before is lost");
                }
            }
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("now", &self.now)
            .field("halves", &self.halves)
            .finish_non_exhaustive()
    }
}

// --- What the scenes are made of ------------------------------------------------------------

fn body_script() -> impl Strategy<Value = Body> {
    let size = prop_oneof![1usize..100, 1usize..20_000, Just(60_000usize)];
    let delay = prop_oneof![4 => Just(0u64), 1 => 1u64..100];
    let ending = prop_oneof![
        8 => Just(Ending::Finish),
        4 => Just(Ending::Trailers),
        1 => Just(Ending::Fail),
        1 => Just(Ending::Abort),
        1 => Just(Ending::Leave),
    ];
    (proptest::collection::vec((size, delay), 0..12), ending)
        .prop_map(|(pieces, ending)| Body { pieces, ending })
}

fn pace() -> impl Strategy<Value = Pace> {
    let delay = prop_oneof![3 => Just(0u64), 1 => 1u64..200];
    let stops = prop_oneof![9 => Just(None), 1 => (0usize..100_000).prop_map(Some)];
    (delay, stops).prop_map(|(delay, stops_after)| Pace { delay, stops_after })
}

fn script() -> impl Strategy<Value = Script> {
    let leaves = || prop_oneof![9 => Just(None), 1 => (0u64..1000).prop_map(Some)];
    (
        (0u64..500, proptest::option::of(body_script()), pace()),
        (0usize..3, prop_oneof![Just(0u64), 1u64..300], any::<bool>()),
        (body_script(), pace()),
        (leaves(), leaves()),
    )
        .prop_map(
            |(
                (start, request, request_reader),
                (interims, answer_delay, answer_waits_for_request),
                (response, response_reader),
                (opener_leaves, acceptor_leaves),
            )| Script {
                start,
                request,
                request_reader,
                interims,
                answer_delay,
                answer_waits_for_request,
                response,
                response_reader,
                opener_leaves,
                acceptor_leaves,
            },
        )
}

fn scene() -> impl Strategy<Value = Scene> {
    let end = || prop_oneof![Just(End::Opener), Just(End::Acceptor)];
    let limit =
        || prop_oneof![4 => Just(PLENTY), 1 => Just(150_000usize), 1 => Just(2_000_000usize)];
    (
        proptest::collection::vec(script(), 1..8),
        prop_oneof![Just(0u64), 1u64..100],
        prop_oneof![Just(None), Just(Some(50u64)), Just(Some(2000))],
        [limit(), limit()],
        prop_oneof![4 => Just(1024u32), 1 => 1u32..4],
        prop_oneof![9 => Just(None), 1 => (end(), 0u64..800).prop_map(Some)],
        prop_oneof![
            8 => Just(None),
            1 => (0u64..2000).prop_map(|at| Some((Loss::Known, at))),
            1 => (0u64..2000).prop_map(|at| Some((Loss::Silent, at))),
        ],
    )
        .prop_map(
            |(exchanges, latency, bandwidth, budgets, max_exchanges, drain, loss)| Scene {
                exchanges,
                latency,
                bandwidth,
                budgets,
                max_exchanges,
                drain,
                loss,
            },
        )
}

proptest! {
    #![proptest_config(proptest_config())]

    #[test]
    fn bodies_arrive_whole_or_end_with_a_reason_and_nobody_waits_for_ever(scene in scene()) {
        World::new(scene).run().check();
    }
}

fn simple(request: Option<Body>, response: Body) -> Script {
    let pace = Pace {
        delay: 0,
        stops_after: None,
    };
    Script {
        start: 0,
        request,
        request_reader: pace.clone(),
        interims: 0,
        answer_delay: 0,
        answer_waits_for_request: false,
        response,
        response_reader: pace,
        opener_leaves: None,
        acceptor_leaves: None,
    }
}

fn finish(pieces: Vec<(usize, u64)>) -> Body {
    Body {
        pieces,
        ending: Ending::Finish,
    }
}

fn calm(exchanges: Vec<Script>) -> Scene {
    Scene {
        exchanges,
        latency: 40,
        bandwidth: None,
        budgets: [PLENTY; 2],
        max_exchanges: 1024,
        drain: None,
        loss: None,
    }
}

#[test]
fn a_visitor_who_leaves_is_noticed_one_latency_later() {
    // The service would take a minute for its answer.
    let mut script = simple(None, finish(vec![(1000, 0)]));
    script.answer_delay = 60_000;
    script.opener_leaves = Some(100);
    let world = World::new(calm(vec![script])).run();
    let theirs = &world.halves[0][1];
    assert_eq!(theirs.wrote, Some(Wrote::Stopped(Reason::Cancelled)));
    assert_eq!(theirs.wrote_at, ms(140));
    world.check();
}

#[test]
fn a_silent_loss_is_found_by_heartbeats() {
    let mut scene = calm(vec![simple(None, finish(vec![(1000, 10_000); 100]))]);
    scene.loss = Some((Loss::Silent, 5000));
    let world = World::new(scene).run();
    assert!(
        world.now >= ms(30_000) && world.now <= ms(45_000),
        "{:?}",
        world.now
    );
    world.check();
}

#[test]
fn a_hundred_exchanges_share_a_slow_stream() {
    let script = |number: u64| {
        let mut script = simple(
            Some(finish(vec![(5000, 0); 4])),
            finish(vec![(10_000, 0); 4]),
        );
        script.start = number % 7;
        script
    };
    let mut scene = calm((0..100).map(script).collect());
    scene.bandwidth = Some(1000);
    World::new(scene).run().check();
}
