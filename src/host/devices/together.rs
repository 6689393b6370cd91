//! Devices that only go together: those of an IOMMU group, where devices are reached through VFIO.

use std::sync::Arc;

use conf_space::address::Bdf;

use super::hide::{Begun, Leaving};
use super::{Device, DeviceError, Devices, Quarantine, Rebind};
use crate::text::chain;

impl Devices {
    /// Hides a device and all that it goes together with, and returns those that were not hidden before.
    ///
    /// # Errors
    /// [`DeviceError`]; all of them are then as before.
    pub fn hide_group(&self, bdf: Bdf, force: bool) -> Result<Vec<Bdf>, DeviceError> {
        let group = self.bus.together(bdf)?;
        let mut coming = Vec::new();
        let announced = group.iter().try_for_each(|&bdf| {
            if self.announce(bdf)? {
                coming.push(bdf);
            }
            Ok(())
        });
        let result = announced.and_then(|()| self.take_all(&coming, &group, force));
        match result {
            Ok(devices) => {
                for device in devices {
                    self.arrived(device.bdf, Ok(device))?;
                }
                Ok(coming)
            }
            Err(error) => {
                let mut table = self.table();
                for bdf in &coming {
                    table.coming.remove(bdf);
                }
                drop(table);
                self.wake();
                Err(error)
            }
        }
    }

    /// From dom0's to hidden: all lose their drivers before the first is opened.
    fn take_all(
        &self,
        coming: &[Bdf],
        group: &[Bdf],
        force: bool,
    ) -> Result<Vec<Arc<Device>>, DeviceError> {
        let mut begun: Vec<Begun> = Vec::new();
        let mut hidden: Vec<Arc<Device>> = Vec::new();
        let mut result = coming.iter().try_for_each(|&bdf| {
            begun.push(self.begin(bdf, force, group)?);
            self.detach(bdf)
        });
        // Those that failed on the way, besides those that have not begun it.
        let mut failed = None;
        while result.is_ok() && !begun.is_empty() {
            match self.prepare(begun.remove(0), Quarantine::Ours) {
                Ok(device) => hidden.push(device),
                Err((device, error)) => {
                    failed = Some(device);
                    result = Err(error);
                }
            }
        }
        result.map(|()| hidden.clone()).inspect_err(|_| {
            let arrived = hidden.iter().map(|device| Leaving {
                bdf: device.bdf,
                record: &device.record,
                rebind: Rebind::Driver,
            });
            let others = failed.iter().chain(&begun).map(Begun::leaving);
            self.undo(&arrived.chain(others).collect::<Vec<_>>());
        })
    }

    /// Gives a device back to dom0, with all that is hidden of what it goes together with, and returns them.
    ///
    /// # Errors
    /// As [`Devices::unhide`]; all of them are then hidden as before.
    pub fn unhide_group(&self, bdf: Bdf) -> Result<Vec<Bdf>, DeviceError> {
        let mut group = self.bus.together(bdf)?;
        group.retain(|other| *other == bdf || self.get(*other).is_some());
        let mut devices: Vec<(Arc<Device>, _)> = Vec::new();
        for bdf in &group {
            let before = self.get(*bdf).and_then(|device| device.record.phase());
            match (self.reserve_for_return(*bdf), before) {
                (Ok(device), Some(before)) => devices.push((device, before)),
                (Ok(_), None) => {}
                (Err(error), _) => {
                    for (device, before) in devices {
                        device.record.set_phase(before);
                    }
                    return Err(error);
                }
            }
        }
        let devices: Vec<Arc<Device>> = devices.into_iter().map(|(device, _)| device).collect();
        for device in &devices {
            if let Err(error) = self.reset_and_restore(device) {
                log::warn!("{}", chain(&error));
            }
        }
        self.hand_back(&devices, Rebind::Driver);
        Ok(group)
    }

    /// Refuses to give a device back to dom0 while others stay hidden that it goes together with: no driver could have it.
    pub(super) fn check_alone(&self, bdf: Bdf) -> Result<(), DeviceError> {
        // What was removed from the machine has no group any more.
        let group = self.bus.together(bdf).unwrap_or_default();
        let is_other = |other: &Bdf| *other != bdf && self.get(*other).is_some();
        let others: Vec<Bdf> = group.into_iter().filter(is_other).collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(DeviceError::Together { bdf, others })
    }
}
