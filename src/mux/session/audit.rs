//! What tests may see of a session's inside, and what must hold there at any time.

use super::*;

/// The credit of one exchange as one end sees it.
#[derive(Debug, Clone, Copy)]
pub(in crate::mux) struct Credit {
    /// What this end may still send.
    pub(in crate::mux) to_send: usize,
    /// What the peer may still send.
    pub(in crate::mux) to_receive: usize,
}

impl Session {
    /// Exchanges that count against the agreement.
    #[cfg(test)]
    pub(in crate::mux) fn live(&self) -> u32 {
        self.live
    }

    pub(in crate::mux) fn config_max(&self) -> usize {
        self.config.max_exchanges as usize
    }

    /// The length of the longest queue.
    pub(in crate::mux) fn longest_queue(&self) -> usize {
        [&self.ready, &self.control, &self.events]
            .map(IndexQueue::len)
            .into_iter()
            .chain([self.accepted.len()])
            .max()
            .unwrap_or_default()
    }

    pub(in crate::mux) fn credit(&self, id: ExchangeId) -> Option<Credit> {
        let exchange = self.store.iter().find(|(_, exchange)| exchange.id == id)?.1;
        Some(Credit {
            to_send: exchange.send_window.available(),
            to_receive: exchange.receive_window.available(),
        })
    }

    /// Bytes of heads, bodies and trailers that the peer has made this end hold.
    pub(in crate::mux) fn held_bytes(&self) -> usize {
        let accepted: usize = self.accepted.iter().map(|(_, head)| head.size()).sum();
        let exchanges: usize = self
            .store
            .iter()
            .map(|(_, exchange)| {
                let head = exchange.head_in.as_ref().map_or(0, ResponseHead::size);
                let interim = exchange.interim_in.as_ref().map_or(0, ResponseHead::size);
                let trailers = match &exchange.ending_in {
                    Some(Ending::Complete(Some(lines))) => lines.size(),
                    _ => 0,
                };
                exchange.inbox.len() + head + interim + trailers
            })
            .sum();
        accepted + exchanges
    }

    /// Slices that the peer has made this end hold: each costs memory of its own.
    pub(in crate::mux) fn held_slices(&self) -> usize {
        self.store
            .iter()
            .map(|(_, exchange)| exchange.inbox.slices())
            .sum()
    }

    /// Panics if what is written down twice differs, or if something to do is in no queue.
    #[track_caller]
    pub(in crate::mux) fn assert_consistent(&self) {
        let live = self.store.iter().filter(|(_, e)| !e.is_over()).count();
        assert_eq!(self.live as usize, live, "live has drifted");
        let promised: usize = self
            .store
            .iter()
            .map(|(_, exchange)| exchange.promised + exchange.outbox_loan)
            .sum();
        assert_eq!(self.budget.used(), promised, "the budget has drifted");
        for (index, exchange) in self.store.iter() {
            exchange.receive_window.assert_consistent();
            if !exchange.discards() {
                assert_eq!(
                    exchange.receive_window.unread() as usize,
                    exchange.inbox.len(),
                    "what lies unread isn't what the window says"
                );
            }
            assert!(
                !(exchange.is_over() && exchange.released),
                "an exchange that nobody needs"
            );
            if self.closed {
                assert!(exchange.is_over(), "an exchange of a closed session lives");
                continue;
            }
            assert!(
                !exchange.is_ready() || self.ready.contains(index),
                "something to send waits for no turn: {exchange:?}"
            );
            assert!(
                !exchange.has_control() || self.control.contains(index),
                "control to send waits for no turn: {exchange:?}"
            );
            let event = exchange.readable || exchange.writable;
            assert!(
                !event || exchange.released || self.events.contains(index),
                "an event that nobody will hear of"
            );
            assert!(
                exchange.cancel != Cancel::Sent || exchange.sent_end,
                "cancelled before the own end"
            );
        }
    }
}
