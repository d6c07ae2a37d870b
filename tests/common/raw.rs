//! Both ends of an exchange byte by byte: services that note exactly what they received, and
//! visitors that send exactly what they are told.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use super::{Agent, Answer, PATIENCE, Server, connect, read_answer, service};

/// A request as a service received it.
#[derive(Debug, Clone)]
pub struct Received {
    /// The request line and the header lines, up to the empty one.
    pub head: Vec<u8>,
    pub body: Vec<u8>,
    /// The trailer section of a chunked body.
    pub trailers: Vec<u8>,
}

impl Received {
    /// The request line, one character a byte.
    pub fn line(&self) -> String {
        latin1(self.head.split(|byte| *byte == b'\r').next().unwrap())
    }

    /// The header lines as name and value, in order, one character a byte.
    pub fn lines(&self) -> Vec<(String, String)> {
        lines_of(&self.head)
    }

    /// The values of a header, in order.
    pub fn header(&self, name: &str) -> Vec<String> {
        values_of(&self.head, name)
    }
}

/// The values of a header in a raw head, in order, one character a byte.
pub fn values_of(head: &[u8], name: &str) -> Vec<String> {
    lines_of(head)
        .into_iter()
        .filter(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
        .collect()
}

/// The header lines of a raw head as name and value, in order, one character a byte.
pub fn lines_of(head: &[u8]) -> Vec<(String, String)> {
    latin1(head)
        .split("\r\n")
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let (name, value) = line.split_once(':').expect("a colon");
            (name.to_owned(), value.trim_matches(' ').to_owned())
        })
        .collect()
}

/// Bytes as text, one character a byte.
pub fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// Reads one request, whose framing has to be beyond doubt.
pub fn read_request(stream: &mut impl Read) -> io::Result<Received> {
    let mut request = read_request_head(stream)?;
    read_request_body(stream, &mut request)?;
    Ok(request)
}

/// Reads the head of one request, whose body may follow.
pub fn read_request_head(stream: &mut impl Read) -> io::Result<Received> {
    Ok(Received {
        head: super::read_head(stream)?,
        body: Vec::new(),
        trailers: Vec::new(),
    })
}

/// Reads the body of a request whose head has been read.
pub fn read_request_body(stream: &mut impl Read, request: &mut Received) -> io::Result<()> {
    let lengths = request.header("content-length");
    let encodings = request.header("transfer-encoding");
    assert!(
        lengths.len() + encodings.len() <= 1,
        "ambiguous framing: {}",
        latin1(&request.head)
    );
    if let Some(length) = lengths.first() {
        request.body = vec![0; length.parse().expect("a length")];
        return stream.read_exact(&mut request.body);
    }
    let Some(encoding) = encodings.first() else {
        return Ok(());
    };
    assert_eq!(encoding, "chunked");
    while let Some(chunk) = read_chunk(stream)? {
        request.body.extend_from_slice(&chunk);
    }
    loop {
        let line = read_line(stream)?;
        if line.is_empty() {
            return Ok(());
        }
        request.trailers.extend_from_slice(&line);
        request.trailers.extend_from_slice(b"\r\n");
    }
}

/// Reads one chunk, which must come without extensions; none if it is the last one.
pub fn read_chunk(stream: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let line = latin1(&read_line(stream)?);
    let size = usize::from_str_radix(&line, 16)
        .unwrap_or_else(|_| panic!("a chunk's size, and nothing else: {line:?}"));
    if size == 0 {
        return Ok(None);
    }
    let mut chunk = vec![0; size];
    stream.read_exact(&mut chunk)?;
    assert_eq!(read_line(stream)?, b"");
    Ok(Some(chunk))
}

fn read_line(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    Ok(line)
}

/// A service that notes each request and gives the same answer to all, keeping connections alive.
pub struct Recorder {
    pub address: SocketAddr,
    received: Receiver<Received>,
}

impl Recorder {
    /// One that answers with these bytes, exactly.
    pub fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::with(move |_, stream| stream.write_all(&answer).is_ok())
    }

    /// One that answers with 200 and a short body.
    pub fn new() -> Self {
        Self::answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    }

    /// One that sends back what it gets, in the same framing.
    pub fn echoing() -> Self {
        Self::with(|request, stream| {
            let head = "HTTP/1.1 200 OK\r\n";
            if request.header("transfer-encoding").is_empty() {
                let length = request.body.len();
                write!(stream, "{head}Content-Length: {length}\r\n\r\n").is_ok()
                    && stream.write_all(&request.body).is_ok()
            } else {
                write!(stream, "{head}Transfer-Encoding: chunked\r\n\r\n").is_ok()
                    && stream.write_all(&chunked(&request.body)).is_ok()
            }
        })
    }

    /// One that lets `answer` write the answer; the connection is kept if that says so.
    pub fn with(
        answer: impl Fn(&Received, &mut TcpStream) -> bool + Send + Sync + 'static,
    ) -> Self {
        let (sender, received) = channel();
        let address = service(move |mut stream| {
            stream.set_nodelay(true).unwrap();
            while let Ok(request) = read_request(&mut stream) {
                let _ = sender.lock().unwrap().send(request.clone());
                if !answer(&request, &mut stream) {
                    return;
                }
            }
        });
        Self { address, received }
    }

    /// The next request that came.
    pub fn next(&self) -> Received {
        take(&self.received, "a request at the service")
    }

    /// Whether nothing came since the last request that was taken.
    pub fn is_empty(&self) -> bool {
        self.received.try_recv().is_err()
    }
}

/// A channel whose sender threads share.
pub fn channel<T>() -> (Mutex<Sender<T>>, Receiver<T>) {
    let (sender, receiver) = mpsc::channel();
    (Mutex::new(sender), receiver)
}

/// Waits for a value that another thread sends.
pub fn take<T>(receiver: &Receiver<T>, what: &str) -> T {
    match receiver.recv_timeout(PATIENCE) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("waited in vain for {what}"),
        Err(RecvTimeoutError::Disconnected) => panic!("there will be no {what}"),
    }
}

/// A server with one agent and its recording service.
pub struct Stand {
    pub agent: Agent,
    pub server: Server,
    pub service: Recorder,
}

impl Stand {
    /// With default settings and a service that answers 200.
    pub fn new() -> Self {
        Self::with(Recorder::new(), &[], &[])
    }

    /// With default settings.
    pub fn of(service: Recorder) -> Self {
        Self::with(service, &[], &[])
    }

    /// With settings of the server and of the agent.
    pub fn with(service: Recorder, server: &[(&str, &str)], agent: &[(&str, &str)]) -> Self {
        let server = Server::with(super::port_range(4), server);
        let agent = server.agent_with("a", service.address, agent);
        Self {
            agent,
            server,
            service,
        }
    }

    /// Sends bytes on a connection of their own and reads the answer.
    pub fn ask(&self, bytes: impl AsRef<[u8]>) -> Answer {
        ask(self.agent.address(), bytes)
    }

    /// Waits until the server has no exchange under way any more.
    pub fn settles(&self) {
        settles(&self.server);
    }
}

/// Waits until the server has no exchange under way any more.
pub fn settles(server: &Server) {
    super::eventually(Duration::from_secs(5), "all exchanges are over", || {
        server.metric("silo_exchanges_open", "") == 0.0
    });
}

/// Sends bytes on a connection of their own and reads the answer.
pub fn ask(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Answer {
    let mut stream = send(address, bytes);
    read_answer(&mut stream, false)
}

/// Opens a connection and sends bytes.
pub fn send(address: SocketAddr, bytes: impl AsRef<[u8]>) -> TcpStream {
    let mut stream = connect(address);
    stream.write_all(bytes.as_ref()).unwrap();
    stream
}

/// Reads until the peer closes; a reset counts as that. The second value tells whether it was
/// one.
pub fn read_to_close(stream: &mut impl Read) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, false),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_timeout(&error) => panic!("the connection stays open: {error}"),
            Err(_) => return (bytes, true),
        }
    }
}

/// Closes a connection with a reset instead of a FIN.
pub fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Whether a read ran into its time limit.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Whether nothing comes on a connection for so long.
pub fn is_silent(stream: &mut TcpStream, time: Duration) -> bool {
    stream.set_read_timeout(Some(time)).unwrap();
    let silent = matches!(stream.peek(&mut [0]), Err(error) if is_timeout(&error));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

/// Bytes in which every piece looks different, so that a lost, doubled or moved one shows.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A body in chunks of uneven sizes, with its end.
pub fn chunked(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + body.len() / 16 + 16);
    let sizes = [1, 1000, 16, 65_536, 7, 30_000];
    let mut rest = body;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, after) = rest.split_at((*size).min(rest.len()));
        write!(bytes, "{:x}\r\n", chunk.len()).unwrap();
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
        rest = after;
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}
