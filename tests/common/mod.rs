//! Real processes of the real binary, on ports that nobody else uses, for the black-box tests.
//!
//! Nothing here sleeps to wait for readiness: a process is ready when its log or the admin port
//! says so, and every wait has a deadline after which the test fails with the logs.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "it is a module of every test binary")]
#![allow(
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails anywhere, and shows its logs then"
)]

pub mod bystander;
pub mod daemon;
pub mod raw;
pub mod relay;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

/// How long anything may take that should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

const SECOND: Duration = Duration::from_secs(1);

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_silo-proxy");

/// A running process of the binary under test, with its log. Killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Log>,
    name: String,
}

/// What a process has written to standard output and error so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Lines>,
    grown: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    /// Of the two streams, how many have ended.
    ended: usize,
}

impl Process {
    /// Starts the binary with arguments and environment.
    pub fn start(name: &str, args: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_command(name, Command::new(BINARY).args(args), environment)
    }

    /// Starts a prepared command, such as the binary under another program's limits.
    pub fn start_command(name: &str, command: &mut Command, environment: &[(&str, &str)]) -> Self {
        let mut child = command
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let log = Arc::new(Log::default());
        collect(child.stdout.take().unwrap(), log.clone());
        collect(child.stderr.take().unwrap(), log.clone());
        Self {
            child,
            log,
            name: name.to_owned(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains all of `parts`, and returns it.
    pub fn wait_for(&self, parts: &[&str]) -> String {
        self.wait_for_nth(1, parts)
    }

    /// Waits until `count` lines contain all of `parts`, and returns the last of them.
    pub fn wait_for_nth(&self, count: usize, parts: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut log = self.log.lines.lock().unwrap();
        loop {
            let mut found = log
                .lines
                .iter()
                .filter(|line| parts.iter().all(|part| line.contains(part)));
            if let Some(line) = found.nth(count - 1) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || log.ended == 2 {
                let text = log.lines.join("\n");
                drop(log);
                panic!("{}: no line with {parts:?} in its log:\n{text}", self.name);
            }
            log = self.log.grown.wait_timeout(log, left).unwrap().0;
        }
    }

    /// Everything written so far.
    pub fn log(&self) -> String {
        self.log.lines.lock().unwrap().lines.join("\n")
    }

    /// How many lines so far contain all of `parts`.
    pub fn count(&self, parts: &[&str]) -> usize {
        let log = self.log.lines.lock().unwrap();
        let matches = |line: &&String| parts.iter().all(|part| line.contains(part));
        log.lines.iter().filter(matches).count()
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(status.success(), "kill -{name} {}", self.name);
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                panic!("{} doesn't end; its log:\n{}", self.name, self.log());
            }
            pause();
        }
    }

    /// Waits for the process to end by itself; returns its exit code (none after a signal) and
    /// everything that it wrote.
    pub fn finish(&mut self) -> (Option<i32>, String) {
        let code = self.wait().code();
        let deadline = Instant::now() + PATIENCE;
        let mut log = self.log.lines.lock().unwrap();
        while log.ended < 2 {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{}: somebody holds its output", self.name);
            log = self.log.grown.wait_timeout(log, left).unwrap().0;
        }
        (code, log.lines.join("\n"))
    }

    /// Everything that the process wrote before it was killed. A child of its own may hold its
    /// output: that isn't waited for.
    fn last_words(&self) -> String {
        let log = self.log.lines.lock().unwrap();
        let ended = |log: &mut Lines| log.ended < 2;
        let waited = self.log.grown.wait_timeout_while(log, SECOND, ended);
        waited.unwrap().0.lines.join("\n")
    }

    /// Kills the process as `kill -9` does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The resident memory, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        status_number(self.pid(), "VmRSS:") * 1024
    }

    /// The most memory that was ever resident, in bytes.
    pub fn peak_resident_bytes(&self) -> u64 {
        status_number(self.pid(), "VmHWM:") * 1024
    }

    /// The open file descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// The CPU time used so far, user and system together.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // The name in parentheses may contain anything; fields 14 and 15 follow after it.
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..]
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // USER_HZ is 100 on every Linux that Rust runs on.
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}\n---", self.name, self.log());
        } else {
            // Whatever a test is about: this program doesn't panic.
            let log = self.last_words();
            assert!(!log.contains("panicked"), "{}:\n{log}", self.name);
        }
    }
}

fn collect(stream: impl Read + Send + 'static, log: Arc<Log>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            log.lines.lock().unwrap().lines.push(line);
            log.grown.notify_all();
        }
        log.lines.lock().unwrap().ended += 1;
        log.grown.notify_all();
    });
}

fn status_number(pid: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The bytes that wait in the queues of all TCP sockets with one of `ports` at either end, sent
/// and not acknowledged or received and not read.
pub fn bytes_in_sockets(ports: &[u16]) -> u64 {
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).unwrap();
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        // A host may lack IPv6.
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .flat_map(|table| table.lines().skip(1).map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|line| {
            // sl, local_address:port, rem_address:port, state, tx_queue:rx_queue, ...
            let fields: Vec<&str> = line.split_whitespace().collect();
            let is_ours = [fields[1], fields[2]].iter().any(|address| {
                let (_, port) = address.split_once(':').unwrap();
                ports
                    .iter()
                    .any(|ours| u64::from(*ours) == hexadecimal(port))
            });
            let (sent, received) = fields[4].split_once(':').unwrap();
            // A listening socket counts connections there.
            (is_ours && fields[3] == "01").then(|| hexadecimal(sent) + hexadecimal(received))
        })
        .sum()
}

/// A short wait inside a loop that has a deadline.
#[expect(
    clippy::disallowed_methods,
    reason = "polling a process, with a deadline around it"
)]
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// Waits until `condition` holds; fails the test with `what` if it doesn't within `limit`.
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        pause();
    }
}

/// A range of ports that no other test of this machine is likely to use. Below the kernel's
/// ephemeral ports; should one be taken all the same, the server skips it.
pub fn port_range(count: u16) -> RangeInclusive<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test binaries run one after the other, but an old one's sockets may linger, and several
    // checkouts may be tested at once: start somewhere else in each process.
    let base = 10_000 + (std::process::id() % 1_000) as u16 * 18;
    loop {
        let start = base + NEXT.fetch_add(count, Ordering::Relaxed) % 4_000;
        let end = start + count - 1;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if end < 32_000 && (count > 200 || (start..=end).all(free)) {
            return start..=end;
        }
    }
}

/// A running server with its ports.
pub struct Server {
    pub process: Process,
    pub admin: SocketAddr,
    pub tunnel: SocketAddr,
    pub range: RangeInclusive<u16>,
    config: tempfile::TempDir,
}

impl Server {
    /// A server with default settings and a range of 100 ports.
    pub fn start() -> Self {
        Self::with(port_range(100), &[])
    }

    /// A server with a range of ports and settings such as `("http.port_lease", "5s")`.
    pub fn with(range: RangeInclusive<u16>, settings: &[(&str, &str)]) -> Self {
        Self::with_command(Command::new(BINARY).arg("server"), range, settings)
    }

    /// The same, with the binary started by a prepared command, such as a shell that sets limits.
    pub fn with_command(
        command: &mut Command,
        range: RangeInclusive<u16>,
        settings: &[(&str, &str)],
    ) -> Self {
        let mut all = vec![
            ("http.port", "0".to_owned()),
            ("grpc.port", "0".to_owned()),
            ("grpc.host", "127.0.0.1".to_owned()),
            ("http.agent_port_range.start", range.start().to_string()),
            ("http.agent_port_range.end", range.end().to_string()),
        ];
        for (key, value) in settings {
            all.retain(|(known, _)| known != key);
            all.push((key, (*value).to_owned()));
        }
        let environment: Vec<(String, String)> = all
            .into_iter()
            .map(|(key, value)| (variable(key), value))
            .collect();
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        Self::from_process(
            Process::start_command("server", command, &environment),
            range,
        )
    }

    /// A server that was started with its ports left to the kernel.
    pub fn from_process(process: Process, range: RangeInclusive<u16>) -> Self {
        let line = process.wait_for(&["server started"]);
        // Either in lines for people or in lines for machines.
        let json: Option<serde_json::Value> = serde_json::from_str(&line).ok();
        let address = |key: &str| -> SocketAddr {
            if let Some(json) = &json {
                let value = &json[key.trim_end_matches('=')];
                return value.as_str().unwrap().parse().unwrap();
            }
            let rest = &line[line.find(key).unwrap() + key.len()..];
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            admin: address("admin="),
            tunnel: address("tunnel="),
            process,
            range,
            config: tempfile::tempdir().unwrap(),
        }
    }

    /// A directory that lives as long as the server.
    pub fn directory(&self) -> PathBuf {
        self.config.path().to_owned()
    }

    /// The agents as GET /agents lists them: (id, port).
    pub fn agents(&self) -> Vec<(String, u16)> {
        let answer = get(self.admin, "/agents");
        assert_eq!(answer.status, 200, "{}", answer.text());
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        let rows = json["agents"].as_array().unwrap();
        assert_eq!(json["count"], rows.len());
        rows.iter()
            .map(|row| {
                let port = u16::try_from(row["port"].as_u64().unwrap()).unwrap();
                (row["agent_id"].as_str().unwrap().to_owned(), port)
            })
            .collect()
    }

    /// A figure of GET /metrics: the sum over all lines of that name with that text in them.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        get(self.admin, "/metrics")
            .text()
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label))
            .filter(|line| {
                let rest = &line[name.len()..];
                rest.starts_with('{') || rest.starts_with(' ')
            })
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    /// Starts an agent for a service on this host and waits until it is registered.
    pub fn agent(&self, id: &str, service: SocketAddr) -> Agent {
        self.agent_with(id, service, &[])
    }

    /// The same with settings such as `("local.response_timeout", "1s")`.
    pub fn agent_with(&self, id: &str, service: SocketAddr, settings: &[(&str, &str)]) -> Agent {
        let process = self.start_agent(id, &format!("http://{service}"), settings);
        let line = process.wait_for(&["connected", "port="]);
        let rest = &line[line.find("port=").unwrap() + 5..];
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let port = digits.parse().unwrap();
        Agent {
            process,
            id: id.to_owned(),
            port,
        }
    }

    /// Starts an agent without waiting for it.
    pub fn start_agent(&self, id: &str, service: &str, settings: &[(&str, &str)]) -> Process {
        let mut all = vec![
            (
                "SILO_GRPC_SERVER_ADDRESS".to_owned(),
                self.tunnel.to_string(),
            ),
            ("SILO_GRPC_AGENT_ID".to_owned(), id.to_owned()),
            ("SILO_LOCAL_SERVICE_URL".to_owned(), service.to_owned()),
        ];
        for (key, value) in settings {
            all.push((variable(key), (*value).to_owned()));
        }
        let environment: Vec<(&str, &str)> = all
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        Process::start(id, &["agent"], &environment)
    }
}

/// A registered agent.
pub struct Agent {
    pub process: Process,
    pub id: String,
    pub port: u16,
}

impl Agent {
    /// Where visitors reach it.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }
}

/// The environment variable of a setting.
pub fn variable(setting: &str) -> String {
    format!("SILO_{}", setting.replace('.', "_").to_uppercase())
}

/// An HTTP/1.1 answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and header lines, as they came.
    pub head: Vec<u8>,
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The values of a header, in order.
    pub fn header(&self, name: &str) -> Vec<String> {
        let head = String::from_utf8_lossy(&self.head).into_owned();
        head.lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_owned())
            .collect()
    }
}

/// Opens a connection with a time limit on reading.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// GET on a connection of its own.
pub fn get(address: SocketAddr, target: &str) -> Answer {
    request(address, "GET", target, &[], b"")
}

/// A request on a connection of its own.
pub fn request(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut head =
        format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    if !body.is_empty() {
        write!(head, "Content-Length: {}\r\n", body.len()).unwrap();
    }
    head += "\r\n";
    let mut stream = connect(address);
    stream.write_all(head.as_bytes()).unwrap();
    // A server may answer and close before it has read all of the body.
    let _ = stream.write_all(body);
    read_answer(&mut stream, method == "HEAD")
}

/// Reads one answer: by Content-Length, chunks, or to the connection's end. Interim answers are
/// passed over.
pub fn read_answer(stream: &mut impl Read, head_only: bool) -> Answer {
    try_read_answer(stream, head_only).expect("a complete answer")
}

/// The same, or an error if the answer is cut off.
pub fn try_read_answer(stream: &mut impl Read, head_only: bool) -> std::io::Result<Answer> {
    let head = read_head(stream)?;
    let text = String::from_utf8_lossy(&head).into_owned();
    let status: u16 = text
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| std::io::Error::other(format!("no status line: {text:?}")))?;
    if (100..200).contains(&status) && status != 101 {
        return try_read_answer(stream, head_only);
    }
    let mut answer = Answer {
        status,
        head,
        body: Vec::new(),
    };
    if head_only || matches!(status, 101 | 204 | 304) {
        return Ok(answer);
    }
    if answer.header("transfer-encoding") == ["chunked"] {
        loop {
            let size = read_line(stream)?;
            let digits = size.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(digits, 16).map_err(std::io::Error::other)?;
            if size == 0 {
                // Trailers are left in the head for the caller to find.
                loop {
                    let line = read_line(stream)?;
                    if line.is_empty() {
                        return Ok(answer);
                    }
                    answer.head.extend_from_slice(line.as_bytes());
                    answer.head.extend_from_slice(b"\r\n");
                }
            }
            let start = answer.body.len();
            answer.body.resize(start + size, 0);
            stream.read_exact(&mut answer.body[start..])?;
            read_line(stream)?;
        }
    }
    match answer.header("content-length").first() {
        Some(length) => {
            let length = length.parse().map_err(std::io::Error::other)?;
            answer.body.resize(length, 0);
            stream.read_exact(&mut answer.body)?;
        }
        None => {
            stream.read_to_end(&mut answer.body)?;
        }
    }
    Ok(answer)
}

/// Reads a head, up to and including the empty line.
pub fn read_head(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(head)
}

fn read_line(stream: &mut impl Read) -> std::io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    String::from_utf8(line).map_err(std::io::Error::other)
}

/// A service on a port of its own that hands each connection to `serve` on a thread.
pub fn service(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

/// A service that answers each request with a text, keeping connections alive.
pub fn text_service(text: &str) -> SocketAddr {
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    );
    service(move |mut stream| {
        while read_head(&mut stream).is_ok() {
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// A service that answers each request with a text, as [`text_service`] does, but those for
/// `/held` only when the test lets go of them.
pub struct HeldService {
    pub address: SocketAddr,
    arrived: Mutex<mpsc::Receiver<()>>,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl HeldService {
    pub fn start(text: &str) -> Self {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        );
        let (arrive, arrived) = mpsc::channel();
        let gate = Arc::new(Gate::default());
        let shared = gate.clone();
        let address = service(move |mut stream| {
            while let Ok(head) = read_head(&mut stream) {
                if head.starts_with(b"GET /held ") {
                    let _ = arrive.send(());
                    let open = shared.open.lock().unwrap();
                    drop(shared.opened.wait_while(open, |open| !*open).unwrap());
                }
                if stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        });
        Self {
            address,
            arrived: Mutex::new(arrived),
            gate,
        }
    }

    /// Waits until one more request for `/held` has arrived.
    pub fn wait_for_request(&self) {
        let arrived = self.arrived.lock().unwrap();
        arrived.recv_timeout(PATIENCE).expect("a request for /held");
    }

    /// Answers the requests that are held, and all that come.
    pub fn let_go(&self) {
        *self.gate.open.lock().unwrap() = true;
        self.gate.opened.notify_all();
    }
}

/// Whether nobody listens at an address.
pub fn refuses(address: SocketAddr) -> bool {
    match TcpStream::connect(address) {
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
    }
}

/// Runs curl, which must succeed within 20 s; for a test that knows it is there.
pub fn curl(args: &[&str]) -> Output {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20"])
        .args(["--noproxy", "*"])
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "curl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Looks for a program from Debian. Where it is missing the test fails in CI, with the line that
/// installs it, and is passed over elsewhere.
pub fn have(program: &str, package: &str) -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .chain([PathBuf::from("/usr/sbin")])
        .any(|directory| directory.join(program).is_file());
    if !found {
        assert!(
            std::env::var_os("CI").is_none(),
            "{program} is missing: apt-get install {package}"
        );
        eprintln!("passed over, {program} is missing: apt-get install {package}");
    }
    found
}
