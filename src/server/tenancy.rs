//! An agent's hold on a port, as the connections of its visitors see it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::id::{AgentId, Generation};
use crate::link::Link;
use crate::metrics::AgentStats;
use crate::ports::Allocation;

/// One agent's tenancy of one port, from the moment the port is its own to its release.
///
/// A visitor's connection belongs to the tenancy, not to a tunnel: each exchange takes the
/// tunnel that the tenancy has at that moment, so a kept-alive connection follows its agent over
/// a reconnect, and never reaches another agent that has the port later.
#[derive(Debug)]
pub(super) struct Tenancy {
    /// Whose port it is.
    pub agent_id: AgentId,
    /// The tenancy's number, never used again.
    pub allocation: Allocation,
    /// The port.
    pub port: u16,
    /// The agent's live figures.
    pub stats: Arc<AgentStats>,
    /// Held to look or to swap only. Each exchange reads it; the registry writes it.
    tunnel: Mutex<Option<Tunnel>>,
    /// The worker that new connections go to: the tunnel's, or the last one's.
    worker: AtomicUsize,
    /// The port has been released: connections end after what they are doing. Read by the
    /// workers' sweeps.
    over: AtomicBool,
}

/// The tunnel of an agent's current session.
#[derive(Clone)]
pub(super) struct Tunnel {
    /// Opens exchanges, from any thread.
    pub link: Link,
    /// The session it belongs to.
    pub generation: Generation,
    /// The worker it lives on.
    pub worker: usize,
    /// The agent knows what to do with a request that asks for another protocol.
    pub upgrades: bool,
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel")
            .field("generation", &self.generation)
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

impl Tenancy {
    /// A tenancy without a tunnel.
    pub(super) fn new(
        agent_id: AgentId,
        allocation: Allocation,
        port: u16,
        stats: Arc<AgentStats>,
    ) -> Arc<Self> {
        Arc::new(Self {
            agent_id,
            allocation,
            port,
            stats,
            tunnel: Mutex::new(None),
            worker: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        })
    }

    /// The tunnel to open an exchange in, if the agent is connected.
    pub(super) fn tunnel(&self) -> Option<Tunnel> {
        self.lock().clone()
    }

    /// The worker that serves new connections best.
    pub(super) fn worker(&self) -> usize {
        self.worker.load(Ordering::Relaxed)
    }

    /// Makes `tunnel` the one that exchanges take from now on.
    pub(super) fn connect(&self, tunnel: Tunnel) {
        self.worker.store(tunnel.worker, Ordering::Relaxed);
        *self.lock() = Some(tunnel);
    }

    /// Takes the tunnel away if it is still the one of that session.
    pub(super) fn disconnect(&self, generation: Generation) {
        let mut tunnel = self.lock();
        if tunnel
            .as_ref()
            .is_some_and(|tunnel| tunnel.generation == generation)
        {
            *tunnel = None;
        }
    }

    /// Notes that the port has been released.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Whether the port has been released.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Tunnel>> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
