//! Certificates and keys as they lie in files: how they are read, and what can be wrong with them.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

/// The longest file of certificates that is read, in bytes: the system's own bundles are 200 KiB.
const MAX_FILE: u64 = 1 << 20;

/// A certificate that expires within this time deserves a warning.
const SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// What is wrong with a file of certificates or keys. The text names the setting and the file, and
/// says what mends it; it never holds what the file holds.
#[derive(Debug, Error)]
pub enum TlsFault {
    /// The file is missing, may not be read, or is longer than any such file.
    #[error("{setting}: can't read {}: {source}{}", file.display(), mend_reading(source))]
    Unreadable {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// There is no PEM block with a certificate in it.
    #[error(
        "{setting}: {} holds no usable certificate: a PEM file with BEGIN CERTIFICATE is wanted",
        file.display()
    )]
    NoCertificate {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
    },
    /// A certificate is there, but it is nobody's authority.
    #[error(
        "{setting}: the certificate of {subject} in {} can't sign others: name the file of the \
         authority that has signed it",
        file.display()
    )]
    NoAuthority {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
        /// Whom the certificate is for.
        subject: String,
    },
    /// There is no PEM block with a private key in it, or one that isn't understood.
    #[error(
        "{setting}: {} holds no usable private key: a PEM file with an unencrypted PKCS#8, SEC1 or \
         PKCS#1 key is wanted",
        file.display()
    )]
    NoKey {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
    },
    /// The two don't belong together.
    #[error(
        "{setting}: the key in {} doesn't fit the certificate in {}: name the key with which that \
         certificate was made",
        key.display(),
        certificate.display()
    )]
    KeyMismatch {
        /// The setting that names the key.
        setting: &'static str,
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The certificate's time is over, or hasn't begun.
    #[error("{setting}: {} {validity}: {}", file.display(), validity.mend())]
    NotValid {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
        /// Why not.
        validity: Validity,
    },
    /// The system has no certificates of authorities.
    #[error("no certificate authorities found on this system ({why}); name one in {setting}")]
    NoSystemRoots {
        /// The setting in which a file can be named.
        setting: &'static str,
        /// The first error met while looking for them, or nothing.
        why: String,
    },
    /// The name can't stand in a certificate.
    #[error("{setting}: {name:?} is neither a DNS name nor an IP address")]
    Name {
        /// The setting that the name comes from.
        setting: &'static str,
        /// The name.
        name: String,
    },
    /// TLS can't be set up with them for another reason.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

fn mend_reading(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; `silo-proxy certs` makes certificates where there are none yet"
        }
        io::ErrorKind::PermissionDenied => "; give the user that silo-proxy runs as the right to",
        _ => "",
    }
}

/// A certificate as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Whom it is for, as a distinguished name such as `CN=agent-1`; may be empty.
    pub subject: String,
    /// Who has signed it.
    pub issuer: String,
    /// Whether it may sign others: it says so (RFC 5280, section 4.2.1.9), or has signed itself.
    pub is_authority: bool,
    /// Its dNSNames (RFC 5280, section 4.2.1.6).
    pub dns: Vec<String>,
    /// Its IP addresses.
    pub addresses: Vec<String>,
    /// Its URIs.
    pub uris: Vec<String>,
    /// It is valid from here,
    pub not_before: SystemTime,
    /// to here.
    pub not_after: SystemTime,
}

impl CertificateInfo {
    /// Reads a certificate; none if it isn't one. Nothing is verified.
    pub fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let (mut dns, mut addresses, mut uris) = (Vec::new(), Vec::new(), Vec::new());
        for extension in parsed.extensions() {
            let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension()
            else {
                continue;
            };
            for name in &names.general_names {
                match name {
                    GeneralName::DNSName(name) => dns.push((*name).to_owned()),
                    GeneralName::IPAddress(bytes) => addresses.extend(address(bytes)),
                    GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                    _ => {}
                }
            }
        }
        let validity = parsed.validity();
        Some(Self {
            is_authority: parsed.is_ca() || parsed.subject() == parsed.issuer(),
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            dns,
            addresses,
            uris,
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
        })
    }

    /// Whether it is valid at `now`, and for how long.
    pub fn validity(&self, now: SystemTime) -> Validity {
        if now < self.not_before {
            return Validity::NotYet {
                from: self.not_before,
            };
        }
        match self.not_after.duration_since(now) {
            Err(_) => Validity::Expired { at: self.not_after },
            Ok(left) if left < SOON => Validity::ExpiresSoon {
                at: self.not_after,
                days: left.as_secs() / (24 * 60 * 60),
            },
            Ok(_) => Validity::Valid { to: self.not_after },
        }
    }
}

/// The bytes of an address in a certificate: four or sixteen of them.
fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).to_string());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).to_string())
}

fn time(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs());
    let time = match seconds {
        0.. => UNIX_EPOCH.checked_add(since),
        _ => UNIX_EPOCH.checked_sub(since),
    };
    time.unwrap_or(UNIX_EPOCH)
}

/// Whether a certificate is valid now; shown as `expired on 2026-01-01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For two weeks and more.
    Valid {
        /// To this time.
        to: SystemTime,
    },
    /// Valid, but not for long.
    ExpiresSoon {
        /// To this time.
        at: SystemTime,
        /// Whole days that are left.
        days: u64,
    },
    /// No more.
    Expired {
        /// Since this time.
        at: SystemTime,
    },
    /// Not yet.
    NotYet {
        /// From this time.
        from: SystemTime,
    },
}

impl Validity {
    /// Whether it is valid now.
    pub fn is_valid(self) -> bool {
        matches!(self, Self::Valid { .. } | Self::ExpiresSoon { .. })
    }

    /// What to do about it; nothing for one that is valid for long.
    pub fn mend(self) -> &'static str {
        match self {
            Self::Valid { .. } => "",
            Self::ExpiresSoon { .. } => "put a new one in its place; it is taken without a restart",
            Self::Expired { .. } => "put a new one in its place, or set this host's clock",
            Self::NotYet { .. } => "set this host's clock, or put another one in its place",
        }
    }
}

impl fmt::Display for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Valid { to } => write!(f, "is valid to {}", Date(to)),
            Self::ExpiresSoon { at, days } => {
                write!(f, "expires on {}, in {days} days", Date(at))
            }
            Self::Expired { at } => write!(f, "expired on {}", Date(at)),
            Self::NotYet { from } => write!(f, "isn't valid before {}", Date(from)),
        }
    }
}

/// A time as people read it: `2026-01-31 23:59:59 UTC`.
pub(super) struct Date(pub(super) SystemTime);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Beyond the years that the other one writes.
        if self.0 < UNIX_EPOCH {
            return f.write_str("a date before 1970");
        }
        let text = humantime::format_rfc3339_seconds(self.0).to_string();
        f.write_str(&text.replace('T', " ").replace('Z', " UTC"))
    }
}

/// What the certificates in a file say of themselves, for who wants to look at them.
///
/// # Errors
/// [`TlsFault::Unreadable`] and [`TlsFault::NoCertificate`].
pub fn inspect(setting: &'static str, file: &Path) -> Result<Vec<CertificateInfo>, TlsFault> {
    let unusable = || TlsFault::NoCertificate {
        setting,
        file: file.to_owned(),
    };
    certificates(setting, file, &read(setting, file)?)?
        .iter()
        .map(|certificate| CertificateInfo::read(certificate).ok_or_else(unusable))
        .collect()
}

/// A certificate with its key, and what the certificate says of itself.
pub(super) struct Identity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) info: CertificateInfo,
}

/// The settings that name the two files of an [`Identity`].
pub(super) const CERT_FILE: &str = "grpc.tls.cert_file";
pub(super) const KEY_FILE: &str = "grpc.tls.key_file";

impl Identity {
    /// Reads both files, and sees whether they belong together. Whether the certificate is valid now isn't
    /// looked at.
    pub(super) fn load(
        certificate: &Path,
        key: &Path,
        provider: &CryptoProvider,
    ) -> Result<Self, TlsFault> {
        let chain = certificates(CERT_FILE, certificate, &read(CERT_FILE, certificate)?)?;
        let info = chain.first().and_then(CertificateInfo::read);
        let Some(info) = info else {
            return Err(TlsFault::NoCertificate {
                setting: CERT_FILE,
                file: certificate.to_owned(),
            });
        };
        let no_key = || TlsFault::NoKey {
            setting: KEY_FILE,
            file: key.to_owned(),
        };
        let pem = read(KEY_FILE, key)?;
        let parsed = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| no_key())?;
        let signing = provider
            .key_provider
            .load_private_key(parsed.clone_key())
            .map_err(|_| no_key())?;
        match CertifiedKey::new(chain.clone(), signing).keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                return Err(TlsFault::KeyMismatch {
                    setting: KEY_FILE,
                    key: key.to_owned(),
                    certificate: certificate.to_owned(),
                });
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Self {
            chain,
            key: parsed,
            info,
        })
    }
}

/// The authorities in a file.
///
/// # Errors
/// [`TlsFault::Unreadable`] and [`TlsFault::NoCertificate`].
pub(super) fn authorities(setting: &'static str, file: &Path) -> Result<RootCertStore, TlsFault> {
    authorities_in(setting, file, &read(setting, file)?)
}

/// The same for a file that has been read.
pub(super) fn authorities_in(
    setting: &'static str,
    file: &Path,
    pem: &[u8],
) -> Result<RootCertStore, TlsFault> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(setting, file, pem)? {
        if let Some(info) = CertificateInfo::read(&certificate)
            && !info.is_authority
        {
            return Err(TlsFault::NoAuthority {
                setting,
                file: file.to_owned(),
                subject: info.subject,
            });
        }
        roots
            .add(certificate)
            .map_err(|_| TlsFault::NoCertificate {
                setting,
                file: file.to_owned(),
            })?;
    }
    Ok(roots)
}

/// The authorities that this system trusts.
pub(super) fn system_authorities(setting: &'static str) -> Result<RootCertStore, TlsFault> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    // Systems carry certificates that nobody can use any more; the others do.
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map(ToString::to_string);
        return Err(TlsFault::NoSystemRoots {
            setting,
            why: why.unwrap_or_default(),
        });
    }
    Ok(roots)
}

/// All certificates in PEM; at least one.
fn certificates(
    setting: &'static str,
    file: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| TlsFault::NoCertificate {
            setting,
            file: file.to_owned(),
        })
}

fn read(setting: &'static str, file: &Path) -> Result<Vec<u8>, TlsFault> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(file)?
            .take(MAX_FILE + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    };
    read().map_err(|source| TlsFault::Unreadable {
        setting,
        file: file.to_owned(),
        source,
    })
}

/// What files look like from outside: it changes when somebody writes one, or puts another in its
/// place, be it behind a symbolic link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamps(Vec<Option<Stamp>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamps {
    /// A cheap look: nothing is opened.
    pub(super) fn of(files: &[&Path]) -> Self {
        let stamp = |file: &&Path| {
            let meta = fs::metadata(file).ok()?;
            Some(Stamp {
                device: meta.dev(),
                inode: meta.ino(),
                size: meta.size(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                changed: (meta.ctime(), meta.ctime_nsec()),
            })
        };
        Self(files.iter().map(stamp).collect())
    }
}

/// What should be said of the time of the certificates in a file.
pub(super) fn warnings(
    setting: &'static str,
    file: &Path,
    certificates: &[CertificateInfo],
    now: SystemTime,
) -> Vec<String> {
    certificates
        .iter()
        .map(|certificate| certificate.validity(now))
        .filter(|validity| !matches!(validity, Validity::Valid { .. }))
        .map(|validity| {
            format!(
                "{setting}: {} {validity}: {}",
                file.display(),
                validity.mend()
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validity_at_its_edges() {
        let day = Duration::from_secs(24 * 60 * 60);
        let start = UNIX_EPOCH + day * 20_000;
        let info = CertificateInfo {
            subject: String::new(),
            issuer: String::new(),
            is_authority: false,
            dns: Vec::new(),
            addresses: Vec::new(),
            uris: Vec::new(),
            not_before: start,
            not_after: start + day * 30,
        };
        let shown = |now| info.validity(now).to_string();
        assert_eq!(
            shown(start - Duration::from_secs(1)),
            "isn't valid before 2024-10-04 00:00:00 UTC"
        );
        assert_eq!(shown(start), "is valid to 2024-11-03 00:00:00 UTC");
        assert_eq!(
            shown(start + day * 30 - SOON),
            "is valid to 2024-11-03 00:00:00 UTC"
        );
        assert_eq!(
            shown(start + day * 28),
            "expires on 2024-11-03 00:00:00 UTC, in 2 days"
        );
        assert!(info.validity(start + day * 30).is_valid());
        assert_eq!(
            shown(start + day * 31),
            "expired on 2024-11-03 00:00:00 UTC"
        );
        assert_eq!(time(-1), UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!(Date(time(-1)).to_string(), "a date before 1970");
    }

    #[test]
    fn addresses_in_certificates() {
        assert_eq!(address(&[127, 0, 0, 1]).as_deref(), Some("127.0.0.1"));
        let mut v6 = [0; 16];
        v6[15] = 1;
        assert_eq!(address(&v6).as_deref(), Some("::1"));
        assert_eq!(address(&[1, 2, 3]), None);
    }

    #[test]
    fn rubbish_is_no_certificate() {
        for bytes in [&b""[..], b"0", &[0x30, 0x80, 0, 0], &[0xff; 64]] {
            assert_eq!(CertificateInfo::read(&CertificateDer::from(bytes)), None);
        }
    }
}
