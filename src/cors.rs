//! Cross-origin resource sharing (the Fetch standard, section 3.3): which web pages of other
//! origins may read the answers. Pure: headers in, headers out.

use std::str::FromStr;
use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method};
use thiserror::Error;

/// An origin as browsers send it: scheme, host and, unless it is the scheme's own, port
/// (RFC 6454, section 6.2). Never `null`, which any page can make itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

/// Why a text is no [`Origin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "expected an origin as browsers send it, such as https://app.example.com: in lower case, with the port unless it is the scheme's own, without a path"
)]
pub struct InvalidOrigin;

impl Origin {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Origin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = || {
            let (scheme, rest) = text.split_once("://")?;
            let scheme_fits = scheme.starts_with(|c: char| c.is_ascii_lowercase())
                && scheme.bytes().all(|b| lower(b) || b"+-.".contains(&b));
            let (host, port) = match rest.rsplit_once(':') {
                Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
                _ => (rest, None),
            };
            let host_fits = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
                Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
                None => !host.is_empty() && host.bytes().all(|b| lower(b) || b"-._".contains(&b)),
            };
            let own = match scheme {
                "http" => "80",
                "https" => "443",
                _ => "",
            };
            let port_fits = port.is_none_or(|port| {
                let number = port.bytes().all(|byte| byte.is_ascii_digit());
                number && port != own && !port.starts_with('0') && port.parse::<u16>().is_ok()
            });
            Some(scheme_fits && host_fits && port_fits)
        };
        match valid() {
            Some(true) => Ok(Self(text.to_owned())),
            _ => Err(InvalidOrigin),
        }
    }
}

/// Whose pages may read answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Everybody's.
    Any,
    /// Those of these origins.
    Only(Vec<Origin>),
}

/// What pages of other origins may do, and what browsers are told about it.
///
/// It protects nobody from requests: browsers ask before unusual ones, everything else doesn't,
/// and a request that may not be read is passed on all the same.
#[derive(Debug, Clone)]
pub struct Cors {
    /// Whose pages.
    pub origins: Origins,
    /// The methods that they may use.
    pub methods: Vec<Method>,
    /// The header lines that they may send; `None` for those that they ask for.
    pub headers: Option<HeaderValue>,
    /// Whether cookies and credentials go with their requests. Never with [`Origins::Any`]: every
    /// page could read what its visitor may.
    pub credentials: bool,
    /// How long browsers may remember the answer to a preflight.
    pub max_age: Duration,
}

/// What our own answers say beside their status.
const EXPOSED: HeaderValue = HeaderValue::from_static("x-silo-error, retry-after");

/// What the answer to a preflight depends on.
const PREFLIGHT_VARY: HeaderValue = HeaderValue::from_static(
    "origin, access-control-request-method, access-control-request-headers",
);

impl Cors {
    /// Whether a request is a preflight: the question of a browser, meant for us, whether it may
    /// send another one.
    pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
        *method == Method::OPTIONS
            && headers.contains_key(ORIGIN)
            && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }

    /// The header lines of the answer to a preflight, whose status is 204. For an origin that may
    /// do nothing they allow nothing.
    pub fn answer(&self, request: &HeaderMap) -> HeaderMap {
        let mut lines = HeaderMap::new();
        lines.insert(VARY, PREFLIGHT_VARY);
        let Some(origin) = self.allowed(request.get(ORIGIN)) else {
            return lines;
        };
        lines.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        let methods: Vec<&str> = self.methods.iter().map(Method::as_str).collect();
        if let Ok(methods) = HeaderValue::from_str(&methods.join(", ")) {
            lines.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        let asked = || request.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        if let Some(headers) = self.headers.clone().or_else(asked) {
            lines.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
        lines.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.as_secs().into());
        self.allow_credentials(&mut lines);
        lines
    }

    /// Adds to an answer's header lines who may read it. A service that says so itself has the
    /// last word.
    pub fn extend(&self, origin: Option<&HeaderValue>, lines: &mut HeaderMap) {
        if lines.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            return;
        }
        if self.origins != Origins::Any {
            // Also where there is no origin: a cache must not keep that answer for one.
            add_vary_origin(lines);
        }
        if let Some(allowed) = self.allowed(origin) {
            lines.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
            self.allow_credentials(lines);
        }
    }

    /// The same for an answer of our own, whose lines pages may read.
    pub fn extend_own(&self, origin: Option<&HeaderValue>, lines: &mut HeaderMap) {
        self.extend(origin, lines);
        if lines.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            lines.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
    }

    /// The value of Access-Control-Allow-Origin for a request from `origin`.
    fn allowed(&self, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
        match &self.origins {
            Origins::Any => Some(HeaderValue::from_static("*")),
            Origins::Only(origins) => origin
                .filter(|origin| {
                    origins
                        .iter()
                        .any(|one| origin.as_bytes() == one.0.as_bytes())
                })
                .cloned(),
        }
    }

    fn allow_credentials(&self, lines: &mut HeaderMap) {
        if self.credentials {
            let yes = HeaderValue::from_static("true");
            lines.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        }
    }
}

fn add_vary_origin(lines: &mut HeaderMap) {
    let names_it = |value: &HeaderValue| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii)
            .any(|name| name == b"*" || name.eq_ignore_ascii_case(b"origin"))
    };
    if !lines.get_all(VARY).iter().any(names_it) {
        lines.append(VARY, HeaderValue::from_static("origin"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: &str = "https://app.example.com";

    fn cors(origins: &[&str]) -> Cors {
        Cors {
            origins: match origins {
                ["*"] => Origins::Any,
                some => Origins::Only(some.iter().map(|one| one.parse().unwrap()).collect()),
            },
            methods: vec![Method::GET, Method::PUT],
            headers: None,
            credentials: false,
            max_age: Duration::from_secs(600),
        }
    }

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| {
                let name = http::HeaderName::from_static(name);
                (name, HeaderValue::from_str(value).unwrap())
            })
            .collect()
    }

    fn shown(lines: &HeaderMap) -> Vec<String> {
        let line = |(name, value): (&http::HeaderName, &HeaderValue)| {
            format!("{name}: {}", value.to_str().unwrap())
        };
        let mut all: Vec<String> = lines.iter().map(line).collect();
        all.sort();
        all
    }

    #[test]
    fn origins_are_as_browsers_send_them() {
        for text in [
            "https://app.example.com",
            "http://localhost:3000",
            "http://127.0.0.1:8080",
            "http://[::1]:3000",
            "https://[::1]",
            "capacitor://localhost",
            "chrome-extension://abc",
        ] {
            assert_eq!(text.parse::<Origin>().map(|o| o.0), Ok(text.to_owned()));
        }
        for text in [
            "",
            "*",
            "null",
            "app.example.com",
            "https://app.example.com/",
            "https://App.example.com",
            "https://app.example.com:443",
            "http://a:80",
            "http://a:0",
            "http://a:080",
            "http://a:65536",
            "http://a:",
            "http://a:+81",
            "http://",
            "://a",
            "http://a b",
            "http://u@a",
            "http://*.example.com",
            "http://[::1",
            "http://[x]",
        ] {
            assert_eq!(text.parse::<Origin>(), Err(InvalidOrigin), "{text:?}");
        }
    }

    #[test]
    fn only_a_question_is_a_preflight() {
        let lines = map(&[("origin", APP), ("access-control-request-method", "PUT")]);
        assert!(Cors::is_preflight(&Method::OPTIONS, &lines));
        assert!(!Cors::is_preflight(&Method::PUT, &lines));
        for other in [&[("origin", APP)][..], &[]] {
            assert!(!Cors::is_preflight(&Method::OPTIONS, &map(other)));
        }
    }

    #[test]
    fn a_preflight_is_answered() {
        let request = map(&[
            ("origin", APP),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "authorization,x-mine"),
        ]);
        let mut policy = cors(&["http://other", APP]);
        assert_eq!(
            shown(&policy.answer(&request)),
            [
                "access-control-allow-headers: authorization,x-mine",
                "access-control-allow-methods: GET, PUT",
                "access-control-allow-origin: https://app.example.com",
                "access-control-max-age: 600",
                "vary: origin, access-control-request-method, access-control-request-headers",
            ]
        );
        policy.credentials = true;
        policy.headers = Some(HeaderValue::from_static("x-mine"));
        let answer = policy.answer(&request);
        assert_eq!(answer["access-control-allow-credentials"], "true");
        assert_eq!(answer["access-control-allow-headers"], "x-mine");

        // Another origin may do nothing.
        for origin in [
            "https://evil.example",
            "https://app.example.com:444",
            "null",
        ] {
            let request = map(&[("origin", origin), ("access-control-request-method", "GET")]);
            let answer = policy.answer(&request);
            assert_eq!(answer.keys().collect::<Vec<_>>(), ["vary"], "{origin}");
        }
        let answer = cors(&["*"]).answer(&request);
        assert_eq!(answer["access-control-allow-origin"], "*");
    }

    #[test]
    fn answers_say_who_may_read_them() {
        let origin = HeaderValue::from_static(APP);
        let other = HeaderValue::from_static("https://evil.example");
        let one = cors(&[APP]);
        let extended =
            |cors: &Cors, origin: Option<&HeaderValue>, lines: &[(&'static str, &str)]| {
                let mut lines = map(lines);
                cors.extend(origin, &mut lines);
                shown(&lines)
            };
        let allowed = "access-control-allow-origin: https://app.example.com";
        assert_eq!(
            extended(&one, Some(&origin), &[]),
            [allowed, "vary: origin"]
        );
        for nobody in [Some(&other), None] {
            assert_eq!(extended(&one, nobody, &[]), ["vary: origin"]);
        }
        for vary in ["Accept, ORIGIN", "*"] {
            let lines = extended(&one, Some(&origin), &[("vary", vary)]);
            assert_eq!(lines, [allowed.to_owned(), format!("vary: {vary}")]);
        }
        assert_eq!(
            extended(&one, Some(&origin), &[("vary", "accept")]),
            [allowed, "vary: accept", "vary: origin"]
        );

        // The same for everybody, so nothing varies.
        let any = cors(&["*"]);
        for origin in [Some(&origin), None] {
            assert_eq!(
                extended(&any, origin, &[]),
                ["access-control-allow-origin: *"]
            );
        }

        // The service knows better.
        let own = [("access-control-allow-origin", "https://its.own")];
        let expected = ["access-control-allow-origin: https://its.own"];
        for cors in [&one, &any] {
            assert_eq!(extended(cors, Some(&origin), &own), expected);
        }

        let mut with_credentials = one.clone();
        with_credentials.credentials = true;
        assert_eq!(
            extended(&with_credentials, Some(&origin), &[]),
            [
                "access-control-allow-credentials: true",
                allowed,
                "vary: origin"
            ]
        );
        assert_eq!(
            extended(&with_credentials, Some(&other), &[]),
            ["vary: origin"]
        );
    }

    #[test]
    fn our_own_answers_can_be_told_apart() {
        let policy = cors(&[APP]);
        let origin = HeaderValue::from_static(APP);
        let mut lines = HeaderMap::new();
        policy.extend_own(Some(&origin), &mut lines);
        assert_eq!(
            lines["access-control-expose-headers"],
            "x-silo-error, retry-after"
        );
        let mut lines = HeaderMap::new();
        policy.extend_own(None, &mut lines);
        assert!(!lines.contains_key("access-control-expose-headers"));
    }
}
