//! What an emulator of devices asks of Xen about an HVM guest: an IOREQ server, the guest's memory, interrupts.
//!
//! An IOREQ server is Xen's word for who answers accesses that no memory and none of Xen's own
//! devices answer. It claims ranges; a virtual CPU that accesses one of them stops, and goes on
//! when the server has answered the request in the CPU's slot of the shared page (see
//! [`crate::ioreq`]). A guest has up to eight servers; the one created last has precedence.

use std::fmt;
use std::io;
use std::ptr::NonNull;

use crate::platform::{PageMapping, XenError};
use crate::types::{DomId, PciDevice};

/// The number of an IOREQ server among its guest's (`ioservid_t`, Xen `dm_op.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoreqServerId(pub u16);

impl fmt::Display for IoreqServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What kind of addresses a range is of (`XEN_DMOP_IO_RANGE_*`, Xen `dm_op.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum IoSpace {
    /// Ports of `in` and `out`.
    Port = 0,
    /// Guest-physical memory.
    Memory = 1,
    /// Configuration spaces of PCI functions. An address is [`PciDevice::sbdf`].
    Config = 2,
}

/// Addresses that an IOREQ server can claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoRange {
    /// Of which kind.
    pub space: IoSpace,
    /// The first.
    pub first: u64,
    /// The last, which is part of it.
    pub last: u64,
}

impl IoRange {
    /// The configuration space of one function.
    pub fn config(function: PciDevice) -> Self {
        let address = function.sbdf().into();
        Self {
            space: IoSpace::Config,
            first: address,
            last: address,
        }
    }

    /// Whether `other` lies within it.
    pub fn contains(&self, other: &Self) -> bool {
        self.space == other.space && self.first <= other.first && other.last <= self.last
    }
}

impl fmt::Display for IoRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = match self.space {
            IoSpace::Port => "ports",
            IoSpace::Memory => "memory",
            IoSpace::Config => "configuration of functions",
        };
        write!(f, "{space} {:#x} to {:#x}", self.first, self.last)
    }
}

/// A virtual interrupt pin of a PCI device on bus 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IntxPin {
    /// Device, 0 to 31.
    pub device: u8,
    /// 0 for INTA to 3 for INTD.
    pub pin: u8,
}

impl IntxPin {
    /// The line of the guest's IO-APIC that it drives, as ACPI counts them: 16 to 47, level-triggered
    /// (`hvm_pci_intx_gsi`, Xen `xen/arch/x86/include/asm/hvm/irq.h`). Each line is that of four pins.
    pub const fn gsi(self) -> u32 {
        let Self { device, pin } = self;
        let (device, pin) = (device as u32, pin as u32);
        let line = (device << 2).wrapping_add(device >> 3).wrapping_add(pin);
        (line & 31).wrapping_add(16)
    }
}

/// Pages of a guest's memory in this process, one after the other. Unmapped on drop. While there is
/// one, a dead guest's memory is not freed.
///
/// # Safety
/// Each page of which [`ForeignMapping::present`] or [`ForeignMapping::retry`] says true must be
/// 4096 bytes at `base` plus 4096 times its number that stay readable and writable for as long as
/// the value lives. `base` is aligned to 4096, and no part of the mapping's addresses belongs to
/// anybody else.
pub unsafe trait ForeignMapping: Send + Sync + fmt::Debug {
    /// Where the first page is.
    fn base(&self) -> NonNull<u8>;

    /// For each page, whether it is there. One that is not must not be touched: access to it ends
    /// the process.
    fn present(&self) -> &[bool];

    /// Tries again to map page `page`, which is not there and is not being tried by another thread.
    /// True: it is there from now on, though [`ForeignMapping::present`] goes on telling how it was
    /// at first.
    ///
    /// # Errors
    /// Linux has no memory left, or the domain is gone.
    fn retry(&self, page: usize) -> io::Result<bool>;
}

/// Xen, as a device model in dom0 sees it. All of it may be called from any thread.
pub trait DeviceModel: Send + Sync + fmt::Debug {
    /// Makes a server, which is disabled and has no buffered page. It lives until it is destroyed,
    /// or its guest is: it outlives the process that made it.
    ///
    /// # Errors
    /// Xen's. ESRCH: there is no such domain. EINVAL: it is no HVM guest. ENOSPC: it has eight.
    fn create_ioreq_server(&self, domain: DomId) -> Result<IoreqServerId, XenError>;

    /// Destroys a server. Requests that wait for it are not answered: what their CPUs read is
    /// undefined.
    ///
    /// # Errors
    /// Xen's. ENOENT: there is none of that number.
    fn destroy_ioreq_server(&self, domain: DomId, server: IoreqServerId) -> Result<(), XenError>;

    /// Maps the server's page, with a slot for each of the guest's CPUs (at most 128). To be done
    /// before the server is enabled for the first time, so that Xen can put the numbers of ports
    /// there. As long as it is mapped, a dead guest is not forgotten.
    ///
    /// # Errors
    /// Xen's. ENOENT: there is no such server.
    fn map_ioreq_page(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<Box<dyn PageMapping>, XenError>;

    /// Has accesses to a range go to the server.
    ///
    /// # Errors
    /// Xen's. EEXIST: a part of it is the server's already. ENOENT: there is no such server. ENOMEM
    /// and others: it has 256 ranges of this kind.
    fn map_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError>;

    /// Takes a range from the server, or part of one.
    ///
    /// # Errors
    /// Xen's. ENOENT: not all of it is the server's.
    fn unmap_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError>;

    /// Enables a server or disables it. A server that is disabled gets no requests. An enabled one
    /// has event channel ports in its page.
    ///
    /// # Errors
    /// Xen's. ENOENT: there is no such server.
    fn set_ioreq_server_state(
        &self,
        domain: DomId,
        server: IoreqServerId,
        enabled: bool,
    ) -> Result<(), XenError>;

    /// How many CPUs the guest may have.
    ///
    /// # Errors
    /// Xen's. EOPNOTSUPP: older than 4.15.
    fn vcpu_count(&self, domain: DomId) -> Result<u32, XenError>;

    /// Sets the level of an interrupt pin.
    ///
    /// # Errors
    /// Xen's. EINVAL: there is no such pin.
    fn set_pci_intx_level(&self, domain: DomId, pin: IntxPin, level: bool) -> Result<(), XenError>;

    /// Sets the level of an ISA interrupt, 0 to 15.
    ///
    /// # Errors
    /// Xen's. EINVAL: there is no such interrupt.
    fn set_isa_irq_level(&self, domain: DomId, irq: u8, level: bool) -> Result<(), XenError>;

    /// Sends a message-signalled interrupt, as a device with this address and data would.
    ///
    /// # Errors
    /// Xen's. EINVAL, ENOSYS: not an address and data of x86's interrupt messages.
    fn inject_msi(&self, domain: DomId, address: u64, data: u32) -> Result<(), XenError>;

    /// Maps `count` pages of the guest's memory beginning with guest frame `first`. Pages that
    /// cannot be mapped are no error, but absent from the mapping.
    ///
    /// # Errors
    /// When nothing could be mapped at all: Linux has no memory or addresses left, or there is no
    /// such domain.
    fn map_foreign(
        &self,
        domain: DomId,
        first: u64,
        count: usize,
    ) -> io::Result<Box<dyn ForeignMapping>>;
}
