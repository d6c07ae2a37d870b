//! Programs of Debian's that a test talks to.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

/// A program that says something on standard output; ended when dropped.
pub(crate) struct Program {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// What it says in its next line.
    pub(crate) fn says(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The address of a service that says its port.
    pub(crate) fn address(&mut self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.says().parse().unwrap()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks for the first of `commands` that succeeds. Where none does the test fails in CI, with the
/// line that installs it, and is passed over elsewhere.
pub(crate) fn working<'a>(commands: &'a [&'a [&'a str]], package: &str) -> Option<&'a str> {
    let works = |command: &&&[&str]| {
        let status = Command::new(command[0])
            .args(&command[1..])
            .env("NODE_PATH", NODE_PATH)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    let found = commands.iter().find(works).map(|command| command[0]);
    if found.is_none() {
        let missing = format!("something is missing: apt-get install {package}");
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        eprintln!("passed over, {missing}");
    }
    found
}

/// Where Debian puts modules, which a Node from elsewhere doesn't know.
pub(crate) const NODE_PATH: &str = "/usr/share/nodejs";
