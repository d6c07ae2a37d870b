//! Faults drawn by a seed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::net::{Cut, Host, How, Side};
use super::random::Random;
use super::stage::{Ledger, SERVER, Stage, settings};
use super::{ids, run, seeds};

/// After the last fault everybody is back within this much, unless a rival or a foreign port kept
/// somebody away. An agent that doesn't know that its connection is dead finds out after 30 s
/// without a heartbeat, its next connection may hang for 10 s in what was sent before the network
/// was well, as may its welcome, and between two attempts it waits for 20 s at most.
const BOUND: Duration = Duration::from_secs(70);

/// The same with rivals: whoever lost its id waits 30 s and up to a quarter more, finds the other
/// still listed if that went without a word (30 s), and waits once more. And with foreign ports,
/// one of them pinned: the agent waits for it, and it is tried again after 30 s.
const RIVALS_BOUND: Duration = Duration::from_secs(120);

/// How many kinds of faults there are, and how many of them concern one agent only.
const ALL: usize = 18;
const AGENTS: usize = 11;

/// What is done to end a fault.
#[derive(Debug, Clone, Copy)]
enum Mend {
    /// Bytes pass again from one host to another.
    Open(Host, Host),
    /// The agent's host has power, and the agent starts.
    Start(usize),
    /// A flapping agent starts, or dies: so many times more.
    Flap(usize, usize),
    /// The server's host has power, and the server starts.
    StartServer,
    /// Bytes are fast again.
    Speed,
    /// A process that has another's id is stopped, or killed.
    EndRival(usize, bool),
    /// Ports of other programs are free again.
    NoForeign,
}

struct Plan {
    stage: Stage,
    random: Random,
    ids: Vec<String>,
    /// Each agent's process.
    processes: Vec<usize>,
    mends: BTreeMap<(Instant, u64), Mend>,
    next_mend: u64,
    hosts: u8,
    bound: Duration,
    /// Only agents but the first have faults: their hosts, their links and their processes.
    spares_first: bool,
}

impl Plan {
    fn new(seed: u64, spares_first: bool) -> Self {
        let random = Random::new(seed);
        let ids = ids(2 + random.below(5));
        let mut config = settings(ids.len() as u16 + 2);
        config.http.port_lease = *random.pick(&[0, 0, 5, 60].map(Duration::from_secs));
        if random.one_in(2) {
            let pinned = ids[0].parse().unwrap();
            config.http.static_ports.insert(pinned, 8101);
        }
        let mut plan = Self {
            stage: Stage::new(config, random.fork()),
            random,
            processes: Vec::new(),
            mends: BTreeMap::new(),
            next_mend: 0,
            hosts: ids.len() as u8,
            ids,
            bound: BOUND,
            spares_first,
        };
        plan.stage.start_server();
        for index in 0..plan.ids.len() {
            plan.processes.push(usize::MAX);
            plan.start(index);
        }
        plan.stage.invite(4);
        plan
    }

    fn host(index: usize) -> Host {
        Host(index as u8 + 1)
    }

    fn start(&mut self, index: usize) {
        if !self.stage.is_running(self.processes[index]) {
            let (id, host) = (self.ids[index].clone(), Self::host(index));
            self.processes[index] = self.stage.start_agent(&id, host);
        }
    }

    fn later(&mut self, after: Duration, mend: Mend) {
        self.next_mend += 1;
        self.mends
            .insert((Instant::now() + after, self.next_mend), mend);
    }

    /// A length of time, most of them short, in milliseconds.
    fn while_(&self, longest: u64) -> Duration {
        let longest = match self.random.below(3) {
            0 => longest / 100,
            1 => longest / 10,
            _ => longest,
        };
        self.random.millis(0..longest)
    }

    /// Faults for some time, then none.
    async fn act(mut self) -> Ledger {
        let ledger = self.stage.ledger.clone();
        let end = Instant::now() + self.random.millis(20_000..90_000);
        while Instant::now() < end {
            let pause = self.while_(8_000);
            self.pass(pause).await;
            self.fault().await;
        }
        ledger.note("no more faults");
        for mend in std::mem::take(&mut self.mends).into_values() {
            match mend {
                Mend::Flap(index, _) => self.mend(Mend::Start(index)),
                mend => self.mend(mend),
            }
        }
        self.stage.net.heal();
        let took = self.stage.settle(&self.ids, self.bound).await;
        assert!(took <= self.bound || !ledger.faults().is_empty());
        // It isn't the quiet before the storm.
        self.stage.pass(Duration::from_secs(35)).await;
        self.stage.settle(&self.ids, Duration::from_secs(1)).await;
        self.stage.finish().await;
        ledger
    }

    /// Lets time pass, and ends what is to end meanwhile.
    async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(((at, _), mend)) =
            self.mends.first_key_value().map(|(at, mend)| (*at, *mend))
            && at <= end
        {
            self.stage
                .pass(at.saturating_duration_since(Instant::now()))
                .await;
            self.mends.pop_first();
            self.mend(mend);
        }
        self.stage
            .pass(end.saturating_duration_since(Instant::now()))
            .await;
    }

    fn mend(&mut self, mend: Mend) {
        self.stage.ledger.note(format!("{mend:?}"));
        match mend {
            Mend::Open(from, to) => self.stage.net.open(from, to),
            Mend::Start(index) => {
                self.stage.net.reboot(Self::host(index));
                self.start(index);
            }
            Mend::Flap(index, times) => {
                match self.stage.is_running(self.processes[index]) {
                    true => self.stage.kill_agent(self.processes[index]),
                    false => self.start(index),
                }
                match times {
                    0 => self.start(index),
                    times => {
                        let pause = self.random.millis(0..300);
                        self.later(pause, Mend::Flap(index, times - 1));
                    }
                }
            }
            Mend::StartServer => {
                if !self.stage.has_server() {
                    self.stage.net.reboot(SERVER);
                    self.stage.start_server();
                }
            }
            Mend::Speed => self.stage.net.set_delay(0..5),
            Mend::EndRival(process, kill) => match kill {
                true => self.stage.kill_agent(process),
                false => drop(self.stage.stop_agent(process)),
            },
            Mend::NoForeign => self.stage.foreign.store(false, Relaxed),
        }
    }

    /// Makes one fault.
    async fn fault(&mut self) {
        let (index, kind) = match self.spares_first {
            false => (self.random.below(self.ids.len()), self.random.below(ALL)),
            true => (
                1 + self.random.below(self.ids.len() - 1),
                self.random.below(AGENTS),
            ),
        };
        let (host, process) = (Self::host(index), self.processes[index]);
        let ledger = self.stage.ledger.clone();
        match kind {
            0 | 1 => {
                ledger.note(format!("{host:?} is cut off"));
                let time = self.while_(45_000);
                for (from, to) in [(host, SERVER), (SERVER, host)] {
                    self.stage.net.block(from, to);
                    self.later(time, Mend::Open(from, to));
                }
            }
            2 | 3 => {
                let (from, to) = *self.random.pick(&[(host, SERVER), (SERVER, host)]);
                ledger.note(format!("nothing passes from {from:?} to {to:?}"));
                self.stage.net.block(from, to);
                let time = self.while_(45_000);
                self.later(time, Mend::Open(from, to));
            }
            4 => {
                self.stage.kill_agent(process);
                let time = self.while_(10_000);
                self.later(time, Mend::Start(index));
            }
            5 => {
                self.stage.cut_power(process);
                let time = self.while_(60_000);
                self.later(time, Mend::Start(index));
            }
            6 => {
                let times = 4 + self.random.below(16);
                self.mend(Mend::Flap(index, times));
            }
            7 | 8 => {
                self.hosts += 1;
                let id = self.ids[index].clone();
                let rival = self.stage.start_agent(&id, Host(self.hosts));
                let (time, kill) = (self.while_(60_000), self.random.one_in(2));
                self.later(time, Mend::EndRival(rival, kill));
                self.bound = RIVALS_BOUND;
            }
            9 => {
                let cut = Cut {
                    sender: *self.random.pick(&[Side::Client, Side::Server]),
                    after: self.random.below(3_000),
                    how: match self.random.one_in(2) {
                        true => How::Reset,
                        false => How::Silence,
                    },
                };
                ledger.note(format!("the next connection of {host:?}: {cut:?}"));
                self.stage.net.cut_next(host, cut);
                self.stage.kill_agent(process);
                self.start(index);
            }
            10 => {
                let task = self.stage.stop_agent(process);
                drop(task);
                let time = self.while_(10_000);
                self.later(time, Mend::Start(index));
            }
            11 => {
                self.stage.crash_server(false);
                let time = self.while_(5_000);
                self.later(time, Mend::StartServer);
            }
            12 => {
                self.stage.crash_server(true);
                let time = self.while_(40_000);
                self.later(time, Mend::StartServer);
            }
            13 => {
                self.stage.drain_server().await;
                let time = self.while_(5_000);
                self.later(time, Mend::StartServer);
            }
            14 => {
                let delay = self.random.millis(10..3_000).as_millis() as u64;
                ledger.note(format!("bytes take up to {delay} ms"));
                self.stage.net.set_delay(0..delay);
                let time = self.while_(30_000);
                self.later(time, Mend::Speed);
            }
            15 => {
                let seconds =
                    *self
                        .random
                        .pick(&[0, 1, 1_600_000_000, 1_700_000_600, 250_000_000_000]);
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
                self.stage.set_calendar(time);
            }
            16 => {
                let time = self.while_(40_000);
                ledger.note(format!("nobody's programs run for {time:?}"));
                tokio::time::advance(time).await;
            }
            _ => {
                ledger.note("some ports are other programs'");
                self.stage.foreign.store(true, Relaxed);
                let time = self.while_(30_000);
                self.later(time, Mend::NoForeign);
                self.bound = RIVALS_BOUND;
            }
        }
    }
}

fn simulate(seed: u64) -> Ledger {
    run("chance::whatever_happens", seed, || async move {
        Plan::new(seed, false).act().await
    })
}

fn simulate_all(seeds: Range<u64>) {
    let mut answered = 0;
    for seed in seeds.clone() {
        answered += simulate(seed).counts().answered;
    }
    println!("{answered} requests answered in {} seeds", seeds.count());
    assert!(answered > 0);
}

#[test]
fn whatever_happens_everything_is_back_and_nothing_left() {
    simulate_all(seeds(0..8));
}

#[test]
#[ignore = "takes half a minute"]
fn whatever_else_happens() {
    simulate_all(seeds(8..60));
}

/// Whatever happens to other agents, the first one's visitors get their answers.
#[test]
fn whatever_happens_to_others_an_agent_answers() {
    for seed in seeds(0..5) {
        run("chance::whatever_happens_to_others", seed, || async move {
            let plan = Plan::new(seed, true);
            plan.stage.settle(&plan.ids, Duration::from_secs(2)).await;
            plan.stage.ledger.expect_answers(&plan.ids[0]);
            plan.act().await
        });
    }
}

#[test]
fn the_same_seed_does_the_same_again() {
    for seed in seeds(0..3) {
        let (first, again) = (simulate(seed), simulate(seed));
        let lines = first.trace().into_iter().zip(again.trace());
        for (first, again) in lines {
            assert_eq!(first, again, "seed {seed}");
        }
        assert_eq!(first.counts(), again.counts(), "seed {seed}");
    }
}
