//! Services that break off: in the middle of an answer, and between two.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::Response;

use crate::alone;
use crate::client::{Client, request, run, upload};
use crate::common::bystander::Bystander;
use crate::common::raw::{pattern, read_chunk, read_to_close, send, settles};
use crate::common::{Agent, Process, Server, port_range, read_head};

/// What there is of an answer before its service is gone, and what it should have been.
const HALF: usize = 100_000;
const WHOLE: usize = 200_000;

/// How an answer's end would have been told.
#[derive(Clone, Copy, PartialEq)]
enum Framing {
    Length,
    Chunks,
    Stream,
}

impl Framing {
    fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Chunks => "chunks",
            Self::Stream => "stream",
        }
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";

/// A service and its agent, on the case's server.
struct Doomed {
    framing: Framing,
    service: Process,
    agent: Agent,
}

impl Doomed {
    fn start(server: &Server, id: &str, framing: Framing) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let test = "broken::half_of_an_answer";
        command.args(["--exact", test, "--ignored", "--nocapture"]);
        let service = Process::start_command(id, &mut command, &[(HALF_SERVICE, framing.name())]);
        let line = service.wait_for(&["listens on "]);
        let address = line.split_once("listens on ").unwrap().1.parse().unwrap();
        let protocol = if framing == Framing::Stream {
            "h2c"
        } else {
            "http1"
        };
        let agent = server.agent_with(id, address, &[("local.protocol", protocol)]);
        Self {
            framing,
            service,
            agent,
        }
    }
}

/// How the processes are told what they are.
const HALF_SERVICE: &str = "SILO_TEST_HALF_SERVICE";

#[test]
#[ignore = "not a test of its own: a service of others, in a process that can be killed"]
fn half_of_an_answer() {
    let Some(framing) = std::env::var_os(HALF_SERVICE) else {
        return;
    };
    let framing = [Framing::Length, Framing::Chunks, Framing::Stream]
        .into_iter()
        .find(|one| framing == one.name())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("listens on {}", listener.local_addr().unwrap());
    for stream in listener.incoming().map_while(Result::ok) {
        std::thread::spawn(move || match framing {
            Framing::Stream => run(half_of_streams(stream)),
            _ => half_of(framing, stream),
        });
    }
}

fn half_of(framing: Framing, mut stream: TcpStream) {
    let half = pattern(HALF);
    if read_head(&mut stream).is_err() {
        return;
    }
    let sent = if framing == Framing::Length {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {WHOLE}\r\n\r\n");
        [head.into_bytes(), half].concat()
    } else {
        let mut sent = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for chunk in half.chunks(9_973) {
            write!(sent, "{:x}\r\n", chunk.len()).unwrap();
            sent.extend_from_slice(chunk);
            sent.extend_from_slice(b"\r\n");
        }
        sent
    };
    stream.write_all(&sent).unwrap();
    println!("half is sent");
    let _ = stream.read(&mut [0]);
}

async fn half_of_streams(stream: TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let mut connection = h2::server::handshake(stream).await.unwrap();
    let mut kept = Vec::new();
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        kept.push(tokio::spawn(async move {
            upload(&mut body, Bytes::from(pattern(HALF))).await;
            // The stream stays open.
            std::future::pending::<()>().await;
        }));
    }
}

/// Somebody who reads an answer as far as it comes.
fn read_half(framing: Framing, visitor: &mut TcpStream) {
    let head = read_head(visitor).unwrap();
    assert!(head.starts_with(b"HTTP/1.1 200 "));
    let mut body = vec![0; HALF];
    if framing == Framing::Length {
        visitor.read_exact(&mut body).unwrap();
    } else {
        body.clear();
        while body.len() < HALF {
            body.extend(read_chunk(visitor).unwrap().expect("not the end"));
        }
    }
    assert!(body == pattern(HALF), "other bytes");
}

async fn read_half_of_stream(answer: Response<RecvStream>) -> RecvStream {
    assert_eq!(answer.status(), 200);
    let mut body = answer.into_body();
    let mut read = Vec::new();
    while read.len() < HALF {
        let data = body.data().await.expect("not the end").unwrap();
        let _ = body.flow_control().release_capacity(data.len());
        read.extend_from_slice(&data);
    }
    assert!(read == pattern(HALF), "other bytes");
    body
}

/// His service is killed when both visitors have read what there is.
fn dies_while_they_wait(doomed: &mut Doomed) {
    let address = doomed.agent.address();
    let mut visitor = send(address, GET);
    read_half(doomed.framing, &mut visitor);
    run(async {
        let mut client = Client::connect(address).await;
        let (answer, _) = client.begin(request("GET", "/"), true).await;
        let mut body = read_half_of_stream(answer.await.unwrap()).await;
        doomed.service.kill();
        assert_reset(&mut body).await;
        // The connection goes on; there is only nobody to ask.
        let next = client.ask(request("GET", "/")).await;
        assert_eq!(next.header("x-silo-error"), "upstream_refused");
    });
    // Not a byte more, and in particular no last chunk.
    assert_eq!(read_to_close(&mut visitor).0, b"");
}

async fn assert_reset(body: &mut RecvStream) {
    let end = body.data().await.expect("no clean end").unwrap_err();
    assert!(end.is_reset() && end.is_remote(), "{end}");
    assert_eq!(end.reason(), Some(Reason::INTERNAL_ERROR));
}

/// It is killed as soon as it has sent, and they read when it is gone.
fn dies_before_they_read(doomed: &mut Doomed) {
    let address = doomed.agent.address();
    let mut visitor = send(address, GET);
    run(async {
        let mut client = Client::connect(address).await;
        let (answer, _) = client.begin(request("GET", "/"), true).await;
        let answer = answer.await.unwrap();
        // The visitor's window is smaller than the half, so a part of it waits on the way.
        doomed.service.wait_for_nth(2, &["half is sent"]);
        doomed.service.kill();
        assert_reset(&mut read_half_of_stream(answer).await).await;
    });
    read_half(doomed.framing, &mut visitor);
    assert_eq!(read_to_close(&mut visitor).0, b"");
}

#[test]
fn a_service_that_is_killed_midway_gives_exactly_its_half() {
    let _alone = alone();
    let server = Server::with(port_range(10), &[]);
    let mut all: Vec<Doomed> = [
        ("length-1", Framing::Length),
        ("chunks-1", Framing::Chunks),
        ("stream-1", Framing::Stream),
        ("length-2", Framing::Length),
        ("chunks-2", Framing::Chunks),
    ]
    .map(|(id, framing)| Doomed::start(&server, id, framing))
    .into();
    let agents: Vec<&Process> = all.iter().map(|one| &one.agent.process).collect();
    let bystander = Bystander::start(&server, &agents);
    for doomed in &mut all[..3] {
        dies_while_they_wait(doomed);
    }
    for doomed in &mut all[3..] {
        dies_before_they_read(doomed);
    }
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", "cut_after_head"), 10.0);
    bystander.noticed_nothing();
}
