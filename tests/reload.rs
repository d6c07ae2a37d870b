//! Settings that change while a server or an agent runs: a file, edited, and a SIGHUP.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use common::{
    Answer, PATIENCE, Process, Server, connect, eventually, get, port_range, read_answer, refuses,
    request, text_service,
};
use serde_json::{Map, Value};

/// A file of settings, to be edited.
struct File {
    directory: tempfile::TempDir,
    settings: BTreeMap<String, String>,
}

impl File {
    fn new(settings: &[(&str, &str)]) -> Self {
        let mut file = Self {
            directory: tempfile::tempdir().unwrap(),
            settings: BTreeMap::new(),
        };
        file.edit(settings);
        file
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("silo.yaml")
    }

    /// Changes settings; an empty value takes one out.
    fn edit(&mut self, changes: &[(&str, &str)]) {
        for (path, value) in changes {
            self.settings
                .insert((*path).to_owned(), (*value).to_owned());
        }
        self.settings.retain(|_, value| !value.is_empty());
        // JSON is YAML.
        let mut root = Map::new();
        for (path, value) in &self.settings {
            let mut sections: Vec<&str> = path.split('.').collect();
            let name = sections.pop().unwrap();
            let mut place = &mut root;
            for section in sections {
                let below = place.entry(section).or_insert_with(|| Map::new().into());
                place = below.as_object_mut().unwrap();
            }
            place.insert(name.to_owned(), value.as_str().into());
        }
        let text = serde_json::to_string_pretty(&Value::Object(root)).unwrap();
        std::fs::write(self.path(), text).unwrap();
    }
}

/// A server that reads a file.
struct Reloadable {
    server: Server,
    file: File,
    reloads: usize,
}

impl Reloadable {
    fn start(range: RangeInclusive<u16>, settings: &[(&str, &str)]) -> Self {
        let mut file = File::new(&[
            ("http.port", "0"),
            ("grpc.port", "0"),
            ("grpc.host", "127.0.0.1"),
            ("http.agent_port_range.start", &range.start().to_string()),
            ("http.agent_port_range.end", &range.end().to_string()),
        ]);
        file.edit(settings);
        let path = file.path();
        let arguments = ["server", "--config", path.to_str().unwrap()];
        let process = Process::start("server", &arguments, &[]);
        Self {
            server: Server::from_process(process, range),
            file,
            reloads: 0,
        }
    }

    /// Edits the file and has it read again; returns the line that says what has changed.
    fn reload(&mut self, changes: &[(&str, &str)]) -> String {
        self.file.edit(changes);
        self.hang_up()
    }

    fn hang_up(&mut self) -> String {
        self.reloads += 1;
        self.server.process.signal("HUP");
        self.server
            .process
            .wait_for_nth(self.reloads, &["SIGHUP", "reloaded"])
    }
}

fn post(address: SocketAddr, bytes: usize) -> Answer {
    request(address, "POST", "/", &[], &vec![b'x'; bytes])
}

#[test]
fn a_changed_token_lets_new_sessions_in_and_leaves_running_ones() {
    let secrets = tempfile::tempdir().unwrap();
    let token_file = secrets.path().join("token");
    std::fs::write(&token_file, "the-old-secret\n").unwrap();
    let mut reloadable = Reloadable::start(
        port_range(8),
        &[
            ("grpc.auth.shared_token_file", token_file.to_str().unwrap()),
            ("log.level", "trace"),
        ],
    );
    let service = text_service("here");
    let url = format!("http://{service}");
    let old = [("grpc.token", "the-old-secret")];
    let new = [("grpc.token", "the-new-secret")];
    let own = [("grpc.token", "a-secret-of-its-own")];
    let stays = reloadable.server.agent_with("stays", service, &old);

    std::fs::write(&token_file, "the-new-secret\n").unwrap();
    let line = reloadable.reload(&[("grpc.auth.tokens", "bound=a-secret-of-its-own")]);
    assert!(
        line.contains("grpc.auth.shared_token, grpc.auth.tokens"),
        "{line}"
    );
    let server = &reloadable.server;
    let late = server.start_agent("late", &url, &old);
    late.wait_for(&["rejected", "grpc.token"]);
    let accepted = server.agent_with("accepted", service, &new);
    let bound = server.agent_with("bound", service, &own);
    for agent in [&stays, &accepted, &bound] {
        assert_eq!(get(agent.address(), "/").text(), "here");
    }
    assert_eq!(server.process.count(&["agent registered", "stays"]), 1);
    let log = server.process.log();
    for secret in ["the-old-secret", "the-new-secret", "a-secret-of-its-own"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[test]
fn a_changed_admin_key_holds_at_once() {
    let mut reloadable = Reloadable::start(port_range(1), &[("http.admin_api_key", "old-key")]);
    let admin = reloadable.server.admin;
    let status = |key: &str| {
        let headers = [("X-API-Key", key)];
        request(admin, "GET", "/agents", &headers, b"").status
    };
    assert_eq!((status("old-key"), status("new-key")), (200, 401));
    reloadable.reload(&[("http.admin_api_key", "new-key")]);
    assert_eq!((status("old-key"), status("new-key")), (401, 200));
    reloadable.reload(&[("http.admin_api_key", "")]);
    assert_eq!(get(admin, "/agents").status, 200);
}

#[test]
fn changed_limits_hold_for_the_next_request_and_the_next_connection() {
    let mut reloadable = Reloadable::start(port_range(2), &[]);
    let agent = reloadable.server.agent("agent", text_service("here"));
    let address = agent.address();
    let mut kept = connect(address);
    let ask = |stream: &mut std::net::TcpStream| {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n";
        write!(stream, "{head}{}", "x".repeat(20)).unwrap();
        read_answer(stream, false)
    };
    assert_eq!(ask(&mut kept).status, 200);
    assert_eq!(post(address, 20).status, 200);

    reloadable.reload(&[("http.max_body", "10B")]);
    assert_eq!(ask(&mut kept).status, 413, "a connection that was kept");
    assert_eq!(
        (post(address, 20).status, post(address, 10).status),
        (413, 200)
    );

    let line = reloadable.reload(&[("http.max_body", "off"), ("http.max_connections", "1")]);
    assert!(
        line.contains("http.max_connections, http.max_body"),
        "{line}"
    );
    let server = &reloadable.server;
    let none_open = || server.metric("silo_connections_open", "") == 0.0;
    drop(kept);
    eventually(PATIENCE, "visitors' connections end", none_open);
    let mut first = connect(address);
    assert_eq!(ask(&mut first).status, 200);
    let refused = server.metric("silo_connections_refused_total", "");
    let mut second = connect(address);
    assert_eq!(std::io::Read::read(&mut second, &mut [0]).unwrap_or(0), 0);
    eventually(PATIENCE, "a refusal is counted", || {
        server.metric("silo_connections_refused_total", "") > refused
    });
    reloadable.reload(&[("http.max_connections", "")]);
    assert_eq!(get(address, "/").status, 200);
}

#[test]
fn a_new_pin_gives_an_agent_its_port() {
    let range = port_range(4);
    let mut reloadable = Reloadable::start(range.clone(), &[]);
    let service = text_service("here");
    let port = range.end();
    let line = reloadable.reload(&[("http.static_ports", &format!("pinned={port}"))]);
    assert!(line.contains("http.static_ports"), "{line}");
    let pinned = reloadable.server.agent("pinned", service);
    assert_eq!(pinned.port, *port);
    assert_eq!(get(pinned.address(), "/").text(), "here");
}

#[test]
fn a_grown_range_takes_the_agent_that_found_no_port() {
    let range = port_range(3);
    let mut reloadable = Reloadable::start(*range.start()..=*range.start(), &[]);
    let service = text_service("here");
    let _first = reloadable.server.agent("first", service);
    let url = format!("http://{service}");
    let second = reloadable.server.start_agent("second", &url, &[]);
    second.wait_for(&["rejected"]);
    let line = reloadable.reload(&[("http.agent_port_range.end", &range.end().to_string())]);
    assert!(line.contains("http.agent_port_range.end"), "{line}");
    second.wait_for(&["connected"]);
    assert_eq!(reloadable.server.metric("silo_ports", "free"), 1.0);
}

#[test]
fn a_shrunk_range_drains() {
    let range = port_range(3);
    let mut reloadable = Reloadable::start(range.clone(), &[("http.port_lease", "1h")]);
    let service = text_service("here");
    let stays = reloadable.server.agent("stays", service);
    let mut drains = reloadable.server.agent("drains", service);
    assert_eq!(stays.port, *range.start());

    reloadable.reload(&[("http.agent_port_range.end", &stays.port.to_string())]);
    let server = &reloadable.server;
    server
        .process
        .wait_for(&["agents=1", "until it disconnects"]);
    for agent in [&stays, &drains] {
        assert_eq!(get(agent.address(), "/").text(), "here");
    }
    drains.process.signal("TERM");
    assert!(drains.process.wait().success());
    let closed = || refuses(drains.address());
    eventually(PATIENCE, "the port is closed without a lease", closed);
    eventually(PATIENCE, "it is listed no longer", || {
        server.agents() == [("stays".to_owned(), stays.port)]
    });
    assert_eq!(server.metric("silo_ports", ""), 1.0);
    let again = server.start_agent("drains", &format!("http://{service}"), &[]);
    again.wait_for(&["rejected"]);
}

#[test]
fn the_log_level_changes() {
    let mut reloadable = Reloadable::start(port_range(2), &[]);
    let agent = reloadable.server.agent("agent", text_service("here"));
    get(agent.address(), "/");
    assert_eq!(reloadable.server.process.count(&["DEBUG"]), 0);
    reloadable.reload(&[("log.level", "debug")]);
    get(agent.address(), "/");
    reloadable
        .server
        .process
        .wait_for(&["DEBUG", "visitor's connection ended"]);
}

#[test]
fn a_file_with_faults_changes_nothing() {
    let mut reloadable = Reloadable::start(port_range(2), &[("http.max_body", "10B")]);
    let agent = reloadable.server.agent("agent", text_service("here"));
    let line = reloadable.reload(&[
        ("http.max_body", "off"),
        ("http.max_haed", "1KiB"),
        ("server.grace", "soon"),
    ]);
    assert!(line.contains("ERROR"), "{line}");
    for part in [
        "http.max_haed",
        "did you mean http.max_head?",
        "server.grace",
    ] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(post(agent.address(), 20).status, 413);

    // Nor does a file that is gone; once all is well again, it counts.
    let path = reloadable.file.path();
    std::fs::remove_file(&path).unwrap();
    assert!(reloadable.hang_up().contains("ERROR"));
    assert_eq!(post(agent.address(), 20).status, 413);
    let line = reloadable.reload(&[("http.max_haed", ""), ("server.grace", "")]);
    assert!(line.contains("changed=\"http.max_body\""), "{line}");
    assert_eq!(post(agent.address(), 20).status, 200);
}

#[test]
fn what_needs_a_restart_is_said_and_the_rest_is_applied() {
    let mut reloadable = Reloadable::start(port_range(2), &[]);
    let agent = reloadable.server.agent("agent", text_service("here"));
    let line = reloadable.reload(&[
        ("http.port", "1"),
        ("server.workers", "7"),
        ("http.max_body", "10B"),
    ]);
    assert!(line.contains("INFO"), "{line}");
    assert!(line.contains("http.max_body") && !line.contains("server.workers"));
    let process = &reloadable.server.process;
    process.wait_for(&["WARN", "http.port, server.workers", "restart"]);
    assert_eq!(post(agent.address(), 20).status, 413);
    assert_eq!(get(reloadable.server.admin, "/health").status, 200);
    // It is said again, as it is still so.
    assert!(reloadable.hang_up().contains("changed=\"none\""));
    let warned = || reloadable.server.process.count(&["WARN", "restart"]) == 2;
    eventually(Duration::from_secs(10), "a second warning", warned);
}

/// A service that answers each request with what it got.
fn telling_service() -> SocketAddr {
    common::service(|mut stream| {
        while let Ok(head) = common::read_head(&mut stream) {
            let head = String::from_utf8(head).unwrap().to_lowercase();
            let host = head.split("host: ").nth(1).unwrap().lines().next();
            let body = format!("host {}", host.unwrap());
            let length = body.len();
            if write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .is_err()
            {
                return;
            }
        }
    })
}

#[test]
fn an_agent_changes_its_service_and_token_without_losing_its_session() {
    let server = Server::with(
        port_range(4),
        &[("grpc.auth.tokens", "agent=first-token-of-agent")],
    );
    let mut file = File::new(&[
        ("grpc.server_address", &server.tunnel.to_string()),
        ("grpc.agent_id", "agent"),
        ("grpc.token", "first-token-of-agent"),
        (
            "local.service_url",
            &format!("http://{}", text_service("one")),
        ),
        ("log.level", "info"),
    ]);
    let path = file.path();
    let process = Process::start("agent", &["agent", "--config", path.to_str().unwrap()], &[]);
    process.wait_for(&["connected", "port="]);
    let (_, port) = server.agents()[0].clone();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut kept = connect(address);
    let mut ask = || {
        write!(kept, "GET / HTTP/1.1\r\nHost: visited\r\n\r\n").unwrap();
        read_answer(&mut kept, false).text()
    };
    assert_eq!(ask(), "one");

    let two = text_service("two");
    file.edit(&[
        ("local.service_url", &format!("http://{two}")),
        ("grpc.token", "second-token-of-agent"),
        ("grpc.agent_id", "another"),
        ("log.level", "info,silo_proxy::agent=debug"),
    ]);
    process.signal("HUP");
    let line = process.wait_for(&["SIGHUP: settings reloaded"]);
    assert!(
        line.contains("log.level, grpc.token, local.service_url"),
        "{line}"
    );
    process.wait_for(&["WARN", "grpc.agent_id", "restart"]);
    assert_eq!(ask(), "two");
    file.edit(&[("local.service_url", "http://127.0.0.1:1")]);
    process.signal("HUP");
    process.wait_for_nth(2, &["SIGHUP: settings reloaded"]);
    assert!(ask().contains("\"status\":502"));
    process.wait_for(&["DEBUG", "can't connect to the local service"]);

    let told = telling_service();
    file.edit(&[
        ("local.service_url", &format!("http://{told}")),
        ("local.host_header", "target"),
    ]);
    process.signal("HUP");
    process.wait_for_nth(3, &["SIGHUP: settings reloaded"]);
    assert_eq!(ask(), format!("host {told}"));

    file.edit(&[("local.service_url", "http://a/path"), ("local.max", "1")]);
    process.signal("HUP");
    let line = process.wait_for(&["ERROR", "not reloaded"]);
    assert!(line.contains("local.max") && line.contains("local.service_url"));
    assert_eq!(ask(), format!("host {told}"));

    assert_eq!(server.process.count(&["agent registered"]), 1);
    let log = process.log();
    assert!(!log.contains("first-token") && !log.contains("second-token"));
}

#[test]
fn an_agent_that_was_rejected_gets_in_with_the_token_it_is_given() {
    let server = Server::with(
        port_range(4),
        &[("grpc.auth.shared_token", "the-right-one")],
    );
    let mut file = File::new(&[
        ("grpc.server_address", &server.tunnel.to_string()),
        ("grpc.agent_id", "agent"),
        ("grpc.token", "a-wrong-one"),
        (
            "local.service_url",
            &format!("http://{}", text_service("one")),
        ),
    ]);
    let path = file.path();
    let process = Process::start("agent", &["agent", "--config", path.to_str().unwrap()], &[]);
    process.wait_for(&["rejected", "grpc.token"]);
    file.edit(&[("grpc.token", "the-right-one")]);
    process.signal("HUP");
    // It doesn't sit out the wait that was asked of whoever had the wrong one.
    process.wait_for(&["connected", "port="]);
}

/// Whoever holds an id by a credential that doesn't count any more gives way.
#[test]
fn a_new_token_takes_an_id_back() {
    let mut reloadable = Reloadable::start(port_range(2), &[("grpc.auth.shared_token", "stolen")]);
    let mut file = File::new(&[
        ("grpc.server_address", &reloadable.server.tunnel.to_string()),
        ("grpc.agent_id", "agent"),
        ("grpc.token", "stolen"),
        (
            "local.service_url",
            &format!("http://{}", text_service("owner")),
        ),
    ]);
    let path = file.path();
    let owner = Process::start("owner", &["agent", "--config", path.to_str().unwrap()], &[]);
    owner.wait_for(&["connected", "port="]);
    let settings = [("grpc.token", "stolen")];
    let thief = (reloadable.server).agent_with("agent", text_service("thief"), &settings);
    owner.wait_for(&["rejected", "reason=replaced"]);
    assert_eq!(get(thief.address(), "/").text(), "thief");

    reloadable.reload(&[("grpc.auth.shared_token", "fresh")]);
    file.edit(&[("grpc.token", "fresh")]);
    owner.signal("HUP");
    owner.wait_for_nth(2, &["connected", "port="]);
    assert_eq!(get(thief.address(), "/").text(), "owner");
    thief.process.wait_for(&["rejected"]);
}
