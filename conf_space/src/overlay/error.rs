//! What can go wrong: when an overlay is built, and in a guest's operation.

use thiserror::Error;

use crate::access::AccessError;
use crate::address::Bdf;

/// A function that cannot be given to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BuildError {
    /// It is a bridge.
    #[error(
        "{bdf} is a bridge (header type {header_type}), which no guest can have; \
         give it the devices behind the bridge"
    )]
    Bridge {
        /// The function.
        bdf: Bdf,
        /// Layout of its header: 1 PCI-to-PCI, 2 CardBus.
        header_type: u8,
    },
    /// Its header has a layout that nobody knows.
    #[error("{bdf} has the unknown header type {header_type:#04x}; the device is broken")]
    UnknownHeader {
        /// The function.
        bdf: Bdf,
        /// The layout.
        header_type: u8,
    },
    /// It reads as all ones.
    #[error(
        "{bdf} does not answer (its header reads as all ones); \
         reset its slot, or switch the machine off and on"
    )]
    NoAnswer {
        /// The function.
        bdf: Bdf,
    },
    /// Its configuration space cannot be accessed.
    #[error("cannot set up the configuration space of {bdf}")]
    Access {
        /// The function.
        bdf: Bdf,
        /// Why.
        #[source]
        source: AccessError,
    },
}

/// Why a guest's operation fails. [`OpError::code`] is what the guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpError {
    /// The device is gone.
    #[error("the device is gone")]
    DeviceNotFound,
    /// Offset or size are not those of an access to this function.
    #[error("no aligned access of 1, 2 or 4 bytes within the configuration space")]
    InvalidOffset,
    /// The guest may not do this.
    #[error("the guest may not write this value")]
    AccessDenied,
    /// The hardware access failed.
    #[error("the hardware access failed with errno {errno}")]
    Failed {
        /// The positive errno.
        errno: i32,
    },
}

impl OpError {
    /// The number in `op.err` of the shared page (Xen `io/pciif.h`, `XEN_PCI_ERR_*`).
    pub const fn code(self) -> i32 {
        match self {
            Self::DeviceNotFound => -1,
            Self::InvalidOffset => -2,
            Self::AccessDenied => -3,
            Self::Failed { .. } => -5,
        }
    }
}

impl From<AccessError> for OpError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Gone => Self::DeviceNotFound,
            AccessError::Denied => Self::AccessDenied,
            AccessError::Failed { errno } => Self::Failed { errno },
        }
    }
}
