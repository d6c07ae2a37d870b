//! The access log: one line a request, for those who count visits and for those who look for a
//! single one.

use std::fmt::{self, Write as _};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use tracing::{info, warn};

use crate::config::LogOutput;
use crate::id::AgentId;
use crate::metrics::Metrics;
use crate::telemetry::{Format, LogFile, Output, Report, Spool, Stderr, Stdout};

/// How many bytes of lines may wait to be written: about 20,000 requests. Beyond, lines are
/// dropped and counted.
const QUEUE: usize = 4 * 1024 * 1024;

/// How long the server's end may wait for the last lines.
const FLUSH: Duration = Duration::from_secs(1);

/// The longest path, and the longest of any other text of a visitor's, that a line shows; a
/// longer one is cut and ends with three dots.
const MAX_METHOD: usize = 32;
const MAX_PATH: usize = 2048;
const MAX_TEXT: usize = 128;

/// Where lines about requests go.
#[derive(Debug)]
pub(super) struct AccessLog {
    lines: Spool,
    format: Format,
}

impl AccessLog {
    /// Opens the output.
    pub(super) fn open(output: &LogOutput, format: Format, metrics: &Metrics) -> io::Result<Self> {
        let output: Box<dyn Output> = match output {
            LogOutput::Stderr => Box::new(Stderr),
            LogOutput::Stdout => Box::new(Stdout),
            LogOutput::File(path) => Box::new(LogFile::open(path)?),
        };
        let dropped = metrics.access_log_dropped.clone();
        Ok(Self {
            lines: Spool::start("silo-access", QUEUE, output, dropped, report)?,
            format,
        })
    }

    /// Writes a line, or drops it if too many are waiting.
    pub(super) fn write(&self, entry: &Entry<'_>) {
        self.lines.push(entry.line(self.format).as_bytes());
    }

    /// Opens the file again under its name, after it has been moved away. Streams stay.
    pub(super) fn reopen(&self) {
        self.lines.reopen();
    }

    /// Waits a second at most until what is queued has been written.
    pub(super) fn flush(&self) {
        self.lines.flush(FLUSH);
    }
}

fn report(report: Report) {
    match report {
        Report::Dropped(lines) => warn!(
            lines,
            "lines of the access log were dropped: they couldn't be written as fast as they came"
        ),
        Report::Failed(error) => warn!(
            %error,
            "the access log can't be written, so its lines are dropped: free the disk or set \
             http.access_log to another place"
        ),
        Report::Recovered => info!("the access log is written again"),
        Report::NotReopened(error) => warn!(
            %error,
            "the access log can't be opened again: it goes on in the old file"
        ),
    }
}

/// What a line says.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    /// When the request's head had come.
    pub time: SystemTime,
    /// Who asked.
    pub visitor: IpAddr,
    /// Where he says the request came from; only if he is one of `http.trusted_proxies`.
    pub forwarded_for: Option<&'a [u8]>,
    /// Whose port it was.
    pub agent_id: &'a AgentId,
    /// The port.
    pub port: u16,
    /// The request's method, a token; none if its head couldn't be read.
    pub method: Option<&'a [u8]>,
    /// Its target without the query; none if that has none.
    pub path: Option<&'a [u8]>,
    /// Its protocol.
    pub protocol: Option<&'static str>,
    /// The status of the answer; none if no answer was begun.
    pub status: Option<u16>,
    /// Bytes of the request's body that went on to the agent.
    pub bytes_in: u64,
    /// Bytes of the answer's body that were given to the visitor's connection.
    pub bytes_out: u64,
    /// From the request's head to the end of its answer.
    pub duration: Duration,
    /// Whether all of the answer was given to the visitor's connection.
    pub complete: bool,
    /// The X-Request-Id that the service saw.
    pub request_id: Option<&'a [u8]>,
    /// What went wrong, as X-Silo-Error and the metrics name it.
    pub error: Option<&'static str>,
}

impl Entry<'_> {
    /// The line with its newline: `name=value` after the time, or a JSON object. Whatever a
    /// visitor has a hand in is quoted and escaped, so that he can't write lines of his own.
    fn line(&self, format: Format) -> String {
        let time = humantime::format_rfc3339_micros(self.time);
        let mut line = Line {
            text: String::with_capacity(384),
            format,
        };
        match format {
            Format::Text => line.put(format_args!("{time}")),
            Format::Json => line.put(format_args!(
                "{{\"timestamp\":\"{time}\",\"target\":\"access\""
            )),
        }
        line.word("visitor", self.visitor);
        if let Some(from) = self.forwarded_for {
            line.quoted("forwarded_for", from, MAX_TEXT);
        }
        line.word("agent_id", self.agent_id);
        line.number("port", self.port);
        if let Some(method) = self.method {
            // Nothing in a token has to be escaped (RFC 9110, section 5.6.2).
            let method = &method[..method.len().min(MAX_METHOD)];
            line.word("method", String::from_utf8_lossy(method));
        }
        if let Some(path) = self.path {
            line.quoted("path", path, MAX_PATH);
        }
        if let Some(protocol) = self.protocol {
            line.word("protocol", protocol);
        }
        if let Some(status) = self.status {
            line.number("status", status);
        }
        line.number("bytes_in", self.bytes_in);
        line.number("bytes_out", self.bytes_out);
        let micros = self.duration.as_micros();
        line.number(
            "duration_ms",
            format_args!("{}.{:03}", micros / 1000, micros % 1000),
        );
        line.number("complete", self.complete);
        if let Some(id) = self.request_id {
            line.quoted("request_id", id, MAX_TEXT);
        }
        if let Some(error) = self.error {
            line.word("error", error);
        }
        line.end()
    }
}

/// A line that is being written.
struct Line {
    text: String,
    format: Format,
}

impl Line {
    /// A value that no visitor has a hand in, and that JSON quotes.
    fn word(&mut self, name: &str, value: impl fmt::Display) {
        match self.format {
            Format::Text => self.put(format_args!(" {name}={value}")),
            Format::Json => self.put(format_args!(",\"{name}\":\"{value}\"")),
        }
    }

    /// A number, or a truth.
    fn number(&mut self, name: &str, value: impl fmt::Display) {
        match self.format {
            Format::Text => self.put(format_args!(" {name}={value}")),
            Format::Json => self.put(format_args!(",\"{name}\":{value}")),
        }
    }

    /// A visitor's text, of which no more than `limit` bytes are shown.
    fn quoted(&mut self, name: &str, value: &[u8], limit: usize) {
        match self.format {
            Format::Text => self.put(format_args!(" {name}=\"")),
            Format::Json => self.put(format_args!(",\"{name}\":\"")),
        }
        for byte in value.iter().take(limit) {
            match byte {
                b'"' => self.text.push_str("\\\""),
                b'\\' => self.text.push_str("\\\\"),
                b' '..=b'~' => self.text.push(char::from(*byte)),
                // As JSON writes it, and everything else may.
                _ => self.put(format_args!("\\u{byte:04x}")),
            }
        }
        if value.len() > limit {
            self.text.push_str("...");
        }
        self.text.push('"');
    }

    fn put(&mut self, text: fmt::Arguments<'_>) {
        // Writing to a `String` can't fail.
        let _ = self.text.write_fmt(text);
    }

    fn end(mut self) -> String {
        if self.format == Format::Json {
            self.text.push('}');
        }
        self.text.push('\n');
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(agent_id: &AgentId) -> Entry<'_> {
        Entry {
            time: SystemTime::UNIX_EPOCH + Duration::from_micros(1_500),
            visitor: IpAddr::from([192, 0, 2, 1]),
            forwarded_for: None,
            agent_id,
            port: 8100,
            method: Some(b"GET"),
            path: Some(b"/a"),
            protocol: Some("HTTP/1.1"),
            status: Some(200),
            bytes_in: 1,
            bytes_out: 2,
            duration: Duration::from_micros(12_045),
            complete: true,
            request_id: Some(b"id"),
            error: None,
        }
    }

    #[test]
    fn a_line_for_people() {
        let id = "agent-1".parse().unwrap();
        let mut entry = entry(&id);
        assert_eq!(
            entry.line(Format::Text),
            "1970-01-01T00:00:00.001500Z visitor=192.0.2.1 agent_id=agent-1 port=8100 \
             method=GET path=\"/a\" protocol=HTTP/1.1 status=200 bytes_in=1 bytes_out=2 \
             duration_ms=12.045 complete=true request_id=\"id\"\n"
        );
        (entry.method, entry.path, entry.protocol) = (None, None, None);
        entry.status = None;
        entry.complete = false;
        entry.request_id = None;
        entry.forwarded_for = Some(b"198.51.100.7");
        entry.error = Some("tunnel_lost");
        let line = entry.line(Format::Text);
        assert!(line.contains(" forwarded_for=\"198.51.100.7\" "), "{line}");
        for name in ["method=", "path=", "protocol=", "status=", "request_id="] {
            assert!(!line.contains(name), "{line}");
        }
        assert!(line.ends_with(" complete=false error=tunnel_lost\n"));
    }

    #[test]
    fn a_line_for_machines() {
        let id = "agent-1".parse().unwrap();
        let line = entry(&id).line(Format::Json);
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "timestamp": "1970-01-01T00:00:00.001500Z", "target": "access",
                "visitor": "192.0.2.1", "agent_id": "agent-1", "port": 8100, "method": "GET",
                "path": "/a", "protocol": "HTTP/1.1", "status": 200, "bytes_in": 1,
                "bytes_out": 2, "duration_ms": 12.045, "complete": true, "request_id": "id",
            })
        );
    }

    #[test]
    fn no_visitor_writes_lines_of_his_own() {
        let id = "agent-1".parse().unwrap();
        let mut entry = entry(&id);
        entry.path = Some("/\" status=200\n\r\u{1b}[31m\\\u{7f}é".as_bytes());
        entry.request_id = Some(b"\xff\"\n");
        let escaped = r#"path="/\" status=200\u000a\u000d\u001b[31m\\\u007f\u00c3\u00a9" "#;
        let line = entry.line(Format::Text);
        assert!(line.contains(escaped), "{line}");
        assert!(line.ends_with("request_id=\"\\u00ff\\\"\\u000a\"\n"));
        assert_eq!(line.matches('\n').count(), 1);
        let line = entry.line(Format::Json);
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["request_id"], "\u{ff}\"\n");

        let long = "/".repeat(MAX_PATH + 1);
        entry.path = Some(long.as_bytes());
        assert!(entry.line(Format::Text).contains("//...\" protocol="));
    }
}
