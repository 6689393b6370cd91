//! Register blocks that a guest accesses, as tables of named registers.
//!
//! A block's owner sees whole registers by name, never offsets: an access of any width at any
//! offset is taken apart, or put together, here. The masks of the table are the law: what is not
//! writable does not reach the owner.

use conf_space::Width;
use conf_space::registers::Register;

/// What is behind a table. `I` names its registers.
pub trait Registers<I> {
    /// The guest reads the register.
    fn read(&mut self, register: I) -> u32;

    /// The guest writes the register. Bits that are not writable are zero.
    fn write(&mut self, register: I, value: u32);

    /// What the guest's last write left in the register, to which an access to a part of it is
    /// merged. Zero where a register holds nothing. Nothing happens by it.
    fn held(&self, register: I) -> u32;
}

/// A register block: names and registers, in the order of their offsets, without overlap.
#[derive(Debug)]
pub struct Table<I: 'static> {
    registers: &'static [(I, Register)],
}

impl<I: Copy> Table<I> {
    /// A table. Evaluated in a constant, a wrong one does not compile.
    ///
    /// # Panics
    /// The registers are not in order, overlap or are not aligned.
    pub const fn new(registers: &'static [(I, Register)]) -> Self {
        let mut rest = registers;
        let mut end = 0;
        while let [(_, register), behind @ ..] = rest {
            assert!(register.offset >= end && register.width.is_aligned(register.offset));
            end = register.end();
            rest = behind;
        }
        Self { registers }
    }

    /// Length of the block in bytes, up to the end of the last register.
    pub const fn length(&self) -> u16 {
        match self.registers {
            [.., (_, last)] => last.end(),
            [] => 0,
        }
    }

    /// The guest reads. Where there is no register it reads zero.
    pub fn read(&self, owner: &mut impl Registers<I>, offset: u64, width: Width) -> u32 {
        let mut value = 0;
        for (name, register, overlap) in self.touched(offset, width) {
            value |= overlap.to_access(owner.read(name), register);
        }
        value
    }

    /// The guest writes. Where there is no register, or it cannot be written, nothing happens.
    pub fn write(&self, owner: &mut impl Registers<I>, offset: u64, width: Width, value: u32) {
        for (name, register, overlap) in self.touched(offset, width) {
            let lane = overlap.lane(register);
            if register.rw & lane == 0 {
                continue;
            }
            let mut whole = overlap.to_register(value, register);
            if lane != register.width.mask() {
                whole |= owner.held(name) & !lane;
            }
            owner.write(name, whole & register.rw);
        }
    }

    fn touched(
        &self,
        offset: u64,
        width: Width,
    ) -> impl Iterator<Item = (I, &'static Register, Overlap)> + use<I> {
        let first = self
            .registers
            .partition_point(|(_, register)| u64::from(register.end()) <= offset);
        // No register reaches beyond 16 bits.
        let start = u32::try_from(offset).unwrap_or(u32::MAX);
        let bytes = u32::from(width.bytes());
        let registers = self.registers.get(first..).unwrap_or_default();
        registers.iter().map_while(move |(name, register)| {
            let overlap = Overlap::new(start, bytes, register)?;
            Some((*name, register, overlap))
        })
    }
}

/// The bytes that an access and a register have in common.
#[derive(Debug, Clone, Copy)]
struct Overlap {
    /// Bits of the access below the common ones.
    in_access: u32,
    /// Bits of the register below the common ones.
    in_register: u32,
    /// The common ones, shifted down.
    mask: u32,
}

impl Overlap {
    fn new(start: u32, bytes: u32, register: &Register) -> Option<Self> {
        let register_start = u32::from(register.offset);
        let register_end = register_start.saturating_add(register.width.bytes().into());
        let from = start.max(register_start);
        let to = start.saturating_add(bytes).min(register_end);
        let bytes = to.checked_sub(from).filter(|bytes| *bytes > 0)?;
        Some(Self {
            in_access: from.saturating_sub(start).saturating_mul(8),
            in_register: from.saturating_sub(register_start).saturating_mul(8),
            mask: u32::MAX.wrapping_shr(32u32.saturating_sub(bytes.saturating_mul(8))),
        })
    }

    /// The register's bits that the access touches.
    const fn lane(self, register: &Register) -> u32 {
        self.mask.wrapping_shl(self.in_register) & register.width.mask()
    }

    const fn to_access(self, register_value: u32, register: &Register) -> u32 {
        let value = register_value & register.width.mask();
        (value.wrapping_shr(self.in_register) & self.mask).wrapping_shl(self.in_access)
    }

    const fn to_register(self, access_value: u32, register: &Register) -> u32 {
        let value = access_value.wrapping_shr(self.in_access) & self.mask;
        value.wrapping_shl(self.in_register) & register.width.mask()
    }
}

/// The value of an access to these bytes, lowest first.
pub(crate) fn bytes_to_value(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value.wrapping_shl(8) | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use conf_space::Width::{Four, One, Two};
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Name {
        Wide,
        Word,
        Fixed,
        Low,
    }

    const TABLE: Table<Name> = Table::new(&[
        (
            Name::Wide,
            Register::new("wide", 0, Four, "").rw(0x0fff_ffff),
        ),
        (Name::Word, Register::new("word", 4, Two, "").rw(0xffff)),
        (Name::Fixed, Register::new("fixed", 6, One, "")),
        (Name::Low, Register::new("low", 8, One, "").rw(0xff)),
    ]);

    #[derive(Debug, Clone, Default, PartialEq, Eq)]
    struct Owner {
        wide: u32,
        word: u32,
        low: u32,
        reads: Vec<u8>,
        writes: usize,
    }

    impl Registers<Name> for Owner {
        fn read(&mut self, register: Name) -> u32 {
            self.reads.push(register as u8);
            if register == Name::Fixed {
                0x5a
            } else {
                self.held(register)
            }
        }

        fn write(&mut self, register: Name, value: u32) {
            self.writes += 1;
            match register {
                Name::Wide => self.wide = value,
                Name::Word => self.word = value,
                Name::Fixed => panic!("it is read-only"),
                Name::Low => self.low = value,
            }
        }

        fn held(&self, register: Name) -> u32 {
            match register {
                Name::Wide => self.wide,
                Name::Word => self.word,
                Name::Fixed => 0,
                Name::Low => self.low,
            }
        }
    }

    #[test]
    fn a_whole_register_is_one_callback() {
        let mut owner = Owner::default();
        TABLE.write(&mut owner, 4, Two, 0x1234);
        assert_eq!((owner.word, owner.writes), (0x1234, 1));
        assert_eq!(TABLE.read(&mut owner, 4, Two), 0x1234);
        assert_eq!(owner.reads, [Name::Word as u8]);
    }

    #[test]
    fn an_access_across_registers_is_put_together() {
        let mut owner = Owner::default();
        TABLE.write(&mut owner, 2, Four, 0x4433_2211);
        assert_eq!((owner.wide, owner.word), (0x0211_0000, 0x4433));
        assert_eq!(TABLE.read(&mut owner, 4, Four), 0x005a_4433);
        assert_eq!(TABLE.read(&mut owner, 7, Two), 0, "a gap reads as zero");
    }

    #[test]
    fn a_part_of_a_register_leaves_the_rest_of_it() {
        let mut owner = Owner {
            wide: 0x0102_0304,
            ..Owner::default()
        };
        TABLE.write(&mut owner, 1, One, 0xff);
        assert_eq!(owner.wide, 0x0102_ff04);
    }

    #[test]
    fn nothing_is_behind_the_end() {
        let mut owner = Owner::default();
        for offset in [9, 0xffff, u64::MAX] {
            TABLE.write(&mut owner, offset, Four, u32::MAX);
            assert_eq!(TABLE.read(&mut owner, offset, Four), 0);
        }
        assert_eq!(owner, Owner::default());
        assert_eq!(TABLE.length(), 9);
    }

    proptest! {
        #[test]
        fn an_access_in_bytes_is_the_same_as_the_whole(
            start: (u32, u32, u32), offset in 0u64..12, width in 0usize..3, value: u32,
        ) {
            let width = [One, Two, Four][width];
            let start = Owner { wide: start.0 & 0x0fff_ffff, word: start.1 & 0xffff, low: start.2 & 0xff, ..Owner::default() };
            let (mut whole, mut bytes) = (start.clone(), start);
            TABLE.write(&mut whole, offset, width, value & width.mask());
            for byte in 0..width.bytes() {
                TABLE.write(&mut bytes, offset + u64::from(byte), One, (value >> (8 * byte)) & 0xff);
            }
            prop_assert_eq!((whole.wide, whole.word, whole.low), (bytes.wide, bytes.word, bytes.low));
            let read: Vec<u8> = (0..width.bytes())
                .map(|byte| TABLE.read(&mut bytes, offset + u64::from(byte), One) as u8)
                .collect();
            prop_assert_eq!(TABLE.read(&mut whole, offset, width), bytes_to_value(&read));
        }
    }
}
