//! Hypercalls by `/dev/xen/privcmd` (Linux `include/uapi/xen/privcmd.h`).

mod dm_op;
mod domctl;
mod foreign;
mod page;
mod physdev;

use std::fs::File;
use std::io;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) use domctl::Domctl;
use page::Pages;

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

/// The way to issue hypercalls.
#[derive(Debug)]
pub(crate) struct Privcmd {
    /// Mappings of guests' memory hold it, too.
    privcmd: Arc<File>,
    pages: Pages,
}

impl Privcmd {
    pub(crate) fn open() -> Result<Self, XenError> {
        let privcmd = Arc::new(open("/dev/xen/privcmd", "xen-privcmd", 0)?);
        let pages = Pages::new(open("/dev/xen/hypercall", "xen-privcmd", 0)?);
        Ok(Self { privcmd, pages })
    }

    /// `HYPERVISOR_physdev_op(command, &argument)`. Gives the argument back as Xen left it.
    fn physdev_op<T>(&self, command: u32, argument: &T) -> io::Result<T>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        self.pages.with(argument, |address| {
            let arguments = [command.into(), address, 0, 0, 0];
            self.hypercall(xen_sys::__HYPERVISOR_physdev_op, arguments)
        })
    }

    /// `HYPERVISOR_domctl(&argument)`. Gives the argument back as Xen left it.
    fn domctl<T>(&self, argument: &T) -> io::Result<T>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        self.pages.with(argument, |address| {
            self.hypercall(xen_sys::__HYPERVISOR_domctl, [address, 0, 0, 0, 0])
        })
    }

    fn hypercall(&self, number: u32, arguments: [u64; 5]) -> io::Result<()> {
        let mut call = PrivcmdHypercall {
            number: number.into(),
            arguments,
        };
        // SAFETY: HYPERCALL takes a `struct privcmd_hypercall`. The only callers are the two above;
        // the one address among their arguments is that of a page which is theirs during the call
        // and longer than any argument of these hypercalls.
        unsafe { ioctl(&self.privcmd, HYPERCALL, &mut call) }.map(drop)
    }
}
