//! Messages off a tunnel, which may be any bytes.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use prost::Message;

use super::{AgentMessage, Detach, Frames, ServerMessage};
use crate::mux::{self, Frame};

/// Takes `data` for a message, of the server's or of an agent's. What can be read of it survives
/// being written and read again, and a session takes it or ends.
pub fn frames(data: &[u8]) {
    try_as::<ServerMessage>(data, true);
    try_as::<AgentMessage>(data, false);
}

fn try_as<T>(data: &[u8], to_agent: bool)
where
    T: Message + Frames + Detach + Default + Clone + PartialEq + std::fmt::Debug + From<Vec<Frame>>,
{
    let Ok(message) = T::decode(data) else {
        return;
    };
    let mut detached = message.clone();
    detached.detach(data.len());
    assert_eq!(detached, message, "copied wrongly");

    // A session sees what comes before the first frame that can't be understood.
    let frames: Vec<Frame> = message.into_frames().map_while(Result::ok).collect();
    let bytes = T::from(frames.clone()).encode_to_vec();
    let again = T::decode(&bytes[..]).unwrap();
    let again: Vec<Frame> = again.into_frames().map(Result::unwrap).collect();
    assert_eq!(again, frames);
    mux::fuzz::receive(to_agent, frames);
}
