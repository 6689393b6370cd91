//! Requests of an HVM guest's CPUs to an IOREQ server, and the page in which they lie (Xen
//! `ioreq.h`).
//!
//! The page has a slot of 32 bytes for each CPU. Xen writes a request, sets its state to
//! [`State::Ready`] and notifies the CPU's event channel. The server marks it
//! [`State::InProcess`], carries it out, puts what was read into `data`, sets the state to
//! [`State::Answered`] and notifies the same channel. The CPU waits all the while, and for ever if
//! the server never answers. A state that goes back makes Xen crash the guest.

mod page;

pub use page::{IoreqPage, SLOTS};

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `struct ioreq`, as the server copies it. Nothing in it is checked.
///
/// The page is not the guest's, but what stands in it are the guest's numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Ioreq {
    /// The address: a port, guest-physical memory, or a function in bits 63:32 and its register in
    /// bits 31:0.
    pub addr: u64,
    /// The value; or, with [`Flags::DATA_IS_PTR`], where in guest-physical memory the values are.
    pub data: u64,
    /// Elements of a string instruction, otherwise 1. Undefined for broadcasts.
    pub count: u32,
    /// Bytes of an element.
    pub size: u32,
    /// Xen's end of the CPU's event channel.
    pub vp_eport: u32,
    /// Nothing.
    pub pad: u16,
    /// State in bits 3:0, and [`Flags`].
    pub flags: u8,
    /// [`Kind`].
    pub kind: u8,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Ioreq>() == 32);
    assert!(offset_of!(Ioreq, data) == 8 && offset_of!(Ioreq, count) == 16);
    assert!(offset_of!(Ioreq, vp_eport) == 24 && offset_of!(Ioreq, flags) == 30);
};

bitflags::bitflags! {
    /// The bits beside the state.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u8 {
        /// `data` is the guest-physical address of the values.
        const DATA_IS_PTR = 1 << 4;
        /// The guest reads.
        const READ = 1 << 5;
        /// Addresses go down from one element to the next (the CPU's direction flag).
        const DESCENDING = 1 << 6;
    }
}

/// `IOREQ_TYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `in` and `out`.
    Port = 0,
    /// Memory.
    Memory = 1,
    /// A configuration space.
    Config = 2,
    /// To all servers: the guest has set its clock.
    TimeOffset = 7,
    /// To all servers: pages of the guest are not where they were; mappings are to be dropped.
    Invalidate = 8,
}

impl Kind {
    /// The type with this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        [
            Self::Port,
            Self::Memory,
            Self::Config,
            Self::TimeOffset,
            Self::Invalidate,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == number)
    }
}

/// `STATE_IO*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// There is no request.
    None = 0,
    /// A request waits.
    Ready = 1,
    /// The server is at it, or was when it died.
    InProcess = 2,
    /// The CPU may take the answer.
    Answered = 3,
}

/// Where the flags hold the state.
const STATE_MASK: u8 = 0xf;

impl State {
    /// The state among the flags; `None` when it is no known one.
    pub fn from_flags(flags: u8) -> Option<Self> {
        [Self::None, Self::Ready, Self::InProcess, Self::Answered]
            .into_iter()
            .find(|state| *state as u8 == flags & STATE_MASK)
    }
}

impl Ioreq {
    /// The bits beside the state.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_truncate(self.flags)
    }
}
