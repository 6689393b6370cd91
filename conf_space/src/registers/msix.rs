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

/// Bytes of an entry of the table: address, data, control (PCIe 7.7.2.6 to 7.7.2.9).
pub const ENTRY_BYTES: u16 = 16;

/// Where a structure of MSI-X is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the BAR, 0 to 5; 6 and 7 are reserved.
    pub bar: u8,
    /// Offset in bytes from the start of what the BAR decodes; a multiple of 8.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Place {
    fn new(location: u32, size: u64) -> Self {
        let [bar, ..] = (location & location::BAR).to_le_bytes();
        Self {
            bar,
            start: u64::from(location & location::OFFSET),
            size,
        }
    }
}

/// How many entries the table has, by the control word: 1 to 2048.
pub const fn vectors(control: u16) -> u16 {
    (control & control::TABLE_SIZE).saturating_add(1)
}

/// Where the table is, by the control word and [`TABLE`].
pub fn table(control: u16, location: u32) -> Place {
    let size = u64::from(vectors(control)).saturating_mul(ENTRY_BYTES.into());
    Place::new(location, size)
}

/// Where the pending bits are, by the control word and [`PENDING`]: 64 at a time (PCIe 7.7.2.10).
pub fn pending_bits(control: u16, location: u32) -> Place {
    let size = u64::from(vectors(control).div_ceil(64)).saturating_mul(8);
    Place::new(location, size)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_and_pending_bits_are_where_the_capability_says() {
        // 65 vectors.
        let place = |bar, start, size| Place { bar, start, size };
        assert_eq!(table(0x8040, 0x1003), place(3, 0x1000, 0x410));
        assert_eq!(pending_bits(0x8040, 0x2009), place(1, 0x2008, 0x10));
        assert_eq!(table(0xffff, 0).size, 0x8000);
    }
}
