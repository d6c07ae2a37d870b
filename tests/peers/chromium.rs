//! Chromium on a page that comes through the tunnel and tries what pages do: it sees what it sees
//! without the tunnel.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::frame::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{Role, WebSocket};

use crate::common::raw::{Received, read_request, settles};
use crate::common::{Server, have, port_range, service};

/// A page takes a few seconds, and longer where other tests run beside it.
const PAGE: Duration = Duration::from_secs(60);

#[test]
#[ignore = "starts a browser twice"]
fn chromium_sees_no_difference() {
    if !have("chromium", "chromium") {
        return;
    }
    let directly = {
        let (first, other) = (Site::start(), Site::start());
        browse(first.address, other.address, &first.reports)
    };
    assert_eq!(directly["done"], true, "directly: {directly:#}");

    let (first, other) = (Site::start(), Site::start());
    let server = Server::with(port_range(4), &[]);
    let page = server.agent("page", first.address);
    let beside = server.agent("other", other.address);
    let through = browse(page.address(), beside.address(), &first.reports);
    assert_eq!(through, directly, "through the tunnel: {through:#}");
    settles(&server);
}

/// What the page saw, once it has tried everything.
fn browse(page: SocketAddr, other: SocketAddr, reports: &Receiver<String>) -> serde_json::Value {
    let profile = tempfile::tempdir().unwrap();
    let browser = Command::new("chromium")
        .args([
            // The page is ours, and root has no sandbox.
            "--no-sandbox",
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--no-proxy-server",
            // Of amanda, in the range of the tests' ports.
            "--explicitly-allowed-ports=10080",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{page}/?other=http://{other}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _browser = Browser(browser);
    let report = reports.recv_timeout(PAGE).expect("a report of the page");
    serde_json::from_str(&report).unwrap()
}

/// Ended when dropped.
struct Browser(Child);

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The service that has the page, and does what it asks for.
struct Site {
    address: SocketAddr,
    reports: Receiver<String>,
}

/// What its connections have in common.
struct Shared {
    reports: Mutex<Sender<String>>,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    /// Pieces that the page has got.
    pieces: usize,
    /// How often it has asked for events.
    streams: usize,
    /// What it was answered that may be kept.
    cached: Vec<&'static str>,
    /// It has left an answer without end.
    left: bool,
}

impl Site {
    fn start() -> Self {
        let (sender, reports) = mpsc::channel();
        let shared = Arc::new(Shared {
            reports: Mutex::new(sender),
            state: Mutex::default(),
            moved: Condvar::new(),
        });
        let address = service(move |mut stream| {
            stream.set_nodelay(true).unwrap();
            while let Ok(request) = read_request(&mut stream) {
                if !shared.answer(&request, &mut stream).unwrap_or(false) {
                    return;
                }
            }
        });
        Self { address, reports }
    }
}

impl Shared {
    /// Says whether the connection is kept.
    fn answer(&self, request: &Received, stream: &mut TcpStream) -> io::Result<bool> {
        let line = request.line();
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        match (method, path) {
            ("GET", "/") => text(
                stream,
                "Content-Type: text/html\r\n",
                include_str!("page.html"),
            ),
            ("GET", "/pieces") => self.pieces(stream),
            ("GET", "/more") => {
                if let Ok(count) = query.parse() {
                    self.tell(|state| state.pieces = count);
                }
                text(stream, "", "")
            }
            ("GET", "/events") => self.events(request, stream),
            ("GET", "/echo" | "/drop") => {
                switch(request, stream)?;
                Ok(false)
            }
            ("OPTIONS" | "PUT", "/shared") => shared_with_others(method, request, stream),
            ("GET", "/cached") => {
                let is_known = request.header("if-none-match") == ["\"1\""];
                let status = if is_known { "304" } else { "200" };
                self.tell(|state| state.cached.push(status));
                match is_known {
                    true => {
                        stream.write_all(b"HTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\n\r\n")?
                    }
                    false => return text(stream, "ETag: \"1\"\r\n", "kept"),
                }
                Ok(true)
            }
            ("GET", "/cached-count") => {
                let cached = self.state.lock().unwrap().cached.join(" ");
                text(stream, "", &cached)
            }
            ("GET", "/half-of-a-length") => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf.")?;
                Ok(false)
            }
            ("GET", "/half-of-the-chunks") => {
                stream.write_all(CHUNKED.as_bytes())?;
                chunk(stream, "half")?;
                Ok(false)
            }
            ("GET", "/endless") => {
                stream.write_all(CHUNKED.as_bytes())?;
                while chunk(stream, "more").is_ok() {
                    crate::common::pause();
                }
                self.tell(|state| state.left = true);
                Ok(false)
            }
            ("GET", "/left") => {
                self.wait(|state| state.left);
                text(stream, "", "seen")
            }
            ("POST", "/sum") => text(stream, "", &request.body.len().to_string()),
            ("POST", "/report") => {
                let report = String::from_utf8(request.body.clone()).unwrap();
                let _ = self.reports.lock().unwrap().send(report);
                text(stream, "", "")
            }
            _ => {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
                Ok(true)
            }
        }
    }

    fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.moved.notify_all();
    }

    fn wait(&self, until: impl Fn(&State) -> bool) {
        let state = self.state.lock().unwrap();
        let waited = self
            .moved
            .wait_timeout_while(state, PAGE, |state| !until(state));
        drop(waited.unwrap());
    }

    fn pieces(&self, stream: &mut TcpStream) -> io::Result<bool> {
        stream.write_all(CHUNKED.as_bytes())?;
        for number in 0..4 {
            self.wait(|state| state.pieces == number);
            chunk(stream, &format!("piece {number}"))?;
        }
        self.wait(|state| state.pieces == 4);
        stream.write_all(b"0\r\n\r\n")?;
        Ok(true)
    }

    fn events(&self, request: &Received, stream: &mut TcpStream) -> io::Result<bool> {
        let mut count = 0;
        self.tell(|state| {
            state.streams += 1;
            count = state.streams;
        });
        let head = CHUNKED.replace("text/plain", "text/event-stream");
        let last = request.header("last-event-id").join(", ");
        match count {
            1 => {
                stream.write_all(head.as_bytes())?;
                chunk(stream, "retry: 20\n\nid: 1\ndata: eins\n\n")?;
                chunk(stream, "id: 2\ndata: gr\u{fc}\u{df}e\n\n: silence\n\n")?;
                stream.write_all(b"0\r\n\r\n")?;
                Ok(true)
            }
            2 => {
                stream.write_all(head.as_bytes())?;
                chunk(stream, &format!("id: 3\ndata: after {last}\n\n"))?;
                // Without the last chunk.
                Ok(false)
            }
            _ => {
                assert_eq!(last, "3");
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
                Ok(true)
            }
        }
    }
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\n\
                       Transfer-Encoding: chunked\r\n\r\n";

fn text(stream: &mut TcpStream, lines: &str, body: &str) -> io::Result<bool> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\n{lines}Content-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(true)
}

fn chunk(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    let chunk = format!("{:x}\r\n{text}\r\n", text.len());
    stream.write_all(chunk.as_bytes())
}

/// CORS is the service's business unless the server is told otherwise.
fn shared_with_others(
    method: &str,
    request: &Received,
    stream: &mut TcpStream,
) -> io::Result<bool> {
    let origin = request.header("origin").join(", ");
    let allow = format!("Access-Control-Allow-Origin: {origin}\r\n");
    if method == "PUT" {
        let more =
            "Access-Control-Expose-Headers: X-Shown\r\nX-Shown: shown\r\nX-Hidden: hidden\r\n";
        let own = request.header("x-own").join(", ");
        return text(stream, &format!("{allow}{more}"), &format!("PUT {own}"));
    }
    assert_eq!(request.header("access-control-request-method"), ["PUT"]);
    assert_eq!(request.header("access-control-request-headers"), ["x-own"]);
    let more = "Access-Control-Allow-Methods: PUT\r\nAccess-Control-Allow-Headers: X-Own\r\n";
    text(stream, &format!("{allow}{more}"), "")
}

/// Goes on with WebSocket.
fn switch(request: &Received, stream: &mut TcpStream) -> io::Result<()> {
    assert_eq!(
        request.header("sec-websocket-protocol"),
        ["chat, superchat"]
    );
    let key = request.header("sec-websocket-key").join("");
    let accept = derive_accept_key(key.as_bytes());
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: superchat\r\n\r\n"
    )?;
    let mut socket = WebSocket::from_raw_socket(stream.try_clone()?, Role::Server, None);
    while let Ok(message) = socket.read() {
        let is_asked = message == tungstenite::Message::text("close");
        if is_asked && request.line().contains("/drop") {
            break;
        }
        let sent = match message {
            _ if is_asked => socket.close(Some(CloseFrame {
                code: CloseCode::Again,
                reason: "genug gr\u{fc}\u{df}e".into(),
            })),
            message if message.is_text() || message.is_binary() => socket.send(message),
            _ => Ok(()),
        };
        if sent.is_err() {
            break;
        }
    }
    Ok(())
}
