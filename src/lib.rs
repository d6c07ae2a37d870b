//! silo-proxy: a reverse tunnel that gives every agent behind NAT an HTTP port of its own.

pub mod agent;
pub mod auth;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod head;
pub mod headers;
pub mod id;
pub mod link;
pub mod metrics;
pub mod mux;
pub mod net;
pub mod ports;
pub mod server;
pub mod telemetry;
pub mod wire;
