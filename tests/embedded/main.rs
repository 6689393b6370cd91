//! The daemon end to end, on the embedded Xen with simulated devices and simulated guests.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

// Shared with tests/security.rs, which uses the rest of them.
#[allow(dead_code)]
mod house;
#[allow(dead_code)]
mod mortal;

mod absent;
mod aer;
mod boot;
mod compatibility;
mod connecting;
mod doctor;
mod groups;
mod handover;
mod hotplug;
mod interrupts;
mod isolation;
mod keeping;
mod killed;
mod moving;
mod policy;
mod properties;
mod resets;
mod restart;
mod returning;
mod seeing;
mod sharing;
mod sriov;
mod variants;
