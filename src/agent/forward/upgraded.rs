//! A connection to the service that goes on with another protocol: bytes both ways as they come,
//! each direction until its own end, for as long as it takes.
//!
//! ```text
//!                        End          what waits is written, FIN
//!   to the service:  Open ──► Ending ────────────────────────────► Ended
//!                      └────────┴── the service takes no more ───► Refused
//! ```

use std::task::{Context, Poll, ready};

use futures_util::future::poll_fn;
use tracing::debug;

use crate::headers::Framing;
use crate::http1::{BodyDecoder, Outgoing, Piece};
use crate::link::Exchange;
use crate::mux::{Read, Reason};

use super::connection::Connection;
use super::exchange::WRITE_AHEAD;

/// Carries bytes between an exchange and a connection whose 101 has been passed on, until both
/// directions have ended. `out` is what the service hasn't taken yet of the request's head.
pub(super) async fn carry(exchange: &Exchange, mut connection: Box<Connection>, out: Outgoing) {
    connection.keep_alive();
    let mut upgraded = Upgraded {
        exchange,
        out,
        to_service: ToService::Open,
        from_service: BodyDecoder::new(Framing::UntilClose),
    };
    match poll_fn(|cx| upgraded.poll(&mut connection, cx)).await {
        Ok(()) => {}
        Err(Cut) => connection.cut(),
    }
}

struct Upgraded<'a> {
    exchange: &'a Exchange,
    /// What waits for the service to take it.
    out: Outgoing,
    to_service: ToService,
    /// Done when the service has ended its direction and the exchange has been told.
    from_service: BodyDecoder,
}

/// What becomes of the visitor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToService {
    Open,
    /// He has ended his direction, and the service is to be told after what waits.
    Ending,
    /// The service has been told.
    Ended,
    /// The service takes no more. What it said before that may still be on its way.
    Refused,
}

/// The exchange is over before both directions have ended. The service hears of it even if it
/// doesn't read.
struct Cut;

impl Upgraded<'_> {
    fn poll(&mut self, connection: &mut Connection, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        self.send(connection, cx)?;
        if !self.from_service.is_done() {
            ready!(self.poll_receive(connection, cx))?;
        }
        match self.to_service {
            ToService::Open | ToService::Ending => Poll::Pending,
            ToService::Ended | ToService::Refused => Poll::Ready(Ok(())),
        }
    }

    /// Passes on what the visitor has sent, as much as the service takes.
    fn send(&mut self, connection: &mut Connection, cx: &mut Context<'_>) -> Result<(), Cut> {
        loop {
            if self.to_service == ToService::Open && self.out.len() < WRITE_AHEAD {
                match self.exchange.poll_read(cx) {
                    Poll::Ready(Read::Data(piece)) => {
                        self.out.push(piece);
                        continue;
                    }
                    Poll::Ready(Read::End(_)) => self.to_service = ToService::Ending,
                    Poll::Ready(Read::Reset(reason)) => {
                        debug!(exchange = ?self.exchange, %reason, "the visitor's side broke off");
                        return Err(Cut);
                    }
                    Poll::Ready(Read::Pending) | Poll::Pending => {}
                }
            }
            if self.out.is_empty() {
                break;
            }
            match connection.poll_write(&mut self.out, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    debug!(exchange = ?self.exchange, %error, "the local service takes no more");
                    self.refuse();
                }
                Poll::Pending => break,
            }
        }
        let ends = self.to_service == ToService::Ending && self.out.is_empty();
        let sent = match self.to_service {
            ToService::Ended | ToService::Refused => return Ok(()),
            _ if ends => connection.poll_shutdown(cx),
            _ => connection.poll_flush(cx),
        };
        match sent {
            Poll::Ready(Ok(())) if ends => self.to_service = ToService::Ended,
            Poll::Ready(Err(_)) => self.refuse(),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        Ok(())
    }

    fn refuse(&mut self) {
        self.out = Outgoing::default();
        self.to_service = ToService::Refused;
    }

    /// Passes on what the service sends, until it ends its direction. It is asked for no more
    /// than the visitor takes.
    fn poll_receive(
        &mut self,
        connection: &mut Connection,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Cut>> {
        while !self.from_service.is_done() {
            if ready!(self.exchange.poll_capacity(cx)).is_err() {
                return Poll::Ready(Err(Cut));
            }
            if let Ok(Piece::Data(piece)) = self.from_service.decode(connection.input()) {
                if self.exchange.send(piece).is_err() {
                    return Poll::Ready(Err(Cut));
                }
                continue;
            }
            match connection.poll_fill(cx) {
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0)) => {
                    self.from_service.close();
                    self.exchange.finish(None);
                }
                Poll::Ready(Err(error)) => {
                    debug!(exchange = ?self.exchange, %error, "the local service broke off");
                    self.exchange.fail(Reason::UpstreamError);
                    return Poll::Ready(Err(Cut));
                }
                Poll::Pending => return self.exchange.poll_reset(cx).map(|_| Err(Cut)),
            }
        }
        Poll::Ready(Ok(()))
    }
}
