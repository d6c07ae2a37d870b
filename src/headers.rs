//! What a proxy does to the lines of a head: pure functions.
//!
//! A request passes [`check_request`] before anything of it reaches an agent. Then
//! [`forward_request`] turns its lines into the tunnel's [`Lines`] without those that belong to
//! one connection only (RFC 9110, section 7.6.1) and with those that say where it came from;
//! [`check_response`], [`forward_response`] and [`forward_trailers`] do the same for the way back.
//! At the far end [`sendable`] and [`sendable_trailers`] hand out the lines that are to be
//! written, and trust nothing of what the peer of a tunnel may have put into them.
//!
//! Lines are pairs of a name and a value. Names are compared without regard to case, and passed on
//! as they were written.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

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
pub fn check_request<'a>(
    method: &[u8],
    target: &[u8],
    version: Version,
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<RequestFacts, Refusal> {
    let authority = check_target(method, target)?;

    let mut host = None;
    let mut length = None;
    let mut is_chunked = false;
    let mut connection = Persistence::default();
    let mut expects_continue = false;
    let mut offers = false;
    for (name, value) in fields {
        match kind(name) {
            Kind::Plain => {}
            Kind::Host if host.is_some() => return Err(Refusal::RepeatedHost),
            Kind::Host => host = Some(value),
            Kind::ContentLength => match number(trim(value)) {
                Some(bytes) if length.is_none() => length = Some(bytes),
                _ => return Err(Refusal::ContentLength),
            },
            Kind::TransferEncoding
                if is_chunked || version == Version::Http10 || !is_chunked_only(value) =>
            {
                return Err(Refusal::TransferEncoding);
            }
            Kind::TransferEncoding => is_chunked = true,
            Kind::Connection => connection.read(value),
            Kind::Expect => expects_continue |= value.eq_ignore_ascii_case(b"100-continue"),
            Kind::Upgrade => offers |= protocols(value).next().is_some(),
            _ => {}
        }
    }
    match (host, authority) {
        (None, _) if version == Version::Http11 => return Err(Refusal::MissingHost),
        (Some(host), Some(authority)) if !host.eq_ignore_ascii_case(authority) => {
            return Err(Refusal::HostMismatch);
        }
        (Some(host), None) if !host.is_empty() && !is_authority(host) => {
            return Err(Refusal::InvalidHost);
        }
        // The authority has been checked, and where there is a host too, it is the same.
        _ => {}
    }
    let framing = match (length, is_chunked) {
        (Some(_), true) => return Err(Refusal::LengthAndEncoding),
        (_, true) => Framing::Chunked,
        (length, false) => Framing::Length(length.unwrap_or(0)),
    };
    Ok(RequestFacts {
        framing,
        persistent: connection.persists(version),
        // RFC 9110, section 10.1.1: in HTTP/1.0 it means nothing.
        expects_continue: expects_continue && version == Version::Http11,
        // RFC 9110, section 7.8: the line counts if Connection names it, and not in HTTP/1.0.
        upgrades: offers
            && connection.upgrade
            && version == Version::Http11
            && framing == Framing::Length(0),
    })
}

/// A version of HTTP/1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
}

/// How the end of a body is told (RFC 9112, section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// It has so many bytes. None is the same as no body.
    Length(u64),
    /// It comes in chunks.
    Chunked,
    /// It ends with the connection. Only of an answer.
    UntilClose,
}

/// What a request's head says of the message and the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestFacts {
    /// The body's framing.
    pub framing: Framing,
    /// The connection can be used again.
    pub persistent: bool,
    /// The visitor sends his body only when he is told to go on, or after a while of his own.
    pub expects_continue: bool,
    /// The visitor would go on with another protocol on the connection (RFC 9110, section 7.8).
    /// Only of a request without a body: where one ends and the other protocol begins, nobody
    /// has to agree upon then. HTTP/2 isn't among these protocols.
    pub upgrades: bool,
}

/// What the Connection lines of a head say of what becomes of the connection (RFC 9112, section
/// 9.3, and RFC 9110, section 7.8).
#[derive(Debug, Clone, Copy, Default)]
struct Persistence {
    close: bool,
    keep_alive: bool,
    upgrade: bool,
}

impl Persistence {
    fn read(&mut self, connection: &[u8]) {
        for option in connection.split(|byte| *byte == b',').map(trim) {
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            self.upgrade |= option.eq_ignore_ascii_case(b"upgrade");
        }
    }

    fn persists(self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }
}

/// Why a request is refused before anything of it reaches an agent.
///
/// All of them are the visitor's fault: 400 and a close, but for [`Refusal::Connect`] (405) and
/// [`Refusal::Version`] (505).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Refusal {
    /// Bytes that are no HTTP/1 head.
    #[error("the request is malformed")]
    Syntax,
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
    /// Content-Length is repeated, a list, not digits, or 2^63 and more.
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
            Self::Syntax => "syntax",
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
///   HTTP2-Settings, and TE but for its `trailers`. Connection can't name away a line that this
///   module gives a meaning to, such as Host, Content-Length or X-Forwarded-For: it would change
///   what the request is.
/// * Upgrade becomes one line with the protocols in it but `h2c`, if `upgrade` says so; else it
///   is dropped. `upgrade` is for a request that asks for it ([`RequestFacts::upgrades`]), on its
///   way to an agent that knows what to do with it.
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
pub fn forward_request<'a>(
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])> + Clone,
    forwarding: &Forwarding,
    upgrade: bool,
    request_id: impl FnOnce() -> RequestId,
) -> Result<Lines, LineTooLong> {
    let (size, named) = survey(fields.clone());
    let mut lines = LinesBuilder::with_capacity(size + ADDED_TO_A_REQUEST);
    let trusted = forwarding.peer_is_trusted;
    let mut host: &[u8] = b"";
    let mut accepts_trailers = false;
    let mut has_host = false;
    let mut has_proto = false;
    let mut has_request_id = false;
    let mut earlier_peers: Vec<&[u8]> = Vec::new();
    let mut offered: Vec<&[u8]> = Vec::new();

    for (name, bytes) in fields {
        match kind(name) {
            Kind::Plain if named.contain(name) => continue,
            Kind::Plain | Kind::ContentLength | Kind::Expect | Kind::Trailer => {}
            Kind::Host => host = bytes,
            Kind::RequestId => has_request_id = true,
            Kind::Te => {
                accepts_trailers |= names_trailers(bytes);
                continue;
            }
            Kind::Upgrade => {
                if upgrade {
                    offered.extend(protocols(bytes));
                }
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
        lines.push(name, bytes)?;
    }

    if accepts_trailers {
        lines.push(b"te", b"trailers")?;
    }
    if !offered.is_empty() {
        lines.push(b"upgrade", &offered.join(&b", "[..]))?;
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

/// Checks what an answer's head says of its framing and of the connection (RFC 9112, section 6.3).
///
/// `to_head`: it answers a HEAD, and has no body whatever it says.
///
/// # Errors
/// [`InvalidLines::ContentLength`] if the length is repeated or not a number, as the visitor's
/// side and the service's could read it differently; [`InvalidLines::TransferEncoding`] if there
/// is another encoding than `chunked`, which can't be passed on. Either is the service's fault.
pub fn check_response<'a>(
    status: u16,
    version: Version,
    to_head: bool,
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<ResponseFacts, InvalidLines> {
    let mut length = None;
    let mut is_chunked = false;
    let mut connection = Persistence::default();
    for (name, value) in fields {
        match kind(name) {
            Kind::ContentLength => match number(trim(value)) {
                Some(bytes) if length.is_none() => length = Some(bytes),
                _ => return Err(InvalidLines::ContentLength),
            },
            Kind::TransferEncoding if is_chunked || !is_chunked_only(value) => {
                return Err(InvalidLines::TransferEncoding);
            }
            Kind::TransferEncoding => is_chunked = true,
            Kind::Connection => connection.read(value),
            _ => {}
        }
    }
    let bodiless = to_head || matches!(status, 100..=199 | 204 | 304);
    let framing = match length {
        _ if bodiless => Framing::Length(0),
        _ if is_chunked => Framing::Chunked,
        Some(length) => Framing::Length(length),
        None => Framing::UntilClose,
    };
    // Conflicting or impossible framing is believed this once, and never again on the same
    // connection (RFC 9112, sections 6.1 and 6.3).
    let doubtful = is_chunked && (length.is_some() || version == Version::Http10);
    Ok(ResponseFacts {
        framing,
        persistent: framing != Framing::UntilClose && !doubtful && connection.persists(version),
    })
}

/// What an answer's head says of the message and the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponseFacts {
    /// The body's framing.
    pub framing: Framing,
    /// The connection can be used again.
    pub persistent: bool,
}

/// The lines of a service's answer, interim or final, for the tunnel; the final one's have passed
/// [`check_response`].
///
/// Dropped are Connection and the lines it names, Keep-Alive, Proxy-Connection, TE and
/// Transfer-Encoding; and Content-Length beside Transfer-Encoding (RFC 9112, section 6.3). Upgrade
/// is dropped but where it belongs to what the status says: in a 101, and in a 426 (RFC 9110,
/// section 15.5.22), there as one line. Everything else is kept, in order, values untouched.
///
/// # Errors
/// [`LineTooLong`] if a name or value is beyond the tunnel's 65,535 bytes.
pub fn forward_response<'a>(
    status: u16,
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])> + Clone,
) -> Result<Lines, LineTooLong> {
    let (size, named) = survey(fields.clone());
    let mut lines = LinesBuilder::with_capacity(size);
    let mut named_protocols: Vec<&[u8]> = Vec::new();
    for (name, value) in fields.clone() {
        match kind(name) {
            Kind::Plain if named.contain(name) => continue,
            Kind::Upgrade => {
                if matches!(status, 101 | 426) {
                    named_protocols.extend(protocols(value));
                }
                continue;
            }
            Kind::Connection | Kind::TransferEncoding | Kind::Te | Kind::OtherHop => continue,
            // Looked up only if there is a length, which an answer with an encoding seldom has.
            Kind::ContentLength
                if fields
                    .clone()
                    .into_iter()
                    .any(|(name, _)| kind(name) == Kind::TransferEncoding) =>
            {
                continue;
            }
            _ => {}
        }
        lines.push(name, value)?;
    }
    if !named_protocols.is_empty() {
        lines.push(b"upgrade", &named_protocols.join(&b", "[..]))?;
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
pub fn forward_trailers<'a>(
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<Lines, LineTooLong> {
    let mut lines = LinesBuilder::default();
    for (name, value) in fields {
        if may_trail(name) {
            lines.push(name, value)?;
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

/// Hands the lines off the tunnel that are to be written to `write`, and says what they mean.
///
/// The peer of a tunnel may send anything. So lines that would change the framing of the message
/// or of its connection (Connection, Keep-Alive, Proxy-Connection, Transfer-Encoding) are
/// dropped, and what isn't an unambiguous head is refused. TE is dropped but for `trailers` in a
/// request, and Upgrade but for [`offered`] protocols in a request without a body; they bring the
/// Connection line that must name them (RFC 9110, sections 10.1.4 and 7.8). Content-Length isn't
/// handed out either, nor the Upgrade line of an answer: whoever writes the head writes them, if
/// they fit.
///
/// # Errors
/// See [`InvalidLines`]. The lines are the peer's fault, and the exchange is over; some may have
/// been handed out before.
pub fn sendable(
    lines: &Lines,
    direction: Direction,
    mut write: impl FnMut(&[u8], &[u8]),
) -> Result<LineFacts, InvalidLines> {
    let mut facts = LineFacts::default();
    let mut accepts_trailers = false;
    let mut upgrade = None;
    for (name, value) in lines.iter() {
        match kind(name) {
            Kind::Upgrade => {
                if direction == Direction::Request && upgrade.is_none() && are_protocols(value) {
                    upgrade = Some(value);
                }
                continue;
            }
            Kind::Connection | Kind::TransferEncoding | Kind::OtherHop => continue,
            Kind::Te => {
                accepts_trailers |= direction == Direction::Request && names_trailers(value);
                continue;
            }
            Kind::ContentLength => match number(trim(value)) {
                Some(length) if facts.length.is_none() => {
                    facts.length = Some(length);
                    continue;
                }
                _ => return Err(InvalidLines::ContentLength),
            },
            // In an answer it is a line like any other.
            Kind::Host if direction == Direction::Response => {}
            Kind::Host if facts.has_host => return Err(InvalidLines::Host),
            Kind::Host => facts.has_host = true,
            Kind::Expect => {
                facts.expects_continue |= value.eq_ignore_ascii_case(b"100-continue");
            }
            _ => {}
        }
        check_line(name, value)?;
        write(name, value);
    }
    // Whoever has a body to send can't say where it ends and the other protocol begins.
    let upgrade = upgrade.filter(|_| facts.length.unwrap_or(0) == 0);
    if accepts_trailers {
        write(b"te", b"trailers");
    }
    if let Some(protocols) = upgrade {
        write(b"upgrade", protocols);
    }
    match (accepts_trailers, upgrade.is_some()) {
        (true, true) => write(b"connection", b"upgrade, te"),
        (true, false) => write(b"connection", b"te"),
        (false, true) => write(b"connection", b"upgrade"),
        (false, false) => {}
    }
    Ok(facts)
}

/// The protocols that a head off the tunnel names in its Upgrade line: those that a request
/// offers, or those that an answer speaks of. None if there is no such line, or if it is anything
/// else than a list of protocols; of several lines the first counts.
pub fn offered(lines: &Lines) -> Option<&[u8]> {
    lines
        .iter()
        .find(|(name, value)| kind(name) == Kind::Upgrade && are_protocols(value))
        .map(|(_, value)| value)
}

/// Whether `answer`, the lines of a 101 off the tunnel or on the way there, goes on with nothing
/// but protocols of the `offer` (RFC 9110, section 15.2.2).
pub fn goes_on_as_offered(offer: &[u8], answer: &Lines) -> bool {
    let is_offered = |chosen: &[u8]| protocols(offer).any(|one| one.eq_ignore_ascii_case(chosen));
    offered(answer).is_some_and(|chosen| protocols(chosen).all(is_offered))
}

/// What the lines of a head off the tunnel say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LineFacts {
    /// Content-Length.
    pub length: Option<u64>,
    /// There is a Host line in a request.
    pub has_host: bool,
    /// The visitor awaits the service's word to send his body.
    pub expects_continue: bool,
}

/// The trailer lines off the tunnel that may be written. The others are left out, which is
/// allowed (RFC 9110, section 6.5.1).
pub fn sendable_trailers(lines: &Lines) -> impl Iterator<Item = (&[u8], &[u8])> {
    lines
        .iter()
        .filter(|(name, value)| may_trail(name) && check_line(name, value).is_ok())
}

/// Whether `bytes` is a token (RFC 9110, section 5.6.2), such as a method.
pub fn is_token(bytes: &[u8]) -> bool {
    // No early exit: short texts are the rule, and a loop without one is vectorised.
    let good = bytes
        .iter()
        .fold(true, |good, byte| good & IN_A_TOKEN[usize::from(*byte)]);
    good && !bytes.is_empty()
}

/// Whether `bytes` can stand in a request line as its target: visible ASCII without `#`. That it
/// has one of a target's forms is for [`check_request`] to say.
pub fn is_target(bytes: &[u8]) -> bool {
    let good = bytes.iter().fold(true, |good, byte| {
        good & byte.is_ascii_graphic() & (*byte != b'#')
    });
    good && !bytes.is_empty()
}

/// Whether a line can be written without becoming something else.
fn check_line(name: &[u8], value: &[u8]) -> Result<(), InvalidLines> {
    if !is_token(name) {
        return Err(InvalidLines::Name);
    }
    let visible = value.iter().fold(true, |good, byte| {
        good & ((*byte >= b' ' && *byte != 0x7f) | (*byte == b'\t'))
    });
    if visible {
        Ok(())
    } else {
        Err(InvalidLines::Value)
    }
}

/// The bytes of a token (RFC 9110, section 5.6.2).
static IN_A_TOKEN: [bool; 256] = alphanumeric_and(b"!#$%&'*+-.^_`|~");

/// A table of ASCII's letters and digits, and of `others`.
const fn alphanumeric_and(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
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
    /// Content-Length is repeated, a list, not digits, or 2^63 and more.
    #[error("the Content-Length header is invalid")]
    ContentLength,
    /// There is more than one Host line in a request.
    #[error("there is more than one Host header")]
    Host,
    /// Transfer-Encoding is repeated, or something else than `chunked`.
    #[error("the Transfer-Encoding header is invalid")]
    TransferEncoding,
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
    /// Passed on, whatever Connection says, as the following are.
    Trailer,
    Expect,
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Te,
    Upgrade,
    /// For one connection only: Keep-Alive, Proxy-Connection, HTTP2-Settings.
    OtherHop,
    ForwardedFor,
    ForwardedHost,
    ForwardedProto,
    /// Forwarded, X-Real-IP, and all five spelled with underscores.
    OtherForwarded,
    RequestId,
}

/// Sorts a name. By length first: most names are done after that one comparison.
fn kind(name: &[u8]) -> Kind {
    let is = |word: &[u8]| name.eq_ignore_ascii_case(word);
    match name.len() {
        2 if is(b"te") => Kind::Te,
        4 if is(b"host") => Kind::Host,
        6 if is(b"expect") => Kind::Expect,
        7 if is(b"trailer") => Kind::Trailer,
        7 if is(b"upgrade") => Kind::Upgrade,
        9 if is(b"forwarded") => Kind::OtherForwarded,
        9 => forwarded(name, b"x-real-ip", Kind::OtherForwarded),
        10 if is(b"connection") => Kind::Connection,
        10 if is(b"keep-alive") => Kind::OtherHop,
        12 if is(b"x-request-id") => Kind::RequestId,
        14 if is(b"content-length") => Kind::ContentLength,
        14 if is(b"http2-settings") => Kind::OtherHop,
        15 => forwarded(name, b"x-forwarded-for", Kind::ForwardedFor),
        16 if is(b"proxy-connection") => Kind::OtherHop,
        16 => forwarded(name, b"x-forwarded-host", Kind::ForwardedHost),
        17 if is(b"transfer-encoding") => Kind::TransferEncoding,
        17 => forwarded(name, b"x-forwarded-proto", Kind::ForwardedProto),
        _ => Kind::Plain,
    }
}

/// Whether `name` is `pattern` (`exact`), or looks like it to CGI.
fn forwarded(name: &[u8], pattern: &[u8], exact: Kind) -> Kind {
    if name.eq_ignore_ascii_case(pattern) {
        return exact;
    }
    let same = |(a, b): (&u8, &u8)| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    if name.iter().zip(pattern).all(same) {
        Kind::OtherForwarded
    } else {
        Kind::Plain
    }
}

/// The protocols of an Upgrade value, a list of `name ["/" version]` (RFC 9110, section 7.8),
/// without what is none, and without `h2c`: a service that answered in HTTP/2 would be out of
/// reach for every check of what visitors ask, and RFC 9113, section 3.1 has done away with it.
fn protocols(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let parts = value.split(|byte| *byte == b',').map(trim);
    parts.filter(|part| is_protocol(part))
}

/// Whether a value is a list of such protocols and nothing else.
fn are_protocols(value: &[u8]) -> bool {
    let mut parts = value.split(|byte| *byte == b',').map(trim);
    parts.all(is_protocol)
}

fn is_protocol(part: &[u8]) -> bool {
    part.splitn(2, |byte| *byte == b'/').all(is_token) && !part.eq_ignore_ascii_case(b"h2c")
}

/// What the lines take in the tunnel, in bytes, and what Connection names.
fn survey<'a>(fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> (usize, Named<'a>) {
    let mut size = 0;
    let mut named = Named::default();
    for (name, value) in fields {
        size += 4 + name.len() + value.len();
        if kind(name) == Kind::Connection {
            named.read(value);
        }
    }
    (size, named)
}

/// The options of Connection that may be names of lines.
#[derive(Debug, Default)]
struct Named<'a>(Vec<&'a [u8]>);

impl<'a> Named<'a> {
    fn read(&mut self, connection: &'a [u8]) {
        for option in connection.split(|byte| *byte == b',').map(trim) {
            let usual = [&b"keep-alive"[..], b"close", b"upgrade", b"te"];
            if option.is_empty() || usual.iter().any(|word| option.eq_ignore_ascii_case(word)) {
                continue;
            }
            if self.0.len() == MAX_OPTIONS {
                return;
            }
            self.0.push(option);
        }
    }

    fn contain(&self, name: &[u8]) -> bool {
        self.0
            .iter()
            .any(|option| option.eq_ignore_ascii_case(name))
    }
}

/// How many options of Connection are compared with the lines. No honest head has as many; a
/// hostile one of 64 KiB could have 32,000, milliseconds of work. The lines that later ones name
/// are passed on.
const MAX_OPTIONS: usize = 100;

/// Whether a field may come after the body.
///
/// Refused is what RFC 9110, section 6.5.1 speaks of: framing, routing, request modifiers,
/// authentication, response control and content. Content-Digest may come (RFC 9530), and so may
/// Authentication-Info (RFC 9110, section 11.6.3) and ETag.
fn may_trail(name: &[u8]) -> bool {
    if kind(name) != Kind::Plain {
        return false;
    }
    let is = |word: &&[u8]| name.eq_ignore_ascii_case(word);
    let begins = |word: &[u8]| {
        name.get(..word.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(word))
    };
    if is(&&b"content-digest"[..]) {
        return true;
    }
    const REFUSED: [&[u8]; 17] = [
        b"age",
        b"authorization",
        b"cache-control",
        b"cookie",
        b"date",
        b"expires",
        b"location",
        b"max-forwards",
        b"pragma",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"range",
        b"retry-after",
        b"set-cookie",
        b"vary",
        b"warning",
        b"www-authenticate",
    ];
    !REFUSED.iter().any(is) && !begins(b"content-") && !begins(b"if-")
}

/// The authority of a target in absolute form, once the target has been found good.
fn check_target<'a>(method: &[u8], target: &'a [u8]) -> Result<Option<&'a [u8]>, Refusal> {
    if method == b"CONNECT" {
        return Err(Refusal::Connect);
    }
    if !is_target(target) {
        return Err(Refusal::Target);
    }
    match target {
        [b'/', ..] => Ok(None),
        b"*" if method == b"OPTIONS" => Ok(None),
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
static IN_A_NAME: [bool; 256] = alphanumeric_and(b"-._~!$&'()*+;=");

/// Whether `digits` is a port; RFC 3986, section 3.2.3 lets it be empty.
fn is_port(digits: &[u8]) -> bool {
    digits.is_empty() || number(digits).is_some_and(|port| port <= u64::from(u16::MAX))
}

/// Whether a Transfer-Encoding value is `chunked` and nothing else.
fn is_chunked_only(value: &[u8]) -> bool {
    trim(value).eq_ignore_ascii_case(b"chunked")
}

/// A number in digits, such as a length (RFC 9110, section 8.6). One that takes more than 63 bits
/// would be negative to a service that counts in signed numbers, and nobody means it.
fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    if digits.is_empty() {
        return None;
    }
    let number = digits.iter().try_fold(0, add)?;
    i64::try_from(number).is_ok().then_some(number)
}

/// Whether a TE value has the member `trailers` (RFC 9110, section 10.1.4).
fn names_trailers(te: &[u8]) -> bool {
    te.split(|byte| *byte == b',')
        .any(|member| trim(member).eq_ignore_ascii_case(b"trailers"))
}

/// Without the white space around it that RFC 9110, section 5.6.3 calls optional.
pub(crate) fn trim(bytes: &[u8]) -> &[u8] {
    let mut bytes = bytes;
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
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
    use proptest::prelude::*;

    type Field<'a> = (&'a [u8], &'a [u8]);

    fn fields<'a>(lines: &[(&'a str, &'a str)]) -> Vec<Field<'a>> {
        let bytes = |(name, value): &(&'a str, &'a str)| (name.as_bytes(), value.as_bytes());
        lines.iter().map(bytes).collect()
    }

    /// What is written of lines off the tunnel, and what they say.
    fn sent_on(
        lines: &Lines,
        direction: Direction,
    ) -> Result<(Vec<(String, String)>, LineFacts), InvalidLines> {
        let mut written = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let facts = sendable(lines, direction, |name, value| {
            written.push((text(name), text(value)));
        })?;
        Ok((written, facts))
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
        check_request(b"POST", b"/", Version::Http11, fields(lines)).map(drop)
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
        let lines = forward_request(fields(lines), &forwarding, false, id).unwrap();
        let mut texts = texts(&lines);
        texts.retain(|(name, _)| !name.starts_with("x-forwarded") && name != "x-request-id");
        texts
    }

    fn forwarded_by(peer: &str, trusted: bool, lines: &[(&str, &str)]) -> Vec<(String, String)> {
        let forwarding = Forwarding::new(peer.parse().unwrap(), trusted);
        texts(&forward_request(fields(lines), &forwarding, false, id).unwrap())
    }

    #[test]
    fn host_lines_are_counted() {
        assert_eq!(check(&[]), Err(Refusal::MissingHost));
        assert_eq!(
            check(&[("host", "a"), ("host", "a")]),
            Err(Refusal::RepeatedHost)
        );
        let in_1_0 = |lines: &[(&str, &str)]| {
            check_request(b"GET", b"/", Version::Http10, fields(lines)).map(drop)
        };
        assert_eq!(in_1_0(&[]), Ok(()));
        assert_eq!(in_1_0(&[("host", "a")]), Ok(()));
        assert_eq!(
            in_1_0(&[("host", "a"), ("host", "b")]),
            Err(Refusal::RepeatedHost)
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
        for good in ["0", "5", "007", "9223372036854775807"] {
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
            "9223372036854775808",
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
            check_request(b"POST", b"/", version, fields(&lines)).map(drop)
        };
        for good in ["chunked", "Chunked", "CHUNKED", " chunked\t"] {
            assert_eq!(with(Version::Http11, &[good]), Ok(()), "{good:?}");
            assert_eq!(
                with(Version::Http10, &[good]),
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
            let result = with(Version::Http11, &[bad]);
            assert_eq!(result, Err(Refusal::TransferEncoding), "{bad:?}");
        }
        assert_eq!(
            with(Version::Http11, &["chunked", "chunked"]),
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
        let check = |method: &[u8], target: &[u8]| {
            check_request(method, target, Version::Http11, fields(&[("host", "a:1")])).map(drop)
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
            assert_eq!(check(b"GET", good.as_bytes()), Ok(()), "{good:?}");
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
            assert_eq!(check(b"GET", bad), Err(Refusal::Target), "{shown:?}");
        }
        assert_eq!(check(b"OPTIONS", b"*"), Ok(()));
        assert_eq!(check(b"OPTIONS", b"**"), Err(Refusal::Target));
        for target in [&b"a:1"[..], b"/", b"http://a:1/"] {
            assert_eq!(check(b"CONNECT", target), Err(Refusal::Connect));
        }
    }

    #[test]
    fn an_absolute_target_and_host_agree() {
        let check = |version, lines: &[(&str, &str)]| {
            check_request(b"GET", b"http://Example.com:81/", version, fields(lines)).map(drop)
        };
        let (old, new) = (Version::Http10, Version::Http11);
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
            Refusal::Syntax,
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
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let lines = forward_request(fields(&sent), &forwarding, false, id);
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
    fn latin_1_values_and_the_case_of_names_stay_intact() {
        let fields: [Field<'_>; 2] = [(b"Host", b"a"), (b"X-Name", b"caf\xe9 \xff\x80")];
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let request = forward_request(fields, &forwarding, false, id).unwrap();
        let answer = forward_response(200, fields).unwrap();
        for (lines, direction) in [(request, Direction::Request), (answer, Direction::Response)] {
            let mut arrived = false;
            let line = |name: &[u8], value: &[u8]| arrived |= (name, value) == fields[1];
            sendable(&lines, direction, line).unwrap();
            assert!(arrived);
        }
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
        let response = forward_response(200, fields(&hops)).unwrap();
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
    fn a_response_has_one_framing() {
        let facts = |status, to_head, lines: &[(&str, &str)]| {
            check_response(status, Version::Http11, to_head, fields(lines))
        };
        let framing = |lines: &[(&str, &str)]| facts(200, false, lines).map(|facts| facts.framing);
        let length = ("content-length", "5");
        let chunked = ("Transfer-Encoding", "Chunked");
        assert_eq!(framing(&[length]), Ok(Framing::Length(5)));
        assert_eq!(framing(&[chunked]), Ok(Framing::Chunked));
        assert_eq!(framing(&[]), Ok(Framing::UntilClose));
        for (status, to_head) in [(204, false), (304, false), (103, false), (200, true)] {
            let facts = facts(status, to_head, &[length]).unwrap();
            assert_eq!(facts.framing, Framing::Length(0), "{status}");
            assert!(facts.persistent);
        }
        for bad in [
            &[length, length][..],
            &[("content-length", "5, 5")],
            &[("content-length", "-1")],
            &[("content-length", "")],
        ] {
            assert_eq!(framing(bad), Err(InvalidLines::ContentLength));
        }
        for bad in [
            &[chunked, chunked][..],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "identity")],
        ] {
            assert_eq!(framing(bad), Err(InvalidLines::TransferEncoding));
        }

        // What is doubtful is believed once.
        let both = facts(200, false, &[length, chunked]).unwrap();
        assert_eq!((both.framing, both.persistent), (Framing::Chunked, false));
        let lines = forward_response(200, fields(&[length, chunked, ("x", "y")])).unwrap();
        assert_eq!(texts(&lines), pairs(&[("x", "y")]));
    }

    #[test]
    fn a_connection_persists_by_version_and_option() {
        for (version, options, persists) in [
            (Version::Http11, &[][..], true),
            (Version::Http11, &["close"], false),
            (Version::Http11, &["te, Close"], false),
            (Version::Http11, &["keep-alive", "close"], false),
            (Version::Http10, &[], false),
            (Version::Http10, &["Keep-Alive"], true),
            (Version::Http10, &["keep-alive, close"], false),
        ] {
            let mut lines = vec![("host", "a"), ("content-length", "0")];
            lines.extend(options.iter().map(|options| ("Connection", *options)));
            let request = check_request(b"GET", b"/", version, fields(&lines)).unwrap();
            assert_eq!(request.persistent, persists, "{version:?} {options:?}");
            let answer = check_response(200, version, false, fields(&lines)).unwrap();
            assert_eq!(answer.persistent, persists, "{version:?} {options:?}");
        }
    }

    #[test]
    fn a_request_says_what_follows() {
        let facts = |version, lines: &[(&str, &str)]| {
            let mut all = vec![("host", "a")];
            all.extend(lines);
            check_request(b"PUT", b"/", version, fields(&all)).unwrap()
        };
        let new = |lines: &[(&str, &str)]| facts(Version::Http11, lines);
        assert_eq!(new(&[]).framing, Framing::Length(0));
        assert_eq!(new(&[("content-length", "7")]).framing, Framing::Length(7));
        assert_eq!(
            new(&[("transfer-encoding", "chunked")]).framing,
            Framing::Chunked
        );
        let expect = [("Expect", "100-Continue")];
        assert!(new(&expect).expects_continue);
        assert!(!new(&[("expect", "something")]).expects_continue);
        assert!(!facts(Version::Http10, &expect).expects_continue);
    }

    #[test]
    fn an_upgrade_is_asked_for_by_two_lines_and_no_body() {
        let upgrades = |version, lines: &[(&str, &str)]| {
            let mut all = vec![("host", "a")];
            all.extend(lines);
            let facts = check_request(b"GET", b"/", version, fields(&all)).unwrap();
            facts.upgrades
        };
        let named = ("connection", "keep-alive, Upgrade");
        let websocket = ("Upgrade", "WebSocket");
        for (lines, expected) in [
            (&[named, websocket][..], true),
            (&[websocket, named], true),
            (&[named, ("upgrade", "h2c"), ("upgrade", "x/1")], true),
            (&[named, ("upgrade", "h2c, websocket")], true),
            (&[named, websocket, ("content-length", "0")], true),
            (&[websocket], false),
            (&[("connection", "upgraded"), websocket], false),
            (&[named], false),
            (&[named, ("upgrade", "H2C")], false),
            (&[named, ("upgrade", "")], false),
            (&[named, ("upgrade", "web socket, a/b/c, \"x\"")], false),
            (&[named, websocket, ("content-length", "1")], false),
            (&[named, websocket, ("transfer-encoding", "chunked")], false),
        ] {
            assert_eq!(upgrades(Version::Http11, lines), expected, "{lines:?}");
        }
        assert!(!upgrades(Version::Http10, &[named, websocket]));
    }

    #[test]
    fn the_protocols_of_an_upgrade_pass_as_one_line() {
        let sent = [
            ("connection", "upgrade, http2-settings"),
            ("upgrade", "h2c, websocket ,, a b"),
            ("http2-settings", "AAMAAABkAAQAAP__"),
            ("upgrade", "Chat/2"),
            ("te", "trailers"),
        ];
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let forwarded = |upgrade| {
            let lines = forward_request(fields(&sent), &forwarding, upgrade, id).unwrap();
            let (mut written, _) = sent_on(&lines, Direction::Request).unwrap();
            written.retain(|(name, _)| !name.starts_with("x-"));
            (lines, written)
        };
        let (lines, written) = forwarded(true);
        assert_eq!(offered(&lines), Some(&b"websocket, Chat/2"[..]));
        let both = [
            ("te", "trailers"),
            ("upgrade", "websocket, Chat/2"),
            ("connection", "upgrade, te"),
        ];
        assert_eq!(written, pairs(&both));
        let (lines, written) = forwarded(false);
        assert_eq!(offered(&lines), None);
        assert_eq!(written, pairs(&[("te", "trailers"), ("connection", "te")]));
    }

    #[test]
    fn an_answer_names_protocols_where_its_status_speaks_of_them() {
        let answer = [
            ("connection", "Upgrade, x-hop"),
            ("upgrade", "websocket"),
            ("x-hop", "1"),
            ("sec-websocket-accept", "x"),
        ];
        for (status, named) in [(101, true), (426, true), (200, false), (103, false)] {
            let lines = forward_response(status, fields(&answer)).unwrap();
            let expected = named.then_some(&b"websocket"[..]);
            assert_eq!(offered(&lines), expected, "{status}");
            // Whoever writes the answer knows its status.
            let (written, _) = sent_on(&lines, Direction::Response).unwrap();
            assert_eq!(written, pairs(&[("sec-websocket-accept", "x")]));
        }
    }

    #[test]
    fn a_service_chooses_among_what_was_offered() {
        for (offer, chosen, good) in [
            ("websocket", "WebSocket", true),
            ("a, b/1", "b/1", true),
            ("a, b/1", "b/1, a", true),
            ("a, b/1", "b", false),
            ("a", "a, c", false),
            ("a", "", false),
            ("a", "a b", false),
            ("a, h2c", "h2c", false),
        ] {
            let answer = lines(&[("upgrade", chosen)]);
            let went_on = goes_on_as_offered(offer.as_bytes(), &answer);
            assert_eq!(went_on, good, "{offer:?} {chosen:?}");
        }
        assert!(!goes_on_as_offered(b"a", &lines(&[])));
    }

    #[test]
    fn an_upgrade_off_the_tunnel_is_a_list_of_protocols_or_nothing() {
        let hostile = [
            &[("upgrade", "h2c")][..],
            &[("upgrade", "websocket, h2c")],
            &[("upgrade", "a\r\nb: c")],
            &[("upgrade", "")],
            &[("upgrade", "websocket"), ("content-length", "1")],
        ];
        for hostile in hostile {
            let (written, _) = sent_on(&lines(hostile), Direction::Request).unwrap();
            assert_eq!(written, pairs(&[]), "{hostile:?}");
        }
    }

    #[test]
    fn a_response_keeps_its_lines() {
        let answer = [
            ("Set-Cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("location", "http://127.0.0.1:3000/x"),
            ("x-empty", ""),
            ("trailer", "x-sum"),
        ];
        let lines = forward_response(200, fields(&answer)).unwrap();
        assert_eq!(texts(&lines), pairs(&answer));
        let (arrived, _) = sent_on(&lines, Direction::Response).unwrap();
        assert_eq!(arrived, pairs(&answer));
    }

    #[test]
    fn a_line_too_long_for_the_tunnel_is_refused() {
        let long = "x".repeat(65_536);
        let lines = [("host", "a"), ("x-long", &*long)];
        let forwarding = Forwarding::new([1, 2, 3, 4].into(), false);
        let refused = forward_request(fields(&lines), &forwarding, false, id);
        assert_eq!(refused, Err(LineTooLong));
        assert_eq!(forward_response(200, fields(&lines)), Err(LineTooLong));
        assert_eq!(forward_trailers(fields(&lines)), Err(LineTooLong));
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
            let (arrived, facts) = sent_on(&hostile, direction).unwrap();
            assert_eq!((arrived, facts.length), (pairs(&[]), Some(5)));
        }
        let repeated_length = [("content-length", "5"), ("Content-Length", "5")];
        let cases = [
            (&repeated_length[..], InvalidLines::ContentLength),
            (&[("content-length", "5, 5")], InvalidLines::ContentLength),
            (&[("content-length", "")], InvalidLines::ContentLength),
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
        for (hostile, error) in cases {
            let lines = lines(hostile);
            for direction in [Direction::Request, Direction::Response] {
                assert_eq!(sent_on(&lines, direction), Err(error), "{hostile:?}");
            }
            assert_eq!(sendable_trailers(&lines).count(), 0, "{hostile:?}");
        }
    }

    #[test]
    fn only_a_request_is_ambiguous_by_its_hosts() {
        let two = [("host", "a"), ("HOST", "b")];
        let request = sent_on(&lines(&two), Direction::Request);
        assert_eq!(request, Err(InvalidLines::Host));
        let (response, _) = sent_on(&lines(&two), Direction::Response).unwrap();
        assert_eq!(response, pairs(&two));
    }

    #[test]
    fn te_reaches_the_service_with_its_connection_option() {
        let te = lines(&[("te", "trailers"), ("connection", "close")]);
        let (request, _) = sent_on(&te, Direction::Request).unwrap();
        assert_eq!(request, pairs(&[("te", "trailers"), ("connection", "te")]));
        let (response, _) = sent_on(&te, Direction::Response).unwrap();
        assert_eq!(response, pairs(&[]));
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
            texts(&forward_trailers(fields(&sent)).unwrap()),
            pairs(&allowed)
        );
        let arrived = lines(&sent);
        let arrived: Vec<_> = sendable_trailers(&arrived).collect();
        assert_eq!(arrived, fields(&allowed));
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
            prop::sample::select(vec![
                "x-hop, close",
                "host, content-length",
                "trailers",
                "upgrade",
                "websocket",
                "h2c, websocket/13,,",
            ])
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
            let facts = check_request(b"POST", b"/", Version::Http11, fields(&sent)).unwrap();
            let upgrade = facts.upgrades;
            let lines = forward_request(fields(&sent), &Forwarding::new(peer, trusted), upgrade, id).unwrap();
            let (arrived, facts) = sent_on(&lines, Direction::Request).unwrap();
            let all = |name: &str| -> Vec<&str> {
                let named = arrived.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
                named.map(|(_, value)| value.as_str()).collect()
            };
            let original = |name: &str| -> Vec<&str> {
                sent.iter().filter(|(n, _)| *n == name).map(|(_, value)| *value).collect()
            };

            prop_assert_eq!(all("host"), original("host"));
            let length = original("content-length").first().map(|value| value.parse().unwrap());
            prop_assert_eq!(facts.length, length);
            prop_assert!(all("transfer-encoding").is_empty());
            prop_assert_eq!(all("upgrade").len(), usize::from(upgrade));
            prop_assert!(!upgrade || length.is_none() && original("transfer-encoding").is_empty());
            let options = usize::from(!all("te").is_empty() || upgrade);
            prop_assert_eq!(all("connection").len(), options);
            let forwarded_for = all("x-forwarded-for");
            prop_assert_eq!(forwarded_for.len(), 1);
            let peer = peer.to_canonical().to_string();
            prop_assert!(forwarded_for[0].ends_with(&peer));
            prop_assert!(trusted || forwarded_for[0] == peer);
            prop_assert!(!all("x-request-id").is_empty());
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
            let host = fields(&[("host", &host)]);
            if check_request(b"GET", &target, Version::Http11, host).is_ok() {
                prop_assert!(target.iter().all(|byte| (0x21..=0x7e).contains(byte)));
            }
        }

        #[test]
        fn only_safe_lines_are_written(
            sent in prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..6),
            request: bool,
        ) {
            let mut builder = LinesBuilder::default();
            for (name, value) in &sent {
                builder.push(name, value).unwrap();
            }
            let direction = if request { Direction::Request } else { Direction::Response };
            let lines = builder.finish();
            let clean = |(name, value): (&[u8], &[u8])| {
                let breaks = |byte: &u8| matches!(byte, b'\r' | b'\n' | 0);
                !name.is_empty() && !name.contains(&b':') && !name.iter().chain(value).any(breaks)
            };
            let mut all_clean = true;
            // An error comes after what was written before it, and the whole is thrown away.
            let _ = sendable(&lines, direction, |name, value| all_clean &= clean((name, value)));
            prop_assert!(all_clean);
            prop_assert!(sendable_trailers(&lines).all(clean));
        }
    }
}
