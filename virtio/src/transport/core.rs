//! What all faces of a device have in common: features, status, queues, and the life from reset to
//! reset (virtio 1.3, sections 2 and 3).

mod inspect;
#[cfg(test)]
mod kill_tests;
mod queues;
mod state;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::notes::Notes;
use super::signals::{InterruptSink, Signals};
use crate::device::{Activation, Device, DeviceKind};
use crate::features::Features;
use crate::memory::GuestRam;
use crate::queue::{QueueConfig, QueueError, Record};
use crate::status::{Interface, Status, Transition};

/// Page size and alignment of legacy queues on PCI (virtio 1.3, section 4.1.5.1.3.1).
pub(super) const LEGACY_PAGE: u32 = 4096;

/// Features that are of the legacy interface alone.
const LEGACY_ONLY: Features = Features::ANY_LAYOUT.union(Features::NOTIFY_ON_EMPTY);

/// Bits that the legacy interface can offer: the low half.
const LEGACY_MASK: u64 = 0xffff_ffff;

/// Whether the driver waits until the status register reads zero after it has written zero there.
/// It decides how long its CPU is held until the device is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResetWait {
    /// It is to (virtio 1.3, section 4.1.4.3.2), but firmware does not: it resets devices that have
    /// nothing to do, which takes no time worth mentioning.
    Polls,
    /// It frees its memory at once, so nothing may be written there any more.
    Expects,
}

impl ResetWait {
    const fn patience(self) -> Duration {
        match self {
            Self::Polls => Duration::from_millis(20),
            Self::Expects => Duration::from_secs(1),
        }
    }
}

/// What a device is made of, whatever the transport.
pub struct Parts {
    /// What it is called in the log.
    pub name: String,
    /// The device model.
    pub device: Box<dyn Device>,
    /// Features of rings and transport to offer besides the device's own.
    pub features: Features,
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Where its interrupts go.
    pub sink: Arc<dyn InterruptSink>,
    /// Where its state is noted. With what the same device noted before a restart it goes on.
    pub notes: Notes,
}

pub(super) use state::{DEVICE as DEVICE_WORDS, QUEUE as QUEUE_WORDS};

/// Features of rings and transports that every driver may have.
pub const RING_FEATURES: Features = Features::INDIRECT_DESC
    .union(Features::EVENT_IDX)
    .union(Features::ANY_LAYOUT)
    .union(Features::VERSION_1)
    .union(Features::RING_RESET);

/// See the module.
pub(crate) struct Core {
    device: Box<dyn Device>,
    ram: Arc<GuestRam>,
    signals: Arc<Signals>,
    offered: Features,
    phase: Phase,
    /// While a reset is under way: so long a CPU that writes is held for it at most.
    held_until: Option<Instant>,
    interface: Interface,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    /// As the driver wrote them.
    driver_features: u64,
    pub queue_select: u16,
    /// Virtio-mmio version 1: what a page number of the driver counts.
    pub guest_page_size: u32,
    queues: Vec<QueueState>,
    notes: Arc<Notes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The device has no queues.
    Idle,
    /// It has.
    Live,
    /// It is about to give them back. The status register reads as before.
    Resetting(Status),
}

#[derive(Debug)]
struct QueueState {
    config: QueueConfig,
    record: Record,
    phase: QueuePhase,
    /// Of a legacy queue: how its used ring is aligned.
    align: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum QueuePhase {
    /// The device does not have it.
    Stopped,
    /// The device has it.
    Running,
    /// The device is about to give it back.
    Resetting,
    /// The device has given it back while it was live, and can be given it again.
    Reset,
}

impl QueuePhase {
    const ALL: [Self; 4] = [Self::Stopped, Self::Running, Self::Resetting, Self::Reset];
}

impl Core {
    /// A device as its notes say: just reset, or as before a restart, to be woken by
    /// [`Core::resume`]. `vectors`: of MSI-X, if the transport has that.
    pub fn new(mut parts: Parts, vectors: Option<u16>) -> Self {
        let notes = parts.notes;
        parts.device.keep(notes.device().clone());
        let sizes = parts.device.queue_sizes();
        let table = notes.msix().clone();
        let signals = Signals::new(parts.name, sizes.len(), vectors, parts.sink, table);
        let queues = sizes
            .iter()
            .zip(notes.records())
            .map(|(size, record)| QueueState {
                config: QueueConfig::new(*size),
                record: record.clone(),
                phase: QueuePhase::Stopped,
                align: LEGACY_PAGE,
            })
            .collect();
        let mut core = Self {
            offered: parts.device.features().union(parts.features),
            device: parts.device,
            ram: parts.ram,
            signals: Arc::new(signals),
            phase: Phase::Idle,
            held_until: None,
            interface: Interface::Modern,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            guest_page_size: LEGACY_PAGE,
            queues,
            notes: Arc::new(notes),
        };
        core.load();
        core
    }

    pub fn kind(&self) -> DeviceKind {
        self.device.kind()
    }

    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        if !self.is_resetting() {
            self.device.write_config(offset, data);
        }
    }

    // Features

    fn offered(&self, interface: Interface) -> u64 {
        match interface {
            Interface::Legacy => self.offered.bits() & LEGACY_MASK,
            Interface::Modern => self.offered.difference(LEGACY_ONLY).bits(),
        }
    }

    /// 32 of the features offered; `select` 0: bits 0 to 31, 1: bits 32 to 63. None beyond.
    pub fn device_features(&self, interface: Interface, select: u32) -> u32 {
        half(self.offered(interface), select)
    }

    /// What the driver has chosen, as it wrote it.
    pub fn driver_features(&self, select: u32) -> u32 {
        half(self.driver_features, select)
    }

    /// The driver chooses. After it has confirmed its choice, nothing changes any more.
    pub fn set_driver_features(&mut self, interface: Interface, select: u32, value: u32) {
        let confirmed = Status::FEATURES_OK | Status::DRIVER_OK;
        if self.is_resetting() || self.signals.lock().status.get().intersects(confirmed) {
            return;
        }
        let value = u64::from(value);
        self.driver_features = match (interface, select) {
            // A legacy driver has no second word, and nobody would tell it of a refusal.
            (Interface::Legacy, _) => value & self.offered(interface),
            (Interface::Modern, 0) => (self.driver_features & !LEGACY_MASK) | value,
            (Interface::Modern, 1) => (self.driver_features & LEGACY_MASK) | value.wrapping_shl(32),
            _ => return,
        };
    }

    /// What is agreed on. Never more than is offered, whichever doors the driver has used.
    fn features(&self) -> Features {
        Features::from_bits_retain(self.driver_features & self.offered(self.interface))
    }

    /// Section 2.2.1, and 6.1: a driver of the modern interface accepts VERSION_1.
    fn are_features_acceptable(&self, interface: Interface) -> bool {
        let chosen = Features::from_bits_retain(self.driver_features);
        interface == Interface::Legacy
            || self.driver_features & !self.offered(interface) == 0
                && chosen.contains(Features::VERSION_1)
    }

    // Status

    /// The status register, as the driver reads it.
    pub fn status(&mut self) -> u8 {
        self.poll_reset();
        match self.phase {
            Phase::Resetting(before) => before.bits(),
            Phase::Idle | Phase::Live => self.signals.lock().status.get().bits(),
        }
    }

    /// The driver writes the status register.
    pub fn set_status(&mut self, interface: Interface, wait: ResetWait, value: u8) {
        self.poll_reset();
        if self.is_resetting() {
            return;
        }
        let acceptable = self.are_features_acceptable(interface);
        let (before, transition) = {
            let mut state = self.signals.lock();
            let before = state.status.get();
            (before, state.status.write(value, interface, acceptable))
        };
        if self.phase == Phase::Idle {
            self.interface = interface;
        }
        match transition {
            Transition::Reset => self.reset(before, wait),
            Transition::Live => self.activate(),
            Transition::FeaturesRefused => self.signals.complain(&format_args!(
                "the driver asks for features that are not offered, or not for VERSION_1: {:#x}",
                self.driver_features
            )),
            Transition::GivenUp => self.signals.complain(&"the driver has given the device up"),
            Transition::Illegal => self.signals.complain(&format_args!(
                "the driver writes status {value:#x} where it is {:#x}, which is no step to take",
                before.bits()
            )),
            Transition::FeaturesAccepted => self.device.agree(self.features()),
            Transition::Found | Transition::Unchanged => {}
        }
        self.save();
    }

    fn reset(&mut self, before: Status, wait: ResetWait) {
        self.phase = Phase::Resetting(before);
        self.held_until = Instant::now().checked_add(wait.patience());
        // Whoever comes after a kill goes on with the reset.
        self.save();
        self.device.reset();
        self.poll_reset();
    }

    /// Whether a CPU that has written is to wait for the end of a reset. To be asked again until it is not.
    pub fn holds(&mut self) -> bool {
        if !self.is_resetting() {
            return false;
        }
        self.poll_reset();
        let is_due = |until| Instant::now() < until;
        self.is_resetting() && self.held_until.is_some_and(is_due)
    }

    fn is_resetting(&self) -> bool {
        matches!(self.phase, Phase::Resetting(_))
    }

    /// Finishes a reset when the device has.
    fn poll_reset(&mut self) {
        if !self.is_resetting() || !self.device.is_reset() {
            return;
        }
        self.signals.reset();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.config.reset();
            // Until it is noted that the reset is done, no queue goes on as its record says.
            queue.record.clear();
            queue.phase = QueuePhase::Stopped;
            queue.align = LEGACY_PAGE;
        }
        self.phase = Phase::Idle;
        self.save();
    }

    /// Gives the device its queues.
    fn activate(&mut self) {
        if self.phase != Phase::Idle {
            return;
        }
        let features = self.features();
        let view = self.ram.view();
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, queue) in (0u16..).zip(&mut self.queues) {
            if !queue.config.ready {
                continue;
            }
            match queue.config.activate(&view, features, queue.record.clone()) {
                Ok(ring) => queues.push((index, ring)),
                Err(error) => return self.refuse(index, &error),
            }
        }
        for (index, _) in &queues {
            if let Some(queue) = self.queues.get_mut(usize::from(*index)) {
                queue.phase = QueuePhase::Running;
            }
        }
        self.phase = Phase::Live;
        self.signals.lock().active = true;
        self.device.agree(features);
        self.device.activate(Activation {
            ram: Arc::clone(&self.ram),
            queues,
            features,
            events: Arc::clone(&self.signals) as Arc<dyn crate::device::Events>,
        });
    }

    fn refuse(&self, index: u16, error: &QueueError) {
        use crate::device::Events;
        self.signals
            .needs_reset(&format_args!("queue {index}: {error}"));
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("kind", &self.device.kind())
            .field("phase", &self.phase)
            .field("signals", &self.signals)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// One half of a feature word.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & LEGACY_MASK) as u32,
        1 => features.wrapping_shr(32) as u32,
        _ => 0,
    }
}
