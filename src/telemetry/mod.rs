//! Logging: lines for people or for machines, on standard error.
//!
//! Nobody who logs waits for whoever reads: lines go through a [`Spool`], and where they can't be
//! written as fast as they come, some are dropped and counted.

mod spool;
mod throttle;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{Level, enabled, error, warn};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::metrics::PANICS;

pub use spool::{LogFile, Output, Report, Spool, Stderr, Stdout};
pub use throttle::{Throttle, Told, Who, may_say};

/// How many bytes of lines may wait to be written: more than all agents of a full host write when
/// they go and come back at once.
const QUEUE: usize = 4 * 1024 * 1024;

/// How long the process's end may wait for its last lines: a pipe that nobody reads must not
/// keep it.
const FLUSH: Duration = Duration::from_secs(1);

/// Crates below this one. Their `info` is our `trace`: they log every connection and stream, so
/// they stay at `warn` unless a directive names them.
const QUIET: [&str; 6] = ["h2", "hyper", "hyper_util", "mio", "rustls", "tower"];

/// What is logged: a level, or directives in the manner of `RUST_LOG`, separated by commas, such
/// as `info,silo_proxy::mux=trace`.
///
/// It has been checked: [`init`] takes it as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(String);

/// Why a text is no [`Filter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "expected off, error, warn, info, debug or trace, or directives such as info,silo_proxy::mux=trace"
)]
pub struct InvalidFilter;

impl Filter {
    /// The directives as they were written, without blanks between them.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directives with the crates below at `warn` unless they are named.
    fn quieted(&self) -> String {
        let named = |target: &str| {
            self.0.split(',').any(|directive| {
                let directive = directive.trim();
                directive
                    .strip_prefix(target)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['=', ':', '[']))
            })
        };
        let mut all: String = QUIET
            .into_iter()
            .filter(|target| !named(target))
            .map(|target| format!("{target}=warn,"))
            .collect();
        all.push_str(&self.0);
        all
    }
}

impl Default for Filter {
    /// `info`: the life of agents, and what an operator should know.
    fn default() -> Self {
        Self("info".into())
    }
}

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(text: &str) -> Result<Self, InvalidFilter> {
        let words: Vec<&str> = text.split(',').map(str::trim).collect();
        for word in &words {
            // The library takes a misspelt level for a target of that name, and logs nothing.
            let bare = !word.contains(['=', '[', ']', '}', '"']);
            if word.is_empty() || bare && word.parse::<LevelFilter>().is_err() {
                return Err(InvalidFilter);
            }
        }
        let text = words.join(",");
        EnvFilter::builder().parse(&text).or(Err(InvalidFilter))?;
        Ok(Self(text))
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people: time, level, target, message, `name=value`.
    #[default]
    Text,
    /// For machines: one JSON object a line with `timestamp`, `level`, `target`, `message` and the
    /// fields.
    Json,
}

impl Format {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Why a text is no [`Format`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("expected text or json")]
pub struct InvalidFormat;

impl FromStr for Format {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        [Self::Text, Self::Json]
            .into_iter()
            .find(|format| format.as_str() == text)
            .ok_or(InvalidFormat)
    }
}

/// Why logging could not be started.
#[derive(Debug, Error)]
pub enum InitError {
    /// The thread that writes could not be started.
    #[error("cannot start logging: {0}")]
    Thread(#[from] io::Error),
    /// Logging was started before.
    #[error("cannot start logging: {0}")]
    Twice(#[from] TryInitError),
}

/// The process's log, to change what goes there.
#[derive(Debug, Clone)]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Telemetry {
    /// Logs what `filter` says from now on.
    pub fn set_filter(&self, filter: &Filter) {
        // It could fail only if logging had ended, and it ends with the process.
        let _ = self.filter.reload(EnvFilter::new(filter.quieted()));
    }
}

/// The lines of the process's log. Set once, by [`init`].
static LINES: OnceLock<Spool> = OnceLock::new();

/// Starts logging for the whole process, panics included, with colours if standard error is a
/// terminal. Whoever ends the process calls [`flush`] before.
///
/// Fails when logging was started before, or when the process may have no more threads.
pub fn init(filter: &Filter, format: Format) -> Result<Telemetry, InitError> {
    if LINES.get().is_none() {
        // Were there two, the second would end unused.
        let _ = LINES.set(Spool::start(
            "silo-log",
            QUEUE,
            Stderr,
            Arc::default(),
            |report| {
                // What can't be written to standard error can't be said there either.
                if let Report::Dropped(lines) = report {
                    warn!(
                        lines,
                        "log lines were dropped: standard error was not read in time"
                    );
                }
            },
        )?);
    }
    let (level, filter) = reload::Layer::new(EnvFilter::new(filter.quieted()));
    let lines = tracing_subscriber::fmt::layer().with_writer(Lines);
    let lines = match format {
        Format::Text => lines
            .compact()
            .with_ansi(io::stderr().is_terminal())
            .boxed(),
        Format::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(level)
        .with(lines)
        .try_init()?;
    watch_panics();
    Ok(Telemetry { filter })
}

/// Counts each panic of the process in [`PANICS`] from now on, and says where it happened: the
/// first ten of a minute, and with the next one how many were left out. [`init`] does it too.
///
/// A panic ends the task it happens in. What else ends with it is up to whoever has started the
/// task.
pub fn watch_panics() {
    let begun = Instant::now();
    let told = Rationed::default();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.inc();
        let Some(left_out) = told.admit(begun.elapsed().as_secs() / 60) else {
            return;
        };
        if enabled!(Level::ERROR) {
            log_panic(panic, left_out);
        } else {
            before(panic);
        }
        // Where panics abort, this was the last word.
        flush();
    }));
}

/// Ten lines a minute: whoever finds out how to make a task panic shall not fill a disk by it, nor
/// hold a thread up that waits for its lines to be written. No lock, since a panic may happen under
/// any.
#[derive(Default)]
struct Rationed {
    minute: AtomicU64,
    /// Lines asked for in this minute.
    asked: AtomicU64,
    left_out: AtomicU64,
}

impl Rationed {
    const LINES: u64 = 10;

    /// Whether a line may be written, and how many were left out before it.
    fn admit(&self, minute: u64) -> Option<u64> {
        if self.minute.swap(minute, Relaxed) != minute {
            self.asked.store(0, Relaxed);
        }
        if self.asked.fetch_add(1, Relaxed) < Self::LINES {
            return Some(self.left_out.swap(0, Relaxed));
        }
        self.left_out.fetch_add(1, Relaxed);
        None
    }
}

/// Waits until everything logged so far has been written, a second at most.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(FLUSH);
    }
}

fn log_panic(panic: &PanicHookInfo<'_>, left_out: u64) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("?");
    let payload = panic.payload();
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("?");
    let place = panic.location().map(ToString::to_string);
    let place = place.as_deref().unwrap_or("?");
    // Captured if RUST_BACKTRACE says so.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        error!(thread, place, left_out, %backtrace, "panicked: {message}");
    } else {
        error!(thread, place, left_out, "panicked: {message}");
    }
}

/// Makes the writers through which events become lines of [`LINES`].
struct Lines;

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line
    }
}

/// Takes each event as one piece.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(lines) = LINES.get() {
            lines.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> Filter {
        text.parse().unwrap()
    }

    #[test]
    fn levels_and_directives_are_taken() {
        for text in [
            "off",
            "info",
            "TRACE",
            "info,silo_proxy::mux=trace",
            "silo_proxy[session{agent_id=agent-1}]=trace",
        ] {
            assert_eq!(filter(text).as_str(), text);
        }
        for text in [
            "",
            "inof",
            "info,",
            "silo_proxy::mux",
            "a=b",
            "info=info=info",
            "[",
            "x={",
        ] {
            assert!(text.parse::<Filter>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn crates_below_stay_quiet_unless_named() {
        let quieted = filter("debug").quieted();
        assert!(quieted.contains("h2=warn,") && quieted.contains("hyper=warn,"));
        assert!(quieted.ends_with(",debug"));

        let named = filter("info,h2=trace,hyper::proto=debug").quieted();
        assert!(!named.contains("h2=warn") && !named.contains("hyper=warn"));
        assert!(named.contains("hyper_util=warn") && named.contains("tower=warn"));
    }

    #[test]
    fn panics_are_told_ten_times_a_minute() {
        let told = Rationed::default();
        let lines = |minute, count: u64| (0..count).filter_map(|_| told.admit(minute)).collect();
        let first: Vec<u64> = lines(0, 25);
        assert_eq!(first, [0; 10]);
        let next: Vec<u64> = lines(1, 3);
        assert_eq!(next, [15, 0, 0]);
        let later: Vec<u64> = lines(7, 11);
        assert_eq!(later.len(), 10);
        let last: Vec<u64> = lines(8, 1);
        assert_eq!(last, [1]);
    }

    #[test]
    fn every_filter_that_was_taken_can_be_used() {
        for text in ["off", "info", "info,silo_proxy::mux=trace,h2=debug"] {
            assert!(EnvFilter::builder().parse(filter(text).quieted()).is_ok());
        }
    }
}
