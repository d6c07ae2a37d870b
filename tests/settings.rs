//! Every setting of the documented table is read: for each there is a test that sets it and sees
//! the effect on the running product. Most of these tests stand elsewhere, beside what they are
//! about; here are the rest, and the list.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{
    HeldService, PATIENCE, Server, bytes_in_sockets, connect, eventually, get, port_range,
    read_answer, refuses, request, text_service,
};
use silo_proxy::config::{Role, table};

/// Where the effect of a setting is seen: the setting, a file, a test in it.
const SERVER: &[(&str, &str, &str)] = &[
    ("log.level", "tests/reload.rs", "the_log_level_changes"),
    ("log.format", "tests/logs.rs", "lines_for_machines"),
    (
        "http.host",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "http.port",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "http.admin_api_key",
        "tests/admin.rs",
        "with_a_key_the_key_decides",
    ),
    (
        "http.agent_host",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "http.public_host",
        HERE,
        "the_agent_is_told_the_public_host",
    ),
    (
        "http.agent_port_range.start",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "http.agent_port_range.end",
        "tests/reload.rs",
        "a_grown_range_takes_the_agent_that_found_no_port",
    ),
    (
        "http.static_ports",
        "tests/seed.rs",
        "a_pinned_port_belongs_to_one_id_alone",
    ),
    ("http.port_lease", "tests/seed.rs", "a_lease_ends"),
    (
        "http.state_file",
        "tests/survival.rs",
        "leases_survive_the_server",
    ),
    (
        "http.trusted_proxies",
        "tests/http/heads.rs",
        "a_visitors_word_on_where_he_comes_from_counts_only_if_he_is_trusted",
    ),
    (
        "http.max_exchanges_per_agent",
        "tests/limits.rs",
        "too_many_exchanges",
    ),
    (
        "http.max_connections",
        "tests/limits.rs",
        "connections_are_limited_in_all",
    ),
    (
        "http.max_connections_per_agent",
        "tests/limits.rs",
        "connections_are_limited_by_agent",
    ),
    (
        "http.max_connections_per_address",
        "tests/limits.rs",
        "connections_are_limited_by_address",
    ),
    ("http.max_request_line", HERE, "heads_are_limited"),
    ("http.max_head", HERE, "heads_are_limited"),
    ("http.max_header_lines", HERE, "heads_are_limited"),
    (
        "http.head_timeout",
        "tests/limits.rs",
        "a_head_that_comes_too_slowly",
    ),
    (
        "http.body_timeout",
        "tests/limits.rs",
        "a_body_that_comes_too_slowly",
    ),
    (
        "http.idle_timeout",
        "tests/limits.rs",
        "a_connection_that_lies_idle",
    ),
    (
        "http.send_timeout",
        "tests/limits.rs",
        "a_visitor_who_takes_nothing",
    ),
    (
        "http.max_body",
        "tests/limits.rs",
        "a_body_that_is_too_large",
    ),
    (
        "http.receive_buffer",
        HERE,
        "the_kernel_takes_of_an_upload_what_it_may",
    ),
    (
        "http.cors.allowed_origins",
        "tests/logs.rs",
        "pages_of_allowed_origins_may_read_answers",
    ),
    (
        "http.cors.allowed_methods",
        HERE,
        "a_preflight_is_told_what_pages_may",
    ),
    (
        "http.cors.allowed_headers",
        HERE,
        "a_preflight_is_told_what_pages_may",
    ),
    (
        "http.cors.allow_credentials",
        HERE,
        "a_preflight_is_told_what_pages_may",
    ),
    (
        "http.cors.max_age",
        HERE,
        "a_preflight_is_told_what_pages_may",
    ),
    (
        "http.access_log",
        "tests/logs.rs",
        "each_request_is_a_line_of_the_access_log",
    ),
    (
        "grpc.host",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "grpc.port",
        HERE,
        "addresses_and_ports_are_those_of_the_settings",
    ),
    (
        "grpc.auth.shared_token",
        "tests/seed.rs",
        "agents_show_the_token_they_must",
    ),
    (
        "grpc.auth.tokens",
        "tests/seed.rs",
        "agents_show_the_token_they_must",
    ),
    (
        "grpc.tls.enabled",
        "tests/tls.rs",
        "certificates_are_made_and_used",
    ),
    (
        "grpc.tls.cert_file",
        "tests/tls.rs",
        "files_that_cannot_be_used_are_faults_of_the_configuration",
    ),
    (
        "grpc.tls.key_file",
        "tests/tls.rs",
        "files_that_cannot_be_used_are_faults_of_the_configuration",
    ),
    (
        "grpc.tls.ca_file",
        "tests/tls.rs",
        "certificates_are_made_and_used",
    ),
    (
        "grpc.tls.client_auth",
        "tests/tls.rs",
        "certificates_are_made_and_used",
    ),
    (
        "grpc.handshake_timeout",
        "tests/tls.rs",
        "an_endless_handshake_is_ended",
    ),
    (
        "grpc.max_handshakes",
        "tests/limits.rs",
        "who_never_says_hello_keeps_no_agent_out",
    ),
    (
        "grpc.heartbeat_interval",
        HERE,
        "heartbeats_keep_the_servers_time",
    ),
    (
        "grpc.heartbeat_timeout",
        HERE,
        "heartbeats_keep_the_servers_time",
    ),
    (
        "server.workers",
        HERE,
        "there_are_as_many_workers_as_asked_for",
    ),
    (
        "server.grace",
        "tests/processes.rs",
        "a_request_without_an_end_is_cut_when_the_grace_is_over",
    ),
    (
        "server.max_buffered",
        HERE,
        "what_the_process_promises_to_hold_is_limited",
    ),
    (
        "server.max_buffered_per_agent",
        HERE,
        "what_an_agent_may_hold_is_limited",
    ),
];

/// The same for an agent.
const AGENT: &[(&str, &str, &str)] = &[
    (
        "log.level",
        "tests/reload.rs",
        "an_agent_changes_its_service_and_token_without_losing_its_session",
    ),
    ("log.format", HERE, "an_agent_logs_for_machines"),
    (
        "grpc.server_address",
        "tests/rejections.rs",
        "rejected_agents_make_no_more_attempts_than_told",
    ),
    (
        "grpc.agent_id",
        "tests/reload.rs",
        "an_agent_that_was_rejected_gets_in_with_the_token_it_is_given",
    ),
    (
        "grpc.token",
        "tests/seed.rs",
        "agents_show_the_token_they_must",
    ),
    (
        "grpc.tls.enabled",
        "tests/tls.rs",
        "with_tls_and_without_do_not_mix_and_say_so",
    ),
    (
        "grpc.tls.ca_file",
        "tests/tls.rs",
        "certificates_that_are_not_accepted_are_told",
    ),
    (
        "grpc.tls.cert_file",
        "tests/tls.rs",
        "a_requested_certificate_is_as_good_as_a_token",
    ),
    (
        "grpc.tls.key_file",
        "tests/tls.rs",
        "files_that_cannot_be_used_are_faults_of_the_configuration",
    ),
    (
        "grpc.tls.server_name",
        "tests/tls.rs",
        "a_server_that_is_not_accepted_is_left_alone",
    ),
    (
        "grpc.heartbeat_timeout",
        "src/agent/tests/sessions.rs",
        "a_server_that_says_nothing_is_given_up",
    ),
    (
        "local.service_url",
        "tests/reload.rs",
        "an_agent_changes_its_service_and_token_without_losing_its_session",
    ),
    (
        "local.protocol",
        "tests/http2/services.rs",
        "grpc_alone_goes_as_http2_if_that_is_left_to_the_agent",
    ),
    (
        "local.host_header",
        "tests/http/heads.rs",
        "host_is_what_the_agent_is_told_to_send",
    ),
    (
        "local.response_timeout",
        "tests/limits.rs",
        "the_service_takes_too_long",
    ),
    (
        "local.connect_timeout",
        HERE,
        "a_service_that_does_not_greet_is_given_up",
    ),
    (
        "local.idle_timeout",
        "src/agent/tests/forwarding.rs",
        "unused_connections_are_closed_after_a_while",
    ),
    (
        "local.max_connections",
        "src/agent/tests/forwarding.rs",
        "exchanges_wait_for_a_connection_in_order",
    ),
    (
        "local.tls.ca_file",
        "tests/http/secure.rs",
        "certificates_are_checked",
    ),
    (
        "local.tls.server_name",
        "tests/http/secure.rs",
        "certificates_are_checked",
    ),
    (
        "local.tls.insecure",
        "tests/http/secure.rs",
        "certificates_are_checked",
    ),
    ("agent.labels", "tests/seed.rs", "an_agent_shows_its_labels"),
    (
        "agent.grace",
        "tests/processes.rs",
        "an_agent_cuts_a_request_without_an_end_when_its_grace_is_over",
    ),
];

const HERE: &str = "tests/settings.rs";

#[test]
fn each_setting_of_the_table_has_a_test_that_sees_its_effect() {
    for (role, proofs) in [(Role::Server, SERVER), (Role::Agent, AGENT)] {
        let settings: Vec<&str> = table(role).iter().map(|setting| setting.path).collect();
        for path in &settings {
            let proofs = proofs.iter().filter(|(of, ..)| of == path).count();
            assert_eq!(
                proofs, 1,
                "{path} of the {role}: name a test that sees its effect"
            );
        }
        for (path, file, test) in proofs {
            assert!(settings.contains(path), "the {role} has no {path}");
            let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file));
            let source = source.unwrap();
            let (_, after) = source
                .split_once(&format!("fn {test}("))
                .unwrap_or_else(|| panic!("{file} has no {test}, which {path} relies on"));
            let body = after.split("\n}\n").next().unwrap();
            // Said in full, as a variable, or as a field.
            let variable = common::variable(path);
            let name = path.rsplit('.').next().unwrap();
            let said = [name, &variable].iter().any(|name| body.contains(name));
            assert!(said, "{test} in {file} doesn't mention {path}");
        }
    }
}

#[test]
fn addresses_and_ports_are_those_of_the_settings() {
    let ports = port_range(4);
    let [admin, tunnel, start, end] = [0, 1, 2, 3].map(|n| ports.start() + n);
    let server = Server::with(
        start..=end,
        &[
            ("http.host", "127.0.0.2"),
            ("http.port", &admin.to_string()),
            ("grpc.host", "127.0.0.3"),
            ("grpc.port", &tunnel.to_string()),
            ("http.agent_host", "127.0.0.4"),
            ("http.agent_port_range.start", &start.to_string()),
        ],
    );
    assert_eq!(server.admin, SocketAddr::from(([127, 0, 0, 2], admin)));
    assert_eq!(server.tunnel, SocketAddr::from(([127, 0, 0, 3], tunnel)));
    let agent = server.agent("agent", text_service("here"));
    assert_eq!(agent.port, start);
    assert_eq!(
        get(SocketAddr::from(([127, 0, 0, 4], start)), "/").text(),
        "here"
    );
    assert!(refuses(agent.address()), "127.0.0.1 is another address");
    assert_eq!(server.agents(), [("agent".to_owned(), start)]);
}

#[test]
fn the_kernel_takes_of_an_upload_what_it_may() {
    let taken = |settings: &[(&str, &str)]| {
        let server = Server::with(port_range(1), settings);
        let held = HeldService::start("");
        let agent = server.agent("agent", held.address);
        let mut visitor = connect(agent.address());
        // Its own buffer isn't what this is about.
        socket2::SockRef::from(&visitor)
            .set_send_buffer_size(8 * 1024)
            .unwrap();
        let head = "GET /held HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n";
        visitor.write_all(head.as_bytes()).unwrap();
        visitor
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        while visitor.write(&[0; 64 * 1024]).is_ok() {}
        let taken = bytes_in_sockets(&[agent.port]);
        drop(visitor);
        held.let_go();
        taken
    };
    let small = taken(&[("http.receive_buffer", "8KiB")]);
    let usual = taken(&[]);
    assert!(small < 64 * 1024, "{small} bytes");
    assert!(
        small < usual && usual < 1024 * 1024,
        "{usual} bytes, and {small} of little"
    );
}

#[test]
fn the_agent_is_told_the_public_host() {
    let settings = [("http.public_host", "proxy.example")];
    let server = Server::with(port_range(1), &settings);
    let agent = server.agent("agent", text_service("here"));
    let url = format!("http://proxy.example:{}/", agent.port);
    agent.process.wait_for(&["connected", &url]);
}

#[test]
fn heads_are_limited() {
    let long_target = format!("/{}", "x".repeat(100));
    let large = [("X-Large", "x".repeat(2000))];
    let many: Vec<(String, String)> = (0..10).map(|n| (format!("X-{n}"), "x".into())).collect();
    let large: Vec<(&str, &str)> = large.iter().map(|(n, v)| (*n, v.as_str())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let statuses = |settings: &[(&str, &str)]| {
        let server = Server::with(port_range(1), settings);
        let agent = server.agent("agent", text_service("here"));
        [(&*long_target, &[][..]), ("/", &large), ("/", &many)]
            .map(|(target, lines)| request(agent.address(), "GET", target, lines, b"").status)
    };
    assert_eq!(statuses(&[]), [200; 3]);
    assert_eq!(
        statuses(&[("http.max_request_line", "64B")]),
        [414, 200, 200]
    );
    assert_eq!(statuses(&[("http.max_head", "1KiB")]), [200, 431, 200]);
    assert_eq!(statuses(&[("http.max_header_lines", "5")]), [200, 200, 431]);
}

#[test]
fn a_preflight_is_told_what_pages_may() {
    let server = Server::with(
        port_range(1),
        &[
            ("http.cors.allowed_origins", "https://page.example"),
            ("http.cors.allowed_methods", "PURGE"),
            ("http.cors.allowed_headers", "X-Special"),
            ("http.cors.allow_credentials", "true"),
            ("http.cors.max_age", "77s"),
        ],
    );
    let agent = server.agent("agent", text_service("here"));
    let lines = [
        ("Origin", "https://page.example"),
        ("Access-Control-Request-Method", "PURGE"),
        ("Access-Control-Request-Headers", "x-special"),
    ];
    let answer = request(agent.address(), "OPTIONS", "/", &lines, b"");
    for (name, value) in [
        ("access-control-allow-methods", "purge"),
        ("access-control-allow-headers", "x-special"),
        ("access-control-allow-credentials", "true"),
        ("access-control-max-age", "77"),
    ] {
        let values = answer.header(name).join(", ").to_ascii_lowercase();
        assert!(values.contains(value), "{name}: {values:?}");
    }
}

#[test]
fn heartbeats_keep_the_servers_time() {
    let server = Server::with(
        port_range(1),
        &[
            ("grpc.heartbeat_interval", "100ms"),
            ("grpc.heartbeat_timeout", "2s"),
        ],
    );
    let agent = server.agent("agent", text_service("here"));
    let received = || server.metric("silo_tunnel_messages_received_total", "");
    let before = received();
    // With the default it would take three minutes.
    eventually(PATIENCE, "heartbeats come", || received() >= before + 20.0);
    agent.process.signal("STOP");
    // With the default it would take half a minute.
    eventually(PATIENCE, "a silent agent is given up", || {
        server.agents().is_empty()
    });
    agent.process.signal("CONT");
}

#[test]
fn there_are_as_many_workers_as_asked_for() {
    let server = Server::with(port_range(1), &[("server.workers", "5")]);
    let tasks = format!("/proc/{}/task", server.process.pid());
    let names = fs::read_dir(tasks).unwrap().map(|task| {
        let name = task.unwrap().path().join("comm");
        fs::read_to_string(name).unwrap_or_default()
    });
    assert_eq!(
        names.filter(|name| name.starts_with("silo-worker")).count(),
        5
    );
}

/// How many of so many requests at once are turned away, each of which is promised 32 KiB.
fn turned_away(requests: usize, settings: &[(&str, &str)]) -> usize {
    let server = Server::with(port_range(1), settings);
    let service = HeldService::start("here");
    let agent = server.agent("agent", service.address);
    let ask = |_| {
        let mut stream = connect(agent.address());
        write!(stream, "GET /held HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        stream
    };
    let streams: Vec<TcpStream> = (0..requests).map(ask).collect();
    let overloaded = || server.metric("silo_failures_total", "overloaded");
    let open = || server.metric("silo_exchanges_open", "");
    eventually(PATIENCE, "each is under way or turned away", || {
        (overloaded() + open()) as usize >= requests
    });
    service.let_go();
    let statuses = streams
        .into_iter()
        .map(|mut stream| read_answer(&mut stream, false).status);
    statuses.filter(|status| *status == 503).count()
}

#[test]
fn what_an_agent_may_hold_is_limited() {
    assert_eq!(turned_away(60, &[]), 0);
    let few = [("server.max_buffered_per_agent", "1MiB")];
    assert!(turned_away(60, &few) > 0);
}

#[test]
fn what_the_process_promises_to_hold_is_limited() {
    assert!(turned_away(540, &[("server.max_buffered", "16MiB")]) > 0);
}

#[test]
fn an_agent_logs_for_machines() {
    let server = Server::with(port_range(1), &[]);
    let url = format!("http://{}", text_service("here"));
    let agent = server.start_agent("agent", &url, &[("log.format", "json")]);
    let line = agent.wait_for(&["\"connected\""]);
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(json["level"], "INFO");
}

#[test]
fn a_service_that_does_not_greet_is_given_up() {
    let server = Server::with(port_range(1), &[]);
    // It takes the connection and says nothing, so there is no TLS.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", silent.local_addr().unwrap());
    let settings = [
        ("local.connect_timeout", "300ms"),
        ("local.tls.insecure", "true"),
    ];
    let agent = server.start_agent("agent", &url, &settings);
    agent.wait_for(&["connected", "port="]);
    let port = server.agents()[0].1;
    let asked = Instant::now();
    let answer = get(SocketAddr::from(([127, 0, 0, 1], port)), "/");
    assert!(answer.status >= 500, "{}", answer.status);
    // By default it is 5 s.
    assert!(
        asked.elapsed() < Duration::from_secs(4),
        "{:?}",
        asked.elapsed()
    );
}
