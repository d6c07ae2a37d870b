//! silo-proxy: a reverse tunnel that gives every agent behind NAT an HTTP port of its own.
//!
//! A server runs on a reachable host. Agents, each next to a private HTTP service, dial out to it
//! and hold one gRPC stream each. Each connected agent owns one TCP port of the server; whatever
//! HTTP arrives there goes through the stream to the agent, which calls its service, and streams
//! back.
//!
//! ```text
//!                       the server's host                 ║ NAT ║        the agent's host
//!                                                         ║     ║
//!  visitor ── HTTP/1 ─► :8100 ─┐                          ║     ║
//!  visitor ── HTTP/1 ─► :8100 ─┼► exchanges ═ one stream ═╬═════╬═► agent ─ HTTP/1 ─► service
//!  visitor ── HTTP/2 ─► :8101 ─┘            (gRPC, :9090) ║     ║
//!  poller  ── HTTP/1 ─► :8080 (who is connected, where)   ║     ║
//! ```
//!
//! # The house
//! Dependencies point down only; `tests/layering.rs` keeps them so.
//!
//! | Level | Rooms |
//! | --- | --- |
//! | 5 shell | [`cli`]: one file a subcommand |
//! | 4 roles | [`server`] (registry, workers, ingress, admin), [`agent`] (reconnect, forward) |
//! | 3 link | [`link`]: a session behind a short lock, and the tasks that wait for it |
//! | 2 edges | [`config`], [`wire`] (Protocol Buffers), [`net`] (sockets, TLS, the acceptor), [`metrics`], [`telemetry`] |
//! | 1 cores, no I/O, no clock | [`mux`] (the protocol), [`grpc`] (the call that carries it), [`http1`] (HTTP/1 as values), [`http2`] (HTTP/2's heads), [`ports`] (who has which port), [`auth`] |
//! | 0 words | [`id`], [`head`], [`headers`], [`cors`], [`backoff`] |
//!
//! # The way of one request
//! 1. The accept task takes the visitor's connection from a listening socket, finds the port's
//!    tenancy in a concurrent map, and hands the socket to the worker on which that agent's tunnel
//!    lives. From here to the last byte everything happens on that worker's thread.
//! 2. The connection's task finds the end of the head ([`http1::HeadScan`]) and takes it apart,
//!    refuses what is ambiguous ([`headers::check_request`]), drops what belongs to one connection
//!    only, adds where the request came from ([`headers::forward_request`]) and opens an exchange
//!    ([`link::Link::open`]). A connection that begins with the preface of HTTP/2 is h2's, and each
//!    of its streams goes the same way with the same checks.
//! 3. The exchange takes a slot in the session's slab; slab key and generation name it on the wire.
//!    Its head waits for its turn in the session ([`mux::Session`]).
//! 4. The tunnel's task ([`link::Tunnel`]) is woken. It takes whatever is ready, from all
//!    exchanges, as one batch ([`mux::Session::transmit`]); [`wire`] makes a gRPC message of it, and
//!    [`grpc`] a frame.
//! 5. The agent's end does the same in reverse: its receiver finds the exchange, wakes the task of
//!    a service connection that is idle (or a new one), and that sends the request to the service.
//! 6. The answer comes back the same way: a small one as a single frame with head, body and end.
//!
//! A body streams: each piece is passed on as it comes, and is read from its source only while the
//! other side has granted credit for it. So a visitor who stops reading stops his own service, and
//! nobody else's.
//!
//! A request that offers another protocol (WebSocket) opens its exchange with a body to come, and
//! what the visitor sends waits on the server. If the service agrees with a 101, both directions
//! of the exchange carry bytes as they come, and the end of one is a FIN at the other end; no limit
//! of time holds any more. With any other answer the request has ended with its head, and what has
//! waited is the next request.
//!
//! # The life of a port
//! ```text
//!             request            bound             agent lost
//!   free ──────────────► opening ─────► serving ──────────────► leased
//!    ▲                     │               ▲   the agent is back  │ │
//!    │                     │ bind failed   └──────────────────────┘ │
//!    │ tried again         ▼                                        │
//!    ├──────────────── foreign                                      │
//!    └──────────────────────────────────────────────────────────────┘ lease over (at once by default)
//! ```
//! [`ports::Allocator`] decides, the accept task binds and closes, and reports back. What should
//! outlive the server is written to `http.state_file` by a thread of its own; the next server
//! starts with it: who was connected then has a lease, and its port is bound before it is back.
//!
//! # The life of a tunnel
//! ```text
//!   agent                                    server
//!     │ TCP, TLS if set, HTTP/2, Connect ─────► │ within grpc.handshake_timeout:
//!     │ Hello (id, credential, last port) ────► │ check version, id, credential or certificate; join
//!     │ ◄───────────── Welcome (port, limits)   │ or Rejection (why, retry after)
//!     │ ◄════════ frames, both ways ══════════► │ a heartbeat every 10 s, dead after 30 s
//!     │ ◄──────────────────────────── Drain ──► │ no new exchanges, those under way go on
//!     ▼ reconnects with backoff                 ▼ exchanges end with 502, the port is released
//! ```
//! A newer session of the same agent replaces the older one; who cleans up after a session shows
//! its generation, so the older one can't touch the newer one's port. The hello names the agent's
//! process: the older session of the same process is dead and ends at once, that of another one is
//! told, and that process doesn't get the id back while the newer one is connected.
//!
//! # Where time goes by
//! The cores get the time as an argument. A tunnel has one timer, for heartbeats. Visitors'
//! connections have none: each notes what it waits for, and a worker's sweep looks at all of them
//! twice a second.
//!
//! # What a panic takes with it
//! It is a bug, is counted and told ([`telemetry::watch_panics`]), and ends the task it happens in:
//! a visitor's connection, an agent's exchange, a session (its tunnel ends, its port is given back,
//! the agent comes back), an admin connection. Whatever counts or holds something gives it back
//! where it is dropped, and no lock minds being poisoned. The accept task, a worker thread and the
//! admin thread can't be replaced: with one of them the process ends, as a failure, after a drain
//! ([`server::Server::failed`]). So does an agent's process with its one session.
//!
//! # Settings that change
//! What a server is told is one value that a reload replaces as a whole; a request, a connection or
//! a session takes it once where it begins, so none goes by half of the old and half of the new.
//! [`config::table()`] knows for each setting whether it can change while the process runs.

pub mod agent;
pub mod auth;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod cors;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod grpc;
pub mod head;
pub mod headers;
pub mod http1;
pub mod http2;
pub mod id;
pub mod link;
pub mod metrics;
pub mod mux;
pub mod net;
pub mod ports;
pub mod server;
#[cfg(test)]
mod simulation;
pub mod telemetry;
pub mod wire;
