//! The packed ring (virtio 1.3, section 2.8): driver and device write to the same descriptors, and each
//! tells by a bit that it inverts with every round what is new.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use super::chain::{Descriptor, Flags, Format};
use super::config::DESCRIPTOR;
use super::in_flight::InFlight;
use super::record::Copied;
use super::{Chain, QueueConfig, QueueError, Record, RingError};
use crate::features::Features;
use crate::memory::{MemoryError, View};

/// Where the flags of a descriptor are.
const FLAGS_OFFSET: u64 = 14;
/// Where the buffer's number is; the length is the four bytes before it.
const LENGTH_OFFSET: u64 = 8;

/// An event suppression structure: a descriptor event (offset in bits 0-14, wrap counter in bit 15), and
/// flags (section 2.8.10).
const EVENT_FLAGS_OFFSET: u64 = 2;
/// Events for every descriptor.
const EVENT_ENABLE: u16 = 0;
/// No events.
const EVENT_DISABLE: u16 = 1;
/// An event for one descriptor.
const EVENT_DESCRIPTOR: u16 = 2;
const EVENT_FLAGS: u16 = 3;
const EVENT_WRAP: u16 = 1 << 15;

/// A place in the ring, counted over two rounds: the wrap counter is 1 in the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Position {
    place: u16,
    size: u16,
}

impl Position {
    fn new(place: u16, size: u16) -> Self {
        Self { place: 0, size }.after(place.into())
    }

    fn index(self) -> u16 {
        self.place.checked_rem(self.size).unwrap_or(0)
    }

    fn wrap(self) -> bool {
        self.place < self.size
    }

    /// `slots` further on, fewer than two rounds.
    fn after(self, slots: u32) -> Self {
        let rounds = u32::from(self.size).saturating_mul(2);
        let place = u32::from(self.place).saturating_add(slots);
        Self {
            place: place.checked_rem(rounds).unwrap_or(0) as u16,
            size: self.size,
        }
    }

    /// How many slots `self` is after `other`.
    fn since(self, other: Self) -> u32 {
        let rounds = u32::from(self.size).saturating_mul(2);
        u32::from(self.place)
            .saturating_add(rounds)
            .saturating_sub(other.place.into())
            .checked_rem(rounds)
            .unwrap_or(0)
    }

    /// As in an event suppression structure.
    fn event(self) -> u16 {
        self.index() | if self.wrap() { EVENT_WRAP } else { 0 }
    }

    fn of_event(event: u16, size: u16) -> Option<Self> {
        let index = event & !EVENT_WRAP;
        let first = if event & EVENT_WRAP != 0 { 0 } else { size };
        (index < size).then(|| Self::new(first, size).after(index.into()))
    }
}

/// A packed ring in use.
#[derive(Debug)]
pub struct PackedQueue {
    ring: u64,
    driver: u64,
    device: u64,
    features: Features,
    in_flight: InFlight,
    /// Where the next available descriptor is expected.
    available: Position,
    /// Where the next used descriptor goes.
    used: Position,
    /// Slots used since the driver was last asked whether it wants an interrupt.
    unannounced: u32,
    /// Copies that no chain in flight uses.
    free: Vec<u16>,
    /// The descriptors of the chain being taken.
    taken: Vec<Descriptor>,
}

impl PackedQueue {
    pub(super) fn new(
        config: &QueueConfig,
        view: &View,
        features: Features,
        record: Record,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        let start = Position::new(0, size);
        let mut queue = Self {
            ring: config.descriptors,
            driver: config.driver,
            device: config.device,
            features,
            in_flight: InFlight::new(record, size)?,
            available: start,
            used: start,
            unannounced: 0,
            free: Vec::new(),
            taken: Vec::new(),
        };
        queue.go_on(view)?;
        Ok(queue)
    }

    /// Goes on where the record says, or begins.
    fn go_on(&mut self, view: &View) -> Result<(), QueueError> {
        let size = self.in_flight.size();
        let broken = || QueueError::Record { size };
        let ring = self.ring;
        let used = self.in_flight.go_on(|used, slots| {
            // Its slots were available with this wrap counter, so both bits equal to it mean that it
            // was used since.
            let used = Position::new(used, size);
            let flags = flags(view, ring, used).map_err(|_| broken())?;
            let both = [Flags::AVAIL, Flags::USED];
            let shown = both.iter().all(|bit| flags.contains(*bit) == used.wrap());
            Ok(shown.then(|| used.after(slots.into()).place))
        })?;
        self.used = Position::new(used, size);
        let mut copies = vec![false; size.into()];
        for entry in self.in_flight.again() {
            let mut copy = Some(entry.copy);
            for _ in 0..entry.slots {
                let used = copy.and_then(|copy| copies.get_mut(usize::from(copy)));
                // A copy that does not exist, or that two chains have: not ours.
                let used = used.filter(|used| !**used).ok_or(broken())?;
                *used = true;
                copy = copy.and_then(|copy| self.in_flight.record().copied(size, copy).next);
            }
        }
        let slots = self.in_flight.slots();
        if slots > size.into() {
            return Err(broken());
        }
        self.available = self.used.after(slots);
        self.free = (0..size)
            .rev()
            .zip(copies.iter().rev())
            .filter_map(|(copy, used)| (!used).then_some(copy))
            .collect();
        Ok(())
    }

    pub(super) fn pop(&mut self, view: &Arc<View>, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(head) = self.in_flight.take_again() {
            self.pop_copied(view, head, chain)?;
            return Ok(true);
        }
        if !self.is_available(view, self.available)? {
            return Ok(false);
        }
        let size = self.in_flight.size();
        chain.restart(view);
        self.taken.clear();
        let mut at = self.available;
        let (head, slots) = loop {
            // All of the ring's descriptors can be in flight at once, and no more.
            if self.taken.len() >= self.free.len() {
                return Err(RingError::ChainTooLong { limit: size.into() });
            }
            let descriptor = Descriptor::read(view, self.ring, at.index().into(), Format::Packed)?;
            chain.add(view, &descriptor, Format::Packed, size, self.features)?;
            self.taken.push(descriptor);
            at = at.after(1);
            if !descriptor.flags().contains(Flags::NEXT) {
                break (descriptor.next, self.taken.len() as u16);
            }
        };
        if head >= size {
            return Err(RingError::NoSuchDescriptor {
                index: head,
                count: size.into(),
            });
        }
        if self.in_flight.entry(head).is_some() {
            return Err(RingError::AlreadyInFlight { head });
        }
        chain.set_head(head);
        self.note(head, slots);
        self.available = at;
        Ok(true)
    }

    /// Notes the chain in `taken`: copies first, and last that they mean something.
    fn note(&mut self, head: u16, slots: u16) {
        let (record, size) = (self.in_flight.record(), self.in_flight.size());
        let mut next = None;
        for descriptor in self.taken.iter().rev() {
            // There are as many free copies as free slots, which `pop` has made sure of.
            let Some(copy) = self.free.pop() else { break };
            let copied = Copied {
                descriptor: *descriptor,
                next,
            };
            record.set_copied(size, copy, copied);
            next = Some(copy);
        }
        self.in_flight.add(head, slots, next.unwrap_or(0));
    }

    fn pop_copied(
        &mut self,
        view: &Arc<View>,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let (record, size) = (self.in_flight.record(), self.in_flight.size());
        chain.restart(view);
        chain.set_head(head);
        let entry = record.entry(head);
        let mut copy = entry.map(|entry| entry.copy);
        for _ in 0..entry.map_or(0, |entry| entry.slots) {
            let Some(index) = copy else { break };
            let copied = record.copied(size, index);
            let descriptor = &copied.descriptor;
            chain.add(view, descriptor, Format::Packed, size, self.features)?;
            copy = copied.next;
        }
        Ok(())
    }

    pub(super) fn complete(
        &mut self,
        view: &View,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        let entry = self.in_flight.begin_completing(head, self.used.place)?;
        let at = descriptor(self.ring, self.used)?;
        let [l0, l1, l2, l3] = written.to_le_bytes();
        let [h0, h1] = head.to_le_bytes();
        let address = at.saturating_add(LENGTH_OFFSET);
        view.write_slice(&[l0, l1, l2, l3, h0, h1], GuestAddress(address))
            .map_err(|_| MemoryError::NotThere { address })?;
        let mut flags = Flags::empty();
        flags.set(Flags::AVAIL | Flags::USED, self.used.wrap());
        // The length means something only with this flag (section 2.8.1).
        flags.set(Flags::WRITE, written > 0);
        let address = at.saturating_add(FLAGS_OFFSET);
        store(view, address, flags.bits(), Ordering::Release)?;
        let (record, size) = (self.in_flight.record(), self.in_flight.size());
        let mut copy = Some(entry.copy);
        for _ in 0..entry.slots {
            let Some(index) = copy else { break };
            self.free.push(index);
            copy = record.copied(size, index).next;
        }
        self.used = self.used.after(entry.slots.into());
        self.in_flight.end_completing(head, entry, self.used.place);
        self.unannounced = self.unannounced.saturating_add(entry.slots.into());
        Ok(())
    }

    pub(super) fn should_notify(&mut self, view: &View) -> Result<bool, RingError> {
        let unannounced = std::mem::take(&mut self.unannounced);
        // The driver sees what was completed before its wish is looked at.
        fence(Ordering::SeqCst);
        let flags = load(view, self.driver.saturating_add(EVENT_FLAGS_OFFSET))?;
        Ok(match flags & EVENT_FLAGS {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.features.contains(Features::EVENT_IDX) => {
                let event = load(view, self.driver)?;
                match Position::of_event(event, self.in_flight.size()) {
                    // It is one of the last `unannounced` slots before `used`.
                    Some(event) => self.used.since(event.after(1)) < unannounced,
                    None => true,
                }
            }
            _ => true,
        })
    }

    pub(super) fn disable_notify(&mut self, view: &View) -> Result<(), RingError> {
        let at = self.device.saturating_add(EVENT_FLAGS_OFFSET);
        store(view, at, EVENT_DISABLE, Ordering::Relaxed)
    }

    pub(super) fn enable_notify(&mut self, view: &View) -> Result<bool, RingError> {
        let flags = if self.features.contains(Features::EVENT_IDX) {
            store(view, self.device, self.available.event(), Ordering::Relaxed)?;
            EVENT_DESCRIPTOR
        } else {
            EVENT_ENABLE
        };
        let at = self.device.saturating_add(EVENT_FLAGS_OFFSET);
        store(view, at, flags, Ordering::Release)?;
        // The driver either sees this, or we see what it made available before.
        fence(Ordering::SeqCst);
        self.has_next(view)
    }

    pub(super) fn has_next(&self, view: &View) -> Result<bool, RingError> {
        Ok(self.in_flight.has_again() || self.is_available(view, self.available)?)
    }

    pub(super) fn chains(&self) -> &InFlight {
        &self.in_flight
    }

    fn is_available(&self, view: &View, at: Position) -> Result<bool, RingError> {
        let flags = flags(view, self.ring, at)?;
        Ok(flags.contains(Flags::AVAIL) == at.wrap() && flags.contains(Flags::USED) != at.wrap())
    }
}

/// The flags of a descriptor of the ring at `ring`.
fn flags(view: &View, ring: u64, at: Position) -> Result<Flags, RingError> {
    let address = descriptor(ring, at)?.saturating_add(FLAGS_OFFSET);
    load(view, address).map(Flags::from_bits_retain)
}

fn descriptor(ring: u64, at: Position) -> Result<u64, RingError> {
    let offset = u64::from(at.index()).saturating_mul(DESCRIPTOR);
    let address = ring.checked_add(offset);
    Ok(address.ok_or(MemoryError::BeyondEnd { address: ring })?)
}

fn load(view: &View, address: u64) -> Result<u16, RingError> {
    let value: Result<u16, _> = view.load(GuestAddress(address), Ordering::Acquire);
    Ok(u16::from_le(
        value.map_err(|_| MemoryError::NotThere { address })?,
    ))
}

fn store(view: &View, address: u64, value: u16, order: Ordering) -> Result<(), RingError> {
    view.store(value.to_le(), GuestAddress(address), order)
        .map_err(|_| MemoryError::NotThere { address })?;
    Ok(())
}
