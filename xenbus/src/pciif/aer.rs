//! The error recovery slot: what a backend asks a frontend's driver when the device reported
//! errors.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A recovery step (`struct xen_pcie_aer_op`).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AerOp {
    /// An [`AerCommand`]'s number.
    pub cmd: u32,
    /// To the frontend: a [`ChannelState`]. Back: an [`AerResult`].
    pub err: i32,
    /// The function's virtual address: PCI segment,
    pub domain: u32,
    /// bus,
    pub bus: u32,
    /// device in bits 7:3 and function in bits 2:0.
    pub devfn: u32,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<AerOp>() == 20 && align_of::<AerOp>() == 4);
    assert!(offset_of!(AerOp, cmd) == 0);
    assert!(offset_of!(AerOp, err) == 4);
    assert!(offset_of!(AerOp, domain) == 8);
    assert!(offset_of!(AerOp, bus) == 12);
    assert!(offset_of!(AerOp, devfn) == 16);
};

/// The steps of recovery, each a callback of the frontend's driver (`XEN_PCI_OP_aer_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum AerCommand {
    /// An error was seen.
    Detected = 6,
    /// All is well again.
    Resume = 7,
    /// The device can be accessed again.
    MmioEnabled = 8,
    /// The device was reset.
    SlotReset = 9,
}

impl AerCommand {
    /// The step of that number.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            6 => Some(Self::Detected),
            7 => Some(Self::Resume),
            8 => Some(Self::MmioEnabled),
            9 => Some(Self::SlotReset),
            _ => None,
        }
    }
}

/// The state of the way to the device (Linux `pci_channel_state_t`, part of the protocol by use).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ChannelState {
    /// Works.
    Normal = 1,
    /// Blocked: a reset is needed.
    Frozen = 2,
    /// The device is lost.
    PermanentFailure = 3,
}

/// A frontend's answer (Linux `pci_ers_result_t`, part of the protocol by use).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum AerResult {
    /// No opinion, or nobody to ask.
    None = 1,
    /// The driver can go on without a reset.
    CanRecover = 2,
    /// The driver wants the device reset.
    NeedReset = 3,
    /// The driver gives the device up.
    Disconnect = 4,
    /// The device works again.
    Recovered = 5,
    /// The driver knows nothing of AER.
    NoDriver = 6,
}

impl AerResult {
    /// Reads an answer. A number that is none of them is a frontend that cannot be trusted with the
    /// device: [`AerResult::Disconnect`].
    pub fn from_wire(number: i32) -> Self {
        match number {
            1 => Self::None,
            2 => Self::CanRecover,
            3 => Self::NeedReset,
            5 => Self::Recovered,
            6 => Self::NoDriver,
            _ => Self::Disconnect,
        }
    }
}
