//! What becomes of a request, for its line of the access log.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::metrics::Failure;
use crate::server::access::Entry;
use crate::server::tenancy::Tenancy;
use crate::server::worker::Worker;

use super::place::Place;

/// Kept with a request while there is an access log; its line is written when it is dropped, so
/// however the request ends.
pub(super) struct Record {
    worker: Arc<Worker>,
    tenancy: Arc<Tenancy>,
    visitor: IpAddr,
    time: SystemTime,
    since: Instant,
    request: Option<Request>,
    /// The name that the request was given.
    pub(super) made_id: Option<Box<str>>,
    /// The status of the answer, once that has begun.
    pub(super) status: Option<u16>,
    /// Bytes of the request's body that went on.
    pub(super) received: u64,
    /// Bytes of the answer's body that the visitor's connection took.
    pub(super) sent: u64,
    /// The connection has taken all of the answer.
    pub(super) complete: bool,
    /// What went wrong.
    pub(super) failure: Option<Failure>,
}

/// What is known of a request whose head could be read.
struct Request {
    method: Box<[u8]>,
    path: Option<Box<[u8]>>,
    protocol: &'static str,
    forwarded_for: Option<Box<[u8]>>,
    id: Option<Box<[u8]>>,
}

impl Record {
    /// Begins one for the request whose head has come, if there is an access log.
    pub(super) fn begin(place: &Place, visitor: IpAddr) -> Option<Box<Self>> {
        place.worker.shared().access.as_ref()?;
        Some(Box::new(Self {
            worker: place.worker.clone(),
            tenancy: place.tenancy.clone(),
            visitor,
            time: SystemTime::now(),
            since: Instant::now(),
            request: None,
            made_id: None,
            status: None,
            received: 0,
            sent: 0,
            complete: false,
            failure: None,
        }))
    }

    /// Notes what was asked. A proxy that `is_trusted` is believed where the request came from.
    pub(super) fn asked<'a>(
        &mut self,
        protocol: &'static str,
        method: &[u8],
        target: &[u8],
        fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
        is_trusted: bool,
    ) {
        let last = |name: &[u8]| {
            let fields = fields.clone();
            let named = fields.filter(|(n, _)| n.eq_ignore_ascii_case(name));
            named.last().map(|(_, value)| Box::from(value))
        };
        self.request = Some(Request {
            method: method.into(),
            path: path_of(target).map(Box::from),
            protocol,
            forwarded_for: is_trusted.then(|| last(b"x-forwarded-for")).flatten(),
            id: last(b"x-request-id"),
        });
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(log) = &self.worker.shared().access else {
            return;
        };
        let request = self.request.as_ref();
        let made_id = self.made_id.as_deref().map(str::as_bytes);
        log.write(&Entry {
            time: self.time,
            visitor: self.visitor,
            forwarded_for: request.and_then(|request| request.forwarded_for.as_deref()),
            agent_id: &self.tenancy.agent_id,
            port: self.tenancy.port,
            method: request.map(|request| &*request.method),
            path: request.and_then(|request| request.path.as_deref()),
            protocol: request.map(|request| request.protocol),
            status: self.status,
            bytes_in: self.received,
            bytes_out: self.sent,
            duration: self.since.elapsed(),
            complete: self.complete,
            request_id: made_id.or(request.and_then(|request| request.id.as_deref())),
            error: self.failure.map(Failure::as_str),
        });
    }
}

/// The path of a target in origin, absolute or asterisk form (RFC 9112, section 3.2), without
/// the query, and without an authority, which may hold a password.
fn path_of(target: &[u8]) -> Option<&[u8]> {
    let path = match target {
        b"*" => target,
        [b'/', ..] => target,
        _ => {
            let authority = target.windows(3).position(|bytes| bytes == b"://")? + 3;
            let rest = &target[authority..];
            let end = rest.iter().position(|byte| b"/?".contains(byte));
            &rest[end.unwrap_or(rest.len())..]
        }
    };
    path.split(|byte| *byte == b'?').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_path_is_shown() {
        for (target, path) in [
            ("/", Some("/")),
            ("/a/b?token=secret", Some("/a/b")),
            ("/a?b?c", Some("/a")),
            ("/://x?y", Some("/://x")),
            ("*", Some("*")),
            ("http://user:secret@a/b?c", Some("/b")),
            ("http://a", Some("")),
            ("http://a?secret", Some("")),
            ("user:secret@host:443", None),
            ("secret", None),
        ] {
            let shown = path_of(target.as_bytes());
            assert_eq!(shown, path.map(str::as_bytes), "{target}");
        }
    }
}
