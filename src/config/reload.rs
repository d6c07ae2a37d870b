//! What of new settings a running process can take up.

use super::agent::{AgentConfig, DialTls};
use super::fault::ConfigError;
use super::server::ServerConfig;
use super::sources::{Reader, Sources};
use super::table::{Reload, Role, table};

/// Which settings differ from those that a process runs with, by their paths: values don't
/// belong into a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that take effect now.
    pub applied: Vec<&'static str>,
    /// Those whose old value holds until the process is started anew.
    pub needs_restart: Vec<&'static str>,
}

impl Changes {
    /// Whether one of these settings changes now.
    pub fn touch(&self, paths: &[&str]) -> bool {
        self.applied.iter().any(|path| paths.contains(path))
    }
}

/// A comparison under way.
struct Comparison {
    role: Role,
    changes: Changes,
}

impl Comparison {
    fn new(role: Role) -> Self {
        Self {
            role,
            changes: Changes::default(),
        }
    }

    /// Notes a change if it is one. For what is compared by hand, where the old value is kept by
    /// hand, too.
    fn note_if(&mut self, changed: bool, path: &'static str) {
        if changed {
            self.note(path);
        }
    }

    /// Notes a change, and says whether it takes effect now.
    fn note(&mut self, path: &'static str) -> bool {
        let setting = table(self.role).iter().find(|setting| setting.path == path);
        let now = setting.is_some_and(|setting| setting.reload == Reload::Now);
        match now {
            true => self.changes.applied.push(path),
            false => self.changes.needs_restart.push(path),
        }
        now
    }
}

/// Compares field by field, and keeps in `$new` what can't change.
macro_rules! compare {
    ($old:ident, $new:ident, $changes:ident; $($path:literal: $($field:ident).+,)*) => {
        $(if $old.$($field).+ != $new.$($field).+ && !$changes.note($path) {
            $new.$($field).+ = $old.$($field).+.clone();
        })*
    };
}

impl ServerConfig {
    /// What a server that runs with these settings goes by when it is told `new` ones: what
    /// can't change while it runs stays as it is.
    ///
    /// Fails if what stays contradicts what changes.
    pub fn replaced_by(&self, mut new: Self) -> Result<(Self, Changes), ConfigError> {
        let old = self;
        let mut changes = Comparison::new(Role::Server);
        compare! { old, new, changes;
            "log.level": log.level,
            "log.format": log.format,
            "http.host": http.host,
            "http.port": http.port,
            "http.admin_api_key": http.admin_api_key,
            "http.agent_host": http.agent_host,
            "http.public_host": http.public_host,
        }
        let [was, is] = [old, &new].map(|config| &config.http.agent_port_range);
        changes.note_if(was.start() != is.start(), "http.agent_port_range.start");
        changes.note_if(was.end() != is.end(), "http.agent_port_range.end");
        compare! { old, new, changes;
            "http.static_ports": http.static_ports,
            "http.port_lease": http.port_lease,
            "http.state_file": http.state_file,
            "http.trusted_proxies": http.trusted_proxies,
            "http.max_exchanges_per_agent": http.max_exchanges_per_agent,
            "http.max_connections": http.max_connections,
            "http.max_connections_per_agent": http.max_connections_per_agent,
            "http.max_connections_per_address": http.max_connections_per_address,
            "http.max_request_line": http.max_request_line,
            "http.max_head": http.max_head,
            "http.max_header_lines": http.max_header_lines,
            "http.head_timeout": http.head_timeout,
            "http.body_timeout": http.body_timeout,
            "http.idle_timeout": http.idle_timeout,
            "http.send_timeout": http.send_timeout,
            "http.max_body": http.max_body,
            "http.receive_buffer": http.receive_buffer,
            "http.access_log": http.access_log,
            "grpc.host": grpc.host,
            "grpc.port": grpc.port,
            "grpc.auth.shared_token": grpc.auth.shared,
            "grpc.auth.tokens": grpc.auth.tokens,
            "grpc.tls.client_auth": grpc.auth.certificates,
            "grpc.handshake_timeout": grpc.handshake_timeout,
            "grpc.max_handshakes": grpc.max_handshakes,
            "grpc.heartbeat_interval": grpc.heartbeat_interval,
            "grpc.heartbeat_timeout": grpc.heartbeat_timeout,
            "server.workers": server.workers,
            "server.grace": server.grace,
            "server.max_buffered": server.max_buffered,
            "server.max_buffered_per_agent": server.max_buffered_per_agent,
        }
        match (&old.http.cors, &new.http.cors) {
            (Some(old), Some(new)) => {
                changes.note_if(old.origins != new.origins, "http.cors.allowed_origins");
                changes.note_if(old.methods != new.methods, "http.cors.allowed_methods");
                changes.note_if(old.headers != new.headers, "http.cors.allowed_headers");
                let credentials = old.credentials != new.credentials;
                changes.note_if(credentials, "http.cors.allow_credentials");
                changes.note_if(old.max_age != new.max_age, "http.cors.max_age");
            }
            // The rest comes and goes with them.
            (old, new) => {
                changes.note_if(old.is_some() != new.is_some(), "http.cors.allowed_origins");
            }
        }
        match (&old.grpc.tls, &new.grpc.tls) {
            (Some(old), Some(new)) => {
                changes.note_if(old.cert_file != new.cert_file, "grpc.tls.cert_file");
                changes.note_if(old.key_file != new.key_file, "grpc.tls.key_file");
                changes.note_if(old.ca_file != new.ca_file, "grpc.tls.ca_file");
            }
            // The files come and go with it.
            (old, new) => changes.note_if(old.is_some() != new.is_some(), "grpc.tls.enabled"),
        }
        new.grpc.tls.clone_from(&old.grpc.tls);
        if !changes.changes.needs_restart.is_empty() {
            // The new settings agree with each other, but these are not all of them.
            let mut faults = Reader::new(Role::Server, &Sources::none());
            new.reconcile(&mut faults);
            new = faults.finish(new)?;
        }
        Ok((new, changes.changes))
    }
}

impl AgentConfig {
    /// What an agent that runs with these settings goes by when it is told `new` ones: what
    /// can't change while it runs stays as it is.
    pub fn replaced_by(&self, mut new: Self) -> (Self, Changes) {
        let old = self;
        let mut changes = Comparison::new(Role::Agent);
        compare! { old, new, changes;
            "log.level": log.level,
            "log.format": log.format,
            "grpc.server_address": grpc.server_address,
            "grpc.agent_id": grpc.agent_id,
            "grpc.token": grpc.token,
            "grpc.heartbeat_timeout": grpc.heartbeat_timeout,
            "local.service_url": local.service_url,
            "local.protocol": local.protocol,
            "local.host_header": local.host_header,
            "local.response_timeout": local.response_timeout,
            "local.connect_timeout": local.connect_timeout,
            "local.idle_timeout": local.idle_timeout,
            "local.max_connections": local.max_connections,
            "local.tls.ca_file": local.tls.ca_file,
            "local.tls.server_name": local.tls.server_name,
            "local.tls.insecure": local.tls.insecure,
            "agent.labels": agent.labels,
            "agent.grace": agent.grace,
        }
        match (&old.grpc.tls, &new.grpc.tls) {
            (Some(old), Some(new)) => {
                let files = |tls: &DialTls| tls.identity.clone().unzip();
                let ((old_cert, old_key), (new_cert, new_key)) = (files(old), files(new));
                changes.note_if(old.ca_file != new.ca_file, "grpc.tls.ca_file");
                changes.note_if(old_cert != new_cert, "grpc.tls.cert_file");
                changes.note_if(old_key != new_key, "grpc.tls.key_file");
                changes.note_if(old.server_name != new.server_name, "grpc.tls.server_name");
            }
            // The rest comes and goes with it.
            (old, new) => changes.note_if(old.is_some() != new.is_some(), "grpc.tls.enabled"),
        }
        new.grpc.tls.clone_from(&old.grpc.tls);
        (new, changes.changes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::table::{Kind, Preset, Setting, environment_name};
    use super::*;

    /// What every test configuration is told, so that each change is a valid one.
    const BASE: &[(&str, &str)] = &[
        ("http.admin_api_key", "base"),
        ("grpc.server_address", "a:1"),
        ("grpc.agent_id", "a"),
        ("local.service_url", "https://a"),
    ];

    /// A value of the setting that is neither its default nor the one of `BASE`.
    fn other_value(setting: &Setting) -> String {
        let preset = match setting.preset {
            Preset::Value(text) => text,
            Preset::Unset { .. } | Preset::Required(_) => "",
        };
        match (setting.kind, setting.path) {
            (Kind::Level, _) => "debug".into(),
            (Kind::LogFormat, _) => "json".into(),
            (Kind::Address, _) => "127.0.0.9".into(),
            (Kind::Host, _) => "other.example".into(),
            (Kind::HostPort, _) => "other.example:9".into(),
            (Kind::Id, _) => "other".into(),
            (Kind::Url, _) => "https://other.example".into(),
            (Kind::Protocol, _) => "auto".into(),
            (Kind::HostHeader, _) => "target".into(),
            (Kind::Flag, _) => if preset == "true" { "false" } else { "true" }.into(),
            (Kind::Count { .. }, _) if preset == "off" => "7".into(),
            (Kind::Count { max, .. }, _) => {
                let preset: u64 = preset.parse().unwrap();
                if preset < max { preset + 1 } else { preset - 1 }.to_string()
            }
            (Kind::Size { min, .. }, "http.max_head") => (16 * min).to_string(),
            // Less would bring `server.max_buffered_per_agent` down with it.
            (Kind::Size { .. }, "server.max_buffered") => "2GiB".into(),
            (Kind::Size { min, .. }, _) => min.to_string(),
            (Kind::Time { .. }, "grpc.heartbeat_interval") => "11s".into(),
            (Kind::Time { .. }, _) => "99s".into(),
            (Kind::Secret, _) => "other".into(),
            (Kind::Tokens, _) => "agent-1=other".into(),
            (Kind::Labels, _) => "site=zurich".into(),
            (Kind::Ports, _) => "agent-1=9999".into(),
            (Kind::Networks, _) => "10.0.0.0/8".into(),
            (Kind::FileName, _) => "/tmp/other".into(),
            (Kind::Certificates, _) => {
                concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent/tests/service.pem").into()
            }
            (Kind::ClientAuth, _) => "require".into(),
            (Kind::Output, _) => "stderr".into(),
            (Kind::Origins, _) => "https://other.example".into(),
            (Kind::Methods, _) => "GET".into(),
            (Kind::HeaderNames, _) => "x-other".into(),
        }
    }

    /// What TLS needs to be on, and then what client certificates need.
    const TLS: &[(&str, &str)] = &[
        ("grpc.tls.enabled", "true"),
        ("grpc.tls.cert_file", "a.pem"),
        ("grpc.tls.key_file", "a.key"),
        ("grpc.tls.ca_file", "ca.pem"),
        ("grpc.tls.client_auth", "request"),
    ];

    /// What the rest of CORS needs.
    const CORS: &[(&str, &str)] = &[("http.cors.allowed_origins", "https://a.example")];

    /// What is told before `setting` is changed, or after.
    fn sources(role: Role, setting: &Setting, changed: bool) -> Sources {
        let more: &[_] = match setting.path {
            "http.cors.allowed_origins" => &[],
            path if path.starts_with("http.cors.") => CORS,
            "grpc.tls.enabled" if changed => &TLS[..3],
            "grpc.tls.enabled" => &[],
            path if path.starts_with("grpc.tls.") => TLS,
            _ => &[],
        };
        let known = |path| table(role).iter().any(|setting| setting.path == path);
        let told = BASE.iter().chain(more);
        let mut told: BTreeMap<&str, String> = told
            .filter(|(path, _)| known(*path))
            .map(|(path, value)| (*path, (*value).to_owned()))
            .collect();
        if changed {
            told.insert(setting.path, other_value(setting));
        }
        let told = told.into_iter();
        Sources::none().environment(told.map(|(path, value)| (environment_name(path), value)))
    }

    /// Changes each setting of the table and compares what became of it with what the table says.
    fn each_setting(role: Role, reload: impl Fn(&Sources, &Sources) -> (String, Changes)) {
        for setting in table(role) {
            let old = sources(role, setting, false);
            let (unchanged, changes) = reload(&old, &old);
            assert_eq!(changes, Changes::default());
            let (held, changes) = reload(&old, &sources(role, setting, true));
            let expected = match setting.reload {
                Reload::Now => Changes {
                    applied: vec![setting.path],
                    needs_restart: vec![],
                },
                Reload::Restart => Changes {
                    applied: vec![],
                    needs_restart: vec![setting.path],
                },
            };
            assert_eq!(changes, expected, "{}", setting.path);
            let secret = matches!(setting.kind, Kind::Secret);
            let differs = held != unchanged;
            assert!(
                secret || differs == (setting.reload == Reload::Now),
                "{}",
                setting.path
            );
        }
    }

    #[test]
    fn each_setting_of_a_server_changes_as_the_table_says() {
        each_setting(Role::Server, |old, new| {
            let (old, new) = (ServerConfig::load(old), ServerConfig::load(new));
            let (held, changes) = old.unwrap().replaced_by(new.unwrap()).unwrap();
            (format!("{held:?}"), changes)
        });
    }

    #[test]
    fn each_setting_of_an_agent_changes_as_the_table_says() {
        each_setting(Role::Agent, |old, new| {
            let (old, new) = (AgentConfig::load(old), AgentConfig::load(new));
            let (held, changes) = old.unwrap().replaced_by(new.unwrap());
            (format!("{held:?}"), changes)
        });
    }

    #[test]
    fn what_stays_must_agree_with_what_changes() {
        let load = |told: &[(&str, &str)]| {
            ServerConfig::load(&Sources::none().environment(told.iter().copied())).unwrap()
        };
        // The admin port stays where others reach it, so its key stays too.
        let old = load(&[
            ("SILO_HTTP_HOST", "0.0.0.0"),
            ("SILO_HTTP_ADMIN_API_KEY", "key"),
        ]);
        let error = old.replaced_by(load(&[])).unwrap_err();
        assert_eq!(error.faults.len(), 1);
        assert!(error.to_string().contains("http.admin_api_key"), "{error}");

        // The range reaches the admin port's place, which the admin port doesn't leave.
        let error = load(&[])
            .replaced_by(load(&[
                ("SILO_HTTP_PORT", "7000"),
                ("SILO_HTTP_AGENT_PORT_RANGE_START", "8000"),
            ]))
            .unwrap_err();
        assert!(error.to_string().contains("8080"), "{error}");
    }
}
