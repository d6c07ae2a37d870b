//! `silo-proxy swarm`: many agents in one process, to find out what a host holds.

use std::collections::{BTreeMap, HashSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::agent::TlsArgs;
use super::{
    Failure, Outcome, block_on, raise_descriptor_limit, say, services, start_log, told_to_stop,
};
use crate::agent::{Agent, Event};
use crate::config::{AgentConfig, LogConfig, Sources};

/// How often the rate of requests is printed, if there are any.
const REPORT: Duration = Duration::from_secs(5);

/// Run many agents in one process, to find out what a host holds
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each agent forwards to a small service in the same process. When all have been
registered or rejected a summary is printed; then the rate of requests, until Ctrl-C.
Each agent takes a file descriptor here, and two and a port on the server. All show the same
certificate, if any: it has to name each of them.

Example:
  silo-proxy swarm --server localhost:9090 --count 1000
  silo-proxy swarm --server localhost:9090 --count 1000 --tls-ca certs/ca.pem"
)]
pub(super) struct SwarmArgs {
    /// The server's tunnel port
    #[arg(long, value_name = "HOST:PORT")]
    server: String,
    /// How many agents
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    count: u32,
    /// What their ids begin with; a number follows
    #[arg(long, value_name = "TEXT", default_value = "swarm-")]
    prefix: String,
    /// File with the agents' token; without it SILO_GRPC_TOKEN is used if it is set
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
    /// How many connect at a time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    at_once: u32,
    /// What is logged, such as info or debug; agents' comings and goings are info
    #[arg(long, value_name = "LEVEL", default_value = "off")]
    log_level: crate::telemetry::Filter,
}

pub(super) fn run(args: SwarmArgs) -> Outcome {
    start_log(&LogConfig {
        level: args.log_level.clone(),
        ..LogConfig::default()
    })?;
    raise_descriptor_limit();
    block_on(swarm(args))?
}

/// What the agents have reported.
#[derive(Default)]
struct Tally {
    registered: HashSet<u32>,
    /// Agents that were rejected or found no server at their first attempt, by reason.
    rejected: BTreeMap<String, u32>,
    /// Agents that have reported anything at all.
    settled: HashSet<u32>,
}

async fn swarm(args: SwarmArgs) -> Outcome {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .map_err(Failure::failed)?;
    let service = listener.local_addr().map_err(Failure::failed)?;
    let template = template(&args, service)?;
    let served = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let _service = tokio::spawn(services::serve_small(listener, served.clone()));

    let tally = Arc::new(Mutex::new(Tally::default()));
    let settled = Arc::new(Notify::new());
    let stop = CancellationToken::new();
    let mut told = std::pin::pin!(told_to_stop()?);
    let progress = ProgressBar::new(args.count.into()).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} agents, {elapsed}")
            .map_err(Failure::failed)?,
    );
    let since = Instant::now();
    let mut agents = tokio::task::JoinSet::new();
    let mut started = 0;
    while tally_of(&tally).settled.len() < args.count as usize {
        let underway = started - tally_of(&tally).settled.len() as u32;
        if started < args.count && underway < args.at_once {
            let number = started;
            let id = format!("{}{number:05}", args.prefix)
                .parse()
                .map_err(|error| Failure::usage(format_args!("--prefix: {error}")))?;
            let (tally, settled) = (tally.clone(), settled.clone());
            let agent = template
                .with_id(id)
                .map_err(Failure::failed)?
                .on_event(move |event| {
                    note(&mut tally_of(&tally), number, event);
                    settled.notify_one();
                });
            agents.spawn(agent.run(stop.clone().cancelled_owned()));
            started += 1;
            continue;
        }
        tokio::select! {
            () = settled.notified() => {}
            () = &mut told => {
                progress.abandon();
                summarise(&tally, since.elapsed());
                return Ok(());
            }
        }
        progress.set_position(tally_of(&tally).settled.len() as u64);
    }
    progress.finish_and_clear();
    summarise(&tally, since.elapsed());

    let mut reports = tokio::time::interval(REPORT);
    let mut before = (Instant::now(), 0);
    loop {
        tokio::select! {
            () = &mut told => {
                stop.cancel();
                while agents.join_next().await.is_some() {}
                return Ok(());
            }
            _ = reports.tick() => {
                let now = (Instant::now(), served.load(std::sync::atomic::Ordering::Relaxed));
                if now.1 > before.1 {
                    let rate = (now.1 - before.1) as f64 / (now.0 - before.0).as_secs_f64();
                    say(format_args!("{rate:.0} requests/s"));
                }
                before = now;
            }
        }
    }
}

/// The agent that all others are copies of.
fn template(args: &SwarmArgs, service: std::net::SocketAddr) -> Result<Agent, Failure> {
    let sources = Sources::process()
        .flag(
            "local.service_url",
            "the service",
            format!("http://{service}"),
        )
        .flag("grpc.server_address", "--server", args.server.clone())
        .flag("grpc.agent_id", "--prefix", format!("{}00000", args.prefix))
        .file_flag(
            "grpc.token_file",
            "--token-file",
            args.token_file.as_deref(),
        );
    let sources = args.tls.add_to(sources);
    Agent::new(AgentConfig::load(&sources)?).map_err(Failure::usage)
}

fn note(tally: &mut Tally, number: u32, event: Event) {
    let first = tally.settled.insert(number);
    match event {
        Event::Connected { .. } => {
            tally.registered.insert(number);
        }
        Event::Rejected { reason, .. } => {
            tally.registered.remove(&number);
            if first {
                let name = reason.as_str().to_owned();
                *tally.rejected.entry(name).or_default() += 1;
            }
        }
        Event::Disconnected { why, .. } => {
            tally.registered.remove(&number);
            if first {
                *tally.rejected.entry(why.to_string()).or_default() += 1;
            }
        }
    }
}

fn summarise(tally: &Mutex<Tally>, took: Duration) {
    let tally = tally_of(tally);
    say(format_args!(
        "registered {} in {:.2} s",
        tally.registered.len(),
        took.as_secs_f64()
    ));
    for (reason, count) in &tally.rejected {
        say(format_args!("rejected {count}: {reason}"));
    }
}

fn tally_of(tally: &Mutex<Tally>) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}
