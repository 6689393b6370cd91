//! Event channels of the real Xen, by `/dev/xen/evtchn` (Linux `include/uapi/xen/evtchn.h`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use crate::device::{ioctl, ioctl_number, open};
use crate::platform::{EventPort, XenError};
use crate::types::{DomId, Port};

#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

#[repr(C)]
struct Notify {
    port: u32,
}

const BIND_INTERDOMAIN: libc::Ioctl = ioctl_number(b'E', 1, 8);
const NOTIFY: libc::Ioctl = ioctl_number(b'E', 4, 4);
const RESET: libc::Ioctl = ioctl_number(b'E', 5, 0);

const _: () = {
    assert!(size_of::<BindInterdomain>() == 8 && size_of::<Notify>() == 4);
    assert!(BIND_INTERDOMAIN == 0x84501 && NOTIFY == 0x44504 && RESET == 0x4505);
};

/// An interdomain channel on a file descriptor of its own. Closing that closes our end; the other
/// end goes back to waiting for us.
#[derive(Debug)]
pub struct EventChannel {
    file: File,
    local: Port,
}

/// Opens the device: to see early whether it is there.
pub(crate) fn open_device() -> Result<File, XenError> {
    open("/dev/xen/evtchn", "xen-evtchn", libc::O_NONBLOCK)
}

impl EventChannel {
    /// Binds to a port that `domain` left unbound for us.
    ///
    /// # Errors
    /// [`XenError::Device`]; Xen's: EINVAL when the port is not waiting for us, ESRCH when there is
    /// no such domain.
    pub fn bind_interdomain(domain: DomId, port: Port) -> Result<Self, XenError> {
        let file = open_device()?;
        let mut bind = BindInterdomain {
            remote_domain: domain.0.into(),
            remote_port: port.0,
        };
        // SAFETY: BIND_INTERDOMAIN takes a `struct ioctl_evtchn_bind_interdomain`, which holds no
        // pointers.
        let local = unsafe { ioctl(&file, BIND_INTERDOMAIN, &mut bind) }.map_err(|source| {
            XenError::Failed {
                operation: format!("binding to event channel {port} of domain {domain}"),
                source,
            }
        })?;
        Ok(Self {
            file,
            local: Port(local.cast_unsigned()),
        })
    }

    /// Our end's number.
    pub fn local_port(&self) -> Port {
        self.local
    }
}

impl EventPort for EventChannel {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        // The device gives the numbers of pending ports; on this descriptor that can only be ours.
        let mut ports = [0; 4];
        match self.file.read(&mut ports) {
            Ok(count) => Ok(count == ports.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            // The ring of pending ports has overflowed and takes no more until it is emptied.
            // Something was pending.
            Err(error) if error.raw_os_error() == Some(libc::EFBIG) => {
                // SAFETY: RESET takes no argument.
                unsafe { ioctl(&self.file, RESET, &mut ()) }?;
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    fn unmask(&mut self) -> io::Result<()> {
        self.file.write_all(&self.local.0.to_ne_bytes())
    }

    fn notify(&self) -> io::Result<()> {
        // SAFETY: NOTIFY takes a `struct ioctl_evtchn_notify`, which holds no pointers.
        unsafe { ioctl(&self.file, NOTIFY, &mut Notify { port: self.local.0 }) }.map(drop)
    }
}
