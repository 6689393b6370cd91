//! Resetting hidden devices, and what becomes of one that does not come back.

use std::sync::Arc;

use conf_space::AccessError;
use conf_space::address::Bdf;

use super::{Device, DeviceError, Devices};
use crate::config::ResetChoice;
use crate::host::HostError;
use crate::host::config_state;
use crate::host::interrupts;
use crate::host::record::{Flags, Phase, Record};
use crate::host::reset::{Way, way};
use crate::text::chain;

/// A reset method, and what came of it.
pub type Attempt = (String, Result<(), DeviceError>);

impl Devices {
    /// Resets a device for the toolstack (`do_flr`), on the caller's thread and as its settings say. A guest that has it keeps its
    /// configuration and interrupts.
    ///
    /// # Errors
    /// As [`Devices::reset_free`], but for [`DeviceError::InUse`].
    pub fn reset(self: &Arc<Self>, bdf: Bdf) -> Result<(), DeviceError> {
        let device = self.get(bdf).ok_or(DeviceError::NotHidden { bdf })?;
        let choice = self.settings(&device).reset;
        if device.record.phase() != Some(Phase::Assigned) {
            return self.reset_free(bdf, choice);
        }
        self.check_functions(bdf)?;
        // The kernel saves and restores the standard configuration around it.
        self.reset_by(&device, choice)?;
        self.check_alive(&device)?;
        self.restore_interrupts(&device);
        Ok(())
    }

    /// Resets a device that no guest has, on the caller's thread. One that was dead and comes back can be given to guests again; one that
    /// does not come back is dead.
    ///
    /// # Errors
    /// What the reset failed with; [`DeviceError::Dead`], [`DeviceError::InUse`], [`DeviceError::Busy`], [`DeviceError::NotHidden`].
    pub fn reset_free(self: &Arc<Self>, bdf: Bdf, choice: ResetChoice) -> Result<(), DeviceError> {
        let device = self.find(bdf)?;
        self.check_functions(bdf)?;
        let record = &device.record;
        // Nobody gets it meanwhile, and a daemon that is started anew resets it again.
        if !record.advance(Phase::Hidden, Phase::Releasing)
            && !record.advance(Phase::Dead, Phase::Releasing)
        {
            return Err(not_free(&device));
        }
        self.reset_held(&device, || self.reset_by(&device, choice))
    }

    /// Refuses what [`Devices::reset_free`] would, but for what is the matter with virtual functions: before they are taken from guests for it.
    ///
    /// # Errors
    /// As [`Devices::check_free`]; [`DeviceError::NoSuchReset`].
    pub fn check_reset(&self, bdf: Bdf, choice: ResetChoice) -> Result<(), DeviceError> {
        self.check_free(bdf)?;
        let offered = self.bus.describe(bdf)?.reset_methods;
        self.way(bdf, choice, &offered).map(drop)
    }

    /// A hidden device that no guest has.
    ///
    /// # Errors
    /// [`DeviceError::InUse`], [`DeviceError::Busy`], [`DeviceError::NotHidden`].
    pub fn check_free(&self, bdf: Bdf) -> Result<Arc<Device>, DeviceError> {
        let device = self.find(bdf)?;
        match device.record.phase() {
            Some(Phase::Hidden | Phase::Dead) => Ok(device),
            _ => Err(not_free(&device)),
        }
    }

    /// Tries each reset that the kernel offers for a device that no guest has, until one kills it. With their names.
    ///
    /// # Errors
    /// As [`Devices::reset_free`], but what a reset failed with is in the list.
    pub fn try_resets(self: &Arc<Self>, bdf: Bdf) -> Result<Vec<Attempt>, DeviceError> {
        let device = self.find(bdf)?;
        self.check_functions(bdf)?;
        let offered = self.bus.describe(bdf)?.reset_methods;
        let mut attempts = Vec::new();
        for method in &offered {
            if !device.record.advance(Phase::Hidden, Phase::Releasing) {
                return Err(not_free(&device));
            }
            let result = self.reset_held(&device, || {
                let _alone = device.alone();
                self.reset_in(&device, Way::By(method), &offered)
            });
            let dead = matches!(result, Err(DeviceError::Dead { .. }));
            attempts.push((method.clone(), result));
            if dead {
                break;
            }
        }
        Ok(attempts)
    }

    /// Resets a device that was taken for that, restores it, and lets it go.
    pub(super) fn reset_held(
        self: &Arc<Self>,
        device: &Device,
        reset: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let reset = reset();
        let restored = self.restore_or_bury(device);
        if device.is_removed() {
            self.forget(device);
        } else {
            self.keep_functions_beside(device);
        }
        self.wake();
        if let (Err(_), Err(error)) = (&restored, &reset) {
            log::error!("{}", chain(error));
        }
        restored.and(reset)
    }

    /// Resets a device that its guest has let go of, on a thread of its own.
    pub(super) fn reset_in_background(self: &Arc<Self>, device: Arc<Device>) {
        let bdf = device.bdf;
        self.in_background(bdf, "reset", move |devices| {
            if device.is_removed() {
                // Not even its PIRQs are unmapped: Xen has freed the interrupts behind them, and may have given them to another device.
                return devices.forget(&device);
            }
            interrupts::release(&device, &*devices.xen);
            if let Err(error) = devices.reset_by(&device, devices.settings(&device).reset) {
                log::warn!("{bdf} is used without a reset: {}", chain(&error));
            }
            device
                .record
                .update_settings(|settings| settings.reset = None);
            let restored = devices.restore_or_bury(&device);
            if device.is_removed() {
                return devices.forget(&device);
            }
            match restored {
                Ok(()) => log::info!("{bdf} is free for the next guest"),
                Err(error) => log::error!("{}", chain(&error)),
            }
            devices.wake();
            devices.keep_functions_beside(&device);
        });
    }

    /// Gives a device that was reset the configuration from before any guest, and moves it on: to hidden, or dead if it does not answer. One that
    /// cannot be looked at now is no worse for that: whoever opens it next finds out.
    fn restore_or_bury(&self, device: &Device) -> Result<(), DeviceError> {
        let restored = self.restore(device);
        device.record.set_phase(match restored {
            Err(DeviceError::Dead { .. } | DeviceError::Host(HostError::NoDevice { .. })) => {
                Phase::Dead
            }
            _ => Phase::Hidden,
        });
        restored
    }

    /// Resets the device and gives it the configuration it had before any guest. A device that cannot be reset is used as it is.
    pub(super) fn reset_and_restore(&self, device: &Device) -> Result<(), DeviceError> {
        if let Err(error) = self.reset_by(device, self.settings(device).reset) {
            log::warn!("{} goes on without a reset: {}", device.bdf, chain(&error));
        }
        self.restore(device)
    }

    fn restore(&self, device: &Device) -> Result<(), DeviceError> {
        self.check_alive(device)?;
        let saved = device.record.config();
        config_state::restore(&*device.config, &saved, config_state::saved_command(&saved));
        Ok(())
    }

    /// Whether a device answers. Waits for one that is changing hands.
    fn check_alive(&self, device: &Device) -> Result<(), DeviceError> {
        let bdf = device.bdf;
        self.bus.open(bdf)?;
        match device.command_and_status() {
            Ok(value) if value != u32::MAX => Ok(()),
            // It has begun to do so again.
            Err(AccessError::Failed {
                errno: libc::EBUSY, ..
            }) => Err(DeviceError::Busy {
                bdf,
                phase: "changing hands",
            }),
            _ => Err(DeviceError::Dead { bdf }),
        }
    }

    /// One reset of a device at a time: another one's choice of methods must not be in force.
    fn reset_by(&self, device: &Device, choice: ResetChoice) -> Result<(), DeviceError> {
        let _alone = device.alone();
        self.reset_alone(device, choice)
    }

    /// For who holds the lock.
    pub(super) fn reset_alone(
        &self,
        device: &Device,
        choice: ResetChoice,
    ) -> Result<(), DeviceError> {
        let bdf = device.bdf;
        let offered = self.bus.describe(bdf)?.reset_methods;
        self.reset_in(device, self.way(bdf, choice, &offered)?, &offered)
    }

    fn way<'a>(
        &self,
        bdf: Bdf,
        choice: ResetChoice,
        offered: &'a [String],
    ) -> Result<Way<'a>, DeviceError> {
        way(choice, offered).map_err(|missing| DeviceError::NoSuchReset {
            bdf,
            missing,
            beside: self.bus.beside(bdf).unwrap_or_default(),
        })
    }

    fn reset_in(
        &self,
        device: &Device,
        way: Way<'_>,
        offered: &[String],
    ) -> Result<(), DeviceError> {
        let bdf = device.bdf;
        match way {
            Way::Kernels => Ok(self.reset_function(device)?),
            Way::Not => {
                log::info!("{bdf} is not reset, as its settings say");
                Ok(())
            }
            Way::By(method) if offered == [method] => Ok(self.reset_function(device)?),
            Way::By(method) => {
                // Written down first: a daemon that is killed here leaves the kernel with one method only.
                device.record.insert(Flags::RESET_NARROWED);
                let result = self
                    .bus
                    .set_reset_methods(bdf, &[method])
                    .and_then(|()| self.reset_function(device));
                let all: Vec<&str> = offered.iter().map(String::as_str).collect();
                self.widen(bdf, &device.record, &all);
                Ok(result?)
            }
        }
    }

    /// Lets the kernel use these methods again; all that it has if none is named.
    pub(super) fn widen(&self, bdf: Bdf, record: &Record, methods: &[&str]) {
        match self.bus.set_reset_methods(bdf, methods) {
            Ok(()) => record.clear(Flags::RESET_NARROWED),
            Err(error) => log::warn!("{}", chain(&error)),
        }
    }

    /// Puts MSI and MSI-X of a device that was reset under its guest back to what they were.
    pub fn restore_interrupts(&self, device: &Device) {
        interrupts::restore(device, &*self.xen);
    }
}

/// Why nobody else can have a device now.
pub(super) fn not_free(device: &Device) -> DeviceError {
    let (bdf, record) = (device.bdf, &device.record);
    match (record.phase(), record.owner()) {
        (Some(Phase::Assigned), Some(owner)) => DeviceError::InUse {
            bdf,
            domain: owner.domain,
        },
        (Some(Phase::Dead), _) => DeviceError::Dead { bdf },
        (phase, _) => DeviceError::Busy {
            bdf,
            phase: phase.map_or("unknown", Phase::name),
        },
    }
}
