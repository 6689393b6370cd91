//! Virtio devices and their transports.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod ioreq;
pub mod status;

pub use status::{DeviceStatus, Interface, Status, Transition};
