//! What visitors that speak HTTP/2 get, and what services see of them.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

use crate::client::{Client, read, reason, request, run};
use crate::common::raw::{Recorder, Stand, chunked, pattern, read_request, read_to_close};
use crate::common::{HeldService, PATIENCE, Server, eventually, get, port_range, service};

/// Writes an answer with the request's body in it, in chunks.
fn echo() -> Recorder {
    Recorder::with(|received, stream| {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).is_ok()
            && stream.write_all(&chunked(&received.body)).is_ok()
    })
}

#[test]
fn a_request_arrives_as_it_was_sent() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 201 Made\r\nX-One: 1\r\nX-Two: a\r\nX-Two: b\r\nX-Raw: \u{e9}\r\n\
         Connection: x-hop\r\nX-Hop: gone\r\nContent-Length: 2\r\n\r\nok",
    ));
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        let mut asked = request("PUT", "/a/../b//c%2e?x=%00&y");
        let headers = asked.headers_mut();
        headers.append("x-two", HeaderValue::from_static("a"));
        headers.append("x-two", HeaderValue::from_static("b"));
        headers.append("x-raw", HeaderValue::from_bytes(b"\xff\x80").unwrap());
        headers.append("cookie", HeaderValue::from_static("a=1"));
        headers.append("cookie", HeaderValue::from_static("b=2"));
        headers.append("te", HeaderValue::from_static("trailers"));
        headers.append("x-forwarded-for", HeaderValue::from_static("1.2.3.4"));
        let answer = client.post(asked, "body").await;
        assert_eq!(answer.status, 201);
        assert_eq!(answer.text(), "ok");
        assert_eq!(answer.header("x-one"), "1");
        assert_eq!(answer.headers.get_all("x-two").iter().count(), 2);
        assert_eq!(answer.headers["x-raw"].as_bytes(), "\u{e9}".as_bytes());
        assert_eq!(answer.header("content-length"), "2");
        for hop in ["x-hop", "connection", "transfer-encoding"] {
            assert!(!answer.headers.contains_key(hop), "{hop}");
        }
    });
    let received = stand.service.next();
    assert_eq!(received.line(), "PUT /a/../b//c%2e?x=%00&y HTTP/1.1");
    assert_eq!(received.header("host"), ["host.test"]);
    assert_eq!(received.header("x-forwarded-host"), ["host.test"]);
    assert_eq!(received.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(received.header("x-two"), ["a", "b"]);
    assert_eq!(received.header("x-raw"), ["\u{ff}\u{80}"]);
    assert_eq!(received.header("cookie"), ["a=1; b=2"]);
    assert_eq!(received.header("te"), ["trailers"]);
    assert_eq!(received.header("transfer-encoding"), ["chunked"]);
    assert_eq!(received.body, b"body");
}

#[test]
fn trailers_pass_both_ways() {
    let (sender, received) = crate::common::raw::channel();
    let address = service(move |mut stream| {
        let mut seen = Vec::new();
        let mut byte = [0; 4096];
        use std::io::Read;
        while !seen.windows(5).any(|end| end == b"\r\n0\r\n") || !seen.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(count @ 1..) => seen.extend_from_slice(&byte[..count]),
                _ => return,
            }
        }
        let _ = sender.lock().unwrap().send(seen);
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: grpc-status\r\n\r\n\
              2\r\nok\r\n0\r\ngrpc-status: 7\r\ngrpc-message: caf%C3%A9\r\n\
              Content-Length: 9\r\n\r\n",
        );
    });
    let server = Server::with(port_range(2), &[]);
    let agent = server.agent("a", address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let (answer, mut send) = client.begin(request("POST", "/"), false).await;
        send.send_data(Bytes::from_static(b"hello"), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("5"));
        send.send_trailers(trailers).unwrap();
        let answer = read(answer.await.unwrap()).await;
        assert_eq!(answer.text(), "ok");
        assert_eq!(answer.trailer("grpc-status"), "7");
        assert_eq!(answer.trailer("grpc-message"), "caf%C3%A9");
        assert_eq!(answer.trailer("content-length"), "");
    });
    let seen = crate::common::raw::take(&received, "the request");
    let text = String::from_utf8(seen).unwrap();
    assert!(text.ends_with("0\r\nx-sum: 5\r\n\r\n"), "{text}");
}

#[test]
fn answers_without_a_body_have_none() {
    for (answer, method, status) in [
        ("HTTP/1.1 204 No\r\n\r\n", "GET", 204),
        ("HTTP/1.1 304 No\r\nContent-Length: 7\r\n\r\n", "GET", 304),
        ("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "HEAD", 200),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", 200),
        ("HTTP/1.0 200 OK\r\n\r\n", "GET", 200),
    ] {
        let stand = Stand::of(Recorder::with(move |_, stream| {
            let _ = stream.write_all(answer.as_bytes());
            !answer.starts_with("HTTP/1.0")
        }));
        run(async {
            let mut client = Client::connect(stand.agent.address()).await;
            let (response, _) = client.begin(request(method, "/"), true).await;
            let response = response.await.unwrap();
            // A head that says all there is to say is one frame.
            if answer.starts_with("HTTP/1.1") {
                assert!(response.body().is_end_stream(), "{answer}");
            }
            let got = read(response).await;
            assert_eq!(got.status, status, "{answer}");
            assert_eq!((got.text().as_str(), got.broken), ("", None), "{answer}");
        });
        stand.settles();
    }
}

#[test]
fn many_streams_share_a_connection() {
    let stand = Stand::of(echo());
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        // How many there may be at once is known after this.
        client.ask(request("GET", "/")).await;
        let bodies = (0..199).map(|index| {
            let send = client.send.clone();
            async move {
                let connection = tokio::spawn(std::future::pending());
                let mut client = Client { send, connection };
                let body = pattern(3000 + index * 97);
                let answer = client.post(request("POST", "/"), body.clone()).await;
                let (status, broken) = (answer.status, answer.broken);
                assert!(answer.body == body, "{index} {status} {broken:?}");
            }
        });
        futures_util::future::join_all(bodies).await;
    });
    stand.settles();
    assert_eq!(stand.server.metric("silo_requests_total", ""), 200.0);
}

#[test]
fn a_slow_reader_holds_up_only_his_own_stream() {
    let stand = Stand::of(Recorder::with(|received, stream| {
        let size = match received.line().contains("large") {
            true => 4 << 20,
            false => 2,
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
        stream.write_all(head.as_bytes()).is_ok() && stream.write_all(&pattern(size)).is_ok()
    }));
    run(async {
        let mut builder = h2::client::Builder::new();
        builder.initial_connection_window_size(8 << 20);
        let mut client = Client::with(stand.agent.address(), builder).await;
        let (slow, _) = client.begin(request("GET", "/large"), true).await;
        let slow = slow.await.unwrap();
        for _ in 0..20 {
            assert_eq!(client.ask(request("GET", "/")).await.body, pattern(2));
        }
        let slow = read(slow).await;
        assert!(slow.body == pattern(4 << 20) && slow.broken.is_none());
    });
}

#[test]
fn refused_requests_are_answered_and_the_others_go_on() {
    let stand = Stand::with(
        Recorder::new(),
        &[
            ("http.max_head", "4KiB"),
            ("http.max_request_line", "1KiB"),
            ("http.max_body", "10"),
        ],
        &[],
    );
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        let with = |name: &'static str, value: &str| {
            let mut request = request("GET", "/");
            let value = HeaderValue::from_str(value).unwrap();
            request.headers_mut().append(name, value);
            request
        };
        let mut connect = request("CONNECT", "");
        *connect.uri_mut() = "host.test:80".parse().unwrap();
        let long = "x".repeat(1100);
        let large = "x".repeat(4096);
        for (asked, status, error) in [
            (connect, 405, "bad_request"),
            (request("GET", &format!("/{long}")), 414, "head_too_large"),
            (with("x-large", &large), 431, "head_too_large"),
            (with("host", "other.test"), 400, "bad_request"),
            (with("x-blank", " a"), 400, "bad_request"),
            (request("POST", "/"), 413, "body_too_large"),
        ] {
            let mut asked = asked;
            if status == 413 {
                let length = HeaderValue::from_static("11");
                asked.headers_mut().append("content-length", length);
                let answer = client.post(asked, "12345678901").await;
                assert_eq!((answer.status, answer.header("x-silo-error")), (413, error));
                continue;
            }
            let answer = client.ask(asked).await;
            assert_eq!(
                (answer.status, answer.header("x-silo-error")),
                (status, error)
            );
            assert_eq!(answer.header("content-type"), "application/problem+json");
        }
        // Without a length it is found out on the way.
        let answer = client.post(request("POST", "/"), "12345678901").await;
        assert_eq!(answer.status, 413);
        assert_eq!(client.ask(request("GET", "/last")).await.text(), "ok");
        client.connection.abort();
    });
    // Nothing of the others was a whole request.
    assert_eq!(stand.service.next().line(), "GET /last HTTP/1.1");
}

#[test]
fn a_service_that_is_not_there_is_told_of() {
    let server = Server::with(port_range(2), &[("http.port_lease", "30s")]);
    let agent = server.agent("a", "127.0.0.1:1".parse().unwrap());
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let answer = client.ask(request("GET", "/")).await;
        assert_eq!(answer.status, 502);
        assert_eq!(answer.header("x-silo-error"), "upstream_refused");
        assert!(answer.text().contains("upstream_refused"));
        let address = agent.address();
        drop(agent);
        eventually(PATIENCE, "the agent is gone", || {
            get(address, "/").status == 503
        });
        let answer = client.ask(request("GET", "/")).await;
        assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
        assert_eq!(answer.header("x-silo-error"), "agent_offline");
    });
}

#[test]
fn who_resets_a_stream_cancels_at_the_service() {
    let (sender, gone) = crate::common::raw::channel();
    let (began_sender, began) = crate::common::raw::channel();
    let address = service(move |mut stream| {
        let Ok(request) = read_request(&mut stream) else {
            return;
        };
        if request.line().contains("begun") {
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n");
        }
        let _ = began_sender.lock().unwrap().send(());
        read_to_close(&mut stream);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    let server = Server::with(port_range(2), &[]);
    let agent = server.agent("a", address);
    for path in ["/waiting", "/begun"] {
        let left = run(async {
            let mut client = Client::connect(agent.address()).await;
            let (answer, mut send) = client.begin(request("GET", path), true).await;
            if path == "/begun" {
                let mut answer = answer.await.unwrap().into_body();
                assert_eq!(&answer.data().await.unwrap().unwrap()[..], b"x");
            }
            eventually_async("the request is there", || began.try_recv().is_ok()).await;
            send.send_reset(h2::Reason::CANCEL);
            let left = Instant::now();
            let mut noticed = left;
            let saw = || gone.try_recv().map(|at| noticed = at).is_ok();
            eventually_async("the service sees it", saw).await;
            noticed.saturating_duration_since(left)
        });
        assert!(left < Duration::from_secs(1), "{path}: {left:?}");
    }
    crate::common::raw::settles(&server);
    assert_eq!(server.metric("silo_failures_total", "visitor_left"), 2.0);
}

#[test]
fn an_answer_that_breaks_off_never_ends_cleanly() {
    for (answer, body) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
            "hello",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            "hello",
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ""),
    ] {
        let stand = Stand::of(Recorder::with(move |_, stream| {
            let _ = stream.write_all(answer.as_bytes());
            false
        }));
        run(async {
            let mut client = Client::connect(stand.agent.address()).await;
            let got = client.ask(request("GET", "/")).await;
            assert_eq!((got.status, got.text().as_str()), (200, body), "{answer}");
            assert_eq!(got.broken, Some(h2::Reason::INTERNAL_ERROR), "{answer}");
            // Only the stream is over.
            assert_eq!(client.ask(request("GET", "/")).await.status, 200);
        });
    }
}

#[test]
fn a_lost_tunnel_cuts_the_streams_and_not_the_connection() {
    let held = HeldService::start("late");
    let server = Server::with(port_range(2), &[("http.port_lease", "30s")]);
    let agent = server.agent("a", held.address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let (answer, _) = client.begin(request("GET", "/held"), true).await;
        eventually_async("the exchange is open", || {
            server.metric("silo_exchanges_open", "") == 1.0
        })
        .await;
        drop(agent);
        let answer = read(answer.await.unwrap()).await;
        assert_eq!(answer.status, 502);
        assert_eq!(answer.header("x-silo-error"), "tunnel_lost");
        let answer = client.ask(request("GET", "/")).await;
        assert_eq!(answer.header("x-silo-error"), "agent_offline");
    });
}

/// Waits for something that other threads do, and lets this one's tasks go on.
async fn eventually_async(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn interim_answers_are_passed_on() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n\
         HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ));
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        let (mut answer, _) = client.begin(request("GET", "/"), true).await;
        let mut seen = Vec::new();
        while let Some(interim) = std::future::poll_fn(|cx| answer.poll_informational(cx)).await {
            let interim = interim.unwrap();
            seen.push(interim.status().as_u16());
            assert_eq!(interim.headers()["link"], "</a>");
        }
        assert_eq!(seen, [103]);
        assert_eq!(read(answer.await.unwrap()).await.text(), "ok");
    });
}

#[test]
fn an_early_answer_ends_an_upload() {
    let address = service(|mut stream| {
        let _ = crate::common::read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno");
        read_to_close(&mut stream);
    });
    let server = Server::with(port_range(2), &[]);
    let agent = server.agent("a", address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let answer = client.post(request("POST", "/"), pattern(16 << 20)).await;
        assert_eq!((answer.status, answer.text().as_str()), (413, "no"));
        assert!(matches!(answer.broken, None | Some(h2::Reason::NO_ERROR)));
        let answer = client.post(request("POST", "/"), pattern(16 << 20)).await;
        assert_eq!(answer.status, 413);
    });
    crate::common::raw::settles(&server);
}

#[test]
fn time_limits_hold_for_each_stream() {
    let stand = Stand::with(
        echo(),
        &[
            ("http.body_timeout", "1s"),
            ("http.send_timeout", "1s"),
            ("http.idle_timeout", "3s"),
        ],
        &[],
    );
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        // A body that doesn't go on.
        let (answer, mut send) = client.begin(request("POST", "/"), false).await;
        send.send_data(Bytes::from_static(b"x"), false).unwrap();
        let Err(error) = answer.await else {
            panic!("answered");
        };
        assert_eq!(reason(&error), h2::Reason::CANCEL);
        // An answer that isn't taken.
        let (answer, mut send) = client.begin(request("POST", "/"), false).await;
        let body = Bytes::from(pattern(1 << 20));
        assert!(crate::client::upload(&mut send, body).await);
        send.send_data(Bytes::new(), true).unwrap();
        let mut answer = answer.await.unwrap().into_body();
        let broken = loop {
            // Nothing is released, so that the window stays shut.
            match answer.data().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break reason(&error),
                None => panic!("complete"),
            }
        };
        assert_eq!(broken, h2::Reason::CANCEL);
        // With them goes what they hold of the connection's window.
        drop((answer, send));
        // The connection is good for more, until nothing is asked for.
        let got = client.post(request("POST", "/"), "x").await;
        assert_eq!(got.text(), "x", "{got:?}");
        ends_in_good_order(client).await;
    });
}

#[test]
fn a_drain_lets_streams_finish() {
    let held = HeldService::start("late");
    let mut server = Server::with(port_range(2), &[]);
    let agent = server.agent("a", held.address);
    run(async {
        let mut idle = Client::connect(agent.address()).await;
        assert_eq!(idle.ask(request("GET", "/")).await.status, 200);
        let mut client = Client::connect(agent.address()).await;
        let (answer, _) = client.begin(request("GET", "/held"), true).await;
        eventually_async("the exchange is open", || {
            let total = server.metric("silo_requests_total", "");
            total == 2.0 && server.metric("silo_exchanges_open", "") == 1.0
        })
        .await;
        server.process.signal("TERM");
        // An idle connection is told that its time is over, in good order.
        ends_in_good_order(idle).await;
        held.let_go();
        assert_eq!(read(answer.await.unwrap()).await.text(), "late");
        ends_in_good_order(client).await;
    });
    assert_eq!(server.process.wait().code(), Some(0));
}

/// Whether h2 calls that an error depends on whether it had noticed that nothing is under way.
async fn ends_in_good_order(client: Client) {
    if let Err(error) = client.connection.await.unwrap() {
        assert_eq!(error.reason(), Some(h2::Reason::NO_ERROR), "{error}");
    }
}

#[test]
fn requests_are_logged_and_counted() {
    let stand = Stand::with(Recorder::new(), &[("http.access_log", "stdout")], &[]);
    run(async {
        let mut client = Client::connect(stand.agent.address()).await;
        client.ask(request("GET", "/seen?secret")).await;
    });
    stand.server.process.wait_for(&["/seen", "HTTP/2.0", "200"]);
    stand.settles();
    assert_eq!(stand.server.metric("silo_requests_total", ""), 1.0);
}

/// What only looks like the beginning is what it was before.
#[test]
fn the_preface_may_come_in_pieces() {
    let stand = Stand::new();
    let mut stream: TcpStream = crate::common::connect(stand.agent.address());
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for byte in preface {
        stream.write_all(&[*byte]).unwrap();
    }
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
    let mut frame = [0; 9];
    std::io::Read::read_exact(&mut stream, &mut frame).unwrap();
    assert_eq!(frame[3], 4, "settings");

    let answer = stand.ask("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n");
    assert_eq!(answer.status, 505);
    let answer = stand.ask("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(answer.status, 200);
}
