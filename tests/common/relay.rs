//! A network between agents and their server that the test can break.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Relays TCP connections, and notes when each came. Ends with the test's process.
pub struct Relay {
    /// Where to connect.
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

struct State {
    target: SocketAddr,
    came: Vec<Instant>,
    open: Vec<Relayed>,
}

struct Relayed {
    client: TcpStream,
    target: TcpStream,
    /// The end of one is not passed on to the other.
    silent: Arc<AtomicBool>,
}

impl Relay {
    /// A relay to `target`.
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            target,
            came: Vec::new(),
            open: Vec::new(),
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let mut state = shared.lock().unwrap();
                state.came.push(Instant::now());
                // Without a target the client finds nobody, as it would without us.
                if let Ok(target) = TcpStream::connect(state.target) {
                    for stream in [&client, &target] {
                        stream.set_nodelay(true).unwrap();
                    }
                    let silent = Arc::new(AtomicBool::new(false));
                    copy(&client, &target, silent.clone());
                    copy(&target, &client, silent.clone());
                    state.open.push(Relayed {
                        client,
                        target,
                        silent,
                    });
                }
            }
        });
        Self { address, state }
    }

    /// When the connections came so far.
    pub fn came(&self) -> Vec<Instant> {
        self.state.lock().unwrap().came.clone()
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        for relayed in self.state.lock().unwrap().open.drain(..) {
            let _ = relayed.client.shutdown(Shutdown::Both);
            let _ = relayed.target.shutdown(Shutdown::Both);
        }
    }

    /// Breaks every connection in such a way that only the client notices. What is returned keeps
    /// the target's ends open.
    pub fn cut_clients(&self) -> Vec<TcpStream> {
        let open = std::mem::take(&mut self.state.lock().unwrap().open);
        open.into_iter()
            .map(|relayed| {
                relayed.silent.store(true, Ordering::Relaxed);
                let _ = relayed.client.shutdown(Shutdown::Both);
                relayed.target
            })
            .collect()
    }
}

/// Copies until one of the two ends, and ends the other one then.
fn copy(from: &TcpStream, to: &TcpStream, silent: Arc<AtomicBool>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        if !silent.load(Ordering::Relaxed) {
            let _ = to.shutdown(Shutdown::Both);
        }
    });
}
