//! What a driver has written, noted in mapped memory so that a restart of the daemon goes unnoticed.
//!
//! Noted is what came from the driver, when it was written and before its access is answered. What
//! came from the device is not: who is killed may have used buffers and not said so, so after a
//! restart everything is said again. Spurious interrupts do no harm.

use std::sync::Arc;
use std::time::Instant;

use super::{Core, Phase, QueuePhase, QueueState, ResetWait};
use crate::memory::Words;
use crate::status::{DeviceStatus, Interface, Status};
use crate::transport::NO_VECTOR;
use crate::transport::signals::State;

/// Words of the device, that [`Core::visit`] visits.
pub(in crate::transport) const DEVICE: usize = 5;
/// Words of a queue.
pub(in crate::transport) const QUEUE: usize = 5;

impl Core {
    /// Notes what the driver has written. To be called before its access is answered.
    pub fn save(&mut self) {
        let notes = Arc::clone(&self.notes);
        notes.set_registers(|words| {
            self.visit(&mut |at, value| {
                if words.get(at) != value {
                    words.set(at, value);
                }
                value
            });
        });
    }

    /// Takes on what was noted.
    pub(super) fn load(&mut self) {
        if self.is_restart() {
            let words = self.notes.registers().clone();
            self.visit(&mut |at, _| words.get(at));
        }
    }

    /// Whether there are notes from before a restart.
    pub fn is_restart(&self) -> bool {
        self.notes.is_restart()
    }

    /// The notes of the configuration space.
    pub fn config_space_words(&self) -> &Words {
        self.notes.config_space()
    }

    /// Has a device go on that was live before a restart. All else that belongs to its state is in
    /// place.
    pub fn resume(&mut self) {
        if !self.is_restart() {
            return;
        }
        for (index, queue) in (0u16..).zip(&mut self.queues) {
            if queue.phase == QueuePhase::Resetting {
                queue.phase = QueuePhase::Reset;
                queue.config.reset();
                self.signals.lock().set_queue_vector(index, NO_VECTOR);
            }
            if !queue.config.ready {
                queue.record.clear();
            }
        }
        if self.is_resetting() {
            // The CPU that has asked for it may wait, and asks again.
            self.held_until = Instant::now().checked_add(ResetWait::Expects.patience());
            self.device.reset();
            self.poll_reset();
        }
        let status = self.signals.lock().status.get();
        if status.contains(Status::FEATURES_OK) {
            self.device.agree(self.features());
        }
        let was_live = self.phase == Phase::Live;
        self.phase = Phase::Idle;
        if was_live && !status.intersects(Status::FAILED | Status::DEVICE_NEEDS_RESET) {
            self.activate();
        }
        self.signals.repeat();
        for index in 0..self.queue_count() {
            self.notify(index);
        }
        self.save();
    }

    /// The words of the device and of its queues. `word` gets the place of each and what it is, and returns
    /// what it is to be. So what is noted and what is taken on cannot differ.
    fn visit(&mut self, word: &mut impl FnMut(usize, u64) -> u64) {
        let signals = Arc::clone(&self.signals);
        let mut state = signals.lock();
        let noted = word(0, status_word(self.phase, self.interface, &state));
        (self.phase, self.interface) = from_status_word(noted, &mut state);
        let vector = state.written_config_vector();
        let noted = word(1, join([vector, self.queue_select, 0, 0]));
        let [vector, select, _, _] = split(noted);
        state.set_config_vector(vector);
        self.queue_select = select;
        let noted = word(2, pair(state.generation, self.guest_page_size));
        (state.generation, self.guest_page_size) = halves(noted);
        let selects = pair(self.device_feature_select, self.driver_feature_select);
        (self.device_feature_select, self.driver_feature_select) = halves(word(3, selects));
        self.driver_features = word(4, self.driver_features);
        let places = (DEVICE..).step_by(QUEUE);
        for ((index, queue), place) in (0u16..).zip(&mut self.queues).zip(places) {
            queue.visit(index, &mut state, &mut |at, value| {
                word(place.saturating_add(at), value)
            });
        }
    }
}

impl QueueState {
    fn visit(&mut self, index: u16, state: &mut State, word: &mut impl FnMut(usize, u64) -> u64) {
        let vector = state.written_queue_vector(index);
        let ready = self.config.ready.into();
        let phase = self.phase as u16;
        let noted = word(0, join([self.config.size, vector, ready, phase]));
        let [size, vector, ready, phase] = split(noted);
        self.config.size = size;
        state.set_queue_vector(index, vector);
        self.config.ready = ready != 0;
        self.phase = QueuePhase::ALL
            .into_iter()
            .find(|known| *known as u16 == phase)
            .unwrap_or(QueuePhase::Stopped);
        (self.align, _) = halves(word(1, pair(self.align, 0)));
        self.config.descriptors = word(2, self.config.descriptors);
        self.config.driver = word(3, self.config.driver);
        self.config.device = word(4, self.config.device);
    }
}

/// Bits of the status word above the two status bytes: the phase, and the interface.
const LIVE: u16 = 1 << 0;
const RESETTING: u16 = 1 << 1;
const LEGACY: u16 = 1 << 2;

fn status_word(phase: Phase, interface: Interface, state: &State) -> u64 {
    let (mut flags, before) = match phase {
        Phase::Idle => (0, Status::empty()),
        Phase::Live => (LIVE, Status::empty()),
        Phase::Resetting(before) => (RESETTING, before),
    };
    if interface == Interface::Legacy {
        flags |= LEGACY;
    }
    let status = state.status.get().bits().into();
    join([status, before.bits().into(), flags, 0])
}

fn from_status_word(word: u64, state: &mut State) -> (Phase, Interface) {
    let [status, before, flags, _] = split(word);
    let bits = |byte: u16| Status::from_bits_truncate((byte & 0xff) as u8);
    state.status = DeviceStatus::restored(bits(status));
    let phase = match (flags & LIVE != 0, flags & RESETTING != 0) {
        (_, true) => Phase::Resetting(bits(before)),
        (true, false) => Phase::Live,
        (false, false) => Phase::Idle,
    };
    let interface = if flags & LEGACY != 0 {
        Interface::Legacy
    } else {
        Interface::Modern
    };
    (phase, interface)
}

/// Four numbers in a word, the first in its lowest bits.
fn join([a, b, c, d]: [u16; 4]) -> u64 {
    u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
}

fn split(word: u64) -> [u16; 4] {
    [0, 16, 32, 48].map(|shift| (word.wrapping_shr(shift) & 0xffff) as u16)
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn halves(word: u64) -> (u32, u32) {
    ((word & 0xffff_ffff) as u32, (word >> 32) as u32)
}
