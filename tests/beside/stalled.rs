//! Peers who stop taking what they are sent, or take it drop by drop.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::Sender;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crate::alone;
use crate::common::bystander::Bystander;
use crate::common::raw::{channel, pattern, settles, take};
use crate::common::{
    Server, bytes_in_sockets, connect, port_range, read_answer, read_head, service,
};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

/// What of an upload that nobody reads may be on its way, beyond what the kernel holds: how large
/// it makes the buffers of the three connections is its own affair.
const TAKEN: u64 = 2 * MIB;

#[test]
#[ignore = "a gibibyte takes a while if nothing is optimised"]
fn an_upload_of_a_gibibyte_waits_at_its_visitor() {
    const SIZE: u64 = GIB;
    let _alone = alone();
    let (address, go) = stubborn(SIZE);
    let server = Server::with(port_range(4), &[]);
    let agent = server.agent("stubborn", address);
    let bystander = Bystander::start(&server, &[&agent.process]);

    let mut visitor = connect(agent.address());
    let head = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {SIZE}\r\n\r\n");
    visitor.write_all(head.as_bytes()).unwrap();
    let taken = write_until_stalled(&mut visitor, SIZE);
    let ports = [agent.port, server.tunnel.port(), address.port()];
    let kernel = bytes_in_sockets(&ports);
    let held = taken.saturating_sub(kernel);
    eprintln!(
        "nobody reads: {} KiB of a GiB were taken, of which {} KiB are in sockets",
        taken / 1024,
        kernel / 1024
    );
    assert!(held < TAKEN, "{held} bytes were taken");

    go.send(()).unwrap();
    let mut position = taken;
    while position < SIZE {
        position += visitor.write(piece(position, SIZE - position)).unwrap() as u64;
    }
    let answer = read_answer(&mut visitor, false);
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "all as sent")
    );
    drop(visitor);
    settles(&server);
    bystander.noticed_nothing();
}

/// The bytes of every body, over and over; their number is odd, so that a loss of any usual size
/// shows.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(1_048_573));

/// A piece of the body that begins at `position`.
fn piece(position: u64, limit: u64) -> &'static [u8] {
    let rest = &BYTES[(position % BYTES.len() as u64) as usize..];
    &rest[..rest.len().min(limit.min(65_536) as usize)]
}

/// Reads a body to `end` and compares each byte.
fn check(stream: &mut impl Read, end: u64) -> io::Result<()> {
    let (mut position, mut buffer) = (0, vec![0; 65_536]);
    while position < end {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::other(format!("ended after {position} bytes")));
        }
        let mut read = &buffer[..count];
        while !read.is_empty() {
            let expected = piece(position, read.len() as u64);
            if read[..expected.len()] != *expected {
                return Err(io::Error::other(format!("a wrong byte after {position}")));
            }
            position += expected.len() as u64;
            read = &read[expected.len()..];
        }
    }
    Ok(())
}

/// A service that reads a body only when it is told to.
fn stubborn(size: u64) -> (SocketAddr, Sender<()>) {
    let (go, may_go) = channel::<()>();
    let may_go = Mutex::new(may_go);
    let address = service(move |mut stream| {
        if read_head(&mut stream).is_err() {
            return;
        }
        take(&may_go.lock().unwrap(), "leave to read");
        let text = match check(&mut stream, size) {
            Ok(()) => "all as sent".to_owned(),
            Err(error) => error.to_string(),
        };
        let length = text.len();
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{text}"
        );
    });
    (address, go.into_inner().unwrap())
}

/// Writes until nothing has been taken for a second.
fn write_until_stalled(visitor: &mut TcpStream, size: u64) -> u64 {
    visitor
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut written = 0;
    while written < size {
        match visitor.write(piece(written, size - written)) {
            Ok(count) => written += count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("after {written} bytes: {error}"),
        }
    }
    visitor.set_write_timeout(None).unwrap();
    written
}
