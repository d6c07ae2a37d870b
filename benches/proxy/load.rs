//! The load: as many requests as the other side answers, on one thread.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

const GET_SMALL: &[u8] = b"GET /small HTTP/1.1\r\nHost: bench\r\n\r\n";
const GET_SMALL_ONCE: &[u8] = b"GET /small HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";

/// What is read or written at once.
const CHUNK: usize = 256 * 1024;

/// A large download in the background.
const BULK: u64 = 64 * 1024 * 1024;

/// How fast it is taken: 60 MB a second, every few milliseconds a piece.
const BULK_PIECE: u64 = 300_000;
const BULK_INTERVAL: Duration = Duration::from_millis(5);

/// The thread that asks is the one that calls; each method says how long it took.
pub(crate) struct Load(Runtime);

impl Load {
    pub(crate) fn new() -> Self {
        Self(runtime())
    }

    /// Connections on which one request has been answered already.
    pub(crate) fn open(&self, address: SocketAddr, count: usize) -> Vec<Connection> {
        self.0.block_on(async {
            let mut connections = Vec::new();
            for _ in 0..count {
                let mut connection = Connection::open(address).await.unwrap();
                connection.small(GET_SMALL).await.unwrap();
                connections.push(connection);
            }
            connections
        })
    }

    /// Small requests, shared out among the connections as each becomes free.
    pub(crate) fn small(&self, connections: &mut Vec<Connection>, requests: u64) -> Duration {
        self.0.block_on(async {
            let left = Arc::new(AtomicU64::new(requests));
            let mut visitors = JoinSet::new();
            let started = Instant::now();
            for mut connection in connections.drain(..) {
                let left = left.clone();
                visitors.spawn(async move {
                    while take_one(&left) {
                        connection.small(GET_SMALL).await.unwrap();
                    }
                    connection
                });
            }
            while let Some(connection) = visitors.join_next().await {
                connections.push(connection.unwrap());
            }
            started.elapsed()
        })
    }

    /// Small requests on a new connection each, `at_once` of them at a time.
    pub(crate) fn connect(&self, address: SocketAddr, at_once: usize, requests: u64) -> Duration {
        self.0.block_on(async {
            let left = Arc::new(AtomicU64::new(requests));
            let mut visitors = JoinSet::new();
            let started = Instant::now();
            for _ in 0..at_once {
                let left = left.clone();
                visitors.spawn(async move {
                    while take_one(&left) {
                        let mut connection = Connection::open(address).await.unwrap();
                        connection.small(GET_SMALL_ONCE).await.unwrap();
                    }
                });
            }
            visitors.join_all().await;
            started.elapsed()
        })
    }

    /// Answers with a body of that size, one after the other.
    pub(crate) fn down(&self, connection: &mut Connection, size: u64, times: u64) -> Duration {
        self.0.block_on(async {
            let started = Instant::now();
            for _ in 0..times {
                connection.ask(size).await.unwrap();
                connection.take(size).await.unwrap();
            }
            started.elapsed()
        })
    }

    /// Requests with a body of that size, one after the other.
    pub(crate) fn up(&self, connection: &mut Connection, size: u64, times: u64) -> Duration {
        self.0.block_on(async {
            let started = Instant::now();
            for _ in 0..times {
                connection.give(size).await.unwrap();
            }
            started.elapsed()
        })
    }
}

fn take_one(left: &AtomicU64) -> bool {
    // One thread: nobody comes in between.
    let now = left.load(Ordering::Relaxed);
    left.store(now.saturating_sub(1), Ordering::Relaxed);
    now > 0
}

/// Load beside the one that is measured, on a thread of its own.
pub(crate) struct Background {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Background {
    /// Large downloads, again and again.
    pub(crate) fn downloads(address: SocketAddr, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let mut downloads = JoinSet::new();
                for _ in 0..count {
                    downloads.spawn(download(address, stopped.clone()));
                }
                downloads.join_all().await;
            });
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

async fn download(address: SocketAddr, stopped: Arc<AtomicBool>) {
    let mut connection = Connection::open(address).await.unwrap();
    let mut beat = tokio::time::interval(BULK_INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        connection.ask(BULK).await.unwrap();
        let mut left = BULK;
        while left > 0 {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            beat.tick().await;
            let piece = left.min(BULK_PIECE);
            connection.take(piece).await.unwrap();
            left -= piece;
        }
    }
}

/// A connection to the service, over whichever way.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// The bytes of a body that came with its head.
    ready: u64,
}

impl Connection {
    async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::with_capacity(4096),
            ready: 0,
        })
    }

    async fn small(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
        let length = self.head().await?;
        self.take(length).await?;
        assert_eq!(self.ready, 0, "more came than the answer");
        Ok(())
    }

    async fn ask(&mut self, size: u64) -> io::Result<()> {
        let request = format!("GET /bytes/{size} HTTP/1.1\r\nHost: bench\r\n\r\n");
        self.stream.write_all(request.as_bytes()).await?;
        assert_eq!(self.head().await?, size);
        Ok(())
    }

    async fn give(&mut self, size: u64) -> io::Result<()> {
        let request =
            format!("POST /sink HTTP/1.1\r\nHost: bench\r\nContent-Length: {size}\r\n\r\n");
        self.stream.write_all(request.as_bytes()).await?;
        let mut left = size as usize;
        while left > 0 {
            let piece = &ZEROS[..left.min(CHUNK)];
            left -= self.stream.write(piece).await?;
        }
        let length = self.head().await?;
        self.take(length).await
    }

    /// Reads a head and returns the length of its body.
    async fn head(&mut self) -> io::Result<u64> {
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let Some(end) = find(&self.buffer, b"\r\n\r\n") else {
                continue;
            };
            let (head, body) = self.buffer.split_at(end + 4);
            assert!(
                head.starts_with(b"HTTP/1.1 200 "),
                "{}",
                head.escape_ascii()
            );
            self.ready = body.len() as u64;
            return Ok(content_length(head));
        }
    }

    /// Reads so many bytes of a body.
    async fn take(&mut self, count: u64) -> io::Result<()> {
        let ready = self.ready.min(count);
        self.ready -= ready;
        let mut left = (count - ready) as usize;
        if left == 0 {
            return Ok(());
        }
        self.buffer.resize(CHUNK, 0);
        while left > 0 {
            let room = left.min(CHUNK);
            match self.stream.read(&mut self.buffer[..room]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => left -= count,
            }
        }
        Ok(())
    }
}

pub(crate) static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// The value of `Content-Length`; 0 without one.
pub(crate) fn content_length(head: &[u8]) -> u64 {
    let name = b"\r\ncontent-length: ";
    let at = head
        .windows(name.len())
        .position(|window| window.eq_ignore_ascii_case(name));
    at.map_or(0, |at| {
        head[at + name.len()..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .fold(0, |value, digit| value * 10 + u64::from(digit - b'0'))
    })
}

pub(crate) fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}
