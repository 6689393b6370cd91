//! Linux's devices for Xen, under `/dev/xen`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::platform::XenError;

/// The number of an ioctl of the `/dev/xen` devices. They are all `_IOC(_IOC_NONE, ...)`, whatever
/// they pass, so that only the size of the argument in bytes and not its direction is in the number
/// (Linux `include/uapi/xen`).
pub(crate) const fn ioctl_number(device: u8, number: u8, size: u16) -> libc::Ioctl {
    ((size as libc::Ioctl) << 16) | ((device as libc::Ioctl) << 8) | number as libc::Ioctl
}

/// Opens `/dev/xen/<name>`, which the kernel module of that name provides.
pub(crate) fn open(path: &'static str, module: &'static str, flags: i32) -> Result<File, XenError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| XenError::Device {
            path,
            module,
            source,
        })
}

/// Issues an ioctl with an argument of ours.
///
/// # Safety
/// `argument` must be of the type that `request` takes, with pointers and indices that the driver
/// may use.
pub(crate) unsafe fn ioctl<T>(
    file: &File,
    request: libc::Ioctl,
    argument: &mut T,
) -> io::Result<i32> {
    // SAFETY: the argument is a live, exclusively borrowed value; its type and content are the
    // caller's promise.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
