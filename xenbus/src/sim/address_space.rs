//! The IOMMU: a guest's memory as its devices see it.
//!
//! Mapping memory for DMA takes as long as it takes to pin it. So each guest has a lock of its own for that, which is taken before the
//! machine's, and held while the [`Hardware`] maps; the machine's is held for a look only.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::grants::PAGE_SIZE;
use super::hardware::DmaMemory;
use super::hypervisor::Hypervisor;
use super::{Machine, lock};
use crate::platform::XenError;
use crate::types::{DomId, PciDevice};

/// Parts that a guest's memory may have: more than a guest needs, and few enough for an IOMMU driver's limits.
const MOST_PARTS: usize = 64;

/// What a guest's devices reach.
#[derive(Debug, Default)]
pub(super) struct AddressSpace {
    memory: Vec<DmaMemory>,
    devices: BTreeSet<PciDevice>,
}

fn is_aligned(number: u64) -> bool {
    const PAGE: u64 = PAGE_SIZE as u64;
    number.is_multiple_of(PAGE)
}

/// Whether a part can be memory: whole pages of a file that cannot get shorter.
fn check(memory: &DmaMemory) -> Result<(), Errno> {
    let &DmaMemory {
        address,
        size,
        offset,
        ref file,
    } = memory;
    if size == 0 || ![address, size, offset].into_iter().all(is_aligned) {
        return Err(Errno::EINVAL);
    }
    let end = offset.checked_add(size).ok_or(Errno::EINVAL)?;
    address.checked_add(size).ok_or(Errno::EINVAL)?;
    // Fails for whatever is no memfd.
    let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).map_err(|_| Errno::EINVAL)?;
    let length = nix::sys::stat::fstat(file.as_fd())?.st_size;
    let fits = u64::try_from(length).is_ok_and(|length| end <= length);
    if fits && SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

fn overlap(one: &DmaMemory, other: &DmaMemory) -> bool {
    let end = |memory: &DmaMemory| memory.address.saturating_add(memory.size);
    one.address < end(other) && other.address < end(one)
}

fn failed(operation: String) -> impl FnOnce(io::Error) -> XenError {
    move |source| XenError::Failed { operation, source }
}

impl Hypervisor {
    fn address_space(&self, domain: DomId) -> Option<Arc<Mutex<AddressSpace>>> {
        let domain = self.domains.get(&domain)?;
        Some(Arc::clone(&domain.address_space))
    }
}

impl Machine {
    /// `None` for dom0, for quarantine, and for a domain that is not known.
    fn address_space(&self, domain: DomId) -> Option<Arc<Mutex<AddressSpace>>> {
        lock(&self.inner.hypervisor).address_space(domain)
    }

    pub(super) fn assign(&self, domain: DomId, device: PciDevice) -> io::Result<()> {
        let Some(space) = self.address_space(domain) else {
            return Ok(lock(&self.inner.hypervisor).assign(domain, device)?);
        };
        let mut space = lock(&space);
        lock(&self.inner.hypervisor).assign(domain, device)?;
        if let Err(error) = self.hardware().assign(domain, device, &space.memory) {
            // To quarantine: who had it before does not get back what was to be a guest's.
            lock(&self.inner.hypervisor).deassign(domain, device)?;
            return Err(error);
        }
        space.devices.insert(device);
        Ok(())
    }

    pub(super) fn deassign(&self, domain: DomId, device: PciDevice) -> Result<(), Errno> {
        if let Some(space) = self.address_space(domain) {
            let mut space = lock(&space);
            // Also one that Xen does not know any more, since it was removed.
            if space.devices.remove(&device) {
                self.hardware().deassign(domain, device);
            }
            return lock(&self.inner.hypervisor).deassign(domain, device);
        }
        lock(&self.inner.hypervisor).deassign(domain, device)
    }

    /// A device has gone: whoever had it has it no more.
    pub(super) fn cut_off(&self, device: PciDevice) {
        let owner = lock(&self.inner.hypervisor)
            .devices
            .get(&device)
            .map(|record| record.owner);
        let Some(owner) = owner else { return };
        let Some(space) = self.address_space(owner) else {
            return;
        };
        let mut space = lock(&space);
        if space.devices.remove(&device) {
            self.hardware().deassign(owner, device);
        }
    }

    /// Destroys a domain, and what its devices could reach with it.
    pub(super) fn destroy(&self, domain: DomId) -> Result<(), Errno> {
        let Some(space) = self.address_space(domain) else {
            return Err(Errno::ESRCH);
        };
        let mut space = lock(&space);
        for device in std::mem::take(&mut space.devices) {
            self.hardware().deassign(domain, device);
        }
        space.memory.clear();
        lock(&self.inner.hypervisor).destroy(domain)
    }

    /// A guest gives its devices memory to work on.
    ///
    /// # Errors
    /// ESRCH; EINVAL when it cannot be memory; EEXIST when there is memory at one of the addresses; ENOSPC for too many parts; what the
    /// hardware says, ENOMEM for one.
    pub fn give_memory(&self, domain: DomId, memory: DmaMemory) -> Result<(), XenError> {
        let operation = format!(
            "giving domain {domain} memory for DMA at {:#x}, {:#x} bytes",
            memory.address, memory.size
        );
        let give = || -> io::Result<()> {
            check(&memory)?;
            let space = self.address_space(domain).ok_or(Errno::ESRCH)?;
            let mut space = lock(&space);
            lock(&self.inner.hypervisor).alive(domain)?;
            if space.memory.iter().any(|other| overlap(other, &memory)) {
                return Err(Errno::EEXIST.into());
            }
            if space.memory.len() >= MOST_PARTS {
                return Err(Errno::ENOSPC.into());
            }
            if !space.devices.is_empty() {
                self.hardware().map_dma(domain, &memory)?;
            }
            space.memory.push(memory);
            Ok(())
        };
        give().map_err(failed(operation))
    }

    /// A guest takes a part of its memory back, by the address that it begins at. When this returns, no device reaches it.
    ///
    /// # Errors
    /// ESRCH; EINVAL when no part begins there.
    pub fn take_memory(&self, domain: DomId, address: u64) -> Result<(), XenError> {
        let take = || -> Result<(), Errno> {
            let space = self.address_space(domain).ok_or(Errno::ESRCH)?;
            let mut space = lock(&space);
            let found = space
                .memory
                .iter()
                .position(|memory| memory.address == address);
            let memory = space.memory.swap_remove(found.ok_or(Errno::EINVAL)?);
            if !space.devices.is_empty() {
                self.hardware().unmap_dma(domain, address, memory.size);
            }
            Ok(())
        };
        let operation = format!("taking domain {domain}'s memory for DMA at {address:#x} back");
        take().map_err(io::Error::from).map_err(failed(operation))
    }
}
