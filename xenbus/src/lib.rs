//! Xen's interfaces as a dom0 daemon uses them: xenstore, grants, event channels, hypercalls, the
//! `xen_pci_sharedinfo` page.
//!
//! Everything above this crate talks to the [`Xen`] trait. Two things implement it: [`host::Host`],
//! the hypervisor that this dom0 runs on, and [`sim::Machine`], Xen embedded in the process.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

mod device;
pub mod device_model;
pub mod event_channel;
#[doc(hidden)]
pub mod fuzzing;
pub mod grant;
pub mod host;
pub mod ioreq;
pub mod pciif;
pub mod platform;
mod privcmd;
pub mod sim;
pub mod state;
pub mod types;
pub mod xenstore;

pub use device_model::DeviceModel;
pub use platform::{DomainInfo, EventPort, MsiRequest, PageMapping, Xen, XenError};
pub use state::XenbusState;
pub use types::{DomId, GrantRef, Gsi, PciDevice, Pirq, Port};
