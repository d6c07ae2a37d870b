//! The protocol core: many exchanges over one ordered stream, without I/O and without a clock.
//!
//! A [`Session`] is one end of a tunnel as a value. Frames and the time go in
//! ([`Session::receive`], [`Session::handle_timeout`]), frames, events and the next deadline come
//! out ([`Session::transmit`], [`Session::poll_event`], [`Session::poll_timeout`]). Time is a
//! [`Duration`](std::time::Duration) since an epoch of the caller's choice. The [`link`](crate::link)
//! room drives a session over a real stream; tests drive two against each other.
//!
//! The server's end opens exchanges ([`Session::opener`]), the agent's end accepts them
//! ([`Session::acceptor`]); otherwise the ends are alike.
//!
//! # Rules both ends keep
//! - Each end ends each exchange exactly once, by `End` (a frame's end mark or trailers) or by
//!   `Reset`. Who receives a `Reset` before having ended answers with a `Reset`. A slot is free
//!   when both ends have ended, so that a peer that resets fast can't have more work under way
//!   than a peer that waits.
//! - An end that has ended by `End` may send one `Reset` more while the other hasn't ended: it
//!   wants no more of what the other sends. So a request that is out can still be cancelled.
//! - A body byte is sent only against credit that the receiver has granted; exceeding it is an
//!   error of the tunnel. Heads, interim answers and trailers need none, and are bounded by
//!   count and size instead.
//! - Control (credit, reset, heartbeat, drain) goes before data and is state, not a queue: it
//!   can't pile up however slowly the peer reads.
//! - Frames of exchanges that have ended are ignored; the generation in the id tells them apart.

mod budget;
mod chunks;
mod error;
mod exchange;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod queue;
mod session;
mod store;
#[cfg(test)]
mod tests;
mod window;

pub use budget::{Budget, Pool};
pub use error::{OpenError, ProtocolError, Reason, SessionError};
pub use exchange::Read;
pub use frame::Frame;
pub use session::{Config, Event, Events, HeadRead, Session};
pub use store::Key;

/// The body bytes an exchange may have under way in each direction before any credit is granted.
///
/// Both ends reserve as much for every exchange they admit, so it is the price of an exchange:
/// 16,384 of them cost 512 MiB in the worst case. Anything beyond is lent while there is room.
pub const RESERVED_WINDOW: u32 = 16 * 1024;

/// The most body bytes an exchange may have under way in one direction.
///
/// A visitor that stops reading holds at most this much; over a link with 50 ms of round trip
/// one exchange reaches 10 MB/s.
pub const MAX_WINDOW: u32 = 512 * 1024;

/// The largest head accepted from a peer, in bytes of method, target and lines.
pub const MAX_HEAD: usize = 128 * 1024;

/// What one call of [`Session::transmit`] aims for: large enough to make one system call carry
/// many frames, small enough that a heartbeat behind it waits microseconds.
pub const BATCH_BYTES: usize = 64 * 1024;
