//! Single registers that an operator opens to a guest, bit by bit, in the syntax of the kernel's `quirks` file.
//!
//! Of a write to such a register the bits in the mask reach the device. The others are written as they are read from it just before, since
//! hardware takes whole bytes. A bit that is cleared by writing one must not be written as read: for registers that
//! [`registers`](crate::registers) knows it is written as zero; for others the operator chooses a width that leaves it out.
//!
//! A register with a rule of its own (BARs, the command register, MSI control, ...) keeps it: no quirk changes that.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::access::Width;
use crate::address::{Bdf, ParseBdfError};

/// A register that a guest may write in some of its bits. Written `OFFSET:WIDTH:MASK`, hexadecimal, as in `c8:2:00ff`.
///
/// The kernel keeps the mask and never looks at it; here it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quirk {
    offset: u16,
    width: Width,
    mask: u32,
}

/// A text that is no quirk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QuirkError {
    /// The parts are not where they should be.
    #[error("expected OFFSET:WIDTH:MASK in hexadecimal, for example c8:2:00ff")]
    Form,
    /// The device is missing.
    #[error(
        "expected [dddd:]bb:ss.f-OFFSET:WIDTH:MASK in hexadecimal, for example 03:00.0-c8:2:00ff"
    )]
    NoDevice,
    /// The device is none.
    #[error("{0}")]
    Device(#[source] ParseBdfError),
    /// Width is none.
    #[error("the width must be 1, 2 or 4 bytes")]
    Width,
    /// Offset is beyond the space, or unaligned.
    #[error("the offset must be below 1000 and a multiple of the width")]
    Offset,
    /// The mask does not fit.
    #[error("the mask has bits beyond the register's width")]
    Mask,
}

/// A quirk that a function has no use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QuirkRefusal {
    /// Of a register with a rule, or of one that another quirk is for already, in other bounds.
    #[error("it is for {name}, which has a rule of its own that no quirk changes")]
    Ruled {
        /// The register.
        name: &'static str,
    },
    /// The function has no such register.
    #[error("the device's configuration space has only {size:#x} bytes")]
    Beyond {
        /// Its size.
        size: u16,
    },
}

impl Quirk {
    /// The register of `width` at `offset`, writable in the bits of `mask`.
    ///
    /// # Errors
    /// [`QuirkError::Offset`] when no aligned register is there, [`QuirkError::Mask`].
    pub const fn new(offset: u16, width: Width, mask: u32) -> Result<Self, QuirkError> {
        if offset >= 0x1000 || !width.is_aligned(offset) {
            return Err(QuirkError::Offset);
        }
        if mask & !width.mask() != 0 {
            return Err(QuirkError::Mask);
        }
        Ok(Self {
            offset,
            width,
            mask,
        })
    }

    /// Offset of the register.
    pub const fn offset(self) -> u16 {
        self.offset
    }

    /// Its width.
    pub const fn width(self) -> Width {
        self.width
    }

    /// The bits that the guest may write.
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// As a number, for a file. Never 0.
    pub const fn to_bits(self) -> u64 {
        (self.mask as u64) << 32 | (self.width.bytes() as u64) << 16 | self.offset as u64
    }

    /// From such a number; `None` when it is none.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        let Some(width) = Width::from_bytes((bits >> 16 & 0xffff) as u32) else {
            return None;
        };
        match Self::new((bits & 0xffff) as u16, width, (bits >> 32) as u32) {
            Ok(quirk) => Some(quirk),
            Err(_) => None,
        }
    }
}

/// As the kernel's `quirks` file shows a field.
impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08x}:{:x}:{:08x}",
            self.offset,
            self.width.bytes(),
            self.mask
        )
    }
}

impl FromStr for Quirk {
    type Err = QuirkError;

    fn from_str(text: &str) -> Result<Self, QuirkError> {
        let parts: Vec<u32> = text
            .trim()
            .split(':')
            .map(hexadecimal)
            .collect::<Option<_>>()
            .ok_or(QuirkError::Form)?;
        let [offset, width, mask] = *parts.as_slice() else {
            return Err(QuirkError::Form);
        };
        let width = Width::from_bytes(width).ok_or(QuirkError::Width)?;
        let offset = u16::try_from(offset).map_err(|_| QuirkError::Offset)?;
        Self::new(offset, width, mask)
    }
}

/// Digits only: `from_str_radix` would take a sign.
fn hexadecimal(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        u32::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

/// A device's quirk, as the kernel's `quirks` file takes it: `[dddd:]bb:ss.f-OFFSET:WIDTH:MASK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceQuirk {
    /// The device.
    pub device: Bdf,
    /// The quirk.
    pub quirk: Quirk,
}

impl FromStr for DeviceQuirk {
    type Err = QuirkError;

    fn from_str(text: &str) -> Result<Self, QuirkError> {
        let (device, quirk) = text.split_once('-').ok_or(QuirkError::NoDevice)?;
        Ok(Self {
            device: device.trim().parse().map_err(QuirkError::Device)?,
            quirk: quirk.parse()?,
        })
    }
}

/// Parses a file of quirks: one [`DeviceQuirk`] per line, empty lines, and comments from `#` to the end of a line. Each entry comes
/// with the number of its line, counted from 1; a bad one voids no other.
pub fn parse_file(text: &str) -> impl Iterator<Item = (usize, Result<DeviceQuirk, QuirkError>)> {
    (1..).zip(text.lines()).filter_map(|(number, line)| {
        let entry = line.split('#').next().unwrap_or_default().trim();
        (!entry.is_empty()).then(|| (number, entry.parse()))
    })
}

/// A device's quirks, one for each register at most. Of fixed size, without allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quirks {
    quirks: [Option<Quirk>; Self::CAPACITY],
}

/// No place for another quirk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a device can have {} quirks at most", Quirks::CAPACITY)]
pub struct TooManyQuirks;

impl Quirks {
    /// How many quirks there can be.
    pub const CAPACITY: usize = 16;
    /// None.
    pub const EMPTY: Self = Self {
        quirks: [None; Self::CAPACITY],
    };

    /// The quirks, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = Quirk> {
        self.quirks.iter().copied().flatten()
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        matches!(self.quirks, [None, ..])
    }

    /// Adds a quirk. One for the same register takes the other's place.
    ///
    /// # Errors
    /// [`TooManyQuirks`]; nothing has changed then.
    pub fn insert(&mut self, quirk: Quirk) -> Result<(), TooManyQuirks> {
        let same = |other: &Quirk| (other.offset, other.width) == (quirk.offset, quirk.width);
        let slot = self
            .quirks
            .iter_mut()
            .find(|slot| slot.as_ref().is_none_or(same));
        *slot.ok_or(TooManyQuirks)? = Some(quirk);
        Ok(())
    }
}

impl Default for Quirks {
    fn default() -> Self {
        Self::EMPTY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quirk_is_a_register_and_the_bits_of_it_that_may_be_written() {
        let quirk = Quirk::new(0xc8, Width::Two, 0xff00).unwrap();
        assert_eq!("c8:2:ff00".parse(), Ok(quirk));
        assert_eq!("0c8:2:0000FF00".parse(), Ok(quirk));
        assert_eq!(quirk.to_string(), "000000c8:2:0000ff00");
        assert_eq!(quirk.to_string().parse(), Ok(quirk));
        assert_eq!(Quirk::from_bits(quirk.to_bits()), Some(quirk));
        assert_eq!(
            "0:4:ffffffff".parse(),
            Ok(Quirk::new(0, Width::Four, u32::MAX).unwrap())
        );
    }

    #[test]
    fn what_is_wrong_with_a_quirk_is_told() {
        for (text, error) in [
            ("", QuirkError::NoDevice),
            ("00:05.0", QuirkError::NoDevice),
            (
                "00:05.*-10:1:1",
                QuirkError::Device(ParseBdfError::Function),
            ),
            ("00:05.0-10:1", QuirkError::Form),
            ("00:05.0-10:1:1:1", QuirkError::Form),
            ("00:05.0-10:1:", QuirkError::Form),
            ("00:05.0-+10:1:1", QuirkError::Form),
            ("00:05.0--10:1:1", QuirkError::Form),
            ("00:05.0-10:4:100000000", QuirkError::Form),
            ("00:05.0-1000:1:1", QuirkError::Offset),
            ("00:05.0-11:2:1", QuirkError::Offset),
            ("00:05.0-10:3:1", QuirkError::Width),
            ("00:05.0-10:0:0", QuirkError::Width),
            ("00:05.0-10:1:100", QuirkError::Mask),
            ("00:05.0-10:2:10000", QuirkError::Mask),
        ] {
            assert_eq!(text.parse::<DeviceQuirk>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn a_bad_line_of_a_file_is_told_of_and_voids_no_other() {
        let file = "# of old\n\n0000:03:00.0-c8:2:ff\n03:00.0-c8:3:ff # typo\n  4:0.1-d0:1:1\r\n";
        let found: Vec<_> = parse_file(file).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], (3, "03:00.0-c8:2:ff".parse()));
        assert_eq!(found[1], (4, Err(QuirkError::Width)));
        assert_eq!(found[2], (5, "04:00.1-d0:1:1".parse()));
    }

    #[test]
    fn of_two_quirks_for_a_register_the_later_one_holds() {
        let mut quirks = Quirks::EMPTY;
        for text in ["c8:2:ff", "ca:2:ff", "c8:2:f0", "c8:1:1"] {
            quirks.insert(text.parse().unwrap()).unwrap();
        }
        let shown: Vec<String> = quirks.iter().map(|quirk| quirk.to_string()).collect();
        let expected = [
            "000000c8:2:000000f0",
            "000000ca:2:000000ff",
            "000000c8:1:00000001",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn there_is_an_end_to_quirks() {
        let mut quirks = Quirks::EMPTY;
        for offset in 0..16 {
            quirks
                .insert(Quirk::new(offset, Width::One, 1).unwrap())
                .unwrap();
        }
        let another = Quirk::new(16, Width::One, 1).unwrap();
        assert_eq!(quirks.insert(another), Err(TooManyQuirks));
        quirks
            .insert(Quirk::new(3, Width::One, 2).unwrap())
            .unwrap();
    }
}
