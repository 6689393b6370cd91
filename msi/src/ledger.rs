//! What is written down of a device's interrupts: a few words that outlive the daemon.
//!
//! Word 0 is the state, words 1 to 128 are the vectors. Each step changes one word, in an order
//! that leaves something to go on from if the daemon is killed between any two:
//!
//! | step | state | vectors |
//! |---|---|---|
//! | before anything is mapped | *mapping* | all zero |
//! | after each map | *mapping* | one more |
//! | after the enable bit is set | *enabled* | |
//! | before the enable bit is cleared | *undoing* | |
//! | after each unmap | *undoing* | one less |
//! | at the end | nothing | all zero |
//!
//! So at most one mapping is not in the vectors, and only in the state *mapping*: the one whose
//! answer the daemon did not live to write down.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use xenbus::Pirq;
use xenbus::pciif::MAX_VECTORS;

/// A few words that outlive the daemon, zero to begin with. A store is visible to a later daemon
/// once it returns, in the order of the stores.
pub trait Ledger {
    /// Reads a word, below [`WORDS`].
    fn load(&self, word: usize) -> u32;

    /// Writes a word, below [`WORDS`].
    fn store(&self, word: usize, value: u32);
}

/// How many words a ledger needs.
pub const WORDS: usize = 1 + MAX_VECTORS;

/// Words in memory, such as a mapped file.
impl<const N: usize> Ledger for [AtomicU32; N] {
    fn load(&self, word: usize) -> u32 {
        const { assert!(N >= WORDS, "a ledger needs more words") };
        self.get(word)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, word: usize, value: u32) {
        if let Some(word) = self.get(word) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Which of the two a device uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MSI, with one vector or several.
    Msi,
    /// MSI-X.
    MsiX,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Msi => "MSI",
            Self::MsiX => "MSI-X",
        })
    }
}

/// What a device holds according to its ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which of the two.
    pub kind: Kind,
    /// Number of vectors, 1 to 128.
    pub count: u16,
    /// How far it is.
    pub phase: Phase,
    /// INTx was on before, and is to be on again afterwards.
    pub intx: bool,
}

/// How far the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// On its way to being enabled.
    Mapping,
    /// In use.
    Enabled,
    /// On its way to nothing.
    Undoing,
}

const STATE: usize = 0;
const FIRST_VECTOR: usize = 1;
const KIND: u32 = 0xf;
const KIND_MSI: u32 = 1;
const KIND_MSIX: u32 = 2;
const PHASE: u32 = 0xf0;
const PHASE_MAPPING: u32 = 0x10;
const PHASE_ENABLED: u32 = 0x20;
const PHASE_UNDOING: u32 = 0x30;
const INTX: u32 = 1 << 8;

impl Held {
    /// What the ledger says; `None` when the device holds nothing.
    pub fn read<L: Ledger + ?Sized>(ledger: &L) -> Option<Self> {
        let word = ledger.load(STATE);
        let [_, _, low, high] = word.to_le_bytes();
        Some(Self {
            kind: match word & KIND {
                KIND_MSI => Kind::Msi,
                KIND_MSIX => Kind::MsiX,
                _ => return None,
            },
            phase: match word & PHASE {
                PHASE_MAPPING => Phase::Mapping,
                PHASE_ENABLED => Phase::Enabled,
                PHASE_UNDOING => Phase::Undoing,
                _ => return None,
            },
            count: u16::from_le_bytes([low, high]),
            intx: word & INTX != 0,
        })
    }

    /// Writes the state word; nothing else.
    pub(crate) fn write<L: Ledger + ?Sized>(self, ledger: &L) {
        let kind = match self.kind {
            Kind::Msi => KIND_MSI,
            Kind::MsiX => KIND_MSIX,
        };
        let phase = match self.phase {
            Phase::Mapping => PHASE_MAPPING,
            Phase::Enabled => PHASE_ENABLED,
            Phase::Undoing => PHASE_UNDOING,
        };
        let intx = if self.intx { INTX } else { 0 };
        ledger.store(STATE, u32::from(self.count) << 16 | intx | phase | kind);
    }

    /// The PIRQs that the ledger names, whatever the phase: those of an MSI block all, though Xen
    /// takes them back by the first.
    pub fn pirqs<L: Ledger + ?Sized>(ledger: &L) -> impl Iterator<Item = Pirq> {
        let held = Self::read(ledger);
        let (slots, block) = match held {
            None => (0, 0),
            Some(Self {
                kind: Kind::Msi,
                count,
                ..
            }) => (1, count),
            Some(Self {
                kind: Kind::MsiX,
                count,
                ..
            }) => (usize::from(count), 1),
        };
        (0..slots.min(MAX_VECTORS))
            .filter_map(|slot| mapped(ledger, slot))
            .flat_map(move |first| {
                (0..u32::from(block)).map(move |next| Pirq(first.0.wrapping_add(next)))
            })
    }
}

/// Ends the state: the device holds nothing.
pub(crate) fn clear<L: Ledger + ?Sized>(ledger: &L) {
    ledger.store(STATE, 0);
}

/// The PIRQ that vector `slot` was mapped to, if it was.
pub(crate) fn mapped<L: Ledger + ?Sized>(ledger: &L, slot: usize) -> Option<Pirq> {
    let slot = slot
        .checked_add(FIRST_VECTOR)
        .filter(|word| *word < WORDS)?;
    let [low, high, _, _] = ledger.load(slot).to_le_bytes();
    let pirq = u16::from_le_bytes([low, high]);
    (pirq != 0).then(|| Pirq(u32::from(pirq)))
}

/// Writes down the PIRQ of vector `slot` and the table entry it belongs to, or that there is none.
pub(crate) fn set_mapped<L: Ledger + ?Sized>(ledger: &L, slot: usize, vector: Option<(u16, u16)>) {
    let (pirq, entry) = vector.unwrap_or_default();
    ledger.store(
        slot.saturating_add(FIRST_VECTOR),
        u32::from(entry) << 16 | u32::from(pirq),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> [AtomicU32; WORDS] {
        [const { AtomicU32::new(0) }; WORDS]
    }

    #[test]
    fn a_ledger_of_zeros_holds_nothing() {
        let ledger = ledger();
        assert_eq!(Held::read(&ledger), None);
        assert_eq!(Held::pirqs(&ledger).count(), 0);
    }

    #[test]
    fn what_was_written_is_read_again() {
        let ledger = ledger();
        for kind in [Kind::Msi, Kind::MsiX] {
            for phase in [Phase::Mapping, Phase::Enabled, Phase::Undoing] {
                for (count, intx) in [(1, true), (128, false)] {
                    let held = Held {
                        kind,
                        count,
                        phase,
                        intx,
                    };
                    held.write(&ledger);
                    assert_eq!(Held::read(&ledger), Some(held));
                }
            }
        }
    }

    #[test]
    fn an_msi_block_holds_every_pirq_from_its_first() {
        let ledger = ledger();
        set_mapped(&ledger, 0, Some((40, 0)));
        set_mapped(&ledger, 1, Some((99, 0)));
        Held {
            kind: Kind::Msi,
            count: 4,
            phase: Phase::Enabled,
            intx: false,
        }
        .write(&ledger);
        let pirqs: Vec<u32> = Held::pirqs(&ledger).map(|pirq| pirq.0).collect();
        assert_eq!(pirqs, [40, 41, 42, 43]);
    }

    #[test]
    fn msix_holds_what_has_been_mapped_so_far() {
        let ledger = ledger();
        set_mapped(&ledger, 0, Some((55, 7)));
        set_mapped(&ledger, 2, Some((53, 9)));
        Held {
            kind: Kind::MsiX,
            count: 3,
            phase: Phase::Mapping,
            intx: false,
        }
        .write(&ledger);
        let pirqs: Vec<u32> = Held::pirqs(&ledger).map(|pirq| pirq.0).collect();
        assert_eq!(pirqs, [55, 53]);
    }

    #[test]
    fn any_content_can_be_read() {
        let ledger = ledger();
        for word in &ledger {
            word.store(u32::MAX, Ordering::Relaxed);
        }
        assert_eq!(Held::read(&ledger), None);
        ledger.store(STATE, 0xffff_0012);
        assert_eq!(Held::pirqs(&ledger).count(), MAX_VECTORS);
        ledger.store(STATE, 0xffff_0011);
        assert_eq!(Held::pirqs(&ledger).count(), 0xffff);
    }
}
