//! Access to a mapped page, word by word. The other end may write at any moment, so every access is atomic and happens exactly once.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use zerocopy::{FromZeros, IntoBytes};

use super::aer::AerOp;
use super::op::{MsixEntry, PciOp};
use super::{Flags, SharedPage};
use crate::platform::PageMapping;

pub(super) const OP: usize = offset_of!(SharedPage, op);
pub(super) const OP_ERR: usize = offset_of!(SharedPage, op.err);
pub(super) const OP_VALUE: usize = offset_of!(SharedPage, op.value);
pub(super) const AER_OP: usize = offset_of!(SharedPage, aer_op);
pub(super) const AER_ERR: usize = offset_of!(SharedPage, aer_op.err);
const HEADER: [usize; 6] = [
    offset_of!(SharedPage, op.cmd),
    offset_of!(SharedPage, op.domain),
    offset_of!(SharedPage, op.bus),
    offset_of!(SharedPage, op.devfn),
    offset_of!(SharedPage, op.offset),
    offset_of!(SharedPage, op.size),
];
/// The first entry's `vector`, its first half.
const VECTORS: usize = offset_of!(SharedPage, op.msix_entries);

/// A page shared with the other end.
#[derive(Debug)]
pub(super) struct Page(Box<dyn PageMapping>);

impl Page {
    pub(super) fn new(mapping: Box<dyn PageMapping>) -> Self {
        Self(mapping)
    }

    /// The word at a byte offset; `None` outside the page or not aligned.
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if offset > 4096 - 4 || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: by the trait's contract 4096 bytes at `base`, aligned to 4096, are readable and writable while the mapping lives, which
        // is at least as long as `self` is borrowed; the offset is within them and aligned. All access in this process is atomic.
        Some(unsafe { AtomicU32::from_ptr(self.0.base().as_ptr().add(offset).cast()) })
    }

    pub(super) fn load(&self, offset: usize) -> u32 {
        self.word(offset).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    pub(super) fn store(&self, offset: usize, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The flags; what the other end wrote before it set or cleared one is visible afterwards.
    pub(super) fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.word(0).map_or(0, |word| word.load(Ordering::Acquire)))
    }

    /// Sets flags after everything written so far.
    pub(super) fn set(&self, flags: Flags) {
        if let Some(word) = self.word(0) {
            word.fetch_or(flags.bits(), Ordering::AcqRel);
        }
    }

    /// Clears flags after everything written so far.
    pub(super) fn clear(&self, flags: Flags) {
        if let Some(word) = self.word(0) {
            word.fetch_and(!flags.bits(), Ordering::AcqRel);
        }
    }

    /// Copies the operation, each word once.
    pub(super) fn load_op(&self) -> PciOp {
        let mut words = [0u32; size_of::<PciOp>() / 4];
        for (offset, word) in (OP..).step_by(4).zip(&mut words) {
            *word = self.load(offset);
        }
        zerocopy::transmute!(words)
    }

    /// The words that say what is asked for: command, address, offset, size.
    pub(super) fn load_header(&self) -> [u32; 6] {
        HEADER.map(|offset| self.load(offset))
    }

    pub(super) fn store_op(&self, op: &PciOp) {
        let words: [u32; size_of::<PciOp>() / 4] = zerocopy::transmute!(*op);
        for (offset, word) in (OP..).step_by(4).zip(words) {
            self.store(offset, word);
        }
    }

    pub(super) fn load_aer(&self) -> AerOp {
        let mut op = AerOp::new_zeroed();
        for (offset, bytes) in (AER_OP..).step_by(4).zip(op.as_mut_bytes().chunks_exact_mut(4)) {
            bytes.copy_from_slice(&self.load(offset).to_ne_bytes());
        }
        op
    }

    pub(super) fn store_aer(&self, op: &AerOp) {
        let words: [u32; size_of::<AerOp>() / 4] = zerocopy::transmute!(*op);
        for (offset, word) in (AER_OP..).step_by(4).zip(words) {
            self.store(offset, word);
        }
    }

    /// Writes the `vector` halves of the first entries and leaves the `entry` halves alone.
    pub(super) fn store_vectors(&self, vectors: &[u16]) {
        let offsets = (VECTORS..AER_OP).step_by(size_of::<MsixEntry>());
        for (offset, vector) in offsets.zip(vectors) {
            // SAFETY: as for `word`; the offsets are those of the `vector` fields, within the page and aligned to 2.
            let half = unsafe { AtomicU16::from_ptr(self.0.base().as_ptr().add(offset).cast()) };
            half.store(*vector, Ordering::Relaxed);
        }
    }
}
