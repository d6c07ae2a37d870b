//! A visitor's connection: its admission, its limits of time, and the task that serves it.
//!
//! No connection has a timer. Each notes in [`Watched`] what it is waiting for and since when, in
//! ticks of its worker's coarse clock, and the worker's sweep looks at all of them twice a second.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::task::AtomicWaker;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tracing::{debug, warn};

use super::{Visit, serve as serve_request};
use crate::config::HttpConfig;
use crate::metrics::{Failure, Refusal, StatusClass};
use crate::net::acceptor::Accepted;
use crate::server::tenancy::Tenancy;
use crate::server::worker::{Shared, TICK, Worker};
use crate::telemetry::{Told, Who, may_say};

/// What hyper may read beyond the largest head: a head that is only a little too large gets an
/// answer of ours rather than hyper's.
const HEAD_SLACK: usize = 16 * 1024;

/// How many header lines hyper parses beyond the limit, for the same reason.
const LINES_SLACK: usize = 28;

/// How long a visitor may go on sending what nobody wants, so that he finds the answer.
const LINGER: Duration = Duration::from_secs(2);

/// Serves a connection on a task of its own, unless a limit says otherwise.
pub(in crate::server) fn admit(worker: &Arc<Worker>, tenancy: &Arc<Tenancy>, accepted: Accepted) {
    worker.metrics().connections_accepted.inc();
    let place = match Place::take(worker, tenancy, accepted.peer.ip()) {
        Ok(place) => place,
        // Dropping the socket closes it.
        Err(reason) => {
            worker.refuse(reason);
            return log_refusal(reason, tenancy, accepted.peer.ip());
        }
    };
    match TcpStream::from_std(accepted.stream) {
        Ok(stream) => {
            tokio::spawn(serve(stream, accepted.peer, place));
        }
        Err(error) => debug!(%error, "connection lost before it was served"),
    }
}

/// Says once a minute that a limit turns visitors away, and which one that is.
fn log_refusal(reason: Refusal, tenancy: &Tenancy, address: IpAddr) {
    let kind = reason.as_str();
    let (who, limit) = match reason {
        Refusal::LimitTotal => (Who::Anybody, "http.max_connections"),
        Refusal::LimitAgent => ((&tenancy.agent_id).into(), "http.max_connections_per_agent"),
        Refusal::LimitAddress => (address.into(), "http.max_connections_per_address"),
        Refusal::NoTenant | Refusal::QueueFull | Refusal::Descriptors => return,
    };
    if let Some(Told { repeated, others }) = may_say(kind, who) {
        warn!(
            reason = %kind,
            agent_id = %tenancy.agent_id,
            peer = %address,
            repeated,
            others,
            "visitor's connection refused: {limit} is reached"
        );
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, place: Place) {
    let limits = &place.worker.shared().config.http;
    let io = Metered {
        stream,
        watched: place.watched.clone(),
        worker: place.worker.clone(),
    };
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        // The service's own date is passed on; ours would be a second opinion.
        .auto_date_header(false)
        .max_buf_size(limits.max_head + HEAD_SLACK)
        .max_headers(limits.max_header_lines + LINES_SLACK);
    let visit = Arc::new(Visit::new(
        place.worker.clone(),
        place.tenancy.clone(),
        place.watched.clone(),
        peer.ip(),
    ));
    let service = service_fn(move |request| serve_request(visit.clone(), request));
    let mut http = builder.serve_connection(TokioIo::new(io), service);
    let watched = &place.watched;
    let mut winding_down = false;
    let outcome = std::future::poll_fn(|cx| {
        watched.task.register(cx.waker());
        match watched.order.load(Relaxed) {
            CUT => return Poll::Ready(Ok(())),
            WIND_DOWN if !winding_down => {
                winding_down = true;
                Pin::new(&mut http).graceful_shutdown();
            }
            _ => {}
        }
        Pin::new(&mut http).poll(cx)
    })
    .await;
    if let Err(error) = &outcome {
        debug!(%peer, port = place.tenancy.port, %error, "visitor's connection broke");
    }
    let malformed = outcome.as_ref().is_err_and(hyper::Error::is_parse);
    if (malformed || watched.lingers.load(Relaxed)) && watched.order.load(Relaxed) != CUT {
        linger(http.into_parts().io.into_inner()).await;
    }
    place.count(outcome.err());
}

/// Lets a visitor who is still sending read the answer that made us stop listening: to close a
/// socket with bytes unread would reset the connection, and a reset takes the answer away from him
/// (RFC 9112, section 9.6).
async fn linger(mut io: Metered) {
    let finish = async {
        io.stream.shutdown().await?;
        let mut nowhere = [0; 16 * 1024];
        while io.stream.read(&mut nowhere).await? > 0 {}
        io::Result::Ok(())
    };
    // However it ends, there is nothing left to do.
    let _ = tokio::time::timeout(LINGER, finish).await;
}

/// A visitor's place among the connections that are allowed, to be given back.
struct Place {
    worker: Arc<Worker>,
    tenancy: Arc<Tenancy>,
    watched: Arc<Watched>,
    key: usize,
    address: IpAddr,
}

impl Place {
    fn take(
        worker: &Arc<Worker>,
        tenancy: &Arc<Tenancy>,
        address: IpAddr,
    ) -> Result<Self, Refusal> {
        let shared = worker.shared();
        let limits = &shared.config.http;
        let watched = Watched::new(tenancy.clone(), worker.now());
        let all = shared.visitors.fetch_add(1, Relaxed);
        tenancy.stats.connections_open.inc();
        worker.metrics().connections_open.inc();
        let of_address = count_address(shared, address);
        // From here on dropping it undoes the counting.
        let place = Self {
            worker: worker.clone(),
            tenancy: tenancy.clone(),
            key: worker.watch(watched.clone()),
            watched,
            address,
        };
        let of_agent = usize::try_from(tenancy.stats.connections_open.get()).unwrap_or(0);
        if all >= limits.max_connections {
            Err(Refusal::LimitTotal)
        } else if of_agent > limits.max_connections_per_agent {
            Err(Refusal::LimitAgent)
        } else if limits
            .max_connections_per_address
            .is_some_and(|limit| of_address > limit)
        {
            Err(Refusal::LimitAddress)
        } else {
            Ok(place)
        }
    }

    /// Counts what the connection's end says that no answer of ours has said.
    fn count(&self, error: Option<hyper::Error>) {
        let metrics = self.worker.metrics();
        match error {
            // hyper has answered it, with a status line and nothing else.
            Some(error) if error.is_parse() => {
                metrics.failures.inc(if error.is_parse_too_large() {
                    Failure::HeadTooLarge
                } else {
                    Failure::BadRequest
                });
                metrics.answers.inc(StatusClass::ClientError);
            }
            // The answer broke off, which its exchange has counted.
            Some(error) if error.is_user() => {}
            _ if self.watched.phase.load(Relaxed) == EXCHANGE => {
                metrics.failures.inc(Failure::VisitorLeft);
            }
            _ => {}
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let shared = self.worker.shared();
        self.worker.unwatch(self.key);
        shared.visitors.fetch_sub(1, Relaxed);
        self.tenancy.stats.connections_open.dec();
        self.worker.metrics().connections_open.dec();
        if let Some(addresses) = &shared.addresses {
            addresses.remove_if_mut(&self.address, |_, count| {
                *count = count.saturating_sub(1);
                *count == 0
            });
        }
    }
}

/// Counts one more connection from an address, if those are limited, and says how many there are.
fn count_address(shared: &Shared, address: IpAddr) -> usize {
    let Some(addresses) = &shared.addresses else {
        return 0;
    };
    let mut count = addresses.entry(address).or_default();
    *count += 1;
    *count
}

/// What a connection waits for, as the worker's sweep sees it. Times are in [`TICK`]s of the
/// worker's clock; 0 stands for "not waiting".
///
/// All of it is written by the connection's own tasks but for `order`, which is the sweep's, and
/// nothing else is ordered by it: hence relaxed.
#[derive(Debug)]
pub(in crate::server) struct Watched {
    tenancy: Arc<Tenancy>,
    phase: AtomicU8,
    phase_since: AtomicU32,
    /// Waiting for the next bytes of a body that can be passed on.
    reading_since: AtomicU32,
    /// Waiting for the visitor to take bytes.
    writing_since: AtomicU32,
    /// Nobody waits for bytes of the socket, because the service takes nothing, a 100 is awaited,
    /// or the next request has come before its turn: only a look at it tells that the visitor
    /// left, or sends without waiting. Cleared when somebody waits again.
    unread: AtomicBool,
    /// The sweep asks for that look.
    look: AtomicBool,
    /// The connection closes with bytes of the visitor unread.
    lingers: AtomicBool,
    /// Numbers the exchanges, so that a task of an earlier one can't speak for the next.
    number: AtomicU32,
    /// The visitor sends his body without having been told to go on.
    early_body: AtomicBool,
    /// How much was read since the head began; the end of it may be the beginning of a body, or
    /// of the next request. `u32::MAX` for a head of which nothing was read: it had come before.
    read_with_head: AtomicU32,
    /// The answer under way ends for the visitor where his connection ends: if it breaks off,
    /// only a reset tells him.
    ends_by_close: AtomicBool,
    /// What the sweep wants of the connection's task.
    order: AtomicU8,
    /// The connection's task.
    task: AtomicWaker,
}

/// Accepted; nothing has come yet.
const FRESH: u8 = 0;
/// The beginning of a head has come.
const HEAD: u8 = 1;
/// A request is being served.
const EXCHANGE: u8 = 2;
/// Between two requests.
const IDLE: u8 = 3;

const WIND_DOWN: u8 = 1;
const CUT: u8 = 2;

impl Watched {
    fn new(tenancy: Arc<Tenancy>, now: u32) -> Arc<Self> {
        Arc::new(Self {
            tenancy,
            phase: AtomicU8::new(FRESH),
            phase_since: AtomicU32::new(now),
            reading_since: AtomicU32::new(0),
            writing_since: AtomicU32::new(0),
            unread: AtomicBool::new(false),
            look: AtomicBool::new(false),
            lingers: AtomicBool::new(false),
            number: AtomicU32::new(0),
            early_body: AtomicBool::new(false),
            read_with_head: AtomicU32::new(u32::MAX),
            ends_by_close: AtomicBool::new(false),
            order: AtomicU8::new(0),
            task: AtomicWaker::new(),
        })
    }

    fn enter(&self, phase: u8, now: u32) {
        self.phase.store(phase, Relaxed);
        self.phase_since.store(now, Relaxed);
    }

    /// A request has begun.
    pub(in crate::server) fn exchange_begins(&self, now: u32) {
        self.enter(EXCHANGE, now);
        self.number.fetch_add(1, Relaxed);
        self.reading_since.store(0, Relaxed);
        self.early_body.store(false, Relaxed);
    }

    /// The answer is complete.
    pub(in crate::server) fn exchange_ends(&self, now: u32) {
        self.enter(IDLE, now);
        self.read_with_head.store(u32::MAX, Relaxed);
    }

    /// Notes whether only the connection's end tells the visitor that the answer is complete.
    pub(in crate::server) fn answer_ends_by_close(&self, by_close: bool) {
        self.ends_by_close.store(by_close, Relaxed);
    }

    /// The connection will close though the visitor may still be sending.
    pub(in crate::server) fn linger(&self) {
        self.lingers.store(true, Relaxed);
    }

    /// The body of the request that is being served.
    pub(in crate::server) fn body(self: &Arc<Self>) -> WatchedBody {
        WatchedBody {
            number: self.number.load(Relaxed),
            watched: self.clone(),
        }
    }

    /// Whether the visitor sends a body that he was asked to hold back. `head_size` is what his
    /// head takes when it is written without needless blanks: whatever came beyond that with the
    /// head is taken for the body.
    pub(in crate::server) fn body_came_early(&self, head_size: usize) -> bool {
        self.early_body.load(Relaxed) || self.read_with_head.load(Relaxed) as usize > head_size
    }

    /// The sweep's look at the connection.
    pub(in crate::server) fn inspect(&self, now: u32, limits: &HttpConfig) {
        if self.tenancy.is_over() {
            self.wind_down();
        }
        let since = self.phase_since.load(Relaxed);
        let late = match self.phase.load(Relaxed) {
            FRESH | HEAD => is_late(now, since, limits.head_timeout),
            IDLE => is_late(now, since, limits.idle_timeout),
            _ => false,
        };
        let waits = |since: &AtomicU32, limit| match since.load(Relaxed) {
            0 => false,
            since => is_late(now, since, limit),
        };
        if late
            || waits(&self.reading_since, limits.body_timeout)
            || waits(&self.writing_since, limits.send_timeout)
        {
            self.order(CUT);
        } else if self.unread.load(Relaxed) && !self.look.swap(true, Relaxed) {
            self.task.wake();
        }
    }

    /// Has the connection end after what it is doing; at once, if it is doing nothing.
    pub(in crate::server) fn wind_down(&self) {
        match self.phase.load(Relaxed) {
            FRESH | HEAD | IDLE if self.writing_since.load(Relaxed) == 0 => self.order(CUT),
            _ => self.order(WIND_DOWN),
        }
    }

    fn order(&self, order: u8) {
        if self.order.fetch_max(order, Relaxed) < order {
            self.task.wake();
        }
    }
}

/// What the task that reads a body tells of it. It may outlive its exchange by a little, and then
/// has no say any more.
#[derive(Debug)]
pub(in crate::server) struct WatchedBody {
    watched: Arc<Watched>,
    number: u32,
}

impl WatchedBody {
    /// Bytes of it are awaited from the visitor since `now`.
    pub(in crate::server) fn reading(&self, now: u32) {
        self.note(now);
    }

    /// It is complete, or nobody wants more of it.
    pub(in crate::server) fn read_enough(&self) {
        self.note(0);
    }

    /// It isn't being read, because it can't be passed on yet.
    pub(in crate::server) fn holding_back(&self) {
        self.note(0);
        self.watched.unread.store(true, Relaxed);
    }

    fn note(&self, reading_since: u32) {
        if self.watched.number.load(Relaxed) == self.number {
            self.watched.reading_since.store(reading_since, Relaxed);
        }
    }
}

fn is_late(now: u32, since: u32, limit: Duration) -> bool {
    // One tick more, as the tick in which waiting began counts in full.
    let ticks = limit.as_millis().div_ceil(TICK.as_millis()) + 1;
    u128::from(now.wrapping_sub(since)) >= ticks
}

/// The socket, noting for the sweep what comes and what can't go.
struct Metered {
    stream: TcpStream,
    watched: Arc<Watched>,
    worker: Arc<Worker>,
}

impl Metered {
    fn wrote(&self, blocked: bool) {
        let since = &self.watched.writing_since;
        if !blocked {
            since.store(0, Relaxed);
        } else if since.load(Relaxed) == 0 {
            since.store(self.worker.now(), Relaxed);
        }
    }

    /// Looks at the socket without reading it.
    fn look(&self, cx: &Context<'_>) -> io::Result<()> {
        let Some(ready) = self.stream.ready(Interest::READABLE).now_or_never() else {
            return Ok(());
        };
        let ready = ready?;
        if ready.is_read_closed() {
            // Before the answer is complete, a visitor's FIN counts as leaving.
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if ready.is_readable() && !self.watched.early_body.swap(true, Relaxed) {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        if self.watched.ends_by_close.load(Relaxed) {
            // If that fails the connection is broken already, which tells the visitor as much.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let watched = &self.watched;
        watched.unread.store(outcome.is_ready(), Relaxed);
        ready!(outcome)?;
        let read = u32::try_from(buffer.filled().len() - before).unwrap_or(u32::MAX);
        match watched.phase.load(Relaxed) {
            // What is left of a body that nobody wants isn't the next head.
            FRESH | IDLE if read > 0 && watched.reading_since.load(Relaxed) == 0 => {
                watched.enter(HEAD, self.worker.now());
                watched.read_with_head.store(read, Relaxed);
            }
            HEAD => {
                let before = watched.read_with_head.load(Relaxed);
                let all = before.saturating_add(read);
                watched.read_with_head.store(all, Relaxed);
            }
            _ => {}
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(outcome.is_pending());
        outcome
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(outcome.is_pending());
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes whenever it is polled, so this is where the sweep's question is answered.
        if self.watched.look.swap(false, Relaxed) {
            self.look(cx)?;
        }
        // A TCP socket has nothing to flush.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kept_to_a_tick() {
        let limit = Duration::from_secs(10);
        let ticks = 20;
        assert!(!is_late(100 + ticks, 100, limit));
        assert!(is_late(100 + ticks + 1, 100, limit));
        // The clock may wrap.
        assert!(is_late(5, u32::MAX - 20, limit));
        assert!(!is_late(5, u32::MAX, limit));
    }
}
