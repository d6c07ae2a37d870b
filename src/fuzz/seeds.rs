//! Where fuzzers begin: small inputs of each kind, for each target.

use bytes::Bytes;
use prost::Message;

use crate::grpc::tests::breaches;
use crate::head::{Lines, LinesBuilder, RequestHead, ResponseHead};
use crate::id::ExchangeId;
use crate::mux::{Frame, Reason};
use crate::wire::{AgentMessage, Hello, Rejection, ServerMessage, Welcome};

use super::stream::NAMES;

/// The name of a file and what is in it.
pub(super) type Seed = (String, Vec<u8>);

fn seed(name: &str, bytes: impl Into<Vec<u8>>) -> Seed {
    (name.to_owned(), bytes.into())
}

/// What a peer says below the messages: whatever breaks a rule, to a server with a call and to a
/// client, cut into pieces of three bytes.
pub(super) fn tunnel() -> Vec<Seed> {
    let seeds = |(name, bytes, _): (&str, Vec<u8>, _)| {
        [("server", 1), ("client", 2)].map(|(to, how)| {
            let name = format!("{to}-{}", name.replace([' ', '\''], "-"));
            seed(&name, [&[how, 2], &bytes[..]].concat())
        })
    };
    breaches().into_iter().flat_map(seeds).collect()
}

/// Messages off the wire.
pub(super) fn frames() -> Vec<Seed> {
    let id = |slot, generation| ExchangeId { slot, generation };
    let lines = |pairs: &[(&str, &str)]| -> Lines {
        let mut lines = LinesBuilder::default();
        for (name, value) in pairs {
            lines.push(name.as_bytes(), value.as_bytes()).unwrap();
        }
        lines.finish()
    };
    let open = |id, body: &'static str, end, credit| Frame::Open {
        id,
        head: RequestHead {
            method: Bytes::from_static(b"POST"),
            target: Bytes::from_static(b"/a?b=c"),
            lines: lines(&[("host", "example"), ("x-empty", "")]),
        },
        body: body.into(),
        end,
        credit,
    };
    let answer = |id, status, body: &'static str, end| Frame::Answer {
        id,
        head: ResponseHead {
            status,
            lines: lines(&[("content-type", "text/plain")]),
        },
        body: body.into(),
        end,
    };
    let interim = |id, status| Frame::Interim {
        id,
        head: ResponseHead {
            status,
            lines: lines(&[("link", "</a>")]),
        },
    };
    let data = |id, body: &'static str, end| Frame::Data {
        id,
        body: body.into(),
        end,
    };
    let trailers = |id| Frame::Trailers {
        id,
        lines: lines(&[("x-sum", "1")]),
    };
    let reset = |id, reason| Frame::Reset { id, reason };
    let credit = |id, bytes| Frame::Credit { id, bytes };
    let a = id(0, 0);
    let b = id(1, 1);
    let to_agent: Vec<(&str, Vec<Frame>)> = vec![
        ("open", vec![open(a, "", true, 0)]),
        (
            "open-with-body",
            vec![open(a, "hello", false, 49_152), data(a, " world", true)],
        ),
        (
            "open-twice",
            vec![open(a, "", true, 0), open(a, "", true, 0)],
        ),
        (
            "open-other-slots",
            vec![
                open(a, "", true, 0),
                open(b, "x", false, 1),
                open(id(1023, 9), "", true, 0),
            ],
        ),
        ("open-slot-beyond", vec![open(id(1024, 0), "", true, 0)]),
        (
            "open-and-reset",
            vec![open(a, "", false, 0), reset(a, Reason::Cancelled)],
        ),
        (
            "open-and-cancel",
            vec![open(a, "", true, 0), reset(a, Reason::Cancelled)],
        ),
        (
            "reopened",
            vec![
                open(a, "", false, 0),
                reset(a, Reason::Cancelled),
                open(id(0, 1), "", true, 0),
            ],
        ),
        (
            "upload-with-trailers",
            vec![open(a, "", false, 0), data(a, "part", false), trailers(a)],
        ),
        (
            "data-after-end",
            vec![open(a, "", true, 0), data(a, "late", false)],
        ),
        ("credit", vec![open(a, "", true, 0), credit(a, 65_536)]),
        (
            "credit-overflow",
            vec![open(a, "", true, u32::MAX), credit(a, u32::MAX)],
        ),
        (
            "credit-for-nobody",
            vec![
                credit(b, 7),
                data(b, "x", true),
                reset(b, Reason::Cancelled),
            ],
        ),
        ("wrong-direction", vec![answer(a, 200, "", true)]),
        (
            "heartbeat",
            vec![
                Frame::Ping { nonce: 1 },
                Frame::Pong { nonce: 0 },
                Frame::Ping { nonce: u64::MAX },
            ],
        ),
        ("drain", vec![Frame::Drain, open(a, "", true, 0)]),
    ];
    let from_agent: Vec<(&str, Vec<Frame>)> = vec![
        ("answer", vec![answer(a, 200, "hello", true)]),
        (
            "answer-in-pieces",
            vec![
                answer(a, 200, "", false),
                data(a, "one", false),
                data(a, "", true),
            ],
        ),
        (
            "interim",
            vec![interim(a, 100), interim(a, 103), answer(a, 204, "", true)],
        ),
        ("interim-with-final-status", vec![interim(a, 200)]),
        (
            "answer-twice",
            vec![answer(a, 200, "", false), answer(a, 200, "", false)],
        ),
        ("data-first", vec![data(a, "early", false)]),
        (
            "answer-with-trailers",
            vec![answer(b, 200, "x", false), trailers(b)],
        ),
        (
            "answers-crossed",
            vec![
                answer(b, 200, "b", false),
                answer(a, 404, "a", true),
                data(b, "b", true),
            ],
        ),
        (
            "reset-by-agent",
            vec![
                reset(a, Reason::UpstreamRefused),
                reset(b, Reason::Unknown(99)),
            ],
        ),
        (
            "upgraded",
            vec![
                answer(id(2, 2), 101, "", false),
                data(id(2, 2), "\u{81}", false),
                credit(id(2, 2), 1),
            ],
        ),
        ("wrong-direction-to-server", vec![open(a, "", true, 0)]),
        ("status-0", vec![answer(a, 0, "", true)]),
        ("status-65535", vec![answer(a, 65_535, "", true)]),
    ];
    let mut seeds = Vec::new();
    for (name, frames) in to_agent {
        seeds.push(seed(name, ServerMessage::from(frames).encode_to_vec()));
    }
    for (name, frames) in from_agent {
        seeds.push(seed(name, AgentMessage::from(frames).encode_to_vec()));
    }
    let hello = AgentMessage::from(Hello {
        agent_id: "agent-1".to_owned(),
        ..Hello::default()
    });
    let welcome = ServerMessage::from(Welcome::default());
    let rejection = ServerMessage::from(Rejection::default());
    let whole = AgentMessage::from(vec![answer(a, 200, "hello", true)]).encode_to_vec();
    seeds.extend([
        seed("hello", hello.encode_to_vec()),
        seed("welcome", welcome.encode_to_vec()),
        seed("rejection", rejection.encode_to_vec()),
        seed("empty", []),
        seed("cut-short", &whole[..whole.len() - 3]),
        // Kind 100 with three bytes in it, and field 50 beside it.
        seed("unknown", [0x90, 3, 1, 0x12, 8, 8, 7, 0xa2, 6, 3, 1, 2, 3]),
        seed(
            "length-beyond-the-end",
            [0x12, 0xff, 0xff, 0xff, 0xff, 0x0f],
        ),
        seed("not-protobuf", *b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ]);
    seeds
}

/// Numbers of [`mux::fuzz`](crate::mux::fuzz)'s operations, with the bytes that follow.
pub(super) fn session() -> Vec<Seed> {
    const ALL: [u8; 3] = [0, 0, 4];
    const TIGHT: [u8; 3] = [0, 1, 1];
    const HOSTILE: [u8; 3] = [1, 0, 4];
    // The opener's end is 0, the acceptor's 1; the newest exchange is 0.
    let open: &[u8] = &[0, 0, 3, 20];
    let open_with_body: &[u8] = &[0, 1, 3, 20];
    let accept: &[u8] = &[1];
    let to_acceptor: &[u8] = &[13, 0, 16, 0];
    let to_opener: &[u8] = &[13, 1, 16, 1];
    let answer: &[u8] = &[3, 0, 0, 3, 10];
    let read_head: &[u8] = &[9, 0];
    let send_answer: &[u8] = &[4, 1, 0, 4, 0x3f, 0xff];
    let send_much: &[u8] = &[4, 1, 0, 5, 0, 2, 0xff, 0xff];
    let upload: &[u8] = &[4, 0, 0, 2];
    let finish_answer: &[u8] = &[5, 1, 0, 0];
    let finish_upload: &[u8] = &[5, 0, 0, 1, 3, 4];
    let read: &[u8] = &[10, 0, 0];
    let read_upload: &[u8] = &[10, 1, 0];
    let release: &[u8] = &[8, 0, 0, 8, 1, 0];
    let abort: &[u8] = &[7, 0, 0];
    let fail: &[u8] = &[6, 1, 0];
    let events: &[u8] = &[12, 0, 12, 1];
    let capacity: &[u8] = &[11, 1, 0];
    let begun = [open, to_acceptor, accept].concat();
    let join = |start: [u8; 3], parts: &[&[u8]]| [&start[..], &parts.concat()].concat();

    let mut seeds = vec![
        seed("nothing", ALL),
        seed("open", join(ALL, &[open])),
        seed(
            "small-answer",
            join(
                ALL,
                &[
                    &begun,
                    answer,
                    send_answer,
                    finish_answer,
                    to_opener,
                    read_head,
                    read,
                    read,
                    release,
                ],
            ),
        ),
        seed(
            "large-answer",
            join(
                ALL,
                &[
                    &begun,
                    answer,
                    send_much,
                    to_opener,
                    read,
                    read,
                    to_acceptor,
                    capacity,
                    send_much,
                    to_opener,
                    read,
                    finish_answer,
                    to_opener,
                ],
            ),
        ),
        seed(
            "upload",
            join(
                ALL,
                &[
                    open_with_body,
                    to_acceptor,
                    accept,
                    upload,
                    to_acceptor,
                    read_upload,
                    to_opener,
                    upload,
                    finish_upload,
                    to_acceptor,
                    read_upload,
                    read_upload,
                ],
            ),
        ),
        seed(
            "early-answer",
            join(
                ALL,
                &[
                    open_with_body,
                    upload,
                    to_acceptor,
                    accept,
                    answer,
                    finish_answer,
                    to_opener,
                    read_head,
                    read,
                    abort,
                    to_acceptor,
                    release,
                ],
            ),
        ),
        seed(
            "abort-before-sending",
            join(ALL, &[open, abort, to_acceptor]),
        ),
        seed(
            "abort-after-head",
            join(
                ALL,
                &[&begun, abort, to_acceptor, events, to_opener, release],
            ),
        ),
        seed(
            "fail-midway",
            join(
                ALL,
                &[
                    &begun,
                    answer,
                    send_answer,
                    fail,
                    to_opener,
                    read_head,
                    read,
                    read,
                    to_acceptor,
                ],
            ),
        ),
        seed(
            "released-early",
            join(ALL, &[&begun, release, to_acceptor, to_opener]),
        ),
        seed(
            "interim",
            join(
                ALL,
                &[
                    &begun,
                    &[2, 0, 0, 3, 5],
                    to_opener,
                    read_head,
                    &[2, 0, 1, 3, 5],
                    answer,
                    to_opener,
                    read_head,
                    read_head,
                ],
            ),
        ),
        seed(
            "interim-too-large",
            join(ALL, &[&begun, &[2, 0, 1, 0], answer, to_opener, read_head]),
        ),
        seed(
            "head-too-large",
            join(
                ALL,
                &[&[0, 0, 2], &begun, &[3, 0, 0, 2], to_opener, read_head],
            ),
        ),
        seed(
            "wrong-status",
            join(ALL, &[&begun, &[3, 0, 2, 3, 1], to_opener, read_head]),
        ),
        seed(
            "upgrade",
            join(
                ALL,
                &[
                    open_with_body,
                    to_acceptor,
                    accept,
                    &[3, 0, 1, 3, 1],
                    to_opener,
                    read_head,
                    upload,
                    send_answer,
                    to_acceptor,
                    to_opener,
                    finish_upload,
                    finish_answer,
                    to_acceptor,
                    to_opener,
                ],
            ),
        ),
        seed(
            "tight",
            join(
                TIGHT,
                &[
                    open_with_body,
                    open,
                    open,
                    to_acceptor,
                    accept,
                    accept,
                    answer,
                    send_much,
                    send_much,
                    to_opener,
                    read,
                ],
            ),
        ),
        seed(
            "more-than-agreed",
            join(
                [0, 0, 0],
                &[open, open, open, to_acceptor, accept, accept, release],
            ),
        ),
        seed(
            "many-turns",
            join(
                ALL,
                &[
                    &begun,
                    answer,
                    send_much,
                    &begun,
                    answer,
                    send_much,
                    &[14, 1, 0x40, 0],
                    &[15, 1, 0],
                    read,
                    &[14, 1, 0x40, 0],
                    &[15, 1, 3],
                    read,
                ],
            ),
        ),
        seed(
            "heartbeats",
            join(
                ALL,
                &[
                    &[17, 0x23, 0x28],
                    to_acceptor,
                    to_opener,
                    &[17, 0x23, 0x28],
                    to_acceptor,
                    to_opener,
                    to_acceptor,
                ],
            ),
        ),
        seed(
            "silence",
            join(ALL, &[&begun, &[17, 0xff, 0xff], answer, to_opener]),
        ),
        seed(
            "drain",
            join(
                ALL,
                &[
                    &begun,
                    &[18, 1, 1],
                    to_opener,
                    open,
                    answer,
                    finish_answer,
                    to_opener,
                    release,
                ],
            ),
        ),
        seed(
            "close",
            join(
                ALL,
                &[
                    &begun,
                    answer,
                    send_answer,
                    &[18, 0, 0],
                    read_head,
                    read,
                    events,
                ],
            ),
        ),
    ];
    // An end, the name of an exchange, and a frame: to the acceptor, or to the opener.
    for (name, before, frame) in [
        (
            "hostile-open",
            &begun[..],
            &[19, 1, 1, 1, 1, 0, 3, 5, 1, 0, 9, 1, 3, 0, 7][..],
        ),
        (
            "hostile-open-same-slot",
            &begun,
            &[19, 1, 3, 0, 0, 3, 5, 1, 0, 9, 1, 3, 0, 7],
        ),
        (
            "hostile-open-to-opener",
            &begun,
            &[19, 0, 3, 0, 0, 3, 5, 1, 0, 9, 1, 3, 0, 7],
        ),
        ("hostile-interim", &begun, &[19, 0, 3, 0, 1, 0, 103, 3, 5]),
        (
            "hostile-answer",
            &begun,
            &[19, 0, 3, 0, 2, 0, 100, 3, 5, 1, 0x40, 0, 0],
        ),
        (
            "hostile-answer-before-open",
            open,
            &[19, 0, 3, 0, 2, 0, 100, 3, 5, 1, 0, 0, 1],
        ),
        ("hostile-data", &begun, &[19, 1, 3, 0, 3, 1, 0x40, 0, 1]),
        (
            "hostile-data-beyond-credit",
            &begun,
            &[19, 1, 3, 0, 3, 0, 0],
        ),
        ("hostile-trailers", &begun, &[19, 0, 3, 0, 4, 3, 5]),
        (
            "hostile-reset",
            &begun,
            &[19, 0, 3, 0, 5, 11, 19, 0, 3, 0, 5, 1],
        ),
        (
            "hostile-credit",
            &begun,
            &[19, 1, 3, 0, 6, 0, 19, 1, 3, 0, 6, 1],
        ),
        (
            "hostile-heartbeat",
            &begun,
            &[19, 0, 3, 0, 7, 9, 19, 0, 3, 0, 8, 0, 19, 0, 3, 0, 8, 3],
        ),
        ("hostile-drain", &begun, &[19, 0, 3, 0, 9, 0, 0, 3, 20]),
        (
            "hostile-any-id",
            &begun,
            &[19, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 1, 0, 1, 0],
        ),
    ] {
        seeds.push(seed(
            name,
            join(HOSTILE, &[before, frame, to_opener, to_acceptor]),
        ));
    }
    seeds
}

/// Numbers of [`ports::fuzz`](crate::ports::fuzz)'s operations, with the bytes that follow.
pub(super) fn ports() -> Vec<Seed> {
    let join = |leased: u8, parts: &[&[u8]]| [&[leased][..], &parts.concat()].concat();
    let ask = |agent: u8| [0, agent];
    let bound: &[u8] = &[4, 3];
    let lose = |agent: u8| [2, agent];
    let wait = |seconds: u8| [8, seconds];
    let crowd: Vec<u8> = (0..8).flat_map(ask).collect();
    let names_port = |agent: u8, port: u8| [1, agent, port - 98];
    let mut seeds = Vec::new();
    for (suffix, leased) in [("", 0), ("-leased", 1)] {
        for (name, ops) in [
            ("grant", vec![&ask(2)[..], bound]),
            (
                "grant-and-lose",
                vec![&ask(2), bound, &lose(2), &ask(3), bound],
            ),
            ("lost-while-opening", vec![&ask(2), &lose(2), bound]),
            (
                "takeover",
                vec![&ask(2), bound, &ask(2), &lose(2), &ask(2), bound],
            ),
            (
                "exhausted",
                vec![&crowd, bound, bound, &lose(4), &crowd, bound],
            ),
            (
                "pinned",
                vec![&ask(0), &ask(1), bound, &lose(0), &ask(2), bound],
            ),
            (
                "named-port",
                vec![
                    &names_port(2, 102),
                    bound,
                    &names_port(3, 102),
                    bound,
                    &names_port(4, 104),
                    bound,
                ],
            ),
            (
                "foreign",
                vec![
                    &[6, 0, 1],
                    &ask(2),
                    bound,
                    bound,
                    &wait(31),
                    &[6, 0, 0],
                    &ask(3),
                    bound,
                ],
            ),
            (
                "pin-foreign",
                vec![
                    &[6, 3, 1],
                    &ask(0),
                    bound,
                    &ask(0),
                    &wait(39),
                    &ask(0),
                    bound,
                ],
            ),
            (
                "no-descriptors",
                vec![&[7, 0], &ask(2), bound, &wait(3), &[7, 1], &ask(2), bound],
            ),
            (
                "lease-over",
                vec![
                    &ask(2),
                    bound,
                    &lose(2),
                    &wait(19),
                    &wait(2),
                    &ask(3),
                    bound,
                ],
            ),
            (
                "back-in-time",
                vec![&ask(2), bound, &lose(2), &wait(5), &ask(2), bound],
            ),
            (
                "stray",
                vec![&[5, 3, 1, 0], &ask(2), &[5, 2, 1, 1], bound, &[5, 2, 2, 0]],
            ),
            ("drained", vec![&crowd, bound, &[9], bound, &crowd, bound]),
            (
                "restart",
                vec![&crowd, bound, &[10], bound, bound, &ask(2), &ask(3), bound],
            ),
            (
                "restart-twice",
                vec![&ask(2), bound, &[10], &ask(2), &[10], bound, &wait(21)],
            ),
            (
                "range-shrinks",
                vec![
                    &crowd,
                    bound,
                    bound,
                    &[11, 2, 4, 1, 0],
                    &lose(2),
                    &ask(3),
                    bound,
                ],
            ),
            (
                "range-empty",
                vec![&ask(2), bound, &[11, 5, 3, 0, 0], &ask(3), &lose(2)],
            ),
            (
                "new-pin",
                vec![
                    &ask(2),
                    bound,
                    &[11, 1, 9, 2, 1, 3, 2],
                    &ask(3),
                    &lose(2),
                    &ask(3),
                    bound,
                ],
            ),
            (
                "pins-contradict",
                vec![
                    &ask(2),
                    bound,
                    &[11, 1, 9, 2, 2, 3, 2, 4, 2],
                    &ask(3),
                    bound,
                ],
            ),
        ] {
            let bytes = join(leased, &ops);
            seeds.push(seed(&format!("{name}{suffix}"), bytes));
        }
    }
    seeds
}

/// What a visitor or a service sends.
pub(super) fn http1() -> Vec<Seed> {
    let of = |kind: u8, step: u8, text: &str| [&[kind, step], text.as_bytes()].concat();
    let requests = [
        ("get", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("get-1.0", "GET /x HTTP/1.0\r\n\r\n"),
        (
            "keep-alive-1.0",
            "GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /y HTTP/1.0\r\n\r\n",
        ),
        (
            "pipelined",
            "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\nHEAD /3 HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "length",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "chunked",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "empty-chunked",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "cl-te",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "te-te",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        ),
        (
            "two-lengths",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        ),
        (
            "length-plus",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello",
        ),
        ("two-hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        ("no-host", "GET / HTTP/1.1\r\n\r\n"),
        (
            "absolute",
            "GET http://a:80/x?y HTTP/1.1\r\nHost: a:80\r\n\r\n",
        ),
        ("asterisk", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("connect", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
        (
            "obs-fold",
            "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
        ),
        ("bare-cr", "GET / HTTP/1.1\r\nHost: a\r\nX: y\rZ: w\r\n\r\n"),
        (
            "bare-lf",
            "GET / HTTP/1.1\nHost: a\n\nGET / HTTP/1.1\nHost: a\n\n",
        ),
        ("nul-byte", "GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n"),
        ("space-before-colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
        (
            "empty-lines-first",
            "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "hop-by-hop",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x-hop, te, close\r\nX-Hop: 1\r\nTE: trailers\r\nKeep-Alive: 5\r\n\r\n",
        ),
        (
            "upgrade",
            "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n\u{81}\u{5}hello",
        ),
        (
            "expect",
            "PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok",
        ),
        (
            "forwarded",
            "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX_Forwarded_Host: b\r\nForwarded: for=c\r\n\r\n",
        ),
        (
            "chunk-size-tricks",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        ),
        (
            "chunk-size-huge",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello",
        ),
        ("http-2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("version-1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
        ("tls", "\u{16}\u{3}\u{1}\u{2}\0"),
        (
            "non-ascii",
            "GET /\u{e9} HTTP/1.1\r\nHost: a\r\nX: \u{e9}\r\n\r\n",
        ),
    ];
    let answers = [
        (
            "ok",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "until-close",
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nas much as there is",
        ),
        ("answer-1.0", "HTTP/1.0 200 OK\r\n\r\nhello"),
        (
            "answer-chunked",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\nContent-Length: 4\r\n\r\n",
        ),
        (
            "interim",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        ),
        (
            "not-modified",
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "length-and-chunks",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "gzip-encoding",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two-answer-lengths",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        ),
        (
            "switching",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nbytes",
        ),
        ("no-reason", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"),
        ("status-0", "HTTP/1.1 000 x\r\n\r\n"),
        ("status-999", "HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n"),
        (
            "connection-close",
            "HTTP/1.1 200 OK\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nContent-Length: 2\r\n\r\nok",
        ),
    ];
    let mut seeds = Vec::new();
    for (index, (name, text)) in requests.into_iter().enumerate() {
        seeds.push(seed(name, of(0, 1 + index as u8 % 7, text)));
    }
    for (index, (name, text)) in answers.into_iter().enumerate() {
        seeds.push(seed(name, of(1, 1 + index as u8 % 7, text)));
    }
    let long = "x".repeat(300);
    seeds.extend([
        seed("to-head", of(2, 3, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")),
        seed("line-too-long", of(0, 9, &format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"))),
        seed("head-too-large", of(0, 200, &format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", format!("X: {long}\r\n").repeat(8)))),
        seed("too-many-lines", of(0, 2, &format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(17)))),
    ]);
    seeds
}

/// What [`Said`](super::stream::Said) reads.
fn said(lines: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let piece = |bytes: &mut Vec<u8>, text: &str| {
        bytes.push(text.len() as u8);
        bytes.extend_from_slice(text.as_bytes());
    };
    for (name, value) in lines {
        match NAMES.iter().position(|known| known == name) {
            Some(number) => bytes.push(number as u8 + 2),
            None if *name == "DATA" => bytes.push(0),
            None => {
                bytes.push(1);
                piece(&mut bytes, name);
            }
        }
        piece(&mut bytes, value);
    }
    bytes
}

/// Answers in HTTP/2, as [`agent::fuzz`](crate::agent::fuzz) reads them.
pub(super) fn http2_answers() -> Vec<Seed> {
    let status = |status, more: &[(&'static str, &'static str)]| {
        [&[0][..], &said(&[&[(":status", status)], more].concat())].concat()
    };
    let ok = |more: &[(&'static str, &'static str)]| status("200", more);
    let to_head = |mut answer: Vec<u8>| {
        answer[0] = 1;
        answer
    };
    let hello = ("DATA", "hello");
    [
        ("bodiless", ok(&[])),
        ("body", ok(&[("x", "y"), hello])),
        (
            "length",
            ok(&[("content-length", "5"), ("DATA", "he"), ("DATA", "llo")]),
        ),
        ("length-short", ok(&[("content-length", "6"), hello])),
        ("length-long", ok(&[("content-length", "4"), hello])),
        ("length-none", ok(&[("content-length", "5")])),
        ("length-0", ok(&[("content-length", "0"), ("DATA", "")])),
        (
            "two-lengths",
            ok(&[("content-length", "5"), ("content-length", "5"), hello]),
        ),
        ("length-list", ok(&[("content-length", "5, 5"), hello])),
        (
            "body-like-an-answer",
            ok(&[("DATA", "HTTP/1.1 200 OK\r\n\r\n")]),
        ),
        ("trailers", ok(&[hello, ("x", "1"), ("grpc-status", "0")])),
        ("trailers-only", ok(&[("DATA", ""), ("x", "1")])),
        (
            "trailers-that-frame",
            ok(&[
                hello,
                ("content-length", "9"),
                ("transfer-encoding", "chunked"),
            ]),
        ),
        (
            "trailers-after-length",
            ok(&[("content-length", "5"), hello, ("x", "1")]),
        ),
        ("status-in-trailers", ok(&[hello, (":status", "200")])),
        ("204", status("204", &[])),
        ("204-with-length", status("204", &[("content-length", "5")])),
        ("204-with-body", status("204", &[hello])),
        ("304-with-length", status("304", &[("content-length", "5")])),
        ("304-with-body", status("304", &[hello])),
        ("205", status("205", &[("content-length", "0")])),
        ("100", status("100", &[])),
        ("101", status("101", &[("upgrade", "websocket")])),
        ("103", status("103", &[("link", "</a>")])),
        ("426", status("426", &[("upgrade", "websocket"), hello])),
        ("999", status("999", &[])),
        ("099", status("099", &[])),
        ("status-text", status("200 OK", &[])),
        ("two-statuses", ok(&[(":status", "404")])),
        ("path", ok(&[(":path", "/")])),
        ("connection", ok(&[("connection", "close")])),
        (
            "transfer-encoding",
            ok(&[("transfer-encoding", "chunked"), ("DATA", "0\r\n\r\n")]),
        ),
        ("line-in-value", ok(&[("x", "y\r\nz: w")])),
        ("padded-value", ok(&[("x", " y ")])),
        ("no-ascii", ok(&[("x", "\u{e9}")])),
        ("head", to_head(ok(&[("content-length", "5")]))),
        ("head-with-body", to_head(ok(&[hello]))),
        ("head-204", to_head(status("204", &[]))),
    ]
    .into_iter()
    .map(|(name, bytes)| seed(name, bytes))
    .collect()
}

/// Requests in HTTP/2, as [`server::fuzz`](crate::server::fuzz) reads them.
pub(super) fn http2() -> Vec<Seed> {
    let of = said;
    let asked = |method, path, more: &[(&'static str, &'static str)]| {
        let pseudo = [
            (":method", method),
            (":scheme", "http"),
            (":authority", "a:80"),
            (":path", path),
        ];
        of(&[&pseudo[..], more].concat())
    };
    let get = |more: &[(&'static str, &'static str)]| asked("GET", "/a?b=%2f", more);
    let post = |more: &[(&'static str, &'static str)]| asked("POST", "/", more);
    let crumb = ("cookie", "a=1");
    [
        ("get", get(&[])),
        ("head", asked("HEAD", "/", &[])),
        ("asterisk", asked("OPTIONS", "*", &[])),
        ("asterisk-get", asked("GET", "*", &[])),
        ("absolute", asked("GET", "http://b/", &[])),
        (
            "no-path",
            of(&[(":method", "GET"), (":scheme", "http"), (":authority", "a")]),
        ),
        ("blank-in-path", asked("GET", "/ HTTP/1.1", &[])),
        ("line-in-path", asked("GET", "/\r\nX: y", &[])),
        ("fragment", asked("GET", "/a#b", &[])),
        ("no-ascii-in-path", asked("GET", "/\u{e9}", &[])),
        ("blank-in-method", asked("GET /x", "/", &[])),
        (
            "connect",
            of(&[(":method", "CONNECT"), (":authority", "a:443")]),
        ),
        (
            "extended-connect",
            of(&[
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a"),
                (":path", "/"),
            ]),
        ),
        (
            "no-authority",
            of(&[
                (":method", "GET"),
                (":scheme", "http"),
                (":path", "/"),
                ("host", "b"),
            ]),
        ),
        (
            "no-host-at-all",
            of(&[(":method", "GET"), (":scheme", "http"), (":path", "/")]),
        ),
        ("host-too", get(&[("host", "A:80")])),
        ("other-host", get(&[("host", "b")])),
        (
            "user-in-authority",
            of(&[
                (":method", "GET"),
                (":scheme", "http"),
                (":authority", "u@a"),
                (":path", "/"),
            ]),
        ),
        (
            "ipv6-authority",
            of(&[
                (":method", "GET"),
                (":scheme", "http"),
                (":authority", "[::1]:80"),
                (":path", "/"),
            ]),
        ),
        ("crumbs", get(&[crumb, ("cookie", "b=2"), ("cookie", "")])),
        ("te", get(&[("te", "trailers")])),
        ("te-gzip", get(&[("te", "gzip")])),
        (
            "expect",
            post(&[
                ("expect", "100-continue"),
                ("content-length", "2"),
                ("DATA", "hi"),
            ]),
        ),
        (
            "forwarded",
            get(&[
                ("x-forwarded-for", "1.2.3.4"),
                ("x_forwarded_proto", "https"),
            ]),
        ),
        ("request-id", get(&[("x-request-id", "mine")])),
        ("connection", get(&[("connection", "close")])),
        ("upgrade", get(&[("upgrade", "websocket")])),
        (
            "transfer-encoding",
            post(&[("transfer-encoding", "chunked"), ("DATA", "0\r\n\r\n")]),
        ),
        ("upper-case", get(&[("X-Upper", "y")])),
        ("blank-in-name", get(&[("x y", "z")])),
        ("colon-in-name", get(&[("x:y", "z")])),
        ("line-in-value", get(&[("x", "y\r\nhost: b")])),
        ("padded-value", get(&[("x", " y\t")])),
        ("no-ascii-in-value", get(&[("x", "\u{e9}")])),
        (
            "late-pseudo",
            of(&[
                (":method", "GET"),
                ("x", "y"),
                (":scheme", "http"),
                (":path", "/"),
            ]),
        ),
        ("status", get(&[(":status", "200")])),
        (
            "length",
            post(&[("content-length", "5"), ("DATA", "he"), ("DATA", "llo")]),
        ),
        (
            "length-short",
            post(&[("content-length", "5"), ("DATA", "hell")]),
        ),
        (
            "length-long",
            post(&[("content-length", "5"), ("DATA", "hello!")]),
        ),
        ("length-none", post(&[("content-length", "5")])),
        ("length-0", post(&[("content-length", "0"), ("DATA", "")])),
        (
            "length-plus",
            post(&[("content-length", "+5"), ("DATA", "hello")]),
        ),
        (
            "two-lengths",
            post(&[
                ("content-length", "5"),
                ("content-length", "5"),
                ("DATA", "hello"),
            ]),
        ),
        ("no-length", post(&[("DATA", "hello")])),
        (
            "get-with-body",
            get(&[("DATA", "GET / HTTP/1.1\r\nHost: a\r\n\r\n")]),
        ),
        (
            "trailers",
            post(&[
                ("trailer", "x"),
                ("DATA", "hello"),
                ("x", "1"),
                ("grpc-status", "0"),
            ]),
        ),
        ("trailers-only", post(&[("DATA", ""), ("x", "1")])),
        (
            "trailers-that-frame",
            post(&[
                ("DATA", "hello"),
                ("content-length", "9"),
                ("host", "b"),
                ("x", "1\r\n\r\n"),
            ]),
        ),
        (
            "trailers-pseudo",
            post(&[("DATA", "hello"), (":path", "/b")]),
        ),
        (
            "length-and-trailers",
            post(&[("content-length", "2"), ("DATA", "hi"), ("x", "1")]),
        ),
    ]
    .into_iter()
    .map(|(name, bytes)| seed(name, bytes))
    .collect()
}

/// Files of settings, and variables after a 0.
pub(super) fn config() -> Vec<Seed> {
    [
        ("empty", ""),
        ("comment", "# nothing\n"),
        ("ports", "http:\n  port: 8080\n  agent_port_range:\n    start: 8100\n    end: 8200\n"),
        ("range-backwards", "http:\n  agent_port_range: {start: 9000, end: 8000}\n"),
        ("admin-port-in-range", "http:\n  port: 8150\n  host: 0.0.0.0\n"),
        ("static-ports", "http:\n  static_ports:\n    agent-1: 8100\n    agent-2: 8100\n    Bad Id: 1\n"),
        ("unknown-keys", "http:\n  prot: 1\n  admin:\n    key: x\nhtpp: {}\n"),
        ("duplicate", "http:\n  port: 1\n  port: 2\n"),
        ("secrets", "http:\n  admin_api_key: \"0123456789abcdef\"\ngrpc:\n  auth:\n    shared_token: token-token-token\n    tokens: {a: b, c: d}\n"),
        ("secret-file", "grpc:\n  auth:\n    shared_token_file: no-such-file\n"),
        ("times", "http:\n  port_lease: 30s\n  head_timeout: 1h30m\n  idle_timeout: -5s\n  body_timeout: 99999999999999999999s\n"),
        ("sizes", "http:\n  max_head: 64KiB\n  max_request_line: 8 KiB\n  max_body: off\nserver:\n  max_buffered: 18446744073709551616\n"),
        ("trusted-proxies", "http:\n  trusted_proxies: [10.0.0.0/8, \"::1\", 1.2.3.4/33]\n"),
        ("cors", "http:\n  cors:\n    origins: [\"https://a.example\", \"*\"]\n"),
        ("tls", "grpc:\n  tls:\n    enabled: true\n    client_auth: require\n    cert_file: a.pem\n"),
        ("agent", "grpc:\n  server_address: localhost:9090\n  agent_id: my-service\nlocal:\n  service_url: http://127.0.0.1:3000\n"),
        ("agent-https", "grpc:\n  server_address: \"[::1]:9090\"\n  agent_id: a\n  token: 0x1f\nlocal:\n  service_url: https://user:pass@host:99999/\n  host_header: target\n"),
        ("log", "log:\n  level: info,h2=trace\n  format: json\n"),
        ("wrong-types", "http: [1, 2]\ngrpc: 5\nserver:\n  workers: {a: b}\nlog: ~\n"),
        ("anchors", "a: &a [1, 2]\nb: [*a, *a, *a]\nhttp: {<<: *a}\n"),
        ("tags", "http: !!map\n  port: !!str 8080\n  host: !x y\n"),
        ("flow", "{http: {port: 8080, agent_port_range: {start: 1, end: 2}}}"),
        ("brackets", "[[[[[[[[[[[[{{{{{{{{{{{{"),
        ("not-utf-8", "http:\n  host: \u{fffd}"),
        ("documents", "---\nhttp:\n  port: 1\n---\nhttp:\n  port: 2\n"),
        ("block-text", "http:\n  host: |\n    a\n    b\n  public_host: >-\n    c\n    d\n"),
        ("quotes", "http:\n  host: 'it''s'\n  public_host: \"\\u0041\\n\\x00\"\n"),
        ("tabs", "http:\n\tport: 1\n"),
        ("environment", "\0SILO_HTTP_PORT=8081\nSILO_GRPC_SERVER_ADDRESS=localhost:9090\nSILO_GRPC_AGENT_ID=a\nSILO_LOCAL_SERVICE_URL=http://localhost:3000"),
        ("environment-over-file", "http:\n  port: 1\n\0SILO_HTTP_PORT=2\nSILO_HTTP_STATIC_PORTS=a=8100,b=8101\nSILO_HTTP_TRUSTED_PROXIES=10.0.0.0/8,::1"),
        ("environment-unknown", "\0SILO_HTTP_PROT=1\nSILO_PROXY_PORT=tcp://1.2.3.4\nSILO_=x\nHOME=/"),
        ("environment-wrong", "\0SILO_HTTP_PORT=99999\nSILO_SERVER_WORKERS=0\nSILO_HTTP_STATIC_PORTS=a\nSILO_LOG_LEVEL=loud"),
    ]
    .map(|(name, text)| {
        let mut bytes = text.as_bytes().to_vec();
        if name == "not-utf-8" {
            bytes.extend_from_slice(b"\xff\xfe\n");
        }
        (name.to_owned(), bytes)
    })
    .into()
}
