//! Server-sent events: many in a row, and long silence between two.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::bystander::{Bystander, p99};
use crate::common::raw::{is_silent, read_chunk, settles};
use crate::common::{Server, connect, pause, port_range, read_head, service};

/// How much later than without the tunnel an event may arrive, at the p99.
const LATER: Duration = Duration::from_millis(5);

#[test]
fn a_thousand_events_arrive_in_order_and_at_once() {
    events(1_000);
}

#[test]
#[ignore = "10,000 events at one a millisecond, with the tunnel and without"]
fn ten_thousand_events_arrive_in_order_and_at_once() {
    events(10_000);
}

/// Has a service send so many events, one a millisecond.
fn events(count: usize) {
    let _alone = alone();
    // Each event says when it was sent.
    let start = Instant::now();
    let address = service(move |mut stream| {
        stream.set_nodelay(true).unwrap();
        if read_head(&mut stream).is_err() {
            return;
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n";
        let _ = stream.write_all(format!("{head}\r\n").as_bytes());
        let began = Instant::now();
        for number in 0..count {
            let due = began + Duration::from_millis(number as u64);
            while Instant::now() < due {
                std::thread::yield_now();
            }
            let now = start.elapsed().as_micros();
            let event = format!("id: {number}\ndata: {now}\n\n");
            if stream.write_all(event.as_bytes()).is_err() {
                return;
            }
        }
    });
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("events", address);
    let bystander = Bystander::start(&server, &[&agent.process]);
    // Other programs may keep the machine busy, also in between: the best of three counts.
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let direct = listen(address, count, start);
        let tunnelled = listen(agent.address(), count, start);
        eprintln!("{count} events: {direct} directly, {tunnelled} through the tunnel");
        best = best.min(tunnelled.p99.saturating_sub(direct.p99));
        if best <= LATER {
            settles(&server);
            bystander.noticed_nothing();
            return;
        }
    }
    panic!("at the p99 events came {best:?} later");
}

/// How late events were.
struct Late {
    median: Duration,
    p99: Duration,
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "median {:?}, p99 {:?}", self.median, self.p99)
    }
}

/// Reads all events, which have to come in order.
fn listen(address: SocketAddr, count: usize, start: Instant) -> Late {
    let mut stream = connect(address);
    stream
        .write_all(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    let mut reader = BufReader::new(stream);
    read_head(&mut reader).unwrap();
    let mut late = Vec::with_capacity(count);
    let mut line = String::new();
    // Chunks' sizes may stand between any two lines, and events are never torn: each was written
    // at once, and is shorter than anything that would be cut.
    while late.len() < count {
        line.clear();
        assert_ne!(
            reader.read_line(&mut line).unwrap(),
            0,
            "after {} events",
            late.len()
        );
        if let Some(number) = line.strip_prefix("id: ") {
            assert_eq!(number.trim_end(), late.len().to_string());
            line.clear();
            reader.read_line(&mut line).unwrap();
            let now = start.elapsed();
            let sent = line
                .strip_prefix("data: ")
                .unwrap()
                .trim_end()
                .parse()
                .unwrap();
            late.push(now.saturating_sub(Duration::from_micros(sent)));
        }
    }
    let p99 = p99(&mut late);
    Late {
        median: late[late.len() / 2],
        p99,
    }
}

#[test]
#[ignore = "waits for an event for 90 s"]
fn a_silence_of_90_seconds_between_events_ends_nothing() {
    let _alone = alone();
    const SILENCE: Duration = Duration::from_secs(90);
    let address = service(|mut stream| {
        if read_head(&mut stream).is_err() {
            return;
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
        let _ = stream.write_all(format!("{head}data: first\n\n").as_bytes());
        let until = Instant::now() + SILENCE;
        while Instant::now() < until {
            pause();
        }
        let _ = stream.write_all(b"data: second\n\n");
    });
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("events", address);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let mut visitor = connect(agent.address());
    visitor
        .write_all(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    read_head(&mut visitor).unwrap();
    let first = read_chunk(&mut visitor).unwrap();
    assert_eq!(first.as_deref(), Some(&b"data: first\n\n"[..]));
    assert!(is_silent(&mut visitor, SILENCE - Duration::from_secs(5)));
    let second = read_chunk(&mut visitor).unwrap();
    assert_eq!(second.as_deref(), Some(&b"data: second\n\n"[..]));
    assert_eq!(read_chunk(&mut visitor).unwrap(), None);
    settles(&server);
    bystander.noticed_nothing();
}
