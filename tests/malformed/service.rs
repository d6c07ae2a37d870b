//! A service that takes nothing for a request but a well-formed one (RFC 9112), and tells what came.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};

use crate::common::raw::channel;
use crate::common::service;

/// What came over some connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Came {
    /// A request, to which the answer says its number.
    Request { number: usize, target: String },
    /// Something else.
    Fault(String),
}

/// See the module.
pub struct Strict {
    pub address: SocketAddr,
    came: Mutex<Receiver<Came>>,
}

impl Strict {
    pub fn start() -> Self {
        let (sender, came) = channel();
        let count = Arc::new(AtomicUsize::new(0));
        let address = service(move |stream| serve(stream, &sender, &count));
        let came = Mutex::new(came);
        Self { address, came }
    }

    /// What came since it was asked last.
    pub fn came(&self) -> Vec<Came> {
        self.came.lock().unwrap().try_iter().collect()
    }
}

fn serve(stream: TcpStream, came: &Mutex<Sender<Came>>, count: &AtomicUsize) {
    let tell = |what| {
        // The test may be over.
        let _ = came.lock().unwrap().send(what);
    };
    let mut reader = Reader {
        stream,
        buffer: Vec::new(),
    };
    loop {
        match reader.request() {
            Ok(request) => {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let sum: u64 = request.body.iter().map(|byte| u64::from(*byte)).sum();
                let body = format!("{number} {} {} {sum}", request.method, request.target);
                tell(Came::Request {
                    number,
                    target: request.target,
                });
                let content = if request.method == "HEAD" { "" } else { &body };
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nX-Number: {number}\r\n\
                     X-Method: {}\r\n\r\n{content}",
                    request.method
                );
                if reader.stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
            // It broke off: nobody can take half of a request for a whole one.
            Err(None) => return,
            Err(Some(fault)) => {
                tell(Came::Fault(fault));
                let _ = reader
                    .stream
                    .write_all(b"HTTP/1.1 599 Fault\r\nContent-Length: 0\r\n\r\n");
                return;
            }
        }
    }
}

struct Request {
    method: String,
    target: String,
    body: Vec<u8>,
}

struct Reader {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What is wrong; nothing if the connection ended.
type Broken = Option<String>;

fn fault<T>(what: &str, bytes: &[u8]) -> Result<T, Broken> {
    let shown = &bytes[..bytes.len().min(60)];
    Err(Some(format!(
        "{what}: {:?}",
        String::from_utf8_lossy(shown)
    )))
}

impl Reader {
    fn request(&mut self) -> Result<Request, Broken> {
        let first = self.line()?;
        let text = String::from_utf8(first.clone()).or_else(|_| fault("request line", &first))?;
        let parts: Vec<&str> = text.split(' ').collect();
        let [method, target, "HTTP/1.1"] = parts[..] else {
            return fault("request line", &first);
        };
        let in_target = |byte: u8| byte.is_ascii_graphic() && byte != b'#';
        if method.is_empty() || !method.bytes().all(is_token) {
            return fault("method", &first);
        }
        if target.is_empty() || !target.bytes().all(in_target) {
            return fault("target", &first);
        }
        let fields = self.fields()?;
        let of = |name: &str| -> Vec<&str> {
            let same = fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
            same.map(|(_, value)| value.as_str()).collect()
        };
        if of("host").len() != 1 {
            return fault("not one Host", text.as_bytes());
        }
        let body = match (&of("content-length")[..], &of("transfer-encoding")[..]) {
            ([], []) => Vec::new(),
            ([length], []) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
                let Ok(length) = length.parse() else {
                    return fault("length", length.as_bytes());
                };
                self.take(length)?
            }
            ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => self.chunks()?,
            framing => return fault("framing", format!("{framing:?}").as_bytes()),
        };
        Ok(Request {
            method: method.to_owned(),
            target: target.to_owned(),
            body,
        })
    }

    /// Lines up to an empty one.
    fn fields(&mut self) -> Result<Vec<(String, String)>, Broken> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(fields);
            }
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                return fault("field without a colon", &line);
            };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.is_empty() || !name.iter().copied().all(is_token) {
                return fault("field name", &line);
            }
            if !value
                .iter()
                .all(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f))
            {
                return fault("field value", &line);
            }
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            fields.push((text(name), text(value)));
        }
    }

    fn chunks(&mut self) -> Result<Vec<u8>, Broken> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            // Extensions aren't for this hop.
            let is_size = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
            let size = String::from_utf8_lossy(&line);
            let Some(size) = usize::from_str_radix(&size, 16).ok().filter(|_| is_size) else {
                return fault("size of a chunk", &line);
            };
            if size == 0 {
                break;
            }
            body.extend(self.take(size)?);
            let end = self.line()?;
            if !end.is_empty() {
                return fault("after a chunk", &end);
            }
        }
        for (name, value) in self.fields()? {
            let name = name.to_ascii_lowercase();
            if ["content-length", "transfer-encoding", "host"].contains(&&*name) {
                return fault("trailer", format!("{name}: {value}").as_bytes());
            }
        }
        Ok(body)
    }

    /// A line without its end, which is CR LF; neither is anywhere else.
    fn line(&mut self) -> Result<Vec<u8>, Broken> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                if line.pop() != Some(b'\r') || line.contains(&b'\r') {
                    return fault("end of a line", &line);
                }
                return Ok(line);
            }
            self.fill()?;
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>, Broken> {
        while self.buffer.len() < length {
            self.fill()?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn fill(&mut self) -> Result<(), Broken> {
        let mut piece = [0; 16 * 1024];
        match self.stream.read(&mut piece) {
            Ok(0) | Err(_) => Err(None),
            Ok(count) => {
                self.buffer.extend_from_slice(&piece[..count]);
                Ok(())
            }
        }
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
