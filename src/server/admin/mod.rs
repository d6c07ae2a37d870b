//! The admin port: who is here, is the server ready, what did it count.
//!
//! It runs on a thread and a one-thread runtime of its own and takes no lock that a proxied request
//! takes, so that the proxy under load can't delay an answer here, nor a crowd of pollers there.
//! The list of agents is written in pieces, each when the poller has room for it: a poller that
//! doesn't read holds a snapshot and a few pieces, however long the list is.
//!
//! What is rendered of a long list is shared by all who ask within 50 ms. A poller may also wait for the list to
//! change: he holds a connection and a place in a watch channel.
//!
//! No answer ever carries a CORS header: a page in somebody's browser has no business here.

mod access;
mod etag;
mod list;
mod listener;
mod readiness;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderName, StatusCode};
use serde::Serialize;

use self::access::{check_host, check_key};
use self::etag::Tag;
use self::list::{AgentList, SharedPieces};
use self::listener::{LIMITS, Limits, accept, set_up};
pub use self::readiness::{Readiness, ReadyState, Step};
use crate::auth::ApiKey;
use crate::id::AgentId;
use crate::metrics::{self, Metrics};
use crate::server::directory::Directory;

/// What the admin port shows, and to whom.
#[derive(Debug)]
pub struct AdminState {
    /// The agents.
    pub directory: Arc<Directory>,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// What `GET /ready` answers.
    pub readiness: Arc<Readiness>,
    /// Asked for on everything but `GET /health`; without one, everybody who can connect may read,
    /// unless it may be a web page of another host. A request takes it once.
    pub api_key: Arc<ArcSwap<ApiKey>>,
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
    /// Fails if the thread, its runtime or the socket can't be set up, or without random bytes.
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
        let mut instance = [0; 8];
        getrandom::fill(&mut instance).map_err(io::Error::other)?;
        let context = Arc::new(Context {
            state,
            bound: address.ip().to_canonical(),
            instance: u64::from_ne_bytes(instance),
            pieces: Arc::default(),
        });
        let (started, outcome) = mpsc::sync_channel(1);
        // The runtime is built where it runs and ends, since none can be dropped on a thread that
        // runs another one.
        let thread = std::thread::Builder::new()
            .name("silo-admin".into())
            .spawn(move || match set_up(listener) {
                Ok((runtime, listener)) => {
                    // The receiver waits for exactly this message.
                    let _ = started.send(Ok(()));
                    runtime.block_on(run(limits, listener, context, shutdown));
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

/// What every request may need.
#[derive(Debug)]
struct Context {
    state: AdminState,
    /// The port's own address, which a request without a key may name as its host.
    bound: IpAddr,
    /// This start of the server, for tags.
    instance: u64,
    /// For all who get the list.
    pieces: Arc<SharedPieces>,
}

async fn run(
    limits: Limits,
    listener: tokio::net::TcpListener,
    context: Arc<Context>,
    shutdown: impl Future<Output = ()>,
) {
    let state = &context.state;
    let shutdown = async {
        shutdown.await;
        state.readiness.drain();
    };
    tokio::select! {
        () = accept(limits, listener, router(context.clone()), shutdown) => {}
        () = state.directory.keep_current() => {}
    }
}

fn router(context: Arc<Context>) -> Router {
    // A route is behind the key unless it is named outside of `keyed`; so is every unknown path.
    let keyed = Router::new()
        .route("/ready", get(ready))
        .route("/agents", get(agents))
        .route("/agents/{id}", get(agent))
        .route("/metrics", get(scrape))
        .fallback(unknown)
        .layer(middleware::from_fn(check_key));
    Router::new()
        .route("/health", get(health))
        .merge(keyed)
        .layer(middleware::from_fn_with_state(context.clone(), check_host))
        .with_state(context)
}

async fn health() -> Response {
    json(StatusCode::OK, r#"{"status":"ok"}"#)
}

async fn ready(State(context): State<Arc<Context>>) -> Response {
    let ready = context.state.readiness.state();
    let status = match ready {
        ReadyState::Ready => StatusCode::OK,
        ReadyState::Starting { .. } | ReadyState::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    rendered(status, serde_json::to_vec(&ready))
}

/// The longest wait for a change. Shorter than the 60 s or more after which proxies and load
/// balancers give up an answer would be safer still, but who asks knows what is in between.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The list, unless the poller has it already. With `wait` he then gets it once it changes. The
/// limit of connections is that of waiters, and each costs what a connection does.
async fn agents(
    State(context): State<Arc<Context>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let Ok(wait) = wait(query.as_deref().unwrap_or_default()) else {
        let detail = "wait is a time of at most 60s, given once, such as /agents?wait=30s";
        return problem(StatusCode::BAD_REQUEST, detail);
    };
    let Context {
        state, instance, ..
    } = &*context;
    let mut newest = state.directory.watch();
    let mut ends = state.readiness.ends();
    let mut over = pin!(tokio::time::sleep(wait.unwrap_or_default()));
    loop {
        let snapshot = newest.borrow_and_update().clone();
        let tag = Tag {
            instance: *instance,
            revision: snapshot.revision(),
        };
        if !tag.is_named(&headers) {
            return listed(AgentList::new(snapshot, context.pieces.clone()), tag);
        }
        tokio::select! {
            biased;
            Ok(()) = newest.changed(), if wait.is_some() => {}
            () = over.as_mut(), if wait.is_some() => return unchanged(tag),
            _ = ends.changed(), if wait.is_some() => return unchanged(tag),
            else => return unchanged(tag),
        }
    }
}

/// Reads `wait` from a query. Names that nobody knows are passed over, as in any query.
fn wait(query: &str) -> Result<Option<Duration>, ()> {
    let mut values = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .filter(|(name, _)| *name == "wait");
    let Some((_, value)) = values.next() else {
        return Ok(None);
    };
    let wait = humantime::parse_duration(value).or(Err(()))?;
    match values.next() {
        None if wait <= LONGEST_WAIT => Ok(Some(wait)),
        _ => Err(()),
    }
}

fn listed(mut list: AgentList, tag: Tag) -> Response {
    // A short list has a length; a long one goes out piece by piece.
    let body = match list.pieces() {
        1 => match list.piece() {
            Ok(piece) => Body::from(piece.unwrap_or_default()),
            Err(error) => return failed(&error),
        },
        _ => Body::new(list),
    };
    (tagged(tag), [(CONTENT_TYPE, "application/json")], body).into_response()
}

fn unchanged(tag: Tag) -> Response {
    (StatusCode::NOT_MODIFIED, tagged(tag)).into_response()
}

/// A poller may keep the list, and asks each time whether it still holds.
fn tagged(tag: Tag) -> [(HeaderName, String); 2] {
    [
        (ETAG, tag.to_string()),
        (CACHE_CONTROL, "private, no-cache".into()),
    ]
}

async fn agent(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let Some(id) = id.ok().and_then(|Path(id)| id.parse::<AgentId>().ok()) else {
        return problem(StatusCode::BAD_REQUEST, "this is no agent id");
    };
    match context.state.directory.read().get(id.as_str()) {
        Some(row) => rendered(StatusCode::OK, list::agent(row)),
        None => problem(StatusCode::NOT_FOUND, "no agent of this id is here"),
    }
}

async fn scrape(State(context): State<Arc<Context>>) -> Response {
    let headers = [
        (CONTENT_TYPE, metrics::CONTENT_TYPE),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, context.state.metrics.render()).into_response()
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
