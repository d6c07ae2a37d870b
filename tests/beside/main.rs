//! What services and visitors do to an agent, and that nobody beside them notices: each case has a
//! bystander who is served all the while ([`common::bystander`]).
#![cfg(target_os = "linux")]
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may fail anywhere, and tells what it measured"
)]

#[path = "../http2/client.rs"]
#[allow(dead_code, reason = "the tests of HTTP/2 use the rest of it")]
mod client;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/upgrade.rs"]
#[allow(dead_code, reason = "the tests of upgrades use the rest of it")]
mod upgrade;

mod attacks;
mod broken;
mod closes;
mod events;
mod expect;
mod flapping;
mod heads;
mod link;
mod stalled;
mod upgraded;

use std::sync::atomic::{AtomicBool, Ordering};

use common::bystander::alone;

/// Ends what goes on beside a test's thread, also if the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
