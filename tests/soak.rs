//! A short run of `tests/soak/run`: traffic of all kinds with faults, and nothing left behind. Longer
//! ones are started by hand.
#![allow(clippy::unwrap_used, reason = "a test may fail anywhere")]

mod common;

use std::process::Command;

use common::{BINARY, have};

#[test]
#[ignore = "half a minute of traffic"]
fn traffic_with_faults_leaves_nothing_behind() {
    if !have("python3", "python3") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/soak/run"))
        .args(["30", "--every", "1.5", "--binary", BINARY, "--folder"])
        .arg(folder.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&run.stdout);
    let failed = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{told}\n{failed}");
    let plot = std::fs::read_to_string(folder.path().join("soak.svg")).unwrap();
    assert!(plot.ends_with("</svg>\n"));
}
