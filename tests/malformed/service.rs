//! A service that takes nothing on trust: it notes what came on each connection, byte by byte, and
//! reads it by the letter of RFC 9112, without a line of the code under test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::bystander::sum;
use crate::common::raw::latin1;
use crate::common::service;

/// What came on a connection of the service.
#[derive(Debug, Clone)]
pub(crate) enum Record {
    /// One well-formed request, and what it was answered with.
    Request(Request),
    /// The connection ended within a request that was well-formed so far.
    Incomplete,
    /// Something that a service could read in two ways, or not at all.
    Illegal { why: String, bytes: String },
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    /// The body of its answer, which no other request gets.
    pub(crate) answer: String,
}

/// The service. Its records wait until they are taken.
pub(crate) struct Strict {
    pub(crate) address: SocketAddr,
    records: Arc<Mutex<Vec<Record>>>,
}

impl Strict {
    pub(crate) fn start() -> Self {
        let records = Arc::new(Mutex::new(Vec::new()));
        let noted = records.clone();
        let count = AtomicU64::new(0);
        let address = service(move |stream| serve(stream, &noted, &count));
        Self { address, records }
    }

    /// What came since the last time.
    pub(crate) fn take(&self) -> Vec<Record> {
        std::mem::take(&mut *self.records.lock().unwrap())
    }
}

fn serve(stream: TcpStream, records: &Mutex<Vec<Record>>, count: &AtomicU64) {
    let _ = stream.set_nodelay(true);
    let mut input = Input {
        stream,
        bytes: Vec::new(),
        read: 0,
    };
    loop {
        input.bytes.drain(..input.read);
        input.read = 0;
        let (record, answer) = match read_request(&mut input) {
            Ok((method, target, body)) => {
                let id = count.fetch_add(1, Ordering::Relaxed);
                let answer = format!(
                    "{id} {method} {} of {} bytes, sum {:x}",
                    target.escape_default(),
                    body.len(),
                    sum(&body)
                );
                let head_only = method == "HEAD";
                let request = Request {
                    method,
                    target,
                    answer: answer.clone(),
                };
                (Record::Request(request), Some((answer, head_only)))
            }
            Err(Fault::End) if input.bytes.is_empty() => return,
            Err(Fault::End) => (Record::Incomplete, None),
            Err(Fault::Illegal(why)) => {
                let bytes = latin1(&input.bytes[..input.bytes.len().min(2000)]);
                (Record::Illegal { why, bytes }, None)
            }
        };
        records.lock().unwrap().push(record);
        let Some((answer, head_only)) = answer else {
            return;
        };
        let body = if head_only { "" } else { &answer };
        let length = answer.len();
        let whole = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
        if input.stream.write_all(whole.as_bytes()).is_err() {
            return;
        }
    }
}

enum Fault {
    End,
    Illegal(String),
}

fn illegal<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Illegal(why.into()))
}

struct Input {
    stream: TcpStream,
    bytes: Vec<u8>,
    /// How many of the bytes have been read as a part of the request.
    read: usize,
}

impl Input {
    fn fill(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) | Err(_) => Err(Fault::End),
            Ok(count) => {
                self.bytes.extend_from_slice(&buffer[..count]);
                Ok(())
            }
        }
    }

    /// The next line, which ends with CR LF and contains neither.
    fn line(&mut self) -> Result<Vec<u8>, Fault> {
        let mut seen = self.read;
        loop {
            let fresh = &self.bytes[seen..];
            if let Some(at) = fresh.iter().position(|byte| *byte == b'\n') {
                let end = seen + at;
                let line = self.bytes[self.read..end].to_vec();
                self.read = end + 1;
                let Some(line) = line.strip_suffix(b"\r") else {
                    return illegal("a bare LF");
                };
                if line.contains(&b'\r') {
                    return illegal("a bare CR");
                }
                return Ok(line.to_vec());
            }
            seen = self.bytes.len();
            self.fill()?;
        }
    }

    fn exactly(&mut self, count: usize) -> Result<Vec<u8>, Fault> {
        while self.bytes.len() - self.read < count {
            self.fill()?;
        }
        let bytes = self.bytes[self.read..self.read + count].to_vec();
        self.read += count;
        Ok(bytes)
    }
}

/// Method, target and body of the next request.
fn read_request(input: &mut Input) -> Result<(String, String, Vec<u8>), Fault> {
    let line = latin1(&input.line()?);
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words[..] else {
        return illegal("a request line that isn't three words");
    };
    if version != "HTTP/1.1" {
        return illegal("another version");
    }
    if method.is_empty() || !method.bytes().all(is_token) {
        return illegal("a method that is no token");
    }
    if target.is_empty() || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return illegal("a target with bytes that aren't allowed");
    }
    if target.contains('#') {
        return illegal("a target with a fragment");
    }
    let lines = read_lines(input)?;
    let host = check_host(method, target, &lines)?;
    check_authority(target, host)?;
    let body = read_body(input, &lines)?;
    if input.read < input.bytes.len() {
        return illegal("bytes behind the request, before it was answered");
    }
    Ok((method.to_owned(), target.to_owned(), body))
}

/// Header or trailer lines up to the empty one.
fn read_lines(input: &mut Input) -> Result<Vec<(String, String)>, Fault> {
    let mut lines = Vec::new();
    loop {
        let line = latin1(&input.line()?);
        if line.is_empty() {
            return Ok(lines);
        }
        if line.starts_with([' ', '\t']) {
            return illegal("a folded line");
        }
        let Some((name, value)) = line.split_once(':') else {
            return illegal("a line without a colon");
        };
        if name.is_empty() || !name.bytes().all(is_token) {
            return illegal("a name that is no token");
        }
        if value.chars().any(|c| c != '\t' && c.is_ascii_control()) {
            return illegal("a control byte in a value");
        }
        let value = value.trim_matches([' ', '\t']).to_owned();
        lines.push((name.to_ascii_lowercase(), value));
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn values<'a>(lines: &'a [(String, String)], name: &str) -> Vec<&'a str> {
    let named = lines.iter().filter(|(key, _)| key == name);
    named.map(|(_, value)| value.as_str()).collect()
}

fn check_host<'a>(
    method: &str,
    target: &str,
    lines: &'a [(String, String)],
) -> Result<&'a str, Fault> {
    let [host] = values(lines, "host")[..] else {
        return illegal("no Host, or more than one");
    };
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (host, ""),
    };
    let literal = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let fits = match literal {
        Some(literal) => literal
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || b":.vV".contains(&byte)),
        // A reg-name: unreserved, sub-delims, and escapes.
        None => name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(&byte)),
    };
    if !fits || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return illegal("a Host that is none");
    }
    // What a target may look like depends on the method.
    let fits = match target {
        "*" => method == "OPTIONS",
        _ => target.starts_with('/') || target.contains("://"),
    };
    if !fits || method == "CONNECT" {
        return illegal("a target of the wrong form");
    }
    Ok(host)
}

/// An absolute target names the same host as Host does: otherwise it is a matter of taste whom
/// the request is for.
fn check_authority(target: &str, host: &str) -> Result<(), Fault> {
    if target.starts_with('/') {
        return Ok(());
    }
    let Some((_, rest)) = target.split_once("://") else {
        return Ok(());
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    if rest[..end].eq_ignore_ascii_case(host) {
        Ok(())
    } else {
        illegal("a target that differs from Host")
    }
}

/// What may never stand in a trailer: framing, routing, authentication and what says how to read
/// the content (RFC 9110, section 6.5.1).
const FORBIDDEN: &[&str] = &[
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "max-forwards",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];

fn read_body(input: &mut Input, lines: &[(String, String)]) -> Result<Vec<u8>, Fault> {
    let lengths = values(lines, "content-length");
    let codings = values(lines, "transfer-encoding");
    match (&lengths[..], &codings[..]) {
        ([], []) => return Ok(Vec::new()),
        ([length], []) => {
            let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
            return match length.parse() {
                Ok(length) if digits => input.exactly(length),
                _ => illegal("a length that is none"),
            };
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => {}
        _ => return illegal("framing that is ambiguous or unknown"),
    }
    let mut body = Vec::new();
    loop {
        let size = latin1(&input.line()?);
        if size.is_empty() || size.len() > 15 || !size.bytes().all(|b| b.is_ascii_hexdigit()) {
            return illegal("a chunk's size with something else, or none");
        }
        let size = usize::from_str_radix(&size, 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&input.exactly(size)?);
        if input.exactly(2)? != b"\r\n" {
            return illegal("a chunk that ends somewhere else");
        }
    }
    for (name, _) in read_lines(input)? {
        if FORBIDDEN.contains(&name.as_str()) {
            return illegal(format!("{name} in the trailers"));
        }
    }
    Ok(body)
}
