//! How sessions come and go.

use super::*;

use crate::agent::Lost;
use crate::grpc::Status;
use crate::link::tunnel;
use crate::wire::{Frames, RejectionReason};
use tokio::time::Instant;

fn rejection(reason: RejectionReason, retry_after_ms: u32) -> Rejection {
    Rejection {
        reason: reason.into(),
        detail: "because".into(),
        retry_after_ms,
    }
}

#[tokio::test]
async fn the_hello_says_who_it_is_and_the_welcome_is_reported() {
    let mut stage = Stage::new().await;
    let hello = stage.server.hellos.recv().await.unwrap();
    assert_eq!(hello.version, wire::VERSION);
    assert_eq!(hello.agent_id, "agent-1");
    assert_eq!(&hello.credential[..], b"secret");
    assert_eq!(hello.instance.len(), 16);
    assert!(hello.software.starts_with("silo-proxy/"));
    assert_eq!(hello.last_port, 0);
    let Event::Connected {
        port, public_url, ..
    } = stage.event().await
    else {
        panic!("not connected");
    };
    assert_eq!((port, &*public_url), (8100, "http://localhost:8100"));
}

#[tokio::test]
async fn a_lost_session_is_followed_by_another() {
    let mut stage = Stage::new().await;
    let first = stage.server.hellos.recv().await.unwrap();
    assert!(matches!(stage.event().await, Event::Connected { .. }));
    stage.session.connection.abort();
    let Event::Disconnected { why, retry_in } = stage.event().await else {
        panic!("not disconnected");
    };
    assert!(matches!(why, Lost::Ended(_)), "{why:?}");
    assert!(retry_in <= Duration::from_millis(200));
    let again = soon(stage.server.hellos.recv()).await.unwrap();
    assert_eq!(again.instance, first.instance);
    assert_eq!(again.last_port, 8100);
    assert!(matches!(stage.event().await, Event::Connected { .. }));

    // And it works.
    let session = soon(stage.server.sessions.recv()).await.unwrap();
    let exchange = session.get("/");
    let mut service = stage.local.accept().await;
    service.head().await;
    service.answer("here again").await;
    assert_eq!(whole(&exchange).await, (200, "here again".into()));
}

#[tokio::test]
async fn a_server_that_is_away_is_asked_again() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (mut events, _stop, agent) = start(config(address, 1));
    let Some(Event::Disconnected { why, .. }) = soon(events.recv()).await else {
        panic!("not disconnected");
    };
    assert!(matches!(why, Lost::Connect(_)), "{why:?}");
    let listener = TcpListener::bind(address).await.unwrap();
    let mut server = Server::on(listener, Arc::new(|_| Ok(())));
    assert!(soon(server.sessions.recv()).await.is_some());
    agent.abort();
}

#[tokio::test]
async fn a_rejection_is_obeyed_and_reported() {
    let rejected = || rejection(RejectionReason::PortExhausted, 400);
    let policy: Policy = Arc::new(move |count| if count == 0 { Err(rejected()) } else { Ok(()) });
    let mut server = Server::start(policy).await;
    let (mut events, _stop, agent) = start(config(server.address, 1));
    soon(server.hellos.recv()).await.unwrap();
    let since = Instant::now();
    let Some(Event::Rejected {
        reason,
        detail,
        retry_in,
    }) = soon(events.recv()).await
    else {
        panic!("not rejected");
    };
    assert_eq!(reason, RejectionReason::PortExhausted);
    assert_eq!(detail, "because");
    let range = Duration::from_millis(400)..=Duration::from_millis(500);
    assert!(range.contains(&retry_in), "{retry_in:?}");
    soon(server.hellos.recv()).await.unwrap();
    assert!(since.elapsed() >= Duration::from_millis(390));
    assert!(matches!(
        soon(events.recv()).await,
        Some(Event::Connected { .. })
    ));
    agent.abort();
}

#[tokio::test]
async fn a_replaced_agent_finishes_what_it_has_and_keeps_away() {
    // A server that says it while exchanges go on: ours says it last.
    let local = Local::new().await;
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = local.0.local_addr().unwrap().port();
    let (mut events, _stop, agent) = start(config(server.local_addr().unwrap(), port));
    let mut tunnel = Tunnel::server(soon(server.accept()).await.unwrap().0);
    soon(hello(&mut tunnel)).await.unwrap();
    tunnel.send(&welcome(1, CONFIG)).await.unwrap();
    let budget = Budget::new(Pool::new(1 << 30), 1 << 30);
    let mut session = mux::Session::opener(CONFIG, budget, Duration::ZERO);
    let head = request("GET", "/", &[("host", "visitor.test")]);
    let key = session.open(head, false).unwrap();
    let mut frames = Vec::new();
    session.transmit(Duration::ZERO, mux::BATCH_BYTES, &mut frames);
    tunnel.send(&ServerMessage::from(frames)).await.unwrap();
    let mut service = local.accept().await;
    service.head().await;
    let message = ServerMessage::from(rejection(RejectionReason::Replaced, 0));
    tunnel.send(&message).await.unwrap();
    // The answer after it; then the agent ends its side.
    let mut answered = false;
    loop {
        let message: AgentMessage = match soon(tunnel.message()).await {
            Ok(message) => message,
            Err(tunnel::Error::Status(status)) => break assert_eq!(status, Status::OK),
            Err(error) => panic!("{error}"),
        };
        for frame in message.into_frames() {
            session.receive(frame.unwrap(), Duration::ZERO).unwrap();
        }
        if session.peer_is_draining() && !std::mem::replace(&mut answered, true) {
            service.answer("still").await;
        }
    }
    assert!(matches!(session.read_head(key), HeadRead::Answer(head) if head.status == 200));
    assert!(matches!(session.read(key), Read::Data(data) if data == "still"));
    assert!(matches!(session.read(key), Read::End(_)));
    soon(tunnel.finish()).await;
    assert!(matches!(
        soon(events.recv()).await,
        Some(Event::Connected { .. })
    ));
    let Some(Event::Rejected {
        reason, retry_in, ..
    }) = soon(events.recv()).await
    else {
        panic!("not rejected");
    };
    assert_eq!(reason, RejectionReason::Replaced);
    assert!(retry_in >= Duration::from_secs(30));
    agent.abort();
}

#[tokio::test]
async fn whatever_is_no_tunnel_server_is_no_session() {
    for text in ["HTTP/1.1 400 Bad Request\r\n\r\n", "garbage"] {
        let local = Local::new().await;
        let (mut events, _stop, agent) = start(config(local.0.local_addr().unwrap(), 1));
        let mut connection = local.accept().await;
        connection.send(text).await;
        drop(connection);
        let event = soon(events.recv()).await;
        assert!(
            matches!(event, Some(Event::Disconnected { .. })),
            "{event:?}"
        );
        agent.abort();
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let local = Local::new().await;
    let mut config = config(local.0.local_addr().unwrap(), 1);
    config.grpc.heartbeat_timeout = Duration::from_millis(200);
    let (mut events, _stop, agent) = start(config);
    let mut silent = local.accept().await;
    let Some(Event::Disconnected { why, .. }) = soon(events.recv()).await else {
        panic!("not disconnected");
    };
    assert!(matches!(why, Lost::NoWelcome(_)), "{why:?}");
    within_a_second(silent.closed()).await;
    agent.abort();
}

#[tokio::test]
async fn an_idle_agent_stops_at_once() {
    let mut stage = Stage::new().await;
    assert!(matches!(stage.event().await, Event::Connected { .. }));
    stage.stop = None;
    within_a_second(&mut stage.agent).await.unwrap();
    let ended = soon(&mut stage.session.ended).await.unwrap();
    assert!(matches!(ended, Ended::Closed), "{ended}");
}

#[tokio::test]
async fn a_stopping_agent_finishes_what_it_has() {
    let mut stage = Stage::new().await;
    let running = stage.session.get("/running");
    let mut service = stage.local.accept().await;
    service.head().await;
    stage.stop = None;
    while !stage.session.link.peer_is_draining() {
        tokio::task::yield_now().await;
    }
    let head = request("GET", "/new", &[]);
    let refused = stage.session.link.open(head, false);
    assert!(matches!(refused, Err(mux::OpenError::Draining)));
    assert!(!stage.agent.is_finished());
    service.answer("finished").await;
    assert_eq!(whole(&running).await, (200, "finished".into()));
    drop(running);
    within_a_second(&mut stage.agent).await.unwrap();
    let ended = soon(&mut stage.session.ended).await.unwrap();
    assert!(matches!(ended, Ended::Closed), "{ended}");
    within_a_second(service.closed()).await;
}

#[tokio::test]
async fn a_stopping_agent_waits_no_longer_than_its_grace() {
    let grace = Duration::from_millis(200);
    let mut stage = Stage::with(|config| config.agent.grace = grace).await;
    let running = stage.session.get("/running");
    let mut service = stage.local.accept().await;
    service.head().await;
    let since = Instant::now();
    stage.stop = None;
    soon(&mut stage.agent).await.unwrap();
    assert!(since.elapsed() >= grace);
    assert_eq!(refused(&running).await, Reason::TunnelLost);
    within_a_second(service.closed()).await;
}

#[tokio::test]
async fn an_agent_stops_while_it_waits_for_a_server() {
    let local = Local::new().await;
    let (_events, stop, agent) = start(config(local.0.local_addr().unwrap(), 1));
    let _silent = local.accept().await;
    drop(stop);
    within_a_second(agent).await.unwrap();
}
