//! gRPC through the tunnel is what it is without it: the cases of the interoperability tests, by
//! tonic and, where it is installed, Python's grpcio as clients and servers, each done directly and through a visitor's port.

use std::fmt::Debug;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use http::uri::PathAndQuery;
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::server::{
    ClientStreamingService, ServerStreamingService, StreamingService, UnaryService,
};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::client::{Client, run};
use crate::common::raw::{pattern, settles};
use crate::common::{Agent, Server, port_range};
use crate::service::{listen, serve};

/// A message is its bytes.
#[derive(Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length).to_vec()))
    }
}

pub type Messages = Pin<Box<dyn Stream<Item = Result<Vec<u8>, Status>> + Send>>;

/// The service of the tests: its methods do what those of the interoperability tests do.
#[derive(Clone)]
struct Test {
    /// Calls that the service saw called off.
    cancelled: mpsc::Sender<Instant>,
}

/// Notes when a call is dropped before it is done.
struct Call(Option<mpsc::Sender<Instant>>);

impl Call {
    fn is_done(&mut self) {
        self.0 = None;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(cancelled) = &self.0 {
            let _ = cancelled.try_send(Instant::now());
        }
    }
}

const ECHO: &str = "x-grpc-test-echo-initial";
const ECHO_BIN: &str = "x-grpc-test-echo-trailing-bin";

/// What is asked for by metadata: a status, and metadata to send back.
fn asked(metadata: &MetadataMap) -> Result<MetadataMap, Status> {
    let mut back = MetadataMap::new();
    if let Some(value) = metadata.get(ECHO) {
        back.insert(ECHO, value.clone());
    }
    if let Some(value) = metadata.get_bin(ECHO_BIN) {
        back.insert_bin(ECHO_BIN, value.clone());
    }
    match metadata.get("x-code") {
        Some(code) => {
            let code: i32 = code.to_str().unwrap().parse().unwrap();
            let message = metadata
                .get_bin("x-message-bin")
                .unwrap()
                .to_bytes()
                .unwrap();
            let message = String::from_utf8(message.to_vec()).unwrap();
            Err(Status::with_metadata(Code::from(code), message, back))
        }
        None => Ok(back),
    }
}

fn answer<T>(message: T, metadata: MetadataMap) -> Response<T> {
    let mut response = Response::new(message);
    *response.metadata_mut() = metadata;
    response
}

struct Unary(Test);

impl UnaryService<Vec<u8>> for Unary {
    type Response = Vec<u8>;
    type Future = BoxFuture<'static, Result<Response<Vec<u8>>, Status>>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let cancelled = self.0.cancelled.clone();
        Box::pin(async move {
            let metadata = asked(request.metadata())?;
            if request.metadata().contains_key("x-sleep") {
                let _call = Call(Some(cancelled));
                std::future::pending::<()>().await;
            }
            Ok(answer(request.into_inner(), metadata))
        })
    }
}

/// Says how many bytes came in how many messages.
struct Collect(Test);

impl ClientStreamingService<Vec<u8>> for Collect {
    type Response = Vec<u8>;
    type Future = BoxFuture<'static, Result<Response<Vec<u8>>, Status>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let cancelled = self.0.cancelled.clone();
        Box::pin(async move {
            let mut call = Call(Some(cancelled));
            let metadata = asked(request.metadata())?;
            let mut messages = request.into_inner();
            let (mut count, mut bytes) = (0, 0);
            while let Some(message) = messages.message().await? {
                count += 1;
                bytes += message.len();
            }
            call.is_done();
            Ok(answer(format!("{count} {bytes}").into_bytes(), metadata))
        })
    }
}

/// Sends as many messages as the request has bytes, each as long as its byte says, in kilobytes.
struct Scatter;

impl ServerStreamingService<Vec<u8>> for Scatter {
    type Response = Vec<u8>;
    type ResponseStream = Messages;
    type Future = BoxFuture<'static, Result<Response<Messages>, Status>>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        Box::pin(async move {
            let metadata = asked(request.metadata())?;
            let sizes = stream::iter(request.into_inner());
            let messages = sizes.map(|size| Ok(pattern(usize::from(size) * 1000)));
            Ok(answer(Box::pin(messages) as Messages, metadata))
        })
    }
}

/// Sends each message back as it comes.
struct PingPong(Test);

impl StreamingService<Vec<u8>> for PingPong {
    type Response = Vec<u8>;
    type ResponseStream = Messages;
    type Future = BoxFuture<'static, Result<Response<Messages>, Status>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let cancelled = self.0.cancelled.clone();
        Box::pin(async move {
            let metadata = asked(request.metadata())?;
            let state = (request.into_inner(), Call(Some(cancelled)));
            let messages = stream::unfold(state, |(mut messages, mut call)| async move {
                match messages.message().await {
                    Ok(Some(message)) if message == b"fail" => {
                        call.is_done();
                        Some((Err(Status::data_loss("as asked")), (messages, call)))
                    }
                    Ok(Some(message)) => Some((Ok(message), (messages, call))),
                    Ok(None) => {
                        call.is_done();
                        None
                    }
                    Err(_) => None,
                }
            });
            Ok(answer(Box::pin(messages) as Messages, metadata))
        })
    }
}

impl Test {
    async fn answer(self, request: http::Request<Incoming>) -> http::Response<Body> {
        let mut grpc = tonic::server::Grpc::new(Raw)
            .apply_max_message_size_config(Some(1 << 24), Some(1 << 24));
        match request.uri().path() {
            "/test.Test/Unary" => grpc.unary(Unary(self), request).await,
            "/test.Test/Collect" => grpc.client_streaming(Collect(self), request).await,
            "/test.Test/Scatter" => grpc.server_streaming(Scatter, request).await,
            "/test.Test/PingPong" => grpc.streaming(PingPong(self), request).await,
            path => Status::unimplemented(format!("no {path}")).into_http(),
        }
    }
}

/// Runs the service on a thread of its own; calls that are called off come out of the channel.
fn service() -> (SocketAddr, mpsc::Receiver<Instant>) {
    let (cancelled, calls) = mpsc::channel(64);
    let address = listen(move |_, stream| {
        let test = Test {
            cancelled: cancelled.clone(),
        };
        serve(stream, move |request| test.clone().answer(request));
    });
    (address, calls)
}

/// A connection for tonic's client.
#[derive(Clone)]
pub struct Channel(SendRequest<Body>);

impl Channel {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (send, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(send)
    }

    pub async fn grpc(&self) -> tonic::client::Grpc<Self> {
        let origin = "http://grpc.test".parse().unwrap();
        let mut grpc = tonic::client::Grpc::with_origin(self.clone(), origin)
            .max_decoding_message_size(1 << 24);
        grpc.ready().await.unwrap();
        grpc
    }
}

impl tower_service::Service<http::Request<Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, hyper::Result<http::Response<Incoming>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

fn path(method: &str) -> PathAndQuery {
    let path = match method.contains('/') {
        true => method.to_owned(),
        false => format!("/test.Test/{method}"),
    };
    path.parse().unwrap()
}

/// The service, and the way to it through the tunnel.
struct Stand {
    service: SocketAddr,
    cancelled: Mutex<mpsc::Receiver<Instant>>,
    server: Server,
    agent: Agent,
}

impl Stand {
    fn new() -> Self {
        Self::with("auto")
    }

    fn with(protocol: &str) -> Self {
        let (service, cancelled) = service();
        Self::before(service, cancelled, protocol)
    }

    fn before(service: SocketAddr, cancelled: mpsc::Receiver<Instant>, protocol: &str) -> Self {
        let server = Server::with(port_range(4), &[]);
        let agent = server.agent_with("a", service, &[("local.protocol", protocol)]);
        Self {
            service,
            cancelled: Mutex::new(cancelled),
            server,
            agent,
        }
    }

    /// Does the same directly and through the tunnel, and returns what comes of both.
    fn same<T: Debug + PartialEq, F>(&self, case: impl Fn(Channel) -> F) -> T
    where
        F: Future<Output = T>,
    {
        run(async {
            let direct = case(Channel::connect(self.service).await).await;
            let through = case(Channel::connect(self.agent.address()).await).await;
            assert_eq!(direct, through);
            through
        })
    }

    /// How long a call lived on at the service that the visitor gave up at this time.
    async fn called_off(&self, left: Instant) -> Duration {
        let cancelled = std::future::poll_fn(|cx| self.cancelled.lock().unwrap().poll_recv(cx));
        let at = cancelled.await.unwrap();
        at.saturating_duration_since(left)
    }
}

/// What came of a call, to be compared.
type Outcome<T> = Result<(T, Seen), (Code, String, Seen)>;

/// The metadata that the tests are about.
type Seen = (Option<String>, Option<Vec<u8>>);

fn seen(metadata: &MetadataMap) -> Seen {
    let text = metadata
        .get(ECHO)
        .map(|value| value.to_str().unwrap().to_owned());
    let bytes = metadata
        .get_bin(ECHO_BIN)
        .map(|value| value.to_bytes().unwrap().to_vec());
    (text, bytes)
}

fn failed<T>(status: &Status) -> Outcome<T> {
    Err((
        status.code(),
        status.message().to_owned(),
        seen(status.metadata()),
    ))
}

fn request<T>(message: T, metadata: &[(&'static str, &str)], bytes: &[u8]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    if !bytes.is_empty() {
        let value = MetadataValue::from_bytes(bytes);
        request.metadata_mut().insert_bin(ECHO_BIN, value);
    }
    request
}

async fn unary(channel: &Channel, method: &str, request: Request<Vec<u8>>) -> Outcome<Vec<u8>> {
    let mut grpc = channel.grpc().await;
    match grpc.unary(request, path(method), Raw).await {
        Ok(response) => {
            let metadata = seen(response.metadata());
            Ok((response.into_inner(), metadata))
        }
        Err(status) => failed(&status),
    }
}

async fn collect(mut messages: Streaming<Vec<u8>>) -> Result<Vec<Vec<u8>>, (Code, String)> {
    let mut all = Vec::new();
    loop {
        match messages.message().await {
            Ok(Some(message)) => all.push(message),
            Ok(None) => return Ok(all),
            Err(status) => return Err((status.code(), status.message().to_owned())),
        }
    }
}

#[test]
fn unary_calls() {
    let stand = Stand::new();
    for size in [0, 1, 271_828, 3 << 20] {
        let outcome = stand.same(|channel| async move {
            unary(&channel, "Unary", Request::new(pattern(size))).await
        });
        assert!(outcome == Ok((pattern(size), (None, None))), "{size}");
    }
    settles(&stand.server);
}

#[test]
fn streams_in_each_direction() {
    let stand = Stand::new();
    let outcome = stand.same(|channel| async move {
        let sizes = [27_182, 8, 1_828, 45_904, 0, 300_000];
        let messages = stream::iter(sizes.map(pattern));
        let mut grpc = channel.grpc().await;
        let request = Request::new(messages);
        let response = grpc.client_streaming(request, path("Collect"), Raw).await;
        String::from_utf8(response.unwrap().into_inner()).unwrap()
    });
    assert_eq!(outcome, "6 374922");

    for sizes in [vec![], vec![31, 0, 2, 58], vec![1; 2000]] {
        let expected: Vec<_> = sizes
            .iter()
            .map(|size| pattern(usize::from(*size) * 1000))
            .collect();
        let outcome = stand.same(|channel| {
            let request = Request::new(sizes.clone());
            async move {
                let mut grpc = channel.grpc().await;
                let response = grpc.server_streaming(request, path("Scatter"), Raw).await;
                collect(response.unwrap().into_inner()).await
            }
        });
        assert!(outcome == Ok(expected));
    }
    settles(&stand.server);
}

#[test]
fn ping_pong_and_half_close() {
    let stand = Stand::new();
    let outcome = stand.same(|channel| async move {
        let (send, receive) = mpsc::channel::<Vec<u8>>(1);
        let outgoing = stream::unfold(receive, |mut receive| async {
            receive.recv().await.map(|message| (message, receive))
        });
        let mut grpc = channel.grpc().await;
        let response = grpc.streaming(Request::new(outgoing), path("PingPong"), Raw);
        let mut messages = response.await.unwrap().into_inner();
        for size in [0, 27_182, 8, 1_828, 45_904] {
            // Each is sent only after the answer to the one before.
            send.send(pattern(size)).await.unwrap();
            let message = messages.message().await.unwrap();
            assert!(message == Some(pattern(size)), "{size}");
        }
        drop(send);
        messages.message().await.unwrap()
    });
    assert_eq!(outcome, None);

    // An empty stream; and one that ends with a status after messages.
    for (sent, expected) in [
        (vec![], Ok(vec![])),
        (
            vec![b"a".to_vec(), b"fail".to_vec()],
            Err((Code::DataLoss, "as asked".to_owned())),
        ),
    ] {
        let outcome = stand.same(|channel| {
            let sent = sent.clone();
            async move {
                let mut grpc = channel.grpc().await;
                let request = Request::new(stream::iter(sent));
                let response = grpc.streaming(request, path("PingPong"), Raw).await;
                collect(response.unwrap().into_inner()).await
            }
        });
        assert_eq!(outcome, expected);
    }
    settles(&stand.server);
}

#[test]
fn metadata_and_statuses() {
    let stand = Stand::new();
    let bytes = [0, 0xab, 0xff, b'\n', 0x7f];
    let outcome = stand.same(|channel| async move {
        let metadata = [(ECHO, "test_initial_metadata_value")];
        unary(&channel, "Unary", request(b"x".to_vec(), &metadata, &bytes)).await
    });
    let expected = (
        Some("test_initial_metadata_value".to_owned()),
        Some(bytes.to_vec()),
    );
    assert_eq!(outcome, Ok((b"x".to_vec(), expected.clone())));

    let special = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
    for (code, message) in [
        (Code::Unknown, "test status message"),
        (Code::Unknown, special),
        (Code::NotFound, ""),
        (Code::Unauthenticated, "100% %20 \"quoted\""),
    ] {
        for method in ["Unary", "Scatter"] {
            let outcome = stand.same(|channel| async move {
                let code = i32::from(code).to_string();
                let metadata = [("x-code", &code[..]), (ECHO, "test_initial_metadata_value")];
                let mut request = request(Vec::new(), &metadata, &bytes);
                let text = MetadataValue::from_bytes(message.as_bytes());
                request.metadata_mut().insert_bin("x-message-bin", text);
                match method {
                    "Unary" => unary(&channel, method, request).await.map(|_| ()),
                    _ => {
                        let mut grpc = channel.grpc().await;
                        match grpc.server_streaming(request, path(method), Raw).await {
                            Ok(_) => Ok(()),
                            Err(status) => failed::<()>(&status).map(|_| ()),
                        }
                    }
                }
            });
            let told = Err((code, message.to_owned(), expected.clone()));
            assert_eq!(outcome, told, "{method}");
        }
    }
    settles(&stand.server);
}

#[test]
fn what_is_not_there_is_unimplemented() {
    let stand = Stand::new();
    for method in ["/test.Test/Nothing", "/test.Nobody/Unary"] {
        let outcome = stand
            .same(|channel| async move { unary(&channel, method, Request::new(Vec::new())).await });
        let message = format!("no {method}");
        assert_eq!(outcome, Err((Code::Unimplemented, message, (None, None))));
    }
}

#[test]
fn calls_can_be_called_off() {
    let stand = Stand::with("h2c");
    // Of the tunnel's second, twice: two runtimes and a client share the machine with others.
    let limit = Duration::from_secs(2);
    run(async {
        let channel = Channel::connect(stand.agent.address()).await;

        // After it began: a message was sent, and no answer came.
        let mut grpc = channel.grpc().await;
        let endless = stream::iter([b"one".to_vec()]).chain(stream::pending());
        let request = Request::new(endless);
        let call = grpc.client_streaming::<_, _, Vec<u8>, _>(request, path("Collect"), Raw);
        let call = tokio::time::timeout(Duration::from_millis(300), call);
        assert!(call.await.is_err());
        let lived = stand.called_off(Instant::now()).await;
        assert!(lived < limit, "{lived:?}");

        // After the first answer; by h2, as hyper goes on with a body when its answer is dropped.
        let mut client = Client::connect(stand.agent.address()).await;
        let mut call = crate::client::request("POST", "/test.Test/PingPong");
        let kind = http::HeaderValue::from_static("application/grpc");
        call.headers_mut().insert("content-type", kind);
        let (answer, mut send) = client.begin(call, false).await;
        send.send_data((&b"\0\0\0\0\x03one"[..]).into(), false)
            .unwrap();
        let mut messages = answer.await.unwrap().into_body();
        let message = messages.data().await.unwrap().unwrap();
        assert_eq!(&message[..], b"\0\0\0\0\x03one");
        send.send_reset(h2::Reason::CANCEL);
        let lived = stand.called_off(Instant::now()).await;
        assert!(lived < limit, "{lived:?}");

        // A deadline at a service that sleeps.
        let mut sleepy = request_to_sleep();
        sleepy.set_timeout(Duration::from_millis(200));
        let mut grpc = channel.grpc().await;
        let call = grpc.unary::<_, Vec<u8>, _>(sleepy, path("Unary"), Raw);
        assert!(
            tokio::time::timeout(Duration::from_millis(300), call)
                .await
                .is_err()
        );
        let lived = stand.called_off(Instant::now()).await;
        assert!(lived < limit, "{lived:?}");

        // The connection is good for more.
        let outcome = unary(&channel, "Unary", Request::new(b"x".to_vec())).await;
        assert_eq!(outcome.unwrap().0, b"x");
    });
    settles(&stand.server);
}

fn request_to_sleep() -> Request<Vec<u8>> {
    request(Vec::new(), &[("x-sleep", "1")], &[])
}

/// Many calls at once, each with bytes of its own.
#[test]
fn calls_side_by_side_don_t_mix() {
    let stand = Arc::new(Stand::new());
    run(async {
        let channel = Channel::connect(stand.agent.address()).await;
        // How many streams there may be is known after this.
        unary(&channel, "Unary", Request::new(Vec::new()))
            .await
            .unwrap();
        let calls = (0..300_usize).map(|index| {
            let channel = channel.clone();
            async move {
                let mut message = index.to_be_bytes().to_vec();
                message.extend(pattern(index * 37));
                let outcome = unary(&channel, "Unary", Request::new(message.clone())).await;
                assert!(outcome.unwrap().0 == message, "{index}");
            }
        });
        futures_util::future::join_all(calls).await;
    });
    settles(&stand.server);
}

/// grpcio as a client or a server, as its file says; ended when dropped.
struct Python(Child);

impl Python {
    /// Starts it, unless grpcio is missing: Debian's belongs to Debian's Python.
    fn start(arguments: &[&str]) -> Option<Self> {
        let has_grpcio = |python: &&str| {
            let imported = Command::new(python)
                .args(["-c", "import grpc"])
                .stderr(Stdio::null())
                .status();
            imported.is_ok_and(|status| status.success())
        };
        let Some(python) = ["python3", "/usr/bin/python3"].into_iter().find(has_grpcio) else {
            let missing = "grpcio is missing: apt-get install python3-grpcio";
            assert!(std::env::var_os("CI").is_none(), "{missing}");
            eprintln!("passed over, {missing}");
            return None;
        };
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http2/interop.py");
        let mut command = Command::new(python);
        let child = command.arg(file).args(arguments).stdout(Stdio::piped());
        Some(Self(child.spawn().unwrap()))
    }

    /// What it says in its next line.
    fn says(&mut self) -> String {
        let mut line = String::new();
        let said = self.0.stdout.as_mut().unwrap();
        BufReader::new(said).read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn grpcio_calls_tonic() {
    let stand = Stand::new();
    for address in [stand.service, stand.agent.address()] {
        let Some(mut client) = Python::start(&["client", &address.to_string()]) else {
            return;
        };
        assert_eq!(client.says(), "all is well", "{address}");
    }
    settles(&stand.server);
}

#[test]
fn grpcio_and_tonic_call_grpcio() {
    let Some(mut service) = Python::start(&["server"]) else {
        return;
    };
    let port: u16 = service.says().parse().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stand = Stand::before(address, mpsc::channel(1).1, "h2c");
    for address in [stand.service, stand.agent.address()] {
        let Some(mut client) = Python::start(&["client", &address.to_string()]) else {
            return;
        };
        assert_eq!(client.says(), "all is well", "{address}");
    }
    let outcome = stand.same(|channel| async move {
        let metadata = [(ECHO, "test_initial_metadata_value")];
        let sent = request(pattern(100_000), &metadata, b"\x00\xff");
        unary(&channel, "Unary", sent).await
    });
    assert!(outcome.is_ok());
    let outcome = stand.same(|channel| async move {
        let mut grpc = channel.grpc().await;
        let sent = Request::new(stream::iter([b"a".to_vec(), b"fail".to_vec()]));
        let response = grpc.streaming(sent, path("PingPong"), Raw).await;
        collect(response.unwrap().into_inner()).await
    });
    assert_eq!(outcome, Err((Code::DataLoss, "as asked".to_owned())));
    let outcome = stand.same(|channel| async move {
        let nothing = unary(&channel, "Nothing", Request::new(Vec::new())).await;
        nothing.unwrap_err().0
    });
    assert_eq!(outcome, Code::Unimplemented);
    settles(&stand.server);
}
