//! The local service: how to connect to it, and what it wants to see.

use std::io;
use std::time::Duration;

use http::HeaderValue;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;

use crate::config::{HostHeader, HostPort, LocalConfig, Scheme, ServiceUrl};
use crate::net::tls::{Stream, TlsFault};
use crate::net::{self, tls};

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
                let stream = connector.connect(name.clone(), tcp).await?;
                Either::Right(Box::new(stream.into()))
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

/// A connection to the service.
pub(super) type ServiceStream = Stream<TcpStream>;
