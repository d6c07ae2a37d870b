//! Many at once who mean harm to one agent's port, to the tunnel port or to the admin port.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use silo_proxy::net::raise_descriptor_limit;

use crate::common::bystander::Bystander;
use crate::common::raw::settles;
use crate::common::{Server, connect, get, have, pause, port_range, text_service};
use crate::{Over, alone};

/// Connections of each of slowhttptest's attacks.
const SLOW: usize = 1000;

/// How long an attack goes on.
const ATTACK: Duration = Duration::from_secs(20);

/// What a visitor who has sent a part of a head may cost, in bytes: buffers of a few KiB and a task.
const SLOW_VISITOR: u64 = 16 * 1024;

/// What a visitor may cost who leaves an answer where it is: what of it was let into the tunnel,
/// which is more than its 56 KiB since pieces of it share their buffers with others'.
const SLOW_READER: u64 = 192 * 1024;

/// The attacks of slowhttptest, what they send or leave, and what each of them may cost.
const ATTACKS: &[(&str, &[&str], u64)] = &[
    // Heads that never end.
    ("slow heads", &["-H"], SLOW_VISITOR),
    // Content that comes a few bytes at a time.
    ("slow bodies", &["-B"], SLOW_VISITOR),
    // Answers that are read a few bytes at a time.
    (
        "slow reads",
        &[
            "-X", "-w", "10", "-y", "20", "-n", "5", "-z", "32", "-k", "3",
        ],
        SLOW_READER,
    ),
];

#[test]
#[ignore = "three attacks of 20 s each"]
fn a_thousand_slow_visitors_of_each_kind_leave_the_service_to_others() {
    if !have("slowhttptest", "slowhttptest") {
        return;
    }
    let _alone = alone();
    raise_descriptor_limit().unwrap();
    let text = "slow reads take their time. ".repeat(2000);
    let server = Server::with(port_range(4), &[]);
    // What it keeps of connections to the service is gone soon.
    let settings = [("local.idle_timeout", "1s")];
    let agent = server.agent_with("attacked", text_service(&text), &settings);
    let bystander = Bystander::start(&server, &[&agent.process]);
    let before = server.process.resident_bytes();
    for (name, options, cost) in ATTACKS {
        let url = format!("http://{}/", agent.address());
        let (count, seconds) = (SLOW.to_string(), ATTACK.as_secs().to_string());
        let output = Command::new("slowhttptest")
            .args(["-u", &url, "-c", &count, "-r", "500", "-l", &seconds])
            .args(["-i", "5", "-p", "3"])
            .args(*options)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let grown = server.process.peak_resident_bytes().saturating_sub(before);
        println!("{name}: the server grew by {} KiB at most", grown / 1024);
        assert!(text.contains("service available:"), "{name}: {text}");
        // Its own probe, at every look.
        let available = text
            .lines()
            .filter(|line| line.contains("service available:"));
        for line in available {
            assert!(line.contains("YES"), "{name}: {text}");
        }
        assert!(grown < SLOW as u64 * cost, "{name}: {grown}");
    }
    settles(&server);
    bystander.noticed_nothing();
}

/// Runs each of these over and over on a thread of its own until `during` is over.
fn beside<T>(attackers: &[&(dyn Fn() + Sync)], during: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for attack in attackers {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    attack();
                    // As fast as they can, they would take the machine's two cores for themselves.
                    pause();
                }
            });
        }
        let _over = Over(&over);
        during()
    })
}

/// Opens so many connections that send these bytes and then nothing.
fn open(address: SocketAddr, count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let open = || {
        let mut stream = connect(address);
        stream.write_all(bytes).unwrap();
        stream
    };
    (0..count).map(|_| open()).collect()
}

/// A connection by HTTP/2 that asks and takes it back, as fast as it can, until it is cut.
fn rapid_resets(address: SocketAddr) {
    let mut stream = connect(address);
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for stream in (1_u32..2000).step_by(2) {
        // GET / of the host h, and RST_STREAM with CANCEL.
        bytes.extend(b"\0\0\x06\x01\x05");
        bytes.extend(stream.to_be_bytes());
        bytes.extend(b"\x82\x84\x86\x01\x01h\0\0\x04\x03\0");
        bytes.extend(stream.to_be_bytes());
        bytes.extend(8_u32.to_be_bytes());
    }
    let _ = stream.write_all(&bytes);
    let mut rest = [0; 4096];
    while matches!(stream.read(&mut rest), Ok(1..)) {}
}

fn wait(time: Duration) {
    let since = Instant::now();
    while since.elapsed() < time {
        pause();
    }
}

#[test]
#[ignore = "attacks for ten seconds, with 2,500 connections"]
fn slow_heads_a_flood_and_idle_sockets_together_hold_up_nobody_else() {
    mixed(500, 1500, Duration::from_secs(10));
}

#[test]
fn a_few_slow_heads_a_flood_and_idle_sockets_hold_up_nobody_else() {
    mixed(50, 150, Duration::from_secs(2));
}

fn mixed(slow: usize, idle: usize, time: Duration) {
    let _alone = alone();
    raise_descriptor_limit().unwrap();
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("attacked", text_service("still here"));
    let bystander = Bystander::start(&server, &[&agent.process]);
    let before = server.process.resident_bytes();
    let address = agent.address();
    let held = [
        open(address, slow, b"GET / HTTP/1.1\r\nHost: h\r\nX-Slow: "),
        open(address, idle, b""),
    ];
    let floods = AtomicUsize::new(0);
    let flood = || {
        rapid_resets(address);
        floods.fetch_add(1, Ordering::Relaxed);
    };
    bystander.forget();
    let (asked, grown) = beside(&[&flood], || {
        let since = Instant::now();
        let mut asked = 0;
        while since.elapsed() < time {
            // A good visitor of the attacked agent is served too.
            assert_eq!(get(address, "/").text(), "still here");
            asked += 1;
            pause();
        }
        (
            asked,
            server.process.resident_bytes().saturating_sub(before),
        )
    });
    println!(
        "{slow} slow heads, {idle} idle sockets, {} floods: {asked} good visits beside, {} KiB more",
        floods.load(Ordering::Relaxed),
        grown / 1024
    );
    assert!(floods.load(Ordering::Relaxed) > 2, "no flood was ended");
    let budget = (slow + idle) as u64 * SLOW_VISITOR + 8 * 1024 * 1024;
    assert!(grown < budget, "{grown} bytes more");
    drop(held);
    settles(&server);
    bystander.noticed_nothing();
}

#[test]
fn floods_of_the_tunnel_and_admin_ports_hold_up_no_visitor() {
    let _alone = alone();
    let server = Server::with(port_range(4), &[("grpc.max_handshakes", "100")]);
    let bystander = Bystander::start(&server, &[]);
    let (tunnel, admin) = (server.tunnel, server.admin);
    // Whoever comes is turned away, or cut by those that come after him.
    let garbage = || {
        let mut stream = connect(tunnel);
        let _ = stream.write_all(&[b'x'; 1000]);
        let _ = stream.read(&mut [0; 100]);
    };
    let resets = || rapid_resets(tunnel);
    let silent = || {
        let idle: Vec<_> = (0..20).map(|_| connect(tunnel)).collect();
        drop(idle);
    };
    let asks = || {
        let mut stream = connect(admin);
        let _ =
            stream.write_all(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\nnonsense\r\n\r\n");
        let _ = stream.read(&mut [0; 1000]);
    };
    bystander.forget();
    beside(&[&garbage, &resets, &silent, &asks], || {
        wait(Duration::from_secs(2))
    });
    // An agent gets in afterwards as before.
    let agent = server.agent("late", text_service("late"));
    assert_eq!(get(agent.address(), "/").text(), "late");
    bystander.noticed_nothing();
}
