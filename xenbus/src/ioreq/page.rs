//! Access to the page of requests. Xen writes to it at any moment, so every access is atomic and
//! happens exactly once.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use super::{Ioreq, STATE_MASK, State};
use crate::platform::PageMapping;
use crate::types::Port;

/// Slots in a page. A guest has no more CPUs.
pub const SLOTS: usize = 128;

/// [`Ioreq`] as it lies in the page.
#[derive(Debug)]
#[repr(C)]
struct Slot {
    addr: AtomicU64,
    data: AtomicU64,
    count: AtomicU32,
    size: AtomicU32,
    vp_eport: AtomicU32,
    pad: AtomicU16,
    flags: AtomicU8,
    kind: AtomicU8,
}

const _: () = {
    assert!(size_of::<Slot>() == size_of::<Ioreq>() && size_of::<[Slot; SLOTS]>() == 4096);
    assert!(offset_of!(Slot, data) == offset_of!(Ioreq, data));
    assert!(offset_of!(Slot, vp_eport) == offset_of!(Ioreq, vp_eport));
    assert!(offset_of!(Slot, flags) == offset_of!(Ioreq, flags));
};

/// The page of one server. Where a slot is asked for that a page does not have, it looks empty.
#[derive(Debug)]
pub struct IoreqPage {
    slots: NonNull<[Slot; SLOTS]>,
    /// Held, and not touched.
    _mapping: Box<dyn PageMapping>,
}

// SAFETY: the mapping can be sent, and the pointer is to memory that belongs to it.
unsafe impl Send for IoreqPage {}
// SAFETY: a shared page is used through `slots` alone, which are atomics.
unsafe impl Sync for IoreqPage {}

impl IoreqPage {
    /// Wraps a mapped page. Changes nothing in it.
    pub fn new(mapping: Box<dyn PageMapping>) -> Self {
        Self {
            slots: mapping.base().cast(),
            _mapping: mapping,
        }
    }

    fn slot(&self, slot: usize) -> Option<&Slot> {
        // SAFETY: by the trait's contract 4096 bytes at the mapping's base, aligned to 4096, are
        // readable and writable while the mapping lives, which is at least as long as `self` is
        // borrowed. A slot consists of atomics, for which any bytes are valid and may change.
        unsafe { self.slots.as_ref() }.get(slot)
    }

    /// Xen's port for a CPU. Meaningful once the server is enabled.
    pub fn port(&self, slot: usize) -> Port {
        Port(
            self.slot(slot)
                .map_or(0, |slot| slot.vp_eport.load(Acquire)),
        )
    }

    /// The state of a slot; `None` when it holds none of the known. What was written before the
    /// state is visible afterwards.
    pub fn state(&self, slot: usize) -> Option<State> {
        let flags = self.slot(slot).map_or(0, |slot| slot.flags.load(Acquire));
        State::from_flags(flags)
    }

    /// Copies a request, each field of it exactly once.
    pub fn fetch(&self, slot: usize) -> Ioreq {
        let Some(slot) = self.slot(slot) else {
            return Ioreq::default();
        };
        Ioreq {
            flags: slot.flags.load(Acquire),
            addr: slot.addr.load(Relaxed),
            data: slot.data.load(Relaxed),
            count: slot.count.load(Relaxed),
            size: slot.size.load(Relaxed),
            vp_eport: slot.vp_eport.load(Relaxed),
            pad: slot.pad.load(Relaxed),
            kind: slot.kind.load(Relaxed),
        }
    }

    /// Sets the value that the CPU reads. Takes effect with [`State::Answered`].
    pub fn set_data(&self, slot: usize, data: u64) {
        if let Some(slot) = self.slot(slot) {
            slot.data.store(data, Relaxed);
        }
    }

    /// Sets the state of a slot after everything written so far.
    pub fn set_state(&self, slot: usize, state: State) {
        if let Some(slot) = self.slot(slot) {
            // A slot is one side's at a time: whoever sets its state is the only one who writes.
            let beside = slot.flags.load(Relaxed) & !STATE_MASK;
            slot.flags.store(beside | state as u8, Release);
        }
    }

    /// Puts a request into a slot, but for its state and the port: Xen's part.
    pub fn put(&self, slot: usize, request: &Ioreq) {
        if let Some(slot) = self.slot(slot) {
            slot.addr.store(request.addr, Relaxed);
            slot.data.store(request.data, Relaxed);
            slot.count.store(request.count, Relaxed);
            slot.size.store(request.size, Relaxed);
            slot.pad.store(request.pad, Relaxed);
            slot.kind.store(request.kind, Relaxed);
            slot.flags.store(request.flags & !STATE_MASK, Relaxed);
        }
    }

    /// Tells the server its port for a CPU: Xen's part.
    pub fn set_port(&self, slot: usize, port: Port) {
        if let Some(slot) = self.slot(slot) {
            slot.vp_eport.store(port.0, Relaxed);
        }
    }
}
