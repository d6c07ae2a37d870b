//! Agents that come and go all the time, and those that stay beside them.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use silo_proxy::agent::Agent;
use silo_proxy::config::AgentConfig;
use silo_proxy::net::raise_descriptor_limit;
use tokio::task::JoinSet;

use crate::common::bystander::{Bystander, SignedVisitor, signing_service};
use crate::common::raw::settles;
use crate::common::{
    PATIENCE, Process, Server, eventually, get, pause, port_range, text_service, try_read_answer,
};
use crate::{Over, alone};

#[test]
fn twenty_flapping_agents_cost_those_that_stay_no_request() {
    flap(20, Duration::from_secs(3));
}

#[test]
#[ignore = "flaps for a minute"]
fn two_hundred_flapping_agents_cost_those_that_stay_no_request() {
    flap(200, Duration::from_secs(60));
}

/// How many threads visit the agents that stay, each of them its share in turn.
const VISITORS: usize = 4;

/// Has `count` agents flap for a while beside as many that stay.
fn flap(count: u16, time: Duration) {
    let _alone = alone();
    raise_descriptor_limit().unwrap();
    // A port that was just released may still be closing.
    let server = Server::with(port_range(3 * count + 20), &[]);
    let staying = start_agents(&server, signing_service(), "stay", count);
    let those = || listed(&server, "stay-");
    let all = Duration::from_secs(60);
    eventually(all, "all that stay are registered", || {
        those().len() == usize::from(count)
    });
    let before = those();
    let ports: Vec<u16> = before.values().map(|(port, _)| *port).collect();
    let asked = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let (bystander, mut flapping) = std::thread::scope(|scope| {
        let _over = Over(&over);
        for share in ports.chunks(ports.len().div_ceil(VISITORS)) {
            scope.spawn(|| visit_those_that_stay(share, &over, &asked));
        }
        // All that stay are visited with or without the others: only those are the case.
        let bystander = Bystander::start(&server, &[&staying]);
        asked.store(0, Ordering::Relaxed);
        let flapping = start_agents(&server, text_service(FLAPPER), "flap", count);
        let heard = scope.spawn(|| visit_flapping(&server, &over));
        let until = Instant::now() + time;
        while Instant::now() < until {
            pause();
        }
        over.store(true, Ordering::Relaxed);
        let came = server.metric("silo_registrations_total", "") - f64::from(count + 1);
        eprintln!(
            "{count} agents came {came} times in {time:?}; to those that stay {} requests, all \
             answered; to those that flap {:?}",
            asked.load(Ordering::Relaxed),
            heard.join().unwrap()
        );
        assert!(came > 1.5 * f64::from(count), "too little for this test");
        (bystander, flapping)
    });
    assert_eq!(
        before,
        those(),
        "their ports and their sessions are the same"
    );

    flapping.kill();
    eventually(PATIENCE, "none that flaps is listed", || {
        listed(&server, "flap-").is_empty()
    });
    settles(&server);
    assert_eq!(server.metric("silo_panics_total", ""), 0.0);
    bystander.noticed_nothing();
}

/// The agents of GET /agents with such an id: port and generation of each.
fn listed(server: &Server, prefix: &str) -> BTreeMap<String, (u16, u64)> {
    let answer = get(server.admin, "/agents");
    let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let rows = json["agents"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let port = u16::try_from(row["port"].as_u64().unwrap()).unwrap();
            let generation = row["generation"].as_u64().unwrap();
            let id = row["agent_id"].as_str().unwrap().to_owned();
            (id, (port, generation))
        })
        .filter(|(id, _)| id.starts_with(prefix))
        .collect()
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Asks each in turn: on a connection that is kept, and every eighth time on another one.
fn visit_those_that_stay(ports: &[u16], over: &AtomicBool, asked: &AtomicUsize) {
    let mut kept: Vec<SignedVisitor> = ports
        .iter()
        .map(|port| SignedVisitor::open(address(*port)).unwrap())
        .collect();
    let mut round = 0_usize;
    while !over.load(Ordering::Relaxed) {
        round += 1;
        for (number, (port, visitor)) in ports.iter().zip(&mut kept).enumerate() {
            let outcome = if (round + number).is_multiple_of(8) {
                SignedVisitor::open(address(*port)).and_then(|mut new| new.ask())
            } else {
                visitor.ask()
            };
            outcome.unwrap_or_else(|error| panic!("port {port}, round {round}: {error}"));
            asked.fetch_add(1, Ordering::Relaxed);
            // The machine has to flap as well.
            pause();
        }
    }
}

const FLAPPER: &str = "one that flaps";

/// Visits those that flap, who may fail, but in no other way than agents do that have gone.
/// Returns how often it heard what.
fn visit_flapping(server: &Server, over: &AtomicBool) -> BTreeMap<String, usize> {
    let mut heard = BTreeMap::new();
    while !over.load(Ordering::Relaxed) {
        for (port, _) in listed(server, "flap-").into_values() {
            let outcome = ask_flapping(address(port));
            *heard.entry(outcome).or_default() += 1;
            if over.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    heard
}

fn ask_flapping(address: SocketAddr) -> String {
    let ask = || {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")?;
        try_read_answer(&mut stream, false)
    };
    match ask() {
        Ok(answer) if answer.status == 200 => {
            assert_eq!(answer.text(), FLAPPER);
            "200".to_owned()
        }
        Ok(answer) => {
            let error = answer.header("x-silo-error").concat();
            let status = answer.status;
            assert!(
                matches!(
                    (status, &*error),
                    (502, "tunnel_lost") | (503, "agent_offline")
                ),
                "{status} {error}: {}",
                answer.text()
            );
            error
        }
        // Its port was closed, or reset while the connection waited there.
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => "closed".to_owned(),
        Err(error) => panic!("no answer: {error}"),
    }
}

// The agents, in a process of their own: this test binary's.

/// How the process is told what to do.
const AGENTS_SERVER: &str = "SILO_TEST_AGENTS_SERVER";
const AGENTS_SERVICE: &str = "SILO_TEST_AGENTS_SERVICE";
const AGENTS_KIND: &str = "SILO_TEST_AGENTS_KIND";
const AGENTS_COUNT: &str = "SILO_TEST_AGENTS_COUNT";

/// Starts `count` agents for one service that stay or flap.
fn start_agents(server: &Server, service: SocketAddr, kind: &str, count: u16) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let test = "flapping::agents_that_stay_or_flap";
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    let environment = [
        (AGENTS_SERVER, &*server.tunnel.to_string()),
        (AGENTS_SERVICE, &*format!("http://{service}")),
        (AGENTS_KIND, kind),
        (AGENTS_COUNT, &*count.to_string()),
    ];
    Process::start_command(kind, &mut command, &environment)
}

#[test]
#[ignore = "not a test of its own: the agents of others, in a process that can be killed"]
fn agents_that_stay_or_flap() {
    let order = |name| Some(std::env::var_os(name)?.into_string().unwrap());
    let (Some(server), Some(service), Some(kind), Some(count)) = (
        order(AGENTS_SERVER),
        order(AGENTS_SERVICE),
        order(AGENTS_KIND),
        order(AGENTS_COUNT),
    ) else {
        return;
    };
    raise_descriptor_limit().unwrap();
    let id = "agent".parse().unwrap();
    let mut config = AgentConfig::new(server.parse().unwrap(), id, service.parse().unwrap());
    // Connections that were needed aren't kept longer than the test.
    config.local.idle_timeout = Duration::from_secs(2);
    let template = Agent::new(config).unwrap();
    let agents = async {
        let mut agents = JoinSet::new();
        for number in 0..count.parse::<u64>().unwrap() {
            let id = format!("{kind}-{number:03}").parse().unwrap();
            let template = template.with_id(id).unwrap();
            if kind == "flap" {
                agents.spawn(come_and_go(template, number));
            } else {
                agents.spawn(template.run(std::future::pending()));
            }
        }
        // Whoever started this process kills it; should he be gone, it ends by itself.
        let _ = tokio::time::timeout(Duration::from_secs(170), agents.join_all()).await;
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(agents);
}

/// Lives for a few seconds, time and again: it takes its leave, or vanishes, or is replaced
/// by its successor while it lives.
async fn come_and_go(template: Agent, number: u64) {
    for life in 0_u64.. {
        let agent = template.with_id(template.id().clone()).unwrap();
        let time = Duration::from_millis(100 + (number * 7_919 + life * 104_729) % 4_800);
        match (number + life) % 3 {
            0 => agent.run(tokio::time::sleep(time)).await,
            1 => {
                let _ = tokio::time::timeout(time, agent.run(std::future::pending())).await;
            }
            _ => {
                let outlives = time + Duration::from_millis(300);
                let left = async move { tokio::time::sleep(outlives).await };
                tokio::spawn(agent.run(left));
                tokio::time::sleep(time).await;
            }
        }
    }
}
