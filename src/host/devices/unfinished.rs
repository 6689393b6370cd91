//! What a daemon that was killed was at with devices. Those that go together are hidden, or given back, as one here, too: no driver can have
//! a device of an IOMMU group as long as another one is hidden.

use std::sync::Arc;

use conf_space::address::Bdf;

use super::hide::{Begun, Rebind};
use super::{Devices, Quarantine};
use crate::host::record::{Phase, Record};
use crate::text::{chain, listed};

/// Devices that an earlier daemon left on their way.
#[derive(Debug, Default)]
pub(super) struct Unfinished {
    pub hiding: Vec<Bdf>,
    pub returning: Vec<Bdf>,
}

impl Devices {
    /// Ends what was begun, on threads of its own.
    pub(super) fn finish(self: &Arc<Self>, unfinished: Unfinished) {
        for (first, group) in self.in_groups(unfinished.hiding) {
            self.in_background(first, "hide", move |devices| devices.go_on_hiding(&group));
        }
        for (first, group) in self.in_groups(unfinished.returning) {
            self.in_background(first, "give back", move |devices| {
                devices.go_on_returning(first, group);
            });
        }
    }

    /// Those that go together, together: each with the first of them.
    fn in_groups(&self, mut devices: Vec<Bdf>) -> Vec<(Bdf, Vec<Bdf>)> {
        let mut groups = Vec::new();
        while let Some(&first) = devices.first() {
            // What was removed from the machine has no group any more.
            let together = self.bus.together(first).unwrap_or_default();
            let is_with_it = |bdf: &Bdf| *bdf == first || together.contains(bdf);
            let (group, others) = devices.into_iter().partition(is_with_it);
            groups.push((first, group));
            devices = others;
        }
        groups
    }

    /// A device that was on its way to be hidden, if it was.
    pub(super) fn begun_before(&self, bdf: Bdf) -> Option<Begun> {
        if !self.directory.join(bdf.to_string()).exists() {
            return None;
        }
        let record = Record::open(&self.directory, bdf).ok()?;
        (record.phase() == Some(Phase::Hiding)).then_some(Begun {
            bdf,
            record,
            resumed: true,
            otherwise: Rebind::Driver,
        })
    }

    /// Hides devices that are noted as coming. If one of them cannot be hidden, dom0 gets all back, with those that had arrived.
    fn go_on_hiding(&self, devices: &[Bdf]) {
        let mut coming = devices.to_vec();
        let mut taken = self.take_all(devices, devices, true, Quarantine::Ours);
        if let Err(abandoned) = &mut taken
            && let Some(first) = devices.first()
        {
            for bdf in self.hidden_beside(*first) {
                match self.reserve_for_return(bdf) {
                    Ok(device) => {
                        if let Err(error) = self.reset_and_restore(&device) {
                            log::warn!("{}", chain(&error));
                        }
                        self.is_leaving(&device);
                        coming.push(bdf);
                        abandoned.arrived.push(device);
                    }
                    Err(error) => log::warn!("{}", chain(&error)),
                }
            }
        }
        if let Err(error) = self.arrived(&coming, taken) {
            log::error!(
                "{} was being hidden when pcibackd ended, and cannot be (try again: pciback hide): {}",
                listed(&coming),
                chain(&error)
            );
        }
    }

    /// Gives back devices that were on that way, and those with them that were to follow.
    fn go_on_returning(&self, first: Bdf, mut devices: Vec<Bdf>) {
        let resumed = devices.clone();
        let mut others = self.hidden_beside(first);
        others.retain(|bdf| !resumed.contains(bdf));
        devices.extend(others);
        if let Err(error) = self.return_all(&devices, &resumed) {
            log::error!(
                "{} was being given back to dom0 when pcibackd ended, and stays hidden: {}",
                listed(&resumed),
                chain(&error)
            );
        }
    }
}
