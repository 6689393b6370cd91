//! Virtio devices of a guest, as the file says them.
//!
//! ```toml
//! [[guest."web".virtio]]
//! type = "rng"
//! transport = "pci"
//! slot = "1f"               # default: the highest that is free
//! mode = "transitional"     # or "modern", "legacy"
//! layout = "qemu"           # or "compact"
//! legacy_in_memory = false
//! packed = false            # packed rings are offered to modern drivers
//!
//! [[guest."web".virtio]]
//! type = "rng"
//! transport = "mmio"
//! slot = "0"                # default: the lowest that is free
//! version = 2
//!
//! [[guest."web".virtio]]
//! type = "blk"
//! path = "/var/lib/images/web.raw"
//! read_only = false
//! direct = false            # past the host's cache
//! queues = 1
//! serial = "web-0"
//!
//! [[guest."web".virtio]]
//! type = "net"
//! bridge = "xenbr0"         # or a tap of your own: tap = "web0"
//! mac = "00:16:3e:01:02:03" # default: always the same for this guest and slot
//! queues = 1                # pairs of them
//! offloads = true
//!
//! [[guest."web".virtio]]
//! type = "console"
//! socket = "/run/web.sock"  # default: a pseudo-terminal
//! ports = [{ name = "org.qemu.guest_agent.0", socket = "/run/web-agent.sock" }]
//!
//! [guest."web".disk.xvde]    # a disk of xl's configuration: what that has no words for
//! slot = "1"
//! version = 1
//! direct = false
//! queues = 1
//! serial = "web-1"
//! ```
//!
//! | module | holds |
//! |---|---|
//! | this one | what all have in common |
//! | `place` | where a device is, and how it looks to drivers; `slot`: of PCI; `mmio`: of virtio-mmio |
//! | `blk`, `net`, `console` | what there is to say of a type |
//! | `xl_disk` | disks that xl's configuration names |

mod blk;
mod console;
mod mmio;
mod net;
mod place;
mod slot;
mod xl_disk;

use std::num::NonZeroU8;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use blk::{Disk, Serial};
pub use console::{Console, NamedPort, PortName};
pub use mmio::{MmioSlot, MmioSlotError};
pub use net::{Card, CardLink, Interface, Mac};
pub use place::{Place, PlaceError};
pub use slot::{Slot, SlotError};
pub use xl_disk::XlDisk;

/// One device. A key that is not among these is the model's, or refused there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioDevice {
    /// Where, and how it looks to drivers.
    #[serde(flatten)]
    pub place: Place,
    /// Drivers of the modern interface are offered packed rings.
    #[serde(default)]
    pub packed: bool,
    /// What it is.
    #[serde(flatten)]
    pub model: Model,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Model {
    /// A source of random numbers.
    Rng {},
    /// A disk.
    Blk(Disk),
    /// A network card.
    Net(Card),
    /// A console.
    Console(Console),
}

impl Model {
    /// As it is written.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rng {} => "rng",
            Self::Blk(_) => "blk",
            Self::Net(_) => "net",
            Self::Console(_) => "console",
        }
    }
}

/// A path that means the same wherever the daemon was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PathBuf", into = "PathBuf")]
pub struct HostPath(PathBuf);

impl TryFrom<PathBuf> for HostPath {
    type Error = String;

    fn try_from(path: PathBuf) -> Result<Self, String> {
        if !path.is_absolute() {
            return Err(format!(
                "{} is not a whole path: begin it with a /",
                path.display()
            ));
        }
        Ok(Self(path))
    }
}

impl From<HostPath> for PathBuf {
    fn from(path: HostPath) -> Self {
        path.0
    }
}

impl Deref for HostPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

fn one() -> NonZeroU8 {
    NonZeroU8::MIN
}
