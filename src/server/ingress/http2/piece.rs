use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::{Buf, Bytes};

use super::super::place::{Part, Watched};
use crate::server::worker::Worker;

/// What h2 has of an answer's body and hasn't written. It notes for the sweep that the visitor
/// takes bytes.
pub(super) struct Unsent {
    bytes: AtomicUsize,
    worker: Arc<Worker>,
    watched: Arc<Watched>,
}

impl Unsent {
    pub(super) fn new(part: &Part) -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicUsize::new(0),
            worker: part.worker.clone(),
            watched: part.watched.clone(),
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    pub(super) fn is_none(&self) -> bool {
        self.bytes() == 0
    }

    pub(super) fn piece(self: &Arc<Self>, data: Bytes) -> Piece {
        self.bytes.fetch_add(data.len(), Relaxed);
        Piece {
            data,
            unsent: self.clone(),
        }
    }

    fn written(&self, bytes: usize) {
        if bytes > 0 && self.bytes.fetch_sub(bytes, Relaxed) == bytes {
            self.watched.task.wake();
        }
    }
}

/// A piece of an answer's body in the hands of h2.
pub(super) struct Piece {
    data: Bytes,
    unsent: Arc<Unsent>,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.data.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.data
    }

    fn advance(&mut self, bytes: usize) {
        self.data.advance(bytes);
        self.unsent.watched.took(self.unsent.worker.now());
        self.unsent.written(bytes);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.unsent.written(self.data.len());
    }
}
