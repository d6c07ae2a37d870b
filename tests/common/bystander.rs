//! Somebody who has nothing to do with what a test does, and must not notice any of it.
//!
//! A bystander is an agent of the test's own server, with a service and a visitor who never stops
//! asking. What he waits is measured while nothing happens, and then beside the case. At the end
//! [`Bystander::noticed_nothing`] asserts what has to hold after every case: he had no error and
//! no byte that wasn't his, his p99 at most doubled, the processes live, and their memory and
//! descriptors are where they were. A second visitor asks the service itself: what he waits beside
//! the case isn't the tunnel's doing but the machine's.

use std::fmt::Write as _;
use std::io::{self, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::raw::{Received, read_request};
use super::{Agent, Process, Server, eventually, pause, try_read_answer};

/// Below this a p99 says more about the machine than about us: it has two cores, shared by all the
/// processes of a test and whatever else runs there, none of them optimised. So a p99 of twice
/// this is never too much.
pub const FLOOR: Duration = Duration::from_millis(20);

/// As many answers as a p99 needs, at least, to be more than the slowest of all.
const ENOUGH: usize = 200;

/// How soon memory and descriptors must be back after a case.
const BACK: Duration = Duration::from_secs(10);

/// What memory may have grown by all the same, or else a twentieth.
const GROWTH: u64 = 8 * 1024 * 1024;

/// The same for descriptors, which leaves room for the test's own questions to the admin port.
const DESCRIPTORS: usize = 4;

/// Held by each test with a bystander: what they measure would only measure the others.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    // One that failed is no reason for the others to.
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One that is being disturbed, or isn't.
pub struct Bystander {
    agent: Agent,
    visits: Arc<Visits>,
    /// Those of the visitor who asks the service itself.
    direct: Arc<Visits>,
    visitors: Vec<JoinHandle<()>>,
    quiet: Duration,
    watched: Vec<Watched>,
}

#[derive(Default)]
struct Visits {
    over: AtomicBool,
    /// How long he waited for each answer since this was last emptied.
    waited: Mutex<Vec<Duration>>,
    /// What went wrong, if anything did.
    failed: Mutex<Option<String>>,
}

/// A process as it was before the case.
struct Watched {
    name: String,
    pid: u32,
    resident: u64,
    descriptors: usize,
}

impl Bystander {
    /// Starts one on the case's server and watches it for a while without the case. `others` are
    /// the processes that have to outlive it too, such as the case's agent.
    pub fn start(server: &Server, others: &[&Process]) -> Self {
        let service = signing_service();
        let agent = server.agent("bystander", service);
        let (visits, direct) = (Arc::default(), Arc::default());
        let visitors = vec![
            visit_steadily(agent.address(), &visits),
            visit_steadily(service, &direct),
        ];
        let mut bystander = Self {
            agent,
            visits,
            direct,
            visitors,
            quiet: Duration::ZERO,
            watched: Vec::new(),
        };
        // The first answers are warming up: connections, memory, the tunnel's path.
        bystander.wait_for(50);
        bystander.forget();
        bystander.wait_for(ENOUGH);
        bystander.quiet = bystander.visits.p99();
        bystander.watched = [&server.process, &bystander.agent.process]
            .into_iter()
            .chain(others.iter().copied())
            .map(Watched::note)
            .collect();
        bystander.forget();
        bystander
    }

    /// The bystander's own agent, for cases that need somebody else.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The p99 that he had without the case.
    pub fn quiet_p99(&self) -> Duration {
        self.quiet
    }

    /// Forgets what he has waited so far: the case begins now.
    pub fn forget(&self) {
        for visits in [&self.visits, &self.direct] {
            visits.waited.lock().unwrap().clear();
        }
    }

    /// Asserts that the case made no difference to him, and left nothing behind. The case's own
    /// connections must be closed by now.
    #[track_caller]
    pub fn noticed_nothing(self) {
        // A short case doesn't give a p99 of its own: what follows it counts as well.
        self.wait_for(ENOUGH);
        let count = self.visits.waited.lock().unwrap().len();
        let (p99, direct) = (self.visits.p99(), self.direct.p99());
        let allowed = allowed(self.quiet.max(direct));
        eprintln!(
            "bystander: p99 {p99:?} of {count} answers, {:?} without the case, {direct:?} without \
             the tunnel, {allowed:?} allowed",
            self.quiet
        );
        assert!(p99 <= allowed, "p99 {p99:?}, allowed {allowed:?}");
        for watched in &self.watched {
            assert!(watched.is_alive(), "{} is gone", watched.name);
        }
        // What the processes hold goes back while he goes on asking.
        eventually(BACK, &self.excess(), || {
            self.watched.iter().all(|one| one.excess().is_none())
        });
        self.check();
    }

    fn excess(&self) -> String {
        let excess: Vec<String> = self.watched.iter().filter_map(Watched::excess).collect();
        format!("memory and descriptors are back, after {excess:?}")
    }

    /// Waits until he has had so many answers.
    #[track_caller]
    fn wait_for(&self, count: usize) {
        eventually(super::PATIENCE, "the bystander is answered", || {
            self.check();
            [&self.visits, &self.direct]
                .iter()
                .all(|visits| visits.waited.lock().unwrap().len() >= count)
        });
    }

    #[track_caller]
    fn check(&self) {
        for visits in [&self.visits, &self.direct] {
            let failed = visits.failed.lock().unwrap().clone();
            assert!(failed.is_none(), "the bystander: {}", failed.unwrap());
        }
    }
}

impl Visits {
    fn p99(&self) -> Duration {
        p99(&mut self.waited.lock().unwrap().clone())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        for visits in [&self.visits, &self.direct] {
            visits.over.store(true, Ordering::Relaxed);
        }
        for visitor in self.visitors.drain(..) {
            let _ = visitor.join();
        }
    }
}

/// What a p99 may be beside a case if it was `quiet` without.
pub fn allowed(quiet: Duration) -> Duration {
    2 * quiet.max(FLOOR)
}

/// The time within which 99 of 100 were.
pub fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[(times.len() * 99).div_ceil(100) - 1]
}

impl Watched {
    fn note(process: &Process) -> Self {
        Self {
            name: process.name.clone(),
            pid: process.pid(),
            resident: process.resident_bytes(),
            descriptors: process.descriptors(),
        }
    }

    fn is_alive(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    }

    /// What it has too much of.
    fn excess(&self) -> Option<String> {
        let resident = super::status_number(self.pid, "VmRSS:") * 1024;
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?;
        let descriptors = descriptors.count();
        let is_back = resident <= self.resident + (self.resident / 20).max(GROWTH)
            && descriptors <= self.descriptors + (self.descriptors / 20).max(DESCRIPTORS);
        (!is_back).then(|| {
            format!(
                "{}: {} KiB, {} before; {descriptors} descriptors, {} before",
                self.name,
                resident / 1024,
                self.resident / 1024,
                self.descriptors
            )
        })
    }
}

/// A visitor who asks until it is over.
fn visit_steadily(address: SocketAddr, visits: &Arc<Visits>) -> JoinHandle<()> {
    let visits = visits.clone();
    std::thread::spawn(move || {
        if let Err(error) = visit(address, &visits) {
            *visits.failed.lock().unwrap() = Some(error.to_string());
        }
    })
}

/// Asks until it is over: mostly on a connection that is kept, sometimes on a new one.
fn visit(address: SocketAddr, visits: &Visits) -> io::Result<()> {
    let mut kept = SignedVisitor::open(address)?;
    let mut count = 0_u32;
    while !visits.over.load(Ordering::Relaxed) {
        count += 1;
        let waited = if count.is_multiple_of(8) {
            let began = Instant::now();
            SignedVisitor::open(address)?.ask()?;
            began.elapsed()
        } else {
            kept.ask()?
        };
        visits.waited.lock().unwrap().push(waited);
        // He asks often, and leaves the machine to the case.
        pause();
    }
    Ok(())
}

/// A visitor of a [`signing_service`] who sees whether an answer is his.
pub struct SignedVisitor {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl SignedVisitor {
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        Self::on(TcpStream::connect(address)?)
    }

    /// One who goes on with a connection that has served other requests.
    pub fn on(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(super::PATIENCE))?;
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, reader })
    }

    /// Sends a request with an id and a checksum, and returns how long its answer took: one with
    /// the same id and a checksum that is right.
    pub fn ask(&mut self) -> io::Result<Duration> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        let body = body_of(id);
        let mut request = format!(
            "POST /{id} HTTP/1.1\r\nHost: h\r\nX-Sum: {}\r\n",
            sum(&body)
        );
        write!(request, "Content-Length: {}\r\n\r\n", body.len()).map_err(io::Error::other)?;
        let began = Instant::now();
        self.stream
            .write_all(&[request.as_bytes(), &body].concat())?;
        let answer = try_read_answer(&mut self.reader, false)?;
        let waited = began.elapsed();
        let expected = body_of(!id);
        if answer.status == 200
            && answer.header("x-id") == [id.to_string()]
            && answer.header("x-sum") == [sum(&expected).to_string()]
            && answer.body == expected
        {
            return Ok(waited);
        }
        let head = String::from_utf8_lossy(&answer.head).into_owned();
        Err(io::Error::other(format!(
            "request {id} got {head:?}, and not its body"
        )))
    }
}

/// A service that checks what it is sent, and signs what it answers.
pub fn signing_service() -> SocketAddr {
    super::service(|mut stream| {
        let _ = stream.set_nodelay(true);
        while let Ok(request) = read_request(&mut stream) {
            if sign(&request, &mut stream).is_err() {
                return;
            }
        }
    })
}

/// Answers one request as a [`signing_service`] does, in a service that does more.
pub fn sign(request: &Received, stream: &mut impl Write) -> io::Result<()> {
    let line = request.line();
    let id = line.split(['/', ' ']).nth(2).and_then(|id| id.parse().ok());
    let is_his = id.is_some_and(|id| request.body == body_of(id))
        && request.header("x-sum") == [sum(&request.body).to_string()];
    let status = if is_his { "200 OK" } else { "400 Mixed Up" };
    let (id, body) = (id.unwrap_or_default(), body_of(!id.unwrap_or_default()));
    let head = format!(
        "HTTP/1.1 {status}\r\nX-Id: {id}\r\nX-Sum: {}\r\nContent-Length: {}\r\n\r\n",
        sum(&body),
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat())
}

/// A body that belongs to one request: of 8 bytes to 2 KiB, with its id all over.
fn body_of(id: u64) -> Vec<u8> {
    let mixed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = 1 + mixed as usize % 256;
    mixed.to_le_bytes().repeat(words)
}

/// FNV-1a, which shows what was lost, doubled or moved.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
