//! Devices that only go together: those of an IOMMU group, where devices are reached through VFIO.

use std::collections::VecDeque;
use std::sync::Arc;

use conf_space::address::Bdf;

use super::hide::{Begun, Leaving};
use super::{Device, DeviceError, Devices, Quarantine, Rebind};
use crate::host::record::Phase;
use crate::text::chain;

/// Devices that were to be hidden, and are not.
#[derive(Debug)]
pub(super) struct Abandoned {
    pub error: DeviceError,
    /// On their way.
    pub begun: Vec<Begun>,
    /// There, but not without the others.
    pub arrived: Vec<Arc<Device>>,
}

impl From<DeviceError> for Abandoned {
    /// Before anything was begun.
    fn from(error: DeviceError) -> Self {
        let (begun, arrived) = (Vec::new(), Vec::new());
        Self {
            error,
            begun,
            arrived,
        }
    }
}

impl Abandoned {
    pub fn leaving(&self) -> Vec<Leaving<'_>> {
        let arrived = self.arrived.iter();
        let arrived = arrived.map(|device| (device.bdf, &device.record));
        let begun = self.begun.iter().map(|begun| (begun.bdf, &begun.record));
        arrived
            .chain(begun)
            .map(|(bdf, record)| Leaving::as_before(bdf, record))
            .collect()
    }
}

impl Devices {
    /// Hides a device and all that it goes together with, and returns those that were not hidden before.
    ///
    /// # Errors
    /// [`DeviceError`]; all of them are then as before.
    pub fn hide_group(&self, bdf: Bdf, force: bool) -> Result<Vec<Bdf>, DeviceError> {
        let group = self.bus.together(bdf)?;
        let mut coming = Vec::new();
        let announced: Result<(), DeviceError> = group.iter().try_for_each(|&bdf| {
            if self.announce(bdf)? {
                coming.push(bdf);
            } else {
                self.bus.open(bdf)?;
            }
            Ok(())
        });
        let taken = announced
            .map_err(Abandoned::from)
            .and_then(|()| self.take_all(&coming, &group, force, Quarantine::Ours));
        self.arrived(&coming, taken)?;
        Ok(coming)
    }

    /// From dom0's to hidden: all lose their drivers before the first is opened. `group`: those that dom0 is not to have.
    pub(super) fn take_all(
        &self,
        coming: &[Bdf],
        group: &[Bdf],
        force: bool,
        quarantine: Quarantine,
    ) -> Result<Vec<Arc<Device>>, Abandoned> {
        let mut begun: VecDeque<Begun> = VecDeque::new();
        let mut hidden: Vec<Arc<Device>> = Vec::new();
        // Those that an earlier daemon had hidden, and this one could not take up: they stay so.
        let mut held: Vec<Bdf> = Vec::new();
        let detached: Result<(), DeviceError> = coming.iter().try_for_each(|&bdf| {
            let device = self.begin(bdf, force, group)?;
            if device.record.phase() != Some(Phase::Hiding) {
                held.push(bdf);
            }
            begun.push_back(device);
            self.detach(bdf)
        });
        let result = detached.and_then(|()| {
            while let Some(device) = begun.pop_front() {
                match self.prepare(device, quarantine) {
                    Ok(device) => hidden.push(device),
                    Err((device, error)) => {
                        begun.push_front(device);
                        return Err(error);
                    }
                }
            }
            Ok(())
        });
        match result {
            Ok(()) => Ok(hidden),
            Err(error) => {
                let has_begun = |bdf: &Bdf| begun.iter().any(|device| device.bdf == *bdf);
                let arrived = |bdf: &Bdf| hidden.iter().any(|device| device.bdf == *bdf);
                let rest = coming.iter().filter(|bdf| !has_begun(bdf) && !arrived(bdf));
                let rest: Vec<Begun> = rest.filter_map(|bdf| self.begun_before(*bdf)).collect();
                begun.extend(rest);
                begun.retain(|device| !held.contains(&device.bdf));
                hidden.retain(|device| !held.contains(&device.bdf));
                Err(Abandoned {
                    error,
                    begun: begun.into(),
                    arrived: hidden,
                })
            }
        }
    }

    /// Gives a device back to dom0, with all that is hidden of what it goes together with, and returns them.
    ///
    /// # Errors
    /// As [`Devices::unhide`]; all of them are then hidden as before.
    pub fn unhide_group(&self, bdf: Bdf) -> Result<Vec<Bdf>, DeviceError> {
        let mut group = self.bus.together(bdf)?;
        group.retain(|other| *other == bdf || self.get(*other).is_some());
        self.return_all(&group, &[])?;
        Ok(group)
    }

    /// Gives hidden devices back to dom0, all or none. `resumed`: those of them that were on that way already.
    pub(super) fn return_all(&self, group: &[Bdf], resumed: &[Bdf]) -> Result<(), DeviceError> {
        let mut devices: Vec<(Arc<Device>, Phase)> = Vec::new();
        for bdf in group {
            let reserved = if resumed.contains(bdf) {
                self.find(*bdf).map(|device| (device, Phase::Hidden))
            } else {
                let before = self.phase(*bdf).unwrap_or(Phase::Hidden);
                self.reserve_for_return(*bdf).map(|device| (device, before))
            };
            match reserved {
                Ok(device) => devices.push(device),
                Err(error) => {
                    for (device, before) in devices {
                        device.record.set_phase(before);
                    }
                    self.wake();
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
        Ok(())
    }

    /// The others that are hidden of what a device goes together with.
    pub(super) fn hidden_beside(&self, bdf: Bdf) -> Vec<Bdf> {
        // What was removed from the machine has no group any more.
        let mut group = self.bus.together(bdf).unwrap_or_default();
        group.retain(|other| *other != bdf && self.get(*other).is_some());
        group
    }

    /// Refuses to give a device back to dom0 while others stay hidden that it goes together with: no driver could have it.
    pub(super) fn check_alone(&self, bdf: Bdf) -> Result<(), DeviceError> {
        let others = self.hidden_beside(bdf);
        if others.is_empty() {
            return Ok(());
        }
        Err(DeviceError::Together { bdf, others })
    }
}
