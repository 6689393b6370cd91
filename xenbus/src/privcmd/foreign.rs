//! Guests' memory, and pages that Xen shares, mapped through privcmd.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::Privcmd;
use crate::device::{ioctl, ioctl_number};
use crate::device_model::{ForeignMapping, IoreqServerId};
use crate::platform::{PageMapping, XenError};
use crate::types::DomId;

const PAGE_SIZE: usize = 4096;

/// `struct privcmd_mmapbatch_v2`.
#[repr(C)]
struct MmapBatchV2 {
    count: u32,
    domain: u16,
    /// Where the mapping is to be.
    address: u64,
    /// Guest frames, 8 bytes each.
    frames: u64,
    /// Out: 0 or a negative errno for each, 4 bytes.
    errors: u64,
}

/// `struct privcmd_mmap_resource`.
#[repr(C)]
struct MmapResource {
    domain: u16,
    kind: u32,
    id: u32,
    index: u32,
    count: u64,
    address: u64,
}

const MMAPBATCH_V2: libc::Ioctl = ioctl_number(b'P', 4, 32);
const MMAP_RESOURCE: libc::Ioctl = ioctl_number(b'P', 7, 32);

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<MmapBatchV2>() == 32 && offset_of!(MmapBatchV2, address) == 8);
    assert!(size_of::<MmapResource>() == 32 && offset_of!(MmapResource, count) == 16);
    assert!(MMAPBATCH_V2 == 0x205004 && MMAP_RESOURCE == 0x205007);
};

/// `XENMEM_resource_ioreq_server` (Xen `memory.h`).
const RESOURCE_IOREQ_SERVER: u32 = 0;
/// `XENMEM_resource_ioreq_server_frame_ioreq(0)`: the page of requests. Frame 0 is that of buffered
/// ones.
const FRAME_IOREQ: u32 = 1;

/// Addresses for pages of others, reserved by privcmd. Unmapped on drop.
#[derive(Debug)]
struct Region {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; whoever reaches into it has to mind
// that others do so, too.
unsafe impl Send for Region {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for Region {}

impl Region {
    /// Addresses that hold no page yet.
    fn reserve(privcmd: &File, pages: usize) -> io::Result<Self> {
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .filter(|bytes| *bytes > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = (libc::MAP_SHARED, privcmd.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes })
    }

    fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `reserve` made, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A guest's pages.
#[derive(Debug)]
struct ForeignPages {
    privcmd: Arc<File>,
    domain: DomId,
    first: u64,
    region: Region,
    present: Box<[bool]>,
}

// SAFETY: Linux has put a page of the guest's, readable and writable, at each place for which it
// reported no error, and takes none away before the region is unmapped. The region is ours alone.
unsafe impl ForeignMapping for ForeignPages {
    fn base(&self) -> NonNull<u8> {
        self.region.base
    }

    fn present(&self) -> &[bool] {
        &self.present
    }

    fn retry(&self, page: usize) -> io::Result<bool> {
        if self.present.get(page) != Some(&false) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let frame = self.first.checked_add(page as u64);
        let frame = frame.ok_or(io::ErrorKind::InvalidInput)?;
        let mut error = [0];
        map_frames(
            &self.privcmd,
            self.domain,
            &self.region,
            page,
            &[frame],
            &mut error,
        )?;
        Ok(error == [0])
    }
}

/// Maps guest frames into a region from a page of it on. `errors` tells how it went with each. Where
/// there is a page already, the kernel refuses.
fn map_frames(
    privcmd: &File,
    domain: DomId,
    region: &Region,
    page: usize,
    frames: &[u64],
    errors: &mut [i32],
) -> io::Result<()> {
    let end = page
        .checked_add(frames.len())
        .and_then(|pages| pages.checked_mul(PAGE_SIZE));
    if end.is_none_or(|end| end > region.bytes) || errors.len() != frames.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let offset = page.saturating_mul(PAGE_SIZE) as u64;
    let mut batch = MmapBatchV2 {
        count: u32::try_from(frames.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        domain: domain.0,
        address: region.address().saturating_add(offset),
        frames: frames.as_ptr().expose_provenance() as u64,
        errors: errors.as_mut_ptr().expose_provenance() as u64,
    };
    // SAFETY: MMAPBATCH_V2 takes a `struct privcmd_mmapbatch_v2`. The part of the region is within
    // it, both arrays have `count` elements and outlive the call, and nobody else refers to them.
    match unsafe { ioctl(privcmd, MMAPBATCH_V2, &mut batch) } {
        // A page has been paged out. Which one, the errors say.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(drop),
    }
}

/// A page that Xen made for a server.
#[derive(Debug)]
struct ResourcePage(Region);

// SAFETY: the region is one page, into which Linux has mapped Xen's, readable and writable; it stays
// until the region is unmapped on drop.
unsafe impl PageMapping for ResourcePage {
    fn base(&self) -> NonNull<u8> {
        self.0.base
    }
}

impl Privcmd {
    pub(crate) fn map_foreign(
        &self,
        domain: DomId,
        first: u64,
        count: usize,
    ) -> io::Result<Box<dyn ForeignMapping>> {
        let region = Region::reserve(&self.privcmd, count)?;
        let frames: Vec<u64> = (first..=u64::MAX).take(count).collect();
        let mut errors = vec![0i32; frames.len()];
        map_frames(&self.privcmd, domain, &region, 0, &frames, &mut errors)?;
        let present = errors.iter().map(|error| *error == 0).collect();
        Ok(Box::new(ForeignPages {
            privcmd: Arc::clone(&self.privcmd),
            domain,
            first,
            region,
            present,
        }))
    }

    pub(crate) fn map_ioreq_page(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        let failed = |source| XenError::Failed {
            operation: format!("mapping the page of IOREQ server {server} of domain {domain}"),
            source,
        };
        let region = Region::reserve(&self.privcmd, 1).map_err(failed)?;
        let mut resource = MmapResource {
            domain: domain.0,
            kind: RESOURCE_IOREQ_SERVER,
            id: server.0.into(),
            index: FRAME_IOREQ,
            count: 1,
            address: region.address(),
        };
        // SAFETY: MMAP_RESOURCE takes a `struct privcmd_mmap_resource`; the region has room for the
        // one page.
        unsafe { ioctl(&self.privcmd, MMAP_RESOURCE, &mut resource) }.map_err(failed)?;
        Ok(Box::new(ResourcePage(region)))
    }
}
