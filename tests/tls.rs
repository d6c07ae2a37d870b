//! TLS on the tunnel, with real processes: private authorities, client certificates, what is said
//! when one of them isn't accepted, and files that change under a running server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail anywhere"
)]

mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use tempfile::TempDir;

use common::raw::{pattern, read_request};
use common::{
    PATIENCE, Process, Server, connect, eventually, get, port_range, read_answer, request, service,
    text_service,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An authority of the test's own, in a directory of its own.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// What a certificate is to be like.
struct Wanted {
    hosts: Vec<&'static str>,
    uris: Vec<&'static str>,
    purpose: ExtendedKeyUsagePurpose,
    from: SystemTime,
    to: SystemTime,
}

impl Default for Wanted {
    fn default() -> Self {
        let now = SystemTime::now();
        Self {
            hosts: Vec::new(),
            uris: Vec::new(),
            purpose: ExtendedKeyUsagePurpose::ServerAuth,
            from: now - DAY,
            to: now + 30 * DAY,
        }
    }
}

/// A server's certificate for this host.
fn for_server() -> Wanted {
    Wanted {
        hosts: vec!["127.0.0.1"],
        ..Wanted::default()
    }
}

/// An agent's certificate.
fn for_agent(id: &'static str) -> Wanted {
    Wanted {
        hosts: vec![id],
        purpose: ExtendedKeyUsagePurpose::ClientAuth,
        ..Wanted::default()
    }
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, directory }
    }

    fn ca(&self) -> String {
        text(&self.directory.path().join("ca.pem"))
    }

    /// Writes a certificate and its key as `name.pem` and `name.key`.
    fn sign(&self, name: &str, wanted: Wanted) -> (String, String) {
        self.sign_in(self.directory.path(), name, wanted)
    }

    /// The same in another directory.
    fn sign_in(&self, directory: &Path, name: &str, wanted: Wanted) -> (String, String) {
        let hosts: Vec<String> = wanted.hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        for uri in wanted.uris {
            let uri = SanType::URI(uri.try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        params.extended_key_usages = vec![wanted.purpose];
        params.not_before = wanted.from.into();
        params.not_after = wanted.to.into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |extension: &str| directory.join(format!("{name}.{extension}"));
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        (text(&path("pem")), text(&path("key")))
    }

    /// A server with a certificate of this authority, and further settings.
    fn server(&self, settings: &[(&str, &str)]) -> Server {
        let own = self.sign("server", for_server());
        server_with(&own, settings)
    }

    /// A server that looks at agents' certificates as `client_auth` says.
    fn server_asking(&self, client_auth: &str, settings: &[(&str, &str)]) -> Server {
        let ca = self.ca();
        let mut all = vec![
            ("grpc.tls.ca_file", &*ca),
            ("grpc.tls.client_auth", client_auth),
        ];
        all.extend(settings);
        self.server(&all)
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn server_with((certificate, key): &(String, String), settings: &[(&str, &str)]) -> Server {
    let mut all = vec![
        ("grpc.tls.enabled", "true"),
        ("grpc.tls.cert_file", certificate),
        ("grpc.tls.key_file", key),
    ];
    all.extend(settings);
    Server::with(port_range(20), &all)
}

/// An agent's settings: its server's authority, and a certificate of its own.
fn agent_settings<'a>(
    ca: &'a str,
    own: Option<&'a (String, String)>,
) -> Vec<(&'static str, &'a str)> {
    let mut all = vec![("grpc.tls.enabled", "true"), ("grpc.tls.ca_file", ca)];
    if let Some((certificate, key)) = own {
        all.push(("grpc.tls.cert_file", certificate));
        all.push(("grpc.tls.key_file", key));
    }
    all
}

/// Starts an agent that gets no tunnel. Its line about that holds all of `parts`, and that it
/// waits half a minute at least.
fn turned_away(server: &Server, id: &str, settings: &[(&str, &str)], parts: &[&str]) -> Process {
    let process = server.start_agent(id, "http://127.0.0.1:1", settings);
    let line = process.wait_for(&["retry_in="]);
    for part in parts {
        assert!(line.contains(part), "{id}: no {part:?} in {line}");
    }
    let (_, wait) = line.split_once("retry_in=").unwrap();
    let wait: f64 = wait.split('s').next().unwrap().parse().unwrap();
    assert!(wait >= 30.0, "{id}: {line}");
    process
}

/// Answers each request with its body.
fn echo() -> SocketAddr {
    service(|mut stream| {
        while let Ok(request) = read_request(&mut stream) {
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                request.body.len()
            );
            if stream.write_all(head.as_bytes()).is_err()
                || stream.write_all(&request.body).is_err()
            {
                return;
            }
        }
    })
}

/// A mebibyte there and back, twice on one connection.
fn carries_bodies(address: SocketAddr) {
    let body = pattern(1 << 20);
    let mut visitor = connect(address);
    for _ in 0..2 {
        let length = body.len();
        let head = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        visitor.write_all(head.as_bytes()).unwrap();
        visitor.write_all(&body).unwrap();
        assert!(read_answer(&mut visitor, false).body == body);
    }
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    Process::start("certs", args, &[]).finish()
}

/// The README's way from nothing to client certificates, with what the program itself makes.
#[test]
fn certificates_are_made_and_used() {
    let home = TempDir::new().unwrap();
    let dir = text(&home.path().join("certs"));
    let path = |name: &str| format!("{dir}/{name}");
    let agent = ["certs", "agent", "agent-1", "--dir", &dir];
    let (code, log) = run(&agent);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("certs init"), "{log}");

    let init = [
        "certs",
        "init",
        "--dir",
        &dir,
        "--host",
        "localhost",
        "--host",
        "127.0.0.1",
    ];
    let (code, log) = run(&init);
    assert_eq!(code, Some(0), "{log}");
    for line in ["enabled: true", "client_auth: require", "server.key"] {
        assert!(log.contains(line), "{line}: {log}");
    }
    let (code, log) = run(&agent);
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("agent_id: agent-1") && log.contains("--tls-cert"));

    // Keys are their owner's only, and nothing is overwritten unasked.
    let files = ["ca", "server", "agents/agent-1"];
    let read = || -> Vec<String> {
        let names = files
            .iter()
            .flat_map(|name| [".pem", ".key"].map(|e| format!("{name}{e}")));
        names
            .map(|name| std::fs::read_to_string(path(&name)).unwrap())
            .collect()
    };
    for name in files {
        let mode = |extension: &str| {
            let meta = std::fs::metadata(path(&format!("{name}.{extension}")));
            meta.unwrap().permissions().mode() & 0o777
        };
        assert_eq!(mode("key"), 0o600, "{name}");
        assert_eq!(mode("pem") & 0o022, 0, "{name}");
    }
    let before = read();
    for again in [&init[..], &agent[..]] {
        let (code, log) = run(again);
        assert_eq!(code, Some(1), "{log}");
        assert!(
            log.contains("there already") && log.contains("--force"),
            "{log}"
        );
    }
    assert!(read() == before);
    // The authority is kept even so.
    for again in [&init[..], &agent[..]] {
        let (code, log) = run(&[again, &["--force"]].concat());
        assert_eq!(code, Some(0), "{log}");
    }
    let after = read();
    assert!(after[..2] == before[..2]);
    assert!((2..6).all(|file| after[file] != before[file]));
    for (args, code) in [
        (&["certs", "init", "--dir", "x"][..], 2),
        (&["certs", "init", "--dir", "x", "--host", "a b"], 2),
        (&["certs", "agent", "Agent", "--dir", "x"], 2),
        (&["certs", "agent", "a", "--days", "0"], 2),
    ] {
        assert_eq!(run(args).0, Some(code), "{args:?}");
    }

    // An id that can't be a host's name has the URI alone.
    let odd = "under_score";
    assert_eq!(run(&["certs", "agent", odd, "--dir", &dir]).0, Some(0));

    let own = (path("server.pem"), path("server.key"));
    let ca = path("ca.pem");
    let server = server_with(
        &own,
        &[
            ("grpc.tls.ca_file", &ca),
            ("grpc.tls.client_auth", "require"),
        ],
    );
    let service = echo();
    for (id, host) in [("agent-1", "127.0.0.1"), (odd, "localhost")] {
        let (certificate, key) = (format!("agents/{id}.pem"), format!("agents/{id}.key"));
        let agent = Process::start(
            id,
            &[
                "agent",
                "http",
                &service.to_string(),
                "--server",
                &format!("{host}:{}", server.tunnel.port()),
                "--id",
                id,
                "--tls-ca",
                &ca,
                "--tls-cert",
                &path(&certificate),
                "--tls-key",
                &path(&key),
            ],
            &[],
        );
        // The agents' ports are plain.
        let line = agent.wait_for(&["connected", &format!("url=http://{host}:")]);
        let (_, port) = line.split_once("port=").unwrap();
        let port = port.split_whitespace().next().unwrap().parse().unwrap();
        carries_bodies(SocketAddr::from(([127, 0, 0, 1], port)));
        drop(agent);
    }
    // Only agent-1 may be agent-1.
    let certificate = (path("agents/agent-1.pem"), path("agents/agent-1.key"));
    let settings = agent_settings(&ca, Some(&certificate));
    let parts = ["reason=auth", "names agent-1", "not this agent id"];
    turned_away(&server, "agent-2", &settings, &parts);
}

#[test]
fn a_tunnel_with_tls_carries_what_one_without_does() {
    let authority = Authority::new("one");
    let server = authority.server(&[]);
    let ca = authority.ca();
    let agent = server.agent_with("a", echo(), &agent_settings(&ca, None));
    carries_bodies(agent.address());
    // Without any credential configured it is for this host only, as without TLS.
    server.process.wait_for(&["server started"]);
    // A token counts as it does without TLS.
    let server = authority.server(&[("grpc.auth.shared_token", "t")]);
    let mut settings = agent_settings(&ca, None);
    let parts = ["reason=auth", "requires a credential", "set grpc.token"];
    turned_away(&server, "a", &settings, &parts);
    settings.push(("grpc.token", "t"));
    let agent = server.agent_with("a", text_service("with a token"), &settings);
    assert_eq!(get(agent.address(), "/").text(), "with a token");
}

/// Each rejection is typed, says what is wrong, and is obeyed.
/// A swarm takes an agent's flags, so that what TLS costs can be measured. Its agents share a
/// certificate.
#[test]
fn a_swarm_speaks_tls() {
    let authority = Authority::new("one");
    let server = authority.server_asking("require", &[]);
    let (certificate, key) = authority.sign(
        "swarm",
        Wanted {
            hosts: vec!["swarm-00000", "swarm-00001", "swarm-00002"],
            ..for_agent("")
        },
    );
    let (tunnel, ca) = (server.tunnel.to_string(), authority.ca());
    let swarm = |flags: &[&str]| {
        let args = ["swarm", "--server", &tunnel, "--count", "3"];
        Process::start("swarm", &[&args, flags].concat(), &[])
    };
    let own = ["--tls-cert", &*certificate, "--tls-key", &*key];
    let shown = swarm(&[&["--tls-ca", &*ca], &own[..]].concat());
    shown.wait_for(&["registered 3 "]);
    eventually(PATIENCE, "all are listed", || server.agents().len() == 3);
    let (_, port) = server.agents()[2];
    let answer = get(SocketAddr::from(([127, 0, 0, 1], port)), "/");
    assert_eq!(answer.status, 200);
    drop(shown);
    // The system's authorities haven't signed the server's certificate, and no agent's is shown.
    for flags in [&["--tls"][..], &["--tls-ca", &ca]] {
        swarm(flags).wait_for(&["registered 0 "]);
    }
}

#[test]
fn certificates_that_are_not_accepted_are_told() {
    let authority = Authority::new("one");
    let stranger = Authority::new("the stranger");
    let server = authority.server_asking("require", &[]);
    let ca = authority.ca();
    let now = SystemTime::now();
    let mut agents = Vec::new();

    let missing = ["reason=auth", "requires a client certificate"];
    agents.push(turned_away(
        &server,
        "a",
        &agent_settings(&ca, None),
        &missing,
    ));
    for (own, parts) in [
        (
            authority.sign("other", for_agent("b")),
            &["names b and not this agent id"][..],
        ),
        (
            stranger.sign("a", for_agent("a")),
            &[
                "no trusted authority has signed it",
                "the stranger",
                "grpc.tls.ca_file",
            ],
        ),
        (
            authority.sign(
                "expired",
                Wanted {
                    to: now - DAY / 2,
                    ..for_agent("a")
                },
            ),
            &["it expired on 20", "have a new one made"],
        ),
        (
            authority.sign(
                "early",
                Wanted {
                    from: now + DAY,
                    ..for_agent("a")
                },
            ),
            &["it isn't valid before 20", "compare the clocks"],
        ),
        (
            authority.sign(
                "purpose",
                Wanted {
                    purpose: ExtendedKeyUsagePurpose::ServerAuth,
                    ..for_agent("a")
                },
            ),
            &["it is not one for agents"],
        ),
        (
            authority.sign("wildcard", for_agent("*")),
            &["names * and not this agent id"],
        ),
    ] {
        let parts = [&["rejected", "reason=auth"], parts].concat();
        agents.push(turned_away(
            &server,
            "a",
            &agent_settings(&ca, Some(&own)),
            &parts,
        ));
    }
    // An address is no name, though it reads like an id.
    let own = authority.sign("address", for_agent("10.0.0.1"));
    agents.push(turned_away(
        &server,
        "10.0.0.1",
        &agent_settings(&ca, Some(&own)),
        &["rejected", "reason=auth", "not this agent id"],
    ));
    // One line each in the server's log, and no further attempts.
    let rejections = || server.metric("silo_rejections_total", "reason=\"auth\"");
    assert_eq!(rejections(), agents.len() as f64);
    assert_eq!(
        server.process.count(&["agent rejected", "reason=auth"]),
        agents.len()
    );

    // Meanwhile the right ones get in: by the name, in any case of letters, or by the URI.
    for (id, wanted) in [
        ("a", for_agent("A")),
        (
            "b.c_d",
            Wanted {
                hosts: vec!["elsewhere"],
                uris: vec!["silo:agent:b.c_d"],
                ..for_agent("a")
            },
        ),
    ] {
        let own = authority.sign(&format!("good-{id}"), wanted);
        let settings = agent_settings(&ca, Some(&own));
        let agent = server.agent_with(id, text_service(id), &settings);
        assert_eq!(get(agent.address(), "/").text(), id);
    }
    assert_eq!(rejections(), agents.len() as f64);
}

#[test]
fn a_requested_certificate_is_as_good_as_a_token() {
    let authority = Authority::new("one");
    let stranger = Authority::new("two");
    let tokens = [("grpc.auth.tokens", "a=t,b=u")];
    let server = authority.server_asking("request", &tokens);
    let ca = authority.ca();
    let own = authority.sign("a", for_agent("a"));
    let forged = stranger.sign("a", for_agent("a"));

    let certified = agent_settings(&ca, Some(&own));
    let agent = server.agent_with("a", text_service("certified"), &certified);
    assert_eq!(get(agent.address(), "/").text(), "certified");
    drop(agent);
    let mut with_token = agent_settings(&ca, None);
    let parts = ["grpc.tls.cert_file", "or grpc.token"];
    turned_away(&server, "a", &with_token, &parts);
    with_token.push(("grpc.token", "t"));
    drop(server.agent_with("a", text_service("x"), &with_token));
    // What is shown must be valid, whatever else is.
    let mut both = agent_settings(&ca, Some(&forged));
    both.push(("grpc.token", "t"));
    turned_away(&server, "a", &both, &["no trusted authority"]);

    // Where both are required, neither is enough.
    let server = authority.server_asking("require", &tokens);
    turned_away(
        &server,
        "a",
        &with_token,
        &["requires a client certificate"],
    );
    turned_away(&server, "a", &certified, &["requires a credential"]);
    let mut both = agent_settings(&ca, Some(&own));
    both.push(("grpc.token", "t"));
    server.agent_with("a", text_service("x"), &both);
}

#[test]
fn a_server_that_is_not_accepted_is_left_alone() {
    let authority = Authority::new("one");
    let stranger = Authority::new("two");
    let now = SystemTime::now();
    for (name, wanted, ca, parts) in [
        (
            "ca",
            for_server(),
            stranger.ca(),
            [
                "no trusted authority has signed it; its issuer is CN=one",
                "set grpc.tls.ca_file",
            ],
        ),
        (
            "name",
            Wanted {
                hosts: vec!["elsewhere.example"],
                ..Wanted::default()
            },
            authority.ca(),
            [
                "it is for elsewhere.example and not for 127.0.0.1",
                "grpc.tls.server_name",
            ],
        ),
        (
            "expired",
            Wanted {
                to: now - DAY / 2,
                ..for_server()
            },
            authority.ca(),
            ["it expired on 20", "give the server a new certificate"],
        ),
    ] {
        let own = authority.sign("server", wanted);
        let server = server_with(&own, &[]);
        let parts = [&["no tunnel", "certificate is not accepted"][..], &parts].concat();
        let _agent = turned_away(&server, "a", &agent_settings(&ca, None), &parts);
        let failed = || server.metric("silo_handshakes_failed_total", "reason=\"tls\"");
        eventually(PATIENCE, "a failed handshake is counted", || {
            failed() == 1.0
        });
        if name == "expired" {
            // It said so when it started, too.
            server
                .process
                .wait_for(&["WARN", "grpc.tls.cert_file", "expired on 20"]);
        }
        if name == "name" {
            let mut settings = agent_settings(&ca, None);
            settings.push(("grpc.tls.server_name", "elsewhere.example"));
            server.agent_with("b", text_service("x"), &settings);
        }
    }
}

#[test]
fn files_that_cannot_be_used_are_faults_of_the_configuration() {
    let authority = Authority::new("one");
    let (certificate, key) = authority.sign("a", for_server());
    let (_, other_key) = authority.sign("b", for_server());
    let absent = format!("{certificate}.absent");
    let ca = authority.ca();
    for (certificate, key, ca, told) in [
        (&absent, &key, &ca, "grpc.tls.cert_file: can't read"),
        (&key, &key, &ca, "holds no usable certificate"),
        (
            &certificate,
            &certificate,
            &ca,
            "holds no usable private key",
        ),
        (&certificate, &other_key, &ca, "doesn't fit the certificate"),
        (&certificate, &key, &key, "grpc.tls.ca_file: "),
        (&certificate, &key, &certificate, "can't sign others"),
    ] {
        let settings = [
            ("SILO_GRPC_TLS_ENABLED", "true"),
            ("SILO_GRPC_TLS_CERT_FILE", certificate),
            ("SILO_GRPC_TLS_KEY_FILE", key),
            ("SILO_GRPC_TLS_CA_FILE", ca),
        ];
        let of_server = [
            ("SILO_GRPC_TLS_CLIENT_AUTH", "require"),
            ("SILO_HTTP_PORT", "0"),
            ("SILO_GRPC_PORT", "0"),
        ];
        let mut server =
            Process::start("server", &["server"], &[&settings[..], &of_server].concat());
        let (code, log) = server.finish();
        assert_eq!(code, Some(2), "{log}");
        assert!(
            log.contains(told) && !log.contains("started"),
            "{told}: {log}"
        );
        let args = ["agent", "http", "1", "--server", "a", "--id", "a"];
        let (code, log) = Process::start("agent", &args, &settings).finish();
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(told), "{told}: {log}");
    }
}

#[test]
fn with_tls_and_without_do_not_mix_and_say_so() {
    let authority = Authority::new("one");
    let ca = authority.ca();
    let with = authority.server(&[("log.level", "debug")]);
    let parts = ["no tunnel", "the server speaks TLS", "set grpc.tls.enabled"];
    let _plain = turned_away(&with, "a", &[], &parts);
    with.process.wait_for(&["an agent without TLS"]);
    let failed = |server: &Server| server.metric("silo_handshakes_failed_total", "reason=\"tls\"");
    eventually(PATIENCE, "it is counted", || failed(&with) == 1.0);

    let without = Server::with(port_range(20), &[("log.level", "debug")]);
    let parts = [
        "no tunnel",
        "doesn't speak TLS",
        "grpc.tls.enabled on the server",
    ];
    let _secure = turned_away(&without, "a", &agent_settings(&ca, None), &parts);
    without.process.wait_for(&["an agent with TLS"]);
    eventually(PATIENCE, "it is counted", || failed(&without) == 1.0);
}

#[test]
fn an_end_that_is_near_is_told_at_the_start() {
    let authority = Authority::new("one");
    let soon = |wanted: Wanted| Wanted {
        to: SystemTime::now() + 10 * DAY + DAY / 2,
        ..wanted
    };
    let own = authority.sign("server", soon(for_server()));
    let server = server_with(&own, &[]);
    let warning = ["WARN", "grpc.tls.cert_file", "expires on 20", "in 10 days"];
    server.process.wait_for(&warning);
    let own = authority.sign("a", soon(for_agent("a")));
    let ca = authority.ca();
    let agent = server.agent_with("a", text_service("x"), &agent_settings(&ca, Some(&own)));
    agent.process.wait_for(&warning);
    assert_eq!(agent.process.count(&["WARN"]), 1);
}

/// Connections that begin TLS and don't end it hold no place for long, and send no more than a
/// handshake.
#[test]
fn an_endless_handshake_is_ended() {
    let authority = Authority::new("one");
    let settings = [("grpc.handshake_timeout", "300ms"), ("log.level", "debug")];
    let server = authority.server(&settings);
    let mut slow = connect(server.tunnel);
    slow.write_all(&[22, 3, 1]).unwrap();
    assert_eq!(slow.read(&mut [0; 16]).unwrap_or(0), 0, "closed");
    server.process.wait_for(&["handshake failed", "timeout"]);

    // A handshake message of 16 MiB, of which as much is sent as is taken.
    let settings = [("log.level", "debug")];
    let server = authority.server(&settings);
    let mut large = connect(server.tunnel);
    let record = [
        &[22, 3, 3, 0x40, 0, 1, 0xff, 0xff, 0xff][..],
        &[0; 0x4000 - 4],
    ]
    .concat();
    large.set_write_timeout(Some(PATIENCE)).unwrap();
    eventually(PATIENCE, "the rest is refused", || {
        large.write_all(&record).is_err()
    });
    server.process.wait_for(&["handshake failed", "tls"]);
}

/// A process that is killed says nothing more, by TLS neither: that breaks no rule of the protocol.
#[test]
fn who_goes_without_a_last_word_has_closed() {
    let authority = Authority::new("one");
    let server = authority.server(&[]);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let mut client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let name = "127.0.0.1".try_into().unwrap();
    let mut connection = rustls::ClientConnection::new(client.into(), name).unwrap();
    let mut socket = connect(server.tunnel);
    let mut tls = rustls::Stream::new(&mut connection, &mut socket);
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    drop(socket);
    let failed = |reason| server.metric("silo_handshakes_failed_total", reason);
    eventually(PATIENCE, "it is counted", || {
        failed("reason=\"closed\"") == 1.0
    });
    assert_eq!(failed("reason=\"protocol\""), 0.0);
}

#[test]
fn new_certificates_are_taken_while_tunnels_run() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let home = TempDir::new().unwrap();
    let own = old.sign_in(home.path(), "server", for_server());
    let server = server_with(&own, &[]);
    // The agent's own copy of the authority, to be replaced as well.
    let ca: PathBuf = home.path().join("ca.pem");
    std::fs::copy(old.ca(), &ca).unwrap();
    let ca = text(&ca);
    let before = server.agent_with("before", text_service("before"), &agent_settings(&ca, None));
    let mut kept = connect(before.address());
    let get_kept = |kept: &mut std::net::TcpStream| {
        kept.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
        read_answer(kept, false).text()
    };
    assert_eq!(get_kept(&mut kept), "before");

    // A broken file changes nothing, and is told once.
    std::fs::write(&own.0, "nothing\n").unwrap();
    let broken = [
        "WARN",
        "certificates not renewed",
        "holds no usable certificate",
    ];
    server.process.wait_for(&broken);
    let ca_of_old = old.ca();
    drop(server.agent_with("a", text_service("x"), &agent_settings(&ca_of_old, None)));

    new.sign_in(home.path(), "server", for_server());
    server
        .process
        .wait_for(&["INFO", "certificates read again", "valid to 20"]);
    assert_eq!(server.process.count(&broken), 1);
    let ca_of_new = new.ca();
    let after = server.agent_with(
        "after",
        text_service("after"),
        &agent_settings(&ca_of_new, None),
    );
    assert_eq!(get(after.address(), "/").text(), "after");
    assert_eq!(get_kept(&mut kept), "before");
    assert_eq!(before.process.count(&["connected", "port="]), 1);

    // SIGHUP doesn't wait for a second look, and takes no certificate that has expired.
    let expired = Wanted {
        to: SystemTime::now() - DAY / 2,
        ..for_server()
    };
    new.sign_in(home.path(), "server", expired);
    server.process.signal("HUP");
    server
        .process
        .wait_for(&["WARN", "certificates not renewed", "expired on 20"]);

    // An agent reads its files again when it dials again.
    new.sign_in(home.path(), "server", for_server());
    std::fs::copy(new.ca(), &ca).unwrap();
    let port = server.tunnel.port().to_string();
    drop(server);
    let server = server_with(&own, &[("grpc.port", &port)]);
    before.process.wait_for(&["certificates read again"]);
    before.process.wait_for_nth(2, &["connected", "port="]);
    eventually(PATIENCE, "it is listed", || {
        server.agents().iter().any(|(id, _)| id == "before")
    });
    let port = server
        .agents()
        .iter()
        .find(|(id, _)| id == "before")
        .unwrap()
        .1;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(request(address, "GET", "/", &[], b"").text(), "before");
}
