//! When to try again.

use std::time::Duration;

use crate::backoff::Backoff;
use crate::net::tls::Failed;
use crate::wire::RejectionReason;

use super::session::Lost;

/// A session that lived as long as this was a success, and the next wait is short again. One that
/// is welcomed and dropped at once is none, else a broken server would be asked without a pause.
const SUCCESS: Duration = Duration::from_secs(10);

/// The least wait after a rejection that only a person can mend, and after another agent took the
/// id: two agents with one id would drive each other out without a pause.
const SLOW: Duration = Duration::from_secs(30);

/// Decides how long to wait before the next session.
pub(super) struct Reconnect<R> {
    backoff: Backoff,
    /// Uniform over all of `u64`.
    random: R,
}

impl<R: Fn() -> u64> Reconnect<R> {
    pub(super) fn new(random: R) -> Self {
        Self {
            backoff: Backoff::default(),
            random,
        }
    }

    /// The wait after a session ended that had `lived` so long since its welcome; after one that
    /// never came about, it has lived for no time.
    ///
    /// What the server asks for is obeyed: the wait is that long at least, and up to a quarter
    /// longer, so that those who were rejected together don't come back together.
    pub(super) fn after(&mut self, ended: &Lost, lived: Duration) -> Duration {
        if lived >= SUCCESS {
            self.backoff.reset();
        }
        let least = match ended {
            Lost::Rejected {
                reason,
                retry_after,
                ..
            } => match (reason, retry_after) {
                (RejectionReason::Replaced, asked) => asked.unwrap_or_default().max(SLOW),
                (_, Some(asked)) => *asked,
                (
                    RejectionReason::Auth
                    | RejectionReason::Version
                    | RejectionReason::Malformed
                    | RejectionReason::Duplicate,
                    None,
                ) => SLOW,
                (_, None) => return self.backoff.next((self.random)()),
            },
            // A connection that breaks within the handshake may hold the next time; the rest is a
            // rejection as well, be it of one side or of the other.
            Lost::Tls(Failed::Connection(_)) => return self.backoff.next((self.random)()),
            Lost::Tls(_) | Lost::ServerSpeaksTls => SLOW,
            _ => return self.backoff.next((self.random)()),
        };
        let jitter = Backoff::new(least / 4, least / 4).next((self.random)());
        least + jitter
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tls::Refused;

    fn reconnect() -> Reconnect<impl Fn() -> u64> {
        Reconnect::new(|| u64::MAX)
    }

    fn rejected(reason: RejectionReason, retry_after: Option<u64>) -> Lost {
        Lost::Rejected {
            reason,
            detail: String::new(),
            retry_after: retry_after.map(Duration::from_millis),
        }
    }

    #[test]
    fn only_a_session_that_lived_shortens_the_next_wait() {
        let mut reconnect = reconnect();
        let almost = SUCCESS - Duration::from_millis(1);
        for (lived, wait) in [
            (Duration::ZERO, 200),
            (Duration::ZERO, 400),
            (almost, 800),
            (SUCCESS, 200),
            (Duration::ZERO, 400),
        ] {
            let drawn = reconnect.after(&Lost::NoWelcome(SLOW), lived);
            assert_eq!(drawn.as_millis(), wait);
        }
    }

    #[test]
    fn what_tls_refuses_is_a_rejection() {
        let mut reconnect = reconnect();
        for ended in [
            Lost::ServerSpeaksTls,
            Lost::Tls(Failed::NotTls),
            Lost::Tls(Failed::Refused(Refused::Purpose("servers"))),
            Lost::Tls(Failed::Alert(rustls::AlertDescription::UnknownCA)),
        ] {
            let wait = reconnect.after(&ended, Duration::ZERO);
            assert_eq!(wait.as_millis(), 37_500, "{ended:?}");
        }
        let broken = Failed::Connection(std::io::ErrorKind::UnexpectedEof.into());
        let wait = reconnect.after(&Lost::Tls(broken), Duration::ZERO);
        assert_eq!(wait.as_millis(), 200);
    }

    #[test]
    fn a_rejection_is_obeyed() {
        let mut most = reconnect();
        let mut least = Reconnect::new(|| 0);
        for (reason, asked, range) in [
            (RejectionReason::PortExhausted, Some(1_000), 1_000..=1_250),
            (RejectionReason::Auth, Some(2_000), 2_000..=2_500),
            (RejectionReason::Auth, None, 30_000..=37_500),
            (RejectionReason::Version, None, 30_000..=37_500),
            (RejectionReason::Replaced, Some(1_000), 30_000..=37_500),
            (RejectionReason::Replaced, Some(40_000), 40_000..=50_000),
            (RejectionReason::Draining, None, 0..=200),
        ] {
            let ended = rejected(reason, asked);
            assert_eq!(
                least.after(&ended, Duration::ZERO).as_millis(),
                *range.start(),
                "{reason:?}"
            );
            assert_eq!(
                most.after(&ended, Duration::ZERO).as_millis(),
                *range.end(),
                "{reason:?}"
            );
        }
    }
}
