//! Exchanges that go on with another protocol.

use super::*;

const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\nx-y: z\r\n\r\n";

impl Session {
    fn upgrade(&self) -> Exchange {
        let lines = [("host", "visitor.test"), ("upgrade", "echo, other/2")];
        self.open(request("GET", "/", &lines), true)
    }
}

/// An exchange whose service has agreed, and the service's connection.
async fn upgraded(stage: &Stage) -> (Exchange, Connection) {
    let exchange = stage.session.upgrade();
    let mut service = stage.local.accept().await;
    let head = service.head().await;
    assert!(head.contains("\r\nupgrade: echo, other/2\r\nconnection: upgrade\r\n"));
    assert!(!head.contains("transfer-encoding"), "{head}");
    service.send(SWITCH).await;
    let head = answer(&exchange).await;
    assert_eq!(head.status, 101);
    assert_eq!(line(&head, "upgrade"), Some(&b"echo"[..]));
    assert_eq!(line(&head, "x-y"), Some(&b"z"[..]));
    assert_eq!(line(&head, "connection"), None);
    (exchange, service)
}

#[tokio::test]
async fn bytes_pass_both_ways_and_each_way_ends_by_itself() {
    for visitor_first in [true, false] {
        let stage = Stage::new().await;
        let (exchange, mut service) = upgraded(&stage).await;
        exchange.send("to service".into()).unwrap();
        assert_eq!(
            service.until("service").await.as_deref(),
            Some("to service")
        );
        service.send("back").await;
        assert_eq!(read(&exchange).await, Read::Data("back".into()));
        if visitor_first {
            exchange.finish(None);
            assert_eq!(service.until("?").await, None);
            service.send("more").await;
            assert_eq!(read(&exchange).await, Read::Data("more".into()));
            drop(service);
            assert_eq!(read(&exchange).await, Read::End(None));
        } else {
            service.stream.shutdown().await.unwrap();
            assert_eq!(read(&exchange).await, Read::End(None));
            exchange.send("more".into()).unwrap();
            assert_eq!(service.until("more").await.as_deref(), Some("more"));
            exchange.finish(None);
            assert_eq!(service.until("?").await, None);
        }
        drop(exchange);
        stage.session.empty().await;
    }
}

#[tokio::test]
async fn bytes_behind_the_101_are_the_protocols() {
    let stage = Stage::new().await;
    let exchange = stage.session.upgrade();
    let mut service = stage.local.accept().await;
    service.head().await;
    service.send(&format!("{SWITCH}first")).await;
    assert_eq!(answer(&exchange).await.status, 101);
    assert_eq!(read(&exchange).await, Read::Data("first".into()));
}

#[tokio::test]
async fn a_service_may_refuse_and_serve_the_next_request() {
    let stage = Stage::new().await;
    let exchange = stage.session.upgrade();
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("no").await;
    assert_eq!(whole(&exchange).await, (200, "no".into()));
    exchange.finish(None);
    drop(exchange);
    let exchange = stage.session.get("/next");
    assert!(service.head().await.starts_with("GET /next "));
    service.answer("next").await;
    assert_eq!(whole(&exchange).await, (200, "next".into()));
}

/// A server that isn't ours may not wait for the 101.
#[tokio::test]
async fn early_bytes_never_reach_the_service() {
    let stage = Stage::new().await;
    let blocker = stage.session.upgrade();
    let mut service = stage.local.accept().await;
    service.head().await;
    blocker.send("early".into()).unwrap();
    // Whatever has come behind the head, the service has got nothing of it when it refuses.
    tokio::task::yield_now().await;
    service.answer("no").await;
    assert_eq!(whole(&blocker).await, (200, "no".into()));
    drop(blocker);
    let exchange = stage.session.get("/next");
    assert!(service.head().await.starts_with("GET /next "));
    drop(exchange);

    let lines = [("host", "h"), ("upgrade", "echo"), ("content-length", "5")];
    let exchange = stage.session.open(request("GET", "/", &lines), true);
    exchange.send("12345".into()).unwrap();
    assert_eq!(refused(&exchange).await, Reason::UpstreamError);
}

#[tokio::test]
async fn a_protocol_that_was_not_offered_is_an_error_of_the_service() {
    for answer in [
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n",
    ] {
        let stage = Stage::new().await;
        let exchange = stage.session.upgrade();
        let mut service = stage.local.accept().await;
        service.head().await;
        service.send(answer).await;
        assert_eq!(refused(&exchange).await, Reason::UpstreamError, "{answer}");
        within_a_second(service.closed()).await;
    }
}

#[tokio::test]
async fn whoever_breaks_off_is_noticed_at_the_other_end() {
    let stage = Stage::new().await;
    let (exchange, mut service) = upgraded(&stage).await;
    drop(exchange);
    within_a_second(service.closed()).await;

    // The same when the service has ended its direction already.
    let (exchange, mut service) = upgraded(&stage).await;
    service.stream.shutdown().await.unwrap();
    assert_eq!(read(&exchange).await, Read::End(None));
    drop(exchange);
    within_a_second(service.closed()).await;

    let (exchange, service) = upgraded(&stage).await;
    service.stream.set_zero_linger().unwrap();
    drop(service);
    assert_eq!(read(&exchange).await, Read::Reset(Reason::UpstreamError));
    drop(exchange);
    stage.session.empty().await;
}

/// Its time ends with the 101.
#[tokio::test]
async fn an_upgraded_connection_has_no_deadline() {
    let stage = Stage::with(|config| {
        config.local.response_timeout = Duration::from_millis(50);
    })
    .await;
    let (exchange, mut service) = upgraded(&stage).await;
    exchange.send("a".into()).unwrap();
    assert_eq!(service.until("a").await.as_deref(), Some("a"));
    let nothing = timeout(
        Duration::from_millis(500),
        poll_fn(|cx| exchange.poll_read(cx)),
    );
    assert!(nothing.await.is_err());
    service.send("b").await;
    assert_eq!(read(&exchange).await, Read::Data("b".into()));
}

#[tokio::test]
async fn upgraded_connections_take_no_turn_away() {
    let stage = Stage::with(|config| config.local.max_connections = 1).await;
    let (_first, _service) = upgraded(&stage).await;
    // The one behind it waits for its turn, and has it as soon as the service has agreed.
    let second = stage.session.upgrade();
    let third = stage.session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.send(SWITCH).await;
    assert_eq!(answer(&second).await.status, 101);
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("third").await;
    assert_eq!(whole(&third).await, (200, "third".into()));
    drop(second);
    let fourth = stage.session.get("/");
    service.head().await;
    service.answer("fourth").await;
    assert_eq!(whole(&fourth).await, (200, "fourth".into()));
}
