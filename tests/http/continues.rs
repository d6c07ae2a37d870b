//! Expect: 100-continue, and other interim answers.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use crate::common::raw::{
    Received, Recorder, Stand, channel, is_silent, latin1, read_request_body, read_request_head,
    send, take,
};
use crate::common::{Server, read_answer, read_head, service};

const HEAD: &str =
    "POST /up HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
const CHUNKED_HEAD: &str =
    "POST /up HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n";

/// A service that hands each connection to `serve` with the head that came on it.
fn serving(serve: impl Fn(Received, TcpStream) + Send + Sync + 'static) -> std::net::SocketAddr {
    service(move |mut stream| {
        stream.set_nodelay(true).unwrap();
        if let Ok(request) = read_request_head(&mut stream) {
            serve(request, stream);
        }
    })
}

fn answer_with_body(request: &mut Received, stream: &mut TcpStream) {
    read_request_body(stream, request).unwrap();
    let length = request.body.len();
    // It does close: a POST sent on it just then would be answered by 502.
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&request.body).unwrap();
}

#[test]
fn the_service_says_when_to_go_on() {
    let (came, head_came) = channel();
    let (go, may_go) = channel::<()>();
    let may_go = std::sync::Mutex::new(may_go);
    let address = serving(move |mut request, mut stream| {
        let _ = came.lock().unwrap().send(request.header("expect"));
        take(&may_go.lock().unwrap(), "leave to go on");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        answer_with_body(&mut request, &mut stream);
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    for (head, body) in [(HEAD, "hello"), (CHUNKED_HEAD, "5\r\nhello\r\n0\r\n\r\n")] {
        let mut visitor = send(agent.address(), head);
        assert_eq!(take(&head_came, "the head"), ["100-continue"]);
        // It isn't for anybody on the way to say it.
        assert!(is_silent(&mut visitor, Duration::from_millis(300)));
        go.lock().unwrap().send(()).unwrap();
        let interim = read_head(&mut visitor).unwrap();
        assert_eq!(latin1(&interim), "HTTP/1.1 100 Continue\r\n\r\n");
        visitor.write_all(body.as_bytes()).unwrap();
        assert_eq!(read_answer(&mut visitor, false).text(), "hello");
    }
}

#[test]
fn the_service_may_refuse_the_body() {
    let address = serving(|_, mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno");
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let mut visitor = send(agent.address(), HEAD);
    // No 100 before it: read_answer would pass over that.
    let head = read_head(&mut visitor).unwrap();
    assert!(head.starts_with(b"HTTP/1.1 417 "), "{}", latin1(&head));
}

#[test]
fn the_service_may_answer_without_the_body() {
    let address = serving(|_, mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly");
        let _ = read_head(&mut stream);
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let mut visitor = send(agent.address(), HEAD);
    let head = read_head(&mut visitor).unwrap();
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", latin1(&head));
    let mut body = [0; 5];
    std::io::Read::read_exact(&mut visitor, &mut body).unwrap();
    assert_eq!(&body, b"early");
}

/// RFC 9110, section 10.1.1: a visitor shouldn't wait for ever, and many services never say 100.
#[test]
fn a_visitor_who_is_tired_of_waiting_sends() {
    let address = serving(|mut request, mut stream| answer_with_body(&mut request, &mut stream));
    let server = Server::start();
    let agent = server.agent("a", address);
    for (head, body) in [(HEAD, "hello"), (CHUNKED_HEAD, "5\r\nhello\r\n0\r\n\r\n")] {
        let mut visitor = send(agent.address(), head);
        assert!(is_silent(&mut visitor, Duration::from_millis(300)));
        visitor.write_all(body.as_bytes()).unwrap();
        assert_eq!(read_answer(&mut visitor, false).text(), "hello");
    }
}

/// Neither does a visitor have to wait at all.
#[test]
fn a_visitor_may_send_at_once() {
    let address = serving(|mut request, mut stream| answer_with_body(&mut request, &mut stream));
    let server = Server::start();
    let agent = server.agent_with("a", address, &[("local.response_timeout", "5s")]);
    for (head, body) in [(HEAD, "hello"), (CHUNKED_HEAD, "5\r\nhello\r\n0\r\n\r\n")] {
        let mut visitor = send(agent.address(), format!("{head}{body}"));
        let answer = read_answer(&mut visitor, false);
        assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
    }
}

#[test]
fn an_http_1_0_visitor_is_never_told_to_go_on() {
    let address = serving(|mut request, mut stream| {
        // In HTTP/1.0 it means nothing, so nobody is told.
        assert!(request.header("expect").is_empty());
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
        answer_with_body(&mut request, &mut stream);
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let head = HEAD.replace("HTTP/1.1", "HTTP/1.0");
    let mut visitor = send(agent.address(), format!("{head}hello"));
    let head = read_head(&mut visitor).unwrap();
    assert!(latin1(&head).contains(" 200 "), "{}", latin1(&head));
}

/// The word to go on isn't lost behind what else the service has to say.
#[test]
fn a_100_arrives_whatever_follows_it() {
    let long = format!("X-Long: {}\r\n", "x".repeat(10_000));
    for interim in [
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
        &format!("HTTP/1.1 100 Continue\r\n{long}\r\n"),
    ] {
        let said = interim.to_owned();
        let address = serving(move |mut request, mut stream| {
            stream.write_all(said.as_bytes()).unwrap();
            answer_with_body(&mut request, &mut stream);
        });
        let server = Server::start();
        let agent = server.agent("a", address);
        let mut visitor = send(agent.address(), HEAD);
        while !read_head(&mut visitor)
            .unwrap()
            .starts_with(b"HTTP/1.1 100 ")
        {}
        visitor.write_all(b"hello").unwrap();
        let mut head = read_head(&mut visitor).unwrap();
        if head.starts_with(b"HTTP/1.1 103 ") {
            head = read_head(&mut visitor).unwrap();
        }
        assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", latin1(&head));
    }
}

/// A visitor who leaves while everybody waits is noticed all the same.
#[test]
fn a_visitor_who_leaves_instead_of_going_on_is_noticed() {
    let (begun, started) = channel();
    let (gone, ended) = channel();
    let address = serving(move |_, mut stream| {
        let _ = begun.lock().unwrap().send(());
        let rest = crate::common::raw::read_to_close(&mut stream).0;
        let _ = gone.lock().unwrap().send(rest);
    });
    let server = Server::start();
    let agent = server.agent("a", address);
    let visitor = send(agent.address(), HEAD);
    take(&started, "the head at the service");
    drop(visitor);
    assert_eq!(take(&ended, "the close at the service"), b"");
    crate::common::raw::settles(&server);
}

#[test]
fn interim_answers_leave_the_final_one_alone() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n\
         HTTP/1.1 102 Processing\r\n\r\n\
         HTTP/1.1 103 Early Hints\r\nLink: </b.css>; rel=preload\r\n\r\n\
         HTTP/1.1 200 OK\r\nX-Final: yes\r\nContent-Length: 2\r\n\r\nok",
    ));
    for _ in 0..2 {
        // read_answer passes over interim answers, if any come.
        let answer = stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
        assert_eq!(answer.header("x-final"), ["yes"]);
        assert!(answer.header("link").is_empty());
    }
}

/// A 100 that nobody asked for is the service's mistake and nobody's trouble.
#[test]
fn a_needless_100_is_passed_over() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ));
    let mut visitor = send(
        stand.agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi",
    );
    let head = read_head(&mut visitor).unwrap();
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", latin1(&head));
}
