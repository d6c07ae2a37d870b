use bytes::Bytes;

use super::RESERVED_WINDOW;
use super::chunks::Chunks;
use super::error::Reason;
use super::frame::Frame;
use super::window::{ReceiveWindow, SendWindow};
use crate::head::{Lines, RequestHead, ResponseHead};
use crate::id::ExchangeId;

/// What there is to read of an exchange's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// The next bytes, never empty.
    Data(Bytes),
    /// The body is complete; the trailer section, where there was one.
    End(Option<Lines>),
    /// The peer, or the loss of the tunnel, ended the body early.
    Reset(Reason),
    /// Nothing yet.
    Pending,
}

/// How one side of an exchange ends.
#[derive(Debug, Clone)]
pub(super) enum Ending {
    Complete(Option<Lines>),
    Reset(Reason),
}

/// Whether the peer is to stop, or has been told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cancel {
    No,
    /// To be said when our own side has ended.
    Due(Reason),
    Sent,
}

/// A head on its way to the peer.
#[derive(Debug)]
pub(super) enum HeadOut {
    /// With the credit that goes with it.
    Open(RequestHead, u32),
    Answer(ResponseHead),
}

/// One request and its answer, as one end sees it.
///
/// ```text
///            ours                                   the peer's
///   head_out ── sent ──┐                   ┌── head_in ── taken
///   outbox   ── sent ──┤                   ├── inbox   ── read
///   ending_out ─ sent ─┴─> sent_end        ├── ending_in  (the peer has ended)
///                             │            │
///                             └──── and ───┴── and released by the application ──> freed
/// ```
///
/// Between `sent_end` and `ending_in` an end may `cancel`: the peer, which hasn't ended, then ends
/// by a reset.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) id: ExchangeId,

    /// Not yet sent. Until an opener's head is sent, the peer doesn't know of the exchange.
    pub(super) head_out: Option<HeadOut>,
    /// The application has given the head, sent or not; until then its body waits.
    pub(super) head_given: bool,
    /// A 100 not yet sent. State, not a place in a queue: nothing replaces it.
    pub(super) go_ahead_out: bool,
    /// The newest other interim answer not yet sent. One place: a newer one replaces it.
    pub(super) interim_out: Option<ResponseHead>,
    pub(super) outbox: Chunks,
    pub(super) send_window: SendWindow,
    /// Decided by the application (or by a reset from the peer), not necessarily sent.
    pub(super) ending_out: Option<Ending>,
    /// The ending overtakes what is in the outbox.
    pub(super) aborted: bool,
    /// Our end is on its way: nothing more may be sent.
    pub(super) sent_end: bool,
    /// What the peer still sends isn't wanted.
    pub(super) cancel: Cancel,
    /// Why nothing can be sent any more, where it wasn't our own choice.
    pub(super) stopped: Option<Reason>,

    /// A 100 not yet taken.
    pub(super) go_ahead_in: bool,
    /// The newest other interim answer not yet taken. One place: a peer can't pile them up.
    pub(super) interim_in: Option<ResponseHead>,
    pub(super) head_in: Option<ResponseHead>,
    /// The peer's head has come (an acceptor's exchange begins with it).
    pub(super) head_seen: bool,
    pub(super) inbox: Chunks,
    pub(super) receive_window: ReceiveWindow,
    pub(super) ending_in: Option<Ending>,
    /// There was no room for the answer: the application is told why, the rest is dropped.
    pub(super) refused: Option<Reason>,

    /// Promised out of the budget for this exchange, to be given back with it.
    pub(super) promised: usize,
    /// Of that, for an interim answer.
    pub(super) interim_promised: usize,
    /// Of the outbox, bytes beyond the reserved window, promised while they wait.
    pub(super) outbox_loan: usize,

    /// Events not yet reported.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The application was told there is no capacity and waits for the event.
    pub(super) wants_capacity: bool,
    /// Credit is to be sent.
    pub(super) credit_due: bool,
    /// The application has let go; whatever still comes is dropped.
    pub(super) released: bool,
}

impl Exchange {
    pub(super) fn new(id: ExchangeId, receive_window: u32, promised: usize) -> Self {
        Self {
            id,
            head_out: None,
            head_given: false,
            go_ahead_out: false,
            interim_out: None,
            outbox: Chunks::default(),
            send_window: SendWindow::new(RESERVED_WINDOW),
            ending_out: None,
            aborted: false,
            sent_end: false,
            cancel: Cancel::No,
            stopped: None,
            go_ahead_in: false,
            interim_in: None,
            head_in: None,
            head_seen: false,
            inbox: Chunks::default(),
            receive_window: ReceiveWindow::new(receive_window),
            ending_in: None,
            refused: None,
            promised,
            interim_promised: 0,
            outbox_loan: 0,
            readable: false,
            writable: false,
            wants_capacity: false,
            credit_due: false,
            released: false,
        }
    }

    /// Both sides have ended: on the wire the exchange is over.
    pub(super) fn is_over(&self) -> bool {
        self.sent_end && self.ending_in.is_some()
    }

    /// Whether what comes from the peer has no reader.
    pub(super) fn discards(&self) -> bool {
        self.released || self.refused.is_some()
    }

    /// An error says why nothing can be sent any more.
    pub(super) fn check_sendable(&self) -> Result<(), Reason> {
        if self.ending_out.is_none() && !self.sent_end {
            return Ok(());
        }
        Err(self.stopped.unwrap_or(Reason::Cancelled))
    }

    /// Whether a turn would send something.
    pub(super) fn is_ready(&self) -> bool {
        if self.sent_end || self.aborted {
            return false;
        }
        self.head_out.is_some()
            || self.go_ahead_out
            || self.interim_out.is_some()
            || (self.head_given && !self.outbox.is_empty() && self.send_window.available() > 0)
            || (self.outbox.is_empty() && self.ending_out.is_some())
    }

    /// Whether control has something to send for it.
    pub(super) fn has_control(&self) -> bool {
        let peer_goes_on = self.ending_in.is_none();
        let cancels = self.sent_end && matches!(self.cancel, Cancel::Due(_));
        (self.aborted && !self.sent_end) || (peer_goes_on && (self.credit_due || cancels))
    }

    /// Takes one turn: at most `quantum` bytes of body, and at most one head or trailer section
    /// that is larger. Says what the frames cost.
    pub(super) fn take_turn(&mut self, quantum: usize, frames: &mut Vec<Frame>) -> usize {
        let before = frames.len();
        let id = self.id;
        if std::mem::take(&mut self.go_ahead_out) {
            let head = ResponseHead::GO_AHEAD;
            frames.push(Frame::Interim { id, head });
        }
        if let Some(head) = self.interim_out.take() {
            frames.push(Frame::Interim { id, head });
        }
        let mut left = quantum;
        if let Some(head) = self.head_out.take() {
            let body = self.take_body(&mut left);
            let end = self.take_plain_end();
            frames.push(match head {
                HeadOut::Open(head, credit) => Frame::Open {
                    id,
                    head,
                    body,
                    end,
                    credit,
                },
                HeadOut::Answer(head) => Frame::Answer {
                    id,
                    head,
                    body,
                    end,
                },
            });
        }
        while self.head_given {
            let body = self.take_body(&mut left);
            if body.is_empty() {
                break;
            }
            let end = self.take_plain_end();
            frames.push(Frame::Data { id, body, end });
        }
        if !self.sent_end
            && self.outbox.is_empty()
            && (self.ending_is_small() || frames.len() == before)
            && let Some(ending) = self.ending_out.take()
        {
            self.sent_end = true;
            frames.push(match ending {
                Ending::Complete(None) => Frame::Data {
                    id,
                    body: Bytes::new(),
                    end: true,
                },
                Ending::Complete(Some(lines)) => Frame::Trailers { id, lines },
                Ending::Reset(reason) => {
                    self.cancel = Cancel::Sent;
                    Frame::Reset { id, reason }
                }
            });
        }
        frames[before..].iter().map(Frame::cost).sum()
    }

    /// The next bytes of the outbox that credit and `left` allow; empty for none.
    fn take_body(&mut self, left: &mut usize) -> Bytes {
        let limit = self.send_window.available().min(*left);
        if limit == 0 || self.outbox.is_empty() {
            return Bytes::new();
        }
        let body = self.outbox.pop(limit);
        self.send_window.spend(body.len());
        *left -= body.len();
        body
    }

    /// Whether our ending may go with whatever else is in the turn.
    fn ending_is_small(&self) -> bool {
        const SMALL: usize = 16 * 1024;
        match &self.ending_out {
            Some(Ending::Complete(Some(lines))) => lines.size() <= SMALL,
            _ => true,
        }
    }

    /// Whether the frame being made is the last one, because the body ends here.
    fn take_plain_end(&mut self) -> bool {
        let ends =
            self.outbox.is_empty() && matches!(self.ending_out, Some(Ending::Complete(None)));
        if ends {
            self.sent_end = true;
        }
        ends
    }
}
