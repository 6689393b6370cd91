//! A guest's memory: frames of a memfd, which come and go as the guest's balloon has them.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

use crate::sim::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;

/// Memory from guest-physical address 0 on.
#[derive(Debug)]
pub(super) struct Memory {
    file: OwnedFd,
    /// For each guest frame the frame of the file that is there.
    frames: Vec<Option<u64>>,
    /// The first frame of the file that was never used.
    fresh: u64,
}

impl Memory {
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = memfd_create(c"xen-guest-memory", MFdFlags::MFD_CLOEXEC)?;
        let fresh = bytes / PAGE;
        ftruncate(
            &file,
            i64::try_from(fresh.saturating_mul(PAGE)).unwrap_or(i64::MAX),
        )?;
        Ok(Self {
            file,
            frames: (0..fresh).map(Some).collect(),
            fresh,
        })
    }

    fn frame(&self, guest_frame: u64) -> Option<u64> {
        let index = usize::try_from(guest_frame).ok()?;
        self.frames.get(index).copied().flatten()
    }

    /// The guest gives a frame back.
    ///
    /// # Errors
    /// EINVAL when it has none there.
    pub fn take_out(&mut self, guest_frame: u64) -> Result<(), Errno> {
        let index = usize::try_from(guest_frame).map_err(|_| Errno::EINVAL)?;
        let frame = self.frames.get_mut(index).ok_or(Errno::EINVAL)?;
        frame.take().map(drop).ok_or(Errno::EINVAL)
    }

    /// The guest gets a frame, filled with zeros. It is another than was there before: whoever still maps that one shares nothing with the
    /// guest any more.
    ///
    /// # Errors
    /// EINVAL when there is one, or it lies beyond the guest's memory.
    pub fn put_in(&mut self, guest_frame: u64) -> Result<(), Errno> {
        let index = usize::try_from(guest_frame).map_err(|_| Errno::EINVAL)?;
        let frame = self.frames.get_mut(index).ok_or(Errno::EINVAL)?;
        if frame.is_some() {
            return Err(Errno::EINVAL);
        }
        *frame = Some(self.fresh);
        self.fresh = self.fresh.saturating_add(1);
        let size = i64::try_from(self.fresh.saturating_mul(PAGE)).map_err(|_| Errno::ENOMEM)?;
        ftruncate(&self.file, size)
    }

    /// Where in the file an address is, and how many bytes follow in its page.
    fn locate(&self, address: u64) -> Option<(i64, usize)> {
        let within = address % PAGE;
        let offset = self
            .frame(address / PAGE)?
            .checked_mul(PAGE)?
            .checked_add(within)?;
        let left = usize::try_from(PAGE.saturating_sub(within)).ok()?;
        Some((i64::try_from(offset).ok()?, left))
    }

    /// Reads. EFAULT where there is no memory.
    pub fn read(&self, mut address: u64, mut into: &mut [u8]) -> Result<(), Errno> {
        while !into.is_empty() {
            let (offset, left) = self.locate(address).ok_or(Errno::EFAULT)?;
            let (now, rest) = into.split_at_mut(left.min(into.len()));
            if pread(&self.file, now, offset)? != now.len() {
                return Err(Errno::EFAULT);
            }
            address = address.saturating_add(now.len() as u64);
            into = rest;
        }
        Ok(())
    }

    /// Writes. EFAULT where there is no memory.
    pub fn write(&self, mut address: u64, mut from: &[u8]) -> Result<(), Errno> {
        while !from.is_empty() {
            let (offset, left) = self.locate(address).ok_or(Errno::EFAULT)?;
            let (now, rest) = from.split_at(left.min(from.len()));
            if pwrite(&self.file, now, offset)? != now.len() {
                return Err(Errno::EFAULT);
            }
            address = address.saturating_add(now.len() as u64);
            from = rest;
        }
        Ok(())
    }

    /// Maps guest frames in a row, those that are there.
    pub fn map(&self, first: u64, count: usize) -> io::Result<Mapped> {
        let mut mapped = Mapped::reserve(first, count)?;
        for page in 0..count {
            let there = self.map_into(&mapped, page)?;
            if let Some(present) = mapped.present.get_mut(page) {
                *present = there;
            }
        }
        Ok(mapped)
    }

    /// Maps a page of a mapping that is not there. False: the guest has none.
    pub fn map_into(&self, mapped: &Mapped, page: usize) -> io::Result<bool> {
        if mapped.present.get(page) != Some(&false) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let frame = mapped.first.checked_add(page as u64);
        let Some(frame) = frame.and_then(|frame| self.frame(frame)) else {
            return Ok(false);
        };
        let at = mapped.base.as_ptr() as usize;
        let at = at.saturating_add(page.saturating_mul(PAGE_SIZE));
        let offset =
            i64::try_from(frame.saturating_mul(PAGE)).map_err(|_| io::ErrorKind::InvalidInput)?;
        map_over(at, &self.file, offset)?;
        Ok(true)
    }
}

/// Maps one page of a file over a page of a [`Mapped`] that is not there.
fn map_over(at: usize, file: impl AsFd, offset: i64) -> io::Result<()> {
    let length = NonZeroUsize::new(PAGE_SIZE).ok_or(io::ErrorKind::InvalidInput)?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
    // SAFETY: the page at this address is within the caller's region and was said not to be there, so nothing refers to it.
    unsafe { mmap(NonZeroUsize::new(at), length, access, flags, file, offset) }?;
    Ok(())
}

/// Pages of a guest's, in this process.
#[derive(Debug)]
pub(super) struct Mapped {
    first: u64,
    base: NonNull<c_void>,
    present: Box<[bool]>,
}

// SAFETY: the mapping belongs to the process, not to a thread; all accesses through its address are the business of whoever makes them.
unsafe impl Send for Mapped {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Addresses that nothing can be read from.
    fn reserve(first: u64, count: usize) -> io::Result<Self> {
        let length = count
            .checked_mul(PAGE_SIZE)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_NONE, flags) }?;
        let present = vec![false; count].into_boxed_slice();
        Ok(Self {
            first,
            base,
            present,
        })
    }

    pub fn base(&self) -> NonNull<u8> {
        self.base.cast()
    }

    pub fn present(&self) -> &[bool] {
        &self.present
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let length = self.present.len().saturating_mul(PAGE_SIZE);
        // SAFETY: the region was made by `reserve` and nothing else unmaps it; who uses its addresses holds this value.
        if let Err(errno) = unsafe { munmap(self.base, length) } {
            log::error!("cannot unmap a guest's memory: {errno}");
        }
    }
}
