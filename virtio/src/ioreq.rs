//! Guests' accesses, brought by an IOREQ server to what answers them.
//!
//! | module | holds |
//! |---|---|
//! | `request` | what a CPU asks for, checked |
//! | `target` | what answers: [`Target`] |
//! | `spaces` | which target answers at which address |
//! | `ranges` | sets of addresses |
//! | `ledger` | what the next process has to know of a server |
//! | `interrupts` | the way back: interrupts of targets |
//! | `server` | the server: from the page of requests to the targets and back |

#[doc(hidden)]
pub mod fuzzing;
mod interrupts;
mod ledger;
mod ranges;
mod request;
mod server;
mod spaces;
mod target;

#[cfg(test)]
mod tests;

pub use interrupts::DomainInterrupts;
pub use ledger::{Ledger, UnknownLayout};
pub use request::{Access, BadRequest, Direction, ElementSize, Operand, Request};
pub use server::{Problem, Server, ServerError};
pub use spaces::Spaces;
pub use target::{Claim, Placed, Target, Window};
