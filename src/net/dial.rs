//! Connecting to a host by name, whichever of its addresses answers.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::net::TcpStream;

use super::bound_unsent;

/// How long an address may be silent before the next one is tried beside it (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Connects to the first address of `host` that takes the connection.
///
/// The addresses are tried in the order of the resolver, but alternating between IPv6 and IPv4
/// (RFC 8305, section 4), a quarter of a second apart: where one of the two leads nowhere, that
/// costs a moment and not the connection. If none answers, the error is that of the first.
///
/// The connection has `TCP_NODELAY`, since what is written here is whole, and [`bound_unsent`]: what
/// was handed to the kernel ahead of time no heartbeat can overtake.
///
/// There is no limit of time for the whole; whoever calls sets it.
pub async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses = tokio::net::lookup_host((host, port)).await?;
    let pause = || tokio::time::sleep(ATTEMPT_DELAY);
    let stream = race(alternating(addresses), TcpStream::connect, pause).await?;
    stream.set_nodelay(true)?;
    bound_unsent(&stream)?;
    Ok(stream)
}

/// The addresses, the families taking turns, beginning with that of the first.
fn alternating(addresses: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut addresses = addresses.peekable();
    let v6_first = addresses.peek().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for address in addresses {
        if address.is_ipv6() == v6_first {
            first.push(address);
        } else {
            second.push(address);
        }
    }
    let mut second = second.into_iter();
    let mut turns = Vec::new();
    for address in first {
        turns.push(address);
        turns.extend(second.next());
    }
    turns.extend(second);
    turns
}

/// The first success among attempts that begin one after the other, each when the one before has
/// failed or its `pause` is over. Those still under way are dropped.
async fn race<T, F, P>(
    addresses: Vec<SocketAddr>,
    attempt: impl Fn(SocketAddr) -> F,
    pause: impl Fn() -> P,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
    P: Future<Output = ()>,
{
    let mut attempts = FuturesUnordered::new();
    let mut failure = None;
    for address in addresses {
        attempts.push(attempt(address));
        match select(attempts.next(), pin!(pause())).await {
            Either::Left((Some(Ok(stream)), _)) => return Ok(stream),
            Either::Left((Some(Err(error)), _)) => failure = failure.or(Some(error)),
            Either::Left((None, _)) | Either::Right(_) => {}
        }
    }
    while let Some(outcome) = attempts.next().await {
        match outcome {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no address")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::pin::Pin;

    use futures_util::FutureExt;
    use futures_util::future::{pending, ready};
    use tokio::sync::oneshot;

    fn v4(last: u8) -> SocketAddr {
        (Ipv4Addr::new(192, 0, 2, last), 9090).into()
    }

    fn v6(last: u16) -> SocketAddr {
        (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last), 9090).into()
    }

    #[test]
    fn families_take_turns() {
        let order = |addresses: &[SocketAddr]| alternating(addresses.iter().copied());
        assert_eq!(
            order(&[v6(1), v6(2), v6(3), v4(1), v4(2)]),
            [v6(1), v4(1), v6(2), v4(2), v6(3)]
        );
        assert_eq!(
            order(&[v4(1), v4(2), v6(1), v6(2), v6(3)]),
            [v4(1), v6(1), v4(2), v6(2), v6(3)]
        );
        assert_eq!(order(&[]), []);
    }

    type Attempt = Pin<Box<dyn Future<Output = io::Result<SocketAddr>>>>;

    fn answers(address: SocketAddr) -> Attempt {
        Box::pin(ready(Ok(address)))
    }

    fn refuses() -> Attempt {
        Box::pin(ready(Err(io::ErrorKind::ConnectionRefused.into())))
    }

    fn is_silent() -> Attempt {
        Box::pin(pending())
    }

    /// What became of a race, and which addresses were tried.
    fn outcome<P: Future<Output = ()>>(
        addresses: &[SocketAddr],
        attempt: impl Fn(SocketAddr) -> Attempt,
        pause: impl Fn() -> P,
    ) -> (Option<Result<SocketAddr, io::ErrorKind>>, Vec<SocketAddr>) {
        let tried = RefCell::new(Vec::new());
        let attempt = |address| {
            tried.borrow_mut().push(address);
            attempt(address)
        };
        let outcome = race(addresses.to_vec(), attempt, pause).now_or_never();
        let outcome = outcome.map(|outcome| outcome.map_err(|error| error.kind()));
        (outcome, tried.into_inner())
    }

    #[test]
    fn an_address_that_answers_is_the_only_one_tried() {
        let (outcome, tried) = outcome(&[v6(1), v4(1)], answers, pending);
        assert_eq!((outcome, tried), (Some(Ok(v6(1))), vec![v6(1)]));
    }

    #[test]
    fn a_silent_address_costs_a_pause() {
        let silent_v6 = |address: SocketAddr| match address.is_ipv6() {
            true => is_silent(),
            false => answers(address),
        };
        let addresses = [v6(1), v4(1)];
        let (before, _) = outcome(&addresses, silent_v6, pending);
        assert_eq!(before, None);
        let (after, _) = outcome(&addresses, silent_v6, || ready(()));
        assert_eq!(after, Some(Ok(v4(1))));
    }

    #[test]
    fn a_slow_address_may_still_win() {
        let (second_begins, begun) = oneshot::channel();
        let parts = RefCell::new((Some(second_begins), Some(begun)));
        let attempt = |address: SocketAddr| {
            let (second_begins, begun) = &mut *parts.borrow_mut();
            if address == v6(1) {
                let begun = begun.take().unwrap();
                let attempt =
                    async move { begun.await.map(|()| address).map_err(io::Error::other) };
                Box::pin(attempt) as Attempt
            } else {
                second_begins.take().unwrap().send(()).unwrap();
                is_silent()
            }
        };
        let (outcome, tried) = outcome(&[v6(1), v4(1)], attempt, || ready(()));
        assert_eq!((outcome, tried.len()), (Some(Ok(v6(1))), 2));
    }

    #[test]
    fn after_a_refusal_the_next_is_tried_at_once() {
        let attempt = |address: SocketAddr| match address == v4(2) {
            true => answers(address),
            false => refuses(),
        };
        let (outcome, _) = outcome(&[v6(1), v4(1), v4(2)], attempt, pending);
        assert_eq!(outcome, Some(Ok(v4(2))));
    }

    #[test]
    fn the_first_failure_is_told() {
        let attempt = |address: SocketAddr| match address.is_ipv6() {
            true => refuses(),
            false => Box::pin(ready(Err(io::ErrorKind::TimedOut.into()))),
        };
        let (outcome, tried) = outcome(&[v6(1), v4(1)], attempt, pending);
        assert_eq!(outcome, Some(Err(io::ErrorKind::ConnectionRefused)));
        assert_eq!(tried.len(), 2);
    }
}
