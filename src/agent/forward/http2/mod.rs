//! HTTP/2 to the service: exchanges share connections, each as a stream of its own.
//!
//! A connection takes as many streams as the service lets it; when all are full, or the last one
//! goes away, one more is opened, by one task for all who wait for it. An exchange still has a
//! worker of its own, so `local.max_connections` and the order of those that wait are what they
//! are in HTTP/1.
//!
//! What a connection may cost: [`WINDOW`] bytes of each answer, for all exchanges that may be under
//! way, so that a visitor who doesn't read one stops no other; [`MAX_UNSENT`] bytes of each
//! request and a piece more; [`SMALL_FRAMES`] for the frames of answers in small pieces.

mod exchange;
mod request;

#[cfg(any(test, fuzzing))]
pub(super) use {exchange::head_of, h2::RecvStream, request::request};

use std::io;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::sync::watch;
use tracing::debug;

use super::Shared;
use super::service::ServiceStream;

pub(super) use exchange::forward;

/// How much of an answer the service may send ahead of the tunnel.
const WINDOW: u32 = 64 * 1024;

/// How much of a request lies in h2 before the visitor is asked for more.
const MAX_UNSENT: usize = 64 * 1024;

/// How many streams a connection takes before the service has said how many it lets it: what RFC
/// 9113, section 6.5.2 asks of it at least.
const STREAMS_AT_FIRST: usize = 100;

/// How large an answer's head may be, as HTTP/2 counts: the 64 KiB of HTTP/1, and 32 bytes for
/// each of 256 lines.
const MAX_HEAD: u32 = 72 * 1024;

/// How much h2 may spend on frames of less than 256 bytes that wait for their visitors to read
/// on. A service that streams tiny messages has thousands in one window.
const SMALL_FRAMES: usize = 4 << 20;

/// The connections to the service.
#[derive(Default)]
pub(super) struct Connections {
    open: Vec<Open>,
    /// One more is being opened; it says whether that went well.
    opening: Option<watch::Receiver<Option<bool>>>,
    next_id: u64,
}

struct Open {
    id: u64,
    send: SendRequest<Bytes>,
    /// Exchanges that use it.
    streams: usize,
    /// When the last one ended, in ticks.
    unused_since: u64,
}

/// Connections that are given up. To be dropped when no lock is held.
pub(super) struct GivenUp(#[expect(dead_code, reason = "it is there to be dropped")] Vec<Open>);

impl Connections {
    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Gives those up that no exchange has used since.
    pub(super) fn give_up_unused_since(&mut self, then: u64) -> GivenUp {
        self.give_up(|one| one.streams == 0 && one.unused_since <= then)
    }

    fn give_up(&mut self, which: impl FnMut(&mut Open) -> bool) -> GivenUp {
        GivenUp(self.open.extract_if(.., which).collect())
    }

    /// One has been opened. Says what it is called.
    fn add(&mut self, send: SendRequest<Bytes>, now: u64) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.opening = None;
        self.open.push(Open {
            id,
            send,
            streams: 0,
            unused_since: now,
        });
        id
    }

    /// A place on a connection that has one, and those that take no streams any more.
    fn take_place(&mut self) -> (Option<(u64, SendRequest<Bytes>)>, GivenUp) {
        let mut unwoken = Context::from_waker(Waker::noop());
        let gone = self.give_up(|one| {
            let ready = one.send.poll_ready(&mut unwoken);
            matches!(ready, Poll::Ready(Err(_)))
        });
        let free = self
            .open
            .iter_mut()
            .find(|one| one.streams < one.send.current_max_send_streams().max(1));
        let place = free.map(|one| {
            one.streams += 1;
            (one.id, one.send.clone())
        });
        (place, gone)
    }
}

/// An exchange's place on a connection, given back when it is dropped.
struct Place {
    shared: Arc<Shared>,
    id: u64,
    send: SendRequest<Bytes>,
}

impl Place {
    /// Waits for one; none if the service can't be reached.
    async fn take(shared: &Arc<Shared>) -> Option<Self> {
        loop {
            let mut opening = {
                let mut state = shared.lock();
                let (place, gone) = state.http2.take_place();
                let opening = match &state.http2.opening {
                    _ if place.is_some() => None,
                    Some(opening) => Some(opening.clone()),
                    None => {
                        let (outcome, opening) = watch::channel(None);
                        state.http2.opening = Some(opening.clone());
                        tokio::spawn(connect(shared.clone(), outcome));
                        Some(opening)
                    }
                };
                drop(state);
                drop(gone);
                match (place, opening) {
                    (Some((id, send)), _) => {
                        let shared = shared.clone();
                        return Some(Self { shared, id, send });
                    }
                    (None, Some(opening)) => opening,
                    (None, None) => return None,
                }
            };
            let is_open = *opening.wait_for(Option::is_some).await.ok()?;
            if is_open != Some(true) {
                return None;
            }
        }
    }

    /// Lets no other exchange use the connection: it may be dead.
    fn give_up_connection(&self) {
        let gone = self.shared.lock().http2.give_up(|one| one.id == self.id);
        drop(gone);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let now = self.shared.now();
        let closed = state.closed;
        if let Some(one) = state.http2.open.iter_mut().find(|one| one.id == self.id) {
            one.streams -= 1;
            one.unused_since = now;
        }
        let gone = match closed {
            true => Some(state.http2.give_up_unused_since(now)),
            false => None,
        };
        drop(state);
        drop(gone);
    }
}

/// Opens a connection and drives it to its end.
async fn connect(shared: Arc<Shared>, outcome: watch::Sender<Option<bool>>) {
    let (send, connection) = match open(&shared).await {
        Ok(opened) => opened,
        Err(error) => {
            debug!(%error, "can't connect to the local service");
            shared.lock().http2.opening = None;
            outcome.send_replace(Some(false));
            return;
        }
    };
    let now = shared.now();
    let id = shared.lock().http2.add(send, now);
    outcome.send_replace(Some(true));
    // Who isn't needed any more shall not be kept by a connection.
    let weak: Weak<Shared> = Arc::downgrade(&shared);
    drop(shared);
    if let Err(error) = connection.await {
        debug!(%error, "the connection to the local service broke");
    }
    if let Some(shared) = weak.upgrade() {
        let gone = shared.lock().http2.give_up(|one| one.id == id);
        drop(gone);
    }
}

async fn open(
    shared: &Shared,
) -> io::Result<(
    SendRequest<Bytes>,
    h2::client::Connection<ServiceStream, Bytes>,
)> {
    let stream = shared.service.connect_for_http2().await?;
    let builder = builder(shared.limits.max_workers);
    builder.handshake(stream).await.map_err(io::Error::other)
}

/// Nothing in it grows with what a service sends.
pub(super) fn builder(exchanges: usize) -> Builder {
    let exchanges = u32::try_from(exchanges).unwrap_or(u32::MAX);
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(WINDOW)
        // RFC 9113, section 6.9.1: there can't be more.
        .initial_connection_window_size(exchanges.saturating_mul(WINDOW).min((1 << 31) - 1))
        .initial_max_send_streams(STREAMS_AT_FIRST)
        .max_header_list_size(MAX_HEAD)
        .max_send_buffer_size(MAX_UNSENT)
        .data_frame_budget(SMALL_FRAMES);
    builder
}
