//! The tunnel is a gRPC call like any other: proxies of other makes carry it from the agent to the
//! server.

use std::net::SocketAddr;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use tonic::server::StreamingService;
use tonic::{Request, Response, Status, Streaming};

use crate::common::daemon::Daemon;
use crate::common::raw::{Recorder, pattern};
use crate::common::{Server, get, have, port_range, request};
use crate::grpc::{Channel, Messages, Raw};
use crate::service::{listen, serve};

/// The one method there is.
const METHOD: &str = "/silo.tunnel.v1.Tunnel/Connect";

/// A proxy made of tonic: it reads messages here and says them there.
#[derive(Clone, Copy)]
struct Proxy(SocketAddr);

impl StreamingService<Vec<u8>> for Proxy {
    type Response = Vec<u8>;
    type ResponseStream = Messages;
    type Future = BoxFuture<'static, Result<Response<Messages>, Status>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let server = self.0;
        Box::pin(async move {
            let mut grpc = Channel::connect(server).await.grpc().await;
            // What the agent's side breaks off with, a request can't say: it ends.
            let said = request.into_inner().take_while(|message| {
                let goes_on = message.is_ok();
                async move { goes_on }
            });
            let said = said.filter_map(|message| async { message.ok() });
            let path = METHOD.parse().unwrap();
            let answer = grpc.streaming(Request::new(said), path, Raw).await?;
            let messages =
                stream::unfold((answer.into_inner(), grpc), |(mut messages, grpc)| async {
                    let message = messages.message().await.transpose()?;
                    Some((message, (messages, grpc)))
                });
            Ok(Response::new(Box::pin(messages) as Messages))
        })
    }
}

/// What passes when the agent reaches the server by way of `proxy`: small and large, one after the
/// other and at once; and both sides hear of the other's end.
fn carries_a_tunnel(server: Server, proxy: SocketAddr) {
    let service = Recorder::echoing();
    let through = [("grpc.server_address", &*proxy.to_string())];
    let mut agent = server.agent_with("behind-a-proxy", service.address, &through);
    let address = agent.address();
    for _ in 0..20 {
        assert_eq!(get(address, "/").status, 200);
    }
    std::thread::scope(|scope| {
        for size in [1, 1000, 100_000, 3_000_000, 5_000_000] {
            scope.spawn(move || {
                let body = pattern(size);
                let answer = request(address, "POST", "/", &[], &body);
                assert!(answer.body == body, "{size} bytes");
            });
        }
    });
    agent.process.signal("TERM");
    server
        .process
        .wait_for(&["agent deregistered", "why=the peer closed the session"]);
    assert!(agent.process.wait().success());
    let agent = server.agent_with("behind-a-proxy", service.address, &through);
    server.process.signal("TERM");
    agent.process.wait_for(&["the server is shutting down"]);
}

#[test]
fn a_proxy_made_of_tonic_carries_a_tunnel() {
    let server = Server::with(port_range(4), &[]);
    let proxy = Proxy(server.tunnel);
    let address = listen(move |_, stream| {
        serve(stream, move |request| async move {
            assert_eq!(request.uri().path(), METHOD);
            tonic::server::Grpc::new(Raw)
                .streaming(proxy, request)
                .await
        });
    });
    carries_a_tunnel(server, address);
}

#[test]
fn nginx_carries_a_tunnel() {
    if !have("nginx", "nginx-light") {
        return;
    }
    let server = Server::with(port_range(4), &[]);
    let address = SocketAddr::from(([127, 0, 0, 1], *port_range(1).start()));
    let _nginx = Daemon::nginx(&format!(
        "listen {address} http2;\nclient_max_body_size 0;\n\
         location / {{ grpc_pass grpc://{}; }}",
        server.tunnel
    ));
    carries_a_tunnel(server, address);
}
