//! Virtio devices of HVM guests, emulated here beside the guest's own device model.
//!
//! | module | holds |
//! |---|---|
//! | `guests` | which guests have such devices: a session for each |
//! | `session` | one guest: a thread that answers its CPUs, and what others see of it |
//! | `assembly` | from the configuration to devices in their slots |
//! | `place` | which device is where |
//! | `mmio` | where virtio-mmio is in a guest |
//! | `backends` | what the host has for them: images, taps, pseudo-terminals |
//! | `kept` | what of that is kept open over a restart |
//! | `missing` | what of it is gone after a restart |
//! | `terminals` | where consoles are |
//! | `xl_disk` | disks of xl's configuration, as libxl describes them |
//! | `report` | what operators ask of devices, and wish for them |
//! | `qemu` | what the guest's own device model has in which slot |
//! | `record` | what the next daemon has to know |
//!
//! A guest's firmware looks for PCI functions once, as it starts. So the devices must be there while
//! the toolstack still builds the guest, and cannot be added later.

mod assembly;
mod backends;
mod guests;
mod kept;
mod missing;
pub mod mmio;
mod place;
mod qemu;
mod record;
mod report;
mod session;
mod terminals;
mod xl_disk;

pub use assembly::AssemblyError;
pub use backends::BackendError;
pub use guests::VirtualGuests;
pub use place::{At, PlaceError};
pub use report::VirtioError;
