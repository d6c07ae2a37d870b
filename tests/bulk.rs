//! Much at once: large bodies both ways, and peers who stop taking them.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and tells what it measured"
)]

mod common;

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{Agent, PATIENCE, Process, Server, bytes_in_sockets, eventually, get, read_head};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// What server and agent may each grow by while they carry a body, however large.
const GROWTH: u64 = 16 * MIB;

/// What they may each grow by for a visitor or a service that stopped reading.
const GROWTH_STALLED: u64 = 4 * MIB;

/// What may wait in server and agent together for a service that stopped reading.
const HELD: u64 = 4 * MIB;

/// How long nothing may move until we say that it stands still.
const STANDSTILL: Duration = Duration::from_millis(500);

#[test]
fn a_body_of_64_mib_costs_no_memory() {
    both_ways(64 * MIB);
}

#[test]
#[ignore = "takes a minute or two"]
fn a_body_of_a_gibibyte_costs_no_memory() {
    both_ways(GIB);
}

#[test]
fn a_visitor_who_stops_reading_stops_only_himself() {
    stalled_visitor(64 * MIB, Duration::from_secs(3));
}

#[test]
#[ignore = "takes two minutes"]
fn a_visitor_who_stops_reading_for_a_minute_stops_only_himself() {
    stalled_visitor(GIB, Duration::from_secs(60));
}

fn both_ways(size: u64) {
    let _alone = alone();
    let (server, agent, bulk) = start();
    let mut visitor = Visitor::open(&agent);

    let before = Memory::of(&server, &agent);
    let ((), took) = timed(|| visitor.download(size));
    let grown = Memory::peak(&server, &agent).since(before);
    eprintln!("{} MiB down in {took:?}: {grown}", size / MIB);
    assert!(grown.within(GROWTH), "grown by {grown}");

    let (answer, took) = timed(|| visitor.upload(size));
    let grown = Memory::peak(&server, &agent).since(before);
    eprintln!("{} MiB up in {took:?}: {grown}", size / MIB);
    assert_eq!(answer, format!("{size} bytes as expected"));
    assert!(grown.within(GROWTH), "grown by {grown}");
    // Nobody else was served meanwhile.
    assert_eq!(bulk.sent.load(Ordering::Relaxed), size);
}

fn stalled_visitor(size: u64, hold: Duration) {
    let _alone = alone();
    let (server, agent, bulk) = start();
    rate(&agent, Duration::from_millis(500));
    let rate_before = rate(&agent, Duration::from_millis(1_500));
    let before = Memory::of(&server, &agent);

    let mut stalled = Visitor::open(&agent);
    stalled.ask(size);
    stalled.read(0, MIB);
    stands_still(|| bulk.sent.load(Ordering::Relaxed));
    let sent = bulk.sent.load(Ordering::Relaxed);
    assert!(
        sent < size,
        "the service could send everything: too little for this test"
    );

    let mut grown = Memory::of(&server, &agent).since(before);
    let mut rates = Vec::new();
    let deadline = Instant::now() + hold;
    while Instant::now() < deadline {
        rates.push(rate(&agent, hold.min(Duration::from_millis(1_500))));
        grown = grown.max(Memory::of(&server, &agent).since(before));
    }
    let rate_during = rates.iter().sum::<f64>() / rates.len() as f64;
    eprintln!(
        "a visitor stopped reading for {hold:?}: others had {rate_before:.0} requests/s before, \
         {rate_during:.0} meanwhile; {grown}"
    );
    assert_eq!(
        bulk.sent.load(Ordering::Relaxed),
        sent,
        "it stood still all the time"
    );
    // How much of the throughput must be left is measured where the machine is quiet; here
    // others' tests may run at the same time.
    assert!(
        rate_during > rate_before / 2.0,
        "{rate_during} of {rate_before} requests/s"
    );
    assert!(grown.within(GROWTH_STALLED), "grown by {grown}");

    stalled.read(MIB, size - MIB);
    stalled.small();
}

#[test]
fn a_service_that_stops_reading_stops_the_upload() {
    const SIZE: u64 = 128 * MIB;
    let _alone = alone();
    let (server, agent, bulk) = start();
    rate(&agent, Duration::from_millis(500));
    let before = Memory::of(&server, &agent);
    bulk.reading.close();

    let mut visitor = Visitor::open(&agent);
    visitor.begin_upload(SIZE);
    let written = visitor.send_until_stalled(SIZE);
    assert!(
        written < SIZE,
        "the service doesn't read, yet everything was taken"
    );
    rate(&agent, Duration::from_millis(500));
    let grown = Memory::of(&server, &agent).since(before);

    // What isn't in any socket of the way from the visitor to the service is in the processes.
    let ports = [
        visitor.stream.local_addr().unwrap().port(),
        server.tunnel.port(),
        bulk.address.port(),
    ];
    let kernel = bytes_in_sockets(&ports);
    let held = written.saturating_sub(kernel);
    eprintln!(
        "a service stopped reading: the visitor's socket took {written} bytes, of which {kernel} \
         are in sockets and {held} in server and agent; {grown}"
    );
    assert!(held < HELD, "server and agent hold {held} bytes");
    assert!(grown.within(GROWTH_STALLED), "grown by {grown}");

    bulk.reading.open();
    visitor.send(written, SIZE);
    assert_eq!(visitor.verdict(), format!("{SIZE} bytes as expected"));
}

#[test]
fn four_downloads_leave_room_for_small_requests() {
    const SIZE: u64 = 24 * MIB;
    let _alone = alone();
    let (_server, agent, _bulk) = start();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let downloads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| Visitor::open(&agent).download(SIZE)))
            .collect();
        let small = scope.spawn(|| {
            let mut visitor = Visitor::open(&agent);
            let mut slowest = Duration::ZERO;
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let ((), took) = timed(|| visitor.small());
                slowest = slowest.max(took);
                count += 1;
            }
            (count, slowest)
        });
        let outcomes: Vec<_> = downloads.into_iter().map(|one| one.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok), "a download failed");
        let (count, slowest) = small.join().unwrap();
        eprintln!("beside four downloads: {count} small requests, the slowest {slowest:?}");
        assert!(count > 10, "only {count} small requests were served");
        assert!(
            slowest < Duration::from_secs(1),
            "a small request took {slowest:?}"
        );
    });
}

fn start() -> (Server, Agent, Bulk) {
    let bulk = Bulk::start();
    let server = Server::start();
    let agent = server.agent("bulk", bulk.address);
    assert_eq!(get(agent.address(), "/small").text(), SMALL);
    (server, agent, bulk)
}

/// Held by each test: what they measure would only measure the others.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    // One that failed is no reason for the others to.
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn timed<T>(action: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = action();
    (result, started.elapsed())
}

/// Waits until a figure has not moved for a while.
fn stands_still(figure: impl Fn() -> u64) {
    let mut last = figure();
    let mut since = Instant::now();
    eventually(PATIENCE, "nothing moves any more", || {
        let now = figure();
        if std::mem::replace(&mut last, now) != now {
            since = Instant::now();
        }
        since.elapsed() > STANDSTILL
    });
}

/// Requests a second on four connections, all of which must succeed.
fn rate(agent: &Agent, duration: Duration) -> f64 {
    let deadline = Instant::now() + duration;
    let visit = || {
        let mut visitor = Visitor::open(agent);
        let mut count = 0;
        while Instant::now() < deadline {
            visitor.small();
            count += 1;
        }
        count
    };
    let count: u32 = std::thread::scope(|scope| {
        let visitors: Vec<_> = (0..4).map(|_| scope.spawn(visit)).collect();
        visitors
            .into_iter()
            .map(|visitor| visitor.join().unwrap())
            .sum()
    });
    f64::from(count) / duration.as_secs_f64()
}

/// Resident bytes of server and agent.
#[derive(Clone, Copy)]
struct Memory {
    server: u64,
    agent: u64,
}

impl Memory {
    fn of(server: &Server, agent: &Agent) -> Self {
        Self::read(server, agent, Process::resident_bytes)
    }

    /// The most there ever were.
    fn peak(server: &Server, agent: &Agent) -> Self {
        Self::read(server, agent, Process::peak_resident_bytes)
    }

    fn read(server: &Server, agent: &Agent, figure: impl Fn(&Process) -> u64) -> Self {
        Self {
            server: figure(&server.process),
            agent: figure(&agent.process),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            server: self.server.saturating_sub(before.server),
            agent: self.agent.saturating_sub(before.agent),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            server: self.server.max(other.server),
            agent: self.agent.max(other.agent),
        }
    }

    fn within(self, limit: u64) -> bool {
        self.server <= limit && self.agent <= limit
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (server, agent) = (self.server / KIB, self.agent / KIB);
        write!(f, "server {server} KiB, agent {agent} KiB")
    }
}

/// The bytes of every large body, over and over: any two places of a body differ, unless they are
/// a multiple of its odd length apart. A loss, a repetition or an exchange of any usual size shows.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..1_048_573).map(|_| next()).collect()
});

/// A piece of the body that begins at `position` and is at most `limit` long.
fn pattern(position: u64, limit: u64) -> &'static [u8] {
    let rest = &PATTERN[(position % PATTERN.len() as u64) as usize..];
    &rest[..rest.len().min(limit.min(64 * KIB) as usize)]
}

/// Whether `bytes` are what a body has at `position`.
fn is_pattern(mut position: u64, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let expected = pattern(position, bytes.len() as u64);
        if bytes[..expected.len()] != *expected {
            return false;
        }
        position += expected.len() as u64;
        bytes = &bytes[expected.len()..];
    }
    true
}

/// Reads `count` bytes of a body, from `position` on, and compares each.
fn check(reader: &mut impl BufRead, mut position: u64, count: u64) -> io::Result<()> {
    let end = position + count;
    while position < end {
        let mut bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Err(io::Error::other(format!("ended after {position} bytes")));
        }
        bytes = &bytes[..bytes.len().min((end - position) as usize)];
        if !is_pattern(position, bytes) {
            return Err(io::Error::other(format!("a wrong byte after {position}")));
        }
        let used = bytes.len();
        position += used as u64;
        reader.consume(used);
    }
    Ok(())
}

fn buffered(stream: &TcpStream) -> BufReader<TcpStream> {
    BufReader::with_capacity(128 * KIB as usize, stream.try_clone().unwrap())
}

const SMALL: &str = "a small answer of thirty-four byte";

/// The service: `GET /small`, `GET /pattern/SIZE`, and `POST /check`, which reads.
struct Bulk {
    address: SocketAddr,
    /// Bytes of large answers that the service could write.
    sent: Arc<AtomicU64>,
    /// Closed while bodies of requests aren't read.
    reading: Arc<Gate>,
}

impl Bulk {
    fn start() -> Self {
        let sent = Arc::new(AtomicU64::new(0));
        let reading = Arc::new(Gate::default());
        let (counter, gate) = (sent.clone(), reading.clone());
        let address = common::service(move |stream| {
            // A connection that breaks is the agent's to explain.
            let _ = serve(&stream, &counter, &gate);
        });
        Self {
            address,
            sent,
            reading,
        }
    }
}

fn serve(mut stream: &TcpStream, sent: &AtomicU64, reading: &Gate) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = buffered(stream);
    loop {
        let head = String::from_utf8(read_head(&mut reader)?).map_err(io::Error::other)?;
        let target = head.split(' ').nth(1).unwrap_or_default();
        if let Some(size) = target.strip_prefix("/pattern/") {
            let size: u64 = size.parse().map_err(io::Error::other)?;
            stream.write_all(answer_head(size).as_bytes())?;
            let mut position = 0;
            while position < size {
                let count = stream.write(pattern(position, size - position))? as u64;
                position += count;
                sent.fetch_add(count, Ordering::Relaxed);
            }
            continue;
        }
        let text = if target == "/check" {
            let length = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .and_then(|(_, length)| length.parse().ok())
                .ok_or(io::ErrorKind::InvalidData)?;
            reading.pass();
            match check(&mut reader, 0, length) {
                Ok(()) => format!("{length} bytes as expected"),
                Err(error) => error.to_string(),
            }
        } else {
            SMALL.to_owned()
        };
        let answer = answer_head(text.len() as u64) + &text;
        stream.write_all(answer.as_bytes())?;
    }
}

fn answer_head(length: u64) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")
}

/// Open at first; whoever passes waits while it is closed.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// A visitor's connection.
struct Visitor {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Visitor {
    fn open(agent: &Agent) -> Self {
        let stream = common::connect(agent.address());
        let reader = buffered(&stream);
        Self { stream, reader }
    }

    fn small(&mut self) {
        self.stream
            .write_all(b"GET /small HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let answer = common::read_answer(&mut self.reader, false);
        assert_eq!((answer.status, answer.text().as_str()), (200, SMALL));
    }

    fn download(&mut self, size: u64) {
        self.ask(size);
        self.read(0, size);
    }

    /// Asks for a body of that size and reads the head of the answer.
    fn ask(&mut self, size: u64) {
        let request = format!("GET /pattern/{size} HTTP/1.1\r\nHost: a\r\n\r\n");
        self.stream.write_all(request.as_bytes()).unwrap();
        let head = common::read_answer(&mut self.reader, true);
        assert_eq!(head.status, 200);
        assert_eq!(head.header("content-length"), [size.to_string()]);
    }

    /// Reads a part of the answer's body.
    fn read(&mut self, position: u64, count: u64) {
        check(&mut self.reader, position, count).unwrap();
    }

    /// Sends a body of that size and returns what the service says of it.
    fn upload(&mut self, size: u64) -> String {
        self.begin_upload(size);
        self.send(0, size);
        self.verdict()
    }

    fn begin_upload(&mut self, size: u64) {
        let request = format!("POST /check HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
        self.stream.write_all(request.as_bytes()).unwrap();
    }

    /// Sends the body from `position` to `end`.
    fn send(&mut self, mut position: u64, end: u64) {
        while position < end {
            let piece = pattern(position, end - position);
            position += self.stream.write(piece).unwrap() as u64;
        }
    }

    /// Sends the body until the socket takes no more, and says how much it took.
    fn send_until_stalled(&mut self, end: u64) -> u64 {
        self.stream.set_write_timeout(Some(STANDSTILL)).unwrap();
        let mut written = 0;
        while written < end {
            match self.stream.write(pattern(written, end - written)) {
                Ok(count) => written += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("after {written} bytes: {error}"),
            }
        }
        self.stream.set_write_timeout(Some(PATIENCE)).unwrap();
        written
    }

    fn verdict(&mut self) -> String {
        common::read_answer(&mut self.reader, false).text()
    }
}
