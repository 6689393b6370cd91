//! Memory that this program and a device have in common.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// See the module. Stays as long as the program runs.
pub struct Memory {
    base: NonNull<u8>,
    size: u64,
    physical: u64,
}

impl Memory {
    /// A mapping of `size` bytes at `base`, a multiple of 8, which a device finds at `physical`.
    ///
    /// # Safety
    /// It is there, writable, for as long as the program runs, and nobody makes a reference to it but an atomic's.
    pub unsafe fn new(base: NonNull<u8>, size: u64, physical: u64) -> Self {
        Self {
            base,
            size,
            physical,
        }
    }

    /// Where this program has it.
    pub fn base(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// What a device calls the byte at `offset`.
    pub fn physical(&self, offset: u64) -> u64 {
        self.physical.saturating_add(offset)
    }

    /// Where a value of `T` lies, if there is one there.
    fn place<T>(&self, offset: u64) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>() as u64)?;
        let fits = end <= self.size && offset.is_multiple_of(align_of::<T>() as u64);
        // SAFETY: it lies in the mapping, which stays, and is aligned. A device changes it at any time, which is why only atomics are asked for, all
        // of whose values are valid.
        fits.then(|| unsafe { self.base.add(offset as usize).cast::<T>().as_ref() })
    }

    pub fn get8(&self, offset: u64) -> u8 {
        let place = self.place::<AtomicU8>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set8(&self, offset: u64, value: u8) {
        if let Some(place) = self.place::<AtomicU8>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn get16(&self, offset: u64) -> u16 {
        let place = self.place::<AtomicU16>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set16(&self, offset: u64, value: u16) {
        if let Some(place) = self.place::<AtomicU16>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn get32(&self, offset: u64) -> u32 {
        let place = self.place::<AtomicU32>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set32(&self, offset: u64, value: u32) {
        if let Some(place) = self.place::<AtomicU32>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn set64(&self, offset: u64, value: u64) {
        if let Some(place) = self.place::<AtomicU64>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    /// Writes bytes.
    pub fn fill(&self, offset: u64, bytes: impl IntoIterator<Item = u8>) {
        for (place, byte) in (offset..).zip(bytes) {
            self.set8(place, byte);
        }
    }

    /// So many bytes.
    pub fn bytes(&self, offset: u64, count: u64) -> Vec<u8> {
        let places = offset..offset.saturating_add(count);
        places.map(|place| self.get8(place)).collect()
    }
}
