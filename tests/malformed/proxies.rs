//! nginx and HAProxy, each in front of a service of its own.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use crate::common::{PATIENCE, eventually, port_range};

/// nginx in front of a service, ended when dropped.
pub(crate) struct Nginx(Program);

/// HAProxy in front of a service, ended when dropped.
pub(crate) struct HaProxy(Program);

impl Nginx {
    pub(crate) fn start(service: SocketAddr) -> Self {
        let program = Program::start("nginx", |address, path| {
            let config = format!(
                "daemon off;\nmaster_process off;\npid {path}/pid;\nerror_log /dev/null;\n\
                 events {{ worker_connections 256; }}\n\
                 http {{\naccess_log off;\n\
                 client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
                 fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\n\
                 scgi_temp_path {path}/scgi;\n\
                 server {{\nlisten {address};\nlocation / {{\nproxy_pass http://{service};\n\
                 proxy_http_version 1.1;\nproxy_set_header Host $http_host;\n\
                 proxy_set_header Connection \"\";\nproxy_buffering off;\n\
                 proxy_request_buffering off;\n}}\n}}\n}}\n"
            );
            (config, vec!["-p", path, "-e", "/dev/null", "-c"])
        });
        Self(program)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }
}

impl HaProxy {
    pub(crate) fn start(service: SocketAddr) -> Self {
        let program = Program::start("haproxy", |address, _| {
            let config = format!(
                "global\n  maxconn 100\n\
                 defaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  \
                 timeout server 5s\n  timeout http-request 5s\n\
                 frontend visitors\n  bind {address}\n  default_backend service\n\
                 backend service\n  server one {service}\n"
            );
            (config, vec!["-db", "-q", "-f"])
        });
        Self(program)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }
}

struct Program {
    child: Child,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Program {
    /// Starts a program with a configuration, whose path follows its arguments.
    fn start(name: &str, configure: impl Fn(SocketAddr, &str) -> (String, Vec<&str>)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], *port_range(1).start()));
        let path = directory.path().display().to_string();
        let (config, arguments) = configure(address, &path);
        let file = directory.path().join("config");
        std::fs::write(&file, config).unwrap();
        let search = std::env::var_os("PATH").unwrap_or_default();
        let child = Command::new(name)
            .env("PATH", format!("{}:/usr/sbin:/sbin", search.display()))
            .args(arguments)
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually(PATIENCE, &format!("{name} listens"), || {
            TcpStream::connect(address).is_ok()
        });
        Self {
            child,
            address,
            _directory: directory,
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
