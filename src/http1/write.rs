use bytes::{BufMut, BytesMut};
use http::StatusCode;

use crate::head::Lines;
use crate::headers::{Version, sendable_trailers};

/// Appends `METHOD target HTTP/1.1` and the line's end. Both have been checked.
pub fn write_request_line(out: &mut BytesMut, method: &[u8], target: &[u8]) {
    out.reserve(method.len() + target.len() + 12);
    out.put_slice(method);
    out.put_u8(b' ');
    out.put_slice(target);
    out.put_slice(b" HTTP/1.1\r\n");
}

/// Appends `HTTP/1.x STATUS reason` and the line's end; the reason is the usual one of the status
/// (RFC 9110, section 15), and empty where there is none.
pub fn write_status_line(out: &mut BytesMut, version: Version, status: u16) {
    out.put_slice(match version {
        Version::Http10 => b"HTTP/1.0 ",
        Version::Http11 => b"HTTP/1.1 ",
    });
    put_decimal(out, u64::from(status));
    out.put_u8(b' ');
    let reason = StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason());
    out.put_slice(reason.unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
}

/// Appends a header line. Name and value have been checked.
pub fn write_line(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.put_slice(name);
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

/// Appends a chunk's size line; the chunk and CRLF follow.
pub fn write_chunk_head(out: &mut BytesMut, length: usize) {
    const DIGITS: usize = 16;
    let mut text = [0; DIGITS];
    let mut at = DIGITS;
    let mut rest = length;
    loop {
        at -= 1;
        text[at] = b"0123456789abcdef"[rest % 16];
        rest /= 16;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&text[at..]);
    out.put_slice(b"\r\n");
}

/// Ends a chunked body, with those of the trailer lines that may be written.
pub fn write_last_chunk(out: &mut BytesMut, trailers: Option<&Lines>) {
    out.put_slice(b"0\r\n");
    for (name, value) in trailers.into_iter().flat_map(sendable_trailers) {
        write_line(out, name, value);
    }
    out.put_slice(b"\r\n");
}

/// Appends a Content-Length line.
pub fn write_length(out: &mut BytesMut, length: u64) {
    out.put_slice(b"content-length: ");
    put_decimal(out, length);
    out.put_slice(b"\r\n");
}

/// Appends a number.
fn put_decimal(out: &mut BytesMut, number: u64) {
    const DIGITS: usize = 20;
    let mut text = [0; DIGITS];
    let mut at = DIGITS;
    let mut rest = number;
    loop {
        at -= 1;
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&text[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut BytesMut)) -> String {
        let mut out = BytesMut::new();
        write(&mut out);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn first_lines() {
        assert_eq!(
            written(|out| write_request_line(out, b"GET", b"/a?b")),
            "GET /a?b HTTP/1.1\r\n"
        );
        let status = |version, status| written(|out| write_status_line(out, version, status));
        assert_eq!(status(Version::Http11, 200), "HTTP/1.1 200 OK\r\n");
        assert_eq!(status(Version::Http10, 404), "HTTP/1.0 404 Not Found\r\n");
        assert_eq!(status(Version::Http11, 299), "HTTP/1.1 299 \r\n");
    }

    #[test]
    fn numbers() {
        for length in [1, 9, 10, 15, 16, 255, 4096, usize::MAX] {
            assert_eq!(
                written(|out| write_chunk_head(out, length)),
                format!("{length:x}\r\n")
            );
        }
        for number in [0, 7, 10, 65_535, u64::MAX] {
            assert_eq!(written(|out| put_decimal(out, number)), number.to_string());
        }
    }
}
