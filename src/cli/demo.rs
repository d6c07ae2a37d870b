//! `silo-proxy demo`: server, agents and sample services in one process.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Failure, Outcome, block_on, raise_descriptor_limit, say, services, start_log, told_to_stop,
};
use crate::agent::{Agent, Event};
use crate::config::{AgentConfig, HostPort, LogConfig, Scheme, ServerConfig, ServiceUrl};
use crate::server::{Server, StartError};

/// Run a server, agents and small services in one process, to try it out
#[derive(Debug, clap::Args)]
#[command(after_help = "Everything is on this host; Ctrl-C ends it.

Example:
  silo-proxy demo --agents 5")]
pub(super) struct DemoArgs {
    /// How many agents, each with a service of its own
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    agents: u16,
    /// What is logged, such as info or debug
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: crate::telemetry::Filter,
}

pub(super) fn run(args: DemoArgs) -> Outcome {
    start_log(&LogConfig {
        level: args.log_level,
        ..LogConfig::default()
    })?;
    raise_descriptor_limit();
    let server = start_server()?;
    block_on(async {
        let outcome = run_agents(&server, args.agents).await;
        server.shutdown().await;
        outcome
    })?
}

/// Starts a server on the default ports. Where one of its own is taken, another one is used.
fn start_server() -> Result<Server, Failure> {
    let mut config = ServerConfig::default();
    // Nothing of a demonstration should be reachable from elsewhere.
    config.http.agent_host = Ipv4Addr::LOCALHOST.into();
    config.grpc.host = Ipv4Addr::LOCALHOST.into();
    loop {
        match Server::start(config.clone()) {
            Err(StartError::Listen {
                address, setting, ..
            }) if address.port() != 0 => {
                say(format_args!(
                    "Port {} is taken, so {setting} is another one.",
                    address.port()
                ));
                match setting {
                    "http.port" => config.http.port = 0,
                    _ => config.grpc.port = 0,
                }
            }
            outcome => return outcome.map_err(Failure::failed),
        }
    }
}

async fn run_agents(server: &Server, count: u16) -> Outcome {
    let stop = CancellationToken::new();
    // An agent reports a few events at most before anybody reads; a full queue drops the rest,
    // which only this table wants.
    let (events, mut connected) = mpsc::channel(usize::from(count) * 4);
    let mut running = tokio::task::JoinSet::new();
    let mut told = std::pin::pin!(told_to_stop()?);
    for number in 1..=count {
        let name = format!("agent-{number}");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(Failure::failed)?;
        let service = ServiceUrl {
            scheme: Scheme::Http,
            address: host_port(listener.local_addr().map_err(Failure::failed)?),
        };
        running.spawn(services::serve(
            listener,
            name.clone(),
            stop.clone().cancelled_owned(),
        ));
        let id = name.parse().map_err(Failure::failed)?;
        let config = AgentConfig::new(host_port(server.tunnel_address()), id, service);
        let events = events.clone();
        let agent = Agent::new(config)
            .map_err(Failure::failed)?
            .on_event(move |event| {
                let news = match event {
                    Event::Connected { port, .. } => Ok(port),
                    Event::Rejected { detail, .. } => Err(detail),
                    Event::Disconnected { why, .. } => Err(why.to_string()),
                };
                let _ = events.try_send((number, news));
            });
        running.spawn(agent.run(stop.clone().cancelled_owned()));
        // One after the other, so that the first agent has the first port.
        let connected = connected.recv();
        tokio::select! {
            news = connected => match news {
                Some((_, Ok(port))) => introduce(number, &name, port),
                Some((_, Err(why))) => return Err(Failure::failed(format_args!("{name}: {why}"))),
                None => {}
            },
            () = &mut told => return Ok(()),
        }
    }
    say(format_args!(
        "\nWho is connected:   curl http://{}/agents\nCounters:           curl http://{}/metrics\nEnd with Ctrl-C.",
        server.admin_address(),
        server.admin_address()
    ));
    told.await;
    stop.cancel();
    while running.join_next().await.is_some() {}
    say("Stopped.");
    Ok(())
}

fn introduce(number: u16, name: &str, port: u16) {
    if number == 1 {
        say("AGENT      URL                       TRY");
    }
    let url = format!("http://localhost:{port}/");
    let attempt = match number % 3 {
        1 => format!("curl {url}api/status"),
        2 => format!("curl -N {url}events"),
        _ => format!("curl -d 'hello' {url}echo"),
    };
    say(format_args!("{name:<10} {url:<25} {attempt}"));
}

fn host_port(address: SocketAddr) -> HostPort {
    HostPort {
        host: address.ip().to_string(),
        port: address.port(),
    }
}
