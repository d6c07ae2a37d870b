use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};

use super::Exchange;
use crate::mux::Read;

/// Reads the peer's body for whoever frames it anew: small pieces that are there already come as
/// one, and the last comes with the word that it is. Small frames cost much, and some peers end a
/// connection that sends them many (h2 itself does that after about a hundred that its
/// application hasn't read).
#[derive(Debug, Default)]
pub struct Gather {
    /// What was given back.
    back: Option<Read>,
    /// What comes next, if that was looked at already.
    ahead: Option<Read>,
}

/// As much is joined to one piece: what a frame of HTTP/2 may have at least.
const GATHERED: usize = 16 * 1024;

impl Gather {
    /// Waits for the next piece, as [`Exchange::poll_read`] does. It may hold one more that it has
    /// looked at.
    pub fn poll_next(&mut self, exchange: &Exchange, cx: &mut Context<'_>) -> Poll<Read> {
        if let Some(read) = self.back.take() {
            return Poll::Ready(read);
        }
        let read = match self.ahead.take() {
            Some(read) => read,
            None => std::task::ready!(exchange.poll_read(cx)),
        };
        Poll::Ready(match read {
            Read::Data(data) => Read::Data(self.join(data, exchange, cx)),
            read => read,
        })
    }

    /// Gives back what was read last: it comes again.
    pub fn put_back(&mut self, read: Read) {
        self.back = Some(read);
    }

    /// Whether it is known that the body ends after what was read last, and without trailers.
    pub fn is_at_end(&self) -> bool {
        self.ahead == Some(Read::End(None))
    }

    fn join(&mut self, data: Bytes, exchange: &Exchange, cx: &mut Context<'_>) -> Bytes {
        let mut joined = BytesMut::new();
        while joined.len().max(data.len()) < GATHERED && self.ahead.is_none() {
            match exchange.poll_read(cx) {
                Poll::Ready(Read::Data(more))
                    if joined.len().max(data.len()) + more.len() <= GATHERED =>
                {
                    if joined.is_empty() {
                        joined.extend_from_slice(&data);
                    }
                    joined.extend_from_slice(&more);
                }
                Poll::Ready(read) => self.ahead = Some(read),
                Poll::Pending => break,
            }
        }
        if joined.is_empty() {
            data
        } else {
            joined.freeze()
        }
    }
}
