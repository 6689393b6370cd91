//! What all capabilities begin with (PCI Express Base Specification 6.0, sections 7.5.1.1.11 and
//! 7.6.3).

use super::{Block, Register};
use crate::access::Width::{Four, One};

/// Which capability it is.
pub const ID: Register = Register::new("Capability ID", 0x00, One, "PCIe 7.5.1.1.11");
/// Offset of the next capability, 0 at the end.
pub const NEXT: Register = Register::new("Next Capability Pointer", 0x01, One, "PCIe 7.5.1.1.11");
/// Which extended capability it is, its version (bits 19:16), and the offset of the next (bits
/// 31:20).
pub const EXTENDED_HEADER: Register =
    Register::new("Extended Capability Header", 0x00, Four, "PCIe 7.6.3");

/// A standard capability of which only the beginning is known.
pub const STANDARD: Block = Block {
    name: "Capability",
    registers: &[&ID, &NEXT],
};
/// An extended capability of which only the beginning is known.
pub const EXTENDED: Block = Block {
    name: "Extended Capability",
    registers: &[&EXTENDED_HEADER],
};
