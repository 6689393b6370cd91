//! Register blocks as tables of named registers.
//!
//! One module per block. A table names every register, its place in the block, its width, what
//! hardware lets software do with each bit, and where that is specified. What a *guest* may do with
//! it is another matter, which [`crate::overlay`] decides.

use crate::access::Width;

pub mod capability;
pub mod error_reporting;
pub mod express;
pub mod header;
pub mod msi;
pub mod msix;
pub mod power_management;
pub mod vpd;

/// One register of a block.
///
/// Every bit is exactly one of: writable (`rw`), cleared by writing one (`rw1c`), reserved and read
/// as zero (`raz`), or else read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register {
    /// Name, as the specification has it.
    pub name: &'static str,
    /// Offset from the start of the block, in bytes; a multiple of the width.
    pub offset: u16,
    /// Width.
    pub width: Width,
    /// Value after a reset, where the specification gives one for every device.
    pub reset: Option<u32>,
    /// Bits that software may write.
    pub rw: u32,
    /// Bits that software clears by writing one.
    pub rw1c: u32,
    /// Reserved bits that read as zero.
    pub raz: u32,
    /// Where it is specified.
    pub spec: &'static str,
    /// Its fields, lowest bits first; none where the register is one number.
    pub fields: &'static [BitField],
}

/// One field of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitField {
    /// Name, as the specification has it.
    pub name: &'static str,
    /// Its bits, which lie side by side.
    pub mask: u32,
}

impl BitField {
    /// The field's value in a register that holds `register`.
    pub const fn of(&self, register: u32) -> u32 {
        (register & self.mask).wrapping_shr(self.mask.trailing_zeros())
    }
}

/// A field of these bits of a 16-bit register.
const fn bits(name: &'static str, mask: u16) -> BitField {
    BitField {
        name,
        mask: mask as u32,
    }
}

impl Register {
    /// A register whose bits are all read-only.
    pub const fn new(name: &'static str, offset: u16, width: Width, spec: &'static str) -> Self {
        Self {
            name,
            offset,
            width,
            reset: None,
            rw: 0,
            rw1c: 0,
            raz: 0,
            spec,
            fields: &[],
        }
    }

    /// With the bits that software may write.
    pub const fn rw(self, rw: u32) -> Self {
        Self { rw, ..self }
    }

    /// With the bits that software clears by writing one.
    pub const fn rw1c(self, rw1c: u32) -> Self {
        Self { rw1c, ..self }
    }

    /// With the reserved bits that read as zero.
    pub const fn raz(self, raz: u32) -> Self {
        Self { raz, ..self }
    }

    /// With the value after a reset.
    pub const fn reset(self, value: u32) -> Self {
        Self {
            reset: Some(value),
            ..self
        }
    }

    /// With its fields.
    pub const fn fields(self, fields: &'static [BitField]) -> Self {
        Self { fields, ..self }
    }

    /// The same register, counted from the start of the configuration space, in a block that starts
    /// at `base`.
    pub const fn at(self, base: u16) -> Self {
        Self {
            offset: base.saturating_add(self.offset),
            ..self
        }
    }

    /// Bits that software can only read.
    pub const fn ro(&self) -> u32 {
        self.width.mask() & !(self.rw | self.rw1c | self.raz)
    }

    /// Offset of the first byte behind the register, from the start of the block.
    pub const fn end(&self) -> u16 {
        self.offset.saturating_add(self.width.bytes())
    }
}

/// The registers of one block, in the order of their offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Name of the block.
    pub name: &'static str,
    /// Its registers.
    pub registers: &'static [&'static Register],
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: [&Block; 12] = [
        &header::TYPE_0,
        &capability::STANDARD,
        &capability::EXTENDED,
        &power_management::BLOCK,
        &vpd::BLOCK,
        msi::block(0),
        msi::block(msi::control::ADDRESS_64),
        msi::block(msi::control::MASKABLE),
        msi::block(msi::control::ADDRESS_64 | msi::control::MASKABLE),
        &msix::BLOCK,
        express::block(1),
        express::block(2),
    ];

    #[test]
    fn every_bit_of_a_register_behaves_in_exactly_one_way() {
        for register in BLOCKS.iter().flat_map(|block| block.registers) {
            let masks = [register.rw, register.rw1c, register.raz, register.ro()];
            assert_eq!(
                masks.iter().fold(0, |all, mask| all | mask),
                register.width.mask(),
                "{}",
                register.name
            );
            assert_eq!(
                masks.iter().map(|mask| mask.count_ones()).sum::<u32>(),
                register.width.mask().count_ones(),
                "{}",
                register.name
            );
        }
    }

    #[test]
    fn fields_lie_side_by_side_within_their_register_without_overlap() {
        for register in BLOCKS.iter().flat_map(|block| block.registers) {
            let mut seen = 0;
            for field in register.fields {
                let name = (register.name, field.name);
                assert_eq!(field.mask & !register.width.mask(), 0, "{name:?}");
                assert_eq!(field.mask & seen, 0, "{name:?}");
                assert!(field.mask > seen, "{name:?} is in order");
                let run = field.mask.wrapping_shr(field.mask.trailing_zeros());
                assert!((run + 1).is_power_of_two(), "{name:?}");
                seen |= field.mask;
            }
        }
    }

    #[test]
    fn registers_are_aligned_and_in_order_without_overlap() {
        for block in BLOCKS {
            for register in block.registers {
                assert_eq!(
                    register.offset % register.width.bytes(),
                    0,
                    "{}",
                    register.name
                );
            }
            for pair in block.registers.windows(2) {
                assert!(
                    pair[0].end() <= pair[1].offset,
                    "{} and {}",
                    pair[0].name,
                    pair[1].name
                );
            }
        }
    }

    #[test]
    fn reserved_bits_and_resets_agree() {
        for register in BLOCKS.iter().flat_map(|block| block.registers) {
            assert_eq!(
                register.reset.unwrap_or(0) & register.raz,
                0,
                "{}",
                register.name
            );
        }
    }
}
