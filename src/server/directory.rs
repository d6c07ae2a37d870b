//! The directory of agents, as the admin port shows it.
//!
//! The registry publishes a finished [`Snapshot`] whenever members, ports, labels or states
//! changed (at most every 50 ms); the admin port takes the newest one for each answer. Figures that
//! move with every request aren't part of that: a row points at the [`AgentStats`] that the worker
//! counts in, and they are read when an answer is written.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::id::{AgentId, Generation};
pub use crate::metrics::AgentStats;

/// One agent and its port.
#[derive(Clone, Debug)]
pub struct Row {
    /// Whose port it is.
    pub agent_id: AgentId,
    /// The port.
    pub port: u16,
    /// The current session, or the last one while the port is leased; 0 for a lease from before
    /// the server's start.
    pub generation: Generation,
    /// Whether there is a session now.
    pub state: RowState,
    /// Where the session's connection comes from; none without a session.
    pub peer: Option<SocketAddr>,
    /// When the session was welcomed; for a lease from before the server's start, when that was
    /// written down.
    pub connected_at: SystemTime,
    /// The agent's version, as its hello says.
    pub version: String,
    /// The agent's labels, as its hello says.
    pub labels: BTreeMap<String, String>,
    /// The URL that the welcome told the agent.
    pub public_url: String,
    /// The live figures.
    pub stats: Arc<AgentStats>,
}

/// Whether a port has a session behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowState {
    /// Requests go to an agent.
    Serving,
    /// The agent is gone, and the port is kept for it.
    Leased,
}

impl RowState {
    /// The word that answers show.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Leased => "leased",
        }
    }
}

/// All agents at one revision of the registry. It never changes.
#[derive(Debug, Default)]
pub struct Snapshot {
    revision: u64,
    /// Sorted by agent id, each id once: the order of answers, and the index for lookups. Rows are
    /// shared with the next snapshot, so that a rebuild copies pointers, not strings.
    rows: Vec<Arc<Row>>,
}

impl Snapshot {
    /// A snapshot of `rows`, which may come in any order but must not name an id twice.
    pub fn new(revision: u64, mut rows: Vec<Arc<Row>>) -> Self {
        rows.sort_unstable_by(|a, b| a.agent_id.cmp(&b.agent_id));
        debug_assert!(
            rows.windows(2)
                .all(|pair| pair[0].agent_id != pair[1].agent_id)
        );
        Self { revision, rows }
    }

    /// The registry's revision that the snapshot shows.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The rows, sorted by agent id.
    pub fn rows(&self) -> &[Arc<Row>] {
        &self.rows
    }

    /// The row of an agent.
    pub fn get(&self, id: &str) -> Option<&Arc<Row>> {
        self.rows
            .binary_search_by(|row| row.agent_id.as_str().cmp(id))
            .ok()
            .map(|at| &self.rows[at])
    }
}

/// Where the registry leaves the newest [`Snapshot`] and the admin port finds it.
#[derive(Debug, Default)]
pub struct Directory {
    /// Held only to clone or swap the pointer, so neither side ever waits for work of the other.
    newest: Mutex<Arc<Snapshot>>,
}

impl Directory {
    /// A directory without agents, at revision 0.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Makes `snapshot` the newest.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *newest, snapshot);
        // The old rows, if this was the last holder, are freed after the lock.
        drop(newest);
        drop(old);
    }

    /// The newest snapshot.
    pub fn read(&self) -> Arc<Snapshot> {
        Arc::clone(&self.newest.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn row(id: &str, port: u16) -> Arc<Row> {
        Arc::new(Row {
            agent_id: id.parse().unwrap(),
            port,
            generation: Generation(1),
            state: RowState::Serving,
            peer: None,
            connected_at: UNIX_EPOCH,
            version: String::new(),
            labels: BTreeMap::new(),
            public_url: String::new(),
            stats: AgentStats::new(UNIX_EPOCH),
        })
    }

    #[test]
    fn rows_are_sorted_and_found_by_id() {
        let snapshot = Snapshot::new(
            3,
            vec![row("b", 2), row("a.b", 3), row("a", 1), row("a-b", 4)],
        );
        let order: Vec<_> = snapshot
            .rows()
            .iter()
            .map(|row| row.agent_id.as_str())
            .collect();
        assert_eq!(order, ["a", "a-b", "a.b", "b"]);
        for row in snapshot.rows() {
            assert_eq!(snapshot.get(row.agent_id.as_str()).unwrap().port, row.port);
        }
        assert!(snapshot.get("c").is_none());
        assert!(snapshot.get("").is_none());
    }

    #[test]
    fn a_reader_keeps_what_it_took() {
        let directory = Directory::new();
        let before = directory.read();
        directory.publish(Arc::new(Snapshot::new(1, vec![row("a", 1)])));
        assert_eq!((before.revision(), before.rows().len()), (0, 0));
        assert_eq!(
            (directory.read().revision(), directory.read().rows().len()),
            (1, 1)
        );
    }
}
