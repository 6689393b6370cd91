//! What was set for a device at run time: by `pciback set`, or through the facade's files. It goes with the guest that it was set for.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use conf_space::overlay::quirk::Quirks;
use conf_space::overlay::{Permissive, Quirk, Range, Ranges};
use xenbus::DomId;

use crate::config::{AerSetting, DeviceSettings, InterruptControl, OnFailure, ResetChoice};

/// What was set for a device at run time. What was not, the configuration file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunTime {
    /// In place of the file's.
    pub permissive: Option<Permissive>,
    /// Besides the file's; one for the same register takes that one's place.
    pub quirks: Quirks,
    /// In place of the file's.
    pub allow_interrupt_control: Option<bool>,
    /// In place of the file's.
    pub allow_shared_interrupt: Option<bool>,
    /// In place of the file's.
    pub allow_shared_pages: Option<bool>,
    /// In place of the file's.
    pub reset: Option<ResetChoice>,
    /// In place of the file's.
    pub aer: AerSetting,
    /// The state of the kernel's INTx handler, as the facade's `irq_handler_state` turned it. There is no such handler here: it is shown again in
    /// `irq_handlers`, and that is all.
    pub irq_handler: bool,
    /// The guest that the toolstack set this for, before that guest has the device. `None`: for whichever gets it next.
    pub meant_for: Option<DomId>,
}

impl RunTime {
    /// Lays it over what the file says.
    pub fn apply_to(&self, settings: &mut DeviceSettings) {
        settings.permissive = self.permissive.unwrap_or(settings.permissive);
        settings.reset = self.reset.unwrap_or(settings.reset);
        if let Some(allow) = self.allow_interrupt_control {
            settings.allow_interrupt_control = InterruptControl::from(allow);
        }
        settings.allow_shared_interrupt = self
            .allow_shared_interrupt
            .unwrap_or(settings.allow_shared_interrupt);
        settings.allow_shared_pages = self
            .allow_shared_pages
            .unwrap_or(settings.allow_shared_pages);
        self.aer.apply_to(&mut settings.aer);
        for quirk in self.quirks.iter() {
            // Whether there is room is looked at when it is set.
            let _ = settings.quirks.insert(quirk);
        }
    }
}

const PERMISSIVE: u32 = 0b11;
const PERMISSIVE_NO: u32 = 1;
const PERMISSIVE_YES: u32 = 2;
const PERMISSIVE_RANGES: u32 = 3;
const INTERRUPT_CONTROL_SHIFT: u32 = 2;
const MEANT_FOR: u32 = 1 << 4;
const IRQ_HANDLER: u32 = 1 << 5;
const RESET_SHIFT: u32 = 8;
const RESETS: [(u32, ResetChoice); 5] = [
    (1, ResetChoice::Auto),
    (2, ResetChoice::Flr),
    (3, ResetChoice::Pm),
    (4, ResetChoice::Bus),
    (5, ResetChoice::None),
];
const ON_FAILURE_SHIFT: u32 = 16;
const ON_FAILURES: [(u32, OnFailure); 3] = [
    (1, OnFailure::Detach),
    (2, OnFailure::Kill),
    (3, OnFailure::Ignore),
];
const MMIO_ENABLED_SHIFT: u32 = 18;
const SHARED_INTERRUPT_SHIFT: u32 = 20;
const SHARED_PAGES_SHIFT: u32 = 22;

/// A setting that may be on, off or not set, as two bits.
fn from_bits(flags: u32, shift: u32) -> Option<bool> {
    match flags >> shift & 0b11 {
        1 => Some(false),
        2 => Some(true),
        _ => None,
    }
}

/// The same the other way.
fn to_bits(value: Option<bool>, shift: u32) -> u32 {
    match value {
        None => 0,
        Some(false) => 1 << shift,
        Some(true) => 2 << shift,
    }
}

/// One of several, by its number; 0 is none.
fn from_number<T: Copy>(numbers: &[(u32, T)], number: u32) -> Option<T> {
    let found = numbers.iter().find(|(known, _)| *known == number);
    found.map(|(_, value)| *value)
}

/// The same the other way.
fn to_number<T: Copy + PartialEq>(numbers: &[(u32, T)], value: Option<T>) -> u32 {
    let found = numbers.iter().find(|(_, known)| Some(*known) == value);
    found.map_or(0, |(number, _)| *number)
}

/// The same in a record. Words of zero are nothing set. An earlier daemon's records are read, so nothing that is there ever moves.
#[repr(C)]
pub(super) struct Words {
    /// Odd while the rest is being written.
    version: AtomicU32,
    flags: AtomicU32,
    meant_for: AtomicU32,
    ranges: [AtomicU32; Ranges::CAPACITY],
    /// In seconds.
    aer_timeout: AtomicU32,
    quirks: [AtomicU64; Quirks::CAPACITY],
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Words, ranges) == 12 && offset_of!(Words, aer_timeout) == 76);
    assert!(offset_of!(Words, quirks) == 80);
};

impl Words {
    /// Changes with each [`Words::store`].
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// What is set, and the version that it is of. `None` while it is being changed: what held before still holds.
    pub fn load(&self) -> Option<(u32, RunTime)> {
        let version = self.version.load(Ordering::Acquire);
        let found = self.read();
        fence(Ordering::Acquire);
        let same = version == self.version.load(Ordering::Relaxed);
        (same && version & 1 == 0).then_some((version, found))
    }

    /// For one writer at a time.
    pub fn store(&self, settings: &RunTime) {
        let version = self.begin();
        self.write(settings);
        self.version
            .store(version.wrapping_add(1), Ordering::Release);
    }

    pub(super) fn begin(&self) -> u32 {
        let version = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(version, Ordering::Relaxed);
        fence(Ordering::Release);
        version
    }

    /// After the daemon was killed in the middle of [`Words::store`]: nothing is set, rather than half of it.
    pub fn recover(&self) {
        if self.version() & 1 != 0 {
            self.store(&RunTime::default());
        }
    }

    fn read(&self) -> RunTime {
        let flags = self.flags.load(Ordering::Relaxed);
        let permissive = match flags & PERMISSIVE {
            PERMISSIVE_NO => Some(Permissive::No),
            PERMISSIVE_YES => Some(Permissive::Yes),
            PERMISSIVE_RANGES => {
                let mut ranges = Ranges::EMPTY;
                for word in &self.ranges {
                    if let Some(range) = Range::from_bits(word.load(Ordering::Relaxed)) {
                        let _ = ranges.insert(range);
                    }
                }
                Some(Permissive::Ranges(ranges))
            }
            _ => None,
        };
        let mut quirks = Quirks::EMPTY;
        for word in &self.quirks {
            if let Some(quirk) = Quirk::from_bits(word.load(Ordering::Relaxed)) {
                let _ = quirks.insert(quirk);
            }
        }
        RunTime {
            permissive,
            quirks,
            allow_interrupt_control: from_bits(flags, INTERRUPT_CONTROL_SHIFT),
            allow_shared_interrupt: from_bits(flags, SHARED_INTERRUPT_SHIFT),
            allow_shared_pages: from_bits(flags, SHARED_PAGES_SHIFT),
            reset: from_number(&RESETS, flags >> RESET_SHIFT & 0xff),
            aer: AerSetting {
                on_failure: from_number(&ON_FAILURES, flags >> ON_FAILURE_SHIFT & 0b11),
                timeout: NonZeroU32::new(self.aer_timeout.load(Ordering::Relaxed)),
                mmio_enabled: from_bits(flags, MMIO_ENABLED_SHIFT),
            },
            irq_handler: flags & IRQ_HANDLER != 0,
            meant_for: (flags & MEANT_FOR != 0)
                .then(|| u16::try_from(self.meant_for.load(Ordering::Relaxed)).ok())
                .flatten()
                .map(DomId),
        }
    }

    fn write(&self, settings: &RunTime) {
        let mut flags = match settings.permissive {
            None => 0,
            Some(Permissive::No) => PERMISSIVE_NO,
            Some(Permissive::Yes) => PERMISSIVE_YES,
            Some(Permissive::Ranges(_)) => PERMISSIVE_RANGES,
        };
        flags |= to_bits(settings.allow_interrupt_control, INTERRUPT_CONTROL_SHIFT)
            | to_bits(settings.allow_shared_interrupt, SHARED_INTERRUPT_SHIFT)
            | to_bits(settings.allow_shared_pages, SHARED_PAGES_SHIFT)
            | to_bits(settings.aer.mmio_enabled, MMIO_ENABLED_SHIFT)
            | to_number(&RESETS, settings.reset) << RESET_SHIFT
            | to_number(&ON_FAILURES, settings.aer.on_failure) << ON_FAILURE_SHIFT;
        let timeout = settings.aer.timeout.map_or(0, NonZeroU32::get);
        self.aer_timeout.store(timeout, Ordering::Relaxed);
        if settings.irq_handler {
            flags |= IRQ_HANDLER;
        }
        if let Some(domain) = settings.meant_for {
            flags |= MEANT_FOR;
            self.meant_for.store(u32::from(domain.0), Ordering::Relaxed);
        }
        let ranges = match settings.permissive {
            Some(Permissive::Ranges(ranges)) => ranges,
            _ => Ranges::EMPTY,
        };
        let mut ranges = ranges.iter();
        for word in &self.ranges {
            word.store(ranges.next().map_or(0, Range::to_bits), Ordering::Relaxed);
        }
        let mut quirks = settings.quirks.iter();
        for word in &self.quirks {
            word.store(quirks.next().map_or(0, Quirk::to_bits), Ordering::Relaxed);
        }
        self.flags.store(flags, Ordering::Relaxed);
    }
}
