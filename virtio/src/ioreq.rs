//! Guests' accesses, brought by an IOREQ server to what answers them.

mod target;

pub use target::{Claim, Target, Window};
