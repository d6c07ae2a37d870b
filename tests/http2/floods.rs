//! Visitors that speak HTTP/2 in bad faith: their connection ends, and nobody else's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::client::{Client, request, run};
use crate::common::raw::{Recorder, Stand, read_to_close};
use crate::common::{PATIENCE, connect};

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `GET / HTTP/2` of the host `h`, in HPACK.
const GET: &[u8] = &[0x82, 0x84, 0x86, 0x01, 0x01, b'h'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A connection that has said what every client says first.
fn open(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address);
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
    stream.write_all(&frame(SETTINGS, ACK, 0, &[])).unwrap();
    stream
}

/// The next frame: kind, flags, payload.
fn next(stream: &mut TcpStream) -> std::io::Result<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload)?;
    Ok((head[3], head[4], payload))
}

/// Reads to the end, and expects a GOAWAY with this code if the connection wasn't reset before.
fn ends_with(mut stream: TcpStream, code: u32) {
    let mut said = None;
    loop {
        match next(&mut stream) {
            Ok((GOAWAY, _, payload)) => {
                said = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
            }
            Ok(_) => {}
            Err(error) => {
                assert!(!crate::common::raw::is_timeout(&error), "still open");
                break;
            }
        }
    }
    assert!(said.is_none() || said == Some(code), "{said:?}");
}

/// A flood on a connection of its own, beside a visitor who keeps his.
fn beside_a_bystander(stand: &Stand, flood: impl FnOnce(SocketAddr) + Send + 'static) {
    let address = stand.agent.address();
    run(async {
        let mut bystander = Client::connect(address).await;
        let flood = tokio::task::spawn_blocking(move || flood(address));
        while !flood.is_finished() {
            assert_eq!(bystander.ask(request("GET", "/")).await.text(), "ok");
        }
        flood.await.unwrap();
        assert_eq!(bystander.ask(request("GET", "/")).await.text(), "ok");
    });
    stand.settles();
    assert_eq!(stand.agent.process.count(&["panicked"]), 0);
    assert_eq!(stand.server.process.count(&["panicked"]), 0);
}

#[test]
fn rapid_resets_end_their_connection() {
    let stand = Stand::new();
    beside_a_bystander(&stand, |address| {
        let mut stream = open(address);
        let mut reader = stream.try_clone().unwrap();
        let mut id = 1;
        let mut pairs = Vec::new();
        for _ in 0..500 {
            pairs.clear();
            for _ in 0..100 {
                pairs.extend(frame(HEADERS, END_HEADERS | END_STREAM, id, GET));
                pairs.extend(frame(RST_STREAM, 0, id, &[0, 0, 0, 8]));
                id += 2;
            }
            if stream.write_all(&pairs).is_err() {
                break;
            }
        }
        reader.set_read_timeout(Some(PATIENCE)).unwrap();
        read_to_close(&mut reader);
    });
    assert_eq!(
        stand.server.metric("silo_failures_total", "bad_request"),
        1.0
    );
}

/// Each waits until the server has seen the request before, so that h2 doesn't notice.
#[test]
fn rapid_resets_one_by_one_end_their_connection_too() {
    let stand = Stand::of(Recorder::with(|received, stream| {
        if received.line() != "GET /never HTTP/1.1" {
            return stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .is_ok();
        }
        read_to_close(stream);
        false
    }));
    beside_a_bystander(&stand, |address| {
        let mut stream = open(address);
        let never = [&[0x82, 0x86, 0x01, 0x01, b'h', 0x04, 0x06][..], b"/never"].concat();
        let mut id = 1;
        let ended = (0..20_000).any(|_| {
            let mut frames = frame(HEADERS, END_HEADERS | END_STREAM, id, &never);
            frames.extend(frame(PING, 0, 0, &[0; 8]));
            if stream.write_all(&frames).is_err() {
                return true;
            }
            loop {
                match next(&mut stream) {
                    Ok((PING, ACK, _)) => break,
                    Ok((GOAWAY, _, payload)) => {
                        // ENHANCE_YOUR_CALM
                        assert_eq!(payload[4..8], [0, 0, 0, 11]);
                        return true;
                    }
                    Ok(_) => {}
                    Err(_) => return true,
                }
            }
            let reset = frame(RST_STREAM, 0, id, &[0, 0, 0, 8]);
            id += 2;
            stream.write_all(&reset).is_err()
        });
        assert!(ended);
    });
}

#[test]
fn endless_heads_end_their_connection() {
    let stand = Stand::new();
    // Empty ones, and ones with lines in them: a literal of one byte without an index.
    for payload in [vec![], [0x00, 0x01, b'a', 0x01, b'b'].repeat(3000)] {
        beside_a_bystander(&stand, move |address| {
            let mut stream = open(address);
            let mut reader = stream.try_clone().unwrap();
            stream
                .write_all(&frame(HEADERS, END_STREAM, 1, GET))
                .unwrap();
            let more = frame(CONTINUATION, 0, 1, &payload);
            for _ in 0..100_000 {
                if stream.write_all(&more).is_err() {
                    break;
                }
            }
            reader.set_read_timeout(Some(PATIENCE)).unwrap();
            read_to_close(&mut reader);
        });
    }
    assert_eq!(
        stand.server.metric("silo_failures_total", "bad_request"),
        2.0
    );
}

/// Who asks and never reads the answers is not read either, and has an idle connection.
#[test]
fn pings_and_settings_that_nobody_reads_cost_little() {
    let stand = Stand::with(Recorder::new(), &[("http.idle_timeout", "1s")], &[]);
    let before = stand.server.process.resident_bytes();
    for flood in [frame(PING, 0, 0, &[1; 8]), frame(SETTINGS, 0, 0, &[])] {
        beside_a_bystander_of_its_own(&stand, || {
            let mut stream = open(stand.agent.address());
            let mut reader = stream.try_clone().unwrap();
            stream
                .set_write_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let many = flood.repeat(1000);
            let mut sent = 0;
            while sent < 64 << 20 && stream.write_all(&many).is_ok() {
                sent += many.len();
            }
            reader.set_read_timeout(Some(PATIENCE)).unwrap();
            read_to_close(&mut reader);
        });
    }
    let after = stand.server.process.resident_bytes();
    assert!(after < before + (16 << 20), "{before} {after}");
}

/// The same with a new connection afterwards, as an idle one has ended by then.
fn beside_a_bystander_of_its_own(stand: &Stand, flood: impl FnOnce()) {
    flood();
    run(async {
        let mut bystander = Client::connect(stand.agent.address()).await;
        assert_eq!(bystander.ask(request("GET", "/")).await.text(), "ok");
    });
    stand.settles();
}

#[test]
fn broken_rules_end_the_stream_or_the_connection() {
    let stand = Stand::new();
    // Data on a stream that was never opened.
    let mut stream = open(stand.agent.address());
    stream.write_all(&frame(0, 0, 1, b"x")).unwrap();
    ends_with(stream, 1);
    // A frame larger than what was agreed.
    let mut stream = open(stand.agent.address());
    let _ = stream.write_all(&frame(0, 0, 1, &[0; 20_000]));
    ends_with(stream, 6);
    // A line that belongs to a connection: `connection: x`, which resets the stream.
    let mut stream = open(stand.agent.address());
    let hop = [GET, &[0x00, 0x0a], b"connection", &[0x01, b'x']].concat();
    stream
        .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &hop))
        .unwrap();
    loop {
        let (kind, _, payload) = next(&mut stream).unwrap();
        if kind == RST_STREAM {
            assert_eq!(payload, [0, 0, 0, 1]);
            break;
        }
    }
    // The connection goes on.
    stream
        .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 3, GET))
        .unwrap();
    while next(&mut stream).unwrap().0 != HEADERS {}
    assert_eq!(stand.service.next().line(), "GET / HTTP/1.1");
    assert!(stand.service.is_empty());
}
