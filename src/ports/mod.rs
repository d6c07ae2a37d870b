//! Which agent has which port: a pure state machine.
//!
//! [`Allocator`] decides, somebody else performs: it emits binds and closes as [`Effect`]s, and
//! every bind's outcome comes back as an input. It opens no socket and reads no clock.

mod allocator;

#[cfg(any(test, fuzzing))]
pub use allocator::fuzz::allocator as fuzz;
pub use allocator::{
    Allocation, Allocator, Answer, BindFailure, Claim, Config, Counts, Effect, PinError, PortState,
    PortView, Refusal, Remembered,
};
