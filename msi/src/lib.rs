//! MSI and MSI-X: what a device has, when it may be enabled, and the PIRQs it holds.
//!
//! Xen writes a device's message addresses, data and MSI-X table when a PIRQ is mapped; the enable
//! bits are left to dom0, so to us. Which PIRQs a domain has, Xen tells nobody: everything that is
//! mapped stands in a [`Ledger`] that outlives the daemon, and what is about to be mapped is
//! written there first.
//!
//! | module | holds |
//! |---|---|
//! | [`interrupts`] | what a device has, read from its configuration space ([`Interrupts`]) |
//! | [`operations`] | enabling, disabling, releasing, recovering ([`Operations`]) |
//! | [`ledger`] | what is written down ([`Ledger`], [`Held`]) |
//! | [`pirqs`] | mapping and unmapping ([`Pirqs`]), and the search for PIRQs that nobody knows of ([`sweep`]) |
//! | [`refusal`] | why an interrupt is not enabled, and what the guest is told ([`Refusal`]) |
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod interrupts;
pub mod ledger;
pub mod operations;
pub mod pirqs;
pub mod refusal;
#[cfg(test)]
mod tests;

pub use interrupts::{BrokenMsiX, Interrupts, Msi, MsiX};
pub use ledger::{Held, Kind, Ledger};
pub use operations::{Operations, Recovered, Vectors, memory_decode};
pub use pirqs::{Pirqs, sweep};
pub use refusal::{Answer, CleanupError, Refusal};
