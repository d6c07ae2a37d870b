//! A tunnel over a link that is far slower than this machine's.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::common::bystander::{Bystander, SignedVisitor, p99, sign};
use crate::common::raw::{Received, pattern, read_request_body, read_request_head, settles};
use crate::common::{Server, connect, get, pause, port_range, read_answer, request, service};
use crate::{Over, alone};

/// What the link carries a second, each way.
const RATE: u32 = 2_000_000;

/// How long a byte takes from one end to the other if nothing is in front of it.
const ONE_WAY: Duration = Duration::from_millis(25);

/// What may wait in front of the link, by the time it takes there: a router's usual buffer.
const QUEUE: Duration = Duration::from_millis(100);

/// What each end's kernel takes for the link: the window of a connection over such a link.
const WINDOW: usize = 64 * 1024;

/// Twelve seconds of the link.
const BULK: usize = 12 * RATE as usize;

/// Those who make small requests.
const VISITORS: usize = 8;

const HEARTBEAT: Duration = Duration::from_secs(1);

#[test]
#[ignore = "fills a slow link for half a minute"]
fn small_requests_pass_bulk_on_a_slow_link() {
    let _alone = alone();
    let times = [
        ("grpc.heartbeat_interval", "1s"),
        ("grpc.heartbeat_timeout", "3s"),
    ];
    let server = Server::with(port_range(4), &times);
    let link = slow_link(server.tunnel).to_string();
    let over_link = ("grpc.server_address", &*link);
    let idle = ("local.idle_timeout", "2s");
    let agent = server.agent_with("far", bulk_service(), &[over_link, idle]);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let address = agent.address();
    let session = || far(&server)["generation"].as_u64().unwrap();
    let generation = session();

    let mut alone = SignedVisitor::open(address).unwrap();
    let mut waited: Vec<Duration> = (0..20).map(|_| alone.ask().unwrap()).collect();
    drop(alone);
    let quiet = p99(&mut waited);
    eprintln!("small requests alone: {:?} to {quiet:?}", waited[0]);
    assert!(waited[0] >= 2 * ONE_WAY, "the link is too fast");

    type Bulk = fn(SocketAddr);
    for (name, bulk) in [("download", download as Bulk), ("upload", upload)] {
        let over = AtomicBool::new(false);
        let (mut waited, took, round_trip) = std::thread::scope(|scope| {
            let visits: Vec<_> = (0..VISITORS)
                .map(|_| scope.spawn(|| visit(address, &over)))
                .collect();
            let watch = scope.spawn(|| slowest_heartbeat(&server, &over));
            let bulk = scope.spawn(|| {
                let _over = Over(&over);
                let began = Instant::now();
                bulk(address);
                began.elapsed()
            });
            let took = bulk.join().unwrap();
            let waited: Vec<Duration> = visits
                .into_iter()
                .flat_map(|visits| visits.join().unwrap())
                .collect();
            (waited, took, watch.join().unwrap())
        });
        let (p99, count) = (p99(&mut waited), waited.len());
        let rate = BULK as f64 / took.as_secs_f64();
        eprintln!(
            "beside a {name} of {rate:.0} bytes/s: {count} small requests, median {:?}, p99 \
             {p99:?}, slowest {:?}; heartbeats took up to {round_trip:?}",
            waited[count / 2],
            waited[count - 1],
        );
        assert!(rate > 0.6 * f64::from(RATE), "the link isn't full");
        assert!(p99 < Duration::from_secs(1), "p99 {p99:?}");
        // One is missed if it isn't back before the next one goes.
        assert!(round_trip < HEARTBEAT, "a heartbeat took {round_trip:?}");
    }
    assert_eq!(session(), generation, "it is still the same session");
    assert_eq!(agent.process.count(&["disconnected"]), 0);
    settles(&server);
    bystander.noticed_nothing();
}

/// The row of the agent behind the link.
fn far(server: &Server) -> serde_json::Value {
    let answer = get(server.admin, "/agents/far");
    serde_json::from_slice(&answer.body).unwrap()
}

/// Watches the round trips of heartbeats as the server measures them.
fn slowest_heartbeat(server: &Server, over: &AtomicBool) -> Duration {
    let mut slowest = 0.0_f64;
    while !over.load(Ordering::Relaxed) {
        slowest = slowest.max(far(server)["rtt_ms"].as_f64().unwrap_or_default());
        let next = Instant::now() + HEARTBEAT / 10;
        while Instant::now() < next {
            pause();
        }
    }
    Duration::from_secs_f64(slowest / 1000.0)
}

fn visit(address: SocketAddr, over: &AtomicBool) -> Vec<Duration> {
    let mut visitor = SignedVisitor::open(address).unwrap();
    let mut waited = Vec::new();
    while !over.load(Ordering::Relaxed) {
        waited.push(visitor.ask().unwrap());
        pause();
    }
    waited
}

fn download(address: SocketAddr) {
    let mut visitor = connect(address);
    visitor
        .write_all(b"GET /bulk HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    let answer = read_answer(&mut visitor, false);
    assert_eq!(answer.status, 200);
    assert!(answer.body == pattern(BULK), "other bytes than were sent");
}

fn upload(address: SocketAddr) {
    let answer = request(address, "POST", "/bulk", &[], &pattern(BULK));
    let expected = (200, "all as sent".to_owned());
    assert_eq!((answer.status, answer.text()), expected);
}

/// A service of large bodies both ways, which signs what else it is asked.
fn bulk_service() -> SocketAddr {
    let bulk = pattern(BULK);
    service(move |mut stream| {
        let _ = stream.set_nodelay(true);
        while let Ok(request) = read_request_head(&mut stream) {
            if answer(request, &bulk, &mut stream).is_err() {
                return;
            }
        }
    })
}

fn answer(mut request: Received, bulk: &[u8], stream: &mut TcpStream) -> io::Result<()> {
    read_request_body(stream, &mut request)?;
    let line = request.line();
    let body = if line.starts_with("GET /bulk ") {
        bulk
    } else if line.starts_with("POST /bulk ") {
        match request.body == bulk {
            true => &b"all as sent"[..],
            false => b"something else",
        }
    } else {
        return sign(&request, stream);
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"
    )?;
    stream.write_all(body)
}

/// Starts a link to `target` that carries [`RATE`] each way, and each byte for [`ONE_WAY`].
fn slow_link(target: SocketAddr) -> SocketAddr {
    let narrow = |stream: &TcpStream| {
        stream.set_nodelay(true).unwrap();
        let socket = socket2::SockRef::from(stream);
        socket.set_recv_buffer_size(WINDOW).unwrap();
        socket.set_send_buffer_size(WINDOW).unwrap();
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Accepted connections inherit it, so that their windows never grow beyond it.
    let socket = socket2::SockRef::from(&listener);
    socket.set_recv_buffer_size(WINDOW).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let far = TcpStream::connect(target).unwrap();
            for stream in [&near, &far] {
                narrow(stream);
            }
            carry(&near, &far);
            carry(&far, &near);
        }
    });
    address
}

/// Carries one direction, until either end closes.
fn carry(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let (link, arrivals) = mpsc::channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // When the link will have taken everything that waits for it.
        let mut free = Instant::now();
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            free = free.max(Instant::now()) + Duration::from_secs(1) * count as u32 / RATE;
            if link
                .send((free + ONE_WAY, buffer[..count].to_vec()))
                .is_err()
            {
                return;
            }
            // A full queue takes nothing.
            wait_until(free - QUEUE);
        }
    });
    std::thread::spawn(move || {
        for (arrives, bytes) in arrivals {
            wait_until(arrives);
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

#[expect(clippy::disallowed_methods, reason = "a link takes its time")]
fn wait_until(moment: Instant) {
    std::thread::sleep(moment.saturating_duration_since(Instant::now()));
}
