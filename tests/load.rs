//! Many at once: agents that vanish together, requests that queue by the thousand, visitors who
//! leave at any byte.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and tells what it measured"
)]

mod common;

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream as BlockingStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{PATIENCE, Process, Server, eventually, get, pause, port_range};
use silo_proxy::agent::Agent;
use silo_proxy::config::AgentConfig;
use silo_proxy::net::raise_descriptor_limit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

#[test]
fn fifty_agents_vanish_at_once() {
    agents_vanish(50);
}

#[test]
#[ignore = "needs 4,000 file descriptors"]
fn a_thousand_agents_vanish_at_once() {
    agents_vanish(1_000);
}

#[test]
fn three_hundred_requests_wait_for_one_agent() {
    requests_wait(300);
}

#[test]
#[ignore = "needs 11,000 file descriptors"]
fn ten_thousand_requests_wait_for_one_agent() {
    requests_wait(10_000);
}

/// One process with `count` agents is killed while each has a request in flight.
fn agents_vanish(count: u16) {
    let _alone = alone();
    let aftermath = kill_agents(count);
    eprintln!("{count} agents vanished: {aftermath:?}");
    assert!(aftermath.is_in_time(), "too late: {aftermath:?}");
}

/// How long things took after the agents' process was gone.
#[derive(Debug)]
struct Aftermath {
    /// Until the last visitor had his answer.
    answered: Duration,
    /// Until the last port was closed.
    closed: Duration,
    /// Answers to GET /agents meanwhile.
    median_poll: Duration,
    slowest_poll: Duration,
}

impl Aftermath {
    fn is_in_time(&self) -> bool {
        // What is asked for is 1 s, 2 s and 50 ms. If nothing is optimized, a thousand sessions'
        // ends are nearly a second of work for a core, and a poll that nothing holds up may still
        // wait for its turns on cores that this test keeps busy.
        let factor = if cfg!(debug_assertions) { 3 } else { 1 };
        self.answered < Duration::from_secs(1) * factor
            && self.closed < Duration::from_secs(2) * factor
            && self.median_poll < Duration::from_millis(50) * factor
            && self.slowest_poll < Duration::from_millis(250) * factor
    }
}

fn kill_agents(count: u16) -> Aftermath {
    raise_descriptor_limit().unwrap();
    let taken = Arc::new(AtomicUsize::new(0));
    let service = silent_service(taken.clone());
    // Some ports more, should others of the range be taken.
    let server = Server::with(port_range(count + 20), &[]);
    let mut swarm = start_swarm(&server, service, count);
    let all = Duration::from_secs(60);
    eventually(all, "all are registered", || {
        server.metric("silo_tunnels_open", "") == f64::from(count)
    });
    let agents = || server.agents().len();
    eventually(PATIENCE, "all are listed", || {
        agents() == usize::from(count)
    });
    let ports: Vec<u16> = server.agents().into_iter().map(|(_, port)| port).collect();

    let visitors = visit_all(&ports);
    eventually(all, "each has a request at the service", || {
        taken.load(Ordering::Relaxed) == usize::from(count)
    });
    let polls = Polls::start(server.admin);
    polls.wait_for(5);

    swarm.kill();
    let vanished = Instant::now();
    let mut answered = Duration::ZERO;
    for (status, error, at) in visitors.join().unwrap() {
        assert_eq!((status, error.as_str()), (502, "tunnel_lost"));
        answered = answered.max(at.saturating_duration_since(vanished));
    }
    // A port is closed when nobody accepts there any more.
    for port in ports {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        eventually(PATIENCE, "its port is closed", || {
            BlockingStream::connect(address).is_err()
        });
    }
    let closed = vanished.elapsed();
    let polls = polls.stop();

    eventually(PATIENCE, "none is listed", || agents() == 0);
    at_rest(&server);
    let agent = server.agent("successor", common::text_service("hello"));
    assert_eq!(get(agent.address(), "/").text(), "hello");
    Aftermath {
        answered,
        closed,
        median_poll: polls[polls.len() / 2],
        slowest_poll: polls[polls.len() - 1],
    }
}

/// `count` requests are under way before the service answers the first of them.
fn requests_wait(count: usize) {
    let _alone = alone();
    raise_descriptor_limit().unwrap();
    let (open, gate) = watch::channel(false);
    let service = echo_service(gate);
    let server = Server::start();
    let agent = server.agent("busy", service);
    let address = agent.address();

    let visitors = in_background(async move {
        let mut visitors = JoinSet::new();
        for number in 0..count {
            visitors.spawn(async move {
                // Of different sizes, so that no two answers look alike to a reader that lost
                // its place.
                let body = format!("token {number};").repeat(1 + number % 40);
                let request = format!(
                    "POST /{number} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                let mut connection = Connection::open(address).await;
                connection.send(request.as_bytes()).await.unwrap();
                let answer = connection.answer().await.unwrap();
                assert_eq!(answer.status, 200, "{number}: {}", answer.text());
                assert_eq!(answer.header("x-target"), [format!("/{number}")]);
                assert_eq!(answer.text(), body);
            });
        }
        visitors.join_all().await;
    });
    let started = Instant::now();
    eventually(Duration::from_secs(60), "all are under way", || {
        server.metric("silo_exchanges_open", "") == count as f64 || visitors.is_finished()
    });
    let queued = started.elapsed();
    open.send_replace(true);
    let outcome = visitors.join();
    assert_eq!(server.metric("silo_connections_refused_total", ""), 0.0);
    outcome.unwrap();
    eprintln!(
        "{count} requests queued within {queued:?}, all answered {:?} later",
        started.elapsed() - queued
    );
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
    at_rest(&server);
}

#[test]
fn visitors_may_leave_at_any_byte() {
    const VISITS: usize = 3_000;
    const AT_ONCE: usize = 64;
    let _alone = alone();
    let (_open, gate) = watch::channel(true);
    let service = echo_service(gate);
    let server = Server::start();
    let agent = server.agent("patient", service);
    let address = agent.address();

    let visits = in_background(async move {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let mut visits = JoinSet::new();
        for number in 0..VISITS {
            let turn = turns.clone().acquire_owned().await.unwrap();
            visits.spawn(async move {
                let outcome = tokio::time::timeout(PATIENCE, visit(address, number)).await;
                outcome.unwrap_or_else(|_| panic!("visit {number} hangs"));
                drop(turn);
            });
            // A failure shows at once.
            while let Some(done) = visits.try_join_next() {
                done.unwrap();
            }
        }
        visits.join_all().await;
    });
    visits.join().unwrap();
    at_rest(&server);
    assert_eq!(server.metric("silo_panics_total", ""), 0.0);

    let answer = common::request(address, "POST", "/after", &[], b"still here");
    assert_eq!((answer.status, answer.text().as_str()), (200, "still here"));
    assert_eq!(
        agent.process.count(&["disconnected"]),
        0,
        "the tunnel stayed up"
    );
}

/// One visit: a request or two on a connection that ends wherever chance wants.
async fn visit(address: SocketAddr, number: usize) {
    let mut chance = Chance(number as u64);
    let mut requests = Vec::new();
    let mut expected = Vec::new();
    for part in 0..1 + chance.below(2) {
        let target = format!("/{number}/{part}");
        let body = target.repeat(chance.below(3) * chance.below(1_500));
        let framed = match (body.is_empty(), chance.below(2)) {
            (true, _) => String::from("\r\n"),
            (_, 0) => format!("Content-Length: {}\r\n\r\n{body}", body.len()),
            _ => {
                let (one, two) = body.split_at(chance.below(body.len() - 1) + 1);
                let mut chunks = String::from("Transfer-Encoding: chunked\r\n\r\n");
                for chunk in [one, two].into_iter().filter(|chunk| !chunk.is_empty()) {
                    chunks += &format!("{:x}\r\n{chunk}\r\n", chunk.len());
                }
                chunks + "0\r\n\r\n"
            }
        };
        let method = if body.is_empty() { "GET" } else { "POST" };
        let request = format!("{method} {target} HTTP/1.1\r\nHost: a\r\n{framed}");
        requests.extend_from_slice(request.as_bytes());
        expected.push((target, body));
    }

    let mut connection = Connection::open(address).await;
    let fate = chance.below(4);
    if fate == 0 {
        // Stays to the end; among those who leave he must get what he asked for.
        connection.send(&requests).await.unwrap();
        for (target, body) in expected {
            let answer = connection.answer().await.unwrap();
            assert_eq!(answer.status, 200, "{target}: {}", answer.text());
            assert_eq!(answer.header("x-target"), [target]);
            assert_eq!(answer.text(), body);
        }
        return;
    }
    let sent = match fate {
        1 => requests.len(),
        _ => chance.below(requests.len() + 1),
    };
    let (early, late) = requests[..sent].split_at(chance.below(sent + 1));
    for part in [early, late] {
        connection.send(part).await.unwrap();
        if chance.below(2) == 0 {
            let moment = chance.below(8) as u64;
            tokio::time::sleep(Duration::from_millis(moment)).await;
        }
    }
    if fate == 1 {
        let size: usize = expected.iter().map(|(_, body)| body.len() + 100).sum();
        let mut some = vec![0; chance.below(size) + 1];
        let some = connection.stream.read(&mut some);
        let _ = tokio::time::timeout(Duration::from_millis(20), some).await;
    }
    if chance.below(2) == 0 {
        connection.stream.set_zero_linger().unwrap();
    }
}

/// Waits until nothing is under way on the server any more.
fn at_rest(server: &Server) {
    for level in ["silo_exchanges_open", "silo_connections_open"] {
        eventually(PATIENCE, &format!("{level} is back to 0"), || {
            server.metric(level, "") == 0.0
        });
    }
}

// The agents of one process.

/// How the process is told what to do.
const SWARM_SERVER: &str = "SILO_TEST_SWARM_SERVER";
const SWARM_SERVICE: &str = "SILO_TEST_SWARM_SERVICE";
const SWARM_COUNT: &str = "SILO_TEST_SWARM_COUNT";

/// Starts `count` agents for one service in a process of their own: this test binary's, since the
/// program's `swarm` brings a service that answers too soon.
fn start_swarm(server: &Server, service: SocketAddr, count: u16) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "swarm_process", "--ignored", "--nocapture"]);
    let environment = [
        (SWARM_SERVER, &*server.tunnel.to_string()),
        (SWARM_SERVICE, &*format!("http://{service}")),
        (SWARM_COUNT, &*count.to_string()),
    ];
    Process::start_command("swarm", &mut command, &environment)
}

#[test]
#[ignore = "not a test of its own: the agents of others, in a process that can be killed"]
fn swarm_process() {
    let order = |name| Some(std::env::var_os(name)?.into_string().unwrap());
    let (Some(server), Some(service), Some(count)) = (
        order(SWARM_SERVER),
        order(SWARM_SERVICE),
        order(SWARM_COUNT),
    ) else {
        return;
    };
    raise_descriptor_limit().unwrap();
    let config = AgentConfig::new(
        server.parse().unwrap(),
        "agent".parse().unwrap(),
        service.parse().unwrap(),
    );
    let template = Agent::new(config).unwrap();
    let agents = async {
        let mut agents = JoinSet::new();
        for number in 0..count.parse::<u16>().unwrap() {
            let id = format!("agent-{number:04}").parse().unwrap();
            let agent = template.with_id(id).unwrap();
            agents.spawn(agent.run(std::future::pending()));
        }
        // Whoever started this process kills it; should he be gone, it ends by itself.
        let _ = tokio::time::timeout(Duration::from_secs(170), agents.join_all()).await;
    };
    runtime().block_on(agents);
}

// Services and visitors.

/// Takes requests, counts them, and never answers.
fn silent_service(taken: Arc<AtomicUsize>) -> SocketAddr {
    service(move |mut connection| {
        let taken = taken.clone();
        async move {
            while connection.head().await.is_ok() {
                taken.fetch_add(1, Ordering::Relaxed);
            }
        }
    })
}

/// Answers with the request's body once the gate is open.
fn echo_service(gate: watch::Receiver<bool>) -> SocketAddr {
    service(move |mut connection| {
        let mut gate = gate.clone();
        async move {
            while let Ok((target, body)) = connection.request().await {
                let _ = gate.wait_for(|open| *open).await;
                let mut answer = format!(
                    "HTTP/1.1 200 OK\r\nX-Target: {target}\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                )
                .into_bytes();
                answer.extend_from_slice(&body);
                if connection.send(&answer).await.is_err() {
                    return;
                }
            }
        }
    })
}

/// A service on a thread of its own.
fn service<F>(serve: impl Fn(Connection) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (give_address, address) = std::sync::mpsc::sync_channel(1);
    in_background(async move {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(4096).unwrap();
        give_address.send(listener.local_addr().unwrap()).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(Connection::new(stream)));
        }
    });
    address.recv().unwrap()
}

/// One request to each port: status, `X-Silo-Error` and when the answer was complete.
fn visit_all(ports: &[u16]) -> JoinHandle<Vec<(u16, String, Instant)>> {
    let ports = ports.to_vec();
    in_background(async move {
        let mut visitors = JoinSet::new();
        for port in ports {
            visitors.spawn(async move {
                let mut connection = Connection::open((Ipv4Addr::LOCALHOST, port).into()).await;
                connection
                    .send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                    .await
                    .unwrap();
                let answer = connection.answer().await.unwrap();
                (
                    answer.status,
                    answer.header("x-silo-error").concat(),
                    Instant::now(),
                )
            });
        }
        visitors.join_all().await
    })
}

/// An HTTP/1.1 connection, seen from either end.
struct Connection {
    stream: TcpStream,
    /// What has been read and not been used yet.
    buffer: Vec<u8>,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    async fn open(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).await.unwrap())
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The next bytes up to and including `end`.
    async fn through(&mut self, end: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self
                .buffer
                .windows(end.len())
                .position(|window| window == end)
            {
                return Ok(self.buffer.drain(..at + end.len()).collect());
            }
            self.fill().await?;
        }
    }

    async fn exactly(&mut self, size: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < size {
            self.fill().await?;
        }
        Ok(self.buffer.drain(..size).collect())
    }

    async fn head(&mut self) -> io::Result<String> {
        let head = self.through(b"\r\n\r\n").await?;
        String::from_utf8(head).map_err(io::Error::other)
    }

    /// The next request's target and body.
    async fn request(&mut self) -> io::Result<(String, Vec<u8>)> {
        let head = self.head().await?;
        let target = head.split(' ').nth(1).unwrap().to_owned();
        let headers: BTreeMap<String, &str> = head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value))
            .collect();
        if headers.contains_key("transfer-encoding") {
            return Ok((target, self.chunks().await?));
        }
        let length = headers.get("content-length").map_or("0", |length| length);
        let body = self.exactly(length.parse().unwrap()).await?;
        Ok((target, body))
    }

    async fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.through(b"\r\n").await?;
            let digits = std::str::from_utf8(&line).unwrap().trim();
            let size = usize::from_str_radix(digits, 16).unwrap();
            let mut chunk = self.exactly(size + 2).await?;
            chunk.truncate(size);
            if chunk.is_empty() {
                return Ok(body);
            }
            body.append(&mut chunk);
        }
    }

    async fn answer(&mut self) -> io::Result<common::Answer> {
        loop {
            let mut rest = &self.buffer[..];
            match common::try_read_answer(&mut rest, false) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                outcome => {
                    let used = self.buffer.len() - rest.len();
                    self.buffer.drain(..used);
                    return outcome;
                }
            }
            self.fill().await?;
        }
    }
}

/// Polls `GET /agents` until it is stopped, and notes how long each answer took.
struct Polls {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<Duration>>,
}

impl Polls {
    fn start(admin: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicUsize::new(0));
        let (stopped, counted) = (stop.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            let mut writer = common::connect(admin);
            let mut reader = BufReader::new(writer.try_clone().unwrap());
            let mut taken = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                writer
                    .write_all(b"GET /agents HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    .unwrap();
                let answer = common::read_answer(&mut reader, false);
                taken.push(asked.elapsed());
                assert_eq!(answer.status, 200);
                counted.store(taken.len(), Ordering::Relaxed);
                // Often, but not so that polling is the load.
                (0..5).for_each(|_| pause());
            }
            taken.sort();
            taken
        });
        Self {
            stop,
            count,
            thread,
        }
    }

    fn wait_for(&self, count: usize) {
        eventually(PATIENCE, "GET /agents is answered", || {
            self.count.load(Ordering::Relaxed) >= count
        });
    }

    /// How long the polls took, the slowest last.
    fn stop(self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Held by each test: they would only make each other late.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    // One that failed is no reason for the others to.
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a future on a thread of its own.
fn in_background<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || runtime().block_on(future))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Numbers that look random and are the same in every run (SplitMix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `limit`; 0 if that is 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}
