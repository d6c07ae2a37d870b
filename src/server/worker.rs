//! A worker: one thread, one runtime, and the tunnels and visitors that live on it.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use dashmap::DashMap;
use http::uri::Authority;
use rustix::time::{ClockId, clock_gettime};
use slab::Slab;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::access::AccessLog;
use super::balance::{Load, Meter};
use super::ingress::{self, Watched};
use super::registry::Registry;
use super::session::{self, Caller};
use super::tenancy::Tenancy;
use crate::config::ServerConfig;
use crate::grpc::Event;
use crate::headers::RequestIds;
use crate::link::{Tunnel, tunnel};
use crate::metrics::{HandshakeFailure, Metrics, Refusal, WorkerMetrics};
use crate::mux::Pool;
use crate::net::acceptor::Accepted;
use crate::net::tls::{PeerCertificate, ServerTls, Stream, TLS_ALERT, TLS_HANDSHAKE};
use crate::telemetry::{Told, Who, may_say};
use crate::wire::ServerMessage;

/// The unit in which a worker measures the times of its connections: a coarse clock that costs
/// nothing to read, moved on by the sweep. A limit is kept to within this much.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// How long a sweep that was asked for may wait for more reasons.
const SWEEP_DELAY: Duration = Duration::from_millis(20);

/// How many batches of connections may wait for a worker, at least: as many as there may be
/// visitors if that is more, since a batch may be a single connection, and a burst that is allowed
/// isn't to be cut for coming faster than one thread takes it. One more and the batch is dropped,
/// which closes its connections.
const QUEUE: usize = 1024;

/// The same at most: what `http.max_connections` may be. Room is allocated as connections come.
const LONGEST_QUEUE: usize = 10_000_000;

/// How many connections are admitted before those that are there have their turn: each new one is a
/// task to be run, and a flood of them would be thousands before the next byte of a request.
const AT_ONCE: usize = 32;

/// How many bytes an agent may send before it is welcomed: a hello is a few hundred, with the most
/// and longest labels 9 KiB, and HTTP/2 adds less than one. More would lie in memory for nobody.
/// A TLS handshake before it may take as much again: mostly the certificates, 2 KiB each at most.
const HELLO_BYTES: usize = 16 * 1024;

/// How long a finished session's connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// What all parts of a server share.
pub(super) struct Shared {
    /// What the server is told: replaced as a whole when it is told anew.
    pub(super) config: ArcSwap<ServerConfig>,
    /// TLS on the tunnel port, if it has any.
    pub tls: Option<Arc<ServerTls>>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// The bytes that all tunnels together may promise to hold.
    pub pool: Arc<Pool>,
    /// Visitors' connections, against `http.max_connections`.
    pub visitors: AtomicUsize,
    /// Visitors' connections by address: those that came while they were limited.
    pub addresses: DashMap<std::net::IpAddr, usize>,
    /// Tunnel connections that haven't been welcomed, oldest first, against
    /// `grpc.max_handshakes`. Locked when one comes or is done.
    pub(super) handshakes: Mutex<BTreeMap<u64, CancellationToken>>,
    /// What each worker has to do, by which new tunnels are given out.
    pub(super) loads: Vec<Load>,
    /// Where lines about requests go, if anywhere.
    pub(super) access: Option<AccessLog>,
    /// Wakes each worker's sweep.
    pub sweeps: Vec<Arc<Notify>>,
}

impl Shared {
    /// What the server is told now, for a look at it: a few instructions, no lock. Take it once
    /// for what belongs together, so that nothing goes by half of the old and half of the new,
    /// and don't keep it over an await: [`Shared::config_to_keep`] is for that.
    pub(super) fn config(&self) -> Guard<Arc<ServerConfig>> {
        self.config.load()
    }

    /// The same for whoever goes by it for longer, such as a session. It touches a counter that
    /// all workers share, so not for each request.
    pub(super) fn config_to_keep(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    fn handshakes(&self) -> MutexGuard<'_, BTreeMap<u64, CancellationToken>> {
        self.handshakes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has every worker look at its connections now. Many calls before a worker gets to it are
    /// one.
    pub(super) fn sweep_all(&self) {
        self.sweeps.iter().for_each(|sweep| sweep.notify_one());
    }
}

/// Connections for a worker.
pub(super) enum Job {
    /// Of visitors of one port.
    Visitors(Arc<Tenancy>, Vec<Accepted>),
    /// Of agents, on the tunnel port.
    Agents(Vec<Accepted>),
}

impl Job {
    /// How many connections it brings.
    fn len(&self) -> usize {
        match self {
            Self::Visitors(_, batch) | Self::Agents(batch) => batch.len(),
        }
    }
}

/// The queue to a worker.
pub(super) struct JobSender {
    sender: mpsc::Sender<Job>,
    shared: Arc<Shared>,
}

impl JobSender {
    /// Puts a job into the queue, or gives it back if that is full or the worker has ended.
    pub(super) fn try_send(&self, job: Job) -> Result<(), TrySendError<Job>> {
        let waiting = self.sender.max_capacity() - self.sender.capacity();
        if waiting >= QUEUE.max(self.shared.config().http.max_connections) {
            return Err(TrySendError::Full(job));
        }
        self.sender.try_send(job)
    }
}

/// See the module.
pub(super) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    sweep: Arc<Notify>,
    /// The coarse clock, in [`TICK`]s. Written by the sweep, read by the connections.
    clock: AtomicU32,
    /// The visitors' connections that live here. Locked when one comes or goes, and by the sweep.
    watched: Mutex<Slab<Arc<Watched>>>,
    /// Names for requests that come without one. Locked for a moment, by this worker only.
    request_ids: Mutex<RequestIds>,
}

impl Worker {
    /// A worker and the queue to it.
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        request_ids: RequestIds,
    ) -> (Arc<Self>, JobSender, mpsc::Receiver<Job>) {
        let (sender, jobs) = mpsc::channel(LONGEST_QUEUE);
        let sender = JobSender {
            sender,
            shared: shared.clone(),
        };
        let worker = Arc::new(Self {
            index,
            sweep: shared.sweeps[index].clone(),
            shared,
            clock: AtomicU32::new(1),
            watched: Mutex::new(Slab::new()),
            request_ids: Mutex::new(request_ids),
        });
        (worker, sender, jobs)
    }

    /// Its number.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// What it shares with the others.
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What it counts.
    pub(super) fn metrics(&self) -> &WorkerMetrics {
        self.shared.metrics.worker(self.index)
    }

    /// The time in [`TICK`]s.
    pub(super) fn now(&self) -> u32 {
        self.clock.load(Ordering::Relaxed)
    }

    /// A name for a request that has none.
    pub(super) fn request_id(&self) -> crate::headers::RequestId {
        self.request_ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next_id()
    }

    /// Takes connections until the queue's senders are gone.
    pub(super) async fn run(self: Arc<Self>, mut jobs: mpsc::Receiver<Job>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut sweep_at = None;
        let mut meter = Meter::default();
        let mut admitted = 0;
        loop {
            tokio::select! {
                // The clock goes on however many connections come.
                biased;
                _ = ticks.tick() => {
                    self.clock.fetch_add(1, Ordering::Relaxed);
                    self.sweep_connections();
                    let share = meter.look(std::time::Instant::now(), thread_time());
                    self.shared.loads[self.index].set_busy(share);
                }
                // However many ports are released at once, one look is enough for all of them.
                () = self.sweep.notified(), if sweep_at.is_none() => {
                    sweep_at = Some(Instant::now() + SWEEP_DELAY);
                }
                () = sleep_until(sweep_at.unwrap_or_else(Instant::now)), if sweep_at.is_some() => {
                    sweep_at = None;
                    self.sweep_connections();
                }
                job = jobs.recv() => match job {
                    Some(job) => {
                        admitted += job.len();
                        self.take(job);
                        if admitted >= AT_ONCE {
                            admitted = 0;
                            tokio::task::yield_now().await;
                        }
                    }
                    None => return,
                },
            }
        }
    }

    fn take(self: &Arc<Self>, job: Job) {
        match job {
            Job::Visitors(tenancy, batch) => {
                for accepted in batch {
                    ingress::admit(self, &tenancy, accepted);
                }
            }
            Job::Agents(batch) => {
                for accepted in batch {
                    self.admit_agent(accepted);
                }
            }
        }
    }

    /// Looks at each connection once: is it over, or beyond a limit of time?
    fn sweep_connections(&self) {
        let now = self.now();
        let config = self.shared.config();
        let limits = &config.http;
        for (_, watched) in self.watched().iter() {
            watched.inspect(now, limits);
        }
    }

    /// Has every visitor's connection end after what it is doing.
    pub(super) fn wind_down(&self) {
        for (_, watched) in self.watched().iter() {
            watched.wind_down();
        }
    }

    /// Serves a tunnel connection that nobody has accepted from a real port.
    #[cfg(test)]
    pub(super) fn admit_stream(self: &Arc<Self>, stream: impl TunnelSocket, peer: SocketAddr) {
        Counted(self.clone()).serve(stream, peer);
    }

    /// How many visitors' connections the sweep looks at.
    #[cfg(test)]
    pub(super) fn watching(&self) -> usize {
        self.watched().len()
    }

    /// Puts a connection among those the sweep looks at.
    pub(super) fn watch(&self, watched: Arc<Watched>) -> usize {
        self.watched().insert(watched)
    }

    /// Takes it out again.
    pub(super) fn unwatch(&self, key: usize) {
        let mut all = self.watched();
        all.try_remove(key);
        if all.is_empty() && all.capacity() > 1024 {
            // What a burst has grown, an idle server doesn't keep.
            *all = Slab::new();
        }
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Slab<Arc<Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit_agent(self: &Arc<Self>, accepted: Accepted) {
        let counted = Counted(self.clone());
        match TcpStream::from_std(accepted.stream) {
            Ok(stream) => counted.serve(stream, accepted.peer),
            Err(error) => debug!(%error, "connection lost before it was served"),
        }
    }

    async fn serve_agent(
        self: Arc<Self>,
        stream: impl TunnelSocket,
        peer: SocketAddr,
        slot: Handshake,
    ) {
        let mut deadline = pin!(tokio::time::sleep(
            self.shared.config().grpc.handshake_timeout
        ));
        let greeted = tokio::select! {
            biased;
            // Most of it is needed only until the agent is known: it isn't to be kept beyond that.
            greeted = Box::pin(self.greet(stream, peer)) => greeted,
            () = &mut deadline => Err(HandshakeFailure::Timeout),
            () = slot.evicted.cancelled() => Err(HandshakeFailure::Limit),
        };
        let (mut tunnel, caller) = match greeted {
            Ok(greeted) => greeted,
            Err(failure) => return self.failed(peer, failure),
        };
        let farewell = match Box::pin(session::admit(&self, caller)).await {
            Ok(welcomed) => {
                drop(slot);
                Guarded::within(tunnel.io_mut()).open();
                let _open = OpenTunnel::new(&self);
                welcomed.run(&mut tunnel, deadline).await
            }
            Err(rejection) => Some(rejection),
        };
        let goodbye = async {
            if let Some(rejection) = farewell {
                tunnel.send(&ServerMessage::from(rejection)).await?;
            }
            tunnel.finish().await;
            Ok::<_, tunnel::Error>(())
        };
        // It may come too late: who is gone needs no last word.
        let _ = tokio::time::timeout(GOODBYE, Box::pin(goodbye)).await;
    }

    /// Takes a connection as far as the agent's first message.
    async fn greet<S: TunnelSocket>(
        &self,
        stream: S,
        peer: SocketAddr,
    ) -> Result<(Tunnel<Stream<Guarded<S>>>, Caller), HandshakeFailure> {
        let (stream, certificate) = self.open(stream, peer).await?;
        let mut tunnel = Tunnel::server(stream);
        let host = match tunnel.next().await {
            Ok(Event::Call { authority }) => authority
                .and_then(|authority| authority.parse::<Authority>().ok())
                .map(|authority| authority.host().to_owned()),
            Ok(_) => {
                // Something else was called, and that is answered.
                let _ = tokio::time::timeout(GOODBYE, tunnel.finish()).await;
                return Err(HandshakeFailure::Protocol);
            }
            Err(error) => return Err(error.into()),
        };
        let caller = Caller {
            peer,
            certificate,
            host,
            first: tunnel.message().await?,
        };
        // Whoever has left with its hello must not take the id of one that lives.
        match tunnel.is_closed().await {
            true => Err(HandshakeFailure::Closed),
            false => Ok((tunnel, caller)),
        }
    }

    /// Brings a connection to where HTTP/2 begins: through the TLS handshake if the port has TLS.
    /// A peer that speaks it and shouldn't, or the reverse, gets a few bytes by which it can tell.
    async fn open<S: TunnelSocket>(
        &self,
        mut stream: S,
        peer: SocketAddr,
    ) -> Result<(Stream<Guarded<S>>, PeerCertificate), HandshakeFailure> {
        let mut first = [0];
        match stream.peek(&mut first).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Err(HandshakeFailure::Closed),
        }
        let is_tls = first == [TLS_HANDSHAKE];
        let (tls, guarded) = match (&self.shared.tls, is_tls) {
            (Some(tls), true) => (tls, Guarded::new(stream)),
            (None, false) => {
                let stream = Stream::Left(Guarded::new(stream));
                return Ok((stream, PeerCertificate::None));
            }
            (tls, _) => {
                log_failed_tls(
                    peer,
                    match tls {
                        Some(_) => "an agent without TLS: set grpc.tls.enabled on it",
                        None => "an agent with TLS: set grpc.tls here, or none on it",
                    },
                );
                let hint = if tls.is_some() { NO_TLS } else { NO_HTTP2 };
                say_goodbye(stream, hint).await;
                return Err(HandshakeFailure::Tls);
            }
        };
        match tls.accept(guarded).await {
            Ok((mut stream, certificate)) => {
                Guarded::within(&mut stream).begin();
                Ok((stream, certificate))
            }
            Err(error) => {
                log_failed_tls(peer, error);
                Err(HandshakeFailure::Tls)
            }
        }
    }

    fn failed(&self, peer: SocketAddr, failure: HandshakeFailure) {
        log_failed_handshake(peer, failure);
        self.metrics().handshakes_failed.inc(failure);
    }

    /// Counts a refused connection.
    pub(super) fn refuse(&self, reason: Refusal) {
        self.metrics().connections_refused.inc(reason);
    }
}

impl From<tunnel::Error> for HandshakeFailure {
    fn from(error: tunnel::Error) -> Self {
        match error {
            tunnel::Error::Closed => Self::Closed,
            tunnel::Error::Io(error) if is_end(&error) => Self::Closed,
            _ => Self::Protocol,
        }
    }
}

/// Whether a read failed because the peer has gone: under TLS without its last word, too.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionReset, UnexpectedEof};
    matches!(error.kind(), ConnectionReset | UnexpectedEof)
}

/// The processor time of this thread since its start.
fn thread_time() -> Duration {
    // Below zero it isn't, and a clock that were is no reason to stop.
    clock_gettime(ClockId::ThreadCPUTime)
        .try_into()
        .unwrap_or_default()
}

/// Says that somebody on the tunnel port was no agent, as far as that is worth a line.
fn log_failed_handshake(peer: SocketAddr, failure: HandshakeFailure) {
    let reason = failure.as_str();
    match failure {
        // What looks whether a port is open does that.
        // Nor is it news what has been said in more words.
        HandshakeFailure::Closed | HandshakeFailure::Tls => {
            debug!(%peer, %reason, "handshake failed")
        }
        HandshakeFailure::Limit => {
            if let Some(Told { repeated, others }) = may_say(reason, "", Who::Anybody) {
                warn!(
                    %peer,
                    %reason,
                    repeated,
                    others,
                    "handshake failed: grpc.max_handshakes connections were waiting to say hello"
                );
            }
        }
        _ => {
            if let Some(Told { repeated, others }) = may_say(reason, "", peer.ip()) {
                info!(%peer, %reason, repeated, others, "handshake failed");
            }
        }
    }
}

/// Says that there was no TLS with somebody, and why.
fn log_failed_tls(peer: SocketAddr, why: impl std::fmt::Display) {
    let why = why.to_string();
    if let Some(Told { repeated, others }) = may_say("tls", &why, peer.ip()) {
        warn!(%peer, repeated, others, "TLS handshake failed: {why}");
    }
}

/// Counts a tunnel connection on its worker. The accept task has counted it in.
struct Counted(Arc<Worker>);

impl Counted {
    /// Serves the connection on a task of its own.
    fn serve(self, stream: impl TunnelSocket, peer: SocketAddr) {
        let worker = self.0.clone();
        let slot = Handshake::begin(&worker.shared);
        tokio::spawn(async move {
            worker.serve_agent(stream, peer, slot).await;
            drop(self);
        });
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.shared.loads[self.0.index].remove(1);
    }
}

/// A tunnel that counts as open until this is dropped.
struct OpenTunnel<'a>(&'a Worker);

impl<'a> OpenTunnel<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.metrics().tunnels_open.inc();
        Self(worker)
    }
}

impl Drop for OpenTunnel<'_> {
    fn drop(&mut self) {
        self.0.metrics().tunnels_open.dec();
    }
}

/// One of the places for connections that haven't shown who they are.
struct Handshake {
    shared: Arc<Shared>,
    number: u64,
    /// The place is needed for a newer connection.
    evicted: CancellationToken,
}

impl Handshake {
    /// Takes a place. If there is none, the oldest connection loses its own: honest agents say
    /// hello at once, so whoever has waited longest is the least likely to be one.
    fn begin(shared: &Arc<Shared>) -> Self {
        let evicted = CancellationToken::new();
        let limit = shared.config().grpc.max_handshakes;
        let mut places = shared.handshakes();
        if places.len() >= limit
            && let Some((_, oldest)) = places.pop_first()
        {
            oldest.cancel();
        }
        let number = places.last_key_value().map_or(0, |(last, _)| last + 1);
        places.insert(number, evicted.clone());
        drop(places);
        Self {
            shared: shared.clone(),
            number,
            evicted,
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        // An evicted one's number may be another's by now only if that one is the newer.
        if !self.evicted.is_cancelled() {
            self.shared.handshakes().remove(&self.number);
        }
    }
}

/// What tells a peer without TLS that it met TLS: a fatal alert, "protocol version" (RFC 8446,
/// section 6.2).
const NO_TLS: &[u8] = &[TLS_ALERT, 3, 1, 0, 2, 2, 70];

/// What tells a peer with TLS that it met HTTP/2: an empty SETTINGS frame (RFC 9113, section 6.5).
const NO_HTTP2: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Sends a last word, and reads what comes until the peer closes: whatever lies unread when a
/// socket is closed resets the connection, and the word may be lost.
async fn say_goodbye(mut stream: impl TunnelSocket, word: &[u8]) {
    let goodbye = async {
        stream.write_all(word).await?;
        stream.shutdown().await?;
        let mut rest = stream.take(HELLO_BYTES as u64);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // It was a courtesy.
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
}

/// What a connection on the tunnel port has to be: a TCP connection, or what behaves like one.
pub(super) trait TunnelSocket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Waits for something to come and copies what fits, without taking it; 0 at the end.
    fn peek(&mut self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send;
}

impl TunnelSocket for TcpStream {
    fn peek(&mut self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send {
        TcpStream::peek(self, buffer)
    }
}

/// A tunnel's socket, from which no more than a TLS handshake and a hello is taken before the
/// agent is welcomed.
struct Guarded<S> {
    stream: S,
    /// What may still come; nothing limits it once the agent is welcomed.
    left: Option<usize>,
}

impl<S> Guarded<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            left: Some(HELLO_BYTES),
        }
    }

    fn within(stream: &mut Stream<Self>) -> &mut Self {
        match stream {
            Stream::Left(guarded) => guarded,
            Stream::Right(tls) => tls.get_mut().0,
        }
    }

    /// The TLS handshake is over: what it took doesn't count against the hello.
    fn begin(&mut self) {
        self.left = Some(HELLO_BYTES);
    }

    /// The agent is welcomed.
    fn open(&mut self) {
        self.left = None;
    }
}

impl<S: TunnelSocket> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if let Some(left) = &mut self.left {
            *left = left
                .checked_sub(buffer.filled().len() - before)
                .ok_or_else(|| io::Error::other("too much before the welcome"))?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: TunnelSocket> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
