//! HTTP through the tunnel arrives as it was sent, both ways.
//!
//! The services and visitors of these tests speak in raw bytes, so that nothing is hidden by a
//! library that means well; curl and nginx stand for the libraries.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may fail anywhere, and says what it passes over"
)]

#[path = "../common/mod.rs"]
mod common;

mod bodies;
mod connections;
mod continues;
mod heads;
mod leaving;
mod programs;
mod same;
mod secure;
mod truncation;
