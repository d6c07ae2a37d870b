//! `silo-proxy server`: accepts agents and their visitors, until told to stop.

use std::pin::pin;

use super::notify::Manager;
use super::{
    ConfigArg, Outcome, block_on, raise_descriptor_limit, sources, start_log, told_to_stop,
};
use crate::config::ServerConfig;
use crate::server::{Server, StartError};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use super::Failure;

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
    let config = ServerConfig::load(&sources(args.file.config.as_deref()))?;
    start_log(&config.log)?;
    raise_descriptor_limit();
    block_on(async {
        // Before anything is bound, so that no signal finds the server half started.
        let told = told_to_stop()?;
        // Without a handler a SIGHUP would end the server, and it is what reloads other programs.
        let mut hangup = signal(SignalKind::hangup()).map_err(Failure::failed)?;
        let server = Server::start(config).map_err(|error| match error {
            StartError::Tls(fault) => Failure::usage(fault),
            error => Failure::failed(error),
        })?;
        let tls = server.tls().cloned();
        let manager = Manager::from_environment();
        let status = format!(
            "serving: agents connect to {}, the admin port is {}",
            server.tunnel_address(),
            server.admin_address()
        );
        manager.ready(&status);
        let mut told = pin!(told);
        loop {
            tokio::select! {
                () = &mut told => break,
                _ = hangup.recv() => {}
            }
            manager.reloading();
            server.reopen_logs();
            if let Some(tls) = &tls {
                tls.refresh();
            }
            warn!(
                "SIGHUP: certificates are read again and logs reopened, but other settings can't be reloaded yet; restart the server"
            );
            manager.ready(&status);
        }
        manager.stopping();
        server.shutdown().await;
        Ok(())
    })?
}
