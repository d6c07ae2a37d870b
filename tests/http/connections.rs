//! Connections that carry many requests, and those that carry one.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::raw::{
    Recorder, Stand, channel, read_request, read_to_close, send, settles, take,
};
use crate::common::{Answer, Server, connect, read_answer, read_head, service};

/// A service that answers with the target it was asked for.
fn namer() -> Recorder {
    Recorder::with(|request, stream| {
        let line = request.line();
        let target = line.split(' ').nth(1).unwrap();
        let length = target.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{target}"
        )
        .is_ok()
    })
}

#[test]
fn a_connection_carries_many_requests() {
    let stand = Stand::of(namer());
    let mut visitor = connect(stand.agent.address());
    for number in 0..300 {
        write!(visitor, "GET /{number} HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.text(), format!("/{number}"));
    }
    assert_eq!(
        stand.server.metric("silo_connections_accepted_total", ""),
        1.0
    );
    assert_eq!(stand.server.metric("silo_requests_total", ""), 300.0);
    assert_eq!(stand.server.metric("silo_answers_total", "2xx"), 300.0);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let stand = Stand::of(namer());
    let mut requests = String::new();
    for number in 0..200 {
        let body = "b".repeat(number % 7);
        let length = body.len();
        requests += &match number % 3 {
            0 => format!("GET /{number} HTTP/1.1\r\nHost: h\r\n\r\n"),
            1 => format!(
                "POST /{number} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{body}"
            ),
            _ => format!(
                "POST /{number} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\
                 3\r\nabc\r\n0\r\n\r\n"
            ),
        };
    }
    let mut visitor = send(stand.agent.address(), requests);
    for number in 0..200 {
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.text(), format!("/{number}"));
    }
}

#[test]
fn close_is_obeyed() {
    let stand = Stand::of(namer());
    let mut visitor = send(
        stand.agent.address(),
        "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n\
         GET /2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n\
         GET /3 HTTP/1.1\r\nHost: h\r\n\r\n",
    );
    assert_eq!(read_answer(&mut visitor, false).text(), "/1");
    let last = read_answer(&mut visitor, false);
    assert_eq!(last.text(), "/2");
    assert_eq!(last.header("connection"), ["close"]);
    assert_eq!(read_to_close(&mut visitor).0, b"");
    assert_eq!(stand.service.next().line(), "GET /1 HTTP/1.1");
    assert_eq!(stand.service.next().line(), "GET /2 HTTP/1.1");
    assert!(stand.service.is_empty());
}

#[test]
fn an_http_1_0_visitor_gets_what_he_understands() {
    // The service's answer has no length, so the end of the connection ends it.
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    ));
    for head in [
        "GET /old HTTP/1.0\r\n\r\n",
        "GET /old HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
    ] {
        let mut visitor = send(stand.agent.address(), head);
        let head = read_head(&mut visitor).unwrap();
        let answer = Answer {
            status: 200,
            head,
            body: read_to_close(&mut visitor).0,
        };
        assert!(answer.header("transfer-encoding").is_empty());
        assert_eq!(answer.text(), "abcde");
        let received = stand.service.next();
        assert_eq!(received.line(), "GET /old HTTP/1.1");
        assert_eq!(received.header("host").len(), 1);
    }
}

#[test]
fn an_http_1_0_visitor_may_keep_his_connection() {
    let stand = Stand::of(namer());
    let mut visitor = connect(stand.agent.address());
    for number in 0..3 {
        write!(
            visitor,
            "GET /{number} HTTP/1.0\r\nHost: h\r\nConnection: Keep-Alive\r\n\r\n"
        )
        .unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.text(), format!("/{number}"));
        assert_eq!(answer.header("connection"), ["keep-alive"]);
    }
    // And by default he has not asked for it.
    let mut visitor = send(
        stand.agent.address(),
        "POST /one HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi",
    );
    assert_eq!(read_answer(&mut visitor, false).text(), "/one");
    assert_eq!(read_to_close(&mut visitor).0, b"");
}

/// The service closes each connection after its answer, without a word. A request that meets
/// such a connection is sent again on a fresh one.
#[test]
fn a_service_that_closes_idle_connections_costs_no_get() {
    let address = service(|mut stream| {
        if read_request(&mut stream).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let mut visitor = connect(agent.address());
    for round in 0..200 {
        visitor
            .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "ok"),
            "{round}"
        );
    }
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
}

/// What a service sends without being asked is nobody's answer.
#[test]
fn a_stray_answer_reaches_nobody() {
    let (strayed, stray) = channel();
    let address = service(move |mut stream| {
        stream.set_nodelay(true).unwrap();
        while let Ok(request) = read_request(&mut stream) {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            if request.line().contains("stray") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL");
                let _ = strayed.lock().unwrap().send(());
            }
        }
    });
    let server = Server::start();
    let settings = [("local.max_connections", "1")];
    let agent = server.agent_with("a", address, &settings);
    let mut visitor = connect(agent.address());
    for round in 0..100 {
        for target in ["/stray", "/normal"] {
            write!(visitor, "GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
            let answer = read_answer(&mut visitor, false);
            assert_eq!(
                (answer.status, answer.text().as_str()),
                (200, "ok"),
                "{round} {target}"
            );
            if target == "/stray" {
                take(&stray, "the stray answer");
            }
        }
    }
}

/// What the service may have acted upon is sent again only where that does no harm.
#[test]
fn a_request_is_sent_twice_at_most_and_only_if_it_is_idempotent() {
    let (sender, received) = channel();
    let address = service(move |mut stream| {
        // Each request is read and gets no answer.
        if let Ok(request) = read_request(&mut stream) {
            let _ = sender.lock().unwrap().send(request.line());
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    for (request, times) in [
        ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", 2),
        ("DELETE /x HTTP/1.1\r\nHost: h\r\n\r\n", 2),
        ("POST /p HTTP/1.1\r\nHost: h\r\n\r\n", 1),
        ("PATCH /p HTTP/1.1\r\nHost: h\r\n\r\n", 1),
        (
            "PUT /u HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi",
            1,
        ),
        (
            "POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi",
            1,
        ),
    ] {
        let mut visitor = send(agent.address(), request);
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.status, 502, "{request}");
        assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
        for _ in 0..times {
            assert!(request.starts_with(&take(&received, "the request")));
        }
        assert!(received.try_recv().is_err(), "{request}");
    }
}

/// Connections to the service are used again.
#[test]
fn connections_to_the_service_are_kept() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = connections.clone();
    let address = service(move |mut stream| {
        counter.fetch_add(1, Ordering::Relaxed);
        while read_request(&mut stream).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    for _ in 0..50 {
        let mut visitor = send(agent.address(), "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(read_answer(&mut visitor, false).status, 200);
    }
    settles(&server);
    assert!(connections.load(Ordering::Relaxed) <= 2, "{connections:?}");
}
