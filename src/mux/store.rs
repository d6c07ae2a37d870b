use slab::Slab;

use super::exchange::Exchange;
use crate::id::ExchangeId;

/// A local handle on one exchange of one session.
///
/// It stays valid until [`Session::release`](super::Session::release); using it later finds
/// nothing, never another exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub(super) index: usize,
    pub(super) id: ExchangeId,
}

impl Key {
    /// The exchange's place in the slab: small, dense, unique among the exchanges that exist at
    /// one time, and reused. For tables beside the session.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The exchange's name on the wire.
    pub fn id(&self) -> ExchangeId {
        self.id
    }
}

/// The exchanges of a session.
///
/// In the opener's store an exchange's slot on the wire is its slab key. The acceptor has a slab
/// of its own, since it may hold an exchange a little longer than its peer, and finds its way
/// from the peer's slots by `by_slot`.
#[derive(Debug)]
pub(super) struct Store {
    slab: Slab<Exchange>,
    next_generation: u32,
    /// Acceptor only: the slab key of the exchange in each of the peer's slots.
    by_slot: Option<Vec<usize>>,
}

/// No exchange in this slot.
const VACANT: usize = usize::MAX;

impl Store {
    pub(super) fn opener() -> Self {
        Self {
            slab: Slab::new(),
            next_generation: 0,
            by_slot: None,
        }
    }

    pub(super) fn acceptor() -> Self {
        Self {
            by_slot: Some(Vec::new()),
            ..Self::opener()
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    /// Names a new exchange of ours and stores what `make` makes for that name.
    pub(super) fn insert_named(&mut self, make: impl FnOnce(ExchangeId) -> Exchange) -> Key {
        let generation = self.next_generation;
        self.next_generation = generation.wrapping_add(1);
        let entry = self.slab.vacant_entry();
        let index = entry.key();
        let id = ExchangeId {
            slot: index as u32,
            generation,
        };
        entry.insert(make(id));
        Key { index, id }
    }

    /// Stores an exchange that the peer has named. Its slot is below the agreed number of
    /// exchanges; the caller has seen to that.
    pub(super) fn insert(&mut self, exchange: Exchange) -> Key {
        let id = exchange.id;
        let index = self.slab.insert(exchange);
        if let Some(by_slot) = &mut self.by_slot {
            let slot = id.slot as usize;
            if by_slot.len() <= slot {
                by_slot.resize(slot + 1, VACANT);
            }
            by_slot[slot] = index;
        }
        Key { index, id }
    }

    /// The slab key of whatever exchange is in the peer's (or our own) slot.
    pub(super) fn in_slot(&self, slot: u32) -> Option<usize> {
        let index = match &self.by_slot {
            None => slot as usize,
            Some(by_slot) => by_slot.get(slot as usize).copied()?,
        };
        self.slab.contains(index).then_some(index)
    }

    /// The slab key for a name from the wire; stale names find nothing.
    pub(super) fn find(&self, id: ExchangeId) -> Option<usize> {
        let index = self.in_slot(id.slot)?;
        (self.slab.get(index)?.id == id).then_some(index)
    }

    pub(super) fn by_index(&mut self, index: usize) -> Option<&mut Exchange> {
        self.slab.get_mut(index)
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Exchange> {
        self.slab
            .get_mut(key.index)
            .filter(|exchange| exchange.id == key.id)
    }

    pub(super) fn remove(&mut self, index: usize) -> Option<Exchange> {
        let exchange = self.slab.try_remove(index)?;
        if let Some(by_slot) = &mut self.by_slot {
            // The peer may have put a newer exchange into the slot by now.
            if let Some(entry) = by_slot.get_mut(exchange.id.slot as usize)
                && *entry == index
            {
                *entry = VACANT;
            }
        }
        if self.slab.is_empty() {
            // What a burst has grown, an idle tunnel doesn't keep.
            if self.slab.capacity() > 64 {
                self.slab = Slab::new();
            }
            if let Some(by_slot) = &mut self.by_slot
                && by_slot.capacity() > 64
            {
                *by_slot = Vec::new();
            }
        }
        Some(exchange)
    }

    /// The slab keys of all exchanges.
    pub(super) fn indexes(&self) -> Vec<usize> {
        self.slab.iter().map(|(index, _)| index).collect()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Exchange)> {
        self.slab.iter()
    }
}
