//! The tunnel's messages on the wire: the only room that knows Protocol Buffers.
//!
//! `silo.tunnel.v1.rs` is generated from `proto/` and committed, so that building needs no
//! `protoc`; a test keeps the two in step. The rest turns the core's frames into messages and back.

use bytes::{BufMut, Bytes, BytesMut};
pub use prost::DecodeError;
use thiserror::Error;

use crate::head::{Lines, MalformedLines, RequestHead, ResponseHead};
use crate::id::ExchangeId;
use crate::mux::{self, Reason};

#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all)]
#[path = "silo.tunnel.v1.rs"]
mod generated;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use generated::{
    AgentMessage, Hello, Rejection, ServerMessage, Welcome, rejection::Reason as RejectionReason,
};

use generated::frame::Kind;

/// The protocol version spoken here.
pub const VERSION: u32 = 1;

/// The oldest protocol version still spoken with.
pub const OLDEST_VERSION: u32 = 1;

/// The capability of an agent that hands a request's Upgrade line to its service and passes on
/// what follows a 101. To others the server sends no such line.
pub const UPGRADE: &str = "upgrade";

/// The largest message accepted, in bytes.
///
/// Batches aim for [`mux::BATCH_BYTES`] and end with the frame that goes over it, so a message is
/// never longer than that and one frame with a head of [`mux::MAX_HEAD`].
pub const MAX_MESSAGE: usize = 256 * 1024;

/// What a peer sent that can't be understood. It ends the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WireError {
    /// Header lines that aren't length-prefixed as they should be.
    #[error("{0}")]
    Lines(#[from] MalformedLines),
    /// A status code beyond 16 bits.
    #[error("an impossible status code")]
    Status,
}

impl RejectionReason {
    /// The word for it in logs, metrics and summaries.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Auth => "auth",
            Self::PortExhausted => "port_exhausted",
            Self::Duplicate => "duplicate",
            Self::Replaced => "replaced",
            Self::Draining => "draining",
            Self::Version => "version",
            Self::Malformed => "malformed",
            Self::Unavailable => "unavailable",
        }
    }
}

impl From<Vec<mux::Frame>> for AgentMessage {
    fn from(frames: Vec<mux::Frame>) -> Self {
        Self {
            frames: frames.into_iter().map(encode).collect(),
            ..Self::default()
        }
    }
}

impl From<Vec<mux::Frame>> for ServerMessage {
    fn from(frames: Vec<mux::Frame>) -> Self {
        Self {
            frames: frames.into_iter().map(encode).collect(),
            ..Self::default()
        }
    }
}

impl From<Hello> for AgentMessage {
    fn from(hello: Hello) -> Self {
        Self {
            hello: Some(hello),
            ..Self::default()
        }
    }
}

impl From<Welcome> for ServerMessage {
    fn from(welcome: Welcome) -> Self {
        Self {
            welcome: Some(welcome),
            ..Self::default()
        }
    }
}

impl From<Rejection> for ServerMessage {
    fn from(rejection: Rejection) -> Self {
        Self {
            rejection: Some(rejection),
            ..Self::default()
        }
    }
}

/// A message whose main content is frames: either direction's.
pub trait Frames {
    /// Takes the frames out; kinds this version doesn't know are left out.
    fn into_frames(self) -> impl Iterator<Item = Result<mux::Frame, WireError>>;

    /// Takes out the rejection, if the message brings one. Only the server's do.
    fn take_rejection(&mut self) -> Option<Rejection> {
        None
    }
}

impl Frames for AgentMessage {
    fn into_frames(self) -> impl Iterator<Item = Result<mux::Frame, WireError>> {
        self.frames.into_iter().filter_map(decode)
    }
}

impl Frames for ServerMessage {
    fn into_frames(self) -> impl Iterator<Item = Result<mux::Frame, WireError>> {
        self.frames.into_iter().filter_map(decode)
    }

    fn take_rejection(&mut self) -> Option<Rejection> {
        self.rejection.take()
    }
}

fn encode(frame: mux::Frame) -> generated::Frame {
    let (exchange, kind) = match frame {
        mux::Frame::Open {
            id,
            head,
            body,
            end,
            credit,
        } => (
            id.to_u64(),
            Kind::Open(generated::Open {
                method: head.method,
                target: head.target,
                lines: head.lines.into_bytes(),
                body,
                end,
                credit,
            }),
        ),
        mux::Frame::Answer {
            id,
            head,
            body,
            end,
        } => (
            id.to_u64(),
            Kind::Answer(generated::Answer {
                status: head.status.into(),
                lines: head.lines.into_bytes(),
                body,
                end,
            }),
        ),
        mux::Frame::Interim { id, head } => (
            id.to_u64(),
            Kind::Interim(generated::Interim {
                status: head.status.into(),
                lines: head.lines.into_bytes(),
            }),
        ),
        mux::Frame::Data { id, body, end } => {
            (id.to_u64(), Kind::Data(generated::Data { body, end }))
        }
        mux::Frame::Trailers { id, lines } => (
            id.to_u64(),
            Kind::Trailers(generated::Trailers {
                lines: lines.into_bytes(),
            }),
        ),
        mux::Frame::Reset { id, reason } => (
            id.to_u64(),
            Kind::Reset(generated::Reset {
                reason: reason.code(),
            }),
        ),
        mux::Frame::Credit { id, bytes } => {
            (id.to_u64(), Kind::Credit(generated::Credit { bytes }))
        }
        mux::Frame::Ping { nonce } => (0, Kind::Ping(generated::Ping { nonce })),
        mux::Frame::Pong { nonce } => (0, Kind::Pong(generated::Pong { nonce })),
        mux::Frame::Drain => (0, Kind::Drain(generated::Drain {})),
    };
    generated::Frame {
        exchange,
        kind: Some(kind),
    }
}

fn decode(frame: generated::Frame) -> Option<Result<mux::Frame, WireError>> {
    let id = ExchangeId::from_u64(frame.exchange);
    Some(Ok(match frame.kind? {
        Kind::Open(open) => {
            let lines = match Lines::parse(open.lines) {
                Ok(lines) => lines,
                Err(error) => return Some(Err(error.into())),
            };
            mux::Frame::Open {
                id,
                head: RequestHead {
                    method: open.method,
                    target: open.target,
                    lines,
                },
                body: open.body,
                end: open.end,
                credit: open.credit,
            }
        }
        Kind::Answer(answer) => match response_head(answer.status, answer.lines) {
            Ok(head) => mux::Frame::Answer {
                id,
                head,
                body: answer.body,
                end: answer.end,
            },
            Err(error) => return Some(Err(error)),
        },
        Kind::Interim(interim) => match response_head(interim.status, interim.lines) {
            Ok(head) => mux::Frame::Interim { id, head },
            Err(error) => return Some(Err(error)),
        },
        Kind::Data(data) => mux::Frame::Data {
            id,
            body: data.body,
            end: data.end,
        },
        Kind::Trailers(trailers) => match Lines::parse(trailers.lines) {
            Ok(lines) => mux::Frame::Trailers { id, lines },
            Err(error) => return Some(Err(error.into())),
        },
        Kind::Reset(reset) => mux::Frame::Reset {
            id,
            reason: Reason::from_code(reset.reason),
        },
        Kind::Credit(credit) => mux::Frame::Credit {
            id,
            bytes: credit.bytes,
        },
        Kind::Ping(ping) => mux::Frame::Ping { nonce: ping.nonce },
        Kind::Pong(pong) => mux::Frame::Pong { nonce: pong.nonce },
        Kind::Drain(_) => mux::Frame::Drain,
    }))
}

fn response_head(status: u32, lines: Bytes) -> Result<ResponseHead, WireError> {
    Ok(ResponseHead {
        status: u16::try_from(status).map_err(|_| WireError::Status)?,
        lines: Lines::parse(lines)?,
    })
}

/// The path of the tunnel's one method.
pub const METHOD: &str = "/silo.tunnel.v1.Tunnel/Connect";

/// A message of one direction, as it is in a call.
pub trait Message: Frames + Sized {
    /// Reads one. Its slices keep `held` bytes alive: those that are small against that are copied.
    ///
    /// # Errors
    /// If it is none.
    fn read(bytes: Bytes, held: usize) -> Result<Self, DecodeError>;

    /// How many bytes [`Message::write`] appends.
    fn length(&self) -> usize;

    /// Appends it.
    fn write(&self, out: &mut BytesMut);
}

impl<M> Message for M
where
    M: prost::Message + Frames + Detach + Default,
{
    fn read(bytes: Bytes, held: usize) -> Result<Self, DecodeError> {
        let size = bytes.len().max(held);
        let mut message = M::decode(bytes)?;
        message.detach(size);
        Ok(message)
    }

    fn length(&self) -> usize {
        let length = self.encoded_len();
        length + padding(length)
    }

    fn write(&self, out: &mut BytesMut) {
        self.encode_raw(out);
        pad(self.encoded_len(), out);
    }
}

/// The smallest message sent, in bytes, padding included. With the five bytes that gRPC puts before
/// it, an HTTP/2 DATA frame has 256 at least: h2 charges smaller ones to a budget of 32 KiB, and
/// ends the connection when a burst of them uses that up, as after a stall they would.
const SMALLEST_MESSAGE: usize = 251;

/// The field `padding` of both messages, as Protocol Buffers write it: number 15, length-delimited.
const PADDING_KEY: u8 = 15 << 3 | 2;

/// Its key and two bytes of length.
const PADDING_HEAD: usize = 3;

/// How much [`pad`] appends to a message of `length` bytes.
fn padding(length: usize) -> usize {
    match SMALLEST_MESSAGE.saturating_sub(length) {
        0 => 0,
        missing => PADDING_HEAD.max(missing),
    }
}

/// Fills a message of `length` bytes up to [`SMALLEST_MESSAGE`].
fn pad(length: usize, out: &mut BytesMut) {
    if let Some(missing) = padding(length).checked_sub(PADDING_HEAD) {
        out.put_u8(PADDING_KEY);
        // Two bytes, whatever the number: its groups of seven bits, the lower one first.
        out.put_slice(&[missing as u8 | 0x80, (missing >> 7) as u8]);
        out.put_bytes(0, missing);
    }
}

/// A received message whose slices can be copied out of the buffer they came in.
pub trait Detach {
    /// Copies every slice that is small against the message's size in bytes.
    fn detach(&mut self, size: usize);
}

impl Detach for AgentMessage {
    fn detach(&mut self, size: usize) {
        self.frames.iter_mut().for_each(|frame| frame.detach(size));
    }
}

impl Detach for ServerMessage {
    fn detach(&mut self, size: usize) {
        self.frames.iter_mut().for_each(|frame| frame.detach(size));
    }
}

impl Detach for generated::Frame {
    fn detach(&mut self, size: usize) {
        match &mut self.kind {
            Some(Kind::Open(open)) => {
                for slice in [
                    &mut open.method,
                    &mut open.target,
                    &mut open.lines,
                    &mut open.body,
                ] {
                    copy_if_small(slice, size);
                }
            }
            Some(Kind::Answer(answer)) => {
                copy_if_small(&mut answer.lines, size);
                copy_if_small(&mut answer.body, size);
            }
            Some(Kind::Interim(interim)) => copy_if_small(&mut interim.lines, size),
            Some(Kind::Data(data)) => copy_if_small(&mut data.body, size),
            Some(Kind::Trailers(trailers)) => copy_if_small(&mut trailers.lines, size),
            _ => {}
        }
    }
}

/// Copies a slice that would keep more than four times its size alive. A small message stands in
/// a buffer of a few KiB, which isn't worth a copy.
fn copy_if_small(slice: &mut Bytes, size: usize) {
    const SMALL_MESSAGE: usize = 4 * 1024;
    if size > SMALL_MESSAGE && slice.len() < size / 4 && !slice.is_empty() {
        *slice = Bytes::copy_from_slice(slice);
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::head::LinesBuilder;
    use proptest::prelude::*;

    fn lines() -> impl Strategy<Value = Lines> {
        proptest::collection::vec(("[a-z-]{1,20}", "[ -~]{0,40}"), 0..5).prop_map(|lines| {
            let mut builder = LinesBuilder::default();
            for (name, value) in lines {
                builder.push(name.as_bytes(), value.as_bytes()).unwrap();
            }
            builder.finish()
        })
    }

    fn body() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..100).prop_map(Bytes::from)
    }

    fn frame() -> impl Strategy<Value = mux::Frame> {
        let id = any::<u64>().prop_map(ExchangeId::from_u64);
        let head = |status: std::ops::Range<u16>| {
            (status, lines()).prop_map(|(status, lines)| ResponseHead { status, lines })
        };
        prop_oneof![
            (
                id.clone(),
                "[A-Z]{1,8}",
                "[!-~]{1,40}",
                lines(),
                body(),
                any::<bool>(),
                any::<u32>()
            )
                .prop_map(|(id, method, target, lines, body, end, credit)| {
                    mux::Frame::Open {
                        id,
                        head: RequestHead {
                            method: method.into(),
                            target: target.into(),
                            lines,
                        },
                        body,
                        end,
                        credit,
                    }
                }),
            (id.clone(), head(200..1000), body(), any::<bool>()).prop_map(
                |(id, head, body, end)| mux::Frame::Answer {
                    id,
                    head,
                    body,
                    end
                }
            ),
            (id.clone(), head(100..200)).prop_map(|(id, head)| mux::Frame::Interim { id, head }),
            (id.clone(), body(), any::<bool>()).prop_map(|(id, body, end)| mux::Frame::Data {
                id,
                body,
                end
            }),
            (id.clone(), lines()).prop_map(|(id, lines)| mux::Frame::Trailers { id, lines }),
            (id.clone(), any::<u32>()).prop_map(|(id, code)| mux::Frame::Reset {
                id,
                reason: Reason::from_code(code)
            }),
            (id, any::<u32>()).prop_map(|(id, bytes)| mux::Frame::Credit { id, bytes }),
            any::<u64>().prop_map(|nonce| mux::Frame::Ping { nonce }),
            any::<u64>().prop_map(|nonce| mux::Frame::Pong { nonce }),
            Just(mux::Frame::Drain),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_the_wire(frames in proptest::collection::vec(frame(), 0..6)) {
            let bytes = ServerMessage::from(frames.clone()).encode_to_vec();
            let mut message = ServerMessage::decode(&bytes[..]).unwrap();
            message.detach(1 << 20);
            let again: Vec<_> = message.into_frames().map(Result::unwrap).collect();
            prop_assert_eq!(again, frames);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = AgentMessage::decode(&bytes[..]) {
                message.into_frames().for_each(drop);
            }
        }
    }

    #[test]
    fn small_messages_are_padded() {
        for size in (0..300).step_by(7) {
            let frames = vec![mux::Frame::Data {
                id: ExchangeId::from_u64(7),
                body: vec![b'x'; size].into(),
                end: false,
            }];
            let message = AgentMessage::from(frames.clone());
            let mut bytes = BytesMut::new();
            message.write(&mut bytes);
            assert_eq!(bytes.len(), message.length());
            assert!(bytes.len() >= SMALLEST_MESSAGE && bytes.len() < size + 300);
            let again = AgentMessage::read(bytes.freeze(), 0).unwrap();
            let again: Vec<_> = again.into_frames().map(Result::unwrap).collect();
            assert_eq!(again, frames);
        }
    }

    #[test]
    fn unknown_kinds_and_fields_are_ignored() {
        // A frame of kind 100 with three bytes in it, and an unknown field 50 beside it.
        let unknown_frame = [8, 7, 0xa2, 6, 3, 1, 2, 3];
        let mut message = vec![0x90, 3, 1, 0x12, unknown_frame.len() as u8];
        message.extend(unknown_frame);
        let message = AgentMessage::decode(&message[..]).unwrap();
        assert_eq!(message.frames.len(), 1);
        assert_eq!(message.into_frames().count(), 0);
    }

    #[test]
    fn malformed_lines_are_refused() {
        let frame = generated::Frame {
            exchange: 1,
            kind: Some(Kind::Trailers(generated::Trailers {
                lines: Bytes::from_static(b"\x00"),
            })),
        };
        assert_eq!(decode(frame), Some(Err(WireError::Lines(MalformedLines))));
    }
}
