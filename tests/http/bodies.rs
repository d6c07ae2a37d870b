//! Bodies and their trailers.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::raw::{
    Recorder, Stand, chunked, latin1, pattern, read_chunk, read_request, send, take, values_of,
};
use crate::common::{Server, read_answer, read_head, service};

const BODY: usize = 5 * 1024 * 1024;

#[test]
fn large_bodies_arrive_whole_both_ways() {
    let stand = Stand::of(Recorder::echoing());
    let body = pattern(BODY);
    for (line, bytes) in [
        (format!("Content-Length: {BODY}"), body.clone()),
        ("Transfer-Encoding: chunked".to_owned(), chunked(&body)),
        ("transfer-encoding:Chunked".to_owned(), chunked(&body)),
    ] {
        let head = format!("PUT /big HTTP/1.1\r\nHost: h\r\n{line}\r\n\r\n");
        let mut visitor = send(stand.agent.address(), head);
        let mut writer = visitor.try_clone().unwrap();
        let sending = thread::spawn(move || writer.write_all(&bytes));
        let answer = read_answer(&mut visitor, false);
        sending.join().unwrap().unwrap();
        assert_eq!(answer.status, 200);
        assert!(answer.body == body, "{line}: the echo differs");
        let received = stand.service.next();
        assert!(received.body == body, "{line}: the body differs");
        // Content-Length stays what it was, and nothing else turns up.
        let length = BODY.to_string();
        let length = line.starts_with("Content").then_some(length.as_str());
        assert_eq!(received.header("content-length"), length.as_slice());
        assert_eq!(answer.header("content-length"), length.as_slice());
    }
    let bytes = 2.0 * 3.0 * BODY as f64;
    let counted = stand.server.metric("silo_body_bytes_in_total", "")
        + stand.server.metric("silo_body_bytes_out_total", "");
    assert_eq!(counted, bytes);
}

#[test]
fn bodies_that_end_with_a_request_of_any_method_arrive() {
    let stand = Stand::of(Recorder::echoing());
    for method in ["GET", "DELETE", "OPTIONS", "PATCH", "REPORT"] {
        for (line, bytes) in [
            ("Content-Length: 5", "hello"),
            ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
            ("Transfer-Encoding: chunked", "0\r\n\r\n"),
        ] {
            let head = format!("{method} / HTTP/1.1\r\nHost: h\r\n{line}\r\n\r\n{bytes}");
            let answer = stand.ask(head);
            assert_eq!(answer.status, 200);
            let expected = if bytes.starts_with('0') { "" } else { "hello" };
            assert_eq!(answer.text(), expected, "{method} {line}");
            assert_eq!(latin1(&stand.service.next().body), expected);
        }
    }
}

#[test]
fn chunk_extensions_end_at_the_server_and_at_the_agent() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
         3;a=b\r\nabc\r\n2 ; x=\"y\"\r\nde\r\n0;last\r\n\r\n",
    ));
    let mut visitor = send(
        stand.agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\
         5;ext=1\r\nhello\r\n1;x\r\n!\r\n0;end=true\r\n\r\n",
    );
    // The service's reader takes no extension.
    assert_eq!(stand.service.next().body, b"hello!");
    // Nor does this one.
    let head = read_head(&mut visitor).unwrap();
    assert_eq!(values_of(&head, "transfer-encoding"), ["chunked"]);
    let mut body = Vec::new();
    while let Some(chunk) = read_chunk(&mut visitor).unwrap() {
        body.extend_from_slice(&chunk);
    }
    assert_eq!(body, b"abcde");
}

#[test]
fn trailers_travel_both_ways() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, X-Late\r\n\r\n\
         3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Late: 2\r\n\r\n",
    ));
    let answer = stand.ask(
        "POST / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Check\r\n\
         Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Check: abc\r\n\r\n",
    );
    let received = stand.service.next();
    assert_eq!(received.header("te"), ["trailers"]);
    assert_eq!(received.header("trailer"), ["X-Check"]);
    assert_eq!(received.body, b"hello");
    assert_eq!(
        latin1(&received.trailers).to_ascii_lowercase(),
        "x-check: abc\r\n"
    );
    assert_eq!(answer.text(), "abc");
    assert_eq!(answer.header("x-sum"), ["1"]);
    assert_eq!(answer.header("x-late"), ["2"]);

    // Trailers without a body before them.
    stand.ask(
        "POST / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Check\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\nX-Check: none\r\n\r\n",
    );
    let received = stand.service.next();
    assert_eq!(
        latin1(&received.trailers).to_ascii_lowercase(),
        "x-check: none\r\n"
    );
}

#[test]
fn an_answer_that_ends_with_its_connection_arrives_whole() {
    let body = pattern(300_000);
    let sent = body.clone();
    let stand = Stand::of(Recorder::with(move |_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: x/y\r\n\r\n");
        let _ = stream.write_all(&sent);
        false
    }));
    let mut visitor = crate::common::connect(stand.agent.address());
    for _ in 0..3 {
        visitor
            .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.status, 200);
        // For the visitor it has an end of its own, so his connection can be kept.
        assert_eq!(answer.header("transfer-encoding"), ["chunked"]);
        assert!(answer.body == body);
    }
}

#[test]
fn an_http_1_0_service_is_understood() {
    let stand = Stand::of(Recorder::with(|request, stream| {
        assert_eq!(request.line(), "GET / HTTP/1.1");
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nold");
        false
    }));
    let answer = stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.head.starts_with(b"HTTP/1.1 200 "));
    assert_eq!(answer.text(), "old");
}

/// Nothing waits for more before it is passed on.
#[test]
fn the_first_event_arrives_within_100_ms() {
    let (sent, at) = crate::common::raw::channel();
    let stand = Stand::of(Recorder::with(move |_, stream| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
        for number in 0..3 {
            let now = Instant::now();
            let event = format!("data: {number}\n\n");
            if stream.write_all(event.as_bytes()).is_err() {
                return false;
            }
            let _ = sent.lock().unwrap().send(now);
            // Nothing follows until the visitor is gone, or has read this one.
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            let _ = stream.read(&mut [0]);
        }
        false
    }));
    // The best of some tries: other programs may keep the machine busy.
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let mut visitor = send(
            stand.agent.address(),
            "GET /events HTTP/1.1\r\nHost: h\r\n\r\n",
        );
        read_head(&mut visitor).unwrap();
        for number in 0..3 {
            let chunk = read_chunk(&mut visitor).unwrap().unwrap();
            let late = Instant::now().saturating_duration_since(take(&at, "the event's time"));
            assert_eq!(latin1(&chunk), format!("data: {number}\n\n"));
            if number == 0 {
                best = best.min(late);
            }
        }
        assert_eq!(read_chunk(&mut visitor).unwrap(), None);
        if best <= Duration::from_millis(100) {
            return;
        }
    }
    panic!("the first event took {best:?}");
}

/// The service has the beginning of an upload while the visitor still holds the rest.
#[test]
fn uploads_stream_too() {
    let (sender, pieces) = crate::common::raw::channel();
    let address = service(move |mut stream| {
        let _ = read_head(&mut stream);
        while let Ok(Some(chunk)) = read_chunk(&mut stream) {
            let _ = sender.lock().unwrap().send(chunk);
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    for piece in ["one", "two", "three"] {
        write!(visitor, "{:x}\r\n{piece}\r\n", piece.len()).unwrap();
        assert_eq!(take(&pieces, "the piece"), piece.as_bytes());
    }
    visitor.write_all(b"0\r\n\r\n").unwrap();
    assert_eq!(read_answer(&mut visitor, false).status, 200);
}

/// Both bodies at once, piece by piece: a request's answer may begin before the request ends.
#[test]
fn both_bodies_flow_at_once() {
    let address = service(|mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        while let Ok(Some(chunk)) = read_chunk(&mut stream) {
            let text = latin1(&chunk).to_uppercase();
            let _ = write!(stream, "{:x}\r\n{text}\r\n", text.len());
        }
        let _ = stream.read_exact(&mut [0; 2]);
        let _ = stream.write_all(b"0\r\n\r\n");
        // The same connection serves the next one.
        while read_request(&mut stream).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext");
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    assert!(
        read_head(&mut visitor)
            .unwrap()
            .starts_with(b"HTTP/1.1 200")
    );
    for piece in ["a", "bc", "def"] {
        write!(visitor, "{:x}\r\n{piece}\r\n", piece.len()).unwrap();
        let chunk = read_chunk(&mut visitor).unwrap().unwrap();
        assert_eq!(latin1(&chunk), piece.to_uppercase());
    }
    visitor.write_all(b"0\r\n\r\n").unwrap();
    assert_eq!(read_chunk(&mut visitor).unwrap(), None);
    // The chunks' end, then another request.
    visitor.read_exact(&mut [0; 2]).unwrap();
    visitor
        .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut visitor, false).text(), "next");
}

/// However the visitor's bytes are cut, the service is told that the body is empty.
#[test]
fn an_empty_body_in_chunks_is_an_empty_body() {
    let stand = Stand::new();
    let head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut visitor = send(stand.agent.address(), format!("{head}0\r\n\r\n"));
    assert_eq!(read_answer(&mut visitor, false).status, 200);
    assert_eq!(stand.service.next().header("content-length"), ["0"]);
}
