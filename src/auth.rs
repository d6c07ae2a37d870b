//! Who may use which agent id, and who may read the admin port.
//!
//! Pure: a credential goes in, a verdict comes out. Every comparison takes constant time.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::id::{AgentId, Secret};

/// Which credential each agent id needs.
///
/// | Configured | An id with a token of its own | Any other id |
/// | --- | --- | --- |
/// | nothing | | from loopback only, without a credential |
/// | `tokens` | that token | refused |
/// | `shared` | | the shared token |
/// | both | that token, the shared one is refused | the shared token |
///
/// Once anything is configured, where the agent comes from no longer matters. Holders of the
/// shared token trust each other: any of them may use any id without a token of its own.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The credential for every id that has none of its own.
    pub shared: Option<Secret>,
    /// Ids bound to a credential of their own.
    pub tokens: BTreeMap<AgentId, Secret>,
}

/// Why an agent may not use the id it claims; the text is for the agent's operator.
///
/// A wrong token and an unknown id read the same, so that guessing tells nothing about the ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
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
    /// The credential is not the one for this id.
    #[error(
        "grpc.token is not valid for this agent id: compare both with the server's grpc.auth; \
         an id with a token of its own takes no other"
    )]
    Invalid,
}

impl Policy {
    /// Whether no credential is configured at all, so that only loopback is accepted.
    pub fn is_open(&self) -> bool {
        self.shared.is_none() && self.tokens.is_empty()
    }

    /// Decides whether `id` may be used by a peer that shows `credential`.
    ///
    /// An empty credential counts as none. `peer_is_loopback` is the address the connection comes
    /// from, an IPv4-mapped one included; it matters only when nothing is configured.
    pub fn check(
        &self,
        id: &AgentId,
        credential: Option<&[u8]>,
        peer_is_loopback: bool,
    ) -> Result<(), Denied> {
        if self.is_open() {
            return if peer_is_loopback {
                Ok(())
            } else {
                Err(Denied::LoopbackOnly)
            };
        }
        let Some(credential) = credential.filter(|bytes| !bytes.is_empty()) else {
            return Err(Denied::Missing);
        };
        match self.tokens.get(id).or(self.shared.as_ref()) {
            Some(secret) if secret.matches(credential) => Ok(()),
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
        }
    }

    #[test]
    fn without_credentials_only_loopback_enters() {
        let open = policy(None, &[]);
        assert!(open.is_open());
        assert_eq!(open.check(&id("a"), None, true), Ok(()));
        assert_eq!(open.check(&id("a"), Some(b"whatever"), true), Ok(()));
        assert_eq!(open.check(&id("a"), None, false), Err(Denied::LoopbackOnly));
        assert_eq!(
            open.check(&id("a"), Some(b"whatever"), false),
            Err(Denied::LoopbackOnly)
        );
        assert!(Denied::LoopbackOnly.to_string().contains("grpc.auth"));
    }

    #[test]
    fn with_any_credential_loopback_needs_one_too() {
        for policy in [policy(Some("s"), &[]), policy(None, &[("b", "t")])] {
            for loopback in [true, false] {
                assert_eq!(policy.check(&id("a"), None, loopback), Err(Denied::Missing));
                assert_eq!(
                    policy.check(&id("a"), Some(b""), loopback),
                    Err(Denied::Missing)
                );
            }
        }
    }

    #[test]
    fn an_id_with_its_own_token_takes_no_other() {
        let policy = policy(Some("shared"), &[("a", "own-a"), ("b", "own-b")]);
        let verdict = |name: &str, token: &[u8]| policy.check(&id(name), Some(token), false);
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
        let unknown = policy.check(&id("z"), Some(b"own-a"), true);
        let wrong = policy.check(&id("a"), Some(b"nope"), true);
        assert_eq!(unknown, Err(Denied::Invalid));
        assert_eq!(wrong, unknown);
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
