//! Who may use which agent id, and who may read the admin port.
//!
//! Pure: a credential goes in, a verdict comes out. Every comparison takes constant time.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use crate::id::{AgentId, Secret};

/// Which credential each agent id needs.
///
/// Without client certificates:
///
/// | Configured | An id with a token of its own | Any other id |
/// | --- | --- | --- |
/// | nothing | | from loopback only, without a credential |
/// | `tokens` | that token | refused |
/// | `shared` | | the shared token |
/// | both | that token, the shared one is refused | the shared token |
///
/// With them, by what the agent shows:
///
/// | `certificates` | names the id | names others only | isn't valid | none |
/// | --- | --- | --- | --- | --- |
/// | [`Request`](ClientAuth::Request) | enough | the token decides | refused | the token decides |
/// | [`Require`](ClientAuth::Require), no tokens configured | enough | refused | refused | refused |
/// | [`Require`](ClientAuth::Require), and tokens | the token decides | refused | refused | refused |
///
/// "The token decides" as in the first table, but for its first line: where no token is configured
/// there is none that would do. Once anything is configured, where the agent comes from no longer
/// matters. Holders of the shared token trust each other: any of them may use any id without a
/// token of its own.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The credential for every id that has none of its own.
    pub shared: Option<Secret>,
    /// Ids bound to a credential of their own.
    pub tokens: BTreeMap<AgentId, Secret>,
    /// What client certificates count for.
    pub certificates: ClientAuth,
}

/// What client certificates count for, `grpc.tls.client_auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientAuth {
    /// Nobody is asked for one.
    #[default]
    None,
    /// One is a credential for the ids it names, as a token is.
    Request,
    /// Every agent needs one that names its id.
    Require,
}

/// What an agent shows beside the id it claims.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shown<'a> {
    /// Its token; an empty one counts as none.
    pub token: Option<&'a [u8]>,
    /// Its certificate.
    pub certificate: Certificate<'a>,
    /// Whether it comes from this host, by an IPv4-mapped address perhaps. Matters only when
    /// nothing is configured.
    pub from_loopback: bool,
}

/// A client certificate of which the agent has proved that it holds the key.
#[derive(Debug, Clone, Copy, Default)]
pub enum Certificate<'a> {
    /// There is none.
    #[default]
    None,
    /// It isn't valid: a failed credential. The text says why, and what mends it.
    Invalid(&'a str),
    /// A trusted authority has signed it, and it is valid now.
    Verified(&'a Names),
}

/// The names in a certificate that can be an agent's (RFC 5280, section 4.2.1.6).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// Each dNSName. One that is the agent's id, in any case of letters, names it; a wildcard
    /// names nobody.
    pub dns: Vec<String>,
    /// Each URI. `silo:agent:ID` names the agent, written exactly so.
    pub uris: Vec<String>,
}

impl Names {
    /// What the URI of an agent's certificate begins with; its id follows.
    pub const URI_PREFIX: &'static str = "silo:agent:";

    /// Whether the certificate is one for this id.
    fn name(&self, id: &AgentId) -> bool {
        let id = id.as_str();
        let is_uri = |uri: &String| uri.strip_prefix(Self::URI_PREFIX) == Some(id);
        self.dns.iter().any(|name| name.eq_ignore_ascii_case(id)) || self.uris.iter().any(is_uri)
    }
}

impl fmt::Display for Names {
    /// The first few, escaped: whoever made the certificate chose them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        const LONGEST: usize = 80;
        let all = || self.dns.iter().chain(&self.uris);
        for (index, name) in all().take(SHOWN).enumerate() {
            let separator = if index > 0 { ", " } else { "" };
            let short: String = name.chars().take(LONGEST).collect();
            write!(f, "{separator}{}", short.escape_debug())?;
        }
        match all().count() {
            0 => f.write_str("nobody"),
            count if count > SHOWN => write!(f, " and {} more", count - SHOWN),
            _ => Ok(()),
        }
    }
}

/// Why an agent may not use the id it claims; the text is for the agent's operator.
///
/// A wrong token and an unknown id read the same, so that guessing tells nothing about the ids.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Denied {
    /// The server has no credential configured and the agent is on another host.
    #[error(
        "this server has no credential configured, so it accepts agents from its own host only: \
         set grpc.auth.shared_token or grpc.auth.tokens on the server, and grpc.token on the agent"
    )]
    LoopbackOnly,
    /// The agent showed no credential and the server wants one.
    #[error("this server requires a credential, from agents on its own host too: set grpc.token")]
    Missing,
    /// The same where a certificate would do.
    #[error(
        "this server requires a credential, from agents on its own host too: set \
         grpc.tls.cert_file and grpc.tls.key_file, or grpc.token"
    )]
    MissingEither,
    /// The credential is not the one for this id.
    #[error(
        "grpc.token is not valid for this agent id: compare both with the server's grpc.auth; \
         an id with a token of its own takes no other"
    )]
    Invalid,
    /// The server wants a client certificate and the agent has shown none.
    #[error(
        "this server requires a client certificate: set grpc.tls.cert_file and grpc.tls.key_file \
         (`silo-proxy certs agent ID` beside the server's authority makes one)"
    )]
    CertificateMissing,
    /// The certificate isn't valid.
    #[error("the client certificate is not accepted: {0}")]
    CertificateInvalid(String),
    /// The certificate is for other ids.
    #[error(
        "the client certificate names {0} and not this agent id: set grpc.agent_id to the name in \
         it, or have one made with `silo-proxy certs agent ID`"
    )]
    CertificateForOthers(String),
}

impl Policy {
    /// Whether no credential is configured at all, so that only loopback is accepted.
    pub fn is_open(&self) -> bool {
        !self.has_tokens() && self.certificates == ClientAuth::None
    }

    fn has_tokens(&self) -> bool {
        self.shared.is_some() || !self.tokens.is_empty()
    }

    /// Decides whether `id` may be used by a peer that shows these credentials.
    pub fn check(&self, id: &AgentId, shown: Shown<'_>) -> Result<(), Denied> {
        if self.is_open() {
            return if shown.from_loopback {
                Ok(())
            } else {
                Err(Denied::LoopbackOnly)
            };
        }
        if self.certificates == ClientAuth::None {
            return self.check_token(id, shown.token, Denied::Missing);
        }
        let required = self.certificates == ClientAuth::Require;
        match shown.certificate {
            Certificate::Invalid(why) => Err(Denied::CertificateInvalid(why.to_owned())),
            Certificate::Verified(names) if names.name(id) => match required {
                true if self.has_tokens() => self.check_token(id, shown.token, Denied::Missing),
                _ => Ok(()),
            },
            Certificate::None if required => Err(Denied::CertificateMissing),
            Certificate::None => self.check_token(id, shown.token, Denied::MissingEither),
            Certificate::Verified(names) => {
                let for_others = Denied::CertificateForOthers(names.to_string());
                match required {
                    true => Err(for_others),
                    false => self.check_token(id, shown.token, for_others),
                }
            }
        }
    }

    fn check_token(
        &self,
        id: &AgentId,
        token: Option<&[u8]>,
        missing: Denied,
    ) -> Result<(), Denied> {
        let Some(token) = token.filter(|bytes| !bytes.is_empty()) else {
            return Err(missing);
        };
        match self.tokens.get(id).or(self.shared.as_ref()) {
            Some(secret) if secret.matches(token) => Ok(()),
            _ => Err(Denied::Invalid),
        }
    }
}

/// What callers of the admin port must show, if anything.
#[derive(Debug, Clone, Default)]
pub struct ApiKey(Option<Secret>);

impl ApiKey {
    /// Requires `key` of every caller; with `None` everybody may read.
    pub fn new(key: Option<Secret>) -> Self {
        Self(key)
    }

    /// Whether no key is asked for.
    pub fn is_open(&self) -> bool {
        self.0.is_none()
    }

    /// Whether a caller may go on, from the values of his `X-API-Key` and `Authorization` headers.
    ///
    /// Either is enough, and a wrong one does no harm beside a right one. The scheme `Bearer` is
    /// written in any case (RFC 9110, section 11.1); blanks around a key don't count.
    pub fn admits(&self, x_api_key: Option<&[u8]>, authorization: Option<&[u8]>) -> bool {
        let Some(key) = &self.0 else { return true };
        let shown = |candidate: Option<&[u8]>| {
            candidate.is_some_and(|bytes| key.matches(bytes.trim_ascii()))
        };
        shown(x_api_key) | shown(authorization.and_then(bearer))
    }
}

/// The credential of an `Authorization` value with the scheme `Bearer` (RFC 6750, section 2.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.trim_ascii_start().split_at_checked(6)?;
    let separated = rest.first().is_some_and(|byte| *byte == b' ');
    (separated && scheme.eq_ignore_ascii_case(b"bearer")).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> AgentId {
        text.parse().unwrap()
    }

    fn policy(shared: Option<&str>, tokens: &[(&str, &str)]) -> Policy {
        Policy {
            shared: shared.map(Secret::new),
            tokens: tokens
                .iter()
                .map(|(name, token)| (id(name), Secret::new(*token)))
                .collect(),
            certificates: ClientAuth::None,
        }
    }

    fn shown(token: Option<&[u8]>, from_loopback: bool) -> Shown<'_> {
        Shown {
            token,
            from_loopback,
            ..Shown::default()
        }
    }

    #[test]
    fn without_credentials_only_loopback_enters() {
        let open = policy(None, &[]);
        assert!(open.is_open());
        for token in [None, Some(&b"whatever"[..])] {
            assert_eq!(open.check(&id("a"), shown(token, true)), Ok(()));
            let remote = open.check(&id("a"), shown(token, false));
            assert_eq!(remote, Err(Denied::LoopbackOnly));
        }
        assert!(Denied::LoopbackOnly.to_string().contains("grpc.auth"));
    }

    #[test]
    fn with_any_credential_loopback_needs_one_too() {
        for policy in [policy(Some("s"), &[]), policy(None, &[("b", "t")])] {
            for loopback in [true, false] {
                for token in [None, Some(&b""[..])] {
                    let verdict = policy.check(&id("a"), shown(token, loopback));
                    assert_eq!(verdict, Err(Denied::Missing));
                }
            }
        }
    }

    #[test]
    fn an_id_with_its_own_token_takes_no_other() {
        let policy = policy(Some("shared"), &[("a", "own-a"), ("b", "own-b")]);
        let verdict = |name: &str, token: &[u8]| policy.check(&id(name), shown(Some(token), false));
        assert_eq!(verdict("a", b"own-a"), Ok(()));
        assert_eq!(verdict("a", b"own-b"), Err(Denied::Invalid));
        assert_eq!(verdict("a", b"shared"), Err(Denied::Invalid));
        assert_eq!(verdict("c", b"shared"), Ok(()));
        assert_eq!(verdict("c", b"own-a"), Err(Denied::Invalid));
        assert_eq!(verdict("c", b"share"), Err(Denied::Invalid));
    }

    #[test]
    fn an_unknown_id_reads_like_a_wrong_token() {
        let policy = policy(None, &[("a", "own-a")]);
        let unknown = policy.check(&id("z"), shown(Some(b"own-a"), true));
        let wrong = policy.check(&id("a"), shown(Some(b"nope"), true));
        assert_eq!(unknown, Err(Denied::Invalid));
        assert_eq!(wrong, unknown);
    }

    fn names(dns: &[&str], uris: &[&str]) -> Names {
        let owned = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        Names {
            dns: owned(dns),
            uris: owned(uris),
        }
    }

    #[test]
    fn a_certificate_names_ids_exactly() {
        for good in [
            names(&["agent-1"], &[]),
            names(&["other", "Agent-1"], &[]),
            names(&[], &["silo:agent:agent-1"]),
            names(&["other"], &["https://x", "silo:agent:agent-1"]),
        ] {
            assert!(good.name(&id("agent-1")), "{good}");
        }
        for bad in [
            names(&[], &[]),
            names(&["*"], &[]),
            names(&["*.agent-1", "agent-1.", "agent-10", "agent"], &[]),
            names(&[], &["silo:agent:agent-10", "silo:agent:", "agent-1"]),
            names(&[], &["SILO:agent:agent-1", "silo:agent:Agent-1"]),
            names(&["silo:agent:agent-1"], &["silo:agent:*"]),
        ] {
            assert!(!bad.name(&id("agent-1")), "{bad}");
        }
        assert_eq!(names(&[], &[]).to_string(), "nobody");
        let many = names(&["a\n", "b", "c"], &["d", "e"]);
        assert_eq!(many.to_string(), "a\\n, b, c and 2 more");
    }

    /// The second table of [`Policy`], line by line.
    #[test]
    fn certificates_count_as_configured() {
        let own = names(&["a"], &[]);
        let foreign = names(&["b"], &["silo:agent:c"]);
        let named = Certificate::Verified(&own);
        let others = Certificate::Verified(&foreign);
        let invalid = Certificate::Invalid("it expired");
        let for_others = || Err(Denied::CertificateForOthers("b, silo:agent:c".into()));
        let not_valid = || Err(Denied::CertificateInvalid("it expired".into()));
        let token = Some(&b"t"[..]);
        let wrong = Some(&b"x"[..]);

        let with = |certificates, shared| Policy {
            certificates,
            ..policy(shared, &[])
        };
        let bare = with(ClientAuth::Request, None);
        let request = with(ClientAuth::Request, Some("t"));
        let require = with(ClientAuth::Require, None);
        let both = with(ClientAuth::Require, Some("t"));
        let lax = with(ClientAuth::None, Some("t"));
        for (policy, certificate, token, verdict) in [
            (&bare, named, None, Ok(())),
            (&bare, Certificate::None, None, Err(Denied::MissingEither)),
            (&bare, Certificate::None, token, Err(Denied::Invalid)),
            (&bare, others, None, for_others()),
            (&bare, invalid, None, not_valid()),
            (&request, named, None, Ok(())),
            (&request, named, wrong, Ok(())),
            (&request, Certificate::None, token, Ok(())),
            (&request, Certificate::None, wrong, Err(Denied::Invalid)),
            (&request, others, None, for_others()),
            (&request, others, token, Ok(())),
            (&request, others, wrong, Err(Denied::Invalid)),
            (&request, invalid, token, not_valid()),
            (&require, named, None, Ok(())),
            (
                &require,
                Certificate::None,
                token,
                Err(Denied::CertificateMissing),
            ),
            (&require, others, token, for_others()),
            (&require, invalid, token, not_valid()),
            (&both, named, token, Ok(())),
            (&both, named, None, Err(Denied::Missing)),
            (&both, named, wrong, Err(Denied::Invalid)),
            (&both, others, token, for_others()),
            (&both, invalid, token, not_valid()),
            (
                &both,
                Certificate::None,
                token,
                Err(Denied::CertificateMissing),
            ),
            // Nobody was asked for a certificate.
            (&lax, named, None, Err(Denied::Missing)),
            (&lax, invalid, token, Ok(())),
        ] {
            // With any of them, it no longer matters where the agent comes from.
            for from_loopback in [true, false] {
                let shown = Shown {
                    token,
                    certificate,
                    from_loopback,
                };
                assert!(!policy.is_open());
                let told = policy.check(&id("a"), shown);
                assert_eq!(told, verdict, "{policy:?} {shown:?}");
            }
        }
    }

    #[test]
    fn a_certificate_is_one_of_two_keys_to_an_id_with_a_token_of_its_own() {
        let own = names(&["a"], &[]);
        let shown = Shown {
            certificate: Certificate::Verified(&own),
            ..Shown::default()
        };
        let request = Policy {
            certificates: ClientAuth::Request,
            ..policy(None, &[("a", "t")])
        };
        assert_eq!(request.check(&id("a"), shown), Ok(()));
        // With both required, an id without a token has none that would do.
        let require = Policy {
            certificates: ClientAuth::Require,
            ..policy(None, &[("b", "t")])
        };
        let verdict = require.check(
            &id("a"),
            Shown {
                token: Some(b"t"),
                ..shown
            },
        );
        assert_eq!(verdict, Err(Denied::Invalid));
    }

    #[test]
    fn the_admin_key_is_taken_from_either_header() {
        let key = ApiKey::new(Some(Secret::new("k3y")));
        assert!(key.admits(Some(b"k3y"), None));
        assert!(key.admits(Some(b" k3y "), None));
        for good in ["Bearer k3y", "bearer k3y", "BEARER  k3y "] {
            assert!(key.admits(None, Some(good.as_bytes())), "{good:?}");
        }
        assert!(key.admits(Some(b"wrong"), Some(b"Bearer k3y")));
        for bad in [
            "k3y",
            "Basic k3y",
            "Bearerk3y",
            "Bearer",
            "Bearer k3",
            "\u{e9}",
        ] {
            assert!(!key.admits(None, Some(bad.as_bytes())), "{bad:?}");
        }
        assert!(!key.admits(None, None));
        assert!(!key.admits(Some(b""), Some(b"Bearer ")));
    }

    #[test]
    fn without_an_admin_key_everybody_reads() {
        assert!(ApiKey::default().admits(None, None));
        assert!(ApiKey::default().admits(Some(b"x"), None));
    }
}
