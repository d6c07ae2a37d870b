//! What the accept task does when the process runs out of file descriptors. The limit is the
//! process's, so this test has a binary of its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use silo_proxy::net::acceptor::{Accepted, Acceptor, AcceptorHandle, Command, Listener, Sink};
use silo_proxy::net::{bind_failure, listen, raise_descriptor_limit};
use silo_proxy::ports::BindFailure;
use socket2::{Domain, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing_subscriber::fmt::MakeWriter;

const PATIENCE: Duration = Duration::from_secs(20);
const VISITORS: usize = 8;

struct TestSink {
    commands: Arc<Mutex<VecDeque<Command>>>,
    opened: mpsc::Sender<io::Result<()>>,
    accepted: mpsc::Sender<(Listener, Vec<Accepted>)>,
}

impl Sink for TestSink {
    fn next_command(&mut self) -> Option<Command> {
        self.commands.lock().unwrap().pop_front()
    }

    fn opened(&mut self, _port: u16, _key: u64, outcome: io::Result<()>) {
        self.opened.try_send(outcome).unwrap();
    }

    fn accepted(&mut self, listener: Listener, batch: Vec<Accepted>) {
        self.accepted.try_send((listener, batch)).unwrap();
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn count(&self, level: &str) -> usize {
        let bytes = self.0.lock().unwrap();
        String::from_utf8_lossy(&bytes)
            .lines()
            .filter(|line| line.contains(level))
            .count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// CPU time of this process, read from a file that is open already.
fn cpu_time(stat: &mut File) -> Duration {
    let mut text = String::new();
    stat.rewind().unwrap();
    stat.read_to_string(&mut text).unwrap();
    // Fields 14 and 15 of proc_pid_stat(5), counted after the name, in ticks of 10 ms.
    let (_, fields) = text.rsplit_once(") ").unwrap();
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    Duration::from_millis(ticks * 10)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn exhausted(handle: &AcceptorHandle) -> u64 {
    handle.stats().exhausted.load(Ordering::Relaxed)
}

#[tokio::test]
async fn without_descriptors_it_idles_keeps_serving_commands_and_resumes_by_itself() {
    let log = Log::default();
    tracing_subscriber::fmt()
        .with_writer(log.clone())
        .with_ansi(false)
        .init();

    let commands = Arc::new(Mutex::new(VecDeque::new()));
    let (opened_tx, mut opened) = mpsc::channel(16);
    let (accepted_tx, mut accepted) = mpsc::channel(1_024);
    let sink = TestSink {
        commands: Arc::clone(&commands),
        opened: opened_tx,
        accepted: accepted_tx,
    };
    let (mut acceptor, handle) = Acceptor::new(Ipv4Addr::LOCALHOST.into(), sink).unwrap();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for id in 0..2 {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        addresses.push(listener.local_addr().unwrap());
        acceptor.adopt(listener, id).unwrap();
    }
    let task = tokio::spawn(acceptor.run());
    let command = |command| {
        commands.lock().unwrap().push_back(command);
        handle.wake();
    };
    // One whole round of a command and its answer: the acceptor runs.
    command(Command::Bind { port: 0, key: 0 });
    opened.recv().await.unwrap().unwrap_err();

    // What the visitors need is opened beforehand, and a port to fail on is looked up.
    let mut stat = File::open("/proc/self/stat").unwrap();
    let visitors: Vec<Socket> = (0..VISITORS)
        .map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap())
        .collect();
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    raise_descriptor_limit().unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    let low = Rlimit {
        current: Some(64),
        maximum,
    };
    setrlimit(Resource::Nofile, low).unwrap();
    let hogs: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(!hogs.is_empty());

    for (visitor, address) in visitors.iter().zip(addresses.iter().cycle()) {
        visitor.connect(&(*address).into()).unwrap();
    }
    until("accepting is paused", || {
        handle.stats().paused.load(Ordering::Relaxed)
    })
    .await;

    // Pauses of 100, 200, 400 and 800 ms: five attempts take 1.5 s, and next to no CPU.
    let (cpu, start) = (cpu_time(&mut stat), Instant::now());
    let tries = exhausted(&handle);
    until("five attempts", || exhausted(&handle) >= tries + 4).await;
    assert!(start.elapsed() >= Duration::from_secs(1));
    let spent = cpu_time(&mut stat) - cpu;
    assert!(spent < start.elapsed() / 5, "{spent:?} of CPU time");

    // Commands are served, and one that needs a descriptor says what is missing.
    command(Command::Bind { port, key: 1 });
    let error = opened.recv().await.unwrap().unwrap_err();
    assert_eq!(bind_failure(&error), BindFailure::Descriptors);
    assert!(accepted.try_recv().is_err());

    drop(hogs);
    let mut served = 0;
    while served < VISITORS {
        let (_, batch) = timeout(PATIENCE, accepted.recv()).await.unwrap().unwrap();
        served += batch.len();
    }
    command(Command::Bind { port: 0, key: 0 });
    opened.recv().await.unwrap().unwrap_err();
    assert!(!handle.stats().paused.load(Ordering::Relaxed));

    until("it is logged that the shortage is over", || {
        log.count("INFO") == 1
    })
    .await;
    assert_eq!(log.count("WARN"), 1);
    handle.shutdown();
    timeout(PATIENCE, task).await.unwrap().unwrap().unwrap();
}
