//! A visitor's connection after the service's 101: bytes both ways as they come, each direction
//! until its own end, for as long as it takes.
//!
//! ```text
//!                        the service's end              the visitor's end
//!           ┌──► Both ───────────────────► ToService ─────────────────────► over
//!   101 ────┘      │ the visitor's end, or the service takes no more
//!                  └──────────► ToVisitor, Refused ───────────────────────► over
//!                                                     the service's end
//! ```
//!
//! Until the 101 what the visitor sends waits in the connection's buffer. If the service refuses,
//! it is the next request; of another protocol's bytes the service never sees one.

use super::*;

use crate::headers::goes_on_as_offered;

impl Serving {
    /// The service goes on with another protocol, if that was asked for.
    pub(super) fn upgrade(&mut self, visitor: &mut Visitor, head: &ResponseHead) {
        let is_offered = self
            .offer
            .take()
            .is_some_and(|offer| goes_on_as_offered(&offer, &head.lines));
        if !is_offered {
            return self.fail(visitor, Fault::UpstreamError);
        }
        match Reply::upgrade(&mut visitor.out, head, self.grant.as_ref()) {
            Ok(reply) => {
                // Without it the connection works as well.
                let _ = net::keep_alive(&visitor.stream);
                self.body = BodyDecoder::new(Framing::UntilClose);
                self.upload = Upload::Upgraded(Flow::Both);
                self.answered(visitor, head.status, reply);
            }
            Err(_) => self.fail(visitor, Fault::UpstreamError),
        }
    }

    /// Passes on what the visitor sends, as fast as the service takes it. Says whether something
    /// moved.
    pub(super) fn poll_upgraded(
        &mut self,
        visitor: &mut Visitor,
        flow: Flow,
        cx: &mut Context<'_>,
    ) -> Result<bool, Over> {
        if matches!(flow, Flow::ToVisitor | Flow::Refused) {
            visitor.look_for_reset()?;
            return Ok(false);
        }
        let mut moved = false;
        while let Some(exchange) = &self.exchange {
            match exchange.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => {
                    self.upload = Upload::Upgraded(Flow::Refused);
                    return Ok(true);
                }
                Poll::Pending => {
                    visitor.look_for_reset()?;
                    break;
                }
            }
            if let Ok(Piece::Data(data)) = self.body.decode(&mut visitor.input) {
                moved = true;
                self.received += data.len() as u64;
                if let Some(record) = &mut self.record {
                    record.received = self.received;
                }
                visitor.place.count_in(data.len());
                // If it fails, the next look at the capacity says so too.
                let _ = exchange.send(data);
                continue;
            }
            visitor.place.watched.holding_back(false);
            match visitor.poll_fill(cx) {
                Poll::Ready(Ok(0)) => {
                    exchange.finish(None);
                    self.upload = Upload::Upgraded(Flow::ToVisitor);
                    return Ok(true);
                }
                Poll::Ready(read) => moved |= read? > 0,
                Poll::Pending => {
                    // An idle connection holds no buffers.
                    visitor.input = BytesMut::new();
                    visitor.out.shrink();
                    if exchange.poll_reset(cx).is_ready() {
                        self.upload = Upload::Upgraded(Flow::Refused);
                        moved = true;
                    }
                    break;
                }
            }
        }
        Ok(moved)
    }

    /// All that the service has sent is written, and it sends nothing more: tells the visitor, and
    /// goes on as long as he does.
    pub(super) fn service_ended(&mut self, visitor: &Visitor, flow: Flow) -> Result<(), Over> {
        match flow {
            Flow::Both => {
                SockRef::from(&visitor.stream).shutdown(Shutdown::Write)?;
                self.upload = Upload::Upgraded(Flow::ToService);
                Ok(())
            }
            Flow::ToService => Ok(()),
            Flow::ToVisitor => Err(Over::Closed),
            Flow::Refused => Err(Over::Unheard),
        }
    }
}

impl Visitor {
    /// Notes that nothing is read for now. The sweep asks for a look at the socket instead: a FIN
    /// has its place behind what is unread, but a reset is seen at once.
    fn look_for_reset(&self) -> Result<(), Over> {
        let watched = &self.place.watched;
        watched.holding_back(true);
        if watched.take_look() && self.stream.take_error()?.is_some() {
            return Err(Over::Left);
        }
        Ok(())
    }
}
