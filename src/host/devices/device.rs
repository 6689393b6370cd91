//! One hidden device.

use std::sync::{Mutex, MutexGuard, PoisonError};

use conf_space::address::Bdf;
use conf_space::{AccessError, Width};
use xenbus::{DomId, PciDevice};

use super::guest::Line;
use crate::host::record::{Flags, Owner, Phase, Record};
use crate::host::{Config, Description};

/// Offset of the command and status registers, which a virtual function has, too (PCIe 9.3.4.1.3).
const COMMAND: u16 = 0x04;

/// A hidden device.
#[derive(Debug)]
pub struct Device {
    /// Its address on the host.
    pub bdf: Bdf,
    /// What the bus knows of it.
    pub description: Description,
    /// Its configuration space.
    pub config: Config,
    /// For a virtual function: its physical function's configuration space.
    pub physical: Option<Config>,
    /// What interrupts it has.
    pub interrupts: msi::Interrupts,
    /// Held while its interrupts change.
    pub interrupts_lock: Mutex<()>,
    /// Held while it is reset.
    pub(super) reset_lock: Mutex<()>,
    /// What is remembered of it.
    pub record: Record,
    /// Why its guest is to lose it.
    pub(super) withdrawn: Mutex<Option<&'static str>>,
}

impl Device {
    /// The device as hypercalls name it.
    pub fn xen(&self) -> PciDevice {
        for_xen(self.bdf)
    }

    /// Where a guest sees it, if that guest has it.
    pub fn held_by(&self, domain: DomId) -> Option<Owner> {
        let assigned = self.record.phase() == Some(Phase::Assigned);
        self.record
            .owner()
            .filter(|owner| assigned && owner.domain == domain)
    }

    /// Keeps others from resetting it.
    pub(super) fn alone(&self) -> MutexGuard<'_, ()> {
        self.reset_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest that has it now.
    pub fn owner(&self) -> Option<DomId> {
        let assigned = self.record.phase() == Some(Phase::Assigned);
        let owner = self.record.owner().filter(|_| assigned);
        owner.map(|owner| owner.domain)
    }

    /// Whether a guest has it.
    pub fn is_held_by(&self, domain: DomId) -> bool {
        self.held_by(domain).is_some()
    }

    /// Whether its guest has to wait for it: nobody else has been kept from taking it away yet.
    pub fn is_withheld(&self) -> bool {
        self.record.flags().contains(Flags::WITHHELD)
    }

    /// Whether its guest may have interrupts by its INTx line.
    pub fn line(&self) -> Line {
        if self.record.flags().contains(Flags::WITHOUT_INTX) {
            Line::Refused
        } else {
            Line::Usable
        }
    }

    /// Why its guest is to lose it at once, if it is.
    pub fn withdrawn(&self) -> Option<&'static str> {
        *self.withdrawal()
    }

    pub(super) fn withdrawal(&self) -> MutexGuard<'_, Option<&'static str>> {
        self.withdrawn
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn command_and_status(&self) -> Result<u32, AccessError> {
        self.config.read(COMMAND, Width::Four)
    }

    /// Whether it was removed from the machine: the kernel no longer knows it, though another may be at its address by now.
    pub fn is_removed(&self) -> bool {
        self.command_and_status() == Err(AccessError::Gone)
    }

    /// Whether its registers can be read at all. A virtual function's identity registers read as absent by design.
    pub fn responds(&self) -> bool {
        self.command_and_status()
            .is_ok_and(|value| value != u32::MAX)
    }
}

/// A device that no record belongs to yet.
pub(super) struct Parts {
    pub(super) bdf: Bdf,
    pub(super) description: Description,
    pub(super) config: Config,
    pub(super) physical: Option<Config>,
    pub(super) interrupts: msi::Interrupts,
}

impl Parts {
    pub(super) fn with(self, record: Record) -> Device {
        let Self {
            bdf,
            description,
            config,
            physical,
            interrupts,
        } = self;
        Device {
            bdf,
            description,
            config,
            physical,
            interrupts,
            interrupts_lock: Mutex::new(()),
            reset_lock: Mutex::new(()),
            record,
            withdrawn: Mutex::default(),
        }
    }
}

/// A host address as hypercalls name it.
pub fn for_xen(bdf: Bdf) -> PciDevice {
    PciDevice {
        segment: bdf.segment(),
        bus: bdf.bus(),
        devfn: bdf.devfn(),
    }
}
