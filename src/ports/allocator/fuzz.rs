//! An allocator, a kernel, other programs and agents, and all that can happen between them. After
//! every step each port has one tenant at most, and in the end nothing may be left.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use super::*;
use crate::fuzz::Tape;

/// Does with an allocator what `data` says. The first byte says whether there are leases.
pub fn allocator(data: &[u8]) {
    let mut tape = Tape::new(data);
    let leased = tape.flag();
    let mut ops = Vec::new();
    while !tape.is_empty() && ops.len() < MAX_OPS {
        ops.push(op(&mut tape));
    }
    run(leased, ops);
}

/// Longer runs find what shorter ones find, later.
const MAX_OPS: usize = 400;

fn op(tape: &mut Tape<'_>) -> Op {
    match tape.below(12) {
        0 => Op::Request(an_agent(tape), None),
        1 => Op::Request(an_agent(tape), Some(a_port(tape))),
        2 | 3 => Op::Lose(an_agent(tape)),
        4 => Op::Answer(1 + tape.below(4)),
        5 => {
            let port = a_port(tape);
            let number = tape.below(40) as u64;
            let failure = [BindFailure::InUse, BindFailure::Descriptors][tape.below(2)];
            Op::Stray(port, number, failure)
        }
        6 => Op::Hold(*PORTS.start() + tape.below(6) as u16, tape.flag()),
        7 => Op::Descriptors(tape.flag()),
        8 => Op::Wait(tape.below(40) as u64),
        9 => Op::ReleaseAll,
        10 => Op::Restart,
        _ => {
            let range = a_port(tape)..=a_port(tape);
            let lease = [0, 5, 20][tape.below(3)];
            let pins = (0..tape.below(4))
                .map(|_| (an_agent(tape), a_port(tape)))
                .collect();
            Op::Reconfigure(range, pins, lease)
        }
    }
}

fn an_agent(tape: &mut Tape<'_>) -> u8 {
    tape.byte() % AGENTS
}

/// One in or around the range.
fn a_port(tape: &mut Tape<'_>) -> u16 {
    98 + tape.below(11) as u16
}

#[derive(Debug, Clone)]
pub(super) enum Op {
    /// An agent asks, naming a port.
    Request(u8, Option<u16>),
    /// The newest tenancy of an agent is lost.
    Lose(u8),
    /// The oldest outcomes of binds arrive.
    Answer(usize),
    /// Inputs that nobody should send: any port, any number.
    Stray(u16, u64, BindFailure),
    /// Another program takes or leaves a port.
    Hold(u16, bool),
    /// The process has descriptors, or hasn't.
    Descriptors(bool),
    Wait(u64),
    ReleaseAll,
    /// The server is killed, and another one takes over its memory.
    Restart,
    /// Other settings hold: a range, which agents are pinned to which ports, a lease.
    Reconfigure(RangeInclusive<u16>, Vec<(u8, u16)>, u64),
}

pub(super) const AGENTS: u8 = 8;
pub(super) const PORTS: RangeInclusive<u16> = 100..=105;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Waiting,
    Granted,
    Over,
}

/// A kernel, other programs, and the agents' side of the bargain.
pub(super) struct World {
    /// The settings that hold.
    config: Config,
    /// Who may go on where the settings wouldn't put him, until he is lost.
    draining: BTreeSet<(AgentId, u16)>,
    allocator: Allocator,
    now: Duration,
    held_by_others: BTreeSet<u16>,
    descriptors: bool,
    /// What listens where for us.
    listening: BTreeMap<u16, Allocation>,
    /// Ports whose last effect was a bind: it can't be bound again before it failed or is
    /// closed.
    asked: BTreeMap<u16, Allocation>,
    outcomes: VecDeque<(u16, Allocation, Result<(), BindFailure>)>,
    tenancies: BTreeMap<Allocation, (AgentId, Phase)>,
}

impl World {
    fn new(lease: Duration) -> Self {
        let mut config = config(PORTS);
        config.lease = lease;
        config.pinned = [(agent("agent-0"), 103), (agent("agent-1"), 107)].into();
        config.reserved = [104].into();
        Self {
            allocator: Allocator::new(config.clone()).unwrap(),
            config,
            draining: BTreeSet::new(),
            now: START,
            held_by_others: BTreeSet::new(),
            descriptors: true,
            listening: BTreeMap::new(),
            asked: BTreeMap::new(),
            outcomes: VecDeque::new(),
            tenancies: BTreeMap::new(),
        }
    }

    /// Whether the settings let an agent have a port.
    fn fits(&self, agent: &AgentId, port: u16) -> bool {
        let Config {
            pinned,
            range,
            reserved,
            ..
        } = &self.config;
        match pinned.get(agent) {
            Some(pin) => *pin == port,
            None => {
                let others = pinned.values().any(|pin| *pin == port);
                range.contains(&port) && !others && !reserved.contains(&port)
            }
        }
    }

    fn reconfigure(&mut self, range: RangeInclusive<u16>, pins: Vec<(u8, u16)>, lease: u64) {
        let pins = pins.into_iter();
        let config = Config {
            range,
            pinned: pins
                .map(|(number, port)| (agent(&format!("agent-{number}")), port))
                .collect(),
            lease: Duration::from_secs(lease),
            ..self.config.clone()
        };
        let before: Vec<_> = (self.allocator.ports())
            .map(|view| format!("{view:?}"))
            .collect();
        let serving: Vec<(AgentId, u16)> = (self.allocator.ports())
            .filter(|view| view.state == PortState::Serving)
            .filter_map(|view| Some((view.tenant?.0.clone(), view.port)))
            .collect();
        let good = Allocator::new(config.clone()).err();
        let outcome = self.allocator.reconfigure(config.clone(), self.now);
        assert_eq!(outcome.as_ref().err(), good.as_ref());
        let Ok(draining) = outcome else {
            let after = self.allocator.ports().map(|view| format!("{view:?}"));
            assert!(after.eq(before), "changed by half");
            return;
        };
        self.config = config;
        self.draining = serving
            .into_iter()
            .filter(|(agent, port)| !self.fits(agent, *port))
            .collect();
        let opening = (self.allocator.ports())
            .filter(|view| view.state == PortState::Opening)
            .filter(|view| !self.fits(view.tenant.unwrap().0, view.port));
        assert_eq!(draining, self.draining.len() + opening.count());
    }

    fn restart(&mut self) {
        let memory = self.allocator.memory();
        self.allocator = Allocator::new(self.config.clone()).unwrap();
        self.draining.clear();
        let lease = self.config.lease;
        self.listening.clear();
        self.asked.clear();
        self.outcomes.clear();
        self.tenancies.clear();
        self.allocator.restore(memory.clone(), self.now);
        let expected: Vec<Remembered> = memory
            .into_iter()
            .map(|entry| Remembered {
                claim: match entry.claim {
                    _ if lease.is_zero() => Claim::Released,
                    Claim::Serving => Claim::Leased {
                        until: self.now + lease,
                    },
                    other => other,
                },
                ..entry
            })
            .filter(|entry| self.fits(&entry.agent, entry.port))
            // Without a lease there is nothing to remember of a pin.
            .filter(|entry| {
                entry.claim != Claim::Released || !self.config.pinned.contains_key(&entry.agent)
            })
            .collect();
        assert_eq!(self.allocator.memory(), expected);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Request(number, last) => {
                let id = agent(&format!("agent-{number}"));
                match self.allocator.request(&id, last, self.now) {
                    Answer::Ready { allocation, port } => {
                        let tenancy = Some(&(id, Phase::Granted));
                        // Leases that were due have been ended by the same call.
                        self.perform();
                        assert_eq!(self.tenancies.get(&allocation), tenancy);
                        assert_eq!(self.listening.get(&port), Some(&allocation));
                    }
                    Answer::Opening { allocation } => {
                        let known = self
                            .tenancies
                            .entry(allocation)
                            .or_insert((id.clone(), Phase::Waiting));
                        assert_eq!(*known, (id, Phase::Waiting));
                    }
                    Answer::Refused(refusal) => {
                        assert!(refusal.retry_after() >= SHORTEST_RETRY);
                    }
                }
            }
            Op::Lose(number) => {
                let id = agent(&format!("agent-{number}"));
                let newest = self.tenancies.iter().rfind(|(_, (owner, _))| *owner == id);
                if let Some((&allocation, _)) = newest {
                    self.allocator.agent_lost(allocation, self.now);
                }
            }
            Op::Answer(count) => {
                for _ in 0..count {
                    self.answer();
                }
            }
            Op::Stray(port, number, failure) => {
                // A bind that is under way has exactly one outcome, which is not ours here.
                let allocation = Allocation(number);
                if self.asked.get(&port) != Some(&allocation) {
                    self.allocator.bound(port, allocation, self.now);
                    self.allocator
                        .bind_failed(port, allocation, failure, self.now);
                }
            }
            Op::Hold(port, held) => {
                if held && !self.listening.contains_key(&port) {
                    self.held_by_others.insert(port);
                } else {
                    self.held_by_others.remove(&port);
                }
            }
            Op::Descriptors(enough) => self.descriptors = enough,
            Op::Wait(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.allocator.handle_timeout(self.now);
                assert!(self.allocator.poll_timeout().is_none_or(|at| at > self.now));
            }
            Op::ReleaseAll => self.allocator.release_all(),
            Op::Restart => self.restart(),
            Op::Reconfigure(range, pins, lease) => self.reconfigure(range, pins, lease),
        }
        self.perform();
        self.check();
    }

    fn answer(&mut self) {
        if let Some((port, allocation, outcome)) = self.outcomes.pop_front() {
            match outcome {
                Ok(()) => self.allocator.bound(port, allocation, self.now),
                Err(failure) => {
                    if self.asked.get(&port) == Some(&allocation) {
                        self.asked.remove(&port);
                    }
                    self.allocator
                        .bind_failed(port, allocation, failure, self.now);
                }
            }
            self.perform();
        }
    }

    /// Does what the allocator asks, at once and in order; outcomes arrive later.
    fn perform(&mut self) {
        while let Some(effect) = self.allocator.poll_effect() {
            match effect {
                Effect::Bind { port, allocation } => {
                    assert_eq!(self.asked.insert(port, allocation), None, "bound twice");
                    if let Some((id, tenancy)) = self.allocator.port(port).unwrap().tenant
                        && tenancy == allocation
                    {
                        // Nobody has asked for a restored lease.
                        let new = (id.clone(), Phase::Waiting);
                        self.tenancies.entry(allocation).or_insert(new);
                    }
                    let outcome = if self.held_by_others.contains(&port) {
                        Err(BindFailure::InUse)
                    } else if !self.descriptors {
                        Err(BindFailure::Descriptors)
                    } else {
                        assert_eq!(self.listening.insert(port, allocation), None);
                        Ok(())
                    };
                    self.outcomes.push_back((port, allocation, outcome));
                }
                Effect::Close { port, allocation } => {
                    assert_eq!(self.asked.remove(&port), Some(allocation));
                    self.listening.remove(&port);
                }
                Effect::Granted { allocation, port } => {
                    assert_eq!(self.listening.get(&port), Some(&allocation));
                    let (agent, phase) = self.tenancies.get_mut(&allocation).unwrap();
                    assert_eq!(*phase, Phase::Waiting);
                    *phase = Phase::Granted;
                    let agent = agent.clone();
                    assert!(self.fits(&agent, port), "{agent} on {port}");
                }
                Effect::Reclaimed {
                    allocation,
                    port,
                    agent,
                } => {
                    assert_eq!(self.listening.get(&port), Some(&allocation));
                    let tenancy = self
                        .tenancies
                        .insert(allocation, (agent.clone(), Phase::Granted));
                    assert_eq!(tenancy, Some((agent, Phase::Waiting)));
                }
                Effect::Refused { allocation, .. } => {
                    let (_, phase) = self.tenancies.get_mut(&allocation).unwrap();
                    assert_eq!(*phase, Phase::Waiting);
                    *phase = Phase::Over;
                }
                Effect::Released { allocation, .. } => {
                    let (_, phase) = self.tenancies.get_mut(&allocation).unwrap();
                    assert_ne!(*phase, Phase::Over, "ended twice");
                    *phase = Phase::Over;
                }
                Effect::Foreign { port, .. } => {
                    assert!(!self.listening.contains_key(&port));
                }
            }
        }
    }

    fn check(&self) {
        let mut counts = Counts::default();
        let mut tenants = BTreeSet::new();
        let mut running = BTreeSet::new();
        for view in self.allocator.ports() {
            *counts.of(view.state) += 1;
            if let Some((id, allocation)) = view.tenant {
                assert!(tenants.insert(id.clone()), "{id} has two ports");
                assert!(running.insert(allocation));
                let drains = match view.state {
                    PortState::Serving => self.draining.contains(&(id.clone(), view.port)),
                    state => state == PortState::Opening,
                };
                assert!(drains || self.fits(id, view.port), "{view:?}");
            } else {
                let anybody = self.config.pinned.values().any(|pin| *pin == view.port)
                    || self.fits(&agent("nobody"), view.port);
                assert!(anybody, "{view:?}");
            }
            let bound = self.listening.get(&view.port);
            match view.state {
                PortState::Serving | PortState::Leased => {
                    assert_eq!(
                        bound,
                        view.tenant.map(|(_, allocation)| allocation).as_ref()
                    );
                }
                PortState::Free | PortState::Foreign => assert_eq!(bound, None),
                PortState::Opening => {}
            }
        }
        assert_eq!(counts, self.allocator.counts());
        let open: BTreeSet<_> = self
            .tenancies
            .iter()
            .filter(|(_, (_, phase))| *phase != Phase::Over)
            .map(|(&allocation, _)| allocation)
            .collect();
        assert_eq!(
            running, open,
            "a tenancy without an end, or ended in secret"
        );
        assert!(self.allocator.remembered.len() <= self.allocator.slots.len());
    }
}

pub(super) fn run(leased: bool, ops: Vec<Op>) {
    let mut world = World::new(if leased {
        Duration::from_secs(20)
    } else {
        Duration::ZERO
    });
    for op in ops {
        world.apply(op);
    }

    world.apply(Op::ReleaseAll);
    world.apply(Op::Answer(usize::from(u16::MAX).min(world.outcomes.len())));
    world.apply(Op::Wait(Config::FOREIGN_RETRY.as_secs()));
    assert!(world.listening.is_empty() && world.asked.is_empty());
    let counts = world.allocator.counts();
    assert_eq!((counts.opening, counts.serving, counts.leased), (0, 0, 0));
    assert!(world.allocator.held.is_empty() && world.allocator.tenancies.is_empty());
    assert!(world.allocator.timers.is_empty());
    assert!(
        world
            .tenancies
            .values()
            .all(|(_, phase)| *phase == Phase::Over)
    );
}

pub(super) const START: Duration = Duration::from_secs(1_000);

pub(super) fn agent(name: &str) -> AgentId {
    name.parse().unwrap()
}

pub(super) fn config(range: RangeInclusive<u16>) -> Config {
    Config {
        range,
        pinned: BTreeMap::new(),
        reserved: BTreeSet::new(),
        lease: Duration::ZERO,
        foreign_retry: Config::FOREIGN_RETRY,
    }
}
