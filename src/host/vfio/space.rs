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
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;
use vfio_ioctls::{VfioContainer, VfioError};
use xenbus::sim::DmaMemory;

use super::{ioctl, lock};

/// A container. What is mapped in it is pinned.
pub(super) struct Space {
    container: VfioContainer,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
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
        Ok(())
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
    pub fn unmap(&self, address: u64) {
        let mut state = lock(&self.state);
        if let Some(part) = state.parts.remove(&address) {
            self.forget(address, part);
        }
    }

    /// Unmaps everything: devices in it reach nothing any more.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        for (address, part) in std::mem::take(&mut state.parts) {
            self.forget(address, part);
        }
    }

    fn forget(&self, address: u64, part: Part) {
        if let Err(error) = self.container.vfio_dma_unmap(address, part.size) {
            // It is pinned, and so not given to anybody else, until the container goes.
            log::error!("a guest's memory at {address:#x} cannot be unmapped for DMA: {error}");
            std::mem::forget(part);
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
        Some(Errno::EINVAL) => {
            "the IOMMU cannot map memory at these addresses: some it keeps to itself (0xfee00000 to 0xfeefffff, for interrupts), and others are \
             more than it has; the host's are in /sys/kernel/iommu_groups/N/reserved_regions"
                .into()
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
        let text = advice(Some(Errno::EINVAL), 1 << 30, u64::MAX);
        assert!(text.contains("reserved_regions"), "{text}");
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
