//! An exchange's request as a stream: its head, and its body on the way.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_LENGTH;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Uri};

use super::super::request::InvalidRequest;
use super::super::service::Service;
use crate::head::RequestHead;
use crate::headers::{Direction, LineFacts, is_target, is_token, sendable};
use crate::http2::append;
use crate::link::{Exchange, Gather};
use crate::mux::Read;

/// How much of a body is kept to be sent again, should the service not have looked at the request.
/// Most calls of gRPC are smaller.
const KEPT: usize = 16 * 1024;

/// The head of a request, and what its lines say. What has no place in HTTP/2, such as a target
/// that h2 knows no form of, is refused.
pub(in crate::agent::forward) fn request(
    service: &Service,
    head: &RequestHead,
) -> Result<(Request<()>, LineFacts), InvalidRequest> {
    if !is_token(&head.method) || !is_target(&head.target) {
        return Err(InvalidRequest::Line);
    }
    let mut map = HeaderMap::new();
    let mut host = None;
    let mut fits = true;
    let facts = sendable(&head.lines, Direction::Request, |name, value| {
        if name.eq_ignore_ascii_case(b"host") {
            host = Some(value.to_vec()).filter(|value| !value.is_empty());
        } else if name != b"connection" && name != b"upgrade" {
            // HTTP/2 has no need for the line that names TE, and knows no Upgrade (RFC 9113,
            // sections 8.2.2 and 8.6): the service isn't offered what it can't take.
            fits &= append(&mut map, name, value);
        }
    })?;
    if let Some(length) = facts.length {
        map.insert(CONTENT_LENGTH, length.into());
    }
    let host = match (&service.host, &host) {
        (Some(fixed), _) => fixed.as_bytes(),
        (None, Some(host)) => host,
        (None, None) => service.own_host.as_bytes(),
    };
    // A target in absolute form says the same as the Host line.
    let path = match &head.target[..] {
        [b'/', ..] | b"*" => PathAndQuery::from_maybe_shared(head.target.clone()),
        absolute => Uri::try_from(absolute).map(|uri| {
            let path = uri.path_and_query().cloned();
            path.unwrap_or_else(|| PathAndQuery::from_static("/"))
        }),
    };
    let uri = Uri::builder()
        .scheme(if service.is_encrypted() {
            "https"
        } else {
            "http"
        })
        .authority(host)
        .path_and_query(path.map_err(|_| InvalidRequest::Line)?)
        .build();
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(&head.method).map_err(|_| InvalidRequest::Line)?;
    *request.uri_mut() = uri.map_err(|_| InvalidRequest::Line)?;
    *request.headers_mut() = map;
    match fits {
        true => Ok((request, facts)),
        false => Err(InvalidRequest::Line),
    }
}

/// The visitor's body on its way, and as much of it as can be sent again.
#[derive(Debug)]
pub(super) struct Upload {
    source: Gather,
    /// What has been taken so far; none once that is too much, or of no use any more.
    kept: Option<Vec<Read>>,
    kept_bytes: usize,
    /// What is to be sent before anything new is taken.
    again: VecDeque<Read>,
}

impl Upload {
    pub(super) fn new() -> Self {
        Self {
            source: Gather::default(),
            kept: Some(Vec::new()),
            kept_bytes: 0,
            again: VecDeque::new(),
        }
    }

    /// Whether there is no body at all. Asked before anything is taken.
    pub(super) fn is_none(&mut self, exchange: &Exchange, cx: &mut Context<'_>) -> bool {
        match self.poll_next(exchange, cx) {
            Poll::Ready(Read::End(None)) => true,
            Poll::Ready(read) => {
                self.again.push_front(read);
                false
            }
            Poll::Pending => false,
        }
    }

    /// Waits for the next piece, as [`Exchange::poll_read`] does.
    pub(super) fn poll_next(&mut self, exchange: &Exchange, cx: &mut Context<'_>) -> Poll<Read> {
        if let Some(read) = self.again.pop_front() {
            return Poll::Ready(read);
        }
        let read = ready!(self.source.poll_next(exchange, cx));
        if let Read::Data(data) = &read {
            self.kept_bytes += data.len();
        }
        if self.kept_bytes > KEPT {
            self.kept = None;
        }
        if let Some(kept) = &mut self.kept {
            kept.push(read.clone());
        }
        Poll::Ready(read)
    }

    /// Whether it is known that the body ends after what was taken last, and without trailers.
    pub(super) fn is_at_end(&self) -> bool {
        match self.again.front() {
            Some(next) => *next == Read::End(None),
            None => self.source.is_at_end(),
        }
    }

    /// Has it all sent again. Says whether that can be done.
    pub(super) fn rewind(&mut self) -> bool {
        self.again = match &self.kept {
            Some(kept) => kept.iter().cloned().collect(),
            None => return false,
        };
        true
    }

    /// Whether something of a body has come.
    pub(super) fn has_begun(&self) -> bool {
        let is_data = |read: &Read| *read != Read::End(None);
        self.kept
            .as_ref()
            .is_none_or(|kept| kept.iter().any(is_data))
    }

    /// It won't be sent again.
    pub(super) fn forget(&mut self) {
        self.kept = None;
    }
}
