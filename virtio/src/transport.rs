//! How a driver reaches a device: register blocks, status, interrupts.
//!
//! | module | holds |
//! |---|---|
//! | `core` | what all faces have in common: features, status, queues, and the life from reset to reset |
//! | `core::queues` | what a driver does to queues |
//! | `core::inspect` | what there is to see of a device |
//! | `core::state` | what a driver has written, noted so that a restart goes unnoticed |
//! | `notes` | where it is noted |
//! | `signals` | what a device tells its driver: ISR status, vectors, MSI-X; shared with its threads |
//! | `legacy` | the register block of virtio 0.9.5 |
//! | `common` | the common configuration of virtio 1.3 on PCI |
//! | `notify` | where a PCI driver notifies queues |
//! | `config` | the device configuration, wherever a face has it |
//! | [`mmio`] | virtio-mmio, versions 1 and 2 |
//!
//! [`crate::pci`] puts the PCI faces into a function's BARs.

pub(crate) mod common;
pub(crate) mod config;
pub(crate) mod core;
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod legacy;
pub mod mmio;
mod notes;
pub(crate) mod notify;
pub(crate) mod signals;

pub use self::core::{Parts, RING_FEATURES};
pub use notes::{Notes, NotesError};
pub use signals::{InterruptSink, NO_VECTOR};
