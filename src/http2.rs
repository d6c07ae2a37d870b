//! HTTP/2's heads as values (RFC 9113, section 8): h2 gives and takes maps, the tunnel has lines.
//! No stream, no socket.

use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::head::Lines;
use crate::headers::sendable_trailers;

/// The lines of a map: in order for each name, as far as h2 keeps that.
pub fn fields_of(map: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    map.iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
}

/// Appends a line to a map. Says whether it is one, and there was room for it.
pub fn append(map: &mut HeaderMap, name: &[u8], value: &[u8]) -> bool {
    match (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
        (Ok(name), Ok(value)) => map.try_append(name, value).is_ok(),
        _ => false,
    }
}

/// The trailer lines off the tunnel that may be sent.
pub fn trailers_of(lines: Option<&Lines>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines.into_iter().flat_map(sendable_trailers) {
        append(&mut map, name, value);
    }
    map
}

/// The crumbs in which a client may send a cookie, put together, as only HTTP/2 knows of them
/// (RFC 9113, section 8.2.3); none if there is nothing to put together.
pub fn joined_cookie(map: &HeaderMap) -> Option<Vec<u8>> {
    let crumbs: Vec<_> = map
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    (crumbs.len() > 1).then(|| crumbs.join(&b"; "[..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::LinesBuilder;

    #[test]
    fn trailers_are_those_that_may_be_sent() {
        let mut lines = LinesBuilder::default();
        for (name, value) in [
            ("Grpc-Status", "0"),
            ("x-bin", "AAE"),
            ("x-bin", "AgM"),
            ("content-length", "7"),
            ("te", "trailers"),
            ("bad name", "x"),
        ] {
            lines.push(name.as_bytes(), value.as_bytes()).unwrap();
        }
        let map = trailers_of(Some(&lines.finish()));
        let all: Vec<_> = fields_of(&map).collect();
        assert_eq!(
            all,
            [
                (&b"grpc-status"[..], &b"0"[..]),
                (b"x-bin", b"AAE"),
                (b"x-bin", b"AgM")
            ]
        );
        assert!(trailers_of(None).is_empty());
    }

    #[test]
    fn crumbs_are_put_together() {
        let mut map = HeaderMap::new();
        assert_eq!(joined_cookie(&map), None);
        append(&mut map, b"cookie", b"a=1");
        assert_eq!(joined_cookie(&map), None);
        append(&mut map, b"cookie", b"b=2");
        assert_eq!(joined_cookie(&map).unwrap(), b"a=1; b=2");
    }
}
