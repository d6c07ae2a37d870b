//! What a panic takes with it: the exchange, the connection or the session it happens in, and
//! nothing else. Where a whole thread of the server's goes, the server says so.
//!
//! Panics are made by a subscriber of the log that panics at a line the test has chosen: wherever
//! the program says something, it can be made to fail.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and these are to"
)]

mod common;

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{
    HeldService, PATIENCE, connect, eventually, get, port_range, read_answer, text_service,
    try_read_answer,
};
use silo_proxy::agent::{Agent, Event};
use silo_proxy::config::{AgentConfig, HostPort, Scheme, ServerConfig, ServiceUrl};
use silo_proxy::metrics::{Metrics, PANICS};
use silo_proxy::server::Server;
use silo_proxy::telemetry;
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};
use tracing::{Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The texts that a line of the log has, all of them, which is to panic. Once.
static ARMED: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// The lines that tell of panics.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Tripwire;

impl<S: Subscriber> Layer<S> for Tripwire {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        if *event.metadata().level() == Level::ERROR && line.0.contains("panicked") {
            if !line.0.contains("as asked") {
                // A test that fails.
                eprintln!("{}", line.0);
            }
            lock(&TOLD).push(line.0);
            return;
        }
        let mut armed = lock(&ARMED);
        let meant = |parts: &mut Vec<String>| parts.iter().all(|part| line.0.contains(part));
        if armed.take_if(meant).is_some() {
            drop(armed);
            panic!("as asked, at: {}", line.0);
        }
    }
}

/// An event as a text.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the next line panic that contains all of `parts`.
fn arm(parts: &[&str]) {
    *lock(&ARMED) = Some(parts.iter().map(|part| (*part).to_owned()).collect());
}

/// Waits until the panic has happened that the test asked for. Its count and its line are there.
fn wait_for_panic(before: u64) {
    eventually(PATIENCE, "the panic", || PANICS.get() > before);
    assert_eq!(PANICS.get(), before + 1);
    eventually(PATIENCE, "its line", || {
        let told = lock(&TOLD);
        told.iter()
            .any(|line| line.contains("as asked") && line.contains("place=\"tests/panics.rs"))
    });
    lock(&TOLD).clear();
}

/// A server in this process, alone in it.
struct House {
    server: Server,
    agents: Vec<(CancellationToken, JoinHandle<()>)>,
    _turn: MutexGuard<'static, ()>,
}

impl House {
    fn start(workers: usize, change: impl FnOnce(&mut ServerConfig)) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LOG: Once = Once::new();
        let turn = lock(&TURN);
        LOG.call_once(|| {
            tracing_subscriber::registry().with(Tripwire).init();
            telemetry::watch_panics();
        });
        let mut config = ServerConfig::default();
        config.http.port = 0;
        config.grpc.port = 0;
        config.http.agent_host = [127, 0, 0, 1].into();
        config.grpc.host = [127, 0, 0, 1].into();
        config.http.agent_port_range = port_range(10);
        config.server.workers = Some(workers);
        change(&mut config);
        Self {
            server: Server::start(config).unwrap(),
            agents: Vec::new(),
            _turn: turn,
        }
    }

    /// Starts an agent, and waits until visitors can come: says where.
    fn agent(&mut self, id: &str, service: SocketAddr) -> SocketAddr {
        self.agent_with(id, service, |_| {})
    }

    fn agent_with(
        &mut self,
        id: &str,
        service: SocketAddr,
        change: impl FnOnce(&mut AgentConfig),
    ) -> SocketAddr {
        let connected = self.start_agent(id, service, change);
        let port = connected.recv_timeout(PATIENCE).unwrap();
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    /// Starts an agent that tells its port each time it is connected.
    fn start_agent(
        &mut self,
        id: &str,
        service: SocketAddr,
        change: impl FnOnce(&mut AgentConfig),
    ) -> mpsc::Receiver<u16> {
        let host_port = |address: SocketAddr| HostPort {
            host: address.ip().to_string(),
            port: address.port(),
        };
        let service = ServiceUrl {
            scheme: Scheme::Http,
            address: host_port(service),
        };
        let server = host_port(self.server.tunnel_address());
        let mut config = AgentConfig::new(server, id.parse().unwrap(), service);
        change(&mut config);
        let (tell, told) = mpsc::channel();
        let agent = Agent::new(config).unwrap().on_event(move |event| {
            if let Event::Connected { port, .. } = event {
                let _ = tell.send(port);
            }
        });
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let thread = std::thread::spawn(move || runtime().block_on(agent.run(stopped)));
        self.agents.push((stop, thread));
        told
    }

    fn metrics(&self) -> &Metrics {
        self.server.metrics()
    }

    /// Nothing counts as open any more.
    #[track_caller]
    fn assert_at_rest(&self) {
        eventually(PATIENCE, "nothing is left", || {
            let metrics = self.metrics();
            metrics.level(|worker| &worker.exchanges_open) == 0
                && metrics.level(|worker| &worker.connections_open) == 0
        });
    }

    fn has_failed(&self) -> bool {
        let failed = async { tokio::time::timeout(Duration::ZERO, self.server.failed()).await };
        runtime().block_on(failed).is_ok()
    }

    /// Waits until the server has noticed that it can't go on.
    fn wait_for_failure(&self) {
        let failed = async { tokio::time::timeout(PATIENCE, self.server.failed()).await };
        runtime().block_on(failed).expect("the server fails");
    }

    fn end(self) {
        for (stop, thread) in self.agents {
            stop.cancel();
            thread.join().unwrap();
        }
        runtime().block_on(self.server.shutdown());
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// An address where nobody listens.
fn nowhere() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

#[test]
fn in_an_agents_exchange_it_ends_that_one() {
    let mut house = House::start(2, |_| {});
    let bystander = house.agent("bystander", text_service("here"));
    // The second and third request wait for the worker that the first one has.
    let address = house.agent_with("stricken", nowhere(), |config| {
        config.local.max_connections = 1;
    });
    let before = PANICS.get();
    arm(&["can't connect to the local service"]);
    let visitors: Vec<_> = (0..3)
        .map(|_| std::thread::spawn(move || get(address, "/").status))
        .collect();
    let answers: Vec<u16> = visitors
        .into_iter()
        .map(|visitor| visitor.join().unwrap())
        .collect();
    assert_eq!(answers, [502; 3]);
    wait_for_panic(before);
    // The same tunnel carries on.
    assert_eq!(
        get(address, "/").header("x-silo-error"),
        ["upstream_refused"]
    );
    assert_eq!(house.metrics().registrations.get(), 2);
    assert_eq!(get(bystander, "/").text(), "here");
    house.assert_at_rest();
    assert!(!house.has_failed());
    house.end();
}

#[test]
fn in_a_visitors_connection_it_ends_that_one() {
    let mut house = House::start(1, |_| {});
    let address = house.agent("agent-1", text_service("here"));
    let before = PANICS.get();
    let mut other = connect(address);
    arm(&["visitor's connection ended"]);
    assert_eq!(get(address, "/").text(), "here");
    wait_for_panic(before);
    other
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut other, false).text(), "here");
    drop(other);
    house.assert_at_rest();
    assert!(!house.has_failed());
    house.end();
}

#[test]
fn in_a_session_it_ends_the_tunnel_and_the_agent_comes_back() {
    let mut house = House::start(1, |_| {});
    let bystander = house.agent("bystander", text_service("here"));
    let before = PANICS.get();
    arm(&["agent registered", "agent_id=stricken"]);
    let address = house.agent("stricken", text_service("again"));
    wait_for_panic(before);
    assert_eq!(get(address, "/").text(), "again");
    assert_eq!(get(bystander, "/").text(), "here");
    assert_eq!(house.metrics().registrations.get(), 3);
    eventually(PATIENCE, "two tunnels are open", || {
        house.metrics().level(|worker| &worker.tunnels_open) == 2
    });
    assert!(!house.has_failed());
    house.end();
}

#[test]
fn at_the_admin_port_it_ends_one_connection() {
    let house = House::start(1, |_| {});
    let admin = house.server.admin_address();
    let before = PANICS.get();
    arm(&["an admin connection ended early"]);
    let mut rude = connect(admin);
    rude.write_all(b"NOT HTTP\r\n\r\n").unwrap();
    wait_for_panic(before);
    assert_eq!(get(admin, "/health").status, 200);
    let told = get(admin, "/metrics").text();
    let count = format!("\nsilo_panics_total {}\n", before + 1);
    assert!(told.contains(&count), "{told}");
    assert!(!house.has_failed());
    house.end();
}

#[test]
fn in_a_worker_thread_it_ends_the_server_which_says_so() {
    let mut house = House::start(1, |config| config.http.max_connections_per_agent = 1);
    let service = HeldService::start("late");
    let address = house.agent("agent-1", service.address);
    let mut visitor = connect(address);
    visitor
        .write_all(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    service.wait_for_request();
    let before = PANICS.get();
    arm(&["visitor's connection refused"]);
    drop(connect(address));
    wait_for_panic(before);
    house.wait_for_failure();
    assert!(try_read_answer(&mut visitor, false).is_err(), "cut off");
    // Whatever was open on it has been given back.
    house.assert_at_rest();
    assert_eq!(house.metrics().level(|worker| &worker.tunnels_open), 0);
    house.end();
}

#[test]
fn in_the_accept_task_it_ends_the_server_which_says_so() {
    for workers in [1, 2] {
        let mut house = House::start(workers, |_| {});
        house.agent("bystander", text_service("here"));
        assert!(!house.has_failed());
        let before = PANICS.get();
        arm(&["port opened"]);
        house.start_agent("stricken", nowhere(), |_| {});
        wait_for_panic(before);
        house.wait_for_failure();
        house.end();
    }
}
