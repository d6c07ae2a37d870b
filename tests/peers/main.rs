//! What people use, as visitors and as services: through the tunnel all of it goes as without it.

#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and says what it passes over"
)]

#[path = "../common/mod.rs"]
mod common;

mod chromium;
mod program;
mod websocket;
