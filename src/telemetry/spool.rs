//! Lines on their way out, written by a thread of their own.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::metrics::Counter;

/// What a queue that was full for a moment keeps of its memory, in bytes.
const KEPT: usize = 64 * 1024;

/// How soon an output that would block, though it is ours to wait for, is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Where lines go in the end.
pub trait Output: Send + 'static {
    /// Writes whole lines. It may block: it is called on the spool's own thread.
    fn write(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Opens it again under the same name, after somebody has moved it away. What has no name
    /// stays as it is.
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Box<dyn Output> {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        (**self).write(lines)
    }

    fn reopen(&mut self) -> io::Result<()> {
        (**self).reopen()
    }
}

/// What a spool has to say of itself. It is told on the spool's own thread.
#[derive(Debug)]
pub enum Report {
    /// There was no room for so many lines; now there is again.
    Dropped(u64),
    /// Lines couldn't be written. Told once, until some can be again.
    Failed(io::Error),
    /// They can be written again.
    Recovered,
    /// The output couldn't be opened again; the old one is kept.
    NotReopened(io::Error),
}

/// A bounded queue of lines, and the thread that writes them.
///
/// Whoever has a line never waits for the output: when the queue is full, because a pipe is
/// stuck or a disk is slow, the line is dropped and counted. Dropping the spool lets the thread
/// write what is queued and end.
#[derive(Debug)]
pub struct Spool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Bytes that may wait.
    capacity: usize,
    /// Held to copy a line, never while anything is written.
    queue: Mutex<Queue>,
    /// Wakes the thread: there are lines, or orders.
    filled: Condvar,
    /// Wakes who flushes: lines have been written.
    written: Condvar,
    /// Lines that were never written.
    dropped: Arc<Counter>,
}

#[derive(Debug, Default)]
struct Queue {
    lines: Vec<u8>,
    /// How many lines those are.
    count: u64,
    /// Lines dropped since the thread looked last.
    dropped: u64,
    /// Lines put in, and lines taken out and dealt with, since the start: who flushes waits for
    /// the second to reach the first.
    put: u64,
    done: u64,
    /// The thread waits, and has to be woken.
    idle: bool,
    reopen: bool,
    closed: bool,
}

impl Spool {
    /// Starts the thread. At most `capacity` bytes wait for it; `dropped` counts the lines that
    /// are never written, and `report` hears what happens.
    pub fn start(
        name: &str,
        capacity: usize,
        output: impl Output,
        dropped: Arc<Counter>,
        report: impl FnMut(Report) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            capacity,
            queue: Mutex::default(),
            filled: Condvar::new(),
            written: Condvar::new(),
            dropped,
        });
        let thread = Writer {
            shared: shared.clone(),
            output,
            report,
            failing: false,
        };
        thread::Builder::new()
            .name(name.into())
            .spawn(move || thread.run())?;
        Ok(Self { shared })
    }

    /// Queues a line, which ends with its newline, or drops it if there is no room.
    pub fn push(&self, line: &[u8]) {
        let mut queue = self.shared.lock();
        if queue.lines.len() + line.len() > self.shared.capacity {
            queue.dropped += 1;
            self.shared.dropped.inc();
            return;
        }
        queue.lines.extend_from_slice(line);
        queue.count += 1;
        queue.put += 1;
        if std::mem::take(&mut queue.idle) {
            self.shared.filled.notify_one();
        }
    }

    /// Has the output opened again, see [`Output::reopen`]. Doesn't wait for it.
    pub fn reopen(&self) {
        self.order(|queue| queue.reopen = true);
    }

    /// Waits until the lines queued so far have been written, but not longer than `limit`. Says
    /// whether they have.
    pub fn flush(&self, limit: Duration) -> bool {
        let queue = self.shared.lock();
        let put = queue.put;
        let (_queue, timeout) = self
            .shared
            .written
            .wait_timeout_while(queue, limit, |queue| queue.done < put)
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    fn order(&self, order: impl FnOnce(&mut Queue)) {
        let mut queue = self.shared.lock();
        order(&mut queue);
        queue.idle = false;
        self.shared.filled.notify_one();
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.order(|queue| queue.closed = true);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread.
struct Writer<O, R> {
    shared: Arc<Shared>,
    output: O,
    report: R,
    /// The last lines couldn't be written, which has been said.
    failing: bool,
}

impl<O: Output, R: FnMut(Report)> Writer<O, R> {
    fn run(mut self) {
        let shared = self.shared.clone();
        let mut batch = Vec::new();
        loop {
            let mut queue = shared.lock();
            while queue.lines.is_empty() && !queue.reopen && !queue.closed {
                queue.idle = true;
                queue = shared
                    .filled
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if queue.lines.is_empty() && !queue.reopen {
                return;
            }
            std::mem::swap(&mut queue.lines, &mut batch);
            let count = std::mem::take(&mut queue.count);
            let dropped = std::mem::take(&mut queue.dropped);
            let reopen = std::mem::take(&mut queue.reopen);
            let put = queue.put;
            drop(queue);

            if dropped > 0 {
                // Now there is room for whatever the report puts in.
                (self.report)(Report::Dropped(dropped));
            }
            if reopen && let Err(error) = self.output.reopen() {
                (self.report)(Report::NotReopened(error));
            }
            if !batch.is_empty() {
                self.write(&batch, count);
            }
            batch.clear();
            batch.shrink_to(KEPT);
            shared.lock().done = put;
            shared.written.notify_all();
        }
    }

    fn write(&mut self, lines: &[u8], count: u64) {
        match self.output.write(lines) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    (self.report)(Report::Recovered);
                }
            }
            Err(error) => {
                self.shared.dropped.add(count);
                if !std::mem::replace(&mut self.failing, true) {
                    (self.report)(Report::Failed(error));
                }
            }
        }
    }
}

/// Standard error.
#[derive(Debug)]
pub struct Stderr;

impl Output for Stderr {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        write_all(&mut io::stderr().lock(), lines)
    }
}

/// Standard output.
#[derive(Debug)]
pub struct Stdout;

impl Output for Stdout {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        write_all(&mut stdout, lines)?;
        stdout.flush()
    }
}

/// A file that grows at its end, whoever else writes it or cuts it off.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Opens the file, or makes it, readable by its owner and group.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: open(path)?,
            path: path.to_owned(),
        })
    }
}

impl Output for LogFile {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        write_all(&mut self.file, lines)
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        // To open a pipe that nobody reads fails instead of waiting for a reader.
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
        options.mode(0o640).custom_flags(nonblocking.cast_signed());
    }
    options.open(path)
}

/// As [`Write::write_all`], but waits where another process has made a shared pipe or terminal
/// non-blocking.
fn write_all(output: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::park_timeout(RETRY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// An output that hands its lines to the test, and waits for a word after each batch.
    struct Gate {
        lines: Sender<String>,
        go: Receiver<io::Result<()>>,
        opened: usize,
    }

    impl Output for Gate {
        fn write(&mut self, lines: &[u8]) -> io::Result<()> {
            let text = String::from_utf8_lossy(lines).into_owned();
            self.lines.send(format!("{}:{text}", self.opened)).unwrap();
            self.go.recv().unwrap_or(Ok(()))
        }

        fn reopen(&mut self) -> io::Result<()> {
            self.opened += 1;
            if self.opened > 1 {
                return Err(ErrorKind::NotFound.into());
            }
            Ok(())
        }
    }

    struct Rig {
        spool: Spool,
        lines: Receiver<String>,
        go: Sender<io::Result<()>>,
        reports: Receiver<String>,
        dropped: Arc<Counter>,
    }

    fn rig(capacity: usize) -> Rig {
        let (lines_in, lines) = channel();
        let (go, go_out) = channel();
        let (said, reports) = channel();
        let gate = Gate {
            lines: lines_in,
            go: go_out,
            opened: 0,
        };
        let dropped = Arc::new(Counter::default());
        let spool = Spool::start("test", capacity, gate, dropped.clone(), move |report| {
            let text = match report {
                Report::Dropped(count) => format!("dropped {count}"),
                Report::Failed(_) => "failed".into(),
                Report::Recovered => "recovered".into(),
                Report::NotReopened(_) => "not reopened".into(),
            };
            let _ = said.send(text);
        })
        .unwrap();
        Rig {
            spool,
            lines,
            go,
            reports,
            dropped,
        }
    }

    #[test]
    fn a_stuck_output_drops_lines_and_says_so_when_it_goes_on() {
        let rig = rig(8);
        rig.spool.push(b"a\n");
        assert_eq!(rig.lines.recv_timeout(LONG).unwrap(), "0:a\n");
        // The output is stuck with the first; four of the next find room.
        for _ in 0..7 {
            rig.spool.push(b"b\n");
        }
        assert_eq!(rig.dropped.get(), 3);
        assert!(!rig.spool.flush(Duration::ZERO));
        assert!(rig.reports.try_recv().is_err());

        rig.go.send(Ok(())).unwrap();
        assert_eq!(rig.lines.recv_timeout(LONG).unwrap(), "0:b\nb\nb\nb\n");
        assert_eq!(rig.reports.recv_timeout(LONG).unwrap(), "dropped 3");
        rig.go.send(Ok(())).unwrap();
        assert!(rig.spool.flush(LONG));

        // Once.
        rig.go.send(Ok(())).unwrap();
        rig.spool.push(b"c\n");
        assert!(rig.spool.flush(LONG));
        assert!(rig.reports.try_recv().is_err());
        // What fits nowhere is dropped too.
        rig.spool.push(b"longer than all\n");
        assert_eq!(rig.dropped.get(), 4);
    }

    #[test]
    fn a_failing_output_is_said_once_until_it_works_again() {
        let rig = rig(100);
        for outcome in [false, false, true, false] {
            let outcome = outcome.then_some(()).ok_or(ErrorKind::StorageFull.into());
            rig.go.send(outcome).unwrap();
            rig.spool.push(b"a\n");
            assert!(rig.spool.flush(LONG));
        }
        assert_eq!(rig.dropped.get(), 3);
        let reports: Vec<String> = rig.reports.try_iter().collect();
        assert_eq!(reports, ["failed", "recovered", "failed"]);
    }

    #[test]
    fn it_is_reopened_between_lines_and_ends_with_its_last() {
        let Rig {
            spool,
            lines,
            go,
            reports,
            dropped: _,
        } = rig(100);
        go.send(Ok(())).unwrap();
        spool.push(b"a\n");
        assert!(spool.flush(LONG));
        spool.reopen();
        spool.push(b"b\n");
        go.send(Ok(())).unwrap();
        assert!(spool.flush(LONG));
        spool.reopen();
        assert_eq!(reports.recv_timeout(LONG).unwrap(), "not reopened");
        spool.push(b"c\n");
        drop(spool);
        drop(go);
        let all: Vec<String> = lines.iter().collect();
        assert_eq!(all, ["0:a\n", "1:b\n", "2:c\n"]);
    }
}
