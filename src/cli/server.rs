//! `silo-proxy server`: accepts agents and their visitors, until told to stop.

use std::pin::pin;

use tracing::info;

use super::notify::Manager;
use super::{
    ConfigArg, Failure, Outcome, block_on, not_reloaded, raise_descriptor_limit, reloaded, sources,
    start_log, told_to_reload, told_to_stop,
};
use crate::config::{ConfigError, ServerConfig};
use crate::server::{Reloaded, Server, StartError};
use crate::telemetry::Telemetry;

/// Run the server: agents connect to it, visitors reach them through it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without a file every setting has its default: admin port 127.0.0.1:8080,
tunnel port 9090 (agents of this host only, until a credential is set), agents' ports 8100-8200.

Examples:
  silo-proxy server
  silo-proxy server --config /etc/silo-proxy/server.yaml
  SILO_GRPC_AUTH_SHARED_TOKEN_FILE=token.txt silo-proxy server"
)]
pub(super) struct ServerArgs {
    #[command(flatten)]
    file: ConfigArg,
}

pub(super) fn run(args: ServerArgs) -> Outcome {
    let load = move || ServerConfig::load(&sources(args.file.config.as_deref()));
    let config = load()?;
    let telemetry = start_log(&config.log)?;
    raise_descriptor_limit();
    block_on(async {
        // Before anything is bound, so that no signal finds the server half started.
        let mut told = pin!(told_to_stop()?);
        let mut hangup = told_to_reload()?;
        let mut server = Server::start(config).map_err(|error| match error {
            StartError::Tls(fault) => Failure::usage(fault),
            error => Failure::failed(error),
        })?;
        let manager = Manager::from_environment();
        let status = format!(
            "serving: agents connect to {}, the admin port is {}",
            server.tunnel_address(),
            server.admin_address()
        );
        manager.ready(&status);
        let mut failed = pin!(server.failed());
        let outcome = loop {
            tokio::select! {
                () = &mut told => break Ok(()),
                () = &mut failed => break Err(Failure::failed("the server has failed")),
                _ = hangup.recv() => {
                    manager.reloading();
                    server.reopen_logs();
                    // They are files of their own, and don't wait for the settings to be right.
                    if let Some(tls) = server.tls() {
                        tls.refresh();
                    }
                    // A file that takes its time holds no signal up.
                    let config = tokio::select! {
                        () = &mut told => break Ok(()),
                        config = tokio::task::spawn_blocking(load.clone()) => config,
                    };
                    if let Ok(config) = config {
                        reload(&mut server, &telemetry, config);
                    }
                    manager.ready(&status);
                }
            }
        };
        manager.stopping();
        server.shutdown().await;
        outcome
    })?
}

/// Has the server go by settings that have been read again, and says what became of that.
fn reload(server: &mut Server, telemetry: &Telemetry, config: Result<ServerConfig, ConfigError>) {
    let config = match config {
        Ok(config) => config,
        Err(error) => return not_reloaded(error),
    };
    match server.reload(config) {
        Ok(Reloaded { changes, draining }) => {
            if changes.touch(&["log.level"]) {
                telemetry.set_filter(&server.config().log.level);
            }
            reloaded(&changes);
            if draining > 0 {
                info!(
                    agents = draining,
                    "on ports that the settings give them no longer; each keeps its port until it \
                     disconnects"
                );
            }
        }
        Err(error) => not_reloaded(error),
    }
}
