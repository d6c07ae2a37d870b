//! From a visitor's request to an exchange in a tunnel, and back.
//!
//! A visitor's connection is one task ([`connection`]), which reads heads, opens exchanges, and
//! carries bodies both ways without handing anything to another task. What it waits for, and since
//! when, it notes in [`Watched`], where the worker's sweep looks for limits of time. An answer is
//! put into bytes by [`reply`], and what became of a request goes to the access log by [`record`].
//! Who speaks HTTP/2 from the first byte on is served by [`http2`], one exchange a stream.

mod connection;
mod http2;
mod place;
mod record;
mod reply;
#[cfg(test)]
pub(crate) mod simulated;

pub(super) use connection::admit;
#[cfg(any(test, fuzzing))]
pub use http2::fuzz;
pub(super) use place::Watched;
