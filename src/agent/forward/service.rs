//! The local service: how to connect to it, and what it wants to see.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use tracing::warn;

use crate::config::{HostHeader, HostPort, LocalConfig, LocalTls, Scheme, ServiceUrl};
use crate::net;

/// Where the local service is and how it is spoken to.
pub(in crate::agent) struct Service {
    address: HostPort,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    connect_timeout: Duration,
    /// The service's own name as a Host value.
    pub(super) own_host: HeaderValue,
    /// What replaces the visitor's Host.
    pub(super) host: Option<HeaderValue>,
}

/// Why the local service can't be reached as the settings say.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The file has no certificate in it, or something that isn't one.
    #[error("local.tls.ca_file: {} holds no usable certificate", .0.display())]
    CaFile(PathBuf),
    /// The system has no certificates.
    #[error("no certificate authorities found on this system ({0}); name one in local.tls.ca_file")]
    NoSystemRoots(String),
    /// The name can't stand in a certificate.
    #[error("local.tls.server_name: {0:?} is neither a DNS name nor an IP address")]
    ServerName(String),
    /// The value can't stand in a header.
    #[error("local.host_header: {0:?} can't be a Host header")]
    HostHeader(String),
    /// TLS can't be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl Service {
    /// Reads the certificates; connects nowhere.
    pub(in crate::agent) fn new(config: &LocalConfig) -> Result<Self, ServiceError> {
        let ServiceUrl { scheme, address } = &config.service_url;
        let tls = match scheme {
            Scheme::Http => None,
            Scheme::Https => {
                let name = config.tls.server_name.as_ref().unwrap_or(&address.host);
                let name = ServerName::try_from(name.clone())
                    .map_err(|_| ServiceError::ServerName(name.clone()))?;
                Some((
                    TlsConnector::from(Arc::new(client_config(&config.tls)?)),
                    name,
                ))
            }
        };
        let own_host = own_host(&config.service_url);
        let own_host =
            HeaderValue::from_str(&own_host).map_err(|_| ServiceError::HostHeader(own_host))?;
        let host = match &config.host_header {
            HostHeader::Preserve => None,
            HostHeader::Target => Some(own_host.clone()),
            HostHeader::Value(value) => Some(
                HeaderValue::from_str(value)
                    .map_err(|_| ServiceError::HostHeader(value.clone()))?,
            ),
        };
        Ok(Self {
            address: address.clone(),
            tls,
            connect_timeout: config.connect_timeout,
            own_host,
            host,
        })
    }

    /// Opens a connection, TLS included.
    pub(super) async fn connect(&self) -> io::Result<ServiceStream> {
        tokio::time::timeout(self.connect_timeout, self.connect_untimed())
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
    }

    async fn connect_untimed(&self) -> io::Result<ServiceStream> {
        let tcp = net::dial::connect(&self.address.host, self.address.port).await?;
        tcp.set_nodelay(true)?;
        Ok(match &self.tls {
            None => Either::Left(tcp),
            Some((connector, name)) => {
                Either::Right(Box::new(connector.connect(name.clone(), tcp).await?))
            }
        })
    }
}

/// The service's name, with the port unless it is the scheme's own.
fn own_host(url: &ServiceUrl) -> String {
    let default = match url.scheme {
        Scheme::Http => 80,
        Scheme::Https => 443,
    };
    let full = url.address.to_string();
    if url.address.port == default {
        full.rsplit_once(':')
            .map(|(host, _)| host.to_owned())
            .unwrap_or(full)
    } else {
        full
    }
}

fn client_config(tls: &LocalTls) -> Result<ClientConfig, ServiceError> {
    // Named here, so that it doesn't matter what the process as a whole has chosen, or hasn't.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let mut config = if tls.insecure {
        warn!("local.tls.insecure: the local service's certificate is not checked");
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TakeAny(provider)))
            .with_no_client_auth()
    } else {
        builder
            .with_root_certificates(roots(tls)?)
            .with_no_client_auth()
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn roots(tls: &LocalTls) -> Result<RootCertStore, ServiceError> {
    let mut roots = RootCertStore::empty();
    match &tls.ca_file {
        Some(file) => {
            let refused = || ServiceError::CaFile(file.path.clone());
            for certificate in CertificateDer::pem_slice_iter(&file.pem) {
                let certificate = certificate.map_err(|_| refused())?;
                roots.add(certificate).map_err(|_| refused())?;
            }
            if roots.is_empty() {
                return Err(refused());
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            // Systems carry certificates that nobody can use any more; the others do.
            let (usable, _) = roots.add_parsable_certificates(found.certs);
            if usable == 0 {
                let why = found.errors.first().map(ToString::to_string);
                return Err(ServiceError::NoSystemRoots(why.unwrap_or_default()));
            }
        }
    }
    Ok(roots)
}

/// Takes any certificate of the service (`local.tls.insecure`): whoever can place himself between
/// the agent and its service can read and change everything. Signatures are checked all the same.
#[derive(Debug)]
struct TakeAny(Arc<CryptoProvider>);

impl ServerCertVerifier for TakeAny {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A connection to the service. The one over TLS is boxed: it is ten times the size of the other.
pub(super) type ServiceStream = Either<TcpStream, Box<TlsStream<TcpStream>>>;
