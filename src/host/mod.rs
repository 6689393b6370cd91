//! The host's PCI devices.
//!
//! | module | holds |
//! |---|---|
//! | this one | the bus they are on, as an interface ([`Bus`]) |
//! | [`backend`] | which bus, and why |
//! | [`sysfs`] | the machine's own bus |
//! | [`vfio`] | the machine's own bus through VFIO, for the embedded platform |
//! | [`sim`] | a simulated one, for the embedded platform |
//! | [`errors`] | errors that devices report, and where we hear of them |
//! | [`devices`] | hidden devices and how they change hands: dom0, hidden, a guest's |
//! | [`record`] | what is remembered of a hidden device beyond the daemon's life |
//! | [`reset`] | how a device is reset: what is wanted against what the kernel offers |
//! | [`group`] | IOMMU groups, and whether they can be used |
//! | [`sharing`] | what a device has in common with others: INTx line, memory pages |
//! | [`config_state`] | saving and restoring configuration space |
//! | [`interrupts`] | a hidden device's MSI and MSI-X |
//! | `window` | what a BAR decodes, for guests of the embedded Xen |

pub mod backend;
mod config_file;
pub mod config_state;
pub mod devices;
pub mod errors;
pub mod group;
pub mod interrupts;
mod read_only;
pub mod record;
pub mod reset;
pub mod sharing;
pub mod sim;
pub mod sysfs;
pub mod vfio;
mod window;

pub use self::backend::Backend;
pub use self::read_only::ReadOnly;

use self::group::Group;
use self::sharing::Occupancy;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use conf_space::address::Bdf;
use conf_space::overlay::Identity;
use conf_space::selector::{DeviceNames, SlotPath};
use conf_space::{AccessError, ConfigSpace};
pub use sriov::Function;
use xenbus::DomId;

use self::errors::ErrorReports;

/// Something that a host device or its kernel driver refused.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The bus cannot be listed.
    #[error("cannot list {path}: is sysfs mounted?")]
    NoBus {
        /// Where it should be.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no such device.
    #[error("there is no PCI device {bdf}: 'lspci -D' lists those that are there")]
    NoDevice {
        /// The device asked for.
        bdf: Bdf,
    },
    /// The kernel refused an operation on a device.
    #[error("{bdf}: cannot {action}: {remedy}")]
    Refused {
        /// The device.
        bdf: Bdf,
        /// What was tried, as a verb phrase: "unbind its driver e1000e".
        action: String,
        /// What the operator can do.
        remedy: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Its configuration space cannot be read.
    #[error("{bdf}: its configuration space cannot be read")]
    Unreadable {
        /// The device.
        bdf: Bdf,
        /// Why.
        #[source]
        source: AccessError,
    },
    /// It is not to be reached in the way that this platform has.
    #[error("{bdf}: {why}")]
    WrongHost {
        /// The device.
        bdf: Bdf,
        /// Which.
        why: backend::WrongHost,
    },
    /// Nothing keeps its DMA in bounds.
    #[error(
        "{bdf} is in no IOMMU group, so it cannot be given to a guest by VFIO: {}. Under Xen, which keeps the IOMMU to itself, devices are reached \
         through sysfs (host = \"auto\")",
        group::SWITCH_ON
    )]
    NoIommu {
        /// The device.
        bdf: Bdf,
    },
    /// The host uses another device of its IOMMU group.
    #[error(
        "{bdf} cannot be given to a guest alone: {others}. Take all of the group: pciback hide --group {bdf}"
    )]
    NotViable {
        /// The device.
        bdf: Bdf,
        /// What is in the way.
        others: group::NotViable,
    },
    /// Errors of devices cannot be heard of.
    #[error("cannot look for errors of devices")]
    NoErrors {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the kernel says of a device cannot be understood.
    #[error("{bdf}: {what}")]
    Malformed {
        /// The device.
        bdf: Bdf,
        /// What is wrong.
        what: String,
    },
}

/// Configuration space that may be used from any thread.
pub type Config = Arc<dyn DeviceConfig>;

/// A configuration space that several threads may use.
pub trait DeviceConfig: ConfigSpace + Send + Sync + fmt::Debug {}

impl<T: ConfigSpace + Send + Sync + fmt::Debug> DeviceConfig for T {}

/// What the bus knows of a device.
#[derive(Debug, Clone)]
pub struct Description {
    /// Identity and resources as the kernel knows them; right for virtual functions too, whose registers read as absent.
    pub identity: Identity,
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
    /// Where it is in the machine; `None` when the kernel's path to it cannot be understood.
    pub path: Option<SlotPath>,
    /// Class code, 24 bits: base class, subclass, programming interface.
    pub class: u32,
    /// What it is to SR-IOV: an ordinary device, a physical or a virtual function.
    pub function: Function,
    /// The legacy interrupt as dom0 numbers it, which for a PV dom0 is the GSI; 0: none.
    pub irq: u32,
    /// The driver bound in dom0.
    pub driver: Option<String>,
    /// Reset methods that are offered, best first; empty: none. Names as in sysfs `reset_method`, and [`reset::VFIO_BUS`].
    pub reset_methods: Vec<String>,
}

impl Description {
    /// All that the device can be told by.
    pub fn names(&self) -> DeviceNames {
        DeviceNames {
            bdf: self.identity.bdf,
            vendor: self.identity.vendor,
            device: self.identity.device,
            subsystem: self.subsystem,
            path: self.path.clone(),
        }
    }
}

/// Host, ISA, PCI bridges and their kin. Not "other" ones (0x80): that is what non-transparent bridges are, which are used as endpoints.
pub fn is_bridge(class: u32) -> bool {
    const BRIDGE: u32 = 0x06;
    const OTHER: u32 = 0x80;
    class >> 16 == BRIDGE && class >> 8 & 0xff != OTHER
}

/// The bus that host devices are on. Every method may block for as long as the kernel takes; [`Bus::reset`] up to a minute.
pub trait Bus: Send + Sync + fmt::Debug {
    /// How devices are reached on it.
    fn backend(&self) -> Backend;

    /// All devices that are there now.
    ///
    /// # Errors
    /// When the bus itself cannot be listed.
    fn list(&self) -> Result<Vec<Bdf>, HostError>;

    /// A descriptor that becomes readable when devices may have come or gone. Non-blocking; to be read until it is empty, and what is in
    /// it means nothing.
    ///
    /// # Errors
    /// When there is none to be had.
    fn changes(&self) -> io::Result<OwnedFd>;

    /// What is known of one device.
    ///
    /// # Errors
    /// [`HostError::NoDevice`], and when the kernel's description cannot be read.
    fn describe(&self, bdf: Bdf) -> Result<Description, HostError>;

    /// What every device occupies that others may have a part of.
    ///
    /// # Errors
    /// When the bus itself cannot be listed. A device that cannot be looked at is left out.
    fn survey(&self) -> Result<Vec<Occupancy>, HostError>;

    /// Opens a device's configuration space for reading and writing. Waits for a device that is changing hands, whose registers nobody reaches
    /// meanwhile (EBUSY), and tries again what could not be opened then.
    ///
    /// # Errors
    /// When it cannot be opened, kernel lockdown among the reasons.
    fn open(&self, bdf: Bdf) -> Result<Config, HostError>;

    /// Unbinds the driver, if one is bound.
    ///
    /// # Errors
    /// The kernel's.
    fn unbind(&self, bdf: Bdf) -> Result<(), HostError>;

    /// Reserves the device for a driver of this name, or for whichever matches.
    ///
    /// # Errors
    /// The kernel's.
    fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError>;

    /// The name that the device is reserved for.
    ///
    /// # Errors
    /// The kernel's.
    fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, HostError>;

    /// Binds a driver: the one named, or whichever matches.
    ///
    /// # Errors
    /// The kernel's.
    fn bind(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError>;

    /// Switches the device on (power state D0, memory and I/O decode, interrupt routing), or takes that back. Counted by the kernel.
    ///
    /// # Errors
    /// The kernel's; a bound driver makes it refuse.
    fn enable(&self, bdf: Bdf, on: bool) -> Result<(), HostError>;

    /// Whether the kernel may let the device lose its power, together with the bridge above it, while no driver of dom0's uses it.
    ///
    /// # Errors
    /// The kernel's.
    fn may_lose_power(&self, bdf: Bdf) -> Result<bool, HostError>;

    /// Lets the kernel do so, or keeps it from that.
    ///
    /// # Errors
    /// The kernel's.
    fn set_may_lose_power(&self, bdf: Bdf, may: bool) -> Result<(), HostError>;

    /// Resets the function by the first of its methods that works. The kernel saves and restores the standard configuration around it.
    ///
    /// # Errors
    /// The kernel's; a device without a reset method is [`HostError::Refused`].
    fn reset(&self, bdf: Bdf) -> Result<(), HostError>;

    /// Has a physical function's driver make so many virtual functions, or take all of them away (0). The kernel goes from one number to
    /// another by way of 0 only.
    ///
    /// # Errors
    /// The kernel's, and those of the physical function's driver.
    fn set_virtual_functions(&self, physical: Bdf, count: u16) -> Result<(), HostError>;

    /// Whether dom0's drivers take virtual functions that are made.
    ///
    /// # Errors
    /// The kernel's.
    fn are_functions_probed(&self, physical: Bdf) -> Result<bool, HostError>;

    /// Has dom0's drivers take virtual functions that are made from now on, or leave them alone.
    ///
    /// # Errors
    /// The kernel's.
    fn set_functions_probed(&self, physical: Bdf, probed: bool) -> Result<(), HostError>;

    /// Has [`Bus::reset`] try these methods only, in this order, until set anew; none: all that the kernel has, in its order.
    ///
    /// # Errors
    /// The kernel's: a method that the device does not have; a kernel older than Linux 5.15, which lets nobody choose.
    fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<(), HostError>;

    /// The other functions behind the same bridge, which a reset of the bus would hit. Empty for a device on a root bus.
    ///
    /// # Errors
    /// [`HostError::NoDevice`].
    fn beside(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError>;

    /// The bridges that are above the device, from the root on; none for a device of the root complex.
    ///
    /// # Errors
    /// [`HostError::NoDevice`].
    fn ports_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError>;

    /// Where errors of devices are reported from now on. What was reported while no daemon ran, but guests had devices, comes first.
    ///
    /// # Errors
    /// When errors cannot be heard of.
    fn error_reports(&self) -> Result<Box<dyn ErrorReports>, HostError>;

    /// How many correctable errors the device has reported; `None` where nobody counts.
    fn correctable_errors(&self, bdf: Bdf) -> Option<u64>;

    /// Keeps everybody from changing how many virtual functions a device has, ourselves included, or lets them. Outlives us.
    ///
    /// # Errors
    /// The kernel's.
    fn keep_virtual_functions(&self, physical: Bdf, keep: bool) -> Result<(), HostError>;

    /// Why dom0 cannot do without the device, in words an operator understands; `None`: it can.
    ///
    /// # Errors
    /// When that cannot be found out.
    fn needed_by_dom0(&self, bdf: Bdf) -> Result<Option<String>, HostError>;

    /// The device's IOMMU group, if Linux has one.
    fn group(&self, _bdf: Bdf) -> Option<Group> {
        None
    }

    /// The devices that a guest gets only with this one or not at all, this one among them.
    ///
    /// # Errors
    /// [`HostError::NoIommu`].
    fn together(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        Ok(vec![bdf])
    }

    /// Whether a guest can have the device, once dom0 has lost those in `taken`. Touches nothing.
    ///
    /// # Errors
    /// [`HostError::NoIommu`], [`HostError::NotViable`].
    fn check_together(&self, _bdf: Bdf, _taken: &[Bdf]) -> Result<(), HostError> {
        Ok(())
    }

    /// Whether dom0 can have a hidden device back that no guest has.
    ///
    /// # Errors
    /// EBUSY when somebody still has it open; it stays as it is.
    fn check_return(&self, _bdf: Bdf) -> Result<(), HostError> {
        Ok(())
    }

    /// A guest is to have the INTx line of a hidden device that it has. Where Xen has the interrupts, it gives the line itself.
    ///
    /// # Errors
    /// The kernel's.
    fn give_line(&self, _bdf: Bdf, _domain: DomId) -> io::Result<()> {
        Ok(())
    }

    /// A hidden device was removed from the machine, and nobody uses it any more.
    fn forget(&self, _bdf: Bdf) {}
}
