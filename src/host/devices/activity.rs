//! What is being done to devices right now, for those who wait for it.

use std::sync::PoisonError;

use conf_space::address::Bdf;

use super::{Device, Devices};
use crate::host::HostError;

impl Devices {
    /// What is being done to a device now that may take long, as a participle.
    pub fn activity(&self, bdf: Bdf) -> Option<&'static str> {
        let activities = self.activities.lock();
        let activities = activities.unwrap_or_else(PoisonError::into_inner);
        activities.get(&bdf).copied()
    }

    /// Does something that may take long.
    pub(super) fn busy<T>(&self, bdf: Bdf, activity: &'static str, work: impl FnOnce() -> T) -> T {
        let note = |activity: Option<&'static str>| {
            let activities = self.activities.lock();
            let mut activities = activities.unwrap_or_else(PoisonError::into_inner);
            match activity {
                Some(activity) => activities.insert(bdf, activity),
                None => activities.remove(&bdf),
            };
        };
        note(Some(activity));
        let result = work();
        note(None);
        result
    }

    /// Resets a device by the best method there is, and counts that.
    pub(super) fn reset_function(&self, device: &Device) -> Result<(), HostError> {
        let bdf = device.bdf;
        self.busy(bdf, "resetting", || self.bus.reset(bdf))?;
        device.record.count_reset();
        Ok(())
    }
}
