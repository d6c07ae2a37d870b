//! What a proxy does to the lines of a head: pure functions.
//!
//! A request passes [`check_request`] before anything of it reaches an agent. Then
//! [`forward_request`] turns its lines into the tunnel's [`Lines`] without those that belong to
//! one connection only (RFC 9110, section 7.6.1) and with those that say where it came from;
//! [`forward_response`] and [`forward_trailers`] do the same for the way back. At the far end
//! [`to_header_map`] and [`to_trailer_map`] turn lines into what an HTTP engine writes, and trust
//! nothing of what the peer of a tunnel may have put into them.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

use http::header::{CONNECTION, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Version};
use thiserror::Error;

use crate::head::{LineTooLong, Lines, LinesBuilder};

/// Checks what an HTTP/1 request says of its target, host and framing.
///
/// HTTP engines are lenient where RFC 9112 leaves them the choice, and two that choose
/// differently are how one visitor's bytes become another's request. So the strict reading
/// stands here, in front of every agent:
///
/// * `target` is visible ASCII without `#`: in origin form, in absolute form with `http` or
///   `https` and no userinfo, or `*` with OPTIONS (RFC 9112, section 3.2). It is looked at as the
///   visitor wrote it and never decoded.
/// * HTTP/1.1 has exactly one Host line, HTTP/1.0 at most one; its value is a host and an optional
///   port, or empty. With a target in absolute form it names the same authority.
/// * Content-Length is one line of digits; Transfer-Encoding is one line that says `chunked`, in
///   HTTP/1.1 only, and never both.
///
/// hyper settles some conflicts before anyone sees its header map: of Content-Length beside
/// Transfer-Encoding only the latter is left, and of equal Content-Length lines one.
pub fn check_request(
    method: &Method,
    target: &[u8],
    version: Version,
    headers: &HeaderMap,
) -> Result<(), Refusal> {
    let http_1_1 = match version {
        Version::HTTP_11 => true,
        Version::HTTP_10 => false,
        _ => return Err(Refusal::Version),
    };
    let authority = check_target(method, target)?;

    let mut host = None;
    let mut has_length = false;
    let mut is_chunked = false;
    for (name, value) in headers {
        let value = value.as_bytes();
        match kind(name.as_str()) {
            Kind::Host if host.is_some() => return Err(Refusal::RepeatedHost),
            Kind::Host => host = Some(value),
            Kind::ContentLength if has_length || !is_length(value) => {
                return Err(Refusal::ContentLength);
            }
            Kind::ContentLength => has_length = true,
            Kind::TransferEncoding
                if is_chunked || !http_1_1 || !trim(value).eq_ignore_ascii_case(b"chunked") =>
            {
                return Err(Refusal::TransferEncoding);
            }
            Kind::TransferEncoding => is_chunked = true,
            _ => {}
        }
    }
    if has_length && is_chunked {
        return Err(Refusal::LengthAndEncoding);
    }
    match (host, authority) {
        (None, _) if http_1_1 => Err(Refusal::MissingHost),
        (None, _) => Ok(()),
        (Some(host), Some(authority)) if !host.eq_ignore_ascii_case(authority) => {
            Err(Refusal::HostMismatch)
        }
        // The authority has been checked, and this is the same.
        (Some(_), Some(_)) => Ok(()),
        (Some(host), None) if host.is_empty() || is_authority(host) => Ok(()),
        (Some(_), None) => Err(Refusal::InvalidHost),
    }
}

/// Why a request is refused before anything of it reaches an agent.
///
/// All of them are the visitor's fault: 400 and a close, but for [`Refusal::Connect`] (405) and
/// [`Refusal::Version`] (505).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Refusal {
    /// Neither HTTP/1.0 nor HTTP/1.1.
    #[error("the HTTP version isn't supported")]
    Version,
    /// CONNECT asks for a tunnel to anywhere, and an agent connects to its service only.
    #[error("CONNECT isn't supported")]
    Connect,
    /// The target has a form or a byte that RFC 9112, section 3.2 doesn't allow.
    #[error("the request target is invalid")]
    Target,
    /// HTTP/1.1 without a Host line.
    #[error("the Host header is missing")]
    MissingHost,
    /// More than one Host line.
    #[error("there is more than one Host header")]
    RepeatedHost,
    /// The Host line is no `host[:port]`.
    #[error("the Host header is invalid")]
    InvalidHost,
    /// The target is in absolute form and names another authority than the Host line.
    #[error("the Host header differs from the request target")]
    HostMismatch,
    /// Content-Length is repeated, a list, not digits, or beyond 64 bits.
    #[error("the Content-Length header is invalid")]
    ContentLength,
    /// Transfer-Encoding is repeated, something else than `chunked`, or sent in HTTP/1.0.
    #[error("the Transfer-Encoding header is invalid")]
    TransferEncoding,
    /// Content-Length beside Transfer-Encoding: the classic of request smuggling.
    #[error("Content-Length and Transfer-Encoding exclude each other")]
    LengthAndEncoding,
}

impl Refusal {
    /// A stable name for logs and the label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Connect => "connect",
            Self::Target => "target",
            Self::MissingHost => "missing_host",
            Self::RepeatedHost => "repeated_host",
            Self::InvalidHost => "invalid_host",
            Self::HostMismatch => "host_mismatch",
            Self::ContentLength => "content_length",
            Self::TransferEncoding => "transfer_encoding",
            Self::LengthAndEncoding => "length_and_encoding",
        }
    }
}

/// Whose requests are forwarded: made once a connection, used for each request on it.
#[derive(Debug, Clone)]
pub struct Forwarding {
    peer: Text<MAX_ADDRESS>,
    peer_is_trusted: bool,
}

impl Forwarding {
    /// For a visitor at `peer`; an IPv4 address in IPv6 clothes is written as IPv4.
    ///
    /// If `peer_is_trusted`, the visitor is a proxy whose word on where a request came from is
    /// taken.
    pub fn new(peer: IpAddr, peer_is_trusted: bool) -> Self {
        Self {
            peer: Text::of(peer.to_canonical()),
            peer_is_trusted,
        }
    }
}

/// The lines of a request for the tunnel; the request has passed [`check_request`].
///
/// * Dropped: Connection and the lines it names, Keep-Alive, Proxy-Connection, Transfer-Encoding,
///   Upgrade, and TE but for its `trailers`. Connection can't name away a line that this module
///   gives a meaning to, such as Host, Content-Length or X-Forwarded-For: it would change what
///   the request is.
/// * Kept: everything else, in order, values untouched. That includes Expect, Trailer, and
///   Proxy-Authorization, which is meant for a proxy that asks for it, and this one never does
///   (RFC 9110, section 11.7.2; nginx passes it too).
/// * Added: X-Forwarded-For with the peer's address, X-Forwarded-Host with the Host value,
///   X-Forwarded-Proto `http`, and X-Request-Id from `request_id` if there is none. A visitor's
///   own values of the first three, Forwarded and X-Real-IP are dropped, also when spelled with
///   underscores, which CGI and WSGI can't tell from hyphens. If the peer is trusted they are
///   kept, and its address is appended to X-Forwarded-For, as one line.
///
/// # Errors
/// [`LineTooLong`] if a name or value is beyond the tunnel's 65,535 bytes.
pub fn forward_request(
    headers: &HeaderMap,
    forwarding: &Forwarding,
    request_id: impl FnOnce() -> RequestId,
) -> Result<Lines, LineTooLong> {
    let (size, named) = survey(headers);
    let mut lines = LinesBuilder::with_capacity(size + ADDED_TO_A_REQUEST);
    let trusted = forwarding.peer_is_trusted;
    let mut host: &[u8] = b"";
    let mut accepts_trailers = false;
    let mut has_host = false;
    let mut has_proto = false;
    let mut has_request_id = false;
    let mut earlier_peers: Vec<&[u8]> = Vec::new();

    for (name, value) in headers {
        let bytes = value.as_bytes();
        match kind(name.as_str()) {
            Kind::Plain if named.contains_key(name) => continue,
            Kind::Plain | Kind::ContentLength | Kind::Kept => {}
            Kind::Host => host = bytes,
            Kind::RequestId => has_request_id = true,
            Kind::Te => {
                accepts_trailers |= names_trailers(bytes);
                continue;
            }
            Kind::Connection | Kind::TransferEncoding | Kind::OtherHop => continue,
            Kind::ForwardedFor => {
                if trusted {
                    earlier_peers.push(bytes);
                }
                continue;
            }
            Kind::ForwardedHost | Kind::ForwardedProto | Kind::OtherForwarded if !trusted => {
                continue;
            }
            Kind::ForwardedHost => has_host = true,
            Kind::ForwardedProto => has_proto = true,
            Kind::OtherForwarded => {}
        }
        lines.push(name.as_str().as_bytes(), bytes)?;
    }

    if accepts_trailers {
        lines.push(b"te", b"trailers")?;
    }
    let peer = forwarding.peer.as_bytes();
    if earlier_peers.is_empty() {
        lines.push(b"x-forwarded-for", peer)?;
    } else {
        earlier_peers.push(peer);
        lines.push(b"x-forwarded-for", &earlier_peers.join(&b", "[..]))?;
    }
    if !has_host && !host.is_empty() {
        lines.push(b"x-forwarded-host", host)?;
    }
    if !has_proto {
        // An agent's port speaks no TLS.
        lines.push(b"x-forwarded-proto", b"http")?;
    }
    if !has_request_id {
        lines.push(b"x-request-id", request_id().as_str().as_bytes())?;
    }
    Ok(lines.finish())
}

/// Room for the lines that [`forward_request`] adds, without the host.
const ADDED_TO_A_REQUEST: usize = 4 * 4 + 15 + MAX_ADDRESS + 16 + 17 + 4 + 12 + RequestId::LEN;

/// The longest text of an address: six groups of an IPv6 address and an IPv4 one.
const MAX_ADDRESS: usize = 45;

/// The lines of a service's answer, interim or final, for the tunnel.
///
/// Dropped are Connection and the lines it names, Keep-Alive, Proxy-Connection, TE,
/// Transfer-Encoding and Upgrade; and Content-Length beside Transfer-Encoding (RFC 9112,
/// section 6.3). Everything else is kept, in order, values untouched.
///
/// # Errors
/// [`InvalidLines::ContentLength`] if the length that is left is repeated or not a number, as the
/// visitor's side and the service's could read it differently; [`InvalidLines::TooLong`] if a
/// name or value is beyond the tunnel's 65,535 bytes. Either is the service's fault.
pub fn forward_response(headers: &HeaderMap) -> Result<Lines, InvalidLines> {
    let (size, named) = survey(headers);
    let mut lines = LinesBuilder::with_capacity(size);
    // Looked up only if there is a length, which an answer with an encoding seldom has.
    let mut has_length = false;
    for (name, value) in headers {
        match kind(name.as_str()) {
            Kind::Plain if named.contains_key(name) => continue,
            Kind::Connection | Kind::TransferEncoding | Kind::Te | Kind::OtherHop => continue,
            Kind::ContentLength => {
                if headers.contains_key(http::header::TRANSFER_ENCODING) {
                    continue;
                }
                if has_length || !is_length(value.as_bytes()) {
                    return Err(InvalidLines::ContentLength);
                }
                has_length = true;
            }
            _ => {}
        }
        lines.push(name.as_str().as_bytes(), value.as_bytes())?;
    }
    Ok(lines.finish())
}

/// The trailer lines for the tunnel, in either direction.
///
/// Fields that must not come after the body are dropped (RFC 9110, section 6.5.1): whoever merges
/// trailers into the head would change its framing, routing, authentication or content by them.
///
/// # Errors
/// [`LineTooLong`] if a name or value is beyond the tunnel's 65,535 bytes.
pub fn forward_trailers(trailers: &HeaderMap) -> Result<Lines, LineTooLong> {
    let mut lines = LinesBuilder::default();
    for (name, value) in trailers {
        if may_trail(name.as_str()) {
            lines.push(name.as_str().as_bytes(), value.as_bytes())?;
        }
    }
    Ok(lines.finish())
}

/// Which way lines travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the visitor to the service.
    Request,
    /// From the service to the visitor.
    Response,
}

/// Lines off the tunnel as what an HTTP engine writes. Values share the memory of `lines`.
///
/// The peer of a tunnel may send anything. So lines that would change the framing of the message
/// or of its connection (Connection, Keep-Alive, Proxy-Connection, Transfer-Encoding, Upgrade)
/// are dropped, and what isn't an unambiguous head is refused. TE is dropped but for `trailers`
/// in a request, which brings the Connection line that must name it (RFC 9110, section 10.1.4).
///
/// # Errors
/// See [`InvalidLines`]. The lines are the peer's fault, and the exchange is over.
pub fn to_header_map(lines: &Lines, direction: Direction) -> Result<HeaderMap, InvalidLines> {
    let mut accepts_trailers = false;
    let mut map =
        HeaderMap::try_with_capacity(lines.iter().count()).map_err(|_| InvalidLines::TooMany)?;
    for (name, value) in lines.iter() {
        let name = HeaderName::from_bytes(name).map_err(|_| InvalidLines::Name)?;
        let repeated = match kind(name.as_str()) {
            Kind::Connection | Kind::TransferEncoding | Kind::OtherHop => continue,
            Kind::Te => {
                accepts_trailers |= direction == Direction::Request && names_trailers(value);
                continue;
            }
            Kind::ContentLength if !is_length(value) => return Err(InvalidLines::ContentLength),
            Kind::ContentLength => Some(InvalidLines::ContentLength),
            Kind::Host => Some(InvalidLines::Host),
            _ => None,
        };
        let value = to_value(lines, value)?;
        let seen = map
            .try_append(name, value)
            .map_err(|_| InvalidLines::TooMany)?;
        if let (true, Some(error)) = (seen, repeated) {
            return Err(error);
        }
    }
    if accepts_trailers {
        map.try_insert(http::header::TE, HeaderValue::from_static("trailers"))
            .map_err(|_| InvalidLines::TooMany)?;
        map.try_insert(CONNECTION, HeaderValue::from_static("te"))
            .map_err(|_| InvalidLines::TooMany)?;
    }
    Ok(map)
}

/// Trailer lines off the tunnel as what an HTTP engine writes, without fields that must not come
/// after the body.
///
/// # Errors
/// [`InvalidLines::Name`], [`InvalidLines::Value`] and [`InvalidLines::TooMany`].
pub fn to_trailer_map(lines: &Lines) -> Result<HeaderMap, InvalidLines> {
    let mut map =
        HeaderMap::try_with_capacity(lines.iter().count()).map_err(|_| InvalidLines::TooMany)?;
    for (name, value) in lines.iter() {
        let name = HeaderName::from_bytes(name).map_err(|_| InvalidLines::Name)?;
        if may_trail(name.as_str()) {
            map.try_append(name, to_value(lines, value)?)
                .map_err(|_| InvalidLines::TooMany)?;
        }
    }
    Ok(map)
}

/// Why lines can't be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidLines {
    /// A name isn't a token (RFC 9110, section 5.6.2).
    #[error("a header name is invalid")]
    Name,
    /// A value has a control character in it, such as a line break.
    #[error("a header value is invalid")]
    Value,
    /// Content-Length is repeated, a list, not digits, or beyond 64 bits.
    #[error("the Content-Length header is invalid")]
    ContentLength,
    /// There is more than one Host line.
    #[error("there is more than one Host header")]
    Host,
    /// More lines than a header map holds (24,576).
    #[error("there are too many header lines")]
    TooMany,
    /// A name or value is too long for the tunnel.
    #[error(transparent)]
    TooLong(#[from] LineTooLong),
}

/// Names one request in logs on both sides of the tunnel: 128 bits as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId([u8; RequestId::LEN]);

impl RequestId {
    /// The length of its text, in bytes.
    pub const LEN: usize = 32;

    /// The hex digits.
    pub fn as_str(&self) -> &str {
        // Only hex digits are ever written into it.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl std::fmt::Debug for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Makes [`RequestId`]s, one generator a thread, seeded once from the operating system's source.
///
/// Unique, not secret: each half is SplitMix64, a counter behind a bijection, so that one
/// generator never repeats itself and two meet only if their seeds do. Whoever sees an id can
/// compute the next; nothing may be granted for knowing one.
#[derive(Debug, Clone)]
pub struct RequestIds {
    high: u64,
    low: u64,
}

impl RequestIds {
    /// A generator that begins at `seed`, 16 random bytes.
    pub fn new(seed: [u8; 16]) -> Self {
        let seed = u128::from_le_bytes(seed);
        Self {
            high: (seed >> 64) as u64,
            low: seed as u64,
        }
    }

    /// The next id. A few nanoseconds: no lock, no system call, no allocation.
    pub fn next_id(&mut self) -> RequestId {
        // Two odd increments: the golden ratio's and the silver ratio's fraction.
        self.high = self.high.wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.low = self.low.wrapping_add(0x6a09_e667_f3bc_c909);
        let number = u128::from(mix(self.high)) << 64 | u128::from(mix(self.low));
        let mut text = [0; RequestId::LEN];
        for (two, byte) in text.chunks_exact_mut(2).zip(number.to_be_bytes()) {
            two[0] = HEX[usize::from(byte >> 4)];
            two[1] = HEX[usize::from(byte & 15)];
        }
        RequestId(text)
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// The finalizer of SplitMix64, a bijection.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a line is to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing to us: passed on, unless Connection names it.
    Plain,
    /// Passed on, whatever Connection says: Expect, Trailer.
    Kept,
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Te,
    /// For one connection only: Keep-Alive, Proxy-Connection, Upgrade.
    OtherHop,
    ForwardedFor,
    ForwardedHost,
    ForwardedProto,
    /// Forwarded, X-Real-IP, and all five spelled with underscores.
    OtherForwarded,
    RequestId,
}

/// Sorts a lower-case name. By length first: most names are done after that one comparison.
fn kind(name: &str) -> Kind {
    match name.len() {
        2 if name == "te" => Kind::Te,
        4 if name == "host" => Kind::Host,
        6 if name == "expect" => Kind::Kept,
        7 => match name {
            "trailer" => Kind::Kept,
            "upgrade" => Kind::OtherHop,
            _ => Kind::Plain,
        },
        9 => match name {
            "forwarded" | "x-real-ip" | "x_real_ip" | "x-real_ip" | "x_real-ip" => {
                Kind::OtherForwarded
            }
            _ => Kind::Plain,
        },
        10 => match name {
            "connection" => Kind::Connection,
            "keep-alive" => Kind::OtherHop,
            _ => Kind::Plain,
        },
        12 if name == "x-request-id" => Kind::RequestId,
        14 if name == "content-length" => Kind::ContentLength,
        15 => forwarded(name, "x-forwarded-for", Kind::ForwardedFor),
        16 if name == "proxy-connection" => Kind::OtherHop,
        16 => forwarded(name, "x-forwarded-host", Kind::ForwardedHost),
        17 if name == "transfer-encoding" => Kind::TransferEncoding,
        17 => forwarded(name, "x-forwarded-proto", Kind::ForwardedProto),
        _ => Kind::Plain,
    }
}

/// Whether `name` is `pattern` (`exact`), or looks like it to CGI.
fn forwarded(name: &str, pattern: &str, exact: Kind) -> Kind {
    if name == pattern {
        return exact;
    }
    let same = |(a, b): (u8, u8)| a == b || (a == b'_' && b == b'-');
    if name.bytes().zip(pattern.bytes()).all(same) {
        Kind::OtherForwarded
    } else {
        Kind::Plain
    }
}

/// What the lines take in the tunnel, in bytes, and the plain ones that Connection names.
fn survey(headers: &HeaderMap) -> (usize, HeaderMap<()>) {
    let mut size = 0;
    let mut named = HeaderMap::default();
    for (name, value) in headers {
        size += 4 + name.as_str().len() + value.len();
        if *name == CONNECTION {
            collect_named(headers, value.as_bytes(), &mut named);
        }
    }
    (size, named)
}

/// Adds the plain lines of `headers` that a Connection value names to `named`.
///
/// A hashed set of lines that exist: however many options a visitor lists, each costs one look.
fn collect_named(headers: &HeaderMap, connection: &[u8], named: &mut HeaderMap<()>) {
    for option in connection.split(|byte| *byte == b',').map(trim) {
        let usual = [&b"keep-alive"[..], b"close", b"upgrade", b"te"];
        if option.is_empty() || usual.iter().any(|word| option.eq_ignore_ascii_case(word)) {
            continue;
        }
        if let Ok(name) = HeaderName::from_bytes(option)
            && kind(name.as_str()) == Kind::Plain
            && headers.contains_key(&name)
        {
            // Never refused: it holds no more names than `headers` does.
            let _ = named.try_insert(name, ());
        }
    }
}

/// Whether a field may come after the body.
///
/// Refused is what RFC 9110, section 6.5.1 speaks of: framing, routing, request modifiers,
/// authentication, response control and content. Content-Digest may come (RFC 9530), and so may
/// Authentication-Info (RFC 9110, section 11.6.3) and ETag.
fn may_trail(name: &str) -> bool {
    if kind(name) != Kind::Plain {
        return false;
    }
    match name {
        "content-digest" => true,
        "age"
        | "authorization"
        | "cache-control"
        | "cookie"
        | "date"
        | "expires"
        | "location"
        | "max-forwards"
        | "pragma"
        | "proxy-authenticate"
        | "proxy-authorization"
        | "range"
        | "retry-after"
        | "set-cookie"
        | "vary"
        | "warning"
        | "www-authenticate" => false,
        _ => !name.starts_with("content-") && !name.starts_with("if-"),
    }
}

/// The authority of a target in absolute form, once the target has been found good.
fn check_target<'a>(method: &Method, target: &'a [u8]) -> Result<Option<&'a [u8]>, Refusal> {
    if *method == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    // No early exit: short targets are the rule, and a loop without one is vectorised.
    let visible = target.iter().fold(true, |good, byte| {
        good & byte.is_ascii_graphic() & (*byte != b'#')
    });
    if !visible {
        return Err(Refusal::Target);
    }
    match target {
        [b'/', ..] => Ok(None),
        b"*" if *method == Method::OPTIONS => Ok(None),
        _ => {
            let authority = absolute_authority(target).ok_or(Refusal::Target)?;
            Ok(Some(authority))
        }
    }
}

/// The authority in `http://authority/path?query`, if it is a valid one.
fn absolute_authority(target: &[u8]) -> Option<&[u8]> {
    let after_scheme = |scheme: &[u8]| {
        let (start, rest) = target.split_at_checked(scheme.len())?;
        start.eq_ignore_ascii_case(scheme).then_some(rest)
    };
    let rest = after_scheme(b"http://").or_else(|| after_scheme(b"https://"))?;
    let end = rest
        .iter()
        .position(|byte| matches!(byte, b'/' | b'?'))
        .unwrap_or(rest.len());
    let authority = &rest[..end];
    is_authority(authority).then_some(authority)
}

/// Whether `bytes` is `uri-host [":" port]` with a host that isn't empty (RFC 9110, section 7.2).
///
/// Stricter than RFC 3986 in two points: no comma, which would make a joined pair of Host lines
/// look like one, and no literal of a future IP version, of which there is none.
fn is_authority(bytes: &[u8]) -> bool {
    if let Some(literal) = bytes.strip_prefix(b"[") {
        let Some(end) = literal.iter().position(|byte| *byte == b']') else {
            return false;
        };
        let (address, rest) = (&literal[..end], &literal[end + 1..]);
        let is_address =
            std::str::from_utf8(address).is_ok_and(|address| address.parse::<Ipv6Addr>().is_ok());
        return is_address && (rest.is_empty() || rest.strip_prefix(b":").is_some_and(is_port));
    }
    let mut index = 0;
    while let Some(byte) = bytes.get(index) {
        match byte {
            b'%' => {
                let hex = bytes.get(index + 1..index + 3).unwrap_or_default();
                if hex.len() != 2 || !hex.iter().all(u8::is_ascii_hexdigit) {
                    return false;
                }
                index += 2;
            }
            b':' => return index > 0 && is_port(&bytes[index + 1..]),
            byte if !IN_A_NAME[usize::from(*byte)] => return false,
            _ => {}
        }
        index += 1;
    }
    !bytes.is_empty()
}

/// The bytes of a registered name (RFC 3986, section 3.2.2): unreserved ones and sub-delimiters,
/// without the comma.
static IN_A_NAME: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric()
            || matches!(
                byte as u8,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b';'
                    | b'='
            );
        byte += 1;
    }
    table
};

/// Whether `digits` is a port; RFC 3986, section 3.2.3 lets it be empty.
fn is_port(digits: &[u8]) -> bool {
    digits.is_empty() || number(digits).is_some_and(|port| port <= u64::from(u16::MAX))
}

/// Whether `value` is one length in digits that 64 bits hold (RFC 9110, section 8.6).
fn is_length(value: &[u8]) -> bool {
    number(trim(value)).is_some()
}

fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0, add)
}

/// Whether a TE value has the member `trailers` (RFC 9110, section 10.1.4).
fn names_trailers(te: &[u8]) -> bool {
    te.split(|byte| *byte == b',')
        .any(|member| trim(member).eq_ignore_ascii_case(b"trailers"))
}

/// Without the white space around it that RFC 9110, section 5.6.3 calls optional.
fn trim(bytes: &[u8]) -> &[u8] {
    let mut bytes = bytes;
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// A value that shares the memory of the lines it stands in.
fn to_value(lines: &Lines, value: &[u8]) -> Result<HeaderValue, InvalidLines> {
    HeaderValue::from_maybe_shared(lines.share(value)).map_err(|_| InvalidLines::Value)
}

/// A short text in place.
#[derive(Debug, Clone)]
struct Text<const MAX: usize> {
    bytes: [u8; MAX],
    len: usize,
}

impl<const MAX: usize> Text<MAX> {
    /// What `value` displays, as far as there is room.
    fn of(value: impl std::fmt::Display) -> Self {
        let mut text = Self {
            bytes: [0; MAX],
            len: 0,
        };
        // Fails only for want of room, and `MAX` is the longest there is.
        let _ = write!(text, "{value}");
        text
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl<const MAX: usize> std::fmt::Write for Text<MAX> {
    fn write_str(&mut self, part: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.len..self.len + part.len());
        room.ok_or(std::fmt::Error)?
            .copy_from_slice(part.as_bytes());
        self.len += part.len();
        Ok(())
    }
}
