//! From dom0 to hidden, and back.

use std::sync::Arc;

use conf_space::address::Bdf;
use nix::errno::Errno;
use xenbus::{DomId, XenError};

use super::device::Parts;
use super::reset::not_free;
use super::together::Abandoned;
use super::{Device, DeviceError, Devices, for_xen};
use crate::host::config_state;
use crate::host::is_bridge;
use crate::host::record::{Flags, Phase, Record};
use crate::host::{Function, HostError, backend};
use crate::text::{chain, listed};

/// The name that `driver_override` reserves a hidden device for. The kernel's own backend and libvirt use the same.
pub const RESERVED_FOR: &str = "pciback";

/// Whether Xen is told to keep the device's DMA from everybody while no guest has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quarantine {
    /// By us, as `xl pci-assignable-add` does.
    Ours,
    /// By whoever asked: xl does it itself right afterwards.
    Callers,
}

/// What becomes of a device that is dom0's again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebind {
    /// The driver it had before, or else whichever matches, takes it.
    Driver,
    /// It stays without one: the caller binds one.
    Nothing,
    /// It stays reserved, as it was.
    Reserved,
}

/// A device on its way from dom0 to hidden.
#[derive(Debug)]
pub(super) struct Begun {
    pub bdf: Bdf,
    pub record: Record,
    /// It was on that way before the daemon was started anew.
    pub(super) resumed: bool,
}

/// A device on its way back to dom0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaving<'a> {
    pub bdf: Bdf,
    pub record: &'a Record,
    pub rebind: Rebind,
}

impl<'a> Leaving<'a> {
    /// One that is to be as it was before it was hidden.
    pub(super) fn as_before(bdf: Bdf, record: &'a Record) -> Self {
        let rebind = if record.flags().contains(Flags::RESERVED) {
            Rebind::Reserved
        } else {
            Rebind::Driver
        };
        Self {
            bdf,
            record,
            rebind,
        }
    }
}

impl Devices {
    /// Hides a device from dom0. `false`: it was hidden already.
    ///
    /// # Errors
    /// [`DeviceError`]; the device is then dom0's as before.
    pub fn hide(&self, bdf: Bdf, force: bool, quarantine: Quarantine) -> Result<bool, DeviceError> {
        if !self.announce(bdf)? {
            // One that could not be opened when it changed hands is tried again.
            self.bus.open(bdf)?;
            return Ok(false);
        }
        self.finish_hiding(bdf, force, quarantine).map(|()| true)
    }

    /// Notes a device as coming. `false`: it is hidden already.
    pub(super) fn announce(&self, bdf: Bdf) -> Result<bool, DeviceError> {
        let mut table = self.table();
        let busy = |phase: Phase| DeviceError::Busy {
            bdf,
            phase: phase.name(),
        };
        if let Some(device) = table.hidden.get(&bdf) {
            return match device.record.phase() {
                Some(Phase::Dead) => Err(DeviceError::Dead { bdf }),
                Some(phase @ Phase::Returning) => Err(busy(phase)),
                _ => Ok(false),
            };
        }
        if let Some(&phase) = table.coming.get(&bdf) {
            return Err(busy(phase));
        }
        table.coming.insert(bdf, Phase::Hiding);
        Ok(true)
    }

    /// Hides a device that is noted as coming.
    pub(super) fn finish_hiding(
        &self,
        bdf: Bdf,
        force: bool,
        quarantine: Quarantine,
    ) -> Result<(), DeviceError> {
        let taken = self.take_all(&[bdf], &[bdf], force, quarantine);
        self.arrived(&[bdf], taken)
    }

    /// Devices that were coming are hidden, or else dom0's as they were: nothing stays half-way.
    pub(super) fn arrived(
        &self,
        coming: &[Bdf],
        taken: Result<Vec<Arc<Device>>, Abandoned>,
    ) -> Result<(), DeviceError> {
        let (arrived, result) = match taken {
            Ok(devices) => (devices, Ok(())),
            Err(abandoned) => {
                self.undo(&abandoned.leaving());
                (Vec::new(), Err(abandoned.error))
            }
        };
        {
            let mut table = self.table();
            for bdf in coming {
                table.coming.remove(bdf);
            }
            for device in arrived {
                device.record.clear(Flags::WITH_GROUP);
                table.hidden.insert(device.bdf, device);
            }
        }
        // A guest may be waiting for one, or for being told that it cannot have it.
        self.wake();
        result
    }

    fn is_reserved(&self, bdf: Bdf) -> Result<bool, DeviceError> {
        Ok(self.bus.driver_override(bdf)?.as_deref() == Some(RESERVED_FOR))
    }

    /// Devices that were reserved for us by `driver_override` while we did not run, which have no driver: at boot, before drivers were loaded.
    ///
    /// # Errors
    /// When the host's devices cannot be listed.
    pub fn reserved(&self) -> Result<Vec<Bdf>, DeviceError> {
        let mut devices = self.bus.list()?;
        devices.retain(|&bdf| {
            self.get(bdf).is_none()
                && self.is_reserved(bdf).unwrap_or_default()
                && self
                    .bus
                    .describe(bdf)
                    .is_ok_and(|device| device.driver.is_none())
        });
        Ok(devices)
    }

    /// Notes that a device is about to be hidden. `together`: the devices that are hidden with it.
    pub(super) fn begin(
        &self,
        bdf: Bdf,
        force: bool,
        together: &[Bdf],
    ) -> Result<Begun, DeviceError> {
        let before = self.bus.describe(bdf)?;
        if is_bridge(before.class) {
            return Err(DeviceError::Bridge { bdf });
        }
        if !force {
            if let Function::Physical {
                enabled: count @ 1..,
                ..
            } = before.function
            {
                return Err(DeviceError::HasVirtualFunctions { bdf, count });
            }
            if let Some(reason) = self.bus.needed_by_dom0(bdf)? {
                return Err(DeviceError::Needed { bdf, reason });
            }
        }
        let choice = self.config.get().settings_for(&before.names()).host;
        backend::check(choice, self.bus.backend())
            .map_err(|why| HostError::WrongHost { bdf, why })?;
        self.bus.check_together(bdf, together)?;
        // They go with its driver. Not even by force while guests have them: who insists takes them from the guests first.
        self.take_back_functions(bdf)?;
        let record = Record::open(&self.directory, bdf)?;
        if let (Some(Phase::Assigned), Some(owner)) = (record.phase(), record.owner()) {
            // It could not be taken up when the daemon started, and is not ours to take from its guest.
            log::error!("{bdf} is domain {}'s", owner.domain);
            return Err(DeviceError::InUse {
                bdf,
                domain: owner.domain,
            });
        }
        let resumed = record.phase().is_some();
        if !resumed {
            if before.driver.is_none() && self.is_reserved(bdf)? {
                record.insert(Flags::RESERVED);
            }
            if together.len() > 1 {
                record.insert(Flags::WITH_GROUP);
            }
            record.set_driver(before.driver.as_deref());
            record.set_phase(Phase::Hiding);
        }
        Ok(Begun {
            bdf,
            record,
            resumed,
        })
    }

    /// Takes a device from its driver.
    pub(super) fn detach(&self, bdf: Bdf) -> Result<(), DeviceError> {
        // One that was on its way already may be ours by now, and is to stay so.
        let has_driver = self.bus.describe(bdf)?.driver.is_some();
        // Reserved first: nobody may grab it between two steps.
        self.bus.set_driver_override(bdf, Some(RESERVED_FOR))?;
        if has_driver {
            self.busy(bdf, "unbinding its driver", || self.bus.unbind(bdf))?;
        }
        Ok(())
    }

    /// From a device without a driver to a hidden one. On failure what was begun comes back, for undoing.
    pub(super) fn prepare(
        &self,
        begun: Begun,
        quarantine: Quarantine,
    ) -> Result<Arc<Device>, (Begun, DeviceError)> {
        let (bdf, record) = (begun.bdf, &begun.record);
        let steps = || -> Result<Parts, DeviceError> {
            self.keep_powered(bdf, record)?;
            if !record.flags().contains(Flags::ENABLED) {
                if begun.resumed {
                    // It may be on already, by a daemon that did not live to write that down. If not, this is refused.
                    let _ = self.bus.enable(bdf, false);
                }
                self.bus.enable(bdf, true)?;
                record.insert(Flags::ENABLED);
            }
            // Only now is the interrupt routed and its number right.
            let parts = self.open_parts(bdf, self.bus.describe(bdf)?)?;
            if !record.flags().contains(Flags::SAVED) {
                record.set_config(&config_state::save(
                    &*parts.config,
                    parts.description.identity.config_size,
                ));
            }
            Ok(parts)
        };
        let parts = match steps() {
            Ok(parts) => parts,
            Err(error) => return Err((begun, error)),
        };
        let Begun {
            record, resumed, ..
        } = begun;
        let device = parts.with(record);
        match self
            .hand_to_xen(&device, quarantine)
            .and_then(|()| self.reset_and_restore(&device))
        {
            Ok(()) => {
                device.record.set_phase(Phase::Hidden);
                Ok(Arc::new(device))
            }
            Err(error) => {
                let record = device.record;
                let begun = Begun {
                    bdf,
                    record,
                    resumed,
                };
                Err((begun, error))
            }
        }
    }

    /// To the kernel, a device without a driver is used by nobody: where user space has allowed it, it suspends the bridge above when nothing
    /// else there is used. The kernel's own backend keeps a device in use by being its driver.
    pub(super) fn keep_powered(&self, bdf: Bdf, record: &Record) -> Result<(), DeviceError> {
        if self.bus.may_lose_power(bdf)? {
            record.insert(Flags::COULD_LOSE_POWER);
            self.bus.set_may_lose_power(bdf, false)?;
        }
        Ok(())
    }

    fn hand_to_xen(&self, device: &Device, quarantine: Quarantine) -> Result<(), DeviceError> {
        let (bdf, xen) = (device.bdf, device.xen());
        if device.interrupts.msix().is_some() {
            // Xen must record the table before a guest can touch it. A Xen without this call needs none (before 4.4).
            match self.xen.prepare_msix(xen) {
                Ok(()) => device.record.insert(Flags::MSIX_PREPARED),
                Err(error) if error.errno() == Some(libc::ENOSYS) => {}
                Err(error) => log::warn!(
                    "{bdf}: its MSI-X will not work in a guest: {}",
                    chain(&error)
                ),
            }
        }
        if quarantine == Quarantine::Ours {
            match self.xen.assign_device(DomId::IO, xen) {
                Ok(()) => device.record.insert(Flags::QUARANTINED),
                Err(error) if no_iommu(&error) => {
                    log::info!("{bdf}: no IOMMU, so nothing to quarantine")
                }
                Err(source) => {
                    return Err(DeviceError::Xen {
                        bdf,
                        what: "Xen will not quarantine its DMA; see 'xl dmesg' for Xen's reason",
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Gives a hidden device back to dom0.
    ///
    /// # Errors
    /// [`DeviceError::InUse`], [`DeviceError::Busy`], [`DeviceError::NotHidden`], [`DeviceError::FunctionsInGuests`],
    /// [`DeviceError::SharedPage`], and what the host refuses.
    pub fn unhide(&self, bdf: Bdf, rebind: Rebind) -> Result<(), DeviceError> {
        self.check_alone(bdf)?;
        self.reserve_for_return(bdf)?;
        self.give_back(bdf, rebind)
    }

    /// Keeps guests from getting a device that is about to be given back.
    pub(super) fn reserve_for_return(&self, bdf: Bdf) -> Result<Arc<Device>, DeviceError> {
        let device = self.find(bdf)?;
        self.check_functions(bdf)?;
        let record = &device.record;
        let phase = {
            let _alone = self.admission();
            let Some(phase @ (Phase::Hidden | Phase::Dead)) = record.phase() else {
                return Err(not_free(&device));
            };
            self.check_pages(&device)?;
            if !record.advance(phase, Phase::Returning) {
                return Err(not_free(&device));
            }
            phase
        };
        // Only now: no guest gets it meanwhile.
        if let Err(error) = self.bus.check_return(bdf) {
            record.set_phase(phase);
            self.wake();
            return Err(error.into());
        }
        Ok(device)
    }

    pub(super) fn give_back(&self, bdf: Bdf, rebind: Rebind) -> Result<(), DeviceError> {
        let device = self.get(bdf).ok_or(DeviceError::NotHidden { bdf })?;
        if let Err(error) = self.reset_and_restore(&device) {
            log::warn!("{}", chain(&error));
        }
        self.hand_back(&[device], rebind);
        Ok(())
    }

    /// From now on the device is not hidden any more. Its record is in use until the last step.
    pub(super) fn is_leaving(&self, device: &Device) {
        let mut table = self.table();
        table.hidden.remove(&device.bdf);
        table.coming.insert(device.bdf, Phase::Returning);
    }

    /// From hidden to dom0's, as they are.
    pub(super) fn hand_back(&self, devices: &[Arc<Device>], rebind: Rebind) {
        for device in devices {
            self.is_leaving(device);
        }
        let leaving = devices.iter().map(|device| Leaving {
            bdf: device.bdf,
            record: &device.record,
            rebind,
        });
        self.undo(&leaving.collect::<Vec<_>>());
        {
            let mut table = self.table();
            for device in devices {
                table.coming.remove(&device.bdf);
            }
        }
        // A guest may be waiting to be told that it cannot have it.
        self.wake();
    }

    /// The way back to dom0, from wherever the devices are on the way. Drivers come last: none can have a device of an IOMMU group as long as
    /// we have another.
    pub(super) fn undo(&self, devices: &[Leaving<'_>]) {
        for device in devices {
            self.let_go(*device);
        }
        for Leaving {
            bdf,
            record,
            rebind,
        } in devices
        {
            let others = self.hidden_beside(*bdf);
            if *rebind == Rebind::Driver && !others.is_empty() {
                // Some kernels do not survive a driver in a group that VFIO has (before 5.19).
                log::error!(
                    "{bdf} stays without a driver, as {} of its IOMMU group is hidden: pciback hide --group {bdf}, or pciback unhide --group {bdf}",
                    listed(&others)
                );
            } else if *rebind == Rebind::Driver
                && let Err(error) = self.busy(*bdf, "binding its driver", || {
                    self.bus.bind(*bdf, record.driver().as_deref())
                })
            {
                log::warn!("{}", chain(&error));
            }
            if let Err(error) = record.remove() {
                log::error!("{}", chain(&error));
            }
        }
    }

    /// Goes on past what fails: each step helps without the others.
    fn let_go(&self, device: Leaving<'_>) {
        let Leaving {
            bdf,
            record,
            rebind,
        } = device;
        let xen = for_xen(bdf);
        // Also when the quarantine was xl's, or the one that Xen puts a device in after a guest: dom0 needs its DMA and MSI back.
        match self.xen.deassign_device(DomId::IO, xen) {
            Ok(()) => {}
            Err(error)
                if no_iommu(&error)
                    || error.errno() == Some(libc::ENODEV)
                    || error.errno() == Some(libc::EINVAL) => {}
            Err(error) => log::error!(
                "{bdf}: Xen does not give its DMA back to dom0, so dom0's driver will not work: {}",
                chain(&error)
            ),
        }
        if record.flags().contains(Flags::MSIX_PREPARED)
            && let Err(error) = self.xen.release_msix(xen)
        {
            log::warn!("{bdf}: {}", chain(&error));
        }
        if record.flags().contains(Flags::RESET_NARROWED) {
            self.widen(bdf, record, &[]);
        }
        if record.flags().contains(Flags::ENABLED)
            && let Err(error) = self.bus.enable(bdf, false)
        {
            log::warn!("{}", chain(&error));
        }
        if record.flags().contains(Flags::COULD_LOSE_POWER)
            && let Err(error) = self.bus.set_may_lose_power(bdf, true)
        {
            log::warn!("{}", chain(&error));
        }
        if rebind != Rebind::Reserved
            && let Err(error) = self.bus.set_driver_override(bdf, None)
        {
            log::error!("{}", chain(&error));
        }
    }
}

fn no_iommu(error: &XenError) -> bool {
    matches!(
        error.errno().map(Errno::from_raw),
        Some(Errno::ENOSYS | Errno::EOPNOTSUPP)
    )
}
