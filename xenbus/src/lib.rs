//! Xen's interfaces as a dom0 daemon uses them: xenstore, grants, event channels, hypercalls, the `xen_pci_sharedinfo` page.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod state;
pub mod types;

pub use state::XenbusState;
pub use types::{DomId, GrantRef, Gsi, PciDevice, Pirq, Port};
