//! Virtio devices and their transports.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod blk;
pub mod console;
pub mod device;
pub mod features;
#[doc(hidden)]
pub mod fuzzing;
pub mod ioreq;
pub mod memory;
pub mod net;
pub mod pci;
pub mod queue;
pub mod register;
pub mod rng;
pub mod status;
pub mod transport;
mod turn;
mod worker;

pub use features::Features;
pub use status::{DeviceStatus, Interface, Status, Transition};
