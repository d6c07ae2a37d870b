//! A service whose answers have a mebibyte of header lines.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::bystander::{Bystander, SignedVisitor, sign};
use crate::common::raw::{Received, read_request, read_to_close, send, settles};
use crate::common::{Server, pause, port_range, read_answer, read_head, service};
use crate::{Over, alone};

const MIB: usize = 1024 * 1024;

#[test]
fn a_mebibyte_of_header_lines_is_refused_and_nothing_else() {
    let _alone = alone();
    let address = service(|mut stream| {
        let _ = stream.set_nodelay(true);
        while let Ok(request) = read_request(&mut stream) {
            if answer(&request, &mut stream).is_err() {
                return;
            }
        }
    });
    let server = Server::with(port_range(4), &[]);
    let idle = ("local.idle_timeout", "2s");
    let agent = server.agent_with("verbose", address, &[idle]);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        // Somebody else visits the same agent all the while.
        scope.spawn(|| {
            let mut visitor = SignedVisitor::open(agent.address()).unwrap();
            while !over.load(Ordering::Relaxed) {
                visitor.ask().unwrap();
                pause();
            }
        });
        for target in ["/line", "/lines", "/status", "/hints"] {
            let request = |method| format!("{method} {target} HTTP/1.1\r\nHost: h\r\n\r\n");
            let mut visitor = send(agent.address(), request("GET"));
            for _ in 0..3 {
                let answer = read_answer(&mut visitor, false);
                assert_eq!(answer.status, 502, "{target}");
                assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
                assert!(answer.header("connection").is_empty(), "it is kept");
                visitor.write_all(request("GET").as_bytes()).unwrap();
            }
            assert_eq!(read_answer(&mut visitor, false).status, 502);
            visitor.write_all(request("HEAD").as_bytes()).unwrap();
            assert_eq!(read_answer(&mut visitor, true).status, 502);
            SignedVisitor::on(visitor).unwrap().ask().unwrap();
        }
        // Trailers come too late for another answer: it ends as one that broke off.
        let mut visitor = send(agent.address(), "GET /trailers HTTP/1.1\r\nHost: h\r\n\r\n");
        let head = read_head(&mut visitor).unwrap();
        assert!(head.starts_with(b"HTTP/1.1 200 "));
        assert_eq!(read_to_close(&mut visitor).0, b"5\r\nhello\r\n");
    });
    assert_eq!(agent.process.count(&["disconnected"]), 0);
    assert_eq!(server.metric("silo_panics_total", ""), 0.0);
    settles(&server);
    bystander.noticed_nothing();
}

fn answer(request: &Received, stream: &mut TcpStream) -> io::Result<()> {
    let line = request.line();
    let length = "Content-Length: 0\r\n\r\n";
    let many = || format!("X-Line: {}\r\n", "x".repeat(90)).repeat(MIB / 100);
    let head = match line.split(' ').nth(1).unwrap_or_default() {
        "/line" => format!("200 OK\r\nX-Line: {}\r\n{length}", "x".repeat(MIB)),
        "/lines" => format!("200 OK\r\n{}{length}", many()),
        "/status" => format!("200 {}\r\n{length}", "O".repeat(MIB)),
        "/hints" => format!(
            "103 Early Hints\r\n{}\r\nHTTP/1.1 200 OK\r\n{length}",
            many()
        ),
        "/trailers" => format!(
            "200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n{}\r\n",
            many()
        ),
        _ => return sign(request, stream),
    };
    stream.write_all(format!("HTTP/1.1 {head}").as_bytes())
}
