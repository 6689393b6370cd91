//! The MSI-X capability (PCI Express Base Specification 6.0, section 7.7.2).

use super::{Block, Register, bits, capability};
use crate::access::Width::{Four, Two};

/// Message control: bits in [`control`].
pub const CONTROL: Register = Register::new("MSI-X Message Control", 0x02, Two, "PCIe 7.7.2.2")
    .rw(0xc000)
    .raz(0x3800)
    .fields(&[
        bits("Table Size", control::TABLE_SIZE),
        bits("Function Mask", control::FUNCTION_MASK),
        bits("MSI-X Enable", control::ENABLE),
    ]);
/// Where the table is: a BAR and an offset, bits in [`location`].
pub const TABLE: Register = Register::new("MSI-X Table Offset/BIR", 0x04, Four, "PCIe 7.7.2.3");
/// Where the pending bits are: a BAR and an offset, bits in [`location`].
pub const PENDING: Register = Register::new("MSI-X PBA Offset/BIR", 0x08, Four, "PCIe 7.7.2.4");

/// The capability.
pub const BLOCK: Block = Block {
    name: "MSI-X",
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CONTROL,
        &TABLE,
        &PENDING,
    ],
};

/// Bits of the control word.
pub mod control {
    /// Number of table entries, less one.
    pub const TABLE_SIZE: u16 = 0x07ff;
    /// All vectors are masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// MSI-X is on.
    pub const ENABLE: u16 = 1 << 15;
}

/// Fields of the two locations.
pub mod location {
    /// Number of the BAR, 0 to 5; 6 and 7 are reserved.
    pub const BAR: u32 = 0x7;
    /// Offset in bytes from the start of what the BAR decodes.
    pub const OFFSET: u32 = !BAR;
}
