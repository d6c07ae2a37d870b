//! Which agent has which port: a pure state machine.
