//! The server's end.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

use crate::auth::Names;
use crate::config::TunnelTls;

use super::files::{CERT_FILE, CertificateInfo, Identity, TlsFault, authorities, inspect};
use super::peer::{Failed, PeerCertificate, Refused};
use super::reload::{Refresh, Reloading, Tell};
use super::stream::Stream;
use super::{ALPN_TUNNEL, provider};

/// The setting that names the authorities of agents.
const CA_FILE: &str = "grpc.tls.ca_file";

/// TLS on the tunnel port, from the files of `grpc.tls`.
pub struct ServerTls {
    settings: TunnelTls,
    loaded: Reloading<Loaded>,
}

struct Loaded {
    acceptor: TlsAcceptor,
    /// Judges agents' certificates; none where nobody is asked for one.
    agents: Option<Arc<dyn ClientCertVerifier>>,
    certificate: CertificateInfo,
    authorities: Vec<CertificateInfo>,
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// Whatever is wrong with one of them, but for a certificate's time: a server whose certificate
    /// has expired starts all the same, as [`warnings`](Self::warnings) will say, and is healed by
    /// a new file.
    pub fn load(settings: &TunnelTls) -> Result<Self, TlsFault> {
        Ok(Self {
            settings: settings.clone(),
            loaded: Reloading::new(&files(settings), || Loaded::new(settings))?,
        })
    }

    /// The server's certificate.
    pub fn certificate(&self) -> CertificateInfo {
        self.loaded.current().certificate.clone()
    }

    /// What should be said of the certificates' time: of the server's own and of the authorities'.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        let loaded = self.loaded.current();
        let mut warnings = Vec::new();
        let own = [(
            CERT_FILE,
            &self.settings.cert_file,
            std::slice::from_ref(&loaded.certificate),
        )];
        let theirs = self.settings.ca_file.iter();
        let theirs = theirs.map(|file| (CA_FILE, file, &loaded.authorities[..]));
        for (setting, file, certificates) in own.into_iter().chain(theirs) {
            warnings.extend(super::files::warnings(setting, file, certificates, now));
        }
        warnings
    }

    /// Looks whether the files have changed, which costs a few system calls, and reads them if so.
    /// Says in the log what came of it: a fault once, and not before the second look, because
    /// files are replaced one after the other.
    pub fn look(&self) {
        self.renew(Tell::AtSecondLook);
    }

    /// Reads the files again, says in the log what came of it, and returns it. Tunnels go on.
    pub fn refresh(&self) -> Refresh {
        self.renew(Tell::Now)
    }

    fn renew(&self, tell: Tell) -> Refresh {
        let settings = &self.settings;
        let load = || {
            let loaded = Loaded::new(settings)?;
            let validity = loaded.certificate.validity(SystemTime::now());
            if validity.is_valid() {
                return Ok(loaded);
            }
            Err(TlsFault::NotValid {
                setting: CERT_FILE,
                file: settings.cert_file.clone(),
                validity,
            })
        };
        match self.loaded.look(&files(settings), tell, load) {
            Ok(None) => Refresh::Unchanged,
            Ok(Some(new)) => {
                let validity = new.certificate.validity(SystemTime::now());
                info!(certificate = %settings.cert_file.display(), "certificates read again; the server's {validity}");
                Refresh::Renewed(Some(new.certificate.clone()))
            }
            Err(fault) => {
                warn!("certificates not renewed, the former ones stay in use: {fault}");
                Refresh::Kept(fault)
            }
        }
    }

    /// Does the handshake with an agent, and judges the certificate it shows.
    ///
    /// There is no limit of time; whoever calls sets it.
    ///
    /// # Errors
    /// Never for the agent's certificate, unless the agent doesn't prove that it holds its key.
    pub async fn accept<S>(&self, stream: S) -> Result<(Stream<S>, PeerCertificate), Failed>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let loaded = self.loaded.current();
        let stream = loaded.acceptor.accept(stream).await?;
        let chain = stream.get_ref().1.peer_certificates();
        let certificate = match (&loaded.agents, chain) {
            (Some(agents), Some([first, rest @ ..])) => judge(&**agents, first, rest),
            _ => PeerCertificate::None,
        };
        Ok((Stream::Right(Box::new(stream.into())), certificate))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerTls").field(&self.settings).finish()
    }
}

fn files(settings: &TunnelTls) -> Vec<&Path> {
    let own = [&settings.cert_file, &settings.key_file];
    let files = own.into_iter().chain(&settings.ca_file);
    files.map(|file| file.as_path()).collect()
}

impl Loaded {
    fn new(settings: &TunnelTls) -> Result<Self, TlsFault> {
        let provider = provider();
        let identity = Identity::load(&settings.cert_file, &settings.key_file, &provider)?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let (builder, agents, known) = match &settings.ca_file {
            None => (builder.with_no_client_auth(), None, Vec::new()),
            Some(file) => {
                let roots = Arc::new(authorities(CA_FILE, file)?);
                let agents = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
                    .build()
                    .map_err(|error| rustls::Error::General(error.to_string()))?;
                let later = Arc::new(JudgedLater(provider));
                let known = inspect(CA_FILE, file)?;
                (
                    builder.with_client_cert_verifier(later),
                    Some(agents),
                    known,
                )
            }
        };
        let mut config = builder.with_single_cert(identity.chain, identity.key)?;
        config.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            agents,
            certificate: identity.info,
            authorities: known,
        })
    }
}

fn judge(
    agents: &dyn ClientCertVerifier,
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> PeerCertificate {
    let now = UnixTime::now();
    let why = match agents.verify_client_cert(certificate, intermediates, now) {
        Ok(_) => match CertificateInfo::read(certificate) {
            Some(info) => {
                return PeerCertificate::Verified(Names {
                    // An address that reads like an id is none.
                    dns: info.dns,
                    uris: info.uris,
                });
            }
            None => "its names can't be read".to_owned(),
        },
        Err(rustls::Error::InvalidCertificate(error)) => {
            let refused = Refused::new(error, certificate, "agents", now);
            match refused {
                Refused::UnknownIssuer { .. } => {
                    format!(
                        "{refused}, and the server's {CA_FILE} has another: have one made there"
                    )
                }
                Refused::Expired { .. } => format!("{refused}: have a new one made"),
                Refused::NotYetValid { .. } => format!("{refused}: compare the clocks"),
                refused => refused.to_string(),
            }
        }
        Err(error) => error.to_string(),
    };
    PeerCertificate::Invalid(why)
}

/// Asks agents for a certificate, takes any of which they hold the key, and none: what it is worth
/// is judged after the handshake, when they can be told.
#[derive(Debug)]
struct JudgedLater(Arc<CryptoProvider>);

impl ClientCertVerifier for JudgedLater {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: an agent shall show the one it has, so that it can be told what is wrong with it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
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
