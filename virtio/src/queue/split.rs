//! The split ring (virtio 1.3, section 2.7), on `virtio-queue` for the two rings of indices. The
//! descriptors are walked here: that crate ends a chain at what is wrong with it, without a word.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue as Rings, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Descriptor, Flags, Format};
use super::in_flight::InFlight;
use super::{Chain, QueueConfig, QueueError, Record, RingError};
use crate::features::Features;
use crate::memory::{MemoryError, View};

/// The driver wants no interrupts: in the flags of the available ring (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A split ring in use.
#[derive(Debug)]
pub struct SplitQueue {
    rings: Rings,
    descriptors: u64,
    driver: u64,
    features: Features,
    in_flight: InFlight,
}

impl SplitQueue {
    pub(super) fn new(
        config: &QueueConfig,
        view: &View,
        features: Features,
        record: Record,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        let refused = |_| QueueError::Size {
            size,
            max: config.max_size(),
        };
        let mut rings = Rings::new(size).map_err(refused)?;
        let alignment = |part, address, align| {
            move |_| QueueError::Alignment {
                part,
                address,
                align,
            }
        };
        let (descriptors, driver, device) = (config.descriptors, config.driver, config.device);
        rings
            .try_set_desc_table_address(GuestAddress(descriptors))
            .map_err(alignment("descriptor table", descriptors, 16))?;
        rings
            .try_set_avail_ring_address(GuestAddress(driver))
            .map_err(alignment("available ring", driver, 2))?;
        rings
            .try_set_used_ring_address(GuestAddress(device))
            .map_err(alignment("used ring", device, 4))?;
        rings.set_event_idx(features.contains(Features::EVENT_IDX));
        rings.set_ready(true);
        let mut queue = Self {
            rings,
            descriptors,
            driver,
            features,
            in_flight: InFlight::new(record, size)?,
        };
        queue.go_on(view)?;
        Ok(queue)
    }

    /// Goes on where the record says, or begins.
    fn go_on(&mut self, view: &View) -> Result<(), QueueError> {
        let (rings, size) = (&self.rings, self.in_flight.size());
        let used = self.in_flight.go_on(|used, _| {
            let index = rings.used_idx(view, Ordering::Acquire);
            let index = index.map_err(|_| QueueError::Record { size })?.0;
            Ok((index == used.wrapping_add(1)).then_some(index))
        })?;
        self.rings.set_next_used(used);
        let next = used.wrapping_add(self.in_flight.count());
        self.rings.set_next_avail(next);
        Ok(())
    }

    pub(super) fn pop(&mut self, view: &Arc<View>, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(head) = self.in_flight.take_again() {
            self.walk(view, head, chain)?;
            return Ok(true);
        }
        let Some(head) = self.next_head(view)? else {
            return Ok(false);
        };
        if head >= self.in_flight.size() {
            return Err(self.no_such(head));
        }
        if self.in_flight.entry(head).is_some() {
            return Err(RingError::AlreadyInFlight { head });
        }
        let slots = self.walk(view, head, chain)?;
        self.in_flight.add(head, slots, 0);
        Ok(true)
    }

    fn next_head(&mut self, view: &View) -> Result<Option<u16>, RingError> {
        if !self.has_next(view)? {
            return Ok(None);
        }
        // There is one, so only an entry that cannot be read ends the iterator here.
        let head = match self.rings.iter(view) {
            Ok(mut heads) => heads.next().map(|chain| chain.head_index()),
            Err(error) => return Err(self.error(error)),
        };
        head.map(Some)
            .ok_or(RingError::Memory(MemoryError::NotThere {
                address: self.driver,
            }))
    }

    /// Returns how many descriptors of the table it has.
    fn walk(&self, view: &Arc<View>, head: u16, chain: &mut Chain) -> Result<u16, RingError> {
        chain.restart(view);
        chain.set_head(head);
        let size = self.in_flight.size();
        let mut index = head;
        for before in 0..size {
            if index >= size {
                return Err(self.no_such(index));
            }
            let descriptor = Descriptor::read(view, self.descriptors, index.into(), Format::Split)?;
            chain.add(view, &descriptor, Format::Split, size, self.features)?;
            if !descriptor.flags().contains(Flags::NEXT) {
                return Ok(before.saturating_add(1));
            }
            index = descriptor.next;
        }
        Err(RingError::ChainTooLong { limit: size.into() })
    }

    pub(super) fn complete(
        &mut self,
        view: &View,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        let used = self.rings.next_used();
        let entry = self.in_flight.begin_completing(head, used)?;
        if let Err(error) = self.rings.add_used(view, head, written) {
            return Err(self.error(error));
        }
        let used = self.rings.next_used();
        self.in_flight.end_completing(head, entry, used);
        Ok(())
    }

    pub(super) fn should_notify(&mut self, view: &View) -> Result<bool, RingError> {
        if self.features.contains(Features::EVENT_IDX) {
            let wanted = self.rings.needs_notification(view);
            return wanted.map_err(|error| self.error(error));
        }
        // The driver sees what was completed before its flag is looked at.
        fence(Ordering::SeqCst);
        let flags: u16 = view
            .load(GuestAddress(self.driver), Ordering::Relaxed)
            .map_err(|_| MemoryError::NotThere {
                address: self.driver,
            })?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    pub(super) fn disable_notify(&mut self, view: &View) -> Result<(), RingError> {
        let done = self.rings.disable_notification(view);
        done.map_err(|error| self.error(error))
    }

    pub(super) fn enable_notify(&mut self, view: &View) -> Result<bool, RingError> {
        let more = self.rings.enable_notification(view);
        more.map(|more| more || self.in_flight.has_again())
            .map_err(|error| self.error(error))
    }

    pub(super) fn has_next(&self, view: &View) -> Result<bool, RingError> {
        let index = self.rings.avail_idx(view, Ordering::Acquire);
        let index = index.map_err(|error| self.error(error))?;
        Ok(index.0 != self.rings.next_avail() || self.in_flight.has_again())
    }

    pub(super) fn chains(&self) -> &InFlight {
        &self.in_flight
    }

    fn no_such(&self, index: u16) -> RingError {
        RingError::NoSuchDescriptor {
            index,
            count: self.in_flight.size().into(),
        }
    }

    fn error(&self, error: virtio_queue::Error) -> RingError {
        match error {
            virtio_queue::Error::InvalidAvailRingIndex => RingError::TooManyAvailable {
                size: self.in_flight.size(),
            },
            // The rings are checked on activation, so only the guest's taking their memory away is left.
            _ => MemoryError::NotThere {
                address: self.driver,
            }
            .into(),
        }
    }
}
