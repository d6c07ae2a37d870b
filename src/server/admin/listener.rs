//! Connections to the admin port: how many, how slow, how long.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower_service::Service;

/// What one peer, or many, can make the admin port hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections open at once. One more is closed at once: the poller sees it and tries again,
    /// while a descriptor held for it would be missing on an agent's port.
    pub connections: usize,
    /// From the connection to its first complete head. A slow head is no poller.
    pub first_head: Duration,
    /// From one answer to the next complete head. Longer than the usual period of a poller (up to
    /// 60 s), so that the connection is there when he comes again.
    pub idle: Duration,
    /// How long the peer may take nothing of an answer (Linux; a bound on what stalled readers
    /// hold).
    pub stall: Duration,
    /// From the shutdown signal to the end of answers that are being written.
    pub grace: Duration,
}

pub(super) const LIMITS: Limits = Limits {
    connections: 4096,
    first_head: Duration::from_secs(10),
    idle: Duration::from_secs(75),
    stall: Duration::from_secs(30),
    grace: Duration::from_secs(1),
};

/// The largest head that is read, and about what is buffered of an answer ahead of the peer.
const BUFFER_BYTES: usize = 64 * 1024;

/// A failed `accept` is tried again after this long: without file descriptors it fails at once, and
/// would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) fn set_up(
    listener: std::net::TcpListener,
) -> io::Result<(Runtime, tokio::net::TcpListener)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    Ok((runtime, listener))
}

pub(super) async fn accept(
    limits: Limits,
    listener: tokio::net::TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let (stop, stopped) = watch::channel(());
    let accepting = async {
        let mut failing = false;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    failing = false;
                    if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                        let serving = serve(limits, stream, router.clone(), stopped.clone(), slot);
                        tokio::spawn(serving);
                    }
                }
                // The peer was gone before its turn came (accept(2)); there may be others.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "the admin port can't accept connections");
                    }
                    failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        () = accepting => {}
    }
    drop(listener);
    drop(stop);
    // Every connection holds a slot to its end, so having them all means that none is left.
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(limits.grace, slots.acquire_many(all)).await;
}

/// Serves one connection to its end. The slot is held as long as the socket is.
async fn serve(
    limits: Limits,
    stream: TcpStream,
    router: Router,
    mut stopped: watch::Receiver<()>,
    _slot: OwnedSemaphorePermit,
) {
    // Without these two the connection works all the same.
    let _ = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(limits.stall));

    let begun = Arc::new(AtomicBool::new(false));
    let service = {
        let begun = Arc::clone(&begun);
        hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            // Whoever asks only what everybody may ask, or shows no key, is no poller yet.
            let is_open = request.uri().path() == "/health";
            let (begun, answer) = (begun.clone(), router.clone().call(request));
            async move {
                let answer = answer.await?;
                let refused = answer.status().is_client_error();
                if !is_open && !refused {
                    begun.store(true, Relaxed);
                }
                Ok::<_, std::convert::Infallible>(answer)
            }
        })
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // hyper counts the time between requests as part of the next head's.
        .header_read_timeout(limits.idle)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let mut first_head = std::pin::pin!(tokio::time::sleep(limits.first_head));
    let mut waiting = true;
    let mut serving = true;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an admin connection ended early");
                }
                break;
            }
            () = first_head.as_mut(), if waiting => {
                if !begun.load(Relaxed) {
                    break;
                }
                waiting = false;
            }
            _ = stopped.changed(), if serving => {
                serving = false;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}
