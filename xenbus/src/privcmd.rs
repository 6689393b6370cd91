//! Hypercalls by `/dev/xen/privcmd` (Linux `include/uapi/xen/privcmd.h`).
//!
//! Xen reads arguments from, and writes them to, a process's memory by virtual address, so that memory must not move or be paged out:
//! `/dev/xen/hypercall` provides such pages (Linux 4.18). Each call has a page of its own: no call waits for another guest's.

mod domctl;
mod physdev;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) use domctl::Domctl;

use crate::device::{ioctl, ioctl_number, open};
use crate::platform::XenError;

/// `struct privcmd_hypercall`.
#[repr(C)]
struct PrivcmdHypercall {
    number: u64,
    arguments: [u64; 5],
}

const HYPERCALL: libc::Ioctl = ioctl_number(b'P', 0, 48);

const _: () = {
    assert!(size_of::<PrivcmdHypercall>() == 48);
    assert!(HYPERCALL == 0x305000);
};

const PAGE_SIZE: usize = 4096;

/// The way to issue hypercalls.
#[derive(Debug)]
pub(crate) struct Privcmd {
    privcmd: File,
    pages: File,
}

impl Privcmd {
    pub(crate) fn open() -> Result<Self, XenError> {
        let privcmd = open("/dev/xen/privcmd", "xen-privcmd", 0)?;
        let pages = open("/dev/xen/hypercall", "xen-privcmd", 0)?;
        Ok(Self { privcmd, pages })
    }

    /// `HYPERVISOR_physdev_op(command, &argument)`. Gives the argument back as Xen left it.
    fn physdev_op<T: FromBytes + IntoBytes + Immutable>(
        &self,
        command: u32,
        argument: &T,
    ) -> io::Result<T> {
        let page = HypercallPage::new(&self.pages)?;
        page.put(argument);
        self.hypercall(
            xen_sys::__HYPERVISOR_physdev_op,
            [command.into(), page.address(), 0, 0, 0],
        )?;
        Ok(page.take())
    }

    /// `HYPERVISOR_domctl(&argument)`. Gives the argument back as Xen left it.
    fn domctl<T: FromBytes + IntoBytes + Immutable>(&self, argument: &T) -> io::Result<T> {
        let page = HypercallPage::new(&self.pages)?;
        page.put(argument);
        self.hypercall(xen_sys::__HYPERVISOR_domctl, [page.address(), 0, 0, 0, 0])?;
        Ok(page.take())
    }

    fn hypercall(&self, number: u32, arguments: [u64; 5]) -> io::Result<i32> {
        let mut call = PrivcmdHypercall {
            number: number.into(),
            arguments,
        };
        // SAFETY: HYPERCALL takes a `struct privcmd_hypercall`. The only callers are the two above; the one address among their arguments
        // is that of a page which outlives the call and is longer than any argument of these hypercalls.
        unsafe { ioctl(&self.privcmd, HYPERCALL, &mut call) }
    }
}

/// A zeroed page that Xen can reach.
struct HypercallPage {
    base: NonNull<u8>,
}

impl HypercallPage {
    fn new(device: &File) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                protection,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base })
    }

    fn address(&self) -> u64 {
        // usize is 64 bits wide wherever this hypercall layout holds.
        self.base.as_ptr().addr() as u64
    }

    fn put<T: IntoBytes + Immutable>(&self, value: &T) {
        const { assert!(size_of::<T>() <= PAGE_SIZE) };
        // SAFETY: the page is ours alone, is mapped for as long as `self` lives, and holds at least that many bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                value.as_bytes().as_ptr(),
                self.base.as_ptr(),
                size_of::<T>(),
            )
        };
    }

    fn take<T: FromBytes>(&self) -> T {
        const { assert!(size_of::<T>() <= PAGE_SIZE && align_of::<T>() <= PAGE_SIZE) };
        // SAFETY: as for `put`; any bytes make a `T` (FromBytes), and a page's beginning is aligned for it. Xen has finished with the page.
        unsafe { self.base.cast::<T>().read_volatile() }
    }
}

impl Drop for HypercallPage {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made.
        unsafe { libc::munmap(self.base.as_ptr().cast(), PAGE_SIZE) };
    }
}
