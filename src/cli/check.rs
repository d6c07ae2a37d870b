//! `silo-proxy check`: are the settings right, and does this host suit them?

use std::fmt;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{ConfigArg, Failure, Outcome, say, sources};
use crate::agent::Agent;
use crate::config::{AgentConfig, HostPort, HttpConfig, Role, ServerConfig, Sources, secret_files};
use crate::net::tls::{AgentTls, CertificateInfo, ServerTls};
use crate::ports::BindFailure;

/// How many ports of a range are tried: enough for any but the largest hosts, and done within a
/// second.
const MOST_TRIED: usize = 20_000;

/// File descriptors of a server besides those of agents and visitors.
const OWN_DESCRIPTORS: u64 = 64;

/// How long another host, or a server on this one, may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The ports that this host gives to outgoing connections, and those it keeps out of that.
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Look at settings and at this host before a server or an agent is started with them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Faults of the settings are told as at the start. Then comes a line for each thing
that was looked at: whether it is well, and what mends it. Nothing is changed.

Exit codes: 0 it can be started, warnings or not; 1 this host prevents it; 2 the settings do.

Examples:
  silo-proxy check --config /etc/silo-proxy/server.yaml
  silo-proxy check --agent --config /etc/silo-proxy/agent.yaml
  silo-proxy check --config server.yaml && kill -HUP $(pidof silo-proxy)"
)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// The settings are an agent's, not a server's
    #[arg(long)]
    agent: bool,
}

pub(super) fn run(args: &CheckArgs) -> Outcome {
    let sources = sources(args.file.config.as_deref());
    let findings = match args.agent {
        false => server(&sources)?,
        true => agent(&sources)?,
    };
    for finding in &findings {
        say(finding);
    }
    let errors = findings
        .iter()
        .filter(|finding| finding.level == Level::Error);
    match errors.count() {
        0 => Ok(()),
        _ => Err(Failure::failed(
            "this host is not ready for these settings: see the lines with `error` above",
        )),
    }
}

/// One thing that was looked at. Shown as a line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    level: Level,
    what: String,
    /// What to do about it; empty where nothing is to be done.
    mend: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    /// As it should be.
    Fine,
    /// It can be started, but should be looked at.
    Warning,
    /// It can't be started.
    Error,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Fine => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        };
        write!(f, "{level:<8} {}", self.what)?;
        match &self.mend[..] {
            "" => Ok(()),
            mend => write!(f, "; to mend it, {mend}"),
        }
    }
}

fn fine(what: impl Into<String>) -> Finding {
    let (what, mend) = (what.into(), String::new());
    Finding {
        level: Level::Fine,
        what,
        mend,
    }
}

fn warning(what: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding {
        level: Level::Warning,
        what: what.into(),
        mend: mend.into(),
    }
}

fn error(what: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding {
        level: Level::Error,
        ..warning(what, mend)
    }
}

// A server.

fn server(sources: &Sources) -> Result<Vec<Finding>, Failure> {
    let config = ServerConfig::load(sources)?;
    let tls = config.grpc.tls.as_ref().map(ServerTls::load).transpose();
    let tls = tls.map_err(Failure::usage)?;

    let mut findings = vec![fine("the settings have no faults")];
    findings.extend(ephemeral_ports(&config.http, &Kernel::read()));
    findings.push(descriptors(&config.http, descriptor_limit()));
    findings.extend(ports(&config));
    if let Some(file) = &config.http.state_file {
        findings.push(state_file(file));
    }
    if let Some(tls) = tls {
        let warnings = tls.warnings(SystemTime::now());
        findings.extend(certificates(
            "the server's",
            Some(&tls.certificate()),
            warnings,
        ));
    }
    let key = config.grpc.tls.map(|tls| tls.key_file);
    findings.extend(secrets(Role::Server, sources, key));
    Ok(findings)
}

/// What the kernel does with ports by itself; empty where it doesn't say.
#[derive(Debug, Default)]
struct Kernel {
    ephemeral: Option<RangeInclusive<u16>>,
    reserved: Vec<RangeInclusive<u16>>,
}

impl Kernel {
    fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&text(EPHEMERAL), &text(RESERVED))
    }

    /// From two numbers with a tab between them, and from a list such as `8080,9000-9100`.
    fn parse(ephemeral: &str, reserved: &str) -> Self {
        let range = |(start, end): (&str, &str)| {
            let port = |text: &str| text.trim().parse::<u16>().ok();
            Some(port(start)?..=port(end)?)
        };
        let parts = reserved.trim().split(',');
        Self {
            ephemeral: ephemeral
                .trim()
                .split_once(char::is_whitespace)
                .and_then(range),
            reserved: parts
                .filter_map(|part| range(part.split_once('-').unwrap_or((part, part))))
                .collect(),
        }
    }

    /// Whether an outgoing connection may take this port.
    fn gives_away(&self, port: u16) -> bool {
        let within = |range: &RangeInclusive<u16>| range.contains(&port);
        self.ephemeral.as_ref().is_some_and(within) && !self.reserved.iter().any(within)
    }
}

fn ephemeral_ports(http: &HttpConfig, kernel: &Kernel) -> Vec<Finding> {
    let Some(ephemeral) = &kernel.ephemeral else {
        return Vec::new();
    };
    let ephemeral = format!("{}-{}", ephemeral.start(), ephemeral.end());
    let all = http
        .agent_port_range
        .clone()
        .chain(http.static_ports.values().copied());
    let mut given: Vec<u16> = all.filter(|port| kernel.gives_away(*port)).collect();
    given.sort_unstable();
    given.dedup();
    let what = match &given[..] {
        [] => {
            let what = format!("no agents' port is given to outgoing connections ({ephemeral})");
            return vec![fine(what)];
        }
        given => format!(
            "outgoing connections of this host may take the agents' ports {} \
             (net.ipv4.ip_local_port_range is {ephemeral})",
            Ports(given)
        ),
    };
    let mut reserved: Vec<String> = kernel.reserved.iter().map(show_range).collect();
    reserved.push(Ports(&given).to_string().replace(' ', ""));
    let mend = format!(
        "move the range, or `sysctl -w net.ipv4.ip_local_reserved_ports={}`",
        reserved.join(",")
    );
    vec![warning(what, mend)]
}

/// What a server needs at most: a stream and a port for each agent, and a connection for each
/// visitor.
fn descriptors(http: &HttpConfig, limit: Option<u64>) -> Finding {
    let agents = http.agent_port_range.len() as u64 + http.static_ports.len() as u64;
    let visitors = http.max_connections as u64;
    let need = OWN_DESCRIPTORS + 2 * agents + visitors;
    match limit {
        None => fine("there is no limit of open files"),
        Some(limit) if limit >= need => fine(format!(
            "{limit} files may be open, enough for {agents} agents and {visitors} visitors"
        )),
        Some(limit) => warning(
            format!(
                "only {limit} files may be open, but {agents} agents and {visitors} visitors need \
                 {need}"
            ),
            format!(
                "raise the limit (LimitNOFILE={need} in a systemd unit, `ulimit -Hn {need}`), or \
                 lower http.max_connections"
            ),
        ),
    }
}

fn descriptor_limit() -> Option<u64> {
    // A server does the same when it starts.
    crate::net::raise_descriptor_limit().map_or(Some(0), |limit| limit.now)
}

/// Tries the ports, unless the server that is to have them runs already.
fn ports(config: &ServerConfig) -> Vec<Finding> {
    let (http, grpc) = (&config.http, &config.grpc);
    let own = [
        ("http.port", http.host, http.port),
        ("grpc.port", grpc.host, grpc.port),
    ];
    let mut findings = Vec::new();
    for (setting, host, port) in own {
        let address = SocketAddr::new(host, port);
        let Err(why) = crate::net::listen(address) else {
            if port != 0 {
                findings.push(fine(format!("{setting}: {address} is free")));
            }
            continue;
        };
        let failure = crate::net::bind_failure(&why);
        if setting == "http.port" && failure == BindFailure::InUse && is_silo_proxy(address) {
            let what = format!(
                "a server runs on {address} already; its ports are not tried, and a change of \
                 settings marked `restart` in the README needs a restart"
            );
            return vec![fine(what)];
        }
        let mend = match failure {
            BindFailure::InUse => format!("stop the program there (`ss -ltnp`), or set {setting}"),
            BindFailure::Denied => {
                format!("set {setting} to 1024 or more, or grant CAP_NET_BIND_SERVICE")
            }
            BindFailure::Descriptors => "raise the limit of open files".to_owned(),
            BindFailure::Other => "set an address of this host".to_owned(),
        };
        findings.push(error(
            format!("{setting}: can't listen on {address}: {why}"),
            mend,
        ));
    }
    findings.extend(agents_ports(http));
    findings
}

fn agents_ports(http: &HttpConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    let taken = |port: u16| crate::net::listen(SocketAddr::new(http.agent_host, port)).err();
    let range = http.agent_port_range.clone();
    let tried: Vec<u16> = range.clone().take(MOST_TRIED).collect();
    let mut held = Vec::new();
    let mut last = None;
    for port in &tried {
        if let Some(why) = taken(*port) {
            held.push(*port);
            last = Some(why);
        }
    }
    let (start, end) = (range.start(), range.end());
    findings.push(match last {
        None if tried.len() < range.len() => fine(format!(
            "http.agent_port_range: {start} to {end}, of which the first {MOST_TRIED} were tried \
             and are free"
        )),
        None => fine(format!("http.agent_port_range: {start} to {end} are free")),
        Some(why) if held.len() == tried.len() => warning(
            format!("http.agent_port_range: no port of {start} to {end} can be had: {why}"),
            "set another range, or http.agent_host to an address of this host",
        ),
        Some(why) => warning(
            format!(
                "http.agent_port_range: {} of {} ports can't be had and will be skipped: {} ({why})",
                held.len(),
                tried.len(),
                Ports(&held)
            ),
            "stop the programs there (`ss -ltnp`), or move the range",
        ),
    });
    for (id, port) in &http.static_ports {
        if let Some(why) = taken(*port) {
            findings.push(warning(
                format!("http.static_ports: {id} can't have {port}, and gets no other: {why}"),
                "stop the program there (`ss -ltnp`), or pin another port",
            ));
        }
    }
    findings
}

/// Whether a silo-proxy server answers on its admin port.
fn is_silo_proxy(address: SocketAddr) -> bool {
    let ask = || -> io::Result<String> {
        let mut address = address;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(r#"{"status":"ok"}"#))
}

fn state_file(file: &Path) -> Finding {
    let directory = match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let writable = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match rustix::fs::access(directory, writable) {
        Ok(()) => fine(format!(
            "http.state_file: {} can be written",
            file.display()
        )),
        Err(why) => error(
            format!(
                "http.state_file: can't write into {}: {why}",
                directory.display()
            ),
            "make the directory and give it to the user that the server runs as",
        ),
    }
}

// An agent.

fn agent(sources: &Sources) -> Result<Vec<Finding>, Failure> {
    let config = AgentConfig::load(sources)?;
    Agent::new(config.clone()).map_err(Failure::usage)?;
    let tls = config.grpc.tls.as_ref().map(AgentTls::load).transpose();
    let tls = tls.map_err(Failure::usage)?;

    let mut findings = vec![fine("the settings have no faults")];
    findings.push(reachable(
        "grpc.server_address",
        &config.grpc.server_address,
        "start the server, open its tunnel port in the firewall, or correct the setting",
    ));
    findings.push(reachable(
        "local.service_url",
        &config.local.service_url.address,
        "start the service, or correct the setting",
    ));
    if let Some(tls) = tls {
        findings.extend(certificates(
            "the agent's",
            None,
            tls.warnings(SystemTime::now()),
        ));
    }
    let key = config
        .grpc
        .tls
        .and_then(|tls| tls.identity)
        .map(|(_, key)| key);
    findings.extend(secrets(Role::Agent, sources, key));
    Ok(findings)
}

/// An agent waits for either, so that neither keeps it from starting.
fn reachable(setting: &str, address: &HostPort, mend: &str) -> Finding {
    let connect = || -> io::Result<()> {
        let mut outcome = Err(io::Error::other("the name has no address"));
        for candidate in (&address.host[..], address.port).to_socket_addrs()? {
            outcome = TcpStream::connect_timeout(&candidate, PATIENCE).map(drop);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    };
    match connect() {
        Ok(()) => fine(format!("{setting}: {address} takes connections")),
        Err(why) => warning(
            format!("{setting}: can't connect to {address}: {why}"),
            mend,
        ),
    }
}

// Both.

fn certificates(whose: &str, own: Option<&CertificateInfo>, warnings: Vec<String>) -> Vec<Finding> {
    if warnings.is_empty() {
        let what = match own {
            Some(own) => format!(
                "grpc.tls: {whose} certificate {}",
                own.validity(SystemTime::now())
            ),
            None => format!("grpc.tls: {whose} certificates are valid"),
        };
        return vec![fine(what)];
    }
    // They say what mends them.
    warnings.into_iter().map(|text| warning(text, "")).collect()
}

/// Looks who may read the files with secrets in them.
fn secrets(role: Role, sources: &Sources, key: Option<PathBuf>) -> Vec<Finding> {
    let mut files = secret_files(role, sources);
    files.extend(key.map(|file| ("grpc.tls.key_file".to_owned(), file)));
    let mut findings = Vec::new();
    for (setting, file) in files {
        let mode = fs::metadata(&file).map_or(0, |meta| meta.permissions().mode());
        let shown = file.display();
        findings.push(match mode & 0o006 {
            0 => fine(format!("{setting}: {shown} is closed to other users")),
            _ => warning(
                format!("{setting}: every user of this host may read or change {shown}"),
                format!("`chmod o= {shown}`"),
            ),
        });
    }
    findings
}

/// Ports in ascending order as people write them: `8100-8102, 8110`.
struct Ports<'a>(&'a [u16]);

impl fmt::Display for Ports<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut first = true;
        while let Some(start) = rest.next() {
            let mut end = start;
            while let Some(next) = rest.next_if(|next| end.checked_add(1) == Some(*next)) {
                end = next;
            }
            if !std::mem::take(&mut first) {
                f.write_str(", ")?;
            }
            f.write_str(&show_range(&(start..=end)))?;
        }
        Ok(())
    }
}

fn show_range(range: &RangeInclusive<u16>) -> String {
    let (start, end) = (range.start(), range.end());
    match start == end {
        true => start.to_string(),
        false => format!("{start}-{end}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(range: RangeInclusive<u16>) -> HttpConfig {
        HttpConfig {
            agent_port_range: range,
            ..ServerConfig::default().http
        }
    }

    #[test]
    fn ports_are_shown_as_people_write_them() {
        assert_eq!(Ports(&[]).to_string(), "");
        assert_eq!(Ports(&[1, 2, 3, 7, 9, 10]).to_string(), "1-3, 7, 9-10");
        assert_eq!(Ports(&[65_534, 65_535]).to_string(), "65534-65535");
    }

    #[test]
    fn a_range_among_ephemeral_ports_is_told_with_the_line_that_mends_it() {
        let kernel = Kernel::parse("32768\t60999\n", "8080,40000-40010\n");
        let found = ephemeral_ports(&http(8100..=8200), &kernel);
        assert_eq!(found[0].level, Level::Fine);

        let found = ephemeral_ports(&http(40_005..=40_020), &kernel);
        assert_eq!(found[0].level, Level::Warning);
        assert!(found[0].what.contains("40011-40020"), "{}", found[0]);
        let line = "ip_local_reserved_ports=8080,40000-40010,40011-40020`";
        assert!(found[0].mend.ends_with(line), "{}", found[0]);
        // All of them reserved, or a host that doesn't say.
        let found = ephemeral_ports(&http(40_000..=40_010), &kernel);
        assert_eq!(found[0].level, Level::Fine);
        assert!(ephemeral_ports(&http(1..=9), &Kernel::parse("", "\n")).is_empty());
    }

    #[test]
    fn a_limit_of_descriptors_is_compared_with_what_all_agents_and_visitors_need() {
        let http = http(8100..=8199);
        let need = OWN_DESCRIPTORS + 200 + http.max_connections as u64;
        assert_eq!(descriptors(&http, None).level, Level::Fine);
        assert_eq!(descriptors(&http, Some(need)).level, Level::Fine);
        let found = descriptors(&http, Some(need - 1));
        assert_eq!(found.level, Level::Warning);
        assert!(
            found.mend.contains(&format!("LimitNOFILE={need}")),
            "{found}"
        );
    }
}
