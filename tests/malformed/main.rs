//! Requests that are none, or that two readers could read in two ways: a visitor gets a refusal
//! and a close, or a service gets one well-formed request and the visitor exactly its answer.
//!
//! The same list goes through nginx and HAProxy, and the three are printed side by side:
//! `cargo test --test malformed -- --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and this one shows a table"
)]

#[path = "../common/mod.rs"]
mod common;

mod list;
mod service;
mod visit;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use common::bystander::{Bystander, alone};
use common::daemon::Daemon;
use common::raw::settles;
use common::{PATIENCE, Server, eventually, have, port_range};
use list::{Case, list};
use service::Strict;
use visit::{Neighbour, Outcome, Patience, visit};

#[test]
fn what_is_malformed_is_refused_or_made_unambiguous() {
    let cases = list();
    assert!(cases.len() >= 150, "{} cases", cases.len());
    let names: HashSet<_> = cases.iter().map(|case| (case.group, case.name)).collect();
    assert_eq!(names.len(), cases.len(), "two cases of one name");

    let _alone = alone();
    let (nginx, haproxy) = std::thread::scope(|scope| {
        let nginx = scope.spawn(|| through_nginx(&cases));
        let haproxy = scope.spawn(|| through_haproxy(&cases));
        (nginx.join().unwrap(), haproxy.join().unwrap())
    });
    let silo = through_silo(&cases, usize::MAX);
    print(&cases, &silo, nginx.as_deref(), haproxy.as_deref());

    let mut faults = Vec::new();
    for (at, (case, outcome)) in cases.iter().zip(&silo).enumerate() {
        if let Some(fault) = outcome.fault(case) {
            faults.push(format!(
                "{}, {}: {fault}\n    {}",
                case.group,
                case.name,
                case.shown()
            ));
        }
        let (Some(nginx), Some(haproxy)) = (&nginx, &haproxy) else {
            continue;
        };
        let alone = outcome.passes() && !nginx[at].passes() && !haproxy[at].passes();
        if alone {
            faults.push(format!(
                "{}, {}: only silo-proxy passes this",
                case.group, case.name
            ));
        }
    }
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

/// However the bytes are cut, they are judged the same.
#[test]
fn pieces_make_no_difference() {
    let cases = list();
    let _alone = alone();
    let whole = through_silo(&cases, usize::MAX);
    let pieces = through_silo(&cases, 5);
    for ((case, whole), pieces) in cases.iter().zip(whole).zip(pieces) {
        assert_eq!(pieces.fault(case), None, "{}, {}", case.group, case.name);
        // Who leaves may do so before his bytes are looked at once more.
        if !case.leaves {
            let same = whole.shown() == pieces.shown();
            assert!(same, "{}, {}: {whole:?}, {pieces:?}", case.group, case.name);
        }
    }
}

fn through_silo(cases: &[Case], piece: usize) -> Vec<Outcome> {
    let service = Strict::start();
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("a", service.address);
    let patience = Patience {
        answer: PATIENCE,
        close: PATIENCE,
    };
    let mut neighbour = Neighbour::new(agent.address());
    assert_eq!(neighbour.asks(), None);
    let bystander = Bystander::start(&server, &[&agent.process]);
    service.take();
    let descriptors = server.process.descriptors();
    let outcomes = cases.iter().map(|case| {
        let mut outcome = visit(agent.address(), case, piece, patience);
        outcome.faults.extend(neighbour.asks());
        outcome.compare(case, service.take());
        outcome
    });
    let outcomes = outcomes.collect();
    bystander.noticed_nothing();
    settles(&server);
    eventually(PATIENCE, "the visitors' sockets are closed", || {
        server.process.descriptors() <= descriptors
    });
    outcomes
}

/// For the programs to compare with, of which nothing is asked. They keep connections open.
const SHORT: Patience = Patience {
    answer: Duration::from_millis(500),
    close: Duration::from_millis(20),
};

fn through_nginx(cases: &[Case]) -> Option<Vec<Outcome>> {
    have("nginx", "nginx-light").then(|| {
        let service = Strict::start();
        // It has a line to say of most of them.
        let nginx = Daemon::nginx(&format!(
            "error_log /dev/null;\nlocation / {{ proxy_pass http://{};\n\
             proxy_http_version 1.1;\nproxy_set_header Host $http_host;\n\
             proxy_set_header Connection \"\";\nproxy_buffering off;\n\
             proxy_request_buffering off; }}",
            service.address
        ));
        through(cases, nginx.address, &service)
    })
}

fn through_haproxy(cases: &[Case]) -> Option<Vec<Outcome>> {
    have("haproxy", "haproxy").then(|| {
        let service = Strict::start();
        let haproxy = Daemon::haproxy(service.address);
        through(cases, haproxy.address, &service)
    })
}

fn through(cases: &[Case], address: SocketAddr, service: &Strict) -> Vec<Outcome> {
    let outcomes = cases.iter().map(|case| {
        let mut outcome = visit(address, case, usize::MAX, SHORT);
        outcome.compare(case, service.take());
        outcome
    });
    outcomes.collect()
}

fn print(cases: &[Case], silo: &[Outcome], nginx: Option<&[Outcome]>, haproxy: Option<&[Outcome]>) {
    let shown = |outcomes: Option<&[Outcome]>, at: usize| match outcomes {
        Some(outcomes) => outcomes[at].shown(),
        None => "not installed".to_owned(),
    };
    let mut group = "";
    for (at, case) in cases.iter().enumerate() {
        if case.group != group {
            group = case.group;
            println!("\n{group:<46} | silo-proxy        | nginx             | HAProxy");
        }
        println!(
            "{:<46} | {:<17} | {:<17} | {}",
            case.name,
            silo[at].shown(),
            shown(nginx, at),
            shown(haproxy, at)
        );
    }
    let count = |outcomes: &[Outcome]| outcomes.iter().filter(|one| one.passes()).count();
    println!("\n{} cases; passed by:", cases.len());
    println!("silo-proxy {}", count(silo));
    for (name, outcomes) in [("nginx", nginx), ("HAProxy", haproxy)] {
        if let Some(outcomes) = outcomes {
            println!("{name} {}", count(outcomes));
        }
    }
}
