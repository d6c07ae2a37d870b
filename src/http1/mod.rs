//! HTTP/1.0 and HTTP/1.1 as values (RFC 9112): bytes of a connection in, heads and bodies out, and
//! the reverse. No socket, no clock, no task.
//!
//! ```text
//!  bytes ──► HeadScan ──► parse_request, parse_response ──► fields, checked by `headers`
//!        └─────────────► BodyDecoder ──► pieces, trailers
//!
//!  head ──► write_request_line, write_line ──┐
//!  body ──► write_chunk_head, … ────┴─► Outgoing ──► bytes
//! ```
//!
//! What is read is taken strictly: where RFC 9112 lets a recipient be lenient, the message is
//! refused, but for a bare LF that ends a line of a head and for empty lines before a request
//! (section 2.2). What is written never depends on how it was read: framing is made anew.

mod body;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod head;
mod outgoing;
mod write;

pub use body::{BodyDecoder, MalformedBody, Piece};
pub use head::{
    Fields, HeadLimits, HeadScan, Malformed, RequestLine, StatusLine, TooLarge, parse_request,
    parse_response,
};
pub use outgoing::Outgoing;
pub use write::{
    write_chunk_head, write_last_chunk, write_length, write_line, write_request_line,
    write_status_line,
};
