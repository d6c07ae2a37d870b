//! Word to the service manager that started the process: ready, reloading, stopping.
//!
//! It is the protocol of sd_notify(3): datagrams of `NAME=value` lines to the socket that
//! `NOTIFY_SOCKET` names. Without that variable nothing is sent. The crates for it don't know
//! abstract sockets, which some managers use, and this is little.

use std::ffi::OsStr;
use std::fmt::Display;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

/// The variable with the socket's path, or its abstract name after `@`.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// How long a manager may take to read what it was sent before.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Whoever started the process and wants to know how it is.
#[derive(Debug)]
pub(super) struct Manager {
    /// None: nobody does.
    socket: Option<UnixDatagram>,
}

impl Manager {
    /// The manager that the environment names.
    pub(super) fn from_environment() -> Self {
        let address = std::env::var_os(VARIABLE).filter(|address| !address.is_empty());
        let socket = address.and_then(|address| match connect(&address) {
            Ok(socket) => Some(socket),
            Err(error) => {
                warn!(
                    ?address,
                    %error,
                    "the service manager can't be told anything: see {VARIABLE}"
                );
                None
            }
        });
        Self { socket }
    }

    /// The process does what it was started for, after its start or after a reload.
    pub(super) fn ready(&self, status: impl Display) {
        self.send(format_args!("READY=1\nSTATUS={}", OneLine(status)));
    }

    /// What people see in `systemctl status`.
    pub(super) fn status(&self, status: impl Display) {
        self.send(format_args!("STATUS={}", OneLine(status)));
    }

    /// Settings are being read again; [`Manager::ready`] must follow, whatever comes of it.
    pub(super) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(format_args!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The process drains and will end.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=draining");
    }

    fn send(&self, lines: impl Display) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(lines.to_string().as_bytes()) {
            warn!(%error, "the service manager doesn't take what it is told");
        }
    }
}

fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => abstract_address(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

#[cfg(target_os = "linux")]
fn abstract_address(name: &[u8]) -> io::Result<SocketAddr> {
    use std::os::linux::net::SocketAddrExt;
    SocketAddr::from_abstract_name(name)
}

#[cfg(not(target_os = "linux"))]
fn abstract_address(_name: &[u8]) -> io::Result<SocketAddr> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A text that stays within its line: some come from the other side of a tunnel, and the next line
/// would be another word to the manager.
struct OneLine<T>(T);

impl<T: Display> Display for OneLine<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.to_string().replace(char::is_control, " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut bytes = [0; 1024];
        let read = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..read].to_vec()).unwrap()
    }

    fn manager(address: &OsStr) -> Manager {
        Manager {
            socket: Some(connect(address).unwrap()),
        }
    }

    #[test]
    fn a_manager_is_told_line_by_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = manager(path.as_os_str());
        manager.ready("serving");
        assert_eq!(received(&socket), "READY=1\nSTATUS=serving");
        manager.status("rejected: \u{7}no\nMAINPID=1");
        assert_eq!(received(&socket), "STATUS=rejected:  no MAINPID=1");
        manager.reloading();
        let text = received(&socket);
        let micros = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(micros.parse::<u64>().unwrap() > 0);
        manager.stopping();
        assert_eq!(received(&socket), "STOPPING=1\nSTATUS=draining");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_abstract_socket_will_do() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("silo-proxy-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        manager(OsStr::new(&format!("@{name}"))).status("here");
        assert_eq!(received(&socket), "STATUS=here");
    }

    #[test]
    fn a_manager_that_is_gone_does_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        assert!(connect(path.as_os_str()).is_err());
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = manager(path.as_os_str());
        drop(socket);
        manager.ready("nobody reads it");
        Manager { socket: None }.stopping();
    }
}
