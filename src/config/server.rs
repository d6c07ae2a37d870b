//! What a server is told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::auth::{ClientAuth, Policy};
use crate::cors::{Cors, InvalidOrigin, Origin, Origins};
use crate::headers::is_token;
use crate::id::{AgentId, Secret};

use super::LogConfig;
use super::fault::ConfigError;
use super::sources::{Reader, Sources, TLS_ENABLED, secret, tls_is_off};
use super::table::Role;
use super::value::{self, Cidr, InvalidValue, LogOutput};

/// Everything a server is told; the fields mirror the sections of the file.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Section `log`.
    pub log: LogConfig,
    /// Section `http`: the admin port, the agents' ports and the limits of their visitors.
    pub http: HttpConfig,
    /// Section `grpc`: the tunnel port.
    pub grpc: TunnelConfig,
    /// Section `server`: the process as a whole.
    pub server: ProcessConfig,
}

/// Section `http` of a server.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// `http.host`: the address of the admin port.
    pub host: IpAddr,
    /// `http.port`: the admin port; 0 lets the kernel choose.
    pub port: u16,
    /// `http.admin_api_key`: what callers of the admin port must show. Always set when `host` is
    /// no loopback address.
    pub admin_api_key: Option<Secret>,
    /// `http.agent_host`: the address of the agents' ports; `::` is every address, IPv4 included.
    pub agent_host: IpAddr,
    /// `http.public_host`: the host in the URL an agent is told, without a port. `None`: the
    /// host by which the agent reached the server.
    pub public_host: Option<String>,
    /// `http.agent_port_range`: the ports given to agents; never empty, and without the admin
    /// and the tunnel port.
    pub agent_port_range: RangeInclusive<u16>,
    /// `http.static_ports`: ports that belong to one id alone, each to one id only.
    pub static_ports: BTreeMap<AgentId, u16>,
    /// `http.port_lease`: how long a port stays its agent's after the agent is gone.
    pub port_lease: Duration,
    /// `http.state_file`: where ports and leases are remembered over a restart. `None`: nowhere.
    pub state_file: Option<PathBuf>,
    /// `http.trusted_proxies`: visitors whose own forwarded headers are believed.
    pub trusted_proxies: Vec<Cidr>,
    /// `http.max_exchanges_per_agent`: requests in flight to one agent; more get 503.
    pub max_exchanges_per_agent: usize,
    /// `http.max_connections`: visitors' connections in all.
    pub max_connections: usize,
    /// `http.max_connections_per_agent`: visitors' connections to one agent's port.
    pub max_connections_per_agent: usize,
    /// `http.max_connections_per_address`: visitors' connections from one address. `None`: no
    /// limit.
    pub max_connections_per_address: Option<usize>,
    /// `http.max_request_line`: bytes; longer ones get 414.
    pub max_request_line: usize,
    /// `http.max_head`: bytes of request line and header lines together; more get 431.
    pub max_head: usize,
    /// `http.max_header_lines`: header lines in a head; more get 431.
    pub max_header_lines: usize,
    /// `http.head_timeout`: from a request's first byte to the end of its head.
    pub head_timeout: Duration,
    /// `http.body_timeout`: without a byte of a body that is not complete.
    pub body_timeout: Duration,
    /// `http.idle_timeout`: between two requests of a connection.
    pub idle_timeout: Duration,
    /// `http.send_timeout`: without a byte taken by the visitor while some are waiting for him.
    pub send_timeout: Duration,
    /// `http.max_body`: bytes of one request's body; more get 413. `None`: no limit.
    pub max_body: Option<u64>,
    /// `http.receive_buffer`: bytes the kernel takes of an upload that nobody reads. `None`: as it
    /// sees fit.
    pub receive_buffer: Option<usize>,
    /// `http.cors`: whose pages may read answers from agents' ports. `None`: that is left to the
    /// services.
    pub cors: Option<Cors>,
    /// `http.access_log`: where a line for each request goes. `None`: nowhere.
    pub access_log: Option<LogOutput>,
}

/// Section `grpc` of a server.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// `grpc.host`: the address of the tunnel port; `::` is every address, IPv4 included.
    pub host: IpAddr,
    /// `grpc.port`: the tunnel port; 0 lets the kernel choose.
    pub port: u16,
    /// `grpc.auth` and `grpc.tls.client_auth`: who may use which id.
    pub auth: Policy,
    /// `grpc.tls`: TLS on the port; without it agents come in clear.
    pub tls: Option<TunnelTls>,
    /// `grpc.handshake_timeout`: from an agent's connection to its hello.
    pub handshake_timeout: Duration,
    /// `grpc.max_handshakes`: connections that have not shown who they are yet.
    pub max_handshakes: usize,
    /// `grpc.heartbeat_interval`: how long a side may be silent before it sends a heartbeat.
    pub heartbeat_interval: Duration,
    /// `grpc.heartbeat_timeout`: without a byte from the other side, the tunnel is dead. Longer
    /// than the interval.
    pub heartbeat_timeout: Duration,
}

/// Section `grpc.tls` of a server, if that is enabled. The files are read when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelTls {
    /// `grpc.tls.cert_file`: the server's certificate and those between it and the authority.
    pub cert_file: PathBuf,
    /// `grpc.tls.key_file`: the certificate's key.
    pub key_file: PathBuf,
    /// `grpc.tls.ca_file`: who may sign agents' certificates. `None`: agents are asked for none.
    pub ca_file: Option<PathBuf>,
}

/// Section `server`.
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// `server.workers`: worker threads. `None`: as many as the machine has cores.
    pub workers: Option<usize>,
    /// `server.grace`: how long running exchanges may go on after the signal to stop.
    pub grace: Duration,
    /// `server.max_buffered`: bytes that the whole process promises to hold for its exchanges.
    pub max_buffered: usize,
    /// `server.max_buffered_per_agent`: the same for one agent's tunnel; not more than
    /// `max_buffered`.
    pub max_buffered_per_agent: usize,
}

impl ServerConfig {
    /// Reads the settings of a server from `sources`, or says everything that is wrong with them.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(Role::Server, sources);
        let mut config = Self::read(&mut reader);
        config.reconcile(&mut reader);
        reader.finish(config)
    }

    fn read(from: &mut Reader) -> Self {
        let start = from.count("http.agent_port_range.start");
        let end = from.count("http.agent_port_range.end");
        let (tls, certificates) = tunnel_tls(from);
        Self {
            log: LogConfig::read(from),
            http: HttpConfig {
                host: from.value("http.host", value::address),
                port: from.count("http.port"),
                admin_api_key: from.optional("http.admin_api_key", api_key),
                agent_host: from.value("http.agent_host", value::address),
                public_host: from.optional("http.public_host", value::host),
                agent_port_range: start..=end,
                static_ports: from.by_id("http.static_ports", port),
                port_lease: from.time("http.port_lease"),
                state_file: from.file_name("http.state_file"),
                trusted_proxies: from.networks("http.trusted_proxies"),
                max_exchanges_per_agent: from.count("http.max_exchanges_per_agent"),
                max_connections: from.count("http.max_connections"),
                max_connections_per_agent: from.count("http.max_connections_per_agent"),
                max_connections_per_address: from.limit("http.max_connections_per_address"),
                max_request_line: from.count("http.max_request_line"),
                max_head: from.count("http.max_head"),
                max_header_lines: from.count("http.max_header_lines"),
                head_timeout: from.time("http.head_timeout"),
                body_timeout: from.time("http.body_timeout"),
                idle_timeout: from.time("http.idle_timeout"),
                send_timeout: from.time("http.send_timeout"),
                max_body: from.limit("http.max_body"),
                receive_buffer: from.limit("http.receive_buffer"),
                cors: cors(from),
                access_log: from.output("http.access_log"),
            },
            grpc: TunnelConfig {
                host: from.value("grpc.host", value::address),
                port: from.count("grpc.port"),
                auth: Policy {
                    shared: from.optional("grpc.auth.shared_token", secret),
                    tokens: from.by_id("grpc.auth.tokens", secret),
                    certificates,
                },
                tls,
                handshake_timeout: from.time("grpc.handshake_timeout"),
                max_handshakes: from.count("grpc.max_handshakes"),
                heartbeat_interval: from.time("grpc.heartbeat_interval"),
                heartbeat_timeout: from.time("grpc.heartbeat_timeout"),
            },
            server: ProcessConfig {
                workers: Some(from.count("server.workers")).filter(|workers| *workers > 0),
                grace: from.time("server.grace"),
                max_buffered: from.count("server.max_buffered"),
                max_buffered_per_agent: from.count("server.max_buffered_per_agent"),
            },
        }
    }

    /// Reports what can't be meant together. A default that a smaller limit contradicts gives way.
    pub(super) fn reconcile(&mut self, faults: &mut Reader) {
        self.check_ports(faults);
        let Self {
            http, grpc, server, ..
        } = self;

        if !http.host.to_canonical().is_loopback() && http.admin_api_key.is_none() {
            let text = format!(
                "http.host is {}, so others can reach the admin port: set http.admin_api_key, or \
                 set http.host to 127.0.0.1",
                http.host
            );
            faults.contradiction(&["http.host", "http.admin_api_key"], text);
        }
        if grpc.heartbeat_timeout <= grpc.heartbeat_interval {
            let text = format!(
                "grpc.heartbeat_timeout ({}) must be longer than grpc.heartbeat_interval ({}), \
                 or silence between two heartbeats ends every tunnel",
                value::show_time(grpc.heartbeat_timeout),
                value::show_time(grpc.heartbeat_interval),
            );
            let paths = ["grpc.heartbeat_timeout", "grpc.heartbeat_interval"];
            faults.contradiction(&paths, text);
        }
        at_most(
            faults,
            ("http.max_request_line", &mut http.max_request_line),
            ("http.max_head", http.max_head),
        );
        at_most(
            faults,
            (
                "server.max_buffered_per_agent",
                &mut server.max_buffered_per_agent,
            ),
            ("server.max_buffered", server.max_buffered),
        );
    }

    fn check_ports(&self, faults: &mut Reader) {
        const START: &str = "http.agent_port_range.start";
        const END: &str = "http.agent_port_range.end";
        let Self { http, grpc, .. } = self;
        let range = &http.agent_port_range;
        let (start, end) = (range.start(), range.end());
        if range.is_empty() {
            let text = format!("{START} ({start}) is greater than {END} ({end}): no port is left");
            faults.contradiction(&[START, END], text);
        }
        let ours = [("http.port", http.port), ("grpc.port", grpc.port)];
        for (path, port) in ours {
            if range.contains(&port) {
                let text =
                    format!("{path} ({port}) lies within http.agent_port_range ({start} to {end})");
                faults.contradiction(&[path, START, END], text);
            }
        }
        if http.port == grpc.port && http.port != 0 {
            let text = format!("http.port and grpc.port are both {}", http.port);
            faults.contradiction(&["http.port", "grpc.port"], text);
        }
        let mut owners: BTreeMap<u16, &AgentId> = BTreeMap::new();
        for (id, port) in &http.static_ports {
            if let Some(owner) = owners.insert(*port, id) {
                let text = format!("http.static_ports gives {port} to both {owner} and {id}");
                faults.contradiction(&["http.static_ports"], text);
            }
            for (path, taken) in ours {
                if *port == taken {
                    let text = format!("http.static_ports gives {port} to {id}, but it is {path}");
                    faults.contradiction(&["http.static_ports", path], text);
                }
            }
        }
    }
}

impl Default for ServerConfig {
    /// The settings of a server whom nobody told anything.
    fn default() -> Self {
        Self::read(&mut Reader::new(Role::Server, &Sources::none()))
    }
}

/// Section `grpc.tls`, and what client certificates count for.
fn tunnel_tls(from: &mut Reader) -> (Option<TunnelTls>, ClientAuth) {
    const CERT: &str = "grpc.tls.cert_file";
    const KEY: &str = "grpc.tls.key_file";
    const CA: &str = "grpc.tls.ca_file";
    const CLIENT_AUTH: &str = "grpc.tls.client_auth";
    let enabled = from.value(TLS_ENABLED, value::flag);
    let client_auth = from.value(CLIENT_AUTH, client_auth);
    let files = [CERT, KEY, CA].map(|path| from.file_name(path));
    if !enabled {
        let told = client_auth != ClientAuth::None;
        tls_is_off(from, &[CERT, KEY, CA], told.then_some(CLIENT_AUTH));
        return (None, ClientAuth::None);
    }
    let [cert_file, key_file, ca_file] = files;
    for (path, file) in [(CERT, &cert_file), (KEY, &key_file)] {
        if file.is_none() {
            let text = format!(
                "{TLS_ENABLED} is true, so {path} must be set: `silo-proxy certs init` makes the \
                 files"
            );
            from.contradiction(&[TLS_ENABLED, path], text);
        }
    }
    match (client_auth, &ca_file) {
        (ClientAuth::None, Some(_)) => {
            let text = format!(
                "{CA} is set, but {CLIENT_AUTH} is none, so no agent is asked for a certificate: \
                 set {CLIENT_AUTH} to request or require, or leave out {CA}"
            );
            from.contradiction(&[CA, CLIENT_AUTH], text);
        }
        (ClientAuth::Request | ClientAuth::Require, None) => {
            let text = format!(
                "{CLIENT_AUTH} is set, so {CA} must be too: it says who may sign agents' \
                 certificates"
            );
            from.contradiction(&[CA, CLIENT_AUTH], text);
        }
        _ => {}
    }
    let tls = cert_file
        .zip(key_file)
        .map(|(cert_file, key_file)| TunnelTls {
            cert_file,
            key_file,
            ca_file,
        });
    (tls, client_auth)
}

fn client_auth(text: &str) -> Result<ClientAuth, InvalidValue> {
    match text {
        "none" => Ok(ClientAuth::None),
        "request" => Ok(ClientAuth::Request),
        "require" => Ok(ClientAuth::Require),
        _ => Err(InvalidValue::new("expected none, request or require")),
    }
}

/// Holds `part` to `whole`: a part that somebody set greater is a contradiction, a default isn't.
fn at_most(
    faults: &mut Reader,
    (part, value): (&'static str, &mut usize),
    (whole, limit): (&'static str, usize),
) {
    if *value > limit && faults.is_set(part) {
        let (value, limit) = (*value as u64, limit as u64);
        let text = format!(
            "{part} ({}) is greater than {whole} ({})",
            value::show_size(value),
            value::show_size(limit)
        );
        faults.contradiction(&[part, whole], text);
    }
    *value = limit.min(*value);
}

/// Reads `http.cors`. Without origins the rest of it means nothing, so nobody may set it.
fn cors(from: &mut Reader) -> Option<Cors> {
    const ORIGINS: &str = "http.cors.allowed_origins";
    const CREDENTIALS: &str = "http.cors.allow_credentials";
    let mut any = false;
    let mut listed = Vec::new();
    for origin in from.list(ORIGINS, origin) {
        match origin {
            Some(origin) => listed.push(origin),
            None => any = true,
        }
    }
    let methods = from.list("http.cors.allowed_methods", method);
    let headers = from.list("http.cors.allowed_headers", header_name);
    let credentials = from.value(CREDENTIALS, value::flag);
    let max_age = from.time("http.cors.max_age");

    if any && !listed.is_empty() {
        let text = format!("{ORIGINS} has \"*\" for all beside others: keep either");
        from.contradiction(&[ORIGINS], text);
    }
    if any && credentials {
        let text = format!(
            "{CREDENTIALS} lets pages read what only their visitor may, so {ORIGINS} can't be \
             \"*\": name the origins"
        );
        from.contradiction(&[ORIGINS, CREDENTIALS], text);
    }
    if !any && listed.is_empty() {
        for path in [
            "http.cors.allowed_methods",
            "http.cors.allowed_headers",
            CREDENTIALS,
            "http.cors.max_age",
        ] {
            if from.is_set(path) {
                let text = format!("{path} is set, but {ORIGINS} isn't, so it has no effect");
                from.contradiction(&[path, ORIGINS], text);
            }
        }
        return None;
    }
    Some(Cors {
        origins: if any {
            Origins::Any
        } else {
            Origins::Only(listed)
        },
        methods,
        headers,
        credentials,
        max_age,
    })
}

/// One origin, or `None` for `*`.
fn origin(text: &str) -> Result<Option<Origin>, InvalidValue> {
    match text {
        "*" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|error: InvalidOrigin| InvalidValue::new(error.to_string())),
    }
}

fn method(text: &str) -> Result<String, InvalidValue> {
    token(text, "expected a method such as GET")
}

fn header_name(text: &str) -> Result<String, InvalidValue> {
    token(text, "expected a header name such as Content-Type")
}

fn token(text: &str, expected: &str) -> Result<String, InvalidValue> {
    match is_token(text.as_bytes()) {
        true => Ok(text.to_owned()),
        false => Err(InvalidValue::new(expected)),
    }
}

fn port(text: &str) -> Result<u16, InvalidValue> {
    value::decimal(text)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
        .ok_or_else(|| InvalidValue::new("expected a port of 1 to 65535"))
}

/// A secret that fits into a header line: visible ASCII, no blanks (RFC 6750, section 2.1).
fn api_key(text: &str) -> Result<Secret, InvalidValue> {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        secret(text)
    } else {
        Err(InvalidValue::new(
            "expected visible ASCII without blanks, because it travels in a header line",
        ))
    }
}
