//! What an agent is told.

use std::time::Duration;

use crate::id::{AgentId, Secret};

use super::LogConfig;
use super::value::{HostHeader, HostPort, PemFile, ServiceUrl};

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
    /// `grpc.heartbeat_timeout`: without a byte from the server, the tunnel is dead. Counts until
    /// the welcome names the server's own value.
    pub heartbeat_timeout: Duration,
}

/// Section `local`.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// `local.service_url`: the only place the agent ever connects to besides the server.
    pub service_url: ServiceUrl,
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
    /// `agent.grace`: how long running exchanges may go on after the signal to stop.
    pub grace: Duration,
}
