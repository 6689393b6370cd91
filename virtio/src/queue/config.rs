//! What a driver sets of a queue, and the step from there to a queue that works.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::packed::PackedQueue;
use super::split::SplitQueue;
use super::{MAX_QUEUE_SIZE, Queue, Record};
use crate::features::Features;
use crate::memory::View;

/// A queue as its driver has configured it so far. Nothing of it is checked before
/// [`QueueConfig::activate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueConfig {
    max_size: u16,
    /// How many descriptors.
    pub size: u16,
    /// Guest address of the descriptor table, or of the packed ring.
    pub descriptors: u64,
    /// Guest address of the available ring, or of the driver's event suppression structure.
    pub driver: u64,
    /// Guest address of the used ring, or of the device's event suppression structure.
    pub device: u64,
    /// The driver has enabled it.
    pub ready: bool,
}

/// A queue cannot work as its driver has configured it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Zero, more than the device offers, or not a power of two in a split ring.
    #[error(
        "a queue of size {size}, where up to {max} are offered and a split ring needs a power of two"
    )]
    Size {
        /// What the driver chose.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A part of the queue is not aligned as it has to be.
    #[error("the {part} at guest address {address:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// How it has to be aligned.
        align: u64,
    },
    /// A part of the queue is not in the guest's memory.
    #[error(
        "the {part} of {len} bytes at guest address {address:#x} is not all in the guest's memory"
    )]
    NotThere {
        /// Which part.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// How long it is.
        len: usize,
    },
    /// A restart found the queue in use, and the record does not fit it.
    #[error("the record of a queue of size {size} does not fit it")]
    Record {
        /// What the driver chose.
        size: u16,
    },
}

/// Where the parts of a legacy queue lie (virtio 1.3, section 2.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LegacyLayout {
    /// The available ring.
    pub driver: u64,
    /// The used ring.
    pub device: u64,
    /// Bytes in all, from the descriptor table on.
    pub len: u64,
}

impl LegacyLayout {
    /// Of a queue with `size` descriptors at `base`, whose used ring is aligned to `align`, a power
    /// of two. Addresses beyond the end of the address space are not valid, and none that
    /// [`QueueConfig::activate`] accepts.
    pub fn new(base: u64, size: u16, align: u64) -> Self {
        let size = u64::from(size);
        let driver = base.saturating_add(size.saturating_mul(DESCRIPTOR));
        // Flags, index, the ring, and used_event, which is there whether negotiated or not.
        let end = driver.saturating_add(size.saturating_mul(2).saturating_add(6));
        let mask = align.saturating_sub(1);
        let device = end.saturating_add(mask) & !mask;
        let used = size.saturating_mul(8).saturating_add(6);
        Self {
            driver,
            device,
            len: device.saturating_sub(base).saturating_add(used),
        }
    }
}

/// Bytes of a descriptor, in both formats.
pub(super) const DESCRIPTOR: u64 = 16;

impl QueueConfig {
    /// As after a reset, for a device that offers `max_size` descriptors.
    pub fn new(max_size: u16) -> Self {
        let max_size = max_size.min(MAX_QUEUE_SIZE);
        Self {
            max_size,
            size: max_size,
            descriptors: 0,
            driver: 0,
            device: 0,
            ready: false,
        }
    }

    /// The largest size.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// As after a reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// A legacy driver puts the queue at `base`, zero taking it away. It has no other way to enable
    /// it.
    pub fn set_legacy(&mut self, base: u64, align: u64) {
        let layout = LegacyLayout::new(base, self.size, align);
        self.descriptors = base;
        self.driver = layout.driver;
        self.device = layout.device;
        self.ready = base != 0;
    }

    /// Makes a queue of it. `record` is where the queue notes what is in flight; if it says that the queue has been in use, it goes on from there.
    ///
    /// # Errors
    /// What the driver has set makes no queue.
    pub fn activate(
        &self,
        view: &Arc<View>,
        features: Features,
        record: Record,
    ) -> Result<Queue, QueueError> {
        let size = self.size;
        let packed = features.contains(Features::RING_PACKED);
        if size == 0 || size > self.max_size || !(packed || size.is_power_of_two()) {
            return Err(QueueError::Size {
                size,
                max: self.max_size,
            });
        }
        let count = usize::from(size);
        let parts = if packed {
            [
                (
                    "descriptor ring",
                    self.descriptors,
                    16,
                    count.saturating_mul(16),
                ),
                ("driver's event suppression", self.driver, 4, 4),
                ("device's event suppression", self.device, 4, 4),
            ]
        } else {
            // With the event indices, which a ring without the feature may do without: there is
            // always something on the rest of the page.
            let event = if features.contains(Features::EVENT_IDX) {
                2
            } else {
                0
            };
            let driver = count
                .saturating_mul(2)
                .saturating_add(4)
                .saturating_add(event);
            let device = count
                .saturating_mul(8)
                .saturating_add(4)
                .saturating_add(event);
            [
                (
                    "descriptor table",
                    self.descriptors,
                    16,
                    count.saturating_mul(16),
                ),
                ("available ring", self.driver, 2, driver),
                ("used ring", self.device, 4, device),
            ]
        };
        for (part, address, align, len) in parts {
            if !address.is_multiple_of(align) {
                return Err(QueueError::Alignment {
                    part,
                    address,
                    align,
                });
            }
            if !view.check_range(GuestAddress(address), len, Permissions::ReadWrite) {
                return Err(QueueError::NotThere { part, address, len });
            }
        }
        if packed {
            PackedQueue::new(self, view, features, record).map(Queue::Packed)
        } else {
            SplitQueue::new(self, view, features, record).map(Queue::Split)
        }
    }
}
