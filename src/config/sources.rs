//! Where settings come from, and how what stands there becomes typed values.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::id::{AgentId, Secret};

use super::fault::{ConfigError, Fault, FaultKind, Place};
use super::table::{Kind, Preset, Role, Setting, environment_name, table};
use super::value::{self, Cidr, InvalidValue, LogOutput, PemFile};
use super::yaml::{self, Entry, Node, Position, Value};

/// The longest file of a secret or of certificates, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Where to look for settings, from the strongest: flags of the command line, the environment,
/// one file, the defaults.
///
/// An empty variable counts as none, and so does a key of the file without a value. Variables
/// of the other role are passed over, so that one environment can serve a server and an agent.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    file: Option<PathBuf>,
    environment: BTreeMap<OsString, OsString>,
    flags: Vec<(&'static str, &'static str, String)>,
}

impl Sources {
    /// Nothing but the defaults.
    pub fn none() -> Self {
        Self::default()
    }

    /// The environment of this process.
    pub fn process() -> Self {
        Self::none().environment(std::env::vars_os())
    }

    /// Reads this file too.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Reads these variables; those whose names don't begin with `SILO_` don't matter.
    pub fn environment<K: Into<OsString>, V: Into<OsString>>(
        mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let variables = variables.into_iter().map(|(k, v)| (k.into(), v.into()));
        self.environment.extend(variables.filter(|(name, _)| {
            let name = name.as_encoded_bytes();
            name.starts_with(b"SILO_")
        }));
        self
    }

    /// Sets the setting at `path` as the user did with `flag`, which faults will name.
    pub fn flag(
        mut self,
        path: &'static str,
        flag: &'static str,
        value: impl Into<String>,
    ) -> Self {
        self.flags.push((path, flag, value.into()));
        self
    }

    /// The same for the name of a file, if it was given.
    pub fn file_flag(self, path: &'static str, flag: &'static str, file: Option<&Path>) -> Self {
        match file {
            Some(file) => self.flag(path, flag, file.display().to_string()),
            None => self,
        }
    }
}

/// The files that hold secrets of `role`, each with the key that stands for it: `…_file`, or the
/// setting itself where the secret is written in the file of settings. Faults are passed over.
pub fn secret_files(role: Role, sources: &Sources) -> Vec<(String, PathBuf)> {
    Reader::new(role, sources).secret_files
}

/// A value that was found, still as it was written.
#[derive(Debug)]
struct Found {
    raw: Raw,
    place: Place,
    source: Source,
}

#[derive(Debug)]
enum Raw {
    Text(String),
    List(Vec<(String, Place)>),
    Pairs(Vec<Pair>),
}

#[derive(Debug)]
struct Pair {
    place: Place,
    key: String,
    value: String,
}

/// From the weakest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    File,
    Environment,
    Flag,
}

/// What stands where for a path of the file.
enum Meaning {
    Setting(&'static Setting),
    /// `…_file` of this secret.
    FileOf(&'static Setting),
    Section,
    Nothing,
}

/// Turns what was found into typed values and collects the faults.
///
/// Each setting is taken out by the method for its kind. A faulty one is replaced by its default,
/// so that the reading goes on and finds the other faults; the result is thrown away then.
pub(super) struct Reader {
    role: Role,
    found: BTreeMap<String, Found>,
    faults: Vec<Fault>,
    /// Settings with a fault of their own: contradictions with them aren't reported.
    faulty: BTreeSet<&'static str>,
    /// The file couldn't be read: what seems to be missing may stand in it.
    unread: bool,
    /// Names of files stand relative to the file that names them.
    directory: PathBuf,
    /// Files with secrets in them, and the keys by which they are known.
    secret_files: Vec<(String, PathBuf)>,
}

impl Reader {
    /// Collects what `sources` hold for `role`.
    pub(super) fn new(role: Role, sources: &Sources) -> Self {
        let mut reader = Self {
            role,
            found: BTreeMap::new(),
            faults: Vec::new(),
            faulty: BTreeSet::new(),
            unread: false,
            directory: PathBuf::new(),
            secret_files: Vec::new(),
        };
        if let Some(path) = &sources.file {
            reader.directory = path.parent().map(Path::to_owned).unwrap_or_default();
            reader.read_file(path);
        }
        for (name, value) in &sources.environment {
            reader.read_variable(name, value);
        }
        for (path, flag, value) in &sources.flags {
            let place = Place::Flag((*flag).to_owned());
            match reader.meaning(path) {
                Meaning::Setting(_) | Meaning::FileOf(_) => {
                    reader.put(path, Raw::Text(value.clone()), place, Source::Flag);
                }
                Meaning::Section | Meaning::Nothing => reader.unknown(path, place),
            }
        }
        reader.resolve_files();
        if let Some(path) = &sources.file {
            reader.note_secrets_in(path);
        }
        reader
    }

    /// The result, or all faults.
    pub(super) fn finish<T>(mut self, value: T) -> Result<T, ConfigError> {
        if self.faults.is_empty() {
            Ok(value)
        } else {
            self.faults
                .sort_by_key(|fault| fault.kind == FaultKind::Contradiction);
            Err(ConfigError {
                faults: self.faults,
            })
        }
    }

    /// Reports that settings contradict each other, unless one of them has a fault of its own or
    /// the file couldn't be read.
    pub(super) fn contradiction(&mut self, paths: &[&'static str], text: impl Into<String>) {
        if self.unread || paths.iter().any(|path| self.faulty.contains(path)) {
            return;
        }
        self.faults.push(Fault {
            kind: FaultKind::Contradiction,
            place: Place::Nowhere,
            text: text.into(),
        });
    }

    /// Whether somebody set `path`.
    pub(super) fn is_set(&self, path: &str) -> bool {
        self.found.contains_key(path)
    }

    /// A value that `parse` reads.
    pub(super) fn value<T>(
        &mut self,
        path: &'static str,
        parse: impl Fn(&str) -> Result<T, InvalidValue>,
    ) -> T {
        match self.optional(path, &parse) {
            Some(value) => value,
            None => {
                let setting = self.setting(path);
                let preset = match setting.preset {
                    Preset::Value(text) => text,
                    Preset::Required(example) => {
                        self.missing(setting);
                        example
                    }
                    Preset::Unset { example, .. } => example,
                };
                parse(preset).expect("a test reads every default and example of the table")
            }
        }
    }

    /// A value that `parse` reads, or `None` when nobody set it.
    pub(super) fn optional<T>(
        &mut self,
        path: &'static str,
        parse: impl Fn(&str) -> Result<T, InvalidValue>,
    ) -> Option<T> {
        let found = self.found.get(path)?;
        let Raw::Text(text) = &found.raw else {
            let place = found.place.clone();
            self.invalid(path, place, "expected a single value");
            return None;
        };
        match parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let place = found.place.clone();
                let text = match self.setting(path).kind {
                    // A URL may hold a password.
                    Kind::Secret | Kind::Url => error.to_string(),
                    _ => format!("{error}; found {text:?}"),
                };
                self.invalid(path, place, text);
                None
            }
        }
    }

    /// A whole number within the table's limits.
    pub(super) fn count<T: TryFrom<u64>>(&mut self, path: &'static str) -> T {
        let kind = self.setting(path).kind;
        self.value(path, |text| number(kind, text))
    }

    /// The same, or `None` for `off`.
    pub(super) fn limit<T: TryFrom<u64>>(&mut self, path: &'static str) -> Option<T> {
        let kind = self.setting(path).kind;
        self.value(path, |text| match text {
            "off" => Ok(None),
            text => number(kind, text).map(Some),
        })
    }

    /// A time within the table's limits.
    pub(super) fn time(&mut self, path: &'static str) -> Duration {
        let kind = self.setting(path).kind;
        self.value(path, |text| {
            let time = value::time(text)?;
            match kind {
                Kind::Time { min, max } if time < min || time > max => {
                    Err(InvalidValue::new(format!("expected {kind}")))
                }
                _ => Ok(time),
            }
        })
    }

    /// Agent ids with a value each, which `parse` reads.
    pub(super) fn by_id<T>(
        &mut self,
        path: &'static str,
        parse: impl Fn(&str) -> Result<T, InvalidValue>,
    ) -> BTreeMap<AgentId, T> {
        self.pairs(path, value::agent_id, parse)
    }

    /// Keys with a value each. In a text they are `KEY=VALUE`, separated by commas.
    pub(super) fn pairs<K: Clone + Ord + fmt::Display, T>(
        &mut self,
        path: &'static str,
        parse_key: impl Fn(&str) -> Result<K, InvalidValue>,
        parse: impl Fn(&str) -> Result<T, InvalidValue>,
    ) -> BTreeMap<K, T> {
        let mut values = BTreeMap::new();
        let mut faults = Vec::new();
        let Some(found) = self.found.get(path) else {
            return values;
        };
        let owned;
        let pairs = match &found.raw {
            Raw::Pairs(pairs) => pairs,
            Raw::List(_) => {
                let place = found.place.clone();
                self.invalid(path, place, format!("expected {}", self.setting(path).kind));
                return values;
            }
            Raw::Text(text) => {
                let split = |part: &str| {
                    let (key, value) = part.split_once('=')?;
                    Some(Pair {
                        place: found.place.clone(),
                        key: key.trim().to_owned(),
                        value: value.trim().to_owned(),
                    })
                };
                let pairs: Option<Vec<Pair>> = text.split(',').map(split).collect();
                let Some(pairs) = pairs else {
                    let place = found.place.clone();
                    let text = "expected KEY=VALUE pairs, separated by commas";
                    self.invalid(path, place, text);
                    return values;
                };
                owned = pairs;
                &owned
            }
        };
        for (index, pair) in pairs.iter().enumerate() {
            let key = match parse_key(&pair.key) {
                Ok(key) => key,
                Err(error) => {
                    faults.push((pair.place.clone(), format!("entry {}: {error}", index + 1)));
                    continue;
                }
            };
            match parse(&pair.value) {
                Err(error) => faults.push((pair.place.clone(), format!("{key}: {error}"))),
                Ok(value) => {
                    if values.insert(key.clone(), value).is_some() {
                        faults.push((pair.place.clone(), format!("{key} stands here twice")));
                    }
                }
            }
        }
        for (place, text) in faults {
            self.invalid(path, place, text);
        }
        values
    }

    /// Addresses and blocks.
    pub(super) fn networks(&mut self, path: &'static str) -> Vec<Cidr> {
        self.list(path, str::parse)
    }

    /// A list of what `parse` reads; nothing if nobody set it and it has no default. In a text
    /// its parts are separated by commas.
    pub(super) fn list<T>(
        &mut self,
        path: &'static str,
        parse: impl Fn(&str) -> Result<T, InvalidValue>,
    ) -> Vec<T> {
        let split = |text: &str, place: &Place| -> Vec<(String, Place)> {
            let part = |part: &str| (part.trim().to_owned(), place.clone());
            text.split(',').map(part).collect()
        };
        let parts = match (self.found.get(path), self.setting(path).preset) {
            (Some(found), _) => match &found.raw {
                Raw::List(items) => items.clone(),
                Raw::Text(text) => split(text, &found.place),
                Raw::Pairs(_) => {
                    let place = found.place.clone();
                    self.invalid(path, place, format!("expected {}", self.setting(path).kind));
                    return Vec::new();
                }
            },
            (None, Preset::Value(text)) => split(text, &Place::Nowhere),
            (None, Preset::Unset { .. } | Preset::Required(_)) => return Vec::new(),
        };
        let mut values = Vec::new();
        for (text, place) in parts {
            match parse(&text) {
                Ok(value) => values.push(value),
                Err(error) => self.invalid(path, place, format!("{error}; found {text:?}")),
            }
        }
        values
    }

    /// Where lines go; `None` for `off`.
    pub(super) fn output(&mut self, path: &'static str) -> Option<LogOutput> {
        let kind = self.setting(path).kind;
        let text = self.value(path, |text| match text {
            // Meant as a switch, it would become a file of that name.
            "" | "true" | "false" | "on" | "yes" | "no" => {
                Err(InvalidValue::new(format!("expected {kind}")))
            }
            text => Ok(text.to_owned()),
        });
        match &*text {
            "off" => None,
            "stderr" => Some(LogOutput::Stderr),
            "stdout" => Some(LogOutput::Stdout),
            name => {
                let source = self.found.get(path)?.source;
                Some(LogOutput::File(self.path_of(name, source)))
            }
        }
    }

    /// The file whose name stands at `path`. It needn't be there.
    pub(super) fn file_name(&mut self, path: &'static str) -> Option<PathBuf> {
        let name = self.optional(path, |text| match text {
            "" => Err(InvalidValue::new("expected the name of a file")),
            name => Ok(name.to_owned()),
        })?;
        let source = self.found.get(path)?.source;
        Some(self.path_of(&name, source))
    }

    /// The file of certificates whose name stands at `path`.
    pub(super) fn certificates(&mut self, path: &'static str) -> Option<PemFile> {
        let name = self.optional(path, |text| Ok(text.to_owned()))?;
        let found = self.found.get(path)?;
        let place = found.place.clone();
        let file = self.path_of(&name, found.source);
        match read(&file) {
            Ok(pem) if pem.windows(BEGIN.len()).any(|bytes| bytes == BEGIN) => Some(PemFile {
                path: file,
                pem: Arc::from(pem),
            }),
            Ok(_) => {
                let text = format!("{} holds no PEM certificate", file.display());
                self.invalid(path, place, text);
                None
            }
            Err(error) => {
                self.unreadable(path, place, &file, &error);
                None
            }
        }
    }

    fn setting(&self, path: &str) -> &'static Setting {
        let all = table(self.role);
        all.iter()
            .find(|setting| setting.path == path)
            .expect("only paths of the table are asked for; a test reads both configurations")
    }

    fn missing(&mut self, setting: &'static Setting) {
        if self.unread || self.faulty.contains(setting.path) {
            return;
        }
        self.faulty.insert(setting.path);
        self.faults.push(Fault {
            kind: FaultKind::Missing,
            place: Place::Nowhere,
            text: format!(
                "{} is not set: put it in the file or in {}",
                setting.path,
                environment_name(setting.path)
            ),
        });
    }

    fn invalid(&mut self, path: &'static str, place: Place, text: impl AsRef<str>) {
        self.faulty.insert(path);
        self.fault(FaultKind::Invalid, place, path, text.as_ref());
    }

    fn unreadable(&mut self, path: &'static str, place: Place, file: &Path, error: &io::Error) {
        self.faulty.insert(path);
        let text = format!("can't read {}: {error}", file.display());
        self.fault(FaultKind::File, place, path, &text);
    }

    fn fault(&mut self, kind: FaultKind, place: Place, path: &str, text: &str) {
        // The name of a variable says which setting it is; a line of a file doesn't.
        let text = match place {
            Place::Environment(_) | Place::Flag(_) => text.to_owned(),
            Place::File { .. } | Place::Nowhere => format!("{path}: {text}"),
        };
        self.faults.push(Fault { kind, place, text });
    }

    fn put(&mut self, path: &str, raw: Raw, place: Place, source: Source) {
        let found = Found { raw, place, source };
        self.found.insert(path.to_owned(), found);
    }

    fn meaning(&self, path: &str) -> Meaning {
        for setting in table(self.role) {
            if setting.path == path {
                return Meaning::Setting(setting);
            }
            if setting.kind.from_file() && path.strip_suffix("_file") == Some(setting.path) {
                return Meaning::FileOf(setting);
            }
        }
        match is_section(self.role, path) {
            true => Meaning::Section,
            false => Meaning::Nothing,
        }
    }

    fn unknown(&mut self, path: &str, place: Place) {
        let other = self.role.other();
        let known = keys(other).iter().any(|key| key == path) || is_section(other, path);
        let mut valid = keys(self.role);
        valid.extend(sections(self.role));
        let nearest = nearest(path, valid);
        let text = match (&nearest, known) {
            (_, true) => format!("a setting of the {other}, not of the {}", self.role),
            (Some(nearest), false) => format!("no such setting; did you mean {nearest}?"),
            (None, false) => "no such setting".to_owned(),
        };
        self.fault(FaultKind::Unknown { nearest }, place, path, &text);
    }

    // The file.

    fn read_file(&mut self, path: &Path) {
        let name = path.display().to_string();
        let document = match read(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.faults.push(Fault {
                    kind: FaultKind::File,
                    place: Place::Nowhere,
                    text: format!("can't read {name}: {error}"),
                });
                self.unread = true;
                return;
            }
        };
        let Some(root) = self.tree(&name, document) else {
            self.unread = true;
            return;
        };
        match root.value {
            Value::Null => {}
            Value::Map(entries) => self.read_section(&name, "", entries),
            Value::Text(_) | Value::List(_) => self.faults.push(Fault {
                kind: FaultKind::Invalid,
                place: place(&name, root.at),
                text: "expected sections such as http: with settings below".to_owned(),
            }),
        }
    }

    fn tree(&mut self, name: &str, document: Vec<u8>) -> Option<Node> {
        let document = match String::from_utf8(document) {
            Ok(document) => document,
            Err(error) => {
                let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = valid.iter().filter(|byte| **byte == b'\n').count() + 1;
                self.faults.push(Fault {
                    kind: FaultKind::Syntax,
                    place: place(name, Position { line, column: 1 }),
                    text: "this line is not UTF-8".to_owned(),
                });
                return None;
            }
        };
        match yaml::parse(&document) {
            Ok(node) => Some(node),
            Err(error) => {
                self.faults.push(Fault {
                    kind: FaultKind::Syntax,
                    place: place(name, error.at),
                    text: error.text,
                });
                None
            }
        }
    }

    fn read_section(&mut self, file: &str, prefix: &str, entries: Vec<Entry>) {
        for entry in self.without_duplicates(file, prefix, entries) {
            let path = join(prefix, &entry.key);
            let at = place(file, entry.at);
            if entry.node.value == Value::Null {
                match self.meaning(&path) {
                    Meaning::Nothing => {}
                    // Not as if nobody had set it: then others would get in.
                    Meaning::Setting(setting) | Meaning::FileOf(setting)
                        if setting.kind.from_file() =>
                    {
                        let text = "nothing stands here: remove the line if there is none";
                        self.invalid(setting.path, at, text);
                        continue;
                    }
                    _ => continue,
                }
            }
            match (self.meaning(&path), entry.node.value) {
                (Meaning::Nothing, _) => self.unknown(&path, at),
                (Meaning::Section, Value::Map(below)) => self.read_section(file, &path, below),
                (Meaning::Section, _) => {
                    let text = "a section: settings stand below it, indented";
                    self.fault(FaultKind::Invalid, at, &path, text);
                }
                (Meaning::Setting(setting), value) => {
                    let at = place(file, entry.node.at);
                    self.read_value(file, setting, at, value);
                }
                (Meaning::FileOf(_), Value::Text(text)) => {
                    let at = place(file, entry.node.at);
                    self.put(&path, Raw::Text(text), at, Source::File);
                }
                (Meaning::FileOf(setting), _) => {
                    self.faulty.insert(setting.path);
                    let text = "expected the name of a file";
                    self.fault(FaultKind::Invalid, at, &path, text);
                }
            }
        }
    }

    fn read_value(&mut self, file: &str, setting: &'static Setting, at: Place, value: Value) {
        let raw = match value {
            Value::Text(text) => Raw::Text(text),
            Value::List(items) => {
                let mut texts = Vec::new();
                for item in items {
                    let at = place(file, item.at);
                    match item.value {
                        Value::Text(text) => texts.push((text, at)),
                        _ => self.invalid(setting.path, at, "expected a list of single values"),
                    }
                }
                Raw::List(texts)
            }
            Value::Map(entries) => {
                let mut pairs = Vec::new();
                for entry in self.without_duplicates(file, setting.path, entries) {
                    let at = place(file, entry.at);
                    match entry.node.value {
                        Value::Text(value) => pairs.push(Pair {
                            place: at,
                            key: entry.key,
                            value,
                        }),
                        _ => self.invalid(setting.path, at, "expected one value for each key"),
                    }
                }
                Raw::Pairs(pairs)
            }
            // Nobody set it.
            Value::Null => return,
        };
        self.put(setting.path, raw, at, Source::File);
    }

    fn without_duplicates(&mut self, file: &str, prefix: &str, entries: Vec<Entry>) -> Vec<Entry> {
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        let mut kept = Vec::new();
        for entry in entries {
            if let Some(line) = lines.get(&entry.key) {
                let text = format!("stands in line {line} already");
                let path = join(prefix, &entry.key);
                self.fault(FaultKind::Duplicate, place(file, entry.at), &path, &text);
            } else {
                lines.insert(entry.key.clone(), entry.at.line);
                kept.push(entry);
            }
        }
        kept
    }

    // The environment.

    fn read_variable(&mut self, name: &OsString, value: &OsString) {
        let place = Place::Environment(name.to_string_lossy().into_owned());
        let name = name.to_string_lossy();
        let of = |role: Role| {
            keys(role)
                .into_iter()
                .find(|path| environment_name(path) == name)
        };
        // Kubernetes tells every pod of a service named silo-proxy by SILO_PROXY_PORT and the like.
        if value.is_empty() || name.starts_with("SILO_PROXY_") {
            return;
        }
        if let Some(path) = of(self.role) {
            match value.to_str() {
                Some(value) => {
                    self.put(
                        &path,
                        Raw::Text(value.to_owned()),
                        place,
                        Source::Environment,
                    );
                }
                None => {
                    if let Meaning::Setting(setting) | Meaning::FileOf(setting) =
                        self.meaning(&path)
                    {
                        self.invalid(setting.path, place, "the value is not UTF-8");
                    }
                }
            }
        } else if of(self.role.other()).is_none() {
            let names = keys(self.role).into_iter();
            let nearest = nearest(&name, names.map(|path| environment_name(&path)).collect());
            let text = match &nearest {
                Some(nearest) => format!("no such setting; did you mean {nearest}?"),
                None => "no such setting".to_owned(),
            };
            self.fault(FaultKind::Unknown { nearest }, place, "", &text);
        }
    }

    // Secrets from files.

    /// Replaces each `…_file` by what the file holds. A secret and its file in the same source
    /// contradict each other; otherwise the stronger source wins, as everywhere.
    fn resolve_files(&mut self) {
        let secrets = table(self.role)
            .iter()
            .filter(|setting| setting.kind.from_file());
        for setting in secrets {
            let key = format!("{}_file", setting.path);
            let Some(found) = self.found.remove(&key) else {
                continue;
            };
            if let Some(direct) = self.found.get(setting.path).map(|found| found.source) {
                if direct == found.source {
                    let text = format!("{} and {key} are both set: keep one", setting.path);
                    self.contradiction(&[], text);
                    self.faulty.insert(setting.path);
                }
                if direct >= found.source {
                    continue;
                }
            }
            let Raw::Text(name) = &found.raw else {
                continue;
            };
            let file = self.path_of(name, found.source);
            let bytes = match read(&file) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.unreadable(setting.path, found.place, &file, &error);
                    self.found.remove(setting.path);
                    continue;
                }
            };
            let name = file.display().to_string();
            self.secret_files.push((key, file));
            if setting.kind == Kind::Tokens {
                if let Some(node) = self.tree(&name, bytes) {
                    let at = place(&name, node.at);
                    self.found.remove(setting.path);
                    match node.value {
                        Value::Map(_) => self.read_value(&name, setting, at, node.value),
                        _ => self.invalid(setting.path, at, "expected lines of ID: TOKEN"),
                    }
                }
                continue;
            }
            let Ok(text) = String::from_utf8(bytes) else {
                let text = format!("{name} is not UTF-8");
                self.invalid(setting.path, found.place, text);
                continue;
            };
            let text = text.strip_suffix('\n').unwrap_or(&text);
            let text = text.strip_suffix('\r').unwrap_or(text).to_owned();
            self.put(setting.path, Raw::Text(text), found.place, found.source);
        }
    }

    /// Notes the secrets that stand in the file of settings itself.
    fn note_secrets_in(&mut self, path: &Path) {
        for setting in table(self.role) {
            let from_elsewhere =
                |(key, _): &(String, PathBuf)| key.strip_suffix("_file") == Some(setting.path);
            let here =
                (self.found.get(setting.path)).is_some_and(|found| found.source == Source::File);
            if setting.kind.from_file() && here && !self.secret_files.iter().any(from_elsewhere) {
                let entry = (setting.path.to_owned(), path.to_owned());
                self.secret_files.push(entry);
            }
        }
    }

    /// A name in the file is relative to the file, any other to the working directory.
    fn path_of(&self, name: &str, source: Source) -> PathBuf {
        match source {
            Source::File => self.directory.join(name),
            Source::Environment | Source::Flag => PathBuf::from(name),
        }
    }
}

/// A credential: something, and on one line.
pub(super) fn secret(text: &str) -> Result<Secret, InvalidValue> {
    match text {
        "" => Err(InvalidValue::new("expected a credential, found nothing")),
        text if text.contains(char::is_control) => {
            Err(InvalidValue::new("expected a credential on one line"))
        }
        text => Ok(Secret::new(text)),
    }
}

/// The switch of both roles' section `grpc.tls`.
pub(super) const TLS_ENABLED: &str = "grpc.tls.enabled";

/// Reports settings that would be ignored because the tunnel has no TLS: those of `paths` that
/// somebody set, and `more`. Nobody shall believe a tunnel to be encrypted that isn't.
pub(super) fn tls_is_off(from: &mut Reader, paths: &[&'static str], more: Option<&'static str>) {
    let told = paths.iter().copied().filter(|path| from.is_set(path));
    let told: Vec<&'static str> = told.chain(more).collect();
    for path in told {
        let text = format!(
            "{path} is set, but {TLS_ENABLED} is false: set it to true, or leave {path} out"
        );
        from.contradiction(&[path, TLS_ENABLED], text);
    }
}

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";

fn number<T: TryFrom<u64>>(kind: Kind, text: &str) -> Result<T, InvalidValue> {
    let (number, range) = match kind {
        Kind::Size { min, max, .. } => (value::size(text)?, min..=max),
        Kind::Count { min, max, .. } => {
            let number = value::decimal(text);
            let expected = || InvalidValue::new(format!("expected {kind}"));
            (number.ok_or_else(expected)?, min..=max)
        }
        _ => return Err(InvalidValue::new("expected no number")),
    };
    Some(number)
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| InvalidValue::new(format!("expected {kind}")))
}

fn place(file: &str, at: Position) -> Place {
    Place::File {
        name: file.to_owned(),
        line: at.line,
        column: at.column,
    }
}

fn join(prefix: &str, key: &str) -> String {
    match prefix {
        "" => key.to_owned(),
        prefix => format!("{prefix}.{key}"),
    }
}

fn is_section(role: Role, path: &str) -> bool {
    sections(role).iter().any(|section| section == path)
}

/// Every path that has settings below it.
fn sections(role: Role) -> BTreeSet<String> {
    let dots = |path: &'static str| path.match_indices('.').map(|(at, _)| &path[..at]);
    let paths = table(role).iter().flat_map(|setting| dots(setting.path));
    paths.map(str::to_owned).collect()
}

/// Every path that may be set, those for files included.
fn keys(role: Role) -> Vec<String> {
    table(role)
        .iter()
        .flat_map(|setting| {
            let file = setting.kind.from_file();
            let file = file.then(|| format!("{}_file", setting.path));
            std::iter::once(setting.path.to_owned()).chain(file)
        })
        .collect()
}

/// The valid name that looks most like `name`: as a whole, or in its last part, for a key in the
/// wrong section. `None` when nothing looks like it.
fn nearest(name: &str, valid: Vec<String>) -> Option<String> {
    const ALIKE: f64 = 0.5;
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let alike = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(name, candidate);
        let part = strsim::normalized_damerau_levenshtein(&last(name), &last(candidate));
        whole.max(part * 0.9)
    };
    valid
        .into_iter()
        .map(|candidate| (alike(&candidate), candidate))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        // The first of those that are equally alike.
        .reduce(|best, next| if next.0 > best.0 { next } else { best })
        .map(|(_, candidate)| candidate)
}

/// A file as a whole, if it isn't longer than any configuration is.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        let text = format!("longer than {MAX_FILE} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}
