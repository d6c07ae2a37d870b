//! The tunnel's messages on the wire.
