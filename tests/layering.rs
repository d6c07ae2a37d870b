//! The map of the house, enforced: which room may name which, and what stays out of the cores.
//!
//! The source is read as text, without comments, literals and what is only compiled for tests.
//! A room is a module at the top of the crate: `src/id.rs`, `src/mux/`. Whoever adds one, adds it
//! to [`ROOMS`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

/// Every room and its level. A room may name rooms below it, and beside it unless that closes a
/// circle or [`APART`] says otherwise; never one above.
const ROOMS: &[(&str, u8)] = &[
    // Words: what everything else is said in.
    ("id", 0),
    ("backoff", 0),
    ("headers", 0),
    ("cors", 0),
    ("head", 0),
    // Only tests and fuzzers have it.
    ("fuzz", 0),
    // Cores: state machines without I/O.
    ("mux", 1),
    ("http1", 1),
    ("http2", 1),
    ("grpc", 1),
    ("ports", 1),
    ("auth", 1),
    // Edges: one piece of the outside each.
    ("config", 2),
    ("wire", 2),
    ("net", 2),
    ("metrics", 2),
    ("telemetry", 2),
    ("drain", 2),
    // Link: a session on a connection.
    ("link", 3),
    // Roles.
    ("server", 4),
    ("agent", 4),
    // Shell.
    ("cli", 5),
    ("main", 5),
];

/// The highest level without I/O, runtime and clock.
const CORES: u8 = 1;

/// What no core names: a core takes bytes and the time as arguments, and returns what to do.
const NOT_IN_CORES: &[&str] = &[
    "tokio",
    "tokio_util",
    "tokio_rustls",
    "mio",
    "socket2",
    "hyper",
    "hyper_util",
    "axum",
    "tonic",
    "tonic_prost",
    "prost",
    "dashmap",
    "Instant",
    "SystemTime",
];

/// Rooms that never name each other: they meet on the wire only.
const APART: &[(&str, &str)] = &[("server", "agent")];

/// A name that only some files may use.
struct Reserved {
    name: &'static str,
    /// What the paths begin with that may.
    places: &'static [&'static str],
    reason: &'static str,
}

const RESERVED: &[Reserved] = &[
    Reserved {
        name: "serde_yaml",
        places: &["src/config"],
        reason: "only `config` names serde_yaml, which is archived and may have to be replaced",
    },
    Reserved {
        name: "prost",
        places: &["src/wire"],
        reason: "only `wire` names prost: the cores' types don't depend on an encoding",
    },
    Reserved {
        name: "http1",
        places: &[
            "src/http1",
            "src/server/ingress",
            "src/agent/forward",
            // hyper's.
            HYPER_PLACES[0],
            HYPER_PLACES[1],
            HYPER_PLACES[2],
        ],
        reason: "only who serves visitors or calls services names HTTP/1: the rest knows heads and bodies",
    },
    Reserved {
        name: "httparse",
        places: &["src/http1"],
        reason: "only `http1` names httparse: what it accepts is checked there",
    },
    Reserved {
        name: "h2",
        places: &["src/server/ingress/http2", "src/agent/forward/http2"],
        reason: "only who serves visitors or calls services names h2: the rest knows heads and bodies",
    },
    Reserved {
        name: "hyper",
        places: &[
            HYPER_PLACES[0],
            HYPER_PLACES[1],
            HYPER_PLACES[2],
            // Its HTTP/2 connections.
            "src/link",
        ],
        reason: "only the admin port, the samples, and the tunnel's HTTP/2 name hyper",
    },
];

/// Where its HTTP/1 is good enough.
const HYPER_PLACES: &[&str] = &[
    "src/server/admin",
    "src/cli/services.rs",
    // Asks the admin port.
    "src/cli/agents.rs",
];

#[test]
fn dependencies_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    read_sources(root, "src", &mut files).unwrap();
    assert!(files.len() > ROOMS.len() / 2, "found only {}", files.len());
    let faults = check(&files);
    let list: Vec<_> = faults.iter().map(Fault::to_string).collect();
    assert!(
        faults.is_empty(),
        "{} lines break the map of the house (see tests/layering.rs):\n{}",
        faults.len(),
        list.join("\n")
    );
}

/// A source file: its path from the crate's root, with `/`, and its text.
type Source = (String, String);

fn read_sources(root: &Path, folder: &str, files: &mut Vec<Source>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            read_sources(root, &path, files)?;
        } else if path.ends_with(".rs") {
            files.push((path, fs::read_to_string(entry.path())?));
        }
    }
    files.sort();
    Ok(())
}

/// A line that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    path: String,
    line: usize,
    text: String,
    rule: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            line,
            text,
            rule,
        } = self;
        write!(f, "{path}:{line}: {rule}\n    {}", text.trim())
    }
}

/// Every fault of a source tree.
fn check(files: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let test_modules = test_modules(files);
    // Which room names which, and where it does so first.
    let mut edges: BTreeMap<(&str, &str), Fault> = BTreeMap::new();
    for (path, text) in files {
        let is_test = |module: &String| {
            *path == format!("{module}.rs") || path.starts_with(&format!("{module}/"))
        };
        if path == "src/lib.rs" || test_modules.iter().any(is_test) {
            continue;
        }
        let fault = |line: usize, rule: String| Fault {
            path: path.clone(),
            line,
            text: text.lines().nth(line - 1).unwrap_or_default().to_owned(),
            rule,
        };
        let Some((room, level)) = room_of(path) else {
            faults.push(fault(1, "this room has no level in ROOMS".to_owned()));
            continue;
        };
        let tokens = tokens(&without_tests(&code_only(text)));
        for token in &tokens {
            if level <= CORES && NOT_IN_CORES.contains(&&*token.text) {
                let rule = format!("`{room}` is a core and never names `{}`", token.text);
                faults.push(fault(token.line, rule));
            }
            for Reserved {
                name,
                places,
                reason,
            } in RESERVED
            {
                if token.text == *name && !places.iter().any(|place| path.starts_with(place)) {
                    faults.push(fault(token.line, (*reason).to_owned()));
                }
            }
        }
        for (name, line) in crate_paths(path, &tokens) {
            if name == "*" {
                let rule = "a glob of the crate hides which rooms are named".to_owned();
                faults.push(fault(line, rule));
                continue;
            }
            let Some((other, other_level)) = room_named(&name) else {
                continue;
            };
            if other == room {
                continue;
            }
            let apart = APART
                .iter()
                .any(|pair| [(room, other), (other, room)].contains(pair));
            if other_level > level {
                let rule =
                    format!("`{room}` (level {level}) names `{other}` above it ({other_level})");
                faults.push(fault(line, rule));
            } else if apart {
                faults.push(fault(
                    line,
                    format!("`{room}` and `{other}` never name each other"),
                ));
            } else {
                let rule = format!("`{room}` and `{other}` name each other, by whatever way round");
                edges
                    .entry((room, other))
                    .or_insert_with(|| fault(line, rule));
            }
        }
    }
    let graph: BTreeSet<_> = edges.keys().copied().collect();
    faults.extend(
        edges
            .into_iter()
            .filter_map(|((from, to), fault)| leads_back(&graph, to, from).then_some(fault)),
    );
    faults
}

/// Whether there is a way from `start` to `end`.
fn leads_back(graph: &BTreeSet<(&str, &str)>, start: &str, end: &str) -> bool {
    let mut seen = BTreeSet::from([start]);
    let mut open = vec![start];
    while let Some(room) = open.pop() {
        if room == end {
            return true;
        }
        let next = graph.iter().filter(|(from, _)| *from == room);
        open.extend(next.map(|(_, to)| *to).filter(|to| seen.insert(to)));
    }
    false
}

fn room_named(name: &str) -> Option<(&'static str, u8)> {
    ROOMS.iter().copied().find(|(room, _)| *room == name)
}

fn room_of(path: &str) -> Option<(&'static str, u8)> {
    let inside = path.strip_prefix("src/")?;
    let name = inside.split('/').next()?;
    room_named(name.strip_suffix(".rs").unwrap_or(name))
}

/// The paths, without `.rs`, of modules in files of their own that only tests compile.
fn test_modules(files: &[Source]) -> Vec<String> {
    let mut modules = Vec::new();
    for (path, text) in files {
        let folder = match path
            .strip_suffix("/mod.rs")
            .or(path.strip_suffix("/lib.rs"))
        {
            Some(folder) => folder,
            None => path.strip_suffix(".rs").unwrap_or(path),
        };
        let code = code_only(text);
        for (start, _) in code.match_indices(TEST_ONLY) {
            let item = tokens(&code[start + TEST_ONLY.len()..]);
            let mut words = item.iter().map(|token| &*token.text);
            if let (Some("mod"), Some(name), Some(";")) = (words.next(), words.next(), words.next())
            {
                modules.push(format!("{folder}/{name}"));
            }
        }
    }
    modules
}

const TEST_ONLY: &str = "#[cfg(test)]";

/// The code with every item blanked that only tests compile; lines stay where they are.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(start) = rest.find(TEST_ONLY) {
        kept.push_str(&rest[..start]);
        let item = &rest[start..];
        let end = end_of_item(item);
        kept.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    kept.push_str(rest);
    kept
}

/// Where the first item of `code` ends: after its `;` or its outermost block.
fn end_of_item(code: &str) -> usize {
    let mut depth = 0usize;
    for (index, c) in code.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && c == '}' {
                    return index + 1;
                }
            }
            ';' if depth == 0 => return index + 1,
            _ => {}
        }
    }
    code.len()
}

/// The text with comments and the insides of literals blanked; lines stay where they are.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = skippable(rest, code.chars().next_back());
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            let blank = |c| if c == '\n' { '\n' } else { ' ' };
            code.extend(rest[..skipped].chars().map(blank));
            rest = &rest[skipped..];
        }
    }
    code
}

/// The length of the comment or literal that `text` begins with, 0 if it begins with neither.
fn skippable(text: &str, before: Option<char>) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment(text);
    }
    if text.starts_with('"') {
        return quoted(text, '"');
    }
    if let Some(after) = text.strip_prefix('\'') {
        // A lifetime has no quote after its first letter.
        let mut chars = after.chars();
        let is_char = chars.next() == Some('\\') || chars.next() == Some('\'');
        return if is_char { quoted(text, '\'') } else { 0 };
    }
    // A raw string, unless the `r` ends a longer word; `br` and `cr` don't.
    let raw = text.strip_prefix('r').filter(|_| {
        before.is_none_or(|c| !(c.is_alphanumeric() || c == '_') || matches!(c, 'b' | 'c'))
    });
    if let Some(after) = raw {
        let hashes = after.len() - after.trim_start_matches('#').len();
        if let Some(inside) = after[hashes..].strip_prefix('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let opening = text.len() - inside.len();
            return inside
                .find(&end)
                .map_or(text.len(), |at| opening + at + end.len());
        }
    }
    0
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0usize;
    let mut index = 0;
    while index < text.len() {
        let rest = &text.as_bytes()[index..];
        if rest.starts_with(b"/*") {
            depth += 1;
            index += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            index += 2;
            if depth == 0 {
                break;
            }
        } else {
            index += 1;
        }
    }
    index
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (index, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return index + 1,
            _ => {}
        }
    }
    text.len()
}

/// A word, `::`, or any other single character of code.
#[derive(Debug)]
struct Token {
    text: String,
    /// Counted from 1.
    line: usize,
}

fn tokens(code: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let end = if word(first) {
                rest.find(|c| !word(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            tokens.push(Token {
                text: rest[..end].to_owned(),
                line: index + 1,
            });
            rest = rest[end..].trim_start();
        }
    }
    tokens
}

/// What stands directly below the crate's root in the paths of a file, and the lines.
///
/// `crate::a`, `silo_proxy::a`, `use crate::{a, b::c}`, and enough `super::` to reach the root.
fn crate_paths(path: &str, tokens: &[Token]) -> Vec<(String, usize)> {
    let word = |index: usize| tokens.get(index).map_or("", |token| &*token.text);
    // How many `super::` lead from the file's outermost module to the root: src/a.rs has one.
    let depth = path.matches('/').count() - usize::from(path.ends_with("/mod.rs"));
    let mut found = Vec::new();
    for index in 0..tokens.len() {
        let mut next = index;
        match word(index) {
            "crate" | "silo_proxy" => next += 1,
            "super" if index == 0 || word(index - 1) != "::" => {
                let mut supers = 1;
                next += 1;
                while word(next) == "::" && word(next + 1) == "super" {
                    supers += 1;
                    next += 2;
                }
                if supers < depth {
                    continue;
                }
            }
            _ => continue,
        }
        if word(next) == "::" {
            found.extend(first_names(tokens, next + 1));
        }
    }
    found
}

/// The name at `index`, or the first name of each branch of the group there.
fn first_names(tokens: &[Token], index: usize) -> Vec<(String, usize)> {
    let name = |token: &Token| (token.text.clone(), token.line);
    let Some(first) = tokens.get(index) else {
        return Vec::new();
    };
    if first.text != "{" {
        return vec![name(first)];
    }
    let mut names = Vec::new();
    let mut depth = 0usize;
    let mut at_start = false;
    for token in &tokens[index..] {
        match &*token.text {
            "{" => {
                depth += 1;
                at_start = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            "," => at_start = depth == 1,
            _ => {
                if at_start {
                    names.push(name(token));
                }
                at_start = false;
            }
        }
    }
    names
}

mod rules {
    use super::*;

    fn sources(files: &[(&str, &str)]) -> Vec<Source> {
        let own = |(path, text): &(&str, &str)| (path.to_string(), text.to_string());
        files.iter().map(own).collect()
    }

    /// `path:line` of each fault.
    fn faults(files: &[(&str, &str)]) -> Vec<String> {
        let at = |fault: Fault| format!("{}:{}", fault.path, fault.line);
        check(&sources(files)).into_iter().map(at).collect()
    }

    #[test]
    fn a_fault_shows_its_line() {
        let shown: Vec<_> = check(&sources(&[("src/auth.rs", "\n    use crate::cli::run;\n")]))
            .iter()
            .map(Fault::to_string)
            .collect();
        assert_eq!(
            shown,
            ["src/auth.rs:2: `auth` (level 1) names `cli` above it (5)\n    use crate::cli::run;"]
        );
    }

    #[test]
    fn a_room_needs_a_level() {
        assert_eq!(faults(&[("src/attic/mod.rs", "")]), ["src/attic/mod.rs:1"]);
        assert_eq!(faults(&[("src/attic.rs", "")]), ["src/attic.rs:1"]);
        assert!(faults(&[("src/lib.rs", "pub mod id;"), ("src/main.rs", "")]).is_empty());
    }

    #[test]
    fn nothing_names_a_room_above() {
        for text in [
            "use crate::link::Handle;",
            "use crate::{id::AgentId, link};",
            "use crate::{\n id::{AgentId, Secret}, link::x};",
            "fn f() -> crate::link::Handle {}",
            "use super::super::link;",
            "use super::super::{id, link};",
        ] {
            let found = faults(&[("src/mux/frame.rs", text)]);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
        }
        assert_eq!(faults(&[("src/mux/mod.rs", "use super::link;")]).len(), 1);
        assert_eq!(faults(&[("src/auth.rs", "use super::link;")]).len(), 1);
        for text in [
            "use crate::{id::AgentId, head};",
            "use crate::mux::link::X;",
            "use super::link;",
            "use self::link::X;",
            "let crate_link = link::x;",
        ] {
            let found = faults(&[("src/mux/frame.rs", text)]);
            assert!(found.is_empty(), "{text}: {found:?}");
        }
        assert_eq!(
            faults(&[("src/mux/frame.rs", "use crate::*;")]),
            ["src/mux/frame.rs:1"]
        );
    }

    #[test]
    fn roles_stay_apart_and_neighbours_close_no_circle() {
        assert_eq!(
            faults(&[("src/server/a.rs", "use crate::agent::X;")]).len(),
            1
        );
        assert_eq!(
            faults(&[("src/agent/a.rs", "use crate::server::X;")]).len(),
            1
        );
        let one_way = ("src/headers.rs", "use crate::head::Lines;");
        assert!(faults(&[one_way]).is_empty());
        let back = ("src/head.rs", "\nuse crate::headers::kind;");
        assert_eq!(
            faults(&[one_way, back]),
            ["src/head.rs:2", "src/headers.rs:1"]
        );
        let round = [
            ("src/net/a.rs", "use crate::config::X;"),
            ("src/config/mod.rs", "use crate::metrics::X;"),
            ("src/metrics.rs", "use crate::net::X;"),
        ];
        assert_eq!(faults(&round).len(), 3);
    }

    #[test]
    fn cores_have_no_io_and_no_clock() {
        for text in [
            "use tokio::sync::Notify;",
            "use std::time::{Duration, Instant};",
            "let now = std::time::SystemTime::now();",
            "use dashmap::DashMap;",
            "let x: socket2::Socket;",
            "use hyper::body::Body;",
            "#[derive(prost::Message)]",
        ] {
            assert!(!faults(&[("src/ports/mod.rs", text)]).is_empty(), "{text}");
        }
        assert!(faults(&[("src/ports/mod.rs", "use std::time::Duration;")]).is_empty());
        assert!(
            faults(&[("src/net/mod.rs", "use std::time::Instant; use tokio::net;")]).is_empty()
        );
    }

    #[test]
    fn some_names_have_a_place() {
        for (text, place, elsewhere) in [
            (
                "use serde_yaml::Value;",
                "src/config/file.rs",
                "src/cli/mod.rs",
            ),
            ("use prost::Message;", "src/wire/mod.rs", "src/link/mod.rs"),
            (
                "use hyper::body::Incoming;",
                "src/link/http2.rs",
                "src/server/registry.rs",
            ),
            (
                "use httparse::Header;",
                "src/http1/head.rs",
                "src/server/ingress/connection.rs",
            ),
            (
                "use crate::http1::Outgoing;",
                "src/server/ingress/reply.rs",
                "src/server/mod.rs",
            ),
            ("use hyper::x;", "src/server/admin.rs", "src/cli/agent.rs"),
            (
                "http1::Builder::new()",
                "src/agent/forward.rs",
                "src/link/mod.rs",
            ),
            (
                "http1::Builder::new()",
                "src/cli/services.rs",
                "src/agent/mod.rs",
            ),
        ] {
            assert!(faults(&[(place, text)]).is_empty(), "{text} in {place}");
            assert!(
                !faults(&[(elsewhere, text)]).is_empty(),
                "{text} in {elsewhere}"
            );
        }
    }

    #[test]
    fn comments_literals_and_tests_say_what_they_like() {
        let text = r####"
            //! tokio
            /* tokio /* tokio */ tokio */
            /// tokio
            const A: &str = "tokio \" tokio";
            const B: &str = r#"tokio " tokio"#;
            const C: &[u8] = br"tokio \";
            const D: [char; 3] = ['"', '\'', '\\'];
            fn f<'a>(tokio_like: &'a str) {}
            #[cfg(test)]
            use tokio::test;
            #[cfg(test)]
            mod tests {
                use tokio::net;
                fn f() { "}" ; }
            }
            #[cfg(test)]
            #[allow(x)]
            fn helper() { tokio::spawn(); }
        "####;
        let found = faults(&[("src/id.rs", text)]);
        assert!(found.is_empty(), "{found:?}");
        let after = format!("{text}use tokio::net;");
        let last = after.lines().count();
        assert_eq!(
            faults(&[("src/id.rs", &after)]),
            [format!("src/id.rs:{last}")]
        );
    }

    #[test]
    fn a_test_module_may_have_a_file_of_its_own() {
        let module = ("src/mux/mod.rs", "#[cfg(test)]\nmod tests;");
        let tests = ("src/mux/tests.rs", "use tokio::net;");
        assert!(faults(&[module, tests]).is_empty());
        assert_eq!(faults(&[tests]), ["src/mux/tests.rs:1"]);
    }
}
