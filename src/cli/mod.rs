//! The command line, one file a subcommand.

pub mod agents;
pub mod services;
