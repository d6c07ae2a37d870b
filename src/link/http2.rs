//! The HTTP/2 connections under the tunnels: hyper futures that their owner drives and drops.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::rt::{Read, Write};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::task::AbortHandle;

/// What goes wrong on an HTTP/2 connection.
pub use hyper::Error;

/// The largest HTTP/2 frame accepted: a batch goes in one.
const MAX_FRAME: u32 = 128 * 1024;

/// How much is handed to HTTP/2 ahead of time. What lies there can't be overtaken by a
/// heartbeat, so it is little: two batches, one on its way and one ready.
const SEND_BUFFER: usize = 128 * 1024;

/// How many bytes HTTP/2 may hold of a tunnel before it is read: little, as each session's task
/// reads at once and credit bounds what it keeps, but enough for a link of 1 Gbit/s with 100 ms of
/// round trip. Before the hello, the server's guard allows far less.
const STREAM_WINDOW: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// What may be handed to the kernel beyond what the peer has taken. Like [`SEND_BUFFER`], it lies
/// where nothing can overtake it, and Linux would let it grow to megabytes.
const UNSENT: u32 = 128 * 1024;

/// Sets a tunnel's socket up: batches are whole messages, so nothing is gained by waiting for
/// more; and little is handed to the kernel ahead of time.
///
/// # Errors
/// The system's, for a socket that is broken already.
pub fn prepare(stream: &tokio::net::TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // Other systems keep their smaller buffers.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    Ok(())
}

/// The most streams on one connection: a tunnel is one.
const MAX_STREAMS: u32 = 4;

/// The largest header list accepted on a tunnel connection; gRPC's are a few hundred bytes.
const MAX_HEADER_LIST: u32 = 16 * 1024;

/// A builder for the server's end of tunnel connections.
pub fn server() -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_LIST);
    builder
}

/// Opens the client's end of a tunnel connection: a service for tonic's client, and the
/// connection, which does nothing unless it is polled and ends when it is dropped, with every
/// task that hyper has started for it: a peer that takes no bytes any more can't keep it open.
/// It also ends when the service and its clones are gone, so hold one as long as the tunnel.
pub async fn client<T>(
    io: T,
) -> hyper::Result<(
    Http2Service,
    impl Future<Output = hyper::Result<()>> + Send + use<T>,
)>
where
    T: Read + Write + Unpin + Send + 'static,
{
    let tasks = Tasks::default();
    let abort = AbortOnDrop(tasks.clone());
    let (sender, connection) = hyper::client::conn::http2::Builder::new(tasks)
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEADER_LIST)
        .handshake(io)
        .await?;
    let connection = async move {
        let _abort = abort;
        connection.await
    };
    Ok((Http2Service(sender), connection))
}

/// The tasks of one client connection: its I/O and, as a tunnel is one stream, two for that.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<Vec<AbortHandle>>>);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let handle = tokio::spawn(task).abort_handle();
        let mut handles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        handles.push(handle);
    }
}

struct AbortOnDrop(Tasks);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        let mut handles = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        handles.drain(..).for_each(|handle| handle.abort());
    }
}

/// Sends tonic's requests over one HTTP/2 connection.
#[derive(Debug, Clone)]
pub struct Http2Service(SendRequest<tonic::body::Body>);

impl tower_service::Service<Request<tonic::body::Body>> for Http2Service {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        // Once a session: the allocation doesn't matter.
        Box::pin(self.0.send_request(request))
    }
}
