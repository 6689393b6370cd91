//! Resets: of a function, and of its bus with everything on it.

use conf_space::Bdf;
use nix::errno::Errno;
use std::io;
use std::os::fd::AsFd;

use super::device::Open;
use super::ioctl::{self, Affected};
use super::{VfioBus, lock, refused};
use crate::host::HostError;

/// What an operator can do about a reset that failed.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY | Errno::EAGAIN) => {
            "it changes hands just now, or is being reset by somebody else: try again in a moment"
        }
        _ => {
            "the kernel offers no working way to reset this device: see its 'reset_method' in sysfs"
        }
    }
}

fn failed(bdf: Bdf, action: &str) -> impl FnOnce(io::Error) -> HostError {
    move |error| refused(bdf, action, remedy(&error))(error)
}

/// What a device on a bus is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Hidden, and no guest's.
    Free,
    Guests,
    /// dom0's.
    Hosts,
}

/// The first device that must not be reset with another one.
fn in_the_way(
    device: Bdf,
    affected: &[Affected],
    standing: impl Fn(Bdf) -> Standing,
) -> Option<(Bdf, Standing)> {
    affected
        .iter()
        .filter(|other| other.bdf != device)
        .map(|other| (other.bdf, standing(other.bdf)))
        .find(|(_, standing)| *standing != Standing::Free)
}

impl VfioBus {
    fn standing(&self, bdf: Bdf) -> Standing {
        match self.slot(bdf) {
            Some(slot) if slot.owner().is_some() => Standing::Guests,
            Some(_) => Standing::Free,
            None => Standing::Hosts,
        }
    }

    /// Whether the bus of a hidden device can be reset, which may be closed just now: who resets it waits, and opens it again.
    pub(super) fn can_reset_bus(&self, bdf: Bdf) -> bool {
        let affected = self.slot(bdf).map(|slot| slot.on_bus());
        affected.is_some_and(|affected| {
            let is_in_the_way = || in_the_way(bdf, &affected, |other| self.standing(other));
            !affected.is_empty() && is_in_the_way().is_none()
        })
    }

    /// Resets a hidden device, with its bus if nothing less helps, or that was chosen.
    ///
    /// # Errors
    /// The kernel's; EBUSY when somebody uses another device on the bus.
    pub(super) fn reset_device(&self, bdf: Bdf) -> Result<(), HostError> {
        let by_bus = lock(&self.by_bus).contains(&bdf);
        let slot = self.opened(bdf)?;
        let open = slot.get().map_err(failed(bdf, "reset it"))?;
        if by_bus || !open.resets {
            drop(open);
            return self.reset_bus(bdf);
        }
        open.reset().map_err(failed(bdf, "reset it"))
    }

    /// Nothing on the bus changes hands meanwhile.
    fn reset_bus(&self, bdf: Bdf) -> Result<(), HostError> {
        let hands = lock(&self.hands);
        let slot = self.slot(bdf).ok_or(HostError::NoDevice { bdf })?;
        let action = "reset its bus";
        let affected = slot
            .with(|open| ioctl::hot_reset_info(&open.file))
            .map_err(failed(bdf, action))?;
        if let Some((other, standing)) = in_the_way(bdf, &affected, |other| self.standing(other)) {
            log::warn!(
                "{bdf}: a reset of its bus would hit {other}, which {}",
                match standing {
                    Standing::Guests => "a guest has",
                    Standing::Free | Standing::Hosts => "is not hidden (pciback hide)",
                }
            );
            return Err(refused(
                bdf,
                action,
                "the reset of its bus would hit another device that is in use; pcibackd's log names it",
            )(Errno::EBUSY.into()));
        }
        let groups = hands.groups().iter();
        let groups: Vec<_> = groups
            .filter(|(number, _)| affected.iter().any(|other| other.group == **number))
            .map(|(_, joined)| joined.file.as_fd())
            .collect();
        let reached = affected.iter().filter_map(|other| self.slot(other.bdf));
        let reached: Vec<_> = reached.collect();
        let opened: Vec<_> = reached.iter().flat_map(|slot| slot.get()).collect();
        let _held: Vec<_> = opened.iter().map(|open| open.hold()).collect();
        let reset = |open: &Open| ioctl::hot_reset(&open.file, groups.into_iter());
        slot.with(reset).map_err(failed(bdf, action))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use xenbus::sim::Machine;

    use super::*;
    use crate::host::sysfs::Sysfs;
    use crate::host::vfio::device::tests::slot;

    #[test]
    fn a_reset_of_the_bus_is_offered_while_the_device_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let sysfs = Sysfs::to_look_at(directory.path());
        let machine = Machine::new(directory.path()).unwrap();
        let bus = VfioBus::new(sysfs, &machine).unwrap();
        let [one, other] = [0, 1].map(|function| Bdf::from_devfn(0, 3, function));
        let group = 1;
        let affected = [one, other].map(|bdf| Affected { group, bdf });
        let add = |bdf| {
            let slot = Arc::new(slot(bdf));
            slot.set_on_bus(affected.to_vec());
            assert!(!slot.open.is_open());
            let mut slots = bus.shared.slots.write().unwrap();
            slots.insert(bdf, Arc::clone(&slot));
            slot
        };
        let known = add(one);
        // The host has the other one.
        assert!(!bus.can_reset_bus(one));
        add(other);
        assert!(bus.can_reset_bus(one));
        // There is none.
        known.set_on_bus(Vec::new());
        assert!(!bus.can_reset_bus(one));
    }

    #[test]
    fn a_device_that_changes_hands_is_not_said_to_have_no_reset() {
        let told = |errno: Errno| remedy(&io::Error::from(errno));
        assert!(told(Errno::EBUSY).contains("try again"));
        assert!(told(Errno::EAGAIN).contains("try again"));
        assert!(told(Errno::ENOTTY).contains("reset_method"));
    }

    #[test]
    fn a_bus_is_reset_only_if_all_on_it_is_hidden_and_no_guests() {
        let bdf = |function| Bdf::from_devfn(0, 3, function);
        let affected: Vec<Affected> = (0..3)
            .map(|function| Affected {
                group: 1,
                bdf: bdf(function),
            })
            .collect();
        let free = in_the_way(bdf(0), &affected, |_| Standing::Free);
        assert_eq!(free, None);
        let used = in_the_way(bdf(0), &affected, |other| {
            if other == bdf(2) {
                Standing::Hosts
            } else {
                Standing::Free
            }
        });
        assert_eq!(used, Some((bdf(2), Standing::Hosts)));
        // The device itself may be a guest's: it is that guest's reset.
        let own = in_the_way(bdf(0), &affected[..1], |_| Standing::Guests);
        assert_eq!(own, None);
    }
}
