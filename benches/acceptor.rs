//! New connections a second to one port, with 1, 1,000 and 8,000 ports bound: the number of
//! bound ports must not show.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench talks to whoever runs it"
)]

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use silo_proxy::net::acceptor::{Accepted, Acceptor, AcceptorHandle, Command, Listener, Sink};
use silo_proxy::net::raise_descriptor_limit;
use socket2::{Domain, Socket, Type};

/// Connections of one round: fewer than the kernel's backlog holds.
const BURST: usize = 64;

/// Descriptors beside the listening sockets.
const SPARE: u64 = 256;

/// Ports below the ephemeral ones are tried in order until enough are bound.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

struct Counter {
    /// What is still to be bound.
    candidates: VecDeque<u16>,
    wanted: usize,
    bound: Vec<u16>,
    /// One message when all are bound.
    ready: SyncSender<Vec<u16>>,
    /// The size of each batch.
    accepted: SyncSender<usize>,
    asked: bool,
}

impl Sink for Counter {
    fn next_command(&mut self) -> Option<Command> {
        if self.asked || self.bound.len() == self.wanted {
            return None;
        }
        self.asked = true;
        let port = self.candidates.pop_front()?;
        let key = port.into();
        Some(Command::Bind { port, key })
    }

    fn opened(&mut self, port: u16, _key: u64, outcome: io::Result<()>) {
        self.asked = false;
        if outcome.is_ok() {
            self.bound.push(port);
        }
        if self.bound.len() == self.wanted {
            self.ready.send(self.bound.clone()).unwrap();
        } else if self.candidates.is_empty() {
            panic!("too few free ports in {PORTS:?}");
        }
    }

    fn accepted(&mut self, _listener: Listener, batch: Vec<Accepted>) {
        self.accepted.send(batch.len()).unwrap();
    }
}

struct Server {
    ports: Vec<u16>,
    accepted: Receiver<usize>,
    handle: AcceptorHandle,
    thread: JoinHandle<io::Result<()>>,
}

impl Server {
    fn start(ports: usize) -> Self {
        let (ready_tx, ready) = mpsc::sync_channel(1);
        let (accepted_tx, accepted) = mpsc::sync_channel(4 * BURST);
        let sink = Counter {
            candidates: PORTS.collect(),
            wanted: ports,
            bound: Vec::with_capacity(ports),
            ready: ready_tx,
            accepted: accepted_tx,
            asked: false,
        };
        let (acceptor, handle) = Acceptor::new(Ipv6Addr::UNSPECIFIED.into(), sink).unwrap();
        let thread = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(acceptor.run())
        });
        Self {
            ports: ready.recv().unwrap(),
            accepted,
            handle,
            thread,
        }
    }

    fn burst(&self, port: u16) {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into();
        let connect = |_| {
            let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            // Reset at the end: a client's port in TIME_WAIT would be missing soon.
            client.set_linger(Some(Duration::ZERO)).unwrap();
            client.connect(&address).unwrap();
            client
        };
        let clients: Vec<Socket> = (0..BURST).map(connect).collect();
        let mut missing = BURST;
        while missing > 0 {
            missing -= self.accepted.recv().unwrap();
        }
        drop(clients);
    }

    fn stop(self) {
        self.handle.shutdown();
        self.thread.join().unwrap().unwrap();
    }
}

fn connections(criterion: &mut Criterion) {
    let limit = raise_descriptor_limit().unwrap().now.unwrap_or(u64::MAX);
    let mut group = criterion.benchmark_group("acceptor/connections");
    group.throughput(Throughput::Elements(BURST as u64));
    for ports in [1, 1_000, 8_000] {
        let needed = ports as u64 + SPARE;
        if limit < needed {
            eprintln!(
                "acceptor/connections/{ports}: skipped, needs {needed} file descriptors, \
                 the hard limit is {limit}"
            );
            continue;
        }
        let server = Server::start(ports);
        let port = server.ports[ports / 2];
        group.bench_function(BenchmarkId::from_parameter(ports), |bencher| {
            bencher.iter(|| server.burst(port));
        });
        server.stop();
    }
    group.finish();
}

criterion_group!(benches, connections);
criterion_main!(benches);
