//! The MSI capability (PCI Express Base Specification 6.0, section 7.7.1). Where its registers are
//! depends on two bits of the control word.

use super::{Block, Register, bits, capability};
use crate::access::Width::{Four, Two};

/// Message control: bits in [`control`].
pub const CONTROL: Register = Register::new("MSI Message Control", 0x02, Two, "PCIe 7.7.1.2")
    .rw(0x0471)
    .raz(0xf800)
    .fields(&[
        bits("MSI Enable", control::ENABLE),
        bits("Multiple Message Capable", control::MULTIPLE_CAPABLE),
        bits("Multiple Message Enable", control::MULTIPLE_ENABLE),
        bits("64-bit Address Capable", control::ADDRESS_64),
        bits("Per-Vector Masking Capable", control::MASKABLE),
        bits("Extended Message Data Capable", 1 << 9),
        bits("Extended Message Data Enable", 1 << 10),
    ]);
/// Message address, low half.
pub const ADDRESS: Register = Register::new("MSI Message Address", 0x04, Four, "PCIe 7.7.1.3")
    .rw(0xffff_fffc)
    .raz(0x3);
/// Message address, high half; only with 64-bit addresses.
pub const ADDRESS_HIGH: Register =
    Register::new("MSI Message Upper Address", 0x08, Four, "PCIe 7.7.1.4").rw(0xffff_ffff);
/// Message data with 32-bit addresses.
pub const DATA_32: Register =
    Register::new("MSI Message Data", 0x08, Two, "PCIe 7.7.1.5").rw(0xffff);
/// Message data with 64-bit addresses.
pub const DATA_64: Register =
    Register::new("MSI Message Data", 0x0c, Two, "PCIe 7.7.1.5").rw(0xffff);
/// Extended message data with 32-bit addresses.
pub const EXTENDED_DATA_32: Register =
    Register::new("MSI Extended Message Data", 0x0a, Two, "PCIe 7.7.1.6");
/// Extended message data with 64-bit addresses.
pub const EXTENDED_DATA_64: Register =
    Register::new("MSI Extended Message Data", 0x0e, Two, "PCIe 7.7.1.6");
/// Mask bits with 32-bit addresses.
pub const MASK_32: Register = Register::new("MSI Mask Bits", 0x0c, Four, "PCIe 7.7.1.7")
    .rw(0xffff_ffff)
    .reset(0);
/// Mask bits with 64-bit addresses.
pub const MASK_64: Register = Register::new("MSI Mask Bits", 0x10, Four, "PCIe 7.7.1.7")
    .rw(0xffff_ffff)
    .reset(0);
/// Pending bits with 32-bit addresses.
pub const PENDING_32: Register =
    Register::new("MSI Pending Bits", 0x10, Four, "PCIe 7.7.1.8").reset(0);
/// Pending bits with 64-bit addresses.
pub const PENDING_64: Register =
    Register::new("MSI Pending Bits", 0x14, Four, "PCIe 7.7.1.8").reset(0);

const NAME: &str = "MSI";
const PLAIN_32: Block = Block {
    name: NAME,
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CONTROL,
        &ADDRESS,
        &DATA_32,
        &EXTENDED_DATA_32,
    ],
};
const PLAIN_64: Block = Block {
    name: NAME,
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CONTROL,
        &ADDRESS,
        &ADDRESS_HIGH,
        &DATA_64,
        &EXTENDED_DATA_64,
    ],
};
const MASKABLE_32: Block = Block {
    name: NAME,
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CONTROL,
        &ADDRESS,
        &DATA_32,
        &EXTENDED_DATA_32,
        &MASK_32,
        &PENDING_32,
    ],
};
const MASKABLE_64: Block = Block {
    name: NAME,
    registers: &[
        &capability::ID,
        &capability::NEXT,
        &CONTROL,
        &ADDRESS,
        &ADDRESS_HIGH,
        &DATA_64,
        &EXTENDED_DATA_64,
        &MASK_64,
        &PENDING_64,
    ],
};

/// The capability, as the value of its control word says it is laid out.
pub const fn block(control: u16) -> &'static Block {
    match (
        control & control::ADDRESS_64 != 0,
        control & control::MASKABLE != 0,
    ) {
        (false, false) => &PLAIN_32,
        (true, false) => &PLAIN_64,
        (false, true) => &MASKABLE_32,
        (true, true) => &MASKABLE_64,
    }
}

/// The largest binary logarithm of a number of vectors; larger ones are reserved.
const MOST_LOG: u16 = 5;

/// How many vectors a control word lets the function use: 1 to 32; a reserved number means the most.
pub const fn used_vectors(control: u16) -> u16 {
    let field = control::MULTIPLE_ENABLE;
    let log = (control & field) >> field.trailing_zeros();
    1 << if log > MOST_LOG { MOST_LOG } else { log }
}

/// The control word with so many vectors for the function to use: 1, 2, 4, 8, 16 or 32.
pub fn with_vectors(control: u16, vectors: u16) -> u16 {
    let field = control::MULTIPLE_ENABLE;
    let log = (0..MOST_LOG).find(|log| 1 << log >= vectors);
    control & !field | log.unwrap_or(MOST_LOG) << field.trailing_zeros()
}

/// Bits of the control word.
pub mod control {
    /// MSI is on.
    pub const ENABLE: u16 = 1 << 0;
    /// Binary logarithm of the number of vectors that the function could use.
    pub const MULTIPLE_CAPABLE: u16 = 0x7 << 1;
    /// Binary logarithm of the number of vectors that it may use.
    pub const MULTIPLE_ENABLE: u16 = 0x7 << 4;
    /// Addresses have 64 bits.
    pub const ADDRESS_64: u16 = 1 << 7;
    /// Vectors can be masked one by one.
    pub const MASKABLE: u16 = 1 << 8;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_word_says_how_many_vectors_are_used() {
        for vectors in [1, 2, 4, 8, 16, 32] {
            let control = with_vectors(0x01f1, vectors);
            assert_eq!(used_vectors(control), vectors);
            assert_eq!(control | control::MULTIPLE_ENABLE, 0x01f1);
        }
        assert_eq!(with_vectors(0x0181, 8), 0x01b1);
        // Reserved.
        assert_eq!(used_vectors(0x01f1), 32);
    }
}
