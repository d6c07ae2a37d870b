use thiserror::Error;

/// Why an exchange ended early. Its blast radius is that one exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Reason {
    /// The other side is no longer interested: the visitor left, or the answer is complete.
    #[error("cancelled")]
    Cancelled,
    /// The tunnel ended, or never came to the point of carrying this exchange.
    #[error("the tunnel was lost")]
    TunnelLost,
    /// The agent takes no new exchanges because it is shutting down.
    #[error("the agent is draining")]
    Draining,
    /// The local service refused the connection.
    #[error("the local service refused the connection")]
    UpstreamRefused,
    /// The local service broke the exchange off, or answered with something that isn't HTTP.
    #[error("the local service broke its answer off")]
    UpstreamError,
    /// The local service didn't answer in time, or the exchange waited too long for its turn.
    #[error("the local service did not answer in time")]
    UpstreamTimeout,
    /// No room for the exchange or for its head.
    #[error("overloaded")]
    Overloaded,
    /// The visitor's body was malformed, or broke off.
    #[error("the request body broke off")]
    BodyIncomplete,
    /// A reason this version doesn't know.
    #[error("ended for an unknown reason ({0})")]
    Unknown(u32),
}

impl Reason {
    /// The number for the wire.
    pub fn code(self) -> u32 {
        match self {
            Self::Cancelled => 1,
            Self::TunnelLost => 2,
            Self::Draining => 3,
            Self::UpstreamRefused => 4,
            Self::UpstreamError => 5,
            Self::UpstreamTimeout => 6,
            Self::Overloaded => 7,
            Self::BodyIncomplete => 8,
            Self::Unknown(code) => code,
        }
    }

    /// The reverse of [`Reason::code`].
    pub fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Cancelled,
            2 => Self::TunnelLost,
            3 => Self::Draining,
            4 => Self::UpstreamRefused,
            5 => Self::UpstreamError,
            6 => Self::UpstreamTimeout,
            7 => Self::Overloaded,
            8 => Self::BodyIncomplete,
            other => Self::Unknown(other),
        }
    }
}

/// Why an exchange could not be opened. Nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpenError {
    /// As many exchanges, or as many bytes, are under way as may be.
    #[error("too many exchanges or bytes in flight")]
    Overloaded,
    /// One of the two ends is draining.
    #[error("draining")]
    Draining,
    /// The session has ended.
    #[error("the tunnel was lost")]
    TunnelLost,
}

/// The peer broke the protocol. Its blast radius is the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// More body bytes than there was credit for.
    #[error("flow control: more bytes than credit")]
    FlowControl,
    /// More credit than a window can hold.
    #[error("flow control: credit overflow")]
    CreditOverflow,
    /// More exchanges than agreed upon.
    #[error("more exchanges than agreed")]
    TooManyExchanges,
    /// A slot was opened again before both ends had ended the exchange in it.
    #[error("exchange opened in a taken slot")]
    SlotTaken,
    /// A frame that only the other end may send.
    #[error("a frame in the wrong direction")]
    WrongDirection,
    /// A second head, data before the head, or anything but credit after the end.
    #[error("a frame out of order")]
    OutOfOrder,
    /// A head beyond [`MAX_HEAD`](super::MAX_HEAD).
    #[error("a head is too large")]
    HeadTooLarge,
    /// A status code outside 100 to 999, or an interim answer with a final one's code.
    #[error("an impossible status code")]
    BadStatus,
}

/// Why a session ended. Its blast radius is the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SessionError {
    /// The peer broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(#[from] ProtocolError),
    /// Nothing was heard from the peer for the heartbeat timeout.
    #[error("nothing heard for {} s", .0.as_secs())]
    Silent(std::time::Duration),
}
