//! Agents that aren't wanted: they ask no more often than they were told, and their log says in
//! one line what to do.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::relay::Relay;
use common::{Process, Server, eventually, port_range, text_service};
use silo_proxy::grpc::{Event, Status};
use silo_proxy::link::Tunnel;
use silo_proxy::link::tunnel::Error;
use silo_proxy::wire::{AgentMessage, Hello, Rejection, RejectionReason, ServerMessage, VERSION};
use tokio::net::{TcpListener, TcpStream};

/// An agent adds up to a quarter to what it was told, and a busy machine something more.
fn longest(told: Duration) -> Duration {
    told + told / 4 + Duration::from_secs(2)
}

/// Checks the pauses between attempts; a new connection is made a moment after the rejection.
fn keeps_to(told: Duration, attempts: &[Instant]) {
    for pair in attempts.windows(2) {
        let pause = pair[1] - pair[0];
        assert!(pause >= told, "again after {pause:?}, told {told:?}");
        assert!(pause <= longest(told), "again after {pause:?}");
    }
}

/// The line of an agent's log about its last rejection: there is one a rejection.
fn last_rejection(agent: &Process, attempts: usize) -> String {
    let line = agent.wait_for_nth(attempts, &["rejected"]);
    assert_eq!(agent.count(&["rejected"]), attempts);
    line
}

/// Does what a server of another time does: it rejects everybody for the version.
async fn reject(stream: TcpStream, retry_after: Duration) {
    let mut tunnel = Tunnel::server(stream);
    let call = tunnel.next().await.unwrap();
    assert!(matches!(call, Event::Call { .. }), "{call:?}");
    let first: AgentMessage = tunnel.message().await.unwrap();
    assert_eq!(first.hello.unwrap().version, VERSION);
    let rejection = Rejection {
        reason: RejectionReason::Version.into(),
        detail: "this server speaks versions 7 to 8".into(),
        retry_after_ms: retry_after.as_millis().try_into().unwrap(),
    };
    let message = ServerMessage::from(rejection);
    tunnel.send(&message).await.unwrap();
    tunnel.finish().await;
}

/// Starts one; returned are its address and when agents came.
fn rejecting_server(retry_after: Duration) -> (SocketAddr, Arc<Mutex<Vec<Instant>>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let came = Arc::new(Mutex::new(Vec::new()));
    let noted = came.clone();
    on_runtime(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            noted.lock().unwrap().push(Instant::now());
            tokio::spawn(reject(stream, retry_after));
        }
    });
    (address, came)
}

fn on_runtime<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    })
}

#[test]
fn an_agent_of_another_version_asks_as_often_as_it_is_told() {
    let told = Duration::from_secs(1);
    let (address, came) = rejecting_server(told);
    let agent = Process::start(
        "agent",
        &[
            "agent",
            "http",
            "3000",
            "--server",
            &address.to_string(),
            "--id",
            "old",
        ],
        &[],
    );
    eventually(4 * longest(told), "it comes four times", || {
        came.lock().unwrap().len() == 4
    });
    keeps_to(told, &came.lock().unwrap());
    let line = last_rejection(&agent, 4);
    for part in [
        "ERROR",
        "reason=version",
        "install the version of silo-proxy that the server runs",
        "speaks versions 7 to 8",
    ] {
        assert!(line.contains(part), "{line}");
    }
}

/// Says hello as an agent of another version does.
fn say_hello(tunnel: SocketAddr, hello: Hello) -> ServerMessage {
    let answer = on_runtime(async move {
        let stream = TcpStream::connect(tunnel).await.unwrap();
        let mut tunnel = Tunnel::client(stream, false, &tunnel.to_string());
        let message = AgentMessage::from(hello);
        tunnel.send(&message).await.unwrap();
        let answer = tunnel.message().await.unwrap();
        // Nothing else follows a rejection, and the call ends as it should.
        let end = tunnel.message::<ServerMessage>().await;
        assert!(matches!(end, Err(Error::Status(status)) if status == Status::OK));
        answer
    });
    answer.join().unwrap()
}

#[test]
fn a_server_turns_agents_of_other_versions_away() {
    let server = Server::start();
    for version in [0, VERSION + 1, u32::MAX] {
        let answer = say_hello(
            server.tunnel,
            Hello {
                version,
                agent_id: format!("from-time-{version}"),
                ..Hello::default()
            },
        );
        let rejection = answer.rejection.unwrap();
        assert_eq!(rejection.reason(), RejectionReason::Version);
        assert!(rejection.retry_after_ms >= 30_000);
        let line = server.process.wait_for(&[
            "WARN",
            "agent rejected",
            &format!("agent_id=from-time-{version} "),
            "reason=version",
            &format!("the agent version {version}:"),
        ]);
        assert!(line.contains("update the older of the two"), "{line}");
    }
    assert!(server.agents().is_empty());
}

/// Three agents that can't be helped for a while, watched for more than two of the longest waits.
#[test]
#[ignore = "watches rejected agents for 80 s"]
fn rejected_agents_make_no_more_attempts_than_told() {
    const WATCHED: Duration = Duration::from_secs(80);
    let server = Server::with(port_range(1), &[("grpc.auth.shared_token", "right")]);
    let service = text_service("served");
    let lucky = server.agent_with("lucky", service, &[("grpc.token", "right")]);
    let (thirty, five) = (Duration::from_secs(30), Duration::from_secs(5));
    let (rejecting, came) = rejecting_server(thirty);
    let agents = [
        ("stranger", "wrong", "reason=auth", "set grpc.token", thirty),
        (
            "late",
            "right",
            "reason=port_exhausted",
            "widen http.agent_port_range on the server",
            five,
        ),
    ]
    .map(|(id, token, reason, advice, told)| {
        let relay = Relay::start(server.tunnel);
        let address = relay.address.to_string();
        let settings = [("grpc.token", token), ("grpc.server_address", &*address)];
        let agent = server.start_agent(id, &format!("http://{service}"), &settings);
        (relay, agent, reason, advice, told)
    });
    let old = server.start_agent(
        "old",
        &format!("http://{service}"),
        &[("grpc.server_address", &rejecting.to_string())],
    );
    let since = Instant::now();
    while since.elapsed() < WATCHED {
        common::pause();
    }
    let attempts = came.lock().unwrap().clone();
    keeps_to(thirty, &attempts);
    // At 0, 30 to 37.5 and 60 to 75 s.
    assert_eq!(attempts.len(), 3);
    last_rejection(&old, 3);
    for (relay, agent, reason, advice, told) in agents {
        let attempts = relay.came();
        keeps_to(told, &attempts);
        let most = WATCHED.as_secs() / told.as_secs() + 1;
        assert!((3..=most as usize).contains(&attempts.len()), "{reason}");
        // The last one may be on its way.
        let line = agent.wait_for_nth(attempts.len(), &["rejected", reason, advice]);
        assert!(!line.contains("wrong"), "{line}");
        assert_eq!(agent.count(&["disconnected"]), 0);
    }
    assert_eq!(server.agents(), [("lucky".to_owned(), lucky.port)]);
}
