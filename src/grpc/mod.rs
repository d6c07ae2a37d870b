//! One gRPC call on an HTTP/2 connection of its own, both ends, as a state machine (RFC 9113, and
//! gRPC over HTTP/2). Bytes go in, events come out, and what is to be written lies in a buffer.
//!
//! A tunnel is one call, so this is as much of HTTP/2 as one call needs, and all that a peer may do
//! on a connection: every frame is checked, whatever belongs to other streams is refused, both
//! windows are kept. Idle, it holds no buffers: with thousands of tunnels these are what counts.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hpack;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::str::FromStr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

use hpack::{Malformed, Table};

/// The largest frame accepted: a batch goes in one.
const MAX_FRAME: usize = 128 * 1024;

/// The largest frame that every peer accepts (RFC 9113, section 4.2).
const SMALL_FRAME: usize = 16 * 1024;

/// How many bytes may come that haven't been read: little, as messages are read at once and the
/// tunnel's credit bounds what is kept of them, but enough for a link of 1 Gbit/s with 100 ms of
/// round trip.
const STREAM_WINDOW: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// The window that a stream and a connection begin with (RFC 9113, section 6.9.2).
const FIRST_WINDOW: u32 = 65_535;

/// The largest window there may be.
const LARGEST_WINDOW: i64 = (1 << 31) - 1;

/// The most bytes of a header list, overhead included; gRPC's are a few hundred.
const MAX_HEADER_LIST: usize = 16 * 1024;

/// How much may wait to be written of what answers the peer: who pings without taking the answers
/// is cut.
const MAX_ANSWERS: usize = 16 * 1024;

/// What a client begins a connection with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The bytes before each frame.
const FRAME_HEAD: usize = 9;

/// The bytes before each gRPC message.
const PREFIX: usize = 5;

/// The frames (RFC 9113, section 6).
mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const PRIORITY: u8 = 2;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PUSH_PROMISE: u8 = 5;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

/// Their flags.
mod flag {
    pub(super) const ACK: u8 = 1;
    pub(super) const END_STREAM: u8 = 1;
    pub(super) const END_HEADERS: u8 = 4;
    pub(super) const PADDED: u8 = 8;
    pub(super) const PRIORITY: u8 = 0x20;
}

/// The settings that matter here (RFC 9113, section 6.5.2).
mod setting {
    pub(super) const HEADER_TABLE_SIZE: u16 = 1;
    pub(super) const ENABLE_PUSH: u16 = 2;
    pub(super) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(super) const MAX_FRAME_SIZE: u16 = 5;
    pub(super) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Why a connection or a stream ends early (RFC 9113, section 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(u32);

impl Code {
    /// Nothing is wrong.
    pub const NO_ERROR: Self = Self(0);
    const PROTOCOL: Self = Self(1);
    const FLOW_CONTROL: Self = Self(3);
    const STREAM_CLOSED: Self = Self(5);
    const FRAME_SIZE: Self = Self(6);
    const REFUSED_STREAM: Self = Self(7);
    const COMPRESSION: Self = Self(9);
    const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NO_ERROR",
            1 => "PROTOCOL_ERROR",
            2 => "INTERNAL_ERROR",
            3 => "FLOW_CONTROL_ERROR",
            4 => "SETTINGS_TIMEOUT",
            5 => "STREAM_CLOSED",
            6 => "FRAME_SIZE_ERROR",
            7 => "REFUSED_STREAM",
            8 => "CANCEL",
            9 => "COMPRESSION_ERROR",
            10 => "CONNECT_ERROR",
            11 => "ENHANCE_YOUR_CALM",
            12 => "INADEQUATE_SECURITY",
            13 => "HTTP_1_1_REQUIRED",
            other => return write!(f, "error {other:#x}"),
        })
    }
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The code of gRPC: 0 is OK.
    pub code: u32,
    /// What was said about it.
    pub message: String,
}

impl Status {
    /// All is well.
    pub const OK: Self = Self {
        code: 0,
        message: String::new(),
    };

    fn read(fields: &[hpack::Field]) -> Option<Self> {
        let code = number(fields, "grpc-status")?;
        let message = value(fields, "grpc-message").unwrap_or_default();
        let message = percent_encoding::percent_decode(message);
        Some(Self {
            code,
            message: message.decode_utf8_lossy().into_owned(),
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gRPC status {}", self.code)?;
        match &*self.message {
            "" => Ok(()),
            message => write!(f, ": {message}"),
        }
    }
}

/// Why a connection can't go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// The peer doesn't speak HTTP/2 at all.
    #[error("the peer doesn't speak HTTP/2")]
    Preface,
    /// The peer broke HTTP/2's rules.
    #[error("{what} ({code})")]
    Broken {
        /// The rule.
        what: &'static str,
        /// What the peer is told.
        code: Code,
    },
    /// The peer has reset the stream.
    #[error("the peer reset the stream: {0}")]
    Reset(Code),
    /// The peer has ended the connection.
    #[error("the peer ended the connection: {0}")]
    GoAway(Code),
    /// The answer isn't gRPC's.
    #[error("the answer has HTTP status {0}")]
    Http(u16),
    /// A message is compressed, or longer than allowed.
    #[error("a message of {0} bytes, or compressed")]
    Message(usize),
}

const fn broken(what: &'static str) -> Error {
    Error::Broken {
        what,
        code: Code::PROTOCOL,
    }
}

const fn oversized(what: &'static str) -> Error {
    Error::Broken {
        what,
        code: Code::FRAME_SIZE,
    }
}

impl From<Malformed> for Error {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Code => Self::Broken {
                what: "a header list that can't be decoded",
                code: Code::COMPRESSION,
            },
            Malformed::TooLong => Self::Broken {
                what: "a header list that is too long",
                code: Code::ENHANCE_YOUR_CALM,
            },
        }
    }
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// At a server: the call, to the authority that the client has named. Comes first, and once.
    Call {
        /// Host and port by which the client reached the server, if it said so.
        authority: Option<String>,
    },
    /// At a server: another call than the one it serves; it was answered, and nothing else comes.
    Refused,
    /// The next message, whole.
    Message(Bytes),
    /// The peer will send nothing more. The server has said how the call ended.
    End(Status),
}

/// What a client calls.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Whether the connection has TLS.
    pub secure: bool,
    /// Host and port of the server.
    pub authority: &'a str,
    /// Service and method.
    pub path: &'a str,
    /// What the client calls itself.
    pub user_agent: &'a str,
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    /// How far the peer's side has come.
    peer: Progress,
    /// The call's stream, once there is one.
    stream: u32,
    /// Whether our side of the stream has ended.
    ended: bool,
    /// Whether our side ends as soon as what waits for a window has gone: at a client.
    ending: bool,
    /// What is to be written.
    out: BytesMut,
    /// How much of that answers the peer.
    answers: usize,
    /// Bytes of messages that wait for a window.
    waiting: BytesMut,
    /// What the peer takes in a frame.
    peer_max_frame: usize,
    /// What streams begin with, as the peer has set it.
    peer_first_window: i64,
    /// Whether the peer is still to hear that its smaller table for header lists is kept to.
    table_is_smaller: bool,
    /// What may be sent.
    stream_window: i64,
    connection_window: i64,
    /// What has come and isn't returned yet.
    received: Received,
    /// The header list that is coming.
    block: Option<Block>,
    /// Gone when no list matters any more.
    table: Option<Box<Table>>,
    /// What is left of the DATA frame at hand.
    payload: Bytes,
    /// Whether it is the stream's last.
    last: bool,
    /// The message that is coming.
    message: Incoming,
    /// The longest message accepted.
    max_message: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Serves the method of this path.
    Server(&'static str),
    Client,
}

/// How far the peer's side has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The client's first bytes haven't come.
    Preface,
    /// Its settings haven't.
    Settings,
    /// The call, or the head of the answer, hasn't.
    Head,
    /// Messages may come.
    Open,
    /// Nothing more comes.
    Over,
}

/// Bytes that came and haven't been returned as credit. They are as they come, a quarter of a
/// window at a time, since whatever comes is read at once: so who keeps to no window gains nothing.
#[derive(Debug, Default)]
struct Received {
    stream: u32,
    connection: u32,
}

/// A header list in pieces.
#[derive(Debug)]
struct Block {
    stream: u32,
    ends_stream: bool,
    bytes: BytesMut,
}

/// A message in pieces.
#[derive(Debug, Default)]
struct Incoming {
    prefix: [u8; PREFIX],
    /// How much of the prefix has come.
    prefixed: usize,
    bytes: BytesMut,
}

impl Connection {
    /// The server's end, for the method of this path.
    pub fn server(path: &'static str, max_message: usize) -> Self {
        let mut connection = Self::new(Role::Server(path), Progress::Preface, max_message);
        connection.put_settings(&[
            (setting::HEADER_TABLE_SIZE, 0),
            (setting::MAX_CONCURRENT_STREAMS, 1),
        ]);
        connection
    }

    /// The client's end, which calls at once.
    pub fn client(target: Target<'_>, max_message: usize) -> Self {
        let mut connection = Self::new(Role::Client, Progress::Settings, max_message);
        connection.out.put_slice(PREFACE);
        connection.put_settings(&[(setting::HEADER_TABLE_SIZE, 0), (setting::ENABLE_PUSH, 0)]);
        connection.stream = 1;
        let scheme = if target.secure { "https" } else { "http" };
        connection.put_headers(
            false,
            &[
                (":method", "POST"),
                (":scheme", scheme),
                (":path", target.path),
                (":authority", target.authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", target.user_agent),
            ],
        );
        connection
    }

    fn new(role: Role, peer: Progress, max_message: usize) -> Self {
        Self {
            role,
            peer,
            stream: 0,
            ended: false,
            ending: false,
            out: BytesMut::new(),
            answers: 0,
            waiting: BytesMut::new(),
            peer_max_frame: SMALL_FRAME,
            peer_first_window: FIRST_WINDOW.into(),
            table_is_smaller: false,
            stream_window: FIRST_WINDOW.into(),
            connection_window: FIRST_WINDOW.into(),
            received: Received::default(),
            block: None,
            table: Some(Box::default()),
            payload: Bytes::new(),
            last: false,
            message: Incoming::default(),
            max_message,
        }
    }

    /// What is to be written; [`Connection::wrote`] says how much of it was.
    pub fn output(&self) -> &[u8] {
        &self.out
    }

    /// So much of the output was written.
    pub fn wrote(&mut self, bytes: usize) {
        /// What is kept for the next message, rather than allocated anew.
        const KEPT: usize = 1024;
        self.out.advance(bytes);
        if self.out.is_empty() {
            self.answers = 0;
            // Its capacity doesn't count what stood before the bytes just written.
            if self.out.try_reclaim(KEPT + 1) {
                self.out = BytesMut::new();
            }
        }
    }

    /// Whether a message may be sent now. One at a time: what waits here can't be overtaken.
    pub fn takes_message(&self) -> bool {
        self.out.is_empty()
            && self.waiting.is_empty()
            && !self.ended
            && !self.ending
            && self.stream != 0
    }

    /// Whether some of what was sent waits for a window.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends a message of `length` bytes, which `write` appends. Ask
    /// [`Connection::takes_message`] before.
    pub fn send(&mut self, length: usize, write: impl FnOnce(&mut BytesMut)) {
        let whole = PREFIX + length;
        let mut prefix = [0; PREFIX];
        prefix[1..].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        let fits = whole <= self.peer_max_frame && whole as i64 <= self.window();
        let (into, head) = match fits && self.waiting.is_empty() {
            true => (&mut self.out, FRAME_HEAD),
            false => (&mut self.waiting, 0),
        };
        into.reserve(head + whole);
        if head > 0 {
            put_frame_head(into, whole, kind::DATA, 0, self.stream);
        }
        into.put_slice(&prefix);
        write(into);
        if head > 0 {
            self.stream_window -= whole as i64;
            self.connection_window -= whole as i64;
        } else {
            self.send_waiting();
        }
    }

    /// Ends our side of the call, after what was sent; a server says that all is well.
    pub fn end(&mut self) {
        if self.ended || self.stream == 0 {
            return;
        }
        match self.role {
            Role::Client => {
                self.ending = true;
                self.send_waiting();
            }
            // What waits for a window waits in vain: the server's last word comes first.
            Role::Server(_) => {
                self.waiting = BytesMut::new();
                self.put_headers(true, &[("grpc-status", "0")]);
            }
        }
    }

    /// Says why the connection ends. Nothing can be sent after that.
    pub fn go_away(&mut self, error: &Error) {
        let code = match error {
            Error::Broken { code, .. } => *code,
            Error::Message(_) => Code::ENHANCE_YOUR_CALM,
            Error::Preface => Code::PROTOCOL,
            Error::Reset(_) | Error::GoAway(_) | Error::Http(_) => Code::NO_ERROR,
        };
        let last = match self.role {
            Role::Server(_) => self.stream,
            Role::Client => 0,
        };
        put_frame_head(&mut self.out, 8, kind::GOAWAY, 0, 0);
        self.out.put_u32(last);
        self.out.put_u32(code.0);
        self.ended = true;
    }

    /// Takes the next event out of what came; none if it takes more bytes for one. After
    /// [`Event::End`] and [`Event::Refused`] only what keeps the connection alive is looked at.
    ///
    /// # Errors
    /// Whatever ends the connection; [`Connection::go_away`] tells the peer.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Event>, Error> {
        loop {
            if let Some(message) = self.next_message()? {
                return Ok(Some(Event::Message(message)));
            }
            if std::mem::take(&mut self.last) {
                return self.over().map(Some);
            }
            if self.peer == Progress::Preface {
                let come = input.len().min(PREFACE.len());
                if input[..come] != PREFACE[..come] {
                    return Err(Error::Preface);
                }
                if come < PREFACE.len() {
                    return Ok(None);
                }
                input.advance(come);
                self.peer = Progress::Settings;
            }
            let Some(head) = FrameHead::read(input) else {
                return Ok(None);
            };
            if self.peer == Progress::Settings
                && (head.kind != kind::SETTINGS || head.flags & flag::ACK != 0)
            {
                // Also what speaks something else altogether, at a client.
                return Err(Error::Preface);
            }
            if head.length > MAX_FRAME {
                return Err(oversized("a frame longer than allowed"));
            }
            if input.len() < FRAME_HEAD + head.length {
                return Ok(None);
            }
            input.advance(FRAME_HEAD);
            let payload = input.split_to(head.length);
            if let Some(event) = self.frame(head, payload)? {
                return Ok(Some(event));
            }
            if self.answers > MAX_ANSWERS {
                return Err(Error::Broken {
                    what: "more to answer than the peer takes answers",
                    code: Code::ENHANCE_YOUR_CALM,
                });
            }
        }
    }

    /// How many more bytes the frame at hand has, of which `input` is the beginning.
    pub fn missing(&self, input: &[u8]) -> usize {
        match FrameHead::read(input) {
            Some(head) => (FRAME_HEAD + head.length.min(MAX_FRAME)).saturating_sub(input.len()),
            None => 0,
        }
    }

    fn frame(&mut self, head: FrameHead, payload: BytesMut) -> Result<Option<Event>, Error> {
        if self.block.is_some() && head.kind != kind::CONTINUATION {
            return Err(broken("another frame within a header list"));
        }
        match head.kind {
            kind::DATA => self.data(head, payload),
            kind::HEADERS => self.headers(head, payload),
            kind::CONTINUATION => self.continuation(head, payload),
            kind::SETTINGS => self.settings(head, &payload).map(|()| None),
            kind::PING => self.ping(head, &payload).map(|()| None),
            kind::WINDOW_UPDATE => self.window_update(head, &payload).map(|()| None),
            kind::RST_STREAM => self.reset(head, &payload).map(|()| None),
            kind::GOAWAY => self.gone_away(head, &payload).map(|()| None),
            kind::PRIORITY if head.stream == 0 || payload.len() != 5 => {
                Err(broken("a PRIORITY frame that isn't one"))
            }
            kind::PUSH_PROMISE => Err(broken("a pushed answer")),
            // Kinds that nobody knows are passed over (section 4.1).
            _ => Ok(None),
        }
    }

    fn data(&mut self, head: FrameHead, payload: BytesMut) -> Result<Option<Event>, Error> {
        let length = head.length as u32;
        let payload = unpadded(head, payload.freeze())?;
        self.received.connection += length;
        if head.stream == 0 || head.stream > self.stream && self.stream_is_idle(head.stream) {
            return Err(broken("data on a stream that isn't open"));
        }
        if head.stream != self.stream {
            // Of a call that was refused.
            self.return_credit();
            return Ok(None);
        }
        match self.peer {
            Progress::Open => {}
            Progress::Over => {
                return Err(Error::Broken {
                    what: "data after the end of the stream",
                    code: Code::STREAM_CLOSED,
                });
            }
            _ => return Err(broken("data before the head")),
        }
        self.received.stream += length;
        self.return_credit();
        self.payload = payload;
        self.last = head.flags & flag::END_STREAM != 0;
        Ok(None)
    }

    /// The peer's side has ended without a word about it: as a client's does, and a server's must
    /// not.
    fn over(&mut self) -> Result<Event, Error> {
        if self.role == Role::Client {
            return Err(broken(NO_STATUS));
        }
        if self.message.prefixed > 0 {
            return Err(broken("the stream ends within a message"));
        }
        self.peer = Progress::Over;
        Ok(Event::End(Status::OK))
    }

    /// A stream that was never opened, as opposed to one that was refused.
    fn stream_is_idle(&self, stream: u32) -> bool {
        self.role == Role::Client || stream.is_multiple_of(2) || self.stream == 0
    }

    fn headers(&mut self, head: FrameHead, payload: BytesMut) -> Result<Option<Event>, Error> {
        let mut payload = unpadded(head, payload.freeze())?;
        if head.flags & flag::PRIORITY != 0 {
            if payload.len() < 5 {
                return Err(oversized("a HEADERS frame that is cut"));
            }
            payload.advance(5);
        }
        if head.stream == 0 || head.stream != self.stream && self.role == Role::Client {
            return Err(broken("a header list on a stream that isn't open"));
        }
        if head.stream.is_multiple_of(2) || head.stream < self.stream {
            return Err(broken("a stream that can't be opened"));
        }
        self.block = Some(Block {
            stream: head.stream,
            ends_stream: head.flags & flag::END_STREAM != 0,
            bytes: BytesMut::new(),
        });
        self.block_goes_on(head, &payload)
    }

    fn continuation(&mut self, head: FrameHead, payload: BytesMut) -> Result<Option<Event>, Error> {
        match &self.block {
            Some(block) if block.stream == head.stream => self.block_goes_on(head, &payload),
            _ => Err(broken("a CONTINUATION frame that continues nothing")),
        }
    }

    fn block_goes_on(&mut self, head: FrameHead, piece: &[u8]) -> Result<Option<Event>, Error> {
        let Some(mut block) = self.block.take() else {
            return Ok(None);
        };
        block.bytes.put_slice(piece);
        // Encoded it is shorter than decoded; and empty pieces don't go on for ever.
        if block.bytes.len() > MAX_HEADER_LIST
            || piece.is_empty() && head.kind == kind::CONTINUATION
        {
            return Err(Malformed::TooLong.into());
        }
        if head.flags & flag::END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(None);
        }
        if self.stream != 0 && block.stream != self.stream {
            // A connection carries one call. Its list isn't decoded, and none will be after it.
            self.table = None;
            self.answer(4, kind::RST_STREAM, 0, block.stream);
            self.out.put_u32(Code::REFUSED_STREAM.0);
            return Ok(None);
        }
        let fields = match &mut self.table {
            Some(table) => table.decode(&block.bytes, MAX_HEADER_LIST)?,
            None => Vec::new(),
        };
        match self.role {
            Role::Server(path) => self.request(block, fields, path),
            Role::Client => self.response(block, fields),
        }
    }

    /// A header list at the server: the call, or the trailers after its messages.
    fn request(
        &mut self,
        block: Block,
        fields: Vec<hpack::Field>,
        path: &str,
    ) -> Result<Option<Event>, Error> {
        match self.peer {
            Progress::Open if block.ends_stream => return self.over().map(Some),
            Progress::Open => return Err(broken("trailers that don't end the stream")),
            Progress::Over => {
                return Err(Error::Broken {
                    what: "a header list after the end of the stream",
                    code: Code::STREAM_CLOSED,
                });
            }
            _ => {}
        }
        self.stream = block.stream;
        self.stream_window = self.peer_first_window;
        let value = |name| value(&fields, name);
        let is_grpc =
            value("content-type").is_some_and(|kind| kind.starts_with(b"application/grpc"));
        if value(":path").is_none() || value(":method").is_none() {
            return Err(broken("a request without a method or a path"));
        }
        if !is_grpc {
            self.peer = Progress::Over;
            self.put_headers(true, &[(":status", "415")]);
            return Ok(Some(Event::Refused));
        }
        if value(":path") != Some(path.as_bytes()) || value(":method") != Some(b"POST") {
            self.peer = Progress::Over;
            let unimplemented = ("grpc-status", "12");
            self.put_headers(true, &[OK, GRPC, unimplemented]);
            return Ok(Some(Event::Refused));
        }
        let authority = value(":authority").or_else(|| value("host"));
        let authority = authority.and_then(|name| std::str::from_utf8(name).ok());
        let event = Event::Call {
            authority: authority.map(str::to_owned),
        };
        // Nothing that a client's trailers say matters.
        self.table = None;
        self.peer = Progress::Open;
        if block.ends_stream {
            return Err(broken("a call without a message"));
        }
        self.put_headers(false, &[OK, GRPC]);
        Ok(Some(event))
    }

    /// A header list at the client: the answer's, or the trailers.
    fn response(
        &mut self,
        block: Block,
        fields: Vec<hpack::Field>,
    ) -> Result<Option<Event>, Error> {
        if self.peer == Progress::Over {
            return Err(broken("a header list after the end of the stream"));
        }
        if block.ends_stream {
            let last = Status::read(&fields);
            if self.message.prefixed > 0 {
                return Err(broken("the stream ends within a message"));
            }
            if let Some(status) = last {
                self.peer = Progress::Over;
                return Ok(Some(Event::End(status)));
            }
            if self.peer == Progress::Open {
                return Err(broken(NO_STATUS));
            }
        } else if self.peer == Progress::Open {
            return Err(broken("trailers that don't end the stream"));
        }
        let status: u16 = number(&fields, ":status").ok_or(broken("an answer without a status"))?;
        match status {
            100..=200 if block.ends_stream => return Err(broken(NO_STATUS)),
            100..=199 => {}
            200 => self.peer = Progress::Open,
            other => return Err(Error::Http(other)),
        }
        Ok(None)
    }

    fn settings(&mut self, head: FrameHead, payload: &[u8]) -> Result<(), Error> {
        if head.stream != 0 {
            return Err(broken("settings on a stream"));
        }
        if head.flags & flag::ACK != 0 {
            return match payload {
                [] => Ok(()),
                _ => Err(oversized("an acknowledgement with content")),
            };
        }
        if !payload.len().is_multiple_of(6) {
            return Err(oversized("settings that are cut"));
        }
        for mut setting in payload.chunks_exact(6) {
            let (name, value) = (setting.get_u16(), setting.get_u32());
            match name {
                setting::INITIAL_WINDOW_SIZE => {
                    let window = i64::from(value);
                    // It moves the windows of streams, even below zero (section 6.9.2).
                    self.stream_window += window - self.peer_first_window;
                    self.peer_first_window = window;
                    if window > LARGEST_WINDOW || self.stream_window > LARGEST_WINDOW {
                        return Err(window_overflow());
                    }
                }
                // Nothing that is sent refers to it, but a smaller one has to be acknowledged.
                setting::HEADER_TABLE_SIZE => {
                    self.table_is_smaller |= (value as usize) < hpack::TABLE_SIZE;
                }
                setting::MAX_FRAME_SIZE => {
                    self.peer_max_frame = value as usize;
                    if !(SMALL_FRAME..1 << 24).contains(&self.peer_max_frame) {
                        return Err(broken("an impossible size of frames"));
                    }
                }
                _ => {}
            }
        }
        if self.peer == Progress::Settings {
            self.peer = Progress::Head;
        }
        self.answer(0, kind::SETTINGS, flag::ACK, 0);
        self.send_waiting();
        Ok(())
    }

    fn ping(&mut self, head: FrameHead, payload: &[u8]) -> Result<(), Error> {
        if head.stream != 0 {
            return Err(broken("a ping on a stream"));
        }
        if payload.len() != 8 {
            return Err(oversized("a ping that isn't one"));
        }
        if head.flags & flag::ACK == 0 {
            self.answer(8, kind::PING, flag::ACK, 0);
            self.out.put_slice(payload);
        }
        Ok(())
    }

    fn window_update(&mut self, head: FrameHead, mut payload: &[u8]) -> Result<(), Error> {
        if payload.len() != 4 {
            return Err(oversized("a window update that isn't one"));
        }
        let more = i64::from(payload.get_u32() & !(1 << 31));
        if more == 0 {
            return Err(broken("a window update of nothing"));
        }
        if head.stream != 0 && head.stream != self.stream {
            // Of a stream that was refused, at most: nothing depends on it.
            return Ok(());
        }
        let window = match head.stream {
            0 => &mut self.connection_window,
            _ => &mut self.stream_window,
        };
        *window += more;
        if *window > LARGEST_WINDOW {
            return Err(window_overflow());
        }
        self.send_waiting();
        Ok(())
    }

    fn reset(&mut self, head: FrameHead, mut payload: &[u8]) -> Result<(), Error> {
        if payload.len() != 4 {
            return Err(oversized("a reset that isn't one"));
        }
        if head.stream == 0 || self.stream == 0 {
            return Err(broken("a reset of no stream"));
        }
        match head.stream == self.stream {
            true => Err(Error::Reset(Code(payload.get_u32()))),
            false => Ok(()),
        }
    }

    fn gone_away(&mut self, head: FrameHead, mut payload: &[u8]) -> Result<(), Error> {
        if head.stream != 0 || payload.len() < 8 {
            return Err(broken("a GOAWAY frame that isn't one"));
        }
        let last = payload.get_u32() & !(1 << 31);
        let code = Code(payload.get_u32());
        // Without an error, and with our stream among those that go on, it asks for no more of them,
        // and there will be none.
        let goes_on = self.role != Role::Client || last >= self.stream;
        match code == Code::NO_ERROR && goes_on {
            true => Ok(()),
            false => Err(Error::GoAway(code)),
        }
    }

    /// The next whole message of the payload at hand.
    fn next_message(&mut self) -> Result<Option<Bytes>, Error> {
        let Self {
            payload, message, ..
        } = self;
        if payload.is_empty() {
            return Ok(None);
        }
        if message.prefixed < PREFIX {
            let more = payload.len().min(PREFIX - message.prefixed);
            let prefix = &mut message.prefix[message.prefixed..][..more];
            payload.copy_to_slice(prefix);
            message.prefixed += more;
            if message.prefixed < PREFIX {
                return Ok(None);
            }
        }
        let [compressed, length @ ..] = message.prefix;
        let length = u32::from_be_bytes(length) as usize;
        if compressed != 0 || length > self.max_message {
            return Err(Error::Message(length));
        }
        if message.bytes.is_empty() && payload.len() >= length {
            // The usual case: nothing is copied.
            message.prefixed = 0;
            return Ok(Some(payload.split_to(length)));
        }
        // What is declared isn't reserved before something of it has come.
        let more = payload.len().min(length - message.bytes.len());
        if message.bytes.capacity() == 0 {
            message.bytes.reserve(length.min(more * 8));
        }
        message.bytes.put_slice(&payload.split_to(more));
        if message.bytes.len() < length {
            *payload = Bytes::new();
            return Ok(None);
        }
        message.prefixed = 0;
        Ok(Some(std::mem::take(&mut message.bytes).freeze()))
    }

    /// Sends what has waited for a window, and the end after it.
    fn send_waiting(&mut self) {
        while !self.waiting.is_empty() {
            let room = usize::try_from(self.window()).unwrap_or(0);
            let length = self.waiting.len().min(room).min(self.peer_max_frame);
            if length == 0 {
                return;
            }
            put_frame_head(&mut self.out, length, kind::DATA, 0, self.stream);
            self.out.put_slice(&self.waiting.split_to(length));
            self.stream_window -= length as i64;
            self.connection_window -= length as i64;
        }
        self.waiting = BytesMut::new();
        if self.ending && !self.ended {
            self.ended = true;
            put_frame_head(&mut self.out, 0, kind::DATA, flag::END_STREAM, self.stream);
        }
    }

    /// What may be sent now.
    fn window(&self) -> i64 {
        self.stream_window.min(self.connection_window)
    }

    /// Gives back what came, when that is worth a frame.
    fn return_credit(&mut self) {
        let Self { received, .. } = self;
        for (stream, received, window) in [
            (0, &mut received.connection, CONNECTION_WINDOW),
            (self.stream, &mut received.stream, STREAM_WINDOW),
        ] {
            if *received >= window / 4 {
                put_frame_head(&mut self.out, 4, kind::WINDOW_UPDATE, 0, stream);
                self.out.put_u32(std::mem::take(received));
            }
        }
    }

    /// The settings of both roles, and a connection's window, which no setting tells.
    fn put_settings(&mut self, own: &[(u16, u32)]) {
        let common = [
            (setting::INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (setting::MAX_FRAME_SIZE, MAX_FRAME as u32),
            (setting::MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST as u32),
        ];
        let length = 6 * (own.len() + common.len());
        put_frame_head(&mut self.out, length, kind::SETTINGS, 0, 0);
        for (name, value) in own.iter().chain(&common) {
            self.out.put_u16(*name);
            self.out.put_u32(*value);
        }
        put_frame_head(&mut self.out, 4, kind::WINDOW_UPDATE, 0, 0);
        self.out.put_u32(CONNECTION_WINDOW - FIRST_WINDOW);
    }

    fn put_headers(&mut self, ends_stream: bool, fields: &[(&str, &str)]) {
        let mut block = BytesMut::new();
        if std::mem::take(&mut self.table_is_smaller) {
            hpack::encode_empty_table(&mut block);
        }
        for (name, value) in fields {
            hpack::encode(&mut block, name, value);
        }
        // All of it is ours and far shorter than a frame.
        let end = if ends_stream { flag::END_STREAM } else { 0 };
        let flags = flag::END_HEADERS | end;
        put_frame_head(
            &mut self.out,
            block.len(),
            kind::HEADERS,
            flags,
            self.stream,
        );
        self.out.put_slice(&block);
        self.ended = ends_stream;
    }

    /// Begins a frame that answers one of the peer's.
    fn answer(&mut self, length: usize, kind: u8, flags: u8, stream: u32) {
        put_frame_head(&mut self.out, length, kind, flags, stream);
        self.answers += FRAME_HEAD + length;
    }
}

/// The value of the first field of this name.
fn value<'a>(fields: &'a [hpack::Field], name: &str) -> Option<&'a [u8]> {
    let field = fields.iter().find(|field| field.0 == name.as_bytes());
    field.map(|(_, value)| &value[..])
}

/// The same as a number.
fn number<T: FromStr>(fields: &[hpack::Field], name: &str) -> Option<T> {
    std::str::from_utf8(value(fields, name)?).ok()?.parse().ok()
}

/// What a server's answer begins with.
const OK: (&str, &str) = (":status", "200");
const GRPC: (&str, &str) = ("content-type", "application/grpc");

const NO_STATUS: &str = "an end without a gRPC status";

const fn window_overflow() -> Error {
    Error::Broken {
        what: "a window larger than there may be",
        code: Code::FLOW_CONTROL,
    }
}

#[derive(Debug, Clone, Copy)]
struct FrameHead {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl FrameHead {
    fn read(input: &[u8]) -> Option<Self> {
        let mut head = input.get(..FRAME_HEAD)?;
        Some(Self {
            length: head.get_uint(3) as usize,
            kind: head.get_u8(),
            flags: head.get_u8(),
            stream: head.get_u32() & !(1 << 31),
        })
    }
}

fn put_frame_head(out: &mut BytesMut, length: usize, kind: u8, flags: u8, stream: u32) {
    out.reserve(FRAME_HEAD + length);
    out.put_uint(length as u64, 3);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u32(stream);
}

/// The payload without its padding (RFC 9113, section 6.1).
fn unpadded(head: FrameHead, mut payload: Bytes) -> Result<Bytes, Error> {
    if head.flags & flag::PADDED == 0 {
        return Ok(payload);
    }
    if payload.is_empty() {
        return Err(oversized("a padded frame without padding"));
    }
    let padding = usize::from(payload.get_u8());
    let length = payload.len().checked_sub(padding);
    payload.truncate(length.ok_or(broken("more padding than frame"))?);
    Ok(payload)
}
