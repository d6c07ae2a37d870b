//! A service that closes the connections an agent keeps, just as requests come on them.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::alone;
use crate::common::bystander::{Bystander, sum};
use crate::common::raw::{Received, read_request, reset, settles};
use crate::common::{Answer, Server, connect, port_range, service, try_read_answer};

#[test]
fn closed_connections_cost_no_request_that_may_be_repeated() {
    closes(1_000);
}

#[test]
#[ignore = "10,000 requests take half a minute"]
fn ten_thousand_closed_connections_cost_no_request_that_may_be_repeated() {
    closes(10_000);
}

/// Has visitors make so many requests.
fn closes(count: usize) {
    let _alone = alone();
    let service = Fickle::start();
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("fickle", service.address);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut visitor = connect(agent.address());
                loop {
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    if id >= count {
                        return;
                    }
                    let answer = ask(&mut visitor, id);
                    match (METHODS[id % METHODS.len()], answer.status) {
                        (_, 200) => assert_eq!(answer.header("x-id"), [id.to_string()]),
                        ("POST", 502) => {
                            assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                        (method, status) => panic!("{method} {id}: {status} {}", answer.text()),
                    }
                    if answer.header("connection") == ["close"] {
                        visitor = connect(agent.address());
                    }
                }
            });
        }
    });
    let closed = service.closed.load(Ordering::Relaxed);
    let failed = failed.into_inner();
    eprintln!(
        "{count} requests, {closed} connections closed, {failed} of {} POSTs answered with 502",
        count.div_ceil(METHODS.len())
    );
    assert!(closed > count / 2, "too little for this test");
    let twice = service.posts.lock().unwrap().twice.clone();
    assert!(twice.is_empty(), "came twice: {twice:?}");
    settles(&server);
    bystander.noticed_nothing();
}

const METHODS: [&str; 4] = ["GET", "HEAD", "POST", "DELETE"];

/// Makes one request. Whatever its answer is, it is this request's.
fn ask(visitor: &mut TcpStream, id: usize) -> Answer {
    let method = METHODS[id % METHODS.len()];
    // A POST with a body or without: neither is repeated.
    let body = if method == "POST" && id % 8 < 4 {
        "x".repeat(id % 3_000)
    } else {
        String::new()
    };
    let mut request = format!("{method} /{id} HTTP/1.1\r\nHost: h\r\n");
    if method == "POST" {
        request += &format!("Content-Length: {}\r\n", body.len());
    }
    visitor
        .write_all(format!("{request}\r\n{body}").as_bytes())
        .unwrap();
    let answer = try_read_answer(visitor, method == "HEAD")
        .unwrap_or_else(|error| panic!("{method} {id}: {error}"));
    if answer.status == 200 && method != "HEAD" {
        assert_eq!(answer.header("x-sum"), [sum(&answer.body).to_string()]);
    }
    answer
}

/// The service: it answers what comes first on a connection, and then closes it sooner or later.
struct Fickle {
    address: SocketAddr,
    closed: Arc<AtomicUsize>,
    posts: Arc<Mutex<Posts>>,
}

/// The request lines of POSTs, which have to differ.
#[derive(Default)]
struct Posts {
    came: HashSet<String>,
    twice: Vec<String>,
}

impl Fickle {
    fn start() -> Self {
        let closed = Arc::new(AtomicUsize::new(0));
        let counter = closed.clone();
        let posts = Arc::new(Mutex::new(Posts::default()));
        let came = posts.clone();
        let address = service(move |mut stream| {
            stream.set_nodelay(true).unwrap();
            let Ok(request) = read_request(&mut stream) else {
                return;
            };
            note(&came, &request);
            if answer(&request, &mut stream).is_err() {
                return;
            }
            match counter.fetch_add(1, Ordering::Relaxed) % 7 {
                // It ends as soon as the answer is sent, or some time later.
                0 => {}
                1 => reset(stream),
                late @ (2 | 3) => {
                    let until = Instant::now() + Duration::from_micros(400 * late as u64);
                    while Instant::now() < until {
                        std::thread::yield_now();
                    }
                }
                // The next request has come and isn't read: a reset.
                4 => drop(stream.peek(&mut [0])),
                // A part of it is.
                5 => drop(stream.read(&mut [0; 20])),
                // It is read, and perhaps acted upon, and gets no answer.
                _ => {
                    if let Ok(request) = read_request(&mut stream) {
                        note(&came, &request);
                    }
                }
            }
        });
        Self {
            address,
            closed,
            posts,
        }
    }
}

/// Each POST comes once at most.
fn note(posts: &Mutex<Posts>, request: &Received) {
    let line = request.line();
    if line.starts_with("POST") {
        let mut posts = posts.lock().unwrap();
        if !posts.came.insert(line.clone()) {
            posts.twice.push(line);
        }
    }
}

fn answer(request: &Received, stream: &mut TcpStream) -> std::io::Result<()> {
    let line = request.line();
    let id = line.split(['/', ' ']).nth(2).unwrap();
    let body = format!("the answer to {line}").repeat(10);
    let head = format!(
        "HTTP/1.1 200 OK\r\nX-Id: {id}\r\nX-Sum: {}\r\nContent-Length: {}\r\n\r\n",
        sum(body.as_bytes()),
        body.len()
    );
    let body = if line.starts_with("HEAD") { "" } else { &body };
    stream.write_all(format!("{head}{body}").as_bytes())
}
