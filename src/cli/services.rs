//! The services behind the agents of `demo` and `swarm`.
//!
//! They stand where a user's own service would, on a real socket, so that what they answer has
//! gone the whole way.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, BodyStream, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// Runs a sample service on `listener` until `shutdown`; `name` is the agent it stands behind.
///
/// | Path | Answer |
/// | --- | --- |
/// | `/` | a page that shows which agent answered, and a clock that runs |
/// | `/api/status` | JSON: agent, status, uptime, requests, time |
/// | `/events` | the clock as server-sent events, one at once and one a second |
/// | `/echo` | the request as text: its line, its headers, its body as it arrives |
///
/// On `shutdown` it accepts no more, ends the clocks, and gives the rest a second to finish.
pub async fn serve(listener: TcpListener, name: String, shutdown: impl Future<Output = ()>) {
    // Nothing is ever sent: that the sender is gone is the word.
    let (running, stopping) = watch::channel(());
    let sample = Arc::new(Sample {
        name,
        started: Instant::now(),
        requests: AtomicU64::new(0),
        stopping,
    });
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            stream = accept(&listener) => {
                connections.spawn(serve_connection(stream, sample.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    drop(running);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    // Whatever is left then is cut when the set is dropped.
    let _ = tokio::time::timeout(GRACE, all_ended).await;
}

/// Answers every request on `listener` with a small fixed text, over connections that are kept
/// alive, until the future is dropped.
///
/// One serves all agents of a `swarm`, so it does as little as a service can. `served` counts the
/// requests.
pub async fn serve_small(listener: TcpListener, served: Arc<AtomicU64>) {
    let mut http = http1::Builder::new();
    http.max_buf_size(SMALL_BUFFER);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            stream = accept(&listener) => {
                let served = served.clone();
                let answer = service_fn(move |_: Request<Incoming>| {
                    served.fetch_add(1, Ordering::Relaxed);
                    let mut response = Response::new(Full::new(Bytes::from_static(SMALL_ANSWER)));
                    response.headers_mut().insert(CONTENT_TYPE, PLAIN_TEXT);
                    std::future::ready(Ok::<_, Infallible>(response))
                });
                let connection = http.serve_connection(TokioIo::new(stream), answer);
                // A connection that breaks concerns nobody but its peer.
                connections.spawn(async { drop(connection.await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// How long requests that run at shutdown may take to finish.
const GRACE: Duration = Duration::from_secs(1);

/// How long to leave a listener alone that just failed, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// hyper's least: thousands of connections are held, and no request is larger.
const SMALL_BUFFER: usize = 8 * 1024;

const SMALL_ANSWER: &[u8] = b"Here answers one out of a swarm.\n";

const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain");

/// The next connection, however long that takes.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without it answers only wait longer.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// What a sample service knows, shared by its connections.
struct Sample {
    /// The agent's name, shown in every answer.
    name: String,
    started: Instant,
    /// Requests so far. Only shown, so any order will do.
    requests: AtomicU64,
    /// Closed when the service stops: idle connections and clocks then end.
    stopping: watch::Receiver<()>,
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

async fn serve_connection(stream: TcpStream, sample: Arc<Sample>) {
    let mut stopping = sample.stopping.clone();
    let answer = service_fn(|request| {
        let sample = sample.clone();
        async move { Ok::<_, Infallible>(answer(&sample, request)) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), answer)
    );
    // A connection that breaks concerns nobody but its peer.
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

fn answer(sample: &Arc<Sample>, request: Request<Incoming>) -> Response<Body> {
    sample.requests.fetch_add(1, Ordering::Relaxed);
    let path = request.uri().path();
    if path == "/echo" {
        return echo(request);
    }
    if !matches!(path, "/" | "/api/status" | "/events") {
        let mut response = text(PLAIN_TEXT, "Nothing here.\n".into());
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(PLAIN_TEXT, "Only GET and HEAD.\n".into());
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    match path {
        "/" => page(sample),
        "/api/status" => status(sample),
        _ => events(sample),
    }
}

fn page(sample: &Sample) -> Response<Body> {
    // A colour of its own for each name, so that browser windows side by side are told apart.
    let hue = sample
        .name
        .bytes()
        .fold(200u32, |hue, byte| (hue * 31 + u32::from(byte) * 47) % 360);
    // The name goes last: it is the only part that could look like another placeholder.
    let page = include_str!("sample_page.html")
        .replace("{hue}", &hue.to_string())
        .replace("{requests}", &sample.requests().to_string())
        .replace("{name}", &escape(&sample.name));
    text(HeaderValue::from_static("text/html; charset=utf-8"), page)
}

fn status(sample: &Sample) -> Response<Body> {
    let status = json!({
        "agent": sample.name,
        "status": "ok",
        "uptime_seconds": sample.started.elapsed().as_secs(),
        "requests": sample.requests(),
        "time": now(),
    });
    text(
        HeaderValue::from_static("application/json"),
        format!("{status}\n"),
    )
}

fn events(sample: &Arc<Sample>) -> Response<Body> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    // After a stall the clock goes on from now, instead of making up for what was missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let state = (ticks, sample.stopping.clone(), sample.clone());
    let clock = stream::unfold(state, |(mut ticks, mut stopping, sample)| async {
        tokio::select! {
            _ = stopping.changed() => return None,
            _ = ticks.tick() => {}
        }
        let event = json!({
            "agent": sample.name,
            "time": now(),
            "requests": sample.requests(),
        });
        let frame = Frame::data(Bytes::from(format!("data: {event}\n\n")));
        Some((Ok(frame), (ticks, stopping, sample)))
    });
    let mut response = Response::new(StreamBody::new(clock).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The request as it arrived, the body frame by frame, with its trailers.
fn echo(request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let mut text = format!("{} {} {:?}\n", head.method, head.uri, head.version).into_bytes();
    for (name, value) in &head.headers {
        // Values needn't be UTF-8.
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.push(b'\n');
    }
    text.push(b'\n');
    let head = stream::iter([Ok(Frame::data(Bytes::from(text)))]);
    let body = StreamBody::new(head.chain(BodyStream::new(body)));
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, PLAIN_TEXT);
    response
}

impl Sample {
    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

fn text(content_type: HeaderValue, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The time of day in UTC, as RFC 3339 writes it.
fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    /// Far longer than anything here takes, so that only a fault meets it.
    const LIMIT: Duration = Duration::from_secs(20);

    struct Running {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        service: JoinHandle<()>,
    }

    async fn start(name: &str) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { drop(stopped.await) };
        let service = tokio::spawn(serve(listener, name.to_owned(), shutdown));
        Running {
            address,
            stop,
            service,
        }
    }

    impl Running {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// The whole answer to a request that asks to close.
        async fn ask(&self, request_line: &str) -> String {
            let mut stream = self.connect().await;
            let request =
                format!("{request_line} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            let all = stream.read_to_string(&mut answer);
            timeout(LIMIT, all).await.unwrap().unwrap();
            answer
        }

        async fn stop(self) {
            drop(self.stop);
            timeout(LIMIT, self.service).await.unwrap().unwrap();
        }
    }

    /// Reads until `text` has come; what came is returned.
    async fn read_until(stream: &mut TcpStream, text: &str) -> String {
        let mut seen = Vec::new();
        let reading = async {
            loop {
                let so_far = String::from_utf8_lossy(&seen).into_owned();
                if so_far.contains(text) {
                    return so_far;
                }
                let read = stream.read_buf(&mut seen).await.unwrap();
                assert_ne!(read, 0, "closed before {text:?}: {so_far}");
            }
        };
        timeout(LIMIT, reading).await.unwrap()
    }

    #[tokio::test]
    async fn the_page_shows_who_answered() {
        let service = start("agent-<1>").await;
        let page = service.ask("GET /").await;
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.contains("<h1>agent-&lt;1&gt;</h1>"), "{page}");
        for placeholder in ["{name}", "{hue}", "{requests}"] {
            assert!(!page.contains(placeholder), "{placeholder}");
        }
        let head = service.ask("HEAD /").await;
        assert!(head.ends_with("\r\n\r\n"), "{head}");
        service.stop().await;
    }

    #[tokio::test]
    async fn the_status_is_json() {
        let service = start("agent-1").await;
        service.ask("GET /").await;
        let answer = service.ask("GET /api/status?x").await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let status: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(status["agent"], "agent-1");
        assert_eq!(status["status"], "ok");
        assert_eq!(status["requests"], 2);
        service.stop().await;
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        let service = start("agent-1").await;
        let missing = service.ask("GET /api").await;
        assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
        let refused = service.ask("DELETE /").await;
        assert!(refused.starts_with("HTTP/1.1 405 "), "{refused}");
        assert!(refused.contains("allow: GET, HEAD\r\n"), "{refused}");
        service.stop().await;
    }

    #[tokio::test]
    async fn an_echo_comes_back_while_the_request_still_goes() {
        let service = start("agent-1").await;
        let mut stream = service.connect().await;
        let head = b"PUT /echo?a=%2F HTTP/1.1\r\nhost: a\r\nx-name: caf\xe9\r\n\
            transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        stream.write_all(head).await.unwrap();
        let echoed = read_until(&mut stream, "first").await;
        assert!(echoed.contains("PUT /echo?a=%2F HTTP/1.1\n"), "{echoed}");
        assert!(echoed.contains("x-name: caf\u{fffd}\n"), "{echoed}");
        stream.write_all(b"6\r\nsecond\r\n0\r\n\r\n").await.unwrap();
        read_until(&mut stream, "second\r\n0\r\n").await;
        service.stop().await;
    }

    #[tokio::test]
    async fn a_clock_runs_until_the_service_stops() {
        let service = start("agent-1").await;
        let mut stream = service.connect().await;
        let request = b"GET /events HTTP/1.1\r\nhost: a\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let begun = read_until(&mut stream, "\n\n").await;
        assert!(
            begun.contains("content-type: text/event-stream\r\n"),
            "{begun}"
        );
        assert!(begun.contains(r#"data: {"agent":"agent-1""#), "{begun}");
        read_until(&mut stream, "data: ").await;
        service.stop().await;
        // The body ends as it should, so the reader knows it has everything.
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert!(rest.ends_with("0\r\n\r\n"), "{rest:?}");
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_end() {
        let service = start("agent-1").await;
        let mut idle = service.connect().await;
        service.ask("GET /").await;
        service.stop().await;
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_small_service_keeps_connections_alive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::new(AtomicU64::new(0));
        let service = tokio::spawn(serve_small(listener, served.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        for _ in 0..3 {
            let request = b"POST /any HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
            stream.write_all(request).await.unwrap();
            let answer = read_until(&mut stream, "swarm.\n").await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        }
        assert_eq!(served.load(Ordering::Relaxed), 3);
        service.abort();
        assert!(service.await.unwrap_err().is_cancelled());
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }
}
