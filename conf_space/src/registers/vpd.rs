//! The vital product data capability (PCI Local Bus Specification 3.0, appendix I).

use super::{Block, Register, bits, capability};
use crate::access::Width::{Four, Two};

/// Address of the double word to read or write.
pub const ADDRESS: Register = Register::new("VPD Address", 0x02, Two, "PCI 3.0 appendix I")
    .rw(0xffff)
    .fields(&[
        bits("Address", !address::WRITE),
        bits("Write", address::WRITE),
    ]);
/// The double word.
pub const DATA: Register =
    Register::new("VPD Data", 0x04, Four, "PCI 3.0 appendix I").rw(0xffff_ffff);

/// The capability.
pub const BLOCK: Block = Block {
    name: "Vital Product Data",
    registers: &[&capability::ID, &capability::NEXT, &ADDRESS, &DATA],
};

/// Bits of the address register.
pub mod address {
    /// Written with an address: 1 starts a write to the device's memory, 0 a read. Flips when that
    /// is done.
    pub const WRITE: u16 = 1 << 15;
}
