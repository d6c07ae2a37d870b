//! What a proxy does to header lines: pure functions.
