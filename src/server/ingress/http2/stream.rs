//! A request on a stream of its own, and its answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Response, StatusCode};

use super::super::connection::{Request, open_exchange};
use super::super::place::{Order, Part};
use super::super::record::Record;
use super::super::reply::answer_lines;
use super::Caller;
use super::head::Head;
use super::piece::{Piece, Unsent};
use crate::cors::{Grant, Line};
use crate::head::ResponseHead;
use crate::headers::forward_trailers;
use crate::http2::{append, fields_of, joined_cookie, trailers_of};
use crate::link::{Exchange, Gather};
use crate::metrics::Failure;
use crate::mux::{HeadRead, Read, Reason};
use crate::server::respond::Fault;

/// How many bytes of interim answers are passed on for a request; they lie in h2, and no window
/// holds them back. More are left out.
const MAX_INTERIM: usize = 64 * 1024;

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Done,
    /// The visitor reset it before the answer began.
    CalledOff,
}

/// A request that is being served: its body on the way to the exchange, and the answer on the way
/// to the visitor.
pub(super) struct Stream {
    caller: Arc<Caller>,
    /// None once the server answers itself. Let go before the request is counted as over.
    exchange: Option<Exchange>,
    upload: Upload,
    body: RecvStream,
    received: u64,
    max_body: Option<u64>,
    expects_continue: bool,
    /// It was a HEAD, so the answer has no body.
    to_head: bool,
    stage: Stage,
    respond: SendResponse<Piece>,
    /// None while the answer's head is awaited.
    send: Option<SendStream<Piece>>,
    /// What is still to come of the answer's body, if its head says so.
    left: Option<u64>,
    sent: u64,
    download: Gather,
    /// Bytes of interim answers so far.
    interim: usize,
    unsent: Arc<Unsent>,
    /// Which pages may read the answer, if that is for us to say.
    grant: Option<Grant>,
    /// For the access log, if there is one.
    record: Option<Box<Record>>,
    /// How often h2 has had its turn: what it was given before has been written, or waits in h2.
    turn: Arc<AtomicU32>,
    /// Nothing is left to be counted.
    settled: bool,
    part: Part,
}

/// What becomes of a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upload {
    /// It goes to the exchange.
    Sending,
    /// All of it has come but for the trailers.
    Trailers,
    /// Nobody wants it. It lies in h2 until the answer is complete, and then the stream is reset.
    Unwanted,
    /// It has been taken whole, or there is none.
    Complete,
}

/// How far an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Head,
    Body,
    /// The visitor has all of it, but the exchange isn't over.
    Bodiless,
    /// All of it has been handed to h2.
    Complete,
    /// It broke off. What came of it is still to be written.
    BrokenOff {
        reason: h2::Reason,
        turn: u32,
    },
}

/// The visitor has left the stream.
struct Left;

impl Stream {
    /// Opens an exchange for a request, or answers why not.
    pub(super) fn open(
        caller: &Arc<Caller>,
        request: http::Request<RecvStream>,
        respond: SendResponse<Piece>,
        turn: Arc<AtomicU32>,
    ) -> Self {
        let (parts, body) = request.into_parts();
        let config = caller.place.worker.shared().config();
        let settings = &config.http;
        let part = caller.place.part_begins();
        let upload = if body.is_end_stream() {
            Upload::Complete
        } else {
            Upload::Sending
        };
        let mut stream = Self {
            exchange: None,
            upload,
            body,
            received: 0,
            max_body: settings.max_body,
            expects_continue: false,
            to_head: parts.method == http::Method::HEAD,
            stage: Stage::Head,
            respond,
            send: None,
            left: None,
            sent: 0,
            download: Gather::default(),
            interim: 0,
            unsent: Unsent::new(&part),
            grant: None,
            record: Record::begin(&caller.place, caller.peer.ip()),
            turn,
            settled: false,
            part,
            caller: caller.clone(),
        };
        let cookie = joined_cookie(&parts.headers);
        let head = Head::new(&parts, cookie.as_deref());
        if let Some(record) = &mut stream.record {
            let (method, target) = (head.method, head.target);
            record.asked("HTTP/2.0", method, target, head.fields(), caller.is_trusted);
        }
        let mut preflight = None;
        if let Some(cors) = &settings.cors {
            let verdict = cors.judge(head.method, head.fields());
            stream.grant = Some(verdict.grant);
            preflight = verdict.preflight;
        }
        let checked = head.check(settings);
        match (checked, preflight) {
            (Err(fault), _) => stream.fail(fault),
            (Ok(_), Some(preflight)) => {
                let lines = stream.grant.iter().flat_map(|grant| preflight.lines(grant));
                let response = with_lines(Response::new(()), lines);
                stream.answer_instead(StatusCode::NO_CONTENT, response, Bytes::new());
            }
            (Ok(facts), None) => {
                stream.expects_continue = facts.expects_continue;
                let request = Request {
                    method: head.method,
                    target: head.target,
                    has_body: upload != Upload::Complete,
                    // HTTP/2 knows no Upgrade (RFC 9113, section 8.6).
                    upgrades: false,
                };
                let (place, forwarding) = (&caller.place, &caller.forwarding);
                let fields = head.fields();
                match open_exchange(place, forwarding, request, fields, &mut stream.record) {
                    Ok(opened) => stream.exchange = Some(opened.exchange),
                    Err(fault) => stream.fail(fault),
                }
            }
        }
        stream
    }

    /// Carries on in both directions until the answer has been written.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.part.watched.task.register(cx.waker());
        loop {
            if self.part.watched.ordered() == Order::Cut {
                self.respond.send_reset(h2::Reason::CANCEL);
                return Poll::Ready(End::Done);
            }
            let moved = match self.advance(cx) {
                Ok(moved) => moved,
                Err(Left) if self.stage == Stage::Head => return Poll::Ready(End::CalledOff),
                Err(Left) => return Poll::Ready(End::Done),
            };
            let blocked = self.is_blocked();
            self.part.writing(blocked);
            if self.unsent.is_none() && self.is_over(cx) {
                return Poll::Ready(End::Done);
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Result<bool, Left> {
        let reset = match &mut self.send {
            None => self.respond.poll_reset(cx),
            Some(send) => send.poll_reset(cx),
        };
        if reset.is_ready() {
            return Err(Left);
        }
        Ok(self.poll_upload(cx)? | self.poll_answer(cx)?)
    }

    /// Whether the visitor is to take something before anything more is done about the answer.
    fn is_blocked(&mut self) -> bool {
        match &mut self.send {
            None => false,
            Some(send) => {
                !self.unsent.is_none() || self.stage == Stage::Body && send.capacity() == 0
            }
        }
    }

    /// Whether nothing is left to be done, once all has been written.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        match self.stage {
            Stage::Head | Stage::Body | Stage::Bodiless => false,
            Stage::Complete => {
                self.settled = true;
                true
            }
            // A reset overtakes what h2 hasn't written, even the head.
            Stage::BrokenOff { turn, .. } if turn == self.turn.load(Relaxed) => {
                cx.waker().wake_by_ref();
                false
            }
            Stage::BrokenOff { reason, .. } => {
                self.failed(Failure::CutAfterHead);
                self.settled = true;
                self.respond.send_reset(reason);
                true
            }
        }
    }

    /// Passes the body on as fast as the service takes it. Says whether something moved.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<bool, Left> {
        let mut moved = false;
        while let Some(exchange) = &self.exchange {
            match self.upload {
                Upload::Sending => {}
                Upload::Trailers => match self.body.poll_trailers(cx) {
                    Poll::Ready(Ok(trailers)) => {
                        self.take_trailers(trailers);
                        return Ok(true);
                    }
                    Poll::Ready(Err(_)) => return Err(self.broke_off()),
                    Poll::Pending => return Ok(moved),
                },
                Upload::Unwanted | Upload::Complete => return Ok(moved),
            }
            match exchange.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => {
                    self.unwanted();
                    return Ok(true);
                }
                Poll::Pending => {
                    self.part.reading(false);
                    return Ok(moved);
                }
            }
            match self.body.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    moved = true;
                    self.part.reading(false);
                    self.take_data(data);
                }
                Poll::Ready(Some(Err(_))) => return Err(self.broke_off()),
                Poll::Ready(None) => self.upload = Upload::Trailers,
                Poll::Pending => {
                    // Once the answer has begun, the two may talk as slowly as they like: gRPC has
                    // streams on which a client is silent for hours.
                    self.part.reading(self.stage == Stage::Head);
                    return Ok(moved);
                }
            }
        }
        Ok(moved)
    }

    fn take_data(&mut self, data: Bytes) {
        let Some(exchange) = &self.exchange else {
            return;
        };
        let length = data.len();
        self.received += length as u64;
        if let Some(record) = &mut self.record {
            record.received = self.received;
        }
        if self.max_body.is_some_and(|limit| self.received > limit) {
            exchange.abort(Reason::Cancelled);
            return self.fail_upload(Fault::BodyTooLarge);
        }
        self.caller.place.count_in(length);
        if length > 0 && exchange.send(data).is_err() {
            return self.unwanted();
        }
        // If the stream is gone, that is found out by the next look at it.
        let _ = self.body.flow_control().release_capacity(length);
    }

    fn take_trailers(&mut self, trailers: Option<HeaderMap>) {
        let Some(exchange) = &self.exchange else {
            return;
        };
        self.part.reading(false);
        let trailers = trailers.unwrap_or_default();
        match forward_trailers(fields_of(&trailers)) {
            Ok(lines) => {
                exchange.finish(Some(lines).filter(|lines| !lines.is_empty()));
                self.upload = Upload::Complete;
            }
            Err(_) => {
                exchange.abort(Reason::BodyIncomplete);
                self.fail_upload(Fault::BodyMalformed);
            }
        }
    }

    /// The body ends early. The service must not take what it got for a whole request.
    fn broke_off(&mut self) -> Left {
        if let Some(exchange) = &self.exchange {
            exchange.abort(Reason::BodyIncomplete);
        }
        Left
    }

    /// Nobody wants the rest of the body.
    fn unwanted(&mut self) {
        if let Some(exchange) = &self.exchange {
            exchange.abort(Reason::Cancelled);
        }
        self.part.reading(false);
        self.upload = Upload::Unwanted;
    }

    /// Something is wrong with the body.
    fn fail_upload(&mut self, fault: Fault) {
        self.part.reading(false);
        self.upload = Upload::Unwanted;
        match self.stage {
            Stage::Head => self.fail(fault),
            Stage::Body => self.break_off(h2::Reason::CANCEL),
            Stage::Bodiless | Stage::Complete | Stage::BrokenOff { .. } => {}
        }
    }

    /// Takes what there is of the answer. Says whether something moved.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Result<bool, Left> {
        let mut moved = false;
        while let Some(exchange) = self.exchange.clone() {
            match self.stage {
                Stage::Head => match exchange.poll_head(cx) {
                    Poll::Ready(head) => self.take_head(&exchange, head, cx)?,
                    Poll::Pending => break,
                },
                Stage::Body => {
                    if !self.has_room(cx) {
                        break;
                    }
                    match self.download.poll_next(&exchange, cx) {
                        Poll::Ready(read) => self.take_read(read)?,
                        Poll::Pending => break,
                    }
                }
                Stage::Bodiless => match exchange.poll_read(cx) {
                    Poll::Ready(Read::End(_) | Read::Reset(_)) => self.stage = Stage::Complete,
                    Poll::Ready(_) => {}
                    Poll::Pending => break,
                },
                Stage::Complete | Stage::BrokenOff { .. } => break,
            }
            moved = true;
        }
        Ok(moved)
    }

    /// Whether h2 can write more, or at least has room for it.
    fn has_room(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(send) = &mut self.send else {
            return false;
        };
        // Of what the visitor grants the connection, an answer that waits for its service holds
        // no more than this.
        send.reserve_capacity(1);
        loop {
            if send.capacity() > 0 {
                return true;
            }
            match send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                // A stream that is gone is seen as such before.
                Poll::Ready(Some(Err(_)) | None) | Poll::Pending => return false,
            }
        }
    }

    fn take_head(
        &mut self,
        exchange: &Exchange,
        head: HeadRead,
        cx: &mut Context<'_>,
    ) -> Result<(), Left> {
        match head {
            HeadRead::Interim(head) => self.pass_interim(&head),
            HeadRead::Reset(reason) => self.fail(reason.into()),
            HeadRead::Answer(head) => {
                let Some((response, length)) = answer(&head, self.grant.as_ref()) else {
                    self.fail(Fault::UpstreamError);
                    return Ok(());
                };
                self.part.reading(false);
                self.left = length;
                let bodiless = self.to_head || matches!(head.status, 204 | 304);
                // An answer of a head alone is said in one frame. To gRPC that is more than a
                // saving: only then it finds the status in it.
                let first = match bodiless {
                    true => None,
                    false => match self.download.poll_next(exchange, cx) {
                        Poll::Ready(read) => Some(read),
                        Poll::Pending => None,
                    },
                };
                let is_all = matches!(first, Some(Read::End(None))) && length.unwrap_or(0) == 0;
                self.begin(response, bodiless || is_all)?;
                match first {
                    _ if bodiless => self.stage = Stage::Bodiless,
                    _ if is_all => self.stage = Stage::Complete,
                    Some(first) => self.download.put_back(first),
                    None => {}
                }
            }
            HeadRead::Pending => {}
        }
        Ok(())
    }

    fn pass_interim(&mut self, head: &ResponseHead) {
        // 101 has no meaning here (RFC 9113, section 8.6), and 100 for nobody who doesn't wait.
        if head.status == 101 || head.status == 100 && !self.expects_continue {
            return;
        }
        self.interim += head.size();
        if self.interim <= MAX_INTERIM
            && let Some(response) = interim(head)
        {
            // It can be done without.
            let _ = self.respond.send_informational(response);
        }
    }

    /// Sends an answer's head.
    fn begin(&mut self, response: Response<()>, is_all: bool) -> Result<(), Left> {
        let status = response.status().as_u16();
        self.send = Some(
            self.respond
                .send_response(response, is_all)
                .map_err(|_| Left)?,
        );
        self.stage = Stage::Body;
        self.caller.place.answered(status);
        if let Some(record) = &mut self.record {
            record.status = Some(status);
        }
        Ok(())
    }

    fn take_read(&mut self, read: Read) -> Result<(), Left> {
        match read {
            Read::Data(data) => {
                let length = data.len() as u64;
                self.left = match self.left.map(|left| left.checked_sub(length)) {
                    None => None,
                    Some(Some(left)) => Some(left),
                    Some(None) => {
                        self.break_off(h2::Reason::INTERNAL_ERROR);
                        return Ok(());
                    }
                };
                self.caller.place.count_out(data.len());
                let is_last = self.download.is_at_end() && self.left.unwrap_or(0) == 0;
                self.send(data, is_last)?;
                if is_last {
                    self.stage = Stage::Complete;
                }
            }
            Read::End(_) if self.left.is_some_and(|left| left > 0) => {
                self.break_off(h2::Reason::INTERNAL_ERROR);
            }
            Read::End(trailers) => {
                let trailers = trailers_of(trailers.as_ref());
                match &mut self.send {
                    Some(send) if !trailers.is_empty() => {
                        send.send_trailers(trailers).map_err(|_| Left)?;
                    }
                    _ => self.send(Bytes::new(), true)?,
                }
                self.stage = Stage::Complete;
            }
            Read::Reset(reason) => self.break_off(code(reason)),
            Read::Pending => {}
        }
        Ok(())
    }

    /// Hands a piece of the answer's body to h2.
    fn send(&mut self, data: Bytes, is_last: bool) -> Result<(), Left> {
        let Some(send) = &mut self.send else {
            return Ok(());
        };
        self.sent += data.len() as u64;
        let piece = self.unsent.piece(data);
        send.send_data(piece, is_last).map_err(|_| Left)
    }

    fn break_off(&mut self, reason: h2::Reason) {
        let turn = self.turn.load(Relaxed);
        self.stage = Stage::BrokenOff { reason, turn };
    }

    /// Answers why there is no answer of the service's.
    fn fail(&mut self, fault: Fault) {
        self.failed(fault.failure());
        let (parts, body) = fault.respond().into_parts();
        let mut response = Response::new(());
        *response.headers_mut() = parts.headers;
        let response = with_lines(response, self.grant.iter().flat_map(Grant::own_lines));
        self.answer_instead(parts.status, response, body);
    }

    /// Lets go of the exchange for an answer of the server's own.
    fn answer_instead(&mut self, status: StatusCode, mut response: Response<()>, body: Bytes) {
        self.exchange = None;
        self.part.reading(false);
        *response.status_mut() = status;
        let is_all = self.to_head || body.is_empty();
        let begun = self.begin(response, is_all);
        if begun.is_ok() && !is_all {
            // A visitor who is gone is seen as such later.
            let _ = self.send(body, true);
        }
        self.stage = Stage::Complete;
    }

    /// Something went wrong.
    fn failed(&mut self, failure: Failure) {
        self.caller.place.failed(failure);
        if let Some(record) = &mut self.record {
            record.failure = Some(failure);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let is_complete = self.settled && self.stage == Stage::Complete;
        if !self.settled {
            self.failed(Failure::VisitorLeft);
        }
        if let Some(record) = &mut self.record {
            record.sent = self.sent.saturating_sub(self.unsent.bytes() as u64);
            record.complete = is_complete;
        }
    }
}

/// The head of the service's answer, with the lines that a `grant` adds, and the length that it
/// declares; none if it can't be passed on.
fn answer(head: &ResponseHead, grant: Option<&Grant>) -> Option<(Response<()>, Option<u64>)> {
    // The agent passed on what no visitor may see.
    if head.status < 200 {
        return None;
    }
    let (mut response, length) = response(head, grant)?;
    // RFC 9110, section 8.6: a 204 has no length, a 304 the one that a 200 would have.
    if let (Some(length), true) = (length, head.status != 204) {
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
    Some((response, length))
}

/// An interim answer, if it can be passed on.
fn interim(head: &ResponseHead) -> Option<Response<()>> {
    response(head, None).map(|(response, _)| response)
}

fn response(head: &ResponseHead, grant: Option<&Grant>) -> Option<(Response<()>, Option<u64>)> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).ok()?;
    let mut fits = true;
    let facts = answer_lines(head, grant, |name, value| {
        fits &= append(response.headers_mut(), name, value);
    });
    let length = facts.ok()?.length;
    fits.then_some((response, length))
}

fn with_lines<'a>(
    mut response: Response<()>,
    lines: impl Iterator<Item = Line<'a>>,
) -> Response<()> {
    for (name, value) in lines {
        append(response.headers_mut(), name.as_bytes(), value);
    }
    response
}

/// What a visitor is told who has the answer's head already (RFC 9113, section 7).
fn code(reason: Reason) -> h2::Reason {
    match reason {
        Reason::Cancelled => h2::Reason::CANCEL,
        Reason::Overloaded => h2::Reason::ENHANCE_YOUR_CALM,
        Reason::TunnelLost
        | Reason::Draining
        | Reason::UpstreamRefused
        | Reason::UpstreamError
        | Reason::UpstreamTimeout
        | Reason::BodyIncomplete
        | Reason::Unknown(_) => h2::Reason::INTERNAL_ERROR,
    }
}
