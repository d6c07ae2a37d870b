//! The list of agents as it is answered.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body::Frame;
use serde::{Serialize, Serializer};

use crate::metrics::Gauge;
use crate::server::directory::{Row, Snapshot};

/// The size from which a piece of the list is handed on. A row is some 400 bytes.
pub(super) const PIECE_BYTES: usize = 32 * 1024;

/// `{"agents":[...],"count":N}`, rendered as it is sent, from one snapshot: the members are those
/// of one moment, the live figures those of the moment each row is written.
pub(super) struct AgentList {
    snapshot: Arc<Snapshot>,
    pub(super) stage: Stage,
    /// Rendered ahead, to find out whether it is all.
    pub(super) first: Option<Bytes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The row at this index is next.
    Row(usize),
    /// The closing bracket was written.
    Done,
}

impl AgentList {
    pub(super) fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            stage: Stage::Row(0),
            first: None,
        }
    }

    /// Renders until the piece is full or the list complete; empty once it is.
    pub(super) fn piece(&mut self) -> serde_json::Result<Bytes> {
        let Stage::Row(start) = self.stage else {
            return Ok(Bytes::new());
        };
        let rows = self.snapshot.rows();
        let mut piece = Vec::with_capacity(PIECE_BYTES + 1024);
        if start == 0 {
            piece.extend_from_slice(br#"{"agents":["#);
        }
        for (index, row) in rows.iter().enumerate().skip(start) {
            if piece.len() >= PIECE_BYTES {
                self.stage = Stage::Row(index);
                return Ok(piece.into());
            }
            if index > 0 {
                piece.push(b',');
            }
            serde_json::to_writer(&mut piece, &Agent(row))?;
        }
        piece.extend_from_slice(br#"],"count":"#);
        serde_json::to_writer(&mut piece, &rows.len())?;
        piece.push(b'}');
        self.stage = Stage::Done;
        Ok(piece.into())
    }
}

impl http_body::Body for AgentList {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        let piece = match self.first.take() {
            Some(first) => Ok(first),
            None => self.piece(),
        };
        Poll::Ready(match piece {
            Ok(piece) if piece.is_empty() => None,
            piece => Some(piece.map(Frame::data)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.stage == Stage::Done
    }
}

/// A row as `GET /agents` shows it, with the live figures of the moment it is written.
pub(super) struct Agent<'a>(pub(super) &'a Row);

impl Serialize for Agent<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            agent_id: &'a str,
            port: u16,
            last_seen: Timestamp,
            url: &'a str,
            state: &'static str,
            generation: u64,
            peer: Option<SocketAddr>,
            connected_at: Timestamp,
            requests: u64,
            exchanges: u64,
            connections: u64,
            bytes_in: u64,
            bytes_out: u64,
            rtt_ms: Option<f64>,
            version: &'a str,
            labels: &'a BTreeMap<String, String>,
        }
        let Self(row) = self;
        let stats = &row.stats;
        Shown {
            agent_id: row.agent_id.as_str(),
            port: row.port,
            last_seen: Timestamp::from_ms(stats.last_seen_ms()),
            url: &row.public_url,
            state: row.state.as_str(),
            generation: row.generation.0,
            peer: row.peer,
            connected_at: Timestamp::from_time(row.connected_at),
            requests: stats.requests.get(),
            exchanges: level(&stats.exchanges_open),
            connections: level(&stats.connections_open),
            bytes_in: stats.bytes_in.get(),
            bytes_out: stats.bytes_out.get(),
            rtt_ms: stats.rtt().map(|rtt| rtt.as_micros() as f64 / 1000.0),
            version: &row.version,
            labels: &row.labels,
        }
        .serialize(serializer)
    }
}

/// A gauge that two threads count may be seen between the two.
fn level(gauge: &Gauge) -> u64 {
    gauge.get().max(0).unsigned_abs()
}

/// A time as RFC 3339 with milliseconds, in UTC.
struct Timestamp(SystemTime);

impl Timestamp {
    /// 9999-12-31T23:59:59.999Z, the last that RFC 3339 can write.
    const LAST_MS: u64 = 253_402_300_799_999;

    fn from_ms(since_epoch: u64) -> Self {
        Self(UNIX_EPOCH + Duration::from_millis(since_epoch.min(Self::LAST_MS)))
    }

    fn from_time(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_ms(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_millis(self.0).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
