//! What a daemon that was killed was at with devices. Those that go together are hidden, or given back, as one here, too: no driver can have
//! a device of an IOMMU group as long as another one is hidden.

use std::sync::Arc;

use conf_space::address::Bdf;

use super::hide::Begun;
use super::{Device, DeviceError, Devices, Quarantine};
use crate::host::record::{Flags, Owner, Phase, Record};
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
        let hiding = self.in_groups(unfinished.hiding);
        let mut going_on = Vec::new();
        for (first, _) in &hiding {
            going_on.extend(self.bus.together(*first).unwrap_or_default());
        }
        for device in self.list() {
            // All of its group had arrived; what comes later to that group is another matter.
            if !going_on.contains(&device.bdf) {
                device.record.clear(Flags::WITH_GROUP);
            }
        }
        for (first, group) in hiding {
            let rest = self.rest_of_group(first, &group);
            self.in_background(first, "hide", move |devices| {
                devices.go_on_hiding(first, &group, &rest);
            });
        }
        for (first, group) in self.in_groups(unfinished.returning) {
            self.in_background(first, "give back", move |devices| {
                devices.go_on_returning(first, group);
            });
        }
    }

    /// Of a device that cannot be taken up: its guest has it no more if it has ended, and then it is free once it was reset. Found out at once,
    /// since the guest's number may be another one's later.
    pub(super) fn abandon(&self, bdf: Bdf) {
        let Ok(record) = Record::open(&self.directory, bdf) else {
            return;
        };
        let ended = |owner: Owner| match self.xen.domain_info(owner.domain) {
            Ok(info) => info.is_none_or(|info| info.gone),
            Err(_) => false,
        };
        if record.phase() == Some(Phase::Assigned) && record.owner().is_some_and(ended) {
            record.forget_guest();
            record.set_phase(Phase::Releasing);
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
        })
    }

    /// Notes as coming those of a group that were to be hidden, and were not begun with.
    fn rest_of_group(&self, first: Bdf, begun: &[Bdf]) -> Vec<Bdf> {
        let is_with_group = |bdf: &Bdf| {
            let begun = self.begun_before(*bdf);
            begun.is_some_and(|begun| begun.record.flags().contains(Flags::WITH_GROUP))
        };
        if !begun.iter().any(is_with_group) {
            return Vec::new();
        }
        let mut rest = self.bus.together(first).unwrap_or_default();
        rest.retain(|bdf| !begun.contains(bdf) && matches!(self.announce(*bdf), Ok(true)));
        rest
    }

    /// Hides devices that are noted as coming: those that were begun with, and the rest of their group. If one of them cannot be hidden, dom0 gets
    /// all back, with those that had arrived.
    fn go_on_hiding(&self, first: Bdf, begun: &[Bdf], rest: &[Bdf]) {
        let mut coming = [begun, rest].concat();
        let had_arrived = self.hidden_beside(first).into_iter().filter(|bdf| {
            let device = self.get(*bdf);
            device.is_some_and(|device| device.record.flags().contains(Flags::WITH_GROUP))
        });
        let had_arrived: Vec<Bdf> = had_arrived.collect();
        // Whether dom0 can do without the rest was not found out before.
        let force = rest.is_empty();
        let mut taken = self.take_all(&coming, &coming, force, Quarantine::Ours);
        let mut returning = Vec::new();
        for bdf in &had_arrived {
            match &mut taken {
                Ok(_) => {
                    if let Some(device) = self.get(*bdf) {
                        device.record.clear(Flags::WITH_GROUP);
                    }
                }
                Err(abandoned) => match self.take_along(*bdf) {
                    Ok(device) => {
                        returning.push(*bdf);
                        abandoned.arrived.push(device);
                    }
                    Err(error) => log::warn!("{}", chain(&error)),
                },
            }
        }
        coming.extend(&returning);
        if let Err(error) = self.arrived(&coming, taken) {
            let staying = self.hidden_beside(first);
            log::error!("{}", cannot_follow(begun, &returning, &staying, &error));
        }
    }

    /// Takes a hidden device on the way back to dom0.
    fn take_along(&self, bdf: Bdf) -> Result<Arc<Device>, DeviceError> {
        let device = self.reserve_for_return(bdf)?;
        if let Err(error) = self.reset_and_restore(&device) {
            log::warn!("{}", chain(&error));
        }
        self.is_leaving(&device);
        Ok(device)
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

/// That devices were being hidden, and cannot be. `returning`: those that go back to dom0 with them; `staying`: those of their group that do not.
fn cannot_follow(
    devices: &[Bdf],
    returning: &[Bdf],
    staying: &[Bdf],
    error: &DeviceError,
) -> String {
    let all = listed(devices);
    let mut text = format!(
        "hiding {all} was begun by an earlier pcibackd, and cannot be ended: {}.",
        chain(error)
    );
    if !returning.is_empty() {
        let returning = listed(returning);
        text += &format!(" {returning} of the same IOMMU group goes back to dom0 with it.");
    }
    if !staying.is_empty() {
        let staying = listed(staying);
        text += &format!(
            " {staying} of the same IOMMU group stays hidden, and until it is given back (pciback unhide --group {all}) no driver of dom0's can \
             have the others."
        );
    }
    let is_alone = devices.len() == 1 && returning.is_empty() && staying.is_empty();
    let group = if is_alone { "" } else { "--group " };
    text + &format!(" To try again: pciback hide {group}{all}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_hidden_is_told_with_what_goes_and_stays_and_with_the_remedy() {
        let [one, two, three] = [0, 1, 2].map(|function| Bdf::from_devfn(0, 3, function));
        let told = |returning: &[Bdf], staying: &[Bdf]| {
            cannot_follow(&[one], returning, staying, &DeviceError::Dead { bdf: one })
        };
        let with_others = told(&[two], &[three]);
        for part in [
            "hiding 0000:03:00.0 was begun",
            "did not come back from its last reset",
            "0000:03:00.1 of the same IOMMU group goes back",
            "0000:03:00.2 of the same IOMMU group stays hidden",
            "pciback unhide --group 0000:03:00.0",
            "pciback hide --group 0000:03:00.0",
        ] {
            assert!(with_others.contains(part), "{with_others}");
        }
        let alone = told(&[], &[]);
        assert!(
            alone.ends_with("To try again: pciback hide 0000:03:00.0"),
            "{alone}"
        );
        assert!(!alone.contains("group"), "{alone}");
    }
}
