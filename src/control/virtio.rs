//! What is told of guests' virtio devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::VirtioDevice;

/// A guest with virtio devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioGuest {
    /// Its number.
    pub domain: u16,
    /// Its name.
    pub name: String,
    /// `served`; `opening`: what the devices are made of is being opened; `waiting`: its CPUs wait for its devices; `refused`: it has
    /// none.
    pub state: String,
    /// Why, if it is not served.
    pub reason: Option<String>,
    /// Its devices.
    pub devices: Vec<VirtioLine>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioLine {
    /// Where it is: `slot 1f`, or `mmio slot 0`.
    pub place: String,
    /// As it was configured.
    pub configured: VirtioDevice,
    /// How its driver has it; `None`: it is not served now.
    pub driven: Option<Driven>,
    /// It waits for what it is made of, and so does whoever uses it in the guest: why. `None`: it does not.
    pub waiting: Option<String>,
    /// The pseudo-terminals of a console's ports.
    pub terminals: Vec<TerminalLine>,
}

/// A port that ends at a pseudo-terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalLine {
    /// The port's name; of the console itself none.
    pub port: Option<String>,
    /// `/dev/pts/N`.
    pub path: PathBuf,
}

/// A device as its driver has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Driven {
    /// The bits of the status register that are set, by name.
    pub status: Vec<String>,
    /// `legacy` or `modern`.
    pub interface: String,
    /// Interrupts are messages (MSI-X).
    pub msix: bool,
    /// Features that the driver has chosen, by name.
    pub features: Vec<String>,
    /// Features that it could have chosen besides.
    pub not_chosen: Vec<String>,
    /// By number.
    pub queues: Vec<QueueLine>,
}

/// One queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLine {
    /// Its number.
    pub queue: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Descriptors.
    pub size: u16,
    /// The most that there could be.
    pub max_size: u16,
    /// Guest address of the descriptor table, or of a packed ring.
    pub descriptors: u64,
    /// Guest address of the available ring, or of the driver's event suppression structure.
    pub driver: u64,
    /// Guest address of the used ring, or of the device's event suppression structure.
    pub device: u64,
    /// The index of the available ring; `None`: not enabled, or packed.
    pub available: Option<u16>,
    /// The index of the used ring.
    pub used: Option<u16>,
    /// Chains that the device has taken and not given back.
    pub in_flight: usize,
    /// Its vector of MSI-X.
    pub vector: Option<u16>,
}
