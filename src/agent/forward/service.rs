//! The local service: how to connect to it, and what it wants to see.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::HeaderValue;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

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
        let io = match &self.tls {
            None => Stream::Plain(tcp),
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), tcp).await?;
                Stream::Tls(Box::new(stream.into()))
            }
        };
        Ok(ServiceStream {
            io,
            traffic: Arc::default(),
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

/// A connection to the service that counts its bytes.
pub(super) struct ServiceStream {
    io: Stream<TcpStream>,
    traffic: Arc<Traffic>,
}

/// The bytes a connection has carried. Whether a request may be sent again depends on them.
///
/// Relaxed throughout: the connection and whoever asks are one task.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    read: AtomicU64,
    written: AtomicU64,
}

impl Traffic {
    /// Bytes read and written.
    pub(super) fn now(&self) -> (u64, u64) {
        (
            self.read.load(Ordering::Relaxed),
            self.written.load(Ordering::Relaxed),
        )
    }

    fn note(counter: &AtomicU64, bytes: usize) {
        // One task writes: no read-modify-write needed.
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(bytes as u64),
            Ordering::Relaxed,
        );
    }
}

impl ServiceStream {
    pub(super) fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = result {
            Traffic::note(&self.traffic.written, bytes);
        }
        result
    }
}

impl AsyncRead for ServiceStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buffer);
        Traffic::note(&self.traffic.read, buffer.filled().len() - before);
        result
    }
}

impl AsyncWrite for ServiceStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buffer);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, buffers);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
