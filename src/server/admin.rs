//! The admin port: who is here, is the server ready, what did it count.
//!
//! It runs on a thread and a one-thread runtime of its own and takes no lock that a proxied request
//! takes, so that the proxy under load can't delay an answer here, nor a crowd of pollers there.
//! The list of agents is written in pieces, each when the poller has room for it: a poller that
//! doesn't read holds a snapshot and a few pieces, however long the list is.
//!
//! No answer ever carries a CORS header: a page in somebody's browser has no business here.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};
use http_body::Frame;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, Serializer};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower_service::Service;

use crate::id::{AgentId, Secret};
use crate::metrics::{self, Gauge, Metrics};
use crate::server::directory::{Directory, Row, Snapshot};

/// What the admin port shows, and to whom.
#[derive(Debug)]
pub struct AdminState {
    /// The agents.
    pub directory: Arc<Directory>,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// What `GET /ready` answers.
    pub readiness: Arc<Readiness>,
    /// Asked for on everything but `GET /health`; without one, everybody who can connect may read.
    pub api_key: Option<Secret>,
}

/// The running admin port.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
    thread: JoinHandle<()>,
}

impl Admin {
    /// Serves `listener` on a new thread until `shutdown` completes; then running answers have a
    /// second to end.
    ///
    /// Fails if the thread, its runtime or the socket can't be set up.
    pub fn start(
        listener: TcpListener,
        state: AdminState,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_with(LIMITS, listener, state, shutdown)
    }

    fn start_with(
        limits: Limits,
        listener: TcpListener,
        state: AdminState,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (started, outcome) = mpsc::sync_channel(1);
        // The runtime is built where it runs and ends, since none can be dropped on a thread that
        // runs another one.
        let thread = std::thread::Builder::new()
            .name("silo-admin".into())
            .spawn(move || match set_up(listener) {
                Ok((runtime, listener)) => {
                    // The receiver waits for exactly this message.
                    let _ = started.send(Ok(()));
                    runtime.block_on(accept(limits, listener, router(state), shutdown));
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })?;
        outcome.recv().map_err(io::Error::other)??;
        Ok(Self { address, thread })
    }

    /// The address that the listener is bound to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the thread's end, which follows a second at most after the shutdown signal. It
    /// blocks: not for a thread that runs tasks.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("the admin thread panicked");
        }
    }
}

/// Whether the server is ready for agents and visitors: a latch that each step of the start
/// releases, and that drain sets again for good.
#[derive(Debug, Default)]
pub struct Readiness {
    /// Held only to look or to change; the admin thread reads it, start and drain write it.
    inner: Mutex<Latch>,
}

#[derive(Debug, Default)]
struct Latch {
    /// How many steps of each name are outstanding; a name goes with its last step.
    outstanding: BTreeMap<&'static str, usize>,
    draining: bool,
}

impl Readiness {
    /// A latch without steps: ready.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a step; the server isn't ready until [`Step::release`]. A step that is dropped instead
    /// has failed and stays outstanding.
    pub fn step(self: &Arc<Self>, name: &'static str) -> Step {
        *self.lock().outstanding.entry(name).or_default() += 1;
        Step {
            readiness: Arc::clone(self),
            name,
        }
    }

    /// The server drains: it isn't ready any more and won't be again.
    pub fn drain(&self) {
        self.lock().draining = true;
    }

    /// The state now.
    pub fn state(&self) -> ReadyState {
        let latch = self.lock();
        if latch.draining {
            ReadyState::Draining
        } else if latch.outstanding.is_empty() {
            ReadyState::Ready
        } else {
            ReadyState::Starting {
                waiting_for: latch.outstanding.keys().copied().collect(),
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Latch> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A step of the start that the server isn't ready without.
#[derive(Debug)]
#[must_use = "a step that is dropped without a release stays outstanding"]
pub struct Step {
    readiness: Arc<Readiness>,
    name: &'static str,
}

impl Step {
    /// The step is done.
    pub fn release(self) {
        let mut latch = self.readiness.lock();
        if let Some(count) = latch.outstanding.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                latch.outstanding.remove(self.name);
            }
        }
    }
}

/// What `GET /ready` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum ReadyState {
    /// Agents and visitors are served.
    Ready,
    /// Steps of the start are outstanding.
    Starting {
        /// Their names, sorted.
        waiting_for: Vec<&'static str>,
    },
    /// The server is shutting down.
    Draining,
}

/// What one peer, or many, can make the admin port hold.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections open at once. One more is closed at once: the poller sees it and tries again,
    /// while a descriptor held for it would be missing on an agent's port.
    connections: usize,
    /// From the connection to its first complete head. A slow head is no poller.
    first_head: Duration,
    /// From one answer to the next complete head. Longer than the usual period of a poller (up to
    /// 60 s), so that the connection is there when he comes again.
    idle: Duration,
    /// How long the peer may take nothing of an answer (Linux; a bound on what stalled readers
    /// hold).
    stall: Duration,
    /// From the shutdown signal to the end of answers that are being written.
    grace: Duration,
}

const LIMITS: Limits = Limits {
    connections: 4096,
    first_head: Duration::from_secs(10),
    idle: Duration::from_secs(75),
    stall: Duration::from_secs(30),
    grace: Duration::from_secs(1),
};

/// The largest head that is read, and about what is buffered of an answer ahead of the peer.
const BUFFER_BYTES: usize = 64 * 1024;

/// A failed `accept` is tried again after this long: without file descriptors it fails at once, and
/// would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn set_up(listener: TcpListener) -> io::Result<(Runtime, tokio::net::TcpListener)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    Ok((runtime, listener))
}

async fn accept(
    limits: Limits,
    listener: tokio::net::TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let (stop, stopped) = watch::channel(());
    let accepting = async {
        let mut failing = false;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    failing = false;
                    if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                        let serving = serve(limits, stream, router.clone(), stopped.clone(), slot);
                        tokio::spawn(serving);
                    }
                }
                // The peer was gone before its turn came (accept(2)); there may be others.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "the admin port can't accept connections");
                    }
                    failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        () = accepting => {}
    }
    drop(listener);
    drop(stop);
    // Every connection holds a slot to its end, so having them all means that none is left.
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(limits.grace, slots.acquire_many(all)).await;
}

/// Serves one connection to its end. The slot is held as long as the socket is.
async fn serve(
    limits: Limits,
    stream: TcpStream,
    router: Router,
    mut stopped: watch::Receiver<()>,
    _slot: OwnedSemaphorePermit,
) {
    // Without these two the connection works all the same.
    let _ = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(limits.stall));

    let begun = Arc::new(AtomicBool::new(false));
    let service = {
        let begun = Arc::clone(&begun);
        hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            begun.store(true, Relaxed);
            router.clone().call(request)
        })
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // hyper counts the time between requests as part of the next head's.
        .header_read_timeout(limits.idle)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let mut first_head = std::pin::pin!(tokio::time::sleep(limits.first_head));
    let mut waiting = true;
    let mut serving = true;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an admin connection ended early");
                }
                break;
            }
            () = first_head.as_mut(), if waiting => {
                if !begun.load(Relaxed) {
                    break;
                }
                waiting = false;
            }
            _ = stopped.changed(), if serving => {
                serving = false;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn router(state: AdminState) -> Router {
    let state = Arc::new(state);
    // A route is behind the key unless it is named outside of `keyed`; so is every unknown path.
    let keyed = Router::new()
        .route("/ready", get(ready))
        .route("/agents", get(agents))
        .route("/agents/{id}", get(agent))
        .route("/metrics", get(scrape))
        .fallback(unknown)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            check_key,
        ));
    Router::new()
        .route("/health", get(health))
        .merge(keyed)
        .with_state(state)
}

async fn check_key(State(state): State<Arc<AdminState>>, request: Request, next: Next) -> Response {
    match &state.api_key {
        Some(key) if !shows_key(request.headers(), key) => {
            let detail = "this server asks for its API key, as X-API-Key or Authorization: Bearer";
            let mut answer = problem(StatusCode::UNAUTHORIZED, detail);
            answer.headers_mut().insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"silo-proxy\""),
            );
            answer
        }
        _ => next.run(request).await,
    }
}

fn shows_key(headers: &HeaderMap, key: &Secret) -> bool {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
    });
    let plain = headers.get("x-api-key").map(HeaderValue::as_bytes);
    [bearer, plain]
        .into_iter()
        .flatten()
        .any(|candidate| key.matches(candidate))
}

async fn health() -> Response {
    json(StatusCode::OK, r#"{"status":"ok"}"#)
}

async fn ready(State(state): State<Arc<AdminState>>) -> Response {
    let ready = state.readiness.state();
    let status = match ready {
        ReadyState::Ready => StatusCode::OK,
        ReadyState::Starting { .. } | ReadyState::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    rendered(status, serde_json::to_vec(&ready))
}

async fn agents(State(state): State<Arc<AdminState>>) -> Response {
    let mut list = AgentList::new(state.directory.read());
    let first = match list.piece() {
        Ok(first) => first,
        Err(error) => return failed(&error),
    };
    // A short list has a length; a long one goes out piece by piece.
    if list.stage == Stage::Done {
        json(StatusCode::OK, first)
    } else {
        list.first = Some(first);
        json(StatusCode::OK, Body::new(list))
    }
}

async fn agent(
    State(state): State<Arc<AdminState>>,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let Some(id) = id.ok().and_then(|Path(id)| id.parse::<AgentId>().ok()) else {
        return problem(StatusCode::BAD_REQUEST, "this is no agent id");
    };
    match state.directory.read().get(id.as_str()) {
        Some(row) => rendered(StatusCode::OK, serde_json::to_vec(&Agent(row))),
        None => problem(StatusCode::NOT_FOUND, "no agent of this id is here"),
    }
}

async fn scrape(State(state): State<Arc<AdminState>>) -> Response {
    let headers = [
        (CONTENT_TYPE, metrics::CONTENT_TYPE),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, state.metrics.render()).into_response()
}

async fn unknown() -> Response {
    problem(StatusCode::NOT_FOUND, "there is nothing at this path")
}

fn json(status: StatusCode, body: impl Into<Body>) -> Response {
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-store"),
    ];
    (status, headers, body.into()).into_response()
}

fn rendered(status: StatusCode, body: serde_json::Result<Vec<u8>>) -> Response {
    match body {
        Ok(body) => json(status, body),
        Err(error) => failed(&error),
    }
}

fn failed(error: &serde_json::Error) -> Response {
    tracing::error!(%error, "an admin answer can't be written as JSON");
    problem(
        StatusCode::INTERNAL_SERVER_ERROR,
        "the answer can't be written",
    )
}

/// A failure in the form of RFC 9457.
fn problem(status: StatusCode, detail: &'static str) -> Response {
    #[derive(Serialize)]
    struct Problem {
        title: &'static str,
        status: u16,
        detail: &'static str,
    }
    let problem = Problem {
        title: status.canonical_reason().unwrap_or("Error"),
        status: status.as_u16(),
        detail,
    };
    let headers = [
        (CONTENT_TYPE, "application/problem+json"),
        (CACHE_CONTROL, "no-store"),
    ];
    // Words and a number always are JSON; should they not be, the status still tells.
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    (status, headers, body).into_response()
}

/// The size from which a piece of the list is handed on. A row is some 400 bytes.
const PIECE_BYTES: usize = 32 * 1024;

/// `{"agents":[...],"count":N}`, rendered as it is sent, from one snapshot: the members are those
/// of one moment, the live figures those of the moment each row is written.
struct AgentList {
    snapshot: Arc<Snapshot>,
    stage: Stage,
    /// Rendered ahead, to find out whether it is all.
    first: Option<Bytes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The row at this index is next.
    Row(usize),
    /// The closing bracket was written.
    Done,
}

impl AgentList {
    fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            stage: Stage::Row(0),
            first: None,
        }
    }

    /// Renders until the piece is full or the list complete; empty once it is.
    fn piece(&mut self) -> serde_json::Result<Bytes> {
        let Stage::Row(start) = self.stage else {
            return Ok(Bytes::new());
        };
        let rows = self.snapshot.rows();
        let mut piece = Vec::with_capacity(PIECE_BYTES + 1024);
        if start == 0 {
            piece.extend_from_slice(br#"{"agents":["#);
        }
        for (index, row) in rows.iter().enumerate().skip(start) {
            if piece.len() >= PIECE_BYTES {
                self.stage = Stage::Row(index);
                return Ok(piece.into());
            }
            if index > 0 {
                piece.push(b',');
            }
            serde_json::to_writer(&mut piece, &Agent(row))?;
        }
        piece.extend_from_slice(br#"],"count":"#);
        serde_json::to_writer(&mut piece, &rows.len())?;
        piece.push(b'}');
        self.stage = Stage::Done;
        Ok(piece.into())
    }
}

impl http_body::Body for AgentList {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        let piece = match self.first.take() {
            Some(first) => Ok(first),
            None => self.piece(),
        };
        Poll::Ready(match piece {
            Ok(piece) if piece.is_empty() => None,
            piece => Some(piece.map(Frame::data)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.stage == Stage::Done
    }
}

/// A row as `GET /agents` shows it, with the live figures of the moment it is written.
struct Agent<'a>(&'a Row);

impl Serialize for Agent<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            agent_id: &'a str,
            port: u16,
            last_seen: Timestamp,
            url: &'a str,
            state: &'static str,
            generation: u64,
            peer: Option<SocketAddr>,
            connected_at: Timestamp,
            requests: u64,
            exchanges: u64,
            connections: u64,
            bytes_in: u64,
            bytes_out: u64,
            rtt_ms: Option<f64>,
            version: &'a str,
            labels: &'a BTreeMap<String, String>,
        }
        let Self(row) = self;
        let stats = &row.stats;
        Shown {
            agent_id: row.agent_id.as_str(),
            port: row.port,
            last_seen: Timestamp::from_ms(stats.last_seen_ms()),
            url: &row.public_url,
            state: row.state.as_str(),
            generation: row.generation.0,
            peer: row.peer,
            connected_at: Timestamp::from_time(row.connected_at),
            requests: stats.requests.get(),
            exchanges: level(&stats.exchanges_open),
            connections: level(&stats.connections_open),
            bytes_in: stats.bytes_in.get(),
            bytes_out: stats.bytes_out.get(),
            rtt_ms: stats.rtt().map(|rtt| rtt.as_micros() as f64 / 1000.0),
            version: &row.version,
            labels: &row.labels,
        }
        .serialize(serializer)
    }
}

/// A gauge that two threads count may be seen between the two.
fn level(gauge: &Gauge) -> u64 {
    gauge.get().max(0).unsigned_abs()
}

/// A time as RFC 3339 with milliseconds, in UTC.
struct Timestamp(SystemTime);

impl Timestamp {
    /// 9999-12-31T23:59:59.999Z, the last that RFC 3339 can write.
    const LAST_MS: u64 = 253_402_300_799_999;

    fn from_ms(since_epoch: u64) -> Self {
        Self(UNIX_EPOCH + Duration::from_millis(since_epoch.min(Self::LAST_MS)))
    }

    fn from_time(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_ms(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_millis(self.0).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use serde_json::{Value, json};
    use tokio::sync::oneshot;

    use crate::id::Generation;
    use crate::server::directory::{AgentStats, RowState};

    const KEY: &str = "correct horse";

    struct Server {
        admin: Admin,
        directory: Arc<Directory>,
        metrics: Arc<Metrics>,
        readiness: Arc<Readiness>,
        stop: oneshot::Sender<()>,
    }

    impl Server {
        fn start() -> Self {
            Self::start_with(LIMITS, None)
        }

        fn start_with(limits: Limits, api_key: Option<Secret>) -> Self {
            let directory = Directory::new();
            let metrics = Metrics::new(1, UNIX_EPOCH);
            let readiness = Readiness::new();
            let state = AdminState {
                directory: Arc::clone(&directory),
                metrics: Arc::clone(&metrics),
                readiness: Arc::clone(&readiness),
                api_key,
            };
            let (stop, stopped) = oneshot::channel();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let shutdown = async move { drop(stopped.await) };
            let admin = Admin::start_with(limits, listener, state, shutdown).unwrap();
            Self {
                admin,
                directory,
                metrics,
                readiness,
                stop,
            }
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.admin.address()).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            stream
        }

        fn ask(&self, method: &str, path: &str, lines: &str) -> Answer {
            let mut stream = self.connect();
            write!(
                stream,
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n"
            )
            .unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            Answer::parse(&bytes)
        }

        fn get(&self, path: &str) -> Answer {
            self.ask("GET", path, "")
        }

        fn stop(self) {
            drop(self.stop);
            self.admin.join();
        }
    }

    struct Answer {
        status: u16,
        head: String,
        body: Vec<u8>,
    }

    impl Answer {
        fn parse(bytes: &[u8]) -> Self {
            let end = bytes
                .windows(4)
                .position(|window| window == b"\r\n\r\n")
                .unwrap();
            let head = String::from_utf8(bytes[..end].to_vec())
                .unwrap()
                .to_lowercase();
            let body = &bytes[end + 4..];
            let body = match head.contains("\r\ntransfer-encoding: chunked") {
                true => dechunk(body),
                false => body.to_vec(),
            };
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            Self { status, head, body }
        }

        fn json(&self) -> Value {
            serde_json::from_slice(&self.body).unwrap()
        }

        fn has(&self, line: &str) -> bool {
            self.head.lines().any(|found| found == line)
        }
    }

    fn dechunk(mut rest: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = rest
                .windows(2)
                .position(|window| window == b"\r\n")
                .unwrap();
            let digits = std::str::from_utf8(&rest[..line]).unwrap();
            let size = usize::from_str_radix(digits, 16).unwrap();
            if size == 0 {
                return body;
            }
            body.extend_from_slice(&rest[line + 2..][..size]);
            rest = &rest[line + 2 + size + 2..];
        }
    }

    fn row(id: &str, port: u16) -> Row {
        Row {
            agent_id: id.parse().unwrap(),
            port,
            generation: Generation(7),
            state: RowState::Serving,
            peer: Some("[2001:db8::1]:4711".parse().unwrap()),
            connected_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            version: "0.1.0".into(),
            labels: BTreeMap::from([("site".into(), "Zürich \"1\"".into())]),
            public_url: format!("http://proxy.example:{port}"),
            stats: AgentStats::new(UNIX_EPOCH + Duration::from_millis(1_700_000_001_234)),
        }
    }

    fn publish(server: &Server, rows: Vec<Row>) {
        let rows = rows.into_iter().map(Arc::new).collect();
        server.directory.publish(Arc::new(Snapshot::new(1, rows)));
    }

    #[test]
    fn health_is_ok() {
        let server = Server::start();
        let answer = server.get("/health");
        assert_eq!(
            (answer.status, &answer.body[..]),
            (200, &br#"{"status":"ok"}"#[..])
        );
        assert!(answer.has("content-type: application/json"));
        server.stop();
    }

    #[test]
    fn the_server_is_ready_between_its_last_step_and_drain() {
        let server = Server::start();
        let [tunnel, first, second] =
            ["tunnel listener", "acceptor", "acceptor"].map(|name| server.readiness.step(name));
        let check = |status, body: Value| {
            let answer = server.get("/ready");
            assert_eq!((answer.status, answer.json()), (status, body));
        };
        check(
            503,
            json!({"status": "starting", "waiting_for": ["acceptor", "tunnel listener"]}),
        );
        tunnel.release();
        first.release();
        check(
            503,
            json!({"status": "starting", "waiting_for": ["acceptor"]}),
        );
        second.release();
        check(200, json!({"status": "ready"}));
        let failed = server.readiness.step("state file");
        drop(failed);
        check(
            503,
            json!({"status": "starting", "waiting_for": ["state file"]}),
        );
        server.readiness.drain();
        check(503, json!({"status": "draining"}));
        assert_eq!(server.get("/health").status, 200);
        server.stop();
    }

    #[test]
    fn agents_are_listed_with_their_live_figures() {
        let server = Server::start();
        assert_eq!(server.get("/agents").body, br#"{"agents":[],"count":0}"#);

        let gone = Row {
            state: RowState::Leased,
            peer: None,
            ..row("agent-2", 8101)
        };
        let here = row("agent-1", 8100);
        let stats = Arc::clone(&here.stats);
        publish(&server, vec![gone, here]);
        stats.requests.add(3);
        stats.exchanges_open.inc();
        stats.connections_open.dec();
        stats.bytes_in.add(10);
        stats.bytes_out.add(20);
        stats.measured_rtt(Duration::from_micros(312));

        let expected = json!({
            "agent_id": "agent-1", "port": 8100, "last_seen": "2023-11-14T22:13:21.234Z",
            "url": "http://proxy.example:8100", "state": "serving", "generation": 7,
            "peer": "[2001:db8::1]:4711", "connected_at": "2023-11-14T22:13:20.000Z",
            "requests": 3, "exchanges": 1, "connections": 0, "bytes_in": 10, "bytes_out": 20,
            "rtt_ms": 0.312, "version": "0.1.0", "labels": {"site": "Zürich \"1\""},
        });
        let list = server.get("/agents").json();
        assert_eq!(list["count"], 2);
        assert_eq!(list["agents"][0], expected);
        assert_eq!(list["agents"][1]["state"], "leased");
        assert_eq!(list["agents"][1]["peer"], Value::Null);
        assert_eq!(list["agents"][1]["rtt_ms"], Value::Null);
        assert_eq!(server.get("/agents/agent-1").json(), expected);

        stats.requests.inc();
        stats.seen(UNIX_EPOCH + Duration::from_millis(1_700_000_002_000));
        let now = server.get("/agents/agent-1").json();
        assert_eq!(now["requests"], 4);
        assert_eq!(now["last_seen"], "2023-11-14T22:13:22.000Z");
        server.stop();
    }

    #[test]
    fn eight_thousand_agents_arrive_whole_and_in_order() {
        let server = Server::start();
        publish(
            &server,
            (0..8_000)
                .map(|n| row(&format!("agent-{n:04}"), 8_100 + n))
                .collect(),
        );
        let answer = server.get("/agents");
        assert!(answer.has("transfer-encoding: chunked"));
        let list = answer.json();
        assert_eq!(list["count"], 8_000);
        let agents = list["agents"].as_array().unwrap();
        assert_eq!(agents.len(), 8_000);
        for (n, agent) in agents.iter().enumerate() {
            assert_eq!(agent["agent_id"], format!("agent-{n:04}"));
            assert_eq!(agent["port"], 8_100 + n);
        }

        let mut old = server.connect();
        old.write_all(b"GET /agents HTTP/1.0\r\n\r\n").unwrap();
        let mut bytes = Vec::new();
        old.read_to_end(&mut bytes).unwrap();
        assert_eq!(Answer::parse(&bytes).json(), list);
        server.stop();
    }

    #[test]
    fn a_list_of_any_length_is_well_formed() {
        for count in [0, 1, 2, 79, 80, 81, 82, 83, 84, 85, 400] {
            let rows = (0..count)
                .map(|n| Arc::new(row(&format!("a{n}"), 1)))
                .collect();
            let mut list = AgentList::new(Arc::new(Snapshot::new(1, rows)));
            let mut all = Vec::new();
            loop {
                let piece = list.piece().unwrap();
                if piece.is_empty() {
                    break;
                }
                assert!(piece.len() < PIECE_BYTES + 1024);
                all.extend_from_slice(&piece);
            }
            let list: Value = serde_json::from_slice(&all).unwrap();
            assert_eq!(list["count"], count);
            assert_eq!(list["agents"].as_array().unwrap().len(), count);
        }
    }

    #[test]
    fn what_isnt_there_is_a_problem() {
        let server = Server::start();
        for (path, status) in [
            ("/agents/nobody", 404),
            ("/agents/No%20body", 400),
            ("/agents/%ff", 400),
            ("/agents/", 404),
            ("/agents/a/b", 404),
            ("/", 404),
        ] {
            let answer = server.get(path);
            assert_eq!(answer.status, status, "{path}");
            assert!(
                answer.has("content-type: application/problem+json"),
                "{path}"
            );
            assert_eq!(answer.json()["status"], status);
        }
        for path in ["/health", "/ready", "/agents", "/agents/a", "/metrics"] {
            let answer = server.ask("POST", path, "Content-Length: 0\r\n");
            assert_eq!(answer.status, 405, "{path}");
            assert!(answer.has("allow: get,head"), "{}", answer.head);
        }
        let head = server.ask("HEAD", "/agents", "");
        assert_eq!((head.status, head.body.len()), (200, 0));
        server.stop();
    }

    #[test]
    fn no_page_of_another_origin_may_read() {
        let server = Server::start();
        for method in ["GET", "OPTIONS"] {
            let lines = "Origin: http://evil.example\r\nAccess-Control-Request-Method: GET\r\n";
            let answer = server.ask(method, "/agents", lines);
            assert!(!answer.head.contains("access-control"), "{}", answer.head);
        }
        server.stop();
    }

    #[test]
    fn all_but_health_asks_for_the_key() {
        let server = Server::start_with(LIMITS, Some(Secret::new(KEY)));
        assert_eq!(server.get("/health").status, 200);
        for path in [
            "/ready",
            "/agents",
            "/agents/a",
            "/metrics",
            "/nothing",
            "//health",
            "/health/",
        ] {
            for lines in [
                "",
                "X-API-Key: wrong\r\n",
                "Authorization: Basic correct horse\r\n",
            ] {
                let answer = server.ask("GET", path, lines);
                assert_eq!(answer.status, 401, "{path} {lines}");
                assert!(answer.has(r#"www-authenticate: bearer realm="silo-proxy""#));
            }
        }
        assert_eq!(server.ask("POST", "/agents", "").status, 401);
        for lines in [
            format!("X-API-Key: {KEY}\r\n"),
            format!("Authorization: Bearer {KEY}\r\n"),
            format!("authorization: bearer {KEY}\r\nX-API-Key: wrong\r\n"),
        ] {
            assert_eq!(server.ask("GET", "/agents", &lines).status, 200, "{lines}");
        }
        server.stop();
    }

    #[test]
    fn metrics_are_open_metrics() {
        let server = Server::start();
        server.metrics.registrations.inc();
        let answer = server.get("/metrics");
        assert!(answer.has(&format!("content-type: {}", metrics::CONTENT_TYPE)));
        let text = String::from_utf8(answer.body).unwrap();
        assert!(text.contains("silo_registrations_total 1\n"));
        assert!(text.ends_with("# EOF\n"));
        server.stop();
    }

    #[test]
    fn one_connection_serves_many_polls() {
        let server = Server::start();
        let mut stream = server.connect();
        for _ in 0..3 {
            stream
                .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
            let mut bytes = Vec::new();
            while !bytes.ends_with(br#"{"status":"ok"}"#) {
                let mut part = [0; 256];
                let read = stream.read(&mut part).unwrap();
                assert_ne!(read, 0);
                bytes.extend_from_slice(&part[..read]);
            }
        }
        // An idle poller is let go when the server ends.
        drop(server.stop);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        server.admin.join();
    }

    #[test]
    fn the_end_closes_the_port() {
        let server = Server::start();
        let address = server.admin.address();
        server.stop();
        let error = TcpStream::connect(address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_slow_head_is_cut() {
        let limits = Limits {
            first_head: Duration::from_millis(20),
            ..LIMITS
        };
        let server = Server::start_with(limits, None);
        let mut stream = server.connect();
        stream.write_all(b"GET /health HTTP/1.1\r\nHo").unwrap();
        let mut rest = Vec::new();
        // Closed or reset, but not answered.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
        server.stop();
    }

    #[test]
    fn one_connection_too_many_is_closed_at_once() {
        let server = Server::start_with(
            Limits {
                connections: 1,
                ..LIMITS
            },
            None,
        );
        let mut first = server.connect();
        // Once it is answered, the first connection surely has the slot.
        first
            .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        assert_ne!(first.read(&mut [0; 512]).unwrap(), 0);
        assert!(matches!(server.connect().read(&mut [0; 1]), Ok(0) | Err(_)));
        server.stop();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_poller_who_stops_reading_is_cut() {
        let limits = Limits {
            connections: 1,
            stall: Duration::from_millis(50),
            ..LIMITS
        };
        let server = Server::start_with(limits, None);
        publish(
            &server,
            (0..8_000).map(|n| row(&format!("a{n}"), 1)).collect(),
        );
        let mut stalled = server.connect();
        // More than the sockets' buffers hold.
        for _ in 0..20 {
            stalled
                .write_all(b"GET /agents HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
        }
        assert_ne!(stalled.read(&mut [0; 1]).unwrap(), 0);
        // His slot is free once he is cut.
        let begun = std::time::Instant::now();
        loop {
            let mut next = server.connect();
            let _ = next.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
            if matches!(next.read(&mut [0; 1]), Ok(1)) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "the stalled poller is still served"
            );
        }
        server.stop();
    }
}
