//! `silo-proxy certs`: a private authority and certificates for the tunnel, so that nobody needs
//! openssl.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use thiserror::Error;

use super::{Failure, Outcome, say};
use crate::auth::Names;
use crate::id::AgentId;
use crate::net::tls::{TlsFault, Validity, inspect};

/// How long the authority lives, in days: longer than what it signs, and than most hosts.
const AUTHORITY_DAYS: u32 = 3650;

/// How much earlier than now a certificate begins, for hosts whose clocks are behind.
const CLOCKS_APART: Duration = Duration::from_secs(60 * 60);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Make a private authority and certificates, for TLS on the tunnel
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  silo-proxy certs init --host proxy.example --host 192.0.2.7
  silo-proxy certs agent my-service

The first makes the authority and the server's certificate, the second an agent's. Each prints
the settings that use them. Nothing is overwritten unless --force says so.")]
pub(super) struct CertsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Init(InitArgs),
    Agent(AgentArgs),
}

/// Make an authority and the server's certificate
#[derive(Debug, clap::Args)]
struct InitArgs {
    /// A name or an address by which agents reach the server; may be given several times
    #[arg(long = "host", value_name = "NAME", required = true)]
    hosts: Vec<String>,
    #[command(flatten)]
    place: Place,
    /// Make a new server certificate in place of the old one. The authority is kept
    #[arg(long)]
    force: bool,
}

/// Make an agent's certificate
#[derive(Debug, clap::Args)]
struct AgentArgs {
    /// The agent's id
    #[arg(value_name = "ID")]
    id: AgentId,
    #[command(flatten)]
    place: Place,
    /// Make a new one in place of the old one
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// Where the files are. Whoever can read ca.key there can make himself any agent
    #[arg(long, value_name = "DIR", default_value = "certs")]
    dir: PathBuf,
    /// How many days the certificate is valid
    #[arg(long, value_name = "N", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    days: u32,
}

/// Why certificates can't be made.
#[derive(Debug, Error)]
enum CertsError {
    /// There is one already.
    #[error(
        "{} is there already, and nothing was changed: --force makes a new one in its place{}",
        .0.display(), .1
    )]
    Exists(PathBuf, &'static str),
    /// The authority is missing.
    #[error("no authority in {}: `silo-proxy certs init --host NAME` makes one", .0.display())]
    NoAuthority(PathBuf),
    /// There is one of the authority's two files.
    #[error(
        "{} is there and {} is missing: an authority is both; bring the other back, or name another \
         --dir",
        .0.display(), .1.display()
    )]
    HalfAuthority(PathBuf, PathBuf),
    /// The authority's certificate can't sign any more.
    #[error("the authority {} {}: name another --dir and make a new one", .0.display(), .1)]
    Expired(PathBuf, Validity),
    /// The authority's certificate can't be read.
    #[error(transparent)]
    Unreadable(#[from] TlsFault),
    /// The operating system gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
    /// A name that can't stand in a certificate.
    #[error("--host {0:?} is neither a DNS name nor an IP address")]
    Host(String),
    /// A file can't be read or written.
    #[error("{}: {}", .0.display(), .1)]
    File(PathBuf, io::Error),
    /// Making keys or signing failed.
    #[error("can't make the certificate: {0}")]
    Made(#[from] rcgen::Error),
}

pub(super) fn run(args: CertsArgs) -> Outcome {
    match args.what {
        What::Init(args) => init(&args),
        What::Agent(args) => agent(&args),
    }
    .map_err(|error| match error {
        CertsError::Host(_) => Failure::usage(error),
        error => Failure::failed(error),
    })
}

fn init(args: &InitArgs) -> Result<(), CertsError> {
    let names = args.hosts.iter().map(|host| subject_name(host));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let dir = &args.place.dir;
    let files = Files::new(dir, "server");
    files.refuse_to_overwrite(args.force, ", and keeps the authority")?;
    let authority = match Authority::load(dir) {
        Ok(_) if !args.force => {
            let file = Files::new(dir, "ca").certificate;
            return Err(CertsError::Exists(file, ", and keeps the authority"));
        }
        Err(CertsError::NoAuthority(_)) => Authority::create(dir)?,
        authority => authority?,
    };
    let mut params = leaf(&args.hosts[0], &authority, args.place.days);
    params.subject_alt_names = names;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    files.write(params, &authority)?;
    let ca = Files::new(dir, "ca");
    say(format_args!(
        "Made {} and {}, for {}.\nKeep {} to yourself: whoever has it can make himself any agent.\n\n\
         For the server:\n\n\
         grpc:\n  tls:\n    enabled: true\n    cert_file: {}\n    key_file: {}\n    ca_file: {}\n    \
         client_auth: require\n\n\
         For each agent: silo-proxy certs agent ID --dir {}",
        files.certificate.display(),
        files.key.display(),
        args.hosts.join(", "),
        ca.key.display(),
        absolute(&files.certificate),
        absolute(&files.key),
        absolute(&ca.certificate),
        dir.display(),
    ));
    Ok(())
}

fn agent(args: &AgentArgs) -> Result<(), CertsError> {
    let dir = &args.place.dir;
    // A directory of their own, since an agent may be called "ca" or "server".
    let files = Files::new(&dir.join("agents"), args.id.as_str());
    files.refuse_to_overwrite(args.force, "")?;
    let authority = Authority::load(dir)?;
    let mut params = leaf(args.id.as_str(), &authority, args.place.days);
    let uri = format!("{}{}", Names::URI_PREFIX, args.id);
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    if is_dns_name(args.id.as_str()) {
        let name = args.id.to_string().try_into()?;
        params.subject_alt_names.push(SanType::DnsName(name));
    }
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    files.write(params, &authority)?;
    let ca = Files::new(dir, "ca").certificate;
    let (ca, own, key) = (
        absolute(&ca),
        absolute(&files.certificate),
        absolute(&files.key),
    );
    say(format_args!(
        "Made {} and {}.\nThe agent needs these two and {}; nothing else of this directory.\n\n\
         For the agent:\n\n\
         grpc:\n  agent_id: {id}\n  tls:\n    enabled: true\n    ca_file: {ca}\n    cert_file: {own}\n    \
         key_file: {key}\n\n\
         Or: silo-proxy agent http PORT --server HOST:9090 --id {id} --tls-ca {ca} --tls-cert {own} \
         --tls-key {key}",
        files.certificate.display(),
        files.key.display(),
        Files::new(dir, "ca").certificate.display(),
        id = args.id,
    ));
    Ok(())
}

/// A name for the server's certificate.
fn subject_name(host: &str) -> Result<SanType, CertsError> {
    let bare = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    if let Ok(address) = bare.unwrap_or(host).parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let wrong = || CertsError::Host(host.to_owned());
    if !is_dns_name(host.strip_prefix("*.").unwrap_or(host)) {
        return Err(wrong());
    }
    Ok(SanType::DnsName(host.try_into().map_err(|_| wrong())?))
}

/// Whether a text may stand as a dNSName (RFC 5280, section 4.2.1.6): labels of letters, digits and
/// hyphens, and no IP address.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label) && name.parse::<IpAddr>().is_err()
}

/// A certificate with its key, as files.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    fn new(dir: &Path, name: &str) -> Self {
        Self {
            certificate: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        }
    }

    fn refuse_to_overwrite(&self, force: bool, but: &'static str) -> Result<(), CertsError> {
        for file in [&self.certificate, &self.key] {
            if !force && file.symlink_metadata().is_ok() {
                return Err(CertsError::Exists(file.clone(), but));
            }
        }
        Ok(())
    }

    /// Makes a key, has its certificate signed, and writes both.
    fn write(&self, params: CertificateParams, authority: &Authority) -> Result<(), CertsError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &authority.issuer)?;
        self.store(&certificate.pem(), &key.serialize_pem())
    }

    fn store(&self, certificate: &str, key: &str) -> Result<(), CertsError> {
        write(&self.key, key, 0o600)?;
        write(&self.certificate, certificate, 0o644)
    }
}

/// Puts a whole file in its place, so that a running process never reads half of one.
fn write(file: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let put = || {
        if let Some(dir) = file.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut new = file.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let _ = fs::remove_file(&new);
        let mut open = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        open.write_all(text.as_bytes())?;
        open.sync_all()?;
        fs::rename(&new, file)
    };
    put().map_err(|error| CertsError::File(file.to_owned(), error))
}

/// What signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Nothing it signs outlives it.
    not_after: SystemTime,
}

impl Authority {
    fn create(dir: &Path) -> Result<Self, CertsError> {
        let files = Files::new(dir, "ca");
        let not_after = SystemTime::now() + DAY * AUTHORITY_DAYS;
        let mut params = CertificateParams::default();
        // No two have the same name, so that one can't be taken for the other.
        let number = getrandom::u32().map_err(CertsError::Random)?;
        let name = format!("silo-proxy private authority {number:08x}");
        params.distinguished_name = common_name(&name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (SystemTime::now() - CLOCKS_APART).into();
        params.not_after = not_after.into();
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?;
        files.store(&certificate.pem(), &key.serialize_pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            not_after,
        })
    }

    fn load(dir: &Path) -> Result<Self, CertsError> {
        let Files { certificate, key } = Files::new(dir, "ca");
        match (certificate.exists(), key.exists()) {
            (true, true) => {}
            (false, false) => return Err(CertsError::NoAuthority(dir.to_owned())),
            (true, false) => return Err(CertsError::HalfAuthority(certificate, key)),
            (false, true) => return Err(CertsError::HalfAuthority(key, certificate)),
        }
        let info = inspect("--dir", &certificate)?.swap_remove(0);
        let validity = info.validity(SystemTime::now());
        if !validity.is_valid() {
            return Err(CertsError::Expired(certificate, validity));
        }
        let read = |file: &Path| {
            fs::read_to_string(file).map_err(|error| CertsError::File(file.to_owned(), error))
        };
        let signing = KeyPair::from_pem(&read(&key)?)?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&read(&certificate)?, signing)?,
            not_after: info.not_after,
        })
    }
}

/// What a server's and an agent's certificate have in common.
fn leaf(name: &str, authority: &Authority, days: u32) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now - CLOCKS_APART).into();
    params.not_after = (now + DAY * days).min(authority.not_after).into();
    params
}

/// A distinguished name of 64 characters at most (RFC 5280, appendix A.1). Nobody decides by it.
fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    let short: String = name.chars().take(64).collect();
    distinguished.push(DnType::CommonName, short);
    distinguished
}

fn absolute(path: &Path) -> String {
    let absolute = path.canonicalize();
    absolute.as_deref().unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_certificates() {
        for good in ["a", "agent-1", "proxy.example", "a1.b-2.c"] {
            assert!(is_dns_name(good), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "a..b",
            "a_b",
            "a.",
            "127.0.0.1",
            "::1",
            "*.a",
        ] {
            assert!(!is_dns_name(bad), "{bad}");
        }
        for good in ["::1", "[::1]", "127.0.0.1", "*.proxy.example", "localhost"] {
            assert!(subject_name(good).is_ok(), "{good}");
        }
        for bad in ["", "*", "a b", "host:9090", "http://host"] {
            assert!(subject_name(bad).is_err(), "{bad}");
        }
    }
}
