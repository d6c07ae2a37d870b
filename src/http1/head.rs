use std::mem::MaybeUninit;

use thiserror::Error;

use crate::headers::Version;

/// How large a head may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLimits {
    /// Bytes of the first line with its end.
    pub line: usize,
    /// Bytes of the whole, with all line ends.
    pub head: usize,
    /// Header lines.
    pub lines: usize,
}

/// A head beyond its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TooLarge {
    /// The first line is too long.
    #[error("the first line is too long")]
    Line,
    /// There are too many bytes or lines in all.
    #[error("the head is too large")]
    Head,
}

/// Finds the end of a head whose bytes come piece by piece. It looks at each byte once, so that
/// a head that comes in tiny pieces costs no more than one that comes whole.
#[derive(Debug, Clone, Default)]
pub struct HeadScan {
    scanned: usize,
    line_start: usize,
    /// Lines so far that weren't empty.
    lines: usize,
    /// How much of the first line has been found plausible.
    judged: Judged,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Judged {
    #[default]
    Nothing,
    Beginning,
    Line,
}

impl HeadScan {
    /// Looks at `bytes`, which begin with the head and hold more of it than last time. Says how
    /// long the head is, with the empty line that ends it and empty lines before it, if its end
    /// is there; then the next scan begins anew.
    ///
    /// # Errors
    /// [`TooLarge`] as soon as it is certain, whether the end is there or not.
    pub fn scan(&mut self, bytes: &[u8], limits: HeadLimits) -> Result<Option<usize>, TooLarge> {
        while let Some(at) = memchr::memchr(b'\n', &bytes[self.scanned..]) {
            let line_end = self.scanned + at;
            let line = &bytes[self.line_start..line_end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            self.scanned = line_end + 1;
            self.line_start = self.scanned;
            if self.scanned > limits.head {
                return Err(self.too_large(line.len(), limits));
            }
            if line.is_empty() {
                if self.lines == 0 {
                    continue;
                }
                let end = self.scanned;
                *self = Self::default();
                return Ok(Some(end));
            }
            self.lines += 1;
            if self.lines == 1 && line.len() + LINE_END > limits.line {
                return Err(TooLarge::Line);
            }
            if self.lines > limits.lines + 1 {
                return Err(TooLarge::Head);
            }
        }
        self.scanned = bytes.len();
        let begun = bytes.len() - self.line_start;
        if begun >= limits.line && self.lines == 0 || bytes.len() > limits.head {
            return Err(self.too_large(begun, limits));
        }
        Ok(None)
    }

    /// Whether a request can become of `bytes`, of which no end has been found yet. Looks once at
    /// its beginning and once at the first line when that is complete, so that whoever speaks
    /// something else is told at once.
    pub fn may_be_request(&mut self, bytes: &[u8]) -> bool {
        self.judge(|| {
            let mut none = [];
            let outcome = httparse::Request::new(&mut none).parse(bytes);
            is_beginning(outcome)
        })
    }

    /// The same for an answer.
    pub fn may_be_response(&mut self, bytes: &[u8]) -> bool {
        self.judge(|| {
            let mut none = [];
            let outcome = httparse::Response::new(&mut none).parse(bytes);
            is_beginning(outcome)
        })
    }

    fn judge(&mut self, plausible: impl FnOnce() -> bool) -> bool {
        let there = match self.lines {
            0 if self.line_start == self.scanned => Judged::Nothing,
            0 => Judged::Beginning,
            _ => Judged::Line,
        };
        let new = there > self.judged;
        self.judged = there;
        !new || plausible()
    }

    fn too_large(&self, line: usize, limits: HeadLimits) -> TooLarge {
        if self.lines == 0 && line + LINE_END > limits.line {
            TooLarge::Line
        } else {
            TooLarge::Head
        }
    }
}

/// Whether a head may begin so, of which the parser was given no room for lines.
fn is_beginning(outcome: httparse::Result<usize>) -> bool {
    matches!(outcome, Ok(_) | Err(httparse::Error::TooManyHeaders))
}

/// CRLF.
const LINE_END: usize = 2;

/// The first line of a request (RFC 9112, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLine<'a> {
    /// A token.
    pub method: &'a [u8],
    /// As it was sent; no blank and no control character in it.
    pub target: &'a [u8],
    /// The version.
    pub version: Version,
}

/// The first line of an answer (RFC 9112, section 4), without its reason phrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusLine {
    /// 100 to 999.
    pub status: u16,
    /// The version.
    pub version: Version,
}

/// The header lines of a head, in order: names are tokens as they were written, values without
/// the blanks around them, and with no control character but tabs in them.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(&'a [httparse::Header<'a>]);

impl<'a> Fields<'a> {
    /// Names and values.
    pub fn iter(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone {
        self.0.iter().map(|line| (line.name.as_bytes(), line.value))
    }
}

/// Bytes that are no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// It is HTTP, but of a version that isn't spoken here.
    #[error("the HTTP version isn't supported")]
    Version,
    /// The first line is none.
    #[error("the first line is malformed")]
    Line,
    /// A header line is none, or there is one too many.
    #[error("a header line is malformed")]
    Field,
}

/// Takes a request's head apart. `head` is what [`HeadScan`] found to be one.
pub fn parse_request<T>(
    head: &[u8],
    max_lines: usize,
    then: impl FnOnce(RequestLine<'_>, Fields<'_>) -> T,
) -> Result<T, Malformed> {
    with_lines(max_lines, |lines| {
        let mut request = httparse::Request::new(&mut []);
        let status = request.parse_with_uninit_headers(head, lines);
        complete(status, head.len()).map_err(|malformed| match malformed {
            // The parser finds no version either where the target has a blank in it.
            Malformed::Version if !has_version(head) => Malformed::Line,
            malformed => malformed,
        })?;
        let (Some(method), Some(target), Some(minor)) =
            (request.method, request.path, request.version)
        else {
            return Err(Malformed::Line);
        };
        let line = RequestLine {
            method: method.as_bytes(),
            target: target.as_bytes(),
            version: version(minor),
        };
        Ok(then(line, Fields(request.headers)))
    })
}

/// Takes an answer's head apart. `head` is what [`HeadScan`] found to be one.
pub fn parse_response<T>(
    head: &[u8],
    max_lines: usize,
    then: impl FnOnce(StatusLine, Fields<'_>) -> T,
) -> Result<T, Malformed> {
    with_lines(max_lines, |lines| {
        let mut response = httparse::Response::new(&mut []);
        let status = httparse::ParserConfig::default().parse_response_with_uninit_headers(
            &mut response,
            head,
            lines,
        );
        complete(status, head.len())?;
        let (Some(status @ 100..), Some(minor)) = (response.code, response.version) else {
            return Err(Malformed::Line);
        };
        let line = StatusLine {
            status,
            version: version(minor),
        };
        Ok(then(line, Fields(response.headers)))
    })
}

/// Takes a trailer section apart, from its first line to the empty one that ends it.
pub(super) fn parse_trailers<T>(
    section: &[u8],
    max_lines: usize,
    then: impl FnOnce(Fields<'_>) -> T,
) -> Result<T, Malformed> {
    let mut lines = vec![httparse::EMPTY_HEADER; max_lines];
    match httparse::parse_headers(section, &mut lines) {
        Ok(httparse::Status::Complete((end, lines))) if end == section.len() => {
            Ok(then(Fields(lines)))
        }
        _ => Err(Malformed::Field),
    }
}

/// How many lines there is room for without an allocation.
const USUAL_LINES: usize = 100;

fn with_lines<'a, T>(
    max_lines: usize,
    parse: impl FnOnce(&mut [MaybeUninit<httparse::Header<'a>>]) -> T,
) -> T {
    if max_lines <= USUAL_LINES {
        parse(&mut [MaybeUninit::uninit(); USUAL_LINES])
    } else {
        parse(&mut vec![MaybeUninit::uninit(); max_lines])
    }
}

fn complete(status: httparse::Result<usize>, expected: usize) -> Result<(), Malformed> {
    match status {
        // The end that was found by looking for an empty line, and no other.
        Ok(httparse::Status::Complete(end)) if end == expected => Ok(()),
        Err(httparse::Error::Version) => Err(Malformed::Version),
        Err(
            httparse::Error::HeaderName
            | httparse::Error::HeaderValue
            | httparse::Error::TooManyHeaders,
        ) => Err(Malformed::Field),
        Ok(_) | Err(_) => Err(Malformed::Line),
    }
}

/// Whether the first line of `head` is three words of which the last is a version of HTTP.
fn has_version(head: &[u8]) -> bool {
    let mut lines = head
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii_end);
    let first = lines.find(|line| !line.is_empty()).unwrap_or_default();
    let words: Vec<&[u8]> = first.splitn(4, |byte| *byte == b' ').collect();
    match words[..] {
        [_, _, version] => match version.strip_prefix(b"HTTP/") {
            Some([major, b'.', minor]) => major.is_ascii_digit() && minor.is_ascii_digit(),
            _ => false,
        },
        _ => false,
    }
}

fn version(minor: u8) -> Version {
    match minor {
        0 => Version::Http10,
        _ => Version::Http11,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: HeadLimits = HeadLimits {
        line: 64,
        head: 256,
        lines: 5,
    };

    /// Where the head ends, fed in pieces of `step` bytes.
    fn scan(bytes: &[u8], step: usize) -> Result<Option<usize>, TooLarge> {
        let mut scan = HeadScan::default();
        let mut seen = 0;
        loop {
            seen = (seen + step).min(bytes.len());
            match scan.scan(&bytes[..seen], LIMITS)? {
                None if seen < bytes.len() => {}
                end => return Ok(end),
            }
        }
    }

    #[test]
    fn a_head_ends_with_an_empty_line() {
        for (bytes, end) in [
            ("", None),
            ("GET / HTTP/1.1", None),
            ("GET / HTTP/1.1\r\n", None),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r", None),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\nNEXT", Some(27)),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\nNEXT", Some(22)),
            ("GET / HTTP/1.1\nHost: a\n\nNEXT", Some(24)),
            ("\r\n\r\n\r\n", None),
        ] {
            for step in [1, 2, 3, 100] {
                assert_eq!(scan(bytes.as_bytes(), step), Ok(end), "{bytes:?} {step}");
            }
        }
    }

    #[test]
    fn what_is_something_else_is_found_early() {
        let judged = |bytes: &[u8], judge: fn(&mut HeadScan, &[u8]) -> bool| {
            (1..=bytes.len()).all(|seen| {
                let mut scan = HeadScan::default();
                let bytes = &bytes[..seen];
                scan.scan(bytes, LIMITS) == Ok(None) && judge(&mut scan, bytes)
            })
        };
        let request = |bytes: &[u8]| judged(bytes, HeadScan::may_be_request);
        assert!(request(b"\r\nGET / HTTP/1.1\r\nHost: a\r\nX"));
        for other in [
            &b"\x16\x03\x01\x02\x00"[..],
            b"SSH-2.0-foo\r\n",
            b"HELO x\r\n",
            b"GET / FTP/1.1\r\n",
        ] {
            assert!(!request(other), "{other:?}");
        }
        let answer = |bytes: &[u8]| judged(bytes, HeadScan::may_be_response);
        assert!(answer(b"HTTP/1.1 200 OK\r\nA: b\r\nX"));
        for other in [&b"SSH-2.0-foo\r\n"[..], b"220 mail\r\n", b"\x15\x03"] {
            assert!(!answer(other), "{other:?}");
        }
    }

    #[test]
    fn what_is_too_large_is_found_early() {
        let line = |length: usize| format!("{}\r\n\r\n", "x".repeat(length - 2));
        let lines = |count: usize| format!("x\r\n{}\r\n", "a: b\r\n".repeat(count));
        let bytes = |length: usize| format!("x\r\na: {}\r\n\r\n", "b".repeat(length - 10));
        for step in [1, 7, 1000] {
            assert_eq!(scan(line(64).as_bytes(), step), Ok(Some(66)));
            assert_eq!(scan(line(65).as_bytes(), step), Err(TooLarge::Line));
            assert_eq!(scan("x".repeat(63).as_bytes(), step), Ok(None));
            assert_eq!(scan("x".repeat(64).as_bytes(), step), Err(TooLarge::Line));
            assert_eq!(scan("x".repeat(1000).as_bytes(), step), Err(TooLarge::Line));
            assert_eq!(scan(lines(5).as_bytes(), step), Ok(Some(35)));
            assert_eq!(scan(lines(6).as_bytes(), step), Err(TooLarge::Head));
            assert_eq!(scan(bytes(256).as_bytes(), step), Ok(Some(256)));
            assert_eq!(scan(bytes(257).as_bytes(), step), Err(TooLarge::Head));
            let empty = "\r\n".repeat(200);
            assert_eq!(scan(empty.as_bytes(), step), Err(TooLarge::Head));
        }
    }

    fn request(head: &str) -> Result<(String, Version, usize), Malformed> {
        parse_request(head.as_bytes(), 100, |line, fields| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let first = format!("{} {}", text(line.method), text(line.target));
            (first, line.version, fields.iter().count())
        })
    }

    #[test]
    fn requests_are_taken_apart() {
        assert_eq!(
            request("GET /a?b HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n"),
            Ok(("GET /a?b".into(), Version::Http11, 2))
        );
        assert_eq!(
            request("\r\nM-SEARCH * HTTP/1.0\r\n\r\n"),
            Ok(("M-SEARCH *".into(), Version::Http10, 0))
        );
        for (head, malformed) in [
            ("GET / HTTP/1.2\r\n\r\n", Malformed::Version),
            ("GET / HTTP/2.0\r\n\r\n", Malformed::Version),
            ("GET / HTTP/2\r\n\r\n", Malformed::Line),
            ("GET / HTTP/1.\r\n\r\n", Malformed::Line),
            ("GET / HTTP/01.1\r\n\r\n", Malformed::Line),
            ("GET / HTTP/99999999999.1\r\n\r\n", Malformed::Line),
            ("GET /a b HTTP/1.1\r\n\r\n", Malformed::Line),
            ("GET / http/1.1\r\n\r\n", Malformed::Line),
            ("GET /\r\n\r\n", Malformed::Line),
            ("GET  / HTTP/1.1\r\n\r\n", Malformed::Line),
            ("GET / HTTP/1.1 \r\n\r\n", Malformed::Line),
            ("GET\t/ HTTP/1.1\r\n\r\n", Malformed::Line),
            ("G(T / HTTP/1.1\r\n\r\n", Malformed::Line),
            ("GET / HTTP/1.1\r\nX : y\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\n X: y\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\nX: y\r\n z\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\nX: y\rz\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\nX: \0\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\nX\r\n\r\n", Malformed::Field),
            ("GET / HTTP/1.1\r\n: y\r\n\r\n", Malformed::Field),
        ] {
            assert_eq!(request(head), Err(malformed), "{head:?}");
        }
    }

    #[test]
    fn lines_keep_case_order_and_bytes() {
        let head = b"GET / HTTP/1.1\r\nX-A:  caf\xe9\t \r\nx-a:\r\n\r\n";
        let seen = parse_request(head, 100, |_, fields| {
            fields
                .iter()
                .map(|(n, v)| (n.to_vec(), v.to_vec()))
                .collect::<Vec<_>>()
        });
        let expected: [(&[u8], &[u8]); 2] = [(b"X-A", b"caf\xe9"), (b"x-a", b"")];
        assert_eq!(
            seen.unwrap(),
            expected.map(|(n, v)| (n.to_vec(), v.to_vec()))
        );
    }

    #[test]
    fn answers_are_taken_apart() {
        let answer = |head: &str| {
            parse_response(head.as_bytes(), 100, |line, fields| {
                (line.status, fields.iter().count())
            })
        };
        assert_eq!(answer("HTTP/1.1 200 OK\r\nA: b\r\n\r\n"), Ok((200, 1)));
        assert_eq!(answer("HTTP/1.0 299\r\n\r\n"), Ok((299, 0)));
        assert_eq!(answer("HTTP/1.1 404 Caf\u{e9}\r\n\r\n"), Ok((404, 0)));
        for head in [
            "HTTP/1.1 99 x\r\n\r\n",
            "HTTP/1.1 020 x\r\n\r\n",
            "HTTP/1.1 20 x\r\n\r\n",
            "HTTP/2 200 x\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
            "hello\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        ] {
            assert!(answer(head).is_err(), "{head:?}");
        }
    }

    proptest! {
        /// However a head comes, it ends at the same place or is refused for the same reason.
        #[test]
        fn pieces_make_no_difference(bytes in "[a\r\n]{0,300}", step in 1_usize..9) {
            let whole = scan(bytes.as_bytes(), bytes.len().max(1));
            let pieces = scan(bytes.as_bytes(), step);
            match (whole, pieces) {
                // The one that sees less at a time may see the limit first.
                (Err(_), Err(_)) => {}
                (whole, pieces) => prop_assert_eq!(whole, pieces),
            }
        }

        /// Any bytes are judged, and what is accepted has nothing in it that could be taken for
        /// the end of a line.
        #[test]
        fn any_bytes_are_judged(mut bytes: Vec<u8>) {
            bytes.extend_from_slice(b"\r\n\r\n");
            let clean = |bytes: &[u8]| !bytes.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0));
            let judged = parse_request(&bytes, 100, |line, fields| {
                let all = fields.iter().all(|(name, value)| clean(name) && clean(value));
                all && clean(line.method) && clean(line.target)
            });
            prop_assert!(judged.unwrap_or(true));
            let judged = parse_response(&bytes, 100, |_, fields| {
                fields.iter().all(|(name, value)| clean(name) && clean(value))
            });
            prop_assert!(judged.unwrap_or(true));
        }
    }
}
