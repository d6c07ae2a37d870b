//! A connection under a tunnel, on which a peer may say any bytes.

use bytes::{BufMut, BytesMut};

use super::{Connection, Event, MAX_ANSWERS, PREFIX, Target};

const METHOD: &str = "/fuzz.Service/Call";

/// The longest message that is taken.
const MAX: usize = 4096;

/// What begins a call at a server, so that most inputs get further than that.
const CALL: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\
    \0\0\x41\x01\x04\0\0\0\x01\x83\x86\x04\x12/fuzz.Service/Call\x0f\x10\x10application/grpc\
    \x0f\x2b\x10fuzz/0.0.1-alpha";

/// Reads the bytes as a server or as a client, all at once and in pieces, which has to come to the
/// same. What is kept and what is answered stays within bounds.
pub fn call(data: &[u8]) {
    let [how, piece, bytes @ ..] = data else {
        return;
    };
    let mut all = BytesMut::new();
    let new = match how % 4 {
        0 => || Connection::server(METHOD, MAX),
        1 => {
            all.put_slice(CALL);
            || Connection::server(METHOD, MAX)
        }
        // The settings that a server begins with.
        2 => {
            all.put_slice(b"\0\0\0\x04\0\0\0\0\0");
            client
        }
        _ => client,
    };
    all.put_slice(bytes);
    let whole = read(new(), [&all[..]]);
    let pieces = read(new(), all.chunks(usize::from(*piece) + 1));
    assert_eq!(whole, pieces, "it depends on where the bytes are cut");
}

fn client() -> Connection {
    let target = Target {
        secure: false,
        authority: "fuzz:1",
        path: METHOD,
        user_agent: "fuzz",
    };
    Connection::client(target, MAX)
}

/// All that comes of these pieces, as text, and what is written.
fn read<'a>(
    mut connection: Connection,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<String>, Vec<u8>) {
    let begun = connection.output().len();
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    let mut said = 0;
    'pieces: for piece in pieces {
        input.put_slice(piece);
        loop {
            match connection.receive(&mut input) {
                Ok(Some(event)) => {
                    if let Event::Message(message) = &event {
                        assert!(message.len() <= MAX);
                    }
                    events.push(format!("{event:?}"));
                }
                Ok(None) => break,
                Err(error) => {
                    events.push(error.to_string());
                    connection.go_away(&error);
                    break 'pieces;
                }
            }
        }
        assert!(connection.message.bytes.len() <= MAX);
    }
    // What answers is bounded; what returns credit is a part of what came.
    let bound = begun + MAX_ANSWERS + events.len() * 100 + 1000;
    assert!(connection.output().len() <= bound, "too much is answered");
    let written = connection.output().to_vec();
    connection.wrote(written.len());
    // Whatever windows the peer has set: what is said keeps to them.
    while connection.takes_message() && said < 4 {
        let window = connection.window();
        connection.send(100, |out| out.put_bytes(7, 100));
        let sent = connection.output().len() as i64;
        assert!(sent <= window.max(0) + 9 * (PREFIX as i64 + 100));
        connection.wrote(connection.output().len());
        said += 1;
    }
    connection.end();
    (events, written)
}
