//! Who cleans up late, and what that may not touch.

use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use super::*;
use crate::link::Link;
use crate::mux::{self, Budget, Pool};
use crate::net::acceptor::Command;

const PORT: u16 = 8100;

struct Stand {
    registry: Arc<Registry>,
    config: ServerConfig,
}

impl Stand {
    /// A registry with one port, kept for so long for who leaves it.
    fn new(lease: Duration) -> Self {
        let mut config = ServerConfig::default();
        config.http.agent_port_range = PORT..=PORT;
        config.http.port_lease = lease;
        let registry = Registry::new(
            &config,
            BTreeSet::new(),
            Directory::new(),
            Metrics::new(1, SystemTime::UNIX_EPOCH),
            None,
            None,
        );
        Self {
            registry: registry.unwrap(),
            config,
        }
    }

    fn join(&self, id: &str) -> Pin<Box<impl Future<Output = Result<Joined, JoinError>> + use<>>> {
        let heartbeat = Duration::from_secs(10);
        let config = mux::Config {
            max_exchanges: 8,
            heartbeat_interval: heartbeat,
            heartbeat_timeout: 3 * heartbeat,
        };
        let budget = Budget::new(Pool::new(1 << 20), 1 << 20);
        let applicant = Applicant {
            agent_id: id.parse().unwrap(),
            instance: None,
            last_port: None,
            session: Session::new(Link::acceptor(config, budget)),
            worker: 0,
            upgrades: true,
            peer: ([127, 0, 0, 1], 4711).into(),
            software: String::new(),
            labels: BTreeMap::new(),
            public_host: DEFAULT_HOST.into(),
        };
        let registry = self.registry.clone();
        Box::pin(async move { registry.join(applicant).await })
    }

    /// Does what an accept task would, and says by which keys ports were bound.
    fn obey(&self) -> Vec<(u16, u64)> {
        let mut bound = Vec::new();
        while let Some(command) = self.registry.next_command() {
            if let Command::Bind { port, key } = command {
                self.registry.opened(port, key, Ok(()));
                bound.push((port, key));
            }
        }
        bound
    }

    /// The agent's session once its port is bound, and the port's key if it was bound for that.
    fn joined(&self, id: &str) -> (Joined, Vec<(u16, u64)>) {
        let mut join = self.join(id);
        let first = poll(join.as_mut());
        let bound = self.obey();
        match first {
            Poll::Ready(joined) => (joined.unwrap(), bound),
            Poll::Pending => match poll(join.as_mut()) {
                Poll::Ready(joined) => (joined.unwrap(), bound),
                Poll::Pending => panic!("{id} still waits for its port"),
            },
        }
    }

    fn leave(&self, id: &str, generation: Generation) -> bool {
        self.registry.leave(&id.parse().unwrap(), generation)
    }

    /// The session that a connection goes to which was accepted under that key.
    fn route(&self, (port, key): (u16, u64)) -> Option<Generation> {
        let tunnel = self.registry.route(port, key)?.tunnel();
        Some(tunnel.map_or(Generation(0), |tunnel| tunnel.generation))
    }

    fn listed(&self) -> Vec<String> {
        let mut keep = pin!(self.registry.directory.keep_current());
        let _ = poll(keep.as_mut());
        let snapshot = self.registry.directory.read();
        let rows = snapshot.rows().iter();
        rows.map(|row| format!("{} {}", row.agent_id, row.port))
            .collect()
    }
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Sessions end those they replace in tasks of their own.
fn with_tasks(test: impl FnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async { test() });
}

#[test]
fn a_replaced_session_takes_nothing_from_its_successor() {
    with_tasks(|| {
        let stand = Stand::new(Duration::ZERO);
        let (first, bound) = stand.joined("a");
        let (second, again) = stand.joined("a");
        assert_eq!(again, [], "the port stays bound");
        assert!(!stand.leave("a", first.generation));
        assert_eq!(stand.route(bound[0]), Some(second.generation));
        assert_eq!(stand.listed(), ["a 8100"]);
        assert!(stand.leave("a", second.generation));
        assert!(!stand.leave("a", second.generation));
        assert_eq!(stand.listed(), [""; 0]);
    });
}

#[test]
fn a_connection_accepted_for_an_agent_never_reaches_the_next_one() {
    with_tasks(|| {
        let stand = Stand::new(Duration::ZERO);
        let (first, old) = stand.joined("a");
        assert_eq!(stand.route(old[0]), Some(first.generation));
        assert!(stand.leave("a", first.generation));
        assert_eq!(stand.route(old[0]), None);
        let (second, new) = stand.joined("b");
        // A worker may take it out of its queue only now.
        assert_eq!(stand.route(old[0]), None);
        assert_eq!(stand.route(new[0]), Some(second.generation));
    });
}

#[test]
fn who_goes_while_the_port_is_bound_holds_none() {
    with_tasks(|| {
        let stand = Stand::new(Duration::ZERO);
        let mut join = stand.join("a");
        assert!(poll(join.as_mut()).is_pending());
        drop(join);
        let bound = stand.obey();
        assert_eq!(stand.route(bound[0]), None);
        assert_eq!(stand.listed(), [""; 0]);
        // The port is free for somebody else.
        stand.joined("b");
    });
}

#[test]
fn a_late_word_of_an_older_bind_changes_nothing() {
    with_tasks(|| {
        let stand = Stand::new(Duration::ZERO);
        let (first, old) = stand.joined("a");
        assert!(stand.leave("a", first.generation));
        let mut join = stand.join("b");
        assert!(poll(join.as_mut()).is_pending());
        let (port, key) = old[0];
        stand.registry.opened(port, key, Ok(()));
        assert!(poll(join.as_mut()).is_pending(), "its own isn't bound yet");
        let failed = Err(io::ErrorKind::AddrInUse.into());
        stand.registry.opened(port, key, failed);
        stand.obey();
        assert!(poll(join.as_mut()).is_ready());
    });
}

#[test]
fn a_range_that_has_moved_gets_the_agent_when_it_comes_back() {
    with_tasks(|| {
        let mut stand = Stand::new(Duration::ZERO);
        let (first, old) = stand.joined("a");
        stand.config.http.agent_port_range = PORT + 1..=PORT + 1;
        assert_eq!(stand.registry.reconfigure(&stand.config).unwrap(), 1);
        // One that takes over keeps the port that visitors know.
        let (second, bound) = stand.joined("a");
        assert_eq!((second.port, bound), (PORT, vec![]));
        assert!(!stand.leave("a", first.generation));
        assert_eq!(stand.route(old[0]), Some(second.generation));
        assert!(stand.leave("a", second.generation));
        let (third, new) = stand.joined("a");
        assert_eq!(stand.listed(), ["a 8101"]);
        assert_eq!(stand.route(old[0]), None);
        assert_eq!(stand.route(new[0]), Some(third.generation));
    });
}
