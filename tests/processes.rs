//! Signals and deaths: what the server, the agents and their visitors notice when a process ends,
//! in good order or not, and when file descriptors run out.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{
    Answer, BINARY, HeldService, PATIENCE, Process, Server, connect, eventually, get, pause,
    port_range, read_answer, read_head, refuses, service, text_service, try_read_answer,
};

/// GET on a thread of its own: the answer, or what became of it, and when it came.
fn get_meanwhile(
    address: SocketAddr,
    target: &str,
) -> JoinHandle<(std::io::Result<Answer>, Instant)> {
    let request = format!("GET {target} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    std::thread::spawn(move || {
        let mut stream = connect(address);
        stream.write_all(request.as_bytes()).unwrap();
        let answer = try_read_answer(&mut stream, false);
        (answer, Instant::now())
    })
}

/// Waits for a process's end; returns the exit code and how long that took since `since`.
fn ended(process: &mut Process, since: Instant) -> (Option<i32>, Duration) {
    let status = process.wait();
    (status.code(), since.elapsed())
}

#[test]
fn an_idle_server_ends_at_once() {
    let grace = Duration::from_secs(15);
    let mut server = Server::with(port_range(10), &[("server.grace", "15s")]);
    let service = text_service("idle");
    let agents = [
        server.agent("agent-1", service),
        server.agent("agent-2", service),
    ];
    // A connection that is kept alive isn't worth waiting for, and neither is one without a word.
    let mut kept = connect(agents[0].address());
    kept.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut kept, false).status, 200);
    let mut silent = connect(agents[1].address());

    let since = Instant::now();
    server.process.signal("TERM");
    let (code, took) = ended(&mut server.process, since);
    assert_eq!(code, Some(0));
    assert!(took < grace / 3, "{took:?}");
    for stream in [&mut kept, &mut silent] {
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "closed");
    }
    for address in [
        server.admin,
        server.tunnel,
        agents[0].address(),
        agents[1].address(),
    ] {
        assert!(refuses(address), "{address}");
    }
    // The agents are told, and wait for the server's return.
    for agent in &agents {
        agent.process.wait_for(&["rejected", "reason=draining"]);
        agent.process.wait_for(&["disconnected", "retry_in="]);
    }
}

#[test]
fn a_request_in_flight_finishes_before_the_server_ends() {
    let grace = Duration::from_secs(15);
    let mut server = Server::with(port_range(10), &[("server.grace", "15s")]);
    let held = HeldService::start("finished");
    let agent = server.agent("agent-1", held.address);
    let mut kept = connect(agent.address());
    kept.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut kept, false).status, 200);
    let visitor = get_meanwhile(agent.address(), "/held");
    held.wait_for_request();

    let since = Instant::now();
    server.process.signal("INT");
    eventually(grace, "the ports are closed", || refuses(agent.address()));
    // A connection that is kept alive takes no new requests either, and nor do agents come.
    assert_eq!(kept.read(&mut [0]).unwrap_or(0), 0, "closed");
    let newcomer = server.start_agent("agent-2", "http://127.0.0.1:9", &[]);
    newcomer.wait_for(&["rejected", "reason=draining"]);
    assert_eq!(get(server.admin, "/ready").status, 503);
    assert_eq!(get(server.admin, "/health").status, 200);
    held.let_go();
    let answer = visitor.join().unwrap().0.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "finished"));
    assert_eq!(answer.header("connection"), ["close"]);
    let (code, took) = ended(&mut server.process, since);
    assert_eq!(code, Some(0));
    assert!(took < grace / 2, "{took:?}");
    assert!(refuses(server.admin) && refuses(server.tunnel));
}

#[test]
fn a_request_without_an_end_is_cut_when_the_grace_is_over() {
    let mut server = Server::with(port_range(10), &[("server.grace", "1s")]);
    // One answer that doesn't begin, and one that doesn't end.
    let held = HeldService::start("never");
    let endless = service(|mut stream| {
        while read_head(&mut stream).is_ok() {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n";
            stream.write_all(head).unwrap();
            while stream.write_all(b"drop by drop ").is_ok() {
                pause();
            }
        }
    });
    let silent = server.agent("silent", held.address);
    let visitor = get_meanwhile(silent.address(), "/held");
    held.wait_for_request();
    let dripping = server.agent("dripping", endless);
    let mut reader = connect(dripping.address());
    reader
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut beginning = [0; 512];
    reader.read_exact(&mut beginning).unwrap();

    let since = Instant::now();
    server.process.signal("TERM");
    let (code, took) = ended(&mut server.process, since);
    assert_eq!(code, Some(0));
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    // Both can tell that they didn't get all of it.
    match visitor.join().unwrap().0 {
        Ok(answer) => assert_eq!(
            (answer.status, answer.header("x-silo-error").concat()),
            (502, "tunnel_lost".to_owned())
        ),
        Err(cut) => assert_ne!(cut.kind(), std::io::ErrorKind::WouldBlock, "{cut}"),
    }
    let mut rest = Vec::new();
    // Cut by a reset or by an early end.
    let _ = reader.read_to_end(&mut rest);
    assert!(rest.len() < 900_000);
    assert!(refuses(silent.address()) && refuses(dripping.address()));
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    let mut server = Server::with(port_range(10), &[("server.grace", "1h")]);
    let held = HeldService::start("never");
    let agent = server.agent("agent-1", held.address);
    let visitor = get_meanwhile(agent.address(), "/held");
    held.wait_for_request();
    server.process.signal("TERM");
    server.process.wait_for(&["draining"]);
    server.process.signal("TERM");
    let (code, _) = ended(&mut server.process, Instant::now());
    assert_eq!(code, Some(1));
    assert!(visitor.join().unwrap().0.is_err());
}

#[test]
fn an_agent_that_is_told_to_stop_finishes_what_it_began() {
    let server = Server::start();
    let held = HeldService::start("finished");
    let mut agent = server.agent_with("agent-1", held.address, &[("agent.grace", "15s")]);
    let address = agent.address();
    let visitor = get_meanwhile(address, "/held");
    held.wait_for_request();

    agent.process.signal("TERM");
    // New requests are turned away, by a port that still listens.
    eventually(PATIENCE, "new requests are turned away", || {
        let answer = get(address, "/");
        if answer.status == 200 {
            return false;
        }
        assert_eq!(answer.status, 503);
        assert_eq!(answer.header("x-silo-error"), ["agent_offline"]);
        assert_eq!(answer.header("retry-after").len(), 1);
        true
    });
    assert!(!visitor.is_finished());
    held.let_go();
    let answer = visitor.join().unwrap().0.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "finished"));
    let since = Instant::now();
    let (code, took) = ended(&mut agent.process, since);
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(5), "{took:?}");
    server.process.wait_for(&["agent deregistered"]);
    eventually(PATIENCE, "the port is closed", || refuses(address));
}

#[test]
fn an_idle_agent_ends_at_once() {
    let grace = Duration::from_secs(15);
    let server = Server::start();
    let mut agent = server.agent_with("agent-1", text_service("idle"), &[("agent.grace", "15s")]);
    assert_eq!(get(agent.address(), "/").text(), "idle");
    let since = Instant::now();
    agent.process.signal("INT");
    let (code, took) = ended(&mut agent.process, since);
    assert_eq!(code, Some(0));
    assert!(took < grace / 3, "{took:?}");
    eventually(PATIENCE, "the port is closed", || refuses(agent.address()));

    // So does one that waits for its server.
    let mut lost = Process::start(
        "lost",
        &[
            "agent",
            "http",
            "3000",
            "--server",
            "127.0.0.1:1",
            "--id",
            "lost",
        ],
        &[("SILO_AGENT_GRACE", "15s")],
    );
    lost.wait_for_nth(2, &["disconnected", "retry_in="]);
    let since = Instant::now();
    lost.signal("TERM");
    let (code, took) = ended(&mut lost, since);
    assert_eq!(code, Some(0));
    assert!(took < grace / 3, "{took:?}");
}

#[test]
fn an_agent_cuts_a_request_without_an_end_when_its_grace_is_over() {
    let server = Server::start();
    let held = HeldService::start("never");
    let mut agent = server.agent_with("agent-1", held.address, &[("agent.grace", "1s")]);
    let visitor = get_meanwhile(agent.address(), "/held");
    held.wait_for_request();
    let since = Instant::now();
    agent.process.signal("TERM");
    let (code, took) = ended(&mut agent.process, since);
    assert_eq!(code, Some(0));
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(visitor.join().unwrap().0.unwrap().status, 502);
    eventually(PATIENCE, "the port is closed", || refuses(agent.address()));
}

#[test]
fn a_second_signal_ends_the_agent_at_once() {
    let server = Server::start();
    let held = HeldService::start("never");
    let mut agent = server.agent_with("agent-1", held.address, &[("agent.grace", "1h")]);
    let visitor = get_meanwhile(agent.address(), "/held");
    held.wait_for_request();
    agent.process.signal("INT");
    agent.process.wait_for(&["stopping"]);
    agent.process.signal("INT");
    let (code, _) = ended(&mut agent.process, Instant::now());
    assert_eq!(code, Some(1));
    assert_eq!(visitor.join().unwrap().0.unwrap().status, 502);
}

#[test]
fn an_agents_death_is_told_to_its_visitors_within_a_second() {
    let server = Server::start();
    let held = HeldService::start("never");
    let mut agent = server.agent("agent-1", held.address);
    let bystander = server.agent("agent-2", text_service("unharmed"));
    let visitors: Vec<_> = (0..20)
        .map(|_| {
            let visitor = get_meanwhile(agent.address(), "/held");
            held.wait_for_request();
            visitor
        })
        .collect();

    let killed = Instant::now();
    agent.process.kill();
    for visitor in visitors {
        let (answer, at) = visitor.join().unwrap();
        let answer = answer.unwrap();
        assert_eq!(answer.status, 502);
        assert_eq!(answer.header("x-silo-error"), ["tunnel_lost"]);
        assert!(at - killed < Duration::from_secs(1), "{:?}", at - killed);
    }
    server
        .process
        .wait_for(&["agent deregistered", "agent_id=agent-1"]);
    eventually(Duration::from_secs(2), "the port is closed", || {
        refuses(agent.address())
    });
    assert_eq!(get(bystander.address(), "/").text(), "unharmed");
    eventually(PATIENCE, "nothing is left of it", || {
        server.metric("silo_exchanges_open", "") == 0.0
            && server.metric("silo_connections_open", "") == 0.0
    });
    assert_eq!(server.metric("silo_failures_total", "tunnel_lost"), 20.0);
}

#[test]
fn agents_come_back_to_a_server_that_was_killed() {
    let range = port_range(10);
    let mut server = Server::with(range.clone(), &[]);
    let agents: Vec<_> = (1..=3)
        .map(|number| {
            let id = format!("agent-{number}");
            server.agent(&id, text_service(&id))
        })
        .collect();
    // Connections of visitors are open when it dies, so its ports linger in the kernel.
    let mut kept: Vec<TcpStream> = agents
        .iter()
        .map(|agent| {
            let mut stream = connect(agent.address());
            let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
            stream.write_all(request).unwrap();
            assert_eq!(read_answer(&mut stream, false).text(), agent.id);
            stream
        })
        .collect();
    server.process.kill();
    for stream in &mut kept {
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "closed");
    }
    for agent in &agents {
        agent.process.wait_for(&["disconnected"]);
    }

    let port = server.tunnel.port().to_string();
    let restarted = Server::with(range, &[("grpc.port", &port)]);
    for agent in &agents {
        let expected = format!("port={}", agent.port);
        agent.process.wait_for_nth(2, &["connected", &expected]);
        assert_eq!(get(agent.address(), "/").text(), agent.id);
    }
    assert_eq!(restarted.tunnel, server.tunnel);
}

/// Holds more visitors than there are descriptors for 5 s.
#[test]
fn without_file_descriptors_the_server_waits_quietly() {
    const DESCRIPTORS: usize = 96;
    let limit = format!("ulimit -n {DESCRIPTORS} && exec \"$0\" server");
    let server = Server::with_command(
        Command::new("sh").args(["-c", &limit, BINARY]),
        port_range(10),
        &[("http.head_timeout", "1h")],
    );
    let agent = server.agent("agent-1", text_service("served"));
    assert_eq!(get(agent.address(), "/").text(), "served");

    // Visitors who say nothing: the last ones stay in the kernel's queue.
    let mut idle: Vec<TcpStream> = (0..DESCRIPTORS).map(|_| connect(agent.address())).collect();
    const WARNING: [&str; 2] = ["WARN", "out of file descriptors"];
    server.process.wait_for(&WARNING);
    // One with a request, who has to wait.
    let waiting = get_meanwhile(agent.address(), "/");

    let (since, used) = (Instant::now(), server.process.cpu_time());
    while since.elapsed() < Duration::from_secs(5) {
        // Others keep knocking.
        if idle.len() < 2 * DESCRIPTORS {
            idle.push(connect(agent.address()));
        }
        let next = Instant::now() + Duration::from_millis(100);
        while Instant::now() < next {
            pause();
        }
    }
    let used = server.process.cpu_time() - used;
    assert!(used < Duration::from_millis(500), "{used:?} of CPU in 5 s");
    assert!(!waiting.is_finished());

    drop(idle);
    assert_eq!(waiting.join().unwrap().0.unwrap().text(), "served");
    assert_eq!(get(agent.address(), "/").text(), "served");
    // The agent hasn't noticed anything, and another one is welcome.
    assert_eq!(agent.process.count(&["connected"]), 1);
    let another = server.agent("agent-2", text_service("too"));
    assert_eq!(get(another.address(), "/").text(), "too");
    eventually(PATIENCE, "all descriptors are back", || {
        server.process.descriptors() < DESCRIPTORS / 2
    });
    assert_eq!(server.process.count(&["WARN"]), 1, "one line about it");
    server.process.wait_for(&["accepting connections again"]);
}

/// How many single bytes pass while the other side stands still: as many messages, and far more
/// than h2 takes in one go if they are tiny (139 of them, in h2 0.4.20).
const DRIPS: usize = 400;

#[test]
fn many_small_messages_after_a_stall_do_not_end_the_tunnel() {
    let server = Server::start();
    // Reads a chunked request to its end, then answers byte by byte.
    let address = service(|mut stream| {
        let Ok(_head) = read_head(&mut stream) else {
            return;
        };
        let mut chunks = 0;
        while let Ok(Some(_)) = common::raw::read_chunk(&mut stream) {
            chunks += 1;
        }
        let head =
            format!("HTTP/1.1 200 OK\r\nX-Chunks: {chunks}\r\nContent-Length: {DRIPS}\r\n\r\n");
        let _ = stream.write_all(head.as_bytes());
        let mut go = [0];
        let _ = stream.read(&mut go);
    });
    let agent = server.agent("dripping", address);
    let mut visitor = connect(agent.address());
    let head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    visitor.write_all(head.as_bytes()).unwrap();
    // The agent stands still, and the server's messages pile up in the sockets between them.
    agent.process.signal("STOP");
    for _ in 0..DRIPS {
        visitor.write_all(b"1\r\nx\r\n").unwrap();
        pause();
    }
    visitor.write_all(b"0\r\n\r\n").unwrap();
    agent.process.signal("CONT");
    let answer = read_head(&mut visitor).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 "));
    assert_eq!(agent.process.count(&["disconnected"]), 0);
    drop(visitor);

    // The same the other way around: the server stands still while the service drips.
    let (tell, told) = std::sync::mpsc::channel();
    let tell = std::sync::Mutex::new(tell);
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_err() {
            return;
        }
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {DRIPS}\r\n\r\n");
        let _ = stream.write_all(head.as_bytes());
        let _ = tell.lock().unwrap().send(());
        for _ in 0..DRIPS {
            pause();
            let _ = stream.write_all(b"x");
        }
        let _ = tell.lock().unwrap().send(());
        let _ = stream.read(&mut [0]);
    });
    let agent = server.agent("dripped-on", address);
    let mut visitor = connect(agent.address());
    visitor
        .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    told.recv_timeout(PATIENCE).unwrap();
    server.process.signal("STOP");
    told.recv_timeout(PATIENCE).unwrap();
    server.process.signal("CONT");
    let answer = read_answer(&mut visitor, false);
    assert_eq!((answer.status, answer.body.len()), (200, DRIPS));
    assert_eq!(agent.process.count(&["disconnected"]), 0);
}
