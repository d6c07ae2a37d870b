//! WebSocket by Python's websockets, by Node's ws and by tungstenite, as visitors and as services:
//! each visitor sees of each service through the tunnel what he sees directly.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use tungstenite::handshake::client::generate_key;
use tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tungstenite::http;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};
use tungstenite::{Bytes, HandshakeError, Message, WebSocket};

use crate::common::raw::{pattern, settles};
use crate::common::{Server, connect, get, port_range, service};
use crate::program::{NODE_PATH, Program, working};

const REASON: &str = "genug gr\u{fc}\u{df}e";

/// Who speaks WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    Python,
    Node,
}

impl Speaker {
    const ALL: [Self; 2] = [Self::Python, Self::Node];

    /// The program with its arguments, if it is installed.
    fn start(self, arguments: &[&str]) -> Option<Program> {
        let import = ["-c", "import websockets"];
        let (program, file) = match self {
            Self::Python => {
                let candidates =
                    ["python3", "/usr/bin/python3"].map(|python| [&[python][..], &import].concat());
                let candidates: Vec<&[&str]> = candidates.iter().map(|all| &all[..]).collect();
                let found = working(&candidates, "python3-websockets")?.to_owned();
                (found, "tests/peers/websocket.py")
            }
            Self::Node => {
                let candidates: &[&[&str]] = &[&["node", "-e", "require('ws')"]];
                let found = working(candidates, "nodejs node-ws")?.to_owned();
                (found, "tests/peers/websocket.js")
            }
        };
        let mut command = Command::new(program);
        command
            .arg(file)
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("NODE_PATH", NODE_PATH);
        Some(Program::start(&mut command))
    }

    /// What a visitor sees, with messages of so many bytes; none if the program is missing.
    fn visit(self, address: SocketAddr, bytes: usize) -> Option<String> {
        let arguments = ["client", &address.to_string(), &bytes.to_string()];
        let seen = self.start(&arguments)?.says();
        assert!(!seen.is_empty(), "{self:?} at {address} says why");
        Some(seen)
    }
}

/// What each of the visitors sees of a service, which has to be the same through the tunnel.
fn visited(service: SocketAddr, visitors: &[Speaker], bytes: usize) -> Vec<String> {
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("a", service);
    let mut seen = Vec::new();
    for visitor in visitors {
        let Some(directly) = visitor.visit(service, bytes) else {
            continue;
        };
        let through = visitor.visit(agent.address(), bytes).unwrap();
        assert_eq!(through, directly, "{visitor:?}");
        assert!(directly.contains("[\"refused\""), "{directly}");
        seen.push(directly.replace(", ", ","));
    }
    settles(&server);
    let metrics = get(server.admin, "/metrics").text();
    // A visitor who has said goodbye may close before the service has.
    let failures: Vec<&str> = (metrics.lines())
        .filter(|line| line.starts_with("silo_failures_total") && !line.ends_with(" 0"))
        .filter(|line| !line.contains("visitor_left"))
        .collect();
    assert!(
        failures.is_empty(),
        "{failures:?}\n{}",
        server.process.log()
    );
    seen
}

#[test]
fn pythons_service_by_all_visitors() {
    let Some(mut service) = Speaker::Python.start(&["server"]) else {
        return;
    };
    let address = service.address();
    for seen in visited(address, &Speaker::ALL, 100_000) {
        assert!(seen.contains("[\"sec-websocket-extensions\",\"permessage-deflate"));
    }
    tungstenite_visits(address);
}

#[test]
fn nodes_service_by_all_visitors() {
    let Some(mut service) = Speaker::Node.start(&["server"]) else {
        return;
    };
    let address = service.address();
    for seen in visited(address, &Speaker::ALL, 100_000) {
        assert!(seen.contains("[\"sec-websocket-extensions\",\"permessage-deflate"));
    }
    tungstenite_visits(address);
}

/// It knows no permessage-deflate, so nobody speaks it with it.
#[test]
fn tungstenites_service_by_all_visitors() {
    for seen in visited(tungstenite_service(), &Speaker::ALL, 100_000) {
        assert!(!seen.contains("[\"compressed\",true]"));
    }
}

#[test]
#[ignore = "messages of 64 MiB, compressed and not"]
fn messages_of_64_mebibytes() {
    for (serving, visiting) in [
        (Speaker::Python, Speaker::Node),
        (Speaker::Node, Speaker::Python),
    ] {
        let Some(mut service) = serving.start(&["server"]) else {
            return;
        };
        visited(service.address(), &[visiting], 64 << 20);
    }
}

// --- tungstenite --------------------------------------------------------------------------------

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(None)
        .max_frame_size(None)
}

/// What websocket.py says a service does.
fn tungstenite_service() -> SocketAddr {
    service(|stream| {
        stream.set_nodelay(true).unwrap();
        let mut path = String::new();
        let mut lines = String::new();
        #[expect(clippy::result_large_err, reason = "tungstenite wants it so")]
        let agree = |request: &Request, mut response: Response| -> Result<_, ErrorResponse> {
            path = request.uri().to_string();
            lines = lines_of(request.headers());
            if path == "/refuse" {
                let refusal = http::Response::builder()
                    .status(401)
                    .header("WWW-Authenticate", "Basic realm=\"x\"")
                    .header("Content-Length", "12")
                    .body(Some("who are you?".to_owned()));
                return Err(refusal.unwrap());
            }
            let offer = request.headers().get("sec-websocket-protocol");
            let offer = offer.map_or("", |offer| offer.to_str().unwrap());
            let known = ["superchat", "chat"].iter();
            let mut chosen = known.filter(|one| offer.split(',').any(|all| all.trim() == **one));
            if let Some(one) = chosen.next() {
                let value = one.parse().unwrap();
                response
                    .headers_mut()
                    .insert("sec-websocket-protocol", value);
            }
            Ok(response)
        };
        let accepted = tungstenite::accept_hdr_with_config(stream, agree, Some(config()));
        if let Ok(socket) = accepted {
            let _ = serve(socket, &path, lines);
        }
    })
}

/// Without those that differ each time.
fn lines_of(headers: &http::HeaderMap) -> String {
    let mut lines: Vec<_> = headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_bytes().escape_ascii().to_string()))
        .filter(|(name, _)| {
            let passing = ["host", "sec-websocket-key", "x-request-id"];
            !passing.contains(name) && !name.starts_with("x-forwarded-")
        })
        .map(|(name, value)| match name {
            "connection" | "upgrade" => (name, value.to_lowercase()),
            _ => (name, value),
        })
        .collect();
    lines.sort();
    serde_json::to_string(&lines).unwrap()
}

fn serve(
    mut socket: WebSocket<TcpStream>,
    path: &str,
    lines: String,
) -> Result<(), tungstenite::Error> {
    match path {
        "/headers" => socket.send(Message::text(lines))?,
        "/ping" => {
            socket.send(Message::Ping("p".into()))?;
            while socket.read()? != Message::Pong("p".into()) {}
            socket.send(Message::text("ponged"))?;
        }
        _ => {}
    }
    loop {
        let message = socket.read()?;
        if !message.is_text() && !message.is_binary() {
            continue;
        }
        if path == "/drop" {
            return Ok(());
        }
        if let Some(code) = path.strip_prefix("/close?") {
            let code = CloseCode::from(code.parse::<u16>().unwrap());
            socket.close(Some(CloseFrame {
                code,
                reason: REASON.into(),
            }))?;
            continue;
        }
        if path != "/pieces" {
            socket.send(message)?;
            continue;
        }
        let kind = if message.is_text() {
            Data::Text
        } else {
            Data::Binary
        };
        for fragment in fragments(kind, &message.into_data()) {
            socket.send(fragment)?;
        }
    }
}

/// A message in three frames.
fn fragments(kind: Data, data: &Bytes) -> [Message; 3] {
    let frame = |kind, range, is_final| {
        let header = FrameHeader {
            is_final,
            opcode: OpCode::Data(kind),
            ..FrameHeader::default()
        };
        Message::Frame(Frame::from_payload(header, data.slice(range)))
    };
    [
        frame(kind, 0..1, false),
        frame(Data::Continue, 1..7, false),
        frame(Data::Continue, 7..data.len(), true),
    ]
}

/// tungstenite as a visitor of a service of somebody else's, directly and through the tunnel.
fn tungstenite_visits(service: SocketAddr) {
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("a", service);
    assert_eq!(seen_at(agent.address()), seen_at(service));
    settles(&server);
    // Not asked for failures: it leaves a refusal before its body has come.
}

fn seen_at(address: SocketAddr) -> Vec<String> {
    let mut seen = Vec::new();
    let open = |path: &str, offer: &str| {
        let request = Request::builder()
            .uri(format!("ws://{address}{path}"))
            .header("Host", address.to_string())
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", generate_key());
        let request = match offer {
            "" => request,
            offer => request.header("Sec-WebSocket-Protocol", offer),
        };
        let request = request.body(()).unwrap();
        tungstenite::client::client_with_config(request, connect(address), Some(config()))
            .map_err(Box::new)
    };

    let (mut socket, answer) = open("/echo", "").unwrap();
    assert_eq!(answer.status(), 101);
    for message in [
        Message::text(""),
        Message::text("gr\u{fc}\u{df}e"),
        Message::binary(pattern(125)),
        Message::binary(pattern(126)),
        Message::binary(pattern(65_536)),
        Message::binary(pattern(300_000)),
    ] {
        socket.send(message.clone()).unwrap();
        assert!(socket.read().unwrap() == message);
    }
    let whole = Bytes::from_static(b"in pieces on the way there");
    for fragment in fragments(Data::Binary, &whole) {
        socket.send(fragment).unwrap();
        socket.send(Message::Ping("between".into())).unwrap();
    }
    let mut pongs = 0;
    loop {
        match socket.read().unwrap() {
            Message::Pong(_) => pongs += 1,
            message => break assert_eq!(message, Message::Binary(whole.clone())),
        }
    }
    while pongs < 3 {
        assert!(socket.read().unwrap().is_pong());
        pongs += 1;
    }
    let reason = CloseFrame {
        code: CloseCode::from(4000),
        reason: REASON.into(),
    };
    socket.close(Some(reason)).unwrap();
    seen.push(format!("{:?}", socket.read()));
    end(socket);

    for offer in ["chat", "chat, superchat"] {
        let (socket, answer) = open("/echo", offer).unwrap();
        let chosen = answer.headers().get("sec-websocket-protocol").unwrap();
        seen.push(chosen.to_str().unwrap().to_owned());
        end(socket);
    }
    for path in ["/close?1000", "/close?1011", "/close?4999", "/drop"] {
        let (mut socket, _) = open(path, "").unwrap();
        socket.send(Message::text("x")).unwrap();
        seen.push(format!("{path}: {:?}", socket.read()));
        end(socket);
    }
    match open("/refuse", "").map_err(|error| *error) {
        Err(HandshakeError::Failure(tungstenite::Error::Http(answer))) => {
            let asks = answer.headers().get("www-authenticate").cloned();
            seen.push(format!("{} {asks:?}", answer.status()));
        }
        other => panic!("{other:?}"),
    }
    assert!(seen.last().unwrap().starts_with("401"), "{seen:?}");
    seen
}

/// Closes a connection in good order.
fn end(mut socket: WebSocket<TcpStream>) {
    let _ = socket.close(None);
    while socket.read().is_ok() {}
}
