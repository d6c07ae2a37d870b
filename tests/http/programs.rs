//! curl and nginx as visitors and services.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::daemon::Daemon;
use crate::common::raw::{Recorder, Stand, latin1, pattern};
use crate::common::{Server, connect, curl, have, read_answer};

use std::io::Write;

#[test]
fn curl_uploads_a_form() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::new();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("photo.bin");
    let photo = pattern(3 * 1024 * 1024);
    std::fs::write(&file, &photo).unwrap();
    let url = format!("http://{}/form", stand.agent.address());
    let form = format!("photo=@{};type=image/x-test", file.display());
    curl(&[&url, "-F", "name=caf\u{e9}", "-F", &form]);
    let received = stand.service.next();
    let content_type = received.header("content-type").remove(0);
    let boundary = content_type
        .strip_prefix("multipart/form-data; boundary=")
        .unwrap();
    let body = &received.body;
    assert!(body.starts_with(format!("--{boundary}\r\n").as_bytes()));
    assert!(body.ends_with(format!("\r\n--{boundary}--\r\n").as_bytes()));
    let found = body
        .windows(64)
        .position(|window| window == &photo[..64])
        .expect("the file's beginning");
    assert!(body[found..].starts_with(&photo), "the file differs");
    assert!(latin1(&body[..found]).contains("filename=\"photo.bin\""));
}

#[test]
fn curl_uploads_what_has_no_length() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::new();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stream");
    let bytes = pattern(2 * 1024 * 1024 + 17);
    std::fs::write(&file, &bytes).unwrap();
    let url = format!("http://{}/put", stand.agent.address());
    let input = std::fs::File::open(&file).unwrap();
    let output = Command::new("curl")
        .args([
            "--silent",
            "--max-time",
            "20",
            "--noproxy",
            "*",
            "-T",
            "-",
            &url,
        ])
        .stdin(input)
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"ok");
    let received = stand.service.next();
    assert_eq!(received.line(), "PUT /put HTTP/1.1");
    assert_eq!(received.header("transfer-encoding"), ["chunked"]);
    assert!(received.body == bytes);
}

/// curl waits a second for the word to go on, unless it comes.
#[test]
fn curl_is_told_to_go_on() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::of(Recorder::new());
    // A recorder reads the body before it answers, and says nothing before: curl waits in vain.
    let url = format!("http://{}/up", stand.agent.address());
    let upload = |url: &str, wait: &str| {
        let wait = ["--expect100-timeout", wait];
        let expect = ["-H", "Expect: 100-continue", "--data-binary", "hello"];
        curl(&[&wait[..], &expect, &[url]].concat())
    };
    assert_eq!(upload(&url, "0.3").stdout, b"ok");
    assert_eq!(stand.service.next().body, b"hello");

    let address = crate::common::service(|mut stream| {
        let _ = crate::common::read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
        let _ = std::io::Read::read_exact(&mut stream, &mut [0; 5]);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntold");
    });
    let agent = stand.server.agent("b", address);
    let began = Instant::now();
    let url = format!("http://{}/up", agent.address());
    assert_eq!(upload(&url, "15").stdout, b"told");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn curl_speaks_http_1_0_and_asks_for_heads() {
    if !have("curl", "curl") {
        return;
    }
    let stand = Stand::new();
    let url = format!("http://{}/", stand.agent.address());
    assert_eq!(curl(&["--http1.0", &url]).stdout, b"ok");
    assert_eq!(stand.service.next().line(), "GET / HTTP/1.1");
    // The same connection for all of them.
    assert_eq!(curl(&[&url, &url, &url]).stdout, b"okokok");
    let stand = Stand::of(Recorder::answering(
        "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n",
    ));
    let url = format!("http://{}/", stand.agent.address());
    let head = curl(&["--head", &url]).stdout;
    assert!(latin1(&head).to_lowercase().contains("content-length: 7"));
}

#[test]
fn nginx_serves_files_through_the_tunnel() {
    if !have("nginx", "nginx-light") || !have("curl", "curl") {
        return;
    }
    let nginx = Daemon::nginx(
        "client_max_body_size 1m;\nabsolute_redirect off;\n\
         location /moved { return 302 /file; }\nlocation /gone { return 204; }",
    );
    let content = pattern(5 * 1024 * 1024);
    std::fs::write(nginx.path().join("file"), &content).unwrap();
    let server = Server::start();
    let agent = server.agent("files", nginx.address);
    let base = format!("http://{}", agent.address());
    let file = format!("{base}/file");

    assert!(curl(&[&file]).stdout == content);
    assert!(curl(&["--range", "1000-1999", &file]).stdout == content[1000..2000]);
    let head = latin1(&curl(&["--head", &file]).stdout);
    assert!(
        head.contains(&format!("content-length: {}", content.len())),
        "{head}"
    );
    assert_eq!(
        head.to_lowercase().matches("\r\ndate:").count(),
        1,
        "{head}"
    );
    let etag = head
        .lines()
        .find_map(|line| line.strip_prefix("ETag: "))
        .unwrap();
    let condition = format!("If-None-Match: {etag}");
    let status = ["-o", "/dev/null", "-w", "%{http_code} %{redirect_url}"];
    let with = |more: &[&str]| latin1(&curl(&[&status, more].concat()).stdout);
    assert_eq!(with(&["-H", &condition, &file]), "304 ");
    assert_eq!(with(&[&format!("{base}/gone")]), "204 ");
    assert_eq!(with(&[&format!("{base}/moved")]), format!("302 {file}"));
    assert_eq!(with(&[&format!("{base}/nothing")]), "404 ");
    let upload = nginx.path().join("upload");
    std::fs::write(&upload, pattern(10 * 1024 * 1024)).unwrap();
    let data = format!("@{}", upload.display());
    assert_eq!(with(&["--data-binary", &data, &file]), "413 ");
    assert_eq!(
        with(&["-H", "Expect:", "--data-binary", &data, &file]),
        "413 "
    );
}

/// nginx closes a connection after so many requests; none of a visitor's is lost by that.
#[test]
fn nginx_may_close_its_connections() {
    if !have("nginx", "nginx-light") {
        return;
    }
    for lines in ["keepalive_requests 3;", "keepalive_timeout 0;"] {
        let nginx = Daemon::nginx(&format!("{lines}\nlocation / {{ return 200 served; }}"));
        let server = Server::start();
        let agent = server.agent("a", nginx.address);
        let mut visitor = connect(agent.address());
        for round in 0..100 {
            visitor
                .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                .unwrap();
            let answer = read_answer(&mut visitor, false);
            assert_eq!(answer.text(), "served", "{lines} {round}");
        }
    }
}

/// The usual place of an agent's port: behind a reverse proxy that does TLS.
#[test]
fn nginx_in_front_of_an_agents_port() {
    if !have("nginx", "nginx-light") || !have("curl", "curl") {
        return;
    }
    let stand = Stand::with(
        Recorder::echoing(),
        &[("http.trusted_proxies", "127.0.0.1")],
        &[],
    );
    let nginx = Daemon::nginx(&format!(
        "client_max_body_size 0;\n\
         location / {{ proxy_pass http://{};\nproxy_set_header Host $http_host;\n\
         proxy_set_header X-Forwarded-For 203.0.113.9;\n\
         proxy_set_header X-Forwarded-Proto https; }}",
        stand.agent.address()
    ));
    let file = nginx.path().join("upload");
    let bytes = pattern(5 * 1024 * 1024);
    std::fs::write(&file, &bytes).unwrap();
    let url = format!("http://{}/a%2Fb?c=%3F", nginx.address);
    let data = format!("@{}", file.display());
    assert!(curl(&["--data-binary", &data, &url]).stdout == bytes);
    let received = stand.service.next();
    assert_eq!(received.line(), "POST /a%2Fb?c=%3F HTTP/1.1");
    assert_eq!(received.header("host"), [nginx.address.to_string()]);
    assert_eq!(
        received.header("x-forwarded-for"),
        ["203.0.113.9, 127.0.0.1"]
    );
    assert_eq!(received.header("x-forwarded-proto"), ["https"]);
}
