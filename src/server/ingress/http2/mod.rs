//! HTTP/2 on a visitor's connection (RFC 9113), with prior knowledge: one exchange a stream.
//!
//! ```text
//!  socket ◄──► h2 ◄──► streams: each is one request, its exchange, and what it waits for
//! ```
//!
//! A connection is still one task. It polls the streams and then h2, which frames what they say
//! and tells them what has come; h2 grants a stream more window only as the tunnel takes what
//! came, and a stream asks the tunnel for more only as h2 has room for it. So who stops reading
//! one stream stops that stream's service only.
//!
//! # What a connection may cost
//! * [`MAX_STREAMS`] requests at once, each an exchange of its own: it counts against
//!   `http.max_exchanges_per_agent` until both sides have ended it, however fast it is reset.
//! * [`WINDOW`] bytes of each request's body before the tunnel has credit for them, and no less in
//!   all than for all streams together: a service that doesn't read one can't stop the others.
//! * [`MAX_UNSENT`] bytes of each answer, and two pieces more, before the visitor takes them.
//! * A head of twice `http.max_head` and header tables of 4 KiB while it is taken apart.
//!
//! # Floods
//! h2 ends the connection by GOAWAY (ENHANCE_YOUR_CALM) for more CONTINUATION frames than such a
//! head needs, more than [`MAX_ERRORS`] streams that break the rules, more than [`MAX_STREAMS`]
//! streams that are reset before we have seen them, and for too many DATA frames that are all but
//! empty. Streams that are reset later than that are counted here: see [`RESETS`]. PING and
//! SETTINGS are answered one at a time, and nothing more is read until the visitor has taken the
//! answer. Whoever sends such, or parts of a head, and no request has an idle connection, which
//! `http.idle_timeout` ends.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod head;
mod piece;
mod socket;
mod stream;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::Poll;

use bytes::BytesMut;
use futures_util::StreamExt;
use futures_util::future::poll_fn;
use futures_util::stream::FuturesUnordered;
use h2::server::{Builder, Connection};
use tokio::net::TcpStream;
use tracing::debug;

use super::connection::{LINGER, linger};
use super::place::{Order, Place};
use crate::config::HttpConfig;
use crate::headers::Forwarding;
use crate::metrics::Failure;

use piece::Piece;
use socket::Socket;
use stream::{End, Stream};

/// How many requests may be under way on one connection: what nginx allows, and more than the
/// hundred that RFC 9113, section 6.5.2 asks for.
const MAX_STREAMS: u32 = 128;

/// How much of a request's body a visitor may send ahead of the tunnel: as much as is read ahead
/// of an HTTP/1 one. With 50 ms of round trip one upload reaches 1.3 MB/s.
const WINDOW: u32 = 64 * 1024;

/// How much of an answer lies in h2 before the tunnel is asked for more.
const MAX_UNSENT: usize = 64 * 1024;

/// How many streams a visitor may break the rules on. None is what an honest one needs.
const MAX_ERRORS: usize = 100;

/// How many requests a visitor may call off before their answers began, and how many of these are
/// forgotten with each tick of the clock (half a second). A client that gives up on a service that
/// hangs stays far below, and gets answers to others; a rapid reset is at the end in an instant.
const RESETS: u32 = 512;
const RESETS_FORGOTTEN: u32 = 64;

/// What a client begins with that knows that HTTP/2 is spoken (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Whether the first bytes of a connection may be those of HTTP/2. No request of HTTP/1 begins
/// so.
pub(super) fn may_begin(received: &[u8]) -> bool {
    let length = received.len().min(PREFACE.len());
    received[..length] == PREFACE[..length]
}

/// Whether they are.
pub(super) fn begins(received: &[u8]) -> bool {
    received.starts_with(PREFACE)
}

/// Whose connection it is.
pub(super) struct Caller {
    pub(super) peer: SocketAddr,
    pub(super) place: Place,
    pub(super) forwarding: Forwarding,
    /// The visitor is one of `http.trusted_proxies`.
    pub(super) is_trusted: bool,
}

/// Why a connection is over.
#[derive(Debug)]
enum Over {
    /// In good order.
    Closed,
    /// The visitor has left, or his connection broke.
    Left,
    /// The worker's sweep wants it so, or a drain is done.
    Cut,
    /// The visitor broke the rules.
    Broken,
    /// The visitor calls too much off.
    Flood,
}

/// Serves a connection of which the beginning has been `received`.
pub(super) async fn serve(stream: TcpStream, received: BytesMut, caller: Caller) {
    let stream = Arc::new(stream);
    let socket = Socket {
        stream: stream.clone(),
        received,
    };
    let caller = Arc::new(caller);
    let over = drive(socket, &caller).await;
    debug!(peer = %caller.peer, port = caller.place.tenancy.port, ?over, "visitor's HTTP/2 connection ended");
    if let Over::Broken | Over::Flood = over {
        caller.place.failed(Failure::BadRequest);
    }
    if let Over::Broken | Over::Flood | Over::Cut = over {
        let _ = linger(&stream).await;
    }
}

async fn drive(socket: Socket, caller: &Arc<Caller>) -> Over {
    let watched = &caller.place.watched;
    let mut handshake =
        pin!(builder(&caller.place.worker.shared().config().http).handshake(socket));
    let opened = poll_fn(|cx| {
        watched.task.register(cx.waker());
        match watched.ordered() {
            Order::None => handshake.as_mut().poll(cx).map(Some),
            Order::WindDown | Order::Cut => Poll::Ready(None),
        }
    });
    let mut connection: Connection<Socket, Piece> = match opened.await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) => return over(error),
        None => return Over::Cut,
    };
    caller.place.rests();
    let turn = Arc::new(AtomicU32::new(0));
    let mut streams = FuturesUnordered::new();
    let mut resets = Resets::default();
    let mut winds_down = false;
    let outcome = poll_fn(|cx| {
        watched.task.register(cx.waker());
        loop {
            while let Poll::Ready(Some(end)) = streams.poll_next_unpin(cx) {
                if end == End::CalledOff && resets.is_one_too_many(caller.place.worker.now()) {
                    return Poll::Ready(Over::Flood);
                }
            }
            if streams.is_empty() {
                caller.place.rests();
            }
            match watched.ordered() {
                Order::None => {}
                Order::WindDown => {
                    if !std::mem::replace(&mut winds_down, true) {
                        connection.graceful_shutdown();
                    }
                }
                Order::Cut => return Poll::Ready(Over::Cut),
            }
            let accepted = connection.poll_accept(cx);
            turn.fetch_add(1, Relaxed);
            match accepted {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let mut stream = Stream::open(caller, request, respond, turn.clone());
                    streams.push(poll_fn(move |cx| stream.poll(cx)));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(over(error)),
                Poll::Ready(None) => return Poll::Ready(Over::Closed),
                // Nothing is under way, nor waits to be written.
                Poll::Pending if winds_down && streams.is_empty() && !connection.has_streams() => {
                    return Poll::Ready(Over::Cut);
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let over = outcome.await;
    drop(streams);
    let reason = match over {
        Over::Cut => h2::Reason::NO_ERROR,
        Over::Flood => h2::Reason::ENHANCE_YOUR_CALM,
        Over::Closed | Over::Left | Over::Broken => return over,
    };
    // It names the last request that was looked at, so that the others can be sent again.
    connection.abrupt_shutdown(reason);
    let goodbye = poll_fn(|cx| connection.poll_closed(cx));
    // However it ends, there is nothing left to do.
    let _ = tokio::time::timeout(LINGER, goodbye).await;
    over
}

/// Nothing in it grows with what a visitor sends.
fn builder(settings: &HttpConfig) -> Builder {
    // h2 refuses what is larger in few words. So it gets room for heads that are refused here, and
    // for the 32 bytes that it counts for each line.
    let head = u32::try_from(2 * settings.max_head).unwrap_or(u32::MAX);
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(MAX_STREAMS * WINDOW)
        .max_header_list_size(head)
        .max_send_buffer_size(MAX_UNSENT)
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .max_local_error_reset_streams(Some(MAX_ERRORS));
    builder
}

fn over(error: h2::Error) -> Over {
    debug!(%error, "visitor's HTTP/2 connection broke");
    if error.is_library() && error.is_go_away() {
        Over::Broken
    } else {
        Over::Left
    }
}

/// Counts the requests that were called off.
#[derive(Debug, Default)]
struct Resets {
    count: u32,
    at: u32,
}

impl Resets {
    fn is_one_too_many(&mut self, now: u32) -> bool {
        let forgotten = now.wrapping_sub(self.at).saturating_mul(RESETS_FORGOTTEN);
        self.at = now;
        self.count = self.count.saturating_sub(forgotten) + 1;
        self.count > RESETS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preface_is_known_from_its_first_byte() {
        for (bytes, may_begin_so, begins_so) in [
            (&PREFACE[..1], true, false),
            (&PREFACE[..23], true, false),
            (PREFACE, true, true),
            (&[PREFACE, b"more"].concat(), true, true),
            (b"PUT", false, false),
            (b"PRI / HTTP/1.1\r\n", false, false),
            (b"GET / HTTP/1.1\r\n\r\n", false, false),
        ] {
            assert_eq!(may_begin(bytes), may_begin_so, "{bytes:?}");
            assert_eq!(begins(bytes), begins_so, "{bytes:?}");
        }
    }

    #[test]
    fn resets_are_forgotten_with_time() {
        let mut resets = Resets::default();
        assert!((0..RESETS).all(|_| !resets.is_one_too_many(1)));
        assert!(resets.is_one_too_many(1));
        let mut resets = Resets::default();
        for now in 1..100 {
            assert!((0..RESETS_FORGOTTEN).all(|_| !resets.is_one_too_many(now)));
        }
    }
}
