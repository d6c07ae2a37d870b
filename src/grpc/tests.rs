//! The two ends against each other, against frames by hand, and against what nobody should send.

use proptest::prelude::*;

use super::*;

const METHOD: &str = "/test.Service/Call";

const MAX: usize = 256 * 1024;

fn server() -> Connection {
    Connection::server(METHOD, MAX)
}

fn client_of(path: &str) -> Connection {
    let target = Target {
        secure: false,
        authority: "server.test:9090",
        path,
        user_agent: "test/1",
    };
    Connection::client(target, MAX)
}

fn client() -> Connection {
    client_of(METHOD)
}

/// Moves everything that one has to write to the other, `piece` bytes at a time.
fn carry(from: &mut Connection, to: &mut Connection, piece: usize) -> Result<Vec<Event>, Error> {
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    while !from.output().is_empty() {
        let some = from.output().len().min(piece);
        input.put_slice(&from.output()[..some]);
        from.wrote(some);
        while let Some(event) = to.receive(&mut input)? {
            events.push(event);
        }
    }
    assert!(input.is_empty(), "half a frame is left");
    Ok(events)
}

/// A call that both ends know of.
fn connected() -> (Connection, Connection) {
    let (mut client, mut server) = (client(), server());
    let called = carry(&mut client, &mut server, MAX).unwrap();
    let authority = Some("server.test:9090".to_owned());
    assert_eq!(called, [Event::Call { authority }]);
    assert_eq!(carry(&mut server, &mut client, MAX).unwrap(), []);
    assert_eq!(carry(&mut client, &mut server, MAX).unwrap(), []);
    (client, server)
}

fn say(connection: &mut Connection, bytes: &[u8]) {
    assert!(connection.takes_message());
    connection.send(bytes.len(), |out| out.put_slice(bytes));
}

fn message(bytes: &[u8]) -> Event {
    Event::Message(Bytes::copy_from_slice(bytes))
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    put_frame_head(&mut out, payload.len(), kind, flags, stream);
    out.put_slice(payload);
    out.to_vec()
}

/// A header list as one frame.
fn headers(flags: u8, stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = BytesMut::new();
    for (name, value) in fields {
        hpack::encode(&mut block, name, value);
    }
    frame(kind::HEADERS, flags | flag::END_HEADERS, stream, &block)
}

const CALL: &[(&str, &str)] = &[
    (":method", "POST"),
    (":scheme", "http"),
    (":path", METHOD),
    ("content-type", "application/grpc+proto"),
];

/// What a client says before its call.
fn opening() -> Vec<u8> {
    [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat()
}

/// All that a connection makes of these bytes.
fn feed(connection: &mut Connection, bytes: &[u8]) -> Result<Vec<Event>, Error> {
    let mut input = BytesMut::from(bytes);
    let mut events = Vec::new();
    while let Some(event) = connection.receive(&mut input)? {
        events.push(event);
    }
    Ok(events)
}

/// The frames that a connection has to write: kind, flags, stream and payload.
fn written(connection: &mut Connection) -> Vec<(u8, u8, u32, Vec<u8>)> {
    let mut rest = connection.output();
    let mut frames = Vec::new();
    while let Some(head) = FrameHead::read(rest) {
        let payload = &rest[FRAME_HEAD..][..head.length];
        frames.push((head.kind, head.flags, head.stream, payload.to_vec()));
        rest = &rest[FRAME_HEAD + head.length..];
    }
    assert!(rest.is_empty());
    connection.wrote(connection.output().len());
    frames
}

/// A server with a call, whose answers so far were written.
fn called() -> Connection {
    let mut server = server();
    let bytes = [opening(), headers(0, 1, CALL)].concat();
    let events = feed(&mut server, &bytes).unwrap();
    assert_eq!(events, [Event::Call { authority: None }]);
    written(&mut server);
    server
}

#[test]
fn messages_pass_both_ways_and_each_side_ends() {
    let (mut client, mut server) = connected();
    say(&mut client, b"hello");
    assert_eq!(
        carry(&mut client, &mut server, 1).unwrap(),
        [message(b"hello")]
    );
    say(&mut server, b"");
    assert_eq!(carry(&mut server, &mut client, 1).unwrap(), [message(b"")]);
    client.end();
    let end = || Event::End(Status::OK);
    assert_eq!(carry(&mut client, &mut server, 3).unwrap(), [end()]);
    say(&mut server, b"last");
    assert_eq!(
        carry(&mut server, &mut client, 7).unwrap(),
        [message(b"last")]
    );
    server.end();
    assert_eq!(carry(&mut server, &mut client, 2).unwrap(), [end()]);
    assert!(!server.takes_message() && !client.takes_message());
}

#[test]
fn an_idle_connection_holds_no_buffers() {
    for piece in [1000, MAX] {
        let (mut client, mut server) = connected();
        say(&mut client, &[7; 50_000]);
        assert_eq!(carry(&mut client, &mut server, piece).unwrap().len(), 1);
        carry(&mut server, &mut client, piece).unwrap();
        for connection in [&mut client, &mut server] {
            // There is no room for so much, however it is looked for.
            assert!(!connection.out.try_reclaim(1025), "in pieces of {piece}");
            assert_eq!(connection.waiting.capacity(), 0);
            assert_eq!(connection.message.bytes.capacity(), 0);
        }
        assert!(server.table.is_none());
    }
}

#[test]
fn whatever_is_no_call_of_the_method_is_answered_by_its_rules() {
    // Unimplemented, as gRPC says it: in an answer of trailers only.
    let (mut client, mut server) = (client_of("/test.Service/Other"), server());
    assert_eq!(
        carry(&mut client, &mut server, MAX).unwrap(),
        [Event::Refused]
    );
    let ended = carry(&mut server, &mut client, MAX).unwrap();
    assert!(
        matches!(&*ended, [Event::End(Status { code: 12, .. })]),
        "{ended:?}"
    );
    // A browser's request: 415.
    let mut server = self::server();
    let get = [(":method", "GET"), (":scheme", "http"), (":path", METHOD)];
    let bytes = [opening(), headers(flag::END_STREAM, 1, &get)].concat();
    assert_eq!(feed(&mut server, &bytes).unwrap(), [Event::Refused]);
    let answer = written(&mut server).pop().unwrap();
    assert_eq!(
        (answer.0, answer.1),
        (kind::HEADERS, flag::END_HEADERS | flag::END_STREAM)
    );
    let fields = Table::default().decode(&answer.3, 1000).unwrap();
    assert_eq!(fields, [(b":status".to_vec(), b"415".to_vec())]);
}

#[test]
fn a_second_call_is_refused_and_the_first_goes_on() {
    let mut server = called();
    let second = [
        headers(0, 3, CALL),
        frame(kind::DATA, 0, 3, b"passed over"),
        frame(kind::RST_STREAM, 0, 3, &[0; 4]),
        frame(kind::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 9]),
        frame(kind::DATA, 0, 1, &[0, 0, 0, 0, 2, b'o', b'k']),
    ];
    assert_eq!(
        feed(&mut server, &second.concat()).unwrap(),
        [message(b"ok")]
    );
    let refused = Code::REFUSED_STREAM.0.to_be_bytes().to_vec();
    assert_eq!(written(&mut server), [(kind::RST_STREAM, 0, 3, refused)]);
}

#[test]
fn the_peers_windows_are_kept() {
    let mut server = server();
    // Streams begin with ten bytes, and connections with 65,535.
    let small = [0, 4, 0, 0, 0, 10];
    let opening = [PREFACE, &frame(kind::SETTINGS, 0, 0, &small)].concat();
    feed(&mut server, &[opening, headers(0, 1, CALL)].concat()).unwrap();
    written(&mut server);
    say(&mut server, b"eleven more");
    let sent = |server: &mut Connection| {
        let frames = written(server);
        assert!(
            frames
                .iter()
                .all(|frame| frame.0 == kind::DATA || frame.0 == kind::SETTINGS)
        );
        frames
            .iter()
            .filter(|frame| frame.0 == kind::DATA)
            .map(|frame| frame.3.len())
            .sum::<usize>()
    };
    assert_eq!(sent(&mut server), 10);
    assert!(!server.takes_message(), "what waits can't be overtaken");
    feed(
        &mut server,
        &frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 2]),
    )
    .unwrap();
    assert_eq!(sent(&mut server), 2);
    // A setting moves the window of a stream that is there, even below zero.
    feed(
        &mut server,
        &frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 7]),
    )
    .unwrap();
    assert_eq!(sent(&mut server), 0);
    feed(
        &mut server,
        &frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 5]),
    )
    .unwrap();
    assert_eq!(sent(&mut server), 2);
    feed(
        &mut server,
        &frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 200]),
    )
    .unwrap();
    assert_eq!(sent(&mut server), 2);
    assert!(server.takes_message());
}

/// RFC 9113, section 4.3.1: who has made the table smaller expects to hear of it.
#[test]
fn a_smaller_table_is_acknowledged_in_the_next_header_list() {
    for (size, update) in [(0_u32, true), (4095, true), (4096, false), (1 << 20, false)] {
        let mut server = server();
        let setting = [&[0, 1][..], &size.to_be_bytes()].concat();
        let opening = [PREFACE, &frame(kind::SETTINGS, 0, 0, &setting)].concat();
        feed(&mut server, &[opening, headers(0, 1, CALL)].concat()).unwrap();
        let (kind, _, _, answer) = written(&mut server).pop().unwrap();
        assert_eq!(kind, kind::HEADERS);
        assert_eq!(answer[0] == 0x20, update, "{size}");
        // Once.
        server.end();
        let (_, _, _, trailers) = written(&mut server).pop().unwrap();
        assert_ne!(trailers[0], 0x20);
    }
}

#[test]
fn credit_is_given_back_before_a_window_is_empty() {
    let (mut client, mut server) = connected();
    // Four times both windows.
    for _ in 0..4 * CONNECTION_WINDOW as usize / MAX {
        say(&mut client, &vec![1; MAX - PREFIX]);
        let came = carry(&mut client, &mut server, MAX).unwrap();
        assert_eq!(came.len(), 1, "it takes no round trip");
        carry(&mut server, &mut client, MAX).unwrap();
    }
}

#[test]
fn pings_are_answered_by_who_reads_the_answers() {
    let mut server = called();
    let ping = frame(kind::PING, 0, 0, b"12345678");
    feed(&mut server, &ping).unwrap();
    let pong = (kind::PING, flag::ACK, 0, b"12345678".to_vec());
    assert_eq!(written(&mut server), [pong]);
    for answered in [ping, frame(kind::SETTINGS, 0, 0, &[]), headers(0, 3, CALL)] {
        let mut server = called();
        let flood = answered.repeat(10_000);
        let refused = feed(&mut server, &flood);
        let code = Code::ENHANCE_YOUR_CALM;
        assert!(
            matches!(refused, Err(Error::Broken { code: c, .. }) if c == code),
            "{refused:?}"
        );
        assert!(server.output().len() < MAX_ANSWERS + 100);
    }
}

/// Frames after a call that break a rule, and what the peer is told of each.
pub(crate) fn breaches() -> Vec<(&'static str, Vec<u8>, Code)> {
    use Code as C;
    let data = |stream, flags, payload: &[u8]| frame(kind::DATA, flags, stream, payload);
    let hello = [0, 0, 0, 0, 1, b'x'];
    vec![
        (
            "a frame too long",
            vec![2, 0, 1, 0, 0, 0, 0, 0, 1],
            C::FRAME_SIZE,
        ),
        ("data on no stream", data(0, 0, &hello), C::PROTOCOL),
        ("data on a server's stream", data(2, 0, &hello), C::PROTOCOL),
        (
            "padding without a length",
            data(1, flag::PADDED, b""),
            C::FRAME_SIZE,
        ),
        (
            "more padding than frame",
            data(1, flag::PADDED, &[3, 0, 0]),
            C::PROTOCOL,
        ),
        (
            "data after the end",
            [data(1, 1, &hello), data(1, 0, &hello)].concat(),
            C::STREAM_CLOSED,
        ),
        (
            "a head after the end",
            [data(1, 1, &hello), headers(1, 1, CALL)].concat(),
            C::STREAM_CLOSED,
        ),
        (
            "an end within a message",
            data(1, 1, &hello[..4]),
            C::PROTOCOL,
        ),
        (
            "trailers that don't end",
            headers(0, 1, &[("a", "b")]),
            C::PROTOCOL,
        ),
        ("a head on no stream", headers(0, 0, CALL), C::PROTOCOL),
        (
            "a head on a server's stream",
            headers(0, 2, CALL),
            C::PROTOCOL,
        ),
        (
            "a head cut in its priority",
            frame(kind::HEADERS, 0x24, 3, &[0; 4]),
            C::FRAME_SIZE,
        ),
        (
            "a continuation of nothing",
            frame(kind::CONTINUATION, 4, 1, &[]),
            C::PROTOCOL,
        ),
        (
            "a frame within a head",
            [
                frame(kind::HEADERS, 0, 3, &[]),
                frame(kind::PING, 0, 0, &[0; 8]),
            ]
            .concat(),
            C::PROTOCOL,
        ),
        (
            "another's continuation",
            [
                frame(kind::HEADERS, 0, 3, &[]),
                frame(kind::CONTINUATION, 4, 5, b"x"),
            ]
            .concat(),
            C::PROTOCOL,
        ),
        (
            "empty continuations",
            [
                frame(kind::HEADERS, 0, 3, &[]),
                frame(kind::CONTINUATION, 0, 3, b""),
            ]
            .concat(),
            C::ENHANCE_YOUR_CALM,
        ),
        (
            "a head without end",
            [
                frame(kind::HEADERS, 0, 3, &[]),
                frame(kind::CONTINUATION, 0, 3, &[0; 9000]).repeat(2),
            ]
            .concat(),
            C::ENHANCE_YOUR_CALM,
        ),
        (
            "settings on a stream",
            frame(kind::SETTINGS, 0, 1, &[]),
            C::PROTOCOL,
        ),
        (
            "settings cut",
            frame(kind::SETTINGS, 0, 0, &[0; 5]),
            C::FRAME_SIZE,
        ),
        (
            "an answer with settings",
            frame(kind::SETTINGS, 1, 0, &[0; 6]),
            C::FRAME_SIZE,
        ),
        (
            "too large a window",
            frame(kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]),
            C::FLOW_CONTROL,
        ),
        (
            "too small frames",
            frame(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0x3f, 0xff]),
            C::PROTOCOL,
        ),
        (
            "too large frames",
            frame(kind::SETTINGS, 0, 0, &[0, 5, 1, 0, 0, 0]),
            C::PROTOCOL,
        ),
        (
            "a ping on a stream",
            frame(kind::PING, 0, 1, &[0; 8]),
            C::PROTOCOL,
        ),
        (
            "a short ping",
            frame(kind::PING, 0, 0, &[0; 7]),
            C::FRAME_SIZE,
        ),
        (
            "a window of nothing more",
            frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4]),
            C::PROTOCOL,
        ),
        (
            "a short window",
            frame(kind::WINDOW_UPDATE, 0, 0, &[0; 3]),
            C::FRAME_SIZE,
        ),
        (
            "a window beyond all",
            frame(kind::WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]),
            C::FLOW_CONTROL,
        ),
        (
            "a short reset",
            frame(kind::RST_STREAM, 0, 1, &[0; 3]),
            C::FRAME_SIZE,
        ),
        (
            "a reset of no stream",
            frame(kind::RST_STREAM, 0, 0, &[0; 4]),
            C::PROTOCOL,
        ),
        (
            "a goodbye on a stream",
            frame(kind::GOAWAY, 0, 1, &[0; 8]),
            C::PROTOCOL,
        ),
        (
            "a short goodbye",
            frame(kind::GOAWAY, 0, 0, &[0; 7]),
            C::PROTOCOL,
        ),
        (
            "a priority of no stream",
            frame(kind::PRIORITY, 0, 0, &[0; 5]),
            C::PROTOCOL,
        ),
        (
            "a pushed answer",
            frame(kind::PUSH_PROMISE, 4, 1, &[0; 8]),
            C::PROTOCOL,
        ),
    ]
}

#[test]
fn what_breaks_a_rule_of_http_2_ends_the_connection() {
    for (name, bytes, code) in breaches() {
        let mut server = called();
        match feed(&mut server, &bytes) {
            Err(error @ Error::Broken { .. }) => {
                let Error::Broken { code: c, .. } = error else {
                    continue;
                };
                assert_eq!(c, code, "{name}");
                server.go_away(&error);
                let (kind, _, _, payload) = written(&mut server).pop().unwrap();
                assert_eq!(kind, kind::GOAWAY, "{name}");
                assert_eq!(
                    payload,
                    [1_u32.to_be_bytes(), code.0.to_be_bytes()].concat(),
                    "{name}"
                );
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn what_the_rules_allow_is_passed_over() {
    let mut server = called();
    let frames = [
        frame(kind::PRIORITY, 0, 1, &[0; 5]),
        frame(0x42, 0xff, 7, b"of another time"),
        frame(kind::SETTINGS, 0, 0, &[0, 99, 1, 2, 3, 4]),
        frame(kind::SETTINGS, flag::ACK, 0, &[]),
        frame(kind::GOAWAY, 0, 0, &[0; 8]),
        frame(kind::DATA, 0, 1, &[]),
        frame(kind::DATA, flag::PADDED, 1, &[2, 0, 0, 0, 0, 1, b'x', 9, 9]),
    ];
    assert_eq!(
        feed(&mut server, &frames.concat()).unwrap(),
        [message(b"x")]
    );
    // A head in pieces, padded and with a priority, and its number not the first.
    let mut server = self::server();
    let whole = headers(0, 5, CALL).split_off(FRAME_HEAD);
    let (front, back) = whole.split_at(30);
    let padded = [&[2, 0, 0, 0, 0, 7][..], front, &[0, 0]].concat();
    let bytes = [
        opening(),
        frame(kind::HEADERS, flag::PADDED | flag::PRIORITY, 5, &padded),
        frame(kind::CONTINUATION, 0, 5, &back[..1]),
        frame(kind::CONTINUATION, flag::END_HEADERS, 5, &back[1..]),
    ];
    let events = feed(&mut server, &bytes.concat()).unwrap();
    assert_eq!(events, [Event::Call { authority: None }]);
}

#[test]
fn what_ends_a_call_says_why() {
    let code = 8_u32.to_be_bytes();
    let mut server = called();
    let reset = feed(&mut server, &frame(kind::RST_STREAM, 0, 1, &code));
    assert_eq!(reset, Err(Error::Reset(Code(8))));
    let mut server = called();
    let gone = feed(
        &mut server,
        &frame(kind::GOAWAY, 0, 0, &[[0; 4], code].concat()),
    );
    assert_eq!(gone, Err(Error::GoAway(Code(8))));
    // Not HTTP/2 at all, in either role.
    assert_eq!(
        feed(&mut self::server(), b"GET / HTTP/1.1\r\n"),
        Err(Error::Preface)
    );
    assert_eq!(
        feed(&mut client(), b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Err(Error::Preface)
    );
    // The message says what is wrong with it.
    for (prefix, length) in [([1, 0, 0, 0, 1], 1), ([0, 0, 4, 0, 1], MAX + 1)] {
        let refused = feed(&mut called(), &frame(kind::DATA, 0, 1, &prefix));
        assert_eq!(refused, Err(Error::Message(length)));
    }
}

/// What a client makes of answers that other programs give.
#[test]
fn a_client_understands_what_a_server_or_a_proxy_says() {
    let answer = |frames: &[Vec<u8>]| {
        let bytes = [frame(kind::SETTINGS, 0, 0, &[]), frames.concat()].concat();
        feed(&mut client(), &bytes)
    };
    let ok = || headers(0, 1, &[OK, GRPC]);
    let end = headers(
        1,
        1,
        &[
            ("grpc-status", "14"),
            ("grpc-message", "over%20capacity%21"),
        ],
    );
    let unavailable = Event::End(Status {
        code: 14,
        message: "over capacity!".into(),
    });
    assert_eq!(answer(&[ok(), end.clone()]), Ok(vec![unavailable]));
    let both = [OK, GRPC, ("grpc-status", "7")];
    let denied = Event::End(Status {
        code: 7,
        message: String::new(),
    });
    assert_eq!(answer(&[headers(1, 1, &both)]), Ok(vec![denied]));
    let early = headers(0, 1, &[(":status", "103"), ("link", "</a>")]);
    assert_eq!(answer(&[early, ok()]), Ok(vec![]));
    let bad = headers(0, 1, &[(":status", "502"), ("content-type", "text/html")]);
    assert_eq!(answer(&[bad]), Err(Error::Http(502)));
    for (name, frames) in [
        (
            "an end that says nothing",
            vec![ok(), headers(1, 1, &[("a", "b")])],
        ),
        (
            "a head that ends without a word",
            vec![headers(1, 1, &[OK, GRPC])],
        ),
        (
            "an early hint that ends",
            vec![headers(1, 1, &[(":status", "103")])],
        ),
        ("data that ends", vec![ok(), frame(kind::DATA, 1, 1, &[])]),
        ("data before the head", vec![frame(kind::DATA, 0, 1, b"x")]),
        ("no status", vec![headers(0, 1, &[GRPC])]),
        ("a stream of its own", vec![headers(0, 3, &[OK])]),
        ("a frame after the end", vec![ok(), end.clone(), end]),
    ] {
        assert!(
            matches!(answer(&frames), Err(Error::Broken { .. })),
            "{name}"
        );
    }
    // A server that goes away for others goes on for this call; one that doesn't know it can't.
    let goodbye = |last: u32| frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    assert_eq!(answer(&[ok(), goodbye(1)]), Ok(vec![]));
    assert_eq!(answer(&[goodbye(0)]), Err(Error::GoAway(Code::NO_ERROR)));
}

proptest! {
    /// Whatever the sizes of messages, of pieces and of the peer's windows and frames: every message
    /// arrives, in order and whole.
    #[test]
    fn messages_arrive_as_they_were_sent(
        sizes in prop::collection::vec(prop_oneof![0..40_usize, 0..70_000_usize, Just(MAX)], 1..12),
        piece in prop_oneof![1..60_usize, 1..40_000_usize],
        upwards: bool,
    ) {
        let (mut client, mut server) = connected();
        let (from, to) = match upwards {
            true => (&mut client, &mut server),
            false => (&mut server, &mut client),
        };
        let sent: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(number, size)| vec![number as u8; *size])
            .collect();
        let mut came = Vec::new();
        for bytes in &sent {
            say(from, bytes);
            while !from.takes_message() {
                came.extend(carry(from, to, piece).unwrap());
                carry(to, from, piece).unwrap();
            }
        }
        from.end();
        came.extend(carry(from, to, piece).unwrap());
        let mut expected: Vec<_> = sent.iter().map(|bytes| message(bytes)).collect();
        expected.push(Event::End(Status::OK));
        prop_assert_eq!(came, expected);
    }

    /// However a connection's bytes are cut, they mean the same.
    #[test]
    fn nothing_depends_on_where_bytes_are_cut(
        frames in prop::collection::vec(
            (0..12_u8, any::<u8>(), 0..6_u32, prop::collection::vec(any::<u8>(), 0..40)),
            0..20,
        ),
        is_server: bool,
        piece in 1..50_usize,
    ) {
        let (begin, mut whole, mut cut) = match is_server {
            true => ([opening(), headers(0, 1, CALL)].concat(), server(), server()),
            false => (frame(kind::SETTINGS, 0, 0, &[]), client(), client()),
        };
        let rest = frames.iter().flat_map(|(kind, flags, stream, payload)| {
            frame(*kind, *flags, *stream, payload)
        });
        let bytes: Vec<u8> = begin.into_iter().chain(rest).collect();
        let once = feed(&mut whole, &bytes);
        let mut input = BytesMut::new();
        let mut events = Vec::new();
        let mut outcome = Ok(());
        'all: for piece in bytes.chunks(piece) {
            input.put_slice(piece);
            loop {
                match cut.receive(&mut input) {
                    Ok(Some(event)) => events.push(event),
                    Ok(None) => break,
                    Err(error) => {
                        outcome = Err(error);
                        break 'all;
                    }
                }
            }
        }
        match (&once, outcome) {
            (Ok(all), Ok(())) => prop_assert_eq!(all, &events),
            (Err(error), Err(other)) => prop_assert_eq!(error, &other),
            (once, other) => prop_assert!(false, "{:?} but {:?}", once, other),
        }
        prop_assert_eq!(whole.output(), cut.output());
    }
}
