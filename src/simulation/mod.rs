//! Faults by simulation: the real registry, port allocator, sessions, tunnels, tenancies and limits
//! of the server, and the real session and reconnecting of the agent, in one thread, on a network
//! ([`net`]) and a clock that a seed decides about. What takes minutes takes a second, and happens
//! again with the same seed.
//!
//! ```text
//!   stage  ── a server, agents, visitors; what must hold of them
//!   chance ── faults drawn by a seed: partitions, loss one way, delay, cuts, crashes, power cuts,
//!             flapping, rivals, drains, stalls, clock jumps, foreign ports
//!   steps  ── a tunnel cut after each byte of its handshake; two processes that race for an id
//! ```
//!
//! Only the transport is another one: an agent's way to its server ([`Outside`](crate::agent::Outside)),
//! the socket of a tunnel connection ([`TunnelSocket`](crate::server::simulated)), the listening
//! ports, the disk. Visitors ask by the call that opens every visitor's exchange; HTTP/1 and HTTP/2
//! on their sockets, and the agent's connections to its service, have tests of their own.
//!
//! Not turmoil: its partitions drop segments, and its TCP sends nothing again, so that a connection
//! that outlives a partition has a hole in it, which no kernel makes. Nor can it cut a connection
//! after a byte. What is left of it, one thread and a paused clock, tokio has.
//!
//! `cargo test --lib simulation` runs some seeds, with `-- --include-ignored` some tens;
//! `SEEDS=1000 cargo test --lib simulation::chance` runs so many, and `SEED=17` that one alone. A
//! failure says how to see it again with all that happened.

mod chance;
pub(crate) mod net;
pub(crate) mod random;
mod stage;
mod steps;

use std::ops::Range;

/// Runs a stage on a clock that goes on when nothing is left to do, and panics if something went
/// wrong, saying what had happened and how to see it again.
fn run<F: Future>(name: &str, seed: u64, act: impl FnOnce() -> F) -> F::Output
where
    F::Output: Seen,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let seen = runtime.block_on(act());
    let ledger = seen.ledger();
    let faults = ledger.faults();
    let trace = ledger.trace();
    let last = match wanted("SEED") {
        Some(_) => trace.len(),
        None => 60,
    };
    let trace = &trace[trace.len().saturating_sub(last)..];
    if wanted("SEED").is_some() {
        println!("{}\n{:?}", trace.join("\n"), ledger.counts());
    }
    assert!(
        faults.is_empty(),
        "{}\n\nseed {seed}: {faults:#?}\nagain, with all that happened: \
         SEED={seed} cargo test --lib simulation::{name} -- --nocapture --include-ignored",
        trace.join("\n"),
    );
    seen
}

/// What a run leaves behind to be looked at.
trait Seen {
    fn ledger(&self) -> &stage::Ledger;
}

impl Seen for stage::Ledger {
    fn ledger(&self) -> &stage::Ledger {
        self
    }
}

impl<T> Seen for (stage::Ledger, T) {
    fn ledger(&self) -> &stage::Ledger {
        &self.0
    }
}

/// Which seeds to run: these, unless somebody wants more, or one of them.
fn seeds(usual: Range<u64>) -> Range<u64> {
    match (wanted("SEED"), wanted("SEEDS")) {
        (Some(one), _) => one..one + 1,
        (None, Some(many)) => 0..many,
        (None, None) => usual,
    }
}

fn wanted(variable: &str) -> Option<u64> {
    std::env::var_os(variable)?.to_str()?.parse().ok()
}

/// Ids for so many agents.
fn ids(count: usize) -> Vec<String> {
    (1..=count)
        .map(|number| format!("agent-{number}"))
        .collect()
}
