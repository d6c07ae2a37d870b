//! Requests off the tunnel, written for the service.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::sync::LazyLock;

use super::http2::request as as_http2;
use super::request::Upload;
use super::service::Service;
use crate::config::{AgentConfig, Sources};
use crate::head::RequestHead;
use crate::http2::fields_of;
use crate::mux::Read;

static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let settings = [
        ("SILO_GRPC_SERVER_ADDRESS", "127.0.0.1:1"),
        ("SILO_GRPC_AGENT_ID", "a"),
        ("SILO_LOCAL_SERVICE_URL", "http://127.0.0.1:2"),
    ];
    let config = AgentConfig::load(&Sources::none().environment(settings)).unwrap();
    Service::new(&config.local).unwrap()
});

/// The bytes of a request for a service that speaks HTTP/1, none if it is refused. A service that
/// speaks HTTP/2 would get the same one.
pub fn written(head: &RequestHead, body: Vec<Read>) -> Option<Vec<u8>> {
    let mut reads = body.into_iter();
    let mut upload = Upload::begin(&SERVICE, head, reads.next()?).ok()?;
    for read in reads {
        upload.take(read).ok()?;
    }
    let (request, _) = as_http2(&SERVICE, head).unwrap();
    assert_eq!(request.method().as_str().as_bytes(), head.method);
    if head.target.starts_with(b"/") {
        assert_eq!(
            request.uri().path_and_query().unwrap().as_str(),
            head.target
        );
    }
    for (name, value) in fields_of(request.headers()) {
        assert_ne!(name, b"host");
        let given =
            |(given, bytes): (&[u8], &[u8])| given.eq_ignore_ascii_case(name) && bytes == value;
        assert!(head.lines.iter().any(given), "{}", name.escape_ascii());
    }

    let mut out = upload.into_waiting();
    let mut bytes = Vec::new();
    while !out.is_empty() {
        let count = out.with_slices(|slices| {
            slices
                .iter()
                .for_each(|slice| bytes.extend_from_slice(slice));
            slices.iter().map(|slice| slice.len()).sum()
        });
        out.advance(count);
    }
    Some(bytes)
}
