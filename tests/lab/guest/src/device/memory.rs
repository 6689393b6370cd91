//! Memory for a device's DMA: a memfd, which can be handed to whoever maps it for the device.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use crate::memory::Memory;

/// Bytes of the memory.
pub const SIZE: u64 = 1 << 20;
/// Where devices find it. QEMU's `edu` has 28 address lines, and page 0 is better left alone.
pub const ADDRESS: u64 = 16 << 20;

/// Makes it, and the memfd.
pub fn shared() -> Result<(Memory, OwnedFd), Box<dyn Error>> {
    let file = sealed(SIZE)?;
    let base = map(&file, 0, SIZE as usize)?;
    // SAFETY: a mapping of this size, which nobody else knows, and which is never unmapped.
    Ok((unsafe { Memory::new(base, SIZE, ADDRESS) }, file))
}

/// A file of so many bytes, none of which is in use yet, that cannot get shorter.
pub fn sealed(size: u64) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string of C's, which the kernel copies.
    let raw = check(unsafe { libc::memfd_create(c"lab-guest".as_ptr(), flags) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let file = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: no pointers are involved.
    check(unsafe { libc::ftruncate(file.as_raw_fd(), size.cast_signed()) })?;
    // SAFETY: F_ADD_SEALS takes a number.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) })?;
    Ok(file)
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
