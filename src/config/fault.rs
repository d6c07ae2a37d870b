//! What can be wrong with a configuration.

use std::fmt;

use thiserror::Error;

/// Every fault of a configuration at once; printed one a line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", lines(.faults))]
pub struct ConfigError {
    /// Never empty; in the order of the sources, contradictions last.
    pub faults: Vec<Fault>,
}

/// One fault: its kind, where it stands, and a sentence for the operator.
///
/// Printed as `server.yaml:3:5: http.prot: …`. The sentence never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub kind: FaultKind,
    /// Where it stands.
    pub place: Place,
    /// The same for a person, with the way out.
    pub text: String,
}

/// The kinds of [`Fault`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultKind {
    /// A file can't be read, or is too long.
    File,
    /// It is no YAML, or YAML that no configuration needs.
    Syntax,
    /// There is no such setting.
    Unknown {
        /// The valid one that looks most like it.
        nearest: Option<String>,
    },
    /// The same key twice.
    Duplicate,
    /// A value of the wrong type, out of range, or badly written.
    Invalid,
    /// A setting without a default that nobody gave.
    Missing,
    /// Two settings that can't both be meant.
    Contradiction,
}

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a file; lines and columns count from 1, a column is a character.
    File {
        /// The file's name as it was given.
        name: String,
        /// The line.
        line: usize,
        /// The column.
        column: usize,
    },
    /// In this variable of the environment.
    Environment(String),
    /// After this flag of the command line.
    Flag(String),
    /// In no single place: the text names the settings, or the file.
    Nowhere,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Nowhere => f.write_str(&self.text),
            place => write!(f, "{place}: {}", self.text),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Self::Environment(name) | Self::Flag(name) => f.write_str(name),
            Self::Nowhere => Ok(()),
        }
    }
}

fn lines(faults: &[Fault]) -> String {
    let lines: Vec<String> = faults.iter().map(Fault::to_string).collect();
    lines.join("\n")
}
