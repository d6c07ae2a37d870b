//! What is made of files, made anew when they change.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::files::{CertificateInfo, Stamps, TlsFault};

/// What came of a look at the files.
#[derive(Debug)]
pub enum Refresh {
    /// They haven't changed, or have just begun to.
    Unchanged,
    /// What they hold now is used from here on. The certificate of this side, if it has one.
    Renewed(Option<CertificateInfo>),
    /// They have changed and can't be used, so what they held before is used on.
    Kept(TlsFault),
}

/// When a fault is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tell {
    /// As soon as it is found, and each time.
    Now,
    /// Once, at the second look that finds it: files are replaced one after the other, and between
    /// two of them they don't fit each other.
    AtSecondLook,
    /// Once, as soon as it is found.
    Once,
}

/// See the module.
pub(super) struct Reloading<T> {
    /// Read by every new connection, written when the files have changed.
    current: RwLock<Arc<T>>,
    /// Taken by whoever looks, for as long as that takes; no connection waits for it.
    looked: Mutex<Looked>,
}

struct Looked {
    /// What the files looked like at the last attempt to read them.
    stamps: Stamps,
    /// Whether that attempt failed, and nobody has been told.
    untold: bool,
}

impl<T> Reloading<T> {
    /// Reads the files for the first time.
    pub(super) fn new(
        files: &[&Path],
        load: impl FnOnce() -> Result<T, TlsFault>,
    ) -> Result<Self, TlsFault> {
        // Before they are read: what changes meanwhile is seen at the next look.
        let stamps = Stamps::of(files);
        Ok(Self {
            current: RwLock::new(Arc::new(load()?)),
            looked: Mutex::new(Looked {
                stamps,
                untold: false,
            }),
        })
    }

    /// What holds now.
    pub(super) fn current(&self) -> Arc<T> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// Reads the files again if they look different from the last time, or in any case with
    /// [`Tell::Now`]. `Ok(None)`: nothing to do, or nothing to tell.
    pub(super) fn look(
        &self,
        files: &[&Path],
        tell: Tell,
        load: impl FnOnce() -> Result<T, TlsFault>,
    ) -> Result<Option<Arc<T>>, TlsFault> {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = Stamps::of(files);
        let changed = stamps != looked.stamps;
        if !changed && !looked.untold && tell != Tell::Now {
            return Ok(None);
        }
        looked.stamps = stamps;
        match load() {
            Ok(new) => {
                looked.untold = false;
                let new = Arc::new(new);
                let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
                *current = new.clone();
                Ok(Some(new))
            }
            Err(_) if changed && tell == Tell::AtSecondLook => {
                looked.untold = true;
                Ok(None)
            }
            Err(fault) => {
                looked.untold = false;
                Err(fault)
            }
        }
    }
}
