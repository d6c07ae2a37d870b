//! Peers who stop taking what they are sent, or take it drop by drop.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::Sender;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::bystander::{Bystander, SignedVisitor, allowed, p99, sign};
use crate::common::raw::{channel, pattern, read_request, send, settles, take};
use crate::common::{
    Agent, Server, bytes_in_sockets, connect, pause, port_range, read_answer, read_head, service,
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// What may be taken of an upload that nobody reads, and how much of that is beyond what the kernel
/// holds. The visitor's own buffer, which may grow to 4 MiB and is none of ours, is kept small.
const TAKEN: u64 = 2 * MIB;
const HELD: u64 = MIB;
const VISITORS_OWN: usize = 64 * 1024;

#[test]
#[ignore = "a gibibyte takes a while if nothing is optimised"]
fn an_upload_of_a_gibibyte_waits_at_its_visitor() {
    const SIZE: u64 = GIB;
    let _alone = alone();
    let (address, go) = stubborn(SIZE);
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("stubborn", address);
    let bystander = Bystander::start(&server, &[&agent.process]);

    let mut visitor = connect(agent.address());
    socket2::SockRef::from(&visitor)
        .set_send_buffer_size(VISITORS_OWN)
        .unwrap();
    let head = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {SIZE}\r\n\r\n");
    visitor.write_all(head.as_bytes()).unwrap();
    let taken = write_until_stalled(&mut visitor, SIZE);
    let ports = [agent.port, server.tunnel.port(), address.port()];
    let kernel = bytes_in_sockets(&ports);
    let held = taken.saturating_sub(kernel);
    eprintln!(
        "nobody reads: {} KiB of a GiB were taken, of which {} KiB are in sockets",
        taken / 1024,
        kernel / 1024
    );
    assert!(taken < TAKEN, "{taken} bytes were taken");
    assert!(held < HELD, "{held} bytes are in the processes");

    go.send(()).unwrap();
    let mut position = taken;
    while position < SIZE {
        position += visitor.write(piece(position, SIZE - position)).unwrap() as u64;
    }
    let answer = read_answer(&mut visitor, false);
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "all as sent")
    );
    drop(visitor);
    settles(&server);
    bystander.noticed_nothing();
}

/// The bytes of every body, over and over; their number is odd, so that a loss of any usual size
/// shows.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(1_048_573));

/// A piece of the body that begins at `position`.
fn piece(position: u64, limit: u64) -> &'static [u8] {
    let rest = &BYTES[(position % BYTES.len() as u64) as usize..];
    &rest[..rest.len().min(limit.min(65_536) as usize)]
}

/// Reads a body to `end` and compares each byte.
fn check(stream: &mut impl Read, end: u64) -> io::Result<()> {
    let (mut position, mut buffer) = (0, vec![0; 65_536]);
    while position < end {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::other(format!("ended after {position} bytes")));
        }
        let mut read = &buffer[..count];
        while !read.is_empty() {
            let expected = piece(position, read.len() as u64);
            if read[..expected.len()] != *expected {
                return Err(io::Error::other(format!("a wrong byte after {position}")));
            }
            position += expected.len() as u64;
            read = &read[expected.len()..];
        }
    }
    Ok(())
}

/// A service that reads a body only when it is told to.
fn stubborn(size: u64) -> (SocketAddr, Sender<()>) {
    let (go, may_go) = channel::<()>();
    let may_go = Mutex::new(may_go);
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_err() {
            return;
        }
        take(&may_go.lock().unwrap(), "leave to read");
        let text = match check(&mut stream, size) {
            Ok(()) => "all as sent".to_owned(),
            Err(error) => error.to_string(),
        };
        let length = text.len();
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{text}"
        );
    });
    (address, go.into_inner().unwrap())
}

/// Writes until nothing has been taken for a second.
fn write_until_stalled(visitor: &mut TcpStream, size: u64) -> u64 {
    visitor
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut written = 0;
    while written < size {
        match visitor.write(piece(written, size - written)) {
            Ok(count) => written += count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("after {written} bytes: {error}"),
        }
    }
    visitor.set_write_timeout(None).unwrap();
    written
}

/// Visitors of the same agent as the reader.
const FAST: usize = 50;

/// Between two requests of each of them: fifty that never pause would only measure how long the
/// machine's two cores take for fifty.
const PAUSE: Duration = Duration::from_millis(100);

#[test]
#[ignore = "it measures for eleven seconds"]
fn a_reader_of_a_kibibyte_a_second_holds_up_no_visitor_of_the_same_agent() {
    let _alone = alone();
    let address = service(|mut stream| {
        stream.set_nodelay(true).unwrap();
        while let Ok(request) = read_request(&mut stream) {
            let outcome = if request.line().starts_with("GET /gibibyte ") {
                send_all(&mut stream, GIB)
            } else {
                sign(&request, &mut stream)
            };
            if outcome.is_err() {
                return;
            }
        }
    });
    let server = Server::with(port_range(4), &[]);
    // Connections that fifty visitors needed aren't kept longer than the test.
    let idle = ("local.idle_timeout", "2s");
    let agent = server.agent_with("shared", address, &[idle]);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let mut fast: Vec<SignedVisitor> = (0..FAST)
        .map(|_| SignedVisitor::open(agent.address()).unwrap())
        .collect();
    visit(&mut fast, Duration::from_secs(1));
    // Whatever else holds up the machine holds up all fifty: the best of three counts.
    let held_up = (0..3).all(|_| {
        let quiet = visit(&mut fast, Duration::from_secs(3));
        let beside = beside_slow_reader(&agent, || visit(&mut fast, Duration::from_secs(3)));
        eprintln!("fifty visitors: p99 {beside:?} beside a slow reader, {quiet:?} without him");
        beside > allowed(quiet)
    });
    assert!(!held_up, "three times");
    drop(fast);
    settles(&server);
    bystander.noticed_nothing();
}

/// Does something while one reads a body of a gibibyte at a kibibyte a second.
fn beside_slow_reader<T: Send>(agent: &Agent, action: impl FnOnce() -> T + Send) -> T {
    let request = "GET /gibibyte HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut reader = send(agent.address(), request);
    read_head(&mut reader).unwrap();
    std::thread::scope(|scope| {
        let action = scope.spawn(action);
        let began = Instant::now();
        let mut read = 0;
        while !action.is_finished() {
            if began.elapsed().as_secs() * KIB >= read {
                let mut bytes = [0; KIB as usize];
                reader.read_exact(&mut bytes).unwrap();
                assert!(bytes[..] == *piece(read, KIB), "other bytes after {read}");
                read += KIB;
            }
            pause();
        }
        action.join().unwrap()
    })
}

/// Has all of them ask for some time, and returns the p99 of what they waited.
fn visit(visitors: &mut [SignedVisitor], time: Duration) -> Duration {
    let until = Instant::now() + time;
    let mut waited: Vec<Duration> = std::thread::scope(|scope| {
        let visits: Vec<_> = visitors
            .iter_mut()
            .map(|visitor| {
                scope.spawn(move || {
                    let mut waited = Vec::new();
                    while Instant::now() < until {
                        waited.push(visitor.ask().unwrap());
                        let next = Instant::now() + PAUSE;
                        while Instant::now() < next {
                            pause();
                        }
                    }
                    waited
                })
            })
            .collect();
        visits
            .into_iter()
            .flat_map(|one| one.join().unwrap())
            .collect()
    });
    p99(&mut waited)
}

fn send_all(stream: &mut TcpStream, size: u64) -> io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n")?;
    let mut position = 0;
    while position < size {
        position += stream.write(piece(position, size - position))? as u64;
    }
    Ok(())
}
