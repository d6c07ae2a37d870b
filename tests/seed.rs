//! The flows of the original specification, with real processes: an agent and its port from
//! connect to release, the admin port, an exhausted range, ports that somebody else holds, and
//! who may take which id and which port.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{
    Agent, HeldService, PATIENCE, Process, Server, connect, eventually, get, port_range,
    read_answer, refuses, text_service,
};

/// How long a port may stay open after its agent is gone. It is closed in the same breath; the
/// rest is for a busy machine.
const RELEASE: Duration = Duration::from_secs(5);

/// A server with a range of `count` ports and the first port of it.
fn server(count: u16, settings: &[(&str, &str)]) -> (Server, u16) {
    let range = port_range(count);
    let first = *range.start();
    (Server::with(range, settings), first)
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn stop(agent: &mut Agent) {
    agent.process.signal("TERM");
    assert_eq!(agent.process.wait().code(), Some(0));
}

/// Waits until GET /agents lists exactly these, in its own order: by id.
fn wait_for_list(server: &Server, expected: &[(&str, u16)]) {
    let mut seen = Vec::new();
    let wanted: Vec<(String, u16)> = expected
        .iter()
        .map(|(id, port)| ((*id).to_owned(), *port))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    while seen != wanted {
        assert!(
            Instant::now() < deadline,
            "listed are {seen:?}, not {wanted:?}"
        );
        common::pause();
        seen = server.agents();
    }
}

/// The seconds of `retry_in=5.2s` in an agent's line.
fn retry_in(line: &str) -> f64 {
    let (_, rest) = line.split_once("retry_in=").unwrap();
    let digits = rest.split('s').next().unwrap();
    digits.parse().unwrap()
}

#[test]
fn an_agent_connects_serves_and_gives_its_port_back() {
    let (server, first) = server(10, &[]);
    assert!(refuses(local(first)), "a port is opened when it is needed");

    let mut agent = server.agent("agent-1", text_service("from agent-1"));
    assert_eq!(agent.port, first);
    let port = format!("port={first}");
    server
        .process
        .wait_for(&["agent registered", "agent_id=agent-1", &port]);
    let url = format!("http://127.0.0.1:{first}/");
    agent.process.wait_for(&["connected", &port, &url]);

    let answer = get(agent.address(), "/api/status");
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "from agent-1")
    );

    stop(&mut agent);
    agent.process.wait_for(&["stopping"]);
    server
        .process
        .wait_for(&["agent deregistered", "agent_id=agent-1", &port]);
    eventually(RELEASE, "connecting is refused", || {
        refuses(agent.address())
    });
    wait_for_list(&server, &[]);
    assert_eq!(server.metric("silo_ports", "serving"), 0.0);
    assert_eq!(server.metric("silo_exchanges_open", ""), 0.0);
}

#[test]
fn the_admin_port_lists_three_agents_then_two() {
    let (server, first) = server(10, &[]);
    let mut agents: Vec<Agent> = (1..=3)
        .map(|number| {
            let id = format!("agent-{number}");
            server.agent(&id, text_service(&id))
        })
        .collect();
    let all = [
        ("agent-1", first),
        ("agent-2", first + 1),
        ("agent-3", first + 2),
    ];
    wait_for_list(&server, &all);
    for (id, port) in all {
        let answer = get(server.admin, &format!("/agents/{id}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let row: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(row["agent_id"], id);
        assert_eq!(row["port"], port);
        assert_eq!(row["state"], "serving");
        let seen = row["last_seen"].as_str().unwrap();
        assert!(seen.starts_with("20") && seen.ends_with('Z'), "{seen}");
        // Each port reaches its own agent.
        assert_eq!(get(local(port), "/").text(), id);
    }
    for unknown in ["/agents/agent-4", "/agents/", "/nothing"] {
        assert_eq!(get(server.admin, unknown).status, 404, "{unknown}");
    }
    assert_eq!(get(server.admin, "/health").text(), r#"{"status":"ok"}"#);
    assert_eq!(get(server.admin, "/ready").status, 200);
    assert_eq!(server.metric("silo_tunnels_open", ""), 3.0);

    stop(&mut agents[1]);
    wait_for_list(&server, &[all[0], all[2]]);
    assert_eq!(get(server.admin, "/agents/agent-2").status, 404);
    eventually(RELEASE, "the port is released", || {
        refuses(agents[1].address())
    });
    for other in [0, 2] {
        assert_eq!(get(agents[other].address(), "/").status, 200);
    }
}

#[test]
fn an_agent_shows_its_labels() {
    let (server, _) = server(1, &[]);
    let labels = [("agent.labels", "site=Zürich, rack=7")];
    let _agent = server.agent_with("agent-1", text_service("hello"), &labels);
    let expected = r#""labels":{"rack":"7","site":"Zürich"}"#;
    eventually(PATIENCE, "the labels are listed", || {
        get(server.admin, "/agents/agent-1")
            .text()
            .contains(expected)
    });
}

#[test]
fn a_fourth_agent_waits_for_one_of_three_ports() {
    let (server, first) = server(3, &[]);
    let mut agents: Vec<Agent> = (1..=3)
        .map(|number| server.agent(&format!("agent-{number}"), text_service("one of three")))
        .collect();

    let service = text_service("the fourth");
    let fourth = server.start_agent("agent-4", &format!("http://{service}"), &[]);
    let told = fourth.wait_for(&["rejected", "reason=port_exhausted"]);
    // The server says 1 to 5 s; agents spread themselves over a quarter more.
    let retry = retry_in(&told);
    assert!((1.0..=6.25).contains(&retry), "{told}");
    let line = server
        .process
        .wait_for(&["agent rejected", "reason=port_exhausted"]);
    assert!(
        line.contains("WARN") && line.contains("agent_id=agent-4"),
        "{line}"
    );
    assert!(server.metric("silo_rejections_total", "port_exhausted") >= 1.0);
    // Nobody else suffers.
    for agent in &agents {
        assert_eq!(get(agent.address(), "/").text(), "one of three");
    }

    stop(&mut agents[1]);
    let port = format!("port={}", first + 1);
    fourth.wait_for(&["connected", &port]);
    assert_eq!(get(local(first + 1), "/").text(), "the fourth");
    wait_for_list(
        &server,
        &[
            ("agent-1", first),
            ("agent-3", first + 2),
            ("agent-4", first + 1),
        ],
    );
}

#[test]
fn ports_of_other_programs_are_skipped() {
    let (server, first) = server(4, &[]);
    let _on_loopback = TcpListener::bind(("127.0.0.1", first)).unwrap();
    let _on_all = TcpListener::bind(("0.0.0.0", first + 1)).unwrap();

    let agent = server.agent("agent-1", text_service("on the third"));
    assert_eq!(agent.port, first + 2);
    assert_eq!(get(agent.address(), "/").text(), "on the third");
    for port in [first, first + 1] {
        let line =
            server
                .process
                .wait_for(&["skipped", &format!("port={port}"), "another program"]);
        assert!(line.contains("WARN"), "{line}");
    }
    assert_eq!(server.metric("silo_ports", "foreign"), 2.0);
    assert_eq!(server.metric("silo_ports", "serving"), 1.0);
    assert_eq!(server.metric("silo_ports", "free"), 1.0);

    // They count as taken: one more agent fits.
    let last = server.agent("agent-2", text_service("on the fourth"));
    assert_eq!(last.port, first + 3);
    let none = server.start_agent("agent-3", "http://127.0.0.1:9", &[]);
    none.wait_for(&["rejected", "port_exhausted"]);
}

#[test]
#[ignore = "waits 30 s until the port of another program is tried again"]
fn a_port_that_another_program_gave_up_is_found() {
    let (server, first) = server(1, &[]);
    let holder = TcpListener::bind(("127.0.0.1", first)).unwrap();
    let service = text_service("at last");
    let agent = server.start_agent("agent-1", &format!("http://{service}"), &[]);
    agent.wait_for(&["rejected", "port_exhausted"]);
    drop(holder);
    eventually(Duration::from_secs(45), "the port is found", || {
        agent.count(&["connected", &format!("port={first}")]) > 0
    });
    assert_eq!(get(local(first), "/").text(), "at last");
    assert_eq!(server.metric("silo_ports", "foreign"), 0.0);
}

#[test]
fn an_agent_that_comes_back_has_its_last_port() {
    let (server, first) = server(10, &[]);
    let service = text_service("here");
    let mut one = server.agent("agent-1", service);
    let mut two = server.agent("agent-2", service);
    stop(&mut one);
    stop(&mut two);
    wait_for_list(&server, &[]);
    // A stranger gets the port that has been unused for longest, not one that somebody just had.
    let stranger = server.agent("agent-3", service);
    assert_eq!(stranger.port, first + 2);
    // New processes that know nothing of before, and in another order.
    assert_eq!(server.agent("agent-2", service).port, first + 1);
    assert_eq!(server.agent("agent-1", service).port, first);
}

#[test]
fn a_pinned_port_belongs_to_one_id_alone() {
    let outside = *port_range(1).start();
    let range = port_range(2);
    let first = *range.start();
    let pins = format!("inside={first},outside={outside}");
    let server = Server::with(range, &[("http.static_ports", &pins)]);
    let service = text_service("pinned");

    // Although it is the first of the range, nobody else gets it.
    assert_eq!(server.agent("agent-1", service).port, first + 1);
    let second = server.agent("outside", service);
    assert_eq!(second.port, outside);
    assert_eq!(get(second.address(), "/").text(), "pinned");
    // The first agent is gone by now (its process was dropped): its port is free again.
    let stays = server.agent("agent-2", service);
    assert_eq!(stays.port, first + 1);
    let refused = server.start_agent("agent-3", &format!("http://{service}"), &[]);
    refused.wait_for(&["rejected", "port_exhausted"]);
    assert_eq!(server.agent("inside", service).port, first);
}

#[test]
fn who_owns_a_pinned_port_gets_no_other() {
    let range = port_range(3);
    let first = *range.start();
    let _holder = TcpListener::bind(("127.0.0.1", first)).unwrap();
    let pins = format!("agent-1={first}");
    let server = Server::with(range, &[("http.static_ports", &pins)]);
    let agent = server.start_agent("agent-1", "http://127.0.0.1:9", &[]);
    let told = agent.wait_for(&["rejected", "reason=unavailable"]);
    assert!(told.contains(&format!("port {first}")), "{told}");
    server
        .process
        .wait_for(&["agent rejected", "agent_id=agent-1", "reason=unavailable"]);
    assert!(server.agents().is_empty());
}

#[test]
fn during_a_lease_visitors_are_told_and_the_port_waits() {
    let (server, first) = server(1, &[("http.port_lease", "1h")]);
    let mut agent = server.agent("agent-1", text_service("before"));
    let address = agent.address();
    assert_eq!(get(address, "/").text(), "before");
    agent.process.kill();

    eventually(RELEASE, "visitors are told", || {
        let answer = get(address, "/");
        if answer.status == 502 {
            // Not noticed yet.
            return false;
        }
        assert_eq!(answer.status, 503);
        assert_eq!(answer.header("x-silo-error"), ["agent_offline"]);
        assert_eq!(answer.header("content-type"), ["application/problem+json"]);
        let retry: u32 = answer.header("retry-after")[0].parse().unwrap();
        assert!(retry >= 1);
        true
    });
    eventually(RELEASE, "the lease is listed", || {
        let row = get(server.admin, "/agents/agent-1");
        row.status == 200 && row.text().contains(r#""state":"leased""#)
    });
    assert_eq!(server.metric("silo_ports", "leased"), 1.0);
    // Nobody else gets it.
    let stranger = server.start_agent("agent-2", "http://127.0.0.1:9", &[]);
    stranger.wait_for(&["rejected", "port_exhausted"]);
    drop(stranger);

    // A visitor's connection outlives the change of sessions.
    let mut visitor = connect(address);
    let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    visitor.write_all(request).unwrap();
    assert_eq!(read_answer(&mut visitor, false).status, 503);
    let back = server.agent("agent-1", text_service("after"));
    assert_eq!(back.port, first);
    visitor.write_all(request).unwrap();
    assert_eq!(read_answer(&mut visitor, false).text(), "after");
}

#[test]
fn a_lease_ends() {
    let (server, first) = server(1, &[("http.port_lease", "1s")]);
    let mut agent = server.agent("agent-1", text_service("first"));
    stop(&mut agent);
    let since = Instant::now();
    // 503 until the lease is over, refused afterwards, and then free for somebody else.
    eventually(PATIENCE, "the port is closed", || refuses(local(first)));
    assert!(since.elapsed() > Duration::from_millis(500));
    wait_for_list(&server, &[]);
    let other = server.agent("agent-2", text_service("second"));
    assert_eq!(other.port, first);
}

#[test]
fn agents_show_the_token_they_must() {
    let (server, _) = server(
        10,
        &[
            ("grpc.auth.shared_token", "shared-token"),
            ("grpc.auth.tokens", "own=own-token,other=other-token"),
        ],
    );
    let service = text_service("welcome");
    for (id, token) in [("anybody", "shared-token"), ("own", "own-token")] {
        let agent = server.agent_with(id, service, &[("grpc.token", token)]);
        assert_eq!(get(agent.address(), "/").text(), "welcome");
    }
    // No credential, though from this host; a wrong one; another id's; and the shared one for an
    // id that has its own.
    for (id, token) in [
        ("anybody", ""),
        ("anybody", "wrong-token"),
        ("anybody", "own-token"),
        ("own", "other-token"),
        ("own", "shared-token"),
    ] {
        let url = format!("http://{service}");
        let agent = server.start_agent(id, &url, &[("grpc.token", token)]);
        let told = agent.wait_for(&["rejected", "reason=auth"]);
        assert!(told.contains("grpc.token"), "{told}");
        assert!(retry_in(&told) >= 30.0, "{told}");
        let line =
            server
                .process
                .wait_for(&["agent rejected", "reason=auth", &format!("agent_id={id}")]);
        assert!(
            line.contains("WARN") && line.contains("grpc.token"),
            "{line}"
        );
    }
    // Once for each id and what is wrong with it, not for each attempt.
    assert_eq!(server.process.count(&["agent rejected"]), 3);
    assert_eq!(server.metric("silo_rejections_total", "auth"), 5.0);
    assert_eq!(server.metric("silo_registrations_total", ""), 2.0);
}

#[test]
fn without_credentials_agents_of_this_host_are_welcome() {
    let (server, _) = server(10, &[("grpc.host", "::")]);
    server.process.wait_for(&["no credential is configured"]);
    // A token that nobody asks for does no harm.
    let settings = [("grpc.token", "unasked")];
    let agent = server.agent_with("agent-1", text_service("welcome"), &settings);
    assert_eq!(get(agent.address(), "/").text(), "welcome");
}

#[test]
fn a_second_agent_with_the_same_id_takes_over_without_a_gap() {
    let (server, first) = server(10, &[]);
    let old_service = HeldService::start("old");
    let old = server.agent("agent-1", old_service.address);
    let address = old.address();

    // One request is under way through the old session, one connection stays open, and other
    // visitors come all the time.
    let held = std::thread::spawn(move || get(address, "/held"));
    old_service.wait_for_request();
    let mut kept = connect(address);
    let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    kept.write_all(request).unwrap();
    assert_eq!(read_answer(&mut kept, false).text(), "old");
    let over = Arc::new(AtomicBool::new(false));
    let visitors = std::thread::spawn({
        let over = over.clone();
        move || {
            let mut texts = Vec::new();
            while !over.load(Ordering::Relaxed) {
                // Fails the test if connecting is refused.
                let answer = get(address, "/");
                assert_eq!(answer.status, 200, "{}", answer.text());
                texts.push(answer.text());
            }
            texts
        }
    });

    let new = server.agent("agent-1", text_service("new"));
    assert_eq!(new.port, first, "the port isn't bound anew");
    kept.write_all(request).unwrap();
    assert_eq!(read_answer(&mut kept, false).text(), "new");
    // What the old session had begun, it may finish.
    old_service.let_go();
    assert_eq!(held.join().unwrap().text(), "old");
    let told = old.process.wait_for(&["rejected", "reason=replaced"]);
    assert!(retry_in(&told) >= 30.0, "{told}");
    assert_eq!(old.process.count(&["connected", "port="]), 1);

    // The old session's end changes nothing for the new one.
    let generation = server.process.wait_for(&["agent deregistered"]);
    assert!(generation.contains("generation=1"), "{generation}");
    wait_for_list(&server, &[("agent-1", first)]);
    assert_eq!(get(address, "/").text(), "new");
    over.store(true, Ordering::Relaxed);
    let texts = visitors.join().unwrap();
    assert_eq!(texts.first().map(String::as_str), Some("old"));
    assert_eq!(texts.last().map(String::as_str), Some("new"));
    let change = texts.iter().position(|text| text == "new").unwrap();
    assert!(texts[change..].iter().all(|text| text == "new"));
    assert_eq!(server.process.count(&["agent registered"]), 2);
}

/// A process that never gets a session says why, and goes on trying.
#[test]
fn an_agent_without_a_server_keeps_trying() {
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let server_address = nobody.to_string();
    let mut agent = Process::start(
        "agent",
        &[
            "agent",
            "http",
            "3000",
            "--server",
            &server_address,
            "--id",
            "agent-1",
        ],
        &[],
    );
    agent.wait_for_nth(3, &["disconnected", "retry_in="]);
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
}
