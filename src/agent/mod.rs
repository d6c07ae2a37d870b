//! The agent: dials the server, forwards exchanges to the local service.
