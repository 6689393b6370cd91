//! From hidden to a guest, and back.

use std::sync::{Arc, PoisonError};

use conf_space::address::Bdf;
use xenbus::DomId;

use super::reset::not_free;
use super::{Device, DeviceError, Devices};
use crate::host::Function;
use crate::host::record::{Flags, Owner, Phase, RunTime};

/// How a guest came to hold a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It was free.
    Taken,
    /// The guest had it before the daemon was restarted.
    Resumed,
}

/// Whether a guest may have interrupts by the INTx line of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// It may.
    Usable,
    /// Somebody else uses the line.
    Refused,
}

/// Called when a device has become free.
pub type Waker = Box<dyn Fn() + Send>;

impl Devices {
    /// A hidden device that a guest is to have.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] when waiting for the next call of the waker will help, [`DeviceError::NotHidden`].
    pub fn find(&self, bdf: Bdf) -> Result<Arc<Device>, DeviceError> {
        let table = self.table();
        match table.hidden.get(&bdf) {
            Some(device) => Ok(Arc::clone(device)),
            None => Err(match table.coming.get(&bdf) {
                Some(phase) => DeviceError::Busy {
                    bdf,
                    phase: phase.name(),
                },
                None => DeviceError::NotHidden { bdf },
            }),
        }
    }

    /// Whether `domain` may have the device now, without touching it.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] when waiting for the next call of the waker will help; others when it will not.
    pub fn check(&self, device: &Device, domain: DomId) -> Result<(), DeviceError> {
        let (bdf, record) = (device.bdf, &device.record);
        match record.phase() {
            Some(Phase::Hidden) => Ok(()),
            Some(Phase::Assigned) => match record.owner() {
                Some(holder) if holder.domain == domain => Ok(()),
                Some(holder) => Err(DeviceError::InUse {
                    bdf,
                    domain: holder.domain,
                }),
                None => Err(DeviceError::Busy {
                    bdf,
                    phase: Phase::Assigned.name(),
                }),
            },
            Some(Phase::Dead) => Err(DeviceError::Dead { bdf }),
            // Dom0 may not get it back: then it is hidden as before.
            Some(phase @ (Phase::Hiding | Phase::Releasing | Phase::Returning)) => {
                Err(DeviceError::Busy {
                    bdf,
                    phase: phase.name(),
                })
            }
            None => Err(DeviceError::NotHidden { bdf }),
        }
    }

    /// Gives a hidden device to a guest, whose overlay begins as `overlay`; or finds that the guest has it already (after a restart of the
    /// daemon). A virtual function is withheld from it at first ([`Device::is_withheld`]); the waker is called when it is not any more.
    ///
    /// # Errors
    /// As [`Devices::check`].
    pub fn claim(
        self: &Arc<Self>,
        device: &Device,
        owner: Owner,
        overlay: u64,
        line: Line,
    ) -> Result<Claim, DeviceError> {
        let claim = self.take_for(device, owner, overlay, line)?;
        if claim == Claim::Taken {
            self.keep_functions_beside(device);
        }
        Ok(claim)
    }

    fn take_for(
        &self,
        device: &Device,
        owner: Owner,
        overlay: u64,
        line: Line,
    ) -> Result<Claim, DeviceError> {
        // Keeps two claimants apart between the stores.
        let _table = self.table();
        let record = &device.record;
        self.check(device, owner.domain)?;
        if record.phase() == Some(Phase::Assigned) {
            return Ok(Claim::Resumed);
        }
        // That was another guest.
        *device.withdrawal() = None;
        record.set_owner(owner);
        record.set_overlay(overlay);
        record.clear_dropped();
        record.clear(Flags::REVOKED);
        if matches!(device.description.function, Function::Virtual { .. }) {
            record.insert(Flags::WITHHELD);
        }
        match line {
            Line::Usable => record.clear(Flags::WITHOUT_INTX),
            Line::Refused => record.insert(Flags::WITHOUT_INTX),
        }
        record.errors().forget();
        // It may be on its way back to dom0 by now.
        if !record.advance(Phase::Hidden, Phase::Assigned) {
            return Err(not_free(device));
        }
        Ok(Claim::Taken)
    }

    /// Takes a device from its guest: at once as far as the guest is concerned, and free for the next one after its reset.
    pub fn release(self: &Arc<Self>, device: &Arc<Device>) {
        let record = &device.record;
        if record.phase() == Some(Phase::Assigned) {
            // Nothing that one guest was granted reaches the next. Not later: the next one's grants may come during the reset.
            // How it is reset holds until it is.
            record.update_settings(|settings| {
                *settings = RunTime {
                    reset: settings.reset,
                    ..RunTime::default()
                };
            });
        }
        if record.advance(Phase::Assigned, Phase::Releasing) {
            self.reset_in_background(Arc::clone(device));
        }
    }

    /// Takes from a guest all that it holds.
    pub fn release_all_of(self: &Arc<Self>, domain: DomId) {
        for device in self.list() {
            if device.is_held_by(domain) {
                self.release(&device);
            }
        }
    }

    /// Has `waker` called when a device becomes free, until [`Devices::forget_waker`]. One for each guest.
    pub fn set_waker(&self, domain: DomId, waker: Waker) {
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(domain, waker);
    }

    /// Ends [`Devices::set_waker`].
    pub fn forget_waker(&self, domain: DomId) {
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&domain);
    }

    pub(super) fn wake(&self) {
        for waker in self
            .wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            waker();
        }
    }
}
