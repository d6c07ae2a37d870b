//! Under a service manager: the units in `config/` start the program as it is, and it tells the
//! manager when it is ready and when it ends.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use silo_proxy::config::Role;

use common::{BINARY, PATIENCE, Process, Server, get, port_range, text_service};

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
    directory: tempfile::TempDir,
}

impl Manager {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("notify")
    }

    fn next(&self) -> String {
        let mut bytes = [0; 4096];
        let read = self.socket.recv(&mut bytes).expect("word from the process");
        String::from_utf8(bytes[..read].to_vec()).unwrap()
    }

    fn wait_for(&self, start: &str) -> String {
        loop {
            let word = self.next();
            if word.starts_with(start) {
                return word;
            }
        }
    }
}

/// A unit of `config/`: the values of its settings, those for people's use included.
struct Unit(String);

impl Unit {
    fn read(role: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let file = root.join(format!("config/silo-proxy-{role}.service"));
        Self(std::fs::read_to_string(file).unwrap())
    }

    fn values(&self, key: &'static str) -> impl Iterator<Item = &str> {
        self.0
            .lines()
            .filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
    }

    fn value(&self, key: &'static str) -> &str {
        let mut values = self.values(key);
        match (values.next(), values.next()) {
            (Some(value), None) => value,
            _ => panic!("{key} isn't there once"),
        }
    }

    /// Its command, with the binary under test, its file of settings in `directory`, and its
    /// variables.
    fn command(&self, directory: &Path, settings: &str) -> Command {
        let line = self.value("ExecStart");
        let rest = line.strip_prefix("/usr/local/bin/silo-proxy ").unwrap();
        let file = directory.join("settings.yaml");
        std::fs::write(&file, settings).unwrap();
        let mut command = Command::new(BINARY);
        for word in rest.split(' ') {
            match word.strip_prefix("/etc/silo-proxy/") {
                Some(_) => command.arg(&file),
                None => command.arg(word),
            };
        }
        for variable in self.values("Environment") {
            let (name, value) = variable.split_once('=').unwrap();
            let state = directory.to_str().unwrap();
            command.env(name, value.replace("%S/silo-proxy", state));
        }
        command
    }
}

#[test]
fn the_servers_unit_starts_it_and_hears_of_it() {
    let manager = Manager::start();
    let unit = Unit::read("server");
    assert_eq!(unit.value("Type"), "notify");
    let range = port_range(10);
    let settings = format!(
        "http: {{port: 0, agent_port_range: {{start: {}, end: {}}}}}\ngrpc: {{host: 127.0.0.1, port: 0}}\n",
        range.start(),
        range.end()
    );
    let mut command = unit.command(manager.directory.path(), &settings);
    command.env("NOTIFY_SOCKET", manager.path());
    let process = Process::start_command("server", &mut command, &[]);
    let ready = manager.next();
    let mut server = Server::from_process(process, range);
    assert!(
        ready.starts_with("READY=1\nSTATUS=serving: "),
        "the first word is {ready:?}"
    );
    assert!(ready.contains(&server.tunnel.to_string()), "{ready}");
    assert!(ready.contains(&server.admin.to_string()), "{ready}");
    assert_eq!(get(server.admin, "/ready").status, 200);

    // What `systemctl reload` does.
    assert!(unit.value("ExecReload").ends_with("kill -HUP $MAINPID"));
    server.process.signal("HUP");
    assert!(manager.next().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert!(manager.next().starts_with("READY=1\n"));

    // It may write where the unit lets it.
    let agent = server.agent("agent-1", text_service("here"));
    assert_eq!(get(agent.address(), "/").text(), "here");
    drop(agent);
    server.process.signal("TERM");
    assert_eq!(manager.next(), "STOPPING=1\nSTATUS=draining");
    assert_eq!(server.process.wait().code(), Some(0));
    assert!(manager.directory.path().join("ports.json").is_file());
}

#[test]
fn the_agents_unit_starts_it_and_shows_its_url() {
    let manager = Manager::start();
    let unit = Unit::read("agent");
    assert_eq!(unit.value("Type"), "notify");
    let server = Server::start();
    let settings = format!(
        "grpc: {{server_address: '{}', agent_id: agent-1}}\nlocal: {{service_url: 'http://{}'}}\n",
        server.tunnel,
        text_service("here")
    );
    let mut command = unit.command(manager.directory.path(), &settings);
    command.env("NOTIFY_SOCKET", manager.path());
    let mut process = Process::start_command("agent", &mut command, &[]);
    assert_eq!(manager.next(), "READY=1\nSTATUS=connecting");
    let url = format!(
        "STATUS=http://127.0.0.1:{}/ leads to ",
        server.range.start()
    );
    assert!(manager.next().starts_with(&url));

    drop(server);
    manager.wait_for("STATUS=not connected: ");
    process.signal("TERM");
    manager.wait_for("STOPPING=1");
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn an_agent_is_ready_without_its_server_and_says_why_it_is_rejected() {
    let manager = Manager::start();
    let path = manager.path();
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("SILO_GRPC_SERVER_ADDRESS", "127.0.0.1:9"),
    ];
    let args = ["agent", "http", "9", "--server", "127.0.0.1:9", "--id", "a"];
    let _alone = Process::start("agent", &args, &environment);
    assert_eq!(manager.next(), "READY=1\nSTATUS=connecting");
    assert!(manager.next().starts_with("STATUS=not connected: "));

    let manager = Manager::start();
    let path = manager.path();
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap())];
    let server = Server::with(port_range(10), &[("grpc.auth.shared_token", "token")]);
    let tunnel = server.tunnel.to_string();
    let args = ["agent", "http", "9", "--server", &tunnel, "--id", "a"];
    let _rejected = Process::start("agent", &args, &environment);
    manager.wait_for("STATUS=rejected, auth: ");
}

#[test]
fn units_know_the_programs_exit_codes_and_times() {
    for role in ["server", "agent"] {
        let unit = Unit::read(role);
        assert_eq!(unit.value("Restart"), "on-failure");
        let prevented = unit.value("RestartPreventExitStatus");
        let mut command = Command::new(BINARY);
        command.args([role, "--config", "/nonexistent/settings.yaml"]);
        let (code, _) = Process::start_command(role, &mut command, &[]).finish();
        assert_eq!(code.unwrap().to_string(), prevented);

        let grace = silo_proxy::config::ServerConfig::default().server.grace;
        let stop = unit.value("TimeoutStopSec").trim_end_matches('s');
        assert!(stop.parse::<u64>().unwrap() > 2 * grace.as_secs());
    }
}

#[test]
fn units_hand_over_secrets_as_the_settings_want_them() {
    for (role, settings, count) in [("server", Role::Server, 2), ("agent", Role::Agent, 1)] {
        let unit = Unit::read(role);
        let handed: Vec<&str> = unit
            .values("#LoadCredential")
            .map(|value| value.split_once(':').unwrap().0)
            .collect();
        let read: Vec<&str> = unit
            .values("#Environment")
            .map(|value| value.split_once("=%d/").unwrap())
            .map(|(variable, name)| {
                let known = silo_proxy::config::table(settings)
                    .iter()
                    .any(|setting| format!("{}_FILE", common::variable(setting.path)) == variable);
                assert!(known, "{variable}");
                name
            })
            .collect();
        assert_eq!(handed, read);
        assert_eq!(handed.len(), count);
    }
}
