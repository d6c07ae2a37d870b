//! An exchange's request as hyper sends it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::InvalidUri;
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use http_body::{Body, Frame, SizeHint};
use thiserror::Error;

use crate::head::{Lines, RequestHead, ResponseHead};
use crate::headers::{Direction, InvalidLines, forward_response, to_header_map, to_trailer_map};
use crate::link::Exchange;
use crate::mux::{Read, Reason};

use super::Deadline;
use super::service::Service;

/// A head that can't be sent. The server has checked it, so this is a server that isn't ours.
#[derive(Debug, Error)]
pub(super) enum InvalidRequest {
    #[error("the method is invalid")]
    Method(#[from] http::method::InvalidMethod),
    #[error("the target is invalid: {0}")]
    Target(#[from] InvalidUri),
    #[error("{0}")]
    Lines(#[from] InvalidLines),
    #[error("a length is declared for a body that isn't there")]
    Length,
}

/// Makes the request. What has already come of its body is taken with it.
pub(super) fn build(
    service: &Service,
    exchange: &Exchange,
    head: &RequestHead,
    body: RequestBody,
) -> Result<Request<RequestBody>, InvalidRequest> {
    let mut headers = to_header_map(&head.lines, Direction::Request)?;
    match &service.host {
        Some(host) => {
            headers.insert(HOST, host.clone());
        }
        // HTTP/1.0 knows requests without it, HTTP/1.1 doesn't (RFC 9112, section 3.2).
        None if !headers.contains_key(HOST) => {
            headers.insert(HOST, service.own_host.clone());
        }
        None => {}
    }
    frame_body(&mut headers, &body)?;
    let mut request = Request::new(body);
    *request.method_mut() = Method::from_bytes(&head.method)?;
    *request.uri_mut() = Uri::from_maybe_shared(head.target.clone())?;
    *request.headers_mut() = headers;

    let interim = exchange.clone();
    hyper::ext::on_informational(&mut request, move |answer| {
        if let Ok(lines) = forward_response(answer.headers()) {
            interim.interim(ResponseHead {
                status: answer.status().as_u16(),
                lines,
            });
        }
    });
    Ok(request)
}

/// Makes the lines say what the body is. hyper alone would send none with a GET.
fn frame_body(headers: &mut HeaderMap, body: &RequestBody) -> Result<(), InvalidRequest> {
    let length = headers.get(CONTENT_LENGTH);
    if !body.is_end_stream() {
        if length.is_none() {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        return Ok(());
    }
    // The service would take the next request for the body.
    let nothing = |length: &HeaderValue| length.as_bytes().iter().all(|digit| *digit == b'0');
    if length.is_some_and(|length| !nothing(length)) {
        return Err(InvalidRequest::Length);
    }
    Ok(())
}

/// Whether the visitor sends his body only when the service says so, or after a while of his own.
pub(super) fn expects_continue(head: &RequestHead) -> bool {
    head.lines.iter().any(|(name, value)| {
        name.eq_ignore_ascii_case(b"expect") && value.eq_ignore_ascii_case(b"100-continue")
    })
}

/// Streams the visitor's body to the service; reading it returns credit to the visitor.
pub(super) struct RequestBody {
    /// `None` for a request without a body, or once all of it has been read.
    exchange: Option<Exchange>,
    /// What was read to find out whether there is a body.
    first: Option<First>,
    /// The service's time doesn't run while the visitor's body is awaited,
    deadline: Option<Arc<Deadline>>,
    /// unless he waits for the service's word to send it.
    awaits_go_ahead: bool,
}

enum First {
    Data(Bytes),
    Trailers(Lines),
}

/// The visitor's body broke off: the service must not take what it got for a whole one.
#[derive(Debug, Error)]
#[error("the request's body broke off: {0}")]
pub(super) struct Broken(Reason);

impl RequestBody {
    /// The body of a new exchange. While it is awaited from the visitor, `deadline` is held,
    /// unless he awaits the service's word to send it.
    pub(super) fn new(
        exchange: &Exchange,
        deadline: &Arc<Deadline>,
        awaits_go_ahead: bool,
        cx: &mut Context<'_>,
    ) -> Self {
        let (exchange, first) = match exchange.poll_read(cx) {
            Poll::Ready(Read::End(None)) => (None, None),
            Poll::Ready(Read::End(Some(lines))) => (None, Some(First::Trailers(lines))),
            Poll::Ready(Read::Data(data)) => (Some(exchange.clone()), Some(First::Data(data))),
            // A reset is found again by the next read.
            Poll::Ready(Read::Reset(_) | Read::Pending) | Poll::Pending => {
                (Some(exchange.clone()), None)
            }
        };
        Self {
            deadline: exchange.is_some().then(|| deadline.clone()),
            awaits_go_ahead: awaits_go_ahead && first.is_none(),
            exchange,
            first,
        }
    }

    /// No body.
    pub(super) fn none() -> Self {
        Self {
            exchange: None,
            first: None,
            deadline: None,
            awaits_go_ahead: false,
        }
    }

    fn hold_deadline(&self, held: bool) {
        if let Some(deadline) = &self.deadline {
            deadline.hold(held);
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match self.first.take() {
            Some(First::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(First::Trailers(lines)) => return Poll::Ready(trailers(&lines)),
            None => {}
        }
        let Some(exchange) = &self.exchange else {
            return Poll::Ready(None);
        };
        let read = exchange.poll_read(cx);
        self.awaits_go_ahead &= read.is_pending();
        self.hold_deadline(read.is_pending() && !self.awaits_go_ahead);
        match read {
            Poll::Ready(Read::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Poll::Ready(Read::End(lines)) => {
                self.exchange = None;
                Poll::Ready(lines.and_then(|lines| trailers(&lines)))
            }
            Poll::Ready(Read::Reset(reason)) => Poll::Ready(Some(Err(Broken(reason)))),
            Poll::Ready(Read::Pending) | Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.exchange.is_none() && self.first.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() {
            SizeHint::with_exact(0)
        } else {
            SizeHint::default()
        }
    }
}

/// Trailers that can't be sent are left out, which is allowed (RFC 9110, section 6.5.1).
fn trailers(lines: &Lines) -> Option<Result<Frame<Bytes>, Broken>> {
    let trailers = to_trailer_map(lines).ok()?;
    (!trailers.is_empty()).then(|| Ok(Frame::trailers(trailers)))
}
