//! The tunnel as tasks see it.
