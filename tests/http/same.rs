//! What curl gets of nginx through the tunnel is what it gets directly: every header line but Date
//! and what belongs to one connection only, and every byte of the bodies.

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use crate::common::daemon::Daemon;
use crate::common::raw::{latin1, pattern};
use crate::common::{Agent, Server, have, port_range};

/// nginx, a tunnel to it, and what curl needs.
struct Stage {
    nginx: Daemon,
    /// Where nginx itself speaks HTTP/2.
    http2: SocketAddr,
    agent: Agent,
    _server: Server,
    files: tempfile::TempDir,
}

impl Stage {
    /// None if something isn't installed.
    fn new() -> Option<Self> {
        if !have("nginx", "nginx") || !have("curl", "curl") {
            return None;
        }
        let http2 = SocketAddr::from(([127, 0, 0, 1], *port_range(1).start()));
        // 40 KB of lines in a head, each as long as nginx takes them.
        let large: String = (0..20)
            .map(|number| format!("add_header X-Large-{number} {};\n", "x".repeat(2_000)))
            .collect();
        let nginx = Daemon::nginx(&format!(
            "listen {http2} http2;\n\
             default_type text/plain;\nif_modified_since before;\n\
             absolute_redirect off;\nclient_max_body_size 4m;\n\
             location / {{ add_header X-Kind file; }}\n\
             location /text {{ gzip on; gzip_min_length 1; gzip_types *; gzip_vary on; }}\n\
             location /put/ {{ dav_methods PUT DELETE MOVE; create_full_put_path on; }}\n\
             location /cookies {{ add_header Set-Cookie a=1; add_header Set-Cookie 'b=2; Path=/';\n\
             add_header X-Empty ''; add_header X-Latin gr\u{fc}\u{df}e; return 200 ok; }}\n\
             location /trailers {{ gzip on; gzip_min_length 1; gzip_types *;\n\
             add_trailer X-Sum 1; add_trailer X-Late two; try_files /text =404; }}\n\
             location /large {{ {large} return 200 large; }}\n\
             location /long {{ return 200 '$http_x_long $http_cookie'; }}\n\
             location /moved {{ return 301 /text?x=y; }}\nlocation /gone {{ return 410; }}\n\
             location /nothing {{ return 204; }}\nlocation /closed {{ return 444; }}\n\
             location /target {{ return 200 '$request_method $request_uri $content_type'; }}\n\
             location ~ ^/(a|%|b) {{ return 200 $request_uri; }}"
        ));
        let text: String = (0..20_000).map(|line| format!("line {line}\n")).collect();
        fs::write(nginx.path().join("text"), text).unwrap();
        fs::write(nginx.path().join("file"), pattern(300_000)).unwrap();
        fs::write(nginx.path().join("empty"), "").unwrap();
        fs::create_dir(nginx.path().join("folder")).unwrap();
        fs::create_dir(nginx.path().join("put")).unwrap();
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("small"), pattern(1_000)).unwrap();
        fs::write(files.path().join("large"), pattern(3 << 20)).unwrap();
        fs::write(files.path().join("too-large"), pattern(5 << 20)).unwrap();
        let server = Server::with(port_range(4), &[]);
        let agent = server.agent("files", nginx.address);
        Some(Self {
            nginx,
            http2,
            agent,
            _server: server,
            files,
        })
    }

    /// What curl is answered by `address`, with `-i` and these arguments, the first of which is
    /// the target.
    fn answer(&self, address: SocketAddr, arguments: &[&str]) -> Answer {
        let (target, options) = arguments.split_first().unwrap();
        let output = Command::new("curl")
            .args(["--silent", "--max-time", "20", "--noproxy", "*", "-i"])
            .args(["--path-as-is", "--globoff"])
            .args(options)
            .arg(format!("http://{address}{target}"))
            .current_dir(self.files.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Answer::new(output.status.code(), &output.stdout)
    }

    /// Asks nginx at `directly` and through the tunnel.
    fn compare(&self, directly: SocketAddr, arguments: &[&str]) -> Answer {
        let expected = self.answer(directly, arguments);
        let found = self.answer(self.agent.address(), arguments);
        assert_eq!(found.code, expected.code, "{arguments:?}");
        assert_eq!(found.heads, expected.heads, "{arguments:?}");
        assert!(found.body == expected.body, "{arguments:?}: another body");
        found
    }
}

/// An answer, without what may differ.
#[derive(Debug)]
struct Answer {
    /// How curl ended.
    code: Option<i32>,
    /// The interim ones and the final one: the status line, and the other lines in order of their
    /// names.
    heads: Vec<Vec<String>>,
    body: Vec<u8>,
}

impl Answer {
    fn new(code: Option<i32>, mut bytes: &[u8]) -> Self {
        let mut heads = Vec::new();
        while bytes.starts_with(b"HTTP/")
            && let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n")
        {
            let text = latin1(&bytes[..end]);
            let mut lines: Vec<String> = text.split("\r\n").map(line).collect();
            // Through the tunnel the reason is the usual one, which nginx's aren't all.
            let words: Vec<&str> = lines[0].splitn(3, ' ').take(2).collect();
            lines[0] = words.join(" ");
            lines.retain(|line| {
                !["date:", "connection:", "keep-alive:"]
                    .iter()
                    .any(|name| line.starts_with(name))
            });
            lines[1..].sort();
            heads.push(lines);
            bytes = &bytes[end + 4..];
        }
        let mut body = bytes.to_vec();
        // Parts of a file are told apart by a number that nginx counts on.
        for line in heads.iter_mut().flatten() {
            if let Some((before, number)) = line.split_once("boundary=") {
                body = latin1(&body).replace(number, "BOUNDARY").into_bytes();
                *line = format!("{before}boundary=BOUNDARY");
            }
        }
        Self { code, heads, body }
    }

    fn status(&self) -> &str {
        self.heads.last().map_or("", |head| &head[0])
    }
}

/// A line with its name in lower case.
fn line(text: &str) -> String {
    match text.split_once(": ") {
        Some((name, value)) => format!("{}: {value}", name.to_lowercase()),
        None => text.to_owned(),
    }
}

/// Those that say the same in every version of HTTP, with the statuses that they lead to.
const CASES: &[(&str, &[&str])] = &[
    ("200", &["/file"]),
    ("200", &["/file", "--head"]),
    ("200", &["/empty"]),
    ("200", &["/empty", "--head"]),
    ("206", &["/file", "--range", "0-0"]),
    ("206", &["/file", "--range", "299990-"]),
    ("206", &["/file", "--range", "-7"]),
    ("206", &["/file", "--range", "0-3,10-13"]),
    ("206", &["/file", "--head", "--range", "10-19"]),
    ("416", &["/file", "--range", "300000-"]),
    ("206", &["/file", "--continue-at", "299000"]),
    ("200", &["/file", "-H", "If-None-Match: \"other\""]),
    ("412", &["/file", "-H", "If-Match: \"other\""]),
    ("200", &["/file", "-r", "0-9", "-H", "If-Range: \"other\""]),
    (
        "304",
        &[
            "/file",
            "-H",
            "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT",
        ],
    ),
    (
        "304",
        &[
            "/file",
            "--head",
            "-H",
            "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT",
        ],
    ),
    ("200", &["/text"]),
    ("200", &["/text", "--compressed"]),
    ("200", &["/text", "-H", "Accept-Encoding: gzip"]),
    ("200", &["/text", "--head", "-H", "Accept-Encoding: gzip"]),
    (
        "200",
        &["/text", "-r", "0-99", "-H", "Accept-Encoding: gzip"],
    ),
    ("200", &["/cookies"]),
    ("200", &["/large"]),
    ("200", &["/large", "--head"]),
    ("301", &["/folder"]),
    ("301", &["/moved"]),
    ("410", &["/gone"]),
    ("204", &["/nothing"]),
    ("404", &["/missing"]),
    ("403", &["/folder/"]),
    ("405", &["/file", "--request", "DELETE"]),
    ("405", &["/file", "--request", "OPTIONS"]),
    ("405", &["/file", "--request", "ODD-ONE"]),
    ("405", &["/file", "--data", "x"]),
    ("200", &["/target?a=%2F&b=+&c", "--data", "x=y"]),
    ("200", &["/target", "--data", ""]),
    ("200", &["/target", "--request", "PURGE"]),
    ("200", &["/a//b/%2E/%41%ff?q=/../"]),
    ("200", &["/a/b?[]|{}"]),
    (
        "413",
        &["/target", "--data-binary", "@too-large", "-H", "Expect:"],
    ),
    ("201", &["/put/one", "-T", "small"]),
    ("204", &["/put/one", "-T", "small"]),
    ("200", &["/put/one"]),
    ("204", &["/put/one", "-T", "large", "-H", "Expect:"]),
    ("200", &["/put/one"]),
    ("204", &["/put/one", "--request", "DELETE"]),
    ("404", &["/put/one"]),
];

/// nginx is asked the same in turns: what a case leaves behind, it takes away.
fn all(stage: &Stage, directly: SocketAddr, version: &str) {
    for (status, arguments) in CASES {
        // Directly, nginx resets the stream of a body that it doesn't read, and curl calls that an
        // error.
        let leaves_body = arguments.iter().any(|word| word.starts_with("--data"));
        if leaves_body && directly == stage.http2 {
            continue;
        }
        let changes = arguments.contains(&"-T") || arguments.contains(&"DELETE");
        let arguments = [arguments, &[version][..]].concat();
        let put = stage.nginx.path().join("put/one");
        let before = fs::read(&put);
        let expected = stage.answer(directly, &arguments);
        if changes {
            match &before {
                Ok(bytes) => fs::write(&put, bytes).unwrap(),
                Err(_) => drop(fs::remove_file(&put)),
            }
        }
        let found = stage.answer(stage.agent.address(), &arguments);
        assert_eq!(found.code, expected.code, "{arguments:?}");
        assert_eq!(found.heads, expected.heads, "{arguments:?}");
        assert!(found.body == expected.body, "{arguments:?}: another body");
        let told = found.status().split(' ').nth(1);
        assert_eq!(told, Some(*status), "{arguments:?}: {:?}", found.heads);
    }
}

#[test]
fn http_1_1_is_the_same() {
    let Some(stage) = Stage::new() else {
        return;
    };
    all(&stage, stage.nginx.address, "--http1.1");
    let etag = |answer: &Answer| {
        let lines = answer.heads[0].iter();
        let mut etags = lines.filter_map(|line| line.strip_prefix("etag: "));
        etags.next().unwrap().to_owned()
    };
    let known = etag(&stage.compare(stage.nginx.address, &["/file"]));
    for (status, name) in [
        ("304", "If-None-Match"),
        ("206", "If-Range"),
        ("206", "If-Match"),
    ] {
        let condition = format!("{name}: {known}");
        let arguments: &[&str] = match status {
            "304" => &["/file", "-H", &condition],
            _ => &["/file", "-H", &condition, "-r", "0-9"],
        };
        let answer = stage.compare(stage.nginx.address, arguments);
        assert!(answer.status().contains(status), "{name}: {answer:?}");
    }
    // nginx asks for the body before it has the name to be refused.
    let upload = [
        "/put/two",
        "-T",
        "large",
        "--expect100-timeout",
        "15",
        "-H",
        "Expect: 100-continue",
    ];
    let answer = stage.answer(stage.agent.address(), &upload);
    assert_eq!(answer.heads.len(), 2, "{:?}", answer.heads);
    assert_eq!(answer.heads[0], ["HTTP/1.1 100"]);
    assert!(answer.status().ends_with(" 201"));
    // The same again replaces it.
    let answer = stage.compare(stage.nginx.address, &upload);
    assert!(answer.status().ends_with(" 204"));
    // And one that is too large is refused instead of asked for.
    let upload = ["/put/two", "-T", "too-large", "-H", "Expect: 100-continue"];
    let answer = stage.compare(stage.nginx.address, &upload);
    assert_eq!(answer.heads.len(), 1, "{:?}", answer.heads);
    assert!(answer.status().ends_with(" 413"));
    // Cut off without an answer directly, 502 here.
    assert_eq!(
        stage.answer(stage.nginx.address, &["/closed"]).code,
        Some(52)
    );
    let answer = stage.answer(stage.agent.address(), &["/closed"]);
    assert!(answer.status().ends_with(" 502"), "{answer:?}");
}

#[test]
fn http_2_is_the_same() {
    let Some(stage) = Stage::new() else {
        return;
    };
    all(&stage, stage.http2, "--http2-prior-knowledge");
}

/// The tunnel answers in the version it was asked in, nginx always in 1.1.
#[test]
fn http_1_0_is_the_same() {
    let Some(stage) = Stage::new() else {
        return;
    };
    for (_, arguments) in CASES {
        // nginx compresses for HTTP/1.1 only, and uploads have been tried.
        if arguments
            .iter()
            .any(|word| word.contains("gzip") || *word == "--compressed" || *word == "-T")
        {
            continue;
        }
        let arguments = [arguments, &["--http1.0"][..]].concat();
        let mut expected = stage.answer(stage.nginx.address, &arguments);
        let found = stage.answer(stage.agent.address(), &arguments);
        let status = &mut expected.heads.last_mut().unwrap()[0];
        *status = status.replace("HTTP/1.1", "HTTP/1.0");
        assert_eq!(found.code, expected.code, "{arguments:?}");
        assert_eq!(found.heads, expected.heads, "{arguments:?}");
        assert!(found.body == expected.body, "{arguments:?}: another body");
    }
}

/// What is long in a request arrives, and what is too long for nginx is nginx's to refuse.
#[test]
fn long_lines_are_the_same() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let long = format!("X-Long: {}", "y".repeat(7_000));
    let cookie = format!("Cookie: c={}", "z".repeat(7_500));
    let beyond = format!("X-Long: {}", "y".repeat(9_000));
    let query = format!("/long?{}", "q".repeat(7_500));
    for arguments in [
        &["/long", "-H", &long][..],
        &["/long", "-H", &long, "-H", &cookie],
        &[&query, "-H", &cookie],
        &["/long", "-H", &beyond],
    ] {
        stage.compare(stage.nginx.address, arguments);
    }
}

#[test]
fn raw_chunks_end_in_the_same_trailers() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let plain = ["/trailers", "--raw", "-H", "Accept-Encoding: gzip"];
    let asking = [&plain[..], &["-H", "TE: trailers", "-H", "Connection: TE"]].concat();
    let trailers = |address, ask: &[&str]| {
        let body = stage.answer(address, ask).body;
        let end = b"\r\n0\r\n";
        let at = body.windows(end.len()).rposition(|five| five == end);
        latin1(&body[at.expect("a last chunk")..])
    };
    for ask in [&plain[..], &asking] {
        let directly = trailers(stage.nginx.address, ask);
        assert_eq!(directly, "\r\n0\r\nX-Sum: 1\r\nX-Late: two\r\n\r\n");
        assert_eq!(trailers(stage.agent.address(), ask), directly);
    }
}

/// What a download had when it broke off stays, and the rest is fetched.
#[test]
fn a_download_is_resumed() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let whole = pattern(300_000);
    let part = stage.files.path().join("part");
    fs::write(&part, &whole[..123_456]).unwrap();
    let url = format!("http://{}/file", stage.agent.address());
    let output = Command::new("curl")
        .args([
            "--silent",
            "--noproxy",
            "*",
            "-C",
            "-",
            "-w",
            "%{http_code} %{size_download}",
        ])
        .arg("-o")
        .arg(&part)
        .arg(url)
        .output()
        .unwrap();
    assert_eq!(latin1(&output.stdout), "206 176544");
    assert!(fs::read(&part).unwrap() == whole);
}

#[test]
fn one_connection_serves_many_downloads() {
    let Some(stage) = Stage::new() else {
        return;
    };
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--noproxy",
            "*",
            version,
            "-w",
            "%{num_connects} ",
        ]);
        for target in [
            "/file", "/text", "/missing", "/nothing", "/moved", "/large", "/file",
        ] {
            curl.args(["-o", "/dev/null"]);
            curl.arg(format!("http://{}{target}", stage.agent.address()));
        }
        let output = curl.output().unwrap();
        assert_eq!(latin1(&output.stdout), "1 0 0 0 0 0 0 ", "{version}");
    }
}
