//! An answer that breaks off must never look complete.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::common::raw::{latin1, pattern, read_chunk, read_to_close, reset, send, settles};
use crate::common::{Agent, Server, read_head, service};

fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> (Server, Agent) {
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_ok() {
            serve(stream);
        }
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    (server, agent)
}

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn half_of_a_content_length() {
    let body = pattern(200_000);
    let half = body[..100_000].to_vec();
    let sent = half.clone();
    let (server, agent) = start(move |mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n");
        let _ = stream.write_all(&sent);
    });
    let mut visitor = send(agent.address(), GET);
    read_head(&mut visitor).unwrap();
    // Exactly what the service sent, and then the end.
    let (body, _) = read_to_close(&mut visitor);
    assert!(body == half, "{} bytes", body.len());
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", "cut_after_head"), 1.0);
}

#[test]
fn half_of_the_chunks() {
    for wrong_end in ["", "5\r\nhel", "zz\r\n", "5\r\nhelloworld\r\n0\r\n\r\n"] {
        let (server, agent) = start(move |mut stream| {
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                 5\r\nhello\r\n6\r\n world\r\n{wrong_end}"
            );
        });
        let mut visitor = send(agent.address(), GET);
        read_head(&mut visitor).unwrap();
        let mut body = Vec::new();
        while body.len() < 11 {
            let chunk = read_chunk(&mut visitor).unwrap();
            body.extend_from_slice(&chunk.expect("not the end"));
        }
        assert!(latin1(&body).starts_with("hello world"));
        let (rest, _) = read_to_close(&mut visitor);
        let rest = latin1(&rest);
        assert!(!rest.contains("0\r\n\r\n"), "{wrong_end:?}: {rest:?}");
        settles(&server);
        assert_eq!(server.metric("silo_failures_total", "cut_after_head"), 1.0);
    }
}

#[test]
fn a_service_that_resets_its_connection() {
    let (server, agent) = start(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        // Once the visitor has that.
        let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(100)));
        let _ = stream.read(&mut [0]);
        reset(stream);
    });
    let mut visitor = send(agent.address(), GET);
    read_head(&mut visitor).unwrap();
    assert_eq!(read_to_close(&mut visitor).0, b"hello");
    settles(&server);
}

/// An answer of unknown length ends for him where his connection ends; so only a reset can tell
/// him that it broke off.
#[test]
fn an_http_1_0_visitor_can_tell_too() {
    let (server, agent) = start(|mut stream| {
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(100)));
        let _ = stream.read(&mut [0]);
    });
    let mut visitor = send(agent.address(), "GET / HTTP/1.0\r\n\r\n");
    read_head(&mut visitor).unwrap();
    let (body, was_reset) = read_to_close(&mut visitor);
    assert_eq!(latin1(&body), "hello");
    assert!(was_reset, "a clean end");
    settles(&server);
}

/// The tunnel is lost in the middle of an answer.
#[test]
fn the_agent_dies() {
    let (server, mut agent) = start(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        let _ = stream.read(&mut [0]);
    });
    let mut visitor = send(agent.address(), GET);
    read_head(&mut visitor).unwrap();
    visitor.read_exact(&mut [0; 5]).unwrap();
    agent.process.kill();
    assert_eq!(read_to_close(&mut visitor).0, b"");
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", "cut_after_head"), 1.0);
}

/// More than was declared is no part of the answer, and of no other one.
#[test]
fn more_than_a_content_length() {
    let (server, agent) = start(|mut stream| {
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\
              Content-Length: 6\r\n\r\nforged",
        );
        let _ = stream.read(&mut [0]);
    });
    let mut visitor = send(agent.address(), GET);
    for _ in 0..3 {
        let answer = crate::common::read_answer(&mut visitor, false);
        assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
        visitor.write_all(GET.as_bytes()).unwrap();
    }
    drop(server);
}
