//! Settings as somebody may write them, which can be anything.
#![allow(
    clippy::unwrap_used,
    reason = "only tests and fuzzers run this, and a fault has to be loud"
)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::{env, fs, process, thread};

use super::{AgentConfig, ConfigError, Role, ServerConfig, Sources, secret_files};

/// Takes `data` for a file of settings and, after the first byte 0, variables of an environment, a
/// line each. Both roles read them: to settings, or to a list of faults that can be told.
pub fn settings(data: &[u8]) {
    let (document, variables) = match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &b""[..]),
    };
    let file = File::new(document);
    let variables = variables.split(|byte| *byte == b'\n').filter_map(|line| {
        let at = line.iter().position(|byte| *byte == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&line[..at]), text(&line[at + 1..])))
    });
    let sources = Sources::none().file(&file.0).environment(variables);

    match ServerConfig::load(&sources) {
        Ok(config) => {
            let told = format!("{config:?}");
            let again = ServerConfig::load(&sources).unwrap();
            assert_eq!(told, format!("{again:?}"));
            let defaults = ServerConfig::load(&Sources::none()).unwrap();
            // Whatever is refused, it is refused in words.
            match defaults.replaced_by(config) {
                Ok(_) => {}
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        Err(error) => tell(&error),
    }
    match AgentConfig::load(&sources) {
        Ok(config) => {
            let again = AgentConfig::load(&sources).unwrap();
            assert_eq!(format!("{config:?}"), format!("{again:?}"));
        }
        Err(error) => tell(&error),
    }
    for role in [Role::Server, Role::Agent] {
        secret_files(role, &sources);
    }
}

fn tell(error: &ConfigError) {
    assert!(!error.faults.is_empty());
    for fault in &error.faults {
        assert!(!fault.to_string().is_empty());
    }
    assert!(!error.to_string().is_empty());
}

/// A file of this thread's, which goes with it.
struct File(PathBuf);

impl File {
    fn new(document: &[u8]) -> Self {
        let name = format!("silo-fuzz-{}-{:?}", process::id(), thread::current().id());
        let path = env::temp_dir().join(name).with_extension("yaml");
        fs::write(&path, document).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
