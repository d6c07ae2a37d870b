//! What is written about what happens, as whoever reads it meets it: the log, the access log, and
//! that neither ever holds anybody up. And who may read answers in a browser.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{
    BINARY, PATIENCE, Server, connect, eventually, get, port_range, read_answer, read_head,
    request, service, text_service, variable,
};
use serde_json::Value;
use tempfile::TempDir;

/// The lines of a log for machines.
fn json_lines(log: &str) -> Vec<Value> {
    log.lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

#[test]
fn lines_for_people() {
    let server = Server::start();
    let mut agent = server.agent("agent-1", text_service("hello"));
    get(agent.address(), "/");
    agent.process.kill();
    let port = format!("port={}", agent.port);
    let of_agent = |what: &str, more: &[&str]| {
        let mut parts = vec![what, "agent_id=agent-1", &port];
        parts.extend(more);
        server.process.wait_for(&parts)
    };
    for line in [
        of_agent("port opened", &[]),
        of_agent("agent registered", &["generation=1", "peer=127.0.0.1:"]),
        of_agent(
            "agent deregistered",
            &[
                "why=",
                "seconds=",
                "requests=1",
                "bytes_in=0",
                "bytes_out=5",
            ],
        ),
        of_agent("port closed", &[]),
    ] {
        // A time in UTC, a level, and no colours where nobody sees them.
        assert_eq!(line.as_bytes()[10], b'T', "{line}");
        assert!(line.contains("Z  INFO silo_proxy::server::"), "{line}");
        assert!(!line.contains('\u{1b}'), "{line}");
    }
}

#[test]
fn lines_for_machines() {
    let server = Server::with(port_range(2), &[("log.format", "json")]);
    let url = format!("http://{}", text_service("hello"));
    let agent = server.start_agent("agent-1", &url, &[("log.format", "json")]);
    agent.wait_for(&[" -> "]);
    server.process.wait_for(&["agent registered"]);

    for log in [server.process.log(), agent.log()] {
        let lines = json_lines(&log);
        // An agent's URL goes to standard output, which is no log.
        let other = log.lines().filter(|line| !line.starts_with('{'));
        assert!(other.clone().all(|line| line.contains(" -> ")), "{log}");
        for line in &lines {
            let time = line["timestamp"].as_str().unwrap();
            assert!(time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
            assert!(line["level"].is_string() && line["target"].is_string());
            assert!(line["message"].is_string(), "{line}");
            let flat = |value: &Value| !value.is_object() && !value.is_array();
            assert!(line.as_object().unwrap().values().all(flat), "{line}");
        }
    }
    let lines = json_lines(&server.process.log());
    let registered = lines
        .iter()
        .find(|line| line["message"] == "agent registered")
        .unwrap();
    assert_eq!(registered["level"], "INFO");
    assert_eq!(registered["agent_id"], "agent-1");
    assert_eq!(registered["generation"], 1);
    assert!(registered["port"].is_u64());

    // A start that fails is a line of the log as well.
    let taken = server.admin.port().to_string();
    let environment = [
        (variable("log.format"), "json"),
        (variable("http.port"), &taken),
        (variable("grpc.port"), "0"),
    ];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (&name[..], *value));
    let (code, log) = common::Process::start("second", &["server"], &environment).finish();
    assert_eq!(code, Some(1), "{log}");
    let line = json_lines(&log).pop().unwrap();
    assert_eq!(line["level"], "ERROR");
    assert!(line["message"].as_str().unwrap().contains("http.port"));
}

#[test]
fn an_exhausted_range_is_told_with_its_figures() {
    let server = Server::with(port_range(2), &[]);
    let service = text_service("hello");
    let _agents = ["agent-1", "agent-2"].map(|id| server.agent(id, service));
    let _third = server.start_agent("agent-3", &format!("http://{service}"), &[]);
    let range = format!("range={}-{}", server.range.start(), server.range.end());
    let line = server
        .process
        .wait_for(&["agent rejected", "agent_id=agent-3"]);
    for part in [
        "WARN",
        "reason=port_exhausted",
        &range,
        "serving=2 leased=0 foreign=0",
        "widen http.agent_port_range",
    ] {
        assert!(line.contains(part), "{part} is missing: {line}");
    }
}

#[test]
fn strangers_write_few_lines() {
    let server = Server::start();
    for _ in 0..50 {
        let mut stranger = connect(server.tunnel);
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let _ = stranger.read_to_end(&mut Vec::new());
    }
    // What looks whether the port is open doesn't say anything, and isn't worth a line.
    drop(connect(server.tunnel));
    eventually(PATIENCE, "all are counted", || {
        server.metric("silo_handshakes_failed_total", "") >= 51.0
    });
    assert_eq!(server.process.count(&["handshake failed"]), 1);
    server
        .process
        .wait_for(&["INFO", "handshake failed", "reason=protocol"]);
    server.agent("agent-1", text_service("hello"));
}

#[test]
fn a_log_that_nobody_reads_holds_nobody_up() {
    let range = port_range(2);
    let settings = [
        ("log.level", "trace,h2=trace".to_owned()),
        ("http.port", "0".to_owned()),
        ("grpc.port", "0".to_owned()),
        ("grpc.host", "127.0.0.1".to_owned()),
        ("http.agent_port_range.start", range.start().to_string()),
        ("http.agent_port_range.end", range.end().to_string()),
    ];
    let mut child = Command::new(BINARY)
        .arg("server")
        .envs(settings.map(|(setting, value)| (variable(setting), value)))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("server started") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
    }
    let (_, tunnel) = line.split_once("tunnel=").unwrap();
    let tunnel = tunnel.split_whitespace().next().unwrap();

    // From here on nobody reads; a pipe takes 64 KiB, the queue 4 MiB.
    let url = format!("http://{}", text_service("hello"));
    let environment = [
        ("SILO_GRPC_SERVER_ADDRESS", tunnel),
        ("SILO_GRPC_AGENT_ID", "agent-1"),
        ("SILO_LOCAL_SERVICE_URL", &url),
    ];
    let agent = common::Process::start("agent", &["agent"], &environment);
    agent.wait_for(&["connected", "port="]);
    let address = SocketAddr::from(([127, 0, 0, 1], *range.start()));
    let mut stream = connect(address);
    // A visitor by HTTP/2, whose frames have several lines each: settings, then pings.
    let mut noise = connect(address);
    noise
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    for _ in 0..2000 {
        for _ in 0..4 {
            let ping = b"\0\0\x08\x06\0\0\0\0\0whatever";
            noise.write_all(ping).unwrap();
        }
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        assert_eq!(read_answer(&mut stream, false).body, b"hello");
    }
    drop((noise, stream));

    // Read again, it goes on, and says what it left out.
    let mut lines = 0;
    while !line.contains("log lines were dropped") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
        lines += 1;
    }
    assert!(line.contains("WARN") && line.contains("lines="), "{line}");
    assert!(lines > 1000, "{lines}");

    // It doesn't wait for readers to end either.
    for _ in 0..100 {
        assert_eq!(get(address, "/").status, 200);
    }
    let mut stop = Command::new("kill");
    assert!(stop.arg(child.id().to_string()).status().unwrap().success());
    eventually(PATIENCE, "the server ends", || {
        child.try_wait().unwrap().is_some()
    });
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut rest = Vec::new();
    log.read_to_end(&mut rest).unwrap();
}

/// The line of a file that contains all of `parts`, as soon as it is there.
fn wait_for_line(file: &Path, parts: &[&str]) -> String {
    let mut found = None;
    eventually(PATIENCE, &format!("{parts:?} in the access log"), || {
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut lines = text.lines();
        found = lines
            .find(|line| parts.iter().all(|part| line.contains(part)))
            .map(str::to_owned);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn each_request_is_a_line_of_the_access_log() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("access.log");
    let name = file.to_str().unwrap();
    let server = Server::with(port_range(3), &[("http.access_log", name)]);
    let agent = server.agent("agent-1", text_service("hello"));
    let port = format!("port={}", agent.port);

    let headers = [("X-Request-Id", "mine \"quoted\"")];
    let target = "/a%20b/\"c\"?token=s3cret";
    assert_eq!(
        request(agent.address(), "POST", target, &headers, b"body").status,
        200
    );
    let line = wait_for_line(&file, &["method=POST"]);
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(time.ends_with('Z') && time.as_bytes()[10] == b'T', "{line}");
    let expected = format!(
        r#"visitor=127.0.0.1 agent_id=agent-1 {port} method=POST path="/a%20b/\"c\"" protocol=HTTP/1.1 status=200 bytes_in=4 bytes_out=5 duration_ms="#
    );
    assert!(rest.starts_with(&expected), "{rest}");
    let end = r#" complete=true request_id="mine \"quoted\"""#;
    assert!(rest.ends_with(end), "{rest}");

    // A name of the server's making, and no body.
    assert_eq!(request(agent.address(), "HEAD", "/", &[], b"").status, 200);
    let line = wait_for_line(&file, &["method=HEAD", "bytes_out=0 ", "complete=true"]);
    let (_, id) = line.split_once("request_id=\"").unwrap();
    assert_eq!(id.len(), 33, "{line}");

    // A head that is no request.
    let mut stream = connect(agent.address());
    stream
        .write_all(b"GET / HTTP/1.1\r\nbad line\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut stream, false).status, 400);
    let line = wait_for_line(&file, &["status=400", "error=bad_request"]);
    assert!(
        !line.contains("method=") && !line.contains("path="),
        "{line}"
    );

    // Nobody there.
    let nobody = server.agent("agent-2", ([127, 0, 0, 1], 9).into());
    assert_eq!(get(nobody.address(), "/").status, 502);
    wait_for_line(
        &file,
        &[
            "agent_id=agent-2",
            "status=502",
            "complete=true",
            "error=upstream_refused",
        ],
    );

    // An answer that breaks off, and a visitor who leaves in the middle of one.
    let half = service(|mut stream| {
        let head = read_head(&mut stream).unwrap();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
        if !head.starts_with(b"GET /breaks") {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let half = server.agent("agent-3", half);
    let mut stream = connect(half.address());
    stream
        .write_all(b"GET /breaks HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
    let cut = [
        "path=\"/breaks\"",
        "status=200",
        "bytes_out=4 ",
        "complete=false",
    ];
    let line = wait_for_line(&file, &cut);
    assert!(line.ends_with("error=cut_after_head"), "{line}");
    let mut stream = connect(half.address());
    stream
        .write_all(b"GET /leaves HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    read_head(&mut stream).unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    drop(stream);
    let left = [
        "path=\"/leaves\"",
        "status=200",
        "bytes_out=4 ",
        "complete=false",
    ];
    let line = wait_for_line(&file, &left);
    assert!(line.ends_with("error=visitor_left"), "{line}");

    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(!text.contains("s3cret") && !text.contains('?'), "{text}");
    assert_eq!(server.metric("silo_access_log_dropped_total", ""), 0.0);
}

#[test]
fn the_access_log_is_opened_again_for_who_moved_it() {
    let directory = TempDir::new().unwrap();
    let [file, moved] = ["access.log", "access.log.1"].map(|name| directory.path().join(name));
    let settings = [
        ("http.access_log", file.to_str().unwrap()),
        ("log.format", "json"),
        ("http.trusted_proxies", "127.0.0.1"),
    ];
    let server = Server::with(port_range(2), &settings);
    let url = format!("http://{}", text_service("hello"));
    let agent = server.start_agent("agent-1", &url, &[]);
    agent.wait_for(&["connected", "port="]);
    let address = SocketAddr::from(([127, 0, 0, 1], *server.range.start()));

    let from = [("X-Forwarded-For", "192.0.2.7")];
    request(address, "GET", "/one?a", &from, b"");
    let line = wait_for_line(&file, &["/one"]);
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["path"], "/one");
    assert_eq!(line["status"], 200);
    assert_eq!(line["complete"], true);
    assert_eq!(line["visitor"], "127.0.0.1");
    assert_eq!(line["forwarded_for"], "192.0.2.7");

    fs::rename(&file, &moved).unwrap();
    server.process.signal("HUP");
    eventually(PATIENCE, "the file is there again", || file.exists());
    get(address, "/two");
    wait_for_line(&file, &["/two"]);
    assert_eq!(fs::read_to_string(&moved).unwrap().lines().count(), 1);
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 1);
}

#[test]
fn an_access_log_on_a_stream_or_a_full_disk() {
    for stream in ["stdout", "stderr"] {
        let server = Server::with(port_range(1), &[("http.access_log", stream)]);
        let agent = server.agent("agent-1", text_service("hello"));
        get(agent.address(), "/there");
        server.process.wait_for(&["path=\"/there\"", "status=200"]);
    }

    let server = Server::with(port_range(1), &[("http.access_log", "/dev/full")]);
    let agent = server.agent("agent-1", text_service("hello"));
    for _ in 0..20 {
        assert_eq!(get(agent.address(), "/").text(), "hello");
    }
    let line = server
        .process
        .wait_for(&["WARN", "the access log can't be written"]);
    assert!(line.contains("http.access_log"), "{line}");
    eventually(PATIENCE, "what is lost is counted", || {
        server.metric("silo_access_log_dropped_total", "") == 20.0
    });
    assert_eq!(server.process.count(&["can't be written"]), 1, "once");

    let nowhere = [(variable("http.access_log"), "/nonexistent/access.log")];
    let nowhere = nowhere.each_ref().map(|(name, value)| (&name[..], *value));
    let environment = [nowhere[0], ("SILO_HTTP_PORT", "0"), ("SILO_GRPC_PORT", "0")];
    let (code, log) = common::Process::start("nowhere", &["server"], &environment).finish();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("http.access_log") && log.contains("/nonexistent/access.log"));
}

#[test]
fn the_last_requests_are_in_the_access_log() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("access.log");
    let settings = [
        ("http.access_log", file.to_str().unwrap()),
        ("server.grace", "200ms"),
    ];
    let mut server = Server::with(port_range(1), &settings);
    let held = common::HeldService::start("never");
    let agent = server.agent("agent-1", held.address);
    let mut stream = connect(agent.address());
    stream
        .write_all(b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    held.wait_for_request();
    server.process.signal("TERM");
    assert_eq!(server.process.wait().code(), Some(0));
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("path=\"/held\"") && text.ends_with('\n'),
        "{text}"
    );
}

const APP: &str = "https://app.example.com";

/// A service that counts its requests, and says who may read its answers if asked for `/own`.
fn counting_service() -> (SocketAddr, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let address = service(move |mut stream| {
        while let Ok(head) = read_head(&mut stream) {
            count.fetch_add(1, Ordering::Relaxed);
            let lines = match head.windows(5).any(|bytes| bytes == b" /own") {
                true => "Access-Control-Allow-Origin: https://its.own\r\n",
                false => "Vary: Accept\r\n",
            };
            let answer = format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: 2\r\n\r\nok");
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    (address, requests)
}

const QUESTION: [(&str, &str); 3] = [
    ("Origin", APP),
    ("Access-Control-Request-Method", "PUT"),
    ("Access-Control-Request-Headers", "content-type"),
];

#[test]
fn pages_of_allowed_origins_may_read_answers() {
    let origins = format!("https://other.example,{APP}");
    let settings = [("http.cors.allowed_origins", origins.as_str())];
    let server = Server::with(port_range(2), &settings);
    let (service, requests) = counting_service();
    let agent = server.agent("agent-1", service);
    let address = agent.address();
    let origin = [("Origin", APP)];
    let allowed = |answer: &common::Answer| answer.header("access-control-allow-origin");

    // Browsers ask on kept-alive connections, and go on there.
    let mut stream = connect(address);
    let question: String = QUESTION
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let question = format!("OPTIONS /api HTTP/1.1\r\nHost: a\r\n{question}\r\n");
    for _ in 0..2 {
        stream.write_all(question.as_bytes()).unwrap();
        let answer = read_answer(&mut stream, false);
        assert_eq!(answer.status, 204);
        assert_eq!(allowed(&answer), [APP]);
        let methods = answer.header("access-control-allow-methods");
        assert_eq!(methods, ["GET, HEAD, POST, PUT, PATCH, DELETE"]);
        assert_eq!(
            answer.header("access-control-allow-headers"),
            ["content-type"]
        );
        assert_eq!(answer.header("access-control-max-age"), ["600"]);
        assert!(answer.header("vary")[0].contains("origin"));
        assert!(answer.header("content-length").is_empty());
    }
    assert_eq!(requests.load(Ordering::Relaxed), 0, "the service was asked");
    stream
        .write_all(format!("PUT /api HTTP/1.1\r\nHost: a\r\nOrigin: {APP}\r\n\r\n").as_bytes())
        .unwrap();
    let answer = read_answer(&mut stream, false);
    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    assert_eq!(allowed(&answer), [APP]);
    assert_eq!(answer.header("vary"), ["Accept", "origin"]);

    // The service has the last word, others may read nothing, and other OPTIONS are its own.
    let answer = request(address, "GET", "/own", &origin, b"");
    assert_eq!(allowed(&answer), ["https://its.own"]);
    assert!(answer.header("vary").is_empty());
    let evil = request(
        address,
        "GET",
        "/",
        &[("Origin", "https://evil.example")],
        b"",
    );
    assert_eq!(evil.status, 200);
    assert!(allowed(&evil).is_empty());
    assert_eq!(evil.header("vary"), ["Accept", "origin"]);
    assert_eq!(request(address, "OPTIONS", "/", &origin, b"").text(), "ok");
    // A question with a body leaves the connection in order.
    let answer = request(address, "OPTIONS", "/", &QUESTION, b"body");
    assert_eq!(answer.status, 204);

    // What the server says itself can be read too.
    let nobody = server.agent("agent-2", ([127, 0, 0, 1], 9).into());
    let answer = request(nobody.address(), "GET", "/", &origin, b"");
    assert_eq!(answer.status, 502);
    assert_eq!(allowed(&answer), [APP]);
    let exposed = answer.header("access-control-expose-headers");
    assert!(exposed[0].contains("x-silo-error"), "{exposed:?}");
    assert_eq!(answer.header("x-silo-error"), ["upstream_refused"]);
    assert!(allowed(&get(nobody.address(), "/")).is_empty());
    // The admin port takes no part in it.
    let list = request(server.admin, "GET", "/agents", &origin, b"");
    assert!(allowed(&list).is_empty());
}

#[test]
fn without_cors_everything_passes() {
    let server = Server::start();
    let (service, requests) = counting_service();
    let agent = server.agent("agent-1", service);
    let answer = request(agent.address(), "OPTIONS", "/", &QUESTION, b"");
    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    assert_eq!(requests.load(Ordering::Relaxed), 1);
    assert_eq!(answer.header("vary"), ["Accept"]);
    assert!(answer.header("access-control-allow-origin").is_empty());

    let any = Server::with(port_range(1), &[("http.cors.allowed_origins", "*")]);
    let agent = any.agent("agent-1", service);
    let answer = get(agent.address(), "/");
    assert_eq!(answer.header("access-control-allow-origin"), ["*"]);
    assert_eq!(answer.header("vary"), ["Accept"]);
}

/// What an agent prints is for people, who may have gone.
#[test]
fn standard_output_that_nobody_reads_holds_no_agent_up() {
    let (_unread, mut full) = std::io::pipe().unwrap();
    let stdout = full.try_clone().unwrap();
    // A pipe takes 64 KiB on Linux; a writer that waits for room is left behind.
    let (filled, is_full) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while full.write_all(&[b'x'; 4096]).is_ok() {
            let _ = filled.send(());
        }
    });
    for _ in 0..16 {
        is_full.recv_timeout(common::PATIENCE).unwrap();
    }

    let server = Server::start();
    let url = format!("http://{}", text_service("hello"));
    let mut child = Command::new(BINARY)
        .arg("agent")
        .env(variable("grpc.server_address"), server.tunnel.to_string())
        .env(variable("grpc.agent_id"), "agent-1")
        .env(variable("local.service_url"), url)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    common::eventually(common::PATIENCE, "the agent is listed", || {
        server.agents().len() == 1
    });
    let (_, port) = server.agents().remove(0);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(get(address, "/").text(), "hello");
    let pid = child.id().to_string();
    Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
