//! What becomes of an exchange.

use super::*;

use tokio::task::yield_now;

#[tokio::test]
async fn requests_and_answers_arrive_as_sent() {
    let stage = Stage::new().await;
    let head = request(
        "GET",
        "/a%2Fb//x/../y?x=%3F",
        &[
            ("host", "visitor.test:8100"),
            ("x-latin", "caf\u{e9}"),
            ("cookie", "a=1"),
            ("x-empty", ""),
            ("cookie", "b=2"),
        ],
    );
    let exchange = stage.session.open(head, false);
    let mut service = stage.local.accept().await;
    let seen = service.head().await;
    let mut lines = seen.split("\r\n");
    assert_eq!(lines.next(), Some("GET /a%2Fb//x/../y?x=%3F HTTP/1.1"));
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    for line in [
        "host: visitor.test:8100",
        "x-latin: caf\u{e9}",
        "cookie: a=1",
        "x-empty: ",
        "cookie: b=2",
    ] {
        assert!(lines.contains(&line), "{line} isn't in {seen}");
    }
    assert_eq!(lines.len(), 5, "{seen}");

    let text = "HTTP/1.1 404 Nope\r\nset-cookie: a\r\nset-cookie: b\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello";
    service.send(text).await;
    let head = answer(&exchange).await;
    assert_eq!(head.status, 404);
    let cookies: Vec<_> = head
        .lines
        .iter()
        .filter(|(name, _)| *name == b"set-cookie")
        .map(|(_, value)| value)
        .collect();
    assert_eq!(cookies, [b"a", b"b"]);
    assert_eq!(line(&head, "content-length"), Some(&b"5"[..]));
    assert_eq!(line(&head, "connection"), None);
    assert_eq!(read(&exchange).await, Read::Data("hello".into()));
    assert_eq!(read(&exchange).await, Read::End(None));
    drop(exchange);
    stage.session.empty().await;
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let stage = Stage::new().await;
    let first = stage.session.get("/0");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("0").await;
    assert_eq!(whole(&first).await, (200, "0".into()));
    for number in 1..20 {
        let exchange = stage.session.get(&format!("/{number}"));
        let head = service.head().await;
        assert!(head.starts_with(&format!("GET /{number} ")), "{head}");
        service.answer(&number.to_string()).await;
        assert_eq!(whole(&exchange).await, (200, number.to_string()));
    }
}

#[tokio::test]
async fn a_small_answer_is_one_frame() {
    let stage = Stage::new().await;
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("small").await;
    assert_eq!(whole(&exchange).await, (200, "small".into()));
    assert_eq!(stage.session.frames.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn the_host_is_kept_or_replaced() {
    for (setting, sent, seen) in [
        (HostHeader::Preserve, Some("visitor.test"), "visitor.test"),
        (HostHeader::Preserve, None, "127.0.0.1:{port}"),
        (HostHeader::Target, Some("visitor.test"), "127.0.0.1:{port}"),
        (
            HostHeader::Value("other.test".into()),
            Some("visitor.test"),
            "other.test",
        ),
    ] {
        let stage = Stage::with(|config| config.local.host_header = setting).await;
        let lines: Vec<_> = sent.iter().map(|host| ("host", *host)).collect();
        let _exchange = stage.session.open(request("GET", "/", &lines), false);
        let head = stage.local.accept().await.head().await;
        let seen = seen.replace("{port}", &stage.local.port().to_string());
        assert_eq!(head, format!("GET / HTTP/1.1\r\nhost: {seen}\r\n\r\n"));
    }
}

#[tokio::test]
async fn other_targets_and_methods_pass() {
    let stage = Stage::new().await;
    for (method, target) in [
        ("OPTIONS", "*"),
        ("GET", "http://visitor.test/x?y"),
        ("BREW", "//pot"),
    ] {
        let head = request(method, target, &[("host", "visitor.test")]);
        let exchange = stage.session.open(head, false);
        let mut service = stage.local.accept().await;
        let head = service.head().await;
        service
            .send("HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
            .await;
        assert_eq!(whole(&exchange).await, (204, String::new()));
        assert!(
            head.starts_with(&format!("{method} {target} HTTP/1.1\r\n")),
            "{head}"
        );
    }
}

#[tokio::test]
async fn bodies_stream_both_ways_at_once() {
    let stage = Stage::new().await;
    let exchange = stage.session.post("/echo");
    let mut service = stage.local.accept().await;
    let head = service.head().await;
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    service
        .send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    assert_eq!(answer(&exchange).await.status, 200);
    for piece in ["one", "two", "six"] {
        exchange.send(piece.into()).unwrap();
        assert_eq!(
            service.until(&format!("3\r\n{piece}\r\n")).await.as_deref(),
            Some(&*format!("3\r\n{piece}\r\n"))
        );
        service.send(&format!("3\r\n{piece}\r\n")).await;
        assert_eq!(read(&exchange).await, Read::Data(piece.into()));
    }
    exchange.finish(None);
    assert_eq!(
        service.until("0\r\n\r\n").await.as_deref(),
        Some("0\r\n\r\n")
    );
    service.send("0\r\n\r\n").await;
    assert_eq!(read(&exchange).await, Read::End(None));

    // Both sides were complete, so the connection goes on.
    let exchange = stage.session.get("/next");
    assert!(service.head().await.starts_with("GET /next "));
    service.answer("next").await;
    assert_eq!(whole(&exchange).await, (200, "next".into()));
}

#[tokio::test]
async fn megabytes_pass_in_both_directions() {
    const SIZE: usize = 5 << 20;
    let stage = Stage::new().await;
    let length = SIZE.to_string();
    let lines = [("host", "visitor.test"), ("content-length", &*length)];
    let exchange = stage.session.open(request("PUT", "/", &lines), true);
    let mut service = stage.local.accept().await;
    let upload = async {
        let mut left = SIZE;
        while left > 0 {
            let room = poll_fn(|cx| exchange.poll_capacity(cx)).await.unwrap();
            let piece = room.min(left).min(10_000);
            exchange.send(vec![b'x'; piece].into()).unwrap();
            left -= piece;
        }
        exchange.finish(None);
    };
    let serve = async {
        let head = service.head().await;
        assert!(!head.contains("transfer-encoding"), "{head}");
        let mut body = std::mem::take(&mut service.buffer);
        while body.len() < SIZE {
            assert_ne!(service.stream.read_buf(&mut body).await.unwrap(), 0);
        }
        assert!(body.len() == SIZE && body.iter().all(|byte| *byte == b'x'));
        service.answer(&String::from_utf8(body).unwrap()).await;
    };
    let download = async {
        let (status, body) = whole(&exchange).await;
        assert_eq!((status, body.len()), (200, SIZE));
    };
    soon(async { tokio::join!(upload, serve, download) }).await;
}

#[tokio::test]
async fn a_get_may_have_a_body() {
    let stage = Stage::new().await;
    let head = request("GET", "/", &[("host", "visitor.test")]);
    let exchange = stage.session.open(head, true);
    exchange.send("query".into()).unwrap();
    exchange.finish(None);
    let mut service = stage.local.accept().await;
    assert!(service.head().await.contains("transfer-encoding: chunked"));
    assert!(service.until("5\r\nquery\r\n0\r\n\r\n").await.is_some());
}

#[tokio::test]
async fn a_length_without_a_body_is_refused() {
    let stage = Stage::new().await;
    let lines = [("host", "visitor.test"), ("content-length", "5")];
    let exchange = stage.session.open(request("POST", "/", &lines), false);
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);
    let lines = [("host", "visitor.test"), ("content-length", "0")];
    let _exchange = stage.session.open(request("POST", "/", &lines), false);
    let head = stage.local.accept().await.head().await;
    assert!(head.contains("content-length: 0\r\n"), "{head}");
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let stage = Stage::new().await;
    let lines = [
        ("host", "visitor.test"),
        ("te", "trailers"),
        ("trailer", "x-sum"),
    ];
    let exchange = stage.session.open(request("POST", "/", &lines), true);
    exchange.send("body".into()).unwrap();
    let mut trailers = LinesBuilder::default();
    trailers.push(b"x-sum", b"1").unwrap();
    let trailers = trailers.finish();
    exchange.finish(Some(trailers.clone()));
    let mut service = stage.local.accept().await;
    let head = service.head().await;
    assert!(head.contains("trailer: x-sum\r\n"), "{head}");
    assert!(head.contains("te: trailers\r\n"), "{head}");
    let sent = service.until("\r\n0\r\nx-sum: 1\r\n\r\n").await;
    assert_eq!(sent.as_deref(), Some("4\r\nbody\r\n0\r\nx-sum: 1\r\n\r\n"));

    let text = "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n4\r\nback\r\n0\r\nx-sum: 1\r\n\r\n";
    service.send(text).await;
    let head = answer(&exchange).await;
    assert_eq!(line(&head, "transfer-encoding"), None);
    assert_eq!(line(&head, "trailer"), Some(&b"x-sum"[..]));
    assert_eq!(read(&exchange).await, Read::Data("back".into()));
    assert_eq!(read(&exchange).await, Read::End(Some(trailers)));
}

#[tokio::test]
async fn interim_answers_pass() {
    let stage = Stage::new().await;
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service
        .send("HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n")
        .await;
    let HeadRead::Interim(hints) = super::head(&exchange).await else {
        panic!("no interim answer");
    };
    assert_eq!(hints.status, 103);
    assert_eq!(line(&hints, "link"), Some(&b"</a.css>"[..]));
    service.answer("done").await;
    assert_eq!(whole(&exchange).await, (200, "done".into()));
}

#[tokio::test]
async fn a_visitor_can_wait_for_the_service_to_want_the_body() {
    let stage = Stage::new().await;
    let lines = [
        ("host", "visitor.test"),
        ("expect", "100-continue"),
        ("content-length", "4"),
    ];
    let exchange = stage.session.open(request("PUT", "/", &lines), true);
    let mut service = stage.local.accept().await;
    assert!(service.head().await.contains("expect: 100-continue\r\n"));
    service.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    let HeadRead::Interim(head) = super::head(&exchange).await else {
        panic!("no interim answer");
    };
    assert_eq!(head.status, 100);
    exchange.send("body".into()).unwrap();
    exchange.finish(None);
    assert_eq!(service.until("body").await.as_deref(), Some("body"));
    service.answer("thanks").await;
    assert_eq!(whole(&exchange).await, (200, "thanks".into()));
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_is_complete() {
    let stage = Stage::new().await;
    let exchange = stage.session.post("/");
    exchange.send("some".into()).unwrap();
    let mut service = stage.local.accept().await;
    service.head().await;
    service
        .send("HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        .await;
    assert_eq!(whole(&exchange).await, (413, "no".into()));
    // Its next request would be taken for the rest of this one's body.
    within_a_second(service.closed()).await;
    drop(exchange);
    stage.session.empty().await;
}

#[tokio::test]
async fn head_and_empty_answers_have_no_body() {
    let stage = Stage::new().await;
    let head = request("HEAD", "/", &[("host", "visitor.test")]);
    let exchange = stage.session.open(head, false);
    let mut service = stage.local.accept().await;
    service.head().await;
    service
        .send("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        .await;
    let head = answer(&exchange).await;
    assert_eq!(line(&head, "content-length"), Some(&b"1000"[..]));
    assert_eq!(read(&exchange).await, Read::End(None));
    for status in ["204 No Content", "304 Not Modified"] {
        let exchange = stage.session.get("/");
        service.head().await;
        service.send(&format!("HTTP/1.1 {status}\r\n\r\n")).await;
        let (code, body) = whole(&exchange).await;
        assert!(status.starts_with(&code.to_string()) && body.is_empty());
    }
}

#[tokio::test]
async fn a_visitor_who_leaves_cancels_at_the_service() {
    let stage = Stage::new().await;

    // While the head is awaited.
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    drop(exchange);
    within_a_second(service.closed()).await;
    stage.session.empty().await;

    // In the middle of the answer.
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service
        .send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        .await;
    answer(&exchange).await;
    drop(exchange);
    within_a_second(service.closed()).await;
    stage.session.empty().await;

    // In the middle of an upload: the service must not take it for complete.
    let exchange = stage.session.post("/");
    exchange.send("half".into()).unwrap();
    let mut service = stage.local.accept().await;
    service.head().await;
    assert!(service.until("half\r\n").await.is_some());
    exchange.fail(Reason::BodyIncomplete);
    assert_eq!(within_a_second(service.until("0\r\n")).await, None);
    assert_eq!(refused(&exchange).await, Reason::Cancelled);
    drop(exchange);
    stage.session.empty().await;
}

#[tokio::test]
async fn a_visitor_who_stops_reading_stalls_only_his_connection() {
    let stage = Stage::new().await;
    let stalled = stage.session.get("/large");
    let mut service = stage.local.accept().await;
    service.head().await;
    service
        .send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        .await;
    let writer = async {
        loop {
            service.stream.write_all(&[b'x'; 65536]).await.unwrap();
        }
    };
    // The kernel's buffers and ours are full when nothing moves any more.
    let mut writer = std::pin::pin!(writer);
    let full = timeout(Duration::from_millis(300), writer.as_mut()).await;
    assert!(full.is_err());
    for _ in 0..3 {
        let exchange = stage.session.get("/small");
        let mut other = stage.local.accept().await;
        other.head().await;
        other
            .send("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok")
            .await;
        drop(other);
        assert_eq!(whole(&exchange).await, (200, "ok".into()));
    }
    assert_eq!(answer(&stalled).await.status, 200);
    drop(stalled);
    stage.session.empty().await;
}

#[tokio::test]
async fn a_broken_answer_ends_after_what_came() {
    for text in [
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let stage = Stage::new().await;
        let exchange = stage.session.get("/");
        let mut service = stage.local.accept().await;
        service.head().await;
        service.send(text).await;
        drop(service);
        assert_eq!(answer(&exchange).await.status, 200);
        assert_eq!(read(&exchange).await, Read::Data("half".into()));
        assert_eq!(read(&exchange).await, Read::Reset(Reason::UpstreamError));
        drop(exchange);
        stage.session.empty().await;
    }
}

#[tokio::test]
async fn what_is_no_answer_is_an_error_of_the_service() {
    for text in [
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nx: y",
    ] {
        let stage = Stage::new().await;
        let exchange = stage.session.get("/");
        let mut service = stage.local.accept().await;
        service.head().await;
        service.send(text).await;
        drop(service);
        assert_eq!(refused(&exchange).await, Reason::UpstreamError, "{text:?}");
    }
}

#[tokio::test]
async fn an_idempotent_request_is_tried_once_more() {
    let stage = Stage::new().await;
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    drop(service);
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("second").await;
    assert_eq!(whole(&exchange).await, (200, "second".into()));

    // Not a third time.
    let exchange = stage.session.get("/");
    service.head().await;
    drop(service);
    let mut service = stage.local.accept().await;
    service.head().await;
    drop(service);
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);
}

#[tokio::test]
async fn a_request_that_may_have_had_an_effect_is_not_repeated() {
    let stage = Stage::new().await;
    // A method that isn't idempotent, a body, an answer's beginning.
    let post = request("POST", "/", &[("host", "visitor.test")]);
    let exchange = stage.session.open(post, false);
    stage.local.accept().await.head().await;
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);

    let put = request("PUT", "/", &[("host", "v"), ("content-length", "4")]);
    let exchange = stage.session.open(put, true);
    exchange.send("body".into()).unwrap();
    exchange.finish(None);
    let mut service = stage.local.accept().await;
    assert!(service.until("body").await.is_some());
    drop(service);
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);

    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.send("HTTP/1.1 102 Processing\r\n\r\n").await;
    drop(service);
    while let HeadRead::Interim(_) = super::head(&exchange).await {}
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);
}

#[tokio::test]
async fn a_connection_the_service_closed_is_replaced() {
    let stage = Stage::new().await;
    for _ in 0..3 {
        let post = request("POST", "/", &[("host", "visitor.test")]);
        let exchange = stage.session.open(post, false);
        let mut service = stage.local.accept().await;
        service.head().await;
        service.answer("ok").await;
        assert_eq!(whole(&exchange).await, (200, "ok".into()));
        drop(service);
    }
}

#[tokio::test]
async fn exchanges_wait_for_a_connection_in_order() {
    let stage = Stage::with(|config| config.local.max_connections = 2).await;
    let mut exchanges: Vec<_> = (0..6)
        .map(|number| Some(stage.session.get(&format!("/{number}"))))
        .collect();
    let mut services = [stage.local.accept().await, stage.local.accept().await];
    let mut served = Vec::new();
    for service in &mut services {
        served.push(target(&service.head().await));
    }
    served.sort();
    assert_eq!(served, ["/0", "/1"]);
    // Of the third nobody hears: its visitor leaves while it waits.
    exchanges[2] = None;
    while stage.session.link.exchanges() > 5 {
        yield_now().await;
    }
    for next in 3..6 {
        let service = &mut services[next % 2];
        service.answer("ok").await;
        assert_eq!(target(&service.head().await), format!("/{next}"));
    }
    for service in &mut services {
        service.answer("ok").await;
    }
    for exchange in exchanges.into_iter().flatten() {
        assert_eq!(whole(&exchange).await, (200, "ok".into()));
    }
    stage.session.empty().await;
}

fn target(head: &str) -> String {
    head.split(' ').nth(1).unwrap().to_owned()
}

#[tokio::test]
async fn the_service_has_its_time_to_answer_and_no_more() {
    let stage = Stage::with(|config| {
        config.local.response_timeout = Duration::from_millis(200);
        config.local.max_connections = 1;
    })
    .await;
    let since = tokio::time::Instant::now();
    let served = stage.session.get("/served");
    let waiting = stage.session.get("/waiting");
    let mut service = stage.local.accept().await;
    service.head().await;
    assert_eq!(refused(&served).await, Reason::UpstreamTimeout);
    assert!(since.elapsed() >= Duration::from_millis(200));
    within_a_second(service.closed()).await;
    // It had its turn, or had waited too long for one: the same to the visitor.
    assert_eq!(refused(&waiting).await, Reason::UpstreamTimeout);

    // Only the head has to come in time.
    let slow = stage.session.get("/slow");
    let mut service = loop {
        // The one that waited may still have a connection to its name.
        let mut service = stage.local.accept().await;
        if service
            .until("\r\n\r\n")
            .await
            .is_some_and(|head| head.contains("/slow"))
        {
            break service;
        }
    };
    service
        .send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
        .await;
    assert_eq!(answer(&slow).await.status, 200);
    tokio::time::sleep(Duration::from_millis(400)).await;
    service.send("body").await;
    assert_eq!(read(&slow).await, Read::Data("body".into()));
}

#[tokio::test]
async fn nobody_listens() {
    let stage = Stage::with(|config| {
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        config.local.service_url.address.port = free.local_addr().unwrap().port();
    })
    .await;
    for _ in 0..3 {
        let exchange = stage.session.get("/");
        assert_eq!(refused(&exchange).await, Reason::UpstreamRefused);
    }
    stage.session.empty().await;
}

#[tokio::test]
async fn unused_connections_are_closed_after_a_while() {
    let idle_timeout = Duration::from_millis(200);
    let stage = Stage::with(|config| config.local.idle_timeout = idle_timeout).await;
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("ok").await;
    assert_eq!(whole(&exchange).await, (200, "ok".into()));
    let since = tokio::time::Instant::now();
    soon(service.closed()).await;
    // It was idle since a moment before.
    assert!(since.elapsed() >= idle_timeout - Duration::from_millis(50));
    // And the next one opens a new one.
    let exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("again").await;
    assert_eq!(whole(&exchange).await, (200, "again".into()));
}

#[tokio::test]
async fn the_end_of_the_tunnel_ends_every_exchange_at_the_service() {
    let stage = Stage::new().await;
    let _exchange = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    stage.session.connection.abort();
    within_a_second(service.closed()).await;
}

#[tokio::test]
async fn many_at_once_get_their_own_answers() {
    let stage = Stage::with(|config| config.local.max_connections = 8).await;
    let local = async {
        loop {
            let mut service = stage.local.accept().await;
            tokio::spawn(async move {
                while let Some(head) = service.until("\r\n\r\n").await {
                    let target = target(&head);
                    for _ in 0..target.len() % 3 {
                        yield_now().await;
                    }
                    service.answer(&target).await;
                }
            });
        }
    };
    let visitors = async {
        for round in 0..20 {
            let exchanges: Vec<_> = (0..60)
                .map(|number| format!("/{round}/{number}"))
                .map(|target| (stage.session.get(&target), target))
                .collect();
            for (exchange, target) in exchanges {
                assert_eq!(whole(&exchange).await, (200, target));
            }
        }
    };
    tokio::select! {
        () = local => {}
        () = visitors => {}
    }
    stage.session.empty().await;
}

mod https {
    use super::*;

    use crate::config::PemFile;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio_rustls::TlsAcceptor;

    const CERTIFICATE: &[u8] = include_bytes!("service.pem");
    const KEY: &[u8] = include_bytes!("service-key.pem");

    fn acceptor() -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certificates = CertificateDer::pem_slice_iter(CERTIFICATE)
            .collect::<Result<_, _>>()
            .unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, PrivateKeyDer::from_pem_slice(KEY).unwrap())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    async fn stage(tls: LocalTls) -> Stage {
        Stage::with(|config| {
            config.local.service_url.scheme = Scheme::Https;
            config.local.tls = tls;
        })
        .await
    }

    #[tokio::test]
    async fn the_service_is_recognised_by_its_certificate() {
        let ca_file = PemFile {
            path: "service.pem".into(),
            pem: CERTIFICATE.into(),
        };
        for tls in [
            LocalTls {
                ca_file: Some(ca_file.clone()),
                server_name: Some("service.test".into()),
                insecure: false,
            },
            LocalTls {
                insecure: true,
                ..LocalTls::default()
            },
        ] {
            let stage = stage(tls).await;
            let exchange = stage.session.get("/");
            let stream = stage.local.accept().await.stream;
            let mut stream = soon(acceptor().accept(stream)).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                assert_ne!(soon(stream.read_buf(&mut head)).await.unwrap(), 0);
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            stream.write_all(answer).await.unwrap();
            assert_eq!(whole(&exchange).await, (200, "ok".into()));
        }

        // The right authority, the wrong name.
        let stage = stage(LocalTls {
            ca_file: Some(ca_file),
            ..LocalTls::default()
        })
        .await;
        let exchange = stage.session.get("/");
        let stream = stage.local.accept().await.stream;
        assert!(soon(acceptor().accept(stream)).await.is_err());
        assert_eq!(refused(&exchange).await, Reason::UpstreamRefused);
    }

    #[test]
    fn unusable_settings_are_named() {
        let mut config = config((Ipv4Addr::LOCALHOST, 1).into(), 2);
        config.local.service_url.scheme = Scheme::Https;
        config.local.tls.ca_file = Some(PemFile {
            path: "empty.pem".into(),
            pem: Arc::from(&b"nothing"[..]),
        });
        let error = Agent::new(config.clone()).unwrap_err().to_string();
        assert!(error.starts_with("local.tls.ca_file: empty.pem"), "{error}");
        config.local.tls.server_name = Some("not a name".into());
        let error = Agent::new(config).unwrap_err().to_string();
        assert!(error.starts_with("local.tls.server_name"), "{error}");
    }
}
