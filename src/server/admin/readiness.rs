//! What `GET /ready` answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::watch;

/// Whether the server is ready for agents and visitors: a latch that each step of the start
/// releases, and that drain sets again for good.
#[derive(Debug, Default)]
pub struct Readiness {
    /// Held only to look or to change; the admin thread reads it, start and drain write it.
    inner: Mutex<Latch>,
    /// Ends the waits for a change of the list, so that nobody who waits holds up the end.
    ends: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Latch {
    /// How many steps of each name are outstanding; a name goes with its last step.
    outstanding: BTreeMap<&'static str, usize>,
    draining: bool,
}

impl Readiness {
    /// A latch without steps: ready.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a step; the server isn't ready until [`Step::release`]. A step that is dropped instead
    /// has failed and stays outstanding.
    pub fn step(self: &Arc<Self>, name: &'static str) -> Step {
        *self.lock().outstanding.entry(name).or_default() += 1;
        Step {
            readiness: Arc::clone(self),
            name,
        }
    }

    /// The server drains: it isn't ready any more and won't be again. Whoever waits for a change
    /// of the list is answered now.
    pub fn drain(&self) {
        self.lock().draining = true;
        self.ends.send_replace(());
    }

    /// Says when the next [`Readiness::drain`] comes.
    pub(super) fn ends(&self) -> watch::Receiver<()> {
        self.ends.subscribe()
    }

    /// The state now.
    pub fn state(&self) -> ReadyState {
        let latch = self.lock();
        if latch.draining {
            ReadyState::Draining
        } else if latch.outstanding.is_empty() {
            ReadyState::Ready
        } else {
            ReadyState::Starting {
                waiting_for: latch.outstanding.keys().copied().collect(),
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Latch> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A step of the start that the server isn't ready without.
#[derive(Debug)]
#[must_use = "a step that is dropped without a release stays outstanding"]
pub struct Step {
    readiness: Arc<Readiness>,
    name: &'static str,
}

impl Step {
    /// The step is done.
    pub fn release(self) {
        let mut latch = self.readiness.lock();
        if let Some(count) = latch.outstanding.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                latch.outstanding.remove(self.name);
            }
        }
    }
}

/// What `GET /ready` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum ReadyState {
    /// Agents and visitors are served.
    Ready,
    /// Steps of the start are outstanding.
    Starting {
        /// Their names, sorted.
        waiting_for: Vec<&'static str>,
    },
    /// The server is shutting down.
    Draining,
}
