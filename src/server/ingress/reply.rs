//! An answer on its way to the visitor.

use bytes::BytesMut;

use crate::cors::{self, Additions, Grant};
use crate::head::ResponseHead;
use crate::headers::{Direction, InvalidLines, LineFacts, Version, offered, sendable};
use crate::http1::{
    Outgoing, write_chunk_head, write_last_chunk, write_length, write_line, write_status_line,
};
use crate::mux::Read;

use super::super::respond::Fault;

/// What is known of a request when it is answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) version: Version,
    /// It was a HEAD, so the answer has no body.
    pub(super) to_head: bool,
    /// Another request may follow on the connection.
    pub(super) persistent: bool,
}

/// What is still to come of an answer, and how it is framed.
#[derive(Debug)]
pub(super) struct Reply {
    body: Body,
    /// Another request may follow on the connection.
    pub(super) persistent: bool,
    /// Bytes of the body so far.
    pub(super) body_bytes: u64,
}

/// What is still to come of an answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Complete,
    /// None belongs to it, whatever the service sends.
    None,
    Length(u64),
    Chunked,
    UntilClose,
}

/// The agent sent more or less of a body than its head has declared.
#[derive(Debug)]
pub(super) struct WrongLength;

impl Reply {
    /// Appends the head of the service's answer to `out`, with the lines that a `grant` adds;
    /// nothing if it can't be passed on.
    pub(super) fn begin(
        out: &mut Outgoing,
        asked: Asked,
        head: &ResponseHead,
        grant: Option<&Grant>,
    ) -> Result<Self, InvalidLines> {
        let out = out.text();
        let facts = write_lines(out, asked.version, head, grant)?;
        // RFC 9110, section 8.6: a 204 has no length, a 304 the one that a 200 would have.
        if let (Some(length), true) = (facts.length, head.status != 204) {
            write_length(out, length);
        }
        let body = match (facts.length, asked.version) {
            _ if asked.to_head || matches!(head.status, 204 | 304) => Body::None,
            (Some(length), _) => Body::Length(length),
            (None, Version::Http11) => {
                write_line(out, b"transfer-encoding", b"chunked");
                Body::Chunked
            }
            (None, Version::Http10) => Body::UntilClose,
        };
        let persistent = asked.persistent && body != Body::UntilClose;
        if head.status == 426 {
            // RFC 9110, section 15.5.22: it says what it requires.
            write_upgrade(out, head);
        }
        end_head(out, asked.version, persistent);
        Ok(Self {
            body,
            persistent,
            body_bytes: 0,
        })
    }

    /// Appends the head of a 101 to `out`, with the lines that a `grant` adds; nothing if it can't
    /// be passed on. What follows is passed on as it comes.
    pub(super) fn upgrade(
        out: &mut Outgoing,
        head: &ResponseHead,
        grant: Option<&Grant>,
    ) -> Result<Self, InvalidLines> {
        let out = out.text();
        write_lines(out, Version::Http11, head, grant)?;
        write_upgrade(out, head);
        out.extend_from_slice(b"\r\n");
        Ok(Self {
            body: Body::UntilClose,
            persistent: false,
            body_bytes: 0,
        })
    }

    /// Appends an answer of the server's own without a body to `out`.
    pub(super) fn own<'a>(
        out: &mut Outgoing,
        asked: Asked,
        status: u16,
        lines: impl Iterator<Item = cors::Line<'a>>,
    ) -> Self {
        write_status_line(out.text(), asked.version, status);
        for (name, value) in lines {
            write_line(out.text(), name.as_bytes(), value);
        }
        end_head(out.text(), asked.version, asked.persistent);
        Self {
            body: Body::Complete,
            persistent: asked.persistent,
            body_bytes: 0,
        }
    }

    /// Appends the answer to what went wrong to `out`, with the lines that a `grant` adds.
    pub(super) fn fault(
        out: &mut Outgoing,
        asked: Asked,
        fault: Fault,
        grant: Option<&Grant>,
    ) -> Self {
        let answer = fault.respond();
        let persistent = asked.persistent && !fault.closes();
        write_status_line(out.text(), asked.version, answer.status().as_u16());
        for (name, value) in answer.headers() {
            write_line(out.text(), name.as_str().as_bytes(), value.as_bytes());
        }
        for (name, value) in grant.into_iter().flat_map(Grant::own_lines) {
            write_line(out.text(), name.as_bytes(), value);
        }
        end_head(out.text(), asked.version, persistent);
        let mut body_bytes = 0;
        if !asked.to_head {
            body_bytes = answer.body().len() as u64;
            out.push(answer.into_body());
        }
        Self {
            body: Body::Complete,
            persistent,
            body_bytes,
        }
    }

    /// Appends an interim answer to `out`; nothing if it can't be passed on.
    pub(super) fn interim(out: &mut Outgoing, head: &ResponseHead) {
        let out = out.text();
        let before = out.len();
        write_status_line(out, Version::Http11, head.status);
        let written = sendable(&head.lines, Direction::Response, |name, value| {
            write_line(out, name, value);
        });
        match written {
            Ok(_) => out.extend_from_slice(b"\r\n"),
            Err(_) => out.truncate(before),
        }
    }

    /// Whether all of it has been taken off the exchange.
    pub(super) fn is_complete(&self) -> bool {
        self.body == Body::Complete
    }

    /// Whether only the connection's end tells the visitor that the answer is complete.
    pub(super) fn ends_by_close(&self) -> bool {
        self.body == Body::UntilClose
    }

    /// Appends the next piece of the body to `out`, or what ends it.
    pub(super) fn take(&mut self, out: &mut Outgoing, read: Read) -> Result<(), WrongLength> {
        if let (Read::Data(piece), true) = (&read, self.body != Body::None) {
            self.body_bytes += piece.len() as u64;
        }
        match (read, self.body) {
            (Read::Data(piece), Body::Length(left)) => {
                let left = left.checked_sub(piece.len() as u64);
                self.body = Body::Length(left.ok_or(WrongLength)?);
                out.push(piece);
            }
            (Read::Data(piece), Body::Chunked) => {
                write_chunk_head(out.text(), piece.len());
                out.push(piece);
                out.text().extend_from_slice(b"\r\n");
            }
            (Read::Data(piece), Body::UntilClose) => out.push(piece),
            (Read::End(_), Body::Length(1..)) => return Err(WrongLength),
            (Read::End(trailers), body) => {
                if body == Body::Chunked {
                    write_last_chunk(out.text(), trailers.as_ref());
                }
                self.body = Body::Complete;
            }
            (Read::Data(_) | Read::Reset(_) | Read::Pending, _) => {}
        }
        Ok(())
    }
}

/// Hands the header lines of a service's answer to `write`, without those that frame it and with
/// those that a `grant` adds. Some may have been handed out before an error.
pub(super) fn answer_lines(
    head: &ResponseHead,
    grant: Option<&Grant>,
    mut write: impl FnMut(&[u8], &[u8]),
) -> Result<LineFacts, InvalidLines> {
    let mut additions = grant.map(Additions::new);
    let facts = sendable(&head.lines, Direction::Response, |name, value| {
        write(name, value);
        if let Some(additions) = &mut additions {
            additions.see(name, value);
        }
    })?;
    for (name, value) in additions.into_iter().flat_map(Additions::into_lines) {
        write(name.as_bytes(), value);
    }
    Ok(facts)
}

/// The status line and the [`answer_lines`]; nothing if they can't be passed on.
fn write_lines(
    out: &mut BytesMut,
    version: Version,
    head: &ResponseHead,
    grant: Option<&Grant>,
) -> Result<LineFacts, InvalidLines> {
    out.reserve(head.size() + ROOM);
    let before = out.len();
    write_status_line(out, version, head.status);
    let written = answer_lines(head, grant, |name, value| write_line(out, name, value));
    written.inspect_err(|_| out.truncate(before))
}

/// The protocols that an answer speaks of, with the line that says for whom that is.
fn write_upgrade(out: &mut BytesMut, head: &ResponseHead) {
    if let Some(protocols) = offered(&head.lines) {
        write_line(out, b"upgrade", protocols);
        write_line(out, b"connection", b"upgrade");
    }
}

/// Room for what is added to a head.
const ROOM: usize = 128;

/// Says whether the connection persists, where that isn't the rule, and ends the head.
fn end_head(out: &mut BytesMut, version: Version, persistent: bool) {
    match (version, persistent) {
        (Version::Http11, false) => write_line(out, b"connection", b"close"),
        (Version::Http10, true) => write_line(out, b"connection", b"keep-alive"),
        (Version::Http11, true) | (Version::Http10, false) => {}
    }
    out.extend_from_slice(b"\r\n");
}
