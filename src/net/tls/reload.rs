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

#[cfg(test)]
mod tests {
    use super::*;

    fn fault() -> TlsFault {
        rustls::Error::HandshakeNotComplete.into()
    }

    #[test]
    fn files_are_read_when_they_have_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let files = [&*file];
        std::fs::write(&file, "1").unwrap();
        let read = || Ok(std::fs::read_to_string(&file).unwrap());
        let reloading = Reloading::new(&files, read).unwrap();
        let unread = || -> Result<String, TlsFault> { panic!("nothing has changed") };
        for tell in [Tell::Once, Tell::AtSecondLook] {
            assert!(reloading.look(&files, tell, unread).unwrap().is_none());
        }
        assert!(reloading.look(&files, Tell::Now, read).unwrap().is_some());

        // Another file in its place, of the same size.
        let other = directory.path().join("other");
        std::fs::write(&other, "2").unwrap();
        std::fs::rename(&other, &file).unwrap();
        let new = reloading.look(&files, Tell::AtSecondLook, read).unwrap();
        assert_eq!(**new.unwrap(), *"2");
        assert_eq!(*reloading.current(), "2");

        // Another behind a link.
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let before = Stamps::of(&[&link]);
        std::fs::write(&other, "3").unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert_ne!(Stamps::of(&[&link]), before);
    }

    #[test]
    fn a_fault_is_told_once_and_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let files = [&*file];
        let reloading = Reloading::new(&files, || Ok(1)).unwrap();
        let look = |tell| reloading.look(&files, tell, || Err(fault()));

        std::fs::write(&file, "x").unwrap();
        assert!(look(Tell::AtSecondLook).unwrap().is_none());
        assert!(look(Tell::AtSecondLook).is_err());
        assert!(look(Tell::AtSecondLook).unwrap().is_none());
        std::fs::write(&file, "xx").unwrap();
        assert!(look(Tell::Once).is_err());
        assert!(look(Tell::Once).unwrap().is_none());
        assert!(look(Tell::Now).is_err());
        assert_eq!(*reloading.current(), 1);

        // What was half replaced at the first look is whole at the second.
        std::fs::write(&file, "xxx").unwrap();
        assert!(look(Tell::AtSecondLook).unwrap().is_none());
        let whole = reloading.look(&files, Tell::AtSecondLook, || Ok(2));
        assert!(whole.unwrap().is_some());
        assert_eq!(*reloading.current(), 2);
    }
}
