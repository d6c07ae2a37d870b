//! Sockets.
//!
//! Every listening socket of the server is made by [`listen`], so that all have the same options;
//! [`acceptor`] is the one task that accepts from them.

pub mod acceptor;
pub mod dial;
pub mod tls;

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::AsyncWrite;

use crate::ports::BindFailure;

/// How many connections may wait to be accepted on one port. The kernel caps it at
/// `net.core.somaxconn` (4096 on Linux by default).
pub const BACKLOG: i32 = 1024;

/// What may be handed to the kernel beyond what the peer's window takes, in bytes. It waits there
/// for a peer that doesn't read, and Linux would let it grow to 4 MiB a connection; with less, a
/// fast peer's window would run dry before a task is woken to fill it.
const UNSENT: u32 = 128 * 1024;

/// Bounds what the kernel takes ahead of time (`TCP_NOTSENT_LOWAT`). What is on its way to a peer
/// far away isn't bounded by it, so it doesn't cost throughput. Other systems than Linux keep their
/// smaller buffers.
///
/// # Errors
/// The system's, for a socket that is broken already.
pub fn bound_unsent(socket: &impl AsFd) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT)?;
    let _ = socket;
    Ok(())
}

/// Bounds what the kernel takes that nobody has read (`SO_RCVBUF`, doubled for its own records) of
/// each connection that a listener accepts from now on, instead of growing the buffer with the
/// sender's speed.
///
/// # Errors
/// The system's.
pub fn bound_unread(listener: &impl AsFd, bytes: usize) -> io::Result<()> {
    SockRef::from(listener).set_recv_buffer_size(bytes)
}

/// Listens on an address: nonblocking, closed on exec, and for whatever is accepted `TCP_NODELAY`
/// and [`bound_unsent`].
///
/// On `[::]` the socket serves IPv4 as well, and where the host has no IPv6 it falls back to
/// `0.0.0.0`. `SO_REUSEADDR` is set, so that a port whose connections linger in `TIME_WAIT` can
/// be bound; `SO_REUSEPORT` never is, so that a port on which another program listens, be it on
/// one address only, fails with [`io::ErrorKind::AddrInUse`]. [`bind_failure`] sorts the errors.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let any_v6 = address.is_ipv6() && address.ip().is_unspecified();
    match listen_on(address, any_v6) {
        Err(error) if any_v6 && lacks_ipv6(&error) => {
            listen_on((Ipv4Addr::UNSPECIFIED, address.port()).into(), false)
        }
        outcome => outcome,
    }
}

fn listen_on(address: SocketAddr, dual_stack: bool) -> io::Result<TcpListener> {
    // `Socket::new` closes on exec.
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    if dual_stack {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit these on Linux, which spares system calls for each of them.
    socket.set_tcp_nodelay(true)?;
    bound_unsent(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)
    )
}

/// How long a connection under [`keep_alive`] may be silent before the kernel asks the peer's host
/// whether it is there, and how often it asks again without an answer: routers on the way forget
/// silent connections after two minutes or more.
const ASK_AFTER: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_secs(15);
const ASK_TIMES: u32 = 4;

/// Has the kernel look whether the peer's host is still there while nothing is sent; if it isn't,
/// the connection breaks after two minutes. For connections that nothing else limits in time: a
/// host that lost its power says no goodbye.
pub fn keep_alive(socket: &tokio::net::TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(ASK_AFTER)
        .with_interval(ASK_AGAIN)
        .with_retries(ASK_TIMES);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Writes parts in order, as many bytes as are taken; no parts at all count as none taken.
///
/// A single part, as most heads and small answers are, goes out by `send`: the kernel has no list
/// of parts to read.
pub fn poll_write(
    stream: Pin<&mut impl AsyncWrite>,
    cx: &mut Context<'_>,
    parts: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    match parts {
        [part] => stream.poll_write(cx, part),
        parts => stream.poll_write_vectored(cx, parts),
    }
}

/// What a failed [`listen`] means for the port.
pub fn bind_failure(error: &io::Error) -> BindFailure {
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => BindFailure::InUse,
        Some(Errno::ACCESS | Errno::PERM) => BindFailure::Denied,
        // NOSPC: the limit of sockets that may be watched at once.
        Some(errno) if out_of_descriptors(errno) || errno == Errno::NOSPC => {
            BindFailure::Descriptors
        }
        _ => BindFailure::Other,
    }
}

/// Whether the process or the host is out of descriptors or of memory for sockets.
fn out_of_descriptors(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM
    )
}

/// The limit of open file descriptors of this process; `None` is "no limit".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorLimit {
    /// What the process was started with.
    pub before: Option<u64>,
    /// What holds now.
    pub now: Option<u64>,
}

/// Raises the soft limit of file descriptors to the hard one.
///
/// Each agent costs a listening socket, each visitor a connection, and the soft limit is 1,024
/// on most hosts. An error leaves the limit as it was.
pub fn raise_descriptor_limit() -> io::Result<DescriptorLimit> {
    let limit = getrlimit(Resource::Nofile);
    let mut now = limit.current;
    if limit.current != limit.maximum {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        )?;
        now = limit.maximum;
    }
    Ok(DescriptorLimit {
        before: limit.current,
        now,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpStream};

    use super::*;

    #[test]
    fn one_socket_on_any_address_serves_both_families() {
        let listener = listen((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let error = listen((Ipv4Addr::LOCALHOST, port).into()).unwrap_err();
        assert_eq!(bind_failure(&error), BindFailure::InUse);
    }

    #[test]
    fn a_port_that_is_bound_but_not_listened_on_is_in_use() {
        let holder = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        holder
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        let port = holder.local_addr().unwrap().as_socket().unwrap().port();
        let error = listen((Ipv6Addr::UNSPECIFIED, port).into()).unwrap_err();
        assert_eq!(bind_failure(&error), BindFailure::InUse);
    }

    #[test]
    fn bind_errors_are_told_apart() {
        let kind = |errno: Errno| bind_failure(&errno.into());
        assert_eq!(kind(Errno::ADDRINUSE), BindFailure::InUse);
        assert_eq!(kind(Errno::ACCESS), BindFailure::Denied);
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
            assert_eq!(kind(errno), BindFailure::Descriptors);
        }
        assert_eq!(kind(Errno::ADDRNOTAVAIL), BindFailure::Other);
        let foreign = io::Error::other("no errno at all");
        assert_eq!(bind_failure(&foreign), BindFailure::Other);
    }

    #[tokio::test]
    async fn a_connection_is_asked_for_signs_of_life() {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        assert!(!SockRef::from(&stream).keepalive().unwrap());
        keep_alive(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), ASK_AFTER);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), ASK_AGAIN);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), ASK_TIMES);
    }

    #[test]
    fn a_host_without_ipv6_is_told_by_its_errors() {
        assert!(lacks_ipv6(&Errno::AFNOSUPPORT.into()));
        assert!(!lacks_ipv6(&Errno::ADDRINUSE.into()));
        assert!(!lacks_ipv6(&Errno::MFILE.into()));
    }

    #[test]
    fn the_soft_limit_of_descriptors_is_raised_to_the_hard_one() {
        let raised = raise_descriptor_limit().unwrap();
        assert_eq!(raised.now, getrlimit(Resource::Nofile).maximum);
        assert_eq!(raise_descriptor_limit().unwrap().before, raised.now);
    }
}
