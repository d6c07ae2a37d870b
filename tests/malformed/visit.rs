//! A visitor who sends the bytes of a case, and what he and the service make of what follows.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::common::raw::{is_timeout, latin1};
use crate::common::{Answer, connect, try_read_answer};
use crate::list::Case;
use crate::service::{Record, Request};

const PROBE: &[u8] = b"GET /probe HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";

/// The refusals that the contract knows. 505 is for a version that has no place here.
const REFUSALS: &[u16] = &[400, 405, 408, 413, 414, 417, 431, 505];

/// What came of a case.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How long the connection may take to end.
    patience: Duration,
    /// How many of the requests were answered by the service.
    passed: usize,
    /// The answers of the service, with that to the probe.
    answers: Vec<String>,
    /// The status of an answer that isn't the service's; nothing comes after it.
    refused: Option<u16>,
    ends: Ends,
    /// What the service got that it can't be sure about.
    illegal: Option<String>,
    pub(crate) faults: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Ends {
    Closed,
    /// Nothing more came, and the connection stayed open.
    Silent,
    /// Something came that is no answer in HTTP/1.
    Odd(String),
}

/// How long a visitor waits.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    /// For an answer.
    pub(crate) answer: Duration,
    /// For the connection's end behind the last answer.
    pub(crate) close: Duration,
}

/// Sends the bytes of a case on a connection of their own, in pieces, then a request that has nothing wrong
/// with it if the connection is still there, and reads all that comes.
pub(crate) fn visit(address: SocketAddr, case: &Case, piece: usize, patience: Patience) -> Outcome {
    let mut outcome = Outcome::new(patience.close);
    let mut stream = BufReader::new(connect(address));
    let timeout = stream.get_ref().set_read_timeout(Some(patience.answer));
    timeout.unwrap();
    // Whoever refuses may do so before all is read.
    for piece in case.bytes.chunks(piece) {
        if stream.get_mut().write_all(piece).is_err() {
            break;
        }
    }
    if case.leaves {
        let _ = stream.get_mut().shutdown(Shutdown::Write);
    }
    let head_only = case.bytes.starts_with(b"HEAD ");
    let mut open = true;
    while open && outcome.passed < case.requests {
        match outcome.read(&mut stream, head_only) {
            Some(answer) => {
                outcome.passed += 1;
                open = !ends_connection(case, &answer);
            }
            None => return outcome,
        }
    }
    if open && !case.leaves {
        let _ = stream.get_mut().write_all(PROBE);
        if outcome.read(&mut stream, false).is_none() {
            if outcome.refused.is_none() {
                outcome.faults.push("the next request got no answer".into());
            }
            return outcome;
        }
    }
    outcome.read_end(&mut stream);
    outcome
}

/// Whether the visitor knows that nothing comes after an answer.
fn ends_connection(case: &Case, answer: &Answer) -> bool {
    let first = case.bytes.split(|byte| *byte == b'\r').next();
    let old = first.is_some_and(|line| line.ends_with(b" HTTP/1.0"));
    old || answer.header("connection").contains(&"close".to_owned())
}

impl Outcome {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            passed: 0,
            answers: Vec::new(),
            refused: None,
            ends: Ends::Closed,
            illegal: None,
            faults: Vec::new(),
        }
    }

    /// Reads the service's next answer, or how it ends without one.
    fn read(&mut self, stream: &mut BufReader<TcpStream>, head_only: bool) -> Option<Answer> {
        match stream.fill_buf() {
            Ok([]) => return None,
            Ok(bytes) if b"HTTP/1.".iter().zip(bytes).all(|(a, b)| a == b) => {}
            Ok(_) => {
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes);
                bytes.truncate(60);
                self.ends = Ends::Odd(latin1(&bytes).escape_default().to_string());
                return None;
            }
            Err(error) => {
                self.broke(&error);
                return None;
            }
        }
        match try_read_answer(stream, head_only) {
            Ok(answer) if answer.status == 200 => {
                // The answer to HEAD has no body that would say which it is.
                if !head_only {
                    self.answers.push(answer.text());
                }
                Some(answer)
            }
            Ok(answer) => {
                self.refused = Some(answer.status);
                self.read_end(stream);
                None
            }
            Err(error) => {
                self.broke(&error);
                self.faults.push(format!("half an answer: {error}"));
                None
            }
        }
    }

    /// Nothing may come any more but the end.
    fn read_end(&mut self, stream: &mut BufReader<TcpStream>) {
        let mut bytes = Vec::new();
        let _ = stream.get_ref().set_read_timeout(Some(self.patience));
        if let Err(error) = stream.read_to_end(&mut bytes) {
            self.broke(&error);
        }
        if !bytes.is_empty() {
            let more = latin1(&bytes[..bytes.len().min(200)]);
            self.faults
                .push(format!("more than was asked for: {more:?}"));
        }
    }

    fn broke(&mut self, error: &io::Error) {
        if is_timeout(error) {
            self.ends = Ends::Silent;
        }
    }
}

impl Outcome {
    /// Holds what the visitor saw against what the service did meanwhile.
    pub(crate) fn compare(&mut self, case: &Case, records: Vec<Record>) {
        let mut came = Vec::new();
        for record in records {
            match record {
                Record::Request(request) if request.target == NEIGHBOUR => {}
                Record::Request(request) => came.push(request),
                // Whoever refuses a body, or is left, breaks off at the service.
                Record::Incomplete => {}
                Record::Illegal { why, bytes } => {
                    self.faults
                        .push(format!("the service got {why}: {bytes:?}"));
                    self.illegal = Some(why);
                }
            }
        }
        let own = |request: &&Request| request.target != "/probe";
        let count = came.iter().filter(own).count();
        if count > case.requests {
            self.faults.push(format!("{count} requests at the service"));
        }
        let sent: Vec<&str> = came
            .iter()
            .filter(|request| request.method != "HEAD")
            .map(|request| request.answer.as_str())
            .collect();
        if sent != self.answers {
            let got = &self.answers;
            let fault = format!("the service answered {sent:?}, and the visitor got {got:?}");
            self.faults.push(fault);
        }
    }

    /// Whether the service got anything of it that it took for a request.
    pub(crate) fn passes(&self) -> bool {
        self.passed > 0 || self.illegal.is_some()
    }

    /// What is wrong, by the rule that holds for all of them.
    pub(crate) fn fault(&self, case: &Case) -> Option<String> {
        if !self.faults.is_empty() {
            return Some(self.faults.join("; "));
        }
        match (&self.ends, self.refused) {
            (Ends::Odd(bytes), _) => return Some(format!("answered with {bytes}")),
            (Ends::Silent, _) => return Some("the connection stays open".into()),
            (Ends::Closed, Some(status)) if !REFUSALS.contains(&status) => {
                return Some(format!("refused with {status}"));
            }
            (Ends::Closed, _) => {}
        }
        let answered = self.passed > 0 || self.refused.is_some();
        (!answered && !case.leaves).then(|| "closed without a word".into())
    }

    /// In a few words, for the table.
    pub(crate) fn shown(&self) -> String {
        let mut words = Vec::new();
        match self.passed {
            0 => {}
            1 => words.push("passed".to_owned()),
            count => words.push(format!("passed {count}")),
        }
        if let Some(why) = &self.illegal {
            words.push(format!("passed {why}"));
        }
        words.extend(self.refused.map(|status| status.to_string()));
        match &self.ends {
            Ends::Closed if words.is_empty() => words.push("closed".to_owned()),
            Ends::Closed => {}
            Ends::Silent if words.is_empty() => words.push("waits".to_owned()),
            Ends::Silent => {}
            Ends::Odd(_) => words.push("answers in another protocol".to_owned()),
        }
        if self.illegal.is_none() && !self.faults.is_empty() {
            words.push("and more".to_owned());
        }
        words.join(", ")
    }
}

const NEIGHBOUR: &str = "/neighbour";

/// A visitor of the same agent whose connection has nothing to do with any of it.
pub(crate) struct Neighbour(BufReader<TcpStream>);

impl Neighbour {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self(BufReader::new(connect(address)))
    }

    /// Asks once more; returned is what is wrong with the answer.
    pub(crate) fn asks(&mut self) -> Option<String> {
        let head = format!("GET {NEIGHBOUR} HTTP/1.1\r\nHost: h\r\n\r\n");
        let sent = self.0.get_mut().write_all(head.as_bytes());
        let answer = sent.and_then(|()| try_read_answer(&mut self.0, false));
        match answer {
            Ok(answer) if answer.text().contains(" GET /neighbour of 0 bytes") => None,
            Ok(answer) => Some(format!("a neighbour got {:?}", answer.text())),
            Err(error) => Some(format!("a neighbour got {error}")),
        }
    }
}
