//! Settings from YAML and the environment.
//!
//! A setting has one path, such as `http.port`, in the file and one name, `SILO_HTTP_PORT`, in
//! the environment. A command line flag goes before the environment, the environment before the
//! file, the file before the default. [`Sources`] says where to look, and
//! [`ServerConfig::load`] and [`AgentConfig::load`] turn what is found there into complete plain
//! values, or into a [`ConfigError`] that lists every fault at once. Loading binds nothing,
//! connects nowhere, and opens no file but the configuration and those it names for secrets and
//! certificates.
//!
//! [`table()`] declares every setting once: its path, what may stand there, its default and why.
//! The parser, the names in the environment and the tables in the README all come from it.

mod agent;
mod fault;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod reload;
mod server;
mod sources;
mod table;
mod value;
mod yaml;

pub use agent::{AgentConfig, AgentProcess, DialConfig, DialTls, LocalConfig, LocalTls};
pub use fault::{ConfigError, Fault, FaultKind, Place};
pub use reload::Changes;
pub use server::{HttpConfig, ProcessConfig, ServerConfig, TunnelConfig, TunnelTls};
pub use sources::{Sources, secret_files};
pub use table::{Kind, Preset, Reload, Role, Setting, environment_name, example, markdown, table};
pub use value::{
    Cidr, HostHeader, HostPort, InvalidValue, LogOutput, PemFile, Protocol, Scheme, ServiceUrl,
};

use crate::telemetry::{Filter, Format};

use sources::Reader;

/// Section `log`, the same on both sides.
#[derive(Debug, Clone, Default)]
pub struct LogConfig {
    /// `log.level`: what is logged.
    pub level: Filter,
    /// `log.format`: how a line looks. The access log follows it.
    pub format: Format,
}

impl LogConfig {
    fn read(from: &mut Reader) -> Self {
        Self {
            level: from.value("log.level", |text| {
                text.parse::<Filter>()
                    .map_err(|error| InvalidValue::new(error.to_string()))
            }),
            format: from.value("log.format", |text| {
                text.parse::<Format>()
                    .map_err(|error| InvalidValue::new(error.to_string()))
            }),
        }
    }
}
