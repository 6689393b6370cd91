//! Requests and replies, in the machine's byte order: both ends are on one machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a guest can ask for. The first request of a connection is [`RequestKind::Become`].
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
}

/// A request: 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// A [`RequestKind`]'s number.
    pub kind: u32,
    /// Its argument; 0 where it has none.
    pub argument: u32,
}

/// A reply: 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reply {
    /// 0, or a positive errno.
    pub errno: i32,
    /// What was asked for; 0 where it is no number.
    pub value: u32,
}

const _: () = {
    assert!(size_of::<Request>() == 8 && size_of::<Reply>() == 8);
    assert!(std::mem::offset_of!(Request, argument) == 4);
    assert!(std::mem::offset_of!(Reply, value) == 4);
};

/// The most descriptors that come with a reply.
pub const MOST_DESCRIPTORS: usize = 2;
