//! `silo-proxy agents`: who is connected, as a table, from a server's admin port.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, HeaderValue};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;

use crate::id::Secret;

/// The variable that the API key is taken from, the server's own.
const API_KEY_VARIABLE: &str = "SILO_HTTP_ADMIN_API_KEY";

/// How long a server may take for the whole answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The longest answer that is read. A row is some 400 bytes and a host has 65,535 ports; the rest is
/// for labels.
const MAX_ANSWER_BYTES: usize = 128 * 1024 * 1024;

/// How often `--watch` asks.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// Show the connected agents and their ports.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  silo-proxy agents
  silo-proxy agents --watch
  silo-proxy agents --admin proxy.example:8080 --api-key-file key.txt --json")]
pub struct AgentsArgs {
    /// The server's admin port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub admin: String,
    /// File with the server's API key; without it SILO_HTTP_ADMIN_API_KEY is used if it is set
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Print the server's JSON instead of a table (with --watch one document a line)
    #[arg(long)]
    pub json: bool,
    /// Ask again every second, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
}

/// Why the agents can't be shown.
#[derive(Debug, Error)]
pub enum AgentsError {
    /// The key's file can't be read, or is empty.
    #[error("the API key can't be read from {}: {source}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key or the address can't stand in a header line.
    #[error("{what} contains characters that HTTP doesn't allow")]
    NotAHeader {
        /// Which of the two.
        what: &'static str,
    },
    /// Nothing listens there.
    #[error(
        "nothing listens at {admin}: is the server running, and is this its admin port (http.port)?"
    )]
    Refused {
        /// The address that was asked.
        admin: String,
    },
    /// The address can't be resolved or reached.
    #[error("can't connect to {admin}: {source}")]
    Connect {
        /// The address that was asked.
        admin: String,
        /// Why.
        source: io::Error,
    },
    /// No complete answer came in time.
    #[error("{admin} didn't answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// The address that was asked.
        admin: String,
    },
    /// The server wants a key.
    #[error("{admin} asks for its API key: give --api-key-file FILE, or set {API_KEY_VARIABLE}")]
    KeyMissing {
        /// The address that was asked.
        admin: String,
    },
    /// The server doesn't take the key.
    #[error("{admin} refuses the API key")]
    KeyRefused {
        /// The address that was asked.
        admin: String,
    },
    /// The server isn't asked by that name.
    #[error(
        "a server without http.admin_api_key doesn't answer as {admin}: use 127.0.0.1, [::1] or \
         localhost with its port, or set a key"
    )]
    Misdirected {
        /// The address that was asked.
        admin: String,
    },
    /// Another status than 200, 401 and 421.
    #[error("{admin} answers {status} to GET /agents: is this a silo-proxy's admin port?")]
    Status {
        /// The address that was asked.
        admin: String,
        /// The answer's status.
        status: StatusCode,
    },
    /// What came isn't an answer of HTTP, or isn't a list of agents.
    #[error("what answers at {admin} isn't a silo-proxy's admin port: {source}")]
    Foreign {
        /// The address that was asked.
        admin: String,
        /// What is wrong with the answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The result can't be written.
    #[error("can't write: {0}")]
    Output(#[from] io::Error),
}

/// Runs the subcommand; the result goes to standard output. `variable` looks up an environment
/// variable. Needs a tokio runtime with I/O and time.
pub async fn run(
    args: &AgentsArgs,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<(), AgentsError> {
    let key = args.api_key(variable)?;
    let shown = if args.watch {
        tokio::select! {
            ended = watch(args, key.as_ref()) => ended,
            interrupt = tokio::signal::ctrl_c() => interrupt.map_err(AgentsError::Output),
        }
    } else {
        show(args, key.as_ref(), Screen::Paper).await
    };
    match shown {
        // Whoever reads has seen enough, as in `silo-proxy agents | head`.
        Err(AgentsError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        shown => shown,
    }
}

impl AgentsArgs {
    fn api_key(
        &self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Secret>, AgentsError> {
        let Some(path) = &self.api_key_file else {
            let key = variable(API_KEY_VARIABLE).filter(|key| !key.is_empty());
            return Ok(key.map(Secret::new));
        };
        let fault = |source| AgentsError::KeyFile {
            path: path.clone(),
            source,
        };
        let text = std::fs::read_to_string(path).map_err(fault)?;
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(fault(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty",
            ))),
            key => Ok(Some(Secret::new(key))),
        }
    }
}

/// What the output is written on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Screen {
    /// Each result under the last one.
    Paper,
    /// A terminal: each result in the last one's place.
    Terminal,
}

async fn watch(args: &AgentsArgs, key: Option<&Secret>) -> Result<(), AgentsError> {
    let screen = match io::stdout().is_terminal() && !args.json {
        true => Screen::Terminal,
        false => Screen::Paper,
    };
    let mut period = tokio::time::interval(WATCH_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    period.tick().await;
    // A server that isn't there at first is a mistake; one that goes away may come back.
    show(args, key, screen).await?;
    loop {
        period.tick().await;
        match show(args, key, screen).await {
            Err(AgentsError::Output(error)) => return Err(AgentsError::Output(error)),
            Err(error) if screen == Screen::Terminal => print(&format!("{error}\n"), screen)?,
            Err(error) => writeln!(io::stderr(), "{error}")?,
            Ok(()) => {}
        }
    }
}

async fn show(args: &AgentsArgs, key: Option<&Secret>, screen: Screen) -> Result<(), AgentsError> {
    let answer = fetch(&args.admin, key, TIMEOUT).await?;
    let list = AgentList::parse(&args.admin, &answer)?;
    if args.json {
        let mut out = io::stdout().lock();
        out.write_all(&answer)?;
        out.write_all(b"\n")?;
        out.flush()?;
    } else {
        print(&table(&list, SystemTime::now()), screen)?;
    }
    Ok(())
}

fn print(text: &str, screen: Screen) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match screen {
        Screen::Paper => out.write_all(text.as_bytes())?,
        // Home, then each line over the old one, then the rest is cleared: nothing flickers.
        Screen::Terminal => {
            let text = text.replace('\n', "\x1b[K\n");
            write!(out, "\x1b[H{text}\x1b[J")?;
        }
    }
    out.flush()
}

/// Gets `/agents` and returns the body of a 200.
async fn fetch(admin: &str, key: Option<&Secret>, timeout: Duration) -> Result<Bytes, AgentsError> {
    let admin = admin.strip_prefix("http://").unwrap_or(admin);
    let admin = admin.trim_end_matches('/');
    match tokio::time::timeout(timeout, exchange(admin, key)).await {
        Ok(answer) => answer,
        Err(_) => Err(AgentsError::Timeout {
            admin: admin.to_owned(),
        }),
    }
}

async fn exchange(admin: &str, key: Option<&Secret>) -> Result<Bytes, AgentsError> {
    let request = request(admin, key)?;
    let admin = admin.to_owned();
    let stream = match TcpStream::connect(&admin).await {
        Ok(stream) => stream,
        Err(source) if source.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(AgentsError::Refused { admin });
        }
        Err(source) => return Err(AgentsError::Connect { admin, source }),
    };
    let foreign = |source| AgentsError::Foreign {
        admin: admin.clone(),
        source,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| foreign(error.into()))?;
    let answered = async {
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| foreign(error.into()))?;
        let admin = admin.clone();
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED if key.is_none() => {
                return Err(AgentsError::KeyMissing { admin });
            }
            StatusCode::UNAUTHORIZED => return Err(AgentsError::KeyRefused { admin }),
            StatusCode::MISDIRECTED_REQUEST => return Err(AgentsError::Misdirected { admin }),
            status => return Err(AgentsError::Status { admin, status }),
        }
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES);
        Ok(body.collect().await.map_err(foreign)?.to_bytes())
    };
    // The connection moves the exchange on, and the exchange reports what goes wrong with it.
    let driven = async {
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        answer = answered => answer,
        never = driven => never,
    }
}

fn request(admin: &str, key: Option<&Secret>) -> Result<Request<Empty<Bytes>>, AgentsError> {
    let not_a_header = |what| move |_| AgentsError::NotAHeader { what };
    let host = HeaderValue::from_str(admin).map_err(not_a_header("the address"))?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = http::Uri::from_static("/agents");
    let headers = request.headers_mut();
    headers.insert(HOST, host);
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if let Some(key) = key {
        let mut value = HeaderValue::from_str(key.expose()).map_err(not_a_header("the API key"))?;
        value.set_sensitive(true);
        headers.insert("x-api-key", value);
    }
    Ok(request)
}

/// What `GET /agents` answers, as far as the table shows it. All but the id and the port may be
/// missing, so that the table of an older or newer server can be shown as well.
#[derive(Debug, Deserialize)]
struct AgentList<'a> {
    #[serde(borrow)]
    agents: Vec<Agent<'a>>,
}

#[derive(Debug, Deserialize)]
struct Agent<'a> {
    #[serde(borrow)]
    agent_id: Cow<'a, str>,
    port: u16,
    #[serde(default, borrow)]
    url: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    state: Option<Cow<'a, str>>,
    #[serde(default)]
    connected_at: Option<String>,
    #[serde(default)]
    last_seen: Option<String>,
    #[serde(default)]
    requests: Option<u64>,
    #[serde(default)]
    exchanges: Option<u64>,
    #[serde(default)]
    bytes_in: Option<u64>,
    #[serde(default)]
    bytes_out: Option<u64>,
    #[serde(default)]
    rtt_ms: Option<f64>,
}

impl<'a> AgentList<'a> {
    fn parse(admin: &str, answer: &'a [u8]) -> Result<Self, AgentsError> {
        serde_json::from_slice(answer).map_err(|error| AgentsError::Foreign {
            admin: admin.to_owned(),
            source: error.into(),
        })
    }
}

/// The columns: heading, and whether it holds figures, which stand to the right.
const COLUMNS: [(&str, bool); 11] = [
    ("AGENT", false),
    ("PORT", true),
    ("URL", false),
    ("STATE", false),
    ("UP", true),
    ("LAST SEEN", true),
    ("REQUESTS", true),
    ("OPEN", true),
    ("IN", true),
    ("OUT", true),
    ("RTT", true),
];

/// What a cell shows for a figure that isn't known.
const UNKNOWN: &str = "-";

fn table(list: &AgentList<'_>, now: SystemTime) -> String {
    let rows: Vec<_> = list.agents.iter().map(|agent| cells(agent, now)).collect();
    let mut widths = COLUMNS.map(|(heading, _)| heading.len());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    write_line(&mut text, &COLUMNS.map(|(heading, _)| heading), &widths);
    for row in &rows {
        write_line(&mut text, row, &widths);
    }
    let plural = if rows.len() == 1 { "" } else { "s" };
    text.push_str(&format!("{} agent{plural}\n", rows.len()));
    text
}

fn write_line(text: &mut String, cells: &[impl AsRef<str>; 11], widths: &[usize; 11]) {
    let mut line = String::new();
    for ((cell, width), (_, figures)) in cells.iter().zip(widths).zip(COLUMNS) {
        let cell = cell.as_ref();
        let padding = " ".repeat(width - cell.chars().count().min(*width));
        let (before, after) = if figures {
            (&*padding, "")
        } else {
            ("", &*padding)
        };
        let gap = if line.is_empty() { "" } else { "  " };
        // Writing to a string can't fail.
        let _ = write!(line, "{gap}{before}{cell}{after}");
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

fn cells(agent: &Agent<'_>, now: SystemTime) -> [String; 11] {
    let ago = |time: &Option<String>| {
        let time = humantime::parse_rfc3339(time.as_deref()?).ok()?;
        // The server's clock may be ahead of this one.
        Some(Ago(now.duration_since(time).unwrap_or_default()))
    };
    let connected = agent.state.as_deref() != Some("leased");
    [
        printable(&agent.agent_id),
        agent.port.to_string(),
        agent
            .url
            .as_deref()
            .map_or_else(|| UNKNOWN.to_owned(), printable),
        agent
            .state
            .as_deref()
            .map_or_else(|| UNKNOWN.to_owned(), printable),
        shown(ago(&agent.connected_at).filter(|_| connected)),
        shown(ago(&agent.last_seen)),
        shown(agent.requests),
        shown(agent.exchanges),
        shown(agent.bytes_in.map(Size)),
        shown(agent.bytes_out.map(Size)),
        agent
            .rtt_ms
            .map_or_else(|| UNKNOWN.to_owned(), |ms| format!("{ms:.1} ms")),
    ]
}

fn shown(figure: Option<impl fmt::Display>) -> String {
    figure.map_or_else(|| UNKNOWN.to_owned(), |figure| figure.to_string())
}

/// Whatever answered, it must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// A duration in its two largest units.
struct Ago(Duration);

impl fmt::Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
        match seconds {
            0..60 => write!(f, "{seconds}s"),
            60..3_600 => write!(f, "{minutes}m{:02}s", seconds % 60),
            3_600..86_400 => write!(f, "{hours}h{:02}m", minutes % 60),
            86_400.. => write!(f, "{days}d{:02}h", hours % 24),
        }
    }
}

/// A number of bytes with a binary unit and about three figures.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB"].into_iter();
        let mut unit = units.next().unwrap_or_default();
        for larger in units {
            // 1023.95 would be shown as 1024.0.
            if value < 1023.95 {
                break;
            }
            value /= 1024.0;
            unit = larger;
        }
        write!(f, "{value:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    use arc_swap::ArcSwap;
    use tokio::sync::oneshot;

    use crate::auth::ApiKey;
    use crate::id::Generation;
    use crate::metrics::{AgentStats, Metrics};
    use crate::server::admin::{Admin, AdminState, Readiness};
    use crate::server::directory::{Directory, Row, RowState, RowText};

    #[test]
    fn the_table_is_aligned() {
        let answer = br#"{"agents":[
            {"agent_id":"agent-1","port":8100,"url":"http://proxy.example:8100","state":"serving",
             "connected_at":"2023-11-14T20:08:20.000Z","last_seen":"2023-11-14T22:13:18.000Z",
             "requests":1234567,"exchanges":3,"bytes_in":1023,"bytes_out":5368709120,"rtt_ms":0.312,
             "labels":{"a":"b"},"of_a_later_version":[1]},
            {"agent_id":"b","port":808,"url":"http://x\u001b[2J","state":"leased","peer":null,
             "connected_at":"2023-11-14T22:13:20.000Z","last_seen":"2023-11-14T22:13:21.000Z",
             "requests":0,"exchanges":0,"bytes_in":0,"bytes_out":1048575,"rtt_ms":null},
            {"agent_id":"of-an-old-server","port":8102,"last_seen":"yesterday"}],"count":3}"#;
        let list = AgentList::parse("x", answer).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let expected = "\
AGENT             PORT  URL                        STATE       UP  LAST SEEN  REQUESTS  OPEN      IN      OUT     RTT
agent-1           8100  http://proxy.example:8100  serving  2h05m         2s   1234567     3  1023 B  5.0 GiB  0.3 ms
b                  808  http://x?[2J               leased       -         0s         0     0     0 B  1.0 MiB       -
of-an-old-server  8102  -                          -            -          -         -     -       -        -       -
3 agents
";
        assert_eq!(table(&list, now), expected);
    }

    #[test]
    fn an_empty_table_says_so() {
        let list = AgentList { agents: Vec::new() };
        let text = table(&list, UNIX_EPOCH);
        assert!(text.starts_with("AGENT  PORT  URL"));
        assert!(text.ends_with("\n0 agents\n"));
    }

    #[test]
    fn durations_and_sizes_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m00s"),
            (3_599, "59m59s"),
            (3_600, "1h00m"),
            (86_399, "23h59m"),
            (86_400, "1d00h"),
            (90 * 86_400 + 7_200, "90d02h"),
        ] {
            assert_eq!(Ago(Duration::from_secs(seconds)).to_string(), text);
        }
        for (bytes, text) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1_024, "1.0 KiB"),
            (1_536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (1 << 40, "1.0 TiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn the_key_comes_from_the_file_or_else_the_environment() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let args = |api_key_file| AgentsArgs {
            admin: String::new(),
            api_key_file,
            json: false,
            watch: false,
        };
        let environment = |name: &str| (name == API_KEY_VARIABLE).then(|| "from env".to_owned());
        let key = |args: AgentsArgs| args.api_key(environment).map(|key| key.unwrap());

        let path = file.path().to_owned();
        let error = key(args(Some(path.clone()))).unwrap_err();
        assert!(error.to_string().ends_with("the file is empty"), "{error}");
        file.write_all(b"from file\n").unwrap();
        assert!(key(args(Some(path))).unwrap().matches(b"from file"));
        assert!(key(args(None)).unwrap().matches(b"from env"));
        assert!(args(None).api_key(|_| None).unwrap().is_none());
        assert!(matches!(
            key(args(Some("/nonexistent".into()))),
            Err(AgentsError::KeyFile { .. })
        ));
    }

    #[tokio::test]
    async fn a_servers_agents_are_fetched() {
        let (admin, _stop) = start(Some(Secret::new("key"))).await;
        let right = Secret::new("key");
        let body = fetch(&admin, Some(&right), TIMEOUT).await.unwrap();
        let list = AgentList::parse(&admin, &body).unwrap();
        assert_eq!(list.agents.len(), 2_000);
        assert_eq!(list.agents[7].agent_id, "agent-0007");
        assert_eq!(list.agents[7].port, 8_107);
        let by_url = fetch(&format!("http://{admin}/"), Some(&right), TIMEOUT).await;
        assert!(by_url.is_ok());

        let error = fetch(&admin, None, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::KeyMissing { .. }), "{error}");
        let wrong = Secret::new("wrong");
        let error = fetch(&admin, Some(&wrong), TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::KeyRefused { .. }), "{error}");
        let error = fetch(&admin, Some(&Secret::new("a\nb")), TIMEOUT)
            .await
            .unwrap_err();
        assert!(matches!(error, AgentsError::NotAHeader { .. }), "{error}");
    }

    #[tokio::test]
    async fn what_isnt_the_admin_port_is_told_apart() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = closed.local_addr().unwrap().to_string();
        drop(closed);
        let error = fetch(&admin, None, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::Refused { .. }), "{error}");

        let error = fetch("127.0.0.1", None, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::Connect { .. }), "{error}");

        let admin = serve_once(b"SSH-2.0-OpenSSH_9.2\r\n");
        let error = fetch(&admin, None, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::Foreign { .. }), "{error}");

        let admin = serve_once(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
        let error = fetch(&admin, None, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, AgentsError::Status { .. }), "{error}");

        let admin = serve_once(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        let body = fetch(&admin, None, TIMEOUT).await.unwrap();
        let error = AgentList::parse(&admin, &body).unwrap_err();
        assert!(matches!(error, AgentsError::Foreign { .. }), "{error}");

        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = silent.local_addr().unwrap().to_string();
        let error = fetch(&admin, None, Duration::from_millis(20))
            .await
            .unwrap_err();
        assert!(matches!(error, AgentsError::Timeout { .. }), "{error}");
    }

    /// An admin port with 2,000 agents, until the sender is dropped.
    async fn start(api_key: Option<Secret>) -> (String, oneshot::Sender<()>) {
        let directory = Directory::new();
        let rows = (0..2_000).map(|n| {
            Arc::new(Row {
                agent_id: format!("agent-{n:04}").parse().unwrap(),
                port: 8_100 + n,
                generation: Generation(1),
                state: RowState::Serving,
                peer: None,
                connected_at: UNIX_EPOCH,
                version: String::new(),
                labels: BTreeMap::new(),
                public_url: "http://\"quoted\"".into(),
                stats: AgentStats::new(UNIX_EPOCH),
                text: RowText::default(),
            })
        });
        rows.for_each(|row| directory.add(row));
        let mut newest = directory.watch();
        let state = AdminState {
            directory,
            metrics: Metrics::new(1, UNIX_EPOCH),
            readiness: Readiness::new(),
            api_key: Arc::new(ArcSwap::from_pointee(ApiKey::new(api_key))),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = Admin::start(listener, state, async move { drop(stopped.await) }).unwrap();
        newest
            .wait_for(|listed| listed.rows().len() == 2_000)
            .await
            .unwrap();
        (admin.address().to_string(), stop)
    }

    /// A server that reads a little and answers the same to whatever it was.
    fn serve_once(answer: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(answer).unwrap();
        });
        address
    }
}
