//! The `silo-proxy` binary.
fn main() {}
