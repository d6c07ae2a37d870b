//! An exchange's request, on its way to the service.

use std::task::{Context, Poll};

use thiserror::Error;

use crate::head::RequestHead;
use crate::headers::{Direction, InvalidLines, LineFacts, is_target, is_token, offered, sendable};
use crate::http1::{
    Outgoing, write_chunk_head, write_last_chunk, write_length, write_line, write_request_line,
};
use crate::link::Exchange;
use crate::mux::{Read, Reason};

use super::service::Service;

/// A head that can't be sent. The server has checked it, so this is a server that isn't ours.
#[derive(Debug, Error)]
pub(super) enum InvalidRequest {
    #[error("the request line is invalid")]
    Line,
    #[error("{0}")]
    Lines(#[from] InvalidLines),
    #[error("a length is declared for a body that isn't there")]
    Length,
    #[error("it offers another protocol and brings bytes of it before the service's word")]
    Early,
}

/// Why a request can't be sent to its end.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the visitor's body broke off: {0}")]
    Visitor(Reason),
    #[error("the visitor's body hasn't the length that its head declares")]
    Length,
}

/// What is left to be sent of a request: bytes that wait for the service to take them, and the
/// visitor's body, which is asked for only when few are left. Reading it returns credit to the
/// visitor.
#[derive(Debug)]
pub(super) struct Upload {
    out: Outgoing,
    body: Body,
    /// There is, or was, a body; such a request isn't sent twice.
    has_body: bool,
    /// The visitor holds his body back until he is told to go on.
    awaits_go_ahead: bool,
}

/// What is still to come of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Complete,
    Chunked,
    /// So many bytes.
    Length(u64),
}

impl Upload {
    /// The request of a new exchange. What has already come of its body is taken with it.
    pub(super) fn new(
        service: &Service,
        exchange: &Exchange,
        head: &RequestHead,
        cx: &mut Context<'_>,
    ) -> Result<Self, InvalidRequest> {
        match exchange.poll_read(cx) {
            Poll::Ready(read) => Self::begin(service, head, read),
            Poll::Pending => Self::begin(service, head, Read::Pending),
        }
    }

    /// The request of a head, and of the `first` that has come of its body.
    pub(super) fn begin(
        service: &Service,
        head: &RequestHead,
        first: Read,
    ) -> Result<Self, InvalidRequest> {
        let first = match first {
            Read::End(None) => return Self::bodiless(service, head),
            // What the visitor's side still sends belongs to another protocol, once the service
            // has agreed upon one.
            Read::Data(_) if offered(&head.lines).is_some() => {
                return Err(InvalidRequest::Early);
            }
            _ if offered(&head.lines).is_some() => return Self::bodiless(service, head),
            // A reset is found again by the next read.
            Read::Reset(_) | Read::Pending => None,
            read => Some(read),
        };
        let (mut out, facts) = start(service, head)?;
        let body = match facts.length {
            Some(length) => {
                write_length(out.text(), length);
                Body::Length(length)
            }
            None => {
                write_line(out.text(), b"transfer-encoding", b"chunked");
                Body::Chunked
            }
        };
        out.text().extend_from_slice(b"\r\n");
        let mut upload = Self {
            out,
            body,
            has_body: true,
            awaits_go_ahead: facts.expects_continue && first.is_none(),
        };
        if let Some(read) = first {
            upload.take(read).map_err(|_| InvalidRequest::Length)?;
        }
        Ok(upload)
    }

    /// A request without a body.
    pub(super) fn bodiless(service: &Service, head: &RequestHead) -> Result<Self, InvalidRequest> {
        let (mut out, facts) = start(service, head)?;
        match facts.length {
            // The service would take the next request for the body.
            Some(1..) => return Err(InvalidRequest::Length),
            Some(0) => write_length(out.text(), 0),
            // An empty body in chunks may have come here as none: the service is told the same
            // however the visitor's bytes were cut.
            None if matches!(&head.method[..], b"POST" | b"PUT" | b"PATCH") => {
                write_length(out.text(), 0);
            }
            None => {}
        }
        out.text().extend_from_slice(b"\r\n");
        Ok(Self {
            out,
            body: Body::Complete,
            has_body: false,
            awaits_go_ahead: false,
        })
    }

    /// Whether there is, or was, a body.
    pub(super) fn has_body(&self) -> bool {
        self.has_body
    }

    /// Whether all of it has been taken by the service.
    pub(super) fn is_complete(&self) -> bool {
        self.body == Body::Complete && self.out.is_empty()
    }

    /// What waits for the service to take it.
    pub(super) fn waiting(&mut self) -> &mut Outgoing {
        &mut self.out
    }

    /// The same, when nothing else is left of the request.
    pub(super) fn into_waiting(self) -> Outgoing {
        self.out
    }

    /// Whether the service is to say that it wants the body.
    pub(super) fn awaits_go_ahead(&self) -> bool {
        self.awaits_go_ahead
    }

    /// The service wants the body.
    pub(super) fn go_ahead(&mut self) {
        self.awaits_go_ahead = false;
    }

    /// Takes the next piece of the body. Pending too when there is none to come.
    pub(super) fn poll_next(
        &mut self,
        exchange: &Exchange,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        if self.body == Body::Complete {
            return Poll::Pending;
        }
        let read = std::task::ready!(exchange.poll_read(cx));
        self.awaits_go_ahead = false;
        Poll::Ready(self.take(read))
    }

    /// Takes a piece of the body, or its end.
    pub(super) fn take(&mut self, read: Read) -> Result<(), Broken> {
        match (read, self.body) {
            (Read::Data(piece), Body::Length(left)) => {
                let left = left.checked_sub(piece.len() as u64).ok_or(Broken::Length)?;
                self.body = Body::Length(left);
                self.out.push(piece);
            }
            (Read::Data(piece), _) => {
                write_chunk_head(self.out.text(), piece.len());
                self.out.push(piece);
                self.out.text().extend_from_slice(b"\r\n");
            }
            (Read::End(trailers), Body::Chunked) => {
                write_last_chunk(self.out.text(), trailers.as_ref());
                self.body = Body::Complete;
            }
            (Read::End(_), Body::Length(1..)) => return Err(Broken::Length),
            (Read::End(_), _) => self.body = Body::Complete,
            (Read::Reset(reason), _) => return Err(Broken::Visitor(reason)),
            (Read::Pending, _) => {}
        }
        Ok(())
    }
}

/// The request line and the header lines, without those that frame the body.
fn start(service: &Service, head: &RequestHead) -> Result<(Outgoing, LineFacts), InvalidRequest> {
    if !is_token(&head.method) || !is_target(&head.target) {
        return Err(InvalidRequest::Line);
    }
    let mut out = Outgoing::default();
    let text = out.text();
    text.reserve(head.size() + ROOM);
    write_request_line(text, &head.method, &head.target);
    let facts = sendable(&head.lines, Direction::Request, |name, value| {
        match (&service.host, name.eq_ignore_ascii_case(b"host")) {
            (Some(host), true) => write_line(text, name, host.as_bytes()),
            _ => write_line(text, name, value),
        }
    })?;
    if !facts.has_host {
        // HTTP/1.0 knows requests without it, HTTP/1.1 doesn't (RFC 9112, section 3.2).
        let host = service.host.as_ref().unwrap_or(&service.own_host);
        write_line(text, b"host", host.as_bytes());
    }
    Ok((out, facts))
}

/// Room for what is added to a head.
const ROOM: usize = 128;
