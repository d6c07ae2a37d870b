//! What services that speak HTTP/2 get from an agent, and what becomes of their answers.

use std::future::Future;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::client::{Client, read, reason, request, run};
use crate::common::raw::{channel, pattern, read_to_close, settles, take};
use crate::common::{
    self, Agent, Server, eventually, get, port_range, request as request_http1, text_service,
};
use crate::service::listen;

type Call = (Request<RecvStream>, SendResponse<Bytes>);

/// A service that speaks HTTP/2 and nothing else, on a thread of its own. It is given the number of
/// the connection with each call.
fn service<F>(
    builder: h2::server::Builder,
    answer: impl Fn(usize, Call) -> F + Send + Sync + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    service_on(builder, |stream| async { Ok(stream) }, answer)
}

/// The same on what `open` makes of its sockets.
fn service_on<F, S, T>(
    builder: h2::server::Builder,
    open: impl Fn(TcpStream) -> S + Send + 'static,
    answer: impl Fn(usize, Call) -> F + Send + Sync + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
    S: Future<Output = io::Result<T>> + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = Arc::new(answer);
    listen(move |number, stream| {
        let (builder, answer) = (builder.clone(), answer.clone());
        let opened = open(stream);
        tokio::spawn(async move {
            let Ok(stream) = opened.await else {
                return;
            };
            let Ok(mut connection) = builder.handshake(stream).await else {
                return;
            };
            while let Some(Ok(call)) = connection.accept().await {
                let ends = call.0.headers().contains_key("x-last");
                let goes_dark = call.0.headers().contains_key("x-die");
                let task = tokio::spawn(answer(number, call));
                if ends {
                    connection.graceful_shutdown();
                }
                if goes_dark {
                    // What it has said is written, and then it is gone.
                    let alive = std::future::poll_fn(|cx| connection.poll_closed(cx));
                    let _ = tokio::time::timeout(Duration::from_millis(300), alive).await;
                    task.abort();
                    return;
                }
            }
        });
    })
}

fn builder() -> h2::server::Builder {
    h2::server::Builder::new()
}

/// Sends a call's body back, with what came as its head, and its trailers as trailers.
async fn echo(_: usize, (request, mut respond): Call) {
    let (parts, mut body) = request.into_parts();
    let mut response = Response::new(());
    let told = format!("{} {}", parts.method, parts.uri);
    let headers = response.headers_mut();
    headers.insert("x-asked", told.parse().unwrap());
    for (name, value) in &parts.headers {
        let name = format!("x-got-{name}").parse::<http::HeaderName>().unwrap();
        headers.append(name, value.clone());
    }
    let Ok(mut send) = respond.send_response(response, false) else {
        return;
    };
    while let Some(Ok(data)) = body.data().await {
        let length = data.len();
        if !crate::client::upload(&mut send, data).await {
            return;
        }
        let _ = body.flow_control().release_capacity(length);
    }
    let Ok(trailers) = body.trailers().await else {
        return;
    };
    let mut trailers = trailers.unwrap_or_default();
    trailers.insert("x-end", HeaderValue::from_static("yes"));
    let _ = send.send_trailers(trailers);
}

/// A server and an agent that speaks HTTP/2 to its service.
fn stand(service: SocketAddr) -> (Server, Agent) {
    stand_with(service, &[])
}

fn stand_with(service: SocketAddr, settings: &[(&str, &str)]) -> (Server, Agent) {
    let server = Server::with(port_range(4), &[]);
    let settings = [&[("local.protocol", "h2c")], settings].concat();
    let agent = server.agent_with("a", service, &settings);
    (server, agent)
}

#[test]
fn a_service_gets_the_request_of_any_visitor() {
    let (server, agent) = stand(service(builder(), echo));
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let (answer, mut send) = {
            let mut asked = request("POST", "/a%20b?q=%2f");
            let headers = asked.headers_mut();
            headers.insert("te", HeaderValue::from_static("trailers"));
            headers.append("x-two", HeaderValue::from_static("a"));
            headers.append("x-two", HeaderValue::from_static("b"));
            client.begin(asked, false).await
        };
        send.send_data(Bytes::from_static(b"hel"), false).unwrap();
        send.send_data(Bytes::from_static(b"lo"), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("5"));
        send.send_trailers(trailers).unwrap();
        let answer = read(answer.await.unwrap()).await;
        assert_eq!(
            answer.header("x-asked"),
            "POST http://host.test/a%20b?q=%2f"
        );
        assert_eq!(answer.header("x-got-te"), "trailers");
        assert_eq!(answer.headers.get_all("x-got-x-two").iter().count(), 2);
        assert_eq!(answer.header("x-got-x-forwarded-for"), "127.0.0.1");
        assert_eq!(answer.header("x-got-x-forwarded-host"), "host.test");
        assert!(!answer.headers.contains_key("x-got-connection"));
        assert_eq!(answer.text(), "hello");
        assert_eq!(answer.trailer("x-sum"), "5");
        assert_eq!(answer.trailer("x-end"), "yes");

        let answer = client.ask(request("OPTIONS", "*")).await;
        assert!(
            answer.header("x-asked").starts_with("OPTIONS"),
            "{answer:?}"
        );
        let body = pattern(3 << 20);
        assert!(client.post(request("PUT", "/"), body.clone()).await.body == body);
    });
    // HTTP/1.1 at the visitor's end.
    let body = pattern(100_000);
    let headers = [("X-One", "1")];
    let answer = request_http1(agent.address(), "POST", "/x", &headers, &body);
    assert_eq!(answer.header("x-got-x-one"), ["1"]);
    assert_eq!(answer.header("x-got-content-length"), ["100000"]);
    assert!(answer.body == body);
    let asked = format!("POST http://{}/x", agent.address());
    assert_eq!(answer.header("x-asked"), [&asked[..]]);
    // What HTTP/2 has no word for isn't offered; the answer is an ordinary one.
    let headers = [("Connection", "Upgrade"), ("Upgrade", "websocket")];
    let answer = request_http1(agent.address(), "GET", "/ws", &headers, b"");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.header("x-got-upgrade").is_empty(), "{answer:?}");
    settles(&server);
}

#[test]
fn grpc_alone_goes_as_http2_if_that_is_left_to_the_agent() {
    let http2 = service(builder(), echo);
    // Passes connections on to one of two services, by their first bytes.
    let http1 = text_service("http1");
    let both = common::service(move |mut visitor| {
        let mut first = [0; 3];
        visitor.peek(&mut first).unwrap();
        let target = if &first == b"PRI" { http2 } else { http1 };
        let mut service = common::connect(target);
        service.set_read_timeout(None).unwrap();
        let (mut back, mut answer) = (visitor.try_clone().unwrap(), service.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut answer, &mut back));
        let _ = std::io::copy(&mut visitor, &mut service);
    });
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent_with("a", both, &[("local.protocol", "auto")]);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        for _ in 0..3 {
            assert_eq!(client.ask(request("GET", "/")).await.text(), "http1");
            let mut asked = request("POST", "/");
            let kind = HeaderValue::from_static("application/grpc+proto");
            asked.headers_mut().insert("content-type", kind);
            let answer = client.post(asked, "grpc").await;
            assert_eq!(answer.text(), "grpc");
            assert_eq!(answer.trailer("x-end"), "yes");
        }
    });
    assert_eq!(get(agent.address(), "/").text(), "http1");
}

#[test]
fn a_status_in_the_head_alone_stays_alone() {
    let address = service(builder(), |_, (_, mut respond): Call| async move {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        headers.insert("grpc-status", HeaderValue::from_static("12"));
        respond.send_response(response, true).unwrap();
    });
    let (_server, agent) = stand(address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        for _ in 0..20 {
            let (answer, _send) = client.begin(request("POST", "/"), false).await;
            let answer = answer.await.unwrap();
            assert_eq!(answer.headers()["grpc-status"], "12");
            assert!(answer.body().is_end_stream());
        }
    });
}

#[test]
fn a_service_that_dies_midway_gives_no_clean_end() {
    let address = service(builder(), |_, (_, mut respond): Call| async move {
        let mut send = respond.send_response(Response::new(()), false).unwrap();
        let _ = send.send_data(Bytes::from_static(b"half"), false);
        std::future::pending::<()>().await;
    });
    let (server, agent) = stand(address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let mut asked = request("GET", "/");
        let headers = asked.headers_mut();
        headers.insert("x-die", HeaderValue::from_static("1"));
        let answer = client.ask(asked).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "half"));
        assert_eq!(answer.broken, Some(h2::Reason::INTERNAL_ERROR));
    });
    let mut visitor = common::raw::send(
        agent.address(),
        "GET / HTTP/1.1\r\nHost: h\r\nX-Die: 1\r\n\r\n",
    );
    let (bytes, _) = read_to_close(&mut visitor);
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.ends_with("4\r\nhalf\r\n"), "{text}");
    settles(&server);
}

#[test]
fn resets_pass_both_ways() {
    let (sender, resets) = channel();
    let sender = Arc::new(sender);
    let address = service(builder(), move |_, (request, mut respond): Call| {
        let sender = sender.clone();
        async move {
            if request.uri().path() == "/waits" {
                let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                let _ = sender
                    .lock()
                    .unwrap()
                    .send((reset.unwrap(), Instant::now()));
                return;
            }
            let code: u32 = request.uri().path()[1..].parse().unwrap();
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            let _ = send.send_data(Bytes::from_static(b"half"), false);
            // h2 drops what isn't written when a stream is reset.
            tokio::time::sleep(Duration::from_millis(50)).await;
            send.send_reset(code.into());
        }
    });
    let (server, agent) = stand(address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        for (code, seen) in [
            (h2::Reason::CANCEL, h2::Reason::CANCEL),
            (h2::Reason::ENHANCE_YOUR_CALM, h2::Reason::ENHANCE_YOUR_CALM),
            (h2::Reason::INTERNAL_ERROR, h2::Reason::INTERNAL_ERROR),
            (h2::Reason::PROTOCOL_ERROR, h2::Reason::INTERNAL_ERROR),
        ] {
            let path = format!("/{}", u32::from(code));
            let answer = client.ask(request("GET", &path)).await;
            assert_eq!(
                (answer.text().as_str(), answer.broken),
                ("half", Some(seen))
            );
        }
        let (_answer, mut send) = client.begin(request("POST", "/waits"), false).await;
        send.send_data(Bytes::from_static(b"x"), false).unwrap();
        while server.metric("silo_exchanges_open", "") < 1.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let left = Instant::now();
        send.send_reset(h2::Reason::CANCEL);
        // Lets the connection write it.
        while server.metric("silo_exchanges_open", "") > 0.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (reset, at) = take(&resets, "a reset at the service");
        assert_eq!(reset, h2::Reason::CANCEL);
        assert!(at.saturating_duration_since(left) < Duration::from_secs(1));
    });
    settles(&server);
}

/// A service that renews its connections all the time, as gRPC ones do, loses no request.
#[test]
fn connections_that_go_away_cost_no_request() {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let address = service(builder(), move |number, call| {
        seen.fetch_max(number + 1, Ordering::Relaxed);
        echo(number, call)
    });
    let (server, agent) = stand(address);
    run(async {
        let client = Client::connect(agent.address()).await;
        let all = (0..8).map(|task| {
            let send = client.send.clone();
            async move {
                let connection = tokio::spawn(std::future::pending());
                let mut client = Client { send, connection };
                for index in 0..25 {
                    let mut asked = request("POST", "/");
                    if index % 5 == task % 5 {
                        let headers = asked.headers_mut();
                        headers.insert("x-last", HeaderValue::from_static("1"));
                    }
                    let answer = client.post(asked, "body").await;
                    assert_eq!((answer.status, answer.text().as_str()), (200, "body"));
                }
            }
        });
        futures_util::future::join_all(all).await;
    });
    settles(&server);
    assert!(count.load(Ordering::Relaxed) > 5);
}

#[test]
fn a_refused_stream_is_tried_once_more() {
    let refusals = Arc::new(AtomicUsize::new(1));
    let left = refusals.clone();
    let address = service(builder(), move |number, (request, mut respond): Call| {
        let refused = left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .is_ok();
        async move {
            match refused {
                true => respond.send_reset(h2::Reason::REFUSED_STREAM),
                false => echo(number, (request, respond)).await,
            }
        }
    });
    let (_server, agent) = stand(address);
    run(async {
        let mut client = Client::connect(agent.address()).await;
        let answer = client.post(request("POST", "/"), "body").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "body"));
        refusals.store(2, Ordering::Relaxed);
        let answer = client.post(request("POST", "/"), "body").await;
        assert_eq!(answer.status, 502);
        // More than is kept can't be sent again.
        refusals.store(1, Ordering::Relaxed);
        let answer = client.post(request("POST", "/"), pattern(100_000)).await;
        assert!(answer.status == 502 || answer.body == pattern(100_000));
    });
}

#[test]
fn a_service_that_takes_few_streams_gets_more_connections() {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = gate.clone();
    let connections = Arc::new(AtomicUsize::new(0));
    let seen = connections.clone();
    let mut few = builder();
    few.max_concurrent_streams(2);
    let address = service(few, move |number, call| {
        let gate = gate.clone();
        seen.fetch_max(number + 1, Ordering::Relaxed);
        async move {
            let _pass = gate.acquire().await.unwrap();
            echo(number, call).await;
        }
    });
    let (server, agent) = stand_with(address, &[("local.idle_timeout", "1s")]);
    run(async {
        let client = Client::connect(agent.address()).await;
        let ask = |path: &'static str| {
            let send = client.send.clone();
            async move {
                let connection = tokio::spawn(std::future::pending());
                let mut client = Client { send, connection };
                client.ask(request("GET", path)).await.status
            }
        };
        opened.add_permits(1);
        // From now on it is known how many one takes.
        assert_eq!(ask("/").await, 200);
        opened.forget_permits(1);
        let all = futures_util::future::join_all((0..5).map(|_| ask("/")));
        let open = async {
            while connections.load(Ordering::Relaxed) < 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            opened.add_permits(5);
        };
        let (statuses, ()) = tokio::join!(all, open);
        assert_eq!(statuses, [200; 5]);
    });
    assert!(connections.load(Ordering::Relaxed) <= 4);
    settles(&server);
    let descriptors = agent.process.descriptors();
    let limit = Duration::from_secs(10);
    eventually(limit, "unused connections are closed", || {
        agent.process.descriptors() + 2 < descriptors
    });
}

#[test]
fn a_service_that_gives_no_answer_is_told_of() {
    let address = service(builder(), |_, (_, mut respond): Call| async move {
        let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
    });
    let (server, agent) = stand_with(address, &[("local.response_timeout", "500ms")]);
    let answer = get(agent.address(), "/");
    assert_eq!(answer.status, 504);
    assert_eq!(answer.header("x-silo-error"), ["upstream_timeout"]);

    // One that speaks HTTP/1 only.
    let agent = server.agent_with("b", text_service("x"), &[("local.protocol", "h2c")]);
    let answer = get(agent.address(), "/");
    assert_eq!(
        (answer.status, answer.header("x-silo-error").join("")),
        (502, "upstream_error".into())
    );

    let nobody = "127.0.0.1:1".parse().unwrap();
    let agent = server.agent_with("b", nobody, &[("local.protocol", "h2c")]);
    let answer = get(agent.address(), "/");
    assert_eq!(answer.header("x-silo-error"), ["upstream_refused"]);
}

#[test]
fn a_head_that_is_too_large_is_no_answer() {
    let address = service(builder(), |_, (_, mut respond): Call| async move {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::OK;
        for index in 0..64 {
            let name = format!("x-{index}").parse::<http::HeaderName>().unwrap();
            let value = HeaderValue::from_str(&"x".repeat(16 << 10)).unwrap();
            response.headers_mut().insert(name, value);
        }
        let _ = respond.send_response(response, true);
    });
    let (_server, agent) = stand(address);
    let answer = get(agent.address(), "/");
    assert_eq!(answer.status, 502);
    assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
}

/// A visitor who doesn't read one answer stops no other, though they share the connection.
#[test]
fn a_slow_visitor_stops_nobody_at_the_service() {
    let address = service(builder(), |_, (request, mut respond): Call| async move {
        let size = match request.uri().path() {
            "/large" => 8 << 20,
            _ => 1000,
        };
        let mut send = respond.send_response(Response::new(()), false).unwrap();
        if crate::client::upload(&mut send, pattern(size).into()).await {
            let _ = send.send_data(Bytes::new(), true);
        }
    });
    let (_server, agent) = stand(address);
    let mut slow: Vec<_> = (0..4).map(|_| common::connect(agent.address())).collect();
    for visitor in &mut slow {
        let asked = "GET /large HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
        visitor.write_all(asked.as_bytes()).unwrap();
    }
    for _ in 0..50 {
        assert!(get(agent.address(), "/").body == pattern(1000));
    }
    for mut visitor in slow {
        let answer = common::read_answer(&mut visitor, false);
        assert!(answer.body == pattern(8 << 20));
    }
}

/// A visitor that leaves while he sends is seen by the service, and the body isn't whole.
#[test]
fn a_body_that_breaks_off_is_not_whole_at_the_service() {
    let (sender, ends) = channel();
    let sender = Arc::new(sender);
    let address = service(builder(), move |_, (request, _respond): Call| {
        let sender = sender.clone();
        async move {
            let mut body = request.into_body();
            let end = loop {
                match body.data().await {
                    Some(Ok(_)) => sender.lock().unwrap().send(None).unwrap(),
                    Some(Err(error)) => break Some(reason(&error)),
                    None => panic!("it is whole"),
                }
            };
            sender.lock().unwrap().send(end).unwrap();
        }
    });
    let (_server, agent) = stand(address);
    let visitor = common::raw::send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf",
    );
    assert!(take(&ends, "half a body").is_none());
    drop(visitor);
    assert!(take(&ends, "the end of the body").is_some());
}

#[test]
fn over_tls_http2_is_agreed_upon() {
    let key = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let serve = |alpn: &'static [u8]| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![key.cert.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der())
                    .unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![alpn.to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        service_on(builder(), move |stream| acceptor.accept(stream), echo)
    };
    let server = Server::with(port_range(4), &[]);
    let settings = [("local.protocol", "h2c"), ("local.tls.insecure", "true")];
    for (id, alpn, status) in [("h2", &b"h2"[..], 200), ("http1", b"http/1.1", 502)] {
        let url = format!("https://{}", serve(alpn));
        let process = server.start_agent(id, &url, &settings);
        let line = process.wait_for(&["connected", "port="]);
        let rest = line.split("port=").nth(1).unwrap();
        let port = rest.split_whitespace().next().unwrap().parse().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let answer = get(address, "/");
        assert_eq!(answer.status, status, "{id}");
        if status == 200 {
            let asked = format!("GET https://{address}/");
            assert_eq!(answer.header("x-asked"), [&asked[..]]);
        }
    }
}
