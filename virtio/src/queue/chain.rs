//! A request: the buffers that a chain of descriptors leads to.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::RingError;
use super::config::DESCRIPTOR;
use crate::features::Features;
use crate::memory::{Buffer, Direction, MemoryError, Reader, View, Writer};

bitflags::bitflags! {
    /// Flags of a descriptor (virtio 1.3, sections 2.7.5 and 2.8.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct Flags: u16 {
        /// The chain goes on.
        const NEXT = 1;
        /// The device writes the buffer.
        const WRITE = 2;
        /// The buffer is a table of descriptors.
        const INDIRECT = 4;
        /// Packed: equal to the driver's wrap counter, it makes the descriptor available.
        const AVAIL = 1 << 7;
        /// Packed: equal to the device's wrap counter, it says that the descriptor is used.
        const USED = 1 << 15;
    }
}

/// A descriptor as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    /// Split: the next one's number. Packed: the number of the buffer.
    pub next: u16,
}

/// How descriptors lie in a ring or table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Split,
    Packed,
}

impl Descriptor {
    /// Reads number `index` of the table at `table`.
    pub fn read(view: &View, table: u64, index: u32, format: Format) -> Result<Self, RingError> {
        let address = table
            .checked_add(u64::from(index).saturating_mul(DESCRIPTOR))
            .ok_or(MemoryError::BeyondEnd { address: table })?;
        let mut bytes = [0; DESCRIPTOR as usize];
        if view.read_slice(&mut bytes, GuestAddress(address)).is_err() {
            return Err(MemoryError::NotThere { address }.into());
        }
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            x0,
            x1,
            y0,
            y1,
        ] = bytes;
        let (x, y) = (u16::from_le_bytes([x0, x1]), u16::from_le_bytes([y0, y1]));
        let (flags, next) = match format {
            Format::Split => (x, y),
            Format::Packed => (y, x),
        };
        Ok(Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags,
            next,
        })
    }

    pub fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.flags)
    }
}

/// A chain of descriptors, all of whose buffers are accessible. To be used again for the next one.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    buffer: Buffer,
    bytes: u64,
    writable: bool,
}

/// The most descriptors in an indirect table if the queue is smaller. The specification allows no
/// chain longer than the queue, but Linux's driver, given a small queue, makes such tables.
const INDIRECT_LIMIT: u32 = 1024;

const DESCRIPTOR_LEN: u32 = DESCRIPTOR as u32;

/// The most bytes in a chain (virtio 1.3, section 2.7.5.2).
const MAX_BYTES: u64 = 1 << 32;

impl Chain {
    /// What [`super::Queue::complete`] is to be given.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device.
    pub fn reader(&self) -> Reader<'_> {
        self.buffer.reader()
    }

    /// Where the device's answer goes.
    pub fn writer(&self) -> Writer<'_> {
        self.buffer.writer()
    }

    /// Lets go of the guest's memory.
    pub fn clear(&mut self) {
        self.buffer.clear();
    }

    pub(super) fn restart(&mut self, view: &Arc<View>) {
        self.buffer.restart(view);
        self.bytes = 0;
        self.writable = false;
    }

    pub(super) fn set_head(&mut self, head: u16) {
        self.head = head;
    }

    /// Adds what one descriptor of the ring leads to: a buffer, or the buffers of a table.
    pub(super) fn add(
        &mut self,
        view: &View,
        descriptor: &Descriptor,
        format: Format,
        size: u16,
        features: Features,
    ) -> Result<(), RingError> {
        if !descriptor.flags().contains(Flags::INDIRECT) {
            return self.add_buffer(descriptor);
        }
        // The driver must not set both; and a table ends its chain.
        if !features.contains(Features::INDIRECT_DESC) || descriptor.flags().contains(Flags::NEXT) {
            return Err(RingError::IndirectMisplaced);
        }
        let (count, rest) = (
            descriptor.len / DESCRIPTOR_LEN,
            descriptor.len % DESCRIPTOR_LEN,
        );
        if count == 0 || rest != 0 {
            return Err(RingError::IndirectLength {
                len: descriptor.len,
            });
        }
        let limit = u32::from(size).max(INDIRECT_LIMIT);
        match format {
            Format::Split => self.add_split_table(view, descriptor.address, count, limit),
            Format::Packed => self.add_packed_table(view, descriptor.address, count, limit),
        }
    }

    fn add_split_table(
        &mut self,
        view: &View,
        table: u64,
        count: u32,
        limit: u32,
    ) -> Result<(), RingError> {
        let limit = limit.min(count);
        let mut index = 0;
        for _ in 0..limit {
            let descriptor = Descriptor::read(view, table, index, Format::Split)?;
            self.add_table_entry(&descriptor)?;
            if !descriptor.flags().contains(Flags::NEXT) {
                return Ok(());
            }
            index = descriptor.next.into();
            if index >= count {
                return Err(RingError::NoSuchDescriptor {
                    index: descriptor.next,
                    count,
                });
            }
        }
        Err(RingError::ChainTooLong { limit })
    }

    /// All descriptors of the table, one after the other; NEXT means nothing (section 2.8.7).
    fn add_packed_table(
        &mut self,
        view: &View,
        table: u64,
        count: u32,
        limit: u32,
    ) -> Result<(), RingError> {
        if count > limit {
            return Err(RingError::ChainTooLong { limit });
        }
        for index in 0..count {
            let descriptor = Descriptor::read(view, table, index, Format::Packed)?;
            self.add_table_entry(&descriptor)?;
        }
        Ok(())
    }

    fn add_table_entry(&mut self, descriptor: &Descriptor) -> Result<(), RingError> {
        if descriptor.flags().contains(Flags::INDIRECT) {
            return Err(RingError::IndirectMisplaced);
        }
        self.add_buffer(descriptor)
    }

    fn add_buffer(&mut self, descriptor: &Descriptor) -> Result<(), RingError> {
        if descriptor.len == 0 {
            return Err(RingError::ZeroLength);
        }
        self.bytes = self.bytes.saturating_add(descriptor.len.into());
        if self.bytes > MAX_BYTES {
            return Err(RingError::TooManyBytes);
        }
        let direction = if descriptor.flags().contains(Flags::WRITE) {
            self.writable = true;
            Direction::Writable
        } else if self.writable {
            return Err(RingError::ReadableAfterWritable);
        } else {
            Direction::Readable
        };
        self.buffer
            .push(direction, descriptor.address, descriptor.len as usize)
            .map_err(RingError::from)
    }
}
