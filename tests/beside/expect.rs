//! Services that speak before they have heard a request to its end, and what becomes of the
//! connection's next request.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::alone;
use crate::common::bystander::{Bystander, SignedVisitor, sign};
use crate::common::raw::{
    Received, is_silent, latin1, pattern, read_request_body, read_request_head, read_to_close,
    send, settles,
};
use crate::common::{Answer, Server, port_range, read_answer, read_head, service};

/// How a body of five bytes is framed.
const FRAMINGS: [(&str, &str); 2] = [
    ("Content-Length: 5", "hello"),
    ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
];

#[test]
fn whatever_a_service_says_first_the_next_request_is_answered() {
    let _alone = alone();
    let server = Server::with(port_range(4), &[]);
    let timeout = ("local.response_timeout", "1s");
    let agent = server.agent_with("outspoken", outspoken(), &[timeout]);
    let address = agent.address();
    let bystander = Bystander::start(&server, &[&agent.process]);
    for (framing, body) in FRAMINGS {
        let hold_back = |target| {
            let head = format!("POST {target} HTTP/1.1\r\nHost: h\r\n{framing}\r\n");
            send(address, format!("{head}Expect: 100-continue\r\n\r\n"))
        };

        let mut visitor = hold_back("/100");
        let interim = read_head(&mut visitor).unwrap();
        assert_eq!(latin1(&interim), "HTTP/1.1 100 Continue\r\n\r\n");
        visitor.write_all(body.as_bytes()).unwrap();
        assert_echo(&final_answer(&mut visitor));
        goes_on(visitor);

        for (target, status) in [("/417", 417), ("/200", 200)] {
            let mut visitor = hold_back(target);
            let answer = final_answer(&mut visitor);
            assert_eq!((answer.status, answer.text().as_str()), (status, "early"));
            goes_on_or_closes(visitor, &answer, body);
        }

        // He is tired of waiting, and the service has only waited for him.
        let mut visitor = hold_back("/echo");
        assert!(is_silent(&mut visitor, Duration::from_millis(300)));
        visitor.write_all(body.as_bytes()).unwrap();
        assert_echo(&final_answer(&mut visitor));
        goes_on(visitor);

        // The service never answers, whether he waits for its word or not.
        for sends in [true, false] {
            let mut visitor = hold_back("/never");
            let rest = if sends {
                visitor.write_all(body.as_bytes()).unwrap();
                ""
            } else {
                body
            };
            let answer = final_answer(&mut visitor);
            assert_eq!(answer.status, 504);
            assert_eq!(answer.header("x-silo-error"), ["upstream_timeout"]);
            goes_on_or_closes(visitor, &answer, rest);
        }

        let mut visitor = hold_back("/103");
        visitor.write_all(body.as_bytes()).unwrap();
        // The interim ones are passed on or dropped.
        assert_echo(&read_answer(&mut visitor, false));
        goes_on(visitor);
    }
    settles(&server);
    bystander.noticed_nothing();
}

fn assert_echo(answer: &Answer) {
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
    assert_eq!(answer.header("x-final"), ["yes"]);
}

/// Reads an answer before which no interim one comes.
fn final_answer(stream: &mut TcpStream) -> Answer {
    let head = read_head(stream).unwrap();
    assert!(!head.starts_with(b"HTTP/1.1 1"), "{}", latin1(&head));
    read_answer(&mut head.as_slice().chain(stream), false)
}

/// The connection's next request gets its answer.
fn goes_on(visitor: TcpStream) {
    SignedVisitor::on(visitor).unwrap().ask().unwrap();
}

/// The same, after what is left of the body; or else the answer has said that the connection
/// closes, and so it does.
fn goes_on_or_closes(mut visitor: TcpStream, answer: &Answer, rest: &str) {
    if answer.header("connection") == ["close"] {
        assert_eq!(read_to_close(&mut visitor), (Vec::new(), false));
    } else {
        visitor.write_all(rest.as_bytes()).unwrap();
        goes_on(visitor);
    }
}

/// What a visitor sends who is told early on that it is too much.
const LARGE: usize = 32 * 1024 * 1024;

#[test]
fn an_early_413_reaches_its_visitor_however_he_uploads() {
    let _alone = alone();
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("outspoken", outspoken());
    let address = agent.address();
    let bystander = Bystander::start(&server, &[&agent.process]);
    let head = |framing| format!("POST /413 HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n");

    // What is left of a small one is read, and the connection serves the next request.
    let mut visitor = send(address, head("Content-Length: 20000"));
    let answer = final_answer(&mut visitor);
    assert_eq!((answer.status, answer.text().as_str()), (413, "early"));
    assert!(answer.header("connection").is_empty());
    visitor.write_all(&pattern(20_000)).unwrap();
    goes_on(visitor);

    let body = pattern(LARGE);
    for framing in ["Content-Length: 33554432", "Transfer-Encoding: chunked"] {
        let (first, last) = match framing.starts_with('C') {
            true => (String::new(), ""),
            false => (format!("{LARGE:x}\r\n"), "\r\n0\r\n\r\n"),
        };
        // One reads while he writes, and goes on writing whatever he reads.
        let mut visitor = send(address, head(framing) + &first);
        let mut writer = visitor.try_clone().unwrap();
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| writer.write_all(&body));
            let answer = final_answer(&mut visitor);
            assert_eq!((answer.status, answer.text().as_str()), (413, "early"));
            // Then the connection ends: nothing else can come on it.
            assert_eq!(read_to_close(&mut visitor).0, b"");
            let _ = sending.join().unwrap();
        });
        // One reads when he has written everything.
        let mut visitor = send(address, head(framing) + &first);
        visitor.write_all(&body).unwrap();
        visitor.write_all(last.as_bytes()).unwrap();
        let answer = final_answer(&mut visitor);
        assert_eq!((answer.status, answer.text().as_str()), (413, "early"));
        assert_eq!(read_to_close(&mut visitor).0, b"");
    }
    settles(&server);
    bystander.noticed_nothing();
}

/// A service that is told by the target what to say, and when.
fn outspoken() -> SocketAddr {
    service(|mut stream| {
        let _ = stream.set_nodelay(true);
        while let Ok(request) = read_request_head(&mut stream) {
            if !matches!(speak(request, &mut stream), Ok(true)) {
                return;
            }
        }
    })
}

/// Answers one request, and says whether the connection is still good for another one.
fn speak(mut request: Received, stream: &mut TcpStream) -> io::Result<bool> {
    let line = request.line();
    match line.split(' ').nth(1).unwrap_or_default() {
        "/100" => {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            echo(request, stream)
        }
        "/103" => {
            let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n";
            stream.write_all(hints.repeat(3).as_bytes())?;
            echo(request, stream)
        }
        "/echo" => echo(request, stream),
        "/200" => early("200 OK", stream),
        "/413" => early("413 Payload Too Large", stream),
        "/417" => early("417 Expectation Failed", stream),
        "/never" => ignore(stream),
        _ => {
            read_request_body(stream, &mut request)?;
            sign(&request, stream)?;
            Ok(true)
        }
    }
}

fn echo(mut request: Received, stream: &mut TcpStream) -> io::Result<bool> {
    read_request_body(stream, &mut request)?;
    let length = request.body.len();
    let head = format!("HTTP/1.1 200 OK\r\nX-Final: yes\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(&[head.as_bytes(), &request.body].concat())?;
    Ok(true)
}

/// Answers, and goes on reading what nobody wants, as many services do.
fn early(status: &str, stream: &mut TcpStream) -> io::Result<bool> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n");
    stream.write_all(format!("{head}early").as_bytes())?;
    ignore(stream)
}

fn ignore(stream: &mut TcpStream) -> io::Result<bool> {
    io::copy(stream, &mut io::sink())?;
    Ok(false)
}
