//! The writes of a device's guest that did not reach the device, counted by register.

use std::sync::atomic::{AtomicU32, Ordering};

use conf_space::Width;
use conf_space::overlay::DroppedWrite;

/// How many registers are told apart. No driver writes more that it may not; a guest that does is counted, without saying where.
pub const PLACES: usize = 48;

/// Writes to one register that were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Offset of the writes.
    pub offset: u16,
    /// Their width.
    pub width: Width,
    /// How many.
    pub count: u32,
    /// What was written last.
    pub last: u32,
}

/// The same in a record. Words of zero are nothing counted.
#[repr(C)]
pub(super) struct Table {
    places: [Place; PLACES],
    elsewhere: AtomicU32,
}

#[repr(C)]
struct Place {
    /// Width << 16 | offset; 0: free.
    register: AtomicU32,
    count: AtomicU32,
    last: AtomicU32,
}

impl Table {
    /// Counts a write. For one thread, the guest's; others may look on.
    pub fn count(&self, write: DroppedWrite) {
        let register = u32::from(write.width.bytes()) << 16 | u32::from(write.offset);
        let place = self.places.iter().find(|place| {
            let found = place.register.load(Ordering::Relaxed);
            found == register || found == 0
        });
        let Some(place) = place else {
            add_one(&self.elsewhere);
            return;
        };
        place.last.store(write.value, Ordering::Relaxed);
        add_one(&place.count);
        place.register.store(register, Ordering::Release);
    }

    /// What was counted, in the order in which registers were first written, and how many writes there were to others still.
    pub fn read(&self) -> (Vec<Dropped>, u32) {
        let found = self.places.iter().map_while(|place| {
            let register = place.register.load(Ordering::Acquire);
            Some(Dropped {
                offset: (register & 0xffff) as u16,
                width: Width::from_bytes(register >> 16)?,
                count: place.count.load(Ordering::Relaxed),
                last: place.last.load(Ordering::Relaxed),
            })
        });
        (found.collect(), self.elsewhere.load(Ordering::Relaxed))
    }

    /// Forgets it all.
    pub fn clear(&self) {
        self.elsewhere.store(0, Ordering::Relaxed);
        for place in &self.places {
            place.register.store(0, Ordering::Relaxed);
            place.count.store(0, Ordering::Relaxed);
            place.last.store(0, Ordering::Relaxed);
        }
    }
}

fn add_one(count: &AtomicU32) {
    count.store(
        count.load(Ordering::Relaxed).saturating_add(1),
        Ordering::Relaxed,
    );
}
