//! What a guest asks of Xen, whether it runs in this process or in another.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::evtchn::{GuestEnd, signal, take};
use super::grants::MappedPage;
use super::hardware::{BarSpace, DmaMemory, WindowArea};
use super::machine::Machine;
use super::windows::opening;
use crate::platform::{PageMapping, XenError};
use crate::types::{DomId, GrantRef, Pirq, Port};
use crate::xenstore;

/// Xen as one guest sees it.
pub trait GuestPlatform: Send + Sync + Debug {
    /// Which domain this is.
    fn domain(&self) -> DomId;

    /// Opens a connection to xenstore.
    ///
    /// # Errors
    /// When xenstored cannot be reached.
    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error>;

    /// Takes a page, filled with zeros, and grants it to another domain for reading and writing.
    ///
    /// # Errors
    /// ESRCH when this domain is gone, ENOSPC when it has no reference left.
    fn grant_page(&self, to: DomId) -> Result<GrantedPage, XenError>;

    /// Takes a grant back.
    ///
    /// # Errors
    /// EINVAL when there is none of that number, EBUSY while the page is mapped.
    fn end_grant(&self, reference: GrantRef) -> Result<(), XenError>;

    /// `EVTCHNOP_alloc_unbound`: makes a port for another domain to bind.
    ///
    /// # Errors
    /// ESRCH when this domain is gone, ENOSPC when it has no port left.
    fn alloc_unbound(&self, remote: DomId) -> Result<GuestPort, XenError>;

    /// `EVTCHNOP_bind_pirq`: makes a port that a PIRQ fires.
    ///
    /// # Errors
    /// EINVAL when the PIRQ is not mapped, EEXIST when it has a port.
    fn bind_pirq(&self, pirq: Pirq) -> Result<GuestPort, XenError>;

    /// `EVTCHNOP_close`.
    ///
    /// # Errors
    /// EINVAL when there is no such port.
    fn close_port(&self, port: Port) -> Result<(), XenError>;

    /// `PHYSDEVOP_eoi`: the line behind a PIRQ has been served, and may interrupt again.
    ///
    /// # Errors
    /// EINVAL when the PIRQ is no line's.
    fn end_of_interrupt(&self, pirq: Pirq) -> Result<(), XenError>;

    /// An eventfd that takes the place of [`GuestPlatform::end_of_interrupt`] for a line, with nobody between it and the hardware.
    ///
    /// # Errors
    /// EINVAL when the PIRQ is no line's; EOPNOTSUPP when there is no such thing for the device behind it.
    fn end_event(&self, pirq: Pirq) -> Result<EndEvent, XenError>;

    /// Lets this domain's devices reach memory, at a guest-physical address, which for them is a bus address. It stays until it is taken back or the
    /// domain is destroyed.
    ///
    /// # Errors
    /// As [`Machine::give_memory`].
    fn give_memory(&self, memory: DmaMemory) -> Result<(), XenError>;

    /// Takes memory back: the part that begins at this address. When this returns, no device reaches it.
    ///
    /// # Errors
    /// As [`Machine::take_memory`].
    fn take_memory(&self, address: u64) -> Result<(), XenError>;

    /// Opens what a BAR of a device of this domain decodes, by an address in it.
    ///
    /// # Errors
    /// EPERM when no device of this domain decodes that address.
    fn open_window(&self, space: BarSpace, address: u64) -> Result<GuestWindow, XenError>;

    /// `SCHEDOP_shutdown`: this domain will do nothing any more. The toolstack has yet to destroy it.
    ///
    /// # Errors
    /// ESRCH when it is gone.
    fn shut_down(&self) -> Result<(), XenError>;
}

/// Memory or ports of a device, one access at a time.
pub trait WindowAccess: Send + Debug {
    /// Reads `width` bytes, of [`BarSpace::widths`] and aligned.
    ///
    /// # Errors
    /// EINVAL beyond the window and for other widths, EPERM when the device is this domain's no more, what the device's bus says.
    fn read(&self, offset: u64, width: u8) -> io::Result<u64>;

    /// Writes, as [`WindowAccess::read`] reads.
    ///
    /// # Errors
    /// As [`WindowAccess::read`].
    fn write(&self, offset: u64, width: u8, value: u64) -> io::Result<()>;
}

/// What a BAR of a guest's device decodes.
#[derive(Debug)]
pub struct GuestWindow {
    /// Where it begins.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// The parts of it that may be mapped; none of ports, nor unless the machine allows it ([`super::MachineOptions::map_windows`]).
    pub areas: Vec<WindowArea>,
    /// All of it.
    pub access: Box<dyn WindowAccess>,
}

/// A page of the guest's that another domain may map.
#[derive(Debug)]
pub struct GrantedPage {
    /// What the other domain maps it by.
    pub reference: GrantRef,
    /// The page in this process.
    pub page: MappedPage,
}

// SAFETY: a `MappedPage` is 4096 bytes, mapped readable and writable at a page boundary until it is dropped, and cannot be shrunk.
unsafe impl PageMapping for MappedPage {
    fn base(&self) -> NonNull<u8> {
        self.base()
    }
}

/// What a guest says the ends of a line's interrupts by.
#[derive(Debug)]
pub struct EndEvent(pub(super) OwnedFd);

impl EndEvent {
    /// The line has been served, and may interrupt again.
    ///
    /// # Errors
    /// When the eventfd is beyond use.
    pub fn end_of_interrupt(&self) -> io::Result<()> {
        signal(&self.0)
    }
}

/// A guest's event channel port.
#[derive(Debug)]
pub struct GuestPort(pub(super) GuestEnd);

impl GuestPort {
    /// The port's number.
    pub fn number(&self) -> Port {
        self.0.port
    }

    /// Notifies the other end.
    ///
    /// # Errors
    /// When the channel is beyond use.
    pub fn notify(&self) -> io::Result<()> {
        signal(&self.0.notify)
    }

    /// Takes a pending event; false when there is none.
    ///
    /// # Errors
    /// When the channel is beyond use.
    pub fn take(&self) -> io::Result<bool> {
        take(&self.0.event)
    }

    /// Waits for an event and takes it; false when none came in time.
    ///
    /// # Errors
    /// When the channel is beyond use.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let start = Instant::now();
        loop {
            if self.take()? {
                return Ok(true);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            wait_readable(self.0.event.as_fd(), left)?;
        }
    }
}

impl AsFd for GuestPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// Waits until a descriptor can be read from, or the time is over.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    // Rounded up, so that the last fraction of a millisecond is not spent spinning.
    let milliseconds = i32::try_from(timeout.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
    let timeout = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A guest in this process.
#[derive(Debug, Clone)]
pub struct LocalGuest {
    machine: Machine,
    domain: DomId,
}

impl Machine {
    /// Xen as `domain` sees it.
    pub fn guest(&self, domain: DomId) -> LocalGuest {
        LocalGuest {
            machine: self.clone(),
            domain,
        }
    }
}

impl GuestPlatform for LocalGuest {
    fn domain(&self) -> DomId {
        self.domain
    }

    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error> {
        self.machine.connect_as(self.domain)
    }

    fn grant_page(&self, to: DomId) -> Result<GrantedPage, XenError> {
        let (reference, page) = self.machine.grant_page(self.domain, to)?;
        let page = MappedPage::new(page).map_err(|source| XenError::Failed {
            operation: "mapping the guest's own page".to_owned(),
            source,
        })?;
        Ok(GrantedPage { reference, page })
    }

    fn end_grant(&self, reference: GrantRef) -> Result<(), XenError> {
        self.machine.end_grant(self.domain, reference)
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<GuestPort, XenError> {
        self.machine
            .alloc_unbound(self.domain, remote)
            .map(GuestPort)
    }

    fn bind_pirq(&self, pirq: Pirq) -> Result<GuestPort, XenError> {
        self.machine.bind_pirq(self.domain, pirq).map(GuestPort)
    }

    fn close_port(&self, port: Port) -> Result<(), XenError> {
        self.machine.close_port(self.domain, port)
    }

    fn end_of_interrupt(&self, pirq: Pirq) -> Result<(), XenError> {
        self.machine.end_of_interrupt(self.domain, pirq)
    }

    fn end_event(&self, pirq: Pirq) -> Result<EndEvent, XenError> {
        self.machine.end_event(self.domain, pirq).map(EndEvent)
    }

    fn give_memory(&self, memory: DmaMemory) -> Result<(), XenError> {
        self.machine.give_memory(self.domain, memory)
    }

    fn take_memory(&self, address: u64) -> Result<(), XenError> {
        self.machine.take_memory(self.domain, address)
    }

    fn open_window(&self, space: BarSpace, address: u64) -> Result<GuestWindow, XenError> {
        let open = self.machine.open_window(self.domain, space, address)?;
        let areas = open.areas().map_err(|source| XenError::Failed {
            operation: opening(space, address),
            source,
        })?;
        Ok(GuestWindow {
            address: open.window.address,
            size: open.window.size,
            areas,
            access: Box::new(open),
        })
    }

    fn shut_down(&self) -> Result<(), XenError> {
        self.machine.domain_shut_down(self.domain)
    }
}
