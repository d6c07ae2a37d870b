//! TLS: files of certificates, the two ends of a tunnel, and what is said when it fails.
//!
//! [`ServerTls`] and [`AgentTls`] hold what is read from the files of `grpc.tls`, and read it again
//! when the files have changed: running tunnels go on, new ones get the new certificate, and a
//! file that can't be used changes nothing but the log. [`service`] makes what an agent needs to
//! call an `https` service.
//!
//! An agent refuses a server whose certificate it doesn't accept, as everybody does. A server takes
//! any certificate of an agent that proves to hold its key, and looks at it right after the
//! handshake: one that isn't valid is a failed credential, but the agent can be told so in words
//! rather than by an alert. Until then such a peer is what any other is that has connected and not
//! said who it is.
//!
//! Nothing is resumed: a tunnel lasts for days, so the tickets would only cost memory, and every
//! handshake looks at the certificates anew.

mod client;
mod files;
mod peer;
mod reload;
mod server;
mod stream;

pub use client::{AgentTls, service};
pub use files::{CertificateInfo, TlsFault, Validity, inspect};
pub use peer::{Failed, PeerCertificate, Refused};
pub use reload::Refresh;
pub use server::ServerTls;
pub use stream::{Sniffed, Stream, TLS_ALERT, TLS_HANDSHAKE};

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// What a tunnel's connections agree upon: HTTP/2.
const ALPN_TUNNEL: &[u8] = b"h2";

/// Named here, so that it doesn't matter what the process as a whole has chosen, or hasn't.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
