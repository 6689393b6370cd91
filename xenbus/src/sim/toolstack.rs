//! The toolstack's part: domains, their PCI devices and virtio disks, with the nodes and in the order of libxl 4.17.
//!
//! What libxl does through sysfs is left out where it concerns the host (the list of assignable devices, `permissive`);
//! the reset is asked of the [`super::Hardware`].

mod disk;
mod domain;
mod pci;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub use disk::VirtioDisk;
pub use pci::PciOptions;

use super::Machine;
use crate::platform::XenError;
use crate::state::XenbusState;
use crate::types::{DomId, PciDevice};
use crate::xenstore::{self, Client, Store};

/// The toolstack could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolstackError {
    /// xenstore said no.
    #[error("the toolstack cannot use xenstore")]
    Xenstore(#[from] xenstore::Error),
    /// Xen said no.
    #[error("the toolstack cannot use Xen")]
    Xen(#[from] XenError),
    /// The backend is not there, or not in time.
    #[error("the PCI backend of domain {domain} is at state {state} instead of {}, after {} ms", XenbusState::Connected, waited.as_millis())]
    BackendNotReady {
        /// Whose backend.
        domain: DomId,
        /// Its state.
        state: XenbusState,
        /// How long was waited.
        waited: Duration,
    },
    /// A virtio disk's backend is not there, or not in time.
    #[error("the backend of disk {device} of domain {domain} is at state {state} instead of {wanted}, after {} ms", waited.as_millis())]
    DiskNotReady {
        /// Whose disk.
        domain: DomId,
        /// Its number.
        device: u32,
        /// Its backend's state.
        state: XenbusState,
        /// What was waited for.
        wanted: XenbusState,
        /// How long was waited.
        waited: Duration,
    },
    /// The device was given to a domain before.
    #[error("{device} is attached to domain {domain}: detach it first")]
    Attached {
        /// The device.
        device: PciDevice,
        /// Who has it.
        domain: String,
    },
    /// The domain has no such device.
    #[error("{device} is not attached to domain {domain}")]
    NotAttached {
        /// The device.
        device: PciDevice,
        /// Who does not have it.
        domain: DomId,
    },
}

/// A toolstack's pause between two looks at a backend. libxl's is 100 ms; nobody but the one who waits can tell the difference.
const PAUSE: Duration = Duration::from_millis(5);

/// Directory of a domain's PCI backend.
fn backend_path(domain: DomId) -> String {
    format!("/local/domain/0/backend/pci/{domain}/0")
}

/// Directory of a domain's PCI frontend.
fn frontend_path(domain: DomId) -> String {
    format!("/local/domain/{domain}/device/pci/0")
}

/// Where the toolstack keeps what it knows of a device.
fn info_path(device: PciDevice) -> String {
    let PciDevice {
        segment,
        bus,
        devfn,
    } = device;
    format!(
        "/libxl/pci/{segment:04x}-{bus:02x}-{:02x}-{:x}",
        devfn >> 3,
        devfn & 7
    )
}

impl Machine {
    /// Waits until a domain's backend is connected, as libxl does: by looking again and again, and not at all when there is no backend.
    fn wait_for_backend(&self, store: &mut Client, domain: DomId) -> Result<(), ToolstackError> {
        let path = format!("{}/state", backend_path(domain));
        let start = Instant::now();
        loop {
            let state = store.read_state(&path)?;
            let waited = start.elapsed();
            if state == XenbusState::Connected {
                return Ok(());
            }
            if state == XenbusState::Unknown || waited >= self.inner.toolstack_timeout {
                return Err(ToolstackError::BackendNotReady {
                    domain,
                    state,
                    waited,
                });
            }
            std::thread::sleep(PAUSE);
        }
    }
}
