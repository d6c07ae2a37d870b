//! Connections that go on with another protocol, such as WebSocket: through real processes, seen
//! from both ends.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;
#[path = "common/upgrade.rs"]
#[allow(dead_code, reason = "the tests beside a bystander use the rest of it")]
mod upgrade;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use common::raw::{
    Received, Recorder, Stand, channel, is_silent, pattern, read_request, read_to_close, reset,
    send, settles, take, values_of,
};
use common::{
    Agent, PATIENCE, Server, connect, eventually, get, pause, port_range, read_answer, read_head,
    service, text_service,
};
use silo_proxy::head::{LinesBuilder, RequestHead, ResponseHead};
use silo_proxy::link::Tunnel;
use silo_proxy::mux;
use silo_proxy::wire::{AgentMessage, Frames, Hello, ServerMessage, VERSION};
use tungstenite::protocol::frame::coding::{Data, OpCode};
use tungstenite::protocol::frame::{Frame, FrameHeader};
use tungstenite::{Message, WebSocket};
use upgrade::{
    ASK, SWITCH, agreeing, echo, echo_of, read_exactly, start, tiny_frames, upgraded,
    websocket_echo,
};

/// How soon a leave has to be seen.
const SOON: Duration = Duration::from_secs(1);

fn start_with(
    service: SocketAddr,
    server: &[(&str, &str)],
    agent: &[(&str, &str)],
) -> (Server, Agent) {
    let server = Server::with(port_range(4), server);
    let agent = server.agent_with("a", service, agent);
    (server, agent)
}

#[test]
fn bytes_pass_both_ways_after_the_101() {
    let (sender, heads) = channel();
    let address = service(move |mut stream| {
        let head = read_head(&mut stream).unwrap();
        let _ = sender.lock().unwrap().send(head);
        // The first bytes of the protocol come with the 101.
        stream
            .write_all(format!("{SWITCH}hello").as_bytes())
            .unwrap();
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..count]).unwrap();
        }
    });
    let (server, agent) = start(address);
    let mut visitor = send(
        agent.address(),
        "GET /chat?x HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade, X-Hop\r\n\
         Upgrade: other/2, echo\r\nX-Hop: 1\r\nSec-WebSocket-Key: k\r\n\r\n",
    );
    let head = read_head(&mut visitor).unwrap();
    let value = |name| values_of(&head, name);
    assert!(head.starts_with(b"HTTP/1.1 101 Switching Protocols\r\n"));
    assert_eq!(value("connection"), ["upgrade"]);
    assert_eq!(value("upgrade"), ["echo"]);
    assert_eq!(value("x-protocol"), ["7"]);
    for name in ["keep-alive", "content-length", "transfer-encoding"] {
        assert!(value(name).is_empty(), "{name}");
    }
    assert_eq!(read_exactly(&mut visitor, 5), b"hello");

    let head = take(&heads, "a request at the service");
    let value = |name| values_of(&head, name);
    assert!(head.starts_with(b"GET /chat?x HTTP/1.1\r\n"));
    assert_eq!(value("connection"), ["upgrade"]);
    assert_eq!(value("upgrade"), ["other/2, echo"]);
    assert_eq!(value("sec-websocket-key"), ["k"]);
    assert_eq!(value("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(value("x-forwarded-host"), ["h"]);
    for name in ["x-hop", "keep-alive", "content-length", "transfer-encoding"] {
        assert!(value(name).is_empty(), "{name}");
    }

    for text in ["a", "bc", "GET / HTTP/1.1\r\n\r\n"] {
        visitor.write_all(text.as_bytes()).unwrap();
        assert_eq!(read_exactly(&mut visitor, text.len()), text.as_bytes());
    }
    assert_eq!(server.metric("silo_exchanges_open", ""), 1.0);
    assert_eq!(server.metric("silo_answers_total", "1xx"), 1.0);
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_close(&mut visitor), (Vec::new(), false));
    settles(&server);
    assert_eq!(server.metric("silo_body_bytes_in_total", ""), 21.0);
    assert_eq!(server.metric("silo_body_bytes_out_total", ""), 26.0);
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
}

#[test]
fn a_refused_upgrade_is_an_answer_before_the_next_request() {
    let stand = Stand::of(Recorder::with(|request, stream| {
        let answer: &[u8] = match request.line().as_str() {
            "GET /chat HTTP/1.1" => {
                b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\n\
                  Connection: Upgrade\r\nContent-Length: 2\r\n\r\nno"
            }
            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext",
        };
        stream.write_all(answer).is_ok()
    }));
    let mut visitor = send(stand.agent.address(), ASK);
    for round in 0..3 {
        let answer = read_answer(&mut visitor, false);
        assert_eq!((answer.status, answer.text()), (426, "no".into()));
        assert_eq!(answer.header("upgrade"), ["websocket"]);
        assert_eq!(answer.header("connection"), ["upgrade"]);
        assert_eq!(stand.service.next().header("upgrade"), ["echo"]);
        // The first time on its own, then in one piece with the next upgrade.
        let again = if round < 2 { ASK } else { "" };
        visitor
            .write_all(format!("GET /next HTTP/1.1\r\nHost: h\r\n\r\n{again}").as_bytes())
            .unwrap();
        assert_eq!(read_answer(&mut visitor, false).text(), "next");
        let next = stand.service.next();
        assert_eq!(next.line(), "GET /next HTTP/1.1");
        assert!(next.header("upgrade").is_empty());
    }
    stand.settles();
}

/// A service that reports everything it gets before it has agreed, and decides when it is told.
struct Undecided {
    address: SocketAddr,
    asked: Receiver<()>,
    decision: std::sync::mpsc::Sender<&'static str>,
    /// What came behind the head before the decision, and behind that up to the end.
    got: Receiver<(bool, Vec<u8>)>,
}

impl Undecided {
    fn start() -> Self {
        let (ask, asked) = channel();
        let (decision, decided) = std::sync::mpsc::channel::<&str>();
        let decided = Mutex::new(decided);
        let (give, got) = channel();
        let address = service(move |mut stream| {
            let _ = read_head(&mut stream).unwrap();
            let _ = ask.lock().unwrap().send(());
            let answer = decided.lock().unwrap().recv().unwrap();
            let early = !is_silent(&mut stream, Duration::from_millis(200));
            stream.write_all(answer.as_bytes()).unwrap();
            let (bytes, _) = read_to_close(&mut stream);
            let _ = give.lock().unwrap().send((early, bytes));
        });
        Self {
            address,
            asked,
            decision,
            got,
        }
    }
}

#[test]
fn early_bytes_wait_for_the_101() {
    let service = Undecided::start();
    let (server, agent) = start(service.address);
    // More than is read ahead.
    let early = pattern(300_000);
    let mut visitor = send(agent.address(), ASK);
    let mut writer = visitor.try_clone().unwrap();
    let bytes = early.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    take(&service.asked, "an upgrade at the service");
    service.decision.send(SWITCH).unwrap();
    assert!(
        read_head(&mut visitor)
            .unwrap()
            .starts_with(b"HTTP/1.1 101 ")
    );
    writing.join().unwrap();
    let (came_early, bytes) = take(&service.got, "the service's bytes");
    assert!(!came_early);
    assert!(bytes == early);
    settles(&server);
}

#[test]
fn early_bytes_never_reach_a_service_that_refuses() {
    for (answer, status) in [
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 403),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
        // Nor one that agrees to what nobody has offered.
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n",
            502,
        ),
        ("HTTP/1.1 101 Switching Protocols\r\n\r\n", 502),
    ] {
        let service = Undecided::start();
        let (server, agent) = start_with(
            service.address,
            &[],
            // So that the connection ends for the service to report.
            &[("local.idle_timeout", "100ms")],
        );
        let mut visitor = send(agent.address(), format!("{ASK}\x01\x05bytes of a protocol"));
        take(&service.asked, "an upgrade at the service");
        service.decision.send(answer).unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.status, status);
        if status == 502 {
            assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
        }
        // What is no request is refused as such.
        assert_eq!(read_answer(&mut visitor, false).status, 400);
        let (came_early, bytes) = take(&service.got, "the service's bytes");
        assert!(!came_early);
        assert_eq!(bytes, b"", "{status}");
        settles(&server);
    }
}

#[test]
fn a_body_and_an_old_version_rule_an_upgrade_out() {
    let stand = Stand::new();
    for request in [
        "POST / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\
         Content-Length: 2\r\n\r\nhi",
        "POST / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\
         Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n",
    ] {
        assert_eq!(stand.ask(request).status, 200);
        let received: Received = stand.service.next();
        assert!(received.header("upgrade").is_empty(), "{request}");
        assert!(received.header("connection").is_empty(), "{request}");
    }
}

#[test]
fn the_visitor_may_end_his_direction_first() {
    let (sender, got) = channel();
    let address = agreeing(move |mut stream| {
        let (bytes, was_reset) = read_to_close(&mut stream);
        let _ = sender.lock().unwrap().send((bytes, was_reset));
        for _ in 0..20 {
            stream.write_all(&pattern(100_000)).unwrap();
        }
    });
    let (server, agent) = start(address);
    let mut visitor = upgraded(&agent);
    visitor.write_all(b"all I have to say").unwrap();
    visitor.shutdown(Shutdown::Write).unwrap();
    let got = take(&got, "the end of the visitor's direction");
    assert_eq!(got, (b"all I have to say".to_vec(), false));
    let (bytes, was_reset) = read_to_close(&mut visitor);
    assert!(bytes == pattern(100_000).repeat(20) && !was_reset);
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
}

#[test]
fn the_service_may_end_its_direction_first() {
    let (sender, got) = channel();
    let address = agreeing(move |mut stream| {
        stream.write_all(b"all I have to say").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = sender.lock().unwrap().send(read_to_close(&mut stream));
    });
    let (server, agent) = start(address);
    let mut visitor = upgraded(&agent);
    assert_eq!(
        read_to_close(&mut visitor),
        (b"all I have to say".to_vec(), false)
    );
    for _ in 0..20 {
        visitor.write_all(&pattern(100_000)).unwrap();
    }
    visitor.shutdown(Shutdown::Write).unwrap();
    let (bytes, was_reset) = take(&got, "the end of the visitor's direction");
    assert!(bytes == pattern(100_000).repeat(20) && !was_reset);
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
}

/// To end one's direction and to close the connection look the same until something is sent.
#[test]
fn a_visitor_who_goes_on_after_the_service_has_closed_is_told() {
    let address = agreeing(|mut stream| {
        stream.write_all(&pattern(200_000)).unwrap();
    });
    let (server, agent) = start(address);
    let mut visitor = upgraded(&agent);
    let (bytes, was_reset) = read_to_close(&mut visitor);
    assert!(bytes == pattern(200_000) && !was_reset);
    eventually(PATIENCE, "nothing more is taken", || {
        pause();
        visitor.write_all(b"too late").is_err()
    });
    settles(&server);
}

/// Does something that the other end has to see soon. Other programs may keep the machine busy:
/// the best of three counts.
fn noticed_soon(server: &Server, gone: &Receiver<Instant>, mut leave: impl FnMut() -> Instant) {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let left = leave();
        let seen = take(gone, "the close at the other end");
        best = best.min(seen.saturating_duration_since(left));
        settles(server);
        if best <= SOON {
            return;
        }
    }
    panic!("it was seen after {best:?}");
}

#[test]
fn a_visitor_who_vanishes_is_seen_by_the_service() {
    let (sender, gone) = channel();
    let address = agreeing(move |mut stream| {
        let _ = read_to_close(&mut stream);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    let (server, agent) = start(address);
    for ends_by_reset in [false, true] {
        noticed_soon(&server, &gone, || {
            let mut visitor = upgraded(&agent);
            visitor.write_all(b"x").unwrap();
            if ends_by_reset {
                reset(visitor);
            }
            Instant::now()
        });
    }
    assert!(server.metric("silo_failures_total", "visitor_left") >= 1.0);
}

/// Also while nothing of his is read, because everything on the way is full; and while nothing is
/// expected of him any more.
#[test]
fn a_visitor_who_vanishes_is_seen_whatever_he_was_doing() {
    let (sender, gone) = channel();
    let address = agreeing(move |mut stream| {
        // It reads nothing, but sees a reset when it writes.
        while stream.write_all(b"x").is_ok() {
            pause();
        }
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    let (server, agent) = start(address);
    noticed_soon(&server, &gone, || {
        let visitor = upgraded(&agent);
        visitor
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let full = (&visitor).write_all(&vec![0; 64 << 20]).unwrap_err();
        assert!(matches!(
            full.kind(),
            ErrorKind::WouldBlock | ErrorKind::TimedOut
        ));
        reset(visitor);
        Instant::now()
    });
    noticed_soon(&server, &gone, || {
        let visitor = upgraded(&agent);
        visitor.shutdown(Shutdown::Write).unwrap();
        reset(visitor);
        Instant::now()
    });
}

#[test]
fn a_service_that_vanishes_is_seen_by_the_visitor() {
    let address = agreeing(|mut stream| {
        let mut word = [0; 5];
        stream.read_exact(&mut word).unwrap();
        if &word == b"reset" {
            reset(stream);
        }
    });
    let (server, agent) = start(address);
    for word in ["close", "reset"] {
        let (sender, gone) = channel();
        noticed_soon(&server, &gone, || {
            let mut visitor = upgraded(&agent);
            let left = Instant::now();
            visitor.write_all(word.as_bytes()).unwrap();
            let (bytes, was_reset) = read_to_close(&mut visitor);
            sender.lock().unwrap().send(Instant::now()).unwrap();
            assert_eq!((bytes, was_reset), (Vec::new(), word == "reset"));
            left
        });
    }
    assert!(server.metric("silo_failures_total", "cut_after_head") >= 1.0);
}

#[test]
fn no_limit_of_time_holds_after_the_101() {
    let times = [
        ("http.idle_timeout", "500ms"),
        ("http.body_timeout", "500ms"),
        ("http.head_timeout", "500ms"),
        ("http.send_timeout", "500ms"),
    ];
    let agent = [
        ("local.response_timeout", "300ms"),
        ("local.idle_timeout", "300ms"),
    ];
    let (_server, agent) = start_with(echo(), &times, &agent);
    let mut visitor = upgraded(&agent);
    for _ in 0..2 {
        assert!(is_silent(&mut visitor, Duration::from_secs(3)));
        visitor.write_all(b"still here").unwrap();
        assert_eq!(read_exactly(&mut visitor, 10), b"still here");
    }
    // Nor is a body's size limited: it is none.
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_close(&mut visitor), (Vec::new(), false));
}

#[test]
fn a_visitor_who_takes_nothing_is_cut_all_the_same() {
    let (sender, gone) = channel();
    let address = agreeing(move |mut stream| {
        while stream.write_all(&[0; 64 * 1024]).is_ok() {}
        let _ = sender.lock().unwrap().send(());
    });
    let (server, agent) = start_with(address, &[("http.send_timeout", "500ms")], &[]);
    let visitor = upgraded(&agent);
    take(&gone, "the end at the service");
    settles(&server);
    drop(visitor);
    assert_eq!(server.metric("silo_failures_total", "visitor_left"), 1.0);
}

#[test]
fn only_what_the_service_takes_is_taken_of_the_visitor() {
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let (sender, got) = channel();
    let address = agreeing(move |mut stream| {
        gate.lock().unwrap().recv().unwrap();
        let _ = sender.lock().unwrap().send(read_to_close(&mut stream).0);
    });
    let (server, agent) = start(address);
    let visitor = upgraded(&agent);
    let bytes = pattern(32 << 20);
    let mut writer = visitor.try_clone().unwrap();
    let all = bytes.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&all).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut before = -1.0;
    eventually(PATIENCE, "everything is full", || {
        let now = server.metric("silo_body_bytes_in_total", "");
        let stands = now > 0.0 && now == before;
        before = now;
        (0..40).for_each(|_| pause());
        stands
    });
    assert!(before < (8 << 20) as f64, "{before}");
    // A bystander isn't in its way.
    drop(upgraded(&agent));
    open.send(()).unwrap();
    open.send(()).unwrap();
    writing.join().unwrap();
    let first = take(&got, "the service's bytes");
    let second = take(&got, "the bystander's end");
    assert!([first, second].contains(&bytes));
}

#[test]
fn a_drain_of_the_server_leaves_them_its_grace() {
    let (mut server, agent) = start_with(echo(), &[("server.grace", "2s")], &[]);
    let mut visitor = upgraded(&agent);
    let begun = Instant::now();
    server.process.signal("TERM");
    server.process.wait_for(&["draining"]);
    while begun.elapsed() < Duration::from_secs(1) {
        visitor.write_all(b"x").unwrap();
        assert_eq!(read_exactly(&mut visitor, 1), b"x");
        pause();
    }
    let (_, _) = read_to_close(&mut visitor);
    assert!(begun.elapsed() >= Duration::from_secs(2));
    let (code, log) = server.process.finish();
    assert_eq!(code, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(8));
    assert!(log.contains("grace is over"), "{log}");
}

#[test]
fn a_drain_of_the_agent_leaves_them_its_grace() {
    let (server, mut agent) = start_with(echo(), &[], &[("agent.grace", "2s")]);
    let mut ends = upgraded(&agent);
    let mut stays = upgraded(&agent);
    let begun = Instant::now();
    agent.process.signal("TERM");
    // The new ones are turned away, the old ones go on.
    eventually(PATIENCE, "the agent drains", || {
        agent.process.log().contains("drain") || begun.elapsed() > Duration::from_millis(500)
    });
    for visitor in [&mut ends, &mut stays] {
        visitor.write_all(b"x").unwrap();
        assert_eq!(read_exactly(visitor, 1), b"x");
    }
    ends.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_close(&mut ends), (Vec::new(), false));
    let (bytes, was_reset) = read_to_close(&mut stays);
    assert_eq!((bytes, was_reset), (Vec::new(), true));
    assert!(begun.elapsed() >= Duration::from_secs(2));
    agent.process.finish();
    assert!(begun.elapsed() < Duration::from_secs(8));
    settles(&server);
}

#[test]
fn a_lost_tunnel_cuts_them() {
    let address = agreeing(|mut stream| {
        if read_exactly(&mut stream, 1) == b"e" {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        read_to_close(&mut stream);
    });
    let (server, mut agent) = start(address);
    let mut whole = upgraded(&agent);
    whole.write_all(b"x").unwrap();
    let mut half = upgraded(&agent);
    half.write_all(b"e").unwrap();
    assert_eq!(half.read(&mut [0]).unwrap(), 0);
    agent.process.kill();
    let (_, was_reset) = read_to_close(&mut whole);
    assert!(was_reset);
    // Who has heard the service's end already has nothing more to hear, but isn't kept.
    settles(&server);
    eventually(PATIENCE, "nothing more is taken", || {
        pause();
        half.write_all(b"too late").is_err()
    });
}

// --- Agents that aren't ours --------------------------------------------------------------------

/// An agent of another time or make, which answers everything with a 101.
struct Foreign {
    port: u16,
    /// What a request offers, and whether it ends with its head.
    opened: Receiver<(Option<Vec<u8>>, bool)>,
}

impl Foreign {
    /// One that can do so much, and goes on with this protocol. It ends with the server.
    fn start(server: &Server, capabilities: &[&str], protocol: &'static str) -> Self {
        let hello = Hello {
            version: VERSION,
            agent_id: "foreign".into(),
            capabilities: capabilities.iter().map(|word| (*word).into()).collect(),
            ..Hello::default()
        };
        let tunnel = server.tunnel;
        let (welcomed, port) = channel();
        let (give, opened) = channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let stream = tokio::net::TcpStream::connect(tunnel).await.unwrap();
                let mut tunnel = Tunnel::client(stream, false, &tunnel.to_string());
                let first = AgentMessage::from(hello);
                tunnel.send(&first).await.unwrap();
                let first: ServerMessage = tunnel.message().await.unwrap();
                let _ = welcomed.lock().unwrap().send(first.welcome.unwrap().port);
                while let Ok(message) = tunnel.message::<ServerMessage>().await {
                    for frame in message.into_frames() {
                        let Ok(mux::Frame::Open { id, head, end, .. }) = frame else {
                            continue;
                        };
                        let offer = line_of(&head, "upgrade");
                        let _ = give.lock().unwrap().send((offer, end));
                        let mut lines = LinesBuilder::default();
                        lines.push(b"upgrade", protocol.as_bytes()).unwrap();
                        let answer = mux::Frame::Answer {
                            id,
                            head: ResponseHead {
                                status: 101,
                                lines: lines.finish(),
                            },
                            body: b"bytes".to_vec().into(),
                            end: false,
                        };
                        tunnel
                            .send(&AgentMessage::from(vec![answer]))
                            .await
                            .unwrap();
                    }
                }
            });
        });
        let port = take(&port, "a welcome");
        Self {
            port: u16::try_from(port).unwrap(),
            opened,
        }
    }
}

fn line_of(head: &RequestHead, name: &str) -> Option<Vec<u8>> {
    let mut lines = head.lines.iter();
    lines.find_map(|(key, value)| (key == name.as_bytes()).then(|| value.to_vec()))
}

#[test]
fn an_agent_that_does_not_know_upgrades_gets_ordinary_requests() {
    for (capabilities, protocol, offer, status) in [
        (&[][..], "echo", None, 502),
        (&["other"][..], "echo", None, 502),
        (&["other", "upgrade"][..], "other", Some("echo"), 502),
        (&["upgrade"][..], "echo", Some("echo"), 101),
    ] {
        let server = Server::with(port_range(4), &[]);
        let agent = Foreign::start(&server, capabilities, protocol);
        let address = SocketAddr::from(([127, 0, 0, 1], agent.port));
        let mut visitor = send(address, ASK);
        let opened = take(&agent.opened, "a request at the agent");
        let offer = offer.map(|offer: &str| offer.as_bytes().to_vec());
        assert_eq!(opened, (offer.clone(), offer.is_none()));
        // What the agent passes on of its service is no more believed than the service.
        let answer = read_answer(&mut visitor, false);
        assert_eq!(answer.status, status);
        if status == 101 {
            assert_eq!(read_exactly(&mut visitor, 5), b"bytes");
        } else {
            assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
        }
    }
}

#[test]
fn the_access_log_has_one_line_for_all_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let (server, agent) = start_with(echo(), &[("http.access_log", path.to_str().unwrap())], &[]);
    let mut visitor = upgraded(&agent);
    visitor.write_all(b"12345").unwrap();
    assert_eq!(read_exactly(&mut visitor, 5), b"12345");
    assert!(is_silent(&mut visitor, Duration::from_millis(300)));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    visitor.shutdown(Shutdown::Write).unwrap();
    read_to_close(&mut visitor);
    settles(&server);
    let mut log = String::new();
    eventually(PATIENCE, "a line in the access log", || {
        log = std::fs::read_to_string(&path).unwrap();
        log.ends_with('\n')
    });
    for part in [
        "method=GET",
        "path=\"/chat\"",
        "status=101",
        "bytes_in=5",
        "bytes_out=5",
        "complete=true",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
    let at = log.find("duration_ms=").unwrap() + "duration_ms=".len();
    let duration = log[at..].split(' ').next().unwrap();
    assert!(duration.parse::<f64>().unwrap() >= 300.0, "{log}");
}

#[test]
fn upgrades_pass_beside_cors() {
    let (_server, agent) = start_with(
        echo(),
        &[("http.cors.allowed_origins", "https://app.example")],
        &[],
    );
    let ask = ASK.replace("\r\n\r\n", "\r\nOrigin: https://app.example\r\n\r\n");
    let mut visitor = send(agent.address(), ask);
    let head = read_head(&mut visitor).unwrap();
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    let allowed = values_of(&head, "access-control-allow-origin");
    assert_eq!(allowed, ["https://app.example"]);
    visitor.write_all(b"x").unwrap();
    assert_eq!(read_exactly(&mut visitor, 1), b"x");
}

#[test]
fn upgraded_connections_leave_the_service_to_other_requests() {
    let address = service(|mut stream| {
        while let Ok(request) = read_request(&mut stream) {
            if request.header("upgrade").is_empty() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                continue;
            }
            stream.write_all(SWITCH.as_bytes()).unwrap();
            let _ = read_to_close(&mut stream);
            return;
        }
    });
    let (server, agent) = start_with(address, &[], &[("local.max_connections", "2")]);
    let sockets: Vec<_> = (0..10).map(|_| upgraded(&agent)).collect();
    assert_eq!(get(agent.address(), "/").text(), "ok");
    drop(sockets);
    settles(&server);
}

#[test]
fn megabytes_come_back() {
    let (server, agent) = start(echo());
    echo_of(upgraded(&agent), 16);
    settles(&server);
}

// --- WebSocket ----------------------------------------------------------------------------------

fn both_ways(talk: impl Fn(&mut WebSocket<TcpStream>)) {
    let service = websocket_echo();
    let (server, agent) = start(service);
    upgrade::both_ways(service, &agent, talk);
    settles(&server);
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
}

#[test]
fn websocket_messages_of_all_kinds() {
    both_ways(|socket| {
        for message in [
            Message::text("gr\u{fc}\u{df}e"),
            Message::text(""),
            Message::binary(pattern(125)),
            Message::binary(pattern(126)),
            Message::binary(pattern(65_535)),
            Message::binary(pattern(65_536)),
            Message::binary(pattern(1_000_000)),
        ] {
            socket.send(message.clone()).unwrap();
            assert!(socket.read().unwrap() == message);
        }
        socket.send(Message::Ping("are you there".into())).unwrap();
        assert_eq!(
            socket.read().unwrap(),
            Message::Pong("are you there".into())
        );
    });
}

#[test]
fn websocket_messages_in_fragments() {
    both_ways(|socket| {
        let part = |text: &str, code, last| {
            let header = FrameHeader {
                is_final: last,
                opcode: OpCode::Data(code),
                ..FrameHeader::default()
            };
            Message::Frame(Frame::from_payload(header, text.to_owned().into()))
        };
        for round in 0..10 {
            socket.send(part("a", Data::Text, false)).unwrap();
            socket.send(part("b", Data::Continue, false)).unwrap();
            // Control frames may stand between them.
            socket.send(Message::Ping("p".into())).unwrap();
            assert_eq!(socket.read().unwrap(), Message::Pong("p".into()));
            let last = round.to_string();
            socket.send(part(&last, Data::Continue, true)).unwrap();
            assert_eq!(socket.read().unwrap(), Message::text(format!("ab{round}")));
        }
    });
}

#[test]
fn thousands_of_tiny_frames() {
    both_ways(|socket| tiny_frames(socket, 5_000));
}

/// A page that asks an ordinary service for a WebSocket gets that service's answer.
#[test]
fn a_service_without_websockets_says_so_itself() {
    let (_server, agent) = start(text_service("no sockets here"));
    let url = format!("ws://{}/", agent.address());
    match tungstenite::client::client(url, connect(agent.address())) {
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(answer))) => {
            assert_eq!(answer.status(), 200);
        }
        other => panic!("{other:?}"),
    }
}
