//! curl as a visitor that speaks HTTP/2.

use std::process::Output;

use crate::common::raw::{Recorder, Stand, pattern};
use crate::common::{curl, have};

/// curl that knows that HTTP/2 is spoken.
fn curl2(args: &[&str]) -> Output {
    curl(&[&["--http2-prior-knowledge"], args].concat())
}

#[test]
fn curl_gets_and_posts() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::new();
    let url = format!("http://{}", stand.agent.address());
    let output = curl2(&["-i", &format!("{url}/a%20b?q=1%2f")]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("HTTP/2 200"), "{text}");
    assert!(text.ends_with("\r\n\r\nok"), "{text}");
    let received = stand.service.next();
    assert_eq!(received.line(), "GET /a%20b?q=1%2f HTTP/1.1");
    let host = stand.agent.address().to_string();
    assert_eq!(received.header("host"), [&host[..]]);
    assert_eq!(received.header("x-forwarded-host"), [&host[..]]);
    assert_eq!(received.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(received.header("x-forwarded-proto"), ["http"]);
    assert_eq!(received.header("x-request-id").len(), 1);
    assert!(received.header("connection").is_empty());

    curl2(&["--data-binary", "hello", &url]);
    let received = stand.service.next();
    assert_eq!(received.line(), "POST / HTTP/1.1");
    assert_eq!(received.header("content-length"), ["5"]);
    assert_eq!(received.body, b"hello");

    let output = curl2(&["-I", &url]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("content-length: 2"), "{text}");
}

#[test]
fn curl_carries_large_bodies_both_ways() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::of(Recorder::with(|received, stream| {
        use std::io::Write;
        let body = &received.body;
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).is_ok() && stream.write_all(body).is_ok()
    }));
    let body = pattern(8 << 20);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("body");
    std::fs::write(&file, &body).unwrap();
    let upload = format!("@{}", file.display());
    let url = format!("http://{}/", stand.agent.address());
    let output = curl2(&["--data-binary", &upload, &url]);
    assert!(output.stdout == body);
}

/// The offer to upgrade is dropped, and the request is an HTTP/1.1 one.
#[test]
fn curl_upgrades_nothing() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::new();
    let url = format!("http://{}/", stand.agent.address());
    let output = curl(&["-i", "--http2", &url]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}
