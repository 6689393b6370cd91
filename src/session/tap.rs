//! A tap on a guest's operations, for whoever traces them. Closed, it costs the guest one load per operation; open, a copy of the operation
//! into a ring of its own. The guest never waits: a listener that is too slow misses operations, and is told how many.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use conf_space::address::Bdf;
use xenbus::pciif::{Command, PciError, PciOp};

use super::operation::{Outcome, Reply};

/// Operations that the ring holds: what a guest can do, as fast as it can, between two looks of a listener.
const SLOTS: u64 = 4096;
const WORDS: usize = 8;

/// An operation that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// When it was answered, since 1970.
    pub time: Duration,
    /// How long it took, from being found in the page.
    pub took: Duration,
    /// The command's number.
    pub number: u32,
    /// The function's address as the guest wrote it: segment, bus, device and function.
    pub address: [u32; 3],
    /// Offset in configuration space, as the guest wrote it.
    pub offset: i32,
    /// Width in bytes, as the guest wrote it.
    pub size: i32,
    /// What the guest wrote into `value`.
    pub value: u32,
    /// What the guest wrote into `info`.
    pub info: u32,
    /// What the guest was told.
    pub error: PciError,
    /// The value that the guest was told.
    pub result: u32,
    /// The host's device, if the guest has one there.
    pub device: Option<Bdf>,
    /// How it ended.
    pub outcome: Outcome,
}

impl Event {
    /// An operation that was answered now.
    pub fn new(op: &PciOp, reply: &Reply, took: Duration) -> Self {
        Self {
            time: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default(),
            took,
            number: op.cmd,
            address: [op.domain, op.bus, op.devfn],
            offset: op.offset,
            size: op.size,
            value: op.value,
            info: op.info,
            error: reply.error,
            result: reply.value,
            device: reply.device,
            outcome: reply.outcome,
        }
    }

    /// The command, if it is one.
    pub fn command(&self) -> Option<Command> {
        Command::from_number(self.number)
    }

    fn to_words(self) -> [u64; WORDS] {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let [segment, bus, devfn] = self.address;
        let device = self.device.map_or(0, |bdf| {
            1 << 40
                | u64::from(bdf.segment()) << 16
                | u64::from(bdf.bus()) << 8
                | u64::from(bdf.devfn())
        });
        [
            nanoseconds(self.time),
            nanoseconds(self.took),
            pair(self.number, self.error.0.cast_unsigned()),
            pair(segment, bus),
            pair(devfn, self.info),
            pair(self.offset.cast_unsigned(), self.size.cast_unsigned()),
            pair(self.value, self.result),
            device | (self.outcome as u64) << 48,
        ]
    }

    fn from_words(
        [time, took, command, place, function, access, value, device]: [u64; WORDS],
    ) -> Self {
        let high = |word: u64| (word >> 32) as u32;
        let low = |word: u64| (word & 0xffff_ffff) as u32;
        let [_, outcome, there, _, segment_high, segment_low, bus, devfn] = device.to_be_bytes();
        let segment = u16::from_be_bytes([segment_high, segment_low]);
        Self {
            time: Duration::from_nanos(time),
            took: Duration::from_nanos(took),
            number: high(command),
            address: [high(place), low(place), high(function)],
            offset: high(access).cast_signed(),
            size: low(access).cast_signed(),
            value: high(value),
            info: low(function),
            error: PciError(low(command).cast_signed()),
            result: low(value),
            device: (there != 0).then(|| Bdf::from_devfn(segment, bus, devfn)),
            outcome: Outcome::from_number(outcome),
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// Twice the number of the event that is in it, and 2 more; one less while it is being written.
    turn: AtomicU64,
    words: [AtomicU64; WORDS],
}

/// The latest events, written by one thread and read by any number.
#[derive(Debug)]
struct Ring {
    written: AtomicU64,
    slots: Box<[Slot]>,
}

impl Ring {
    fn new() -> Self {
        Self {
            written: AtomicU64::new(0),
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
        }
    }

    fn slot(&self, n: u64) -> Option<&Slot> {
        let index = usize::try_from(n.checked_rem(SLOTS)?).ok()?;
        self.slots.get(index)
    }

    fn push(&self, event: &Event) {
        let n = self.written.load(Ordering::Relaxed);
        let Some(slot) = self.slot(n) else { return };
        let turn = n.wrapping_mul(2).wrapping_add(2);
        slot.turn.store(turn.wrapping_sub(1), Ordering::Relaxed);
        // Nobody sees a new word with an old turn.
        fence(Ordering::Release);
        for (word, value) in slot.words.iter().zip(event.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        slot.turn.store(turn, Ordering::Release);
        self.written.store(n.wrapping_add(1), Ordering::Release);
    }

    /// The `n`th event, unless it was overwritten.
    fn read(&self, n: u64) -> Option<Event> {
        let slot = self.slot(n)?;
        let turn = n.wrapping_mul(2).wrapping_add(2);
        if slot.turn.load(Ordering::Acquire) != turn {
            return None;
        }
        let mut words = [0; WORDS];
        for (value, word) in words.iter_mut().zip(&slot.words) {
            *value = word.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        (slot.turn.load(Ordering::Relaxed) == turn).then(|| Event::from_words(words))
    }
}

#[derive(Debug, Default)]
struct Listeners {
    count: usize,
    ring: Option<Arc<Ring>>,
}

/// Where a guest's operations can be listened to.
#[derive(Debug, Default)]
pub struct Tap {
    open: AtomicBool,
    listeners: Mutex<Listeners>,
    /// Events that came while a listener was coming or going.
    missed: AtomicU64,
}

impl Tap {
    /// Whether anybody listens.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Tells the listeners. To be called by the guest's own thread only.
    pub fn push(&self, event: &Event) {
        let Ok(listeners) = self.listeners.try_lock() else {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if let Some(ring) = &listeners.ring {
            ring.push(event);
        }
    }

    /// Opens the tap until the listener is dropped.
    pub fn listen(self: &Arc<Self>) -> Listener {
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.count = listeners.count.saturating_add(1);
        let ring = Arc::clone(listeners.ring.get_or_insert_with(|| Arc::new(Ring::new())));
        self.open.store(true, Ordering::Relaxed);
        Listener {
            next: ring.written.load(Ordering::Acquire),
            missed: self.missed.load(Ordering::Relaxed),
            tap: Arc::clone(self),
            ring,
        }
    }
}

/// Somebody who listens to a guest's operations.
#[derive(Debug)]
pub struct Listener {
    tap: Arc<Tap>,
    ring: Arc<Ring>,
    next: u64,
    missed: u64,
}

impl Listener {
    /// The events since the last call, the oldest first, and how many of them were missed.
    pub fn take(&mut self, events: &mut Vec<Event>) -> u64 {
        let written = self.ring.written.load(Ordering::Acquire);
        let oldest = written.saturating_sub(SLOTS).max(self.next);
        let mut lost = oldest.saturating_sub(self.next);
        for n in oldest..written {
            match self.ring.read(n) {
                Some(event) => events.push(event),
                None => lost = lost.saturating_add(1),
            }
        }
        self.next = written;
        let missed = self.tap.missed.load(Ordering::Relaxed);
        lost = lost.saturating_add(missed.saturating_sub(self.missed));
        self.missed = missed;
        lost
    }

    /// Whether it listens at this tap.
    pub fn is_at(&self, tap: &Arc<Tap>) -> bool {
        Arc::ptr_eq(&self.tap, tap)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut listeners = self
            .tap
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.count = listeners.count.saturating_sub(1);
        if listeners.count == 0 {
            self.tap.open.store(false, Ordering::Relaxed);
            listeners.ring = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u32) -> Event {
        Event {
            time: Duration::from_nanos(1_700_000_000_123_456_789),
            took: Duration::from_nanos(n.into()),
            number: u32::MAX - n,
            address: [n, u32::MAX, n ^ 0xffff],
            offset: i32::MIN.wrapping_add_unsigned(n),
            size: -1,
            value: n,
            info: !n,
            error: PciError(-5),
            result: n.wrapping_mul(3),
            device: n
                .is_multiple_of(2)
                .then(|| Bdf::from_devfn(0xffff, 0xfe, n.to_le_bytes()[0])),
            outcome: Outcome::Failed,
        }
    }

    #[test]
    fn listeners_get_what_was_pushed_since_they_came() {
        let tap = Arc::new(Tap::default());
        assert!(!tap.is_open());
        tap.push(&event(0));
        let mut first = tap.listen();
        tap.push(&event(1));
        let mut second = tap.listen();
        tap.push(&event(2));
        let taken = |listener: &mut Listener| {
            let mut events = Vec::new();
            assert_eq!(listener.take(&mut events), 0);
            events
        };
        assert_eq!(taken(&mut first), [event(1), event(2)]);
        assert_eq!(taken(&mut first), []);
        assert_eq!(taken(&mut second), [event(2)]);
        drop(first);
        assert!(tap.is_open());
        tap.push(&event(3));
        assert_eq!(taken(&mut second), [event(3)]);
        drop(second);
        assert!(!tap.is_open());
        assert!(tap.listeners.lock().unwrap().ring.is_none());
    }

    #[test]
    fn a_slow_listener_loses_the_oldest_and_is_told_how_many() {
        let tap = Arc::new(Tap::default());
        let mut listener = tap.listen();
        let all = u32::try_from(SLOTS).unwrap() + 10;
        for n in 0..all {
            tap.push(&event(n));
        }
        let mut events = Vec::new();
        assert_eq!(listener.take(&mut events), 10);
        assert_eq!(events, (10..all).map(event).collect::<Vec<_>>());
    }

    #[test]
    fn while_one_thread_pushes_another_gets_every_event_whole_or_counts_it() {
        const ALL: u32 = 200_000;
        let tap = Arc::new(Tap::default());
        let mut listener = tap.listen();
        let pusher = std::thread::spawn({
            let tap = Arc::clone(&tap);
            move || (0..ALL).for_each(|n| tap.push(&event(n)))
        });
        let (mut events, mut lost) = (Vec::new(), 0);
        while !pusher.is_finished() {
            lost += listener.take(&mut events);
        }
        pusher.join().unwrap();
        lost += listener.take(&mut events);
        assert_eq!(events.len() as u64 + lost, u64::from(ALL));
        assert!(events.is_sorted_by_key(|event| event.value));
        for found in &events {
            assert_eq!(*found, event(found.value));
        }
    }
}
