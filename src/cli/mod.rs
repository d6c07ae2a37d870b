//! The command line, one file a subcommand.

mod agent;
pub mod agents;
mod certs;
mod check;
mod demo;
mod notify;
mod server;
pub mod services;
mod swarm;

use std::fmt::Display;
use std::future::Future;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{Level, enabled, error, info, warn};

use crate::config::{Changes, ConfigError, LogConfig, Sources};
use crate::telemetry::{self, Telemetry};

/// A reverse tunnel: every agent behind NAT gets an HTTP port of its own.
#[derive(Debug, Parser)]
#[command(
    version,
    propagate_version = true,
    after_help = "Examples:
  silo-proxy demo                                   # server, agents and services in one process
  silo-proxy server                                 # on the reachable host
  silo-proxy agent http 3000 --server HOST:9090 --id my-service
  silo-proxy agents                                 # who is connected, and where

Exit codes: 0 success, 1 failure, 2 usage or configuration."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Server(server::ServerArgs),
    Agent(agent::AgentArgs),
    Demo(demo::DemoArgs),
    Agents(agents::AgentsArgs),
    Certs(certs::CertsArgs),
    Check(check::CheckArgs),
    Swarm(swarm::SwarmArgs),
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let command = Cli::parse().command;
    // An agent's one session runs on this thread, and what supervises the process starts another.
    let outcome = catch_unwind(AssertUnwindSafe(|| execute(command)));
    let outcome = outcome.unwrap_or_else(|_| Err(Failure::failed("ended by a panic")));
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let Failure { message, code } = failure;
            if enabled!(Level::ERROR) {
                error!("{message}");
            } else {
                // There is no log yet. With nobody to read it, the exit code has to do.
                let _ = writeln!(std::io::stderr(), "silo-proxy: {message}");
            }
            ExitCode::from(code)
        }
    };
    // Before the process is gone.
    telemetry::flush();
    code
}

fn execute(command: Command) -> Outcome {
    match command {
        Command::Server(args) => server::run(args),
        Command::Agent(args) => agent::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Agents(args) => block_on(agents::run(&args, variable))
            .and_then(|outcome| outcome.map_err(Failure::failed)),
        Command::Certs(args) => certs::run(args),
        Command::Check(args) => check::run(&args),
        Command::Swarm(args) => swarm::run(args),
    }
}

/// Why a command ended without success: what to say, and the exit code.
#[derive(Debug)]
struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    fn failed(error: impl Display) -> Self {
        Self {
            message: error.to_string(),
            code: 1,
        }
    }

    fn usage(error: impl Display) -> Self {
        Self {
            message: error.to_string(),
            code: 2,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(format_args!("the configuration has faults\n{error}"))
    }
}

type Outcome = Result<(), Failure>;

/// Where settings come from: the file if one is named, and the environment.
fn sources(file: Option<&Path>) -> Sources {
    let sources = Sources::process();
    match file {
        Some(file) => sources.file(file),
        None => sources,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the command line reads it"
)]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn start_log(config: &LogConfig) -> Result<Telemetry, Failure> {
    telemetry::init(&config.level, config.format).map_err(Failure::failed)
}

/// Runs a future on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::failed)?;
    let output = runtime.block_on(future);
    // Not dropped: that would wait for a name look-up that nobody needs any more.
    runtime.shutdown_background();
    Ok(output)
}

/// The future ends with the first SIGTERM or SIGINT since the call, which needs a tokio runtime.
/// A second one ends the process at once.
fn told_to_stop() -> Result<impl Future<Output = ()>, Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "stopping");
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            warn!("told to stop a second time: ending at once");
            telemetry::flush();
            std::process::exit(1);
        });
    })
}

/// Each SIGHUP since the call, which needs a tokio runtime. Without it a SIGHUP would end the
/// process.
fn told_to_reload() -> Result<Signal, Failure> {
    signal(SignalKind::hangup()).map_err(Failure::failed)
}

/// Says that new settings hold, and which of them don't. Values may be secret, so only paths.
fn reloaded(changes: &Changes) {
    if !changes.needs_restart.is_empty() {
        warn!(
            settings = changes.needs_restart.join(", "),
            "SIGHUP: changes of these need a restart; until then their old values hold"
        );
    }
    let changed = match &changes.applied[..] {
        [] => "none".to_owned(),
        paths => paths.join(", "),
    };
    info!(changed, "SIGHUP: settings reloaded");
}

/// Says why new settings don't hold.
fn not_reloaded(error: impl Display) {
    // One line, however many faults.
    let faults = error.to_string().replace('\n', "; ");
    error!("SIGHUP: not reloaded, so the old settings hold, all of them: {faults}");
}

/// Writes a line for whoever started the command; not for the log.
fn say(line: impl Display) {
    // With nobody to read it there is nothing to do about it.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Raises the limit of open files, and says what it is when that may be too little.
fn raise_descriptor_limit() {
    match crate::net::raise_descriptor_limit() {
        Ok(limit) => {
            if let Some(now) = limit.now {
                tracing::debug!(limit = now, "open files");
            }
        }
        Err(error) => warn!(%error, "the limit of open files could not be raised"),
    }
}

/// The file that a command reads its settings from.
#[derive(Debug, clap::Args)]
struct ConfigArg {
    /// YAML file with the settings; SILO_* variables go before it
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}
