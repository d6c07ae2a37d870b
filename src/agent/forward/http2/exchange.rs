//! One exchange on one stream.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::{Either, poll_fn, select};
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Response};
use tracing::debug;

use super::super::exchange::is_idempotent;
use super::super::request::{Broken, InvalidRequest};
use super::super::{Task, Worker};
use super::Place;
use super::request::{Upload, request};
use crate::head::{RequestHead, ResponseHead};
use crate::headers::{Version, check_response, forward_response, forward_trailers, offered};
use crate::http2::{fields_of, trailers_of};
use crate::link::Exchange;
use crate::mux::{Read, Reason};

/// How one try to have a request answered ended.
enum Attempt {
    /// The exchange has ended, with an answer or without.
    Ended,
    /// The service says that it hasn't looked at the request, or will never see it.
    Unprocessed,
    /// The connection broke before a byte of an answer.
    Broken,
}

/// Forwards one exchange.
pub(in crate::agent::forward) async fn forward(worker: &Worker, task: Task) {
    let Task { exchange, head } = task;
    let mut upload = Upload::new();
    let mut retried = false;
    while let Some(place) = take_place(worker, &exchange).await {
        worker.deadline.hold(false);
        worker.start_deadline();
        let begun = poll_fn(|cx| {
            if exchange.poll_reset(cx).is_ready() {
                // Cancelled while it waited for its turn.
                return Poll::Ready(Ok(None));
            }
            let stream = Stream::begin(worker, &exchange, &head, &place, &mut upload, cx);
            Poll::Ready(stream.map(Some))
        });
        let attempt = match begun.await {
            Ok(Some(mut stream)) => poll_fn(|cx| stream.poll(&mut upload, cx)).await,
            Ok(None) => Attempt::Ended,
            Err(NotBegun::Refused) => Attempt::Unprocessed,
            Err(NotBegun::Invalid(error)) => {
                debug!(?exchange, %error, "the request can't be forwarded");
                exchange.abort(Reason::UpstreamError);
                Attempt::Ended
            }
        };
        let again = match attempt {
            Attempt::Ended => return,
            Attempt::Unprocessed => upload.rewind(),
            Attempt::Broken => {
                !upload.has_begun() && is_idempotent(&head.method) && upload.rewind()
            }
        };
        if !again || std::mem::replace(&mut retried, true) {
            return exchange.abort(Reason::UpstreamError);
        }
    }
}

/// A place on a connection, unless the exchange is cancelled before.
async fn take_place(worker: &Worker, exchange: &Exchange) -> Option<Place> {
    let place = pin!(Place::take(&worker.shared));
    let cancelled = poll_fn(|cx| exchange.poll_reset(cx));
    match select(place, cancelled).await {
        Either::Left((Some(place), _)) => Some(place),
        Either::Left((None, _)) => {
            exchange.abort(Reason::UpstreamRefused);
            None
        }
        Either::Right(_) => None,
    }
}

/// Why a stream wasn't begun.
enum NotBegun {
    /// The connection takes none any more.
    Refused,
    Invalid(InvalidRequest),
}

impl From<InvalidRequest> for NotBegun {
    fn from(error: InvalidRequest) -> Self {
        Self::Invalid(error)
    }
}

/// A request on its way and its answer. If it is dropped before both are complete, the stream is
/// reset, and the service sees that it is called off.
struct Stream<'a> {
    worker: &'a Worker,
    exchange: &'a Exchange,
    place: &'a Place,
    send: SendStream<Bytes>,
    /// There is more of the request to send, and the service wants it.
    sending: bool,
    /// What is still to come of the request's body, if its head says so.
    left: Option<u64>,
    /// The visitor holds his body back until he is told to go on.
    awaits_go_ahead: bool,
    to_head: bool,
    stage: Stage,
    /// The service has sent something.
    answered: bool,
    /// Of the answer only trailers can come.
    body_is_over: bool,
}

enum Stage {
    Head(ResponseFuture),
    Body(RecvStream),
}

impl<'a> Stream<'a> {
    fn begin(
        worker: &'a Worker,
        exchange: &'a Exchange,
        head: &RequestHead,
        place: &'a Place,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Result<Self, NotBegun> {
        let (request, facts) = request(worker.service(), head)?;
        // What a visitor sends who offers another protocol would be that protocol's.
        let is_all = offered(&head.lines).is_some() || upload.is_none(exchange, cx);
        if is_all && facts.length.is_some_and(|length| length > 0) {
            return Err(InvalidRequest::Length.into());
        }
        let sent = place.send.clone().send_request(request, is_all);
        let (response, send) = sent.map_err(|error| {
            debug!(%error, "the connection to the local service takes no request");
            NotBegun::Refused
        })?;
        Ok(Self {
            worker,
            exchange,
            place,
            send,
            sending: !is_all,
            left: facts.length,
            awaits_go_ahead: facts.expects_continue,
            to_head: head.method == b"HEAD"[..],
            stage: Stage::Head(response),
            answered: false,
            body_is_over: false,
        })
    }

    fn poll(&mut self, upload: &mut Upload, cx: &mut Context<'_>) -> Poll<Attempt> {
        loop {
            let sent = match self.poll_send(upload, cx) {
                Ok(moved) => moved,
                Err(broken) => {
                    // The service must not take what it got for a whole request.
                    if let Broken::Length = broken {
                        self.exchange.abort(Reason::BodyIncomplete);
                    }
                    debug!(exchange = ?self.exchange, %broken, "the request broke off");
                    return Poll::Ready(Attempt::Ended);
                }
            };
            let moved = match self.poll_answer(cx) {
                Poll::Ready(Some(attempt)) => return Poll::Ready(attempt),
                Poll::Ready(None) => true,
                Poll::Pending => false,
            };
            if matches!(self.stage, Stage::Body(_)) {
                upload.forget();
            }
            if !sent && !moved {
                return Poll::Pending;
            }
        }
    }

    /// Sends as much of the body as the service takes and the visitor has sent. Says whether
    /// something moved.
    fn poll_send(&mut self, upload: &mut Upload, cx: &mut Context<'_>) -> Result<bool, Broken> {
        let mut moved = false;
        let mut held = false;
        while self.sending && self.has_room(cx) {
            let Poll::Ready(read) = upload.poll_next(self.exchange, cx) else {
                // The service's time doesn't run while the visitor's body is awaited, unless he
                // waits for the service's word to send it.
                held = !self.awaits_go_ahead;
                break;
            };
            moved = true;
            self.awaits_go_ahead = false;
            self.send(read, upload, cx)?;
            if let Stage::Head(_) = self.stage {
                // Its time runs from the last piece of the request that it got.
                self.worker.start_deadline();
            }
        }
        let deadline = &self.worker.deadline;
        if held != deadline.is_held() {
            deadline.hold(held);
            self.worker.start_deadline();
        }
        Ok(moved)
    }

    /// Whether h2 can send more, or at least has room for it.
    fn has_room(&mut self, cx: &mut Context<'_>) -> bool {
        // Of what the service grants the connection, a request that waits for its visitor holds
        // no more than this.
        self.send.reserve_capacity(1);
        while self.send.capacity() == 0 {
            match self.send.poll_capacity(cx) {
                Poll::Pending => return false,
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(_)) | None) => {
                    // The service wants no more of it. It may have answered before.
                    self.sending = false;
                    return false;
                }
            }
        }
        true
    }

    fn send(
        &mut self,
        read: Read,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Result<(), Broken> {
        let sent = match read {
            Read::Data(data) => {
                if let Some(left) = &mut self.left {
                    *left = left.checked_sub(data.len() as u64).ok_or(Broken::Length)?;
                }
                let is_last = upload.is_at_end() && self.left.is_none_or(|left| left == 0);
                if is_last {
                    // It is known what this is.
                    let _ = upload.poll_next(self.exchange, cx);
                    self.sending = false;
                }
                self.send.send_data(data, is_last)
            }
            Read::End(_) if self.left.is_some_and(|left| left > 0) => return Err(Broken::Length),
            Read::End(trailers) => {
                self.sending = false;
                let trailers = trailers_of(trailers.as_ref());
                match trailers.is_empty() {
                    true => self.send.send_data(Bytes::new(), true),
                    false => self.send.send_trailers(trailers),
                }
            }
            Read::Reset(reason) => return Err(Broken::Visitor(reason)),
            Read::Pending => Ok(()),
        };
        if let Err(error) = sent {
            debug!(%error, "the local service takes no more of the request");
            self.sending = false;
        }
        Ok(())
    }

    /// Passes on what there is of the answer.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Attempt>> {
        let polled = match &mut self.stage {
            Stage::Head(response) => match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(head))) => return Poll::Ready(self.take_interim(head)),
                Poll::Ready(_) | Poll::Pending => match Pin::new(response).poll(cx) {
                    Poll::Ready(Ok(answer)) => return Poll::Ready(self.take_head(answer)),
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(self.broke(&error))),
                    Poll::Pending if self.worker.deadline.is_over() => {
                        self.exchange.abort(Reason::UpstreamTimeout);
                        // If the others on it are answered, they are all the same.
                        self.place.give_up_connection();
                        return Poll::Ready(Some(Attempt::Ended));
                    }
                    Poll::Pending => Poll::Pending,
                },
            },
            Stage::Body(body) if self.body_is_over => {
                let trailers = body.poll_trailers(cx);
                trailers.map(|trailers| self.take_trailers(trailers))
            }
            Stage::Body(body) => {
                // The service is asked for no more than the visitor takes.
                if ready!(self.exchange.poll_capacity(cx)).is_err() {
                    return Poll::Ready(Some(Attempt::Ended));
                }
                let data = body.poll_data(cx);
                data.map(|data| self.take_data(data))
            }
        };
        match polled {
            Poll::Ready(outcome) => Poll::Ready(outcome),
            Poll::Pending => {
                let cancelled = self.exchange.poll_reset(cx);
                cancelled.map(|_| Some(Attempt::Ended))
            }
        }
    }

    fn take_interim(&mut self, answer: Response<()>) -> Option<Attempt> {
        self.answered = true;
        match head_of(&answer, self.to_head) {
            // It has no meaning here (RFC 9113, section 8.6).
            Ok(head) if head.status == 101 => Some(self.fail("another protocol")),
            Ok(head) => {
                self.awaits_go_ahead &= head.status != 100;
                self.exchange.interim(head);
                None
            }
            Err(error) => Some(self.fail(error)),
        }
    }

    fn take_head(&mut self, answer: Response<RecvStream>) -> Option<Attempt> {
        let (parts, body) = answer.into_parts();
        let head = match head_of(&Response::from_parts(parts, ()), self.to_head) {
            Ok(head) => head,
            Err(error) => return Some(self.fail(error)),
        };
        self.worker.deadline.clear();
        self.exchange.answer(head);
        if body.is_end_stream() {
            // In the same frame of the tunnel: a status of gRPC that stands in the head counts
            // only if nothing follows.
            self.exchange.finish(None);
            return Some(Attempt::Ended);
        }
        self.stage = Stage::Body(body);
        None
    }

    fn take_data(&mut self, data: Option<Result<Bytes, h2::Error>>) -> Option<Attempt> {
        match data {
            Some(Ok(data)) => {
                let length = data.len();
                if length > 0 && self.exchange.send(data).is_err() {
                    return Some(Attempt::Ended);
                }
                if let Stage::Body(body) = &mut self.stage {
                    // If the stream is gone, that is found out by the next read.
                    let _ = body.flow_control().release_capacity(length);
                }
                None
            }
            Some(Err(error)) => Some(self.broke_off(&error)),
            None => {
                self.body_is_over = true;
                None
            }
        }
    }

    fn take_trailers(&mut self, trailers: Result<Option<HeaderMap>, h2::Error>) -> Option<Attempt> {
        let trailers = match trailers {
            Ok(trailers) => trailers.unwrap_or_default(),
            Err(error) => return Some(self.broke_off(&error)),
        };
        match forward_trailers(fields_of(&trailers)) {
            Ok(lines) => self
                .exchange
                .finish(Some(lines).filter(|lines| !lines.is_empty())),
            Err(_) => self.exchange.fail(Reason::UpstreamError),
        }
        Some(Attempt::Ended)
    }

    /// There will be no head.
    fn broke(&self, error: &h2::Error) -> Attempt {
        debug!(exchange = ?self.exchange, %error, "the local service gives no answer");
        // Nobody else is told of a GOAWAY so: streams that the service has looked at go on.
        let refused = error.is_remote()
            && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM));
        if refused {
            return Attempt::Unprocessed;
        }
        if !error.is_reset() && !self.answered {
            return Attempt::Broken;
        }
        self.exchange.abort(reason(error));
        Attempt::Ended
    }

    /// The answer breaks off.
    fn broke_off(&self, error: &h2::Error) -> Attempt {
        debug!(exchange = ?self.exchange, %error, "the local service broke its answer off");
        self.exchange.fail(reason(error));
        Attempt::Ended
    }

    /// The service's answer isn't one.
    fn fail(&self, why: impl std::fmt::Display) -> Attempt {
        debug!(exchange = ?self.exchange, %why, "the local service's answer can't be understood");
        self.exchange.abort(Reason::UpstreamError);
        Attempt::Ended
    }
}

/// What the visitor's side is told of a reset (RFC 9113, section 7).
fn reason(error: &h2::Error) -> Reason {
    match error.reason() {
        Some(h2::Reason::CANCEL) => Reason::Cancelled,
        Some(h2::Reason::ENHANCE_YOUR_CALM) if error.is_reset() => Reason::Overloaded,
        _ => Reason::UpstreamError,
    }
}

/// The head of an answer, for the tunnel.
pub(in crate::agent::forward) fn head_of(
    answer: &Response<()>,
    to_head: bool,
) -> Result<ResponseHead, String> {
    let status = answer.status().as_u16();
    let fields: Vec<_> = fields_of(answer.headers()).collect();
    let lines = fields.iter().copied();
    check_response(status, Version::Http11, to_head, lines.clone())
        .map_err(|error| error.to_string())?;
    let lines = forward_response(status, lines).map_err(|error| error.to_string())?;
    Ok(ResponseHead { status, lines })
}
