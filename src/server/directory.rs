//! The directory of agents, as the admin port shows it.
//!
//! The registry notes each change of members, ports, labels or states as it happens, which costs a
//! map operation. The admin thread makes a [`Snapshot`] of all rows out of them, every 50 ms at most,
//! and takes the newest one for each answer. Figures that move with every request aren't part of
//! that: a row points at the [`AgentStats`] that the worker counts in, and they are read when an
//! answer is written.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};

use crate::id::{AgentId, Generation};
pub use crate::metrics::AgentStats;

/// How often a snapshot is made at most. Pollers see a change this much later.
const REBUILD_INTERVAL: Duration = Duration::from_millis(50);

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
    /// What answers say of all but the live figures.
    pub text: RowText,
}

/// The part of an answer that tells a row without its live figures, kept from the first answer
/// on: of a poll of 8,000 agents it was most of the work. A copy of a row is there to be changed,
/// and begins without.
#[derive(Debug, Default)]
pub struct RowText(OnceLock<Box<[u8]>>);

impl RowText {
    /// The text, written by `write` if this is the first time.
    pub fn get_or_write(&self, write: impl FnOnce() -> Box<[u8]>) -> &[u8] {
        self.0.get_or_init(write)
    }
}

impl Clone for RowText {
    fn clone(&self) -> Self {
        Self::default()
    }
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

/// All agents at one revision of the directory. It never changes.
#[derive(Debug, Default)]
pub struct Snapshot {
    revision: u64,
    /// Sorted by agent id, each id once: the order of answers, and the index for lookups. Rows are
    /// shared with the next snapshot, so that a rebuild copies pointers, not strings.
    rows: Vec<Arc<Row>>,
}

impl Snapshot {
    /// How often the directory has changed so far: 0 while nobody has ever been here. It moves
    /// with members, ports, labels and states, not with live figures.
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

    /// The next snapshot. It costs a pointer's copy for each row and a binary search for each
    /// change.
    fn after(&self, changes: BTreeMap<AgentId, Change>) -> Self {
        let mut rows = Vec::with_capacity(self.rows.len() + changes.len());
        let mut rest = &self.rows[..];
        for (id, change) in changes {
            let at = rest.partition_point(|row| row.agent_id < id);
            let (before, after) = rest.split_at(at);
            rows.extend_from_slice(before);
            rest = match after.split_first() {
                Some((row, after)) if row.agent_id == id => after,
                _ => after,
            };
            match change {
                Change::Added(row) | Change::Replaced(row) => rows.push(row),
                Change::Removed => {}
            }
        }
        rows.extend_from_slice(rest);
        Self {
            revision: self.revision + 1,
            rows,
        }
    }
}

/// What becomes of one agent's row in the next snapshot.
#[derive(Debug)]
enum Change {
    /// The newest snapshot doesn't have it.
    Added(Arc<Row>),
    /// The newest snapshot has an older one.
    Replaced(Arc<Row>),
    /// The newest snapshot has one that is to go.
    Removed,
}

/// Where the registry notes what changes, and the admin port finds all of it.
#[derive(Debug, Default)]
pub struct Directory {
    /// What the newest snapshot doesn't show yet. Held for one operation on the map, or to take all
    /// of it away, so neither side ever waits for work of the other. It is bounded by the agents
    /// that hold a port and those that the newest snapshot has: one that came and went in between
    /// leaves no trace.
    changes: Mutex<BTreeMap<AgentId, Change>>,
    /// Wakes [`Directory::keep_current`].
    changed: Notify,
    /// Written by `keep_current`, read and awaited by answers, all on the admin thread.
    newest: watch::Sender<Arc<Snapshot>>,
}

impl Directory {
    /// A directory without agents, at revision 0.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Notes the row of an agent that had none. Like the other two it costs a map operation, and
    /// a wake-up of the admin thread if that isn't pausing.
    pub fn add(&self, row: Arc<Row>) {
        let mut changes = self.changes();
        let change = match changes.get(&row.agent_id) {
            Some(Change::Removed | Change::Replaced(_)) => Change::Replaced(row.clone()),
            Some(Change::Added(_)) | None => Change::Added(row.clone()),
        };
        changes.insert(row.agent_id.clone(), change);
        drop(changes);
        self.changed.notify_one();
    }

    /// Notes another row of an agent that had one.
    pub fn replace(&self, row: Arc<Row>) {
        let mut changes = self.changes();
        let change = match changes.get(&row.agent_id) {
            Some(Change::Added(_)) => Change::Added(row.clone()),
            Some(Change::Removed | Change::Replaced(_)) | None => Change::Replaced(row.clone()),
        };
        changes.insert(row.agent_id.clone(), change);
        drop(changes);
        self.changed.notify_one();
    }

    /// Notes that an agent has no row any more.
    pub fn remove(&self, id: &AgentId) {
        let mut changes = self.changes();
        match changes.get(id) {
            Some(Change::Added(_)) => {
                changes.remove(id);
            }
            Some(Change::Removed | Change::Replaced(_)) | None => {
                changes.insert(id.clone(), Change::Removed);
            }
        }
        drop(changes);
        self.changed.notify_one();
    }

    /// The newest snapshot: what was true 50 ms ago at most.
    pub fn read(&self) -> Arc<Snapshot> {
        self.newest.borrow().clone()
    }

    /// The newest snapshot, and a word whenever there is another.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.newest.subscribe()
    }

    /// Makes a snapshot of whatever changes, every 50 ms at most, until the future is dropped. The
    /// admin port's own thread does that; for 10,000 agents it takes some 100 µs.
    pub async fn keep_current(&self) {
        loop {
            self.changed.notified().await;
            let changes = std::mem::take(&mut *self.changes());
            if changes.is_empty() {
                continue;
            }
            let next = Arc::new(self.read().after(changes));
            self.newest.send_replace(next);
            tokio::time::sleep(REBUILD_INTERVAL).await;
        }
    }

    fn changes(&self) -> MutexGuard<'_, BTreeMap<AgentId, Change>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

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
            text: RowText::default(),
        })
    }

    /// Lets the directory take what has changed, on a clock that stands still.
    fn rebuild(directory: &Directory) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        let keep = pin!(directory.keep_current());
        assert!(
            keep.poll(&mut Context::from_waker(Waker::noop()))
                .is_pending()
        );
    }

    #[test]
    fn rows_are_sorted_and_found_by_id() {
        let directory = Directory::new();
        for (id, port) in [("b", 2), ("a.b", 3), ("a", 1), ("a-b", 4)] {
            directory.add(row(id, port));
        }
        rebuild(&directory);
        let snapshot = directory.read();
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
        let mut watch = directory.watch();
        directory.add(row("a", 1));
        rebuild(&directory);
        assert_eq!((before.revision(), before.rows().len()), (0, 0));
        let now = directory.read();
        assert_eq!((now.revision(), now.rows().len()), (1, 1));
        assert!(watch.has_changed().unwrap());
        assert_eq!(watch.borrow_and_update().revision(), 1);
    }

    #[test]
    fn who_comes_and_goes_between_two_looks_leaves_no_trace() {
        let directory = Directory::new();
        for n in 0..1_000 {
            let row = row(&format!("agent-{n}"), 1);
            directory.add(row.clone());
            directory.replace(row.clone());
            directory.remove(&row.agent_id);
        }
        assert!(directory.changes().is_empty());
        rebuild(&directory);
        assert_eq!(directory.read().revision(), 0);
    }

    proptest! {
        /// Whatever happens and whenever the admin port looks, it sees what the registry has.
        #[test]
        fn the_snapshot_is_what_the_registry_has(
            steps in prop::collection::vec((0..12_u16, 0..4_u8), 0..80),
        ) {
            let directory = Directory::new();
            let mut members: BTreeMap<AgentId, u16> = BTreeMap::new();
            for (number, (agent, what)) in (1..).zip(steps) {
                let row = row(&format!("a{agent}"), number);
                let id = row.agent_id.clone();
                match what {
                    0 if members.remove(&id).is_some() => directory.remove(&id),
                    1 | 2 => match members.insert(id, number) {
                        None => directory.add(row),
                        Some(_) => directory.replace(row),
                    },
                    3 => rebuild(&directory),
                    _ => {}
                }
            }
            rebuild(&directory);
            let shown: Vec<_> = directory
                .read()
                .rows()
                .iter()
                .map(|row| (row.agent_id.clone(), row.port))
                .collect();
            prop_assert_eq!(shown, members.into_iter().collect::<Vec<_>>());
            prop_assert!(directory.changes().is_empty());
        }
    }
}
