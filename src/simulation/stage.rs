//! A server, agents and visitors on a simulated network, and what must hold of them.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};

use super::net::{Host, Listener, Net, Socket};
use super::random::Random;
use crate::agent::{Agent, Event, Outside};
use crate::config::{AgentConfig, HostPort, Scheme, ServerConfig, ServiceUrl};
use crate::head::{LinesBuilder, RequestHead, ResponseHead};
use crate::id::{Generation, Secret};
use crate::link::Exchange;
use crate::mux::Read;
use crate::net::acceptor::{Command, Listener as Name};
use crate::server::simulated::{Outcome, Remains, Server, Visitor};

/// The server's host. Agents' are those that follow.
pub(crate) const SERVER: Host = Host(0);

const TUNNEL_PORT: u16 = 9090;

/// As often as the state file is written at most.
const SAVE_INTERVAL: Duration = Duration::from_millis(250);

/// Whoever asks has some answer by then: the longest wait of a service, and what it takes to
/// notice that its agent is gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happened, for whoever has to find out why something went wrong; and what went wrong.
#[derive(Clone)]
pub(crate) struct Ledger {
    began: Instant,
    notes: Arc<Mutex<Notes>>,
}

#[derive(Default)]
struct Notes {
    trace: Vec<String>,
    faults: Vec<String>,
    counts: Counts,
    /// An agent whose visitors must get their answers.
    steady: Option<String>,
}

/// What became of visitors' requests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) answered: usize,
    pub(crate) instead: usize,
    pub(crate) broken_off: usize,
    pub(crate) left: usize,
}

impl Ledger {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            notes: Arc::default(),
        }
    }

    /// Notes what happens.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        let at = self.began.elapsed().as_millis();
        let line = format!("{at:>8} {}", text.as_ref());
        self.notes.lock().unwrap().trace.push(line);
    }

    /// Notes what must not happen.
    fn fault(&self, text: impl AsRef<str>) {
        self.note(format!("WRONG: {}", text.as_ref()));
        let fault = text.as_ref().to_owned();
        self.notes.lock().unwrap().faults.push(fault);
    }

    /// From now on visitors of this agent must get their answers.
    pub(crate) fn expect_answers(&self, agent_id: &str) {
        self.notes.lock().unwrap().steady = Some(agent_id.to_owned());
    }

    fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.notes.lock().unwrap().counts);
    }

    pub(crate) fn counts(&self) -> Counts {
        self.notes.lock().unwrap().counts
    }

    pub(crate) fn faults(&self) -> Vec<String> {
        self.notes.lock().unwrap().faults.clone()
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        self.notes.lock().unwrap().trace.clone()
    }
}

/// The calendar's clock of the server's host, which somebody may move.
#[derive(Clone)]
struct Calendar(Arc<Mutex<(SystemTime, Instant)>>);

impl Calendar {
    fn now(&self) -> SystemTime {
        let (time, at) = *self.0.lock().unwrap();
        time + at.elapsed()
    }
}

/// A server that runs.
struct Running {
    number: usize,
    server: Server,
    /// Its ports, by number: under which key they were bound.
    ports: Mutex<BTreeMap<u16, (u64, Listener)>>,
}

/// The server that runs now, if one does.
type Current = Arc<Mutex<Option<Arc<Running>>>>;

/// See the module.
pub(crate) struct Stage {
    pub(crate) net: Net,
    pub(crate) random: Random,
    pub(crate) ledger: Ledger,
    pub(crate) config: ServerConfig,
    current: Current,
    loops: Vec<AbortHandle>,
    starts: usize,
    disk: Arc<Mutex<Option<String>>>,
    calendar: Calendar,
    former: Vec<Remains>,
    processes: BTreeMap<usize, Process>,
    next_process: usize,
    visitors: Vec<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
    requests: Arc<Mutex<u64>>,
    /// Some ports can't be bound for a while.
    pub(crate) foreign: Arc<AtomicBool>,
}

/// A process of an agent.
struct Process {
    id: String,
    host: Host,
    task: JoinHandle<()>,
    stop: Option<oneshot::Sender<()>>,
    /// What it was told when it was welcomed, while it is.
    welcomed: Arc<Mutex<Option<(u16, Generation)>>>,
}

/// The settings of a server with ports 8100 and so many more, and of the default times.
pub(crate) fn settings(ports: u16) -> ServerConfig {
    let mut config = ServerConfig::default();
    config.http.agent_port_range = 8100..=8100 + ports - 1;
    config.grpc.auth.shared = Some(Secret::new("secret"));
    config.server.workers = Some(2);
    config
}

impl Stage {
    pub(crate) fn new(config: ServerConfig, random: Random) -> Self {
        let calendar = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        Self {
            net: Net::new(random.fork(), 0..5),
            random,
            ledger: Ledger::new(),
            config,
            current: Arc::default(),
            loops: Vec::new(),
            starts: 0,
            disk: Arc::default(),
            calendar: Calendar(Arc::new(Mutex::new((calendar, Instant::now())))),
            former: Vec::new(),
            processes: BTreeMap::new(),
            next_process: 0,
            visitors: Vec::new(),
            closing: Arc::default(),
            requests: Arc::default(),
            foreign: Arc::default(),
        }
    }

    // --- The server -----------------------------------------------------------------------------

    /// Starts the server, with what the former one has written to its disk.
    pub(crate) fn start_server(&mut self) {
        let listener = self.net.listen(SERVER, TUNNEL_PORT).unwrap();
        let disk = self.disk.lock().unwrap().clone();
        let now = self.calendar.now();
        let server = Server::start(self.config.clone(), disk.as_deref(), now, &self.random);
        self.starts += 1;
        self.ledger.note(format!("server {} starts", self.starts));
        let running = Arc::new(Running {
            number: self.starts,
            server,
            ports: Mutex::default(),
        });
        *self.current.lock().unwrap() = Some(running.clone());
        let loops = [
            tokio::spawn(accept(running.clone(), listener, self.random.fork())),
            tokio::spawn(bind(
                running.clone(),
                self.net.clone(),
                self.random.fork(),
                self.ledger.clone(),
                self.foreign.clone(),
            )),
            tokio::spawn(save(running, self.calendar.clone(), self.disk.clone())),
        ];
        self.loops = loops.iter().map(JoinHandle::abort_handle).collect();
    }

    /// The server's process dies, or its host loses power.
    pub(crate) fn crash_server(&mut self, silent: bool) {
        let Some(running) = self.current.lock().unwrap().take() else {
            return;
        };
        self.ledger
            .note(format!("server crashes, silent: {silent}"));
        self.loops.drain(..).for_each(|task| task.abort());
        self.net.crash(SERVER, silent);
        running.server.crash();
        self.former.push(running.server.remains());
        drop(running);
    }

    /// The server ends in good order.
    pub(crate) async fn drain_server(&mut self) {
        let Some(running) = self.current() else {
            return;
        };
        self.ledger.note("server drains");
        running.server.drain().await;
        let (_, text) = running.server.memory(self.calendar.now());
        *self.disk.lock().unwrap() = Some(text);
        drop(running);
        self.crash_server(false);
    }

    /// Who has which port, and whether he is connected.
    pub(crate) fn list(&self) -> Vec<(String, u16, bool)> {
        let list = self.current().map(|running| running.server.list());
        let list = list.unwrap_or_default().into_iter();
        list.map(|listed| (listed.agent_id, listed.port, listed.is_connected))
            .collect()
    }

    pub(crate) fn has_server(&self) -> bool {
        self.current.lock().unwrap().is_some()
    }

    fn current(&self) -> Option<Arc<Running>> {
        self.current.lock().unwrap().clone()
    }

    /// What the calendar of the server's host shows.
    pub(crate) fn calendar(&self) -> SystemTime {
        self.calendar.now()
    }

    /// Somebody sets the calendar's clock of the server's host.
    pub(crate) fn set_calendar(&self, time: SystemTime) {
        self.ledger.note(format!("the calendar is set to {time:?}"));
        *self.calendar.0.lock().unwrap() = (time, Instant::now());
    }

    // --- Agents ---------------------------------------------------------------------------------

    /// Starts a process of an agent; returns its number.
    pub(crate) fn start_agent(&mut self, id: &str, host: Host) -> usize {
        let number = self.next_process;
        self.next_process += 1;
        self.ledger
            .note(format!("agent {id}: process {number} starts on {host:?}"));
        let server = HostPort {
            host: "server.test".into(),
            port: TUNNEL_PORT,
        };
        let service = ServiceUrl {
            scheme: Scheme::Http,
            address: HostPort {
                host: "service.test".into(),
                port: 80,
            },
        };
        let mut config = AgentConfig::new(server, id.parse().unwrap(), service);
        config.grpc.token = Some(Secret::new("secret"));
        let welcomed = Arc::new(Mutex::new(None));
        let agent = Agent::new(config).unwrap().on_event({
            let (welcomed, ledger, id) = (welcomed.clone(), self.ledger.clone(), id.to_owned());
            move |event| {
                ledger.note(format!("agent {id}, process {number}: {}", told(&event)));
                *welcomed.lock().unwrap() = match event {
                    Event::Connected {
                        port, generation, ..
                    } => Some((port, generation)),
                    _ => None,
                };
            }
        });
        let outside = Surroundings {
            net: self.net.clone(),
            host,
            random: self.random.fork(),
            agent_id: id.to_owned(),
        };
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let stopped = async move {
                let _ = stopped.await;
            };
            agent.run_on(&outside, stopped).await;
        });
        let process = Process {
            id: id.to_owned(),
            host,
            task,
            stop: Some(stop),
            welcomed,
        };
        self.processes.insert(number, process);
        number
    }

    /// The process dies; its kernel closes its connections.
    pub(crate) fn kill_agent(&mut self, number: usize) {
        if let Some(process) = self.processes.remove(&number) {
            self.ledger
                .note(format!("agent {}: process {number} is killed", process.id));
            process.task.abort();
        }
    }

    /// The process's host loses power, until [`Net::reboot`].
    pub(crate) fn cut_power(&mut self, number: usize) {
        if let Some(process) = self.processes.get(&number) {
            self.ledger.note(format!("{:?} loses power", process.host));
            self.net.crash(process.host, true);
        }
        self.kill_agent(number);
    }

    /// The process is asked to end; it may take a few seconds.
    pub(crate) fn stop_agent(&mut self, number: usize) -> Option<JoinHandle<()>> {
        let mut process = self.processes.remove(&number)?;
        self.ledger
            .note(format!("agent {}: process {number} is stopped", process.id));
        drop(process.stop.take());
        Some(process.task)
    }

    pub(crate) fn is_running(&self, number: usize) -> bool {
        self.processes.contains_key(&number)
    }

    /// The port and session that a process has, as far as it knows.
    pub(crate) fn welcome(&self, number: usize) -> Option<(u16, Generation)> {
        *self.processes.get(&number)?.welcomed.lock().unwrap()
    }

    // --- Visitors -------------------------------------------------------------------------------

    /// So many visitors come, again and again.
    pub(crate) fn invite(&mut self, count: usize) {
        for number in 0..count {
            let visitor = Visits {
                peer: (Ipv4Addr::new(192, 0, 2, number as u8), 50_000).into(),
                current: self.current.clone(),
                random: self.random.fork(),
                ledger: self.ledger.clone(),
                closing: self.closing.clone(),
                requests: self.requests.clone(),
            };
            self.visitors.push(tokio::spawn(visitor.run()));
        }
    }

    /// Whether a request to the port is answered by this agent.
    async fn probe(&self, id: &str, port: u16) -> bool {
        let visits = Visits {
            peer: (Ipv4Addr::new(192, 0, 2, 255), 50_000).into(),
            current: self.current.clone(),
            random: self.random.clone(),
            ledger: self.ledger.clone(),
            closing: self.closing.clone(),
            requests: self.requests.clone(),
        };
        let visitor = self.current().and_then(|running| {
            let key = running.ports.lock().unwrap().get(&port)?.0;
            running.server.visit(port, key, visits.peer).ok()
        });
        match visitor {
            Some(mut visitor) if visitor.agent_id() == id => visits.ask(&mut visitor, 0, 100).await,
            _ => false,
        }
    }

    // --- What must hold -------------------------------------------------------------------------

    /// Lets time pass, and looks every now and then.
    pub(crate) async fn pass(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let step = Duration::from_millis(100).min(end - Instant::now());
            sleep(step).await;
            self.look();
        }
    }

    /// No two agents on one port, no agent on two.
    pub(crate) fn look(&self) {
        let Some(running) = self.current() else {
            return;
        };
        let list = running.server.list();
        let mut ports = BTreeMap::new();
        for listed in &list {
            if let Some(other) = ports.insert(listed.port, &listed.agent_id) {
                let (port, id) = (listed.port, &listed.agent_id);
                self.ledger
                    .fault(format!("port {port} is both {other}'s and {id}'s"));
            }
            if !self.config.http.agent_port_range.contains(&listed.port) {
                self.ledger
                    .fault(format!("{listed:?} is outside of the range"));
            }
        }
    }

    /// What is missing until each of these agents is connected and answers: it is listed, one of
    /// its processes knows it, on the same port and in the same session.
    async fn missing(&self, ids: &[String]) -> Option<String> {
        let Some(running) = self.current() else {
            return Some("there is no server".into());
        };
        let list = running.server.list();
        drop(running);
        for id in ids {
            let Some(listed) = list.iter().find(|listed| listed.agent_id == *id) else {
                return Some(format!("{id} isn't listed"));
            };
            if !listed.is_connected {
                return Some(format!("{id} is away"));
            }
            let theirs = self
                .processes
                .iter()
                .filter(|(_, process)| process.id == *id);
            let welcomed: Vec<_> = theirs
                .filter_map(|(number, _)| self.welcome(*number))
                .collect();
            if welcomed != [(listed.port, listed.generation)] {
                return Some(format!("{listed:?}, but its processes have {welcomed:?}"));
            }
        }
        for listed in list.iter().filter(|listed| ids.contains(&listed.agent_id)) {
            if !self.probe(&listed.agent_id, listed.port).await {
                return Some(format!("{listed:?} doesn't answer"));
            }
        }
        None
    }

    /// Waits until each of these agents is connected and answers; says how long that took.
    pub(crate) async fn settle(&self, ids: &[String], bound: Duration) -> Duration {
        let began = Instant::now();
        while let Some(missing) = self.missing(ids).await {
            if began.elapsed() > bound {
                self.ledger
                    .fault(format!("not back after {bound:?}: {missing}"));
                break;
            }
            sleep(Duration::from_millis(50)).await;
            self.look();
        }
        self.ledger
            .note(format!("all is well after {:?}", began.elapsed()));
        began.elapsed()
    }

    /// Visitors leave, agents stop: nothing of them may be left on the server once leases are over,
    /// and then nothing of the server.
    pub(crate) async fn finish(mut self) {
        self.closing.store(true, Relaxed);
        for visitor in std::mem::take(&mut self.visitors) {
            if timeout(PATIENCE * 2, visitor).await.is_err() {
                self.ledger.fault("a visitor is stuck");
            }
        }
        let numbers: Vec<_> = self.processes.keys().copied().collect();
        let stopping: Vec<_> = numbers
            .into_iter()
            .filter_map(|number| self.stop_agent(number))
            .collect();
        for task in stopping {
            if timeout(Duration::from_secs(10), task).await.is_err() {
                self.ledger.fault("an agent doesn't stop");
            }
        }
        // The longest: a connection that fell silent is dead after three heartbeats.
        let quiet = self
            .config
            .http
            .port_lease
            .max(self.config.grpc.heartbeat_timeout);
        self.pass(quiet + Duration::from_secs(10)).await;
        if let Some(running) = self.current() {
            for left in running.server.left_over() {
                self.ledger
                    .fault(format!("left over on the server: {left}"));
            }
            if !running.ports.lock().unwrap().is_empty() {
                self.ledger.fault("a port is still bound");
            }
            for left in running.server.list() {
                self.ledger.fault(format!("still listed: {left:?}"));
            }
        }
        if self.net.listening(SERVER) != [TUNNEL_PORT] {
            self.ledger.fault(format!(
                "still listening on {:?}",
                self.net.listening(SERVER)
            ));
        }
        let sockets = self.net.sockets_open();
        if sockets != 0 {
            self.ledger
                .fault(format!("{sockets} sockets are still open"));
        }
        self.crash_server(false);
        sleep(Duration::from_secs(1)).await;
        let former = self.former.iter().filter(|former| former.are_there());
        let former = former.count();
        if former != 0 {
            self.ledger
                .fault(format!("something holds {former} servers that are gone"));
        }
        let tasks = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        if tasks != 0 {
            self.ledger.fault(format!("{tasks} tasks are still there"));
        }
    }
}

fn told(event: &Event) -> String {
    match event {
        Event::Connected {
            port, generation, ..
        } => format!("connected, port {port}, session {}", generation.0),
        Event::Rejected {
            reason, retry_in, ..
        } => format!("rejected ({}), again in {retry_in:?}", reason.as_str()),
        Event::Disconnected { why, retry_in } => {
            format!("disconnected ({why}), again in {retry_in:?}")
        }
    }
}

/// Takes agents' connections.
async fn accept(running: Arc<Running>, listener: Listener, random: Random) {
    while let Some((socket, peer)) = listener.accept().await {
        running.server.admit(socket, peer, &random);
    }
}

/// Binds and closes ports, as the accept task does.
async fn bind(
    running: Arc<Running>,
    net: Net,
    random: Random,
    ledger: Ledger,
    foreign: Arc<AtomicBool>,
) {
    loop {
        match running.server.next_command().await {
            Command::Bind { port, key } => {
                if random.one_in(4) {
                    sleep(random.millis(0..50)).await;
                }
                let outcome = if foreign.load(Relaxed) && random.one_in(3) {
                    Err(rustix::io::Errno::ADDRINUSE.into())
                } else {
                    net.listen(SERVER, port).map(|listener| {
                        running.ports.lock().unwrap().insert(port, (key, listener));
                    })
                };
                let is_ours = running.ports.lock().unwrap().get(&port).map(|port| port.0);
                if outcome.is_err() && is_ours.is_some() {
                    ledger.fault(format!("port {port} is bound twice"));
                }
                running.server.opened(port, key, outcome);
            }
            Command::Close(Name::Port { port, key }) => {
                let mut ports = running.ports.lock().unwrap();
                if ports.get(&port).is_some_and(|(bound, _)| *bound == key) {
                    ports.remove(&port);
                }
            }
            Command::Close(Name::Adopted(_)) => {}
        }
    }
}

/// Writes the state file.
async fn save(running: Arc<Running>, calendar: Calendar, disk: Arc<Mutex<Option<String>>>) {
    let mut written = None;
    loop {
        let (revision, text) = running.server.memory(calendar.now());
        if written != Some(revision) {
            written = Some(revision);
            *disk.lock().unwrap() = Some(text);
        }
        sleep(SAVE_INTERVAL).await;
    }
}

/// What is around an agent.
struct Surroundings {
    net: Net,
    host: Host,
    random: Random,
    agent_id: String,
}

impl Outside for Surroundings {
    type Stream = Socket;

    fn connect(&self, server: &HostPort) -> impl Future<Output = io::Result<Socket>> + Send {
        self.net.connect(self.host, SERVER, server.port)
    }

    fn forward(&self, exchange: Exchange, head: RequestHead) {
        tokio::spawn(answer(exchange, head, self.agent_id.clone()));
    }

    fn random(&self) -> u64 {
        self.random.number()
    }
}

/// The service: answers `/NUMBER/WAIT/SIZE` after so many milliseconds with so many bytes, which
/// only this agent's answer to this number has.
async fn answer(exchange: Exchange, head: RequestHead, agent_id: String) {
    let target = String::from_utf8_lossy(&head.target).into_owned();
    let parts: Vec<u64> = target
        .split('/')
        .filter_map(|part| part.parse().ok())
        .collect();
    let [number, wait, size] = parts[..] else {
        return;
    };
    let mut sum = 0;
    loop {
        match poll_fn(|cx| exchange.poll_read(cx)).await {
            Read::Data(data) => sum = checksum(sum, &data),
            Read::End(_) => break,
            Read::Reset(_) | Read::Pending => return,
        }
    }
    let cancelled = poll_fn(|cx| exchange.poll_reset(cx));
    if timeout(Duration::from_millis(wait), cancelled)
        .await
        .is_ok()
    {
        return;
    }
    let mut lines = LinesBuilder::default();
    let sum = sum.to_string();
    let values = [
        ("x-agent", &agent_id),
        ("x-number", &number.to_string()),
        ("x-sum", &sum),
    ];
    for (name, value) in values {
        lines.push(name.as_bytes(), value.as_bytes()).unwrap();
    }
    exchange.answer(ResponseHead {
        status: 200,
        lines: lines.finish(),
    });
    let mut body = Bytes::from(pattern(number, &agent_id, size as usize));
    while !body.is_empty() {
        let Ok(capacity) = poll_fn(|cx| exchange.poll_capacity(cx)).await else {
            return;
        };
        let piece = body.split_to(capacity.min(body.len()).min(8 * 1024));
        if exchange.send(piece).is_err() {
            return;
        }
    }
    exchange.finish(None);
}

/// Bytes that belong to one request and one agent.
fn pattern(number: u64, agent_id: &str, size: usize) -> Vec<u8> {
    let seed = agent_id
        .bytes()
        .fold(number, |seed, byte| seed.rotate_left(8) ^ u64::from(byte));
    let words = (0..).flat_map(|at: u64| {
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(at.wrapping_mul(0xd134_2543_de82_ef95))
            .to_le_bytes()
    });
    words.take(size).collect()
}

fn checksum(sum: u64, data: &[u8]) -> u64 {
    data.iter().fold(sum, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
    })
}

/// One visitor after the other, from the same address.
struct Visits {
    peer: SocketAddr,
    current: Current,
    random: Random,
    ledger: Ledger,
    closing: Arc<AtomicBool>,
    requests: Arc<Mutex<u64>>,
}

impl Visits {
    async fn run(self) {
        while !self.closing.load(Relaxed) {
            sleep(self.random.millis(0..700)).await;
            let Some((server, mut visitor)) = self.come() else {
                continue;
            };
            // Some stay for long, over whatever happens to the agent meanwhile.
            let pause = *self.random.pick(&[50, 200, 10_000]);
            for _ in 0..=self.random.below(6) {
                let is_same = self.current.lock().unwrap().as_ref().map(|now| now.number) == server;
                if visitor.is_over() || !is_same || self.closing.load(Relaxed) {
                    break;
                }
                let wait = *self.random.pick(&[0, 0, 0, 20, 1_000, 10_000]);
                let size = *self.random.pick(&[0, 10, 1_000, 100_000]);
                let asking = self.ask(&mut visitor, wait, size);
                match self.random.one_in(8) {
                    true => {
                        let patience = self.random.millis(0..500);
                        if timeout(patience, asking).await.is_err() {
                            self.ledger.count(|counts| counts.left += 1);
                            break;
                        }
                    }
                    false => {
                        asking.await;
                    }
                }
                sleep(self.random.millis(0..pause)).await;
            }
        }
    }

    fn come(&self) -> Option<(Option<usize>, Visitor)> {
        let running = self.current.lock().unwrap().clone()?;
        let ports: Vec<_> = {
            let ports = running.ports.lock().unwrap();
            ports.iter().map(|(port, (key, _))| (*port, *key)).collect()
        };
        if ports.is_empty() {
            return None;
        }
        let (port, key) = *self.random.pick(&ports);
        let visitor = running.server.visit(port, key, self.peer).ok()?;
        Some((Some(running.number), visitor))
    }

    /// Asks, and looks whether the answer is the right one; false if there is none.
    async fn ask(&self, visitor: &mut Visitor, wait: u64, size: usize) -> bool {
        let number = {
            let mut requests = self.requests.lock().unwrap();
            *requests += 1;
            *requests
        };
        let agent_id = visitor.agent_id();
        let length = *self.random.pick(&[0, 0, 100, 40_000]);
        let upload = pattern(number, "upload", length);
        let pieces: Vec<_> = upload
            .chunks(8 * 1024)
            .rev()
            .map(Bytes::copy_from_slice)
            .collect();
        let target = format!("/{number}/{wait}/{size}");
        let outcome = match timeout(PATIENCE, visitor.ask(&target, pieces)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.ledger
                    .fault(format!("request {number} to {agent_id} hangs"));
                return false;
            }
        };
        let steady = self.ledger.notes.lock().unwrap().steady.clone();
        if steady.is_some_and(|id| id == agent_id)
            && !matches!(outcome, Outcome::Answer(..))
            && !self.closing.load(Relaxed)
        {
            self.ledger
                .fault(format!("request {number} to {agent_id}: {outcome:?}"));
        }
        match outcome {
            Outcome::Answer(head, body) => {
                self.ledger.count(|counts| counts.answered += 1);
                let line = |name: &str| {
                    let mut lines = head.lines.iter();
                    let value =
                        lines.find_map(|(n, value)| (n == name.as_bytes()).then_some(value));
                    String::from_utf8_lossy(value.unwrap_or_default()).into_owned()
                };
                let is_ours = head.status == 200
                    && line("x-agent") == agent_id
                    && line("x-number") == number.to_string()
                    && line("x-sum") == checksum(0, &upload).to_string()
                    && body == pattern(number, &agent_id, size);
                if !is_ours {
                    let (agent, got) = (line("x-agent"), line("x-number"));
                    self.ledger.fault(format!(
                        "request {number} to {agent_id} is answered by {agent} for {got}, \
                         {} of {size} bytes",
                        body.len()
                    ));
                }
                is_ours
            }
            Outcome::Instead(status) => {
                self.ledger.count(|counts| counts.instead += 1);
                if ![502, 503].contains(&status) {
                    self.ledger
                        .fault(format!("request {number} to {agent_id} gets {status}"));
                }
                false
            }
            Outcome::BrokenOff | Outcome::Cut => {
                self.ledger.count(|counts| counts.broken_off += 1);
                false
            }
        }
    }
}
