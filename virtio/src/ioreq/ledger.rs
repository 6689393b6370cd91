//! What the next process has to know of a server: Xen keeps a server whose process has died, but
//! does not tell which ranges it has.

use xenbus::device_model::{IoRange, IoSpace, IoreqServerId};

use crate::memory::Words;

/// Ranges that can be written down: those of 31 functions with six BARs each, before and after a
/// change.
const MOST_RANGES: usize = 512;

/// The layout's version.
const VERSION: usize = 0;
/// The server's number and 1, or 0 before there is one.
const SERVER: usize = 1;
/// Which of the two lists is valid.
const VALID: usize = 2;
const HEADER: usize = 3;
/// To be changed with the layout.
const LAYOUT: u64 = u64::from_le_bytes(*b"ioreq  2");
/// Kind of address, first, last.
const RANGE_WORDS: usize = 3;
/// How many ranges, and the ranges.
const LIST_WORDS: usize = 1 + MOST_RANGES * RANGE_WORDS;

/// Words that are no ledger of this version's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the IOREQ server was noted by another version of this program (layout {found:016x}, not {LAYOUT:016x}): run that version until the guest \
     is shut down"
)]
pub struct UnknownLayout {
    /// What stands there.
    found: u64,
}

/// A server's number and ranges, in memory that outlives the process.
///
/// A list is written beside the one that is valid, and becomes valid by one store. So whenever the
/// process is killed, one of them stands there whole.
#[derive(Debug)]
pub struct Ledger(Words);

impl Ledger {
    /// Words that a ledger takes.
    pub const WORDS: usize = HEADER + 2 * LIST_WORDS;

    /// The ledger that stands in `words`. There is none of a server where all are zero.
    ///
    /// # Errors
    /// They have another layout.
    pub fn new(words: Words) -> Result<Self, UnknownLayout> {
        match words.get(VERSION) {
            0 => {
                words.clear();
                words.set(VERSION, LAYOUT);
            }
            LAYOUT => {}
            found => return Err(UnknownLayout { found }),
        }
        Ok(Self(words))
    }

    /// The server's number.
    pub fn server(&self) -> Option<IoreqServerId> {
        let number = self.0.get(SERVER).checked_sub(1)?;
        u16::try_from(number).ok().map(IoreqServerId)
    }

    /// Writes it down.
    pub fn set_server(&self, server: Option<IoreqServerId>) {
        let number = server.map_or(0, |server| u64::from(server.0).saturating_add(1));
        self.0.set(SERVER, number);
    }

    fn list(&self, valid: bool) -> Words {
        let second = (self.0.get(VALID) == 1) == valid;
        let first_word = if second {
            HEADER.saturating_add(LIST_WORDS)
        } else {
            HEADER
        };
        self.0.part(first_word, LIST_WORDS)
    }

    /// The ranges that Xen may have for the server.
    pub fn ranges(&self) -> Vec<IoRange> {
        let list = self.list(true);
        let count = usize::try_from(list.get(0)).unwrap_or(0).min(MOST_RANGES);
        let range = |index: usize| {
            let at = index.saturating_mul(RANGE_WORDS).saturating_add(1);
            let range = list.part(at, RANGE_WORDS);
            let spaces = [IoSpace::Port, IoSpace::Memory, IoSpace::Config];
            Some(IoRange {
                space: spaces
                    .into_iter()
                    .find(|space| u64::from(*space as u32) == range.get(0))?,
                first: range.get(1),
                last: range.get(2),
            })
        };
        (0..count).filter_map(range).collect()
    }

    /// Writes them down. False: there are too many, and nothing has changed.
    #[must_use]
    pub fn set_ranges(&self, ranges: &[IoRange]) -> bool {
        if ranges.len() > MOST_RANGES {
            return false;
        }
        let list = self.list(false);
        for (index, range) in ranges.iter().enumerate() {
            let at = index.saturating_mul(RANGE_WORDS).saturating_add(1);
            let words = list.part(at, RANGE_WORDS);
            words.set(0, (range.space as u32).into());
            words.set(1, range.first);
            words.set(2, range.last);
        }
        list.set(0, ranges.len() as u64);
        self.0.set(VALID, u64::from(self.0.get(VALID) != 1));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(count: u64) -> Vec<IoRange> {
        let range = |number| IoRange {
            space: [IoSpace::Port, IoSpace::Memory, IoSpace::Config][number as usize % 3],
            first: number,
            last: u64::MAX - number,
        };
        (0..count).map(range).collect()
    }

    #[test]
    fn what_is_written_is_read_by_who_opens_it_next() {
        let words = Words::volatile(Ledger::WORDS).unwrap();
        let ledger = Ledger::new(words.clone()).unwrap();
        assert_eq!((ledger.server(), ledger.ranges()), (None, vec![]));
        for count in [3, 0, 512] {
            ledger.set_server(Some(IoreqServerId(count)));
            assert!(ledger.set_ranges(&ranges(count.into())));
            let next = Ledger::new(words.clone()).unwrap();
            assert_eq!(next.server(), Some(IoreqServerId(count)));
            assert_eq!(next.ranges(), ranges(count.into()));
        }
        assert!(!ledger.set_ranges(&ranges(513)));
        assert_eq!(ledger.ranges().len(), 512);
        ledger.set_server(None);
        assert_eq!(ledger.server(), None);
    }

    #[test]
    fn a_ledger_of_another_version_is_refused() {
        let words = Words::volatile(Ledger::WORDS).unwrap();
        words.set(0, 4);
        assert_eq!(Ledger::new(words).unwrap_err(), UnknownLayout { found: 4 });
    }

    #[test]
    fn until_the_last_store_the_old_list_is_valid() {
        let words = Words::volatile(Ledger::WORDS).unwrap();
        let ledger = Ledger::new(words.clone()).unwrap();
        assert!(ledger.set_ranges(&ranges(2)));
        let before: Vec<_> = (0..words.count()).map(|index| words.get(index)).collect();
        assert!(ledger.set_ranges(&ranges(9)));
        // As it was, with all but the last store done.
        words.set(VALID, before[VALID]);
        assert_eq!(ledger.ranges(), ranges(2));
    }
}
