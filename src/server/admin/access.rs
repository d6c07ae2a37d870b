//! Who may read the admin port.
//!
//! Without a key, whoever can connect may read, which is this host alone: settings without a key
//! bind loopback. A browser on this host can connect too, and runs other people's pages. Such a
//! page can read an answer only if the browser takes the admin port for the page's own server,
//! because the page's host name was made to lead to 127.0.0.1 (DNS rebinding), or because an answer
//! permits it, which none ever does (CORS). So without a key a request must name a host that nobody
//! else can own, and must not come from a page of another host. With a key the key decides: no
//! page has it, and operators may use any name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header::{HOST, HeaderValue, ORIGIN, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode, Uri, Version};

use super::{Context, problem};
use crate::auth::ApiKey;

/// Turns away requests without an unambiguous host (RFC 9112, section 3.2), and without a key
/// those that a page of another host could have sent. The key that holds now holds for the whole
/// request: [`check_key`] finds it there.
pub(super) async fn check_host(
    State(context): State<Arc<Context>>,
    mut request: Request,
    next: Next,
) -> Response {
    let key = context.state.api_key.load_full();
    let bound = key.is_open().then_some(context.bound);
    request.extensions_mut().insert(key);
    let checked = check(request.version(), request.uri(), request.headers(), bound);
    match checked {
        Ok(()) => next.run(request).await,
        Err((status, detail)) => problem(status, detail),
    }
}

/// Turns away requests without the key, if there is one.
pub(super) async fn check_key(
    Extension(key): Extension<Arc<ApiKey>>,
    request: Request,
    next: Next,
) -> Response {
    if shows_key(&key, request.headers()) {
        return next.run(request).await;
    }
    let detail = "this server asks for its API key, as X-API-Key or Authorization: Bearer";
    let mut answer = problem(StatusCode::UNAUTHORIZED, detail);
    answer.headers_mut().insert(
        WWW_AUTHENTICATE,
        HeaderValue::from_static("Bearer realm=\"silo-proxy\""),
    );
    answer
}

fn shows_key(key: &ApiKey, headers: &HeaderMap) -> bool {
    let value = |name| headers.get(name).map(HeaderValue::as_bytes);
    key.admits(value("x-api-key"), value("authorization"))
}

/// `bound` is the address of a port without a key.
fn check(
    version: Version,
    target: &Uri,
    headers: &HeaderMap,
    bound: Option<IpAddr>,
) -> Result<(), (StatusCode, &'static str)> {
    let mut hosts = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => Some(host),
        // No browser is that old.
        (None, _) if version == Version::HTTP_10 => None,
        _ => return Err((StatusCode::BAD_REQUEST, "one Host line is needed")),
    };
    let Some(bound) = bound else { return Ok(()) };
    let target = target
        .authority()
        .map(|authority| authority.as_str().as_bytes());
    if !host.into_iter().chain(target).all(|it| is_ours(it, bound)) {
        return Err((
            StatusCode::MISDIRECTED_REQUEST,
            "without http.admin_api_key this port is asked as localhost, 127.0.0.1 or [::1]: use \
             one of these, or set a key to use another name",
        ));
    }
    let is_foreign = |origin: &HeaderValue| {
        let host = origin.as_bytes().strip_prefix(b"http://");
        !host.is_some_and(|host| is_ours(host, bound))
    };
    if headers.get_all(ORIGIN).iter().any(is_foreign) {
        return Err((
            StatusCode::FORBIDDEN,
            "without http.admin_api_key this port doesn't answer web pages of other hosts",
        ));
    }
    Ok(())
}

/// Whether `host`, with any port or none, is one that only this machine can be.
fn is_ours(host: &[u8], bound: IpAddr) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, "")) => (name, None),
            Some((name, port)) => (name, Some(port.strip_prefix(':').unwrap_or("none"))),
            None => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if port.is_some_and(|port| port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit())) {
        return false;
    }
    let is_bracketed = host.starts_with('[');
    match name.parse::<IpAddr>() {
        Ok(address) => {
            address.is_ipv6() == is_bracketed
                && [
                    Ipv4Addr::LOCALHOST.into(),
                    Ipv6Addr::LOCALHOST.into(),
                    bound,
                ]
                .contains(&address)
        }
        Err(_) => !is_bracketed && name.eq_ignore_ascii_case("localhost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Option<IpAddr> = Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)));

    fn status(
        version: Version,
        target: &str,
        lines: &[(&'static str, &str)],
        bound: Option<IpAddr>,
    ) -> u16 {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            headers.append(*name, value);
        }
        match check(version, &target.parse().unwrap(), &headers, bound) {
            Ok(()) => 200,
            Err((status, _)) => status.as_u16(),
        }
    }

    fn host(value: &str) -> u16 {
        status(Version::HTTP_11, "/agents", &[("host", value)], BOUND)
    }

    #[test]
    fn without_a_key_the_host_is_this_machine() {
        for ours in [
            "localhost",
            "LocalHost:8080",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "[::1]:65535",
            "[0:0::1]:8080",
            "127.0.0.9:8080",
        ] {
            assert_eq!(host(ours), 200, "{ours}");
        }
        for other in [
            "",
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "localhost.",
            "127.0.0.1.evil.example",
            "127.0.0.2",
            "127.1",
            "0.0.0.0",
            "[::]",
            "[::1",
            "::1",
            "[127.0.0.1]",
            "[localhost]",
            "[::1]8080",
            "localhost:",
            "localhost:80:80",
            "localhost:x",
            "user@localhost",
            "localhost, evil.example",
            "\u{e9}",
        ] {
            assert_eq!(host(other), 421, "{other}");
        }
    }

    #[test]
    fn the_targets_host_counts_as_well() {
        let target = |target| status(Version::HTTP_11, target, &[("host", "localhost")], BOUND);
        assert_eq!(target("http://127.0.0.1:8080/agents"), 200);
        assert_eq!(target("http://evil.example/agents"), 421);
    }

    #[test]
    fn a_host_is_named_once_or_in_old_requests_not_at_all() {
        let twice = [("host", "localhost"), ("host", "localhost")];
        for bound in [BOUND, None] {
            assert_eq!(status(Version::HTTP_11, "/", &[], bound), 400);
            assert_eq!(status(Version::HTTP_11, "/", &twice, bound), 400);
            assert_eq!(status(Version::HTTP_10, "/", &twice, bound), 400);
            assert_eq!(status(Version::HTTP_10, "/", &[], bound), 200);
        }
    }

    #[test]
    fn without_a_key_pages_of_other_hosts_are_turned_away() {
        let from = |origin, bound| {
            let lines = [("host", "localhost:8080"), ("origin", origin)];
            status(Version::HTTP_11, "/agents", &lines, bound)
        };
        assert_eq!(from("http://localhost:8080", BOUND), 200);
        assert_eq!(from("http://127.0.0.1:3000", BOUND), 200);
        for origin in [
            "null",
            "http://evil.example",
            "https://evil.example:8080",
            "http://localhost.evil.example",
            "http://localhost http://evil.example",
            "",
        ] {
            assert_eq!(from(origin, BOUND), 403, "{origin}");
            assert_eq!(from(origin, None), 200, "{origin}");
        }
    }

    #[test]
    fn with_a_key_any_name_will_do() {
        let lines = [("host", "silo.example")];
        assert_eq!(status(Version::HTTP_11, "/agents", &lines, None), 200);
    }
}
