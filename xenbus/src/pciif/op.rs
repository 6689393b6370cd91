//! The operation slot: what a frontend asks for.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::MAX_VECTORS;

/// An MSI-X table entry and the PIRQ that it was mapped to (`struct xen_msix_entry`).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MsixEntry {
    /// The PIRQ, written by the backend.
    pub vector: u16,
    /// The entry in the device's table, written by the frontend.
    pub entry: u16,
}

/// An operation (`struct xen_pci_op`). What a frontend put into it is to be distrusted, field by
/// field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PciOp {
    /// A [`Command`]'s number.
    pub cmd: u32,
    /// Result: a [`PciError`].
    pub err: i32,
    /// The function's virtual address: PCI segment,
    pub domain: u32,
    /// bus,
    pub bus: u32,
    /// device in bits 7:3 and function in bits 2:0.
    pub devfn: u32,
    /// Offset in configuration space, in bytes. Signed on the wire.
    pub offset: i32,
    /// Width of a configuration access: 1, 2 or 4 bytes.
    pub size: i32,
    /// In: the value to write, or the number of MSI-X entries. Out: the value read, or the first
    /// PIRQ; from a refused [`Command::EnableMultiMsi`], a number of vectors that may be had.
    pub value: u32,
    /// In: the number of MSI vectors, for [`Command::EnableMultiMsi`].
    pub info: u32,
    /// For [`Command::EnableMsix`].
    pub msix_entries: [MsixEntry; MAX_VECTORS],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<MsixEntry>() == 4 && align_of::<MsixEntry>() == 2);
    assert!(offset_of!(MsixEntry, vector) == 0);
    assert!(offset_of!(MsixEntry, entry) == 2);
    assert!(size_of::<PciOp>() == 548 && align_of::<PciOp>() == 4);
    // From the page's beginning, where the flags come first, each is 4 more.
    assert!(offset_of!(PciOp, cmd) == 0);
    assert!(offset_of!(PciOp, err) == 4);
    assert!(offset_of!(PciOp, domain) == 8);
    assert!(offset_of!(PciOp, bus) == 12);
    assert!(offset_of!(PciOp, devfn) == 16);
    assert!(offset_of!(PciOp, offset) == 20);
    assert!(offset_of!(PciOp, size) == 24);
    assert!(offset_of!(PciOp, value) == 28);
    assert!(offset_of!(PciOp, info) == 32);
    assert!(offset_of!(PciOp, msix_entries) == 36);
};

impl Default for PciOp {
    fn default() -> Self {
        Self::new_zeroed()
    }
}

impl PciOp {
    /// The operation's command, if it is one.
    pub fn command(&self) -> Option<Command> {
        Command::from_number(self.cmd)
    }
}

/// What a frontend can ask for (`XEN_PCI_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Command {
    /// Read `size` bytes of configuration space at `offset` into `value`.
    ConfRead = 0,
    /// Write `size` bytes of `value` to configuration space at `offset`.
    ConfWrite = 1,
    /// Enable MSI with one vector; its PIRQ comes back in `value`.
    EnableMsi = 2,
    /// Disable MSI.
    DisableMsi = 3,
    /// Enable MSI-X with the `value` entries of `msix_entries`; each one's PIRQ comes back in its
    /// `vector`.
    EnableMsix = 4,
    /// Disable MSI-X.
    DisableMsix = 5,
    /// Enable MSI with `info` vectors; the first PIRQ comes back in `value`. In Xen's header, not
    /// in Linux's.
    EnableMultiMsi = 10,
}

impl Command {
    /// The command of that number. Numbers 6 to 9 belong to the other slot: see
    /// [`super::AerCommand`].
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::ConfRead),
            1 => Some(Self::ConfWrite),
            2 => Some(Self::EnableMsi),
            3 => Some(Self::DisableMsi),
            4 => Some(Self::EnableMsix),
            5 => Some(Self::DisableMsix),
            10 => Some(Self::EnableMultiMsi),
            _ => None,
        }
    }

    /// Its name in the header, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConfRead => "conf_read",
            Self::ConfWrite => "conf_write",
            Self::EnableMsi => "enable_msi",
            Self::DisableMsi => "disable_msi",
            Self::EnableMsix => "enable_msix",
            Self::DisableMsix => "disable_msix",
            Self::EnableMultiMsi => "enable_multi_msi",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operation's result (`XEN_PCI_ERR_*`), or a negative errno where frontends expect one: from
/// enabling MSI and MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PciError(pub i32);

impl PciError {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// No such function.
    pub const DEV_NOT_FOUND: Self = Self(-1);
    /// Offset or size outside configuration space, or not aligned.
    pub const INVALID_OFFSET: Self = Self(-2);
    /// Not allowed.
    pub const ACCESS_DENIED: Self = Self(-3);
    /// No such command.
    pub const NOT_IMPLEMENTED: Self = Self(-4);
    /// Failed for any other reason.
    pub const OP_FAILED: Self = Self(-5);

    /// The error for a positive errno. Those from 1 to 5 would read as one of the names above, so
    /// they become [`PciError::OP_FAILED`], as does what is no errno.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            6..=4095 => Self(errno.wrapping_neg()),
            _ => Self::OP_FAILED,
        }
    }
}

impl fmt::Display for PciError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("success"),
            Self::DEV_NOT_FOUND => f.write_str("dev_not_found"),
            Self::INVALID_OFFSET => f.write_str("invalid_offset"),
            Self::ACCESS_DENIED => f.write_str("access_denied"),
            Self::NOT_IMPLEMENTED => f.write_str("not_implemented"),
            Self::OP_FAILED => f.write_str("op_failed"),
            Self(other) => write!(f, "error {other}"),
        }
    }
}
