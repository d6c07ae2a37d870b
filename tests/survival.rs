//! Stops, cuts and kills: who notices when, and that every agent has its own port afterwards.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::raw::values_of;
use common::relay::Relay;
use common::{
    Answer, PATIENCE, Process, Server, connect, eventually, get, pause, port_range, read_answer,
    read_head, refuses, service, text_service, try_read_answer,
};
use silo_proxy::agent::Agent;
use silo_proxy::config::{AgentConfig, HostHeader};
use silo_proxy::net::raise_descriptor_limit;

/// In how much time a side has to notice that the other one has stopped, and a bit for a busy
/// machine.
const NOTICE: Duration = Duration::from_secs(35);

/// In how much time agents have to be back after their server is.
const BACK: Duration = Duration::from_secs(25);

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// GET on a connection of its own, or how that failed.
fn try_get(address: SocketAddr, target: &str) -> io::Result<Answer> {
    try_get_on(&mut try_connect(address)?, target)
}

fn try_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn try_get_on(stream: &mut TcpStream, target: &str) -> io::Result<Answer> {
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())?;
    try_read_answer(stream, false)
}

/// Does nothing for some time, where the test is about nothing happening in it.
fn let_pass(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        pause();
    }
}

/// Agents in a process of their own.
fn swarm(tunnel: SocketAddr, count: usize) -> Process {
    let (tunnel, count) = (tunnel.to_string(), count.to_string());
    Process::start(
        "swarm",
        &["swarm", "--server", &tunnel, "--count", &count],
        &[],
    )
}

/// A server that comes back under the same address, with the same range and settings.
struct Comeback {
    range: RangeInclusive<u16>,
    settings: Vec<(&'static str, String)>,
    server: Server,
}

impl Comeback {
    fn start(ports: u16, settings: &[(&'static str, &str)]) -> Self {
        let range = port_range(ports);
        let server = Server::with(range.clone(), settings);
        let mut settings: Vec<_> = settings
            .iter()
            .map(|(key, value)| (*key, (*value).to_owned()))
            .collect();
        settings.push(("grpc.port", server.tunnel.port().to_string()));
        Self {
            range,
            settings,
            server,
        }
    }

    fn kill(&mut self) {
        self.server.process.kill();
    }

    fn restart(&mut self) {
        let settings: Vec<_> = self
            .settings
            .iter()
            .map(|(key, value)| (*key, value.as_str()))
            .collect();
        self.server = Server::with(self.range.clone(), &settings);
    }

    fn registrations(&self) -> f64 {
        self.server.metric("silo_registrations_total", "")
    }
}

/// What a state file says: the ports by agent. It must be whole, and name nothing twice. One that
/// isn't written yet says nothing.
fn read_state(path: &Path) -> BTreeMap<String, (u16, String)> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => panic!("{error}"),
    };
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error} in the state file:\n{text}");
    });
    assert_eq!(json["name"], "silo-proxy ports");
    assert_eq!(json["version"], 1);
    let mut agents = BTreeMap::new();
    let mut ports = BTreeSet::new();
    for entry in json["ports"].as_array().unwrap() {
        let port = u16::try_from(entry["port"].as_u64().unwrap()).unwrap();
        let agent = entry["agent"].as_str().unwrap().to_owned();
        let state = entry["state"].as_str().unwrap().to_owned();
        assert!(ports.insert(port), "port {port} stands there twice");
        let twice = agents.insert(agent.clone(), (port, state));
        assert_eq!(twice, None, "{agent} stands there twice");
    }
    agents
}

#[test]
#[ignore = "waits half a minute for a heartbeat that doesn't come"]
fn a_stopped_agent_is_noticed_and_comes_back_to_its_port() {
    let server = Server::start();
    let agents =
        ["agent-1", "agent-2", "agent-3"].map(|id| (id, server.agent(id, text_service(id))));
    let (_, stopped) = &agents[1];
    stopped.process.signal("STOP");
    let since = Instant::now();
    eventually(NOTICE, "the server notices", || {
        server
            .process
            .count(&["agent deregistered", "agent_id=agent-2"])
            > 0
    });
    // Not for less than three lost heartbeats.
    assert!(since.elapsed() > Duration::from_secs(15));
    eventually(PATIENCE, "the port is closed", || {
        refuses(stopped.address())
    });

    stopped.process.signal("CONT");
    let expected = format!("port={}", stopped.port);
    stopped.process.wait_for_nth(2, &["connected", &expected]);
    for (id, agent) in &agents {
        assert_eq!(get(agent.address(), "/").text(), *id);
    }
    assert_eq!(server.process.count(&["agent registered"]), 4);
}

#[test]
#[ignore = "waits half a minute for a heartbeat that doesn't come"]
fn a_stopped_server_is_noticed_and_its_agents_come_back_to_their_ports() {
    let server = Server::start();
    let agents = ["agent-1", "agent-2", "agent-3", "agent-4"]
        .map(|id| (id, server.agent(id, text_service(id))));
    server.process.signal("STOP");
    let since = Instant::now();
    eventually(NOTICE, "the agents notice", || {
        let noticed = |agent: &common::Agent| agent.process.count(&["disconnected"]) > 0;
        agents.iter().all(|(_, agent)| noticed(agent))
    });
    assert!(since.elapsed() > Duration::from_secs(15));
    // They knock at a door that nobody opens: what they leave there is found when it is too late.
    for (_, agent) in &agents {
        agent
            .process
            .wait_for(&["disconnected", "no welcome within"]);
    }

    server.process.signal("CONT");
    eventually(BACK, "all are back on their ports", || {
        let mut rows = server.agents();
        rows.retain(|(id, port)| {
            let agent = agents.iter().find(|(name, _)| name == id);
            agent.is_some_and(|(_, agent)| agent.port == *port)
        });
        let answers = |(id, agent): &(&str, common::Agent)| {
            try_get(agent.address(), "/").is_ok_and(|answer| answer.text() == *id)
        };
        rows.len() == agents.len() && agents.iter().all(answers)
    });
    // And stay: nobody is taken for his own rival.
    let_pass(Duration::from_secs(3));
    assert_eq!(server.agents().len(), agents.len());
    for (id, agent) in &agents {
        assert_eq!(get(agent.address(), "/").text(), *id);
        assert_eq!(agent.process.count(&["rejected"]), 0);
    }
}

/// Twenty-five agents lose their connections together, four times over; and the server dies.
#[test]
fn after_a_hundred_reconnects_each_agent_has_its_port() {
    const AGENTS: usize = 25;
    let mut comeback = Comeback::start(40, &[]);
    let relay = Relay::start(comeback.server.tunnel);
    let _swarm = swarm(relay.address, AGENTS);
    let settled = |comeback: &Comeback, registrations: usize| {
        eventually(BACK, "all agents are here", || {
            comeback.registrations() == registrations as f64
                && comeback.server.agents().len() == AGENTS
        });
        comeback.server.agents()
    };
    let first = settled(&comeback, AGENTS);
    for round in 2..=5 {
        relay.cut();
        assert_eq!(settled(&comeback, round * AGENTS), first, "round {round}");
    }
    // Without a state file the new server learns from the agents who had which port.
    comeback.kill();
    comeback.restart();
    assert_eq!(settled(&comeback, AGENTS), first, "after the restart");
}

/// New processes, which know of no port: the server must.
#[test]
fn after_restarts_of_everybody_each_agent_has_its_port() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ports.json");
    let path = file.to_str().unwrap();
    let mut comeback = Comeback::start(10, &[("http.state_file", path)]);
    let services = ["agent-1", "agent-2", "agent-3", "agent-4"].map(|id| (id, text_service(id)));
    let connected = |server: &Server| -> BTreeMap<&str, u16> {
        let agents = services.map(|(id, service)| (id, server.agent(id, service)));
        agents.iter().map(|(id, agent)| (*id, agent.port)).collect()
    };
    let first = connected(&comeback.server);
    let written = |state: &str| {
        eventually(PATIENCE, "the file is written", || {
            let held = read_state(&file);
            first.iter().all(|(id, port)| {
                held.get(*id)
                    .is_some_and(|(kept, is)| kept == port && is == state)
            })
        });
    };
    // The processes ended when `connected` did.
    written("released");
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    comeback.kill();
    comeback.restart();
    comeback.server.process.wait_for(&["remembered", "ports=4"]);
    // A stranger comes first; then the others, in another order.
    let stranger = comeback.server.agent("stranger", services[0].1);
    assert!(!first.values().any(|port| *port == stranger.port));
    for (id, service) in services.iter().rev() {
        assert_eq!(comeback.server.agent(id, *service).port, first[id], "{id}");
    }
    written("released");

    // The same when the server ends in good order, with everybody connected.
    let agents = services.map(|(id, service)| comeback.server.agent(id, service));
    written("serving");
    comeback.server.process.signal("TERM");
    assert_eq!(comeback.server.process.wait().code(), Some(0));
    written("serving");
    drop(agents);
    comeback.restart();
    for (id, service) in services.iter().rev() {
        assert_eq!(comeback.server.agent(id, *service).port, first[id], "{id}");
    }
}

#[test]
fn leases_survive_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ports.json");
    let path = file.to_str().unwrap();
    let mut comeback = Comeback::start(2, &[("http.state_file", path), ("http.port_lease", "1h")]);
    let service = text_service("back");
    let mut here = comeback.server.agent("here", service);
    let mut away = comeback.server.agent("away", service);
    away.process.kill();
    let state = |id: &str| read_state(&file).get(id).map(|(_, state)| state.clone());
    eventually(PATIENCE, "both are written", || {
        state("here").as_deref() == Some("serving") && state("away").as_deref() == Some("leased")
    });
    comeback.kill();
    here.process.kill();
    comeback.restart();

    // Both ports wait for their agents: visitors are told, and nobody else gets them.
    for agent in [&here, &away] {
        eventually(PATIENCE, "the port is bound", || !refuses(agent.address()));
        let answer = get(agent.address(), "/");
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert_eq!(answer.header("x-silo-error"), ["agent_offline"]);
        assert_eq!(answer.header("retry-after").len(), 1);
    }
    eventually(PATIENCE, "both are listed", || {
        comeback.server.agents().len() == 2
    });
    let row = get(comeback.server.admin, "/agents/here");
    let row: serde_json::Value = serde_json::from_slice(&row.body).unwrap();
    assert_eq!(row["state"], "leased");
    assert_eq!(row["port"], here.port);
    assert_eq!(comeback.server.metric("silo_ports", "leased"), 2.0);
    let url = format!("http://{service}");
    let stranger = comeback.server.start_agent("stranger", &url, &[]);
    stranger.wait_for(&["rejected", "port_exhausted"]);
    // A visitor's connection from before its agent's return goes on after it.
    let mut visitor = connect(here.address());
    let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    visitor.write_all(request).unwrap();
    assert_eq!(read_answer(&mut visitor, false).status, 503);
    let back = comeback.server.agent("here", service);
    assert_eq!(back.port, here.port);
    visitor.write_all(request).unwrap();
    assert_eq!(read_answer(&mut visitor, false).text(), "back");
    // One lease runs on over the next restart, too.
    comeback.kill();
    comeback.restart();
    eventually(PATIENCE, "the port is bound", || !refuses(away.address()));
    assert_eq!(get(away.address(), "/").status, 503);
}

/// What is wrong with the file itself, and with where it is.
#[test]
fn a_state_file_that_cannot_be_used_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ports.json");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "{\"name\": \"silo-proxy ports\", \"version\": 1, \"po",
    )
    .unwrap();
    let server = Server::with(port_range(4), &[("http.state_file", path)]);
    let line = server.process.wait_for(&["WARN", "is set aside"]);
    assert!(line.contains("ports.json.damaged-1"), "{line}");
    server.agent("agent-1", text_service("served"));
    eventually(PATIENCE, "a new one is written", || {
        read_state(&file).contains_key("agent-1")
    });
    assert!(directory.path().join("ports.json.damaged-1").exists());

    // A second server doesn't touch it, one without a place for it doesn't start.
    for (path, why) in [
        (path, "in use by another server"),
        ("/nowhere/ports.json", "No such file"),
        (directory.path().to_str().unwrap(), "not a regular file"),
    ] {
        let mut second = Process::start(
            "second",
            &["server"],
            &[
                ("SILO_HTTP_PORT", "0"),
                ("SILO_GRPC_PORT", "0"),
                ("SILO_HTTP_STATE_FILE", path),
            ],
        );
        let (code, text) = second.finish();
        assert_eq!(code, Some(1), "{text}");
        assert!(
            text.contains("http.state_file") && text.contains(why),
            "{text}"
        );
    }
    assert_eq!(server.process.count(&["WARN"]), 1);
}

/// Every agent has waited for some seconds when the server is back; they must not come in a crowd.
#[test]
#[ignore = "keeps a server away for 5 s and waits for its agents' return"]
fn agents_come_back_spread_out() {
    const AGENTS: usize = 200;
    let mut comeback = Comeback::start(250, &[]);
    let _swarm = swarm(comeback.server.tunnel, AGENTS);
    let all_here = |server: &Server| {
        eventually(BACK, "all agents are back", || {
            server.process.count(&["agent registered"]) == AGENTS && server.agents().len() == AGENTS
        });
    };
    all_here(&comeback.server);
    let before = comeback.server.agents();
    comeback.kill();
    let_pass(Duration::from_secs(5));
    comeback.restart();
    all_here(&comeback.server);
    assert_eq!(comeback.server.agents(), before);

    // Log lines begin with the time: 2026-05-01T12:00:00.123456Z.
    let log = comeback.server.process.log();
    let mut times: Vec<Duration> = log
        .lines()
        .filter(|line| line.contains("agent registered"))
        .map(|line| {
            let time = humantime::parse_rfc3339(line.split_whitespace().next().unwrap()).unwrap();
            time.duration_since(std::time::UNIX_EPOCH).unwrap()
        })
        .collect();
    times.sort();
    let window = Duration::from_millis(500);
    let most = times
        .iter()
        .map(|start| {
            let inside = |time: &&Duration| (*start..*start + window).contains(*time);
            times.iter().filter(inside).count()
        })
        .max();
    assert!(most.unwrap() < AGENTS / 2, "{most:?} within {window:?}");
}

/// Agents that come and go all the time, in this process: each forwards to one service that
/// answers with the name of the agent that asked.
fn crowd(tunnel: SocketAddr, count: usize) {
    let service = service(|mut stream| {
        while let Ok(head) = read_head(&mut stream) {
            let name = values_of(&head, "host").concat();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", name.len());
            if stream.write_all((head + &name).as_bytes()).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let agents = (0..count).map(|number| come_and_go(number, tunnel, service));
        runtime.block_on(futures_util::future::join_all(agents));
    });
}

/// One agent after the other, all with the same id.
async fn come_and_go(number: usize, tunnel: SocketAddr, service: SocketAddr) {
    let id = format!("agent-{number:03}");
    loop {
        let mut config = AgentConfig::new(
            tunnel.to_string().parse().unwrap(),
            id.parse().unwrap(),
            format!("http://{service}").parse().unwrap(),
        );
        config.local.host_header = HostHeader::Value(id.clone());
        let agent = Agent::new(config).unwrap();
        let life = tokio::time::sleep(Duration::from_millis(random(100, 4_000)));
        if random(0, 2) == 0 {
            // Leaves in good order.
            agent.run(life).await;
        } else {
            // Vanishes.
            tokio::select! {
                () = agent.run(std::future::pending()) => {}
                () = life => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(random(0, 1_000))).await;
    }
}

/// A number from `low` to below `high`.
fn random(low: u64, high: u64) -> u64 {
    low + getrandom::u64().unwrap() % (high - low)
}

/// One row of GET /agents: id, port, generation; only those that are connected.
fn serving(admin: SocketAddr) -> io::Result<Vec<(String, u16, u64)>> {
    let answer = try_get(admin, "/agents")?;
    let json: serde_json::Value = serde_json::from_slice(&answer.body)?;
    let (mut ids, mut ports, mut rows) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for row in json["agents"].as_array().unwrap() {
        let id = row["agent_id"].as_str().unwrap().to_owned();
        let port = u16::try_from(row["port"].as_u64().unwrap()).unwrap();
        assert!(ids.insert(id.clone()), "{id} is listed twice");
        assert!(ports.insert(port), "port {port} is listed twice");
        if row["state"] == "serving" {
            rows.push((id, port, row["generation"].as_u64().unwrap()));
        }
    }
    Ok(rows)
}

/// A visitor of some agent: asks a few times on one connection. All answers must be that agent's,
/// if it was there all the time, and all one agent's in any case.
fn visit(admin: SocketAddr, served: &AtomicUsize) -> io::Result<()> {
    let before = serving(admin)?;
    if before.is_empty() {
        return Ok(());
    }
    let row = &before[random(0, before.len() as u64) as usize];
    let mut stream = try_connect(local(row.1))?;
    let mut names = BTreeSet::new();
    for _ in 0..random(1, 5) {
        let answer = try_get_on(&mut stream, "/")?;
        match answer.status {
            200 => drop(names.insert(answer.text())),
            502 | 503 => {}
            other => panic!("{other} {}", answer.text()),
        }
        assert!(names.len() <= 1, "{names:?} on one connection");
        // Time for the port to change hands.
        let_pass(Duration::from_millis(random(0, 100)));
    }
    if let Some(name) = names.first() {
        served.fetch_add(1, Ordering::Relaxed);
        if serving(admin)?.contains(row) {
            assert_eq!(*name, row.0, "another agent's answer on port {}", row.1);
        }
    }
    Ok(())
}

#[test]
#[ignore = "kills the server fifty times, which takes two minutes"]
fn whenever_the_server_is_killed_ports_and_answers_stay_apart() {
    const AGENTS: usize = 200;
    raise_descriptor_limit().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ports.json");
    let path = file.to_str().unwrap();
    // Fewer ports than agents, so that they change hands.
    let mut comeback =
        Comeback::start(160, &[("http.state_file", path), ("http.port_lease", "2s")]);
    crowd(comeback.server.tunnel, AGENTS);
    let served = AtomicUsize::new(0);
    let mut remembered = 0;
    for round in 0..50 {
        let admin = comeback.server.admin;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        // The server may be killed at any moment.
                        let _ = visit(admin, &served);
                        pause();
                    }
                });
            }
            let_pass(Duration::from_millis(random(100, 2_500)));
            comeback.kill();
            over.store(true, Ordering::Relaxed);
        });
        if round > 0 || file.exists() {
            remembered += read_state(&file).len();
        }
        assert_eq!(comeback.server.process.count(&["set aside"]), 0);
        assert_eq!(comeback.server.process.count(&["panicked"]), 0);
        comeback.restart();
    }
    // It was all about something.
    let served = served.into_inner();
    assert!(served > 500, "{served} visitors");
    assert!(remembered > 50 * 50, "{remembered} ports over all rounds");
    // When everybody is let alone, every port has an agent.
    eventually(BACK, "the range fills up", || {
        serving(comeback.server.admin).is_ok_and(|rows| rows.len() > 100)
    });
}
