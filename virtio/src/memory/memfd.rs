//! Guest memory in an anonymous file of our own, with holes: for guests that are part of this
//! process, in tests above all.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use xenbus::device_model::ForeignMapping;

use super::{PAGE_SIZE, PageMapper};

/// The memory of an embedded guest. All its pages are there at first.
#[derive(Debug, Clone)]
pub struct Memfd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    /// One for each page: whether it is there.
    there: Vec<AtomicBool>,
    mapped: AtomicUsize,
}

impl Memfd {
    /// A guest with `pages` pages from address 0 on, full of zeroes.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(pages: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string, and the call makes a descriptor that nobody else has.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(pages.saturating_mul(PAGE_SIZE) as u64)?;
        Ok(Self(Arc::new(Inner {
            file,
            there: (0..pages).map(|_| AtomicBool::new(true)).collect(),
            mapped: AtomicUsize::new(0),
        })))
    }

    /// Takes a page from the guest, or gives it back. A mapping that has the page keeps it.
    pub fn set_page(&self, page: usize, there: bool) {
        if let Some(state) = self.0.there.get(page) {
            state.store(there, Ordering::SeqCst);
        }
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.0.mapped.load(Ordering::SeqCst)
    }
}

impl Inner {
    fn is_there(&self, page: usize) -> bool {
        self.there
            .get(page)
            .is_some_and(|state| state.load(Ordering::SeqCst))
    }
}

impl PageMapper for Memfd {
    fn map(&self, first: u64, count: usize) -> io::Result<Box<dyn ForeignMapping>> {
        let size = count.saturating_mul(PAGE_SIZE);
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        self.0.mapped.fetch_add(1, Ordering::SeqCst);
        let mut mapping = MemfdPages {
            guest: Arc::clone(&self.0),
            base,
            first: usize::try_from(first).unwrap_or(usize::MAX),
            present: vec![false; count],
        };
        for page in 0..count {
            let there = mapping.retry(page)?;
            if let Some(present) = mapping.present.get_mut(page) {
                *present = there;
            }
        }
        Ok(Box::new(mapping))
    }
}

#[derive(Debug)]
struct MemfdPages {
    guest: Arc<Inner>,
    base: NonNull<u8>,
    first: usize,
    present: Vec<bool>,
}

// SAFETY: the mapping is the value's own and does not depend on the thread.
unsafe impl Send for MemfdPages {}
// SAFETY: what is behind `base` is not touched here; whoever touches it does so as guest memory.
unsafe impl Sync for MemfdPages {}

// SAFETY: a page is reported only when the file, which is longer than that, is mapped there; it stays so
// until the value is dropped.
unsafe impl ForeignMapping for MemfdPages {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn present(&self) -> &[bool] {
        &self.present
    }

    fn retry(&self, page: usize) -> io::Result<bool> {
        let guest_page = self.first.saturating_add(page);
        if page >= self.present.len() || !self.guest.is_there(guest_page) {
            return Ok(false);
        }
        // SAFETY: the page is within the addresses that `map` reserved for this value, and has not
        // been reported as present yet, so nobody uses what was there.
        let mapped = unsafe {
            libc::mmap(
                self.base
                    .as_ptr()
                    .add(page.saturating_mul(PAGE_SIZE))
                    .cast(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.guest.file.as_raw_fd(),
                guest_page.saturating_mul(PAGE_SIZE) as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(true)
    }
}

impl Drop for MemfdPages {
    fn drop(&mut self) {
        let size = self.present.len().saturating_mul(PAGE_SIZE);
        // SAFETY: the addresses are this value's own, and nothing borrowed from it is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), size) };
        self.guest.mapped.fetch_sub(1, Ordering::SeqCst);
    }
}
