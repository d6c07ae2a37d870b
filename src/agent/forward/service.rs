//! The local service: how to connect to it, and what it wants to see.

use std::future::Future;
use std::io;
use std::time::Duration;

use http::HeaderValue;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;

use crate::config::{HostHeader, HostPort, LocalConfig, Protocol, Scheme, ServiceUrl};
use crate::head::RequestHead;
use crate::net::tls::{Stream, TlsFault};
use crate::net::{self, tls};

/// Where the local service is and how it is spoken to.
pub(in crate::agent) struct Service {
    address: HostPort,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    connect_timeout: Duration,
    protocol: Protocol,
    /// The service's own name as a Host value.
    pub(super) own_host: HeaderValue,
    /// What replaces the visitor's Host.
    pub(super) host: Option<HeaderValue>,
}

/// Why the local service can't be reached as the settings say.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The value can't stand in a header.
    #[error("local.host_header: {0:?} can't be a Host header")]
    HostHeader(String),
    /// TLS can't be set up.
    #[error(transparent)]
    Tls(#[from] TlsFault),
}

impl Service {
    /// Reads the certificates; connects nowhere.
    pub(in crate::agent) fn new(config: &LocalConfig) -> Result<Self, ServiceError> {
        let ServiceUrl { scheme, address } = &config.service_url;
        let tls = match scheme {
            Scheme::Http => None,
            Scheme::Https => Some(tls::service(&config.tls, &address.host)?),
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
            protocol: config.protocol,
            own_host,
            host,
        })
    }

    /// Whether it is to get a request as HTTP/2.
    pub(super) fn takes_http2(&self, head: &RequestHead) -> bool {
        match self.protocol {
            Protocol::Http1 => false,
            Protocol::H2c => true,
            Protocol::Auto => is_grpc(head),
        }
    }

    /// Whether it is spoken to over TLS.
    pub(super) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Opens a connection for HTTP/1, TLS included.
    pub(super) async fn connect(&self) -> io::Result<ServiceStream> {
        self.in_time(self.connect_untimed(ALPN_HTTP1)).await
    }

    /// Opens a connection for HTTP/2, TLS included.
    pub(super) async fn connect_for_http2(&self) -> io::Result<ServiceStream> {
        self.in_time(self.connect_untimed(ALPN_HTTP2)).await
    }

    async fn in_time(
        &self,
        connected: impl Future<Output = io::Result<ServiceStream>>,
    ) -> io::Result<ServiceStream> {
        tokio::time::timeout(self.connect_timeout, connected)
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
    }

    async fn connect_untimed(&self, alpn: &[u8]) -> io::Result<ServiceStream> {
        let tcp = net::dial::connect(&self.address.host, self.address.port).await?;
        Ok(match &self.tls {
            None => Either::Left(tcp),
            Some((connector, name)) => {
                let connector = connector.with_alpn(vec![alpn.to_vec()]);
                let stream = connector.connect(name.clone(), tcp).await?;
                // Who doesn't say so doesn't speak it (RFC 9113, section 3.2).
                if alpn == ALPN_HTTP2 && stream.get_ref().1.alpn_protocol() != Some(alpn) {
                    return Err(io::Error::other("the local service speaks no HTTP/2"));
                }
                Either::Right(Box::new(stream.into()))
            }
        })
    }
}

/// What is agreed upon in a TLS handshake.
const ALPN_HTTP1: &[u8] = b"http/1.1";
const ALPN_HTTP2: &[u8] = b"h2";

/// Whether a request is a call of gRPC, which is HTTP/2 or nothing.
fn is_grpc(head: &RequestHead) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    head.lines.iter().any(|(name, value)| {
        name.eq_ignore_ascii_case(b"content-type")
            && value
                .split_at_checked(GRPC.len())
                .is_some_and(|(kind, rest)| {
                    kind.eq_ignore_ascii_case(GRPC) && matches!(rest, [] | [b'+' | b';' | b' ', ..])
                })
    })
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

/// A connection to the service.
pub(super) type ServiceStream = Stream<TcpStream>;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::head::LinesBuilder;

    #[test]
    fn grpc_is_known_by_its_content() {
        for (value, grpc) in [
            ("application/grpc", true),
            ("Application/gRPC+proto", true),
            ("application/grpc; charset=x", true),
            // It is made for HTTP/1.
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/json", false),
            ("application/", false),
        ] {
            let mut lines = LinesBuilder::default();
            lines.push(b"Content-Type", value.as_bytes()).unwrap();
            let head = RequestHead {
                method: Bytes::from_static(b"POST"),
                target: Bytes::from_static(b"/"),
                lines: lines.finish(),
            };
            assert_eq!(is_grpc(&head), grpc, "{value}");
        }
    }
}
