//! Xen embedded in the process: xenstored, grants, event channels, hypercalls and a toolstack, and frontends to drive a backend with.
//!
//! For demonstrations, for tests, and for trying out policies on any Linux machine: the backend runs on a [`Machine`] as it does on Xen,
//! over the same wire formats. What a guest process needs to know is in `docs/embedded-platform.md`.
//!
//! ```no_run
//! use xenbus::Xen;
//! use xenbus::sim::{DomainKind, Machine};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let machine = Machine::new("/run/my-machine")?;
//! let mut store = machine.connect_xenstore()?; // as dom0
//! let guest = machine.create_domain("guest", DomainKind::Pv)?;
//! let mut guests_store = machine.connect_as(guest)?;
//! # Ok(())
//! # }
//! ```
//!
//! Where Xen's behaviour was looked up, it is that of Xen 4.17.

mod address_space;
mod evtchn;
mod frontend;
mod grants;
mod guest;
mod guest_socket;
mod hardware;
mod hvm;
mod hypervisor;
mod interrupts;
mod machine;
mod msi;
mod passthrough;
mod toolstack;
mod windows;
mod xenstored;

#[cfg(test)]
mod test_bus;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use frontend::{
    AerRequest, Bar, BarKind, Frontend, FrontendError, Function, Lies, Node, Operation, Step,
    Variant,
};
pub use grants::{MappedPage, PAGE_SIZE};
pub use guest::{
    EndEvent, GrantedPage, GuestPlatform, GuestPort, GuestWindow, LocalGuest, WindowAccess,
};
pub use guest_socket::{SocketGuest, SocketToolstack};
pub use hardware::{BarSpace, DmaMemory, Hardware, MsiTarget, Window, WindowArea};
pub use hvm::{Direction, HvmGuest, Message, Vcpu, VcpuError};
pub use machine::{DomainKind, Machine, MachineError, MachineOptions};
pub use toolstack::{PciOptions, ToolstackError, VirtioDisk};

/// Locks, also after a panic elsewhere: what is under these locks is consistent after every single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
