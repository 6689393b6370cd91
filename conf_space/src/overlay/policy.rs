//! What an operator lets a guest do beyond the ordinary.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::access::Width;

/// What the operator lets a guest do beyond the ordinary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// Which writes to registers without a rule reach the device.
    pub permissive: Permissive,
    /// The guest may set the MSI, MSI-X and INTx enable bits itself; for stub domains.
    pub allow_interrupt_control: bool,
}

impl Policy {
    /// Whether a write that no rule covers reaches the device.
    pub(super) fn lets_through(&self, offset: u16, width: Width) -> bool {
        match &self.permissive {
            Permissive::No => false,
            Permissive::Yes => true,
            Permissive::Ranges(ranges) => ranges.contains(offset, width),
        }
    }
}

/// Which writes to registers without a rule reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Permissive {
    /// None.
    #[default]
    No,
    /// All, and more bits of the command register.
    Yes,
    /// Those that lie within one of these ranges with all their bytes. A write that is only partly in a range is dropped as a
    /// whole: half of a register's new value is none that its driver meant.
    Ranges(Ranges),
}

impl From<bool> for Permissive {
    fn from(all: bool) -> Self {
        if all { Self::Yes } else { Self::No }
    }
}

/// Bytes of a configuration space, from `start` up to but without `end`. Written `0x40..0x48`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Range {
    start: u16,
    end: u16,
}

/// A range that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RangeError {
    /// It has no two numbers.
    #[error(
        "expected two offsets, hexadecimal with 0x, as in 0x40..0x48: the first byte and the one behind the last"
    )]
    Form,
    /// It is empty or goes beyond the configuration space.
    #[error("a range holds at least one byte and ends at 0x1000 at the latest")]
    Bounds,
}

impl Range {
    /// The bytes from `start` up to but without `end`; at least one, and none beyond 4095.
    ///
    /// # Errors
    /// [`RangeError::Bounds`].
    pub const fn new(start: u16, end: u16) -> Result<Self, RangeError> {
        if start < end && end <= 0x1000 {
            Ok(Self { start, end })
        } else {
            Err(RangeError::Bounds)
        }
    }

    /// The first byte.
    pub const fn start(self) -> u16 {
        self.start
    }

    /// The byte behind the last one.
    pub const fn end(self) -> u16 {
        self.end
    }

    /// As a number, for a file. Never 0.
    pub const fn to_bits(self) -> u32 {
        (self.start as u32) << 16 | self.end as u32
    }

    /// From such a number; `None` when it is none.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match Self::new((bits >> 16) as u16, (bits & 0xffff) as u16) {
            Ok(range) => Some(range),
            Err(_) => None,
        }
    }

    const fn touches(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}..{:#04x}", self.start, self.end)
    }
}

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let (start, end) = text.split_once("..").ok_or(RangeError::Form)?;
        Self::new(offset(start)?, offset(end)?)
    }
}

fn offset(text: &str) -> Result<u16, RangeError> {
    let text = text.trim();
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(RangeError::Form);
    }
    u16::from_str_radix(digits, radix).map_err(|_| RangeError::Form)
}

/// Ranges in order, apart from each other: those that overlap or touch have become one. Of fixed size, without allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges {
    ranges: [Option<Range>; Self::CAPACITY],
}

/// No place for another range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "a device can have {} ranges at most that are apart from each other; join some of them",
    Ranges::CAPACITY
)]
pub struct TooManyRanges;

impl Ranges {
    /// How many ranges there can be.
    pub const CAPACITY: usize = 16;
    /// None.
    pub const EMPTY: Self = Self {
        ranges: [None; Self::CAPACITY],
    };

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range> {
        self.ranges.iter().copied().flatten()
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        matches!(self.ranges, [None, ..])
    }

    /// Adds a range.
    ///
    /// # Errors
    /// [`TooManyRanges`]; nothing has changed then.
    pub fn insert(&mut self, range: Range) -> Result<(), TooManyRanges> {
        // In order, so one pass finds all that it touches, also by those that it was joined with.
        let joined =
            self.iter()
                .filter(|other| other.touches(range))
                .fold(range, |joined, other| Range {
                    start: joined.start.min(other.start),
                    end: joined.end.max(other.end),
                });
        let before = self.iter().filter(|other| other.end < joined.start);
        let behind = self.iter().filter(|other| other.start > joined.end);
        let mut found = before.chain([joined]).chain(behind);
        let mut ranges = [None; Self::CAPACITY];
        for slot in &mut ranges {
            *slot = found.next();
        }
        let left_over = found.next();
        drop(found);
        if left_over.is_some() {
            return Err(TooManyRanges);
        }
        self.ranges = ranges;
        Ok(())
    }

    /// Whether all bytes of an access are in one of the ranges.
    pub fn contains(&self, offset: u16, width: Width) -> bool {
        let end = offset.saturating_add(width.bytes());
        self.ranges
            .iter()
            .map_while(|range| *range)
            .any(|range| range.start <= offset && end <= range.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(list: &[&str]) -> Ranges {
        let mut ranges = Ranges::EMPTY;
        for text in list {
            ranges.insert(text.parse().unwrap()).unwrap();
        }
        ranges
    }

    fn shown(ranges: &Ranges) -> Vec<String> {
        ranges.iter().map(|range| range.to_string()).collect()
    }

    #[test]
    fn a_range_is_two_offsets_and_the_second_is_not_in_it() {
        let range: Range = "0x40..0x48".parse().unwrap();
        assert_eq!((range.start(), range.end()), (0x40, 0x48));
        assert_eq!("64..72".parse(), Ok(range));
        assert_eq!("0x40 .. 0x48".parse(), Ok(range));
        assert_eq!(range.to_string(), "0x40..0x48");
        assert_eq!(Range::from_bits(range.to_bits()), Some(range));
        for (text, error) in [
            ("", RangeError::Form),
            ("0x40", RangeError::Form),
            ("40..4g", RangeError::Form),
            ("0x40..", RangeError::Form),
            ("+1..2", RangeError::Form),
            ("0x48..0x40", RangeError::Bounds),
            ("0x40..0x40", RangeError::Bounds),
            ("0..0x1001", RangeError::Bounds),
        ] {
            assert_eq!(text.parse::<Range>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn ranges_that_touch_become_one() {
        let list = ranges(&["0x48..0x4c", "0x40..0x44", "0x60..0x62", "0x44..0x48"]);
        assert_eq!(shown(&list), ["0x40..0x4c", "0x60..0x62"]);
        let list = ranges(&["0x10..0x12", "0x20..0x22", "0x30..0x32", "0x00..0x100"]);
        assert_eq!(shown(&list), ["0x00..0x100"]);
    }

    #[test]
    fn a_write_must_be_in_a_range_with_all_its_bytes() {
        let list = ranges(&["0x40..0x46"]);
        assert!(list.contains(0x40, Width::Four));
        assert!(list.contains(0x44, Width::Two));
        assert!(!list.contains(0x44, Width::Four));
        assert!(!list.contains(0x46, Width::One));
        assert!(!list.contains(0x3c, Width::Four));
    }

    #[test]
    fn a_range_too_many_changes_nothing() {
        let mut list = Ranges::EMPTY;
        for start in (0..0x80).step_by(8) {
            list.insert(Range::new(start, start + 4).unwrap()).unwrap();
        }
        let before = list;
        assert_eq!(
            list.insert(Range::new(0x100, 0x104).unwrap()),
            Err(TooManyRanges)
        );
        assert_eq!(list, before);
        // One that joins two makes room.
        list.insert(Range::new(4, 8).unwrap()).unwrap();
        list.insert(Range::new(0x100, 0x104).unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn the_set_holds_exactly_the_bytes_that_were_put_in(
            starts in prop::collection::vec((0u16..0x60, 1u16..0x10), 0..12),
        ) {
            let mut list = Ranges::EMPTY;
            let mut bytes = std::collections::BTreeSet::new();
            for (start, length) in starts {
                list.insert(Range::new(start, start + length).unwrap()).unwrap();
                bytes.extend(start..start + length);
            }
            for offset in 0..0x80 {
                prop_assert_eq!(list.contains(offset, Width::One), bytes.contains(&offset));
            }
            let all: Vec<Range> = list.iter().collect();
            prop_assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        }
    }
}
