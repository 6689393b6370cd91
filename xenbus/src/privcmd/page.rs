//! Memory for hypercall arguments.
//!
//! Xen reads and writes arguments by their virtual address, so the memory must neither move nor be
//! paged out: `/dev/xen/hypercall` provides such pages (Linux 4.18). Mapping one takes several
//! times as long as a hypercall, so they are kept. Each call has one to itself: none waits for
//! another guest's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use zerocopy::{FromBytes, Immutable, IntoBytes};

const PAGE_SIZE: usize = 4096;

/// Pages for as many calls as ever ran at once.
#[derive(Debug)]
pub(super) struct Pages {
    device: File,
    unused: Mutex<Vec<Page>>,
}

impl Pages {
    pub(super) fn new(device: File) -> Self {
        let unused = Mutex::default();
        Self { device, unused }
    }

    /// Calls `hypercall` with the address of a copy of `argument`, and returns what Xen made of it.
    pub(super) fn with<T>(
        &self,
        argument: &T,
        hypercall: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<T>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let unused = self.unused().pop();
        let page = match unused {
            Some(page) => page,
            None => Page::map(&self.device)?,
        };
        page.put(argument);
        let result = hypercall(page.address()).map(|()| page.get());
        self.unused().push(page);
        result
    }

    fn unused(&self) -> std::sync::MutexGuard<'_, Vec<Page>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One page that Xen can reach.
#[derive(Debug)]
struct Page {
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this value alone uses it.
unsafe impl Send for Page {}

impl Page {
    fn map(device: &File) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = (libc::MAP_SHARED, device.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_SIZE, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base })
    }

    fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    fn put<T: IntoBytes + Immutable>(&self, value: &T) {
        const { assert!(size_of::<T>() <= PAGE_SIZE) };
        let bytes = value.as_bytes();
        // SAFETY: the page is ours alone, stays mapped while `self` lives, and is long enough.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr(), bytes.len()) };
    }

    fn get<T: FromBytes>(&self) -> T {
        const { assert!(size_of::<T>() <= PAGE_SIZE && align_of::<T>() <= PAGE_SIZE) };
        // SAFETY: as for `put`; the page's beginning is aligned for a `T`, of which any bytes make
        // a valid one (FromBytes). Volatile, because Xen wrote them behind the compiler's back.
        unsafe { self.base.cast::<T>().read_volatile() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), PAGE_SIZE) };
    }
}
