//! Upgraded connections that are long, large or many.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use silo_proxy::net::raise_descriptor_limit;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

use crate::alone;
use crate::common::Process;
use crate::common::bystander::Bystander;
use crate::common::raw::{is_silent, pattern, settles};
use crate::upgrade::{
    both_ways, echo, echo_of, large, read_exactly, start, tiny_frames, upgraded, websocket_echo,
};

#[test]
#[ignore = "1,000 sockets, and longer than a laptop's limit of descriptors allows"]
fn a_thousand_idle_sockets_on_one_tunnel() {
    let _alone = alone();
    raise_descriptor_limit().unwrap();
    let (server, agent) = start(echo());
    let bystander = Bystander::start(&server, &[&agent.process]);
    let before = (
        server.process.resident_bytes(),
        agent.process.resident_bytes(),
    );
    let mut sockets: Vec<_> = (0..1_000).map(|_| upgraded(&agent)).collect();
    for socket in &mut sockets {
        socket.write_all(b"once").unwrap();
        assert_eq!(read_exactly(socket, 4), b"once");
    }
    let each =
        |process: &Process, before: u64| process.resident_bytes().saturating_sub(before) / 1_000;
    // Measured: 3 KiB and 13 KiB.
    assert!(each(&server.process, before.0) < 16 << 10);
    assert!(each(&agent.process, before.1) < 32 << 10);
    // The bystander may have another.
    let open = server.metric("silo_exchanges_open", "");
    assert!((1_000.0..=1_001.0).contains(&open), "{open}");
    assert!(is_silent(&mut sockets[0], Duration::from_secs(20)));
    // Other requests go on beside them.
    for _ in 0..10 {
        drop(upgraded(&agent));
    }
    for (number, socket) in sockets.iter_mut().enumerate() {
        let word = format!("{number:04}");
        socket.write_all(word.as_bytes()).unwrap();
        assert_eq!(read_exactly(socket, 4), word.as_bytes());
    }
    drop(sockets);
    bystander.noticed_nothing();
    settles(&server);
}

/// `SILENT_SECONDS=600 cargo test --test beside silence -- --ignored`: as long as one likes.
#[test]
#[ignore = "10 minutes of silence are too long for every run: one of 100 s here"]
fn silence_ends_nothing() {
    // Longer than any default time limit: the agent's 60 s for an answer, the server's 75 s.
    let asked = std::env::var_os("SILENT_SECONDS");
    let seconds = asked.map_or(100, |text| text.to_str().unwrap().parse().unwrap());
    let _alone = alone();
    let (server, agent) = start(echo());
    let bystander = Bystander::start(&server, &[&agent.process]);
    let mut visitor = upgraded(&agent);
    visitor.write_all(b"x").unwrap();
    assert_eq!(read_exactly(&mut visitor, 1), b"x");
    assert!(is_silent(&mut visitor, Duration::from_secs(seconds)));
    visitor.write_all(b"y").unwrap();
    assert_eq!(read_exactly(&mut visitor, 1), b"y");
    drop(visitor);
    bystander.noticed_nothing();
    settles(&server);
}

#[test]
#[ignore = "a minute or more on a slow machine"]
fn a_gibibyte_comes_back() {
    let _alone = alone();
    let (server, agent) = start(echo());
    let bystander = Bystander::start(&server, &[&agent.process]);
    echo_of(upgraded(&agent), 1024);
    bystander.noticed_nothing();
    settles(&server);
}

fn websocket_beside(talk: impl Fn(&mut WebSocket<TcpStream>)) {
    let _alone = alone();
    let service = websocket_echo();
    let (server, agent) = start(service);
    let bystander = Bystander::start(&server, &[&agent.process]);
    both_ways(service, &agent, talk);
    assert_eq!(server.metric("silo_failures_total", ""), 0.0);
    bystander.noticed_nothing();
    settles(&server);
}

#[test]
#[ignore = "100,000 frames twice, one write each"]
fn a_hundred_thousand_tiny_frames() {
    websocket_beside(|socket| tiny_frames(socket, 100_000));
}

#[test]
#[ignore = "tungstenite masks 64 MiB byte by byte without optimisation"]
fn a_message_of_64_mebibytes() {
    websocket_beside(|socket| {
        let message = Message::binary(pattern(64 << 20));
        let stream = socket.get_ref().try_clone().unwrap();
        let mut reader = WebSocket::from_raw_socket(stream, Role::Client, Some(large()));
        let expected = message.clone();
        let reading = thread::spawn(move || assert!(reader.read().unwrap() == expected));
        socket.send(message).unwrap();
        reading.join().unwrap();
    });
}
