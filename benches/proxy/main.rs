//! What a request costs, end to end on this host: through a server and an agent (`proxy/...`),
//! straight to the service (`direct/...`), and through a plain reverse proxy of one process
//! (`hop/...`). All three are measured in one run and in turn, so that their ratios hold where
//! the figures themselves don't.
//!
//! | Name | What it is | One element |
//! | --- | --- | --- |
//! | `small/N` | answers of 34 bytes, on N connections that are kept | a request |
//! | `connect/64` | the same with a new connection each, 64 at once | a request |
//! | `down/SIZE`, `up/SIZE` | a body of that size in the answer or in the request | its bytes |
//! | `beside_bulk/1` | small answers one by one, beside four downloads at 60 MB/s each | a request |
//!
//! Server (with one worker), agent, service, hop and load have a thread each.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench talks to whoever runs it"
)]

mod load;
mod targets;

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};

use load::{Background, Load};
use targets::{Target, Targets};

/// What the `silo-proxy` program uses.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const MIB: u64 = 1024 * 1024;

/// Connections of the load that opens a new one for each request.
const AT_ONCE: usize = 64;

fn end_to_end(criterion: &mut Criterion) {
    silo_proxy::net::raise_descriptor_limit().unwrap();
    let targets = Targets::start();
    let load = Load::new();
    for connections in [1, 64, 512] {
        for target in targets.all() {
            small(criterion, &load, target, connections);
        }
    }
    for target in targets.all() {
        connect(criterion, &load, target);
    }
    for size in [1, 64] {
        for target in targets.all() {
            down(criterion, &load, target, size);
        }
        for target in targets.all() {
            up(criterion, &load, target, size);
        }
    }
    for target in targets.all() {
        beside_bulk(criterion, &load, target);
    }
}

fn small(criterion: &mut Criterion, load: &Load, target: Target, connections: usize) {
    let mut group = group(criterion, target, "small");
    group.throughput(Throughput::Elements(1));
    let mut open = load.open(target.address, connections);
    group.bench_function(BenchmarkId::from_parameter(connections), |bencher| {
        bencher.iter_custom(|requests| load.small(&mut open, requests));
    });
}

fn connect(criterion: &mut Criterion, load: &Load, target: Target) {
    let mut group = group(criterion, target, "connect");
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::from_parameter(AT_ONCE), |bencher| {
        bencher.iter_custom(|requests| load.connect(target.address, AT_ONCE, requests));
    });
}

fn down(criterion: &mut Criterion, load: &Load, target: Target, mib: u64) {
    let mut group = group(criterion, target, "down");
    group.throughput(Throughput::Bytes(mib * MIB));
    let mut open = load.open(target.address, 1);
    group.bench_function(format!("{mib}MiB"), |bencher| {
        bencher.iter_custom(|times| load.down(&mut open[0], mib * MIB, times));
    });
}

fn up(criterion: &mut Criterion, load: &Load, target: Target, mib: u64) {
    let mut group = group(criterion, target, "up");
    group.throughput(Throughput::Bytes(mib * MIB));
    let mut open = load.open(target.address, 1);
    group.bench_function(format!("{mib}MiB"), |bencher| {
        bencher.iter_custom(|times| load.up(&mut open[0], mib * MIB, times));
    });
}

fn beside_bulk(criterion: &mut Criterion, load: &Load, target: Target) {
    let mut group = group(criterion, target, "beside_bulk");
    group.throughput(Throughput::Elements(1));
    let mut open = load.open(target.address, 1);
    let downloads = Background::downloads(target.address, 4);
    group.bench_function(BenchmarkId::from_parameter(1), |bencher| {
        bencher.iter_custom(|requests| load.small(&mut open, requests));
    });
    downloads.stop();
}

fn group<'a>(
    criterion: &'a mut Criterion,
    target: Target,
    kind: &str,
) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(format!("{}/{kind}", target.name));
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    group
}

criterion_group!(benches, end_to_end);
criterion_main!(benches);
