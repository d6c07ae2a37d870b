//! HTTP/2 with prior knowledge on agents' ports.
//!
//! Visitors are curl, h2's client and raw frames; services speak in raw bytes, so that what they
//! get is seen as it is.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and says what it passes over"
)]

#[path = "../common/mod.rs"]
mod common;

mod client;
mod floods;
mod grpc;
mod programs;
mod service;
mod services;
mod tunnel;
mod visitors;
