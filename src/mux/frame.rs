use bytes::Bytes;

use super::error::Reason;
use crate::head::{Lines, RequestHead, ResponseHead};
use crate::id::ExchangeId;

/// What one end says to the other. How it looks on the wire is the `wire` room's business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens an exchange: opener to acceptor.
    Open {
        /// The opener's name for the exchange.
        id: ExchangeId,
        /// The request's head.
        head: RequestHead,
        /// The body's beginning, or all of it, against credit like any data.
        body: Bytes,
        /// Nothing follows.
        end: bool,
        /// Credit for the answer's body beyond the reserved window.
        credit: u32,
    },
    /// An interim answer (1xx): acceptor to opener, any number before the final one.
    Interim {
        /// The exchange.
        id: ExchangeId,
        /// Status and lines.
        head: ResponseHead,
    },
    /// The final answer's head: acceptor to opener, once.
    Answer {
        /// The exchange.
        id: ExchangeId,
        /// Status and lines.
        head: ResponseHead,
        /// The body's beginning, or all of it, against credit like any data.
        body: Bytes,
        /// Nothing follows.
        end: bool,
    },
    /// A piece of a body.
    Data {
        /// The exchange.
        id: ExchangeId,
        /// The bytes; may be empty where only `end` is to be said.
        body: Bytes,
        /// Nothing follows.
        end: bool,
    },
    /// The trailer section; it ends the sender's side.
    Trailers {
        /// The exchange.
        id: ExchangeId,
        /// The lines.
        lines: Lines,
    },
    /// Ends the sender's side early.
    Reset {
        /// The exchange.
        id: ExchangeId,
        /// Why.
        reason: Reason,
    },
    /// Lets the peer send this many more body bytes.
    Credit {
        /// The exchange.
        id: ExchangeId,
        /// How many.
        bytes: u32,
    },
    /// A heartbeat, to be answered.
    Ping {
        /// Comes back in the answer.
        nonce: u64,
    },
    /// The answer to a heartbeat.
    Pong {
        /// As in the [`Frame::Ping`].
        nonce: u64,
    },
    /// The sender wants no new exchanges; those under way go on.
    Drain,
}

impl Frame {
    /// About what the frame takes on the wire, to fill batches by.
    pub(super) fn cost(&self) -> usize {
        // Keys, lengths and the id: never more than this.
        const OVERHEAD: usize = 32;
        OVERHEAD
            + match self {
                Self::Open { head, body, .. } => head.size() + body.len(),
                Self::Answer { head, body, .. } => head.size() + body.len(),
                Self::Interim { head, .. } => head.size(),
                Self::Data { body, .. } => body.len(),
                Self::Trailers { lines, .. } => lines.size(),
                Self::Reset { .. } | Self::Credit { .. } => 0,
                Self::Ping { .. } | Self::Pong { .. } | Self::Drain => 0,
            }
    }
}
