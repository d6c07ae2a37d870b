//! One exchange over one connection to the service.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::future::{Either, poll_fn, select};
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use tracing::debug;

use crate::head::{RequestHead, ResponseHead};
use crate::headers::{forward_response, forward_trailers};
use crate::link::Exchange;
use crate::mux::Reason;

use super::request::{self, RequestBody};
use super::service::{ServiceStream, Traffic};
use super::{Task, Worker};

/// The most bytes hyper reads ahead of what the tunnel takes, and the longest head it accepts.
const BUFFER: usize = 64 * 1024;

/// A connection to the service. It does nothing unless it is polled.
pub(super) struct Connection {
    sender: http1::SendRequest<RequestBody>,
    io: http1::Connection<TokioIo<ServiceStream>, RequestBody>,
    traffic: Arc<Traffic>,
    /// It has ended.
    over: bool,
}

impl Connection {
    async fn new(stream: ServiceStream) -> hyper::Result<Box<Self>> {
        let traffic = stream.traffic();
        let (sender, io) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await?;
        Ok(Box::new(Self {
            sender,
            io,
            traffic,
            over: false,
        }))
    }

    /// Lets hyper read and write. What fails is told to whoever waits for the answer.
    fn poll(&mut self, cx: &mut Context<'_>) {
        if !self.over && Pin::new(&mut self.io).poll(cx).is_ready() {
            self.over = true;
        }
    }

    /// Waits for the service to close the connection, while nothing is asked of it.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(cx);
        if self.over {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Whether the next request can be sent on it. Not while a request or an answer is
    /// incomplete, nor when either side has said that it closes.
    fn is_reusable(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.over && !self.sender.is_ready() {
            self.poll(cx);
        }
        !self.over && self.sender.is_ready()
    }
}

/// How one try to have a request answered ended.
enum Attempt {
    /// The answer is complete.
    Answered { reusable: bool },
    /// The exchange has ended otherwise; the service sees that by the end of its connection.
    Ended,
    /// The connection broke before a byte of an answer. The request, if it can be sent again.
    Broken(Option<Again>),
}

/// What is to be sent again.
enum Again {
    /// The request, of which nothing was written.
    Same(Box<Request<RequestBody>>),
    /// One just like it.
    Rebuilt,
}

/// Forwards one exchange, if possible over `connection`, and gives the connection back if it can
/// be used again.
pub(super) async fn forward(
    worker: &Worker,
    connection: Option<Box<Connection>>,
    task: Task,
) -> Option<Box<Connection>> {
    let Task { exchange, head } = task;
    let body = poll_fn(|cx| {
        if exchange.poll_reset(cx).is_ready() {
            // Cancelled while it waited for its turn.
            return Poll::Ready(None);
        }
        let expects = request::expects_continue(&head);
        Poll::Ready(Some(RequestBody::new(
            &exchange,
            &worker.deadline,
            expects,
            cx,
        )))
    });
    let Some(body) = body.await else {
        return connection;
    };
    let mut request = build(worker, &exchange, &head, body)?;
    let mut connection = match connection {
        Some(connection) => connection,
        None => open(worker, &exchange).await?,
    };
    let mut retried = false;
    loop {
        worker.deadline.hold(false);
        worker.start_deadline();
        match attempt(worker, &mut connection, &exchange, &head, request).await {
            Attempt::Answered { reusable } => return reusable.then_some(connection),
            Attempt::Ended => return None,
            Attempt::Broken(Some(again)) if !retried => {
                retried = true;
                request = match again {
                    Again::Same(request) => *request,
                    Again::Rebuilt => build(worker, &exchange, &head, RequestBody::none())?,
                };
                drop(connection);
                connection = open(worker, &exchange).await?;
            }
            Attempt::Broken(_) => {
                exchange.abort(Reason::UpstreamError);
                return None;
            }
        }
    }
}

fn build(
    worker: &Worker,
    exchange: &Exchange,
    head: &RequestHead,
    body: RequestBody,
) -> Option<Request<RequestBody>> {
    match request::build(worker.service(), exchange, head, body) {
        Ok(request) => Some(request),
        Err(error) => {
            debug!(?exchange, %error, "the request can't be forwarded");
            exchange.abort(Reason::UpstreamError);
            None
        }
    }
}

/// Opens a connection, unless the exchange is cancelled before.
async fn open(worker: &Worker, exchange: &Exchange) -> Option<Box<Connection>> {
    let connect = pin!(async {
        let stream = worker.service().connect().await.map_err(|error| {
            debug!(%error, "can't connect to the local service");
            Reason::UpstreamRefused
        })?;
        Connection::new(stream)
            .await
            .map_err(|_| Reason::UpstreamError)
    });
    let cancelled = poll_fn(|cx| exchange.poll_reset(cx));
    match select(connect, cancelled).await {
        Either::Left((Ok(connection), _)) => Some(connection),
        Either::Left((Err(reason), _)) => {
            exchange.abort(reason);
            None
        }
        Either::Right(_) => None,
    }
}

async fn attempt(
    worker: &Worker,
    connection: &mut Connection,
    exchange: &Exchange,
    head: &RequestHead,
    request: Request<RequestBody>,
) -> Attempt {
    let traffic = connection.traffic.now();
    let bodiless = request.body().is_end_stream();
    let response = connection.sender.try_send_request(request);
    // Answer and body come out of the connection, which this task polls just before it looks at
    // them: there is nobody else who could have to wake it. Without that, every piece would wake
    // the running task once more. (Nor may tokio's budget stop a look that nobody repeats.)
    let mut response = pin!(tokio::task::unconstrained(response));
    let mut body = None;
    let mut last = (traffic.1, false);
    poll_fn(|cx| {
        let mut unwoken = Context::from_waker(Waker::noop());
        loop {
            connection.poll(cx);
            let incoming = match &mut body {
                Some(incoming) => incoming,
                None => match response.as_mut().poll(&mut unwoken) {
                    Poll::Ready(Ok(answer)) => {
                        worker.deadline.clear();
                        match take_head(exchange, answer) {
                            Some(incoming) => body.insert(incoming),
                            None => return Poll::Ready(Attempt::Ended),
                        }
                    }
                    Poll::Ready(Err(error)) => {
                        if exchange.poll_reset(cx).is_ready() {
                            return Poll::Ready(Attempt::Ended);
                        }
                        let traffic = (traffic, connection.traffic.now());
                        return Poll::Ready(Attempt::Broken(again(error, head, bodiless, traffic)));
                    }
                    Poll::Pending => {
                        // Its time runs from the last piece of the request that the service got.
                        let now = (connection.traffic.now().1, worker.deadline.is_held());
                        if now != last {
                            last = now;
                            worker.start_deadline();
                        } else if worker.deadline.is_over() {
                            exchange.abort(Reason::UpstreamTimeout);
                            return Poll::Ready(Attempt::Ended);
                        }
                        return exchange.poll_reset(cx).map(|_| Attempt::Ended);
                    }
                },
            };
            let mut moved = false;
            loop {
                // The service is asked for no more than the visitor takes.
                match exchange.poll_capacity(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Attempt::Ended),
                    Poll::Pending => return Poll::Pending,
                }
                match Pin::new(&mut *incoming).poll_frame(&mut unwoken) {
                    Poll::Ready(frame) => {
                        match pass_on(exchange, frame, incoming.is_end_stream()) {
                            Passed::More => moved = true,
                            Passed::End => {
                                let reusable = connection.is_reusable(cx);
                                return Poll::Ready(Attempt::Answered { reusable });
                            }
                            Passed::Broken => return Poll::Ready(Attempt::Ended),
                        }
                    }
                    // There is room again for what hyper reads ahead.
                    Poll::Pending if moved => break,
                    Poll::Pending => return exchange.poll_reset(cx).map(|_| Attempt::Ended),
                }
            }
        }
    })
    .await
}

/// Passes the answer's head on; nothing is left to be done if it can't be.
fn take_head(exchange: &Exchange, answer: Response<Incoming>) -> Option<Incoming> {
    let (head, body) = answer.into_parts();
    let lines = forward_response(&head.headers);
    match lines {
        Ok(lines) if head.status != StatusCode::SWITCHING_PROTOCOLS => {
            exchange.answer(ResponseHead {
                status: head.status.as_u16(),
                lines,
            });
            Some(body)
        }
        // Nobody has asked for another protocol.
        _ => {
            exchange.abort(Reason::UpstreamError);
            None
        }
    }
}

enum Passed {
    More,
    End,
    Broken,
}

/// Passes on a piece of the answer's body, and its end.
fn pass_on(
    exchange: &Exchange,
    frame: Option<hyper::Result<Frame<Bytes>>>,
    is_last: bool,
) -> Passed {
    let frame = match frame {
        Some(Ok(frame)) => frame,
        Some(Err(error)) => {
            debug!(?exchange, %error, "the local service broke its answer off");
            exchange.fail(Reason::UpstreamError);
            return Passed::Broken;
        }
        None => {
            exchange.finish(None);
            return Passed::End;
        }
    };
    match frame.into_data() {
        Ok(data) => {
            if exchange.send(data).is_err() {
                return Passed::Broken;
            }
            if is_last {
                exchange.finish(None);
                return Passed::End;
            }
            Passed::More
        }
        Err(frame) => {
            // Trailers that are too long are left out (RFC 9110, section 6.5.1).
            let trailers = frame.into_trailers().ok();
            exchange.finish(trailers.and_then(|trailers| forward_trailers(&trailers).ok()));
            Passed::End
        }
    }
}

/// What may be sent again after the connection broke. `traffic` is what it had carried before
/// and after.
fn again(
    mut error: TrySendError<Request<RequestBody>>,
    head: &RequestHead,
    bodiless: bool,
    (before, after): ((u64, u64), (u64, u64)),
) -> Option<Again> {
    if let Some(request) = error.take_message() {
        return Some(Again::Same(Box::new(request)));
    }
    debug!(error = %error.error(), "the local service broke the connection");
    let answered = before.0 != after.0;
    let written = before.1 != after.1;
    (bodiless && !answered && (!written || is_idempotent(&head.method))).then_some(Again::Rebuilt)
}

/// RFC 9110, section 9.2.2.
fn is_idempotent(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
    )
}
