//! The command line as its users meet it: help, exit codes, what is said about faults, `demo`,
//! `agents`, `swarm`, and that no secret is ever written.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use common::{
    Process, Server, connect, curl, eventually, get, have, port_range, read_head, refuses, request,
    text_service, variable,
};
use tempfile::TempDir;

/// Runs a command that ends by itself; returns its exit code and everything it wrote.
fn run(args: &[&str]) -> (Option<i32>, String) {
    run_with(args, &[])
}

fn run_with(args: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    Process::start(&args.join(" "), args, environment).finish()
}

/// A running server's admin port as `agents --admin` takes it.
fn admin(server: &Server) -> String {
    server.admin.to_string()
}

#[test]
fn help_and_version() {
    for command in [
        &["--help"][..],
        &["server", "--help"],
        &["agent", "--help"],
        &["agent", "http", "--help"],
        &["demo", "--help"],
        &["agents", "--help"],
        &["swarm", "--help"],
        &["check", "--help"],
    ] {
        let (code, text) = run(command);
        assert_eq!(code, Some(0), "{command:?}");
        let (_, examples) = text
            .split_once("Example")
            .unwrap_or_else(|| panic!("{command:?} shows no example:\n{text}"));
        let shown = ["silo-proxy", command[0].trim_start_matches('-')];
        assert!(examples.contains(shown[0]), "{text}");
        if command[0] != "--help" {
            assert!(examples.contains(&shown.join(" ")), "{text}");
        }
    }
    let (_, text) = run(&["--help"]);
    for command in ["server", "agent", "demo", "agents", "swarm", "check"] {
        assert!(text.contains(&format!("\n  {command} ")), "{text}");
    }
    let version = concat!("silo-proxy ", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["--version"]), (Some(0), version.to_owned()));
}

#[test]
fn mistakes_on_the_command_line_are_usage_errors() {
    for (args, said) in [
        (&[][..], "Usage"),
        (&["serve"], "server"),
        (&["server", "--port", "80"], "--port"),
        (&["demo", "--agents", "0"], "--agents"),
        (&["swarm", "--count", "5"], "--server"),
        (&["agent", "http", "3000"], "--server"),
        (
            &[
                "agent", "--config", "a.yaml", "http", "1", "--server", "b", "--id", "c",
            ],
            "--config",
        ),
    ] {
        let (code, text) = run(args);
        assert_eq!(code, Some(2), "{args:?}: {text}");
        assert!(text.contains(said), "{args:?}: {text}");
    }
}

#[test]
fn faults_of_a_configuration_are_told_all_at_once_and_nothing_is_bound() {
    // If the server bound anything before it looked, it would fail over these.
    let held = [0, 0].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    let [http, grpc] = held
        .each_ref()
        .map(|held| held.local_addr().unwrap().port());
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("server.yaml");
    let yaml = format!(
        "http:
  prot: 8080
  port: {http}
  agent_port_range: {{start: 9000, end: 8000}}
  head_timeout: soon
  access_log: true
grpc:
  port: {grpc}
  auth:
    shared_tokn: abc
"
    );
    fs::write(&file, yaml).unwrap();
    let (code, text) = run(&["server", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(2), "{text}");
    for line in [
        "server.yaml:2:3: http.prot: no such setting; did you mean http.port?",
        "server.yaml:5:17: http.head_timeout: ",
        "server.yaml:6:15: http.access_log: expected `off`, `stderr`, `stdout` or a file name",
        "server.yaml:10:5: grpc.auth.shared_tokn: no such setting; did you mean grpc.auth.shared_token?",
        "http.agent_port_range.start (9000) is greater than http.agent_port_range.end (8000)",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }

    fs::write(&file, "http:\n  port: 80\n port: [\n").unwrap();
    let (code, text) = run(&["server", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("server.yaml:3:"), "{text}");

    let (code, text) = run(&["server", "--config", "/nonexistent/server.yaml"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("/nonexistent/server.yaml"), "{text}");
}

#[test]
fn variables_are_checked_as_the_file_is() {
    for (name, value, said) in [
        ("SILO_HTTP_PROT", "1", "SILO_HTTP_PORT"),
        ("SILO_GRPC_TLS_ENABLED", "true", "grpc.tls.cert_file"),
        ("SILO_SERVER_GRACE", "5", "SILO_SERVER_GRACE"),
        // Others could read who is connected: both ways out are named.
        ("SILO_HTTP_HOST", "0.0.0.0", "http.admin_api_key"),
    ] {
        let (code, text) = run_with(&["server"], &[(name, value)]);
        assert_eq!(code, Some(2), "{name}: {text}");
        assert!(text.contains(said), "{name}: {text}");
    }
    let (code, text) = run(&["agent"]);
    assert_eq!(code, Some(2), "{text}");
    for setting in ["grpc.server_address", "grpc.agent_id", "local.service_url"] {
        assert!(text.contains(setting), "{text}");
    }
}

#[test]
fn a_port_that_is_taken_is_named_with_its_setting() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let port = taken.port().to_string();
    for (setting, other) in [("http.port", "grpc.port"), ("grpc.port", "http.port")] {
        let (code, text) = run_with(
            &["server"],
            &[
                (&variable(setting), &port),
                (&variable(other), "0"),
                ("SILO_GRPC_HOST", "127.0.0.1"),
            ],
        );
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(setting), "{text}");
        assert!(text.contains(&taken.to_string()), "{text}");
        assert!(!text.contains(other), "{text}");
    }
}

#[test]
fn an_agent_takes_a_port_an_address_or_a_url() {
    let server = Server::start();
    let tunnel = server.tunnel.to_string();
    let service = text_service("found");
    let port = service.port();
    for (id, form) in [
        ("port", port.to_string()),
        ("address", service.to_string()),
        ("name", format!("localhost:{port}")),
        ("url", format!("http://127.0.0.1:{port}")),
    ] {
        let args = ["agent", "http", &form, "--server", &tunnel, "--id", id];
        let mut agent = Process::start(id, &args, &[]);
        agent.wait_for(&["connected", "port="]);
        // Its URL is on standard output, for people and for scripts.
        let line = agent.wait_for(&["http://127.0.0.1:", " -> "]);
        let (url, target) = line.split_once(" -> ").unwrap();
        assert!(target.contains(&port.to_string()), "{line}");
        let address: SocketAddr = url
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .parse()
            .unwrap();
        assert_eq!(get(address, "/").text(), "found", "{form}");
        agent.signal("INT");
        assert_eq!(agent.wait().code(), Some(0));
    }
    for (service, server, id, said) in [
        ("99999", "a:1", "b", "65535"),
        ("0", "a:1", "b", "65535"),
        ("http://a/path", "a:1", "b", "path"),
        ("ftp://a", "a:1", "b", "http"),
        ("3000", "a:99999", "b", "--server"),
        ("3000", "a:1", "Not-An-Id", "--id"),
    ] {
        let args = ["agent", "http", service, "--server", server, "--id", id];
        let (code, text) = run(&args);
        assert_eq!(code, Some(2), "{args:?}: {text}");
        assert!(text.contains(said), "{args:?}: {text}");
    }
    let args = [
        "agent",
        "http",
        "3000",
        "--server",
        "a:1",
        "--id",
        "b",
        "--token-file",
        "/nonexistent/token",
    ];
    let (code, text) = run(&args);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("/nonexistent/token"), "{text}");
}

#[test]
fn agents_shows_a_table_or_json() {
    let directory = TempDir::new().unwrap();
    let key_file = directory.path().join("key.txt");
    fs::write(&key_file, "the-key\n").unwrap();
    let key_file = key_file.to_str().unwrap();
    let server = Server::with(port_range(10), &[("http.admin_api_key", "the-key")]);
    let admin = admin(&server);
    let agents = [
        server.agent("agent-1", text_service("1")),
        server.agent("agent-2", text_service("2")),
    ];
    get(agents[1].address(), "/");

    let with_key = ["agents", "--admin", &admin, "--api-key-file", key_file];
    let mut text = String::new();
    eventually(Duration::from_secs(5), "both are listed", || {
        let (code, shown) = run(&with_key);
        assert_eq!(code, Some(0), "{shown}");
        text = shown;
        text.ends_with("2 agents")
    });
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("AGENT") && lines[0].contains("PORT"));
    for (line, agent) in lines[1..].iter().zip(&agents) {
        let cells: Vec<&str> = line.split_whitespace().collect();
        let port = agent.port.to_string();
        assert_eq!(cells[..2], [agent.id.as_str(), port.as_str()]);
        assert!(line.contains("serving"), "{line}");
    }

    // The key may also come from the server's own variable.
    let (code, text) = run_with(
        &["agents", "--admin", &admin, "--json"],
        &[("SILO_HTTP_ADMIN_API_KEY", "the-key")],
    );
    assert_eq!(code, Some(0), "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["count"], 2);
    assert_eq!(json["agents"][1]["agent_id"], "agent-2");
    assert_eq!(json["agents"][1]["port"], agents[1].port);

    let mut watch_args = with_key.to_vec();
    watch_args.push("--watch");
    let mut watch = Process::start("watch", &watch_args, &[]);
    watch.wait_for_nth(2, &["2 agents"]);
    watch.signal("INT");
    assert_eq!(watch.wait().code(), Some(0));

    let (code, text) = run(&["agents", "--admin", &admin]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("--api-key-file"), "{text}");
    fs::write(key_file, "another-key").unwrap();
    let (code, text) = run(&with_key);
    assert_eq!(code, Some(1), "{text}");
    assert!(!text.contains("another-key"), "{text}");
    let (code, text) = run(&["agents", "--admin", "127.0.0.1:9"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("127.0.0.1:9"), "{text}");
}

#[test]
fn a_swarm_registers_or_says_why_not() {
    let server = Server::with(port_range(30), &[]);
    let tunnel = server.tunnel.to_string();
    let args = ["swarm", "--server", &tunnel, "--count", "20"];
    let mut swarm = Process::start("swarm", &args, &[]);
    swarm.wait_for(&["registered 20 "]);
    eventually(Duration::from_secs(5), "all are listed", || {
        server.agents().len() == 20
    });
    let (_, port) = server.agents()[19];
    let answer = get(SocketAddr::from(([127, 0, 0, 1], port)), "/");
    assert_eq!(answer.status, 200);
    assert!(answer.text().contains("swarm"), "{}", answer.text());
    assert_eq!(swarm.count(&["rejected"]), 0, "{}", swarm.log());
    swarm.signal("INT");
    assert_eq!(swarm.wait().code(), Some(0));
    eventually(Duration::from_secs(5), "all have left", || {
        server.agents().is_empty()
    });

    let small = Server::with(port_range(7), &[]);
    let tunnel = small.tunnel.to_string();
    let args = ["swarm", "--server", &tunnel, "--count", "20"];
    let mut swarm = Process::start("swarm", &args, &[]);
    swarm.wait_for(&["registered 7 "]);
    let line = swarm.wait_for(&["rejected 13"]);
    assert!(line.contains("port_exhausted"), "{line}");
    swarm.signal("TERM");
    assert_eq!(swarm.wait().code(), Some(0));
}

/// What `demo` printed: its agents' addresses and the admin port's.
struct Demo {
    process: Process,
    agents: Vec<SocketAddr>,
    admin: SocketAddr,
}

impl Demo {
    fn start(count: usize) -> Self {
        let process = Process::start("demo", &["demo", "--agents", &count.to_string()], &[]);
        let number = |line: &str, before: &str| -> u16 {
            let (_, rest) = line.split_once(before).unwrap();
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap()
        };
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let agents = (1..=count)
            .map(|agent| {
                let name = format!("agent-{agent} ");
                let line = process.wait_for(&[&name, "http://localhost:", "curl"]);
                local(number(&line, "http://localhost:"))
            })
            .collect();
        let line = process.wait_for(&["curl", "/agents"]);
        Self {
            agents,
            admin: local(number(&line, "http://127.0.0.1:")),
            process,
        }
    }

    fn check_agents(&self) {
        let listed = get(self.admin, "/agents");
        assert_eq!(listed.status, 200);
        for (agent, number) in self.agents.iter().zip(1..) {
            let page = get(*agent, "/");
            assert_eq!(page.status, 200);
            assert!(page.text().contains(&format!("agent-{number}")));
            let status = get(*agent, "/api/status");
            let status: serde_json::Value = serde_json::from_slice(&status.body).unwrap();
            assert_eq!(status["agent"], format!("agent-{number}"));
            let echo = request(*agent, "POST", "/echo", &[("X-Mark", "mark")], b"hello");
            let echo = echo.text();
            assert!(echo.contains("mark") && echo.ends_with("hello"), "{echo}");
        }
    }

    /// Ends it as Ctrl-C does.
    fn interrupt(mut self) {
        self.process.signal("INT");
        let (code, text) = self.process.finish();
        assert_eq!(code, Some(0), "{text}");
        assert!(text.ends_with("Stopped."), "{text}");
        for address in self.agents.iter().chain([&self.admin]) {
            assert!(refuses(*address), "{address}");
        }
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("0.0.0.0", port)).is_ok()
}

/// One test, because the default ports are there once.
#[test]
fn the_demo_runs_on_the_default_ports_and_on_others() {
    let ports_free = [8080, 9090, 8100, 8101, 8102].into_iter().all(is_free);
    let demo = Demo::start(3);
    if ports_free {
        assert_eq!(demo.admin.port(), 8080);
        let ports: Vec<u16> = demo.agents.iter().map(SocketAddr::port).collect();
        assert_eq!(ports, [8100, 8101, 8102]);
        assert_eq!(demo.process.count(&["taken"]), 0);
    }
    demo.check_agents();

    // The clock's first event comes at once, though the answer never ends.
    let since = Instant::now();
    let mut clock = connect(demo.agents[1]);
    clock
        .write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let head = read_head(&mut clock).unwrap();
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.contains("text/event-stream"), "{head}");
    let mut event = Vec::new();
    while !event.windows(2).any(|end| end == b"\n\n") {
        let mut byte = [0];
        clock.read_exact(&mut byte).unwrap();
        event.push(byte[0]);
    }
    assert!(event.windows(5).any(|word| word == b"data:"));
    assert!(since.elapsed() < Duration::from_secs(1));
    // Neither does it keep the demo from ending.
    demo.interrupt();

    // Whoever has them otherwise, they are taken now.
    let _taken: Vec<_> = [8080, 9090]
        .into_iter()
        .map(|port| TcpListener::bind(("127.0.0.1", port)))
        .collect();
    let demo = Demo::start(2);
    demo.process.wait_for(&["8080", "taken", "http.port"]);
    demo.process.wait_for(&["9090", "taken", "grpc.port"]);
    assert_ne!(demo.admin.port(), 8080);
    demo.check_agents();
    demo.interrupt();
}

#[test]
fn no_secret_is_ever_written() {
    secrets_stay_secret("text");
    secrets_stay_secret("json");
}

fn secrets_stay_secret(format: &str) {
    const KEY: &str = "k3y-of-the-admin-port";
    const SHARED: &str = "shared-t0ken";
    const OWN: &str = "own-t0ken";
    const WRONG: &str = "wr0ng-token";
    const COOKIE: &str = "session-c00kie";
    const PASSWORD: &str = "visitors-passw0rd";
    const QUERY: &str = "t0ken-of-a-query";
    const EVERYTHING: &str = "trace,h2=trace,hyper=trace,hyper_util=trace,tower=trace";
    let tokens = format!("own={OWN}");
    let directory = TempDir::new().unwrap();
    let access_log = directory.path().join("access.log");
    let server = Server::with(
        port_range(10),
        &[
            ("log.level", EVERYTHING),
            ("log.format", format),
            ("http.access_log", access_log.to_str().unwrap()),
            ("http.admin_api_key", KEY),
            ("grpc.auth.shared_token", SHARED),
            ("grpc.auth.tokens", &tokens),
        ],
    );
    let service = text_service("hello");
    let agent = |id: &str, token: &str| {
        let settings = [
            ("grpc.token", token),
            ("log.level", EVERYTHING),
            ("log.format", format),
        ];
        server.start_agent(id, &format!("http://{service}"), &settings)
    };
    let welcome = [agent("agent-1", SHARED), agent("own", OWN)];
    let rejected = agent("agent-2", WRONG);
    for agent in &welcome {
        agent.wait_for(&["connected", "port"]);
    }
    rejected.wait_for(&["rejected", "auth"]);
    eventually(Duration::from_secs(5), "the agents are listed", || {
        let list = request(server.admin, "GET", "/agents", &[("X-API-Key", KEY)], b"");
        list.text().ends_with(r#""count":2}"#)
    });
    let key = [("X-API-Key", KEY)];
    let list = request(server.admin, "GET", "/agents", &key, b"");
    assert_eq!(list.status, 200);
    let bearer = format!("Bearer {KEY}");
    let bearer = [("Authorization", bearer.as_str())];
    let metrics = request(server.admin, "GET", "/metrics", &bearer, b"");
    assert_eq!(metrics.status, 200);
    let wrong = [("X-API-Key", WRONG)];
    let refused = request(server.admin, "GET", "/agents", &wrong, b"");
    assert_eq!(refused.status, 401);
    let row: serde_json::Value = serde_json::from_slice(&list.body).unwrap();
    let port = row["agents"][0]["port"].as_u64().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).unwrap()));
    assert_eq!(get(address, "/").text(), "hello");
    // What visitors send is theirs.
    let basic = format!("Basic {PASSWORD}");
    let headers = [("Cookie", COOKIE), ("Authorization", &basic)];
    let target = format!("/found?token={QUERY}");
    let answer = request(address, "POST", &target, &headers, PASSWORD.as_bytes());
    assert_eq!(answer.status, 200);
    // By HTTP/2 too, of which the libraries have the most to say.
    if have("curl", "curl") {
        let url = format!("http://{address}{target}");
        let cookie = format!("Cookie: {COOKIE}");
        let user = format!("user:{PASSWORD}");
        let http2 = "--http2-prior-knowledge";
        curl(&[http2, "-H", &cookie, "-u", &user, "-d", PASSWORD, &url]);
    }
    let malformed = format!("GET {target} HTTP/1.1\r\nCookie {COOKIE}\r\n\r\n");
    let mut stream = connect(address);
    stream.write_all(malformed.as_bytes()).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    let mut accesses = String::new();
    eventually(Duration::from_secs(5), "the requests are logged", || {
        accesses = fs::read_to_string(&access_log).unwrap();
        accesses.lines().count() == if have("curl", "curl") { 4 } else { 3 }
    });
    assert!(accesses.contains("/found") && !accesses.contains('?'));

    let mut texts = vec![
        ("the access log", accesses),
        // With all of them in the environment.
        (
            "the help",
            run_with(
                &["server", "--help"],
                &[
                    ("SILO_HTTP_ADMIN_API_KEY", KEY),
                    ("SILO_GRPC_AUTH_SHARED_TOKEN", SHARED),
                    ("SILO_GRPC_AUTH_TOKENS", &tokens),
                ],
            )
            .1,
        ),
        (
            "an agent's help",
            run_with(&["agent", "http", "--help"], &[("SILO_GRPC_TOKEN", OWN)]).1,
        ),
        ("the list", list.text()),
        ("the metrics", metrics.text()),
        ("the refusal", refused.text()),
        ("the server's log", server.process.log()),
        ("the rejected agent's log", rejected.log()),
    ];
    texts.extend(welcome.iter().map(|agent| ("an agent's log", agent.log())));
    assert!(server.process.count(&["TRACE"]) > 10, "that is little");

    // Faults beside a secret don't quote it either.
    for (setting, secret) in [
        ("grpc.auth.tokens", "no-pair-but-a-s3cret"),
        ("http.admin_api_key", "blanks in a s3cret"),
        ("http.admin_api_ky", "misspelt-s3cret"),
    ] {
        let (code, text) = run_with(&["server"], &[(&variable(setting), secret)]);
        assert_eq!(code, Some(2), "{text}");
        texts.push(("a fault", text));
    }
    for (what, text) in texts {
        for secret in [KEY, SHARED, OWN, WRONG, COOKIE, PASSWORD, QUERY, "s3cret"] {
            assert!(!text.contains(secret), "{what} holds {secret:?}:\n{text}");
        }
    }
}
