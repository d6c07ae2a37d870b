//! The kinds of value a setting can have, and how each is written.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::id::{AgentId, InvalidAgentId};

/// What was expected where something else stands. Names no value, so that it can stand beside a
/// secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct InvalidValue(String);

impl InvalidValue {
    pub(super) fn new(expected: impl Into<String>) -> Self {
        Self(expected.into())
    }
}

/// An agent's id.
pub(super) fn agent_id(text: &str) -> Result<AgentId, InvalidValue> {
    text.parse()
        .map_err(|error: InvalidAgentId| InvalidValue::new(error.to_string()))
}

/// A host, which is a name or an address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// A DNS name, or an IP address without brackets.
    pub host: String,
    /// Never 0.
    pub port: u16,
}

impl HostPort {
    /// The server's tunnel port, when an address doesn't name one.
    pub const TUNNEL_PORT: u16 = 9090;
}

impl FromStr for HostPort {
    type Err = InvalidValue;

    /// Reads `host`, `host:port`, `[v6]` or `[v6]:port`; the port is 9090 when there is none.
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if text.contains("://") {
            return Err(InvalidValue::new("expected HOST:PORT without a scheme"));
        }
        let (host, port) = host_and_port(text)?;
        let port = port.unwrap_or(Self::TUNNEL_PORT);
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.port)
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

impl Scheme {
    /// As it is written in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port of a URL that names none (RFC 9110, section 4.2).
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Where the lines of the access log go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogOutput {
    /// Standard error, among the lines of the log.
    Stderr,
    /// Standard output.
    Stdout,
    /// A file, at its end.
    File(PathBuf),
}

impl fmt::Display for LogOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stderr => f.write_str("stderr"),
            Self::Stdout => f.write_str("stdout"),
            Self::File(path) => path.display().fmt(f),
        }
    }
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

impl ServiceUrl {
    /// The value of `Host` for this service: the port is left out when it is the scheme's own
    /// (RFC 9110, section 7.2).
    pub fn authority(&self) -> String {
        if self.address.port == self.scheme.default_port() {
            bracketed(&self.address.host)
        } else {
            self.address.to_string()
        }
    }
}

impl FromStr for ServiceUrl {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(InvalidValue::new(
                "expected a URL such as http://127.0.0.1:3000",
            ));
        };
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(InvalidValue::new("expected http:// or https://")),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err(InvalidValue::new(
                "a user name or password in the URL is not supported",
            ));
        }
        if authority.contains(['/', '?', '#']) {
            return Err(InvalidValue::new(
                "only scheme, host and port: requests arrive with the path and query the visitor \
                 sent, so the URL can't have its own",
            ));
        }
        let (host, port) = host_and_port(authority)?;
        let port = port.unwrap_or(scheme.default_port());
        let address = HostPort { host, port };
        Ok(Self { scheme, address })
    }
}

impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
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

impl FromStr for HostHeader {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "preserve" => Ok(Self::Preserve),
            "target" => Ok(Self::Target),
            value => host_and_port(value)
                .map(|_| Self::Value(value.to_owned()))
                .map_err(|_| {
                    InvalidValue::new("expected preserve, target, or a host with or without a port")
                }),
        }
    }
}

/// Which HTTP the local service is spoken to in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, in clear with prior knowledge.
    H2c,
    /// HTTP/2 for calls of gRPC, HTTP/1.1 for the rest.
    Auto,
}

impl FromStr for Protocol {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "http1" => Ok(Self::Http1),
            "h2c" => Ok(Self::H2c),
            "auto" => Ok(Self::Auto),
            _ => Err(InvalidValue::new("expected http1, h2c or auto")),
        }
    }
}

/// A block of addresses: an address and how many of its leading bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Whether `address` lies in the block. An IPv4-mapped IPv6 address, as a dual-stack socket
    /// reports it, counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let differ = match (self.address, address.to_canonical()) {
            (IpAddr::V4(block), IpAddr::V4(address)) => {
                u128::from(block.to_bits() ^ address.to_bits()) << 96
            }
            (IpAddr::V6(block), IpAddr::V6(address)) => block.to_bits() ^ address.to_bits(),
            _ => return false,
        };
        differ.leading_zeros() >= u32::from(self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let expected = "expected an address or a block such as 10.0.0.0/8";
        let address: IpAddr = address.parse().map_err(|_| InvalidValue::new(expected))?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => bits,
            Some(text) => decimal(text)
                .filter(|prefix| *prefix <= u64::from(bits))
                .and_then(|prefix| u8::try_from(prefix).ok())
                .ok_or_else(|| InvalidValue::new(format!("expected a prefix of 0 to {bits}")))?,
        };
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// A file of PEM blocks, read when the configuration was.
#[derive(Clone, PartialEq, Eq)]
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

/// An IP address, in brackets or not, or `localhost`, which is 127.0.0.1: nothing is looked up.
pub(super) fn address(text: &str) -> Result<IpAddr, InvalidValue> {
    if text == "localhost" {
        return Ok(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    bare.parse().map_err(|_| {
        InvalidValue::new("expected an IP address or localhost; 0.0.0.0 and :: are every address")
    })
}

/// A DNS name, an IPv4 address, or an IPv6 address with or without brackets; without a port.
pub(super) fn host(text: &str) -> Result<String, InvalidValue> {
    let invalid = || InvalidValue::new("expected a host name or an IP address, without a port");
    if text.parse::<std::net::Ipv6Addr>().is_ok() {
        return Ok(text.to_owned());
    }
    match host_and_port(text) {
        Ok((host, None)) => Ok(host),
        _ => Err(invalid()),
    }
}

pub(super) fn flag(text: &str) -> Result<bool, InvalidValue> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(InvalidValue::new("expected true or false")),
    }
}

/// A whole number without a sign. `1_000` and `0x10` are none: they mean different things to
/// different readers of YAML.
pub(super) fn decimal(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// A time such as `30s`, `500ms`, `2m` or `1h 30m`.
pub(super) fn time(text: &str) -> Result<Duration, InvalidValue> {
    let expected = "expected a time with its unit, such as 500ms, 30s or 2m";
    humantime::parse_duration(text).map_err(|_| InvalidValue::new(expected))
}

/// Bytes: a plain number, or one with `B`, `KB`, `KiB`, `MB`, `MiB`, `GB`, `GiB`, `TB` or `TiB`.
/// `K` alone is refused: half of the world means 1000 by it.
pub(super) fn size(text: &str) -> Result<u64, InvalidValue> {
    let expected = || InvalidValue::new("expected bytes, such as 4096, 64KiB, 1MB or 1GiB");
    let digits = text
        .find(|symbol: char| !symbol.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number = decimal(number).ok_or_else(expected)?;
    let unit = UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit.trim_start()))
        .ok_or_else(expected)?;
    number.checked_mul(unit.1).ok_or_else(expected)
}

const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// The reverse of [`size`], in the largest binary unit without a remainder.
pub(super) fn show_size(bytes: u64) -> String {
    UNITS[1..6]
        .iter()
        .rev()
        .find(|(_, unit)| bytes.is_multiple_of(*unit))
        .map_or_else(String::new, |(name, unit)| {
            format!("{}{name}", bytes / unit)
        })
}

/// The reverse of [`time`].
pub(super) fn show_time(time: Duration) -> String {
    match time.as_secs() {
        seconds if seconds > 0 && seconds.is_multiple_of(3600) => format!("{}h", seconds / 3600),
        _ => humantime::format_duration(time).to_string(),
    }
}

/// Splits `host`, `host:port`, `[v6]` or `[v6]:port`, and checks both.
fn host_and_port(text: &str) -> Result<(String, Option<u16>), InvalidValue> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .ok_or_else(|| InvalidValue::new("the bracket is not closed"))?;
        host.parse::<std::net::Ipv6Addr>()
            .map_err(|_| InvalidValue::new("expected an IPv6 address between the brackets"))?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err(InvalidValue::new("expected a port after the brackets")),
        }
    } else {
        match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err(InvalidValue::new(
                    "an IPv6 address stands in brackets, such as [::1]:9090",
                ));
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let named = host.contains(':')
        || host.len() <= 253
            && host
                .strip_suffix('.')
                .unwrap_or(host)
                .split('.')
                .all(|label| (1..=63).contains(&label.len()) && label.bytes().all(word));
    if !named {
        return Err(InvalidValue::new("expected a host name or an IP address"));
    }
    let port = match port {
        None => None,
        Some(text) => Some(
            decimal(text)
                .and_then(|port| u16::try_from(port).ok())
                .filter(|port| *port > 0)
                .ok_or_else(|| InvalidValue::new("expected a port of 1 to 65535"))?,
        ),
    };
    Ok((host.to_owned(), port))
}

fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1B", 1),
            ("64KiB", 65_536),
            ("64 kib", 65_536),
            ("8KB", 8_000),
            ("1GiB", 1 << 30),
            ("2TB", 2_000_000_000_000),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "KiB",
            "64K",
            "-1",
            "1.5MiB",
            "0x10",
            "1_000",
            "99999999TiB",
            "1e3",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
        for (bytes, text) in [
            (64, "64B"),
            (8192, "8KiB"),
            (1 << 40, "1TiB"),
            (1500, "1500B"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }

    #[test]
    fn times() {
        assert_eq!(time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(time("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(time("0s"), Ok(Duration::ZERO));
        for text in ["", "30", "s", "-1s", "1x", "99999999999999999999s"] {
            assert!(time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn server_addresses() {
        for (text, shown) in [
            ("localhost:9090", "localhost:9090"),
            ("proxy.example.com", "proxy.example.com:9090"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("[::1]:9090", "[::1]:9090"),
            ("[::1]", "[::1]:9090"),
        ] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            ":9090",
            "a:0",
            "a:65536",
            "a:b",
            "::1",
            "[::1",
            "[a]:1",
            "http://a:1",
            "a b:1",
            "a..b",
            "a/b",
            "u@a:1",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn service_urls() {
        for (text, shown) in [
            ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("http://127.0.0.1:3000/", "http://127.0.0.1:3000"),
            ("HTTP://a", "http://a"),
            ("https://a:443", "https://a"),
            ("https://[::1]:80", "https://[::1]:80"),
            ("http://my_service:8000", "http://my_service:8000"),
        ] {
            assert_eq!(text.parse::<ServiceUrl>().unwrap().to_string(), shown);
        }
        for text in [
            "3000",
            "localhost:3000",
            "ftp://a",
            "http://",
            "http:///",
            "http://a/b",
            "http://a?x",
            "http://a#x",
            "http://u:p@a",
            "http://a:0",
            "http://a:",
            "http://a//",
            "http://a b",
        ] {
            assert!(text.parse::<ServiceUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn host_headers() {
        assert_eq!("preserve".parse(), Ok(HostHeader::Preserve));
        assert_eq!("target".parse(), Ok(HostHeader::Target));
        assert_eq!("a:80".parse(), Ok(HostHeader::Value("a:80".into())));
        for text in ["", "a\r\nb", "a b", "a/b"] {
            assert!(text.parse::<HostHeader>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn blocks_of_addresses() {
        let holds = |block: &str, address: &str| {
            block
                .parse::<Cidr>()
                .unwrap()
                .contains(address.parse().unwrap())
        };
        assert!(holds("10.0.0.0/8", "10.255.0.1"));
        assert!(holds("10.0.0.0/8", "::ffff:10.1.2.3"));
        assert!(!holds("10.0.0.0/8", "11.0.0.1"));
        assert!(holds("127.0.0.1", "127.0.0.1"));
        assert!(!holds("127.0.0.1", "127.0.0.2"));
        assert!(holds("0.0.0.0/0", "1.2.3.4"));
        assert!(!holds("0.0.0.0/0", "::1"));
        assert!(holds("::/0", "::1"));
        assert!(holds("fd00::/8", "fdff::1"));
        for text in [
            "",
            "10.0.0.0/33",
            "::/129",
            "a",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "10/8",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
