use http::header::{COOKIE, HOST};
use http::{HeaderMap, request::Parts};

use crate::config::HttpConfig;
use crate::headers::{Framing, Refusal, RequestFacts, Version, check_request};
use crate::server::respond::Fault;

/// A request's head, as the rules that are HTTP/1's want to see it.
pub(super) struct Head<'a> {
    pub(super) method: &'a [u8],
    pub(super) target: &'a [u8],
    authority: Option<&'a [u8]>,
    headers: &'a HeaderMap,
    /// The lines of a request in HTTP/1.1: :authority stands for the Host line.
    lines: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Head<'a> {
    pub(super) fn new(parts: &'a Parts, cookie: Option<&'a [u8]>) -> Self {
        let uri = &parts.uri;
        let authority = uri.authority().map(|name| name.as_str().as_bytes());
        let host = authority.map(|name| (&b"host"[..], name));
        let cookie = cookie.map(|cookie| (&b"cookie"[..], cookie));
        let others = parts.headers.iter().filter(|(name, _)| {
            !(*name == HOST && host.is_some() || *name == COOKIE && cookie.is_some())
        });
        let others = others.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
        Self {
            method: parts.method.as_str().as_bytes(),
            target: uri
                .path_and_query()
                .map_or(b"", |path| path.as_str().as_bytes()),
            authority,
            headers: &parts.headers,
            lines: host.into_iter().chain(others).chain(cookie).collect(),
        }
    }

    pub(super) fn fields(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone {
        self.lines.iter().copied()
    }

    /// The limits and rules of a request in HTTP/1.1, and those that only HTTP/2 knows; h2 has
    /// seen to the rest: names in lower case, no line that belongs to a connection, one of each
    /// pseudo-header, before the others.
    pub(super) fn check(&self, settings: &HttpConfig) -> Result<RequestFacts, Fault> {
        // As in HTTP/1: with the version, and with the ends of lines.
        let line = self.method.len() + self.target.len() + " HTTP/1.1 \r\n".len();
        let lines = self.lines.len();
        let sizes = self.fields().map(|(name, value)| name.len() + value.len());
        if line > settings.max_request_line {
            return Err(Fault::RequestLineTooLong);
        }
        if lines > settings.max_header_lines
            || line + sizes.sum::<usize>() + lines * ": \r\n".len() + 2 > settings.max_head
        {
            return Err(Fault::HeadTooLarge);
        }
        // RFC 9113, section 8.2.1.
        let is_padded = |value: &[u8]| {
            matches!(value, [b' ' | b'\t', ..]) || matches!(value, [.., b' ' | b'\t'])
        };
        if self
            .headers
            .values()
            .any(|value| is_padded(value.as_bytes()))
        {
            return Err(Fault::Refused(Refusal::Syntax));
        }
        // RFC 9113, section 8.3.1: the other forms are HTTP/1's.
        if !matches!(self.target, [b'/', ..] | b"*" | b"") {
            return Err(Fault::Refused(Refusal::Target));
        }
        // RFC 9113, section 8.3.1.
        let mut hosts = self.headers.get_all(HOST).iter();
        if let (Some(authority), Some(host)) = (self.authority, hosts.next()) {
            if hosts.next().is_some() {
                return Err(Fault::Refused(Refusal::RepeatedHost));
            }
            if !host.as_bytes().eq_ignore_ascii_case(authority) {
                return Err(Fault::Refused(Refusal::HostMismatch));
            }
        }
        let facts = check_request(self.method, self.target, Version::Http11, self.fields())
            .map_err(Fault::Refused)?;
        if let (Framing::Length(length), Some(limit)) = (facts.framing, settings.max_body)
            && length > limit
        {
            return Err(Fault::BodyTooLarge);
        }
        Ok(facts)
    }
}
