//! Which state of the directory an answer shows, and whether the poller has that already.

use std::fmt;

use http::HeaderMap;
use http::header::{HeaderValue, IF_NONE_MATCH};

/// The entity-tag of the list of agents (RFC 9110, section 8.8.3). Weak, since two lists with the
/// same tag have the same members in the same states, but other live figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    /// Chosen at random when the server starts, so that no other start repeats a tag.
    pub instance: u64,
    /// The directory's.
    pub revision: u64,
}

impl Tag {
    /// Whether `If-None-Match` names this tag, so that the answer is 304 (RFC 9110, section
    /// 13.1.2): among others, by weak comparison, or as `*`. What can't be read names nothing.
    pub(super) fn is_named(self, headers: &HeaderMap) -> bool {
        let opaque = format!("{:016x}-{}", self.instance, self.revision);
        headers
            .get_all(IF_NONE_MATCH)
            .iter()
            .map(HeaderValue::as_bytes)
            .any(|value| value.trim_ascii() == b"*" || contains(value, opaque.as_bytes()))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "W/\"{:016x}-{}\"", self.instance, self.revision)
    }
}

/// Whether a list of entity-tags has one with these bytes between its quotes.
fn contains(mut list: &[u8], opaque: &[u8]) -> bool {
    loop {
        list = list.trim_ascii_start();
        if let Some(rest) = list.strip_prefix(b",") {
            list = rest;
            continue;
        }
        let Some(tag) = list
            .strip_prefix(b"W/\"")
            .or_else(|| list.strip_prefix(b"\""))
        else {
            return false;
        };
        let Some(end) = tag.iter().position(|byte| *byte == b'"') else {
            return false;
        };
        if &tag[..end] == opaque {
            return true;
        }
        list = &tag[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag {
        instance: 0xab,
        revision: 7,
    };

    fn is_named(lines: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for line in lines {
            let value = HeaderValue::from_bytes(line.as_bytes()).unwrap();
            headers.append(IF_NONE_MATCH, value);
        }
        TAG.is_named(&headers)
    }

    #[test]
    fn a_tag_is_found_however_it_is_named() {
        assert_eq!(TAG.to_string(), r#"W/"00000000000000ab-7""#);
        for value in [
            r#"W/"00000000000000ab-7""#,
            r#""00000000000000ab-7""#,
            r#""a", W/"00000000000000ab-7" ,"b""#,
            r#",, "a,b"	,"00000000000000ab-7""#,
            r#"W/"","00000000000000ab-7""#,
            "*",
            " * ",
        ] {
            assert!(is_named(&[value]), "{value}");
        }
        assert!(is_named(&[r#""a""#, r#"W/"00000000000000ab-7""#]));
    }

    #[test]
    fn another_tag_or_none_names_nothing() {
        assert!(!is_named(&[]));
        for value in [
            "",
            "00000000000000ab-7",
            r#"W/"00000000000000ab-8""#,
            r#"W/"00000000000000ac-7""#,
            r#"w/"00000000000000ab-7""#,
            r#"W/"00000000000000ab-7"#,
            r#"x "00000000000000ab-7""#,
            r#""a, *, ""#,
            "\u{e9}",
        ] {
            assert!(!is_named(&[value]), "{value}");
        }
    }
}
