//! What goes wrong, what is too much and what takes too long: what a visitor gets then, what is
//! counted, and that nobody else notices.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and says what it passes over"
)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::raw::{
    Recorder, Stand, ask, channel, latin1, lines_of, pattern, read_request, read_to_close, send,
    settles, take,
};
use common::{
    Answer, PATIENCE, Server, connect, eventually, get, port_range, read_answer, read_head,
    service, text_service,
};

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";

/// Checks an answer of the server's own: status line, headers and problem details.
#[track_caller]
fn assert_problem(answer: &Answer, status: u16, error: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("x-silo-error"), [error]);
    assert_eq!(answer.header("content-type"), ["application/problem+json"]);
    assert_eq!(answer.header("cache-control"), ["no-store"]);
    let retry_after = answer.header("retry-after");
    assert_eq!(retry_after.len(), usize::from(status == 503));
    for seconds in retry_after {
        assert!(seconds.parse::<u32>().is_ok_and(|seconds| seconds > 0));
    }
    let problem: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem["status"], status);
    assert_eq!(problem["error"], error);
    assert!(problem["title"].is_string() && problem["detail"].is_string());
    assert!(
        !answer.text().contains("127.0.0.1"),
        "names an address: {}",
        answer.text()
    );
}

fn failures(server: &Server, kind: &str) -> f64 {
    server.metric("silo_failures_total", &format!("\"{kind}\""))
}

/// Waits until so many failures have been counted: some are when the connection has ended.
#[track_caller]
fn counts(server: &Server, kind: &str, expected: f64) {
    let deadline = Instant::now() + PATIENCE;
    while failures(server, kind) < expected && Instant::now() < deadline {
        common::pause();
    }
    assert_eq!(failures(server, kind), expected, "{kind}");
}

/// A service that reads requests and never answers.
fn silent_service() -> SocketAddr {
    service(|mut stream| while read_request(&mut stream).is_ok() {})
}

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

// --- The table of failures ----------------------------------------------------------------------

#[test]
fn no_agent_behind_the_port() {
    let server = Server::with(port_range(4), &[("http.port_lease", "60s")]);
    let mut agent = server.agent("a", text_service("ok"));
    let mut visitor = send(agent.address(), GET);
    assert_eq!(read_answer(&mut visitor, false).text(), "ok");
    agent.process.kill();
    server.process.wait_for(&["agent deregistered"]);

    // On a new connection and on one that was there before.
    assert_problem(&ask(agent.address(), GET), 503, "agent_offline");
    visitor.write_all(GET.as_bytes()).unwrap();
    assert_problem(&read_answer(&mut visitor, false), 503, "agent_offline");
    assert_eq!(failures(&server, "agent_offline"), 2.0);

    // And both are served again when the agent is back.
    let back = server.agent("a", text_service("back"));
    assert_eq!(back.port, agent.port);
    assert_eq!(ask(agent.address(), GET).text(), "back");
    visitor.write_all(GET.as_bytes()).unwrap();
    assert_eq!(read_answer(&mut visitor, false).text(), "back");
}

#[test]
fn the_tunnel_is_lost() {
    let server = Server::start();
    let mut agent = server.agent("a", silent_service());
    let mut visitors: Vec<TcpStream> = (0..5).map(|_| send(agent.address(), GET)).collect();
    eventually(PATIENCE, "all of them wait", || {
        server.metric("silo_exchanges_open", "") == 5.0
    });
    agent.process.kill();
    let lost = Instant::now();
    for visitor in &mut visitors {
        assert_problem(&read_answer(visitor, false), 502, "tunnel_lost");
    }
    assert!(lost.elapsed() < Duration::from_secs(5));
    assert_eq!(failures(&server, "tunnel_lost"), 5.0);
    settles(&server);
}

#[test]
fn the_service_refuses_the_connection() {
    let server = Server::start();
    let agent = server.agent("a", nobody());
    let mut visitor = connect(agent.address());
    for _ in 0..3 {
        // The visitor's connection is as good as before.
        visitor.write_all(GET.as_bytes()).unwrap();
        assert_problem(&read_answer(&mut visitor, false), 502, "upstream_refused");
    }
    let upload = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello";
    assert_problem(&ask(agent.address(), upload), 502, "upstream_refused");
    assert_eq!(failures(&server, "upstream_refused"), 4.0);
}

#[test]
fn the_service_breaks_its_answer_before_the_head() {
    let broken = [
        "",
        "HTTP/1.1 200 OK\r\nContent-Le",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        "SSH-2.0-OpenSSH_9.2p1\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/9.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: \0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        "\x16\x03\x01",
    ];
    let turn = Arc::new(Mutex::new(""));
    let answer = turn.clone();
    let address = service(move |mut stream| {
        if read_request(&mut stream).is_ok() {
            let answer = *answer.lock().unwrap();
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    for answer in broken {
        *turn.lock().unwrap() = answer;
        for request in [
            GET,
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
        ] {
            let got = ask(agent.address(), request);
            assert_eq!(got.status, 502, "{answer:?}");
            assert_problem(&got, 502, "upstream_error");
        }
    }
    let expected = 2.0 * broken.len() as f64;
    assert_eq!(failures(&server, "upstream_error"), expected);
    assert_eq!(server.metric("silo_answers_total", "5xx"), expected);

    // A head that never ends isn't collected for ever.
    let endless = service(|mut stream| {
        if read_request(&mut stream).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            while stream.write_all(&[b'x'; 1000]).is_ok() {}
        }
    });
    let agent = server.agent("b", endless);
    assert_problem(&ask(agent.address(), GET), 502, "upstream_error");
}

#[test]
fn the_service_takes_too_long() {
    let server = Server::start();
    let settings = [
        ("local.response_timeout", "500ms"),
        ("local.max_connections", "1"),
    ];
    let agent = server.agent_with("a", silent_service(), &settings);
    let began = Instant::now();
    // One is handed to the service, the other waits for its turn.
    let mut first = send(agent.address(), GET);
    let mut second = send(agent.address(), GET);
    for visitor in [&mut first, &mut second] {
        assert_problem(&read_answer(visitor, false), 504, "upstream_timeout");
        assert!(began.elapsed() >= Duration::from_millis(500));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(failures(&server, "upstream_timeout"), 2.0);
    // The connection serves the next request all the same.
    first.write_all(GET.as_bytes()).unwrap();
    assert_problem(&read_answer(&mut first, false), 504, "upstream_timeout");
}

/// A service that never says 100 has no more time than others.
#[test]
fn the_service_never_tells_the_visitor_to_go_on() {
    let server = Server::start();
    let settings = [("local.response_timeout", "500ms")];
    let agent = server.agent_with("a", silent_service(), &settings);
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    );
    assert_problem(&read_answer(&mut visitor, false), 504, "upstream_timeout");
}

/// Nor has one that takes nothing of an upload.
#[test]
fn the_service_takes_nothing_of_an_upload() {
    let server = Server::start();
    let (_never, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let address = service(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = may_go.lock().unwrap().recv_timeout(PATIENCE);
    });
    let agent = server.agent_with("a", address, &[("local.response_timeout", "500ms")]);
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n",
    );
    let mut writer = visitor.try_clone().unwrap();
    let sending = thread::spawn(move || {
        let _ = writer.write_all(&pattern(100_000_000));
    });
    assert_problem(&read_answer(&mut visitor, false), 504, "upstream_timeout");
    drop(visitor);
    sending.join().unwrap();
}

/// The time runs while the service has the request, not while the visitor still sends it.
#[test]
fn a_long_upload_is_no_slow_answer() {
    let stand = Stand::with(Recorder::new(), &[], &[("local.response_timeout", "500ms")]);
    let mut visitor = send(
        stand.agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 20\r\n\r\n",
    );
    // Short pauses at first, then some that are longer than the service's time.
    for pause in [100; 18].into_iter().chain([800; 2]) {
        let since = Instant::now();
        eventually(PATIENCE, "a moment", || {
            since.elapsed() > Duration::from_millis(pause)
        });
        visitor.write_all(b"x").unwrap();
    }
    assert_eq!(read_answer(&mut visitor, false).text(), "ok");
}

#[test]
fn too_many_exchanges() {
    let server = Server::with(port_range(4), &[("http.max_exchanges_per_agent", "2")]);
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let address = service(move |mut stream| {
        while read_request(&mut stream).is_ok() {
            take(&may_go.lock().unwrap(), "leave to answer");
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let agent = server.agent("a", address);
    let other = server.agent("b", text_service("other"));
    let mut held: Vec<TcpStream> = (0..2).map(|_| send(agent.address(), GET)).collect();
    eventually(PATIENCE, "both are under way", || {
        server.metric("silo_exchanges_open", "") == 2.0
    });
    for _ in 0..3 {
        assert_problem(&ask(agent.address(), GET), 503, "overloaded");
    }
    assert_eq!(failures(&server, "overloaded"), 3.0);
    // The limit is each agent's own.
    assert_eq!(ask(other.address(), GET).text(), "other");
    for _ in 0..3 {
        go.send(()).unwrap();
    }
    for visitor in &mut held {
        assert_eq!(read_answer(visitor, false).text(), "ok");
    }
    assert_eq!(ask(agent.address(), GET).text(), "ok");
}

#[test]
fn a_body_that_is_too_large() {
    let (begun, started) = channel();
    let (ended, seen) = channel();
    let address = service(move |mut stream| {
        if let Ok(mut request) = common::raw::read_request_head(&mut stream) {
            let _ = begun.lock().unwrap().send(());
            let complete = common::raw::read_request_body(&mut stream, &mut request).is_ok();
            let _ = ended.lock().unwrap().send((request.line(), complete));
            if complete {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            }
        }
    });
    let server = Server::with(port_range(4), &[("http.max_body", "10KiB")]);
    let agent = server.agent("a", address);
    let post = |path: &str, framing: &str, body: &[u8]| {
        let head = format!("POST {path} HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n");
        let mut visitor = send(agent.address(), head);
        let _ = visitor.write_all(body);
        let answer = read_answer(&mut visitor, false);
        (answer, visitor)
    };
    // Just right, in both framings.
    let right = pattern(10 * 1024);
    let (answer, _) = post("/right", "Content-Length: 10240", &right);
    assert_eq!(answer.text(), "ok");
    let chunks = common::raw::chunked(&right);
    let (answer, _) = post("/right", "Transfer-Encoding: chunked", &chunks);
    assert_eq!(answer.text(), "ok");
    for _ in 0..2 {
        let seen = take(&seen, "the request");
        assert_eq!(seen, ("POST /right HTTP/1.1".to_owned(), true));
    }

    // A length says at once that it is too much, and nothing reaches the service.
    let (answer, mut visitor) = post("/length", "Content-Length: 10241", b"");
    assert_problem(&answer, 413, "body_too_large");
    assert_eq!(read_to_close(&mut visitor).0, b"");
    // Chunks show it on the way, so the service sees an incomplete request.
    assert_eq!(started.try_iter().count(), 2);
    let mut visitor = send(
        agent.address(),
        "POST /chunks HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    );
    take(&started, "the head at the service");
    let _ = visitor.write_all(&common::raw::chunked(&pattern(100 * 1024)));
    assert_problem(&read_answer(&mut visitor, false), 413, "body_too_large");
    assert_eq!(read_to_close(&mut visitor).0, b"");
    assert_eq!(
        take(&seen, "the request"),
        ("POST /chunks HTTP/1.1".to_owned(), false)
    );
    assert_eq!(failures(&server, "body_too_large"), 2.0);
    settles(&server);
}

// --- Heads --------------------------------------------------------------------------------------

#[test]
fn heads_that_are_too_large() {
    let stand = Stand::new();
    let address = stand.agent.address();
    let refused = |head: String, status| {
        let mut visitor = connect(address);
        // The answer may come before all of it is written.
        let _ = visitor.write_all(head.as_bytes());
        let answer = read_answer(&mut visitor, false);
        assert_problem(&answer, status, "head_too_large");
        assert_eq!(answer.header("connection"), ["close"]);
        assert_eq!(read_to_close(&mut visitor).0, b"");
        assert!(stand.service.is_empty());
    };
    let accepted = |head: String| {
        assert_eq!(ask(address, head).status, 200);
        stand.service.next();
    };
    // "GET " and " HTTP/1.1" with the line's end are 15 bytes.
    let line = |length: usize| {
        format!(
            "GET /{} HTTP/1.1\r\nHost: h\r\n\r\n",
            "x".repeat(length - 16)
        )
    };
    accepted(line(8 * 1024));
    refused(line(8 * 1024 + 1), 414);
    refused(line(60_000), 414);

    // Host is a line too.
    let lines = |count: usize| {
        let more: String = (1..count).map(|n| format!("X-{n}: {n}\r\n")).collect();
        format!("GET / HTTP/1.1\r\nHost: h\r\n{more}\r\n")
    };
    accepted(lines(100));
    refused(lines(101), 431);
    refused(lines(120), 431);

    let bytes = |count: usize| {
        let line = format!("X-Long: {}\r\n", "x".repeat(990));
        let head = format!(
            "GET / HTTP/1.1\r\nHost: h\r\n{}\r\n",
            line.repeat(count / 1000)
        );
        assert_eq!(head.len(), count / 1000 * 1000 + 27);
        head
    };
    accepted(bytes(65_000));
    refused(bytes(66_000), 431);
    refused(bytes(75_000), 431);
    assert_eq!(failures(&stand.server, "head_too_large"), 6.0);
}

/// The answer comes when the limit is reached, however much is still to come.
#[test]
fn heads_that_are_far_too_large_are_not_collected() {
    let stand = Stand::new();
    let many: String = (0..1000).map(|n| format!("X-{n}: {n}\r\n")).collect();
    for (head, status) in [
        (
            format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "x".repeat(200_000)),
            414,
        ),
        (format!("GET / HTTP/1.1\r\nHost: h\r\n{many}\r\n"), 431),
        (
            format!(
                "GET / HTTP/1.1\r\nHost: h\r\nX-Long: {}\r\n\r\n",
                "x".repeat(1_000_000)
            ),
            431,
        ),
    ] {
        let mut visitor = connect(stand.agent.address());
        let _ = visitor.write_all(head.as_bytes());
        assert_problem(&read_answer(&mut visitor, false), status, "head_too_large");
        read_to_close(&mut visitor);
    }
    assert!(stand.service.is_empty());
    counts(&stand.server, "head_too_large", 3.0);
}

/// What follows each of the malformed heads below on the same connection: it must not become a
/// request.
const SMUGGLED: &[u8] = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn malformed_heads_reach_nobody() {
    let stand = Stand::new();
    let cases: &[(&str, &[u8])] = &[
        ("no host", b"GET / HTTP/1.1\r\n\r\n"),
        ("two hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        ("the same host twice", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
        ("two hosts in one", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"),
        ("userinfo", b"GET / HTTP/1.1\r\nHost: user@h\r\n\r\n"),
        ("host with a path", b"GET / HTTP/1.1\r\nHost: h/x\r\n\r\n"),
        ("host with a blank", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
        ("host with a bad port", b"GET / HTTP/1.1\r\nHost: h:80x\r\n\r\n"),
        ("host in Latin-1", b"GET / HTTP/1.1\r\nHost: caf\xe9\r\n\r\n"),
        (
            "another host than the target's",
            b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n",
        ),
        (
            "gzip, chunked",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "chunked, gzip",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        ),
        (
            "identity",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "chunked twice",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two encodings",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\
              Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "an encoding with a vertical tab",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "an encoding in quotes",
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
        ),
        (
            "an encoding in HTTP/1.0",
            b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two lengths",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        ),
        (
            "two lengths in one",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5, 5\r\n\r\nhello",
        ),
        (
            "a signed length",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello",
        ),
        (
            "a negative length",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -5\r\n\r\nhello",
        ),
        (
            "a length in hex",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x5\r\n\r\nhello",
        ),
        (
            "an empty length",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\nhello",
        ),
        (
            "a length beyond 64 bits",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551621\r\n\r\nhello",
        ),
        ("a folded line", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: 1\r\n 2\r\n\r\n"),
        ("a fold at the start", b"GET / HTTP/1.1\r\n X-A: 1\r\nHost: h\r\n\r\n"),
        ("a blank before the colon", b"GET / HTTP/1.1\r\nHost: h\r\nX-A : 1\r\n\r\n"),
        (
            "a blank before the length's colon",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length : 5\r\n\r\nhello",
        ),
        ("no colon", b"GET / HTTP/1.1\r\nHost: h\r\nX-A\r\n\r\n"),
        ("no name", b"GET / HTTP/1.1\r\nHost: h\r\n: 1\r\n\r\n"),
        ("a name in Latin-1", b"GET / HTTP/1.1\r\nHost: h\r\nX-\xe9: 1\r\n\r\n"),
        ("NUL in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: a\0b\r\n\r\n"),
        ("a control character", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: a\x07b\r\n\r\n"),
        ("a bare CR in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: a\rb: c\r\n\r\n"),
        ("a bare CR at the end", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: a\r\r\n\r\n"),
        ("a raw non-ASCII target", b"GET /caf\xe9 HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a raw UTF-8 target", b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a control character in the target", b"GET /\x01 HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("NUL in the target", b"GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a blank in the target", b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a relative target", b"GET a/b HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("an asterisk for GET", b"GET * HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("an authority for GET", b"GET h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n"),
        ("another scheme", b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("userinfo in the target", b"GET http://u@h/ HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a fragment", b"GET /#top HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("two equal lengths", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"),
        ("a length and an encoding", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("an encoding and a length", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"),
        ("no method", b" / HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a method that is no token", b"G(T / HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("a method in Latin-1", b"G\xe9T / HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("no target", b"GET HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("HTTP/0.9", b"GET /\r\n\r\n"),
        ("lower-case http", b"GET / http/1.1\r\nHost: h\r\n\r\n"),
        ("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: h\r\n\r\n"),
        ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: h\r\n\r\n"),
        ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: h\r\n\r\n"),
        ("no number", b"GET / HTTP/\r\nHost: h\r\n\r\n"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        ("an answer", b"HTTP/1.1 200 OK\r\nHost: h\r\n\r\n"),
        ("nothing of the sort", b"hello\r\n\r\n"),
    ];
    for (name, head) in cases {
        let mut visitor = send(stand.agent.address(), [head, SMUGGLED].concat());
        let (bytes, _) = read_to_close(&mut visitor);
        let text = latin1(&bytes);
        let status = text
            .strip_prefix("HTTP/1.1 ")
            .or(text.strip_prefix("HTTP/1.0 "));
        let status = status.map(|rest| &rest[..3]);
        let expected = match *name {
            "HTTP/1.2" | "HTTP/2.0" => "505",
            _ => "400",
        };
        assert_eq!(status, Some(expected), "{name}: {text:?}");
        assert!(
            text.contains("x-silo-error: bad_request\r\n"),
            "{name}: {text:?}"
        );
        assert_eq!(text.matches("HTTP/1.").count(), 1, "{name}: {text:?}");
    }
    assert!(stand.service.is_empty(), "one of them reached the service");
    counts(&stand.server, "bad_request", cases.len() as f64);
    let answers = |class| stand.server.metric("silo_answers_total", class);
    assert_eq!(answers("4xx") + answers("5xx"), cases.len() as f64);
    // The tunnel is as good as before.
    assert_eq!(stand.ask(GET).text(), "ok");
}

/// Whoever speaks something else is told at once, not when the time for a head is over.
#[test]
fn what_is_no_http_is_told_at_once() {
    let stand = Stand::with(Recorder::new(), &[("http.head_timeout", "1h")], &[]);
    for (name, bytes) in [
        ("TLS", &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..]),
        ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
        ("SMTP", b"HELO x\r\n"),
    ] {
        let mut visitor = send(stand.agent.address(), bytes);
        let answer = read_answer(&mut visitor, false);
        assert_problem(&answer, 400, "bad_request");
        assert_eq!(answer.header("connection"), ["close"], "{name}");
    }
    assert!(stand.service.is_empty());

    let banner = service(|mut stream| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.6\r\n");
        let _ = read_to_close(&mut stream);
    });
    let agent = stand.server.agent("ssh", banner);
    assert_problem(&ask(agent.address(), GET), 502, "upstream_error");
}

/// What reaches the service in spite of being written oddly has one meaning only.
#[test]
fn what_is_lenient_is_normalised() {
    let stand = Stand::new();
    for head in [
        "GET / HTTP/1.1\nHost: h\n\n",
        "\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \t h \t\r\n\r\n",
    ] {
        let answer = stand.ask(head);
        assert_eq!(answer.status, 200, "{head:?}");
        let received = stand.service.next();
        assert_eq!(received.line(), "GET / HTTP/1.1", "{head:?}");
        assert_eq!(received.header("host"), ["h"], "{head:?}");
        assert_eq!(lines_of(&received.head).len(), 5);
    }
}

/// Bytes at random, bent from good requests: the service sees well-formed requests or nothing,
/// and the server lives on.
#[test]
fn bent_requests_never_reach_the_service_bent() {
    let stand = Stand::new();
    let good: &[&[u8]] = &[
        b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nConnection: close\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
          5\r\nhello\r\n0\r\n\r\n",
    ];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let odd = b"\0\r\n \t:,;/\\\"%+-0159aAzZ\x7f\x80\xff";
    for _ in 0..400 {
        let mut bytes = good[next(good.len())].to_vec();
        for _ in 0..=next(3) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = odd[next(odd.len())],
                1 => bytes.insert(at, odd[next(odd.len())]),
                _ => {
                    bytes.remove(at);
                }
            }
        }
        let mut visitor = send(stand.agent.address(), &bytes);
        // Nothing more comes, so that nothing is waited for.
        let _ = visitor.shutdown(std::net::Shutdown::Write);
        read_to_close(&mut visitor);
    }
    settles(&stand.server);
    // The recorder's reader is strict: it would have failed its thread, and so the next ones.
    assert_eq!(stand.ask(GET).text(), "ok");
    assert_eq!(stand.server.metric("silo_panics_total", ""), 0.0);
}

#[test]
fn a_malformed_body_resets_its_exchange() {
    let (ended, seen) = channel();
    let address = service(move |mut stream| {
        if let Ok(head) = read_head(&mut stream) {
            let (body, _) = read_to_close(&mut stream);
            let line = latin1(&head).lines().next().unwrap_or_default().to_owned();
            let _ = ended.lock().unwrap().send((line, body));
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let cases: &[&[u8]] = &[
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello!\r\n0\r\n\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"\r\n5\r\nhello\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nhello",
        b"5\nhello\n0\n\n",
        b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: \0\r\n\r\n",
    ];
    for (number, chunks) in cases.iter().enumerate() {
        // A good beginning, so that the service has the request already.
        let head = format!(
            "POST /{number} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\
             3\r\nabc\r\n"
        );
        let mut visitor = send(
            agent.address(),
            [head.as_bytes(), chunks, SMUGGLED].concat(),
        );
        let (answer, _) = read_to_close(&mut visitor);
        let answer = latin1(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{}: {answer:?}",
            latin1(chunks)
        );
        assert!(answer.matches("HTTP/1.").count() <= 1, "{answer:?}");
        eventually(PATIENCE, "the exchange is over", || {
            server.metric("silo_exchanges_open", "") == 0.0
        });
        // The agent may have given up before it called the service; if not, it sees no end.
        while let Ok((line, body)) = seen.recv_timeout(Duration::from_millis(50)) {
            assert_eq!(line, format!("POST /{number} HTTP/1.1"));
            assert!(!latin1(&body).ends_with("0\r\n\r\n"), "{}", latin1(chunks));
        }
    }
    counts(&server, "bad_request", cases.len() as f64);
}

// --- Connections --------------------------------------------------------------------------------

/// Opens connections until they are as many as may be, then one more, which is closed unserved;
/// and once one of them is gone there is room again.
fn one_too_many(server: &Server, address: SocketAddr, limit: usize, reason: &str) {
    let mut held: Vec<TcpStream> = (0..limit)
        .map(|_| {
            let mut visitor = send(address, GET);
            assert_eq!(read_answer(&mut visitor, false).status, 200);
            visitor
        })
        .collect();
    let mut excess = connect(address);
    let _ = excess.write_all(GET.as_bytes());
    assert_eq!(read_to_close(&mut excess).0, b"");
    let label = format!("\"{reason}\"");
    let refused = || server.metric("silo_connections_refused_total", &label);
    assert_eq!(refused(), 1.0);
    // The others are served as before.
    for visitor in &mut held {
        visitor.write_all(GET.as_bytes()).unwrap();
        assert_eq!(read_answer(visitor, false).status, 200);
    }
    let open = |count: usize| {
        eventually(PATIENCE, "places are free", || {
            server.metric("silo_connections_open", "") == count as f64
        });
    };
    held.pop();
    open(limit - 1);
    assert_eq!(ask(address, GET).status, 200);
    assert_eq!(refused(), 1.0);
    drop(held);
    open(0);
}

#[test]
fn connections_are_limited_in_all() {
    let server = Server::with(port_range(4), &[("http.max_connections", "2")]);
    let agent = server.agent("a", text_service("ok"));
    one_too_many(&server, agent.address(), 2, "limit_total");
}

#[test]
fn connections_are_limited_by_agent() {
    let server = Server::with(port_range(4), &[("http.max_connections_per_agent", "2")]);
    let agent = server.agent("a", text_service("ok"));
    one_too_many(&server, agent.address(), 2, "limit_agent");
    // Another agent has places of its own.
    let mut held = send(agent.address(), GET);
    let other = server.agent("b", text_service("other"));
    assert_eq!(ask(other.address(), GET).text(), "other");
    assert_eq!(read_answer(&mut held, false).text(), "ok");
}

#[test]
fn connections_are_limited_by_address() {
    let server = Server::with(port_range(4), &[("http.max_connections_per_address", "2")]);
    let agent = server.agent("a", text_service("ok"));
    one_too_many(&server, agent.address(), 2, "limit_address");
    // A visitor from another address isn't concerned.
    let _held: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut visitor = send(agent.address(), GET);
            assert_eq!(read_answer(&mut visitor, false).status, 200);
            visitor
        })
        .collect();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into())
        .unwrap();
    socket.connect(&agent.address().into()).unwrap();
    let mut other: TcpStream = socket.into();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    other.write_all(GET.as_bytes()).unwrap();
    assert_eq!(read_answer(&mut other, false).text(), "ok");
}

// --- Times --------------------------------------------------------------------------------------

/// Asks an agent again and again while something else goes on, and reports the longest wait.
struct Meanwhile {
    stop: Arc<AtomicBool>,
    asking: thread::JoinHandle<usize>,
}

impl Meanwhile {
    fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let asking = thread::spawn(move || {
            let mut kept = connect(address);
            let mut answers = 0;
            while !stopped.load(Ordering::Relaxed) {
                kept.write_all(GET.as_bytes()).unwrap();
                assert_eq!(read_answer(&mut kept, false).status, 200);
                assert_eq!(ask(address, GET).status, 200);
                answers += 1;
                common::pause();
            }
            answers
        });
        Self { stop, asking }
    }

    /// Everybody else was served all the time.
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        assert!(self.asking.join().unwrap() > 0);
    }
}

/// Time limits of a second are kept to two ticks of half a second; the rest is for busy machines.
fn assert_cut_after_a_second(began: Instant) {
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(900), "after {took:?}");
    assert!(took < Duration::from_secs(10), "after {took:?}");
}

#[test]
fn a_head_that_comes_too_slowly() {
    let stand = Stand::with(Recorder::new(), &[("http.head_timeout", "1s")], &[]);
    let address = stand.agent.address();
    // Not a byte; a part of a head; a second head after a good request.
    let began = Instant::now();
    let mut visitors = vec![
        connect(address),
        send(address, "GET / HTTP/1.1\r\nHost:"),
        send(address, GET),
    ];
    assert_eq!(read_answer(&mut visitors[2], false).text(), "ok");
    visitors[2].write_all(b"GET / HT").unwrap();
    let mut dripping = send(address, "GET / HTTP/1.1\r\n");
    let meanwhile = Meanwhile::start(address);
    for visitor in &mut visitors {
        let (bytes, _) = read_to_close(visitor);
        let answer = latin1(&bytes);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"));
        assert_cut_after_a_second(began);
    }
    // A byte now and then doesn't help.
    while dripping.write_all(b"X-A: 1\r\n").is_ok() {
        assert!(began.elapsed() < Duration::from_secs(10));
        common::pause();
    }
    meanwhile.end();
}

#[test]
fn a_connection_that_lies_idle() {
    let stand = Stand::with(Recorder::new(), &[("http.idle_timeout", "1s")], &[]);
    let mut visitor = send(stand.agent.address(), GET);
    assert_eq!(read_answer(&mut visitor, false).text(), "ok");
    let began = Instant::now();
    let meanwhile = Meanwhile::start(stand.agent.address());
    assert_eq!(read_to_close(&mut visitor).0, b"");
    assert_cut_after_a_second(began);
    meanwhile.end();
    // Nobody has left who was waited for.
    assert_eq!(failures(&stand.server, "visitor_left"), 0.0);
}

/// A long wait for the answer isn't idleness.
#[test]
fn waiting_for_an_answer_is_not_idle() {
    let settings = [
        ("http.idle_timeout", "1s"),
        ("http.head_timeout", "1s"),
        ("http.body_timeout", "1s"),
        ("http.send_timeout", "1s"),
    ];
    let slow = Recorder::with(|_, stream| {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(3)));
        let _ = stream.read(&mut [0]);
        let _ = stream.set_read_timeout(None);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")
            .is_ok()
    });
    let stand = Stand::with(slow, &settings, &[]);
    assert_eq!(stand.ask(GET).text(), "slow");
    let upload = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi";
    assert_eq!(stand.ask(upload).text(), "slow");
}

#[test]
fn a_body_that_comes_too_slowly() {
    let (ended, seen) = channel();
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_ok() {
            let (body, _) = read_to_close(&mut stream);
            let _ = ended.lock().unwrap().send(body);
        }
    });
    let server = Server::with(port_range(4), &[("http.body_timeout", "1s")]);
    let agent = server.agent("a", address);
    let other = server.agent("b", text_service("ok"));
    let meanwhile = Meanwhile::start(other.address());
    let began = Instant::now();
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello",
    );
    let (bytes, _) = read_to_close(&mut visitor);
    let answer = latin1(&bytes);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"));
    assert_cut_after_a_second(began);
    assert_eq!(take(&seen, "the end at the service"), b"hello");
    settles(&server);
    counts(&server, "visitor_left", 1.0);
    meanwhile.end();
}

/// A body may take any time, as long as something comes.
#[test]
fn a_body_that_comes_slowly_but_comes() {
    let stand = Stand::with(Recorder::new(), &[("http.body_timeout", "1s")], &[]);
    let mut visitor = send(
        stand.agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n",
    );
    for _ in 0..10 {
        let since = Instant::now();
        eventually(PATIENCE, "a moment", || {
            since.elapsed() > Duration::from_millis(300)
        });
        visitor.write_all(b"x").unwrap();
    }
    assert_eq!(read_answer(&mut visitor, false).text(), "ok");
}

#[test]
fn a_visitor_who_takes_nothing() {
    let (ended, seen) = channel();
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
            let piece = pattern(64 * 1024);
            while stream.write_all(&piece).is_ok() {}
            let _ = ended.lock().unwrap().send(());
        }
    });
    let server = Server::with(port_range(4), &[("http.send_timeout", "1s")]);
    let agent = server.agent("a", address);
    let other = server.agent("b", text_service("ok"));
    let meanwhile = Meanwhile::start(other.address());
    let visitor = send(agent.address(), GET);
    take(&seen, "the end at the service");
    settles(&server);
    counts(&server, "visitor_left", 1.0);
    meanwhile.end();
    drop(visitor);
}

#[test]
fn who_never_says_hello_keeps_no_agent_out() {
    let server = Server::with(
        port_range(4),
        &[("grpc.max_handshakes", "2"), ("server.workers", "1")],
    );
    let mut silent: Vec<_> = (0..3).map(|_| connect(server.tunnel)).collect();
    let agent = server.agent("a", text_service("here"));
    assert_eq!(get(agent.address(), "/").text(), "here");
    // Two places for four: the two that waited longest had to go.
    for stream in &mut silent[..2] {
        read_to_close(stream);
    }
    eventually(PATIENCE, "the evicted are counted", || {
        server.metric("silo_handshakes_failed_total", "limit") >= 2.0
    });
}

#[test]
fn nobody_is_heard_out_before_the_welcome() {
    let server = Server::start();
    let mut stream = connect(server.tunnel);
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    // An empty SETTINGS frame, and PING frames without an end (RFC 9113, sections 6.5 and 6.7).
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
    let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let mut sent = 0;
    while sent < 1 << 20 && stream.write_all(&ping).is_ok() {
        sent += ping.len();
    }
    read_to_close(&mut stream);
    eventually(PATIENCE, "the failure is counted", || {
        server.metric("silo_handshakes_failed_total", "protocol") >= 1.0
    });
    let agent = server.agent("a", text_service("here"));
    assert_eq!(get(agent.address(), "/").text(), "here");
}
