//! A split ring (virtio 1.3, section 2.7) and disk requests (section 5.2.6) in memory that a device knows.

use std::time::{Duration, Instant};

use crate::memory::Memory;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Types of requests.
pub const IN: u32 = 0;
pub const OUT: u32 = 1;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Where what is: the ring as a legacy device wants it, the used ring on a page of its own; then each request's header and status; then data.
pub const RING: u64 = 0;
const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_1000;
/// For tables of indirect descriptors, and whatever else.
pub const SCRATCH: u64 = 0x1_2000;
pub const DATA: u64 = 0x2_0000;

/// What a request's status is until the device writes it.
const PENDING: u8 = 0xff;

const PATIENCE: Duration = Duration::from_secs(20);

/// A descriptor.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// Writes it as the one of that `index` of the table at `table`.
    pub fn put(self, memory: &Memory, table: u64, index: u16) {
        let at = table.saturating_add(u64::from(index).saturating_mul(16));
        memory.set64(at, self.address);
        memory.set32(at.saturating_add(8), self.len);
        memory.set16(at.saturating_add(12), self.flags);
        memory.set16(at.saturating_add(14), self.next);
    }
}

/// A ring with `size` descriptors, and how far it is.
pub struct Ring<'a> {
    pub memory: &'a Memory,
    size: u16,
    available: u16,
}

impl<'a> Ring<'a> {
    /// An empty one.
    pub fn new(memory: &'a Memory, size: u16) -> Self {
        for place in (RING..HEADER).step_by(8) {
            memory.set64(place, 0);
        }
        Self {
            memory,
            size,
            available: 0,
        }
    }

    /// Where the available ring is.
    pub fn driver(&self) -> u64 {
        RING.saturating_add(u64::from(self.size).saturating_mul(16))
    }

    /// Where the used ring is.
    pub fn device(&self) -> u64 {
        let end = self
            .driver()
            .saturating_add(u64::from(self.size).saturating_mul(2))
            .saturating_add(6);
        end.next_multiple_of(4096)
    }

    /// Gives the device the chain that begins with descriptor `head`. The device is yet to be notified.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available.checked_rem(self.size).unwrap_or_default();
        let at = self.driver().saturating_add(4);
        self.memory
            .set16(at.saturating_add(u64::from(slot).saturating_mul(2)), head);
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Says that so many chains were offered in all.
    pub fn set_available(&self, index: u16) {
        self.memory.set16(self.driver().saturating_add(2), index);
    }

    /// How many chains the device has given back.
    pub fn used(&self) -> u16 {
        self.memory.get16(self.device().saturating_add(2))
    }

    /// Waits until the device has given all back; false if it does not.
    pub fn wait(&self) -> bool {
        let begin = Instant::now();
        while self.used() != self.available {
            if begin.elapsed() > PATIENCE {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Puts a request into three descriptors from `head` on: for `bytes` bytes at [`DATA`].
    pub fn put_request(&self, head: u16, kind: u32, sector: u64, bytes: u32) {
        let memory = self.memory;
        memory.set32(HEADER, kind);
        memory.set32(HEADER.saturating_add(4), 0);
        memory.set64(HEADER.saturating_add(8), sector);
        memory.set8(STATUS, PENDING);
        let (second, third) = (head.wrapping_add(1), head.wrapping_add(2));
        let data = NEXT | if kind == IN { WRITE } else { 0 };
        let parts = [
            (head, HEADER, 16, NEXT, second),
            (second, DATA, bytes, data, third),
            (third, STATUS, 1, WRITE, 0),
        ];
        for (index, offset, len, flags, next) in parts {
            let address = memory.physical(offset);
            let descriptor = Descriptor {
                address,
                len,
                flags,
                next,
            };
            descriptor.put(memory, RING, index);
        }
    }

    /// What the device has made of the last request.
    pub fn status(&self) -> u8 {
        self.memory.get8(STATUS)
    }
}
