//! A visitor that speaks HTTP/2, and what he gets.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::common::PATIENCE;

/// Runs a test's tasks to their end, within the usual limit.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, test).await })
        .expect("the test takes too long")
}

/// A connection of a visitor.
pub struct Client {
    pub send: SendRequest<Bytes>,
    /// Ends with the connection.
    pub connection: JoinHandle<Result<(), h2::Error>>,
}

/// An answer read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: Option<HeaderMap>,
    /// Why it broke off, if it did.
    pub broken: Option<h2::Reason>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().unwrap())
    }

    pub fn trailer(&self, name: &str) -> &str {
        let value = self.trailers.as_ref().and_then(|map| map.get(name));
        value.map_or("", |value| value.to_str().unwrap())
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::with(address, h2::client::Builder::new()).await
    }

    pub async fn with(address: SocketAddr, builder: h2::client::Builder) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (send, connection) = builder.handshake(stream).await.unwrap();
        Self {
            send,
            connection: tokio::spawn(connection),
        }
    }

    /// Begins a request, and waits until the connection has room for it.
    pub async fn begin(
        &mut self,
        request: Request<()>,
        is_all: bool,
    ) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
        poll_fn(|cx| self.send.poll_ready(cx)).await.unwrap();
        self.send.send_request(request, is_all).unwrap()
    }

    /// Asks for an answer to a request without a body.
    pub async fn ask(&mut self, request: Request<()>) -> Answer {
        let (answer, _) = self.begin(request, true).await;
        read(answer.await.unwrap()).await
    }

    /// The same, with a body.
    pub async fn post(&mut self, request: Request<()>, body: impl Into<Bytes>) -> Answer {
        let (answer, mut send) = self.begin(request, false).await;
        let body = body.into();
        let upload = async {
            let sent = upload(&mut send, body).await;
            if sent {
                // The answer may have come first.
                let _ = send.send_data(Bytes::new(), true);
            }
        };
        let answer = async { read(answer.await.unwrap()).await };
        tokio::join!(upload, answer).1
    }
}

/// Sends bytes as the peer makes room for them, unless it resets the stream.
pub async fn upload(send: &mut SendStream<Bytes>, mut body: Bytes) -> bool {
    while !body.is_empty() {
        send.reserve_capacity(body.len());
        let Some(Ok(room)) = poll_fn(|cx| send.poll_capacity(cx)).await else {
            return false;
        };
        if send.send_data(body.split_to(room), false).is_err() {
            return false;
        }
    }
    true
}

/// Reads an answer to its end.
pub async fn read(response: Response<RecvStream>) -> Answer {
    let (parts, mut body) = response.into_parts();
    let mut answer = Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: Vec::new(),
        trailers: None,
        broken: None,
    };
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => {
                answer.body.extend_from_slice(&data);
                let _ = body.flow_control().release_capacity(data.len());
            }
            Err(error) => {
                answer.broken = Some(reason(&error));
                return answer;
            }
        }
    }
    match body.trailers().await {
        Ok(trailers) => answer.trailers = trailers,
        Err(error) => answer.broken = Some(reason(&error)),
    }
    answer
}

/// Why a stream was reset; a connection that is gone counts as an internal error.
pub fn reason(error: &h2::Error) -> h2::Reason {
    error.reason().unwrap_or(h2::Reason::INTERNAL_ERROR)
}

/// A request for a path at the test's host.
pub fn request(method: &str, path: &str) -> Request<()> {
    Request::builder()
        .method(method)
        .uri(format!("http://host.test{path}"))
        .body(())
        .unwrap()
}
