//! SR-IOV: virtual functions are made and taken away, and their physical function is not touched while guests have them.
//!
//! A virtual function that goes while its guest has interrupts of it takes the machine with it: Xen (seen with 4.17) forgets the interrupt
//! when dom0's kernel tells it that the device was removed, the guest's PIRQ goes on naming it, and Xen panics when the guest unbinds that.
//! The kernel's own backend keeps such a device by a flag that user space cannot set. So order is everything: first from the guest, its
//! PIRQs unmapped, then from hidden to dom0, and only then the physical function's driver is told.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use conf_space::address::Bdf;

use super::error::Users;
use super::{Device, DeviceError, Devices, Rebind};
use crate::command;
use crate::config::Commands;
use crate::host::record::{Flags, Owner, Phase};
use crate::host::{Function, HostError};
use crate::text::chain;

/// What becomes of virtual functions that are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewFunctions {
    /// dom0's drivers take them, as the physical function's settings say.
    Probed,
    /// No driver of dom0's ever sees them.
    LeftAlone,
}

const BY_FORCE: &str = "the host's operator took it away by force";

impl Devices {
    /// The hidden virtual functions of a physical one.
    fn hidden_functions(&self, physical: Bdf) -> Vec<Arc<Device>> {
        let is_of = |device: &Arc<Device>| matches!(device.description.function, Function::Virtual { physical: of, .. } if of == physical);
        self.list().into_iter().filter(is_of).collect()
    }

    /// Those that guests have, or have only just lost.
    pub fn functions_in_guests(&self, physical: Bdf) -> Vec<Arc<Device>> {
        let mut found = self.hidden_functions(physical);
        found.retain(|device| {
            matches!(
                device.record.phase(),
                Some(Phase::Assigned | Phase::Releasing)
            )
        });
        found
    }

    /// Refuses what would take virtual functions from under guests. For a device that has none it refuses nothing.
    ///
    /// # Errors
    /// [`DeviceError::FunctionsInGuests`].
    pub fn check_functions(&self, physical: Bdf) -> Result<(), DeviceError> {
        let users: Vec<_> = self
            .functions_in_guests(physical)
            .iter()
            .filter_map(|device| Some((device.bdf, device.record.owner()?.domain)))
            .collect();
        if users.is_empty() {
            return Ok(());
        }
        Err(DeviceError::FunctionsInGuests {
            bdf: physical,
            users: Users(users),
        })
    }

    /// Gives all hidden virtual functions of a physical one back to dom0, without a driver: they are about to go.
    ///
    /// # Errors
    /// [`DeviceError::FunctionsInGuests`], [`DeviceError::Busy`]; nothing has changed then.
    pub(super) fn take_back_functions(&self, physical: Bdf) -> Result<(), DeviceError> {
        self.check_functions(physical)?;
        let mut reserved: Vec<(Arc<Device>, Phase)> = Vec::new();
        for device in self.hidden_functions(physical) {
            let from = [Phase::Hidden, Phase::Dead]
                .into_iter()
                .find(|from| device.record.advance(*from, Phase::Returning));
            match from {
                // From here on no guest can claim it.
                Some(from) => reserved.push((device, from)),
                None => {
                    for (device, from) in reserved {
                        device.record.set_phase(from);
                    }
                    self.wake();
                    self.check_functions(physical)?;
                    return Err(DeviceError::Busy {
                        bdf: device.bdf,
                        phase: device.record.phase().map_or("unknown", Phase::name),
                    });
                }
            }
        }
        // Not reset: nobody will use them again.
        let devices: Vec<_> = reserved.into_iter().map(|(device, _)| device).collect();
        self.hand_back(&devices, Rebind::Nothing);
        Ok(())
    }

    /// Keeps others from taking virtual functions away while guests have any of those beside `device`, and lets them when none has. For a
    /// device that is no virtual function there is nothing to do. On a thread of its own: it may be systemd who has to do it, and nobody's
    /// guest is to wait for systemd.
    pub(super) fn keep_functions_beside(self: &Arc<Self>, device: &Device) {
        let Function::Virtual { physical, .. } = device.description.function else {
            return;
        };
        let spawned = self.spawn(format!("keep {physical}"), move |devices| {
            devices.keep_functions(physical);
        });
        if let Err(error) = spawned {
            log::warn!(
                "others may take the virtual functions of {physical} away while guests have them, as no thread can be started to keep them from \
                 it ({error}); restart pcibackd when memory is free again"
            );
            self.hand_out(&self.functions_in_guests(physical));
        }
    }

    /// As [`Devices::keep_functions_beside`], after a start: guests may have come and gone since.
    pub(super) fn keep_all_functions(self: &Arc<Self>) {
        let spawned = self.spawn("keep all".to_owned(), |devices| {
            for bdf in devices.bus.list().unwrap_or_default() {
                let described = devices.bus.describe(bdf);
                if described.is_ok_and(|found| matches!(found.function, Function::Physical { .. }))
                {
                    devices.keep_functions(bdf);
                }
            }
        });
        if let Err(error) = spawned {
            log::warn!("who may take virtual functions away stays as it was: {error}");
            self.hand_out(&self.list());
        }
    }

    fn keep_functions(&self, physical: Bdf) {
        // Two that come and go at the same time must not undo each other's.
        let _alone = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let used = self.functions_in_guests(physical);
        match self.bus.keep_virtual_functions(physical, !used.is_empty()) {
            // With its physical function it may have gone itself.
            Ok(()) | Err(HostError::NoDevice { .. }) => {}
            Err(error) => log::warn!("{}", chain(&error)),
        }
        self.hand_out(&used);
    }

    /// Lets guests have virtual functions that were withheld from them: nobody takes them away now, or nothing more can be done about it.
    fn hand_out(&self, functions: &[Arc<Device>]) {
        let mut any = false;
        for device in functions.iter().filter(|device| device.is_withheld()) {
            device.record.clear(Flags::WITHHELD);
            any = true;
        }
        if any {
            self.wake();
        }
    }

    /// Takes virtual functions from the guests that have them, and waits until they are free: by the toolstack's command, which leaves
    /// everything in order, or else without asking anybody.
    ///
    /// # Errors
    /// [`DeviceError::NotVacated`] when one does not become free.
    pub fn vacate(&self, physical: Bdf) -> Result<(), DeviceError> {
        /// A reset takes up to a minute.
        const PATIENCE: Duration = Duration::from_secs(70);
        const LOOK: Duration = Duration::from_millis(5);
        let config = self.config.get();
        for device in self.functions_in_guests(physical) {
            let (bdf, owner) = (device.bdf, device.record.owner());
            let Some(Owner { domain, .. }) = owner else {
                continue;
            };
            log::warn!("{bdf}: to be taken from domain {domain} by force");
            let detach = Commands::fill(&config.commands.detach, domain, bdf);
            command::run(&detach, domain, bdf);
            if device.is_held_by(domain) {
                self.withdraw(&device, BY_FORCE);
            }
        }
        let begin = Instant::now();
        let any_is_there = || {
            let mut found = self.functions_in_guests(physical).into_iter();
            found.any(|device| !device.is_removed())
        };
        while begin.elapsed() < PATIENCE && any_is_there() {
            thread::sleep(LOOK);
        }
        self.check_functions(physical).map_err(|error| match error {
            DeviceError::FunctionsInGuests { bdf, users } => DeviceError::NotVacated { bdf, users },
            other => other,
        })
    }

    /// One at a time: what is so for a moment only must not be what the next one finds.
    fn provision(&self) -> MutexGuard<'_, ()> {
        let provisioning = self.provisioning.lock();
        provisioning.unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a physical function have `count` virtual functions, and returns them. With as many as there are, does nothing.
    ///
    /// # Errors
    /// [`DeviceError::Functions`], [`DeviceError::Host`].
    pub fn create_functions(
        &self,
        physical: Bdf,
        count: u16,
        new: NewFunctions,
    ) -> Result<Vec<Bdf>, DeviceError> {
        let _alone = self.provision();
        let before = self.bus.describe(physical)?;
        if sriov::must_change(physical, &before.function, before.driver.as_deref(), count)? {
            self.keep_functions(physical);
            match new {
                NewFunctions::Probed => self.bus.set_virtual_functions(physical, count)?,
                NewFunctions::LeftAlone => {
                    self.unprobed(physical, || self.bus.set_virtual_functions(physical, count))?
                }
            }
        }
        match self.bus.describe(physical)?.function {
            Function::Physical {
                virtual_functions, ..
            } => Ok(virtual_functions.into_iter().map(|(_, bdf)| bdf).collect()),
            Function::Plain | Function::Virtual { .. } => Ok(Vec::new()),
        }
    }

    /// Takes all virtual functions of a physical one away, and returns how many there were.
    ///
    /// # Errors
    /// [`DeviceError::FunctionsInGuests`], [`DeviceError::Busy`], [`DeviceError::Functions`], [`DeviceError::Host`].
    pub fn destroy_functions(&self, physical: Bdf) -> Result<u16, DeviceError> {
        let _alone = self.provision();
        let before = self.bus.describe(physical)?;
        if sriov::must_change(physical, &before.function, before.driver.as_deref(), 0)? {
            self.take_back_functions(physical)?;
            self.keep_functions(physical);
            self.bus.set_virtual_functions(physical, 0)?;
        }
        Ok(match before.function {
            Function::Physical { enabled, .. } => enabled,
            Function::Plain | Function::Virtual { .. } => 0,
        })
    }
}
