//! Services that agree to upgrades, visitors who ask for them, and what they say to each other.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

use crate::common::raw::{pattern, send};
use crate::common::{Agent, Server, connect, port_range, read_head, service};

/// A request for an upgrade.
pub(crate) const ASK: &str =
    "GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";

/// The answer that agrees to it.
pub(crate) const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\
                      X-Protocol: 7\r\nKeep-Alive: timeout=5\r\n\r\n";

/// A service that agrees to every upgrade and then hands the connection on.
pub(crate) fn agreeing(then: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    service(move |mut stream| {
        stream.set_nodelay(true).unwrap();
        if read_head(&mut stream).is_ok() && stream.write_all(SWITCH.as_bytes()).is_ok() {
            then(stream);
        }
    })
}

/// A service that sends back what it gets, until there is no more.
pub(crate) fn echo() -> SocketAddr {
    agreeing(|mut stream| {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
}

/// A server, and an agent for the service.
pub(crate) fn start(service: SocketAddr) -> (Server, Agent) {
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("a", service);
    (server, agent)
}

/// A visitor's connection that has been upgraded.
pub(crate) fn upgraded(agent: &Agent) -> TcpStream {
    let mut visitor = send(agent.address(), ASK);
    let head = read_head(&mut visitor).unwrap();
    assert!(
        head.starts_with(b"HTTP/1.1 101 "),
        "{}",
        String::from_utf8_lossy(&head)
    );
    visitor
}

/// So many bytes.
pub(crate) fn read_exactly(stream: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Sums bytes up so that a lost, doubled or moved one shows.
pub(crate) fn sum(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// An echo of so many bytes, in pieces whose sizes have nothing to do with each other.
pub(crate) fn echo_of(mut visitor: TcpStream, megabytes: usize) {
    let block = pattern((1 << 20) + 7);
    let mut writer = visitor.try_clone().unwrap();
    let writing = thread::spawn(move || {
        let mut state = 0;
        for _ in 0..megabytes {
            writer.write_all(&block).unwrap();
            state = sum(state, &block);
        }
        writer.shutdown(Shutdown::Write).unwrap();
        (state, block.len() * megabytes)
    });
    let mut state = 0;
    let mut length = 0;
    let mut buffer = vec![0; 200_000];
    loop {
        match visitor.read(&mut buffer).unwrap() {
            0 => break,
            count => {
                state = sum(state, &buffer[..count]);
                length += count;
            }
        }
    }
    assert_eq!((state, length), writing.join().unwrap());
}

/// What messages may be: as large as the tests send.
pub(crate) fn large() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(128 << 20))
        .max_frame_size(Some(128 << 20))
}

/// A WebSocket service that sends back each message.
pub(crate) fn websocket_echo() -> SocketAddr {
    service(|stream| {
        stream.set_nodelay(true).unwrap();
        let Ok(mut socket) = tungstenite::accept_with_config(stream, Some(large())) else {
            return;
        };
        while let Ok(message) = socket.read() {
            if (message.is_text() || message.is_binary()) && socket.send(message).is_err() {
                return;
            }
        }
    })
}

/// A client that has been welcomed.
pub(crate) fn websocket(address: SocketAddr) -> WebSocket<TcpStream> {
    let url = format!("ws://{address}/chat");
    let (socket, answer) =
        tungstenite::client::client_with_config(url, connect(address), Some(large())).unwrap();
    assert_eq!(answer.status(), 101);
    socket
}

/// The same bytes through the tunnel as without it.
pub(crate) fn both_ways(
    service: SocketAddr,
    agent: &Agent,
    talk: impl Fn(&mut WebSocket<TcpStream>),
) {
    for address in [service, agent.address()] {
        let mut socket = websocket(address);
        talk(&mut socket);
        socket.close(None).unwrap();
        loop {
            match socket.read() {
                Ok(message) => assert!(message.is_close(), "{message}"),
                Err(tungstenite::Error::ConnectionClosed) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Many tiny frames in a row, with as many echoes on the way back at once.
pub(crate) fn tiny_frames(socket: &mut WebSocket<TcpStream>, count: u32) {
    let stream = socket.get_ref().try_clone().unwrap();
    let mut reader = WebSocket::from_raw_socket(stream, Role::Client, None);
    let reading = thread::spawn(move || {
        for number in 0..count {
            let text = number.to_string();
            assert_eq!(reader.read().unwrap(), Message::text(text));
        }
    });
    for number in 0..count {
        socket.send(Message::text(number.to_string())).unwrap();
    }
    reading.join().unwrap();
}
