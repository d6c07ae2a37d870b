//! `http.state_file`: which agent has which port, kept on disk so that a restart of the server
//! changes nobody's port.
//!
//! ```json
//! {"name": "silo-proxy ports", "version": 1, "written": "2026-05-01T12:00:00Z", "ports": [
//! {"port": 8102, "agent": "agent-3", "state": "released"},
//! {"port": 8100, "agent": "agent-1", "state": "serving"},
//! {"port": 8101, "agent": "agent-2", "state": "leased", "until": "2026-05-01T12:05:00Z"}
//! ]}
//! ```
//! Released ports come first, the longest unused one at the head. Unknown fields are ignored, so
//! that a later version may add some.
//!
//! A thread of its own writes ([`keep`]): whoever changes something only leaves word
//! ([`Signal::changed`]). The file is replaced as a whole, so that whatever kills the process, a
//! reader finds one state or the next, never half of one.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use thiserror::Error;
use tracing::{info, warn};

use crate::ports::{Claim, Remembered};

/// The least time between two writes: what changes within it is written at once, and after a kill
/// that much is forgotten at most.
const INTERVAL: Duration = Duration::from_millis(250);

/// When a write is tried again that failed.
const RETRY: Duration = Duration::from_secs(5);

/// The longest file that is read. 65,535 ports with the longest ids make 9 MiB.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// How many files that weren't ours are kept; the last one's place is used again and again.
const SET_ASIDE: u32 = 9;

/// The end of the year 9999, since 1970.
const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

/// In the file, so that nobody's other file is taken for one of ours.
const NAME: &str = "silo-proxy ports";

/// The only format so far.
const VERSION: u32 = 1;

/// Why a server can't use its state file. Nothing of this is mended by waiting.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// Two servers must not write one file.
    #[error("{} is in use by another server: give each its own", .0.display())]
    Locked(PathBuf),
    /// It can't be read, or its directory can't be written to.
    #[error("{}: {source}", path.display())]
    Unusable {
        /// The file, or the one beside it that made the trouble.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The two clocks of one moment: leases end on the server's own, and are written on the calendar's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    /// On the allocator's clock.
    pub here: Duration,
    /// On the calendar's.
    pub calendar: SystemTime,
}

impl Moment {
    /// When `until` will be on the calendar.
    fn calendar_at(self, until: Duration) -> SystemTime {
        self.calendar
            .checked_add(until.saturating_sub(self.here))
            .unwrap_or(self.calendar)
    }

    /// When `until` will be here; what is over is over now. If somebody has moved the calendar's
    /// clock meanwhile, this is as wrong as that: it is for the allocator to bound it.
    fn here_at(self, until: SystemTime) -> Duration {
        let left = until.duration_since(self.calendar).unwrap_or_default();
        self.here.saturating_add(left)
    }
}

/// What a state file held.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// When it was written.
    pub written: SystemTime,
    /// In the order of [`Allocator::memory`](crate::ports::Allocator::memory).
    pub ports: Vec<Remembered>,
}

/// A state file that is ours alone while this lives.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    /// Locked; the kernel unlocks it when the process ends, however that happens. A file beside
    /// the other one, because that is replaced.
    _lock: File,
}

impl StateFile {
    /// Locks the file, sees that it can be written, and reads what it holds; `None` if there is
    /// none yet. One that isn't ours or is damaged is renamed, and a WARN says so.
    pub(super) fn open(path: &Path, now: Moment) -> Result<(Self, Option<Memory>), StateFileError> {
        // A link stays a link: what it points at is replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let lock_path = beside(&path, ".lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(unusable(&lock_path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StateFileError::Locked(path)),
            Err(error) => return Err(unusable(&lock_path)(error.into())),
        }
        let file = Self { path, _lock: lock };
        let next = file.next_path();
        file.create_next()
            .and_then(|_| fs::remove_file(&next))
            .map_err(unusable(&next))?;

        let held = match read(&file.path) {
            Ok(held) => held,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((file, None)),
            Err(error) => return Err(unusable(&file.path)(error)),
        };
        match held.and_then(|text| parse(&text, now)) {
            Ok(memory) => {
                let ports = memory.ports.len();
                info!(file = %file.path.display(), ports, "ports are remembered");
                Ok((file, Some(memory)))
            }
            Err(fault) => {
                let aside = file.set_aside().map_err(unusable(&file.path))?;
                warn!(
                    file = %file.path.display(),
                    moved_to = %aside.display(),
                    "http.state_file is set aside, no port is remembered: {fault}"
                );
                Ok((file, None))
            }
        }
    }

    /// Replaces the file.
    fn write(&self, text: &str) -> io::Result<()> {
        let mut next = self.create_next()?;
        next.write_all(text.as_bytes())?;
        // Else a power cut could leave the new name with none of the new bytes.
        next.sync_all()?;
        fs::rename(self.next_path(), &self.path)
    }

    /// A new and empty file, into which nobody else looks.
    fn create_next(&self) -> io::Result<File> {
        let path = self.next_path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // "New" includes that it is no link to somewhere else.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
    }

    fn next_path(&self) -> PathBuf {
        beside(&self.path, ".new")
    }

    fn set_aside(&self) -> io::Result<PathBuf> {
        let name = |number: u32| beside(&self.path, &format!(".damaged-{number}"));
        let free = (1..SET_ASIDE).map(name).find(|aside| !aside.exists());
        let aside = free.unwrap_or_else(|| name(SET_ASIDE));
        fs::rename(&self.path, &aside)?;
        Ok(aside)
    }
}

/// Word for the thread that writes, and from it.
#[derive(Debug, Default)]
pub(super) struct Signal {
    flags: Mutex<Flags>,
    /// Wakes whoever waits for one of the flags.
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Flags {
    /// There is something to write.
    changed: bool,
    /// Write what there is, then end.
    stop: bool,
    /// The thread has ended.
    done: bool,
}

impl Signal {
    /// There is something to write. Any number of calls before it is written are one.
    pub(super) fn changed(&self) {
        self.lock().changed = true;
        self.moved.notify_all();
    }

    /// Has the newest state written and the thread end, and waits for that as long as `patience`;
    /// false if it takes longer.
    pub(super) fn finish(&self, patience: Duration) -> bool {
        let mut flags = self.lock();
        flags.stop = true;
        self.moved.notify_all();
        let waited = self
            .moved
            .wait_timeout_while(flags, patience, |flags| !flags.done);
        waited.unwrap_or_else(PoisonError::into_inner).0.done
    }

    /// Waits for something to do; true if it is the last.
    fn wait(&self) -> bool {
        let flags = self.lock();
        let waited = self
            .moved
            .wait_while(flags, |flags| !flags.changed && !flags.stop);
        let mut flags = waited.unwrap_or_else(PoisonError::into_inner);
        flags.changed = false;
        flags.stop
    }

    /// Lets time pass, unless it is to end.
    fn rest(&self, time: Duration) {
        let waited = self
            .moved
            .wait_timeout_while(self.lock(), time, |flags| !flags.stop);
        drop(waited);
    }

    fn lock(&self) -> MutexGuard<'_, Flags> {
        self.flags.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the file as new as `memory` until told to end: the body of a thread. `memory` returns a
/// number that moves when its entries do, the entries, and the moment they are of.
pub(super) fn keep(
    file: &StateFile,
    signal: &Signal,
    memory: impl Fn() -> (u64, Vec<Remembered>, Moment),
) {
    let mut written = None;
    let mut failing = false;
    loop {
        let last = signal.wait();
        let (revision, ports, now) = memory();
        if written != Some(revision) {
            match file.write(&format(&ports, now)) {
                Ok(()) => {
                    written = Some(revision);
                    if std::mem::take(&mut failing) {
                        info!(file = %file.path.display(), "http.state_file is written again");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(
                            file = %file.path.display(),
                            %error,
                            "http.state_file can't be written: a restart would forget who has \
                             which port"
                        );
                    }
                    signal.changed();
                }
            }
        }
        if last {
            break;
        }
        signal.rest(if failing { RETRY } else { INTERVAL });
    }
    signal.lock().done = true;
    signal.moved.notify_all();
}

/// Why a file isn't a state file.
#[derive(Debug, PartialEq, Eq, Error)]
pub(super) enum Fault {
    #[error("it is longer than any state file")]
    TooLong,
    #[error("it is no state file of this program ({0})")]
    Damaged(String),
    #[error("it is a state file of version {0}, and this program reads version {VERSION}")]
    Version(u32),
}

/// The text of a file, or why it can't be one of ours.
fn read(path: &Path) -> io::Result<Result<String, Fault>> {
    // To read from a pipe would wait for ever.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Ok(Err(Fault::TooLong));
    }
    Ok(String::from_utf8(bytes).map_err(|error| Fault::Damaged(error.to_string())))
}

#[derive(Deserialize)]
struct Head {
    name: String,
    version: u32,
}

#[derive(Deserialize)]
struct Document {
    written: String,
    ports: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    port: u16,
    agent: String,
    state: EntryState,
    until: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum EntryState {
    Serving,
    Leased,
    Released,
}

/// Reads the text of a file.
pub(super) fn parse(text: &str, now: Moment) -> Result<Memory, Fault> {
    fn damaged(error: impl ToString) -> Fault {
        Fault::Damaged(error.to_string())
    }
    let head: Head = serde_json::from_str(text).map_err(damaged)?;
    if head.name != NAME {
        return Err(damaged("another name"));
    }
    if head.version != VERSION {
        return Err(Fault::Version(head.version));
    }
    let document: Document = serde_json::from_str(text).map_err(damaged)?;
    let mut ports = Vec::with_capacity(document.ports.len());
    for entry in document.ports {
        let claim = match entry.state {
            EntryState::Serving => Claim::Serving,
            EntryState::Released => Claim::Released,
            EntryState::Leased => {
                let until = entry.until.ok_or_else(|| damaged("a lease without end"))?;
                let until = humantime::parse_rfc3339(&until).map_err(damaged)?;
                Claim::Leased {
                    until: now.here_at(until),
                }
            }
        };
        ports.push(Remembered {
            port: entry.port,
            agent: entry.agent.parse().map_err(damaged)?,
            claim,
        });
    }
    Ok(Memory {
        written: humantime::parse_rfc3339(&document.written).map_err(damaged)?,
        ports,
    })
}

/// The text of a file.
pub(super) fn format(ports: &[Remembered], now: Moment) -> String {
    let written = rfc3339(now.calendar);
    let mut text = format!(
        "{{\"name\": \"{NAME}\", \"version\": {VERSION}, \"written\": \"{written}\", \"ports\": ["
    );
    for (number, entry) in ports.iter().enumerate() {
        let Remembered { port, agent, claim } = entry;
        let comma = if number > 0 { "," } else { "" };
        let state = match claim {
            Claim::Serving => "serving",
            Claim::Leased { .. } => "leased",
            Claim::Released => "released",
        };
        // Nothing in an agent's id needs to be escaped. Writing to a `String` can't fail.
        let _ = write!(
            text,
            "{comma}\n{{\"port\": {port}, \"agent\": \"{agent}\", \"state\": \"{state}\""
        );
        if let Claim::Leased { until } = claim {
            let until = rfc3339(now.calendar_at(*until));
            let _ = write!(text, ", \"until\": \"{until}\"");
        }
        text.push('}');
    }
    text.push_str("\n]}\n");
    text
}

/// A time as RFC 3339 writes it. A clock that stands outside of what can be written, before 1970
/// or after 9999, counts as standing at 1970.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let writable = Some(since).filter(|since| *since < LAST_SECOND);
    humantime::format_rfc3339_millis(UNIX_EPOCH + writable.unwrap_or_default()).to_string()
}

/// The name with something added at its end.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn unusable(path: &Path) -> impl FnOnce(io::Error) -> StateFileError {
    let path = path.to_owned();
    move |source| StateFileError::Unusable { path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;

    use super::*;

    fn now() -> Moment {
        Moment {
            here: Duration::from_secs(100),
            calendar: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        }
    }

    fn entry(port: u16, agent: &str, claim: Claim) -> Remembered {
        let agent = agent.parse().unwrap();
        Remembered { port, agent, claim }
    }

    fn some() -> Vec<Remembered> {
        let until = now().here + Duration::from_secs(30);
        vec![
            entry(8102, "gone", Claim::Released),
            entry(8100, "here", Claim::Serving),
            entry(8101, "away", Claim::Leased { until }),
        ]
    }

    fn open(path: &Path) -> (StateFile, Option<Memory>) {
        StateFile::open(path, now()).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        for ports in [Vec::new(), some()] {
            let written = now().calendar;
            let memory = parse(&format(&ports, now()), now());
            assert_eq!(memory, Ok(Memory { written, ports }));
        }
        let text = format(&some(), now());
        assert!(
            text.contains(
                r#"{"port": 8101, "agent": "away", "state": "leased", "until": "2023-11-14T22:13:50.000Z"}"#
            ),
            "{text}"
        );
    }

    #[test]
    fn leases_are_kept_on_the_calendar() {
        let text = format(&some(), now());
        let lease = |here, passed| {
            let later = Moment {
                here: Duration::from_secs(here),
                calendar: now().calendar + Duration::from_secs(passed),
            };
            match parse(&text, later).unwrap().ports[2].claim {
                Claim::Leased { until } => until.as_secs(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(lease(0, 10), 20);
        assert_eq!(lease(7, 29), 8);
        // Over, for a second or for years: over now.
        assert_eq!(lease(7, 31), 7);
        assert_eq!(lease(7, 1_000_000_000), 7);
        // The clock was set back by a day: the allocator bounds it.
        let earlier = Moment {
            calendar: now().calendar - Duration::from_secs(86_400),
            ..now()
        };
        assert_eq!(parse(&text, earlier).unwrap().ports.len(), 3);
    }

    #[test]
    fn a_clock_far_off_does_no_harm() {
        let centuries = |count: u32| count * Duration::from_secs(36_525 * 86_400);
        for calendar in [
            UNIX_EPOCH - Duration::from_secs(1),
            UNIX_EPOCH - centuries(10),
            UNIX_EPOCH + centuries(100),
        ] {
            let here = Duration::ZERO;
            let text = format(&some(), Moment { here, calendar });
            assert_eq!(parse(&text, now()).unwrap().ports.len(), 3, "{text}");
        }
    }

    #[test]
    fn what_isnt_a_state_file_is_told_apart() {
        let good = format(&some(), now());
        assert!(parse(&good, now()).is_ok());
        let later = good.replace("\"version\": 1", "\"version\": 2, \"what\": [1]");
        assert_eq!(parse(&later, now()), Err(Fault::Version(2)));
        let more = good.replace("\"port\": 8100,", "\"port\": 8100, \"colour\": \"red\",");
        assert!(parse(&more, now()).is_ok(), "unknown fields are ignored");
        for damaged in [
            String::new(),
            "http:\n  port: 1\n".into(),
            good[..good.len() / 2].into(),
            good.replace(NAME, "another"),
            good.replace("8100", "81000"),
            good.replace("here", "Not An Id"),
            good.replace("serving", "flying"),
            good.replace("until", "untill"),
            good.replace("2023-", "20x3-"),
        ] {
            let parsed = parse(&damaged, now());
            assert!(matches!(parsed, Err(Fault::Damaged(_))), "{damaged}");
        }
    }

    #[test]
    fn a_file_is_replaced_and_nobody_else_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.json");
        let (file, nothing) = open(&path);
        assert_eq!(nothing, None);
        // What a killed process may have left behind.
        fs::write(file.next_path(), "half").unwrap();
        file.write(&format(&[], now())).unwrap();
        file.write(&format(&some(), now())).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!file.next_path().exists());
        drop(file);
        assert_eq!(open(&path).1.unwrap().ports, some());
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_not_too_many_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.json");
        for round in 1..=2 * SET_ASIDE {
            fs::write(&path, format!("rubbish {round}")).unwrap();
            assert_eq!(open(&path).1, None);
            assert!(!path.exists());
        }
        let kept =
            |number: u32| fs::read_to_string(beside(&path, &format!(".damaged-{number}"))).unwrap();
        assert_eq!(kept(1), "rubbish 1");
        assert_eq!(kept(SET_ASIDE), format!("rubbish {}", 2 * SET_ASIDE));
        // And the lock.
        let files = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(files, SET_ASIDE as usize + 1);

        let long = File::create(&path).unwrap();
        long.set_len(MAX_BYTES + 1).unwrap();
        assert_eq!(open(&path).1, None);
    }

    #[test]
    fn a_file_is_for_one_server() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.json");
        let first = open(&path);
        let second = StateFile::open(&path, now()).unwrap_err();
        assert!(matches!(second, StateFileError::Locked(_)), "{second}");
        drop(first);
        open(&path);
    }

    #[test]
    fn what_cannot_be_used_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        for path in [
            directory.path().join("no/ports.json"),
            directory.path().into(),
        ] {
            let error = StateFile::open(&path, now()).unwrap_err();
            assert!(matches!(error, StateFileError::Unusable { .. }), "{error}");
        }
    }

    #[test]
    fn a_link_stays_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let (link, path) = (
            directory.path().join("link.json"),
            directory.path().join("ports.json"),
        );
        fs::write(&path, format(&some(), now())).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (file, memory) = open(&link);
        assert_eq!(memory.unwrap().ports.len(), 3);
        file.write(&format(&[], now())).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        drop(file);
        assert_eq!(open(&path).1.unwrap().ports, []);
    }

    #[test]
    fn the_newest_state_is_written_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.json");
        let signal = Arc::new(Signal::default());
        let state = Arc::new(Mutex::new((0, Vec::new())));
        let file = open(&path).0;
        let thread = std::thread::spawn({
            let (signal, state) = (signal.clone(), state.clone());
            move || {
                keep(&file, &signal, || {
                    let (revision, ports) = state.lock().unwrap().clone();
                    (revision, ports, now())
                });
            }
        });
        for port in 8100..8200 {
            let mut state = state.lock().unwrap();
            state.0 += 1;
            state
                .1
                .push(entry(port, &format!("agent-{port}"), Claim::Serving));
            drop(state);
            signal.changed();
        }
        assert!(signal.finish(Duration::from_secs(20)));
        thread.join().unwrap();
        assert_eq!(open(&path).1.unwrap().ports.len(), 100);
    }
}
