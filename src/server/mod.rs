//! The server.

pub mod admin;
pub mod directory;
