//! What a device tells its driver, and how it gets there: ISR status, configuration generation,
//! interrupt vectors. All of it may be touched by the device's threads, so it is behind a lock of
//! the device's own.

use std::fmt::{self, Debug, Display};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use conf_space::emulated::{Entry, Message, Msix};

use crate::device::Events;
use crate::memory::Words;
use crate::status::{DeviceStatus, Status};

/// "No vector" in a vector register (virtio 1.3, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Time between two lines in the log about a driver that breaks the rules.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

bitflags::bitflags! {
    /// ISR status, and interrupt status of virtio-mmio (virtio 1.3, sections 4.1.4.5 and 4.2.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Isr: u8 {
        /// A queue has used buffers.
        const QUEUE = 1 << 0;
        /// The device configuration has changed.
        const CONFIG = 1 << 1;
    }
}

/// Where interrupts go. Called from any thread.
pub trait InterruptSink: Send + Sync + Debug {
    /// Sends a message-signalled interrupt.
    fn msi(&self, address: u64, data: u32);

    /// Sets the level of the device's interrupt line.
    fn intx(&self, level: bool);
}

/// The part of a transport that its device's threads share.
pub(crate) struct Signals {
    name: String,
    sink: Arc<dyn InterruptSink>,
    /// The MSI-X table: address; data, and bit 32 of an entry that is not masked.
    table: Words,
    state: Mutex<State>,
}

/// In the second word of an entry: the vector is not masked. So zeroes are an entry after a reset.
const UNMASKED: u64 = 1 << 32;

/// See [`Signals`].
#[derive(Debug)]
pub(crate) struct State {
    pub status: DeviceStatus,
    /// The device has its queues, and may be heard.
    pub active: bool,
    pub isr: Isr,
    pub generation: u32,
    /// As the driver wrote them: they may name vectors that do not exist.
    config_vector: u16,
    queue_vectors: Vec<u16>,
    /// `None`: the transport has interrupt lines alone.
    msix: Option<Msix>,
    line_disabled: bool,
    /// What the sink was last told.
    level: bool,
    complained: Option<Instant>,
}

impl Signals {
    pub fn new(
        name: String,
        queues: usize,
        msix: Option<u16>,
        sink: Arc<dyn InterruptSink>,
        table: Words,
    ) -> Self {
        let msix = msix.map(|vectors| {
            let mut msix = Msix::new(vectors);
            msix.restore(noted_entries(&table));
            msix
        });
        Self {
            name,
            sink,
            table,
            state: Mutex::new(State {
                status: DeviceStatus::default(),
                active: false,
                isr: Isr::default(),
                generation: 0,
                config_vector: NO_VECTOR,
                queue_vectors: vec![NO_VECTOR; queues],
                msix,
                line_disabled: false,
                level: false,
                complained: None,
            }),
        }
    }

    /// A lock that is held for a few instructions, or, where a line changes, for one system call:
    /// else two threads could tell the sink in the wrong order.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reset leaves. The MSI-X table is not virtio's, and stays.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.status = DeviceStatus::default();
        state.active = false;
        state.isr = Isr::default();
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        self.update_line(&mut state);
    }

    /// The driver reads ISR status, which clears it.
    pub fn take_isr(&self) -> Isr {
        let mut state = self.lock();
        let isr = std::mem::take(&mut state.isr);
        self.update_line(&mut state);
        isr
    }

    /// The driver acknowledges interrupts.
    pub fn acknowledge(&self, isr: Isr) {
        let mut state = self.lock();
        state.isr.remove(isr);
        self.update_line(&mut state);
    }

    /// Whether the device would drive its line, were it not switched off.
    pub fn is_line_wanted(&self) -> bool {
        self.lock().is_line_wanted()
    }

    /// The line is switched off at its PCI function, or on again.
    pub fn set_line_disabled(&self, disabled: bool) {
        let mut state = self.lock();
        state.line_disabled = disabled;
        self.update_line(&mut state);
    }

    /// The MSI-X control word was written.
    pub fn set_msix_control(&self, control: u16) {
        let mut state = self.lock();
        if let Some(msix) = &mut state.msix {
            msix.set_control(control, |message| self.send(message));
        }
        self.update_line(&mut state);
    }

    pub fn is_msix_enabled(&self) -> bool {
        self.lock().is_msix_enabled()
    }

    pub fn read_msix_table(&self, offset: u64, data: &mut [u8]) {
        if let Some(msix) = &self.lock().msix {
            msix.read_table(offset, data);
        }
    }

    pub fn write_msix_table(&self, offset: u64, data: &[u8]) {
        if let Some(msix) = &mut self.lock().msix {
            msix.write_table(offset, data, |message| self.send(message));
            for (index, entry) in (0usize..).zip(msix.entries()) {
                let at = index.saturating_mul(2);
                let high = u64::from(entry.address_high) << 32;
                self.table.set(at, high | u64::from(entry.address));
                let unmasked = if entry.masked { 0 } else { UNMASKED };
                let control = unmasked | u64::from(entry.data);
                self.table.set(at.saturating_add(1), control);
            }
        }
    }

    pub fn read_msix_pending(&self, offset: u64, data: &mut [u8]) {
        if let Some(msix) = &self.lock().msix {
            msix.read_pending(offset, data);
        }
    }

    /// After a restart: says all that may have been said, or not, before it. Also tells the sink the
    /// level of the line, which it may still have from then.
    pub fn repeat(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.status.get().contains(Status::DRIVER_OK) || state.active {
            state.generation = state.generation.wrapping_add(1);
            state.isr.insert(Isr::CONFIG);
            if !state.is_msix_enabled() {
                state.isr.insert(Isr::QUEUE);
            }
            if let Some(msix) = &mut state.msix {
                for vector in state.queue_vectors.iter().chain([&state.config_vector]) {
                    if let Some(message) = msix.raise(*vector) {
                        self.send(message);
                    }
                }
            }
        }
        state.level = state.is_line_wanted() && !state.line_disabled;
        self.sink.intx(state.level);
    }

    /// Says in the log what is wrong with the driver, unless it was said a moment ago.
    pub fn complain(&self, what: &dyn Display) {
        let now = Instant::now();
        let mut state = self.lock();
        let recently = |last: Instant| now.duration_since(last) < COMPLAINT_INTERVAL;
        if !state.complained.is_some_and(recently) {
            state.complained = Some(now);
            drop(state);
            log::warn!("{}: {what}", self.name);
        }
    }

    fn send(&self, message: Message) {
        self.sink.msi(message.address, message.data);
    }

    /// Sends a vector's message if MSI-X is on, or else sees to the line.
    fn interrupt(&self, mut state: MutexGuard<'_, State>, vector: u16) {
        if !state.is_msix_enabled() {
            self.update_line(&mut state);
            return;
        }
        let message = state.msix.as_mut().and_then(|msix| msix.raise(vector));
        drop(state);
        if let Some(message) = message {
            self.send(message);
        }
    }

    fn update_line(&self, state: &mut State) {
        let level = state.is_line_wanted() && !state.line_disabled;
        if level != state.level {
            state.level = level;
            self.sink.intx(level);
        }
    }
}

/// The entries of the MSI-X table, as they were noted.
fn noted_entries(table: &Words) -> impl Iterator<Item = Entry> {
    (0..table.count()).step_by(2).map(|at| {
        let (address, control) = (table.get(at), table.get(at.saturating_add(1)));
        Entry {
            address: (address & 0xffff_ffff) as u32,
            address_high: (address >> 32) as u32,
            data: (control & 0xffff_ffff) as u32,
            masked: control & UNMASKED == 0,
        }
    })
}

impl State {
    fn is_msix_enabled(&self) -> bool {
        self.msix.as_ref().is_some_and(Msix::is_enabled)
    }

    fn is_line_wanted(&self) -> bool {
        !self.isr.is_empty() && !self.is_msix_enabled()
    }

    fn is_audible(&self) -> bool {
        let broken = Status::DEVICE_NEEDS_RESET | Status::FAILED;
        self.active && !self.status.get().intersects(broken)
    }

    /// What the driver reads back: a vector that does not exist is none.
    fn existing(&self, vector: u16) -> u16 {
        let vectors = self.msix.as_ref().map_or(0, Msix::vectors);
        if vector < vectors { vector } else { NO_VECTOR }
    }

    /// The vector of configuration changes, as the driver reads it.
    pub fn config_vector(&self) -> u16 {
        self.existing(self.config_vector)
    }

    /// As the driver wrote it.
    pub fn written_config_vector(&self) -> u16 {
        self.config_vector
    }

    pub fn set_config_vector(&mut self, vector: u16) {
        self.config_vector = vector;
    }

    /// The vector of a queue, as the driver reads it.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.existing(self.written_queue_vector(queue))
    }

    /// As the driver wrote it.
    pub fn written_queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.copied().unwrap_or(NO_VECTOR)
    }

    pub fn set_queue_vector(&mut self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get_mut(usize::from(queue)) {
            *place = vector;
        }
    }
}

impl Events for Signals {
    fn complain(&self, what: &dyn Display) {
        Self::complain(self, what);
    }

    fn used(&self, queue: u16) {
        let mut state = self.lock();
        if !state.is_audible() {
            return;
        }
        let vector = state.queue_vector(queue);
        if !state.is_msix_enabled() {
            state.isr.insert(Isr::QUEUE);
        }
        self.interrupt(state, vector);
    }

    fn config_changed(&self) {
        let mut state = self.lock();
        state.generation = state.generation.wrapping_add(1);
        if !state.is_audible() {
            return;
        }
        let vector = state.config_vector();
        state.isr.insert(Isr::CONFIG);
        self.interrupt(state, vector);
    }

    fn needs_reset(&self, why: &dyn Display) {
        let mut state = self.lock();
        if state.status.set_needs_reset() {
            let vector = state.config_vector();
            state.isr.insert(Isr::CONFIG);
            self.interrupt(state, vector);
        } else {
            drop(state);
        }
        self.complain(&format_args!("the device needs a reset: {why}"));
    }
}

impl Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Interface;
    use conf_space::registers::msix::control;

    #[derive(Debug, Default)]
    struct Sink(Mutex<Vec<Sent>>);

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Sent {
        Msi(u64, u32),
        Line(bool),
    }

    impl InterruptSink for Sink {
        fn msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push(Sent::Msi(address, data));
        }

        fn intx(&self, level: bool) {
            self.0.lock().unwrap().push(Sent::Line(level));
        }
    }

    impl Sink {
        fn take(&self) -> Vec<Sent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn live(msix: Option<u16>) -> (Signals, Arc<Sink>) {
        let sink = Arc::new(Sink::default());
        let table = Words::volatile(16).unwrap();
        let signals = Signals::new("test".into(), 2, msix, sink.clone(), table);
        for value in [3, 0xb, 0xf] {
            signals.lock().status.write(value, Interface::Modern, true);
        }
        signals.lock().active = true;
        (signals, sink)
    }

    #[test]
    fn the_line_is_up_until_the_driver_reads_isr_status() {
        let (signals, sink) = live(None);
        signals.used(0);
        signals.used(1);
        assert_eq!(sink.take(), [Sent::Line(true)]);
        assert_eq!(signals.take_isr(), Isr::QUEUE);
        assert_eq!(sink.take(), [Sent::Line(false)]);
        assert_eq!(signals.take_isr(), Isr::empty());
        assert_eq!(sink.take(), []);
    }

    #[test]
    fn the_line_is_up_until_all_is_acknowledged() {
        let (signals, sink) = live(None);
        signals.used(0);
        signals.config_changed();
        assert_eq!(sink.take(), [Sent::Line(true)]);
        signals.acknowledge(Isr::QUEUE);
        assert_eq!(sink.take(), []);
        signals.acknowledge(Isr::CONFIG);
        assert_eq!(sink.take(), [Sent::Line(false)]);
    }

    #[test]
    fn with_msix_each_queue_and_the_configuration_have_messages_of_their_own() {
        let (signals, sink) = live(Some(3));
        signals.set_msix_control(control::ENABLE);
        for (vector, data) in [(0u64, 0x40), (1, 0x41)] {
            let mut entry = 0xfee0_0000u64.to_le_bytes().to_vec();
            entry.extend([data, 0, 0, 0, 0, 0, 0, 0]);
            signals.write_msix_table(vector * 16, &entry);
        }
        signals.lock().set_config_vector(0);
        signals.lock().set_queue_vector(1, 1);
        signals.used(1);
        signals.used(0);
        signals.config_changed();
        let message = |data| Sent::Msi(0xfee0_0000, data);
        assert_eq!(sink.take(), [message(0x41), message(0x40)]);
        assert_eq!(
            signals.take_isr(),
            Isr::CONFIG,
            "queues do not show there with MSI-X"
        );
    }

    #[test]
    fn the_line_is_down_with_msix_or_when_the_function_may_not_drive_it() {
        let (signals, sink) = live(Some(1));
        signals.set_line_disabled(true);
        signals.used(0);
        assert!(signals.is_line_wanted());
        assert_eq!(sink.take(), []);
        signals.set_line_disabled(false);
        assert_eq!(sink.take(), [Sent::Line(true)]);
        signals.set_msix_control(control::ENABLE);
        assert!(!signals.is_line_wanted());
        assert_eq!(sink.take(), [Sent::Line(false)]);
    }

    #[test]
    fn a_vector_that_does_not_exist_reads_as_none() {
        let (signals, _) = live(Some(2));
        let mut state = signals.lock();
        for (written, read) in [(1, 1), (2, NO_VECTOR), (0x7ff, NO_VECTOR)] {
            state.set_config_vector(written);
            state.set_queue_vector(0, written);
            assert_eq!((state.config_vector(), state.queue_vector(0)), (read, read));
        }
        state.set_queue_vector(2, 1);
        assert_eq!(state.queue_vector(2), NO_VECTOR, "there is no such queue");
    }

    #[test]
    fn a_device_without_queues_is_silent() {
        let sink = Arc::new(Sink::default());
        let table = Words::volatile(0).unwrap();
        let signals = Signals::new("test".into(), 1, None, sink.clone(), table);
        signals.used(0);
        signals.config_changed();
        signals.needs_reset(&"a test");
        assert_eq!(sink.take(), []);
        assert_eq!(signals.take_isr(), Isr::empty());
    }

    #[test]
    fn a_device_that_needs_a_reset_says_so_once() {
        let (signals, sink) = live(None);
        signals.needs_reset(&"a test");
        assert_eq!(signals.take_isr(), Isr::CONFIG);
        signals.used(0);
        assert_eq!(sink.take(), [Sent::Line(true), Sent::Line(false)]);
    }
}
