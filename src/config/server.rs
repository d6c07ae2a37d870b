//! What a server is told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::auth::Policy;
use crate::id::{AgentId, Secret};

use super::LogConfig;
use super::value::Cidr;

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
}

/// Section `grpc` of a server.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// `grpc.host`: the address of the tunnel port; `::` is every address, IPv4 included.
    pub host: IpAddr,
    /// `grpc.port`: the tunnel port; 0 lets the kernel choose.
    pub port: u16,
    /// `grpc.auth`: who may use which id.
    pub auth: Policy,
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
