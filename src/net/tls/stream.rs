//! A connection with TLS or without.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;
use tokio_util::either::Either;

/// What a TLS alert begins with (RFC 8446, section 5.1): no frame that HTTP/2 begins with does.
pub const TLS_ALERT: u8 = 21;

/// What a TLS connection begins with (RFC 8446, section 5.1).
pub const TLS_HANDSHAKE: u8 = 22;

/// In clear on the left, TLS on the right; that is boxed, being ten times the size of the other.
pub type Stream<S> = Either<S, Box<TlsStream<S>>>;

/// A socket that notes the first byte it gave: when what follows isn't understood, that byte says
/// what the peer speaks.
#[derive(Debug)]
pub struct Sniffed<S> {
    io: S,
    /// 0x100 with the byte; 0 before. Relaxed: nothing else is read because of it.
    first: Arc<AtomicU16>,
}

impl<S> Sniffed<S> {
    /// Watches a socket of which nothing has been read.
    pub fn new(io: S) -> Self {
        let first = Arc::default();
        Self { io, first }
    }

    /// Says what the first byte was, if one has come; also when the socket is gone.
    pub fn first_byte(&self) -> impl Fn() -> Option<u8> + Send + Sync + use<S> {
        let first = self.first.clone();
        move || {
            let [noted, byte] = first.load(Ordering::Relaxed).to_be_bytes();
            (noted != 0).then_some(byte)
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sniffed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.io).poll_read(cx, buffer);
        if self.first.load(Ordering::Relaxed) == 0
            && let Some(byte) = buffer.filled().get(before)
        {
            self.first
                .store(0x100 | u16::from(*byte), Ordering::Relaxed);
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sniffed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
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
