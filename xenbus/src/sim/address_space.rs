//! The IOMMU: a guest's memory as its devices see it.
//!
//! Mapping memory for DMA takes as long as it takes to pin it. So each guest has a lock of its own for that, which is taken before the
//! machine's, and held while the [`Hardware`] maps; the machine's is held for a look only.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::mem::{self, Discriminant};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::grants::PAGE_SIZE;
use super::hardware::DmaMemory;
use super::hypervisor::Hypervisor;
use super::{Machine, lock};
use crate::platform::XenError;
use crate::types::{DomId, PciDevice};

/// Parts that a guest's memory may have: more than a guest needs, and few enough for an IOMMU driver's limits.
const MOST_PARTS: usize = 64;

/// The devices that reach a guest's memory. They change while its address space is locked, and so is the machine when one comes; who looks waits
/// for neither.
#[derive(Debug, Default, Clone)]
pub(super) struct Reaching(Arc<Mutex<BTreeSet<PciDevice>>>);

impl Reaching {
    fn insert(&self, device: PciDevice) {
        lock(&self.0).insert(device);
    }

    fn remove(&self, device: PciDevice) -> bool {
        lock(&self.0).remove(&device)
    }

    fn contains(&self, device: PciDevice) -> bool {
        lock(&self.0).contains(&device)
    }

    fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    fn take(&self) -> BTreeSet<PciDevice> {
        mem::take(&mut lock(&self.0))
    }
}

/// What a guest's devices reach.
#[derive(Debug)]
pub(super) struct AddressSpace {
    memory: Vec<DmaMemory>,
    devices: Reaching,
    /// Why memory was refused, as far as it has been told: each reason once for each guest, which could ask for ever.
    told: HashSet<Discriminant<Refused>>,
}

impl AddressSpace {
    pub fn new(devices: Reaching) -> Self {
        Self {
            memory: Vec::new(),
            devices,
            told: HashSet::new(),
        }
    }

    /// Bytes that the guest has given.
    fn given(&self) -> u64 {
        let sizes = self.memory.iter().map(|memory| memory.size);
        sizes.fold(0, u64::saturating_add)
    }
}

/// Why a guest's memory is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(
        "it is in huge pages of {block} bytes: its size and where in the memfd it begins are to be multiples of that"
    )]
    HugePages { block: u64 },
    #[error(
        "the guest has given {given} bytes already, and may give {limit} in all, as they are pinned: start the machine with a higher limit \
         (pcibackd --guest-memory)"
    )]
    TooMuch { given: u64, limit: u64 },
    #[error(
        "all guests together have given {given} bytes already, and may give {limit}, as they are pinned: destroy a guest that is not needed, or start \
         the machine with a higher limit (pcibackd --all-guests-memory)"
    )]
    TooMuchTogether { given: u64, limit: u64 },
    #[error(transparent)]
    System(#[from] io::Error),
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

impl Refused {
    /// Whether the errno alone would not tell.
    fn needs_words(&self) -> bool {
        !matches!(self, Self::System(_))
    }

    fn into_errno(self) -> io::Error {
        match self {
            Self::HugePages { .. } => Errno::EINVAL.into(),
            Self::TooMuch { .. } | Self::TooMuchTogether { .. } => Errno::ENOMEM.into(),
            Self::System(error) => error,
        }
    }
}

fn is_aligned(number: u64) -> bool {
    const PAGE: u64 = PAGE_SIZE as u64;
    number.is_multiple_of(PAGE)
}

/// Whether a part of a file in such pages can be mapped and unmapped.
fn is_whole_blocks(block: u64, size: u64, offset: u64) -> bool {
    let is_whole = |number: u64| number.checked_rem(block) == Some(0);
    is_whole(size) && is_whole(offset)
}

/// Whether a part can be memory: whole pages of a file that cannot get shorter.
fn check(memory: &DmaMemory) -> Result<(), Refused> {
    let &DmaMemory {
        address,
        size,
        offset,
        ref file,
    } = memory;
    if size == 0 || ![address, size, offset].into_iter().all(is_aligned) {
        return Err(Errno::EINVAL.into());
    }
    let end = offset.checked_add(size).ok_or(Errno::EINVAL)?;
    address.checked_add(size).ok_or(Errno::EINVAL)?;
    // Fails for whatever is no memfd.
    let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).map_err(|_| Errno::EINVAL)?;
    let length = nix::sys::stat::fstat(file.as_fd())?.st_size;
    let fits = u64::try_from(length).is_ok_and(|length| end <= length);
    if !fits || !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(Errno::EINVAL.into());
    }
    let system = fstatfs(file.as_fd())?;
    let block = u64::try_from(system.block_size()).unwrap_or(0);
    if system.filesystem_type() == HUGETLBFS_MAGIC && !is_whole_blocks(block, size, offset) {
        return Err(Refused::HugePages { block });
    }
    Ok(())
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

    /// Counts memory that a guest gives. Before it is mapped: meanwhile others give some, too.
    fn set_aside(&mut self, size: u64) -> Result<(), Refused> {
        let (given, limit) = (self.given, self.options.all_guests_memory);
        self.given = given
            .checked_add(size)
            .filter(|together| *together <= limit)
            .ok_or(Refused::TooMuchTogether { given, limit })?;
        Ok(())
    }

    /// Counts memory that a guest has no more.
    fn put_back(&mut self, size: u64) {
        self.given = self.given.saturating_sub(size);
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
        let space = lock(&space);
        {
            let mut hypervisor = lock(&self.inner.hypervisor);
            hypervisor.assign(domain, device)?;
            space.devices.insert(device);
        }
        if let Err(error) = self.hardware().assign(domain, device, &space.memory) {
            space.devices.remove(device);
            // To quarantine: who had it before does not get back what was to be a guest's.
            lock(&self.inner.hypervisor).deassign(domain, device)?;
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn deassign(&self, domain: DomId, device: PciDevice) -> Result<(), Errno> {
        if let Some(space) = self.address_space(domain) {
            let space = lock(&space);
            // Also one that Xen does not know any more, since it was removed.
            if space.devices.remove(device) {
                self.hardware().deassign(domain, device);
            }
            return lock(&self.inner.hypervisor).deassign(domain, device);
        }
        lock(&self.inner.hypervisor).deassign(domain, device)
    }

    /// A device has gone: whoever had it has it no more. Waits for that guest alone, as another one's memory may take long to be mapped.
    pub(super) fn cut_off(&self, device: PciDevice) {
        // Until the guest's own lock is held, it may become another one's.
        while let Some((domain, space)) = self.reached_by(device) {
            let space = lock(&space);
            if space.devices.remove(device) {
                self.hardware().deassign(domain, device);
            }
        }
    }

    /// The guest whose memory a device reaches, or is about to, whatever Xen knows of the device.
    fn reached_by(&self, device: PciDevice) -> Option<(DomId, Arc<Mutex<AddressSpace>>)> {
        let hypervisor = lock(&self.inner.hypervisor);
        let mut domains = hypervisor.domains.iter();
        let found = domains.find(|(_, record)| record.reaching.contains(device));
        found.map(|(domain, record)| (*domain, Arc::clone(&record.address_space)))
    }

    /// Destroys a domain, and what its devices could reach with it.
    pub(super) fn destroy(&self, domain: DomId) -> Result<(), Errno> {
        let Some(space) = self.address_space(domain) else {
            return Err(Errno::ESRCH);
        };
        let mut space = lock(&space);
        for device in space.devices.take() {
            self.hardware().deassign(domain, device);
        }
        let given = space.given();
        space.memory.clear();
        let mut hypervisor = lock(&self.inner.hypervisor);
        hypervisor.put_back(given);
        hypervisor.destroy(domain)
    }

    /// A guest gives its devices memory to work on.
    ///
    /// # Errors
    /// ESRCH; EINVAL when it cannot be memory; EEXIST when there is memory at one of the addresses; ENOSPC for too many parts; ENOMEM for more
    /// than [`super::MachineOptions`] lets it, or all guests, give; what the hardware says, ENOMEM for one.
    pub fn give_memory(&self, domain: DomId, memory: DmaMemory) -> Result<(), XenError> {
        let operation = format!(
            "giving domain {domain} memory for DMA at {:#x}, {:#x} bytes",
            memory.address, memory.size
        );
        let space = self.address_space(domain).ok_or(Errno::ESRCH);
        let space = space.map_err(|errno| failed(operation.clone())(errno.into()))?;
        let refused = match self.add_memory(domain, &space, memory) {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        if refused.needs_words() && lock(&space).told.insert(mem::discriminant(&refused)) {
            log::warn!("{operation}, is refused: {refused}");
        }
        Err(failed(operation)(refused.into_errno()))
    }

    fn add_memory(
        &self,
        domain: DomId,
        space: &Mutex<AddressSpace>,
        memory: DmaMemory,
    ) -> Result<(), Refused> {
        // Before any lock: it is the guest's file.
        check(&memory)?;
        let mut space = lock(space);
        let limit = {
            let mut hypervisor = lock(&self.inner.hypervisor);
            hypervisor.alive(domain)?;
            hypervisor.options.guest_memory
        };
        if space.memory.iter().any(|other| overlap(other, &memory)) {
            return Err(Errno::EEXIST.into());
        }
        if space.memory.len() >= MOST_PARTS {
            return Err(Errno::ENOSPC.into());
        }
        let given = space.given();
        if given.saturating_add(memory.size) > limit {
            return Err(Refused::TooMuch { given, limit });
        }
        lock(&self.inner.hypervisor).set_aside(memory.size)?;
        if !space.devices.is_empty()
            && let Err(error) = self.hardware().map_dma(domain, &memory)
        {
            lock(&self.inner.hypervisor).put_back(memory.size);
            return Err(error.into());
        }
        space.memory.push(memory);
        Ok(())
    }

    /// A guest takes a part of its memory back, by the address that it begins at. When this returns, no device reaches it.
    ///
    /// # Errors
    /// ESRCH; EINVAL when no part begins there; what the hardware says: the guest's devices reach it still, and it stays given.
    pub fn take_memory(&self, domain: DomId, address: u64) -> Result<(), XenError> {
        let take = || -> io::Result<()> {
            let space = self.address_space(domain).ok_or(Errno::ESRCH)?;
            let mut space = lock(&space);
            let found = space
                .memory
                .iter()
                .position(|memory| memory.address == address)
                .ok_or(Errno::EINVAL)?;
            if !space.devices.is_empty() {
                self.hardware().unmap_dma(domain, address)?;
            }
            let taken = space.memory.swap_remove(found);
            lock(&self.inner.hypervisor).put_back(taken.size);
            Ok(())
        };
        let operation = format!("taking domain {domain}'s memory for DMA at {address:#x} back");
        take().map_err(failed(operation))
    }
}
