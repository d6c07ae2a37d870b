//! A visitor's connection: one task from its first byte to its last.
//!
//! ```text
//!            head complete           answer taken off the exchange, and written
//!   Idle ──► Head ──► Exchange ─────────────────────────────────────────────► Idle, or the end
//!                       │ the body goes to the exchange, the answer to the visitor,
//!                       │ each as fast as the other side takes it
//! ```
//!
//! While an answer is awaited the connection is read on, up to a bound: the visitor's leaving is
//! seen, and pipelined requests wait here for their turn. Before the answer is complete, the
//! visitor's FIN counts as leaving. After a 101 it is the end of his direction and no more: see
//! [`upgraded`].

mod upgraded;

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::poll_fn;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;
use tracing::{debug, warn};

use super::http2::{self, Caller};
use super::place::{Order, Place};
use super::record::Record;
use super::reply::{Asked, Reply};
use crate::config::HttpConfig;
use crate::cors::{Grant, Preflight, Verdict};
use crate::head::{RequestHead, ResponseHead};
use crate::headers::{
    Forwarding, Framing, Refusal, RequestFacts, Version, check_request, forward_request, offered,
};
use crate::http1::{
    BodyDecoder, Fields, HeadLimits, HeadScan, Malformed, Outgoing, Piece, RequestLine, TooLarge,
    parse_request,
};
use crate::link::Exchange;
use crate::metrics::{self, Failure};
use crate::mux::{HeadRead, Read, Reason};
use crate::net;
use crate::net::acceptor::Accepted;
use crate::server::respond::Fault;
use crate::server::tenancy::Tenancy;
use crate::server::worker::Worker;
use crate::telemetry::{Told, Who, may_say};

/// How much of a request's body is read and dropped after the answer was complete, so that the
/// connection can be used again. A visitor with more to send has it closed.
const DRAIN_LIMIT: usize = 64 * 1024;

/// How long a visitor may go on sending what nobody wants, so that he finds the answer.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// How many times as long it may be if he sends a body: many programs look for an answer when they
/// have sent all of it, and over a slow link that takes a while. Half a minute, as in nginx.
const LINGERS_WITH_BODY: u32 = 15;

/// How much is asked for at once to begin with: more than most heads.
const SMALL_READ: usize = 4 * 1024;

/// How much is asked for at once of a body, and how much is read ahead of what can be passed on.
const LARGE_READ: usize = 64 * 1024;

/// How much of an answer may wait for the visitor to take it before more is asked for.
const WRITE_AHEAD: usize = 64 * 1024;

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
            tokio::spawn(Visitor::new(stream, accepted.peer, place).serve());
        }
        Err(error) => debug!(%error, "connection lost before it was served"),
    }
}

/// Says that a limit turns visitors away, and which one that is; once a minute.
fn log_refusal(reason: metrics::Refusal, tenancy: &Tenancy, address: IpAddr) {
    let kind = reason.as_str();
    let agent_id = &tenancy.agent_id;
    let (who, limit) = match reason {
        metrics::Refusal::LimitTotal => (Who::Anybody, "http.max_connections"),
        metrics::Refusal::LimitAgent => (agent_id.into(), "http.max_connections_per_agent"),
        metrics::Refusal::LimitAddress => (address.into(), "http.max_connections_per_address"),
        // No limit of ours.
        metrics::Refusal::NoTenant
        | metrics::Refusal::QueueFull
        | metrics::Refusal::Descriptors => return,
    };
    if let Some(Told { repeated, others }) = may_say(kind, "", who) {
        warn!(
            reason = %kind,
            %agent_id,
            peer = %address,
            repeated,
            others,
            "visitor's connection refused: {limit} is reached"
        );
    }
}

/// A visitor's connection.
struct Visitor {
    stream: TcpStream,
    peer: SocketAddr,
    place: Place,
    forwarding: Forwarding,
    /// The visitor is one of `http.trusted_proxies`.
    is_trusted: bool,
    /// What the request under way may be; taken anew for each.
    limits: Limits,
    /// What has come and wasn't used yet.
    input: BytesMut,
    /// How much to ask for next.
    read_size: usize,
    /// What waits for the visitor to take it.
    out: Outgoing,
    /// No request has come yet, so what comes may be HTTP/2.
    is_fresh: bool,
}

/// How large a request may be.
#[derive(Debug, Clone, Copy)]
struct Limits {
    head: HeadLimits,
    body: Option<u64>,
}

impl Limits {
    fn of(settings: &HttpConfig) -> Self {
        Self {
            head: HeadLimits {
                line: settings.max_request_line,
                head: settings.max_head,
                lines: settings.max_header_lines,
            },
            body: settings.max_body,
        }
    }

    fn is_too_large(&self, body: u64) -> bool {
        self.body.is_some_and(|limit| body > limit)
    }
}

/// Why a connection is over.
#[derive(Debug)]
enum Over {
    /// Nothing is left to be said or heard.
    Closed,
    /// What was said last explains why nothing is heard any more.
    Unheard,
    /// The same before the end of a request's body, which nobody wants.
    Unwanted,
    /// The visitor has left, or his connection broke.
    Left,
    /// The worker's sweep wants it so.
    Cut,
    /// For HTTP/1: the visitor speaks HTTP/2.
    Http2,
    /// The answer broke off. What came of it has been written.
    BrokenOff {
        /// Only a reset tells the visitor.
        reset: bool,
    },
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Left
    }
}

impl Visitor {
    fn new(stream: TcpStream, peer: SocketAddr, place: Place) -> Self {
        let config = place.worker.shared().config();
        let is_trusted = config
            .http
            .trusted_proxies
            .iter()
            .any(|block| block.contains(peer.ip()));
        Self {
            forwarding: Forwarding::new(peer.ip(), is_trusted),
            is_trusted,
            limits: Limits::of(&config.http),
            stream,
            peer,
            place,
            input: BytesMut::new(),
            read_size: SMALL_READ,
            out: Outgoing::default(),
            is_fresh: true,
        }
    }

    async fn serve(mut self) {
        let over = loop {
            if let Err(over) = self.next_request().await {
                break over;
            }
        };
        if let Over::Http2 = over {
            let caller = Caller {
                peer: self.peer,
                place: self.place,
                forwarding: self.forwarding,
                is_trusted: self.is_trusted,
            };
            // In a box, as few connections need the room.
            return Box::pin(http2::serve(self.stream, self.input, caller)).await;
        }
        let port = self.place.tenancy.port;
        debug!(peer = %self.peer, port, ?over, "visitor's connection ended");
        match over {
            Over::Unheard => {
                let _ = linger(&self.stream).await;
            }
            Over::Unwanted => self.linger_with_body().await,
            Over::BrokenOff { reset: true } => {
                // If that fails the connection is broken already, which tells as much.
                let _ = self.stream.set_zero_linger();
            }
            Over::Closed
            | Over::Left
            | Over::Cut
            | Over::BrokenOff { reset: false }
            | Over::Http2 => {}
        }
    }

    /// Lingers as long as a body is coming, unless the connection has to end.
    async fn linger_with_body(&self) {
        for _ in 0..LINGERS_WITH_BODY {
            let is_sending = linger(&self.stream).await;
            if !is_sending || self.place.watched.ordered() != Order::None {
                return;
            }
        }
    }

    /// Serves the next request on the connection.
    async fn next_request(&mut self) -> Result<(), Over> {
        let mut scan = None;
        let head = poll_fn(|cx| self.poll_head(&mut scan, cx)).await?;
        self.is_fresh = false;
        self.place.exchange_begins();
        let mut serving = match head {
            Ok(end) => {
                let serving = Serving::open(self, end);
                self.input.advance(end);
                serving
            }
            Err(TooLarge::Line) => Serving::refuse(self, Fault::RequestLineTooLong),
            Err(TooLarge::Head) => Serving::refuse(self, Fault::HeadTooLarge),
        };
        let outcome = poll_fn(|cx| serving.poll(self, cx)).await;
        if let Err(Over::Left | Over::Cut) = outcome
            && !(serving.is_answered() && self.out.is_empty())
        {
            serving.failed(self, Failure::VisitorLeft);
        }
        serving.note_end(self);
        // The exchange is let go before it is counted as over.
        drop(serving);
        self.place.exchange_ends();
        outcome
    }

    /// Waits for a whole head: how long it is, or that it is too large.
    fn poll_head(
        &mut self,
        scan: &mut Option<HeadScan>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Result<usize, TooLarge>, Over>> {
        self.place.watched.task.register(cx.waker());
        loop {
            if self.place.watched.ordered() != Order::None {
                return Poll::Ready(Err(Over::Cut));
            }
            if self.input.is_empty() {
                // An idle connection holds no buffers.
                self.input = BytesMut::new();
                self.out.shrink();
            } else if self.is_fresh && http2::may_begin(&self.input) {
                if http2::begins(&self.input) {
                    return Poll::Ready(Err(Over::Http2));
                }
                self.place.head_begins();
            } else {
                let scan = scan.get_or_insert_with(|| {
                    self.limits = Limits::of(&self.place.worker.shared().config().http);
                    HeadScan::default()
                });
                match scan.scan(&self.input, self.limits.head) {
                    Ok(Some(end)) => return Poll::Ready(Ok(Ok(end))),
                    // It is refused for what it is when it is taken apart.
                    Ok(None) if !scan.may_be_request(&self.input) => {
                        return Poll::Ready(Ok(Ok(self.input.len())));
                    }
                    Err(too_large) => return Poll::Ready(Ok(Err(too_large))),
                    Ok(None) => self.place.head_begins(),
                }
            }
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Err(Over::Closed));
            }
        }
    }

    /// Waits for more to come; 0 when the visitor sends nothing more.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // A connection with nothing to read needs no buffer.
        ready!(self.stream.poll_read_ready(cx))?;
        if self.room() < self.read_size / 4 {
            // Free if nothing of the buffer is in use any more.
            self.input.reserve(self.read_size);
        }
        // Unlike `try_read_buf`, this takes a buffer that wasn't filled for a socket without more,
        // which spares a system call for each request.
        let read = ready!(poll_read_buf(
            Pin::new(&mut self.stream),
            cx,
            &mut self.input
        ))?;
        self.read_size = match self.room() {
            0 => LARGE_READ,
            _ if read < SMALL_READ => SMALL_READ,
            _ => self.read_size,
        };
        Poll::Ready(Ok(read))
    }

    fn room(&self) -> usize {
        self.input.capacity() - self.input.len()
    }

    /// Reads ahead of what can be used, to see the visitor leave. Says whether something came.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Result<bool, Over> {
        if self.input.len() >= LARGE_READ {
            self.hold_back()?;
            return Ok(false);
        }
        self.place.watched.holding_back(false);
        match self.poll_fill(cx) {
            Poll::Ready(Ok(0)) => Err(Over::Left),
            Poll::Ready(Ok(_)) => Ok(true),
            Poll::Ready(Err(error)) => Err(error.into()),
            Poll::Pending => Ok(false),
        }
    }

    /// Notes that nothing is read for now. The sweep asks for a look at the socket instead.
    fn hold_back(&self) -> Result<(), Over> {
        let watched = &self.place.watched;
        watched.holding_back(true);
        if watched.take_look()
            && let Some(ready) = self.stream.ready(Interest::READABLE).now_or_never()
            && ready?.is_read_closed()
        {
            return Err(Over::Left);
        }
        Ok(())
    }

    /// Writes what waits. Says whether the visitor took something.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool, Over> {
        let mut wrote = false;
        while !self.out.is_empty() {
            let stream = Pin::new(&mut self.stream);
            let outcome = self
                .out
                .with_slices(|slices| net::poll_write(stream, cx, slices));
            self.place.writing(outcome.is_pending());
            match outcome {
                Poll::Ready(Ok(0)) => return Err(Over::Left),
                Poll::Ready(Ok(bytes)) => self.out.advance(bytes),
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
            wrote = true;
        }
        Ok(wrote)
    }
}

/// Lets a visitor who is still sending read the answer that made us stop listening: to close a
/// socket with bytes unread would reset the connection, and a reset takes the answer away from him
/// (RFC 9112, section 9.6). Says whether he is still sending when the time is over.
pub(super) async fn linger(stream: &TcpStream) -> bool {
    let mut has_sent = false;
    let finish = async {
        SockRef::from(stream).shutdown(Shutdown::Write)?;
        // Not in the task itself, which every connection has.
        let mut nowhere = vec![0; 16 * 1024];
        loop {
            // Neither of the two below ever gives way to others, nor to the limit of time, as long as
            // there is something to read.
            tokio::task::coop::consume_budget().await;
            stream.readable().await?;
            match stream.try_read(&mut nowhere) {
                Ok(0) => return io::Result::Ok(()),
                Ok(_) => has_sent = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    };
    // However it ends before that, there is nothing left to do.
    let is_late = tokio::time::timeout(LINGER, finish).await.is_err();
    is_late && has_sent
}

/// A request that is being served: its body on the way to the exchange, and the answer on the way
/// to the visitor.
struct Serving {
    asked: Asked,
    upload: Upload,
    body: BodyDecoder,
    received: u64,
    /// None once the server answers itself.
    exchange: Option<Exchange>,
    /// The protocols that the visitor offers to go on with, until the service has chosen or not.
    offer: Option<Box<[u8]>>,
    /// None while the answer's head is awaited.
    reply: Option<Reply>,
    /// The answer broke off; what came of it is still to be written.
    broken_off: bool,
    /// Which pages may read the answer, if that is for us to say.
    grant: Option<Grant>,
    /// For the access log, if there is one.
    record: Option<Box<Record>>,
}

/// What becomes of a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upload {
    /// The visitor holds it back until he is told to go on, or is tired of waiting.
    Held,
    /// It goes to the exchange.
    Sending,
    /// Nobody wants it. So much more of it is read, so that the connection can be used again.
    Draining { left: usize },
    /// Nobody wants it, and the connection closes.
    Abandoned,
    /// It has been taken whole, or there is none.
    Complete,
    /// The connection is upgraded, and carries bytes.
    Upgraded(Flow),
}

/// Which way bytes still go on an upgraded connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Both ways.
    Both,
    /// To the service: it has ended its direction, and the visitor has been told.
    ToService,
    /// To the visitor: he has ended his direction, and the service is told.
    ToVisitor,
    /// To the visitor, and the service takes no more.
    Refused,
}

/// A request of which nothing is known, and after which nothing can be.
const UNKNOWN: Asked = Asked {
    version: Version::Http11,
    to_head: false,
    persistent: false,
};

impl Serving {
    /// Opens an exchange for the head that `visitor` has received, or answers why not.
    fn open(visitor: &mut Visitor, head: usize) -> Self {
        let mut asked = UNKNOWN;
        let mut known = None;
        let mut grant = None;
        let mut preflight = None;
        let mut record = Record::begin(&visitor.place, visitor.peer.ip());
        let head = &visitor.input[..head];
        let opened = parse_request(head, visitor.limits.head.lines, |line, fields| {
            asked.version = line.version;
            asked.to_head = line.method == b"HEAD";
            if let Some(record) = &mut record {
                let protocol = match line.version {
                    Version::Http10 => "HTTP/1.0",
                    Version::Http11 => "HTTP/1.1",
                };
                let (method, target) = (line.method, line.target);
                record.asked(protocol, method, target, fields.iter(), visitor.is_trusted);
            }
            if let Some(verdict) = visitor.judge(line, fields) {
                grant = Some(verdict.grant);
                preflight = verdict.preflight;
            }
            let facts = check_request(line.method, line.target, line.version, fields.iter())
                .map_err(Fault::Refused)?;
            asked.persistent = facts.persistent;
            known = Some(facts);
            if preflight.is_some() {
                return Ok(None);
            }
            visitor.open(line, fields, facts, &mut record).map(Some)
        });
        let opened = opened.unwrap_or_else(|malformed| {
            Err(Fault::Refused(match malformed {
                Malformed::Version => Refusal::Version,
                Malformed::Line | Malformed::Field => Refusal::Syntax,
            }))
        });
        let mut serving = Self::new(asked, known, record);
        serving.grant = grant;
        match (opened, preflight) {
            (Ok(_), Some(preflight)) => serving.answer_preflight(visitor, &preflight),
            (Ok(Some(opened)), None) => {
                serving.exchange = Some(opened.exchange);
                serving.offer = opened.offer;
            }
            (Ok(None), None) => {}
            (Err(fault), _) => serving.fail(visitor, fault),
        }
        serving
    }

    /// Answers a head that can't be read.
    fn refuse(visitor: &mut Visitor, fault: Fault) -> Self {
        let record = Record::begin(&visitor.place, visitor.peer.ip());
        let mut serving = Self::new(UNKNOWN, None, record);
        serving.fail(visitor, fault);
        serving
    }

    fn new(asked: Asked, facts: Option<RequestFacts>, record: Option<Box<Record>>) -> Self {
        let framing = facts.map_or(Framing::Length(0), |facts| facts.framing);
        let upload = match (framing, facts) {
            (Framing::Length(0), _) => Upload::Complete,
            (_, Some(facts)) if facts.expects_continue => Upload::Held,
            _ => Upload::Sending,
        };
        Self {
            asked,
            upload,
            body: BodyDecoder::new(framing),
            received: 0,
            exchange: None,
            offer: None,
            reply: None,
            broken_off: false,
            grant: None,
            record,
        }
    }

    /// Carries on in both directions until the answer is complete; then the connection can be
    /// used again, or it is over.
    fn poll(&mut self, visitor: &mut Visitor, cx: &mut Context<'_>) -> Poll<Result<(), Over>> {
        visitor.place.watched.task.register(cx.waker());
        loop {
            if visitor.place.watched.ordered() == Order::Cut {
                return Poll::Ready(Err(self.cut(visitor)));
            }
            let mut moved = self.poll_upload(visitor, cx)?;
            moved |= self.poll_answer(visitor, cx);
            moved |= visitor.poll_write(cx)?;
            if visitor.out.is_empty()
                && let Some(outcome) = self.outcome(visitor)
            {
                return Poll::Ready(outcome);
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    /// Reads what the visitor sends, and passes the body on as fast as the service takes it. Says
    /// whether something moved.
    fn poll_upload(&mut self, visitor: &mut Visitor, cx: &mut Context<'_>) -> Result<bool, Over> {
        let moved = match self.upload {
            // Whoever has an answer to read may have nothing more to say.
            Upload::Complete if self.is_answered() => return Ok(false),
            Upload::Complete => return visitor.poll_ahead(cx),
            Upload::Abandoned => {
                visitor.hold_back()?;
                return Ok(false);
            }
            Upload::Held => {
                let came = !visitor.input.is_empty() || visitor.poll_ahead(cx)?;
                if came {
                    // The visitor waited long enough and sends; RFC 9110, section 10.1.1 lets
                    // him.
                    self.upload = Upload::Sending;
                }
                return Ok(came);
            }
            Upload::Sending => self.poll_send(visitor, cx)?,
            Upload::Draining { left } => self.poll_drain(visitor, left, cx)?,
            Upload::Upgraded(flow) => return self.poll_upgraded(visitor, flow, cx),
        };
        if !matches!(self.upload, Upload::Sending | Upload::Draining { .. }) {
            visitor.place.reading(false);
        }
        Ok(moved)
    }

    fn poll_send(&mut self, visitor: &mut Visitor, cx: &mut Context<'_>) -> Result<bool, Over> {
        let mut moved = false;
        loop {
            // The two go together: `fail` ends both.
            let Some(exchange) = &self.exchange else {
                return Ok(moved);
            };
            match exchange.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => {
                    self.unwanted();
                    return Ok(true);
                }
                Poll::Pending => {
                    visitor.place.reading(false);
                    visitor.hold_back()?;
                    return Ok(moved);
                }
            }
            match self.body.decode(&mut visitor.input) {
                Ok(Piece::Data(data)) => {
                    moved = true;
                    self.received += data.len() as u64;
                    if let Some(record) = &mut self.record {
                        record.received = self.received;
                    }
                    if visitor.limits.is_too_large(self.received) {
                        exchange.abort(Reason::Cancelled);
                        self.fail_upload(visitor, Fault::BodyTooLarge);
                        return Ok(true);
                    }
                    visitor.place.count_in(data.len());
                    if exchange.send(data).is_err() {
                        self.unwanted();
                        return Ok(true);
                    }
                }
                Ok(Piece::End(trailers)) => {
                    exchange.finish(trailers);
                    self.upload = Upload::Complete;
                    return Ok(true);
                }
                Ok(Piece::Partial) => match Self::poll_body(visitor, cx) {
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(over)) => {
                        // The service must not take what it got for a whole request.
                        exchange.abort(Reason::BodyIncomplete);
                        return Err(over);
                    }
                    Poll::Pending => return Ok(moved),
                },
                Err(_) => {
                    exchange.abort(Reason::BodyIncomplete);
                    self.fail_upload(visitor, Fault::BodyMalformed);
                    return Ok(true);
                }
            }
        }
    }

    /// Reads a body that nobody wants, within limits.
    fn poll_drain(
        &mut self,
        visitor: &mut Visitor,
        mut left: usize,
        cx: &mut Context<'_>,
    ) -> Result<bool, Over> {
        let mut moved = false;
        loop {
            match self.body.decode(&mut visitor.input) {
                Ok(Piece::Data(data)) => {
                    moved = true;
                    match left.checked_sub(data.len()) {
                        Some(rest) => left = rest,
                        None => {
                            self.upload = Upload::Abandoned;
                            return Ok(true);
                        }
                    }
                    self.upload = Upload::Draining { left };
                }
                Ok(Piece::End(_)) => {
                    self.upload = Upload::Complete;
                    return Ok(true);
                }
                Ok(Piece::Partial) => match Self::poll_body(visitor, cx)? {
                    Poll::Ready(()) => moved = true,
                    Poll::Pending => return Ok(moved),
                },
                Err(_) => {
                    self.upload = Upload::Abandoned;
                    return Ok(true);
                }
            }
        }
    }

    /// Waits for more of a body, while the sweep counts the time.
    fn poll_body(visitor: &mut Visitor, cx: &mut Context<'_>) -> Poll<Result<(), Over>> {
        visitor.place.watched.holding_back(false);
        let read = visitor.poll_fill(cx);
        visitor.place.reading(read.is_pending());
        Poll::Ready(match ready!(read)? {
            0 => Err(Over::Left),
            _ => Ok(()),
        })
    }

    /// Nobody wants the rest of the body.
    fn unwanted(&mut self) {
        if let Some(exchange) = &self.exchange {
            exchange.abort(Reason::Cancelled);
        }
        self.upload = match self.upload {
            // Whether he still sends it isn't known, so what comes next can't be told.
            Upload::Held => Upload::Abandoned,
            _ => Upload::Draining { left: DRAIN_LIMIT },
        };
    }

    /// Something is wrong with the body.
    fn fail_upload(&mut self, visitor: &mut Visitor, fault: Fault) {
        self.upload = Upload::Abandoned;
        if self.reply.is_none() {
            self.fail(visitor, fault);
        } else if !self.is_answered() {
            self.broken_off = true;
        }
    }

    /// Takes what there is of the answer. Says whether something moved.
    fn poll_answer(&mut self, visitor: &mut Visitor, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while let Some(exchange) = &self.exchange
            && visitor.out.len() < WRITE_AHEAD
        {
            let Some(reply) = &mut self.reply else {
                let Poll::Ready(head) = exchange.poll_head(cx) else {
                    break;
                };
                moved = true;
                self.take_head(visitor, head);
                continue;
            };
            if reply.is_complete() || self.broken_off {
                break;
            }
            let Poll::Ready(read) = exchange.poll_read(cx) else {
                break;
            };
            moved = true;
            if let Read::Data(data) = &read {
                visitor.place.count_out(data.len());
            }
            self.broken_off = match read {
                Read::Reset(_) => true,
                read => reply.take(&mut visitor.out, read).is_err(),
            };
            if let Some(record) = &mut self.record {
                record.sent = reply.body_bytes;
            }
        }
        moved
    }

    fn take_head(&mut self, visitor: &mut Visitor, head: HeadRead) {
        match head {
            HeadRead::Interim(head) => self.pass_interim(visitor, &head),
            HeadRead::Answer(head) if head.status < 200 => self.upgrade(visitor, &head),
            HeadRead::Answer(head) => {
                if self.offer.take().is_some()
                    && let Some(exchange) = &self.exchange
                {
                    // The request ends with its head after all. What has come behind it is the
                    // next one.
                    exchange.finish(None);
                }
                // Whether a visitor who was never told to go on still sends his body isn't known.
                let persistent =
                    self.upload != Upload::Held && visitor.place.watched.ordered() == Order::None;
                let asked = Asked {
                    persistent: self.asked.persistent && persistent,
                    ..self.asked
                };
                match Reply::begin(&mut visitor.out, asked, &head, self.grant.as_ref()) {
                    Ok(reply) => self.answered(visitor, head.status, reply),
                    Err(_) => self.fail(visitor, Fault::UpstreamError),
                }
            }
            HeadRead::Reset(reason) => self.fail(visitor, reason.into()),
            HeadRead::Pending => {}
        }
    }

    fn pass_interim(&mut self, visitor: &mut Visitor, head: &ResponseHead) {
        match (head.status, self.asked.version) {
            (100, _) if self.upload == Upload::Held => self.upload = Upload::Sending,
            // Nobody waits for it; and a 101 is no interim answer here.
            (100 | 101, _) => return,
            // HTTP/1.0 knows none (RFC 9110, section 15.2).
            (_, Version::Http10) => return,
            (_, Version::Http11) => {}
        }
        Reply::interim(&mut visitor.out, head);
    }

    /// Answers why there is no answer of the service's.
    fn fail(&mut self, visitor: &mut Visitor, fault: Fault) {
        let asked = self.answer_instead(visitor, fault.closes());
        self.failed(visitor, fault.failure());
        let reply = Reply::fault(&mut visitor.out, asked, fault, self.grant.as_ref());
        self.answered(visitor, fault.status().as_u16(), reply);
    }

    /// Tells a browser what its page may do.
    fn answer_preflight(&mut self, visitor: &mut Visitor, preflight: &Preflight) {
        let asked = self.answer_instead(visitor, false);
        let lines = self.grant.iter().flat_map(|grant| preflight.lines(grant));
        let reply = Reply::own(&mut visitor.out, asked, 204, lines);
        self.answered(visitor, 204, reply);
    }

    /// Lets go of the exchange for an answer of the server's own, and says what that may promise.
    fn answer_instead(&mut self, visitor: &Visitor, closes_anyway: bool) -> Asked {
        self.exchange = None;
        visitor.place.reading(false);
        // More is to come than would be drained.
        let too_much = self.body.left() > (visitor.input.len() + DRAIN_LIMIT) as u64;
        let closes = closes_anyway || self.upload == Upload::Held || too_much;
        self.upload = match self.upload {
            // Nothing of the body is left, but what follows may not be a request: it is left to
            // the lingering.
            Upload::Complete if closes_anyway => Upload::Abandoned,
            Upload::Complete => Upload::Complete,
            _ if closes => Upload::Abandoned,
            Upload::Draining { left } => Upload::Draining { left },
            _ => Upload::Draining { left: DRAIN_LIMIT },
        };
        Asked {
            persistent: self.asked.persistent
                && !closes
                && visitor.place.watched.ordered() == Order::None,
            ..self.asked
        }
    }

    /// An answer has begun.
    fn answered(&mut self, visitor: &Visitor, status: u16, reply: Reply) {
        visitor.place.answered(status);
        if let Some(record) = &mut self.record {
            record.status = Some(status);
        }
        self.reply = Some(reply);
    }

    /// Something went wrong.
    fn failed(&mut self, visitor: &Visitor, failure: Failure) {
        visitor.place.failed(failure);
        if let Some(record) = &mut self.record {
            record.failure = Some(failure);
        }
    }

    /// Notes for the access log how it ended.
    fn note_end(&mut self, visitor: &Visitor) {
        let is_answered = self.is_answered();
        let Some(record) = &mut self.record else {
            return;
        };
        let taken = self.reply.as_ref().map_or(0, |reply| reply.body_bytes);
        record.sent = taken.saturating_sub(visitor.out.len() as u64);
        record.complete = is_answered && !self.broken_off && visitor.out.is_empty();
    }

    /// What follows when everything has been written: nothing yet, the next request, or the end.
    fn outcome(&mut self, visitor: &Visitor) -> Option<Result<(), Over>> {
        if self.broken_off {
            let reset = self.reply.as_ref()?.ends_by_close();
            self.failed(visitor, Failure::CutAfterHead);
            return Some(Err(Over::BrokenOff { reset }));
        }
        let reply = self.reply.as_ref()?;
        if !self.is_answered() {
            return None;
        }
        if let Upload::Upgraded(flow) = self.upload {
            return self.service_ended(visitor, flow).err().map(Err);
        }
        let winds_down = visitor.place.watched.ordered() != Order::None;
        let persistent = reply.persistent && !winds_down;
        match self.upload {
            Upload::Complete if persistent => Some(Ok(())),
            Upload::Complete if visitor.input.is_empty() => Some(Err(Over::Closed)),
            Upload::Held | Upload::Sending | Upload::Draining { .. } if persistent => {
                if !matches!(self.upload, Upload::Draining { .. }) {
                    self.unwanted();
                }
                None
            }
            _ if self.body.is_done() => Some(Err(Over::Unheard)),
            _ => Some(Err(Over::Unwanted)),
        }
    }

    /// Whether the answer is complete, though perhaps not written yet.
    fn is_answered(&self) -> bool {
        self.reply.as_ref().is_some_and(Reply::is_complete)
    }

    /// How a connection ends that the sweep cuts.
    fn cut(&mut self, visitor: &Visitor) -> Over {
        match &self.reply {
            Some(reply) if reply.ends_by_close() => {
                self.failed(visitor, Failure::VisitorLeft);
                Over::BrokenOff { reset: true }
            }
            _ => Over::Cut,
        }
    }
}

/// An exchange, and what the visitor offers in it.
pub(super) struct Opened {
    pub(super) exchange: Exchange,
    offer: Option<Box<[u8]>>,
}

impl Visitor {
    /// Who may read the answer, if `http.cors` says so.
    fn judge(&self, line: RequestLine<'_>, fields: Fields<'_>) -> Option<Verdict> {
        let config = self.place.worker.shared().config();
        let cors = config.http.cors.as_ref()?;
        Some(cors.judge(line.method, fields.iter()))
    }

    /// Opens an exchange for a request that has been found good.
    fn open(
        &self,
        line: RequestLine<'_>,
        fields: Fields<'_>,
        facts: RequestFacts,
        record: &mut Option<Box<Record>>,
    ) -> Result<Opened, Fault> {
        if let Framing::Length(length) = facts.framing
            && self.limits.is_too_large(length)
        {
            return Err(Fault::BodyTooLarge);
        }
        // RFC 9110, section 10.1.1: in HTTP/1.0 it means nothing.
        let passed = |(name, _): &(&[u8], _)| {
            line.version == Version::Http11 || !name.eq_ignore_ascii_case(b"expect")
        };
        let request = Request {
            method: line.method,
            target: line.target,
            has_body: facts.framing != Framing::Length(0),
            upgrades: facts.upgrades,
        };
        let fields = fields.iter().filter(passed);
        open_exchange(&self.place, &self.forwarding, request, fields, record)
    }
}

/// A request that has been found good, without its header lines.
pub(super) struct Request<'a> {
    pub(super) method: &'a [u8],
    pub(super) target: &'a [u8],
    pub(super) has_body: bool,
    /// It offers other protocols, which are passed on if the agent knows what to do with them.
    pub(super) upgrades: bool,
}

/// Opens an exchange for a request in the tunnel that its tenancy has now.
pub(super) fn open_exchange<'a>(
    place: &Place,
    forwarding: &Forwarding,
    request: Request<'_>,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    record: &mut Option<Box<Record>>,
) -> Result<Opened, Fault> {
    let mut attempt = || -> Result<Opened, Fault> {
        let tunnel = place.tenancy.tunnel().ok_or(Fault::AgentOffline)?;
        let upgrades = request.upgrades && tunnel.upgrades;
        let request_id = || {
            let id = place.worker.request_id();
            if let Some(record) = record {
                record.made_id = Some(id.as_str().into());
            }
            id
        };
        let lines = forward_request(fields.clone(), forwarding, upgrades, request_id)
            .map_err(|_| Fault::HeadTooLarge)?;
        let offer = upgrades.then(|| offered(&lines).map(Box::from)).flatten();
        let head = RequestHead {
            method: method_bytes(request.method),
            target: Bytes::copy_from_slice(request.target),
            lines,
        };
        // Bytes of another protocol may follow.
        let has_body = request.has_body || offer.is_some();
        let exchange = tunnel.link.open(head, has_body)?;
        Ok(Opened { exchange, offer })
    };
    match attempt() {
        // A newer session may have taken over just then.
        Err(Fault::AgentOffline | Fault::TunnelLost) => attempt(),
        outcome => outcome,
    }
}

/// The method as shared bytes, without an allocation for the usual ones.
fn method_bytes(method: &[u8]) -> Bytes {
    const USUAL: [&[u8]; 7] = [
        b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH",
    ];
    match USUAL.iter().find(|usual| **usual == method) {
        Some(usual) => Bytes::from_static(usual),
        None => Bytes::copy_from_slice(method),
    }
}
