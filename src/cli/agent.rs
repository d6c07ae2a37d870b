//! `silo-proxy agent`: keeps a local service reachable through a server, until told to stop.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use super::notify::Manager;
use super::{
    ConfigArg, Failure, Outcome, block_on, not_reloaded, raise_descriptor_limit, reloaded, say,
    sources, start_log, told_to_reload, told_to_stop,
};
use crate::agent::{Agent, Event, Reloader};
use crate::config::{AgentConfig, ConfigError, Sources};
use crate::telemetry::Telemetry;

/// Run an agent: it makes a local service reachable through a server
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  silo-proxy agent http 3000 --server proxy.example:9090 --id my-service
  silo-proxy agent http 3000 --server proxy.example:9090 --id my-service --token-file token.txt
  silo-proxy agent --config /etc/silo-proxy/agent.yaml"
)]
pub(super) struct AgentArgs {
    #[command(flatten)]
    file: ConfigArg,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Make an HTTP service reachable, without a file of settings
    Http(HttpArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  silo-proxy agent http 3000 --server proxy.example:9090 --id my-service
  silo-proxy agent http 192.168.1.7:8000 --server proxy.example:9090 --id printer
  silo-proxy agent http https://localhost:8443 --server proxy.example:9090 --id my-service
  silo-proxy agent http 3000 --server proxy.example:9090 --id my-service --tls-ca ca.pem \\
    --tls-cert my-service.pem --tls-key my-service.key")]
struct HttpArgs {
    /// The service: a port of this host, HOST:PORT, or a URL such as https://localhost:8443
    #[arg(value_name = "PORT|HOST:PORT|URL")]
    service: String,
    /// The server's tunnel port
    #[arg(long, value_name = "HOST:PORT")]
    server: String,
    /// The name by which the server knows this agent: a-z, 0-9, '.', '_', '-'
    #[arg(long, value_name = "NAME")]
    id: String,
    /// File with the agent's token; without it SILO_GRPC_TOKEN is used if it is set
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
}

/// TLS to the server, for whoever starts agents by flags.
#[derive(Debug, clap::Args)]
pub(super) struct TlsArgs {
    /// Encrypt the tunnel; the system's authorities must have signed the server's certificate
    #[arg(long)]
    tls: bool,
    /// The same, with the authorities in this file
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// File with the agent's certificate, for a server that asks for one
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// File with the certificate's key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

pub(super) fn run(args: AgentArgs) -> Outcome {
    let sources = match args.what {
        None => sources(args.file.config.as_deref()),
        Some(What::Http(http)) => http.sources(),
    };
    let load = move || AgentConfig::load(&sources);
    let config = load()?;
    let telemetry = start_log(&config.log)?;
    raise_descriptor_limit();
    let manager = Arc::new(Manager::from_environment());
    let teller = teller(manager.clone())?;
    let agent = Agent::new(config).map_err(Failure::usage)?;
    let reloader = agent.reloader();
    let settings = reloader.clone();
    let agent = agent.on_event(move |event| match event {
        Event::Connected { public_url, .. } => {
            let service = settings.config().local.service_url;
            // The rest is in the log.
            teller(Told {
                line: Some(format!("{public_url} -> {service}")),
                status: format!("{public_url} leads to {service}"),
            });
        }
        Event::Rejected { reason, detail, .. } => teller(Told {
            line: None,
            status: format!("rejected, {}: {detail}", reason.as_str()),
        }),
        Event::Disconnected { why, .. } => teller(Told {
            line: None,
            status: format!("not connected: {why}"),
        }),
    });
    block_on(async {
        let stop = told_to_stop()?;
        let mut hangup = told_to_reload()?;
        // A server that is away is no fault of this process: it is ready once it tries.
        manager.ready("connecting");
        // In a task of its own: tokio looks for events twice for whatever wakes the outermost one.
        let mut running = tokio::spawn(agent.run(async move {
            stop.await;
            manager.stopping();
        }));
        loop {
            tokio::select! {
                ended = &mut running => return ended.map_err(Failure::failed),
                _ = hangup.recv() => {
                    // A file that takes its time holds no signal up.
                    let config = tokio::select! {
                        ended = &mut running => return ended.map_err(Failure::failed),
                        config = tokio::task::spawn_blocking(load.clone()) => config,
                    };
                    if let Ok(config) = config {
                        reload(&reloader, &telemetry, config);
                    }
                }
            }
        }
    })?
}

/// What people and the service manager are told of the agent.
struct Told {
    line: Option<String>,
    status: String,
}

/// How much may wait to be told. What finds no room is left out: the log has it.
const UNTOLD: usize = 64;

/// Tells from a thread of its own, so that nobody who doesn't read it holds the agent up.
fn teller(manager: Arc<Manager>) -> Result<impl Fn(Told) + Send + Sync, Failure> {
    let (sender, told) = mpsc::sync_channel::<Told>(UNTOLD);
    std::thread::Builder::new()
        .name("silo-teller".into())
        .spawn(move || {
            for Told { line, status } in told {
                line.into_iter().for_each(say);
                manager.status(status);
            }
        })
        .map_err(Failure::failed)?;
    Ok(move |told| {
        let _ = sender.try_send(told);
    })
}

/// Has the agent go by settings that have been read again, and says what became of that.
fn reload(reloader: &Reloader, telemetry: &Telemetry, config: Result<AgentConfig, ConfigError>) {
    let config = match config {
        Ok(config) => config,
        Err(error) => return not_reloaded(error),
    };
    match reloader.reload(config) {
        Ok(changes) => {
            if changes.touch(&["log.level"]) {
                telemetry.set_filter(&reloader.config().log.level);
            }
            reloaded(&changes);
        }
        Err(error) => not_reloaded(error),
    }
}

impl HttpArgs {
    /// The flags as settings, so that they are checked and reported as these are.
    fn sources(self) -> Sources {
        let url = if self.service.contains("://") {
            self.service
        } else if self.service.bytes().all(|byte| byte.is_ascii_digit()) {
            format!("http://127.0.0.1:{}", self.service)
        } else {
            format!("http://{}", self.service)
        };
        let sources = Sources::process()
            .flag("local.service_url", "the service", url)
            .flag("grpc.server_address", "--server", self.server)
            .flag("grpc.agent_id", "--id", self.id)
            .file_flag(
                "grpc.token_file",
                "--token-file",
                self.token_file.as_deref(),
            );
        self.tls.add_to(sources)
    }
}

impl TlsArgs {
    /// Puts the flags that were given beside the other settings.
    pub(super) fn add_to(&self, mut sources: Sources) -> Sources {
        let encrypted = match (self.tls, &self.tls_ca) {
            (true, _) => Some("--tls"),
            (false, Some(_)) => Some("--tls-ca"),
            (false, None) => None,
        };
        if let Some(flag) = encrypted {
            sources = sources.flag("grpc.tls.enabled", flag, "true");
        }
        sources
            .file_flag("grpc.tls.ca_file", "--tls-ca", self.tls_ca.as_deref())
            .file_flag("grpc.tls.cert_file", "--tls-cert", self.tls_cert.as_deref())
            .file_flag("grpc.tls.key_file", "--tls-key", self.tls_key.as_deref())
    }
}
