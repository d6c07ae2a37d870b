//! Logging: compact lines on standard error.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use thiserror::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Crates below this one. Their `info` is our `trace`: they log every connection and stream, so
/// they stay at `warn` unless a directive names them.
const QUIET: [&str; 7] = [
    "h2",
    "hyper",
    "hyper_util",
    "mio",
    "rustls",
    "tonic",
    "tower",
];

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

/// Starts logging for the whole process, with colours if standard error is a terminal.
///
/// Fails when logging was started before.
pub fn init(filter: &Filter) -> Result<(), TryInitError> {
    tracing_subscriber::fmt()
        .compact()
        .with_env_filter(EnvFilter::new(filter.quieted()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .finish()
        .try_init()
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
            "silo_proxy[session{agent=agent-1}]=trace",
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
        assert!(named.contains("hyper_util=warn") && named.contains("tonic=warn"));
    }

    #[test]
    fn every_filter_that_was_taken_can_be_used() {
        for text in ["off", "info", "info,silo_proxy::mux=trace,h2=debug"] {
            assert!(EnvFilter::builder().parse(filter(text).quieted()).is_ok());
        }
    }
}
