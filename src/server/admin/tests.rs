//! The admin port as pollers meet it.

use super::list::PIECE_ROWS;
use super::*;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::id::{Generation, Secret};
use crate::server::directory::{AgentStats, Row, RowState, RowText, Snapshot};

const KEY: &str = "correct horse";

struct Server {
    admin: Admin,
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
    stop: oneshot::Sender<()>,
}

impl Server {
    fn start() -> Self {
        Self::start_with(LIMITS, None)
    }

    fn start_with(limits: Limits, api_key: Option<Secret>) -> Self {
        let directory = Directory::new();
        let metrics = Metrics::new(1, UNIX_EPOCH);
        let readiness = Readiness::new();
        let state = AdminState {
            directory: Arc::clone(&directory),
            metrics: Arc::clone(&metrics),
            readiness: Arc::clone(&readiness),
            api_key: Arc::new(ArcSwap::from_pointee(ApiKey::new(api_key))),
        };
        let (stop, stopped) = oneshot::channel();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let shutdown = async move { drop(stopped.await) };
        let admin = Admin::start_with(limits, listener, state, shutdown).unwrap();
        Self {
            admin,
            directory,
            metrics,
            readiness,
            stop,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.admin.address()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, lines: &str) -> Answer {
        let mut stream = self.connect();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n"
        )
        .unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes)
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }

    fn stop(self) {
        drop(self.stop);
        self.admin.join();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap();
        let head = String::from_utf8(bytes[..end].to_vec())
            .unwrap()
            .to_lowercase();
        let body = &bytes[end + 4..];
        let body = match head.contains("\r\ntransfer-encoding: chunked") {
            true => dechunk(body),
            false => body.to_vec(),
        };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The value of a header line, in lower case as the whole head is.
    fn header(&self, name: &str) -> String {
        let mut lines = self.head.lines();
        let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.unwrap_or_default().to_owned()
    }

    fn has(&self, line: &str) -> bool {
        self.head.lines().any(|found| found == line)
    }
}

fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = rest
            .windows(2)
            .position(|window| window == b"\r\n")
            .unwrap();
        let digits = std::str::from_utf8(&rest[..line]).unwrap();
        let size = usize::from_str_radix(digits, 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[line + 2..][..size]);
        rest = &rest[line + 2 + size + 2..];
    }
}

fn row(id: &str, port: u16) -> Row {
    Row {
        agent_id: id.parse().unwrap(),
        port,
        generation: Generation(7),
        state: RowState::Serving,
        peer: Some("[2001:db8::1]:4711".parse().unwrap()),
        connected_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        version: "0.1.0".into(),
        labels: BTreeMap::from([("site".into(), "Zürich \"1\"".into())]),
        public_url: format!("http://proxy.example:{port}"),
        stats: AgentStats::new(UNIX_EPOCH + Duration::from_millis(1_700_000_001_234)),
        text: RowText::default(),
    }
}

/// Adds agents and waits until they are listed.
fn publish(server: &Server, rows: Vec<Row>) {
    let count = rows.len();
    for row in rows {
        server.directory.add(Arc::new(row));
    }
    wait_until(server, |snapshot| snapshot.rows().len() == count);
}

fn wait_until(server: &Server, listed: impl FnMut(&Snapshot) -> bool) {
    let mut listed = listed;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut newest = server.directory.watch();
    runtime
        .block_on(newest.wait_for(|snapshot| listed(snapshot)))
        .unwrap();
}

#[test]
fn health_is_ok() {
    let server = Server::start();
    let answer = server.get("/health");
    assert_eq!(
        (answer.status, &answer.body[..]),
        (200, &br#"{"status":"ok"}"#[..])
    );
    assert!(answer.has("content-type: application/json"));
    server.stop();
}

#[test]
fn the_server_is_ready_between_its_last_step_and_drain() {
    let server = Server::start();
    let [tunnel, first, second] =
        ["tunnel listener", "acceptor", "acceptor"].map(|name| server.readiness.step(name));
    let check = |status, body: Value| {
        let answer = server.get("/ready");
        assert_eq!((answer.status, answer.json()), (status, body));
    };
    check(
        503,
        json!({"status": "starting", "waiting_for": ["acceptor", "tunnel listener"]}),
    );
    tunnel.release();
    first.release();
    check(
        503,
        json!({"status": "starting", "waiting_for": ["acceptor"]}),
    );
    second.release();
    check(200, json!({"status": "ready"}));
    let failed = server.readiness.step("state file");
    drop(failed);
    check(
        503,
        json!({"status": "starting", "waiting_for": ["state file"]}),
    );
    server.readiness.drain();
    check(503, json!({"status": "draining"}));
    assert_eq!(server.get("/health").status, 200);
    server.stop();
}

#[test]
fn agents_are_listed_with_their_live_figures() {
    let server = Server::start();
    assert_eq!(server.get("/agents").body, br#"{"agents":[],"count":0}"#);

    let gone = Row {
        state: RowState::Leased,
        peer: None,
        ..row("agent-2", 8101)
    };
    let here = row("agent-1", 8100);
    let stats = Arc::clone(&here.stats);
    publish(&server, vec![gone, here]);
    stats.requests.add(3);
    stats.exchanges_open.inc();
    stats.connections_open.dec();
    stats.bytes_in.add(10);
    stats.bytes_out.add(20);
    stats.measured_rtt(Duration::from_micros(312));

    let expected = json!({
        "agent_id": "agent-1", "port": 8100, "last_seen": "2023-11-14T22:13:21.234Z",
        "url": "http://proxy.example:8100", "state": "serving", "generation": 7,
        "peer": "[2001:db8::1]:4711", "connected_at": "2023-11-14T22:13:20.000Z",
        "requests": 3, "exchanges": 1, "connections": 0, "bytes_in": 10, "bytes_out": 20,
        "rtt_ms": 0.312, "version": "0.1.0", "labels": {"site": "Zürich \"1\""},
    });
    let list = server.get("/agents").json();
    assert_eq!(list["count"], 2);
    assert_eq!(list["agents"][0], expected);
    assert_eq!(list["agents"][1]["state"], "leased");
    assert_eq!(list["agents"][1]["peer"], Value::Null);
    assert_eq!(list["agents"][1]["rtt_ms"], Value::Null);
    assert_eq!(server.get("/agents/agent-1").json(), expected);

    stats.requests.inc();
    stats.seen(UNIX_EPOCH + Duration::from_millis(1_700_000_002_000));
    let now = server.get("/agents/agent-1").json();
    assert_eq!(now["requests"], 4);
    assert_eq!(now["last_seen"], "2023-11-14T22:13:22.000Z");
    server.stop();
}

#[test]
fn eight_thousand_agents_arrive_whole_and_in_order() {
    let server = Server::start();
    publish(
        &server,
        (0..8_000)
            .map(|n| row(&format!("agent-{n:04}"), 8_100 + n))
            .collect(),
    );
    let answer = server.get("/agents");
    assert!(answer.has("transfer-encoding: chunked"));
    let list = answer.json();
    assert_eq!(list["count"], 8_000);
    let agents = list["agents"].as_array().unwrap();
    assert_eq!(agents.len(), 8_000);
    for (n, agent) in agents.iter().enumerate() {
        assert_eq!(agent["agent_id"], format!("agent-{n:04}"));
        assert_eq!(agent["port"], 8_100 + n);
    }

    let mut old = server.connect();
    old.write_all(b"GET /agents HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    old.read_to_end(&mut bytes).unwrap();
    assert_eq!(Answer::parse(&bytes).json(), list);
    server.stop();
}

#[test]
fn a_list_of_any_length_is_well_formed() {
    let server = Server::start();
    let mut there = 0;
    for count in [0, 1, 2, 79, 80, 81, 159, 160, 161, 400] {
        let rows = there..count;
        for n in rows {
            server.directory.add(Arc::new(row(&format!("a{n}"), 1)));
        }
        there = count;
        wait_until(&server, |snapshot| snapshot.rows().len() == count);
        for query in ["", "?wait=0s"] {
            let list = server.get(&format!("/agents{query}")).json();
            assert_eq!(list["count"], count);
            assert_eq!(list["agents"].as_array().unwrap().len(), count);
        }
    }
    assert!(there > 2 * PIECE_ROWS);
    server.stop();
}

#[test]
fn what_isnt_there_is_a_problem() {
    let server = Server::start();
    for (path, status) in [
        ("/agents/nobody", 404),
        ("/agents/No%20body", 400),
        ("/agents/%ff", 400),
        ("/agents/", 404),
        ("/agents/a/b", 404),
        ("/", 404),
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, status, "{path}");
        assert!(
            answer.has("content-type: application/problem+json"),
            "{path}"
        );
        assert_eq!(answer.json()["status"], status);
    }
    for path in ["/health", "/ready", "/agents", "/agents/a", "/metrics"] {
        let answer = server.ask("POST", path, "Content-Length: 0\r\n");
        assert_eq!(answer.status, 405, "{path}");
        assert!(answer.has("allow: get,head"), "{}", answer.head);
    }
    let head = server.ask("HEAD", "/agents", "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    server.stop();
}

#[test]
fn no_page_of_another_origin_may_read() {
    let server = Server::start();
    for method in ["GET", "OPTIONS"] {
        let lines = "Origin: http://evil.example\r\nAccess-Control-Request-Method: GET\r\n";
        let answer = server.ask(method, "/agents", lines);
        assert!(!answer.head.contains("access-control"), "{}", answer.head);
    }
    server.stop();
}

#[test]
fn all_but_health_asks_for_the_key() {
    let server = Server::start_with(LIMITS, Some(Secret::new(KEY)));
    assert_eq!(server.get("/health").status, 200);
    for path in [
        "/ready",
        "/agents",
        "/agents/a",
        "/metrics",
        "/nothing",
        "//health",
        "/health/",
    ] {
        for lines in [
            "",
            "X-API-Key: wrong\r\n",
            "Authorization: Basic correct horse\r\n",
        ] {
            let answer = server.ask("GET", path, lines);
            assert_eq!(answer.status, 401, "{path} {lines}");
            assert!(answer.has(r#"www-authenticate: bearer realm="silo-proxy""#));
        }
    }
    assert_eq!(server.ask("POST", "/agents", "").status, 401);
    for lines in [
        format!("X-API-Key: {KEY}\r\n"),
        format!("Authorization: Bearer {KEY}\r\n"),
        format!("authorization: bearer {KEY}\r\nX-API-Key: wrong\r\n"),
    ] {
        assert_eq!(server.ask("GET", "/agents", &lines).status, 200, "{lines}");
    }
    server.stop();
}

#[test]
fn without_a_key_another_host_is_misdirected() {
    let server = Server::start();
    for path in ["/health", "/agents", "/nothing"] {
        let mut stream = server.connect();
        let head =
            format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let answer = Answer::parse(&bytes);
        assert_eq!(answer.status, 421, "{path}");
        let detail = answer.json()["detail"].to_string();
        assert!(detail.contains("http.admin_api_key"), "{detail}");
    }
    server.stop();
}

#[test]
fn a_list_that_the_poller_has_isnt_sent_again() {
    let server = Server::start();
    let empty = server.get("/agents").header("etag");
    publish(&server, vec![row("a", 8100)]);
    let first = server.get("/agents");
    let tag = first.header("etag");
    assert!(first.has("cache-control: private, no-cache"));
    assert!(tag.starts_with("w/\"") && tag != empty, "{tag}");

    let ask = |method, tag: &str| {
        let line = format!("If-None-Match: {}\r\n", tag.replace("w/", "W/"));
        server.ask(method, "/agents", &line)
    };
    for method in ["GET", "HEAD"] {
        for tag in [&tag, "*", &format!("\"x\", {tag}")] {
            let same = ask(method, tag);
            assert_eq!((same.status, same.body.len()), (304, 0), "{method} {tag}");
            assert_eq!(same.header("etag"), first.header("etag"));
            assert!(same.has("cache-control: private, no-cache"));
        }
        assert_eq!(ask(method, &empty).status, 200);
    }
    // Live figures don't move it; whatever else a row shows does.
    let mut again = row("a", 8100);
    again.stats.requests.inc();
    assert_eq!(ask("GET", &tag).status, 304);
    again.state = RowState::Leased;
    server.directory.replace(Arc::new(again));
    wait_until(&server, |now| now.rows()[0].state == RowState::Leased);
    let leased = ask("GET", &tag);
    assert_eq!(leased.status, 200);
    assert_eq!(leased.json()["agents"][0]["state"], "leased");
    server.directory.remove(&"a".parse().unwrap());
    wait_until(&server, |now| now.rows().is_empty());
    // The same members as at first, but later.
    assert_eq!(ask("GET", &empty).status, 200);
    assert_eq!(ask("GET", &leased.header("etag")).json()["count"], 0);

    // Another start of the server has other tags.
    let restarted = Server::start();
    assert_ne!(restarted.get("/agents").header("etag"), empty);
    restarted.stop();
    server.stop();
}

#[test]
fn a_wait_ends_with_a_change_or_with_its_time() {
    let server = Server::start();
    let tag = server.get("/agents").header("etag").replace("w/", "W/");
    let line = format!("If-None-Match: {tag}\r\n");

    let over = server.ask("GET", "/agents?wait=50ms", &line);
    assert_eq!((over.status, over.body.len()), (304, 0));
    assert_eq!(server.ask("HEAD", "/agents?x&wait=0s", &line).status, 304);
    // Without a tag there is nothing to wait for.
    assert_eq!(server.get("/agents?wait=60s").status, 200);

    let mut waiters: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    for waiter in &mut waiters {
        let head = format!(
            "GET /agents?wait=60s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{line}\r\n"
        );
        waiter.write_all(head.as_bytes()).unwrap();
    }
    publish(
        &server,
        (0..200).map(|n| row(&format!("a{n}"), 1)).collect(),
    );
    for mut waiter in waiters {
        let mut bytes = Vec::new();
        waiter.read_to_end(&mut bytes).unwrap();
        let answer = Answer::parse(&bytes);
        assert_eq!(answer.status, 200);
        let list = answer.json();
        // Each has a whole list, of the first change or of a later one.
        assert_eq!(list["agents"].as_array().unwrap().len(), list["count"]);
        assert_ne!(list["count"], 0);
    }
    server.stop();
}

#[test]
fn who_waits_is_answered_when_the_server_drains_and_when_it_ends() {
    let server = Server::start();
    let tag = server.get("/agents").header("etag").replace("w/", "W/");
    let wait = || {
        let mut stream = server.connect();
        let head = format!(
            "GET /agents?wait=60s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nIf-None-Match: {tag}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // Whoever asks later is answered later, so this one waits by then.
        assert_eq!(server.get("/health").status, 200);
        stream
    };
    let answered = |mut stream: TcpStream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes).status
    };
    let first = wait();
    server.readiness.drain();
    assert_eq!(answered(first), 304);
    // A new wait isn't answered at once, or its poller would ask without a pause.
    let second = wait();
    drop(server.stop);
    assert_eq!(answered(second), 304);
    server.admin.join();
}

#[test]
fn a_wait_that_makes_no_sense_is_a_problem() {
    let server = Server::start();
    for query in [
        "wait",
        "wait=",
        "wait=30",
        "wait=-1s",
        "wait=61s",
        "wait=1h",
        "wait=1s&wait=1s",
        "wait=999999999999y",
    ] {
        let answer = server.get(&format!("/agents?{query}"));
        assert_eq!(answer.status, 400, "{query}");
        assert!(answer.has("content-type: application/problem+json"));
        assert!(answer.json()["detail"].to_string().contains("60s"));
    }
    server.stop();
}

#[test]
fn metrics_are_open_metrics() {
    let server = Server::start();
    server.metrics.registrations.inc();
    let answer = server.get("/metrics");
    assert!(answer.has(&format!("content-type: {}", metrics::CONTENT_TYPE)));
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.contains("silo_registrations_total 1\n"));
    assert!(text.ends_with("# EOF\n"));
    server.stop();
}

#[test]
fn one_connection_serves_many_polls() {
    let server = Server::start();
    let mut stream = server.connect();
    for _ in 0..3 {
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut bytes = Vec::new();
        while !bytes.ends_with(br#"{"status":"ok"}"#) {
            let mut part = [0; 256];
            let read = stream.read(&mut part).unwrap();
            assert_ne!(read, 0);
            bytes.extend_from_slice(&part[..read]);
        }
    }
    // An idle poller is let go when the server ends.
    drop(server.stop);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    server.admin.join();
}

#[test]
fn the_end_closes_the_port() {
    let server = Server::start();
    let address = server.admin.address();
    server.stop();
    let error = TcpStream::connect(address).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_slow_head_is_cut() {
    let limits = Limits {
        first_head: Duration::from_millis(20),
        ..LIMITS
    };
    let server = Server::start_with(limits, None);
    let mut stream = server.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\nHo").unwrap();
    let mut rest = Vec::new();
    // Closed or reset, but not answered.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty());
    server.stop();
}

#[test]
fn one_connection_too_many_is_closed_at_once() {
    let server = Server::start_with(
        Limits {
            connections: 1,
            ..LIMITS
        },
        None,
    );
    let mut first = server.connect();
    // Once it is answered, the first connection surely has the slot.
    first
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert_ne!(first.read(&mut [0; 512]).unwrap(), 0);
    assert!(matches!(server.connect().read(&mut [0; 1]), Ok(0) | Err(_)));
    server.stop();
}

#[test]
#[cfg(target_os = "linux")]
fn a_poller_who_stops_reading_is_cut() {
    let limits = Limits {
        connections: 1,
        stall: Duration::from_millis(50),
        ..LIMITS
    };
    let server = Server::start_with(limits, None);
    publish(
        &server,
        (0..8_000).map(|n| row(&format!("a{n}"), 1)).collect(),
    );
    let mut stalled = server.connect();
    // More than the sockets' buffers hold.
    for _ in 0..20 {
        stalled
            .write_all(b"GET /agents HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
    }
    assert_ne!(stalled.read(&mut [0; 1]).unwrap(), 0);
    // His slot is free once he is cut.
    let begun = std::time::Instant::now();
    loop {
        let mut next = server.connect();
        let _ = next.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        if matches!(next.read(&mut [0; 1]), Ok(1)) {
            break;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "the stalled poller is still served"
        );
    }
    server.stop();
}
