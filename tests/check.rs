//! `silo-proxy check`: what it finds, and its exit codes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{BINARY, Process, Server, port_range, text_service};
use tempfile::TempDir;

/// A file of settings, with others beside it.
struct Files(TempDir);

impl Files {
    fn new(settings: &str) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write("silo.yaml", settings);
        files
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path
    }

    /// Runs `check` on the file, with more arguments.
    fn check(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let path = self.0.path().join("silo.yaml");
        let mut all = vec!["check", "--config", path.to_str().unwrap()];
        all.extend(arguments);
        Process::start("check", &all, &[]).finish()
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// The line that contains all of `parts`.
fn line<'a>(text: &'a str, parts: &[&str]) -> &'a str {
    text.lines()
        .find(|line| parts.iter().all(|part| line.contains(part)))
        .unwrap_or_else(|| panic!("no line with {parts:?} in\n{text}"))
}

/// Two ports that nobody listens on just now.
fn free_ports() -> [u16; 2] {
    let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn a_good_server_file_is_told_line_by_line_and_no_secret_is() {
    let range = port_range(3);
    let files = Files::new(&format!(
        "http: {{port: 0, agent_port_range: {{start: {}, end: {}}}, max_connections: 10, \
          state_file: state}}\n\
         grpc: {{port: 0, host: 127.0.0.1, auth: {{shared_token_file: token, \
          tokens: {{agent-1: an-inline-secret}}}}}}\n",
        range.start(),
        range.end()
    ));
    let token = files.write("token", "a-secret-in-a-file\n");
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(0), "{text}");
    line(&text, &["ok", "no faults"]);
    line(&text, &["outgoing connections"]);
    line(&text, &["ok", "files may be open"]);
    line(&text, &["ok", "http.agent_port_range", "free"]);
    line(&text, &["ok", "http.state_file"]);
    line(&text, &["ok", "grpc.auth.shared_token_file"]);
    line(&text, &["ok", "grpc.auth.tokens:", "silo.yaml"]);

    mode(&token, 0o644);
    mode(&files.0.path().join("silo.yaml"), 0o604);
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(0), "{text}");
    line(&text, &["warning", "grpc.auth.shared_token_file", "chmod"]);
    line(
        &text,
        &["warning", "grpc.auth.tokens:", "silo.yaml", "chmod"],
    );
    assert!(!text.contains("an-inline-secret") && !text.contains("a-secret-in-a-file"));
}

#[test]
fn faults_of_the_settings_are_told_all_at_once() {
    let files = Files::new(
        "http: {prot: 1, port: 8150, admin_api_key_file: nowhere}\nserver: {grace: soon}\n",
    );
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(2), "{text}");
    for parts in [
        &["http.prot", "did you mean http.port?"][..],
        &["server.grace"],
        &["nowhere"],
        &["http.port (8150)", "http.agent_port_range"],
    ] {
        line(&text, parts);
    }
    // An agent's file, taken for a server's.
    let (code, text) = Files::new("grpc: {agent_id: a}\n").check(&[]);
    assert_eq!(code, Some(2), "{text}");
    line(&text, &["grpc.agent_id", "a setting of the agent"]);
}

#[test]
fn ports_that_are_taken_are_told() {
    let [_, grpc] = free_ports();
    let admin = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = admin.local_addr().unwrap().port();
    let range = port_range(5);
    let (start, end) = (*range.start(), *range.end());
    let _others =
        [start + 1, start + 2, end].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap());
    let files = Files::new(&format!(
        "http: {{port: {taken}, agent_port_range: {{start: {start}, end: {end}}}, \
          static_ports: {{pinned: {end}}}}}\ngrpc: {{port: {grpc}, host: 127.0.0.1}}\n",
    ));
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(1), "{text}");
    line(
        &text,
        &["error", "http.port", &taken.to_string(), "ss -ltnp"],
    );
    line(&text, &["ok", "grpc.port", &grpc.to_string()]);
    let list = format!("{}-{}, {end}", start + 1, start + 2);
    line(&text, &["warning", "3 of 5 ports", &list]);
    line(&text, &["warning", "http.static_ports: pinned"]);
}

#[test]
fn a_server_that_runs_already_is_no_fault() {
    let server = Server::start();
    let _agent = server.agent("agent", text_service("here"));
    let files = Files::new(&format!(
        "http: {{port: {}, agent_port_range: {{start: {}, end: {}}}}}\n\
         grpc: {{port: {}, host: 127.0.0.1}}\n",
        server.admin.port(),
        server.range.start(),
        server.range.end(),
        server.tunnel.port()
    ));
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(0), "{text}");
    line(
        &text,
        &["ok", "a server runs on", &server.admin.to_string()],
    );
}

#[test]
fn too_few_descriptors_are_told() {
    let range = port_range(2);
    let files = Files::new(&format!(
        "http: {{port: 0, agent_port_range: {{start: {}, end: {}}}}}\ngrpc: {{port: 0}}\n",
        range.start(),
        range.end()
    ));
    let path = files.0.path().join("silo.yaml");
    let script = format!(
        "ulimit -n 256; exec {BINARY} check --config {}",
        path.display()
    );
    let mut shell = std::process::Command::new("sh");
    let (code, text) = Process::start_command("check", shell.args(["-c", &script]), &[]).finish();
    assert_eq!(code, Some(0), "{text}");
    line(&text, &["warning", "only 256 files", "LimitNOFILE=100068"]);
}

#[test]
fn a_state_file_that_cannot_be_written_is_an_error() {
    let range = port_range(1);
    let files = Files::new(&format!(
        "http: {{port: 0, agent_port_range: {{start: {0}, end: {0}}}, state_file: no/such/state}}\n\
         grpc: {{port: 0}}\n",
        range.start(),
    ));
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(1), "{text}");
    line(&text, &["error", "http.state_file", "no/such"]);
}

#[test]
fn an_agents_file_is_checked_with_what_it_reaches() {
    let server = Server::start();
    let [nobody, _] = free_ports();
    let files = Files::new(&format!(
        "grpc: {{server_address: '{}', agent_id: a, token: an-inline-secret}}\n\
         local: {{service_url: 'http://127.0.0.1:{nobody}'}}\n",
        server.tunnel
    ));
    let (code, text) = files.check(&["--agent"]);
    assert_eq!(code, Some(0), "{text}");
    line(
        &text,
        &["ok", "grpc.server_address", &server.tunnel.to_string()],
    );
    line(
        &text,
        &["warning", "local.service_url", "start the service"],
    );
    line(&text, &["ok", "grpc.token:", "silo.yaml"]);
    assert!(!text.contains("an-inline-secret"));
}

#[test]
fn certificates_are_looked_at() {
    let range = port_range(1);
    let files = Files::new(&format!(
        "http: {{port: 0, agent_port_range: {{start: {0}, end: {0}}}}}\n\
         grpc: {{port: 0, tls: {{enabled: true, cert_file: server.pem, key_file: server.key}}}}\n",
        range.start(),
    ));
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(2), "{text}");
    line(&text, &["grpc.tls", "server.pem"]);

    let certificate = |year| {
        let mut parameters = rcgen::CertificateParams::new(vec!["proxy.example".into()]).unwrap();
        parameters.not_after = rcgen::date_time_ymd(year, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        files.write("server.pem", &parameters.self_signed(&key).unwrap().pem());
        files.write("server.key", &key.serialize_pem());
    };
    certificate(2999);
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(0), "{text}");
    line(&text, &["ok", "certificate is valid to 2999"]);
    line(&text, &["ok", "grpc.tls.key_file"]);
    certificate(2001);
    let (code, text) = files.check(&[]);
    assert_eq!(code, Some(0), "{text}");
    line(&text, &["warning", "grpc.tls.cert_file", "expired on 2001"]);
}
