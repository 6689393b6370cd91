//! How devices change hands: nobody's, a guest's.
//!
//! A group is in one space, so all of it goes together: to put it into another one, its devices are closed and opened again, and the kernel
//! resets those that it can.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, OpenOptions};
use std::io;
use std::sync::{Arc, PoisonError};

use conf_space::Bdf;
use conf_space::registers::header::command;
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;
use xenbus::sim::DmaMemory;
use xenbus::{DomId, Gsi};

use super::config::change_command;
use super::device::{Open, Slot};
use super::interrupts::Listener;
use super::movable::{self, Away};
use super::space::Space;
use super::{DRIVER, VfioBus, binding, dma, ioctl, lock, refused};
use crate::host::group::{self, Group, Member};
use crate::host::{Bus, HostError};
use crate::text::listed;

/// A group that is in a space, as long as something of it is open.
#[derive(Debug)]
pub(super) struct Joined {
    pub file: File,
    space: Arc<Space>,
}

/// Groups that are open.
#[derive(Debug, Default)]
pub(super) struct Hands {
    groups: BTreeMap<u32, Joined>,
}

fn group_path(number: u32) -> String {
    format!("/dev/vfio/{number}")
}

fn open_group(number: u32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(group_path(number))
}

/// Whether another process has a group open, or a device of it. Whatever else keeps us from opening it is another matter.
///
/// # Errors
/// EBUSY.
fn is_elsewhere(number: u32) -> io::Result<()> {
    match open_group(number) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(error),
        _ => Ok(()),
    }
}

fn cannot(bdf: Bdf, action: impl Into<String>) -> impl FnOnce(io::Error) -> HostError {
    move |error| {
        let remedy = remedy(&error);
        refused(bdf, action, remedy)(error)
    }
}

/// What an operator can do about a device that has changed hands for longer than the kernel lets a reset take.
const STUCK: &str = "it has been changing hands for minutes, and whoever uses it keeps it from that: see the kernel's log (dmesg) for a device that hangs; restart \
     pcibackd if it stays so";

fn cannot_open(bdf: Bdf, group: u32) -> impl FnOnce(io::Error) -> HostError {
    cannot(bdf, format!("open it by {}", group_path(group)))
}

/// What an operator can do about a group that cannot be opened.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {
            "VFIO is not there: modprobe vfio-pci, and look into dmesg for vfio; in a container, have all of /dev/vfio there"
        }
        Some(Errno::EACCES | Errno::EPERM) => {
            "pcibackd must be allowed to use /dev/vfio: it runs as root, under systemd with DeviceAllow=char-vfio, and all of the group must be \
             taken from the host's drivers"
        }
        Some(Errno::EBUSY) => {
            "another process uses the group, or has not let go of a device that it had: fuser -v /dev/vfio/* names it; a guest that had the \
             device before may still map its registers: grep -l vfio-device /proc/[0-9]*/maps names it"
        }
        Some(Errno::ENOSYS) => {
            "the kernel's VFIO has no IOMMU driver of type 1, version 2: modprobe vfio_iommu_type1"
        }
        Some(Errno::EPROTO | Errno::EOVERFLOW) => {
            "what the kernel's VFIO says of the device makes no sense, so it is not used: see the kernel's log (dmesg), and try another kernel"
        }
        _ => "see the kernel's log (dmesg)",
    }
}

impl VfioBus {
    /// Refuses a group that another process has open: what is bound to vfio-pci could then neither be opened nor given back.
    ///
    /// # Errors
    /// EBUSY.
    pub(super) fn check_unused(&self, bdf: Bdf, group: &Group) -> Result<(), HostError> {
        let by_vfio = |member: &Member| member.driver.as_deref() == Some(DRIVER);
        let hands = lock(&self.hands);
        if hands.groups.contains_key(&group.number) || !group.members.iter().any(by_vfio) {
            return Ok(());
        }
        let action = format!("take its IOMMU group {}", group.number);
        is_elsewhere(group.number).map_err(cannot(bdf, action))
    }

    /// A device that vfio-pci has, opened if it is not yet, or could not be opened again when it changed hands: in a space with nothing in it, or
    /// in that of its group. Waits for one that is changing hands.
    ///
    /// # Errors
    /// [`HostError::NotViable`] when the host uses another device of its group; the kernel's.
    pub(super) fn opened(&self, bdf: Bdf) -> Result<Arc<Slot>, HostError> {
        if let Some(slot) = self.slot(bdf) {
            match slot.open.settled() {
                Ok(()) => return Ok(slot),
                Err(Away::Closed(_)) => {}
                Err(away @ Away::Moving) => {
                    return Err(refused(bdf, "open it", STUCK)(away.into()));
                }
            }
        }
        let mut hands = lock(&self.hands);
        let known = self.slot(bdf);
        if let Some(slot) = known.as_ref().filter(|slot| slot.open.is_open()) {
            return Ok(Arc::clone(slot));
        }
        let group = self.group(bdf).ok_or(HostError::NoIommu { bdf })?;
        group
            .check(&[bdf])
            .map_err(|others| HostError::NotViable { bdf, others })?;
        let slot = match known {
            Some(slot) => slot,
            None => {
                let description = self.describe(bdf)?;
                let line = u8::try_from(description.irq).ok().filter(|line| *line != 0);
                let line = line.map(|line| Gsi(u32::from(line)));
                Arc::new(Slot::new(bdf, group.number, line, description.identity))
            }
        };
        self.open_in_place(&mut hands, &slot)
            .map_err(cannot_open(bdf, group.number))?;
        let slots = self.shared.slots.write();
        slots
            .unwrap_or_else(PoisonError::into_inner)
            .insert(bdf, Arc::clone(&slot));
        Ok(slot)
    }

    /// Opens a device where its group is, if that is open.
    fn open_in_place(&self, hands: &mut Hands, slot: &Slot) -> io::Result<()> {
        let number = slot.group;
        let result = match hands.groups.get(&number) {
            Some(joined) => self.open(slot, joined),
            None => Space::new()
                .and_then(|space| hands.join(number, &space))
                .and_then(|joined| self.open(slot, joined)),
        };
        if result.is_err() && !self.is_open(number) {
            hands.groups.remove(&number);
        }
        result
    }

    fn open(&self, slot: &Slot, joined: &Joined) -> io::Result<()> {
        let listener: Arc<dyn Listener> = Arc::clone(&self.shared) as _;
        let opened = Open::new(slot.bdf, &joined.file, &self.machine, slot.line, &listener);
        slot.arrive(opened)
    }

    fn members(&self, number: u32) -> Vec<Arc<Slot>> {
        let mut slots = self.shared.slots();
        slots.retain(|slot| slot.group == number);
        slots
    }

    /// Whether a device of a group is open.
    fn is_open(&self, number: u32) -> bool {
        self.members(number).iter().any(|slot| slot.open.is_open())
    }

    /// Closes a group with all of its devices, which are to be opened again.
    fn close(&self, hands: &mut Hands, number: u32) {
        let members = self.members(number);
        // None of them is used any more from now on, so that those who use one are waited for but once.
        let open: Vec<_> = members
            .iter()
            .map(|slot| slot.open.begin_to_move())
            .collect();
        for (slot, open) in members.iter().zip(open) {
            if let Some(open) = open {
                slot.open.close(open);
            }
        }
        hands.groups.remove(&number);
    }

    /// Opens a group with all of its devices, in a space. The first failure is told; what can be opened is.
    fn reopen(
        &self,
        hands: &mut Hands,
        number: u32,
        space: io::Result<Arc<Space>>,
    ) -> io::Result<()> {
        let members = self.members(number);
        if members.is_empty() {
            return Ok(());
        }
        let joined = match space.and_then(|space| hands.join(number, &space)) {
            Ok(joined) => joined,
            Err(error) => {
                for slot in &members {
                    let _ = slot.open.arrive(Err(movable::errno(&error).into()));
                }
                return Err(error);
            }
        };
        let mut result = Ok(());
        for slot in &members {
            if slot.is_gone() {
                // The kernel waits for it to be closed.
                slot.close();
            } else {
                result = result.and(self.open(slot, joined));
            }
        }
        if !self.is_open(number) {
            hands.groups.remove(&number);
        }
        result
    }

    /// Whether a device can be taken from vfio-pci: who was given a descriptor of it, to map its memory, has let go of that.
    ///
    /// # Errors
    /// EBUSY.
    pub(super) fn check_let_go(&self, bdf: Bdf) -> Result<(), HostError> {
        let mut hands = lock(&self.hands);
        let Some(slot) = self.slot(bdf).filter(|slot| slot.is_lent()) else {
            return Ok(());
        };
        if self
            .members(slot.group)
            .iter()
            .any(|slot| slot.owner().is_some())
        {
            return Ok(());
        }
        // The kernel tells only whether the group can be opened, and we have it open ourselves.
        self.close(&mut hands, slot.group);
        let result = is_elsewhere(slot.group).map_err(cannot(bdf, "take it from vfio-pci"));
        if result.is_ok() {
            slot.set_returned();
        }
        self.reopen_for_nobody(&mut hands, slot.group);
        result
    }

    /// Takes a device from vfio-pci, and forgets it. Others of its group are opened again.
    ///
    /// # Errors
    /// The kernel's. EBUSY when somebody else has it open: the kernel would have us wait for them.
    pub(super) fn let_go(&self, bdf: Bdf) -> Result<(), HostError> {
        let mut hands = lock(&self.hands);
        let number = group::number_of(&self.sysfs.device(bdf)).ok_or(HostError::NoIommu { bdf })?;
        let used = |slot: &Arc<Slot>| slot.bdf != bdf && slot.owner().is_some();
        if self.members(number).iter().any(used) {
            // The group stays with its guest, and so nobody else has the device.
            if let Some(slot) = self.forget_slot(bdf) {
                slot.close();
            }
            return binding::unbind(&self.sysfs, bdf);
        }
        self.close(&mut hands, number);
        if let Some(slot) = self.forget_slot(bdf) {
            slot.close();
            if slot.is_lent() {
                log::warn!(
                    "{bdf} does not leave the host as long as a process maps its registers, as its guest was allowed to: grep -l vfio-device \
                     /proc/[0-9]*/maps names it"
                );
            }
        }
        let result = is_elsewhere(number)
            .map_err(cannot(bdf, "take it from vfio-pci"))
            .and_then(|()| binding::unbind(&self.sysfs, bdf));
        self.reopen_for_nobody(&mut hands, number);
        result
    }

    /// Opens what is left of a group, in a space with nothing in it.
    fn reopen_for_nobody(&self, hands: &mut Hands, number: u32) {
        if let Err(error) = self.reopen(hands, number, Space::new()) {
            log::error!(
                "{} cannot be opened by {} again: {error}; {}. pcibackd tries again when a guest is to have it, or it is reset (pciback reset)",
                listed(self.members(number).iter().map(|slot| slot.bdf)),
                group_path(number),
                remedy(&error)
            );
        }
    }

    fn forget_slot(&self, bdf: Bdf) -> Option<Arc<Slot>> {
        let slots = self.shared.slots.write();
        slots.unwrap_or_else(PoisonError::into_inner).remove(&bdf)
    }

    /// Closes a device that the kernel wants back, which waits for that.
    pub(super) fn close_removed(&self, bdf: Bdf) {
        let mut hands = lock(&self.hands);
        if let Some(slot) = self.forget_slot(bdf) {
            slot.close();
            if slot.is_lent() {
                log::warn!(
                    "{bdf} does not leave the host as long as a process maps its registers, as its guest was allowed to: grep -l vfio-device \
                     /proc/[0-9]*/maps names it"
                );
            }
            if !self.is_open(slot.group) {
                hands.groups.remove(&slot.group);
            }
        }
    }

    /// Gives a device to a guest, with its group: it reaches the guest's memory, and nothing else.
    ///
    /// # Errors
    /// The kernel's; EBUSY when another guest has a device of the group. The device is nobody's then.
    pub(super) fn assign(&self, domain: DomId, bdf: Bdf, memory: &[DmaMemory]) -> io::Result<()> {
        let mut hands = lock(&self.hands);
        let slot = self.slot(bdf).filter(|slot| !slot.is_gone());
        let slot = slot.ok_or(Errno::ENODEV)?;
        let number = slot.group;
        let others = self.members(number);
        let other = others
            .iter()
            .find_map(|slot| Some((slot.bdf, slot.owner().filter(|owner| *owner != domain)?)));
        if let Some((other, owner)) = other {
            log::error!(
                "{bdf} cannot be given to domain {domain}: it is in group {number} together with {other}, which domain {owner} has"
            );
            return Err(Errno::EBUSY.into());
        }
        let failed = |error: &io::Error| {
            log::error!(
                "{bdf} cannot be given to domain {domain}: {error}; {}",
                remedy(error)
            );
        };
        let known = lock(&self.guests).get(&domain).cloned();
        let is_new = known.is_none();
        let space = known.map_or_else(Space::new, Ok).inspect_err(failed)?;
        let joined = hands.groups.get(&number);
        let is_there = joined.is_some_and(|joined| Arc::ptr_eq(&joined.space, &space));
        let opened = if !is_there {
            self.move_to(&mut hands, number, &space)
        } else if slot.open.is_open() {
            Ok(())
        } else {
            self.open_in_place(&mut hands, &slot)
        };
        opened.inspect_err(failed)?;
        // The guest's session gives it its line, or does not: until then nobody would serve it.
        slot.with(|open| change_command(open, 0, command::INTX_DISABLE))?;
        // From now on nobody else gets any of the group.
        slot.set_owner(Some(domain));
        drop(hands);
        if is_new {
            self.pin(&slot, domain, &space, memory)
                .inspect_err(failed)?;
            lock(&self.guests).insert(domain, space);
        }
        Ok(())
    }

    fn move_to(&self, hands: &mut Hands, number: u32, space: &Arc<Space>) -> io::Result<()> {
        self.close(hands, number);
        let moved = self.reopen(hands, number, Ok(Arc::clone(space)));
        if moved.is_err() {
            self.close(hands, number);
            self.reopen_for_nobody(hands, number);
        }
        moved
    }

    /// Maps all memory of a guest that has its first device. That may take seconds, and nobody waits for it but that guest.
    fn pin(
        &self,
        slot: &Slot,
        domain: DomId,
        space: &Space,
        memory: &[DmaMemory],
    ) -> io::Result<()> {
        let pinned = memory
            .iter()
            .try_for_each(|memory| dma::map(space, domain, memory));
        if pinned.is_err() {
            // Before others can have the device, and without them waiting.
            space.clear();
            let mut hands = lock(&self.hands);
            slot.set_owner(None);
            self.close(&mut hands, slot.group);
            self.reopen_for_nobody(&mut hands, slot.group);
        }
        pinned
    }

    /// Takes a device from a guest. Its group stays where it is until another guest gets it: with the last of the guest's devices nothing is
    /// mapped there any more, and before that the device does no DMA, since nobody can make it a master of the bus.
    pub(super) fn deassign(&self, domain: DomId, bdf: Bdf) {
        // It may be another one's by now.
        let slot = self.slot(bdf);
        let slot = slot.filter(|slot| slot.owner() == Some(domain));
        let quiet = |open: &Open| {
            open.wiring().silence();
            change_command(open, command::BUS_MASTER, command::INTX_DISABLE)
        };
        if let Some(slot) = &slot {
            // Nobody else gets it before it has been reset, and nobody waits for that.
            let reset = slot.with(|open| {
                quiet(open)?;
                open.reset()
            });
            if let Err(error) = reset
                && !slot.is_gone()
            {
                log::warn!("{bdf} was taken from domain {domain} and not reset: {error}");
            }
        }
        let hands = lock(&self.hands);
        if let Some(slot) = slot {
            slot.set_owner(None);
            // Until now it was allowed to be switched on.
            let _ = slot.with(quiet);
        }
        let has_more = self
            .shared
            .slots()
            .iter()
            .any(|slot| slot.owner() == Some(domain));
        if has_more {
            return;
        }
        let space = lock(&self.guests).remove(&domain);
        drop(hands);
        // Nobody waits while the memory of a whole guest is unpinned.
        if let Some(space) = space {
            space.clear();
        }
    }
}

impl Hands {
    /// Puts a group into a space.
    fn join(&mut self, number: u32, space: &Arc<Space>) -> io::Result<&Joined> {
        let file = open_group(number)?;
        if ioctl::group_status(&file)? & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(Errno::EPERM.into());
        }
        space.join(&file)?;
        let joined = Joined {
            file,
            space: Arc::clone(space),
        };
        Ok(match self.groups.entry(number) {
            Entry::Vacant(free) => free.insert(joined),
            Entry::Occupied(mut taken) => {
                taken.insert(joined);
                taken.into_mut()
            }
        })
    }

    /// The groups that are open.
    pub fn groups(&self) -> &BTreeMap<u32, Joined> {
        &self.groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_why_a_group_cannot_be_opened_has_its_remedy() {
        let told = |errno: Errno| remedy(&io::Error::from(errno));
        assert!(told(Errno::ENOENT).contains("modprobe vfio-pci"));
        assert!(told(Errno::EACCES).contains("DeviceAllow=char-vfio"));
        assert!(told(Errno::EBUSY).contains("fuser"));
        assert!(told(Errno::ENOSYS).contains("vfio_iommu_type1"));
        assert!(told(Errno::EPROTO).contains("makes no sense"));
        assert!(told(Errno::EIO).contains("dmesg"));
    }
}
