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
        let name = to_name(name)?;
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
        let name = to_name(name)?;
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
    let mut looks = MAX_OPTIONS;
    for (name, value) in headers {
        size += 4 + name.as_str().len() + value.len();
        if *name == CONNECTION {
            collect_named(headers, value.as_bytes(), &mut looks, &mut named);
        }
    }
    (size, named)
}

/// Adds the plain lines of `headers` that a Connection value names to `named`, at the cost of one
/// of the `looks` left for each option that might be one.
fn collect_named(
    headers: &HeaderMap,
    connection: &[u8],
    looks: &mut usize,
    named: &mut HeaderMap<()>,
) {
    for option in connection.split(|byte| *byte == b',').map(trim) {
        let usual = [&b"keep-alive"[..], b"close", b"upgrade", b"te"];
        if option.is_empty() || usual.iter().any(|word| option.eq_ignore_ascii_case(word)) {
            continue;
        }
        let Some(left) = looks.checked_sub(1) else {
            return;
        };
        *looks = left;
        if let Ok(name) = HeaderName::from_bytes(option)
            && kind(name.as_str()) == Kind::Plain
            && headers.contains_key(&name)
        {
            // Never refused: it holds no more names than `headers` does.
            let _ = named.try_insert(name, ());
        }
    }
}

/// How many options of Connection are looked up among the lines. No honest head has as many; a
/// hostile one of 64 KiB could have 32,000, milliseconds of work. The lines that later ones name
/// are passed on.
const MAX_OPTIONS: usize = 100;

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
/// Stricter than RFC 3986 in three points: no comma, which would make a joined pair of Host lines
/// look like one; no percent-encoding, which one engine decodes and the next doesn't (names in
/// other scripts are sent as Punycode); no literal of a future IP version, of which there is none.
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
    let name_end = bytes.iter().position(|byte| !IN_A_NAME[usize::from(*byte)]);
    match name_end {
        None => !bytes.is_empty(),
        Some(end) => end > 0 && bytes[end] == b':' && is_port(&bytes[end + 1..]),
    }
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

/// A name in lower case; those that each request gets here cost no allocation.
fn to_name(name: &[u8]) -> Result<HeaderName, InvalidLines> {
    const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
    const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
    const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
    const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
    match name {
        b"x-forwarded-for" => Ok(FORWARDED_FOR),
        b"x-forwarded-host" => Ok(FORWARDED_HOST),
        b"x-forwarded-proto" => Ok(FORWARDED_PROTO),
        b"x-request-id" => Ok(REQUEST_ID),
        _ => HeaderName::from_bytes(name).map_err(|_| InvalidLines::Name),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::{CONTENT_LENGTH, HOST, TE};
    use proptest::prelude::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            map.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        map
    }

    fn lines(lines: &[(&str, &str)]) -> Lines {
        let mut builder = LinesBuilder::default();
        for (name, value) in lines {
            builder.push(name.as_bytes(), value.as_bytes()).unwrap();
        }
        builder.finish()
    }

    fn texts(lines: &Lines) -> Vec<(String, String)> {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        lines.iter().map(|(n, v)| (text(n), text(v))).collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        expected.iter().map(own).collect()
    }

    fn check(lines: &[(&str, &str)]) -> Result<(), Refusal> {
        check_request(&Method::POST, b"/", Version::HTTP_11, &map(lines))
    }

    fn check_host(host: &str) -> Result<(), Refusal> {
        check(&[("host", host)])
    }

    fn id() -> RequestId {
        RequestIds::new([7; 16]).next_id()
    }

    /// The request's lines in the tunnel, without the ones every request gets.
    fn forwarded_plain(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        let forwarding = Forwarding::new("192.0.2.1".parse().unwrap(), false);
        let lines = forward_request(&map(lines), &forwarding, id).unwrap();
        let mut texts = texts(&lines);
        texts.retain(|(name, _)| !name.starts_with("x-forwarded") && name != "x-request-id");
        texts
    }

    fn forwarded_by(peer: &str, trusted: bool, lines: &[(&str, &str)]) -> Vec<(String, String)> {
        let forwarding = Forwarding::new(peer.parse().unwrap(), trusted);
        texts(&forward_request(&map(lines), &forwarding, id).unwrap())
    }

    #[test]
    fn host_lines_are_counted() {
        assert_eq!(check(&[]), Err(Refusal::MissingHost));
        assert_eq!(
            check(&[("host", "a"), ("host", "a")]),
            Err(Refusal::RepeatedHost)
        );
        let in_1_0 = |lines| check_request(&Method::GET, b"/", Version::HTTP_10, &map(lines));
        assert_eq!(in_1_0(&[]), Ok(()));
        assert_eq!(in_1_0(&[("host", "a")]), Ok(()));
        assert_eq!(
            in_1_0(&[("host", "a"), ("host", "b")]),
            Err(Refusal::RepeatedHost)
        );
        assert_eq!(
            check_request(&Method::GET, b"/", Version::HTTP_2, &map(&[("host", "a")])),
            Err(Refusal::Version)
        );
    }

    #[test]
    fn a_host_is_a_name_or_address_and_a_port() {
        for good in [
            "",
            "a",
            "example.com",
            "Example.COM:8100",
            "a_b-c.d~e",
            "a:",
            "a:0",
            "a:65535",
            "127.0.0.1:80",
            "[::1]",
            "[2001:db8::1]:8080",
            "[::ffff:1.2.3.4]",
            "xn--bcher-kva.example",
            "a!$&'()*+;=b",
        ] {
            assert_eq!(check_host(good), Ok(()), "{good:?}");
        }
        for bad in [
            ":80",
            "a:b",
            "a:65536",
            "a:+1",
            "a:1:2",
            "a b",
            "a,b",
            "a, b",
            "user@a",
            "user:pw@a",
            "a/b",
            "a?b",
            "a#b",
            "a\\b",
            "a\tb",
            "http://a",
            "::1",
            "[::1",
            "[::1]a",
            "[::1]:a",
            "[fe80::1%25eth0]",
            "[]",
            "[a]",
            "[1.2.3.4]",
            "[v1.a]",
            "a]",
            "%",
            "a%4",
            "%00",
            "b%C3%BCcher.example",
            "b\u{fc}cher",
            "<a>",
            "a\"",
        ] {
            assert_eq!(check_host(bad), Err(Refusal::InvalidHost), "{bad:?}");
        }
    }

    #[test]
    fn a_length_is_one_line_of_digits() {
        let with = |values: &[&str]| {
            let mut lines = vec![("host", "a")];
            lines.extend(values.iter().map(|value| ("content-length", *value)));
            check(&lines)
        };
        for good in ["0", "5", "007", "18446744073709551615"] {
            assert_eq!(with(&[good]), Ok(()), "{good:?}");
        }
        let bad = [
            "",
            "5, 5",
            "5,5",
            "+5",
            "-5",
            "5 5",
            "0x5",
            "5.0",
            "18446744073709551616",
            "\u{b2}",
        ];
        for bad in bad {
            assert_eq!(with(&[bad]), Err(Refusal::ContentLength), "{bad:?}");
        }
        assert_eq!(with(&["5", "5"]), Err(Refusal::ContentLength));
        assert_eq!(with(&["5", "6"]), Err(Refusal::ContentLength));
    }

    #[test]
    fn an_encoding_is_one_line_of_chunked() {
        let with = |version, values: &[&str]| {
            let mut lines = vec![("host", "a")];
            lines.extend(values.iter().map(|value| ("transfer-encoding", *value)));
            check_request(&Method::POST, b"/", version, &map(&lines))
        };
        for good in ["chunked", "Chunked", "CHUNKED", " chunked\t"] {
            assert_eq!(with(Version::HTTP_11, &[good]), Ok(()), "{good:?}");
            assert_eq!(
                with(Version::HTTP_10, &[good]),
                Err(Refusal::TransferEncoding)
            );
        }
        for bad in [
            "",
            "identity",
            "gzip",
            "gzip, chunked",
            "chunked, chunked",
            "chunked,",
            ",chunked",
            "chunked;a=b",
            "xchunked",
            "\"chunked\"",
        ] {
            let result = with(Version::HTTP_11, &[bad]);
            assert_eq!(result, Err(Refusal::TransferEncoding), "{bad:?}");
        }
        assert_eq!(
            with(Version::HTTP_11, &["chunked", "chunked"]),
            Err(Refusal::TransferEncoding)
        );
        for order in [
            [("transfer-encoding", "chunked"), ("content-length", "5")],
            [("content-length", "5"), ("transfer-encoding", "chunked")],
        ] {
            let mut lines = vec![("host", "a")];
            lines.extend(order);
            assert_eq!(check(&lines), Err(Refusal::LengthAndEncoding));
        }
    }

    #[test]
    fn a_target_has_one_of_the_forms() {
        let check = |method: Method, target: &[u8]| {
            check_request(&method, target, Version::HTTP_11, &map(&[("host", "a:1")]))
        };
        for good in [
            "/",
            "/%ff",
            "/a%2Fb?x=%3F",
            "//x/../y",
            "/?",
            "/a?b?c",
            "/\"<>\\^`{|}",
            "/http://b/",
            "http://a:1",
            "http://a:1/",
            "HTTP://A:1/x",
            "https://a:1?q",
        ] {
            assert_eq!(check(Method::GET, good.as_bytes()), Ok(()), "{good:?}");
        }
        for bad in [
            &b""[..],
            b"*",
            b"a",
            b"a:1",
            b"?q",
            b"/a b",
            b"/a\tb",
            b"/a\0",
            b"/\x7f",
            b"/\xff",
            "/ü".as_bytes(),
            b"/a#b",
            b"http://a:1/#",
            b"http:/a",
            b"http://",
            b"http:///x",
            b"http://u@a:1/",
            b"http://a:1\\x",
            b"ftp://a:1/",
            b"ws://a:1/",
            b"file:///etc/passwd",
        ] {
            let shown = String::from_utf8_lossy(bad);
            assert_eq!(check(Method::GET, bad), Err(Refusal::Target), "{shown:?}");
        }
        assert_eq!(check(Method::OPTIONS, b"*"), Ok(()));
        assert_eq!(check(Method::OPTIONS, b"**"), Err(Refusal::Target));
        for target in [&b"a:1"[..], b"/", b"http://a:1/"] {
            assert_eq!(check(Method::CONNECT, target), Err(Refusal::Connect));
        }
    }

    #[test]
    fn an_absolute_target_and_host_agree() {
        let check = |version, lines: &[(&str, &str)]| {
            check_request(
                &Method::GET,
                b"http://Example.com:81/",
                version,
                &map(lines),
            )
        };
        let (old, new) = (Version::HTTP_10, Version::HTTP_11);
        assert_eq!(check(new, &[("host", "example.COM:81")]), Ok(()));
        for other in ["example.com", "example.com:82", "", "x example.com:81"] {
            assert_eq!(
                check(new, &[("host", other)]),
                Err(Refusal::HostMismatch),
                "{other:?}"
            );
        }
        assert_eq!(check(new, &[]), Err(Refusal::MissingHost));
        assert_eq!(check(old, &[]), Ok(()));
        assert_eq!(check(old, &[("host", "b")]), Err(Refusal::HostMismatch));
    }

    #[test]
    fn refusals_have_names_of_their_own() {
        let all = [
            Refusal::Version,
            Refusal::Connect,
            Refusal::Target,
            Refusal::MissingHost,
            Refusal::RepeatedHost,
            Refusal::InvalidHost,
            Refusal::HostMismatch,
            Refusal::ContentLength,
            Refusal::TransferEncoding,
            Refusal::LengthAndEncoding,
        ];
        let names: std::collections::HashSet<_> = all.map(Refusal::as_str).into();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn end_to_end_lines_arrive_as_sent() {
        let sent = [
            ("host", "example.com"),
            ("content-length", "5"),
            ("expect", "100-continue"),
            ("trailer", "x-sum"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
            ("x-empty", ""),
            ("proxy-authorization", "Basic eA=="),
            ("x-forwarded-port", "1"),
            ("accept-encoding", "br"),
        ];
        let headers = map(&sent);
        let lines = forward_request(&headers, &Forwarding::new([1, 2, 3, 4].into(), false), id);
        let mut expected = sent.to_vec();
        let id = id();
        expected.extend([
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-host", "example.com"),
            ("x-forwarded-proto", "http"),
            ("x-request-id", id.as_str()),
        ]);
        assert_eq!(texts(&lines.unwrap()), pairs(&expected));
    }

    #[test]
    fn latin_1_values_stay_intact() {
        let mut headers = map(&[("host", "a")]);
        let value = HeaderValue::from_bytes(b"caf\xe9 \xff\x80").unwrap();
        headers.append("x-name", value.clone());
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let lines = forward_request(&headers, &forwarding, id).unwrap();
        let arrived = to_header_map(&lines, Direction::Request).unwrap();
        assert_eq!(arrived.get("x-name"), Some(&value));
        let lines = forward_response(&headers).unwrap();
        let arrived = to_header_map(&lines, Direction::Response).unwrap();
        assert_eq!(arrived.get("x-name"), Some(&value));
    }

    #[test]
    fn hop_by_hop_lines_end_here() {
        let hops = [
            ("connection", "Keep-Alive, X-Hop ,, x-absent"),
            ("connection", "x-second"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "gzip"),
            ("x-hop", "1"),
            ("x-hop", "2"),
            ("x-second", "3"),
            ("x-end", "4"),
        ];
        assert_eq!(forwarded_plain(&hops), pairs(&[("x-end", "4")]));
        let response = forward_response(&map(&hops)).unwrap();
        assert_eq!(texts(&response), pairs(&[("x-end", "4")]));
    }

    #[test]
    fn connection_options_are_looked_up_within_bounds() {
        let after = |options| format!("{}x-hop", "x-absent, close,".repeat(options));
        for (options, dropped) in [(MAX_OPTIONS - 1, true), (MAX_OPTIONS, false)] {
            let sent = [("connection", &*after(options)), ("x-hop", "1")];
            assert_eq!(forwarded_plain(&sent).is_empty(), dropped, "{options}");
        }
    }

    #[test]
    fn te_keeps_its_trailers_only() {
        for (te, kept) in [
            ("trailers", true),
            ("Trailers", true),
            ("gzip;q=0.5, trailers", true),
            ("gzip", false),
            ("xtrailers", false),
            ("", false),
        ] {
            let forwarded = forwarded_plain(&[("te", te), ("connection", "te")]);
            let expected: &[_] = if kept { &[("te", "trailers")] } else { &[] };
            assert_eq!(forwarded, pairs(expected), "{te:?}");
        }
    }

    #[test]
    fn connection_cannot_name_away_what_has_a_meaning() {
        let sent = [
            ("host", "a"),
            ("content-length", "1"),
            ("expect", "100-continue"),
            ("trailer", "x"),
            ("x-request-id", "r"),
            ("x-forwarded-for", "9.9.9.9"),
            ("x-real-ip", "9.9.9.9"),
        ];
        let names: Vec<_> = sent.iter().map(|(name, _)| *name).collect();
        let connection = names.join(",");
        let mut all = sent.to_vec();
        all.push(("connection", &connection));
        let forwarded = forwarded_by("1.2.3.4", true, &all);
        for (name, value) in sent {
            let line = forwarded.iter().find(|(n, _)| n == name);
            assert!(line.is_some_and(|(_, v)| v.starts_with(value)), "{name}");
        }
    }

    #[test]
    fn a_visitor_cannot_say_where_he_came_from() {
        let own = [
            ("host", "a"),
            ("forwarded", "for=9.9.9.9"),
            ("x-real-ip", "9.9.9.9"),
            ("x_real_ip", "9.9.9.9"),
            ("x-forwarded-for", "9.9.9.9"),
            ("x_forwarded_for", "9.9.9.9"),
            ("x-forwarded_for", "9.9.9.9"),
            ("x-forwarded-host", "evil"),
            ("x-forwarded-proto", "https"),
            ("x-request-id", "mine"),
        ];
        assert_eq!(
            forwarded_by("::ffff:1.2.3.4", false, &own),
            pairs(&[
                ("host", "a"),
                ("x-request-id", "mine"),
                ("x-forwarded-for", "1.2.3.4"),
                ("x-forwarded-host", "a"),
                ("x-forwarded-proto", "http"),
            ])
        );
    }

    #[test]
    fn a_trusted_proxy_says_where_a_request_came_from() {
        let sent = [
            ("host", "a"),
            ("forwarded", "for=9.9.9.9"),
            ("x-real-ip", "9.9.9.9"),
            ("x-forwarded-for", "9.9.9.9"),
            ("x-forwarded-for", "8.8.8.8, 7.7.7.7"),
            ("x-forwarded-host", "outside"),
            ("x-forwarded-proto", "https"),
            ("x-request-id", "theirs"),
        ];
        assert_eq!(
            forwarded_by("2001:db8::1", true, &sent),
            pairs(&[
                ("host", "a"),
                ("forwarded", "for=9.9.9.9"),
                ("x-real-ip", "9.9.9.9"),
                ("x-forwarded-host", "outside"),
                ("x-forwarded-proto", "https"),
                ("x-request-id", "theirs"),
                ("x-forwarded-for", "9.9.9.9, 8.8.8.8, 7.7.7.7, 2001:db8::1"),
            ])
        );
        let bare = forwarded_by("10.0.0.1", true, &[("host", "a"), ("x-request-id", "r")]);
        assert_eq!(
            bare,
            pairs(&[
                ("host", "a"),
                ("x-request-id", "r"),
                ("x-forwarded-for", "10.0.0.1"),
                ("x-forwarded-host", "a"),
                ("x-forwarded-proto", "http"),
            ])
        );
    }

    #[test]
    fn without_a_host_none_is_forwarded() {
        for sent in [&[][..], &[("host", "")]] {
            let forwarded = forwarded_by("10.0.0.1", false, sent);
            assert!(forwarded.iter().all(|(name, _)| name != "x-forwarded-host"));
        }
    }

    #[test]
    fn the_longest_address_fits() {
        let longest = "1111:2222:3333:4444:5555:6666:7777:8888";
        let forwarded = forwarded_by(longest, false, &[]);
        assert_eq!(forwarded[0].1, longest);
    }

    #[test]
    fn a_response_has_one_length_or_none() {
        let response = |lines| forward_response(&map(lines)).map(|lines| texts(&lines));
        let one = [("content-length", "5")];
        assert_eq!(response(&one), Ok(pairs(&one)));
        let beside_encoding = [
            ("content-length", "5"),
            ("content-length", "6"),
            ("transfer-encoding", "chunked"),
        ];
        assert_eq!(response(&beside_encoding), Ok(pairs(&[])));
        for bad in [
            &[("content-length", "5"), ("content-length", "5")][..],
            &[("content-length", "5, 5")],
            &[("content-length", "-1")],
        ] {
            assert_eq!(response(bad), Err(InvalidLines::ContentLength));
        }
    }

    #[test]
    fn a_response_keeps_its_lines() {
        let sent = [
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("location", "http://127.0.0.1:3000/x"),
            ("x-empty", ""),
            ("trailer", "x-sum"),
        ];
        let lines = forward_response(&map(&sent)).unwrap();
        assert_eq!(texts(&lines), pairs(&sent));
        let arrived = to_header_map(&lines, Direction::Response).unwrap();
        assert_eq!(arrived, map(&sent));
    }

    #[test]
    fn a_line_too_long_for_the_tunnel_is_refused() {
        let long = "x".repeat(65_536);
        let headers = map(&[("host", "a"), ("x-long", &long)]);
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let refused = forward_request(&headers, &forwarding, id);
        assert_eq!(refused, Err(LineTooLong));
        let refused = forward_response(&headers);
        assert_eq!(refused, Err(InvalidLines::TooLong(LineTooLong)));
        assert_eq!(forward_trailers(&headers), Err(LineTooLong));
    }

    #[test]
    fn a_peer_cannot_smuggle_framing() {
        let hostile = lines(&[
            ("Transfer-Encoding", "chunked"),
            ("connection", "close"),
            ("KEEP-ALIVE", "1"),
            ("proxy-connection", "close"),
            ("upgrade", "websocket"),
            ("te", "gzip"),
            ("content-length", "5"),
        ]);
        for direction in [Direction::Request, Direction::Response] {
            let arrived = to_header_map(&hostile, direction).unwrap();
            assert_eq!(arrived, map(&[("content-length", "5")]));
        }
        let repeated_length = [("content-length", "5"), ("Content-Length", "5")];
        let cases = [
            (&repeated_length[..], InvalidLines::ContentLength),
            (&[("content-length", "5, 5")], InvalidLines::ContentLength),
            (&[("content-length", "")], InvalidLines::ContentLength),
            (&[("host", "a"), ("HOST", "a")], InvalidLines::Host),
            (&[("", "a")], InvalidLines::Name),
            (&[("a b", "a")], InvalidLines::Name),
            (&[("a:", "a")], InvalidLines::Name),
            (&[("a\r\nb", "a")], InvalidLines::Name),
            (&[("\u{e9}", "a")], InvalidLines::Name),
            (&[("a", "b\r\nc: d")], InvalidLines::Value),
            (&[("a", "b\nc")], InvalidLines::Value),
            (&[("a", "b\rc")], InvalidLines::Value),
            (&[("a", "b\0c")], InvalidLines::Value),
        ];
        for (sent, error) in cases {
            for direction in [Direction::Request, Direction::Response] {
                assert_eq!(
                    to_header_map(&lines(sent), direction),
                    Err(error),
                    "{sent:?}"
                );
            }
            if !matches!(error, InvalidLines::ContentLength | InvalidLines::Host) {
                assert_eq!(to_trailer_map(&lines(sent)), Err(error), "{sent:?}");
            }
        }
    }

    #[test]
    fn te_reaches_the_service_with_its_connection_option() {
        let sent = lines(&[("te", "trailers"), ("connection", "close")]);
        let request = to_header_map(&sent, Direction::Request).unwrap();
        assert_eq!(request, map(&[("te", "trailers"), ("connection", "te")]));
        let response = to_header_map(&sent, Direction::Response).unwrap();
        assert!(!response.contains_key(TE) && !response.contains_key(CONNECTION));
    }

    #[test]
    fn more_lines_than_a_map_holds_are_refused() {
        let mut builder = LinesBuilder::default();
        for number in 0..30_000 {
            builder.push(format!("x{number}").as_bytes(), b"").unwrap();
        }
        let many = builder.finish();
        let refused = to_header_map(&many, Direction::Request);
        assert_eq!(refused, Err(InvalidLines::TooMany));
        assert_eq!(to_trailer_map(&many), Err(InvalidLines::TooMany));
    }

    #[test]
    fn values_share_the_memory_of_their_lines() {
        let sent = lines(&[("x-a", "value")]);
        let (_, inside) = sent.iter().next().unwrap();
        let arrived = to_header_map(&sent, Direction::Response).unwrap();
        assert_eq!(arrived["x-a"].as_bytes().as_ptr(), inside.as_ptr());
    }

    #[test]
    fn trailers_cannot_change_what_was_said() {
        let allowed = [
            ("x-sum", "1"),
            ("grpc-status", "0"),
            ("etag", "\"a\""),
            ("server-timing", "a;dur=1"),
            ("content-digest", "sha-256=:x:"),
            ("authentication-info", "a=b"),
        ];
        let refused = [
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "keep-alive",
            "upgrade",
            "te",
            "trailer",
            "expect",
            "range",
            "if-match",
            "if-none-match",
            "cache-control",
            "authorization",
            "proxy-authorization",
            "www-authenticate",
            "cookie",
            "set-cookie",
            "content-type",
            "content-encoding",
            "content-range",
            "location",
            "retry-after",
            "vary",
            "x-forwarded-for",
            "forwarded",
            "x-request-id",
        ];
        let mut sent = allowed.to_vec();
        sent.extend(refused.map(|name| (name, "x")));
        assert_eq!(
            texts(&forward_trailers(&map(&sent)).unwrap()),
            pairs(&allowed)
        );
        assert_eq!(to_trailer_map(&lines(&sent)).unwrap(), map(&allowed));
    }

    #[test]
    fn request_ids_are_hex_and_differ() {
        let mut ids = RequestIds::new([1; 16]);
        let mut other = RequestIds::new([2; 16]);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            for id in [ids.next_id(), other.next_id()] {
                let text = id.to_string();
                assert_eq!(text.len(), RequestId::LEN);
                assert!(text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
                assert!(seen.insert(text));
            }
        }
        let again = RequestIds::new([1; 16]).next_id();
        assert_eq!(again, RequestIds::new([1; 16]).next_id());
    }

    /// The lines of a request that passes the check, with anything else among them.
    fn good_head() -> impl Strategy<Value = Vec<(String, String)>> {
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let host = prop::sample::select(vec![("host", "a:80"), ("host", "[::1]"), ("host", "")]);
        let framing = prop::sample::select(vec![
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("x-none", ""),
        ]);
        let name = prop_oneof![
            prop::sample::select(vec![
                "connection",
                "te",
                "upgrade",
                "x-forwarded-for",
                "x_forwarded-for",
                "x-hop",
                "x-request-id",
            ])
            .prop_map(str::to_owned),
            "x-[a-z0-9_-]{0,16}",
        ];
        let value = prop_oneof![
            prop::sample::select(vec!["x-hop, close", "host, content-length", "trailers"])
                .prop_map(str::to_owned),
            "[ -~]{0,20}",
        ];
        let others = prop::collection::vec((name, value), 0..12);
        (host, framing, others)
            .prop_map(move |(host, framing, mut lines)| {
                lines.extend([own(host), own(framing)]);
                lines
            })
            .prop_shuffle()
    }

    proptest! {
        /// Whatever passes the check arrives at the service with one meaning.
        #[test]
        fn what_is_forwarded_is_unambiguous(sent in good_head(), trusted: bool, peer: IpAddr) {
            let sent: Vec<_> = sent.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            let headers = map(&sent);
            prop_assert_eq!(check(&sent), Ok(()));
            let lines = forward_request(&headers, &Forwarding::new(peer, trusted), id).unwrap();
            let arrived = to_header_map(&lines, Direction::Request).unwrap();

            prop_assert_eq!(arrived.get_all(HOST).iter().count(), 1);
            prop_assert_eq!(arrived.get(HOST), headers.get(HOST));
            prop_assert_eq!(arrived.get(CONTENT_LENGTH), headers.get(CONTENT_LENGTH));
            prop_assert!(!arrived.contains_key("transfer-encoding"));
            prop_assert_eq!(arrived.contains_key(CONNECTION), arrived.contains_key(TE));
            let forwarded_for: Vec<_> = arrived.get_all("x-forwarded-for").iter().collect();
            prop_assert_eq!(forwarded_for.len(), 1);
            let peer = peer.to_canonical().to_string();
            prop_assert!(forwarded_for[0].as_bytes().ends_with(peer.as_bytes()));
            prop_assert!(trusted || forwarded_for[0] == peer.as_str());
            prop_assert!(arrived.contains_key("x-request-id"));
        }

        /// A good authority is one for the URI parser too, with nothing before the host.
        #[test]
        fn a_good_host_is_an_authority(host in "[a-c0-9:.%@,\\[\\] -]{1,12}") {
            if is_authority(host.as_bytes()) {
                prop_assert!(!host.contains(['@', ',', ' ']));
                let authority: Result<http::uri::Authority, _> = host.parse();
                prop_assert!(authority.is_ok(), "{}", host);
            }
        }

        #[test]
        fn any_target_is_judged(target: Vec<u8>, host in "[ -~]{0,20}") {
            let headers = map(&[("host", &host)]);
            if check_request(&Method::GET, &target, Version::HTTP_11, &headers).is_ok() {
                prop_assert!(target.iter().all(|byte| (0x21..=0x7e).contains(byte)));
            }
        }

        #[test]
        fn any_lines_become_a_safe_map_or_none(
            sent in prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..6),
            request: bool,
        ) {
            let mut builder = LinesBuilder::default();
            for (name, value) in &sent {
                builder.push(name, value).unwrap();
            }
            let direction = if request { Direction::Request } else { Direction::Response };
            let lines = builder.finish();
            for map in [to_header_map(&lines, direction), to_trailer_map(&lines)].into_iter().flatten() {
                let clean = |value: &HeaderValue| {
                    !value.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0))
                };
                prop_assert!(map.values().all(clean));
            }
        }
    }
}
