//! nginx, as a service or in front of something.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{PATIENCE, eventually, port_range};

/// An nginx of the test's own, ended when dropped.
pub struct Nginx {
    child: Child,
    pub address: SocketAddr,
    directory: tempfile::TempDir,
}

impl Nginx {
    /// With a `server` section that listens on the port and has these lines too.
    pub fn start(lines: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = *port_range(1).start();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let path = directory.path().display();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {path}/pid;\nerror_log stderr;\n\
             events {{ worker_connections 256; }}\n\
             http {{\n\
             access_log off;\n\
             client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
             fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\n\
             scgi_temp_path {path}/scgi;\n\
             server {{\nlisten {address};\nroot {path};\n{lines}\n}}\n}}\n"
        );
        let file = directory.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let child = Command::new("nginx")
            .env("PATH", path_with_sbin())
            .arg("-p")
            .arg(directory.path())
            .args(["-e", "stderr", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually(PATIENCE, "nginx listens", || {
            TcpStream::connect(address).is_ok()
        });
        Self {
            child,
            address,
            directory,
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where daemons are found too.
pub fn path_with_sbin() -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    format!("{}:/usr/sbin:/sbin", path.to_string_lossy())
}
