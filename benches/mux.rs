//! What the protocol core costs without any I/O: two sessions that hand each other their frames.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench that goes wrong has to say so"
)]

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use prost::Message as _;
use silo_proxy::head::{Lines, LinesBuilder, RequestHead, ResponseHead};
use silo_proxy::id::ExchangeId;
use silo_proxy::mux::{BATCH_BYTES, Budget, Config, Frame, HeadRead, Key, Pool, Read, Session};
use silo_proxy::wire::{AgentMessage, Frames as _};

const NOW: Duration = Duration::ZERO;

const MIB: usize = 1024 * 1024;

/// What one bulk run carries.
const BULK: usize = 64 * MIB;

/// A piece of a bulk body, as a read from a socket gives it.
const PIECE: &[u8] = &[0; 16 * 1024];

struct Pair {
    opener: Session,
    acceptor: Session,
    frames: Vec<Frame>,
}

impl Pair {
    fn new() -> Self {
        let config = Config {
            max_exchanges: 16 * 1024,
            heartbeat_interval: Duration::from_secs(10),
            heartbeat_timeout: Duration::from_secs(30),
        };
        let budget = || Budget::new(Pool::new(4096 * MIB), 4096 * MIB);
        Self {
            opener: Session::opener(config, budget(), NOW),
            acceptor: Session::acceptor(config, budget(), NOW),
            frames: Vec::new(),
        }
    }

    fn requests(&mut self) {
        transfer(&mut self.opener, &mut self.acceptor, &mut self.frames);
    }

    fn answers(&mut self) {
        transfer(&mut self.acceptor, &mut self.opener, &mut self.frames);
    }

    /// Requests on their way at once, each answered in full, and read.
    fn cycle(&mut self, open: &mut Vec<Key>, count: usize, request: &RequestHead, answer: &Answer) {
        open.extend((0..count).map(|_| self.opener.open(request.clone(), false).unwrap()));
        self.requests();
        while let Some((key, head)) = self.acceptor.accept() {
            black_box(head);
            self.acceptor.answer(key, answer.head.clone());
            self.acceptor.send(key, answer.body.clone()).unwrap();
            self.acceptor.finish(key, None);
            self.acceptor.release(key);
        }
        self.answers();
        for key in open.drain(..) {
            let HeadRead::Answer(head) = self.opener.read_head(key) else {
                panic!("no answer")
            };
            black_box(head);
            let Read::Data(body) = self.opener.read(key) else {
                panic!("no body")
            };
            black_box(body);
            assert_eq!(self.opener.read(key), Read::End(None));
            self.opener.release(key);
        }
    }

    /// One large answer in so many exchanges, written and read as fast as credit allows.
    fn bulk(&mut self, exchanges: usize, request: &RequestHead, answer: &Answer) {
        let readers: Vec<_> = (0..exchanges)
            .map(|_| self.opener.open(request.clone(), false).unwrap())
            .collect();
        self.requests();
        let mut writers = Vec::new();
        while let Some((key, _)) = self.acceptor.accept() {
            self.acceptor.answer(key, answer.head.clone());
            writers.push((key, BULK / exchanges));
        }
        let mut received = 0;
        while received < BULK {
            for (key, left) in &mut writers {
                while *left > 0 && self.acceptor.capacity(*key).unwrap() > 0 {
                    let piece = Bytes::from_static(PIECE);
                    *left -= piece.len();
                    self.acceptor.send(*key, piece).unwrap();
                }
            }
            self.answers();
            for key in &readers {
                while let Read::Data(piece) = self.opener.read(*key) {
                    received += black_box(piece).len();
                }
            }
            self.requests();
        }
        for (key, _) in writers {
            self.acceptor.finish(key, None);
            self.acceptor.release(key);
        }
        self.answers();
        for key in readers {
            assert_eq!(self.opener.read(key), Read::End(None));
            self.opener.release(key);
        }
        assert!(self.opener.is_empty() && self.acceptor.is_empty());
    }
}

/// Everything one end has to say, in batches; events are taken as whoever wakes tasks takes them.
fn transfer(from: &mut Session, to: &mut Session, frames: &mut Vec<Frame>) {
    while from.wants_transmit() {
        from.transmit(NOW, BATCH_BYTES, frames);
        while from.poll_event().is_some() {}
        for frame in frames.drain(..) {
            to.receive(frame, NOW).unwrap();
        }
        while to.poll_event().is_some() {}
    }
}

struct Answer {
    head: ResponseHead,
    body: Bytes,
}

fn lines(fields: &[(&str, &str)]) -> Lines {
    let mut builder = LinesBuilder::default();
    for (name, value) in fields {
        builder.push(name.as_bytes(), value.as_bytes()).unwrap();
    }
    builder.finish()
}

/// A request as a load generator makes it.
fn request() -> RequestHead {
    RequestHead {
        method: Bytes::from_static(b"GET"),
        target: Bytes::from_static(b"/index.html"),
        lines: lines(&[
            ("host", "127.0.0.1:8100"),
            ("user-agent", "wrk/4.2.0"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-proto", "http"),
            ("x-request-id", "0123456789abcdef0123456789abcdef"),
        ]),
    }
}

/// The small answer of the comparison with other proxies.
fn answer() -> Answer {
    Answer {
        head: ResponseHead {
            status: 200,
            lines: lines(&[
                ("server", "nginx"),
                ("date", "Sun, 22 Nov 2026 22:00:00 GMT"),
                ("content-type", "text/plain"),
                ("content-length", "34"),
            ]),
        },
        body: Bytes::from_static(&[b'x'; 34]),
    }
}

fn pair(c: &mut Criterion) {
    let (request, answer) = (request(), answer());
    let mut group = c.benchmark_group("mux/pair");
    for count in [1, 100, 10_000] {
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            let mut pair = Pair::new();
            let mut open = Vec::new();
            b.iter(|| pair.cycle(&mut open, count, &request, &answer));
        });
    }
    group.finish();
}

fn bulk(c: &mut Criterion) {
    let (request, answer) = (request(), answer());
    let mut group = c.benchmark_group("mux/bulk");
    for exchanges in [1, 8] {
        group.throughput(Throughput::Bytes(BULK as u64));
        group.bench_function(BenchmarkId::from_parameter(exchanges), |b| {
            let mut pair = Pair::new();
            b.iter(|| pair.bulk(exchanges, &request, &answer));
        });
    }
    group.finish();
}

/// Frames as messages: what the wire adds to the core. 64 small answers travel in one message.
fn frames(c: &mut Criterion) {
    const COUNT: u32 = 64;
    let Answer { head, body } = answer();
    let batch: Vec<Frame> = (0..COUNT)
        .map(|slot| Frame::Answer {
            id: ExchangeId {
                slot,
                generation: 7,
            },
            head: head.clone(),
            body: body.clone(),
            end: true,
        })
        .collect();
    let encoded = Bytes::from(AgentMessage::from(batch.clone()).encode_to_vec());
    let mut group = c.benchmark_group("mux/frames");
    group.throughput(Throughput::Elements(COUNT.into()));
    group.bench_function("encode", |b| {
        b.iter(|| AgentMessage::from(black_box(batch.clone())).encode_to_vec());
    });
    group.bench_function("decode", |b| {
        b.iter(|| {
            let message = AgentMessage::decode(black_box(encoded.clone())).unwrap();
            message.into_frames().map(Result::unwrap).for_each(|frame| {
                black_box(frame);
            });
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(30);
    targets = frames, pair, bulk
}
criterion_main!(benches);
