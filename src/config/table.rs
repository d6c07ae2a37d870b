//! Every setting, declared once.

use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use super::value;

/// Whose settings: a server and an agent have a file each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `silo-proxy server`.
    Server,
    /// `silo-proxy agent`.
    Agent,
}

impl Role {
    /// The other one.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Server => Self::Agent,
            Self::Agent => Self::Server,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server => "server",
            Self::Agent => "agent",
        })
    }
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Its path in the file, such as `http.port`.
    pub path: &'static str,
    /// What may stand there.
    pub kind: Kind,
    /// What holds when nobody sets it, as it would be written.
    pub preset: Preset,
    /// What it is for, and why that default.
    pub about: &'static str,
    /// When a change to it takes effect.
    pub reload: Reload,
}

/// When a change to a [`Setting`] takes effect in a process that is told to read its settings
/// again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// At once: for what begins from then on, and for what runs where that can be.
    Now,
    /// When the process is started anew; until then the old value holds.
    Restart,
}

impl fmt::Display for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Now => "yes",
            Self::Restart => "restart",
        })
    }
}

impl Setting {
    /// The same setting, whose changes need a restart.
    const fn fixed(self) -> Self {
        Self {
            reload: Reload::Restart,
            ..self
        }
    }
}

/// What holds when nobody sets a [`Setting`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// This value.
    Value(&'static str),
    /// Nothing; `example` shows what could be set, `meaning` what happens without.
    Unset {
        /// A value as it would be written.
        example: &'static str,
        /// A few words for the table.
        meaning: &'static str,
    },
    /// It must be set; the text is an example.
    Required(&'static str),
}

/// What may stand in a [`Setting`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A level or directives, see [`Filter`](crate::telemetry::Filter).
    Level,
    /// A [`Format`](crate::telemetry::Format).
    LogFormat,
    /// A [`ClientAuth`](crate::auth::ClientAuth).
    ClientAuth,
    /// An IP address, or `localhost`.
    Address,
    /// A DNS name or an IP address.
    Host,
    /// A host and a port.
    HostPort,
    /// An [`AgentId`](crate::id::AgentId).
    Id,
    /// A [`ServiceUrl`](super::ServiceUrl).
    Url,
    /// A [`Protocol`](super::Protocol).
    Protocol,
    /// A [`HostHeader`](super::HostHeader).
    HostHeader,
    /// `true` or `false`.
    Flag,
    /// A whole number from `min` to `max`.
    Count {
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
        /// Whether `off` may stand there too.
        off: bool,
    },
    /// Bytes, such as `64KiB`, from `min` to `max`.
    Size {
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
        /// Whether `off` may stand there too.
        off: bool,
    },
    /// A time, such as `30s`, from `min` to `max`.
    Time {
        /// The shortest.
        min: Duration,
        /// The longest.
        max: Duration,
    },
    /// A credential; may come from a file.
    Secret,
    /// Agent ids with a credential each; may come from a file.
    Tokens,
    /// Names with a text each.
    Labels,
    /// Agent ids with a port each.
    Ports,
    /// Addresses and blocks of addresses.
    Networks,
    /// The name of a file.
    FileName,
    /// A [`LogOutput`](super::LogOutput), or none.
    Output,
    /// An [`Origins`](crate::cors::Origins).
    Origins,
    /// Methods of HTTP.
    Methods,
    /// Names of header lines.
    HeaderNames,
    /// A file of certificates.
    Certificates,
}

impl Kind {
    /// Whether the value may also come from the file that `…_file` names.
    pub fn from_file(self) -> bool {
        matches!(self, Self::Secret | Self::Tokens)
    }
}

/// The largest port.
const PORT: u64 = u16::MAX as u64;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

const fn count(min: u64, max: u64) -> Kind {
    Kind::Count {
        min,
        max,
        off: false,
    }
}

const fn size(min: u64, max: u64) -> Kind {
    Kind::Size {
        min,
        max,
        off: false,
    }
}

/// A time that may not be zero: nothing can happen within it.
const fn time() -> Kind {
    Kind::Time {
        min: Duration::from_millis(1),
        max: DAY,
    }
}

/// A time that may be zero: it is waited for, or not.
const fn wait() -> Kind {
    Kind::Time {
        min: Duration::ZERO,
        max: DAY,
    }
}

const fn setting(
    path: &'static str,
    kind: Kind,
    default: &'static str,
    about: &'static str,
) -> Setting {
    let preset = Preset::Value(default);
    Setting {
        path,
        kind,
        preset,
        about,
        reload: Reload::Now,
    }
}

const fn unset(
    path: &'static str,
    kind: Kind,
    meaning: &'static str,
    example: &'static str,
    about: &'static str,
) -> Setting {
    let preset = Preset::Unset { example, meaning };
    Setting {
        path,
        kind,
        preset,
        about,
        reload: Reload::Now,
    }
}

const fn required(
    path: &'static str,
    kind: Kind,
    example: &'static str,
    about: &'static str,
) -> Setting {
    let preset = Preset::Required(example);
    Setting {
        path,
        kind,
        preset,
        about,
        reload: Reload::Now,
    }
}

const LEVEL: Setting = setting(
    "log.level",
    Kind::Level,
    "info",
    "What is logged to standard error: `off`, `error`, `warn`, `info`, `debug` or `trace`, or directives such as `info,silo_proxy::mux=trace`. At `info` an agent's coming and going is logged, a request is not.",
);

const LOG_FORMAT: Setting = setting(
    "log.format",
    Kind::LogFormat,
    "text",
    "Lines for people, or `json`: one object a line, with `timestamp`, `level`, `target`, `message` and the fields.",
)
.fixed();

const fn grace(path: &'static str) -> Setting {
    setting(
        path,
        wait(),
        "5s",
        "How long running requests may go on after SIGTERM or Ctrl-C; then they are cut. Service managers kill after 10 s to 90 s.",
    )
}

static SERVER: &[Setting] = &[
    LEVEL,
    LOG_FORMAT,
    setting(
        "http.host",
        Kind::Address,
        "127.0.0.1",
        "Address of the admin port. Anything but loopback needs `http.admin_api_key`: the list of agents is nobody else's business.",
    )
    .fixed(),
    setting(
        "http.port",
        count(0, PORT),
        "8080",
        "The admin port: `/health`, `/ready`, `/agents`, `/metrics`. 0 lets the kernel choose.",
    )
    .fixed(),
    unset(
        "http.admin_api_key",
        Kind::Secret,
        "none",
        "change-me",
        "What callers of the admin port must send as `X-API-Key` or `Authorization: Bearer`. Without one, the port is asked as `localhost`, `127.0.0.1` or `[::1]` only.",
    ),
    setting(
        "http.agent_host",
        Kind::Address,
        "::",
        "Address of the agents' ports. `::` is every address, IPv4 included: these ports are there to be reached.",
    )
    .fixed(),
    unset(
        "http.public_host",
        Kind::Host,
        "the host by which the agent reached the server",
        "proxy.example.com",
        "The host in the URL that an agent is told and prints, without a port.",
    ),
    setting(
        "http.agent_port_range.start",
        count(1, PORT),
        "8100",
        "First port for agents. One is opened when an agent needs it, not before.",
    ),
    setting(
        "http.agent_port_range.end",
        count(1, PORT),
        "8200",
        "Last port for agents, inclusive; the range holds one agent a port. Keep it clear of `net.ipv4.ip_local_port_range`.",
    ),
    unset(
        "http.static_ports",
        Kind::Ports,
        "none",
        "{agent-1: 8100, agent-2: 9000}",
        "Ports that belong to one agent id alone, inside the range or outside it.",
    ),
    setting(
        "http.port_lease",
        wait(),
        "0s",
        "How long a port stays its agent's after the agent is gone; visitors get 503 meanwhile. With 0 it is free at once.",
    ),
    unset(
        "http.state_file",
        Kind::FileName,
        "none",
        "/var/lib/silo-proxy/ports.json",
        "Where the server writes down who has which port, so that leases and last ports survive a restart. In a directory that it may write to; two more files appear beside it.",
    )
    .fixed(),
    unset(
        "http.trusted_proxies",
        Kind::Networks,
        "none",
        "[127.0.0.1, 10.0.0.0/8]",
        "Visitors whose own `X-Forwarded-*`, `Forwarded` and `X-Real-IP` are believed: addresses and blocks. Everybody can write those lines, so nobody is believed by default.",
    ),
    setting(
        "http.max_exchanges_per_agent",
        count(1, 1 << 16),
        "16384",
        "Requests in flight to one agent; more get 503. Enough for a burst of 10,000, and each may hold 32 KiB before anything is lent.",
    ),
    setting(
        "http.max_connections",
        count(1, 10_000_000),
        "100000",
        "Visitors' connections in all. Each costs a file descriptor and some KiB.",
    ),
    setting(
        "http.max_connections_per_agent",
        count(1, 10_000_000),
        "20000",
        "Visitors' connections to one agent's port, so that one busy port leaves room for the others.",
    ),
    setting(
        "http.max_connections_per_address",
        Kind::Count {
            min: 1,
            max: 10_000_000,
            off: true,
        },
        "off",
        "Visitors' connections from one address. Off, because a reverse proxy or a NAT in front makes one address carry everybody.",
    ),
    setting(
        "http.max_request_line",
        size(64, MIB),
        "8KiB",
        "Longest request line; longer ones get 414. What nginx and Apache allow.",
    ),
    setting(
        "http.max_head",
        // What the tunnel carries is 128 KiB, with the lines that are added.
        size(KIB, 96 * KIB),
        "64KiB",
        "Most bytes of a request line with its header lines; more get 431.",
    ),
    setting(
        "http.max_header_lines",
        count(1, 10_000),
        "100",
        "Most header lines of a request; more get 431. Browsers send about 20.",
    ),
    setting(
        "http.head_timeout",
        time(),
        "10s",
        "From a request's first byte to the end of its head, so that a slow sender holds no connection for long.",
    ),
    setting(
        "http.body_timeout",
        time(),
        "60s",
        "Longest silence in the middle of a request's body. The body as a whole may take any time. On a stream of HTTP/2 it counts until the answer has begun: after that, a client of gRPC may be silent for hours.",
    ),
    setting(
        "http.idle_timeout",
        time(),
        "75s",
        "How long a connection is kept between two requests, in HTTP/2 without any. Longer than the 60 s after which common load balancers close, so that they close first.",
    ),
    setting(
        "http.send_timeout",
        time(),
        "120s",
        "How long a visitor may take no byte of an answer that is waiting for him.",
    ),
    setting(
        "http.max_body",
        Kind::Size {
            min: 1,
            max: TIB,
            off: true,
        },
        "off",
        "Largest body of a request; larger ones get 413. Off, because bodies are streamed and cost no memory.",
    ),
    setting(
        "http.receive_buffer",
        Kind::Size {
            min: 4 * KIB,
            max: 1 << 30,
            off: true,
        },
        "256KiB",
        "What the kernel takes of an upload that nobody reads (`SO_RCVBUF` of a visitor's socket: it may hold twice as much, and no more than `net.core.rmem_max` allows). It is also about what one upload brings in a round trip: 5 MB/s over 50 ms. `off` leaves it to the kernel, which lets a fast upload have 6 MiB and more.",
    )
    .fixed(),
    unset(
        "http.cors.allowed_origins",
        Kind::Origins,
        "no CORS: all is left to the services",
        "[https://app.example.com]",
        "Origins whose pages may read answers from agents' ports: as browsers send them, or `\"*\"` for all. With it, preflights are answered by the server and don't reach the agents.",
    ),
    setting(
        "http.cors.allowed_methods",
        Kind::Methods,
        "GET, HEAD, POST, PUT, PATCH, DELETE",
        "Methods that those pages may use.",
    ),
    unset(
        "http.cors.allowed_headers",
        Kind::HeaderNames,
        "those that the browser asks for",
        "[Authorization, Content-Type]",
        "Header lines that those pages may send.",
    ),
    setting(
        "http.cors.allow_credentials",
        Kind::Flag,
        "false",
        "Whether cookies and credentials go with requests of those pages. Not with `\"*\"`: any page could read what its visitor may.",
    ),
    setting(
        "http.cors.max_age",
        wait(),
        "10m",
        "How long browsers may remember the answer to a preflight. They forget after some hours anyway.",
    ),
    setting(
        "http.access_log",
        Kind::Output,
        "off",
        "One line a request: `stderr`, `stdout`, or the name of a file, which grows at its end and is opened again on SIGHUP. Lines follow `log.format`; their paths are without the query.",
    )
    .fixed(),
    setting(
        "grpc.host",
        Kind::Address,
        "::",
        "Address of the tunnel port. `::` is every address, IPv4 included; without a credential in `grpc.auth` or `grpc.tls.client_auth`, agents on other hosts are rejected all the same.",
    )
    .fixed(),
    setting(
        "grpc.port",
        count(0, PORT),
        "9090",
        "The tunnel port, to which agents connect. 0 lets the kernel choose.",
    )
    .fixed(),
    unset(
        "grpc.auth.shared_token",
        Kind::Secret,
        "none",
        "change-me",
        "A credential for every agent id without one of its own. Its holders trust each other: each can take any such id.",
    ),
    unset(
        "grpc.auth.tokens",
        Kind::Tokens,
        "none",
        "{agent-1: change-me, agent-2: change-me-too}",
        "Credentials bound to one agent id each. Such an id takes no other, the shared one included.",
    ),
    setting(
        "grpc.tls.enabled",
        Kind::Flag,
        "false",
        "TLS on the tunnel port (1.2 or 1.3). `silo-proxy certs` makes a private authority and certificates. Agents' ports stay plain HTTP.",
    )
    .fixed(),
    unset(
        "grpc.tls.cert_file",
        Kind::FileName,
        "none; needed with `enabled`",
        "server.pem",
        "PEM file with the server's certificate and those between it and the authority. Read again when it, the key or the authorities change; tunnels go on.",
    )
    .fixed(),
    unset(
        "grpc.tls.key_file",
        Kind::FileName,
        "none; needed with `enabled`",
        "server.key",
        "PEM file with the certificate's key.",
    )
    .fixed(),
    unset(
        "grpc.tls.ca_file",
        Kind::FileName,
        "none",
        "ca.pem",
        "PEM file with the authorities that sign agents' certificates. Use a private one: whoever it signs for gets in.",
    )
    .fixed(),
    setting(
        "grpc.tls.client_auth",
        Kind::ClientAuth,
        "none",
        "Agents' certificates: `none` asks for none; with `request` one is a credential for the ids it names (a dNSName equal to the id, or the URI `silo:agent:ID`), as good as a token; `require` wants one of every agent, and the token too where `grpc.auth` is set.",
    )
    .fixed(),
    setting(
        "grpc.handshake_timeout",
        time(),
        "10s",
        "From an agent's connection to its hello, so that strangers hold no connection for long.",
    ),
    setting(
        "grpc.max_handshakes",
        count(1, 1_000_000),
        "1024",
        "Connections that have not said who they are yet, in all. Thousands of agents that come back at once pass through in turns.",
    ),
    setting(
        "grpc.heartbeat_interval",
        time(),
        "10s",
        "How long a tunnel may be silent before a heartbeat is sent. Short enough to keep a NAT's entry alive.",
    ),
    setting(
        "grpc.heartbeat_timeout",
        time(),
        "30s",
        "Without a byte for so long a tunnel is dead: three heartbeats were lost. Must be longer than the interval.",
    ),
    setting(
        "server.workers",
        count(0, 1024),
        "0",
        "Worker threads; 0 is as many as there are cores.",
    )
    .fixed(),
    grace("server.grace"),
    setting(
        "server.max_buffered",
        size(16 * MIB, TIB),
        "1GiB",
        "Bytes that the process promises to hold for all requests in flight together; requests beyond get 503. Only visitors or services that stop reading make it hold them.",
    ),
    setting(
        "server.max_buffered_per_agent",
        size(MIB, TIB),
        "768MiB",
        "The same for one agent, so that it can't take all: room for 16,384 requests with 32 KiB each, and half as much again to lend to large bodies. If `server.max_buffered` is set to less, that counts.",
    ),
];

static AGENT: &[Setting] = &[
    LEVEL,
    LOG_FORMAT,
    required(
        "grpc.server_address",
        Kind::HostPort,
        "proxy.example.com:9090",
        "Host and port of the server's tunnel port. Without a port it is 9090.",
    )
    .fixed(),
    required(
        "grpc.agent_id",
        Kind::Id,
        "agent-1",
        "The id of this agent: letters, digits, `.`, `_` and `-`, in lower case, at most 63.",
    )
    .fixed(),
    unset(
        "grpc.token",
        Kind::Secret,
        "none",
        "change-me",
        "The credential for that id, as the server's `grpc.auth` has it. Not needed on the server's own host while the server has none. Without `grpc.tls` it goes in clear.",
    ),
    setting(
        "grpc.tls.enabled",
        Kind::Flag,
        "false",
        "TLS to the server, whose certificate is checked.",
    )
    .fixed(),
    unset(
        "grpc.tls.ca_file",
        Kind::FileName,
        "the system's certificates",
        "ca.pem",
        "PEM file with the only authorities that may sign the server's certificate. It and the next two are read again at a reconnect when they have changed.",
    )
    .fixed(),
    unset(
        "grpc.tls.cert_file",
        Kind::FileName,
        "none",
        "agent-1.pem",
        "PEM file with this agent's certificate, for a server that asks for one.",
    )
    .fixed(),
    unset(
        "grpc.tls.key_file",
        Kind::FileName,
        "none; needed with `cert_file`",
        "agent-1.key",
        "PEM file with the certificate's key.",
    )
    .fixed(),
    unset(
        "grpc.tls.server_name",
        Kind::Host,
        "the host of `grpc.server_address`",
        "proxy.example.com",
        "The name that the server's certificate must bear.",
    )
    .fixed(),
    setting(
        "grpc.heartbeat_timeout",
        time(),
        "30s",
        "Without a byte from the server for so long the tunnel is dead. The server's welcome replaces it by its own value.",
    ),
    required(
        "local.service_url",
        Kind::Url,
        "http://127.0.0.1:3000",
        "The local service: `http` or `https`, a host, a port. No path, because requests arrive with the path the visitor sent; no user name and no query. The agent connects to nothing else.",
    ),
    setting(
        "local.protocol",
        Kind::Protocol,
        "http1",
        "Which HTTP the service is spoken to in, whatever its visitors speak. `http1` is HTTP/1.1, what every service knows; `h2c` HTTP/2 with prior knowledge, over shared connections, as gRPC needs it; `auto` is `h2c` for requests whose Content-Type is `application/grpc` or begins with `application/grpc+`, `http1` for all others. With an `https` URL, HTTP/2 is agreed upon in the handshake.",
    ),
    setting(
        "local.host_header",
        Kind::HostHeader,
        "preserve",
        "What the service sees as `Host`: `preserve` is what the visitor sent, `target` the host of the URL, anything else is taken as it is.",
    ),
    setting(
        "local.response_timeout",
        time(),
        "60s",
        "From handing a request to the service to the head of its answer; then the visitor gets 504. What nginx waits.",
    ),
    setting(
        "local.connect_timeout",
        time(),
        "5s",
        "For a connection to the service. It is near: what takes longer is not there.",
    ),
    setting(
        "local.idle_timeout",
        time(),
        "60s",
        "How long an unused connection to the service is kept. Best shorter than the service's own time (nginx: 75 s), or a request may meet a connection that the service just closed.",
    ),
    setting(
        "local.max_connections",
        count(1, 65_536),
        "256",
        "Requests that the service gets at once; others wait in order. Small services do no better with more. A connection that the service has upgraded (WebSocket) doesn't count any more.",
    ),
    unset(
        "local.tls.ca_file",
        Kind::Certificates,
        "the system's certificates",
        "ca.pem",
        "PEM file with the only certificates that may sign an `https` service's.",
    ),
    unset(
        "local.tls.server_name",
        Kind::Host,
        "the host of the URL",
        "service.internal",
        "The name that an `https` service's certificate must bear.",
    ),
    setting(
        "local.tls.insecure",
        Kind::Flag,
        "false",
        "Take any certificate of an `https` service. Whoever can answer in its place then reads everything.",
    ),
    unset(
        "agent.labels",
        Kind::Labels,
        "none",
        "{site: zurich, owner: ops}",
        "What the agent says of itself; `GET /agents` shows it. At most 32, names and values of at most 128 bytes.",
    ),
    grace("agent.grace"),
];

/// The sections, for headings in the examples.
static SECTIONS: &[(Role, &str, &str)] = &[
    (Role::Server, "log", "Logging"),
    (
        Role::Server,
        "http",
        "The admin port, the agents' ports, and the limits of their visitors",
    ),
    (Role::Server, "grpc", "The tunnel port"),
    (Role::Server, "server", "The process as a whole"),
    (Role::Agent, "log", "Logging"),
    (Role::Agent, "grpc", "The way to the server"),
    (Role::Agent, "local", "The service behind this agent"),
    (Role::Agent, "agent", "The process as a whole"),
];

/// Every setting of `role`, in the order of the file.
pub fn table(role: Role) -> &'static [Setting] {
    match role {
        Role::Server => SERVER,
        Role::Agent => AGENT,
    }
}

/// The name of a setting in the environment: `SILO_HTTP_PORT` for `http.port`.
pub fn environment_name(path: &str) -> String {
    format!("SILO_{}", path.replace('.', "_").to_ascii_uppercase())
}

/// The settings of `role` as a Markdown table, for the README.
pub fn markdown(role: Role) -> String {
    let mut text = String::from("| Setting | Default | Value | What it is for | SIGHUP |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for setting in table(role) {
        let default = match setting.preset {
            Preset::Value(value) => format!("`{value}`"),
            Preset::Unset { meaning, .. } => meaning.to_owned(),
            Preset::Required(_) => "must be set".to_owned(),
        };
        let path = match setting.kind.from_file() {
            true => format!("`{0}`, `{0}_file`", setting.path),
            false => format!("`{}`", setting.path),
        };
        let Setting {
            kind,
            about,
            reload,
            ..
        } = setting;
        // Writing to a `String` can't fail.
        let _ = writeln!(text, "| {path} | {default} | {kind} | {about} | {reload} |");
    }
    text
}

/// An annotated file for `role` with every setting of this version: what must be set is, the
/// rest is commented out with its default or an example.
pub fn example(role: Role) -> String {
    let mut text = format!(
        "# Settings of a silo-proxy {role}. What is commented out shows the default, or an example\n\
         # where it says so. Every setting can also come from the environment, which goes before\n\
         # the file: SILO_HTTP_PORT is http.port.\n"
    );
    let mut open: Vec<&str> = Vec::new();
    for setting in table(role) {
        let mut sections: Vec<&str> = setting.path.split('.').collect();
        let name = sections.pop().unwrap_or_default();
        let common = open.iter().zip(&sections).take_while(|(a, b)| a == b);
        let common = common.count();
        for (depth, section) in sections.iter().enumerate().skip(common) {
            let indent = "  ".repeat(depth);
            if depth == 0 {
                let about = SECTIONS
                    .iter()
                    .find(|(of, name, _)| of == &role && name == section)
                    .map_or("", |(_, _, about)| about);
                let _ = writeln!(text, "\n# {about}");
            }
            let _ = writeln!(text, "{indent}{section}:");
        }
        open = sections;

        let indent = "  ".repeat(open.len());
        let (mark, value, note) = match setting.preset {
            Preset::Value("::") => ("#", "\"::\"", String::new()),
            Preset::Value(value) => ("#", value, String::new()),
            Preset::Required(value) => ("", value, " Must be set.".to_owned()),
            Preset::Unset { example, meaning } => (
                "#",
                example,
                format!(" Default: {meaning}; this is an example."),
            ),
        };
        let about = format!("{}{note}", setting.about);
        for line in wrapped(&about, 96 - indent.len()) {
            let _ = writeln!(text, "{indent}# {line}");
        }
        let _ = writeln!(text, "{indent}{mark}{name}: {value}");
        if setting.kind.from_file() {
            let _ = writeln!(text, "{indent}# Or the name of a file that holds it:");
            let _ = writeln!(text, "{indent}#{name}_file: /run/secrets/{name}");
        }
    }
    text
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let off = |off: bool| if off { ", or `off`" } else { "" };
        match *self {
            Self::Level => f.write_str("level or directives"),
            Self::LogFormat => f.write_str("`text` or `json`"),
            Self::ClientAuth => f.write_str("`none`, `request` or `require`"),
            Self::Address => f.write_str("IP address or `localhost`"),
            Self::Host => f.write_str("host name or IP address"),
            Self::HostPort => f.write_str("HOST:PORT"),
            Self::Id => f.write_str("agent id"),
            Self::Url => f.write_str("URL"),
            Self::Protocol => f.write_str("`http1`, `h2c` or `auto`"),
            Self::HostHeader => f.write_str("`preserve`, `target` or a host"),
            Self::Flag => f.write_str("`true` or `false`"),
            Self::Count { min, max, off: may } => write!(f, "{min} to {max}{}", off(may)),
            Self::Size { min, max, off: may } => {
                let (min, max) = (value::show_size(min), value::show_size(max));
                write!(f, "{min} to {max}{}", off(may))
            }
            Self::Time { min, max } => {
                let (min, max) = (value::show_time(min), value::show_time(max));
                write!(f, "{min} to {max}")
            }
            Self::Secret => f.write_str("text"),
            Self::Tokens => f.write_str("ID: TOKEN pairs"),
            Self::Labels => f.write_str("NAME: TEXT pairs"),
            Self::Ports => f.write_str("ID: PORT pairs"),
            Self::Networks => f.write_str("list of addresses and blocks"),
            Self::Output => f.write_str("`off`, `stderr`, `stdout` or a file name"),
            Self::Origins => f.write_str("list of origins, or `\"*\"`"),
            Self::Methods => f.write_str("list of methods"),
            Self::HeaderNames => f.write_str("list of header names"),
            Self::FileName | Self::Certificates => f.write_str("file name"),
        }
    }
}
