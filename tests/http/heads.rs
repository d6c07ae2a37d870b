//! Request lines, header lines and status lines.

use crate::common::raw::{Recorder, Stand, ask, latin1, lines_of, values_of};
use crate::common::{read_answer, request};

use std::io::Write;

#[test]
fn targets_arrive_as_they_were_sent() {
    let stand = Stand::new();
    let absolute = format!("http://{}/x%2Fy/../z?q=%20", stand.agent.address());
    for line in [
        "GET /",
        "GET /%ff",
        "GET /a%2Fb?x=%3F",
        "GET //x/../y",
        "GET /./a//b/.",
        "GET /?",
        "GET /a?b?c=/&d&&",
        "GET /%zz%",
        "GET /~a;b=c,d!$'()*+:@[]|^\\?{}\\^`'|",
        "OPTIONS *",
        "OPTIONS /",
        &format!("GET {absolute}"),
        "DELETE /x",
        "GET /a<b>\"c\"?<>",
        "PROPFIND /dav/",
        "M-SEARCH /x",
    ] {
        let head = format!("{line} HTTP/1.1\r\nHost: {}\r\n\r\n", stand.agent.address());
        let answer = stand.ask(head);
        assert_eq!(answer.status, 200, "{line}: {}", answer.text());
        assert_eq!(stand.service.next().line(), format!("{line} HTTP/1.1"));
    }
}

#[test]
fn header_lines_arrive_as_they_were_sent() {
    let stand = Stand::new();
    let cookie = format!("session={}", "c".repeat(8 * 1024));
    let mut head = Vec::new();
    head.extend_from_slice(b"POST /x HTTP/1.1\r\nHost: example.com:8100\r\n");
    head.extend_from_slice(b"X-Latin: caf\xe9 \xff\x80\r\n");
    head.extend_from_slice(b"X-Many: 1\r\nAccept: text/html\r\nX-Many:   2, 3 \r\n");
    head.extend_from_slice(b"accept: */*;q=0.1\r\nX-Many:\r\nX-MANY: 4\r\nX-Empty:\r\n");
    head.extend_from_slice(b"X_odd!#$%&'*+-.^`|~9: a\tb \"c\"\r\n");
    head.extend_from_slice(b"Trailer: X-Sum\r\nX-Request-Id: mine\r\nContent-Length: 0\r\n");
    write!(head, "Cookie: {cookie}\r\nCookie: second=2\r\n\r\n").unwrap();
    assert_eq!(stand.ask(&head).status, 200);

    let received = stand.service.next();
    assert_eq!(received.line(), "POST /x HTTP/1.1");
    for (name, values) in [
        ("host", vec!["example.com:8100"]),
        ("x-latin", vec!["caf\u{e9} \u{ff}\u{80}"]),
        ("x-many", vec!["1", "2, 3", "", "4"]),
        ("accept", vec!["text/html", "*/*;q=0.1"]),
        ("x-empty", vec![""]),
        ("x_odd!#$%&'*+-.^`|~9", vec!["a\tb \"c\""]),
        ("trailer", vec!["X-Sum"]),
        ("content-length", vec!["0"]),
        ("cookie", vec![cookie.as_str(), "second=2"]),
        ("x-forwarded-for", vec!["127.0.0.1"]),
        ("x-forwarded-host", vec!["example.com:8100"]),
        ("x-forwarded-proto", vec!["http"]),
        ("x-request-id", vec!["mine"]),
    ] {
        assert_eq!(received.header(name), values, "{name}");
    }
    assert_eq!(received.lines().len(), 18, "{}", latin1(&received.head));
}

/// No Accept-Encoding, no User-Agent, no Via: only what the contract says is added.
#[test]
fn a_bare_request_gets_only_what_says_where_it_came_from() {
    let stand = Stand::new();
    assert_eq!(stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n").status, 200);
    let mut lines = stand.service.next().lines();
    lines.sort();
    let (name, id) = lines.pop().unwrap();
    assert_eq!(name, "x-request-id");
    assert!(
        id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{id}"
    );
    let expected = [
        ("Host", "h"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "h"),
        ("x-forwarded-proto", "http"),
    ];
    assert_eq!(
        lines,
        expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
    );

    // Another request has another name.
    stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_ne!(stand.service.next().header("x-request-id"), [id]);
}

#[test]
fn answers_arrive_as_they_were_sent() {
    let stand = Stand::of(Recorder::answering(
        b"HTTP/1.1 299 Fine\r\nSet-Cookie: a=1; Path=/\r\nX-Latin: caf\xe9\r\nX-Empty:\r\n\
          Set-Cookie: b=2\r\nVary: accept\r\nX-Many: 1\r\nVary: cookie\r\nX-Many: 2\r\n\
          Server: mine\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nX_odd!#$: \"x\"\r\n\
          Content-Length: 3\r\n\r\n\x00\xff\n"
            .as_slice(),
    ));
    let answer = stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.head.starts_with(b"HTTP/1.1 299 "));
    assert_eq!(answer.body, b"\x00\xff\n");
    for (name, values) in [
        ("set-cookie", vec!["a=1; Path=/", "b=2"]),
        ("x-latin", vec!["caf\u{e9}"]),
        ("x-empty", vec![""]),
        ("vary", vec!["accept", "cookie"]),
        ("x-many", vec!["1", "2"]),
        ("server", vec!["mine"]),
        ("date", vec!["Sun, 06 Nov 1994 08:49:37 GMT"]),
        ("x_odd!#$", vec!["\"x\""]),
        ("content-length", vec!["3"]),
    ] {
        assert_eq!(values_of(&answer.head, name), values, "{name}");
    }
    assert_eq!(lines_of(&answer.head).len(), 12);

    // And a bare answer gets nothing at all.
    let stand = Stand::new();
    let answer = stand.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(
        latin1(&answer.head),
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    );
}

#[test]
fn a_redirect_is_the_visitors_to_follow() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 302 Found\r\nLocation: /elsewhere?a=%2F\r\nContent-Length: 0\r\n\r\n",
    ));
    let answer = stand.ask("GET /here HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(answer.status, 302);
    assert_eq!(answer.header("location"), ["/elsewhere?a=%2F"]);
    assert_eq!(stand.service.next().line(), "GET /here HTTP/1.1");
    assert!(stand.service.is_empty());
}

#[test]
fn what_belongs_to_one_connection_only_stays_there() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 200 OK\r\nConnection: x-secret, keep-alive\r\nX-Secret: 1\r\nX-Kept: 2\r\n\
         Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nUpgrade: h2c\r\nTE: trailers\r\n\
         Content-Length: 2\r\n\r\nok",
    ));
    let answer = stand.ask(
        "GET / HTTP/1.1\r\nHost: h\r\nConnection: X-Secret , keep-alive,close\r\nX-Secret: 1\r\n\
         Connection: x-other\r\nX-Other: 2\r\nX-Kept: 3\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nTE: gzip\r\n\r\n",
    );
    let received = stand.service.next();
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "upgrade",
        "x-secret",
        "x-other",
    ] {
        assert!(received.header(name).is_empty(), "{name}");
        if name != "connection" {
            assert!(values_of(&answer.head, name).is_empty(), "{name}");
        }
    }
    assert_eq!(received.header("x-kept"), ["3"]);
    assert_eq!(values_of(&answer.head, "x-kept"), ["2"]);
    // The visitor's own wish, not the service's.
    assert_eq!(values_of(&answer.head, "connection"), ["close"]);
}

/// Connection must not take away what makes the request what it is.
#[test]
fn connection_cannot_name_away_what_matters() {
    let stand = Stand::new();
    let answer = stand.ask(
        "POST / HTTP/1.1\r\nHost: h\r\nConnection: host, content-length, x-forwarded-for\r\n\
         Content-Length: 4\r\n\r\nbody",
    );
    assert_eq!(answer.status, 200);
    let received = stand.service.next();
    assert_eq!(received.header("host"), ["h"]);
    assert_eq!(received.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(received.body, b"body");
}

const CLAIMS: &str = "GET / HTTP/1.1\r\nHost: real\r\nX-Forwarded-For: 203.0.113.7\r\n\
    X-Forwarded-Host: claimed\r\nX-Forwarded-Proto: https\r\nForwarded: for=203.0.113.7\r\n\
    X-Real-IP: 203.0.113.7\r\nX_Forwarded_For: 203.0.113.8\r\n\r\n";

#[test]
fn a_visitors_word_on_where_he_comes_from_counts_only_if_he_is_trusted() {
    let stand = Stand::new();
    stand.ask(CLAIMS);
    let received = stand.service.next();
    assert_eq!(received.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(received.header("x-forwarded-host"), ["real"]);
    assert_eq!(received.header("x-forwarded-proto"), ["http"]);
    for name in ["forwarded", "x-real-ip", "x_forwarded_for"] {
        assert!(received.header(name).is_empty(), "{name}");
    }

    let trusting = Stand::with(
        Recorder::new(),
        &[("http.trusted_proxies", "127.0.0.0/8")],
        &[],
    );
    trusting.ask(CLAIMS);
    let received = trusting.service.next();
    assert_eq!(
        received.header("x-forwarded-for"),
        ["203.0.113.7, 127.0.0.1"]
    );
    assert_eq!(received.header("x-forwarded-host"), ["claimed"]);
    assert_eq!(received.header("x-forwarded-proto"), ["https"]);
    assert_eq!(received.header("forwarded"), ["for=203.0.113.7"]);
    assert_eq!(received.header("x-real-ip"), ["203.0.113.7"]);
}

#[test]
fn host_is_what_the_agent_is_told_to_send() {
    let stand = Stand::new();
    let service = stand.service.address;
    let target = stand
        .server
        .agent_with("target", service, &[("local.host_header", "target")]);
    let fixed =
        stand
            .server
            .agent_with("fixed", service, &[("local.host_header", "intern.example")]);
    for (address, host) in [
        (stand.agent.address(), "visitor.example:81".to_owned()),
        (target.address(), service.to_string()),
        (fixed.address(), "intern.example".to_owned()),
    ] {
        let head = "GET / HTTP/1.1\r\nHost: visitor.example:81\r\n\r\n";
        assert_eq!(ask(address, head).status, 200);
        let received = stand.service.next();
        assert_eq!(received.header("host"), [host]);
        assert_eq!(received.header("x-forwarded-host"), ["visitor.example:81"]);
    }
}

#[test]
fn answers_without_a_body_keep_their_length_and_the_connection() {
    let stand = Stand::of(Recorder::with(|request, stream| {
        let head = match request.line().split(' ').nth(1).unwrap() {
            "/head" => "200 OK\r\nContent-Length: 1234",
            "/head-chunked" => "200 OK\r\nTransfer-Encoding: chunked",
            "/head-unknown" => "200 OK\r\nETag: \"e\"",
            "/204" => "204 No Content",
            "/304" => "304 Not Modified\r\nContent-Length: 1234\r\nETag: \"e\"",
            "/304-unknown" => "304 Not Modified\r\nETag: \"e\"",
            _ => "200 OK\r\nContent-Length: 0",
        };
        write!(stream, "HTTP/1.1 {head}\r\n\r\n").is_ok()
    }));
    let mut visitor = crate::common::connect(stand.agent.address());
    for (method, target, status, length) in [
        ("HEAD", "/head", 200, Some("1234")),
        ("HEAD", "/head-chunked", 200, None),
        ("HEAD", "/head-unknown", 200, None),
        ("GET", "/204", 204, None),
        ("POST", "/204", 204, None),
        ("GET", "/304", 304, Some("1234")),
        ("GET", "/304-unknown", 304, None),
        ("GET", "/empty", 200, Some("0")),
        ("HEAD", "/head", 200, Some("1234")),
    ] {
        write!(visitor, "{method} {target} HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        let answer = read_answer(&mut visitor, method == "HEAD");
        assert_eq!(answer.status, status, "{method} {target}");
        assert_eq!(
            answer.header("content-length"),
            length.as_slice(),
            "{method} {target}"
        );
        assert!(answer.body.is_empty(), "{method} {target}");
        assert!(
            answer.header("connection").is_empty(),
            "{method} {target}: {}",
            latin1(&answer.head)
        );
    }
}

#[test]
fn connect_is_refused() {
    let stand = Stand::new();
    let answer = stand.ask("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n");
    assert_eq!(answer.status, 405);
    assert!(!answer.header("allow").is_empty());
    assert!(stand.service.is_empty());
}

/// HTTP/2 can't be had by asking for it in HTTP/1, nor can anything else by half of the lines.
#[test]
fn what_is_no_upgrade_is_an_ordinary_request() {
    let stand = Stand::new();
    for lines in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
        "Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
        "Upgrade: websocket",
        "Connection: upgrade",
        "Connection: upgrade\r\nUpgrade: ",
    ] {
        let mut visitor = crate::common::raw::send(
            stand.agent.address(),
            format!("GET / HTTP/1.1\r\nHost: h\r\n{lines}\r\n\r\n"),
        );
        assert_eq!(read_answer(&mut visitor, false).status, 200);
        let received = stand.service.next();
        for name in ["connection", "upgrade", "http2-settings"] {
            assert!(received.header(name).is_empty(), "{lines}: {name}");
        }
        // The connection is still an HTTP/1.1 one.
        visitor
            .write_all(b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
        assert_eq!(read_answer(&mut visitor, false).text(), "ok");
        assert_eq!(stand.service.next().line(), "GET /next HTTP/1.1");
    }
}

/// A service may not switch protocols that nobody asked it to switch.
#[test]
fn a_101_that_nobody_asked_for_is_no_answer() {
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nbytes",
    ));
    let answer = request(stand.agent.address(), "GET", "/", &[], b"");
    assert_eq!(answer.status, 502);
    assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
}
