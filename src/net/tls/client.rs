//! The agent's ends: to its server, and to its service.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use crate::config::{DialTls, LocalTls};

use super::files::{
    CERT_FILE, CertificateInfo, Identity, TlsFault, authorities, authorities_in, inspect,
    system_authorities,
};
use super::peer::{Failed, Refused};
use super::reload::{Refresh, Reloading, Tell};
use super::stream::Stream;
use super::{ALPN_TUNNEL, provider};

/// The setting that names the server's authorities.
const CA_FILE: &str = "grpc.tls.ca_file";

/// TLS to the server, from the files of `grpc.tls`.
pub struct AgentTls {
    settings: DialTls,
    name: ServerName<'static>,
    loaded: Reloading<Loaded>,
}

struct Loaded {
    config: ClientConfig,
    servers: Arc<WebPkiServerVerifier>,
    /// The agent's own, if it has one.
    certificate: Option<CertificateInfo>,
    /// Those of `grpc.tls.ca_file`; none for the system's.
    authorities: Vec<CertificateInfo>,
}

impl AgentTls {
    /// Reads the files.
    ///
    /// # Errors
    /// Whatever is wrong with one of them, but for a certificate's time; of that
    /// [`warnings`](Self::warnings) tells.
    pub fn load(settings: &DialTls) -> Result<Self, TlsFault> {
        Ok(Self {
            settings: settings.clone(),
            name: server_name("grpc.tls.server_name", &settings.server_name)?,
            loaded: Reloading::new(&files(settings), || Loaded::new(settings))?,
        })
    }

    /// What should be said of the certificates' time: of the agent's own and of the authorities'.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        let loaded = self.loaded.current();
        let mut warnings = Vec::new();
        if let (Some((file, _)), Some(own)) = (&self.settings.identity, &loaded.certificate) {
            let own = std::slice::from_ref(own);
            warnings.extend(super::files::warnings(CERT_FILE, file, own, now));
        }
        if let Some(file) = &self.settings.ca_file {
            let authorities = &loaded.authorities;
            warnings.extend(super::files::warnings(CA_FILE, file, authorities, now));
        }
        warnings
    }

    /// Looks whether the files have changed, which costs a few system calls, and reads them if so.
    /// Says in the log what came of it, a fault once.
    pub fn look(&self) -> Refresh {
        let settings = &self.settings;
        let load = || Loaded::new(settings);
        match self.loaded.look(&files(settings), Tell::Once, load) {
            Ok(None) => Refresh::Unchanged,
            Ok(Some(new)) => {
                info!("certificates read again");
                Refresh::Renewed(new.certificate.clone())
            }
            Err(fault) => {
                warn!("certificates not renewed, the former ones stay in use: {fault}");
                Refresh::Kept(fault)
            }
        }
    }

    /// Does the handshake with the server.
    ///
    /// There is no limit of time; whoever calls sets it.
    pub async fn connect<S>(&self, stream: S) -> Result<Stream<S>, Failed>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let loaded = self.loaded.current();
        let explaining = Arc::new(Explaining {
            servers: loaded.servers.clone(),
            refused: OnceLock::new(),
        });
        let mut config = loaded.config.clone();
        config
            .dangerous()
            .set_certificate_verifier(explaining.clone());
        let connector = TlsConnector::from(Arc::new(config));
        match connector.connect(self.name.clone(), stream).await {
            Ok(stream) => Ok(Stream::Right(Box::new(stream.into()))),
            Err(error) => Err(match explaining.refused.get() {
                Some(refused) => Failed::Refused(refused.clone()),
                None => error.into(),
            }),
        }
    }
}

impl fmt::Debug for AgentTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AgentTls").field(&self.settings).finish()
    }
}

fn files(settings: &DialTls) -> Vec<&Path> {
    let own = settings.identity.iter().flat_map(|(cert, key)| [cert, key]);
    let files = own.chain(&settings.ca_file);
    files.map(|file| file.as_path()).collect()
}

impl Loaded {
    fn new(settings: &DialTls) -> Result<Self, TlsFault> {
        let provider = provider();
        let (roots, known) = match &settings.ca_file {
            Some(file) => (authorities(CA_FILE, file)?, inspect(CA_FILE, file)?),
            None => (system_authorities(CA_FILE)?, Vec::new()),
        };
        let servers =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_webpki_verifier(servers.clone());
        let (mut config, certificate) = match &settings.identity {
            None => (builder.with_no_client_auth(), None),
            Some((certificate, key)) => {
                let identity = Identity::load(certificate, key, &provider)?;
                let config = builder.with_client_auth_cert(identity.chain, identity.key)?;
                (config, Some(identity.info))
            }
        };
        config.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Self {
            config,
            servers,
            certificate,
            authorities: known,
        })
    }
}

/// What an `https` service is called with: its certificate is checked as `local.tls` says, and must
/// bear `host` unless that names another. Which protocol is spoken is for the caller to offer.
///
/// # Errors
/// Whatever is wrong with the files or the name.
pub fn service(
    tls: &LocalTls,
    host: &str,
) -> Result<(TlsConnector, ServerName<'static>), TlsFault> {
    const CA_FILE: &str = "local.tls.ca_file";
    let name = tls.server_name.as_deref().unwrap_or(host);
    let name = server_name("local.tls.server_name", name)?;
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let config = if tls.insecure {
        warn!("local.tls.insecure: the local service's certificate is not checked");
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TakeAny(provider)))
            .with_no_client_auth()
    } else {
        let roots = match &tls.ca_file {
            Some(file) => authorities_in(CA_FILE, &file.path, &file.pem)?,
            None => system_authorities(CA_FILE)?,
        };
        builder.with_root_certificates(roots).with_no_client_auth()
    };
    Ok((TlsConnector::from(Arc::new(config)), name))
}

fn server_name(setting: &'static str, name: &str) -> Result<ServerName<'static>, TlsFault> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsFault::Name {
        setting,
        name: name.to_owned(),
    })
}

/// Accepts what the usual verifier accepts, and keeps what was wrong with the rest: the handshake's
/// error alone doesn't say who has signed a certificate, or for whom.
#[derive(Debug)]
struct Explaining {
    servers: Arc<WebPkiServerVerifier>,
    refused: OnceLock<Refused>,
}

impl ServerCertVerifier for Explaining {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verdict = self
            .servers
            .verify_server_cert(certificate, intermediates, name, ocsp, now);
        if let Err(rustls::Error::InvalidCertificate(error)) = &verdict {
            let refused = Refused::new(error.clone(), certificate, "servers", now);
            // A connection has one handshake.
            let _ = self.refused.set(refused);
        }
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.servers
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.servers
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.servers.supported_verify_schemes()
    }
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
