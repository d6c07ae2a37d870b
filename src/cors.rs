//! Cross-origin resource sharing (the Fetch standard, section 3.3): which web pages of other
//! origins may read the answers. Pure: header lines in, header lines out.

use std::str::FromStr;
use std::time::Duration;

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
/// and a request whose answer may not be read is passed on all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cors {
    /// Whose pages.
    pub origins: Origins,
    /// The methods that they may use; tokens.
    pub methods: Vec<String>,
    /// The header lines that they may send; tokens. If empty, those that they ask for.
    pub headers: Vec<String>,
    /// Whether cookies and credentials go with their requests. Never with [`Origins::Any`]: every
    /// page could read what its visitor may.
    pub credentials: bool,
    /// How long browsers may remember the answer to a preflight.
    pub max_age: Duration,
}

/// A header line that is added to an answer.
pub type Line<'a> = (&'static str, &'a [u8]);

/// What browsers may be shown of the lines of our own answers.
const EXPOSED: Line<'static> = (
    "access-control-expose-headers",
    b"x-silo-error, retry-after",
);

const ALLOW_ORIGIN: &str = "access-control-allow-origin";
const ALLOW_CREDENTIALS: Line<'static> = ("access-control-allow-credentials", b"true");

/// What a request is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Who may read its answer.
    pub grant: Grant,
    /// The answer, if the request is a preflight: the question of a browser, meant for us,
    /// whether its page may send another request.
    pub preflight: Option<Preflight>,
}

impl Cors {
    /// Judges a request by its method and header lines.
    pub fn judge<'a>(
        &self,
        method: &[u8],
        lines: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    ) -> Verdict {
        let value = |name: &str| {
            let mut lines = lines.clone();
            lines.find(|(line, _)| line.eq_ignore_ascii_case(name.as_bytes()))
        };
        let origin = value("origin").map(|(_, value)| value);
        let grant = Grant {
            origin: match &self.origins {
                Origins::Any => Some("*".into()),
                Origins::Only(some) => some
                    .iter()
                    .find(|one| origin == Some(one.0.as_bytes()))
                    .map(|one| one.0.clone()),
            },
            varies: self.origins != Origins::Any,
            credentials: self.credentials,
        };
        let asks = method == b"OPTIONS"
            && origin.is_some()
            && value("access-control-request-method").is_some();
        let preflight = asks.then(|| {
            let asked = value("access-control-request-headers");
            self.answer(&grant, asked.map(|(_, value)| value))
        });
        Verdict { grant, preflight }
    }

    fn answer(&self, grant: &Grant, asked_headers: Option<&[u8]>) -> Preflight {
        if grant.origin.is_none() {
            return Preflight(Vec::new());
        }
        let mut lines = vec![(
            "access-control-allow-methods",
            self.methods.join(", ").into_bytes(),
        )];
        let headers = match &self.headers[..] {
            [] => asked_headers.map(<[u8]>::to_vec),
            some => Some(some.join(", ").into_bytes()),
        };
        if let Some(headers) = headers {
            lines.push(("access-control-allow-headers", headers));
        }
        let seconds = self.max_age.as_secs().to_string();
        lines.push(("access-control-max-age", seconds.into_bytes()));
        Preflight(lines)
    }
}

/// The answer to a preflight; its status is 204.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preflight(Vec<(&'static str, Vec<u8>)>);

impl Preflight {
    /// Its header lines. For an origin that may do nothing they allow nothing.
    pub fn lines<'a>(&'a self, grant: &'a Grant) -> impl Iterator<Item = Line<'a>> {
        let vary = "origin, access-control-request-method, access-control-request-headers";
        let own = self.0.iter().map(|(name, value)| (*name, &value[..]));
        std::iter::once(("vary", vary.as_bytes()))
            .chain(grant.allowing())
            .chain(own)
    }
}

/// Who may read an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The value of Access-Control-Allow-Origin; none if nobody of another origin may.
    origin: Option<String>,
    /// Others would be answered otherwise.
    varies: bool,
    credentials: bool,
}

impl Grant {
    /// The lines for an answer of our own.
    pub fn own_lines(&self) -> impl Iterator<Item = Line<'_>> {
        let exposed = self.origin.is_some().then_some(EXPOSED);
        Additions::new(self).into_lines().chain(exposed)
    }

    fn allowing(&self) -> impl Iterator<Item = Line<'_>> {
        let origin = self.origin.as_deref();
        let credentials = origin.filter(|_| self.credentials);
        let origin = origin.map(|origin| (ALLOW_ORIGIN, origin.as_bytes()));
        let credentials = credentials.map(|_| ALLOW_CREDENTIALS);
        origin.into_iter().chain(credentials)
    }
}

/// What is added to a service's answer, whose own lines are shown to it before. A service that
/// says itself who may read has the last word.
#[derive(Debug, Clone)]
pub struct Additions<'a> {
    grant: &'a Grant,
    /// The answer has an Access-Control-Allow-Origin.
    decided: bool,
    /// Its Vary names the origin.
    varies: bool,
}

impl<'a> Additions<'a> {
    /// For an answer of which no line was seen yet.
    pub fn new(grant: &'a Grant) -> Self {
        Self {
            grant,
            decided: false,
            varies: false,
        }
    }

    /// A line of the answer.
    pub fn see(&mut self, name: &[u8], value: &[u8]) {
        if name.eq_ignore_ascii_case(ALLOW_ORIGIN.as_bytes()) {
            self.decided = true;
        } else if name.eq_ignore_ascii_case(b"vary") {
            self.varies |= value
                .split(|byte| *byte == b',')
                .map(<[u8]>::trim_ascii)
                .any(|name| name == b"*" || name.eq_ignore_ascii_case(b"origin"));
        }
    }

    /// The lines to add. Where the answer depends on the origin, caches are told, also if there
    /// was none: they must not keep that answer for one.
    pub fn into_lines(self) -> impl Iterator<Item = Line<'a>> {
        let varies = self.grant.varies && !self.varies;
        let vary = varies.then_some(("vary", &b"origin"[..]));
        let lines = vary.into_iter().chain(self.grant.allowing());
        lines.filter(move |_| !self.decided)
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
            methods: vec!["GET".into(), "PUT".into()],
            headers: Vec::new(),
            credentials: false,
            max_age: Duration::from_secs(600),
        }
    }

    fn judge(cors: &Cors, method: &str, lines: &[(&str, &str)]) -> Verdict {
        let lines = lines.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes()));
        cors.judge(method.as_bytes(), lines)
    }

    fn shown<'a>(lines: impl Iterator<Item = Line<'a>>) -> Vec<String> {
        lines
            .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value)))
            .collect()
    }

    /// What is added to an answer with these lines, to a request from this origin.
    fn added(cors: &Cors, origin: Option<&str>, answer: &[(&str, &str)]) -> Vec<String> {
        let lines: Vec<_> = origin
            .map(|origin| ("Origin", origin))
            .into_iter()
            .collect();
        let verdict = judge(cors, "GET", &lines);
        assert_eq!(verdict.preflight, None);
        let mut additions = Additions::new(&verdict.grant);
        for (name, value) in answer {
            additions.see(name.as_bytes(), value.as_bytes());
        }
        shown(additions.into_lines())
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
        let any = cors(&["*"]);
        let asks = ("Access-Control-Request-Method", "PUT");
        let question = [("ORIGIN", APP), asks];
        assert!(judge(&any, "OPTIONS", &question).preflight.is_some());
        for (method, lines) in [
            ("PUT", &question[..]),
            ("OPTIONS", &question[..1]),
            ("OPTIONS", &question[1..]),
            ("options", &question),
        ] {
            assert_eq!(judge(&any, method, lines).preflight, None);
        }
    }

    #[test]
    fn a_preflight_is_answered() {
        let answered = |cors: &Cors, origin| {
            let lines = [
                ("origin", origin),
                ("access-control-request-method", "PUT"),
                ("access-control-request-headers", "authorization,x-mine"),
            ];
            let verdict = judge(cors, "OPTIONS", &lines);
            shown(verdict.preflight.unwrap().lines(&verdict.grant))
        };
        let mut policy = cors(&["http://other", APP]);
        let vary = "vary: origin, access-control-request-method, access-control-request-headers";
        assert_eq!(
            answered(&policy, APP),
            [
                vary,
                "access-control-allow-origin: https://app.example.com",
                "access-control-allow-methods: GET, PUT",
                "access-control-allow-headers: authorization,x-mine",
                "access-control-max-age: 600",
            ]
        );
        policy.credentials = true;
        policy.headers = vec!["X-A".into(), "X-B".into()];
        let lines = answered(&policy, APP);
        assert_eq!(lines[2], "access-control-allow-credentials: true");
        assert_eq!(lines[4], "access-control-allow-headers: X-A, X-B");
        // Another origin may do nothing.
        for origin in [
            "https://evil.example",
            "https://app.example.com:444",
            "null",
        ] {
            assert_eq!(answered(&policy, origin), [vary], "{origin}");
        }
        let lines = answered(&cors(&["*"]), "https://evil.example");
        assert_eq!(lines[1], "access-control-allow-origin: *");
    }

    #[test]
    fn answers_say_who_may_read_them() {
        let allowed = "access-control-allow-origin: https://app.example.com";
        let one = cors(&["http://other", APP]);
        assert_eq!(added(&one, Some(APP), &[]), ["vary: origin", allowed]);
        for nobody in [Some("https://evil.example"), Some("null"), None] {
            assert_eq!(added(&one, nobody, &[]), ["vary: origin"]);
        }
        for vary in ["Accept, ORIGIN", "*"] {
            assert_eq!(added(&one, Some(APP), &[("Vary", vary)]), [allowed]);
        }
        let other_vary = [("vary", "accept"), ("vary", "x-origin")];
        assert_eq!(
            added(&one, Some(APP), &other_vary),
            ["vary: origin", allowed]
        );

        // The same for everybody, so nothing varies.
        let any = cors(&["*"]);
        for origin in [Some(APP), None] {
            assert_eq!(added(&any, origin, &[]), ["access-control-allow-origin: *"]);
        }

        // The service knows better.
        let own = [("Access-Control-Allow-Origin", "https://its.own")];
        for cors in [&one, &any] {
            assert!(added(cors, Some(APP), &own).is_empty());
        }

        let mut trusting = one.clone();
        trusting.credentials = true;
        let credentials = "access-control-allow-credentials: true";
        let expected = ["vary: origin", allowed, credentials];
        assert_eq!(added(&trusting, Some(APP), &[]), expected);
        assert_eq!(added(&trusting, Some("http://evil"), &[]), ["vary: origin"]);
    }

    #[test]
    fn our_own_answers_can_be_told_apart() {
        let policy = cors(&[APP]);
        let own = |lines: &[(&str, &str)]| {
            let grant = judge(&policy, "GET", lines).grant;
            shown(grant.own_lines())
        };
        assert_eq!(
            own(&[("origin", APP)]),
            [
                "vary: origin",
                "access-control-allow-origin: https://app.example.com",
                "access-control-expose-headers: x-silo-error, retry-after",
            ]
        );
        assert_eq!(own(&[]), ["vary: origin"]);
    }
}
