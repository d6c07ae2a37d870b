//! A connection to the service, and what has come over it.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncWrite, Interest};
use tokio::net::TcpStream;
use tokio_util::either::Either;
use tokio_util::io::poll_read_buf;

use super::service::ServiceStream;
use crate::http1::Outgoing;
use crate::net;

/// How much is asked for at once to begin with: more than most answers.
const SMALL_READ: usize = 8 * 1024;

/// How much is asked for at once when the service has filled all that was asked for before.
const LARGE_READ: usize = 64 * 1024;

/// A connection to the service. It does nothing unless it is polled.
pub(super) struct Connection {
    stream: ServiceStream,
    /// What has come and wasn't used yet.
    input: BytesMut,
    /// How much to ask for next.
    read_size: usize,
}

impl Connection {
    pub(super) fn new(stream: ServiceStream) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            read_size: SMALL_READ,
        }
    }

    /// What has come and wasn't used yet.
    pub(super) fn received(&self) -> &[u8] {
        &self.input
    }

    /// The same, to be taken.
    pub(super) fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// Waits for more to come; 0 at the end of the connection.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.room() < self.read_size / 4 {
            // Free if nothing of the buffer is in use any more.
            self.input.reserve(self.read_size);
        }
        let read = ready!(poll_read_buf(
            Pin::new(&mut self.stream),
            cx,
            &mut self.input
        ))?;
        if self.room() == 0 {
            self.read_size = LARGE_READ;
        } else if read < SMALL_READ {
            self.read_size = SMALL_READ;
        }
        Poll::Ready(Ok(read))
    }

    fn room(&self) -> usize {
        self.input.capacity() - self.input.len()
    }

    /// Writes as much as the service takes.
    pub(super) fn poll_write(
        &mut self,
        out: &mut Outgoing,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = Pin::new(&mut self.stream);
        match ready!(out.with_slices(|slices| net::poll_write(stream, cx, slices)))? {
            0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            written => {
                out.advance(written);
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Sends on what was written and waits in a layer of encryption.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Tells the service that nothing follows on what was written. It may go on sending.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    /// Has the kernel look whether the service's host is still there while the connection is
    /// idle.
    pub(super) fn keep_alive(&self) {
        // Without it the connection works as well.
        let _ = net::keep_alive(self.socket());
    }

    /// Waits for the service to close the connection, while nothing is asked of it. Whatever it
    /// sends then is no answer to anything: it counts as closing.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.input.capacity() > SMALL_READ {
            // What a large answer has grown, an idle connection doesn't keep.
            self.input = BytesMut::new();
        }
        self.poll_fill(cx).map(|_| ())
    }

    /// Whether nothing has come since the last answer was complete, not even the end of the
    /// connection: what is there now would be taken for the answer to the next request. The kernel
    /// is asked only if the runtime has heard of something since the last read; what comes later
    /// than the runtime's last look may as well come after this one.
    pub(super) fn is_quiet(&self) -> bool {
        let socket = self.socket();
        let peeked = socket.try_io(Interest::READABLE, || {
            SockRef::from(socket).peek(&mut [MaybeUninit::uninit()])
        });
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Ends the connection so that the service can't take what it got for a whole request, and
    /// hears of it even if it doesn't read.
    pub(super) fn cut(self) {
        // If that fails it is broken already.
        let _ = self.socket().set_zero_linger();
    }

    fn socket(&self) -> &TcpStream {
        match &self.stream {
            Either::Left(plain) => plain,
            Either::Right(tls) => tls.get_ref().0,
        }
    }

    /// So much of what has come is used.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.input.advance(bytes);
    }
}
