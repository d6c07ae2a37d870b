//! Requests that no client should send, each alone on a connection: of every one either nothing
//! reaches the service and the visitor gets a 4xx and the end of his connection, or one well-formed
//! request reaches it and the visitor gets exactly its answer.
//!
//! Behind the bytes follows at once a good request, `/sentinel`: who misjudges where a request ends
//! takes a part of it for something else. nginx and HAProxy get the same; `cargo test --test
//! malformed -- --nocapture` prints all three side by side.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test may fail anywhere, and prints a table"
)]

#[path = "../common/mod.rs"]
mod common;

mod list;
mod service;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::nginx::Nginx;
use common::{PATIENCE, Server, connect, eventually, get, have, port_range};
use list::Case;
use service::{Came, Strict};

const SENTINEL: &[u8] = b"GET /sentinel HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";

/// How long nothing may come of what isn't whole, to say that it is waited for.
const QUIET: Duration = Duration::from_millis(400);

/// What a visitor got.
#[derive(Debug, Default)]
struct Got {
    /// Status and, if it is the service's, the number of the request.
    answers: Vec<(u16, Option<usize>)>,
    /// Bytes that are no answer.
    rest: Vec<u8>,
    /// The connection has ended, rather than to wait for more.
    ended: bool,
}

impl Got {
    /// Status of whatever is no answer of the service's.
    fn refusal(&self) -> Option<u16> {
        let mut refusals = self.answers.iter().filter(|(_, number)| number.is_none());
        refusals.next().map(|(status, _)| *status)
    }

    fn served(&self) -> Vec<usize> {
        self.answers
            .iter()
            .filter_map(|(_, number)| *number)
            .collect()
    }
}

/// Sends the case with the sentinel behind it, and reads to the end.
fn visit(front: SocketAddr, case: &Case) -> Got {
    let mut stream = connect(front);
    let mut writer = stream.try_clone().unwrap();
    let bytes = [&case.bytes[..], SENTINEL].concat();
    // Who is refused early may not take all of it.
    let writer = std::thread::spawn(move || writer.write_all(&bytes));
    let mut came = Vec::new();
    let mut got = Got::default();
    stream.set_read_timeout(Some(patience(case))).unwrap();
    loop {
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) => break got.ended = true,
            Ok(count) => came.extend_from_slice(&piece[..count]),
            Err(error) if common::raw::is_timeout(&error) => break,
            // A reset.
            Err(_) => break got.ended = true,
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = writer.join();
    while let Some((status, number, length)) = answer(&came) {
        got.answers.push((status, number));
        came.drain(..length);
    }
    got.rest = came;
    got
}

fn patience(case: &Case) -> Duration {
    if case.incomplete {
        QUIET
    } else {
        Duration::from_secs(3)
    }
}

/// The final answer at the beginning of these bytes, if it is whole, and its length with whatever
/// interim ones came before.
fn answer(bytes: &[u8]) -> Option<(u16, Option<usize>, usize)> {
    let mut start = 0;
    loop {
        let rest = &bytes[start..];
        let end = rest.windows(4).position(|part| part == b"\r\n\r\n")? + 4;
        let head = String::from_utf8_lossy(&rest[..end]).into_owned();
        let status: u16 = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
        if (100..200).contains(&status) {
            start += end;
            continue;
        }
        let of = |name: &str| {
            let values = common::raw::values_of(rest[..end].as_ref(), name);
            values.first().cloned()
        };
        let number = of("x-number").and_then(|number| number.parse().ok());
        let length = match (of("x-method").as_deref(), of("content-length")) {
            (Some("HEAD"), _) => 0,
            (_, Some(length)) => length.parse().ok()?,
            // To the end.
            (_, None) => rest.len() - end,
        };
        let whole = start + end + length;
        return (bytes.len() >= whole).then_some((status, number, whole));
    }
}

/// One of the three, and the service behind it.
struct Front {
    name: &'static str,
    address: SocketAddr,
    service: Strict,
}

/// What came of a case, in a word or two, and what is wrong with it.
fn judge(front: &Front, case: &Case) -> (String, Option<String>) {
    let got = visit(front.address, case);
    let after = get(front.address, "/bystander");
    let came = front.service.came();
    let mut wrong = None;
    let mut numbers = Vec::new();
    let mut passed = false;
    for what in &came {
        match what {
            Came::Fault(fault) => wrong = Some(format!("the service got {fault}")),
            Came::Request { target, .. } if target == "/bystander" => {}
            Came::Request { number, target } => {
                numbers.push(*number);
                let path = target.strip_prefix("http://h").unwrap_or(target);
                passed |= path != "/sentinel";
                if path.contains("hidden") && !path.starts_with("/own") {
                    wrong = Some(format!("the service was asked for {target}"));
                }
            }
        }
    }
    if got.served() != numbers {
        wrong = Some(format!("answers {:?} to {came:?}", got.served()));
    }
    if !got.rest.is_empty() {
        wrong = Some(format!(
            "half an answer: {:?}",
            String::from_utf8_lossy(&got.rest)
        ));
    }
    if got.refusal().is_some() && !got.ended {
        wrong = Some("refused, but not closed".to_owned());
    }
    if got
        .refusal()
        .is_some_and(|status| !(400..=505).contains(&status) || status == 500)
    {
        wrong = Some(format!("refused with {:?}", got.refusal()));
    }
    if !got.ended && !case.incomplete {
        wrong = Some("left waiting".to_owned());
    }
    if after.status != 200 {
        wrong = Some(format!("a bystander got {}", after.status));
    }
    let verdict = match (passed, got.refusal()) {
        (true, None) => "passed".to_owned(),
        (true, Some(status)) => format!("passed, then {status}"),
        (false, Some(status)) => status.to_string(),
        (false, None) if !got.ended => "waits".to_owned(),
        (false, None) if numbers.is_empty() => "closed".to_owned(),
        (false, None) => "passed over".to_owned(),
    };
    (verdict, wrong)
}

/// An HAProxy of the test's own, ended when dropped.
struct Haproxy(
    Child,
    #[expect(dead_code, reason = "keeps its settings")] tempfile::TempDir,
);

impl Haproxy {
    fn start(service: SocketAddr) -> (Self, SocketAddr) {
        let directory = tempfile::tempdir().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], *port_range(1).start()));
        let file = directory.path().join("haproxy.cfg");
        let settings = format!(
            "defaults\n mode http\n timeout connect 5s\n timeout client 10s\n timeout server 10s\n\
             frontend front\n bind {address}\n default_backend back\n\
             backend back\n server service {service}\n"
        );
        std::fs::write(&file, settings).unwrap();
        let child = Command::new("haproxy")
            .env("PATH", common::nginx::path_with_sbin())
            .args(["-db", "-q", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually(PATIENCE, "HAProxy listens", || {
            TcpStream::connect(address).is_ok()
        });
        (Self(child, directory), address)
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_one_is_refused_or_reaches_the_service_well_formed() {
    let list = list::list();
    assert!(list.len() >= 150, "{}", list.len());
    let service = Strict::start();
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("a", service.address);
    let mut fronts = vec![Front {
        name: "silo-proxy",
        address: agent.address(),
        service,
    }];
    let nginx = have("nginx", "nginx-light").then(|| {
        let service = Strict::start();
        let nginx = Nginx::start(&format!(
            "location / {{ proxy_pass http://{};\nproxy_http_version 1.1;\n\
             proxy_set_header Host $http_host;\nproxy_set_header Connection \"\";\n\
             proxy_buffering off;\nproxy_request_buffering off; }}",
            service.address
        ));
        fronts.push(Front {
            name: "nginx",
            address: nginx.address,
            service,
        });
        nginx
    });
    let haproxy = have("haproxy", "haproxy").then(|| {
        let service = Strict::start();
        let (haproxy, address) = Haproxy::start(service.address);
        fronts.push(Front {
            name: "HAProxy",
            address,
            service,
        });
        haproxy
    });

    let columns: Vec<Vec<(String, Option<String>)>> = std::thread::scope(|scope| {
        let all: Vec<_> = fronts
            .iter()
            .map(|front| scope.spawn(|| list.iter().map(|case| judge(front, case)).collect()))
            .collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    drop((nginx, haproxy));

    let mut faults = Vec::new();
    print!("\n{:60}", "");
    fronts.iter().for_each(|front| print!("{:20}", front.name));
    println!();
    for (number, case) in list.iter().enumerate() {
        print!("{:60}", case.name);
        for column in &columns {
            let (verdict, wrong) = &column[number];
            let mark = if wrong.is_some() { " !" } else { "" };
            print!("{:20}", format!("{verdict}{mark}"));
        }
        println!();
        let (verdict, wrong) = &columns[0][number];
        if let Some(wrong) = wrong {
            faults.push(format!("{}: {verdict}: {wrong}", case.name));
        }
        let refuses = |column: &Vec<(String, _)>| !column[number].0.starts_with("passed");
        let alone = columns.len() == 3 && columns[1..].iter().all(refuses);
        if alone && verdict.starts_with("passed") {
            faults.push(format!("{}: only silo-proxy passes it", case.name));
        }
        if verdict == "closed" {
            faults.push(format!("{}: closed without a word", case.name));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    common::raw::settles(&server);
}
