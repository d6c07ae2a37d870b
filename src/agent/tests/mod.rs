//! The agent between a server of the tests' own and small services on real sockets.

mod forwarding;
mod sessions;
mod upgrades;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::poll_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

use super::{Agent, Event};
use crate::config::{
    AgentConfig, AgentProcess, DialConfig, HostHeader, HostPort, LocalConfig, LocalTls, LogConfig,
    Protocol, Scheme, ServiceUrl,
};
use crate::grpc;
use crate::head::{LinesBuilder, RequestHead, ResponseHead};
use crate::link::{Ended, Exchange, Link, Observer, Tunnel};
use crate::mux::{self, Budget, HeadRead, Pool, Read, Reason};
use crate::wire::{self, AgentMessage, Hello, Rejection, ServerMessage, Welcome};

/// Nothing here takes as long; whatever does is stuck.
const STUCK: Duration = Duration::from_secs(10);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(STUCK, future).await.expect("stuck")
}

/// Within the second in which a cancel has to arrive.
async fn within_a_second<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(1), future)
        .await
        .expect("not within a second")
}

// --- The server ---------------------------------------------------------------------------------

/// What the server says to a hello.
type Policy = Arc<dyn Fn(usize) -> Result<(), Rejection> + Send + Sync>;

struct Server {
    address: SocketAddr,
    sessions: mpsc::Receiver<Session>,
    hellos: mpsc::Receiver<Hello>,
    task: AbortHandle,
}

/// A session that was welcomed, as the server sees it.
struct Session {
    link: Link,
    ended: oneshot::Receiver<Ended>,
    frames: Arc<AtomicUsize>,
    connection: AbortHandle,
}

/// What serves one connection.
struct Service {
    policy: Policy,
    hellos: mpsc::Sender<Hello>,
    sessions: mpsc::Sender<Session>,
    count: Arc<AtomicUsize>,
}

struct CountFrames(Arc<AtomicUsize>);

impl Observer for CountFrames {
    fn received(&mut self, frames: usize) {
        self.0.fetch_add(frames, Ordering::Relaxed);
    }

    fn round_trip(&mut self, _: Duration) {}
}

impl Server {
    async fn start(policy: Policy) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self::on(listener, policy)
    }

    fn on(listener: TcpListener, policy: Policy) -> Self {
        let address = listener.local_addr().unwrap();
        let (session, sessions) = mpsc::channel(16);
        let (hello, hellos) = mpsc::channel(16);
        let count = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (tell, told) = oneshot::channel();
                let service = Service {
                    policy: policy.clone(),
                    hellos: hello.clone(),
                    sessions: session.clone(),
                    count: count.clone(),
                };
                let task = tokio::spawn(async move {
                    let mut tunnel = Tunnel::server(stream);
                    if let Ok(connection) = told.await {
                        service.serve(&mut tunnel, connection).await;
                        tunnel.finish().await;
                    }
                });
                let _ = tell.send(task.abort_handle());
            }
        });
        Self {
            address,
            sessions,
            hellos,
            task: task.abort_handle(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What an agent says first.
async fn hello(tunnel: &mut Tunnel<TcpStream>) -> Option<Hello> {
    let call = tunnel.next().await.ok()?;
    assert!(matches!(call, grpc::Event::Call { .. }), "{call:?}");
    let first: AgentMessage = tunnel.message().await.ok()?;
    first.hello
}

fn welcome(generation: u64, config: mux::Config) -> ServerMessage {
    let millis = |duration: Duration| u32::try_from(duration.as_millis()).unwrap();
    let welcome = Welcome {
        version: wire::VERSION,
        port: 8100,
        public_url: "http://localhost:8100".into(),
        generation,
        heartbeat_interval_ms: millis(config.heartbeat_interval),
        heartbeat_timeout_ms: millis(config.heartbeat_timeout),
        max_exchanges: config.max_exchanges,
        capabilities: Vec::new(),
    };
    ServerMessage::from(welcome)
}

const CONFIG: mux::Config = mux::Config {
    max_exchanges: 64,
    heartbeat_interval: Duration::from_secs(10),
    heartbeat_timeout: Duration::from_secs(30),
};

impl Service {
    /// Serves until the session is over. An agent may leave at any time.
    async fn serve(self, tunnel: &mut Tunnel<TcpStream>, connection: AbortHandle) {
        let Some(hello) = hello(tunnel).await else {
            return;
        };
        self.hellos.send(hello).await.unwrap();
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        if let Err(rejection) = (self.policy)(count) {
            let message = ServerMessage::from(rejection);
            let _ = tunnel.send(&message).await;
            return;
        }
        if tunnel
            .send(&welcome(count as u64 + 1, CONFIG))
            .await
            .is_err()
        {
            return;
        }
        let link = Link::opener(CONFIG, Budget::new(Pool::new(1 << 30), 1 << 30));
        let frames = Arc::new(AtomicUsize::new(0));
        let (tell, ended) = oneshot::channel();
        let session = Session {
            link: link.clone(),
            ended,
            frames: frames.clone(),
            connection,
        };
        self.sessions.send(session).await.unwrap();
        let mut observer = CountFrames(frames);
        let how = tunnel.drive::<AgentMessage, ServerMessage>(&link, &mut observer);
        let _ = tell.send(how.await);
    }
}

impl Session {
    fn open(&self, head: RequestHead, expects_body: bool) -> Exchange {
        self.link.open(head, expects_body).unwrap()
    }

    fn get(&self, target: &str) -> Exchange {
        self.open(request("GET", target, &[("host", "visitor.test")]), false)
    }

    fn post(&self, target: &str) -> Exchange {
        self.open(request("POST", target, &[("host", "visitor.test")]), true)
    }

    /// Waits until nothing is left of any exchange.
    async fn empty(&self) {
        within_a_second(self.link.idle()).await;
        assert_eq!(self.link.exchanges(), 0);
    }
}

fn request(method: &str, target: &str, lines: &[(&str, &str)]) -> RequestHead {
    let mut builder = LinesBuilder::default();
    for (name, value) in lines {
        builder.push(name.as_bytes(), value.as_bytes()).unwrap();
    }
    RequestHead {
        method: Bytes::copy_from_slice(method.as_bytes()),
        target: Bytes::copy_from_slice(target.as_bytes()),
        lines: builder.finish(),
    }
}

async fn head(exchange: &Exchange) -> HeadRead {
    soon(poll_fn(|cx| exchange.poll_head(cx))).await
}

async fn answer(exchange: &Exchange) -> ResponseHead {
    match head(exchange).await {
        HeadRead::Answer(head) => head,
        other => panic!("no answer: {other:?}"),
    }
}

async fn read(exchange: &Exchange) -> Read {
    soon(poll_fn(|cx| exchange.poll_read(cx))).await
}

/// Status and body of a complete answer.
async fn whole(exchange: &Exchange) -> (u16, String) {
    let status = answer(exchange).await.status;
    let mut body = Vec::new();
    loop {
        match read(exchange).await {
            Read::Data(data) => body.extend_from_slice(&data),
            Read::End(_) => return (status, String::from_utf8(body).unwrap()),
            other => panic!("the answer isn't complete: {other:?}"),
        }
    }
}

/// Why there is no answer.
async fn refused(exchange: &Exchange) -> Reason {
    match head(exchange).await {
        HeadRead::Reset(reason) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

fn line<'a>(head: &'a ResponseHead, name: &str) -> Option<&'a [u8]> {
    let mut lines = head.lines.iter();
    lines.find_map(|(n, value)| (n == name.as_bytes()).then_some(value))
}

// --- The local service --------------------------------------------------------------------------

/// A connection to the local service, as the service sees it.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Reads up to and with `end`; none if the connection closes before.
    async fn until(&mut self, end: &str) -> Option<String> {
        soon(async {
            loop {
                let text = String::from_utf8_lossy(&self.buffer);
                if let Some(at) = text.find(end) {
                    let found: Vec<u8> = self.buffer.drain(..at + end.len()).collect();
                    return Some(String::from_utf8(found).unwrap());
                }
                let mut piece = [0; 4096];
                match self.stream.read(&mut piece).await {
                    Ok(0) | Err(_) => return None,
                    Ok(count) => self.buffer.extend_from_slice(&piece[..count]),
                }
            }
        })
        .await
    }

    /// The next request's head.
    async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await.expect("no request")
    }

    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Answers with a whole small answer.
    async fn answer(&mut self, body: &str) {
        let length = body.len();
        self.send(&format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
    }

    /// Waits for the agent to close the connection.
    async fn closed(&mut self) {
        while !matches!(self.stream.read(&mut [0; 4096]).await, Ok(0) | Err(_)) {}
    }
}

struct Local(TcpListener);

impl Local {
    async fn new() -> Self {
        Self(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap())
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    async fn accept(&self) -> Connection {
        Connection {
            stream: soon(self.0.accept()).await.unwrap().0,
            buffer: Vec::new(),
        }
    }
}

// --- All together -------------------------------------------------------------------------------

/// An agent between a server and a local service.
struct Stage {
    server: Server,
    session: Session,
    local: Local,
    events: mpsc::Receiver<Event>,
    stop: Option<oneshot::Sender<()>>,
    agent: JoinHandle<()>,
}

fn config(server: SocketAddr, service_port: u16) -> AgentConfig {
    AgentConfig {
        log: LogConfig::default(),
        grpc: DialConfig {
            server_address: HostPort {
                host: server.ip().to_string(),
                port: server.port(),
            },
            agent_id: "agent-1".parse().unwrap(),
            token: Some(crate::id::Secret::new("secret")),
            tls: None,
            heartbeat_timeout: Duration::from_secs(30),
        },
        local: LocalConfig {
            service_url: ServiceUrl {
                scheme: Scheme::Http,
                address: HostPort {
                    host: "127.0.0.1".into(),
                    port: service_port,
                },
            },
            protocol: Protocol::Http1,
            host_header: HostHeader::Preserve,
            response_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(60),
            max_connections: 256,
            tls: LocalTls::default(),
        },
        agent: AgentProcess {
            labels: BTreeMap::new(),
            grace: Duration::from_secs(5),
        },
    }
}

fn start(config: AgentConfig) -> (mpsc::Receiver<Event>, oneshot::Sender<()>, JoinHandle<()>) {
    let (event, events) = mpsc::channel(64);
    let (stop, stopped) = oneshot::channel();
    let agent = Agent::new(config)
        .unwrap()
        .on_event(move |happened| event.try_send(happened).unwrap());
    let agent = tokio::spawn(agent.run(async move {
        let _ = stopped.await;
    }));
    (events, stop, agent)
}

impl Stage {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut AgentConfig)) -> Self {
        let mut server = Server::start(Arc::new(|_| Ok(()))).await;
        let local = Local::new().await;
        let mut config = config(server.address, local.port());
        change(&mut config);
        let (events, stop, agent) = start(config);
        let session = soon(server.sessions.recv()).await.unwrap();
        Self {
            server,
            session,
            local,
            events,
            stop: Some(stop),
            agent,
        }
    }

    async fn event(&mut self) -> Event {
        soon(self.events.recv()).await.unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.agent.abort();
    }
}
