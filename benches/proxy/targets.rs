//! What is measured: the service itself, a plain reverse proxy before it, and a tunnel.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::CONNECTION;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use silo_proxy::agent::{Agent, Event};
use silo_proxy::config::{AgentConfig, ServerConfig};
use silo_proxy::server::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::load::{ZEROS, content_length, find, runtime};

const PATIENCE: Duration = Duration::from_secs(20);

/// The ports that the server may give its agent; one is used.
const PORTS: std::ops::RangeInclusive<u16> = 28_000..=28_099;

/// Where a request goes.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
}

pub(crate) struct Targets {
    all: [Target; 3],
    /// Keeps it running.
    _server: Server,
}

impl Targets {
    /// Starts everything, each on a thread of its own, until the process ends.
    pub(crate) fn start() -> Self {
        let direct = serve(service);
        let pool = Arc::new(Pool::new(direct));
        let hop = serve(move |stream| forward_all(stream, pool.clone()));
        let (server, proxy) = tunnel(direct);
        let target = |name, address| Target { name, address };
        Self {
            all: [
                target("proxy", proxy),
                target("hop", hop),
                target("direct", direct),
            ],
            _server: server,
        }
    }

    pub(crate) fn all(&self) -> [Target; 3] {
        self.all
    }
}

/// A server and an agent before the service, and the address of the agent's port.
fn tunnel(service: SocketAddr) -> (Server, SocketAddr) {
    let mut config = ServerConfig::default();
    config.http.port = 0;
    config.http.agent_port_range = PORTS;
    config.grpc.port = 0;
    config.grpc.host = Ipv4Addr::LOCALHOST.into();
    config.server.workers = Some(1);
    let server = Server::start(config).unwrap();

    let config = AgentConfig::new(
        server.tunnel_address().to_string().parse().unwrap(),
        "bench".parse().unwrap(),
        format!("http://{service}").parse().unwrap(),
    );
    let (give_port, port) = sync_channel(1);
    let agent = Agent::new(config)
        .unwrap()
        .on_event(move |event| match event {
            Event::Connected { port, .. } => give_port.send(port).unwrap(),
            event => panic!("the agent lost its session: {event:?}"),
        });
    std::thread::spawn(move || runtime().block_on(agent.run(std::future::pending())));
    let port = port.recv_timeout(PATIENCE).unwrap();
    (server, (Ipv4Addr::LOCALHOST, port).into())
}

/// Runs a task for each connection, on a thread of its own.
fn serve<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (give_address, address) = sync_channel(1);
    std::thread::spawn(move || {
        runtime().block_on(async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let listener = socket.listen(1024).unwrap();
            give_address.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                tokio::spawn(handle(stream));
            }
        });
    });
    address.recv().unwrap()
}

/// As little as a service can do, so that the ways to it show: `GET /small`, `GET /bytes/SIZE`,
/// and `POST /sink`, which takes a body of known length.
async fn service(mut stream: TcpStream) {
    // A connection that breaks is its peer's to explain.
    let _ = answer_all(&mut stream).await;
}

const SMALL: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\nsmall answer of thirty-four bytes\n";
// A byte too many, and hyper would give up the connection after each answer.
const _: () = assert!(SMALL.len() == 39 + 34);

async fn answer_all(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        let end = loop {
            if let Some(at) = find(&buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = &buffer[..end];
        let closes = find(head, b"onnection: close").is_some();
        if let Some(rest) = head.strip_prefix(b"GET /bytes/") {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit());
            let mut left = digits.fold(0, |value, digit| value * 10 + usize::from(digit - b'0'));
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {left}\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            while left > 0 {
                left -= stream.write(&ZEROS[..left.min(ZEROS.len())]).await?;
            }
            buffer.drain(..end);
        } else {
            let mut left = content_length(head).saturating_sub((buffer.len() - end) as u64);
            buffer.clear();
            while left > 0 {
                buffer.clear();
                match stream.read_buf(&mut buffer).await? {
                    0 => return Ok(()),
                    count => left = left.saturating_sub(count as u64),
                }
            }
            buffer.clear();
            stream.write_all(SMALL).await?;
        }
        if closes {
            return Ok(());
        }
    }
}

/// Connections to the service that may be idle, the latest used last.
struct Pool {
    service: SocketAddr,
    connections: Mutex<Vec<SendRequest<Incoming>>>,
}

impl Pool {
    fn new(service: SocketAddr) -> Self {
        Self {
            service,
            connections: Mutex::new(Vec::new()),
        }
    }

    fn take(&self) -> Option<SendRequest<Incoming>> {
        let mut connections = self.connections.lock().unwrap();
        connections.retain(|connection| !connection.is_closed());
        let idle = connections.iter().rposition(SendRequest::is_ready)?;
        Some(connections.remove(idle))
    }

    fn give(&self, connection: SendRequest<Incoming>) {
        self.connections.lock().unwrap().push(connection);
    }
}

/// A reverse proxy as one writes it with hyper in an hour: no limits, no checks, a pool.
async fn forward_all(stream: TcpStream, pool: Arc<Pool>) {
    let service = service_fn(move |request| forward(pool.clone(), request));
    // A connection that breaks is its peer's to explain.
    let _ = hyper::server::conn::http1::Builder::new()
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn forward(
    pool: Arc<Pool>,
    mut request: Request<Incoming>,
) -> Result<Response<Incoming>, hyper::Error> {
    let mut connection = match pool.take() {
        Some(connection) => connection,
        None => {
            let stream = TcpStream::connect(pool.service).await.unwrap();
            stream.set_nodelay(true).unwrap();
            let (sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            sender
        }
    };
    request.headers_mut().remove(CONNECTION);
    let mut response = connection.send_request(request).await?;
    response.headers_mut().remove(CONNECTION);
    // It is ready for another request when the body has been read.
    pool.give(connection);
    Ok(response)
}
