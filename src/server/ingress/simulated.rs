//! A visitor of [`crate::simulation`]: his place among the connections, the tenancy he belongs to,
//! the way his requests take into a tunnel and the sweep that looks at him are the real ones. Left
//! out are his socket and the HTTP on it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::poll_fn;

use super::connection::{Request, open_exchange};
use super::place::{Order, Place};
use crate::head::ResponseHead;
use crate::headers::Forwarding;
use crate::link::Exchange;
use crate::metrics::Refusal;
use crate::mux::{HeadRead, Read, Reason};
use crate::server::respond::Fault;
use crate::server::tenancy::Tenancy;
use crate::server::worker::Worker;

/// See the module.
pub(crate) struct Visitor {
    place: Place,
    forwarding: Forwarding,
}

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The whole answer.
    Answer(ResponseHead, Vec<u8>),
    /// The server answers itself, with this status.
    Instead(u16),
    /// The answer broke off.
    BrokenOff,
    /// The connection is closed, without an answer.
    Cut,
}

/// A request that is being served.
struct Serving {
    exchange: Exchange,
    body: Vec<Bytes>,
    head: Option<ResponseHead>,
    received: Vec<u8>,
    uploaded: bool,
}

impl Visitor {
    pub(in crate::server) fn admit(
        worker: &Arc<Worker>,
        tenancy: &Arc<Tenancy>,
        peer: SocketAddr,
    ) -> Result<Self, Refusal> {
        worker.metrics().connections_accepted.inc();
        Ok(Self {
            place: Place::take(worker, tenancy, peer.ip())?,
            forwarding: Forwarding::new(peer.ip(), false),
        })
    }

    /// Whose port it is.
    pub(crate) fn agent_id(&self) -> String {
        self.place.tenancy.agent_id.to_string()
    }

    /// Whether the server has closed the connection, or does so after what is under way.
    pub(crate) fn is_over(&self) -> bool {
        self.place.watched.ordered() != Order::None
    }

    /// Asks for something. Whoever drops the future has left.
    pub(crate) async fn ask(&mut self, target: &str, body: Vec<Bytes>) -> Outcome {
        if self.is_over() {
            return Outcome::Cut;
        }
        self.place.head_begins();
        self.place.exchange_begins();
        let request = Request {
            method: if body.is_empty() { b"GET" } else { b"POST" },
            target: target.as_bytes(),
            has_body: !body.is_empty(),
            upgrades: false,
        };
        let lines = [(&b"host"[..], &b"visitor.test"[..])];
        let fields = lines.iter().copied();
        let opened = open_exchange(&self.place, &self.forwarding, request, fields, &mut None);
        let outcome = match opened {
            Ok(opened) => {
                let mut serving = Serving {
                    exchange: opened.exchange,
                    uploaded: body.is_empty(),
                    body,
                    head: None,
                    received: Vec::new(),
                };
                poll_fn(|cx| Pin::new(&mut serving).poll(&self.place, cx)).await
            }
            Err(fault) => Outcome::Instead(fault.status().as_u16()),
        };
        self.place.exchange_ends();
        outcome
    }
}

impl Serving {
    fn poll(mut self: Pin<&mut Self>, place: &Place, cx: &mut Context<'_>) -> Poll<Outcome> {
        place.watched.task.register(cx.waker());
        if place.watched.ordered() == Order::Cut {
            return Poll::Ready(Outcome::Cut);
        }
        while !self.uploaded {
            match self.exchange.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => match self.body.pop() {
                    Some(piece) => {
                        self.uploaded = self.exchange.send(piece).is_err();
                    }
                    None => {
                        self.exchange.finish(None);
                        self.uploaded = true;
                    }
                },
                Poll::Ready(Err(_)) => self.uploaded = true,
                Poll::Pending => break,
            }
        }
        if self.head.is_none() {
            match self.exchange.poll_head(cx) {
                Poll::Ready(HeadRead::Answer(head)) => self.head = Some(head),
                Poll::Ready(HeadRead::Reset(reason)) => {
                    return Poll::Ready(Outcome::Instead(Fault::from(reason).status().as_u16()));
                }
                Poll::Ready(HeadRead::Interim(_) | HeadRead::Pending) | Poll::Pending => {
                    return Poll::Pending;
                }
            }
        }
        loop {
            match self.exchange.poll_read(cx) {
                Poll::Ready(Read::Data(data)) => self.received.extend_from_slice(&data),
                Poll::Ready(Read::End(_)) => {
                    if !self.uploaded {
                        self.exchange.abort(Reason::Cancelled);
                    }
                    let received = std::mem::take(&mut self.received);
                    return Poll::Ready(match self.head.take() {
                        Some(head) => Outcome::Answer(head, received),
                        None => Outcome::BrokenOff,
                    });
                }
                Poll::Ready(Read::Reset(_)) => return Poll::Ready(Outcome::BrokenOff),
                Poll::Ready(Read::Pending) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}
