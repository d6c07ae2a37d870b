//! Services behind https.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::common::raw::{pattern, read_request};
use crate::common::{Process, Server, connect, get, read_answer, service};

/// An authority of the test's own.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn file(&self, directory: &Path) -> PathBuf {
        let file = directory.join("ca.pem");
        std::fs::write(&file, self.0.pem()).unwrap();
        file
    }

    /// A service whose certificate bears `name`. It answers with what it was sent.
    fn service(&self, name: &str) -> SocketAddr {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new([name.to_owned()])
            .unwrap()
            .signed_by(&key, &self.0)
            .unwrap();
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        service(move |stream| {
            let session = ServerConnection::new(config.clone()).unwrap();
            let mut stream = StreamOwned::new(session, stream);
            while let Ok(request) = read_request(&mut stream) {
                let length = request.body.len();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                if stream.write_all(head.as_bytes()).is_err()
                    || stream.write_all(&request.body).is_err()
                {
                    return;
                }
            }
        })
    }
}

/// Starts an agent for an https service.
fn agent(
    server: &Server,
    id: &str,
    service: SocketAddr,
    settings: &[(&str, &str)],
) -> (Process, SocketAddr) {
    let process = server.start_agent(id, &format!("https://{service}"), settings);
    let line = process.wait_for(&["connected", "port="]);
    let rest = &line[line.find("port=").unwrap() + 5..];
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let port = digits.parse().unwrap();
    (process, SocketAddr::from(([127, 0, 0, 1], port)))
}

#[test]
fn certificates_are_checked() {
    let server = Server::start();
    let authority = Authority::new();
    let directory = server.directory();
    let ca = authority.file(&directory);
    let ca = ca.to_str().unwrap();
    let by_address = authority.service("127.0.0.1");
    let by_name = authority.service("service.internal");
    let stranger = Authority::new().service("127.0.0.1");

    for (id, service, settings, status) in [
        ("ca", by_address, vec![("local.tls.ca_file", ca)], 200),
        // Its certificate bears another name.
        ("name", by_name, vec![("local.tls.ca_file", ca)], 502),
        (
            "named",
            by_name,
            vec![
                ("local.tls.ca_file", ca),
                ("local.tls.server_name", "service.internal"),
            ],
            200,
        ),
        // Nobody known has signed it.
        ("stranger", stranger, vec![("local.tls.ca_file", ca)], 502),
        (
            "insecure",
            stranger,
            vec![("local.tls.insecure", "true")],
            200,
        ),
    ] {
        let (process, address) = agent(&server, id, service, &settings);
        let answer = get(address, "/");
        assert_eq!(answer.status, status, "{id}: {}", process.log());
    }
}

#[test]
fn bodies_arrive_whole_over_tls() {
    let server = Server::start();
    let authority = Authority::new();
    let ca = authority.file(&server.directory());
    let service = authority.service("127.0.0.1");
    let settings = [("local.tls.ca_file", ca.to_str().unwrap())];
    let (_process, address) = agent(&server, "a", service, &settings);
    let body = pattern(2 * 1024 * 1024);
    let length = body.len();
    let mut visitor = connect(address);
    for _ in 0..3 {
        let head = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        visitor.write_all(head.as_bytes()).unwrap();
        visitor.write_all(&body).unwrap();
        assert!(read_answer(&mut visitor, false).body == body);
    }
}

/// A certificate file that can't be used is a mistake in the configuration.
#[test]
fn a_file_without_a_certificate_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    std::fs::write(&file, "no certificate\n").unwrap();
    let server = Server::start();
    let settings = [("local.tls.ca_file", file.to_str().unwrap())];
    let mut process = server.start_agent("a", "https://127.0.0.1:1", &settings);
    assert_eq!(process.wait().code(), Some(2), "{}", process.log());
    process.wait_for(&["SILO_LOCAL_TLS_CA_FILE", "no PEM certificate"]);
}
