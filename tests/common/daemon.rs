//! Servers from Debian, run by a test with a configuration of its own.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{PATIENCE, eventually, port_range};

/// One that listens on a port of its own. It ends when this is dropped, and so does its directory.
pub struct Daemon {
    child: Child,
    pub address: SocketAddr,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts `program` with these arguments and, after them, the file with the configuration that
    /// `configure` writes for its address and its directory.
    fn start(
        program: &str,
        arguments: &[&str],
        configure: impl Fn(SocketAddr, &Path) -> String,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], *port_range(1).start()));
        let file = directory.path().join("configuration");
        std::fs::write(&file, configure(address, directory.path())).unwrap();
        let child = Command::new(program)
            .env("PATH", path_with_sbin())
            .args(arguments)
            .arg(&file)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually(PATIENCE, &format!("{program} listens"), || {
            TcpStream::connect(address).is_ok()
        });
        Self {
            child,
            address,
            directory,
        }
    }

    /// nginx with a `server` section that listens on the port and has these lines too. It serves
    /// the files in its directory.
    pub fn nginx(lines: &str) -> Self {
        Self::start("nginx", &["-e", "stderr", "-c"], |address, path| {
            let path = path.display();
            format!(
                "daemon off;\nmaster_process off;\npid {path}/pid;\nerror_log stderr;\n\
                 events {{ worker_connections 256; }}\n\
                 http {{\n\
                 access_log off;\n\
                 client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
                 fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\n\
                 scgi_temp_path {path}/scgi;\n\
                 server {{\nlisten {address};\nroot {path};\n{lines}\n}}\n}}\n"
            )
        })
    }

    /// HAProxy in front of a service.
    pub fn haproxy(service: SocketAddr) -> Self {
        Self::start("haproxy", &["-db", "-q", "-f"], |address, _| {
            format!(
                "global\n  maxconn 100\n\
                 defaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  \
                 timeout server 5s\n  timeout http-request 5s\n\
                 frontend visitors\n  bind {address}\n  default_backend service\n\
                 backend service\n  server one {service}\n"
            )
        })
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where daemons are found too.
fn path_with_sbin() -> PathBuf {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path.into()
}
