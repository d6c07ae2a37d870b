//! Where services of the tests listen.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};

/// Listens on a thread of its own, and hands out each connection with its number, in order. Tasks
/// may be spawned there.
pub fn listen(serve: impl Fn(usize, TcpStream) + Send + 'static) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    std::thread::spawn(move || {
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                serve(number, stream);
            }
        });
    });
    address
}
