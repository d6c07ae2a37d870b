//! Several sessions of one agent id: which of them stays, what their visitors notice, and that a
//! visitor's connection never ends up with another agent.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::relay::Relay;
use common::{
    HeldService, PATIENCE, Server, connect, eventually, get, pause, port_range, read_answer,
    text_service, try_read_answer,
};
use silo_proxy::link::Tunnel;
use silo_proxy::wire::{AgentMessage, Hello, VERSION};
use tokio::io::AsyncReadExt;

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

/// Visitors who come one after the other, each on a connection of his own, until told to stop.
/// Each must get an answer of 200; returned is what they read.
fn visitors(address: SocketAddr, over: Arc<AtomicBool>) -> JoinHandle<Vec<String>> {
    std::thread::spawn(move || {
        let mut texts = Vec::new();
        while !over.load(Ordering::Relaxed) {
            // A refused connection fails the test here.
            let answer = get(address, "/");
            assert_eq!(answer.status, 200, "{}", answer.text());
            texts.push(answer.text());
        }
        texts
    })
}

#[test]
fn of_a_storm_of_sessions_the_last_stays_and_the_port_is_never_closed() {
    const STORM: usize = 50;
    let server = Server::with(port_range(10), &[]);
    let first = server.agent("agent-1", text_service("session 0"));
    let (address, over) = (first.address(), Arc::new(AtomicBool::new(false)));
    let visitors = [0, 1, 2].map(|_| visitors(address, over.clone()));

    let mut processes = vec![first.process];
    for number in 1..STORM {
        let service = format!("http://{}", text_service(&format!("session {number}")));
        processes.push(server.start_agent("agent-1", &service, &[]));
    }
    server
        .process
        .wait_for_nth(STORM, &["agent registered", "agent_id=agent-1"]);
    // All but one are told.
    let told = |process: &common::Process| process.count(&["rejected", "reason=replaced"]);
    eventually(PATIENCE, "all but one are turned out", || {
        processes.iter().map(told).sum::<usize>() == STORM - 1
    });
    let last = processes.iter().position(|process| told(process) == 0);
    let last = format!("session {}", last.unwrap());
    for _ in 0..20 {
        assert_eq!(get(address, "/").text(), last);
    }
    over.store(true, Ordering::Relaxed);
    for visitor in visitors {
        let texts = visitor.join().unwrap();
        assert_eq!(texts.last(), Some(&last));
        // Nobody is served by a session that has been replaced.
        let mut turns = texts.clone();
        turns.dedup();
        let distinct: std::collections::BTreeSet<_> = turns.iter().collect();
        assert_eq!(turns.len(), distinct.len(), "{turns:?}");
    }
    assert_eq!(server.agents(), [("agent-1".to_owned(), first.port)]);
    assert_eq!(
        server.process.count(&["agent registered"]),
        STORM,
        "nobody has come twice"
    );
    assert_eq!(server.metric("silo_tunnels_open", ""), 1.0);
}

/// What an agent says first, up to its hello.
fn first_words(hello: Hello) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let mut tunnel = Tunnel::client(ours, false, "server.test:9090");
        let first = AgentMessage::from(hello);
        tunnel.send(&first).await.unwrap();
        drop(tunnel);
        let mut said = Vec::new();
        theirs.read_to_end(&mut said).await.unwrap();
        said
    })
}

#[test]
fn one_that_died_with_its_hello_on_the_way_takes_no_id() {
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("agent-1", text_service("alive"));
    let hello = Hello {
        version: VERSION,
        agent_id: "agent-1".into(),
        instance: vec![7; 16].into(),
        ..Hello::default()
    };
    let words = first_words(hello);
    // Its hello and its end arrive together, as from a process that was killed; what its host says
    // to an answer is still on its way.
    server.process.signal("STOP");
    let mut dead = connect(server.tunnel);
    dead.write_all(&words).unwrap();
    dead.shutdown(std::net::Shutdown::Write).unwrap();
    server.process.signal("CONT");
    eventually(PATIENCE, "it has come and gone", || {
        server.metric("silo_handshakes_failed_total", "closed") == 1.0
    });
    assert_eq!(get(agent.address(), "/").text(), "alive");
    assert_eq!(server.process.count(&["agent registered"]), 1);
    assert_eq!(agent.process.count(&["rejected"]), 0);
}

/// A loser waits 30 s, so this takes more than two of its attempts.
#[test]
#[ignore = "watches two agents for 80 s, and waits another 40 s"]
fn two_rivals_settle() {
    let server = Server::with(port_range(10), &[]);
    let agents = ["one", "two"].map(|text| server.agent("agent-1", text_service(text)));
    let (since, address) = (Instant::now(), agents[0].address());
    let mut processes = agents.map(|agent| agent.process);
    processes[0].wait_for(&["rejected", "reason=replaced"]);
    while since.elapsed() < Duration::from_secs(80) {
        assert_eq!(get(address, "/").text(), "two");
        let next = Instant::now() + Duration::from_millis(100);
        while Instant::now() < next {
            pause();
        }
    }
    assert_eq!(server.process.count(&["agent registered"]), 2);
    assert_eq!(processes[1].count(&["rejected"]), 0);
    // The loser asks every 30 s, and is told what mends it.
    let refused = processes[0].count(&["rejected", "reason=duplicate", "give each its own"]);
    assert_eq!(refused, 2);
    assert_eq!(server.metric("silo_rejections_total", "duplicate"), 2.0);

    // When the winner is gone the other one has its turn.
    processes[1].kill();
    let turn = Duration::from_secs(40);
    eventually(turn, "the other one is back", || {
        processes[0].count(&["connected", "port="]) == 2
    });
    assert_eq!(get(address, "/").text(), "one");
}

#[test]
fn a_reconnect_is_no_rival() {
    let server = Server::with(port_range(10), &[]);
    let relay = Relay::start(server.tunnel);
    let held = HeldService::start("served");
    let through = [("grpc.server_address", &*relay.address.to_string())];
    let agent = server.agent_with("agent-1", held.address, &through);
    let address = agent.address();
    let mut kept = connect(address);
    kept.write_all(GET).unwrap();
    assert_eq!(read_answer(&mut kept, false).text(), "served");
    let mut waiting = connect(address);
    waiting
        .write_all(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    held.wait_for_request();

    // The agent has lost its connection, and the server doesn't know.
    let _half_open = relay.cut_clients();
    let cut = Instant::now();
    agent.process.wait_for_nth(2, &["connected", "port="]);
    server.process.wait_for(&["agent reconnected"]);
    // What the old session had under way is over: nobody is left who could finish it.
    let answer = read_answer(&mut waiting, false);
    assert_eq!(
        (answer.status, answer.header("x-silo-error").concat()),
        (502, "tunnel_lost".to_owned())
    );
    assert!(
        cut.elapsed() < Duration::from_secs(5),
        "{:?}",
        cut.elapsed()
    );
    // Same port, never closed; the visitor's connection has gone over to the new session.
    kept.write_all(GET).unwrap();
    assert_eq!(read_answer(&mut kept, false).text(), "served");
    assert_eq!(server.agents(), [("agent-1".to_owned(), agent.port)]);
    assert_eq!(agent.process.count(&["rejected"]), 0);
    assert_eq!(server.process.count(&["rejected"]), 0);
    eventually(PATIENCE, "the old session is gone", || {
        server.metric("silo_tunnels_open", "") == 1.0
    });
}

/// The one port of a range changes hands while a visitor's connection to it is open.
#[test]
fn a_visitors_connection_never_changes_to_another_agent() {
    let server = Server::with(port_range(1), &[]);
    let mut first = server.agent("agent-1", text_service("first"));
    let address = first.address();
    let mut idle: Vec<_> = (0..10)
        .map(|_| {
            let mut visitor = connect(address);
            visitor.write_all(GET).unwrap();
            assert_eq!(read_answer(&mut visitor, false).text(), "first");
            visitor
        })
        .collect();
    // These haven't said anything yet.
    let mut silent: Vec<_> = (0..10).map(|_| connect(address)).collect();
    assert_eq!(get(address, "/").text(), "first");

    // The second agent asks for the port before it is free, and gets it within seconds.
    let service = text_service("second");
    let second = server.start_agent("agent-2", &format!("http://{service}"), &[]);
    second.wait_for(&["rejected", "port_exhausted"]);
    first.process.kill();
    second.wait_for(&["connected", &format!("port={}", first.port)]);
    assert_eq!(get(address, "/").text(), "second");
    for visitor in idle.iter_mut().chain(&mut silent) {
        // Written or not, it is no request to the second agent.
        let _ = visitor.write_all(GET);
        match try_read_answer(visitor, false) {
            Ok(answer) => panic!("{} {}", answer.status, answer.text()),
            Err(error) => assert!(!common::raw::is_timeout(&error), "{error}"),
        }
        assert_eq!(visitor.read(&mut [0]).unwrap_or(0), 0);
    }
}
