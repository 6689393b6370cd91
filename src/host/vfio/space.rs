//! What devices may reach: a container, in which groups are, and the guest's memory that is mapped in it. One for each guest, and one with
//! nothing in it for each group that no guest has.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::resource::{Resource, getrlimit};
use vfio_bindings::bindings::vfio::{VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_TYPE1v2_IOMMU};
use vfio_ioctls::{VfioContainer, VfioError};
use xenbus::sim::DmaMemory;

use super::info::{self, Broken};
use super::ioctl::{self, IommuInfo};
use super::{Complaints, lock};

/// A container. What is mapped in it is pinned.
pub(super) struct Space {
    container: VfioContainer,
    state: Mutex<State>,
    pub complaints: Complaints,
}

/// What an IOMMU can map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Reach {
    /// Bytes of its smallest pages; 0: it does not say.
    page: u64,
    /// From the first to the last address; none: it does not say.
    ranges: Vec<(u64, u64)>,
}

impl Reach {
    fn of(info: &IommuInfo) -> Result<Self, Broken> {
        let ranges = info::pairs(
            &info.words,
            info.capabilities,
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
        )?;
        Ok(Self {
            page: 1u64
                .checked_shl(info.page_sizes.trailing_zeros())
                .unwrap_or(0),
            ranges: ranges.unwrap_or_default(),
        })
    }

    /// Why memory cannot be mapped, if it cannot.
    fn obstacle(&self, address: u64, size: u64, offset: u64) -> Option<String> {
        let is_whole = |number: u64| self.page == 0 || number.checked_rem(self.page) == Some(0);
        if ![address, size, offset].into_iter().all(is_whole) {
            return Some(format!(
                "the host's IOMMU maps pages of {} bytes: memory is to be given in whole ones",
                self.page
            ));
        }
        let last = address.checked_add(size.saturating_sub(1));
        let holds =
            |(from, to): &(u64, u64)| *from <= address && last.is_some_and(|last| last <= *to);
        if self.ranges.is_empty() || self.ranges.iter().any(holds) {
            return None;
        }
        let ranges: Vec<String> = self
            .ranges
            .iter()
            .map(|(from, to)| format!("{from:#x} to {to:#x}"))
            .collect();
        Some(format!(
            "the host's IOMMU maps addresses from {} only: give memory at others",
            ranges.join(", ")
        ))
    }
}

#[derive(Default)]
struct State {
    reach: Reach,
    /// Mapping needs an IOMMU, and there is one as soon as there is a group.
    has_iommu: bool,
    parts: BTreeMap<u64, Part>,
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").finish_non_exhaustive()
    }
}

/// Memory of a guest, mapped in this process: what the kernel pins, it pins by our addresses.
struct Part {
    base: NonNull<c_void>,
    size: usize,
}

// SAFETY: nobody accesses the memory through this address; it is there to be given to the kernel.
unsafe impl Send for Part {}

impl Part {
    fn new(memory: &DmaMemory) -> io::Result<Self> {
        let size = usize::try_from(memory.size).map_err(|_| Errno::EINVAL)?;
        let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(memory.offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &memory.file,
                offset,
            )
        }?;
        Ok(Self { base, size })
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference into it.
        if let Err(error) = unsafe { munmap(self.base, self.size) } {
            log::error!("a guest's memory stays mapped here: {error}");
        }
    }
}

impl Space {
    /// An empty one.
    ///
    /// # Errors
    /// That of opening `/dev/vfio/vfio`; ENOSYS when VFIO has no IOMMU driver that we know.
    pub fn new() -> io::Result<Arc<Self>> {
        let container = VfioContainer::new(None).map_err(system_error)?;
        Ok(Arc::new(Self {
            container,
            state: Mutex::default(),
            complaints: Complaints::new(),
        }))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the container is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.container.as_raw_fd()) }
    }

    /// Puts a group into it. It leaves with the last descriptor of the group and of its devices.
    ///
    /// # Errors
    /// The kernel's; EPERM or EBUSY when the host uses a device of the group.
    pub fn join(&self, group: &File) -> io::Result<()> {
        ioctl::set_container(group, self.as_fd())?;
        let mut state = lock(&self.state);
        if !state.has_iommu {
            ioctl::set_iommu(self.as_fd(), VFIO_TYPE1v2_IOMMU)?;
            state.has_iommu = true;
        }
        // Each group may have another IOMMU.
        if let Ok(info) = ioctl::iommu_info(self.as_fd()) {
            state.reach = Reach::of(&info).unwrap_or_default();
        }
        Ok(())
    }

    /// Why memory cannot be mapped, as far as the IOMMU itself says.
    pub fn obstacle(&self, memory: &DmaMemory) -> Option<String> {
        let reach = &lock(&self.state).reach;
        reach.obstacle(memory.address, memory.size, memory.offset)
    }

    /// Maps a guest's memory. There must be a group in the space.
    ///
    /// # Errors
    /// The kernel's; ENOMEM for more than may be locked, which `explain` tells of.
    pub fn map(&self, memory: &DmaMemory) -> io::Result<()> {
        let part = Part::new(memory)?;
        let mut state = lock(&self.state);
        // SAFETY: the memory is a mapping of ours that stays until it is unmapped there (`Part` is dropped after that), and nobody has a reference
        // into it.
        unsafe {
            self.container
                .vfio_dma_map(memory.address, part.size, part.base.as_ptr().cast())
        }
        .map_err(system_error)?;
        state.parts.insert(memory.address, part);
        Ok(())
    }

    /// Unmaps what begins at an address.
    ///
    /// # Errors
    /// The kernel's; it stays mapped.
    pub fn unmap(&self, address: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        if let Some(part) = state.parts.get(&address) {
            self.container
                .vfio_dma_unmap(address, part.size)
                .map_err(system_error)?;
            state.parts.remove(&address);
        }
        Ok(())
    }

    /// Unmaps everything: devices in it reach nothing any more.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        for (address, part) in std::mem::take(&mut state.parts) {
            if let Err(error) = self.container.vfio_dma_unmap(address, part.size) {
                // It is pinned, and so not given to anybody else, until the container goes.
                log::error!("a guest's memory at {address:#x} cannot be unmapped for DMA: {error}");
                std::mem::forget(part);
            }
        }
    }
}

/// The errno within.
pub(super) fn system_error(error: VfioError) -> io::Error {
    match error {
        VfioError::OpenContainer(source) | VfioError::OpenGroup(source, _) => source,
        VfioError::IommuDmaMap(source) | VfioError::IommuDmaUnmap(source) => source.into(),
        VfioError::VfioApiVersion | VfioError::VfioExtension => Errno::ENOSYS.into(),
        other => io::Error::other(other.to_string()),
    }
}

/// What an operator can do about memory that cannot be mapped.
pub(super) fn explain(error: &io::Error, size: u64) -> String {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft);
    advice(error.raw_os_error().map(Errno::from_raw), size, limit)
}

/// `limit`: how many bytes may be locked, for who has not the right to lock any number.
fn advice(errno: Option<Errno>, size: u64, limit: u64) -> String {
    match errno {
        Some(Errno::ENOMEM) if limit < u64::MAX => format!(
            "{size} bytes are to be locked for its devices, and pcibackd may lock {limit} bytes in all: raise that (systemd: LimitMEMLOCK=infinity; \
             shell: ulimit -l unlimited), or leave pcibackd the capability CAP_IPC_LOCK"
        ),
        Some(Errno::ENOMEM) => {
            format!("{size} bytes are to be locked for its devices: the host has too little memory")
        }
        Some(Errno::ENOSPC) => {
            "it has more parts than the kernel maps (parameter dma_entry_limit of the module vfio_iommu_type1)".into()
        }
        _ => "see the kernel's log (dmesg)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_locked_memory_is_told_with_how_to_raise_it() {
        let text = advice(Some(Errno::ENOMEM), 1 << 30, 8 << 20);
        for part in [
            "1073741824",
            "8388608",
            "LimitMEMLOCK=infinity",
            "CAP_IPC_LOCK",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let text = advice(Some(Errno::ENOMEM), 1 << 30, u64::MAX);
        assert!(text.contains("too little memory"), "{text}");
    }

    #[test]
    fn memory_that_the_iommu_does_not_map_is_told_with_what_it_does() {
        // 4 KiB and 2 MiB; two ranges, around the interrupts'.
        let mut words = vec![72, 3, 0x20_1000, 0, 24, 0, 1, 0, 2, 0];
        for address in [0u64, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff] {
            let bytes = address.to_ne_bytes();
            let halves = bytes.chunks_exact(4);
            words.extend(halves.map(|half| u32::from_ne_bytes(half.try_into().unwrap())));
        }
        let info = IommuInfo {
            page_sizes: 0x20_1000,
            words,
            capabilities: 24,
        };
        let reach = Reach::of(&info).unwrap();
        assert_eq!(reach.obstacle(0, 0xfee0_0000, 0), None);
        assert_eq!(reach.obstacle(0x1_0000_0000, 1 << 30, 4096), None);
        let across = reach.obstacle(0xfed0_0000, 1 << 30, 0).unwrap();
        assert!(
            across.contains("0x0 to 0xfedfffff, 0xfef00000 to"),
            "{across}"
        );
        assert!(reach.obstacle(u64::MAX - 0xfff, 0x2000, 0).is_some());
        let odd = reach.obstacle(0x1000, 0x1800, 0).unwrap();
        assert!(odd.contains("4096 bytes"), "{odd}");
        // One that does not say lets the kernel decide.
        let silent = Reach::of(&IommuInfo::default()).unwrap();
        assert_eq!(silent.obstacle(0x1000, 0x1800, 0), None);
    }

    #[test]
    fn memory_that_cannot_be_mapped_here_is_refused_before_the_iommu_is_asked() {
        let memory = |size, offset| DmaMemory {
            address: 0,
            size,
            file: tempfile::tempfile().unwrap().into(),
            offset,
        };
        assert!(Part::new(&memory(0, 0)).is_err());
        assert!(Part::new(&memory(4096, u64::MAX)).is_err());
        assert!(Part::new(&memory(u64::MAX, 0)).is_err());
        let part = Part::new(&memory(4096, 0)).unwrap();
        assert_eq!(part.size, 4096);
    }
}
