//! The kinds of value a setting can have, and how each is written.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// A host, which is a name or an address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// A DNS name, or an IP address without brackets.
    pub host: String,
    /// Never 0.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How a local service is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// In clear.
    Http,
    /// Over TLS.
    Https,
}

/// The local service: a scheme, a host and a port, and nothing else.
///
/// A path would have to be joined with the visitor's raw target, and then the service no longer
/// sees what he sent; a user name and a query have no meaning for a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceUrl {
    /// How it is spoken to.
    pub scheme: Scheme,
    /// Where it listens.
    pub address: HostPort,
}

/// What the local service sees as `Host`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostHeader {
    /// What the visitor sent.
    Preserve,
    /// The host of `local.service_url`, with the port unless it is the scheme's own.
    Target,
    /// This value; a host with or without a port.
    Value(String),
}

/// A block of addresses: an address and how many of its leading bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// A file of PEM blocks, read when the configuration was.
#[derive(Clone)]
pub struct PemFile {
    /// Where it was read, for messages.
    pub path: PathBuf,
    /// What it held.
    pub pem: Arc<[u8]>,
}

impl fmt::Debug for PemFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.fmt(f)
    }
}
