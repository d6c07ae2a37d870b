use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use thiserror::Error;

use crate::id::AgentId;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// How long an agent waits that found every port taken. A port is freed by somebody leaving,
/// which nobody can foresee; a port that is due earlier than this (a lease that ends) shortens it.
const EXHAUSTED_RETRY: Duration = Duration::from_secs(5);

/// No agent is asked to come back sooner than this, so that a crowd without ports stays cheap.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);

/// How long an agent waits when the process had no descriptor for its port. The accept task
/// finds out within a second when there are some again.
const DESCRIPTORS_RETRY: Duration = Duration::from_secs(2);

/// Names one tenancy: one agent's hold on a port, from its request to its release.
///
/// It survives a takeover by a newer session of the same agent and a move to another port while
/// the first one can't be bound. It is never used again, so that whatever arrives late (the
/// outcome of a bind, a lost agent, a visitor's connection) can't meet the next tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Allocation(pub u64);

impl fmt::Display for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an [`Allocator`] may hand out, and for how long it keeps it.
#[derive(Debug, Clone)]
pub struct Config {
    /// The ports to share out, both ends included. Port 0 in it is left out. An empty range
    /// leaves only the pinned ports.
    pub range: RangeInclusive<u16>,
    /// Ports that belong to one agent alone, inside the range or outside.
    pub pinned: BTreeMap<AgentId, u16>,
    /// Ports of the range that are never handed out: the server's own (admin, gRPC).
    pub reserved: BTreeSet<u16>,
    /// How long a port stays bound for an agent that was lost; zero releases it at once.
    pub lease: Duration,
    /// How long a port that couldn't be bound is left alone before it is tried again.
    pub foreign_retry: Duration,
}

impl Config {
    /// Whose each pinned port is.
    fn owners(&self) -> Result<BTreeMap<u16, AgentId>, PinError> {
        let mut owners: BTreeMap<u16, AgentId> = BTreeMap::new();
        for (agent, &port) in &self.pinned {
            let agent = agent.clone();
            if port == 0 {
                return Err(PinError::Zero { agent });
            }
            if self.reserved.contains(&port) {
                return Err(PinError::Reserved { port, agent });
            }
            if let Some(first) = owners.insert(port, agent.clone()) {
                return Err(PinError::Shared {
                    port,
                    first,
                    second: agent,
                });
            }
        }
        Ok(owners)
    }

    /// The `foreign_retry` of a server: long enough that a port held by another program costs
    /// nothing, short enough that a freed one is found within a minute.
    pub const FOREIGN_RETRY: Duration = Duration::from_secs(30);
}

/// Why a table of pinned ports can't hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PinError {
    /// Port 0 asks the kernel for any port, so nobody can own it.
    #[error("port 0 can't be pinned to {agent}")]
    Zero {
        /// Whose pin it is.
        agent: AgentId,
    },
    /// The server listens there itself.
    #[error("port {port} is the server's own and can't be pinned to {agent}")]
    Reserved {
        /// The port.
        port: u16,
        /// Whose pin it is.
        agent: AgentId,
    },
    /// A pinned port belongs to one id alone.
    #[error("port {port} is pinned to {first} and to {second}")]
    Shared {
        /// The port.
        port: u16,
        /// The id that comes first in alphabetical order.
        first: AgentId,
        /// The other one.
        second: AgentId,
    },
}

/// What a request for a port led to at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The agent holds a port that is bound already, serving (a takeover) or leased: same
    /// tenancy, nothing is rebound. No [`Effect::Granted`] follows.
    Ready {
        /// The tenancy, the same as before.
        allocation: Allocation,
        /// Its port.
        port: u16,
    },
    /// A port is being bound for this agent, since now or since an earlier request that nobody
    /// gave up. [`Effect::Granted`], [`Effect::Refused`] or [`Effect::Released`] follows.
    Opening {
        /// The tenancy, by which the effect will name it.
        allocation: Allocation,
    },
    /// There is no port for this agent now.
    Refused(Refusal),
}

/// Why an agent gets no port now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Every port of the range is taken, leased or foreign.
    #[error("every port of the range is in use")]
    Exhausted {
        /// When to ask again.
        retry_after: Duration,
    },
    /// The agent's pinned port couldn't be bound, or its former tenant is still there; the agent
    /// gets no other.
    #[error("port {port}, pinned to this agent, is held by another agent or program")]
    PinUnavailable {
        /// The pinned port.
        port: u16,
        /// When to ask again.
        retry_after: Duration,
    },
    /// The process has no descriptor or memory for one more listening socket.
    #[error("no descriptor left for one more listening socket")]
    Descriptors {
        /// When to ask again.
        retry_after: Duration,
    },
}

impl Refusal {
    /// How long the agent should wait before it asks again.
    pub fn retry_after(self) -> Duration {
        match self {
            Self::Exhausted { retry_after }
            | Self::PinUnavailable { retry_after, .. }
            | Self::Descriptors { retry_after } => retry_after,
        }
    }
}

/// Why a port couldn't be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BindFailure {
    /// Another program holds the port.
    InUse,
    /// We may not bind it (a privileged port, a security policy).
    Denied,
    /// No descriptor or memory for a socket: nothing is wrong with the port.
    Descriptors,
    /// Anything else, such as an address that this host doesn't have.
    Other,
}

/// What the owner of an [`Allocator`] has to do, in the order in which it is polled.
///
/// Binds and closes must reach the kernel in that order: a port may be closed for one tenancy
/// and bound for the next in the same breath.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Listen on the port and report [`Allocator::bound`] or [`Allocator::bind_failed`] with
    /// both values.
    Bind {
        /// The port to listen on.
        port: u16,
        /// For whom.
        allocation: Allocation,
    },
    /// Stop listening. The bind may have failed, or its outcome may be under way: then there is
    /// nothing to close, or the outcome is ignored when it arrives.
    Close {
        /// The port to close.
        port: u16,
        /// For whom it was opened.
        allocation: Allocation,
    },
    /// The agent has its port: whoever waits for it can be welcomed.
    Granted {
        /// The tenancy.
        allocation: Allocation,
        /// Its port, now bound.
        port: u16,
    },
    /// The tenancy ended before it was granted: whoever waits for it is turned away.
    Refused {
        /// The tenancy.
        allocation: Allocation,
        /// Why.
        refusal: Refusal,
    },
    /// A port is bound whose lease [`Allocator::restore`] brought back: its visitors can be told
    /// that the agent is away. [`Effect::Released`] follows unless the agent comes back.
    Reclaimed {
        /// The tenancy.
        allocation: Allocation,
        /// Its port, now bound.
        port: u16,
        /// Whose lease it is.
        agent: AgentId,
    },
    /// The tenancy is over, granted or given up before: its visitors' connections are to be
    /// closed, and whoever still waits for it is turned away.
    Released {
        /// The tenancy.
        allocation: Allocation,
        /// The port it had, or was about to have.
        port: u16,
    },
    /// The port couldn't be bound and is left alone for a while: for the log.
    Foreign {
        /// The port.
        port: u16,
        /// Why it couldn't be bound.
        failure: BindFailure,
    },
}

/// Where a port is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortState {
    /// Nobody's, not bound.
    Free,
    /// Being bound for an agent.
    Opening,
    /// Bound; its agent is connected.
    Serving,
    /// Bound; its agent was lost and may come back until the lease ends.
    Leased,
    /// Not ours when last tried: another program holds it, or we may not bind it.
    Foreign,
}

impl PortState {
    /// The state's name in tables, JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Opening => "opening",
            Self::Serving => "serving",
            Self::Leased => "leased",
            Self::Foreign => "foreign",
        }
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One port as it stands now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortView<'a> {
    /// The port.
    pub port: u16,
    /// Where it is in its life.
    pub state: PortState,
    /// Its tenant while it is opening, serving or leased.
    pub tenant: Option<(&'a AgentId, Allocation)>,
}

/// One port and whose it is or was: what a server has to know after a restart, so that agents
/// find their ports again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// The port.
    pub port: u16,
    /// Who has it, or had it last.
    pub agent: AgentId,
    /// How much of a claim that agent has.
    pub claim: Claim,
}

/// What an agent's claim on a [`Remembered`] port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Its agent is connected.
    Serving,
    /// Its agent is gone, and the port is kept until this time.
    Leased {
        /// On the allocator's clock.
        until: Duration,
    },
    /// The port is free; its last agent gets it back before others do.
    Released,
}

/// How many ports are in which state. The sum is the number of ports that can be handed out,
/// pinned ones included, and of those that drain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ports that are nobody's.
    pub free: usize,
    /// Ports being bound.
    pub opening: usize,
    /// Ports with a connected agent.
    pub serving: usize,
    /// Ports kept for an agent that was lost.
    pub leased: usize,
    /// Ports that couldn't be bound when last tried.
    pub foreign: usize,
}

impl Counts {
    fn of(&mut self, state: PortState) -> &mut usize {
        match state {
            PortState::Free => &mut self.free,
            PortState::Opening => &mut self.opening,
            PortState::Serving => &mut self.serving,
            PortState::Leased => &mut self.leased,
            PortState::Foreign => &mut self.foreign,
        }
    }
}

/// Shares a range of ports out among agents.
///
/// Inputs are methods, outputs are polled: after each input, poll effects until there are none,
/// then ask [`Allocator::poll_timeout`] when to call [`Allocator::handle_timeout`]. Times are
/// durations since an epoch of the caller's, and never go back. Inputs that come late, twice or
/// for an unknown tenancy change nothing.
///
/// Each tenancy ends in exactly one [`Effect::Refused`] or [`Effect::Released`], at most one
/// [`Effect::Granted`] before. No operation costs more than O(log ports) where it doesn't say so,
/// except that one timeout or [`Allocator::release_all`] may end many tenancies. Memory and the queue of effects are
/// bounded by the number of ports if effects are polled as described.
#[derive(Debug)]
pub struct Allocator {
    range: RangeInclusive<u16>,
    reserved: BTreeSet<u16>,
    lease: Duration,
    foreign_retry: Duration,
    /// Every port that can be handed out, and those that can't be any more but have a tenant
    /// still.
    slots: BTreeMap<u16, Slot>,
    pinned: HashMap<AgentId, u16>,
    /// The ports that anybody may have now, the longest unused first, as `(unused_since, port)`.
    unused: BTreeSet<(u64, u16)>,
    /// When a lease ends or a foreign port may be tried again.
    timers: BTreeSet<(Duration, u16)>,
    /// The port of each running tenancy.
    tenancies: HashMap<Allocation, u16>,
    /// The port that each agent opens or holds.
    held: HashMap<AgentId, u16>,
    /// The port each agent had last: the reverse of `Slot::last`, so at most one entry a port.
    remembered: HashMap<AgentId, u16>,
    effects: VecDeque<Effect>,
    counts: Counts,
    next_allocation: u64,
    /// Orders ports by when they were last in use; 0 is "never", so this starts at 1.
    next_use: u64,
    /// Moves whenever [`Allocator::memory`] has changed.
    memory_revision: u64,
}

#[derive(Debug)]
struct Slot {
    state: State,
    pinned: bool,
    /// The value of `next_use` when the port was freed or failed last; 0 for a new one, so that
    /// never-used ports come first, in ascending order.
    unused_since: u64,
    /// Who was granted this port last, unless that agent has had another one since.
    last: Option<AgentId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Tenancy {
    agent: AgentId,
    allocation: Allocation,
}

/// The life of a port.
///
/// ```text
///         request              bound               agent lost, lease > 0
///   Free ─────────► Opening ──────────► Serving ─────────────────────────► Leased
///    ▲               │ │ ▲              │ ▲                                 │ │
///    │   bind failed ▼ │ │ request,     │ └──── request of the same agent ──┘ │
///    │         Foreign │ │ once due     │                                     │
///    │            └────┼─┘              │                                     │
///    └─────────────────┴────────────────┴─────────────────────────────────────┘
///      agent lost, or    agent lost,                                lease over
///      no descriptor     no lease
/// ```
///
/// `release_all` frees what is opening, serving or leased. A lease that `restore` brings back
/// goes from Free to Reclaiming, and with its port bound to Leased; its agent may come before
/// that, which makes it Opening.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Free,
    Opening(Tenancy),
    /// Being bound for an agent that hasn't come back yet.
    Reclaiming {
        tenancy: Tenancy,
        until: Duration,
    },
    Serving(Tenancy),
    Leased {
        tenancy: Tenancy,
        until: Duration,
    },
    /// `retry_at` is `None` once the time has come: the port may be tried like a free one, and
    /// still counts as foreign until a bind succeeds.
    Foreign {
        retry_at: Option<Duration>,
    },
}

impl State {
    fn public(&self) -> PortState {
        match self {
            Self::Free => PortState::Free,
            Self::Opening(_) | Self::Reclaiming { .. } => PortState::Opening,
            Self::Serving(_) => PortState::Serving,
            Self::Leased { .. } => PortState::Leased,
            Self::Foreign { .. } => PortState::Foreign,
        }
    }

    fn tenancy(&self) -> Option<&Tenancy> {
        match self {
            Self::Opening(tenancy)
            | Self::Reclaiming { tenancy, .. }
            | Self::Serving(tenancy)
            | Self::Leased { tenancy, .. } => Some(tenancy),
            Self::Free | Self::Foreign { .. } => None,
        }
    }

    /// Whether the port can be opened for a new tenancy.
    fn available(&self) -> bool {
        match self {
            Self::Free | Self::Foreign { retry_at: None } => true,
            Self::Opening(_)
            | Self::Reclaiming { .. }
            | Self::Serving(_)
            | Self::Leased { .. }
            | Self::Foreign { retry_at: Some(_) } => false,
        }
    }

    /// When the port has to be looked at again.
    fn timer(&self) -> Option<Duration> {
        match self {
            Self::Leased { until, .. } | Self::Reclaiming { until, .. } => Some(*until),
            Self::Foreign { retry_at } => *retry_at,
            Self::Free | Self::Opening(_) | Self::Serving(_) => None,
        }
    }

    /// The claim that outlives a restart.
    fn claim(&self) -> Option<(&Tenancy, Claim)> {
        match self {
            Self::Serving(tenancy) => Some((tenancy, Claim::Serving)),
            Self::Reclaiming { tenancy, until } | Self::Leased { tenancy, until } => {
                Some((tenancy, Claim::Leased { until: *until }))
            }
            // Nobody has been told yet that the port is his.
            Self::Opening(_) | Self::Free | Self::Foreign { .. } => None,
        }
    }
}

impl Allocator {
    /// An allocator with every port free.
    pub fn new(config: Config) -> Result<Self, PinError> {
        let mut allocator = Self {
            range: config.range.clone(),
            reserved: BTreeSet::new(),
            lease: config.lease,
            foreign_retry: config.foreign_retry,
            counts: Counts::default(),
            slots: BTreeMap::new(),
            pinned: HashMap::new(),
            unused: BTreeSet::new(),
            timers: BTreeSet::new(),
            tenancies: HashMap::new(),
            held: HashMap::new(),
            remembered: HashMap::new(),
            effects: VecDeque::new(),
            next_allocation: 1,
            next_use: 1,
            memory_revision: 0,
        };
        allocator.reconfigure(config, Duration::ZERO)?;
        Ok(allocator)
    }

    /// Goes by new settings from `now` on, or by the old ones still if the new pins can't hold.
    /// Says how many agents drain.
    ///
    /// Ports that are new can be handed out at once. An agent that is connected on a port which
    /// it wouldn't be given any more (the port has left the range, is pinned to somebody else, or
    /// the agent to another port) drains: it goes on there until it is lost, newer sessions that
    /// take over included; then the port is closed without a lease, and forgotten unless it can
    /// be handed out. Leases of such ports end at once, and a port that is still being bound is
    /// exchanged for another when the outcome is known. Other leases that run end no later than
    /// if they began now. O(ports log ports).
    pub fn reconfigure(&mut self, config: Config, now: Duration) -> Result<usize, PinError> {
        let owners = config.owners()?;
        self.range = config.range;
        self.reserved = config.reserved;
        self.lease = config.lease;
        self.foreign_retry = config.foreign_retry;
        self.pinned = config.pinned.into_iter().collect();

        // Who has a pin is remembered nowhere else.
        for agent in owners.values() {
            if let Some(port) = self.remembered.remove(agent)
                && let Some(slot) = self.slots.get_mut(&port)
            {
                slot.last = None;
                self.memory_revision += 1;
            }
        }
        for port in self.range.clone().chain(owners.keys().copied()) {
            if port != 0 && !self.reserved.contains(&port) && !self.slots.contains_key(&port) {
                self.counts.free += 1;
                self.slots.insert(
                    port,
                    Slot {
                        state: State::Free,
                        pinned: false,
                        unused_since: 0,
                        last: None,
                    },
                );
            }
        }
        let ports: Vec<u16> = self.slots.keys().copied().collect();
        for port in ports {
            self.resettle(port, owners.contains_key(&port), now);
        }
        let drains = |(port, slot): &(&u16, &Slot)| {
            let tenancy = slot.state.tenancy();
            tenancy.is_some_and(|tenancy| !self.may_have(&tenancy.agent, **port))
        };
        Ok(self.slots.iter().filter(drains).count())
    }

    /// What is worth remembering over a restart, one entry a port at most: the ports that are
    /// free by how long they have been unused, the longest first, then the ones that are taken.
    /// O(ports log ports).
    pub fn memory(&self) -> Vec<Remembered> {
        let mut entries: Vec<(u64, Remembered)> = self
            .slots
            .iter()
            .filter_map(|(&port, slot)| {
                let (agent, claim, order) = match (slot.state.claim(), &slot.last) {
                    (Some((tenancy, claim)), _) => (&tenancy.agent, claim, u64::MAX),
                    (None, Some(last)) => (last, Claim::Released, slot.unused_since),
                    (None, None) => return None,
                };
                let agent = agent.clone();
                Some((order, Remembered { port, agent, claim }))
            })
            .collect();
        entries.sort_by_key(|(order, entry)| (*order, entry.port));
        entries.into_iter().map(|(_, entry)| entry).collect()
    }

    /// A number that moves whenever an entry of [`Allocator::memory`] has changed. O(1).
    pub fn memory_revision(&self) -> u64 {
        self.memory_revision
    }

    /// Takes over what an allocator before this one remembered, to be called first of all.
    ///
    /// Who was connected has a lease from `now` on, who had a lease the rest of it, and neither
    /// for longer than this allocator's own lease: their ports are bound again at once, and
    /// [`Effect::Reclaimed`] follows, unless a port can't be bound or its agent is back before.
    /// All others, and all without a lease, get their last port back if it is free. What
    /// contradicts the settings or itself is passed over: ports that aren't handed out, that
    /// are pinned to somebody else or named twice, and agents that are named twice or have their
    /// pin elsewhere.
    pub fn restore(&mut self, memory: Vec<Remembered>, now: Duration) {
        for Remembered { port, agent, claim } in memory {
            let Some(slot) = self.slots.get(&port) else {
                continue;
            };
            let known = slot.last.is_some()
                || slot.state != State::Free
                || self.remembered.contains_key(&agent)
                || self.held.contains_key(&agent);
            if known || !self.may_have(&agent, port) {
                continue;
            }
            self.remember(port, &agent);
            self.requeue(port);
            let longest = now.saturating_add(self.lease);
            let until = match claim {
                Claim::Serving => longest,
                Claim::Leased { until } => until.min(longest),
                Claim::Released => now,
            };
            if until > now {
                let allocation = self.next_allocation();
                let tenancy = Tenancy { agent, allocation };
                self.take(port, &tenancy);
                self.enter(port, State::Reclaiming { tenancy, until });
                self.effects.push_back(Effect::Bind { port, allocation });
            }
        }
    }

    /// An agent wants a port; `last_port` is the one it says it had, if any.
    ///
    /// It gets the port it holds already; else its pinned port and no other; else the one it had
    /// last, as this allocator remembers or as it says, provided that the port is available and
    /// nobody else had it since; else the longest unused one.
    ///
    /// Several sessions of one agent share one tenancy: whoever calls this must make sure that
    /// only the newest of them reports [`Allocator::agent_lost`].
    pub fn request(&mut self, agent: &AgentId, last_port: Option<u16>, now: Duration) -> Answer {
        // What is due is due, even if the caller's timer is late.
        self.handle_timeout(now);

        if let Some(&port) = self.held.get(agent)
            && let Some(slot) = self.slots.get(&port)
        {
            match slot.state.clone() {
                State::Opening(Tenancy { allocation, .. }) => {
                    return Answer::Opening { allocation };
                }
                State::Reclaiming { tenancy, .. } => {
                    let allocation = tenancy.allocation;
                    self.enter(port, State::Opening(tenancy));
                    return Answer::Opening { allocation };
                }
                State::Serving(Tenancy { allocation, .. }) => {
                    return Answer::Ready { allocation, port };
                }
                State::Leased { tenancy, .. } => {
                    let allocation = tenancy.allocation;
                    self.enter(port, State::Serving(tenancy));
                    return Answer::Ready { allocation, port };
                }
                // `held` names no such port; if it did, the agent would start afresh.
                State::Free | State::Foreign { .. } => {}
            }
        }

        match self.choose(agent, last_port, now) {
            Ok(port) => {
                let allocation = self.next_allocation();
                let agent = agent.clone();
                self.open(port, Tenancy { agent, allocation });
                Answer::Opening { allocation }
            }
            Err(refusal) => Answer::Refused(refusal),
        }
    }

    /// The port is bound, as [`Effect::Bind`] asked.
    pub fn bound(&mut self, port: u16, allocation: Allocation, now: Duration) {
        let Some(slot) = self.slots.get(&port) else {
            return;
        };
        match &slot.state {
            State::Opening(tenancy) if tenancy.allocation == allocation => {
                let tenancy = tenancy.clone();
                if !self.may_have(&tenancy.agent, port) {
                    // The settings have changed since it was asked for.
                    self.enter(port, State::Free);
                    self.effects.push_back(Effect::Close { port, allocation });
                    return self.open_another(tenancy, now);
                }
                self.remember(port, &tenancy.agent);
                self.enter(port, State::Serving(tenancy));
                self.effects.push_back(Effect::Granted { allocation, port });
            }
            State::Reclaiming { tenancy, until } if tenancy.allocation == allocation => {
                let (tenancy, until) = (tenancy.clone(), *until);
                let agent = tenancy.agent.clone();
                self.enter(port, State::Leased { tenancy, until });
                self.effects.push_back(Effect::Reclaimed {
                    allocation,
                    port,
                    agent,
                });
            }
            State::Free
            | State::Opening(_)
            | State::Reclaiming { .. }
            | State::Serving(_)
            | State::Leased { .. }
            | State::Foreign { .. } => {}
        }
    }

    /// The port couldn't be bound, though [`Effect::Bind`] asked.
    ///
    /// Unless descriptors were what was missing, the port is foreign for a while and the next
    /// one is tried, until the agent has one or none is left. A lease that was to be reclaimed
    /// ends: its agent is still the first to get the port, but isn't waited for.
    pub fn bind_failed(
        &mut self,
        port: u16,
        allocation: Allocation,
        failure: BindFailure,
        now: Duration,
    ) {
        let Some(slot) = self.slots.get(&port) else {
            return;
        };
        let (tenancy, wanted) = match &slot.state {
            State::Opening(tenancy) if tenancy.allocation == allocation => (tenancy.clone(), true),
            State::Reclaiming { tenancy, .. } if tenancy.allocation == allocation => {
                (tenancy.clone(), false)
            }
            State::Free
            | State::Opening(_)
            | State::Reclaiming { .. }
            | State::Serving(_)
            | State::Leased { .. }
            | State::Foreign { .. } => return,
        };
        match failure {
            BindFailure::Descriptors => {
                // The port keeps its place among the unused ones: nothing is known against it.
                self.enter(port, State::Free);
                if !wanted {
                    return self.abandon(port, tenancy);
                }
                let retry_after = DESCRIPTORS_RETRY;
                self.refuse(tenancy, Refusal::Descriptors { retry_after });
            }
            BindFailure::InUse | BindFailure::Denied | BindFailure::Other => {
                self.mark_used(port);
                let retry_at = Some(now.saturating_add(self.foreign_retry));
                self.enter(port, State::Foreign { retry_at });
                self.effects.push_back(Effect::Foreign { port, failure });
                if !wanted {
                    return self.abandon(port, tenancy);
                }
                self.open_another(tenancy, now);
            }
        }
    }

    /// The agent that holds this tenancy is gone: no session of it is left.
    ///
    /// A bound port is leased, or released at once without a lease and where it drains; a port that is still being
    /// bound is given up.
    pub fn agent_lost(&mut self, allocation: Allocation, now: Duration) {
        let Some(&port) = self.tenancies.get(&allocation) else {
            return;
        };
        let Some(slot) = self.slots.get(&port) else {
            return;
        };
        match slot.state.clone() {
            State::Opening(tenancy) => self.release(port, tenancy),
            State::Serving(tenancy)
                if self.lease.is_zero() || !self.may_have(&tenancy.agent, port) =>
            {
                self.release(port, tenancy);
            }
            State::Serving(tenancy) => {
                let until = now.saturating_add(self.lease);
                self.enter(port, State::Leased { tenancy, until });
            }
            State::Reclaiming { .. }
            | State::Leased { .. }
            | State::Free
            | State::Foreign { .. } => {}
        }
    }

    /// Ends the leases that are over by `now` and lets foreign ports be tried again.
    pub fn handle_timeout(&mut self, now: Duration) {
        while let Some(&(due, port)) = self.timers.first()
            && due <= now
        {
            let Some(slot) = self.slots.get(&port) else {
                return;
            };
            match slot.state.clone() {
                State::Leased { tenancy, .. } | State::Reclaiming { tenancy, .. } => {
                    self.release(port, tenancy);
                }
                State::Foreign { .. } => self.enter(port, State::Foreign { retry_at: None }),
                // These have no timer: forget what can't be there.
                State::Free | State::Opening(_) | State::Serving(_) => {
                    self.timers.remove(&(due, port));
                }
            }
        }
    }

    /// Ends every tenancy, bound or not, lease or not: the server drains. Requests that come
    /// afterwards are answered as ever; it is the caller who turns agents away.
    pub fn release_all(&mut self) {
        let mut ports: Vec<u16> = self.tenancies.values().copied().collect();
        ports.sort_unstable();
        for port in ports {
            let tenancy = self.slots.get(&port).and_then(|slot| slot.state.tenancy());
            if let Some(tenancy) = tenancy.cloned() {
                self.release(port, tenancy);
            }
        }
    }

    /// The next thing to do, oldest first; `None` when there is nothing until the next input.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Allocator::handle_timeout`] has something to do, if ever.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.timers.first().map(|&(due, _)| due)
    }

    /// How many ports are in which state. O(1).
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Every port that can be handed out or drains, in ascending order.
    pub fn ports(&self) -> impl Iterator<Item = PortView<'_>> {
        self.slots.iter().map(|(&port, slot)| slot.view(port))
    }

    /// One port; `None` if it is none of ours to hand out.
    pub fn port(&self, port: u16) -> Option<PortView<'_>> {
        self.slots.get(&port).map(|slot| slot.view(port))
    }

    /// The port that this agent opens, holds or has on lease.
    pub fn port_of(&self, agent: &AgentId) -> Option<PortView<'_>> {
        self.held.get(agent).and_then(|&port| self.port(port))
    }

    /// The port to open for this agent, which holds none.
    fn choose(
        &self,
        agent: &AgentId,
        last_port: Option<u16>,
        now: Duration,
    ) -> Result<u16, Refusal> {
        if let Some(&port) = self.pinned.get(agent) {
            return match self.slots.get(&port).map(|slot| &slot.state) {
                Some(state) if state.available() => Ok(port),
                other => Err(Refusal::PinUnavailable {
                    port,
                    retry_after: other
                        .and_then(State::timer)
                        .map_or(EXHAUSTED_RETRY, |due| due.saturating_sub(now))
                        .max(SHORTEST_RETRY),
                }),
            };
        }

        let own = |port: &u16| {
            self.slots.get(port).is_some_and(|slot| {
                slot.state.available()
                    && !slot.pinned
                    && slot.last.as_ref().is_none_or(|last| last == agent)
            })
        };
        let remembered = self.remembered.get(agent).copied();
        [remembered, last_port]
            .into_iter()
            .flatten()
            .find(own)
            .or_else(|| self.unused.first().map(|&(_, port)| port))
            .ok_or_else(|| Refusal::Exhausted {
                retry_after: self
                    .poll_timeout()
                    .map_or(EXHAUSTED_RETRY, |due| due.saturating_sub(now))
                    .clamp(SHORTEST_RETRY, EXHAUSTED_RETRY),
            })
    }

    /// Whether the settings let this agent have this port.
    fn may_have(&self, agent: &AgentId, port: u16) -> bool {
        match self.pinned.get(agent) {
            Some(pin) => *pin == port,
            None => self.hands_out(port) && self.slots.get(&port).is_some_and(|slot| !slot.pinned),
        }
    }

    /// Whether the settings let anybody have this port.
    fn hands_out(&self, port: u16) -> bool {
        let pinned = self.slots.get(&port).is_some_and(|slot| slot.pinned);
        pinned || (self.range.contains(&port) && !self.reserved.contains(&port))
    }

    /// Brings a port in line with settings that have changed.
    fn resettle(&mut self, port: u16, pinned: bool, now: Duration) {
        let Some(slot) = self.slots.get_mut(&port) else {
            return;
        };
        self.unused.remove(&(slot.unused_since, port));
        slot.pinned = pinned;
        if pinned && let Some(last) = slot.last.take() {
            self.remembered.remove(&last);
            self.memory_revision += 1;
        }
        let mut state = slot.state.clone();
        if let State::Leased { tenancy, until } | State::Reclaiming { tenancy, until } = &mut state
        {
            *until = (*until).min(now.saturating_add(self.lease));
            if *until <= now || !self.may_have(&tenancy.agent, port) {
                let tenancy = tenancy.clone();
                return self.release(port, tenancy);
            }
        }
        self.enter(port, state);
    }

    fn next_allocation(&mut self) -> Allocation {
        let allocation = Allocation(self.next_allocation);
        self.next_allocation += 1;
        allocation
    }

    fn take(&mut self, port: u16, tenancy: &Tenancy) {
        self.tenancies.insert(tenancy.allocation, port);
        self.held.insert(tenancy.agent.clone(), port);
    }

    fn open(&mut self, port: u16, tenancy: Tenancy) {
        let allocation = tenancy.allocation;
        self.take(port, &tenancy);
        self.enter(port, State::Opening(tenancy));
        self.effects.push_back(Effect::Bind { port, allocation });
    }

    /// Goes on with another port for a tenancy whose port was a disappointment.
    fn open_another(&mut self, tenancy: Tenancy, now: Duration) {
        match self.choose(&tenancy.agent, None, now) {
            Ok(next) => self.open(next, tenancy),
            Err(refusal) => self.refuse(tenancy, refusal),
        }
    }

    fn refuse(&mut self, tenancy: Tenancy, refusal: Refusal) {
        let allocation = tenancy.allocation;
        self.tenancies.remove(&allocation);
        self.held.remove(&tenancy.agent);
        self.effects.push_back(Effect::Refused {
            allocation,
            refusal,
        });
    }

    /// Ends a tenancy that nobody waits for and whose port isn't bound.
    fn abandon(&mut self, port: u16, tenancy: Tenancy) {
        let allocation = tenancy.allocation;
        self.tenancies.remove(&allocation);
        self.held.remove(&tenancy.agent);
        self.effects
            .push_back(Effect::Released { allocation, port });
    }

    fn release(&mut self, port: u16, tenancy: Tenancy) {
        let allocation = tenancy.allocation;
        self.tenancies.remove(&allocation);
        self.held.remove(&tenancy.agent);
        self.mark_used(port);
        self.enter(port, State::Free);
        // Nobody finds the tenancy any more by the time its port is closed.
        self.effects
            .push_back(Effect::Released { allocation, port });
        self.effects.push_back(Effect::Close { port, allocation });
    }

    /// Sends the port to the end of the queue; takes effect when it is next entered there.
    fn mark_used(&mut self, port: u16) {
        if let Some(slot) = self.slots.get_mut(&port)
            && !slot.state.available()
        {
            slot.unused_since = self.next_use;
            self.next_use += 1;
        }
    }

    /// Sends a free port to the end of the queue.
    fn requeue(&mut self, port: u16) {
        if let Some(slot) = self.slots.get_mut(&port) {
            let queued = self.unused.remove(&(slot.unused_since, port));
            slot.unused_since = self.next_use;
            self.next_use += 1;
            if queued {
                self.unused.insert((slot.unused_since, port));
            }
        }
    }

    fn remember(&mut self, port: u16, agent: &AgentId) {
        let Some(slot) = self.slots.get_mut(&port) else {
            return;
        };
        if slot.pinned || slot.last.as_ref() == Some(agent) {
            return;
        }
        self.memory_revision += 1;
        if let Some(former) = slot.last.replace(agent.clone()) {
            self.remembered.remove(&former);
        }
        if let Some(earlier) = self.remembered.insert(agent.clone(), port)
            && let Some(slot) = self.slots.get_mut(&earlier)
        {
            slot.last = None;
        }
    }

    /// The one place where a port's state changes: keeps counts, queue and timers in step. A
    /// port that can't be handed out any more is forgotten once it is nobody's.
    fn enter(&mut self, port: u16, state: State) {
        let gone = state.tenancy().is_none() && !self.hands_out(port);
        let Some(slot) = self.slots.get_mut(&port) else {
            return;
        };
        let place = (slot.unused_since, port);
        if slot.state.available() {
            self.unused.remove(&place);
        }
        if let Some(due) = slot.state.timer() {
            self.timers.remove(&(due, port));
        }
        if slot.state.claim() != state.claim() {
            self.memory_revision += 1;
        }
        *self.counts.of(slot.state.public()) -= 1;

        if gone {
            if let Some(slot) = self.slots.remove(&port)
                && let Some(last) = slot.last
            {
                self.remembered.remove(&last);
                self.memory_revision += 1;
            }
            return;
        }
        *self.counts.of(state.public()) += 1;
        if let Some(due) = state.timer() {
            self.timers.insert((due, port));
        }
        if state.available() && !slot.pinned {
            self.unused.insert(place);
        }
        slot.state = state;
    }
}

impl Slot {
    fn view(&self, port: u16) -> PortView<'_> {
        PortView {
            port,
            state: self.state.public(),
            tenant: self
                .state
                .tenancy()
                .map(|tenancy| (&tenancy.agent, tenancy.allocation)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::fuzz::{AGENTS, Op, PORTS, START, agent, config, run};
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    fn allocator(range: RangeInclusive<u16>) -> Allocator {
        Allocator::new(config(range)).unwrap()
    }

    fn effects(allocator: &mut Allocator) -> Vec<Effect> {
        std::iter::from_fn(|| allocator.poll_effect()).collect()
    }

    /// Asks for a port and returns what is to be bound for it.
    fn ask(allocator: &mut Allocator, name: &str, last: Option<u16>) -> (Allocation, u16) {
        let answer = allocator.request(&agent(name), last, START);
        let Answer::Opening { allocation } = answer else {
            panic!("{name}: {answer:?}");
        };
        match effects(allocator).as_slice() {
            [
                Effect::Bind {
                    port,
                    allocation: a,
                },
            ] if *a == allocation => (allocation, *port),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Asks for a port and binds it.
    fn connect(allocator: &mut Allocator, name: &str) -> (Allocation, u16) {
        let (allocation, port) = ask(allocator, name, None);
        allocator.bound(port, allocation, START);
        assert_eq!(
            effects(allocator),
            [Effect::Granted { allocation, port }],
            "{name}"
        );
        (allocation, port)
    }

    fn leave(allocator: &mut Allocator, (allocation, port): (Allocation, u16)) {
        allocator.agent_lost(allocation, START);
        assert_eq!(
            effects(allocator),
            [
                Effect::Released { allocation, port },
                Effect::Close { port, allocation }
            ]
        );
    }

    #[test]
    fn ports_are_given_in_order_and_released_at_once() {
        let mut allocator = allocator(8100..=8200);
        let first = connect(&mut allocator, "agent-1");
        assert_eq!(first.1, 8100);
        assert_eq!(connect(&mut allocator, "agent-2").1, 8101);
        assert_eq!(connect(&mut allocator, "agent-3").1, 8102);
        assert_eq!(allocator.counts().serving, 3);

        leave(&mut allocator, first);
        assert_eq!(allocator.counts().serving, 2);
        assert_eq!(allocator.counts().free, 99);
        let listed: Vec<_> = allocator
            .ports()
            .filter_map(|view| Some((view.port, view.tenant?.0.to_string())))
            .collect();
        assert_eq!(listed, [(8101, "agent-2".into()), (8102, "agent-3".into())]);
        // The freed port is the last to be used again by somebody else.
        assert_eq!(connect(&mut allocator, "agent-4").1, 8103);
    }

    #[test]
    fn an_exhausted_range_refuses_until_a_port_is_freed() {
        let mut allocator = allocator(8100..=8102);
        let first = connect(&mut allocator, "agent-1");
        connect(&mut allocator, "agent-2");
        connect(&mut allocator, "agent-3");
        let refusal = Refusal::Exhausted {
            retry_after: EXHAUSTED_RETRY,
        };
        assert_eq!(
            allocator.request(&agent("agent-4"), None, START),
            Answer::Refused(refusal)
        );
        assert_eq!(effects(&mut allocator), []);

        leave(&mut allocator, first);
        assert_eq!(connect(&mut allocator, "agent-4").1, 8100);
    }

    #[test]
    fn an_exhausted_range_tells_when_a_lease_ends() {
        let mut allocator = Allocator::new(Config {
            lease: Duration::from_secs(3),
            ..config(8100..=8100)
        })
        .unwrap();
        let (allocation, _) = connect(&mut allocator, "a");
        allocator.agent_lost(allocation, START);
        assert_eq!(
            allocator.request(&agent("b"), None, START),
            Answer::Refused(Refusal::Exhausted {
                retry_after: Duration::from_secs(3)
            })
        );
    }

    #[test]
    fn an_agent_gets_the_port_it_had_last() {
        let mut allocator = allocator(8100..=8110);
        let first = connect(&mut allocator, "a");
        connect(&mut allocator, "b");
        leave(&mut allocator, first);
        assert_eq!(connect(&mut allocator, "a").1, 8100);
    }

    #[test]
    fn a_port_named_in_the_hello_is_given_unless_it_has_a_newer_owner() {
        let mut allocator = allocator(8100..=8110);
        // After a restart of the server nobody knows better than the agent.
        let (_, port) = ask(&mut allocator, "a", Some(8105));
        assert_eq!(port, 8105);
        // Taken, out of range, nonsense: the longest unused one.
        assert_eq!(ask(&mut allocator, "b", Some(8105)).1, 8100);
        assert_eq!(ask(&mut allocator, "c", Some(80)).1, 8101);
        assert_eq!(ask(&mut allocator, "d", Some(0)).1, 8102);

        let newer = connect(&mut allocator, "newer");
        assert_eq!(newer.1, 8103);
        leave(&mut allocator, newer);
        assert_eq!(ask(&mut allocator, "e", Some(8103)).1, 8104);
        assert_eq!(connect(&mut allocator, "newer").1, 8103);
    }

    #[test]
    fn what_is_remembered_is_bounded_by_the_range() {
        let mut allocator = allocator(8100..=8103);
        for round in 0..100 {
            let tenancy = connect(&mut allocator, &format!("agent-{round}"));
            leave(&mut allocator, tenancy);
        }
        assert_eq!(allocator.remembered.len(), 4);
        assert!(allocator.held.is_empty() && allocator.tenancies.is_empty());
    }

    #[test]
    fn a_pinned_port_belongs_to_its_agent_alone() {
        let mut allocator = Allocator::new(Config {
            pinned: [(agent("inside"), 8100), (agent("outside"), 9000)].into(),
            reserved: [8101].into(),
            ..config(8100..=8102)
        })
        .unwrap();
        // 8100 is pinned, 8101 reserved.
        assert_eq!(ask(&mut allocator, "a", Some(8100)).1, 8102);
        assert_eq!(
            allocator.request(&agent("b"), Some(9000), START),
            Answer::Refused(Refusal::Exhausted {
                retry_after: EXHAUSTED_RETRY
            })
        );
        assert_eq!(connect(&mut allocator, "inside").1, 8100);
        assert_eq!(ask(&mut allocator, "outside", Some(8102)).1, 9000);
    }

    #[test]
    fn a_pinned_port_that_is_held_by_another_program_is_not_replaced() {
        let mut allocator = Allocator::new(Config {
            pinned: [(agent("p"), 8100)].into(),
            ..config(8100..=8102)
        })
        .unwrap();
        let (allocation, port) = ask(&mut allocator, "p", None);
        allocator.bind_failed(port, allocation, BindFailure::InUse, START);
        let refusal = Refusal::PinUnavailable {
            port,
            retry_after: Config::FOREIGN_RETRY,
        };
        assert_eq!(
            effects(&mut allocator),
            [
                Effect::Foreign {
                    port,
                    failure: BindFailure::InUse
                },
                Effect::Refused {
                    allocation,
                    refusal
                },
            ]
        );
        let later = START + Duration::from_secs(10);
        assert_eq!(
            allocator.request(&agent("p"), None, later),
            Answer::Refused(Refusal::PinUnavailable {
                port,
                retry_after: Duration::from_secs(20)
            })
        );
        let due = START + Config::FOREIGN_RETRY;
        assert!(matches!(
            allocator.request(&agent("p"), None, due),
            Answer::Opening { .. }
        ));
    }

    #[test]
    fn pins_that_contradict_are_refused() {
        let pins = |pinned: &[(&str, u16)]| {
            Allocator::new(Config {
                pinned: pinned.iter().map(|&(id, port)| (agent(id), port)).collect(),
                reserved: [8080].into(),
                ..config(8100..=8102)
            })
            .map(|_| ())
        };
        assert_eq!(pins(&[("a", 8100), ("b", 8101)]), Ok(()));
        let (first, second) = (agent("a"), agent("b"));
        assert_eq!(
            pins(&[("a", 8100), ("b", 8100)]),
            Err(PinError::Shared {
                port: 8100,
                first,
                second
            })
        );
        let agent = agent("a");
        assert_eq!(
            pins(&[("a", 8080)]),
            Err(PinError::Reserved {
                port: 8080,
                agent: agent.clone()
            })
        );
        assert_eq!(pins(&[("a", 0)]), Err(PinError::Zero { agent }));
    }

    #[test]
    fn foreign_ports_are_skipped_until_they_are_due() {
        let mut allocator = allocator(8100..=8104);
        let (allocation, mut port) = ask(&mut allocator, "a", None);
        for held in 8100..=8103 {
            assert_eq!(port, held);
            allocator.bind_failed(port, allocation, BindFailure::InUse, START);
            let next = held + 1;
            assert_eq!(
                effects(&mut allocator),
                [
                    Effect::Foreign {
                        port,
                        failure: BindFailure::InUse
                    },
                    Effect::Bind {
                        port: next,
                        allocation
                    },
                ]
            );
            port = next;
        }
        allocator.bound(port, allocation, START);
        effects(&mut allocator);
        assert_eq!(allocator.counts().foreign, 4);
        assert!(matches!(
            allocator.request(&agent("b"), None, START),
            Answer::Refused(Refusal::Exhausted { .. })
        ));

        // Due again: still shown as foreign, but tried.
        let due = allocator.poll_timeout().unwrap();
        assert_eq!(due, START + Config::FOREIGN_RETRY);
        allocator.handle_timeout(due);
        assert_eq!(allocator.counts().foreign, 4);
        assert_eq!(allocator.poll_timeout(), None);
        assert_eq!(connect(&mut allocator, "b").1, 8100);
        assert_eq!(allocator.counts().foreign, 3);
    }

    #[test]
    fn a_range_that_is_all_foreign_refuses_after_the_last_try() {
        let mut allocator = allocator(8100..=8101);
        let (allocation, _) = ask(&mut allocator, "a", None);
        allocator.bind_failed(8100, allocation, BindFailure::Denied, START);
        allocator.bind_failed(8101, allocation, BindFailure::Other, START);
        assert_eq!(
            effects(&mut allocator).last(),
            Some(&Effect::Refused {
                allocation,
                refusal: Refusal::Exhausted {
                    retry_after: EXHAUSTED_RETRY
                }
            })
        );
        assert_eq!(allocator.port_of(&agent("a")), None);
    }

    #[test]
    fn missing_descriptors_are_not_held_against_the_port() {
        let mut allocator = allocator(8100..=8101);
        let (allocation, port) = ask(&mut allocator, "a", None);
        allocator.bind_failed(port, allocation, BindFailure::Descriptors, START);
        assert_eq!(
            effects(&mut allocator),
            [Effect::Refused {
                allocation,
                refusal: Refusal::Descriptors {
                    retry_after: DESCRIPTORS_RETRY
                }
            }]
        );
        assert_eq!(allocator.counts().free, 2);
        assert_eq!(ask(&mut allocator, "a", None).1, 8100);
    }

    #[test]
    fn a_takeover_keeps_the_tenancy() {
        let mut allocator = allocator(8100..=8101);
        let (allocation, port) = ask(&mut allocator, "a", None);
        // A second session comes while the port is being opened, a third one afterwards.
        let again = allocator.request(&agent("a"), None, START);
        assert_eq!(again, Answer::Opening { allocation });
        allocator.bound(port, allocation, START);
        assert_eq!(
            effects(&mut allocator),
            [Effect::Granted { allocation, port }]
        );
        assert_eq!(
            allocator.request(&agent("a"), Some(8101), START),
            Answer::Ready { allocation, port }
        );
        assert_eq!(effects(&mut allocator), []);
    }

    #[test]
    fn a_lease_keeps_the_port_for_its_agent() {
        let mut allocator = Allocator::new(Config {
            lease: LEASE,
            ..config(8100..=8100)
        })
        .unwrap();
        let (allocation, port) = connect(&mut allocator, "a");
        allocator.agent_lost(allocation, START);
        assert_eq!(effects(&mut allocator), []);
        assert_eq!(allocator.counts().leased, 1);
        assert!(matches!(
            allocator.request(&agent("b"), None, START),
            Answer::Refused(_)
        ));
        let back = START + Duration::from_secs(59);
        assert_eq!(
            allocator.request(&agent("a"), None, back),
            Answer::Ready { allocation, port }
        );
        assert_eq!(allocator.poll_timeout(), None);

        // A second loss, reported twice, starts one new lease.
        allocator.agent_lost(allocation, back);
        allocator.agent_lost(allocation, back + Duration::from_secs(5));
        assert_eq!(allocator.poll_timeout(), Some(back + LEASE));
        allocator.handle_timeout(back + LEASE);
        assert_eq!(
            effects(&mut allocator),
            [
                Effect::Released { allocation, port },
                Effect::Close { port, allocation }
            ]
        );
        assert_eq!(connect(&mut allocator, "b").0, Allocation(allocation.0 + 1));
    }

    #[test]
    fn an_opening_that_is_given_up_is_closed_and_its_outcome_ignored() {
        let mut allocator = allocator(8100..=8100);
        let early = ask(&mut allocator, "a", None);
        leave(&mut allocator, early);
        // The port goes to the next agent before the outcome of the first bind arrives.
        let (allocation, port) = ask(&mut allocator, "b", None);
        allocator.bound(port, early.0, START);
        allocator.bind_failed(port, early.0, BindFailure::InUse, START);
        allocator.agent_lost(early.0, START);
        assert_eq!(effects(&mut allocator), []);
        allocator.bound(port, allocation, START);
        allocator.bound(port, allocation, START);
        allocator.bind_failed(port, allocation, BindFailure::InUse, START);
        assert_eq!(
            effects(&mut allocator),
            [Effect::Granted { allocation, port }]
        );
    }

    #[test]
    fn a_grown_range_is_usable_at_once() {
        let mut allocator = allocator(8100..=8100);
        connect(&mut allocator, "a");
        assert_eq!(allocator.reconfigure(config(8099..=8102), START), Ok(0));
        assert_eq!(effects(&mut allocator), []);
        assert_eq!(connect(&mut allocator, "b").1, 8099);
        assert_eq!(connect(&mut allocator, "c").1, 8101);
        let counts = allocator.counts();
        assert_eq!((counts.free, counts.serving), (1, 3));
    }

    #[test]
    fn a_shrunk_range_drains() {
        let with_lease = |range| Config {
            lease: LEASE,
            ..config(range)
        };
        let mut allocator = Allocator::new(with_lease(8100..=8103)).unwrap();
        let stays = connect(&mut allocator, "stays");
        let (allocation, port) = connect(&mut allocator, "drains");
        let (leased, leased_port) = connect(&mut allocator, "leased");
        allocator.agent_lost(leased, START);
        let (opening, opening_port) = ask(&mut allocator, "opening", None);

        assert_eq!(
            allocator.reconfigure(with_lease(8100..=8100), START),
            Ok(2),
            "the one that serves, and the one that is opening"
        );
        // Nobody is behind the leased port: it is closed at once.
        assert_eq!(
            effects(&mut allocator),
            [
                Effect::Released {
                    allocation: leased,
                    port: leased_port
                },
                Effect::Close {
                    port: leased_port,
                    allocation: leased
                }
            ]
        );
        allocator.bound(opening_port, opening, START);
        let refusal = Refusal::Exhausted {
            retry_after: EXHAUSTED_RETRY,
        };
        assert_eq!(
            effects(&mut allocator),
            [
                Effect::Close {
                    port: opening_port,
                    allocation: opening
                },
                Effect::Refused {
                    allocation: opening,
                    refusal
                }
            ]
        );
        // A newer session of an agent that drains finds it as it was.
        assert_eq!(
            allocator.request(&agent("drains"), None, START),
            Answer::Ready { allocation, port }
        );
        assert_eq!(allocator.counts().serving, 2);

        // Once it is lost the port is closed without a lease, and nobody has it again.
        leave(&mut allocator, (allocation, port));
        assert_eq!(allocator.port(port), None);
        for name in ["drains", "other"] {
            assert_eq!(
                allocator.request(&agent(name), Some(port), START),
                Answer::Refused(refusal)
            );
        }
        assert_eq!(allocator.counts(), {
            Counts {
                serving: 1,
                ..Counts::default()
            }
        });
        assert!(
            allocator
                .port_of(&agent("stays"))
                .is_some_and(|view| view.port == stays.1)
        );
        assert_eq!(allocator.remembered.len(), 1);
    }

    #[test]
    fn a_new_pin_takes_the_port_over_when_its_tenant_leaves() {
        let pinned = |pins: &[(&str, u16)]| Config {
            lease: LEASE,
            pinned: pins.iter().map(|(id, port)| (agent(id), *port)).collect(),
            ..config(8100..=8102)
        };
        let mut allocator = Allocator::new(pinned(&[])).unwrap();
        let tenant = connect(&mut allocator, "tenant");
        let owner = connect(&mut allocator, "owner");
        assert_eq!((tenant.1, owner.1), (8100, 8101));

        let outcome = allocator.reconfigure(pinned(&[("owner", 8100)]), START);
        assert_eq!((outcome, effects(&mut allocator)), (Ok(2), vec![]));
        // The owner goes, and comes back before the tenant has gone.
        leave(&mut allocator, owner);
        assert!(matches!(
            allocator.request(&agent("owner"), Some(8101), START),
            Answer::Refused(Refusal::PinUnavailable { port: 8100, .. })
        ));
        leave(&mut allocator, tenant);
        assert_eq!(connect(&mut allocator, "owner").1, 8100);
        assert_ne!(connect(&mut allocator, "tenant").1, 8100);

        // A pin that is removed frees the port, with a lease as any other.
        let (allocation, _) = held(&mut allocator, "owner");
        assert_eq!(allocator.reconfigure(pinned(&[]), START), Ok(0));
        allocator.agent_lost(allocation, START);
        allocator.handle_timeout(START + LEASE);
        assert_eq!(effects(&mut allocator).len(), 2);
        let counts = allocator.counts();
        assert_eq!((counts.free, counts.serving), (2, 1));
    }

    /// The tenancy that an agent holds.
    fn held(allocator: &mut Allocator, name: &str) -> (Allocation, u16) {
        match allocator.request(&agent(name), None, START) {
            Answer::Ready { allocation, port } => (allocation, port),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pins_that_contradict_change_nothing() {
        let mut allocator = allocator(8100..=8101);
        connect(&mut allocator, "a");
        let mut bad = config(9000..=9001);
        bad.pinned = [(agent("a"), 9000), (agent("b"), 9000)].into();
        assert!(matches!(
            allocator.reconfigure(bad, START),
            Err(PinError::Shared { port: 9000, .. })
        ));
        assert_eq!(effects(&mut allocator), []);
        assert_eq!(connect(&mut allocator, "b").1, 8101);
    }

    #[test]
    fn leases_that_run_end_no_later_than_new_ones() {
        let leases = |lease| Config {
            lease,
            ..config(8100..=8102)
        };
        let mut allocator = Allocator::new(leases(LEASE)).unwrap();
        let (allocation, _) = connect(&mut allocator, "a");
        allocator.agent_lost(allocation, START);
        let times = [(2 * LEASE, LEASE), (LEASE / 2, LEASE / 2)];
        for (lease, left) in times {
            assert_eq!(allocator.reconfigure(leases(lease), START), Ok(0));
            assert_eq!(allocator.poll_timeout(), Some(START + left));
        }
        assert_eq!(allocator.reconfigure(leases(Duration::ZERO), START), Ok(0));
        assert_eq!(effects(&mut allocator).len(), 2);
        assert_eq!(allocator.counts().free, 3);
    }

    #[test]
    fn a_drain_ends_every_tenancy() {
        let mut allocator = Allocator::new(Config {
            lease: LEASE,
            ..config(8100..=8110)
        })
        .unwrap();
        let serving = connect(&mut allocator, "serving");
        let leased = connect(&mut allocator, "leased");
        allocator.agent_lost(leased.0, START);
        let opening = ask(&mut allocator, "opening", None);
        allocator.release_all();
        let expected = [serving, leased, opening].map(|(allocation, port)| {
            [
                Effect::Released { allocation, port },
                Effect::Close { port, allocation },
            ]
        });
        assert_eq!(effects(&mut allocator), expected.as_flattened());
        assert_eq!(allocator.counts().free, 11);
        assert_eq!(allocator.poll_timeout(), None);
    }

    fn remembered(port: u16, name: &str, claim: Claim) -> Remembered {
        let agent = agent(name);
        Remembered { port, agent, claim }
    }

    /// An allocator with leases that has restored `memory`, and what it wants done.
    fn restored(config: Config, memory: &[Remembered]) -> (Allocator, Vec<Effect>) {
        let mut allocator = Allocator::new(Config {
            lease: LEASE,
            ..config
        })
        .unwrap();
        allocator.restore(memory.to_vec(), START);
        let effects = effects(&mut allocator);
        (allocator, effects)
    }

    #[test]
    fn what_is_remembered_is_what_agents_would_miss() {
        let mut allocator = Allocator::new(Config {
            lease: LEASE,
            pinned: [(agent("pinned"), 9000)].into(),
            ..config(8100..=8110)
        })
        .unwrap();
        assert_eq!(allocator.memory(), []);
        let mut tenancies = ["a", "b", "c", "pinned"].map(|name| connect(&mut allocator, name));
        let before = allocator.memory_revision();
        ask(&mut allocator, "opening", None);
        assert_eq!(allocator.memory_revision(), before);
        for (at, (allocation, _)) in tenancies.iter_mut().enumerate().take(2) {
            allocator.agent_lost(*allocation, START - at as u32 * Duration::from_secs(1));
        }
        assert_ne!(allocator.memory_revision(), before);
        allocator.handle_timeout(START + LEASE - Duration::from_secs(1));
        let until = START + LEASE;
        assert_eq!(
            allocator.memory(),
            [
                remembered(8101, "b", Claim::Released),
                remembered(8100, "a", Claim::Leased { until }),
                remembered(8102, "c", Claim::Serving),
                remembered(9000, "pinned", Claim::Serving),
            ]
        );
    }

    #[test]
    fn leases_outlive_a_restart_and_no_longer_than_a_lease() {
        let rest = START + Duration::from_secs(20);
        let memory = [
            remembered(8104, "released", Claim::Released),
            remembered(8100, "serving", Claim::Serving),
            remembered(8101, "leased", Claim::Leased { until: rest }),
            // Somebody has set the clock back by a year.
            remembered(
                8102,
                "long",
                Claim::Leased {
                    until: START + 400 * Duration::from_secs(86_400),
                },
            ),
            remembered(8103, "over", Claim::Leased { until: START }),
        ];
        let (mut allocator, asked) = restored(config(8100..=8106), &memory);
        let binds: Vec<_> = (1..)
            .map(Allocation)
            .zip(8100..=8102)
            .map(|(allocation, port)| Effect::Bind { port, allocation })
            .collect();
        assert_eq!(asked, binds);
        assert_eq!(allocator.counts().opening, 3);

        for (number, port) in (1..).zip(8100..=8102) {
            allocator.bound(port, Allocation(number), START);
        }
        let agents = ["serving", "leased", "long"].map(agent);
        let reclaimed: Vec<_> = (1..)
            .map(Allocation)
            .zip(8100..=8102)
            .zip(agents)
            .map(|((allocation, port), agent)| Effect::Reclaimed {
                allocation,
                port,
                agent,
            })
            .collect();
        assert_eq!(effects(&mut allocator), reclaimed);
        assert_eq!(allocator.counts().leased, 3);

        // Each comes back to its own port; strangers get others, the longest unused first.
        let ready = allocator.request(&agent("serving"), None, START);
        let (allocation, port) = (Allocation(1), 8100);
        assert_eq!(ready, Answer::Ready { allocation, port });
        assert_eq!(ask(&mut allocator, "over", None).1, 8103);
        assert_eq!(ask(&mut allocator, "stranger", Some(8104)).1, 8105);
        assert_eq!(ask(&mut allocator, "released", None).1, 8104);

        allocator.handle_timeout(rest);
        let (allocation, port) = (Allocation(2), 8101);
        assert_eq!(
            effects(&mut allocator),
            [
                Effect::Released { allocation, port },
                Effect::Close { port, allocation }
            ]
        );
        assert_eq!(allocator.poll_timeout(), Some(START + LEASE));
    }

    #[test]
    fn an_agent_that_is_back_before_its_lease_is_bound_is_granted_the_port() {
        let memory = [remembered(8100, "a", Claim::Serving)];
        let (mut allocator, _) = restored(config(8100..=8101), &memory);
        let (allocation, port) = (Allocation(1), 8100);
        let answer = allocator.request(&agent("a"), None, START);
        assert_eq!(answer, Answer::Opening { allocation });
        allocator.bound(port, allocation, START);
        assert_eq!(
            effects(&mut allocator),
            [Effect::Granted { allocation, port }]
        );
        assert_eq!(allocator.poll_timeout(), None);
    }

    #[test]
    fn a_restored_lease_whose_port_cannot_be_bound_is_given_up() {
        let (allocation, port) = (Allocation(1), 8100);
        let memory = [remembered(8100, "a", Claim::Serving)];
        for (failure, foreign) in [(BindFailure::InUse, 1), (BindFailure::Descriptors, 0)] {
            let (mut allocator, _) = restored(config(8100..=8101), &memory);
            allocator.bind_failed(port, allocation, failure, START);
            let told = effects(&mut allocator);
            assert_eq!(told.last(), Some(&Effect::Released { allocation, port }));
            assert_eq!(told.len(), 1 + foreign);
            assert_eq!(allocator.counts().foreign, foreign);
            // It's nobody's, but its last agent still goes before others.
            allocator.handle_timeout(START + Config::FOREIGN_RETRY);
            assert_eq!(ask(&mut allocator, "b", Some(8100)).1, 8101);
            assert_eq!(ask(&mut allocator, "a", None).1, 8100);
        }
    }

    #[test]
    fn a_memory_that_contradicts_settings_or_itself_is_passed_over() {
        let config = Config {
            pinned: [(agent("pinned"), 8102), (agent("outside"), 9000)].into(),
            reserved: [8101].into(),
            ..config(8100..=8106)
        };
        let memory = [
            remembered(8100, "a", Claim::Serving),
            remembered(8100, "twice-a-port", Claim::Serving),
            remembered(8103, "a", Claim::Released),
            remembered(8101, "on-a-reserved-port", Claim::Serving),
            remembered(8102, "on-anothers-pin", Claim::Serving),
            remembered(8103, "pinned", Claim::Serving),
            remembered(9000, "outside", Claim::Serving),
            remembered(80, "out-of-range", Claim::Serving),
            remembered(0, "zero", Claim::Serving),
            remembered(8104, "once", Claim::Released),
            remembered(8104, "again", Claim::Serving),
        ];
        let (allocator, asked) = restored(config, &memory);
        assert_eq!(asked.len(), 2, "{asked:?}");
        assert_eq!(
            allocator.memory(),
            [
                remembered(8104, "once", Claim::Released),
                remembered(
                    8100,
                    "a",
                    Claim::Leased {
                        until: START + LEASE
                    }
                ),
                remembered(
                    9000,
                    "outside",
                    Claim::Leased {
                        until: START + LEASE
                    }
                ),
            ]
        );
    }

    #[test]
    fn without_leases_a_restart_keeps_only_the_memory() {
        let mut before = allocator(8100..=8110);
        let gone = connect(&mut before, "gone");
        connect(&mut before, "here");
        leave(&mut before, gone);
        let mut after = allocator(8100..=8110);
        after.restore(before.memory(), START);
        assert_eq!(effects(&mut after), []);
        assert_eq!(after.counts().free, 11);
        assert_eq!(connect(&mut after, "stranger").1, 8102);
        assert_eq!(connect(&mut after, "here").1, 8101);
        assert_eq!(connect(&mut after, "gone").1, 8100);
    }

    fn op() -> impl Strategy<Value = Op> {
        let last = prop_oneof![Just(None), (98..108u16).prop_map(Some)];
        let failure = prop_oneof![Just(BindFailure::InUse), Just(BindFailure::Descriptors)];
        prop_oneof![
            6 => (0..AGENTS, last).prop_map(|(agent, last)| Op::Request(agent, last)),
            4 => (0..AGENTS).prop_map(Op::Lose),
            6 => (1..4usize).prop_map(Op::Answer),
            1 => (98..108u16, 0..40u64, failure).prop_map(|(p, a, f)| Op::Stray(p, a, f)),
            2 => (PORTS, any::<bool>()).prop_map(|(port, held)| Op::Hold(port, held)),
            1 => any::<bool>().prop_map(Op::Descriptors),
            3 => (0..40u64).prop_map(Op::Wait),
            1 => Just(Op::ReleaseAll),
            1 => Just(Op::Restart),
            2 => reconfigure(),
        ]
    }

    fn reconfigure() -> impl Strategy<Value = Op> {
        let pin = (0..AGENTS, 99..109u16);
        let pins = prop::collection::vec(pin, 0..3);
        let lease = prop_oneof![Just(0), Just(20), Just(5)];
        (98..104u16, 99..108u16, pins, lease)
            .prop_map(|(start, end, pins, lease)| Op::Reconfigure(start..=end, pins, lease))
    }

    proptest! {
        #[test]
        fn whatever_happens_each_port_has_one_tenant_and_each_tenancy_one_end(
            leased in any::<bool>(),
            ops in prop::collection::vec(op(), 1..200),
        ) {
            run(leased, ops);
        }
    }
}
