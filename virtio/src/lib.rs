//! Virtio devices and their transports.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

// Tests of private parts use drivers that tests of the whole share.
#[cfg(test)]
extern crate self as virtio;
#[cfg(test)]
#[path = "../tests/rings/mod.rs"]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]
mod rings;

pub mod blk;
pub mod console;
pub mod device;
pub mod features;
#[doc(hidden)]
pub mod fuzzing;
pub mod inspect;
pub mod ioreq;
pub mod late;
pub mod memory;
pub mod net;
pub mod pci;
pub mod queue;
pub mod register;
pub mod rng;
mod served;
pub mod status;
pub mod transport;
mod turn;
mod worker;

pub use features::Features;
pub use status::{DeviceStatus, Interface, Status, Transition};
