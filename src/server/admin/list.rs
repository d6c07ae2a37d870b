//! The list of agents as it is answered.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body::Frame;
use serde::{Serialize, Serializer};

use crate::metrics::{AgentStats, Gauge};
use crate::server::directory::{Row, Snapshot};

/// How many rows make a piece of the list: of some 400 bytes each, about what is buffered ahead of
/// a peer. A fixed number, so that answers from one snapshot fall into the same pieces.
pub(super) const PIECE_ROWS: usize = 80;

/// How old the live figures of a shared piece may be: as old as the rows.
const FRESH: Duration = Duration::from_millis(50);

/// `{"agents":[...],"count":N}`, rendered as it is sent, from one snapshot: the members are those
/// of one moment, the live figures those of the moment each piece is written, or of 50 ms before
/// where there is more than one piece.
pub(super) struct AgentList {
    snapshot: Arc<Snapshot>,
    /// Where pieces are taken from and left.
    shared: Arc<SharedPieces>,
    /// The next piece's number.
    next: usize,
}

impl AgentList {
    /// The list, its pieces shared with all who get it at the same time.
    pub(super) fn new(snapshot: Arc<Snapshot>, shared: Arc<SharedPieces>) -> Self {
        Self {
            snapshot,
            shared,
            next: 0,
        }
    }

    /// How many pieces there are, at least one.
    pub(super) fn pieces(&self) -> usize {
        self.snapshot.rows().len().div_ceil(PIECE_ROWS).max(1)
    }

    /// The next piece; none after the last.
    pub(super) fn piece(&mut self) -> serde_json::Result<Option<Bytes>> {
        if self.next == self.pieces() {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        let piece = match self.pieces() {
            // As fresh as can be, since it costs so little.
            1 => self.render(number),
            _ => self
                .shared
                .piece(&self.snapshot, number, || self.render(number)),
        };
        piece.map(Some)
    }

    fn render(&self, number: usize) -> serde_json::Result<Bytes> {
        let rows = self.snapshot.rows();
        let start = number * PIECE_ROWS;
        let end = rows.len().min(start + PIECE_ROWS);
        let mut piece = Vec::with_capacity((end - start) * 512 + 64);
        if start == 0 {
            piece.extend_from_slice(br#"{"agents":["#);
        }
        for (index, row) in rows.iter().enumerate().take(end).skip(start) {
            if index > 0 {
                piece.push(b',');
            }
            write_agent(&mut piece, row)?;
        }
        if end == rows.len() {
            piece.extend_from_slice(br#"],"count":"#);
            serde_json::to_writer(&mut piece, &rows.len())?;
            piece.push(b'}');
        }
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
        Poll::Ready(self.piece().map(|piece| piece.map(Frame::data)).transpose())
    }

    fn is_end_stream(&self) -> bool {
        self.next == self.pieces()
    }
}

/// The pieces of the newest list, rendered once for all pollers who come within 50 ms: for a
/// thousand whom a change has woken, or who come each second, and ten thousand agents the admin
/// thread would have to write 4 GB of JSON otherwise. Holds one list at most, until the next one is asked for.
#[derive(Debug, Default)]
pub(super) struct SharedPieces {
    /// Used on the admin thread alone, while a piece is rendered.
    pieces: Mutex<Pieces>,
}

#[derive(Debug, Default)]
struct Pieces {
    snapshot: Arc<Snapshot>,
    /// By number, with the time when it was rendered.
    rendered: Vec<Option<(Instant, Bytes)>>,
}

impl SharedPieces {
    fn piece(
        &self,
        snapshot: &Arc<Snapshot>,
        number: usize,
        render: impl FnOnce() -> serde_json::Result<Bytes>,
    ) -> serde_json::Result<Bytes> {
        let now = Instant::now();
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        if pieces.snapshot.revision() > snapshot.revision() {
            // A slow reader of an older list is alone with it.
            return render();
        }
        if !Arc::ptr_eq(&pieces.snapshot, snapshot) {
            *pieces = Pieces {
                snapshot: snapshot.clone(),
                rendered: Vec::new(),
            };
        }
        let rendered = &mut pieces.rendered;
        if rendered.len() <= number {
            rendered.resize(number + 1, None);
        }
        match &rendered[number] {
            Some((at, piece)) if now.saturating_duration_since(*at) < FRESH => Ok(piece.clone()),
            _ => {
                let piece = render()?;
                rendered[number] = Some((now, piece.clone()));
                Ok(piece)
            }
        }
    }
}

/// A row as `GET /agents/{id}` shows it, with the live figures of this moment.
pub(super) fn agent(row: &Row) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::new();
    write_agent(&mut text, row)?;
    Ok(text)
}

/// Writes one JSON object out of two: what the row says, which is kept, and its live figures.
fn write_agent(text: &mut Vec<u8>, row: &Row) -> serde_json::Result<()> {
    text.extend_from_slice(kept_text(row));
    // The first object's end and the second one's beginning become a comma.
    text.pop();
    let live = text.len();
    serde_json::to_writer(&mut *text, &Live::of(&row.stats))?;
    text[live] = b',';
    Ok(())
}

fn kept_text(row: &Row) -> &[u8] {
    row.text.get_or_write(|| {
        let kept = Kept {
            agent_id: row.agent_id.as_str(),
            port: row.port,
            url: &row.public_url,
            state: row.state.as_str(),
            generation: row.generation.0,
            peer: row.peer,
            connected_at: Timestamp::from_time(row.connected_at),
            version: &row.version,
            labels: &row.labels,
        };
        serde_json::to_vec(&kept)
            .expect("nothing in it can fail")
            .into()
    })
}

/// What a row says for as long as it is listed.
#[derive(Serialize)]
struct Kept<'a> {
    agent_id: &'a str,
    port: u16,
    url: &'a str,
    state: &'static str,
    generation: u64,
    peer: Option<SocketAddr>,
    connected_at: Timestamp,
    version: &'a str,
    labels: &'a BTreeMap<String, String>,
}

/// The figures that move.
#[derive(Serialize)]
struct Live {
    last_seen: Timestamp,
    requests: u64,
    exchanges: u64,
    connections: u64,
    bytes_in: u64,
    bytes_out: u64,
    rtt_ms: Option<f64>,
}

impl Live {
    fn of(stats: &AgentStats) -> Self {
        Self {
            last_seen: Timestamp::from_ms(stats.last_seen_ms()),
            requests: stats.requests.get(),
            exchanges: level(&stats.exchanges_open),
            connections: level(&stats.connections_open),
            bytes_in: stats.bytes_in.get(),
            bytes_out: stats.bytes_out.get(),
            rtt_ms: stats.rtt().map(|rtt| rtt.as_micros() as f64 / 1000.0),
        }
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
