//! The driver that the facade shows: what toolstacks ask of `/sys/bus/pci/drivers/pciback`, done with our devices.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use conf_space::address::Bdf;
use log::{error, info};
use nix::errno::Errno;

use super::lock_of;
use crate::facade::{Driver, Quirk};
use crate::host::HostError;
use crate::host::devices::{DeviceError, Devices, Quarantine, Rebind};
use crate::host::record::{Flags, Phase};
use crate::text::chain;

/// The hidden devices, and the slots: addresses that a toolstack announced (`new_slot`) and will bind next.
#[derive(Debug)]
pub struct SlotDriver {
    devices: Arc<Devices>,
    announced: Mutex<BTreeSet<Bdf>>,
}

/// More announced slots than there are functions on a few buses are a mistake.
const MAX_SLOTS: usize = 4096;

impl SlotDriver {
    /// With nothing announced.
    pub fn new(devices: Arc<Devices>) -> Self {
        Self {
            devices,
            announced: Mutex::default(),
        }
    }

    fn with(&self, flag: Flags) -> Vec<Bdf> {
        self.devices
            .list()
            .into_iter()
            .filter(|device| device.record.flags().contains(flag))
            .map(|device| device.bdf)
            .collect()
    }

    fn grant(&self, bdf: Bdf, flag: Flags, what: &str) -> Result<(), Errno> {
        let device = self.devices.get(bdf).ok_or(Errno::ENODEV)?;
        device.record.insert(flag);
        info!("{bdf}: {what}, until its guest gives it back");
        Ok(())
    }
}

/// The writer gets a number only, so the reason goes to the log.
fn told(error: DeviceError) -> Errno {
    error!("{}", chain(&error));
    match error {
        DeviceError::Host(HostError::Refused { source, .. }) => {
            source.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
        }
        DeviceError::Host(HostError::NoDevice { .. }) | DeviceError::NotHidden { .. } => {
            Errno::ENODEV
        }
        DeviceError::Needed { .. }
        | DeviceError::HasVirtualFunctions { .. }
        | DeviceError::FunctionsInGuests { .. }
        | DeviceError::Busy { .. }
        | DeviceError::InUse { .. } => Errno::EBUSY,
        DeviceError::Bridge { .. } | DeviceError::Functions(_) => Errno::EINVAL,
        DeviceError::NoSuchReset { .. } => Errno::ENOTTY,
        DeviceError::Host(_)
        | DeviceError::Record(_)
        | DeviceError::Xen { .. }
        | DeviceError::Dead { .. } => Errno::EIO,
    }
}

impl Driver for SlotDriver {
    fn seized(&self) -> Vec<Bdf> {
        let usable = |phase| {
            matches!(
                phase,
                Some(Phase::Hidden | Phase::Assigned | Phase::Releasing)
            )
        };
        self.devices
            .list()
            .into_iter()
            .filter(|device| usable(device.record.phase()))
            .map(|device| device.bdf)
            .collect()
    }

    fn slots(&self) -> Vec<Bdf> {
        let mut slots = lock_of(&self.announced).clone();
        slots.extend(self.seized());
        slots.into_iter().collect()
    }

    fn new_slot(&self, device: Bdf) -> Result<(), Errno> {
        let mut announced = lock_of(&self.announced);
        if announced.len() >= MAX_SLOTS {
            return Err(Errno::ENOMEM);
        }
        announced.insert(device);
        Ok(())
    }

    /// xl takes a device away with this alone, as it finds no driver to unbind it from.
    fn remove_slot(&self, device: Bdf) -> Result<(), Errno> {
        let announced = lock_of(&self.announced).remove(&device);
        if self.devices.get(device).is_some() {
            return self.devices.unhide(device, Rebind::Nothing).map_err(told);
        }
        if announced {
            Ok(())
        } else {
            Err(Errno::ENOENT)
        }
    }

    fn bind(&self, device: Bdf) -> Result<(), Errno> {
        // As the kernel's: a device in no slot is not its own. xl quarantines what it binds, and what it asks for is not second-guessed:
        // it has unbound dom0's driver already.
        if !self.slots().contains(&device) {
            return Err(Errno::ENODEV);
        }
        self.devices
            .hide(device, true, Quarantine::Callers)
            .map_err(told)?;
        Ok(())
    }

    fn unbind(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.unhide(device, Rebind::Nothing).map_err(told)?;
        self.new_slot(device)
    }

    fn permissive(&self) -> Vec<Bdf> {
        self.with(Flags::PERMISSIVE)
    }

    fn set_permissive(&self, device: Bdf) -> Result<(), Errno> {
        self.grant(
            device,
            Flags::PERMISSIVE,
            "its guest may write every register",
        )
    }

    fn interrupt_control(&self) -> Vec<Bdf> {
        self.with(Flags::INTERRUPT_CONTROL)
    }

    fn allow_interrupt_control(&self, device: Bdf) -> Result<(), Errno> {
        self.grant(
            device,
            Flags::INTERRUPT_CONTROL,
            "its guest may set the interrupt enable bits",
        )
    }

    fn quirks(&self) -> String {
        self.devices
            .list()
            .iter()
            .map(|device| format!("{}\n", device.bdf))
            .collect()
    }

    /// Quirks are not kept yet: the answer says so instead of pretending.
    fn add_quirk(&self, quirk: Quirk) -> Result<(), Errno> {
        error!(
            "{}: quirks cannot be set with this version of pcibackd",
            quirk.device
        );
        Err(Errno::EOPNOTSUPP)
    }

    fn may_unbind_other(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.check_functions(device).map_err(told)
    }

    fn reset(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.reset(device).map_err(told)
    }
}
