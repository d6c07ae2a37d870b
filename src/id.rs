//! Names and numbers that identify things: agents, sessions, exchanges, and secrets that prove an identity.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use thiserror::Error;

/// The name an agent is known by: `[a-z0-9][a-z0-9._-]{0,62}`.
///
/// The alphabet is that of a lower-case DNS label with dots, so that an id can stand in a
/// certificate's dNSName, a metric's label and a URL path without escaping. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentId(Arc<str>);

/// The most labels an agent may bear.
pub const MAX_LABELS: usize = 32;

/// The longest name and the longest value of a label, in bytes: 32 of the longest are 8 KiB, so
/// that a hello stays small.
pub const MAX_LABEL_LEN: usize = 128;

/// Why a string is no [`AgentId`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "an agent id is 1 to 63 characters, a letter or digit first, then letters, digits, '.', '_' or '-', all in lower case"
)]
pub struct InvalidAgentId;

impl AgentId {
    /// The longest id, in bytes: a DNS label's length (RFC 1035, section 2.3.4).
    pub const MAX_LEN: usize = 63;

    /// The id as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AgentId {
    type Err = InvalidAgentId;

    fn from_str(text: &str) -> Result<Self, InvalidAgentId> {
        let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = text.len() <= Self::MAX_LEN
            && text.bytes().next().is_some_and(word)
            && text
                .bytes()
                .all(|byte| word(byte) || matches!(byte, b'.' | b'_' | b'-'));
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(InvalidAgentId)
        }
    }
}

impl std::borrow::Borrow<str> for AgentId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Numbers the sessions of one server process in the order they were welcomed.
///
/// Cleanup is fenced by it: whoever tidies up after a session must show the generation it
/// belongs to, and a newer one of the same agent is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one exchange (a request and its answer) of one tunnel, on the wire and in memory.
///
/// `slot` is the key in the opener's slab; `generation` counts the times that slot was taken,
/// so that a frame of an ended exchange can't meet the next one in the same slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExchangeId {
    /// The key in the slab of the side that opened the exchange.
    pub slot: u32,
    /// How many times the slot was taken before.
    pub generation: u32,
}

impl ExchangeId {
    /// The id as one number: the generation in the upper half, the slot in the lower.
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// The reverse of [`ExchangeId::to_u64`]; every number is an id.
    pub fn from_u64(number: u64) -> Self {
        Self {
            slot: number as u32,
            generation: (number >> 32) as u32,
        }
    }
}

impl fmt::Display for ExchangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.slot, self.generation)
    }
}

/// A credential. It is never printed or logged, and compared in constant time.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a credential.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The credential itself, for the one place that has to send it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `candidate` is this credential. The time taken tells the length at most.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(candidate).into()
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.matches(other.0.as_bytes())
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_ids_follow_the_alphabet() {
        for good in ["a", "0", "agent-1", "a.b_c-d", &"x".repeat(63)] {
            assert_eq!(good.parse::<AgentId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "A", "agent 1", "a/b", "é", &"x".repeat(64)] {
            assert_eq!(bad.parse::<AgentId>(), Err(InvalidAgentId), "{bad:?}");
        }
    }

    #[test]
    fn exchange_ids_survive_the_wire() {
        for number in [0, 1, u64::from(u32::MAX), 1 << 32, u64::MAX] {
            assert_eq!(ExchangeId::from_u64(number).to_u64(), number);
        }
    }

    #[test]
    fn secrets_compare_and_hide() {
        let secret = Secret::new("hunter2");
        assert!(secret.matches(b"hunter2"));
        assert!(!secret.matches(b"hunter"));
        assert_eq!(format!("{secret:?}"), "***");
    }
}
