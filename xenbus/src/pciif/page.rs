//! Access to a mapped page. The other end may write at any moment, so every access is atomic and
//! happens exactly once.

use std::mem::offset_of;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicI32, AtomicU16, AtomicU32};

use super::aer::AerOp;
use super::op::{Command, MsixEntry, PciOp};
use super::{Flags, MAX_VECTORS, SharedPage};
use crate::platform::PageMapping;

/// [`MsixEntry`] as it lies in the page.
#[derive(Debug)]
#[repr(C)]
struct SharedEntry {
    vector: AtomicU16,
    entry: AtomicU16,
}

/// [`PciOp`] as it lies in the page.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SharedOp {
    cmd: AtomicU32,
    pub(super) err: AtomicI32,
    domain: AtomicU32,
    bus: AtomicU32,
    devfn: AtomicU32,
    offset: AtomicI32,
    size: AtomicI32,
    pub(super) value: AtomicU32,
    info: AtomicU32,
    msix_entries: [SharedEntry; MAX_VECTORS],
}

/// [`AerOp`] as it lies in the page.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SharedAerOp {
    cmd: AtomicU32,
    pub(super) err: AtomicI32,
    domain: AtomicU32,
    bus: AtomicU32,
    devfn: AtomicU32,
}

/// [`SharedPage`] as it lies in the page.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Shared {
    flags: AtomicU32,
    pub(super) op: SharedOp,
    pub(super) aer_op: SharedAerOp,
}

const _: () = {
    assert!(size_of::<Shared>() == size_of::<SharedPage>());
    assert!(size_of::<Shared>() <= 4096 && align_of::<Shared>() <= 4096);
    assert!(offset_of!(Shared, op.err) == offset_of!(SharedPage, op.err));
    assert!(offset_of!(Shared, op.size) == offset_of!(SharedPage, op.size));
    assert!(offset_of!(Shared, op.value) == offset_of!(SharedPage, op.value));
    assert!(offset_of!(Shared, op.msix_entries) == offset_of!(SharedPage, op.msix_entries));
    assert!(offset_of!(SharedEntry, vector) == offset_of!(MsixEntry, vector));
    assert!(offset_of!(SharedEntry, entry) == offset_of!(MsixEntry, entry));
    assert!(offset_of!(Shared, aer_op) == offset_of!(SharedPage, aer_op));
    assert!(offset_of!(Shared, aer_op.devfn) == offset_of!(SharedPage, aer_op.devfn));
};

/// A page shared with the other end.
#[derive(Debug)]
pub(super) struct Page(Box<dyn PageMapping>);

impl Page {
    pub(super) fn new(mapping: Box<dyn PageMapping>) -> Self {
        Self(mapping)
    }

    pub(super) fn shared(&self) -> &Shared {
        // SAFETY: by the trait's contract 4096 bytes at `base`, aligned to 4096, are readable and
        // writable while the mapping lives, which is at least as long as `self` is borrowed.
        // `Shared` consists of atomics, for which any bytes are valid and may change under us.
        unsafe { self.0.base().cast().as_ref() }
    }

    /// The flags; what the other end wrote before it changed one is visible afterwards.
    pub(super) fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.shared().flags.load(Acquire))
    }

    /// Sets flags after everything written so far.
    pub(super) fn set(&self, flags: Flags) {
        self.shared().flags.fetch_or(flags.bits(), AcqRel);
    }

    /// Clears flags after everything written so far.
    pub(super) fn clear(&self, flags: Flags) {
        self.shared().flags.fetch_and(!flags.bits(), AcqRel);
    }

    /// Writes the word at a byte offset, whatever it belongs to. Nothing happens outside the page
    /// or where the offset is not aligned.
    pub(super) fn scribble(&self, offset: usize, word: u32) {
        if offset > 4096 - 4 || !offset.is_multiple_of(4) {
            return;
        }
        // SAFETY: as in `shared`; the offset is within the page and aligned.
        let target = unsafe { AtomicU32::from_ptr(self.0.base().as_ptr().add(offset).cast()) };
        target.store(word, Relaxed);
    }
}

impl SharedOp {
    /// Copies the operation, each field of it once; `msix_entries` only for the command that has
    /// them, and zeros otherwise.
    pub(super) fn load(&self) -> PciOp {
        let mut op = PciOp {
            cmd: self.cmd.load(Relaxed),
            err: self.err.load(Relaxed),
            domain: self.domain.load(Relaxed),
            bus: self.bus.load(Relaxed),
            devfn: self.devfn.load(Relaxed),
            offset: self.offset.load(Relaxed),
            size: self.size.load(Relaxed),
            value: self.value.load(Relaxed),
            info: self.info.load(Relaxed),
            msix_entries: [MsixEntry::default(); MAX_VECTORS],
        };
        if op.command() == Some(Command::EnableMsix) {
            for (entry, shared) in op.msix_entries.iter_mut().zip(&self.msix_entries) {
                entry.vector = shared.vector.load(Relaxed);
                entry.entry = shared.entry.load(Relaxed);
            }
        }
        op
    }

    pub(super) fn store(&self, op: &PciOp) {
        self.cmd.store(op.cmd, Relaxed);
        self.err.store(op.err, Relaxed);
        self.domain.store(op.domain, Relaxed);
        self.bus.store(op.bus, Relaxed);
        self.devfn.store(op.devfn, Relaxed);
        self.offset.store(op.offset, Relaxed);
        self.size.store(op.size, Relaxed);
        self.value.store(op.value, Relaxed);
        self.info.store(op.info, Relaxed);
        if op.command() != Some(Command::EnableMsix) {
            return;
        }
        for (entry, shared) in op.msix_entries.iter().zip(&self.msix_entries) {
            shared.vector.store(entry.vector, Relaxed);
            shared.entry.store(entry.entry, Relaxed);
        }
    }

    /// Whether what is asked for, and of whom, is what `op` says.
    pub(super) fn asks_for(&self, op: &PciOp) -> bool {
        self.cmd.load(Relaxed) == op.cmd
            && self.domain.load(Relaxed) == op.domain
            && self.bus.load(Relaxed) == op.bus
            && self.devfn.load(Relaxed) == op.devfn
            && self.offset.load(Relaxed) == op.offset
            && self.size.load(Relaxed) == op.size
            && self.value.load(Relaxed) == op.value
    }

    /// Writes the `vector` halves of the first entries and leaves the `entry` halves alone.
    pub(super) fn store_vectors(&self, vectors: &[u16]) {
        for (shared, vector) in self.msix_entries.iter().zip(vectors) {
            shared.vector.store(*vector, Relaxed);
        }
    }
}

impl SharedAerOp {
    pub(super) fn load(&self) -> AerOp {
        AerOp {
            cmd: self.cmd.load(Relaxed),
            err: self.err.load(Relaxed),
            domain: self.domain.load(Relaxed),
            bus: self.bus.load(Relaxed),
            devfn: self.devfn.load(Relaxed),
        }
    }

    pub(super) fn store(&self, op: &AerOp) {
        self.cmd.store(op.cmd, Relaxed);
        self.err.store(op.err, Relaxed);
        self.domain.store(op.domain, Relaxed);
        self.bus.store(op.bus, Relaxed);
        self.devfn.store(op.devfn, Relaxed);
    }
}
