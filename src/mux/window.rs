use super::error::ProtocolError;

/// Credit to send: how many more body bytes the peer has agreed to take.
#[derive(Debug)]
pub(super) struct SendWindow(u32);

impl SendWindow {
    pub(super) fn new(credit: u32) -> Self {
        Self(credit)
    }

    pub(super) fn available(&self) -> usize {
        self.0 as usize
    }

    /// Adds what the peer granted. More than 32 bits can say is an attack or a bug.
    pub(super) fn grant(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.0 = self
            .0
            .checked_add(bytes)
            .ok_or(ProtocolError::CreditOverflow)?;
        Ok(())
    }

    /// Uses credit up. The caller sends no more than [`SendWindow::available`].
    pub(super) fn spend(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.available(), "sent without credit");
        self.0 = self.0.saturating_sub(bytes as u32);
    }
}

/// Credit to receive: what the peer may still send, and when to let it send more.
///
/// At any time `unread + available + owed == size`: of the window, part lies here unread, part
/// the peer may still send, and the rest has been read but not yet granted again.
#[derive(Debug)]
pub(super) struct ReceiveWindow {
    size: u32,
    available: u32,
    unread: u32,
}

impl ReceiveWindow {
    pub(super) fn new(size: u32) -> Self {
        Self {
            size,
            available: size,
            unread: 0,
        }
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Takes bytes in; more than the peer had credit for is an error of the tunnel.
    pub(super) fn receive(&mut self, bytes: usize) -> Result<(), ProtocolError> {
        let bytes = u32::try_from(bytes).map_err(|_| ProtocolError::FlowControl)?;
        self.available = self
            .available
            .checked_sub(bytes)
            .ok_or(ProtocolError::FlowControl)?;
        self.unread += bytes;
        Ok(())
    }

    /// Notes that bytes were read.
    pub(super) fn consume(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.unread as usize, "read more than came");
        self.unread = self.unread.saturating_sub(bytes as u32);
    }

    /// Whether half of the window waits to be granted again. Earlier would cost a frame for
    /// every read, later would let the peer run dry.
    pub(super) fn grant_is_due(&self) -> bool {
        self.owed() >= self.size / 2
    }

    /// Whether the reader keeps up, so that a larger window would be used.
    pub(super) fn reader_keeps_up(&self) -> bool {
        self.unread == 0
    }

    /// Makes the window larger; the difference is owed to the peer.
    pub(super) fn grow(&mut self, bytes: u32) {
        self.size += bytes;
    }

    /// Takes what is owed to the peer, to be sent as credit.
    pub(super) fn grant(&mut self) -> u32 {
        let owed = self.owed();
        self.available += owed;
        owed
    }

    fn owed(&self) -> u32 {
        self.size - self.available - self.unread
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn available(&self) -> usize {
        self.available as usize
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn unread(&self) -> u32 {
        self.unread
    }

    #[cfg(any(test, fuzzing))]
    #[track_caller]
    pub(super) fn assert_consistent(&self) {
        let parts = u64::from(self.available) + u64::from(self.unread);
        assert!(parts <= u64::from(self.size), "credit made: {self:?}");
        assert!(self.size <= super::MAX_WINDOW, "a window too large");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_is_neither_lost_nor_made() {
        let mut window = ReceiveWindow::new(100);
        window.receive(60).unwrap();
        assert!(!window.grant_is_due());
        window.consume(49);
        assert!(!window.grant_is_due());
        window.consume(1);
        assert!(window.grant_is_due());
        assert_eq!(window.grant(), 50);
        assert_eq!(window.grant(), 0);
        window.grow(100);
        assert_eq!(window.grant(), 100);
        assert_eq!(window.receive(191), Err(ProtocolError::FlowControl));
        window.receive(190).unwrap();
    }

    #[test]
    fn overflowing_credit_is_refused() {
        let mut window = SendWindow::new(u32::MAX - 1);
        window.grant(1).unwrap();
        assert_eq!(window.grant(1), Err(ProtocolError::CreditOverflow));
    }
}
