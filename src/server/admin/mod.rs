//! The admin port: who is here, is the server ready, what did it count.
//!
//! It runs on a thread and a one-thread runtime of its own and takes no lock that a proxied request
//! takes, so that the proxy under load can't delay an answer here, nor a crowd of pollers there.
//! The list of agents is written in pieces, each when the poller has room for it: a poller that
//! doesn't read holds a snapshot and a few pieces, however long the list is.
//!
//! No answer ever carries a CORS header: a page in somebody's browser has no business here.

mod access;
mod list;
mod listener;
mod readiness;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::Serialize;

use self::access::check_key;
use self::list::{Agent, AgentList, Stage};
use self::listener::{LIMITS, Limits, accept, set_up};
pub use self::readiness::{Readiness, ReadyState, Step};
use crate::id::{AgentId, Secret};
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
