//! The chains that a device has taken and not completed, as both ring formats count and note them.

use super::record::{Entry, Header};
use super::{QueueError, Record, RingError};

/// See the module.
#[derive(Debug)]
pub(super) struct InFlight {
    record: Record,
    size: u16,
    count: u16,
    /// Descriptors of the ring that these chains have.
    slots: u32,
    order: u32,
    /// Those of before a restart that are still to be taken again, the first one last.
    again: Vec<u16>,
    resumed: bool,
}

impl InFlight {
    /// Of a ring with `size` descriptors; none yet.
    ///
    /// # Errors
    /// The record is too small.
    pub fn new(record: Record, size: u16) -> Result<Self, QueueError> {
        if !record.fits(size) {
            return Err(QueueError::Record { size });
        }
        Ok(Self {
            record,
            size,
            count: 0,
            slots: 0,
            order: 0,
            again: Vec::new(),
            resumed: false,
        })
    }

    /// Goes on where the record says, or begins. Of a chain that was being completed, `shown` is asked by where it was to go and how many
    /// slots it took: if the driver was shown it, it says where the next one goes. Returns where the next used element goes.
    ///
    /// # Errors
    /// Those of `shown`.
    pub fn go_on(
        &mut self,
        shown: impl FnOnce(u16, u16) -> Result<Option<u16>, QueueError>,
    ) -> Result<u16, QueueError> {
        let mut used = 0;
        if let Some(header) = self.record.header() {
            self.resumed = true;
            used = header.used;
            if let Some((head, slots)) = header.completing
                && let Some(next) = shown(used, slots)?
            {
                used = next;
                self.record.set_entry(head, None);
            }
        }
        self.record.set_header(Header {
            used,
            completing: None,
        });
        let mut chains: Vec<(u16, Entry)> = (0..self.size)
            .filter_map(|head| self.record.entry(head).map(|entry| (head, entry)))
            .collect();
        // At most as many as the ring has descriptors, so their numbers lie close together, wherever
        // they start over from zero.
        let some = chains.first().map_or(0, |(_, entry)| entry.order);
        chains.sort_by_key(|(_, entry)| entry.order.wrapping_sub(some) as i32);
        self.count = chains.len() as u16;
        self.slots = chains
            .iter()
            .fold(0, |sum, (_, entry)| sum.saturating_add(entry.slots.into()));
        self.order = chains
            .last()
            .map_or(0, |(_, entry)| entry.order.wrapping_add(1));
        self.again = chains.into_iter().rev().map(|(head, _)| head).collect();
        Ok(used)
    }

    /// Those that are still to be taken again.
    pub fn again(&self) -> impl Iterator<Item = Entry> {
        self.again
            .iter()
            .filter_map(|head| self.record.entry(*head))
    }

    /// There are any.
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// The next one that was in flight before a restart.
    pub fn take_again(&mut self) -> Option<u16> {
        self.again.pop()
    }

    /// Notes a chain that is being taken; what is copied of it was noted before.
    pub fn add(&mut self, head: u16, slots: u16, copy: u16) {
        let entry = Entry {
            order: self.order,
            slots,
            copy,
        };
        self.record.set_entry(head, Some(entry));
        self.slots = self.slots.saturating_add(slots.into());
        self.order = self.order.wrapping_add(1);
        self.count = self.count.saturating_add(1);
    }

    /// What was noted of a chain.
    pub fn entry(&self, head: u16) -> Option<Entry> {
        self.record.entry(head)
    }

    /// Notes that a chain is about to be shown to the driver, where the next used element goes. Returns what was noted of it.
    ///
    /// # Errors
    /// It is not in flight.
    pub fn begin_completing(&self, head: u16, used: u16) -> Result<Entry, RingError> {
        let entry = self.entry(head).ok_or(RingError::NotInFlight { head })?;
        self.record.set_header(Header {
            used,
            completing: Some((head, entry.slots)),
        });
        Ok(entry)
    }

    /// Forgets a chain that the driver was shown; the next one goes to `used`.
    pub fn end_completing(&mut self, head: u16, entry: Entry, used: u16) {
        self.record.set_entry(head, None);
        self.record.set_header(Header {
            used,
            completing: None,
        });
        self.count = self.count.saturating_sub(1);
        self.slots = self.slots.saturating_sub(entry.slots.into());
    }

    /// The copies of descriptors.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// How many descriptors the ring has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many chains.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// How many descriptors of the ring they have.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// It goes on where another process left it.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }
}
