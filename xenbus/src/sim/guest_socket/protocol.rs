//! Requests and replies, in the machine's byte order: both ends are on one machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sim::BarSpace;

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What can be asked for. The first request of a connection is [`RequestKind::Become`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum RequestKind {
            $($(#[$doc])* $name = $number,)*
        }

        impl RequestKind {
            /// The request of that number.
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

requests! {
    /// This connection is a domain's. Argument: its id.
    Become = 1,
    /// Comes back with a stream socket to xenstored.
    ConnectXenstore = 2,
    /// Argument: the domain that may map the page. Comes back with the grant reference, and the page's memfd.
    GrantPage = 3,
    /// Argument: the grant reference.
    EndGrant = 4,
    /// Argument: the domain that may bind the port. Comes back with the port, and two eventfds: to wait on, and to notify by.
    AllocUnbound = 5,
    /// Argument: the PIRQ. Comes back with the port, and an eventfd to wait on.
    BindPirq = 6,
    /// Argument: the port.
    ClosePort = 7,
    /// The domain shuts down.
    ShutDown = 8,
    /// Argument: the PIRQ, of a line.
    EndOfInterrupt = 9,
    /// Address, size and offset in the memfd that comes with the request.
    GiveMemory = 10,
    /// Address.
    TakeMemory = 11,
    /// Argument: a [`BarSpace`]'s number. Address. Comes back with the window's number, an [`Extent`] of the window without offset, and one for each area that may be mapped, with a
    /// descriptor.
    OpenWindow = 12,
    /// Argument: the window's number. Offset, width. Comes back with the value, of 64 bits.
    ReadWindow = 13,
    /// Argument: the window's number. Offset, width, value.
    WriteWindow = 14,
    /// dom0: makes a PV domain, by the name that follows. Comes back with its id.
    CreateDomain = 15,
    /// dom0: `xl pci-attach`. Argument: the domain. The device: segment, bus, and device and function, in bits 31:16, 15:8 and 7:0.
    AttachDevice = 16,
    /// dom0: `xl pci-detach`, as [`RequestKind::AttachDevice`].
    DetachDevice = 17,
    /// dom0: lets a new domain run. Argument: the domain.
    Unpause = 18,
    /// dom0: argument: the domain.
    Destroy = 19,
    /// Argument: the PIRQ, of a line. Comes back with an eventfd: to write to it is [`RequestKind::EndOfInterrupt`].
    EndEvent = 20,
}

impl RequestKind {
    /// How many numbers of 64 bits follow the request's head. [`RequestKind::CreateDomain`]: none, but a name.
    pub fn numbers(self) -> usize {
        match self {
            Self::TakeMemory | Self::OpenWindow | Self::AttachDevice | Self::DetachDevice => 1,
            Self::ReadWindow => 2,
            Self::GiveMemory | Self::WriteWindow => 3,
            _ => 0,
        }
    }

    /// What dom0 alone may ask for.
    pub fn is_toolstacks(self) -> bool {
        (Self::CreateDomain as u32..=Self::Destroy as u32).contains(&(self as u32))
    }
}

/// The address space of that number.
pub fn space(number: u32) -> Option<BarSpace> {
    let mut spaces = [BarSpace::Memory, BarSpace::Io].into_iter();
    spaces.find(|space| *space as u32 == number)
}

/// A request's head: 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// A [`RequestKind`]'s number.
    pub kind: u32,
    /// Its argument; 0 where it has none.
    pub argument: u32,
}

/// A reply's head: 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reply {
    /// 0, or a positive errno.
    pub errno: i32,
    /// What was asked for; 0 where it is no number.
    pub value: u32,
}

/// A window, or an area of one that may be mapped.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Extent {
    /// The window's address, or where in the window the area begins.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Where in its file the area begins; 0 for a window.
    pub offset: u64,
}

const _: () = {
    assert!(size_of::<Request>() == 8 && size_of::<Reply>() == 8 && size_of::<Extent>() == 24);
    assert!(std::mem::offset_of!(Request, argument) == 4);
    assert!(std::mem::offset_of!(Reply, value) == 4);
};

/// Bytes of a domain's name.
pub const LONGEST_NAME: usize = 64;
/// Bytes of the longest request: a head and a name.
pub const LONGEST_REQUEST: usize = size_of::<Request>() + LONGEST_NAME;
/// The most descriptors that come with a reply: areas of a window.
pub const MOST_DESCRIPTORS: usize = 8;
/// Bytes of the longest reply: a head, a window, its areas.
pub const LONGEST_REPLY: usize = size_of::<Reply>() + (1 + MOST_DESCRIPTORS) * size_of::<Extent>();
