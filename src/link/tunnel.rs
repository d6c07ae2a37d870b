//! A tunnel's connection: one gRPC call on one socket, driven by one task.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

use super::{CloseOnDrop, Ended, Link, Observer, Transmission};
use crate::grpc::{self, Connection, Event, Status, Target};
use crate::mux::Frame;
use crate::wire::{self, Message};

/// What a read takes that finds nothing waiting: onto the stack, so that an idle tunnel has no
/// buffer.
const SMALL_READ: usize = 2 * 1024;

/// What a read takes after one that was more than small, and after one that filled that.
const MEDIUM_READ: usize = 16 * 1024;
const LARGE_READ: usize = 128 * 1024;

/// Why a tunnel's connection can't go on.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer closed the socket in the middle of the call.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer broke the rules of HTTP/2 or gRPC, or ended the call by them.
    #[error("{0}")]
    Grpc(#[from] grpc::Error),
    /// The server ended the call with an error, or without having begun it.
    #[error("{0}")]
    Status(Status),
    /// A message that can't be understood.
    #[error("a message that can't be decoded: {0}")]
    Decode(#[from] wire::DecodeError),
}

/// One end of a tunnel's connection. Nothing happens unless one of its futures is polled.
#[derive(Debug)]
pub struct Tunnel<T> {
    io: T,
    call: Connection,
    /// What was read and not yet taken apart.
    input: BytesMut,
    /// What the next read takes.
    read_size: usize,
    /// Whether something was written that isn't flushed.
    unflushed: bool,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Tunnel<T> {
    /// The server's end, which waits for the call.
    pub fn server(io: T) -> Self {
        Self::new(io, Connection::server(wire::METHOD, wire::MAX_MESSAGE))
    }

    /// The client's end, which calls.
    pub fn client(io: T, secure: bool, authority: &str) -> Self {
        let target = Target {
            secure,
            authority,
            path: wire::METHOD,
            user_agent: concat!("silo-proxy/", env!("CARGO_PKG_VERSION")),
        };
        Self::new(io, Connection::client(target, wire::MAX_MESSAGE))
    }

    fn new(io: T, call: Connection) -> Self {
        Self {
            io,
            call,
            input: BytesMut::new(),
            read_size: SMALL_READ,
            unflushed: false,
        }
    }

    /// What it runs over.
    pub fn io_mut(&mut self) -> &mut T {
        &mut self.io
    }

    /// Waits for what comes next, and sends what there is to send meanwhile.
    ///
    /// # Errors
    /// Whatever ends the connection. The peer is told of what it did wrong, as far as the socket
    /// takes it.
    pub async fn next(&mut self) -> Result<Event, Error> {
        poll_fn(|cx| {
            loop {
                // What the peer doesn't take can wait.
                let _ = self.poll_flush(cx)?;
                if let Some(event) = self.take(cx)? {
                    return Poll::Ready(Ok(event));
                }
                ready!(self.poll_fill(cx))?;
            }
        })
        .await
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// As [`Tunnel::next`]; and the end of the call is one.
    pub async fn message<M: Message>(&mut self) -> Result<M, Error> {
        match self.next().await? {
            Event::Message(message) => Ok(M::read(message, self.read_size)?),
            Event::End(status) => Err(Error::Status(status)),
            Event::Call { .. } | Event::Refused => Err(Error::Closed),
        }
    }

    /// Whether the peer has closed the connection already, as far as that can be seen now. What it
    /// sent before stays to be read.
    pub async fn is_closed(&mut self) -> bool {
        poll_fn(|cx| {
            loop {
                match self.poll_fill(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(true),
                    Poll::Pending => return Poll::Ready(false),
                }
            }
        })
        .await
    }

    /// Sends a message: a first one, or a last one, for what comes meanwhile is dropped.
    ///
    /// # Errors
    /// Whatever ends the connection.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), Error> {
        let mut sent = false;
        poll_fn(|cx| {
            loop {
                ready!(self.poll_flush(cx))?;
                if sent && !self.call.is_waiting() {
                    return Poll::Ready(Ok(()));
                }
                if !sent && self.call.takes_message() {
                    self.put(message);
                    sent = true;
                    continue;
                }
                // A window has to open first.
                ready!(self.poll_fill(cx))?;
                while self.take(cx)?.is_some() {}
            }
        })
        .await
    }

    /// Ends our side after what was sent, and reads what comes until the peer closes: whatever lies
    /// unread when a socket is closed resets the connection, and the last word may be lost. Bound
    /// it in time: the peer may never close.
    pub async fn finish(&mut self) {
        self.call.end();
        let left = poll_fn(|cx| {
            ready!(self.poll_flush(cx))?;
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            loop {
                self.input.clear();
                ready!(self.poll_fill(cx))?;
            }
        });
        // It ends with an error at best: that the peer has closed.
        let _: Result<(), Error> = left.await;
    }

    /// Carries what the link has to say, and tells it what comes, until one side ends. When it
    /// returns, every exchange has ended.
    ///
    /// `I` comes and `O` goes.
    pub async fn drive<I, O>(&mut self, link: &Link, observer: &mut impl Observer) -> Ended
    where
        I: Message,
        O: Message + From<Vec<Frame>>,
    {
        // Whoever drops this future ends the tunnel as well.
        let _close = CloseOnDrop(link);
        let mut timer = pin!(sleep_until(link.next_timeout()));
        let mut round_trip = None;
        // The first messages, and even the end, may have come with the one before.
        let mut unread = true;
        poll_fn(|cx| {
            if link.poll_closed(cx).is_ready() {
                return Poll::Ready(Ended::ClosedHere);
            }
            loop {
                // What has come first: it may have to be answered.
                let filled = match std::mem::take(&mut unread) {
                    true => Some(0),
                    false => match self.poll_fill(cx) {
                        Poll::Ready(Ok(read)) => Some(read),
                        Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                        Poll::Pending => None,
                    },
                };
                if filled.is_some()
                    && let Err(ended) = self.receive::<I>(link, observer, &mut round_trip, cx)
                {
                    return Poll::Ready(ended);
                }
                if let Err(ended) = self.transmit::<O>(link, observer, cx) {
                    return Poll::Ready(ended);
                }
                match filled {
                    // Last: where this process was stopped for a while, what came meanwhile counts.
                    None => return poll_time(link, timer.as_mut(), cx),
                    Some(LARGE_READ..) => {
                        // Those who read it have their turn while it is in the processor's cache,
                        // and its room can be used again.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Some(_) => {}
                }
            }
        })
        .await
    }

    fn receive<I: Message>(
        &mut self,
        link: &Link,
        observer: &mut impl Observer,
        round_trip: &mut Option<Duration>,
        cx: &mut Context<'_>,
    ) -> Result<(), Ended> {
        let mut is_whole = false;
        while let Some(event) = self.take(cx)? {
            is_whole = true;
            let message = match event {
                Event::Message(message) => message,
                Event::End(Status { code: 0, .. }) => return Err(Ended::Closed),
                Event::End(status) => return Err(Error::Status(status).into()),
                Event::Call { .. } | Event::Refused => continue,
            };
            let mut message = I::read(message, self.read_size).map_err(Error::from)?;
            if let Some(rejection) = message.take_rejection() {
                observer.rejected(rejection);
            }
            let received = link.receive(message)?;
            observer.received(received.frames);
            if received.round_trip != *round_trip
                && let Some(measured) = received.round_trip
            {
                *round_trip = received.round_trip;
                observer.round_trip(measured);
            }
        }
        if !is_whole {
            // A part of a message, or a frame below them, is a sign of life too.
            link.heard();
        }
        Ok(())
    }

    /// Sends as much as there is and the peer takes.
    fn transmit<O: Message + From<Vec<Frame>>>(
        &mut self,
        link: &Link,
        observer: &mut impl Observer,
        cx: &mut Context<'_>,
    ) -> Result<(), Ended> {
        loop {
            if self.poll_flush(cx)?.is_pending() || !self.call.takes_message() {
                return Ok(());
            }
            let mut frames = Vec::new();
            match link.poll_transmit(cx, &mut frames) {
                Poll::Ready(Transmission::Batch) => {
                    observer.sent(frames.len());
                    self.put(&O::from(frames));
                }
                Poll::Ready(Transmission::Last) => self.call.end(),
                Poll::Ready(Transmission::Closed) => return Err(Ended::ClosedHere),
                Poll::Pending => return Ok(()),
            }
        }
    }

    fn put(&mut self, message: &impl Message) {
        self.call.send(message.length(), |out| message.write(out));
    }

    /// What is in what was read. The peer is told what is wrong with it.
    fn take(&mut self, cx: &mut Context<'_>) -> Result<Option<Event>, Error> {
        let event = self.call.receive(&mut self.input);
        if self.input.is_empty() && self.read_size == SMALL_READ {
            self.input = BytesMut::new();
        }
        event.map_err(|error| {
            self.call.go_away(&error);
            // As far as the socket takes it.
            let _ = self.poll_flush(cx);
            error.into()
        })
    }

    /// Reads more, how much is the result; an error at the end of what the peer sends.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Error>> {
        let room;
        let read = if self.read_size == SMALL_READ && self.input.is_empty() {
            room = SMALL_READ;
            let mut space = [std::mem::MaybeUninit::uninit(); SMALL_READ];
            let mut space = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut space))?;
            self.input.extend_from_slice(space.filled());
            space.filled().len()
        } else {
            // A frame that is only announced gets no room for all of it yet.
            let announced = self.call.missing(&self.input).min(8 * self.input.len());
            let wanted = self.read_size.max(announced);
            if self.input.capacity() - self.input.len() < wanted / 4 {
                // Free if nothing of the buffer is in use any more.
                self.input.reserve(wanted);
            }
            room = self.input.capacity() - self.input.len();
            ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut self.input))?
        };
        self.read_size = match read {
            0 => return Poll::Ready(Err(Error::Closed)),
            _ if read == room => (self.read_size * 8).min(LARGE_READ),
            _ if read < SMALL_READ => SMALL_READ,
            _ => self.read_size.max(MEDIUM_READ),
        };
        Poll::Ready(Ok(read))
    }

    /// Writes what there is to write.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while !self.call.output().is_empty() {
            let wrote = ready!(Pin::new(&mut self.io).poll_write(cx, self.call.output()))?;
            if wrote == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
            self.call.wrote(wrote);
            self.unflushed = true;
        }
        if self.unflushed {
            // TLS keeps what the socket hasn't taken.
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Does what is due.
fn poll_time(link: &Link, mut timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<Ended> {
    while timer.as_mut().poll(cx).is_ready() {
        if let Err(error) = link.handle_timeout() {
            return Poll::Ready(error.into());
        }
        timer.as_mut().reset(link.next_timeout());
    }
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;
    use crate::mux::{Budget, Config, Pool};
    use crate::wire::{AgentMessage, Hello, Rejection, ServerMessage, Welcome};

    const CONFIG: Config = Config {
        max_exchanges: 8,
        heartbeat_interval: Duration::from_secs(10),
        heartbeat_timeout: Duration::from_secs(30),
    };

    fn link() -> Link {
        Link::acceptor(CONFIG, Budget::new(Pool::new(1 << 20), 1 << 20))
    }

    /// What an agent's end comes to.
    async fn drive(agent: &mut Tunnel<DuplexStream>, link: &Link) -> (Ended, Option<Rejection>) {
        let mut noted = Noted::default();
        let ended = agent
            .drive::<ServerMessage, AgentMessage>(link, &mut noted)
            .await;
        (ended, noted.0)
    }

    #[derive(Default)]
    struct Noted(Option<Rejection>);

    impl Observer for Noted {
        fn received(&mut self, _: usize) {}

        fn round_trip(&mut self, _: Duration) {}

        fn rejected(&mut self, rejection: Rejection) {
            self.0 = Some(rejection);
        }
    }

    /// A call that has begun, over pipes of this size.
    async fn call(size: usize) -> (Tunnel<DuplexStream>, Tunnel<DuplexStream>) {
        let (ours, theirs) = duplex(size);
        let mut agent = Tunnel::client(ours, false, "server.test:9090");
        let mut server = Tunnel::server(theirs);
        let hello = AgentMessage::from(Hello::default());
        let said = agent.send(&hello);
        let heard = async {
            let call = server.next().await.unwrap();
            assert!(matches!(call, Event::Call { .. }), "{call:?}");
            server.message::<AgentMessage>().await.unwrap()
        };
        let (said, heard) = tokio::join!(said, heard);
        said.unwrap();
        assert_eq!(heard.hello, hello.hello);
        (agent, server)
    }

    #[tokio::test]
    async fn a_whole_session_may_come_in_one_read() {
        let (mut agent, mut server) = call(1 << 16).await;
        let welcome = ServerMessage::from(Welcome::default());
        let rejection = Rejection {
            detail: "enough".into(),
            ..Rejection::default()
        };
        let rejected = ServerMessage::from(rejection.clone());
        server.send(&welcome).await.unwrap();
        server.send(&rejected).await.unwrap();
        // Its end too, and the connection's: nobody waits for ours.
        let _ = timeout(Duration::from_millis(1), server.finish()).await;
        drop(server);
        let first: ServerMessage = agent.message().await.unwrap();
        assert_eq!(first.welcome, welcome.welcome);
        let (ended, noted) = drive(&mut agent, &link()).await;
        assert!(matches!(ended, Ended::Closed), "{ended}");
        assert_eq!(noted, Some(rejection));
    }

    #[tokio::test]
    async fn a_last_word_passes_a_pipe_that_takes_a_byte_at_a_time() {
        let (mut agent, mut server) = call(1).await;
        let link = link();
        link.finish();
        let last = ServerMessage::from(Rejection::default());
        let serve = async {
            assert!(matches!(server.next().await, Ok(Event::End(status)) if status == Status::OK));
            server.send(&last).await.unwrap();
            server.finish().await;
        };
        let driven = async {
            let (ended, noted) = drive(&mut agent, &link).await;
            assert!(matches!(ended, Ended::Closed), "{ended}");
            // The peer waits for this.
            drop(agent);
            noted
        };
        let ((), noted) = tokio::join!(serve, driven);
        assert_eq!(noted, Some(Rejection::default()));
    }

    /// A tunnel at a server, and the raw end of a client whose streams begin with this window.
    async fn called(window: u8) -> (Tunnel<DuplexStream>, DuplexStream) {
        let (mut ours, theirs) = duplex(1 << 16);
        let path = wire::METHOD.as_bytes();
        let mut block = vec![0x83, 0x86, 0x04, path.len() as u8];
        block.extend(path);
        block.extend(b"\x0f\x10\x10application/grpc");
        let mut said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        said.extend([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, window]);
        said.extend([0, 0, block.len() as u8, 1, 4, 0, 0, 0, 1]);
        said.extend(block);
        ours.write_all(&said).await.unwrap();
        let mut server = Tunnel::server(theirs);
        let call = server.next().await.unwrap();
        assert!(matches!(call, Event::Call { .. }), "{call:?}");
        (server, ours)
    }

    #[tokio::test(start_paused = true)]
    async fn a_last_word_is_said_when_its_window_has_taken_all_of_it() {
        let (mut server, mut client) = called(20).await;
        let last = ServerMessage::from(Rejection::default());
        let mut said = pin!(server.send(&last));
        let early = timeout(Duration::from_secs(1), said.as_mut()).await;
        assert!(early.is_err(), "{early:?}");
        let window_update = b"\0\0\x04\x08\0\0\0\0\x01\0\0\x04\0";
        client.write_all(window_update).await.unwrap();
        said.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn any_byte_is_a_sign_of_life() {
        let (mut agent, server) = call(1 << 16).await;
        let Tunnel { mut io, .. } = server;
        let link = link();
        let since = tokio::time::Instant::now();
        let drip = async {
            // A frame with a message that takes longer than a tunnel may be silent.
            io.write_all(b"\x01\0\0\0\0\0\0\0\x01\0\0\0\xff\xfb")
                .await
                .unwrap();
            for _ in 0..10 {
                tokio::time::sleep(CONFIG.heartbeat_interval).await;
                io.write_all(b"x").await.unwrap();
            }
            std::future::pending().await
        };
        let (ended, _) = tokio::select! {
            driven = drive(&mut agent, &link) => driven,
            never = drip => never,
        };
        let silent = since.elapsed() - 10 * CONFIG.heartbeat_interval;
        assert!(matches!(ended, Ended::Session(_)), "{ended}");
        assert!(silent >= CONFIG.heartbeat_timeout, "{ended}");
        assert!(silent < CONFIG.heartbeat_timeout + CONFIG.heartbeat_interval);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_counts_before_the_time_does() {
        let (mut agent, mut server) = call(1 << 16).await;
        let link = link();
        let ping = ServerMessage::from(vec![Frame::Ping { nonce: 1 }]);
        server.send(&ping).await.unwrap();
        // The process was stopped meanwhile.
        tokio::time::advance(2 * CONFIG.heartbeat_timeout).await;
        let driven = timeout(Duration::from_secs(1), drive(&mut agent, &link)).await;
        assert!(driven.is_err(), "{driven:?}");
    }

    #[tokio::test]
    async fn a_frame_that_is_only_announced_gets_little_room() {
        let (mut agent, server) = call(1 << 16).await;
        let Tunnel { mut io, .. } = server;
        // Data of 128 KiB, of which the first byte comes.
        let head = b"\x02\0\0\0\0\0\0\0\x01x";
        for byte in head.chunks(1) {
            io.write_all(byte).await.unwrap();
            let driven = timeout(Duration::from_millis(1), agent.next()).await;
            assert!(driven.is_err(), "{driven:?}");
        }
        assert!(agent.input.capacity() <= 2 * SMALL_READ);
    }

    #[tokio::test]
    async fn what_a_peer_does_wrong_it_is_told() {
        let (mut agent, server) = call(1 << 16).await;
        let Tunnel { mut io, .. } = server;
        let ping_on_a_stream = b"\0\0\x08\x06\0\0\0\0\x0112345678";
        io.write_all(ping_on_a_stream).await.unwrap();
        let ended = drive(&mut agent, &link()).await.0.to_string();
        assert!(ended.contains("a ping on a stream"), "{ended}");
        drop(agent);
        let mut told = Vec::new();
        io.read_to_end(&mut told).await.unwrap();
        // A GOAWAY frame with PROTOCOL_ERROR.
        assert!(told.ends_with(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]));
    }
}
