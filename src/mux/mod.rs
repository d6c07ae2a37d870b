//! The protocol core.
