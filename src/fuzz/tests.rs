//! The corpora, replayed: as they are, and with a fixed number of mutations that look random.

use std::path::{Path, PathBuf};
use std::{env, fs, thread};

use super::seeds::{self, Seed};
use crate::{agent, config, grpc, http1, mux, ports, server, wire};

#[test]
fn frames() {
    replay("frames", wire::fuzz::frames, seeds::frames(), 400);
}

#[test]
fn session() {
    replay("session", mux::fuzz::session, seeds::session(), 40);
}

#[test]
fn ports() {
    replay("ports", ports::fuzz, seeds::ports(), 60);
}

#[test]
fn tunnel() {
    replay("tunnel", grpc::fuzz::call, seeds::tunnel(), 400);
}

#[test]
fn http1() {
    replay("http1", http1::fuzz::messages, seeds::http1(), 200);
}

#[test]
fn http2() {
    let target = |data: &[u8]| server::fuzz::requests(data, agent::fuzz::written);
    replay("http2", target, seeds::http2(), 200);
}

#[test]
fn http2_answers() {
    let target = |data: &[u8]| agent::fuzz::answers(data, server::fuzz::answered);
    replay("http2-answers", target, seeds::http2_answers(), 200);
}

#[test]
fn config() {
    replay("config", config::fuzz::settings, seeds::config(), 8);
}

/// Every file of a target's corpus, and so many mutations of each.
fn replay(name: &str, target: fn(&[u8]), seeds: Vec<Seed>, mutations: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/corpus")
        .join(name);
    check_seeds(&folder, &seeds);
    let mut files: Vec<PathBuf> = (fs::read_dir(&folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(
        files.len() >= 24,
        "{} has {}",
        folder.display(),
        files.len()
    );
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (file, input) in files.iter().zip(&corpus) {
        Trial(file, input).of(target);
        for _ in 0..mutations {
            let mut mutant = input.clone();
            for _ in 0..=random.below(4) {
                random.mutate(&mut mutant, &corpus);
            }
            Trial(file, &mutant).of(target);
        }
    }
}

/// The seeds are made here, so that it can be read what they are; what fuzzers found lies beside
/// them. `UPDATE=1 cargo test --lib fuzz` writes them anew.
fn check_seeds(folder: &Path, seeds: &[Seed]) {
    let update = env::var_os("UPDATE").is_some();
    if update {
        fs::create_dir_all(folder).unwrap();
    }
    for (name, bytes) in seeds {
        let file = folder.join(name);
        if update {
            fs::write(&file, bytes).unwrap();
        }
        let there = fs::read(&file).unwrap_or_default();
        assert!(there == *bytes, "{} is out of date", file.display());
    }
}

/// One input, which is told if it makes the target panic.
struct Trial<'a>(&'a Path, &'a [u8]);

impl Trial<'_> {
    fn of(self, target: fn(&[u8])) {
        target(self.1);
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let Self(file, input) = self;
            let input = input.escape_ascii();
            eprintln!("the input, made of {}: b\"{input}\"", file.display());
        }
    }
}

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() >> 33) as usize % count.max(1)
    }

    /// One change of those that fuzzers make.
    fn mutate(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let end = at + self.below((bytes.len() - at).min(16) + 1);
        match self.below(7) {
            0 => {
                bytes.drain(at..end);
            }
            1 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            2 => bytes.insert(at, self.next() as u8),
            3 => {
                const TELLING: &[u8] = b"\0\x01\x7f\x80\xff\r\n :;,0-{[\"'#&*";
                let byte = TELLING[self.below(TELLING.len())];
                match bytes.get_mut(at) {
                    Some(old) => *old = byte,
                    None => bytes.push(byte),
                }
            }
            4 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            5 => bytes.truncate(at),
            _ => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
}
