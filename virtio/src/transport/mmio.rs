//! Virtio-mmio: a row of slots in the guest's memory, each with room for one device of any type.

mod registers;

use conf_space::Width;
use thiserror::Error;
use xenbus::device_model::{IoRange, IoSpace};

use self::registers::{CONFIG, Empty, Face, table};
use super::config;
use super::core::{Core, Parts};
use crate::device::DeviceKind;
use crate::inspect::DeviceView;
use crate::ioreq::{Claim, Target, Window};

/// Bytes of a slot: the registers, and 256 bytes of device configuration.
pub const SLOT_BYTES: u64 = 0x200;

/// Version of the register layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Legacy: queues at page numbers.
    One,
    /// Virtio 1.0 and later.
    Two,
}

impl Version {
    const fn number(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }
}

/// A device, to be plugged into a slot.
#[derive(Debug)]
pub struct MmioDevice {
    core: Core,
    version: Version,
}

impl MmioDevice {
    /// A device that was just reset, or goes on from before a restart. Its interrupt line is the
    /// sink's.
    pub fn new(parts: Parts, version: Version) -> Self {
        let mut core = Core::new(parts, None);
        core.resume();
        Self { core, version }
    }

    /// Its type.
    pub fn kind(&self) -> DeviceKind {
        self.core.kind()
    }

    fn read(&mut self, offset: u64, width: Width) -> u32 {
        let (core, version) = (&mut self.core, self.version);
        let registers = table(version).read(&mut Face { core, version }, offset, width);
        registers | config::read(&self.core, CONFIG, offset, width)
    }

    fn write(&mut self, offset: u64, width: Width, value: u32) {
        let (core, version) = (&mut self.core, self.version);
        table(version).write(&mut Face { core, version }, offset, width, value);
        config::write(&mut self.core, CONFIG, offset, width, value);
    }
}

/// A slot cannot take a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PlugError {
    /// There is no such slot.
    #[error("there is no slot {slot}: the board has {slots}")]
    NoSuchSlot {
        /// Which.
        slot: usize,
        /// How many there are.
        slots: usize,
    },
    /// There is a device in it.
    #[error("slot {slot} is taken by a {kind:?} device")]
    Taken {
        /// Which.
        slot: usize,
        /// What is there.
        kind: DeviceKind,
    },
}

/// A row of slots, one behind the other.
#[derive(Debug)]
pub struct Board {
    base: u64,
    slots: Vec<Option<MmioDevice>>,
}

impl Board {
    /// Empty slots from this guest-physical address on.
    pub fn new(base: u64, slots: usize) -> Self {
        let slots = std::iter::repeat_with(|| None).take(slots).collect();
        Self { base, slots }
    }

    /// Guest-physical address of a slot.
    pub fn address(&self, slot: usize) -> u64 {
        let slot = u64::try_from(slot).unwrap_or(u64::MAX);
        self.base.saturating_add(slot.saturating_mul(SLOT_BYTES))
    }

    /// The slots.
    pub fn slots(&self) -> impl Iterator<Item = Option<&MmioDevice>> {
        self.slots.iter().map(Option::as_ref)
    }

    /// Puts a device into a slot.
    ///
    /// # Errors
    /// The slot is taken, or there is no such slot.
    pub fn plug(&mut self, slot: usize, device: MmioDevice) -> Result<(), PlugError> {
        let slots = self.slots.len();
        match self.slots.get_mut(slot) {
            None => Err(PlugError::NoSuchSlot { slot, slots }),
            Some(Some(there)) => Err(PlugError::Taken {
                slot,
                kind: there.kind(),
            }),
            Some(place) => {
                *place = Some(device);
                Ok(())
            }
        }
    }

    fn slot(&mut self, offset: u64) -> Option<(Option<&mut MmioDevice>, u64)> {
        let index = usize::try_from(offset.checked_div(SLOT_BYTES)?).ok()?;
        let within = offset.checked_rem(SLOT_BYTES)?;
        Some((self.slots.get_mut(index)?.as_mut(), within))
    }
}

impl Target for Board {
    fn read(&mut self, _: Window, offset: u64, width: Width) -> u32 {
        match self.slot(offset) {
            Some((Some(device), offset)) => device.read(offset, width),
            Some((None, offset)) => table(Version::Two).read(&mut Empty, offset, width),
            None => width.mask(),
        }
    }

    fn write(&mut self, _: Window, offset: u64, width: Width, value: u32) {
        if let Some((Some(device), offset)) = self.slot(offset) {
            device.write(offset, width, value);
        }
    }

    fn holds(&mut self, _: Window, offset: u64) -> bool {
        let slot = self.slot(offset);
        slot.is_some_and(|(device, _)| device.is_some_and(|device| device.core.holds()))
    }

    fn halt(&mut self) -> bool {
        let mut halted = true;
        for device in self.slots.iter_mut().flatten() {
            halted &= device.core.halt();
        }
        halted
    }

    fn inspect(&self) -> Vec<DeviceView> {
        let devices = self.slots.iter().flatten();
        devices.map(|device| device.core.inspect()).collect()
    }

    fn claims(&self, claims: &mut Vec<Claim>) {
        let end = self.address(self.slots.len());
        claims.push(Claim {
            range: IoRange {
                space: IoSpace::Memory,
                first: self.base,
                last: end.saturating_sub(1),
            },
            window: Window::Region(0),
        });
    }
}
