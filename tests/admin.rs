//! The admin port as programs poll it: what changed since last time, and the wait for a change.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{
    Answer, PATIENCE, Server, connect, eventually, get, have, port_range, read_answer, request,
    text_service,
};

/// From an agent's welcome to the answer of whoever waited: 50 ms by design, the rest is for a busy
/// machine.
const NOTICE: Duration = Duration::from_secs(2);

fn list(server: &Server, query: &str, headers: &[(&str, &str)]) -> Answer {
    request(
        server.admin,
        "GET",
        &format!("/agents{query}"),
        headers,
        b"",
    )
}

fn tag(answer: &Answer) -> String {
    answer.header("etag").remove(0)
}

/// Asks for a change after `tag` and leaves the answer to be read.
fn wait(server: &Server, tag: &str) -> TcpStream {
    let mut stream = connect(server.admin);
    let head = format!(
        "GET /agents?wait=60s HTTP/1.1\r\nHost: {}\r\nIf-None-Match: {tag}\r\n\r\n",
        server.admin
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

fn ids(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let rows = json["agents"].as_array().unwrap();
    let ids = rows.iter().map(|row| row["agent_id"].as_str().unwrap());
    ids.map(str::to_owned).collect()
}

#[test]
fn a_poller_follows_an_agent_from_its_coming_to_its_going() {
    let server = Server::with(port_range(10), &[("http.port_lease", "1s")]);
    let mut tag = tag(&list(&server, "", &[]));
    let service = text_service("here");
    // Each change answers the wait that was begun before it.
    let mut next = |server: &Server, change: &mut dyn FnMut()| {
        let mut waiting = wait(server, &tag);
        change();
        let answer = read_answer(&mut waiting, false);
        let now = answer.header("etag").remove(0);
        assert_ne!(now, tag);
        tag = now;
        answer
    };

    let mut agent = None;
    let mut since = Instant::now();
    let came = next(&server, &mut || {
        agent = Some(server.agent("agent-1", service));
        since = Instant::now();
    });
    assert!(since.elapsed() < NOTICE, "{:?}", since.elapsed());
    assert_eq!(ids(&came), ["agent-1"]);
    assert!(came.text().contains(r#""state":"serving""#));
    let mut agent = agent.unwrap();

    // Requests don't count, though their figures are shown.
    let same = came.header("etag").remove(0);
    assert_eq!(get(agent.address(), "/").text(), "here");
    let unchanged = list(&server, "?wait=100ms", &[("If-None-Match", &same)]);
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));
    eventually(PATIENCE, "the request is counted", || {
        list(&server, "", &[]).text().contains(r#""requests":1,"#)
    });
    assert_eq!(list(&server, "", &[]).header("etag"), [same]);

    let leased = next(&server, &mut || agent.process.kill());
    assert!(leased.text().contains(r#""state":"leased""#));
    assert!(leased.text().contains(r#""peer":null"#));
    let gone = next(&server, &mut || {});
    assert!(ids(&gone).is_empty());
}

#[test]
fn a_thousand_pollers_are_woken_by_one_agent() {
    // Both sides of each connection are in processes of their own; the rest is for the test.
    let limit = silo_proxy::net::raise_descriptor_limit().unwrap();
    let count = limit
        .now
        .map_or(1_000, |limit| limit.saturating_sub(200).min(1_000));
    let server = Server::start();
    let tag = tag(&list(&server, "", &[]));
    let waiters: Vec<TcpStream> = (0..count).map(|_| wait(&server, &tag)).collect();
    // All of them wait, and whoever doesn't is served meanwhile.
    assert_eq!(get(server.admin, "/health").status, 200);

    let agent = server.agent("agent-1", text_service("here"));
    let since = Instant::now();
    for mut waiter in waiters {
        assert_eq!(ids(&read_answer(&mut waiter, false)), ["agent-1"]);
    }
    assert!(
        since.elapsed() < Duration::from_secs(5),
        "{:?}",
        since.elapsed()
    );
    assert_eq!(get(agent.address(), "/").text(), "here");
}

#[test]
fn those_who_wait_hold_up_no_end() {
    let mut server = Server::start();
    let tag = tag(&list(&server, "", &[]));
    let mut waiters: Vec<TcpStream> = (0..50).map(|_| wait(&server, &tag)).collect();
    assert_eq!(get(server.admin, "/health").status, 200);
    let since = Instant::now();
    server.process.signal("TERM");
    for waiter in &mut waiters {
        assert_eq!(read_answer(waiter, false).status, 304);
    }
    assert_eq!(server.process.wait().code(), Some(0));
    assert!(
        since.elapsed() < Duration::from_secs(2),
        "{:?}",
        since.elapsed()
    );
    // The connections are closed, too.
    for waiter in &mut waiters {
        assert_eq!(waiter.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn a_restarted_server_repeats_no_tag() {
    let first = Server::start();
    let before = list(&first, "", &[]);
    let second = Server::start();
    let headers = [("If-None-Match", before.header("etag").remove(0))];
    let headers = headers
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let after = list(&second, "?wait=60s", &headers);
    assert_eq!(after.status, 200);
    assert_eq!(after.body, before.body);
}

#[test]
fn without_a_key_only_this_machines_names_are_answered() {
    let server = Server::start();
    let ask = |lines: &str| {
        let mut stream = connect(server.admin);
        let head = format!("GET /agents HTTP/1.1\r\nConnection: close\r\n{lines}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        read_answer(&mut stream, false)
    };
    for host in ["localhost", "localhost:1", "127.0.0.1", "[::1]:8080"] {
        assert_eq!(ask(&format!("Host: {host}\r\n")).status, 200, "{host}");
    }
    let rebound = ask("Host: evil.example:8080\r\n");
    assert_eq!(rebound.status, 421);
    assert_eq!(rebound.header("content-type"), ["application/problem+json"]);
    assert!(rebound.text().contains("http.admin_api_key"));
    assert_eq!(ask("").status, 400);
    assert_eq!(ask("Host: localhost\r\nHost: localhost\r\n").status, 400);
    let page = ask("Host: localhost\r\nOrigin: http://evil.example\r\n");
    assert_eq!(page.status, 403);
    for answer in [page, rebound] {
        let head = String::from_utf8(answer.head).unwrap().to_lowercase();
        assert!(!head.contains("access-control"), "{head}");
    }
}

#[test]
fn with_a_key_the_key_decides() {
    let server = Server::with(port_range(10), &[("http.admin_api_key", "k3y")]);
    let ask = |headers: &[(&str, &str)]| {
        let mut lines = String::new();
        for (name, value) in headers {
            lines += &format!("{name}: {value}\r\n");
        }
        let mut stream = connect(server.admin);
        let head = format!(
            "GET /agents?wait=60s HTTP/1.1\r\nHost: silo.example\r\nConnection: close\r\n{lines}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        read_answer(&mut stream, false)
    };
    let listed = ask(&[("X-API-Key", "k3y")]);
    assert_eq!(listed.status, 200);
    assert_eq!(ask(&[("Authorization", "bearer k3y")]).status, 200);
    // Who has no key learns nothing, not even whether a tag still holds.
    let tag = tag(&listed);
    for headers in [
        vec![("If-None-Match", tag.as_str())],
        vec![("If-None-Match", &tag), ("X-API-Key", "k3")],
        vec![("If-None-Match", "*"), ("Authorization", "Basic k3y")],
    ] {
        let answer = ask(&headers);
        assert_eq!(answer.status, 401, "{headers:?}");
        assert!(answer.header("etag").is_empty());
    }
}

#[test]
fn curl_keeps_the_tag_for_the_next_time() {
    if !have("curl", "curl") {
        return;
    }
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("etag");
    let url = format!("http://{}/agents?wait=100ms", server.admin);
    let status = || {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "20",
                "--noproxy",
                "*",
            ])
            .args(["--output", "/dev/null", "--write-out", "%{http_code}"])
            .arg("--etag-compare")
            .arg(&file)
            .arg("--etag-save")
            .arg(&file)
            .arg(&url)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(status(), "200");
    assert_eq!(status(), "304");
    assert_eq!(status(), "304");
    let _agent = server.agent("agent-1", text_service("here"));
    eventually(PATIENCE, "the agent is listed", || {
        !server.agents().is_empty()
    });
    assert_eq!(status(), "200");
    assert_eq!(status(), "304");
}
