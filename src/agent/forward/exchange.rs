//! One exchange over one connection to the service.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use futures_util::future::{Either, poll_fn, select};
use tracing::debug;

use crate::head::{RequestHead, ResponseHead};
use crate::headers::{check_response, forward_response, goes_on_as_offered, offered};
use crate::http1::{BodyDecoder, HeadLimits, HeadScan, Piece, parse_response};
use crate::link::Exchange;
use crate::mux::Reason;

use super::connection::Connection;
use super::request::{Broken, InvalidRequest, Upload};
use super::{Task, Worker, upgraded};

/// How large an answer's head may be: as much as the tunnel carries.
const HEAD_LIMITS: HeadLimits = HeadLimits {
    line: 8 * 1024,
    head: 64 * 1024,
    lines: 256,
};

/// How much of a request waits for the service before the visitor is asked for more.
pub(super) const WRITE_AHEAD: usize = 64 * 1024;

/// How one try to have a request answered ended.
enum Attempt {
    /// The answer is complete.
    Answered { reusable: bool },
    /// The service goes on with another protocol, as it was asked to; its 101 is on its way.
    Upgraded,
    /// The exchange has ended otherwise; the service sees that by the end of its connection.
    Ended,
    /// The connection broke before a byte of an answer.
    Broken {
        /// The service may have read something of the request.
        written: bool,
    },
}

/// Forwards one exchange, if possible over `connection`, and gives the connection back if it can
/// be used again.
pub(super) async fn forward(
    worker: &mut Worker,
    connection: Option<Box<Connection>>,
    task: Task,
) -> Option<Box<Connection>> {
    let Task { exchange, head } = task;
    let upload = poll_fn(|cx| {
        if exchange.poll_reset(cx).is_ready() {
            // Cancelled while it waited for its turn.
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Upload::new(worker.service(), &exchange, &head, cx)))
    });
    let Some(upload) = upload.await else {
        return connection;
    };
    let mut upload = sendable(&exchange, upload)?;
    let mut connection = match connection.filter(|connection| connection.is_quiet()) {
        Some(connection) => connection,
        None => open(worker, &exchange).await?,
    };
    let mut retried = false;
    loop {
        worker.deadline.hold(false);
        worker.start_deadline();
        let mut answer = Answer::new(&exchange, &head);
        match poll_fn(|cx| answer.poll(worker, &mut connection, &mut upload, cx)).await {
            Attempt::Answered { reusable } => return reusable.then_some(connection),
            Attempt::Upgraded => {
                worker.step_aside();
                upgraded::carry(&exchange, connection, upload.into_waiting()).await;
                return None;
            }
            Attempt::Ended => {
                connection.cut();
                return None;
            }
            Attempt::Broken { written } if !retried && may_repeat(&head, &upload, written) => {
                retried = true;
                if written {
                    upload = sendable(&exchange, Upload::bodiless(worker.service(), &head))?;
                }
                connection = open(worker, &exchange).await?;
            }
            Attempt::Broken { .. } => {
                exchange.abort(Reason::UpstreamError);
                return None;
            }
        }
    }
}

/// Whether a request that got no byte of an answer may be sent again: if the service saw nothing
/// of it, or if it has no body and does the same when it is done twice.
fn may_repeat(head: &RequestHead, upload: &Upload, written: bool) -> bool {
    !written || !upload.has_body() && is_idempotent(&head.method)
}

/// RFC 9110, section 9.2.2.
fn is_idempotent(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
    )
}

fn sendable(exchange: &Exchange, upload: Result<Upload, InvalidRequest>) -> Option<Upload> {
    match upload {
        Ok(upload) => Some(upload),
        Err(error) => {
            debug!(?exchange, %error, "the request can't be forwarded");
            exchange.abort(Reason::UpstreamError);
            None
        }
    }
}

/// Opens a connection, unless the exchange is cancelled before.
async fn open(worker: &Worker, exchange: &Exchange) -> Option<Box<Connection>> {
    let connect = pin!(worker.service().connect());
    let cancelled = poll_fn(|cx| exchange.poll_reset(cx));
    match select(connect, cancelled).await {
        Either::Left((Ok(stream), _)) => Some(Box::new(Connection::new(stream))),
        Either::Left((Err(error), _)) => {
            debug!(%error, "can't connect to the local service");
            exchange.abort(Reason::UpstreamRefused);
            None
        }
        Either::Right(_) => None,
    }
}

/// A request on its way and its answer: both directions of a connection, driven by one task.
struct Answer<'a> {
    exchange: &'a Exchange,
    request: &'a RequestHead,
    stage: Stage,
    /// The service has taken something of the request.
    written: bool,
    /// The service takes no more of the request. It may have answered before it stopped.
    refused: bool,
    /// The service has sent something.
    answered: bool,
}

enum Stage {
    Head(HeadScan),
    Body {
        decoder: BodyDecoder,
        /// The connection can be used again after it.
        persistent: bool,
    },
}

impl<'a> Answer<'a> {
    fn new(exchange: &'a Exchange, request: &'a RequestHead) -> Self {
        Self {
            exchange,
            request,
            stage: Stage::Head(HeadScan::default()),
            written: false,
            refused: false,
            answered: false,
        }
    }

    fn poll(
        &mut self,
        worker: &Worker,
        connection: &mut Connection,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Attempt> {
        if let Err(broken) = self.send(worker, connection, upload, cx) {
            // The service must not take what it got for a whole request.
            if let Broken::Length = broken {
                self.exchange.abort(Reason::BodyIncomplete);
            }
            debug!(exchange = ?self.exchange, %broken, "the request broke off");
            return Poll::Ready(Attempt::Ended);
        }
        loop {
            let outcome = match &mut self.stage {
                Stage::Head(_) => ready!(self.poll_head(worker, connection, upload, cx)),
                Stage::Body { .. } => ready!(self.poll_body(connection, upload, cx)),
            };
            if let Some(attempt) = outcome {
                return Poll::Ready(attempt);
            }
        }
    }

    /// Sends as much of the request as the service takes and the visitor has sent.
    fn send(
        &mut self,
        worker: &Worker,
        connection: &mut Connection,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Result<(), Broken> {
        let mut held = false;
        while !self.refused && !upload.is_complete() {
            if upload.waiting().len() < WRITE_AHEAD {
                match upload.poll_next(self.exchange, cx) {
                    Poll::Ready(taken) => {
                        taken?;
                        continue;
                    }
                    // The service's time doesn't run while the visitor's body is awaited, unless
                    // he waits for the service's word to send it.
                    Poll::Pending if upload.waiting().is_empty() => {
                        held = !upload.awaits_go_ahead();
                        break;
                    }
                    Poll::Pending => {}
                }
            }
            match connection.poll_write(upload.waiting(), cx) {
                Poll::Ready(Ok(())) => {
                    self.written = true;
                    if let Stage::Head(_) = self.stage {
                        // Its time runs from the last piece of the request that it got.
                        worker.start_deadline();
                    }
                }
                Poll::Ready(Err(error)) => {
                    debug!(%error, "the local service takes no more of the request");
                    self.refused = true;
                }
                Poll::Pending => break,
            }
        }
        if held != worker.deadline.is_held() {
            worker.deadline.hold(held);
            worker.start_deadline();
        }
        // What fails is seen by the next read.
        let _ = connection.poll_flush(cx);
        Ok(())
    }

    /// Waits for the next head, and passes it on.
    fn poll_head(
        &mut self,
        worker: &Worker,
        connection: &mut Connection,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Attempt>> {
        let Stage::Head(scan) = &mut self.stage else {
            return Poll::Ready(None);
        };
        match scan.scan(connection.received(), HEAD_LIMITS) {
            Ok(None) if !scan.may_be_response(connection.received()) => {
                return Poll::Ready(Some(self.fail("something else than HTTP/1")));
            }
            Ok(None) => {}
            Ok(Some(end)) => return Poll::Ready(self.take_head(worker, connection, upload, end)),
            Err(error) => return Poll::Ready(Some(self.fail(error))),
        }
        match connection.poll_fill(cx) {
            Poll::Ready(Ok(1..)) => {
                self.answered = true;
                Poll::Ready(None)
            }
            Poll::Ready(outcome) => Poll::Ready(Some(self.broke(outcome))),
            Poll::Pending if worker.deadline.is_over() => {
                self.exchange.abort(Reason::UpstreamTimeout);
                Poll::Ready(Some(Attempt::Ended))
            }
            Poll::Pending => {
                let cancelled = self.exchange.poll_reset(cx);
                cancelled.map(|_| Some(Attempt::Ended))
            }
        }
    }

    fn take_head(
        &mut self,
        worker: &Worker,
        connection: &mut Connection,
        upload: &mut Upload,
        end: usize,
    ) -> Option<Attempt> {
        let to_head = self.request.method == b"HEAD"[..];
        let head = &connection.received()[..end];
        let parsed = parse_response(head, HEAD_LIMITS.lines, |line, fields| {
            let facts = check_response(line.status, line.version, to_head, fields.iter())
                .map_err(|error| error.to_string())?;
            let lines =
                forward_response(line.status, fields.iter()).map_err(|error| error.to_string())?;
            let head = ResponseHead {
                status: line.status,
                lines,
            };
            Ok::<_, String>((head, facts))
        });
        let parsed = parsed
            .map_err(|error| error.to_string())
            .and_then(|parsed| parsed);
        let (head, facts) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => return Some(self.fail(error)),
        };
        connection.consume(end);
        match head.status {
            101 if !self.is_asked_for(&head) => {
                return Some(self.fail("another protocol, which nobody has asked for"));
            }
            101 => {
                worker.deadline.clear();
                self.exchange.answer(head);
                return Some(Attempt::Upgraded);
            }
            100..=199 => {
                if head.status == 100 {
                    upload.go_ahead();
                }
                self.exchange.interim(head);
            }
            _ => {
                worker.deadline.clear();
                self.exchange.answer(head);
                self.stage = Stage::Body {
                    decoder: BodyDecoder::new(facts.framing),
                    persistent: facts.persistent,
                };
            }
        }
        None
    }

    /// Whether a 101 goes on with what the visitor has offered.
    fn is_asked_for(&self, head: &ResponseHead) -> bool {
        offered(&self.request.lines).is_some_and(|offer| goes_on_as_offered(offer, &head.lines))
    }

    /// Passes the answer's body on.
    fn poll_body(
        &mut self,
        connection: &mut Connection,
        upload: &Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Attempt>> {
        let Stage::Body {
            decoder,
            persistent,
        } = &mut self.stage
        else {
            return Poll::Ready(None);
        };
        if !decoder.is_done() {
            // The service is asked for no more than the visitor takes.
            if ready!(self.exchange.poll_capacity(cx)).is_err() {
                return Poll::Ready(Some(Attempt::Ended));
            }
        }
        match decoder.decode(connection.input()) {
            Ok(Piece::Data(data)) => {
                let sent = self.exchange.send(data);
                Poll::Ready(sent.is_err().then_some(Attempt::Ended))
            }
            Ok(Piece::End(trailers)) => {
                self.exchange.finish(trailers);
                let reusable =
                    *persistent && upload.is_complete() && connection.received().is_empty();
                Poll::Ready(Some(Attempt::Answered { reusable }))
            }
            Ok(Piece::Partial) => match connection.poll_fill(cx) {
                Poll::Ready(Ok(1..)) => Poll::Ready(None),
                Poll::Ready(Ok(_)) if decoder.close() => Poll::Ready(None),
                Poll::Ready(_) => {
                    debug!(exchange = ?self.exchange, "the local service broke its answer off");
                    self.exchange.fail(Reason::UpstreamError);
                    Poll::Ready(Some(Attempt::Ended))
                }
                Poll::Pending => {
                    let cancelled = self.exchange.poll_reset(cx);
                    cancelled.map(|_| Some(Attempt::Ended))
                }
            },
            Err(error) => {
                debug!(exchange = ?self.exchange, %error, "the local service broke its answer off");
                self.exchange.fail(Reason::UpstreamError);
                Poll::Ready(Some(Attempt::Ended))
            }
        }
    }

    /// The connection has ended while the answer's head was awaited.
    fn broke(&self, outcome: io::Result<usize>) -> Attempt {
        if !self.answered {
            debug!(exchange = ?self.exchange, ?outcome, "the local service broke the connection");
            return Attempt::Broken {
                written: self.written,
            };
        }
        self.fail("the connection broke in the middle of the head")
    }

    /// The service's answer isn't one.
    fn fail(&self, why: impl std::fmt::Display) -> Attempt {
        debug!(exchange = ?self.exchange, %why, "the local service's answer can't be understood");
        self.exchange.abort(Reason::UpstreamError);
        Attempt::Ended
    }
}
