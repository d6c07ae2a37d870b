//! Settings from files and the environment: what is read, what is refused, and what is written
//! about them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use silo_proxy::auth::ClientAuth;
use silo_proxy::config::{
    AgentConfig, ConfigError, Fault, FaultKind, HostHeader, Kind, LogOutput, Place, Preset, Role,
    ServerConfig, Sources, environment_name, example, markdown, table,
};
use silo_proxy::cors::Origins;
use silo_proxy::id::{AgentId, Secret};
use silo_proxy::telemetry::{Filter, Format};
use tempfile::TempDir;

/// A directory with `silo.yaml` in it; other files can be put beside it.
struct Files(TempDir);

impl Files {
    fn new(yaml: &str) -> Self {
        Self(TempDir::new().unwrap()).with("silo.yaml", yaml)
    }

    fn with(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        fs::write(self.path(name), text).unwrap();
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn sources(&self) -> Sources {
        Sources::none().file(self.path("silo.yaml"))
    }
}

fn server(yaml: &str) -> Result<ServerConfig, ConfigError> {
    ServerConfig::load(&Files::new(yaml).sources())
}

/// An agent with what it must be told, and `yaml` besides.
fn agent(yaml: &str) -> Result<AgentConfig, ConfigError> {
    let told = [
        ("SILO_GRPC_SERVER_ADDRESS", "a:9090"),
        ("SILO_GRPC_AGENT_ID", "agent-1"),
    ];
    AgentConfig::load(&Files::new(yaml).sources().environment(told))
}

fn server_from(variables: &[(&str, &str)]) -> Result<ServerConfig, ConfigError> {
    ServerConfig::load(&Sources::none().environment(variables.iter().copied()))
}

fn faults<T>(result: Result<T, ConfigError>) -> Vec<Fault> {
    result.err().expect("this configuration is faulty").faults
}

/// The one fault of a configuration, as it is printed, without the directory.
fn fault<T>(result: Result<T, ConfigError>) -> String {
    let faults = faults(result);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    shown(&faults[0])
}

fn shown(fault: &Fault) -> String {
    let text = fault.to_string();
    match text.find("silo.yaml") {
        Some(at) if matches!(fault.place, Place::File { .. }) => text[at..].to_owned(),
        _ => text,
    }
}

fn id(text: &str) -> AgentId {
    text.parse().unwrap()
}

fn exposed(secret: &Option<Secret>) -> Option<&str> {
    secret.as_ref().map(Secret::expose)
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let ServerConfig {
        log,
        http,
        grpc,
        server,
    } = ServerConfig::default();
    assert_eq!((log.level, log.format), (Filter::default(), Format::Text));
    assert_eq!(http.host.to_string(), "127.0.0.1");
    assert_eq!((http.port, grpc.port), (8080, 9090));
    assert_eq!(http.agent_host.to_string(), "::");
    assert_eq!(http.agent_port_range, 8100..=8200);
    assert_eq!(http.port_lease, Duration::ZERO);
    assert_eq!(http.max_exchanges_per_agent, 16_384);
    assert_eq!(http.max_connections_per_address, None);
    assert_eq!(http.max_request_line, 8 << 10);
    assert_eq!(http.max_head, 64 << 10);
    assert_eq!(http.max_header_lines, 100);
    assert_eq!(http.head_timeout, Duration::from_secs(10));
    assert_eq!(http.body_timeout, Duration::from_secs(60));
    assert_eq!(http.idle_timeout, Duration::from_secs(75));
    assert_eq!(http.max_body, None);
    assert_eq!(http.receive_buffer, Some(262_144));
    assert!(grpc.auth.is_open() && http.admin_api_key.is_none());
    assert_eq!(grpc.heartbeat_interval, Duration::from_secs(10));
    assert_eq!(grpc.heartbeat_timeout, Duration::from_secs(30));
    assert_eq!(
        (server.workers, server.grace),
        (None, Duration::from_secs(5))
    );
    assert_eq!(server.max_buffered, 1 << 30);
    assert_eq!(server.max_buffered_per_agent, 768 << 20);

    let agent = AgentConfig::new("a:1".parse().unwrap(), id("x"), "http://b".parse().unwrap());
    assert_eq!(agent.grpc.server_address.to_string(), "a:1");
    assert_eq!(agent.grpc.agent_id, id("x"));
    assert_eq!(agent.local.service_url.to_string(), "http://b");
    assert_eq!(agent.local.host_header, HostHeader::Preserve);
    assert_eq!(agent.local.response_timeout, Duration::from_secs(60));
    assert_eq!(agent.local.max_connections, 256);
    assert!(agent.grpc.token.is_none() && !agent.local.tls.insecure);
}

#[test]
fn nothing_at_all_is_the_default() {
    let default = format!("{:?}", ServerConfig::default());
    for yaml in [
        "",
        "# a comment\n",
        "http:\ngrpc:\n",
        "http:\n  port:\n  host: ~\n",
    ] {
        assert_eq!(format!("{:?}", server(yaml).unwrap()), default, "{yaml:?}");
    }
    let loaded = ServerConfig::load(&Sources::none()).unwrap();
    assert_eq!(format!("{loaded:?}"), default);
}

#[test]
fn a_file_is_read() {
    let config = server(
        "log: {level: 'warn,silo_proxy::mux=trace', format: json}
http:
  host: ::1
  admin_api_key: 0x1f
  public_host: proxy.example.com
  agent_port_range: {start: 9000, end: 9001}
  static_ports:
    agent-1: 9000
    007: 10000
  port_lease: 1m 30s
  trusted_proxies:
    - 127.0.0.1
    - 10.0.0.0/8
  max_connections_per_address: 10
  max_body: 8KB
grpc:
  auth:
    shared_token: \"12 34\"
    tokens:
      agent-1: 007
server:
  workers: 3
",
    )
    .unwrap();
    assert_eq!(config.log.level.as_str(), "warn,silo_proxy::mux=trace");
    assert_eq!(config.log.format, Format::Json);
    assert_eq!(config.http.host.to_string(), "::1");
    assert_eq!(exposed(&config.http.admin_api_key), Some("0x1f"));
    assert_eq!(
        config.http.public_host.as_deref(),
        Some("proxy.example.com")
    );
    assert_eq!(config.http.agent_port_range, 9000..=9001);
    assert_eq!(config.http.static_ports[&id("agent-1")], 9000);
    assert_eq!(config.http.static_ports[&id("007")], 10_000);
    assert_eq!(config.http.port_lease, Duration::from_secs(90));
    assert!(config.http.trusted_proxies[1].contains([10, 1, 2, 3].into()));
    assert_eq!(config.http.max_connections_per_address, Some(10));
    assert_eq!(config.http.max_body, Some(8000));
    assert_eq!(exposed(&config.grpc.auth.shared), Some("12 34"));
    assert_eq!(config.grpc.auth.tokens[&id("agent-1")].expose(), "007");
    assert_eq!(config.server.workers, Some(3));
}

#[test]
fn flags_go_before_the_environment_before_the_file_before_the_default() {
    let files = Files::new("http: {port: 1001}\ngrpc: {port: 1002}\nserver: {grace: 3s}\n");
    let sources = files
        .sources()
        .environment([("SILO_HTTP_PORT", "2001"), ("SILO_GRPC_PORT", "2002")])
        .flag("grpc.port", "--grpc-port", "3002");
    let config = ServerConfig::load(&sources).unwrap();
    assert_eq!((config.http.port, config.grpc.port), (2001, 3002));
    assert_eq!(config.server.grace, Duration::from_secs(3));
    assert_eq!(config.http.idle_timeout, Duration::from_secs(75));
}

#[test]
fn every_setting_has_a_variable() {
    for role in [Role::Server, Role::Agent] {
        let names: Vec<String> = table(role)
            .iter()
            .map(|s| environment_name(s.path))
            .collect();
        let distinct: BTreeSet<&String> = names.iter().collect();
        assert_eq!(names.len(), distinct.len());

        // Every setting at its default, or its example, through the environment.
        let variables: Vec<(String, String)> = table(role)
            .iter()
            .filter(|setting| !matches!(setting.kind, Kind::Certificates | Kind::FileName))
            .filter(|setting| !setting.path.ends_with(".tls.server_name"))
            .map(|setting| {
                let text = match setting.preset {
                    Preset::Value(text) | Preset::Required(text) => text.to_owned(),
                    Preset::Unset { example, .. } => example
                        .trim_matches(['{', '}', '[', ']'])
                        .replace(": ", "="),
                };
                (environment_name(setting.path), text)
            })
            .collect();
        let sources = Sources::none().environment(variables);
        let result = match role {
            Role::Server => ServerConfig::load(&sources).map(drop),
            Role::Agent => AgentConfig::load(&sources).map(drop),
        };
        assert_eq!(result, Ok(()));
    }

    let config = server_from(&[
        ("SILO_HTTP_STATIC_PORTS", "a=8100, b=8101"),
        ("SILO_GRPC_AUTH_TOKENS", "a=x=y,b=z"),
        ("SILO_HTTP_TRUSTED_PROXIES", "::1, 10.0.0.0/8"),
        ("SILO_HTTP_PORT", ""),
        ("HOME", "/nowhere"),
    ])
    .unwrap();
    assert_eq!(config.http.static_ports[&id("b")], 8101);
    assert_eq!(config.grpc.auth.tokens[&id("a")].expose(), "x=y");
    assert_eq!(config.http.trusted_proxies.len(), 2);
    assert_eq!(config.http.port, 8080);
}

/// A template that came out empty must not open the door.
#[test]
fn a_secret_that_stands_there_empty_is_a_fault() {
    for yaml in [
        "grpc: {auth: {shared_token: }}\n",
        "grpc: {auth: {shared_token: ~}}\n",
        "grpc: {auth: {tokens_file: }}\n",
        "http:\n  admin_api_key:\n",
    ] {
        assert!(
            fault(server(yaml)).contains("nothing stands here"),
            "{yaml}"
        );
    }
}

/// Kubernetes sets these for a service named silo-proxy.
#[test]
fn variables_of_a_service_of_our_name_are_passed_over() {
    let variables = [
        ("SILO_PROXY_PORT", "tcp://10.0.0.1:8080"),
        ("SILO_PROXY_SERVICE_HOST", "10.0.0.1"),
        ("SILO_PROXY_PORT_8080_TCP_ADDR", "10.0.0.1"),
    ];
    assert!(server_from(&variables).is_ok());
}

#[test]
fn variables_of_the_other_role_are_passed_over() {
    assert!(server_from(&[("SILO_GRPC_AGENT_ID", "a"), ("SILO_LOCAL_SERVICE_URL", "x")]).is_ok());
}

#[test]
fn unknown_keys_are_told_all_at_once_with_the_nearest() {
    let yaml = "http:\n  prot: 1\n  agent_port_range: {stat: 1}\nport: 1\nhtpp: {port: 1}\n\
                qqqq: 1\nlocal: {service_url: x}\ngrpc:\n  agent_id: a\n";
    let shown: Vec<String> = faults(server(yaml)).iter().map(shown).collect();
    assert_eq!(
        shown,
        [
            "silo.yaml:2:3: http.prot: no such setting; did you mean http.port?",
            "silo.yaml:3:22: http.agent_port_range.stat: no such setting; \
             did you mean http.agent_port_range.start?",
            "silo.yaml:4:1: port: no such setting; did you mean http.port?",
            "silo.yaml:5:1: htpp: no such setting; did you mean http?",
            "silo.yaml:6:1: qqqq: no such setting",
            "silo.yaml:7:1: local: a setting of the agent, not of the server",
            "silo.yaml:9:3: grpc.agent_id: a setting of the agent, not of the server",
        ]
    );

    assert_eq!(
        fault(server_from(&[("SILO_HTTP_PROT", "1")])),
        "SILO_HTTP_PROT: no such setting; did you mean SILO_HTTP_PORT?"
    );
}

#[test]
fn cors_is_off_until_origins_are_named() {
    let cors = |text: &str| server(&format!("http: {{cors: {{{text}}}}}"));
    assert!(server("").unwrap().http.cors.is_none());

    let policy = cors("allowed_origins: [https://app.example.com]").unwrap();
    let policy = policy.http.cors.unwrap();
    let origin = "https://app.example.com".parse().unwrap();
    assert_eq!(policy.origins, Origins::Only(vec![origin]));
    assert_eq!(policy.methods.len(), 6);
    assert!(policy.headers.is_empty());
    assert!(!policy.credentials);
    assert_eq!(policy.max_age, Duration::from_secs(600));

    let environment = server_from(&[
        ("SILO_HTTP_CORS_ALLOWED_ORIGINS", "http://a, http://b"),
        ("SILO_HTTP_CORS_ALLOWED_METHODS", "GET,PURGE"),
        ("SILO_HTTP_CORS_ALLOWED_HEADERS", "X-A,X-B"),
        ("SILO_HTTP_CORS_ALLOW_CREDENTIALS", "true"),
        ("SILO_HTTP_CORS_MAX_AGE", "1m"),
    ]);
    let policy = environment.unwrap().http.cors.unwrap();
    assert!(matches!(&policy.origins, Origins::Only(two) if two.len() == 2));
    assert_eq!(policy.methods, ["GET", "PURGE"]);
    assert_eq!(policy.headers, ["X-A", "X-B"]);
    assert!(policy.credentials);
    assert_eq!(policy.max_age, Duration::from_secs(60));

    let any = cors("allowed_origins: '*'").unwrap();
    assert_eq!(any.http.cors.unwrap().origins, Origins::Any);
    for (text, said) in [
        ("allowed_origins: ['*', 'http://a']", "keep either"),
        (
            "allowed_origins: '*', allow_credentials: true",
            "name the origins",
        ),
        (
            "allowed_origins: [a.example]",
            "expected an origin as browsers send it",
        ),
        (
            "allowed_origins: ['null']",
            "expected an origin as browsers send it",
        ),
        (
            "allowed_origins: '*', allowed_methods: ['G T']",
            "expected a method",
        ),
        (
            "allowed_origins: '*', allowed_headers: ['a b']",
            "expected a header name",
        ),
        ("max_age: 1h", "it has no effect"),
    ] {
        let fault = fault(cors(text));
        assert!(fault.contains(said), "{text}: {fault}");
    }
}

#[test]
fn the_access_log_goes_to_a_stream_or_a_file() {
    let output = |text: &str| server(&format!("http: {{access_log: {text}}}"));
    assert_eq!(server("").unwrap().http.access_log, None);
    assert_eq!(output("off").unwrap().http.access_log, None);
    let stderr = output("stderr").unwrap().http.access_log;
    assert_eq!(stderr, Some(LogOutput::Stderr));
    let stdout = output("stdout").unwrap().http.access_log;
    assert_eq!(stdout, Some(LogOutput::Stdout));

    // Beside the file that names it, and in the working directory.
    let files = Files::new("http: {access_log: access.log}");
    let in_file = ServerConfig::load(&files.sources()).unwrap();
    let Some(LogOutput::File(path)) = in_file.http.access_log else {
        panic!("no file");
    };
    assert!(path.is_absolute() && path.ends_with("access.log"));
    let variable = server_from(&[("SILO_HTTP_ACCESS_LOG", "access.log")]).unwrap();
    let expected = Some(LogOutput::File("access.log".into()));
    assert_eq!(variable.http.access_log, expected);

    assert!(fault(output("true")).contains("expected `off`, `stderr`, `stdout` or a file name"));
}

#[test]
fn syntax_and_types_are_told_with_their_line() {
    let place = |yaml: &str| match &faults(server(yaml))[..] {
        [fault] => match fault.place {
            Place::File { line, .. } => (fault.kind.clone(), line),
            _ => panic!("{fault}"),
        },
        more => panic!("{more:?}"),
    };
    assert_eq!(place("http:\n  port: [1\n"), (FaultKind::Syntax, 3));
    assert_eq!(place("http:\n\tport: 1\n"), (FaultKind::Syntax, 2));
    assert_eq!(
        place("http:\n  port: 1\n  port: 1\n"),
        (FaultKind::Duplicate, 3)
    );
    assert_eq!(
        place("http:\n  port: 1\nhttp:\n"),
        (FaultKind::Duplicate, 3)
    );
    assert_eq!(place("http: 1\n"), (FaultKind::Invalid, 1));
    assert_eq!(place("- http\n"), (FaultKind::Invalid, 1));
    assert_eq!(place("http:\n  port:\n    - 1\n"), (FaultKind::Invalid, 2));
    assert_eq!(place("http:\n  port: {a: 1}\n"), (FaultKind::Invalid, 2));
    assert_eq!(
        place("http:\n  static_ports:\n    a: [1]\n"),
        (FaultKind::Invalid, 3)
    );
    assert_eq!(
        place("http:\n  static_ports:\n    a: 1\n    A: 1\n"),
        (FaultKind::Invalid, 4)
    );
    assert_eq!(
        place("http:\n  static_ports: 8100\n"),
        (FaultKind::Invalid, 2)
    );
    assert_eq!(
        place("http:\n  trusted_proxies:\n  - x\n"),
        (FaultKind::Invalid, 3)
    );
    assert_eq!(place("a: &a [*a]\n").0, FaultKind::Syntax);

    let files = Files::new("").with("silo.yaml", b"http:\n  port: \xff\n");
    assert!(fault(ServerConfig::load(&files.sources())).contains(":2:1: this line is not UTF-8"));

    // What seems to be missing may stand in the file that can't be read.
    let broken = Files::new("grpc: [");
    assert!(fault(AgentConfig::load(&broken.sources())).starts_with("silo.yaml:"));

    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStringExt;
        let value = std::ffi::OsString::from_vec(vec![0xff]);
        let sources = Sources::none().environment([("SILO_HTTP_PORT", value)]);
        let text = fault(ServerConfig::load(&sources));
        assert_eq!(text, "SILO_HTTP_PORT: the value is not UTF-8");
    }

    let missing = Sources::none().file("/nowhere/silo.yaml");
    assert_eq!(
        faults(ServerConfig::load(&missing))[0].kind,
        FaultKind::File
    );
}

#[test]
fn values_out_of_range_are_told_all_at_once() {
    let yaml = "log: {level: inof}
http:
  host: example.com
  port: 65536
  agent_port_range: {start: 0}
  static_ports: {a: 0}
  port_lease: 5
  trusted_proxies: [10.0.0.0/33]
  max_exchanges_per_agent: 0
  max_connections: -1
  max_request_line: 64K
  head_timeout: 0s
  idle_timeout: 2d
  max_body: 0
grpc:
  port: 0x50
  auth: {tokens: {Agent: x, b: ''}, shared_token: ''}
server:
  workers: 1.5
  max_buffered: 1B
";
    let found = faults(server(yaml));
    let lines: Vec<String> = found.iter().map(shown).collect();
    assert_eq!(found.len(), 19, "{lines:#?}");
    assert!(found.iter().all(|fault| fault.kind == FaultKind::Invalid));
    assert!(
        lines.contains(&"silo.yaml:4:9: http.port: expected 0 to 65535; found \"65536\"".into())
    );
    assert!(lines.contains(
        &"silo.yaml:7:15: http.port_lease: expected a time with its unit, such as 500ms, 30s or \
          2m; found \"5\""
            .into()
    ));
}

#[test]
fn contradictions_are_told_all_at_once() {
    let yaml = "http:
  host: 0.0.0.0
  port: 8150
  static_ports: {a: 8300, b: 8300, c: 8150}
  max_request_line: 8KiB
  max_head: 4KiB
grpc:
  port: 8150
  heartbeat_interval: 30s
server:
  max_buffered: 64MiB
  max_buffered_per_agent: 128MiB
";
    let found = faults(server(yaml));
    assert!(
        found
            .iter()
            .all(|fault| fault.kind == FaultKind::Contradiction)
    );
    let lines: Vec<String> = found.iter().map(Fault::to_string).collect();
    let expected = [
        "http.port (8150) lies within http.agent_port_range (8100 to 8200)",
        "grpc.port (8150) lies within http.agent_port_range (8100 to 8200)",
        "http.port and grpc.port are both 8150",
        "http.static_ports gives 8300 to both a and b",
        "http.static_ports gives 8150 to c, but it is http.port",
        "http.static_ports gives 8150 to c, but it is grpc.port",
        "http.host is 0.0.0.0, so others can reach the admin port: set http.admin_api_key, or set \
         http.host to 127.0.0.1",
        "grpc.heartbeat_timeout (30s) must be longer than grpc.heartbeat_interval (30s), or \
         silence between two heartbeats ends every tunnel",
        "http.max_request_line (8KiB) is greater than http.max_head (4KiB)",
        "server.max_buffered_per_agent (128MiB) is greater than server.max_buffered (64MiB)",
    ];
    assert_eq!(lines, expected);

    let range = "http: {agent_port_range: {start: 9000, end: 8999}}";
    assert!(fault(server(range)).contains("is greater than"));
    // One fault, not a second one about the default that stands in for it.
    let half = "http: {agent_port_range: {start: x, end: 1}}";
    assert!(fault(server(half)).contains("expected 1 to 65535"));
}

#[test]
fn a_default_gives_way_to_a_smaller_limit() {
    let config = server("http: {max_head: 4KiB}\nserver: {max_buffered: 64MiB}\n").unwrap();
    assert_eq!(config.http.max_request_line, 4 << 10);
    assert_eq!(config.server.max_buffered_per_agent, 64 << 20);
}

#[test]
fn the_admin_port_opens_to_others_only_with_a_key() {
    assert!(fault(server("http: {host: '::'}")).contains("http.admin_api_key"));
    // A faulty key is one fault, not a missing key besides.
    let faulty = "http: {host: '::', admin_api_key_file: [a]}";
    assert!(fault(server(faulty)).contains("expected the name of a file"));
    for yaml in [
        "http: {host: '::', admin_api_key: k}",
        "http: {host: 127.3.4.5}",
        "http: {host: '::ffff:127.0.0.1'}",
        "http: {host: localhost}",
    ] {
        assert!(server(yaml).is_ok(), "{yaml}");
    }
}

#[test]
fn what_an_agent_must_be_told_is_told() {
    let found = faults(AgentConfig::load(&Sources::none()));
    assert!(found.iter().all(|fault| fault.kind == FaultKind::Missing));
    let lines: Vec<String> = found.iter().map(Fault::to_string).collect();
    assert_eq!(
        lines,
        [
            "grpc.server_address is not set: put it in the file or in SILO_GRPC_SERVER_ADDRESS",
            "grpc.agent_id is not set: put it in the file or in SILO_GRPC_AGENT_ID",
            "local.service_url is not set: put it in the file or in SILO_LOCAL_SERVICE_URL",
        ]
    );

    let sources = Sources::none()
        .flag("grpc.server_address", "--server", "a:9090")
        .flag("grpc.agent_id", "--id", "Agent")
        .flag("local.service_url", "the service", "http://127.0.0.1:3000");
    assert!(fault(AgentConfig::load(&sources)).starts_with("--id: an agent id is"));
}

#[test]
fn the_state_file_stands_beside_the_settings() {
    let files = Files::new("http: {state_file: ports.json}");
    let config = ServerConfig::load(&files.sources()).unwrap();
    assert_eq!(config.http.state_file, Some(files.path("ports.json")));
    let from_variable = server_from(&[("SILO_HTTP_STATE_FILE", "ports.json")]).unwrap();
    assert_eq!(from_variable.http.state_file, Some("ports.json".into()));
    assert!(fault(server("http: {state_file: ''}")).contains("expected the name of a file"));
}

#[test]
fn labels_are_short_and_few() {
    let told = "grpc: {server_address: a, agent_id: a}\nlocal: {service_url: 'http://a'}\n";
    let labels = |labels: String| agent(&format!("{told}agent: {{labels: {labels}}}"));
    let config = labels("{site: Zürich, rack: 7}".to_owned()).unwrap();
    let shown: Vec<_> = config.agent.labels.iter().collect();
    assert_eq!(
        format!("{shown:?}"),
        r#"[("rack", "7"), ("site", "Zürich")]"#
    );

    for wrong in ["{a: ''}", r#"{a: "b\u0007"}"#, r#"{"a\n": b}"#] {
        assert!(fault(labels(wrong.to_owned())).contains("expected 1 to 128 bytes"));
    }
    let many = |count: usize| {
        let pairs: Vec<String> = (0..count).map(|index| format!("l{index}: x")).collect();
        format!("{{{}}}", pairs.join(", "))
    };
    assert!(labels(many(32)).is_ok());
    assert!(fault(labels(many(33))).contains("agent.labels has more than 32 labels"));
    assert!(labels(format!("{{a: {}}}", "x".repeat(128))).is_ok());
    assert!(labels(format!("{{a: {}}}", "x".repeat(129))).is_err());
}

#[test]
fn tls_to_a_service_is_for_https() {
    for yaml in [
        "local: {service_url: 'http://a', tls: {insecure: true}}",
        "local: {service_url: 'http://a', tls: {server_name: b}}",
    ] {
        assert!(fault(agent(yaml)).contains("which is no https"), "{yaml}");
    }
    let files = Files::new("local: {service_url: 'https://a', tls: {ca_file: ca.pem}}")
        .with("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    let told = [
        ("SILO_GRPC_SERVER_ADDRESS", "a"),
        ("SILO_GRPC_AGENT_ID", "a"),
    ];
    let config = AgentConfig::load(&files.sources().environment(told)).unwrap();
    let ca = config.local.tls.ca_file.unwrap();
    assert_eq!(ca.path, files.path("ca.pem"));
    assert!(ca.pem.starts_with(b"-----BEGIN"));

    let files = files.with("ca.pem", "nothing");
    assert!(
        fault(AgentConfig::load(&files.sources().environment(told)))
            .contains("holds no PEM certificate")
    );
    let absent = "local: {service_url: 'https://a', tls: {ca_file: no.pem}}";
    assert_eq!(faults(agent(absent))[0].kind, FaultKind::File);
}

#[test]
fn tls_of_a_server_is_complete_or_off() {
    let files = Files::new(
        "grpc:\n  tls: {enabled: true, cert_file: s.pem, key_file: /k, ca_file: ca.pem, \
         client_auth: require}\n",
    );
    let config = ServerConfig::load(&files.sources()).unwrap();
    let tls = config.grpc.tls.unwrap();
    // Relative to the file of settings; nothing is opened yet.
    assert_eq!(tls.cert_file, files.path("s.pem"));
    assert_eq!(tls.key_file, PathBuf::from("/k"));
    assert_eq!(tls.ca_file, Some(files.path("ca.pem")));
    assert_eq!(config.grpc.auth.certificates, ClientAuth::Require);
    assert!(!config.grpc.auth.is_open());

    let told = |yaml: &str| -> Vec<String> {
        let found = faults(server(&format!("grpc: {{tls: {{{yaml}}}}}")));
        assert!(found.iter().all(|f| f.kind == FaultKind::Contradiction));
        found.iter().map(Fault::to_string).collect()
    };
    let missing = told("enabled: true");
    assert_eq!(missing.len(), 2, "{missing:#?}");
    assert!(missing[0].contains("grpc.tls.cert_file must be set"));
    assert!(missing[1].contains("grpc.tls.key_file must be set"));
    let own = "enabled: true, cert_file: c, key_file: k";
    for client_auth in ["request", "require"] {
        let found = told(&format!("{own}, client_auth: {client_auth}"));
        assert!(
            found[0].contains("grpc.tls.ca_file must be too"),
            "{found:?}"
        );
    }
    assert!(told(&format!("{own}, ca_file: a"))[0].contains("no agent is asked"));
    // Nobody shall believe a tunnel to be encrypted that isn't.
    let off = told("cert_file: c, key_file: k, ca_file: a, client_auth: require");
    assert_eq!(off.len(), 4, "{off:#?}");
    assert!(
        off.iter()
            .all(|line| line.contains("grpc.tls.enabled is false"))
    );
    assert!(
        fault(server("grpc: {tls: {client_auth: maybe}}")).contains("none, request or require")
    );
}

#[test]
fn tls_of_an_agent_is_complete_or_off() {
    let tls = |yaml: &str| {
        let yaml = format!("grpc: {{tls: {{{yaml}}}}}\nlocal: {{service_url: 'http://a'}}\n");
        agent(&yaml)
    };
    let plain = tls("enabled: true").unwrap().grpc.tls.unwrap();
    assert_eq!((plain.ca_file, plain.identity), (None, None));
    assert_eq!(plain.server_name, "a", "the host of grpc.server_address");
    let full = "enabled: true, ca_file: ca, cert_file: c, key_file: k, server_name: b.c";
    let full = tls(full).unwrap().grpc.tls.unwrap();
    assert!(full.ca_file.unwrap().ends_with("ca"));
    assert!(full.identity.unwrap().1.ends_with("k"));
    assert_eq!(full.server_name, "b.c");
    assert!(tls("enabled: false").unwrap().grpc.tls.is_none());

    assert!(fault(tls("enabled: true, cert_file: c")).contains("grpc.tls.key_file must be too"));
    assert!(fault(tls("enabled: true, key_file: k")).contains("grpc.tls.cert_file must be too"));
    for off in ["ca_file: a", "server_name: b", "enabled: false, ca_file: a"] {
        assert!(
            fault(tls(off)).contains("grpc.tls.enabled is false"),
            "{off}"
        );
    }
}

#[test]
fn secrets_come_from_files_too() {
    let files = Files::new(
        "http: {admin_api_key_file: key}\ngrpc:\n  auth: {shared_token_file: shared, tokens_file: tokens}\n",
    )
    .with("key", "k\r\n")
    .with("shared", " s \n")
    .with("tokens", "agent-1: t1\nagent-2: \"t: 2\"\n");
    let config = ServerConfig::load(&files.sources()).unwrap();
    assert_eq!(exposed(&config.http.admin_api_key), Some("k"));
    assert_eq!(exposed(&config.grpc.auth.shared), Some(" s "));
    assert_eq!(config.grpc.auth.tokens[&id("agent-2")].expose(), "t: 2");

    // The stronger source wins, whichever way it says it.
    let sources = files
        .sources()
        .environment([("SILO_HTTP_ADMIN_API_KEY", "env")]);
    let config = ServerConfig::load(&sources).unwrap();
    assert_eq!(exposed(&config.http.admin_api_key), Some("env"));
    let key = files.path("key").into_os_string();
    let direct = Files::new("http: {admin_api_key: direct}");
    let sources = direct
        .sources()
        .environment([("SILO_HTTP_ADMIN_API_KEY_FILE", key)]);
    let config = ServerConfig::load(&sources).unwrap();
    assert_eq!(exposed(&config.http.admin_api_key), Some("k"));

    // In one source they contradict each other.
    let both = files.with(
        "silo.yaml",
        "http: {admin_api_key: a, admin_api_key_file: key}",
    );
    assert_eq!(
        fault(ServerConfig::load(&both.sources())),
        "http.admin_api_key and http.admin_api_key_file are both set: keep one"
    );
    let absent = both.with("silo.yaml", "http: {admin_api_key_file: nothing-here}");
    assert!(fault(ServerConfig::load(&absent.sources())).contains("can't read"));
    let empty = absent
        .with("silo.yaml", "http: {admin_api_key_file: empty}")
        .with("empty", "\n");
    assert!(fault(ServerConfig::load(&empty.sources())).contains("found nothing"));
    let twice = empty
        .with("silo.yaml", "grpc: {auth: {tokens_file: tokens}}")
        .with("tokens", "a: 1\na: 2\n");
    assert!(fault(ServerConfig::load(&twice.sources())).contains("stands in line 1 already"));
}

#[test]
fn faults_hold_no_secret() {
    let yaml = "http: {admin_api_key: 'hunter2 x'}
grpc:
  auth:
    shared_token: [hunter2]
    tokens: {HUNTER2: hunter2, b: \"hunter2\\n\", c: {hunter2: 1}}
";
    let found = faults(server(yaml));
    assert_eq!(found.len(), 5, "{found:#?}");
    assert!(!format!("{found:?}").to_lowercase().contains("hunter2"));
    let found = faults(server_from(&[("SILO_GRPC_AUTH_TOKENS", "hunter2")]));
    assert!(!format!("{found:?}").contains("hunter2"));
    let found = faults(agent("local: {service_url: 'http://u:hunter2@a'}"));
    assert!(!format!("{found:?}").contains("hunter2"));

    let config = server("grpc: {auth: {shared_token: hunter2}}").unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
}

#[test]
fn hostile_files_end_soon() {
    let bomb: String = (1..30)
        .map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9)))
        .collect();
    for yaml in [
        "[".repeat(1 << 20),
        "a: ".repeat(1 << 18),
        "- ".repeat(1 << 16),
        format!("a0: &a0 x\n{bomb}"),
        "x: y\n".repeat(1 << 14),
        " ".repeat(2 << 20),
    ] {
        assert!(server(&yaml).is_err());
    }
}

/// What is written about the settings comes from the table; `UPDATE=1 cargo test --test config`
/// writes it anew.
fn written(path: &str, expected: &str, replace: impl Fn(&str) -> String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE").is_some() {
        let old = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, replace(&old)).unwrap();
    }
    let text = fs::read_to_string(&path).unwrap();
    assert!(
        text.contains(expected),
        "{} differs from the table of settings: run `UPDATE=1 cargo test --test config`, \
         which puts this there:\n{expected}",
        path.display()
    );
}

#[test]
fn the_readme_has_the_tables() {
    for role in [Role::Server, Role::Agent] {
        let (begin, end) = (format!("<!-- settings:{role} -->"), "<!-- /settings -->");
        let block = format!("{begin}\n{}{end}\n", markdown(role));
        written("README.md", &block, |readme| {
            let (before, rest) = readme.split_once(&begin).expect("README.md has the marks");
            let (_, after) = rest.split_once(end).expect("README.md has the marks");
            format!("{before}{}{after}", block.trim_end())
        });
    }
}

#[test]
fn the_examples_are_true() {
    for (role, name) in [
        (Role::Server, "config/server.yaml"),
        (Role::Agent, "config/agent.yaml"),
    ] {
        written(name, &example(role), |_| example(role));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));

    let file = root.join("config/server.yaml");
    let config = ServerConfig::load(&Sources::none().file(&file)).unwrap();
    assert_eq!(
        format!("{config:?}"),
        format!("{:?}", ServerConfig::default())
    );

    let file = root.join("config/agent.yaml");
    let config = AgentConfig::load(&Sources::none().file(&file)).unwrap();
    assert_eq!(config.grpc.agent_id, id("agent-1"));
    assert!(config.grpc.token.is_none());
}

#[test]
fn the_examples_hold_when_they_are_uncommented() {
    let uncommented = |role: Role, dropped: &[&str]| -> String {
        example(role)
            .lines()
            .filter(|line| !dropped.iter().any(|key| line.trim().starts_with(key)))
            .map(|line| match line.split_once('#') {
                Some((indent, rest)) if indent.trim().is_empty() && !rest.starts_with(' ') => {
                    format!("{indent}{rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect()
    };
    let files = [
        "#admin_api_key_file",
        "#shared_token_file",
        "#tokens_file",
        "#token_file",
    ];
    let with_tls = |yaml: String| {
        yaml.replace("enabled: false", "enabled: true")
            .replace("client_auth: none", "client_auth: require")
    };
    let config = server(&with_tls(uncommented(Role::Server, &files))).unwrap();
    assert!(config.grpc.tls.is_some());
    assert_eq!(config.http.static_ports[&id("agent-2")], 9000);
    assert_eq!(config.grpc.auth.tokens.len(), 2);
    assert_eq!(config.http.agent_host.to_string(), "::");

    let yaml = with_tls(uncommented(Role::Agent, &files)).replace("http://127", "https://127");
    let files = Files::new(&yaml).with("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    let config = AgentConfig::load(&files.sources()).unwrap();
    assert!(config.local.tls.ca_file.is_some());
    assert_eq!(exposed(&config.grpc.token), Some("change-me"));
}
