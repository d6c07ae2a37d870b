//! What an agent is told.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::id::{AgentId, MAX_LABEL_LEN, MAX_LABELS, Secret};

use super::LogConfig;
use super::fault::ConfigError;
use super::sources::{Reader, Sources, TLS_ENABLED, secret, tls_is_off};
use super::table::Role;
use super::value::{
    self, HostHeader, HostPort, InvalidValue, PemFile, Protocol, Scheme, ServiceUrl,
};

/// Everything an agent is told; the fields mirror the sections of the file.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Section `log`.
    pub log: LogConfig,
    /// Section `grpc`: the way to the server.
    pub grpc: DialConfig,
    /// Section `local`: the service behind the agent.
    pub local: LocalConfig,
    /// Section `agent`: the process as a whole.
    pub agent: AgentProcess,
}

/// Section `grpc` of an agent.
#[derive(Debug, Clone)]
pub struct DialConfig {
    /// `grpc.server_address`: where the server's tunnel port is.
    pub server_address: HostPort,
    /// `grpc.agent_id`: the id this agent claims.
    pub agent_id: AgentId,
    /// `grpc.token`: the credential for it.
    pub token: Option<Secret>,
    /// `grpc.tls`: TLS to the server; without it everything goes in clear.
    pub tls: Option<DialTls>,
    /// `grpc.heartbeat_timeout`: without a byte from the server, the tunnel is dead. Counts until
    /// the welcome names the server's own value.
    pub heartbeat_timeout: Duration,
}

/// Section `grpc.tls` of an agent, if that is enabled. The files are read when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialTls {
    /// `grpc.tls.ca_file`: the only authorities that may sign the server's certificate. `None`:
    /// the system's.
    pub ca_file: Option<PathBuf>,
    /// `grpc.tls.cert_file` and `grpc.tls.key_file`: this agent's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// `grpc.tls.server_name`: the name the server's certificate must bear; the host of
    /// `grpc.server_address` unless somebody set another.
    pub server_name: String,
}

/// Section `local`.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// `local.service_url`: the only place the agent ever connects to besides the server.
    pub service_url: ServiceUrl,
    /// `local.protocol`: which HTTP it is spoken to in.
    pub protocol: Protocol,
    /// `local.host_header`: what the service sees as `Host`.
    pub host_header: HostHeader,
    /// `local.response_timeout`: from handing a request to the service to the head of its answer.
    pub response_timeout: Duration,
    /// `local.connect_timeout`: for a connection to the service, TLS included.
    pub connect_timeout: Duration,
    /// `local.idle_timeout`: how long an unused connection to the service is kept.
    pub idle_timeout: Duration,
    /// `local.max_connections`: requests the service is given at once; others wait in order.
    pub max_connections: usize,
    /// `local.tls`: how the service is recognised; only read when its URL says `https`.
    pub tls: LocalTls,
}

/// Section `local.tls`.
#[derive(Debug, Clone, Default)]
pub struct LocalTls {
    /// `local.tls.ca_file`: the only certificates that may sign the service's. `None`: the
    /// system's.
    pub ca_file: Option<PemFile>,
    /// `local.tls.server_name`: the name the service's certificate must bear. `None`: the host of
    /// the URL.
    pub server_name: Option<String>,
    /// `local.tls.insecure`: take any certificate.
    pub insecure: bool,
}

/// Section `agent`.
#[derive(Debug, Clone)]
pub struct AgentProcess {
    /// `agent.labels`: what the agent says of itself; [`MAX_LABELS`] at most.
    pub labels: BTreeMap<String, String>,
    /// `agent.grace`: how long running exchanges may go on after the signal to stop.
    pub grace: Duration,
}

impl AgentConfig {
    /// The defaults for an agent that claims `agent_id` at `server_address` and forwards to
    /// `service_url`.
    pub fn new(server_address: HostPort, agent_id: AgentId, service_url: ServiceUrl) -> Self {
        let mut config = Self::read(&mut Reader::new(Role::Agent, &Sources::none()));
        config.grpc.server_address = server_address;
        config.grpc.agent_id = agent_id;
        config.local.service_url = service_url;
        config
    }

    /// Reads the settings of an agent from `sources`, or says everything that is wrong with them.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(Role::Agent, sources);
        let config = Self::read(&mut reader);
        config.local.check(&mut reader);
        if config.agent.labels.len() > MAX_LABELS {
            let text = format!("agent.labels has more than {MAX_LABELS} labels");
            reader.contradiction(&["agent.labels"], text);
        }
        reader.finish(config)
    }

    fn read(from: &mut Reader) -> Self {
        let server_address: HostPort = from.value("grpc.server_address", str::parse);
        Self {
            log: LogConfig::read(from),
            grpc: DialConfig {
                tls: dial_tls(from, &server_address),
                server_address,
                agent_id: from.value("grpc.agent_id", value::agent_id),
                token: from.optional("grpc.token", secret),
                heartbeat_timeout: from.time("grpc.heartbeat_timeout"),
            },
            local: LocalConfig {
                service_url: from.value("local.service_url", str::parse),
                protocol: from.value("local.protocol", str::parse),
                host_header: from.value("local.host_header", str::parse),
                response_timeout: from.time("local.response_timeout"),
                connect_timeout: from.time("local.connect_timeout"),
                idle_timeout: from.time("local.idle_timeout"),
                max_connections: from.count("local.max_connections"),
                tls: LocalTls {
                    ca_file: from.certificates("local.tls.ca_file"),
                    server_name: from.optional("local.tls.server_name", value::host),
                    insecure: from.value("local.tls.insecure", value::flag),
                },
            },
            agent: AgentProcess {
                labels: from.pairs("agent.labels", label, label),
                grace: from.time("agent.grace"),
            },
        }
    }
}

/// Section `grpc.tls`.
fn dial_tls(from: &mut Reader, server: &HostPort) -> Option<DialTls> {
    const CERT: &str = "grpc.tls.cert_file";
    const KEY: &str = "grpc.tls.key_file";
    const CA: &str = "grpc.tls.ca_file";
    const NAME: &str = "grpc.tls.server_name";
    let enabled = from.value(TLS_ENABLED, value::flag);
    let [ca_file, cert_file, key_file] = [CA, CERT, KEY].map(|path| from.file_name(path));
    let server_name = from.optional(NAME, value::host);
    if !enabled {
        tls_is_off(from, &[CA, CERT, KEY, NAME], None);
        return None;
    }
    for (set, path, missing, other) in [
        (&cert_file, CERT, &key_file, KEY),
        (&key_file, KEY, &cert_file, CERT),
    ] {
        if set.is_some() && missing.is_none() {
            let text = format!("{path} is set, so {other} must be too: they belong together");
            from.contradiction(&[path, other], text);
        }
    }
    Some(DialTls {
        ca_file,
        identity: cert_file.zip(key_file),
        server_name: server_name.unwrap_or_else(|| server.host.clone()),
    })
}

impl LocalConfig {
    fn check(&self, faults: &mut Reader) {
        const URL: &str = "local.service_url";
        const INSECURE: &str = "local.tls.insecure";
        let told = [
            ("local.tls.ca_file", self.tls.ca_file.is_some()),
            ("local.tls.server_name", self.tls.server_name.is_some()),
            (INSECURE, self.tls.insecure),
        ];
        for (path, told) in told {
            if told && self.service_url.scheme == Scheme::Http {
                let text = format!(
                    "{path} is set, but {URL} is {}, which is no https",
                    self.service_url
                );
                faults.contradiction(&[path, URL], text);
            }
        }
        if self.tls.insecure && self.tls.ca_file.is_some() {
            let text = format!(
                "{INSECURE} takes any certificate, so local.tls.ca_file has no effect: keep one"
            );
            faults.contradiction(&[INSECURE, "local.tls.ca_file"], text);
        }
    }
}

/// The name or the value of a label.
fn label(text: &str) -> Result<String, InvalidValue> {
    if (1..=MAX_LABEL_LEN).contains(&text.len()) && !text.contains(char::is_control) {
        Ok(text.to_owned())
    } else {
        Err(InvalidValue::new(format!(
            "expected 1 to {MAX_LABEL_LEN} bytes without control characters"
        )))
    }
}
