//! Memory for a device's DMA: a memfd, which can be handed to whoever maps it for the device.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Bytes of the memory.
pub const SIZE: u64 = 1 << 20;
/// Where devices find it. QEMU's `edu` has 28 address lines, and page 0 is better left alone.
pub const ADDRESS: u64 = 16 << 20;

/// See the module. Stays as long as the program runs.
pub struct Memory {
    pub file: OwnedFd,
    base: NonNull<u8>,
}

impl Memory {
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a string of C's, which the kernel copies.
        let raw = check(unsafe { libc::memfd_create(c"lab-guest".as_ptr(), flags) })?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: no pointers are involved.
        check(unsafe { libc::ftruncate(file.as_raw_fd(), SIZE.cast_signed()) })?;
        // SAFETY: F_ADD_SEALS takes a number.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) })?;
        let base = map(&file, 0, SIZE as usize)?;
        Ok(Self { file, base })
    }

    /// Where this program has it.
    pub fn base(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// Where a device finds the byte at `offset`.
    pub fn physical(&self, offset: u64) -> u64 {
        ADDRESS.saturating_add(offset)
    }

    /// Where a value of `T` lies, if there is one there.
    fn place<T>(&self, offset: u64) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>() as u64)?;
        let fits = end <= SIZE && offset.is_multiple_of(align_of::<T>() as u64);
        // SAFETY: it lies in the mapping, which stays, and is aligned. A device changes it at any time, which is why only atomics are asked for, all
        // of whose values are valid.
        fits.then(|| unsafe { self.base.add(offset as usize).cast::<T>().as_ref() })
    }

    pub fn get32(&self, offset: u64) -> u32 {
        let place = self.place::<AtomicU32>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set32(&self, offset: u64, value: u32) {
        if let Some(place) = self.place::<AtomicU32>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn set64(&self, offset: u64, value: u64) {
        if let Some(place) = self.place::<AtomicU64>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    /// Writes bytes.
    pub fn fill(&self, offset: u64, bytes: impl IntoIterator<Item = u8>) {
        for (place, byte) in (offset..).zip(bytes) {
            if let Some(place) = self.place::<AtomicU8>(place) {
                place.store(byte, Ordering::SeqCst);
            }
        }
    }

    /// So many bytes.
    pub fn bytes(&self, offset: u64, count: u64) -> Vec<u8> {
        (offset..offset.saturating_add(count))
            .filter_map(|place| self.place::<AtomicU8>(place))
            .map(|byte| byte.load(Ordering::SeqCst))
            .collect()
    }
}

/// Maps a part of a file, shared, for as long as the program runs.
pub fn map(file: &impl AsRawFd, offset: u64, size: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice changes no memory that is in use.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset.cast_signed(),
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or(io::Error::other("mapped at 0"))
}

pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
