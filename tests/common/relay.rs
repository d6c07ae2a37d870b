//! A network between agents and their server that the test can break.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
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
    /// The two ends of each connection that was relayed: the client's and the target's.
    open: Vec<(TcpStream, TcpStream)>,
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
                    copy(&client, &target);
                    copy(&target, &client);
                    state.open.push((client, target));
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
        for (client, target) in self.state.lock().unwrap().open.drain(..) {
            let _ = client.shutdown(Shutdown::Both);
            let _ = target.shutdown(Shutdown::Both);
        }
    }

    /// Breaks every connection in such a way that only the client notices. What is returned keeps
    /// the target's ends open.
    pub fn cut_clients(&self) -> Vec<TcpStream> {
        let open = std::mem::take(&mut self.state.lock().unwrap().open);
        open.into_iter()
            .map(|(client, target)| {
                let _ = client.shutdown(Shutdown::Both);
                target
            })
            .collect()
    }
}

/// Copies until one of the two breaks, and leaves both open then.
fn copy(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count) = from.read(&mut buffer) {
            if count == 0 || to.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
}
