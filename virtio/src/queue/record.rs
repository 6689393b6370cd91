//! What a queue writes down of itself, so that whoever comes after a kill at any moment goes on
//! where it was: no chain lost, none completed twice.
//!
//! ```text
//! word 0           bits 0-15  where the next used element goes
//!                  bits 16-31 a chain being completed: its number
//!                  bit 32     there is such a chain
//!                  bits 33-48 how many slots of the ring it took
//!                  bit 63     the queue is in use; the rest means something
//! words 1 ..=n     for each chain number: 0, or in flight: bits 0-31 the order of taking, 32-47 how many slots of the
//!                  ring it took, 48-62 its first copied descriptor, bit 63 set
//! then 3 for each  copied descriptors of a packed ring, where completing one chain may overwrite
//! of n             another's: address; length and flags; 1 plus the next one's number
//! ```
//!
//! A chain is noted before it is handed out. Completing one notes it as being completed, shows it to
//! the driver, forgets it, and moves on. Who finds a chain being completed sees in the ring itself
//! whether the driver was shown it. The number of the next available chain is not noted: it is that of
//! the next used one plus what is in flight.

use std::io;

use crate::memory::Words;

use super::chain::Descriptor;

const IN_USE: u64 = 1 << 63;
const COMPLETING: u64 = 1 << 32;
const IN_FLIGHT: u64 = 1 << 63;

/// Words before the ones for each chain.
const HEADER: usize = 1;
/// Words of a copied descriptor.
const COPY: usize = 3;

/// The notes of one queue.
#[derive(Debug, Clone)]
pub struct Record {
    words: Words,
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Where the next used element goes, as the ring format counts.
    pub used: u16,
    /// The chain being completed, and how many slots it took.
    pub completing: Option<(u16, u16)>,
}

/// A chain in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Chains are taken in this order, modulo 2^32.
    pub order: u32,
    /// How many slots of the ring it took.
    pub slots: u16,
    /// Its first copied descriptor, if there are copies.
    pub copy: u16,
}

/// A copied descriptor and the one after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copied {
    pub descriptor: Descriptor,
    pub next: Option<u16>,
}

impl Record {
    /// How many words a queue of up to `max_size` descriptors needs.
    pub const fn words(max_size: u16) -> usize {
        HEADER.saturating_add((max_size as usize).saturating_mul(1 + COPY))
    }

    /// Notes in `words`, at least [`Record::words`] of them. They say that the queue is not in use if
    /// they are all zero.
    pub fn new(words: Words) -> Self {
        Self { words }
    }

    /// Notes that are gone with the process.
    ///
    /// # Errors
    /// Out of memory.
    pub fn volatile(max_size: u16) -> io::Result<Self> {
        Words::volatile(Self::words(max_size)).map(Self::new)
    }

    /// The queue is not in use any more.
    pub fn clear(&self) {
        // The header is the last that is cleared, but it alone says that the rest means something.
        self.words.set(0, 0);
        self.words.clear();
    }

    /// How many chains are noted of a queue of up to `max_size` descriptors.
    pub fn in_flight(&self, max_size: u16) -> usize {
        if self.header().is_none() {
            return 0;
        }
        let heads = 0..max_size;
        heads.filter(|head| self.entry(*head).is_some()).count()
    }

    /// There is room for a queue of `size`.
    pub(super) fn fits(&self, size: u16) -> bool {
        self.words.count() >= Self::words(size)
    }

    pub(super) fn header(&self) -> Option<Header> {
        let word = self.words.get(0);
        (word & IN_USE != 0).then_some(Header {
            used: word as u16,
            completing: (word & COMPLETING != 0)
                .then_some(((word >> 16) as u16, (word >> 33) as u16)),
        })
    }

    pub(super) fn set_header(&self, header: Header) {
        let completing = header.completing.map_or(0, |(head, slots)| {
            COMPLETING | u64::from(head) << 16 | u64::from(slots) << 33
        });
        self.words
            .set(0, IN_USE | u64::from(header.used) | completing);
    }

    pub(super) fn entry(&self, head: u16) -> Option<Entry> {
        let word = self.words.get(HEADER.saturating_add(head.into()));
        (word & IN_FLIGHT != 0).then_some(Entry {
            order: word as u32,
            slots: (word >> 32) as u16,
            copy: (word >> 48) as u16 & 0x7fff,
        })
    }

    pub(super) fn set_entry(&self, head: u16, entry: Option<Entry>) {
        let word = entry.map_or(0, |entry| {
            IN_FLIGHT
                | u64::from(entry.order)
                | u64::from(entry.slots) << 32
                | u64::from(entry.copy & 0x7fff) << 48
        });
        self.words.set(HEADER.saturating_add(head.into()), word);
    }

    pub(super) fn copied(&self, size: u16, index: u16) -> Copied {
        let words = self.copy(size, index);
        let (len_flags, next) = (words.get(1), words.get(2));
        Copied {
            descriptor: Descriptor {
                address: words.get(0),
                len: len_flags as u32,
                flags: (len_flags >> 32) as u16,
                next: 0,
            },
            next: next.checked_sub(1).map(|next| next as u16),
        }
    }

    pub(super) fn set_copied(&self, size: u16, index: u16, copied: Copied) {
        let words = self.copy(size, index);
        let descriptor = copied.descriptor;
        words.set(0, descriptor.address);
        words.set(
            1,
            u64::from(descriptor.len) | u64::from(descriptor.flags) << 32,
        );
        words.set(
            2,
            copied
                .next
                .map_or(0, |next| u64::from(next).saturating_add(1)),
        );
    }

    fn copy(&self, size: u16, index: u16) -> Words {
        let first = HEADER
            .saturating_add(size.into())
            .saturating_add(usize::from(index).saturating_mul(COPY));
        self.words.part(first, COPY)
    }
}
