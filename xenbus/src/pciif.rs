//! The page that a PCI frontend shares with its backend (Xen `io/pciif.h`).
//!
//! One page, granted by the frontend; its first 572 bytes are [`SharedPage`]. Two independent
//! slots: operations, from the frontend to the backend, and error recovery (AER), the other way. A
//! flag for each says whose turn it is; one event channel serves both. [`SharedInfo`] is the
//! backend's view, [`Frontend`] the other one.

mod aer;
mod frontend;
mod local_page;
mod op;
mod page;
mod shared_info;
#[cfg(test)]
mod tests;

pub use aer::{AerCommand, AerOp, AerResult, ChannelState};
pub use frontend::Frontend;
pub use local_page::LocalPage;
pub use op::{Command, MsixEntry, PciError, PciOp};
pub use shared_info::SharedInfo;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a frontend writes to its node `magic` (`XEN_PCI_MAGIC`).
pub const MAGIC: &str = "7";

/// The most MSI-X entries in one operation (`SH_INFO_MAX_VEC`).
pub const MAX_VECTORS: usize = 128;

bitflags::bitflags! {
    /// Whose turn it is. Each end changes its own bits only, by atomic operations.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// An operation waits for the backend (`XEN_PCIF_active`): set by the frontend, cleared by
        /// the backend.
        const OP_ACTIVE = 1 << 0;
        /// The frontend handles AER (`XEN_PCIB_AERHANDLER`).
        const AER_HANDLER = 1 << 1;
        /// An AER request waits for the frontend (`XEN_PCIB_active`): set by the backend, cleared
        /// by the frontend.
        const AER_ACTIVE = 1 << 2;
    }
}

/// The page's layout (`struct xen_pci_sharedinfo`): little-endian, no padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SharedPage {
    /// [`Flags`].
    pub flags: u32,
    /// The operation slot.
    pub op: PciOp,
    /// The error recovery slot.
    pub aer_op: AerOp,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<SharedPage>() == 572 && align_of::<SharedPage>() == 4);
    assert!(offset_of!(SharedPage, flags) == 0);
    assert!(offset_of!(SharedPage, op) == 4);
    assert!(offset_of!(SharedPage, aer_op) == 552);
};
