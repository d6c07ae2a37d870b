//! From a visitor's request to an exchange in a tunnel, and back: the one room of the server that
//! knows the visitors' HTTP engine.

pub(super) mod visitor;

use std::cell::Cell;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::header::{CONTENT_LENGTH, EXPECT, ORIGIN};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use self::visitor::{Watched, WatchedBody};
use super::access::Entry;
use super::respond::Fault;
use super::tenancy::Tenancy;
use super::worker::Worker;
use crate::config::HttpConfig;
use crate::cors::Cors;
use crate::head::RequestHead;
use crate::headers::{
    self, Direction, Forwarding, check_request, forward_request, forward_trailers,
};
use crate::link::Exchange;
use crate::metrics::{Failure, StatusClass};
use crate::mux::{HeadRead, Read, Reason};

/// How much of a request's body is read and dropped after the answer was complete, so that the
/// connection can be used again. A visitor with more to send has it closed.
const DRAIN_LIMIT: usize = 64 * 1024;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the requests of one connection share.
pub(super) struct Visit {
    worker: Arc<Worker>,
    tenancy: Arc<Tenancy>,
    watched: Arc<Watched>,
    peer: IpAddr,
    peer_is_trusted: bool,
    forwarding: Forwarding,
}

impl Visit {
    /// A connection from `peer` to the port of `tenancy`.
    pub(super) fn new(
        worker: Arc<Worker>,
        tenancy: Arc<Tenancy>,
        watched: Arc<Watched>,
        peer: IpAddr,
    ) -> Self {
        let trusted = &worker.shared().config.http.trusted_proxies;
        let is_trusted = trusted.iter().any(|block| block.contains(peer));
        Self {
            forwarding: Forwarding::new(peer, is_trusted),
            peer,
            peer_is_trusted: is_trusted,
            worker,
            tenancy,
            watched,
        }
    }
}

/// Serves one request.
pub(super) async fn serve(
    visit: Arc<Visit>,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    let mut underway = Underway::begin(&visit, &request);
    let version = request.version();
    let is_head = *request.method() == Method::HEAD;
    let cors = visit.worker.shared().config.http.cors.as_ref();
    let origin = cors.and_then(|_| request.headers().get(ORIGIN).cloned());
    let response = match forward(&visit, request, &mut underway.record).await {
        Ok((mut head, exchange, upload)) => {
            if let Some(cors) = cors {
                cors.extend(origin.as_ref(), head.headers_mut());
            }
            // What has a body, but neither length nor chunks (RFC 9112, section 6.3).
            let bodiless = matches!(
                head.status(),
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            );
            let by_close = version == Version::HTTP_10
                && !is_head
                && !bodiless
                && !head.headers().contains_key(CONTENT_LENGTH);
            visit.watched.answer_ends_by_close(by_close);
            if let Some(record) = &mut underway.record {
                record.answered(head.status(), is_head || bodiless);
                record.length = length_of(head.headers());
            }
            head.map(|()| Answer {
                source: Source::Exchange(exchange),
                last_look: false,
                upload,
                underway,
            })
        }
        Err((own, upload)) => {
            let response = match own {
                Own::Fault(fault) => {
                    if fault.closes() {
                        visit.watched.linger();
                    }
                    visit.worker.metrics().failures.inc(fault.failure());
                    if let Some(record) = &mut underway.record {
                        record.error = Some(fault.failure().as_str());
                    }
                    let mut response = fault.respond();
                    if let Some(cors) = cors {
                        cors.extend_own(origin.as_ref(), response.headers_mut());
                    }
                    response.map(Some)
                }
                Own::Preflight(lines) => {
                    let mut response = Response::new(None);
                    *response.status_mut() = StatusCode::NO_CONTENT;
                    *response.headers_mut() = *lines;
                    response
                }
            };
            if let Some(record) = &mut underway.record {
                record.answered(response.status(), is_head || response.body().is_none());
            }
            response.map(|body| Answer {
                source: Source::Own(body),
                last_look: false,
                upload,
                underway,
            })
        }
    };
    let class = StatusClass::of(response.status().as_u16());
    visit.worker.metrics().answers.inc(class);
    Ok(response)
}

/// An answer of the server's own.
enum Own {
    /// Something went wrong.
    Fault(Fault),
    /// A browser asked what its page may do; these header lines tell.
    Preflight(Box<HeaderMap>),
}

impl From<Fault> for Own {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Own {
    /// Whether the connection can't be used again.
    fn closes(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.closes())
    }
}

type Forwarded = (Response<()>, Exchange, UploadGuard);

/// Carries the request over and waits for the answer's head.
async fn forward(
    visit: &Arc<Visit>,
    request: Request<Incoming>,
    record: &mut Option<Box<Record>>,
) -> Result<Forwarded, (Own, UploadGuard)> {
    let (parts, body) = request.into_parts();
    let holds_back = parts.version == Version::HTTP_11 && awaits_go_ahead(&parts.headers);
    let mut upload = UploadGuard::default();
    let (exchange, head_size) = match open(visit, &parts, &body, record) {
        Ok(opened) => opened,
        Err(own) => {
            // Where the connection closes anyway, the rest of the body is left to the lingering.
            if !body.is_end_stream() && !holds_back && !own.closes() {
                tokio::spawn(drain(visit.clone(), visit.watched.body(), body));
            }
            return Err((own, upload));
        }
    };
    if !body.is_end_stream() {
        let shared = Arc::new(Upload::default());
        upload.upload = Some(shared.clone());
        if let Some(record) = record {
            record.upload = Some(shared.clone());
        }
        let pump = Pump {
            watched: visit.watched.body(),
            visit: visit.clone(),
            exchange: exchange.clone(),
            upload: shared,
            body,
            received: 0,
        };
        if holds_back {
            // Reading the body would tell the visitor to go on, which is for the service to say.
            pump.watched.holding_back();
            upload.held = Some(pump);
        } else {
            tokio::spawn(pump.run());
        }
    }
    let head = loop {
        let read = std::future::poll_fn(|cx| {
            if upload.held.is_some()
                && visit.watched.body_came_early(head_size)
                && let Some(pump) = upload.held.take()
            {
                // The visitor waited long enough and sends; RFC 9110, section 10.1.1 lets him.
                tokio::spawn(pump.run());
            }
            exchange.poll_head(cx)
        })
        .await;
        match read {
            HeadRead::Interim(head) => {
                if head.status == StatusCode::CONTINUE
                    && let Some(pump) = upload.held.take()
                {
                    // hyper sends the 100 when the body is asked for.
                    tokio::spawn(pump.run());
                }
                // Others can't be sent through hyper's server; a proxy may drop them
                // (RFC 9110, section 15.2).
            }
            HeadRead::Answer(head) => break head,
            HeadRead::Reset(reason) => {
                let fault = upload.fault().unwrap_or_else(|| reason.into());
                return Err((fault.into(), upload));
            }
            HeadRead::Pending => {}
        }
    };
    let valid = StatusCode::from_u16(head.status)
        .ok()
        .filter(|status| !status.is_informational())
        .zip(headers::to_header_map(&head.lines, Direction::Response).ok());
    let Some((status, lines)) = valid else {
        // The agent passed on what no visitor may see.
        exchange.abort(Reason::Cancelled);
        return Err((Fault::UpstreamError.into(), upload));
    };
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = lines;
    Ok((response, exchange, upload))
}

/// Checks the head and opens an exchange for it. Says how large the head is, too.
fn open(
    visit: &Visit,
    parts: &http::request::Parts,
    body: &Incoming,
    record: &mut Option<Box<Record>>,
) -> Result<(Exchange, usize), Own> {
    let limits = &visit.worker.shared().config.http;
    let target = Target::of(&parts.uri);
    let head_size = check_size(parts, &target, limits)?;
    check_request(
        &parts.method,
        target.as_bytes(),
        parts.version,
        &parts.headers,
    )
    .map_err(Fault::Refused)?;
    if let (Some(limit), Some(length)) = (limits.max_body, body.size_hint().exact())
        && length > limit
    {
        return Err(Fault::BodyTooLarge.into());
    }
    if let Some(cors) = &limits.cors
        && Cors::is_preflight(&parts.method, &parts.headers)
    {
        return Err(Own::Preflight(Box::new(cors.answer(&parts.headers))));
    }
    let made_id = Cell::new(None);
    let attempt = || -> Result<Exchange, Fault> {
        let lines = forward_request(&parts.headers, &visit.forwarding, || {
            let id = visit.worker.request_id();
            made_id.set(Some(id));
            id
        })
        .map_err(|_| Fault::HeadTooLarge)?;
        let head = RequestHead {
            method: method_bytes(&parts.method),
            target: Bytes::copy_from_slice(target.as_bytes()),
            lines,
        };
        let link = visit.tenancy.link().ok_or(Fault::AgentOffline)?;
        Ok(link.open(head, !body.is_end_stream())?)
    };
    let opened = match attempt() {
        // A newer session may have taken over just then.
        Err(Fault::AgentOffline | Fault::TunnelLost) => attempt(),
        outcome => outcome,
    };
    if let (Some(record), Some(id)) = (record, made_id.get()) {
        record.request_id = Some(id.as_str().as_bytes().into());
    }
    Ok((opened?, head_size))
}

/// The request target as the visitor wrote it. hyper keeps origin and asterisk form as they are;
/// only a target in absolute form has to be put together again.
enum Target<'a> {
    Borrowed(&'a str),
    Owned(String),
}

impl<'a> Target<'a> {
    fn of(uri: &'a http::Uri) -> Self {
        match uri.path_and_query() {
            Some(target) if uri.scheme().is_none() && uri.authority().is_none() => {
                Self::Borrowed(target.as_str())
            }
            _ => Self::Owned(uri.to_string()),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Borrowed(text) => text.as_bytes(),
            Self::Owned(text) => text.as_bytes(),
        }
    }
}

/// The size of the head with its empty line, as it is usually written, if it is within the limits.
fn check_size(
    parts: &http::request::Parts,
    target: &Target<'_>,
    limits: &HttpConfig,
) -> Result<usize, Fault> {
    // "METHOD target HTTP/1.1" and the line's end.
    let line = parts.method.as_str().len() + target.as_bytes().len() + 12;
    if line > limits.max_request_line {
        return Err(Fault::RequestLineTooLong);
    }
    let lines: usize = parts
        .headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if parts.headers.len() > limits.max_header_lines || line + lines > limits.max_head {
        return Err(Fault::HeadTooLarge);
    }
    Ok(line + lines + 2)
}

/// The length of a body, as its head gives it.
fn length_of(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The method as bytes, without an allocation for the usual ones.
fn method_bytes(method: &Method) -> Bytes {
    match method.as_str() {
        "GET" => Bytes::from_static(b"GET"),
        "HEAD" => Bytes::from_static(b"HEAD"),
        "POST" => Bytes::from_static(b"POST"),
        "PUT" => Bytes::from_static(b"PUT"),
        "DELETE" => Bytes::from_static(b"DELETE"),
        "OPTIONS" => Bytes::from_static(b"OPTIONS"),
        "PATCH" => Bytes::from_static(b"PATCH"),
        other => Bytes::copy_from_slice(other.as_bytes()),
    }
}

fn awaits_go_ahead(headers: &HeaderMap) -> bool {
    headers
        .get(EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// What the task that reads a request's body and the answer to it tell each other.
#[derive(Debug, Default)]
struct Upload {
    /// The answer is complete: no more of the body is wanted.
    done: AtomicBool,
    /// The pump's task.
    pump: AtomicWaker,
    /// What went wrong with the body, one of the constants below.
    fault: AtomicU8,
    /// Bytes of the body that went on to the agent. Read by the access log.
    received: AtomicU64,
}

const TOO_LARGE: u8 = 1;
const INCOMPLETE: u8 = 2;
const MALFORMED: u8 = 3;

/// Ends the upload when the answer is complete or given up.
#[derive(Default)]
struct UploadGuard {
    upload: Option<Arc<Upload>>,
    /// The body that nobody has asked for. It is kept with the answer, unread, so that the
    /// connection stays open for the visitor's going to be noticed.
    held: Option<Pump>,
}

impl UploadGuard {
    /// What went wrong with the body, if that is why the exchange ended.
    fn fault(&self) -> Option<Fault> {
        match self.upload.as_ref()?.fault.load(Relaxed) {
            TOO_LARGE => Some(Fault::BodyTooLarge),
            INCOMPLETE => Some(Fault::BodyIncomplete),
            MALFORMED => Some(Fault::BodyMalformed),
            _ => None,
        }
    }
}

impl Drop for UploadGuard {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.done.store(true, Relaxed);
            upload.pump.wake();
        }
    }
}

/// Carries a request's body into the exchange, as fast as the service takes it.
struct Pump {
    visit: Arc<Visit>,
    watched: WatchedBody,
    exchange: Exchange,
    upload: Arc<Upload>,
    body: Incoming,
    received: u64,
}

/// How a pump ended.
enum Pumped {
    /// The body is complete, or broke.
    Ended,
    /// The rest isn't wanted.
    Unwanted,
}

impl Pump {
    async fn run(mut self) {
        let pumped = std::future::poll_fn(|cx| self.poll(cx)).await;
        match pumped {
            Pumped::Ended => self.watched.read_enough(),
            Pumped::Unwanted => {
                self.exchange.abort(Reason::Cancelled);
                drop(self.exchange);
                if self.upload.fault.load(Relaxed) == TOO_LARGE {
                    // The answer closes the connection.
                    drop(self.body);
                    self.watched.read_enough();
                } else {
                    drain(self.visit, self.watched, self.body).await;
                }
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Pumped> {
        self.upload.pump.register(cx.waker());
        loop {
            if self.upload.done.load(Relaxed) {
                return Poll::Ready(Pumped::Unwanted);
            }
            match self.exchange.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Pumped::Unwanted),
                Poll::Pending => {
                    self.watched.holding_back();
                    return Poll::Pending;
                }
            }
            self.watched.reading(self.visit.worker.now());
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => {
                    let fault = if is_malformed(&error) {
                        MALFORMED
                    } else {
                        INCOMPLETE
                    };
                    self.fail(fault, Reason::BodyIncomplete);
                    return Poll::Ready(Pumped::Ended);
                }
                Poll::Ready(None) => {
                    self.exchange.finish(None);
                    return Poll::Ready(Pumped::Ended);
                }
                Poll::Pending => return Poll::Pending,
            };
            match frame.into_data() {
                Ok(data) => {
                    self.received += data.len() as u64;
                    self.upload.received.store(self.received, Relaxed);
                    let limit = self.visit.worker.shared().config.http.max_body;
                    if limit.is_some_and(|limit| self.received > limit) {
                        self.fail(TOO_LARGE, Reason::Cancelled);
                        return Poll::Ready(Pumped::Unwanted);
                    }
                    self.visit.count_in(data.len());
                    if self.exchange.send(data).is_err() {
                        return Poll::Ready(Pumped::Unwanted);
                    }
                }
                Err(frame) => {
                    let trailers = frame
                        .trailers_ref()
                        .and_then(|trailers| forward_trailers(trailers).ok());
                    self.exchange.finish(trailers);
                    return Poll::Ready(Pumped::Ended);
                }
            }
        }
    }

    fn fail(&self, fault: u8, reason: Reason) {
        self.upload.fault.store(fault, Relaxed);
        self.exchange.abort(reason);
    }
}

/// Whether a body broke because of what is in it, and not because the connection ended.
fn is_malformed(error: &hyper::Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|error| {
            matches!(
                error.kind(),
                ErrorKind::InvalidData | ErrorKind::InvalidInput
            )
        })
}

/// Reads the rest of a body that nobody wants, within limits; what is left closes the connection.
async fn drain(visit: Arc<Visit>, watched: WatchedBody, mut body: Incoming) {
    let mut left = DRAIN_LIMIT;
    std::future::poll_fn(|cx| {
        loop {
            watched.reading(visit.worker.now());
            match std::task::ready!(Pin::new(&mut body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    match left.checked_sub(bytes) {
                        Some(rest) => left = rest,
                        None => {
                            visit.watched.linger();
                            return Poll::Ready(());
                        }
                    }
                }
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
    })
    .await;
    watched.read_enough();
}

impl Visit {
    fn count_in(&self, bytes: usize) {
        self.worker.metrics().body_bytes_in.add(bytes as u64);
        self.tenancy.stats.bytes_in.add(bytes as u64);
    }

    fn count_out(&self, bytes: usize) {
        self.worker.metrics().body_bytes_out.add(bytes as u64);
        self.tenancy.stats.bytes_out.add(bytes as u64);
    }
}

/// Counts a request as under way until its answer is complete, or the visitor has left.
struct Underway {
    visit: Arc<Visit>,
    /// What the access log will say of it, if there is one.
    record: Option<Box<Record>>,
}

impl Underway {
    fn begin(visit: &Arc<Visit>, request: &Request<Incoming>) -> Self {
        let metrics = visit.worker.metrics();
        metrics.requests.inc();
        metrics.exchanges_open.inc();
        visit.tenancy.stats.requests.inc();
        visit.tenancy.stats.exchanges_open.inc();
        visit.watched.exchange_begins(visit.worker.now());
        let log = visit.worker.shared().access.as_ref();
        Self {
            visit: visit.clone(),
            record: log.map(|_| Box::new(Record::begin(visit, request))),
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let visit = &self.visit;
        visit.worker.metrics().exchanges_open.dec();
        visit.tenancy.stats.exchanges_open.dec();
        visit.watched.exchange_ends(visit.worker.now());
        if let Some(record) = &self.record {
            record.write(visit);
        }
    }
}

/// What becomes of a request, for its line of the access log.
struct Record {
    time: SystemTime,
    since: Instant,
    method: Method,
    path: Box<str>,
    protocol: &'static str,
    forwarded_for: Option<Box<[u8]>>,
    request_id: Option<Box<[u8]>>,
    upload: Option<Arc<Upload>>,
    status: Option<StatusCode>,
    /// What the answer's head says of the length of its body. hyper doesn't ask for more.
    length: Option<u64>,
    bytes_out: u64,
    complete: bool,
    error: Option<&'static str>,
}

impl Record {
    fn begin(visit: &Visit, request: &Request<Incoming>) -> Self {
        let line = |name| request.headers().get(name).map(HeaderValue::as_bytes);
        let trusted = visit.peer_is_trusted;
        Self {
            time: SystemTime::now(),
            since: Instant::now(),
            method: request.method().clone(),
            path: request.uri().path().into(),
            protocol: match request.version() {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_11 => "HTTP/1.1",
                _ => "HTTP/2.0",
            },
            forwarded_for: line(X_FORWARDED_FOR).filter(|_| trusted).map(Box::from),
            request_id: line(X_REQUEST_ID).map(Box::from),
            upload: None,
            status: None,
            length: None,
            bytes_out: 0,
            complete: false,
            error: None,
        }
    }

    /// The answer's head is ready; hyper won't ask for a body if there is none.
    fn answered(&mut self, status: StatusCode, bodiless: bool) {
        self.status = Some(status);
        self.complete = bodiless;
    }

    fn write(&self, visit: &Visit) {
        let Some(log) = &visit.worker.shared().access else {
            return;
        };
        let all = self.length.is_some_and(|length| self.bytes_out >= length);
        let received = self.upload.as_ref().map(|up| up.received.load(Relaxed));
        log.write(&Entry {
            time: self.time,
            visitor: visit.peer,
            forwarded_for: self.forwarded_for.as_deref(),
            agent_id: &visit.tenancy.agent_id,
            port: visit.tenancy.port,
            method: self.method.as_str(),
            path: &self.path,
            protocol: self.protocol,
            status: self.status.map(|status| status.as_u16()),
            bytes_in: received.unwrap_or(0),
            bytes_out: self.bytes_out,
            duration: self.since.elapsed(),
            complete: self.complete || all,
            request_id: self.request_id.as_deref(),
            error: self.error,
        });
    }
}

/// The body of an answer: the exchange's, or one of our own.
pub(super) struct Answer {
    source: Source,
    /// The exchange broke off, and what came before it has been given to hyper.
    last_look: bool,
    /// Dropped with the answer, which ends an upload that is still going on.
    #[expect(dead_code, reason = "held for its drop")]
    upload: UploadGuard,
    underway: Underway,
}

enum Source {
    Exchange(Exchange),
    Own(Option<Bytes>),
}

/// The answer broke off; hyper closes the connection, so that the visitor can tell.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off: {0}")]
pub(super) struct BrokenOff(Reason);

impl Body for Answer {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = &mut *self;
        let exchange = match &mut this.source {
            Source::Own(body) => {
                let body = body.take();
                if let (Some(record), Some(body)) = (&mut this.underway.record, &body) {
                    record.bytes_out = body.len() as u64;
                    record.complete = true;
                }
                return Poll::Ready(body.map(|body| Ok(Frame::data(body))));
            }
            Source::Exchange(exchange) => exchange,
        };
        match std::task::ready!(exchange.poll_read(cx)) {
            Read::Data(data) => {
                this.underway.visit.count_out(data.len());
                if let Some(record) = &mut this.underway.record {
                    record.bytes_out += data.len() as u64;
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Read::End(trailers) => {
                this.underway.visit.watched.answer_ends_by_close(false);
                if let Some(record) = &mut this.underway.record {
                    record.complete = true;
                }
                Poll::Ready(
                    trailers
                        .and_then(|lines| headers::to_trailer_map(&lines).ok())
                        .filter(|map| !map.is_empty())
                        .map(|map| Ok(Frame::trailers(map))),
                )
            }
            Read::Reset(reason) => {
                if !this.last_look {
                    // An error makes hyper drop what it has buffered. Once more around, and it
                    // has written that: the visitor gets exactly what the service sent.
                    this.last_look = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                let metrics = this.underway.visit.worker.metrics();
                metrics.failures.inc(Failure::CutAfterHead);
                if let Some(record) = &mut this.underway.record {
                    record.error = Some(Failure::CutAfterHead.as_str());
                }
                Poll::Ready(Some(Err(BrokenOff(reason))))
            }
            Read::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Own(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, Bytes::len) as u64),
            Source::Exchange(_) => SizeHint::default(),
        }
    }
}
