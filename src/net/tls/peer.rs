//! What is said of a peer: of its certificate, and of a handshake that failed.

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

use crate::auth::{Certificate, Names};

use super::files::{CertificateInfo, Date};

/// The longest text that a peer's certificate brings into a log line, in characters.
const MAX_TEXT: usize = 120;

/// The certificate that an agent has shown.
#[derive(Debug, Clone, Default)]
pub enum PeerCertificate {
    /// None, or nobody asked for one.
    #[default]
    None,
    /// One that isn't valid; the text says why, for the agent's operator.
    Invalid(String),
    /// One that an authority of `grpc.tls.ca_file` has signed and that is valid now.
    Verified(Names),
}

impl PeerCertificate {
    /// The same for [`Policy::check`](crate::auth::Policy::check).
    pub fn shown(&self) -> Certificate<'_> {
        match self {
            Self::None => Certificate::None,
            Self::Invalid(why) => Certificate::Invalid(why),
            Self::Verified(names) => Certificate::Verified(names),
        }
    }
}

/// Why a peer's certificate is not accepted. Shown as a sentence about "it"; names from the
/// certificate are cut and escaped.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Refused {
    /// Its time is over.
    #[error("it expired on {} (the clock here says {})", Date(*at), Date(*now))]
    Expired {
        /// Since this time.
        at: SystemTime,
        /// The time by which it was judged.
        now: SystemTime,
    },
    /// Its time hasn't come.
    #[error("it isn't valid before {} (the clock here says {})", Date(*from), Date(*now))]
    NotYetValid {
        /// From this time.
        from: SystemTime,
        /// The time by which it was judged.
        now: SystemTime,
    },
    /// Nobody who is trusted has signed it.
    #[error("no trusted authority has signed it; its issuer is {issuer}")]
    UnknownIssuer {
        /// Who has.
        issuer: String,
    },
    /// It is for other hosts.
    #[error("it is for {presented} and not for {expected}")]
    WrongName {
        /// Whom it should be for.
        expected: String,
        /// Whom it is for.
        presented: String,
    },
    /// It may not be used for this: a server's shown by an agent, or the reverse.
    #[error("it is not one for {0} (extended key usage)")]
    Purpose(&'static str),
    /// Anything else: rare, or forged.
    #[error("{0}")]
    Other(CertificateError),
}

impl Refused {
    /// What `error` means for `certificate`, which was to be used for `purpose`.
    pub(super) fn new(
        error: CertificateError,
        certificate: &CertificateDer<'_>,
        purpose: &'static str,
        now: UnixTime,
    ) -> Self {
        let now = system_time(now);
        let info = CertificateInfo::read(certificate);
        match error {
            CertificateError::ExpiredContext { not_after, .. } => Self::Expired {
                at: system_time(not_after),
                now,
            },
            CertificateError::NotValidYetContext { not_before, .. } => Self::NotYetValid {
                from: system_time(not_before),
                now,
            },
            // The latter where another authority bears the same name, such as the one before.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                Self::UnknownIssuer {
                    issuer: info.map_or_else(String::new, |info| shorten(&info.issuer)),
                }
            }
            CertificateError::NotValidForNameContext { expected, .. } => Self::WrongName {
                expected: expected.to_str().into_owned(),
                presented: match info.map(|info| [info.dns, info.addresses].concat()) {
                    Some(hosts) if !hosts.is_empty() => shorten(&hosts.join(", ")),
                    _ => "no host".to_owned(),
                },
            },
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::Purpose(purpose)
            }
            error => Self::Other(error),
        }
    }
}

fn system_time(time: UnixTime) -> SystemTime {
    UNIX_EPOCH
        .checked_add(Duration::from_secs(time.as_secs()))
        .unwrap_or(UNIX_EPOCH)
}

fn shorten(text: &str) -> String {
    let short: String = text.chars().take(MAX_TEXT).collect();
    short.escape_debug().to_string()
}

/// Why a TLS handshake failed.
#[derive(Debug, Error)]
pub enum Failed {
    /// What the peer says isn't TLS.
    #[error("the other side doesn't speak TLS")]
    NotTls,
    /// The peer's certificate is not accepted here.
    #[error("the server's certificate is not accepted: {0}")]
    Refused(Refused),
    /// The peer has ended the handshake, and says why.
    #[error("the other side ended the TLS handshake: {}", Alert(*.0))]
    Alert(AlertDescription),
    /// The connection broke, or was closed.
    #[error("the connection ended within the TLS handshake: {0}")]
    Connection(io::Error),
    /// TLS that can't be agreed upon, or is broken.
    #[error("the TLS handshake failed: {0}")]
    Tls(rustls::Error),
}

impl From<io::Error> for Failed {
    /// From what a handshake ended with.
    fn from(error: io::Error) -> Self {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner.cloned() {
            None => Self::Connection(error),
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls,
            Some(rustls::Error::AlertReceived(alert)) => Self::Alert(alert),
            Some(error) => Self::Tls(error),
        }
    }
}

/// An alert in words, where it is about this side's certificate.
struct Alert(AlertDescription);

impl fmt::Display for Alert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            AlertDescription::UnknownCA => {
                f.write_str("it knows no authority that has signed our certificate")
            }
            AlertDescription::CertificateExpired => f.write_str("our certificate has expired"),
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate => {
                f.write_str("it doesn't accept our certificate, or the name in it")
            }
            other => write!(f, "{other:?}"),
        }
    }
}
