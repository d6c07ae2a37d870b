//! Whoever leaves in the middle of an exchange is noticed at the other end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::raw::{
    channel, pattern, read_request, read_to_close, reset, send, settles, take,
};
use crate::common::{Agent, Server, connect, eventually, pause, read_answer, read_head, service};

/// How soon a leave has to be seen.
const SOON: Duration = Duration::from_secs(1);

/// Has a visitor do something and leave, and the service report when it saw the end of its
/// connection. Other programs may keep the machine busy: the best of three counts.
fn noticed_soon(server: &Server, gone: &Receiver<Instant>, mut leave: impl FnMut() -> Instant) {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let left = leave();
        let seen = take(gone, "the close at the service");
        best = best.min(seen.saturating_duration_since(left));
        settles(server);
        if best <= SOON {
            return;
        }
    }
    panic!("the service saw it after {best:?}");
}

fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> (Server, Agent) {
    let address = service(serve);
    let server = Server::start();
    let agent = server.agent("a", address);
    (server, agent)
}

#[test]
fn a_visitor_leaves_while_he_waits_for_the_head() {
    let (begun, started) = channel();
    let (sender, gone) = channel();
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = begun.lock().unwrap().send(());
        let _ = stream.read(&mut [0]);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let visitor = send(agent.address(), "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        take(&started, "the head at the service");
        drop(visitor);
        Instant::now()
    });
    assert!(server.metric("silo_failures_total", "visitor_left") >= 1.0);
    assert_eq!(server.metric("silo_answers_total", ""), 0.0);
}

/// His next request has been read already, so that his FIN stands behind it.
#[test]
fn a_visitor_leaves_behind_a_pipelined_request() {
    let (begun, started) = channel();
    let (sender, gone) = channel();
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = begun.lock().unwrap().send(());
        let _ = stream.read(&mut [0]);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let visitor = send(
            agent.address(),
            "GET /1 HTTP/1.1\r\nHost: h\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n",
        );
        take(&started, "the head at the service");
        drop(visitor);
        Instant::now()
    });
}

/// Before the answer is complete, a FIN counts as leaving.
#[test]
fn a_visitor_closes_his_side_only() {
    let (begun, started) = channel();
    let (sender, gone) = channel();
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = begun.lock().unwrap().send(());
        let _ = stream.read(&mut [0]);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let visitor = send(agent.address(), "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        take(&started, "the head at the service");
        visitor.shutdown(std::net::Shutdown::Write).unwrap();
        let left = Instant::now();
        // Held open until the service has seen it.
        settles(&server);
        left
    });
}

#[test]
fn a_visitor_leaves_in_the_middle_of_an_answer() {
    let (sender, gone) = channel();
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let _ = stream.write_all(b"5\r\nhello\r\n");
        let _ = stream.read(&mut [0]);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let mut visitor = send(agent.address(), "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        read_head(&mut visitor).unwrap();
        drop(visitor);
        Instant::now()
    });
    assert!(server.metric("silo_failures_total", "visitor_left") >= 1.0);
}

/// He has stopped reading before, so that everything on the way is full.
#[test]
fn a_visitor_leaves_in_the_middle_of_an_answer_that_he_does_not_read() {
    let (sender, gone) = channel();
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
        let piece = pattern(64 * 1024);
        while stream.write_all(&piece).is_ok() {}
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let mut visitor = send(agent.address(), "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
        read_head(&mut visitor).unwrap();
        let full = |server: &Server| server.metric("silo_body_bytes_out_total", "");
        let mut before = -1.0;
        eventually(Duration::from_secs(20), "everything is full", || {
            // What isn't taken within a while is waiting.
            let now = full(&server);
            let stands = now > 0.0 && now == before;
            before = now;
            for _ in 0..20 {
                crate::common::pause();
            }
            stands
        });
        drop(visitor);
        Instant::now()
    });
}

#[test]
fn a_visitor_leaves_in_the_middle_of_an_upload() {
    for framing in ["Content-Length: 1000000", "Transfer-Encoding: chunked"] {
        let (sender, gone) = channel();
        let (begun, started) = channel();
        let (server, agent) = start(move |mut stream| {
            let _ = read_head(&mut stream);
            let _ = stream.read_exact(&mut [0; 5]);
            let _ = begun.lock().unwrap().send(());
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            let _ = sender.lock().unwrap().send(Instant::now());
            // It must not look complete.
            assert!(!rest.ends_with(b"0\r\n\r\n"));
        });
        noticed_soon(&server, &gone, || {
            let mut visitor = send(
                agent.address(),
                format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n5\r\nhello\r\n"),
            );
            take(&started, "the beginning of the upload");
            visitor.flush().unwrap();
            drop(visitor);
            Instant::now()
        });
    }
}

/// The service has stopped reading, so that nobody on the way reads either. The visitor's FIN
/// would wait behind what he has sent; a reset comes through.
#[test]
fn a_visitor_leaves_in_the_middle_of_an_upload_that_nobody_reads() {
    let (sender, gone) = channel();
    let (go, may_go) = channel::<()>();
    let may_go = Mutex::new(may_go);
    let (server, agent) = start(move |mut stream| {
        let _ = read_head(&mut stream);
        // What is on the way stands between the service and the end of it.
        take(&may_go.lock().unwrap(), "leave to read");
        let (body, _) = read_to_close(&mut stream);
        assert!(body.len() < 1_000_000_000);
        let _ = sender.lock().unwrap().send(Instant::now());
    });
    noticed_soon(&server, &gone, || {
        let mut visitor = connect(agent.address());
        visitor
            .write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n")
            .unwrap();
        visitor
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let piece = pattern(64 * 1024);
        while visitor.write_all(&piece).is_ok() {}
        reset(visitor);
        let left = Instant::now();
        // The exchange is over before the service has read anything.
        settles(&server);
        go.lock().unwrap().send(()).unwrap();
        left
    });
}

/// The reverse: the service leaves while the visitor uploads.
#[test]
fn a_service_that_leaves_in_the_middle_of_an_upload_is_noticed() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.read_exact(&mut [0; 100]);
    });
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    let mut writer = visitor.try_clone().unwrap();
    let sending = thread::spawn(move || {
        let chunk = crate::common::raw::chunked(&pattern(10_000));
        let chunk = &chunk[..chunk.len() - 5];
        // Until the connection is closed here too.
        while writer.write_all(chunk).is_ok() {
            crate::common::pause();
        }
    });
    let began = Instant::now();
    let answer = read_answer(&mut visitor, false);
    assert_eq!(answer.status, 502);
    assert_eq!(answer.header("x-silo-error"), ["upstream_error"]);
    assert!(began.elapsed() < Duration::from_secs(5));
    sending.join().unwrap();
    settles(&server);
}

/// curl and browsers read while they send; the answer reaches them before the connection closes.
#[test]
fn an_early_answer_reaches_a_visitor_who_still_uploads() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ =
            stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 7\r\n\r\ntoo big");
        // A well-behaved service lingers, without reading all of it.
        let _ = stream.read(&mut [0; 1000]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0; 1000]);
    });
    let mut visitor = send(
        agent.address(),
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10485760\r\n\r\n",
    );
    let mut writer = visitor.try_clone().unwrap();
    let sending = thread::spawn(move || {
        let _ = writer.write_all(&pattern(10 * 1024 * 1024));
    });
    let answer = read_answer(&mut visitor, false);
    assert_eq!((answer.status, answer.text().as_str()), (413, "too big"));
    sending.join().unwrap();
    settles(&server);
}

/// Neither does it escape a visitor who sends everything before he reads anything.
#[test]
fn an_early_answer_reaches_a_visitor_who_reads_late() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ =
            stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 7\r\n\r\ntoo big");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0; 1000]);
    });
    for framing in ["Content-Length: 2000000", "Transfer-Encoding: chunked"] {
        let mut visitor = connect(agent.address());
        let head = format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n");
        visitor.write_all(head.as_bytes()).unwrap();
        let body = pattern(2_000_000);
        let body = match framing.starts_with('C') {
            true => body,
            false => crate::common::raw::chunked(&body),
        };
        visitor.write_all(&body).unwrap();
        let answer = read_answer(&mut visitor, false);
        assert_eq!((answer.status, answer.text().as_str()), (413, "too big"));
    }
    settles(&server);
}

/// Nor one whose link takes longer for the upload than anybody waits for a visitor who is silent.
#[test]
fn an_early_answer_reaches_a_visitor_who_uploads_slowly() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ =
            stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 7\r\n\r\ntoo big");
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let began = Instant::now();
    let head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut visitor = send(agent.address(), head);
    let chunk = crate::common::raw::chunked(&pattern(20_000));
    let (chunk, end) = chunk.split_at(chunk.len() - 5);
    while began.elapsed() < Duration::from_secs(4) {
        visitor.write_all(chunk).unwrap();
        pause();
    }
    visitor.write_all(end).unwrap();
    let answer = read_answer(&mut visitor, false);
    assert_eq!((answer.status, answer.text().as_str()), (413, "too big"));
    assert_eq!(read_to_close(&mut visitor), (Vec::new(), false));
    settles(&server);
}

/// Whoever never comes to an end isn't waited for for ever.
#[test]
#[ignore = "waits for half a minute"]
fn a_visitor_who_uploads_for_ever_is_cut() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\n\r\n");
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let began = Instant::now();
    let head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut visitor = send(agent.address(), head);
    // Soon it is more than is drained so that the connection can be used again.
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    while visitor.write_all(chunk.as_bytes()).is_ok() {
        pause();
    }
    let took = began.elapsed();
    assert!(took > Duration::from_secs(20), "only {took:?}");
    assert!(took < Duration::from_secs(40), "as long as {took:?}");
    settles(&server);
}

/// What is left of a small body is read, and the connection is used again.
#[test]
fn an_early_answer_to_a_small_upload_keeps_the_connection() {
    let (server, agent) = start(|mut stream| {
        let _ = read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut visitor = connect(agent.address());
    for _ in 0..3 {
        visitor
            .write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 20000\r\n\r\n")
            .unwrap();
        assert_eq!(read_answer(&mut visitor, false).text(), "early");
        visitor.write_all(&pattern(20_000)).unwrap();
    }
    settles(&server);
}

/// A connection to the service that carries an unfinished exchange is never used again.
#[test]
fn what_a_visitor_left_behind_reaches_nobody_else() {
    let (server, agent) = start(|mut stream| {
        while let Ok(request) = read_request(&mut stream) {
            let target = request.line();
            if target.contains("/slow") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nslow");
                // The rest comes when nobody waits for it any more.
                let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
                let _ = stream.read(&mut [0]);
                let _ = stream.write_all(b"-slow-");
                let _ = stream.set_read_timeout(None);
            } else {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfast");
            }
        }
    });
    for _ in 0..20 {
        let mut visitor = send(agent.address(), "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n");
        read_head(&mut visitor).unwrap();
        drop(visitor);
        let mut other = send(agent.address(), "GET /fast HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(read_answer(&mut other, false).text(), "fast");
    }
    settles(&server);
}
