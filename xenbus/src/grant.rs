//! Pages granted by guests, mapped by `/dev/xen/gntdev` (Linux `include/uapi/xen/gntdev.h`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::device::{ioctl, ioctl_number, open};
use crate::platform::{PageMapping, XenError};
use crate::types::{DomId, GrantRef};

/// `struct ioctl_gntdev_map_grant_ref` with one reference.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    /// Out: where to mmap it.
    index: u64,
    domain: u32,
    reference: u32,
}

#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

const MAP_GRANT_REF: libc::Ioctl = ioctl_number(b'G', 0, 24);
const UNMAP_GRANT_REF: libc::Ioctl = ioctl_number(b'G', 1, 16);

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<MapGrantRef>() == 24 && offset_of!(MapGrantRef, index) == 8);
    assert!(offset_of!(MapGrantRef, domain) == 16 && offset_of!(MapGrantRef, reference) == 20);
    assert!(size_of::<UnmapGrantRef>() == 16 && offset_of!(UnmapGrantRef, count) == 8);
    assert!(MAP_GRANT_REF == 0x184700 && UNMAP_GRANT_REF == 0x104701);
};

const PAGE_SIZE: usize = 4096;

/// One page of a guest's, mapped for reading and writing. As long as it is mapped, a dead guest's
/// memory cannot be freed.
#[derive(Debug)]
pub struct GrantedPage {
    base: NonNull<u8>,
    index: u64,
    file: File,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this value alone unmaps it.
unsafe impl Send for GrantedPage {}

/// Opens the device: to see early whether it is there.
pub(crate) fn open_device() -> Result<File, XenError> {
    open("/dev/xen/gntdev", "xen-gntdev", 0)
}

impl GrantedPage {
    /// Maps what `domain` granted to us.
    ///
    /// # Errors
    /// [`XenError::Device`]; EINVAL when the reference is not one that was granted to us for
    /// writing.
    pub fn map(domain: DomId, reference: GrantRef) -> Result<Self, XenError> {
        let failed = |source| XenError::Failed {
            operation: format!("mapping grant {reference} of domain {domain}"),
            source,
        };
        let file = open_device()?;
        let mut map = MapGrantRef {
            count: 1,
            pad: 0,
            index: 0,
            domain: domain.0.into(),
            reference: reference.0,
        };
        // SAFETY: MAP_GRANT_REF takes a `struct ioctl_gntdev_map_grant_ref` followed by `count`
        // references: one, as here.
        unsafe { ioctl(&file, MAP_GRANT_REF, &mut map) }.map_err(failed)?;
        // The kernel asks Xen only now.
        match mmap(&file, map.index) {
            Ok(base) => Ok(Self {
                base,
                index: map.index,
                file,
            }),
            Err(error) => {
                unmap_index(&file, map.index);
                Err(failed(error))
            }
        }
    }
}

fn mmap(file: &File, index: u64) -> io::Result<NonNull<u8>> {
    let offset = i64::try_from(index).map_err(|_| io::ErrorKind::InvalidData)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE_SIZE,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

fn unmap_index(file: &File, index: u64) {
    let mut unmap = UnmapGrantRef {
        index,
        count: 1,
        pad: 0,
    };
    // SAFETY: UNMAP_GRANT_REF takes a `struct ioctl_gntdev_unmap_grant_ref`, which holds no
    // pointers.
    if let Err(error) = unsafe { ioctl(file, UNMAP_GRANT_REF, &mut unmap) } {
        log::warn!("giving a grant back to /dev/xen/gntdev: {error}");
    }
}

// SAFETY: `base` is a shared, writable mapping of one page, which only drop undoes.
unsafe impl PageMapping for GrantedPage {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for GrantedPage {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made; nothing can borrow from it any more. The
        // pages go first, then the grant.
        if unsafe { libc::munmap(self.base.as_ptr().cast(), PAGE_SIZE) } == 0 {
            unmap_index(&self.file, self.index);
        }
    }
}
