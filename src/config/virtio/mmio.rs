//! A guest's slots of virtio-mmio.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// One of a guest's slots for virtio-mmio devices. Any device may be in any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct MmioSlot(u8);

/// A text is not such a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a slot of virtio-mmio is a number from 0 to {}", MmioSlot::COUNT.saturating_sub(1))]
pub struct MmioSlotError;

impl MmioSlot {
    /// How many a guest has: as many as there are interrupt lines that no PCI function drives.
    pub const COUNT: u8 = 7;

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(Self)
    }

    /// The slot of this number.
    ///
    /// # Errors
    /// There is none.
    pub fn new(number: u8) -> Result<Self, MmioSlotError> {
        let exists = number < Self::COUNT;
        exists.then_some(Self(number)).ok_or(MmioSlotError)
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl FromStr for MmioSlot {
    type Err = MmioSlotError;

    fn from_str(text: &str) -> Result<Self, MmioSlotError> {
        Self::new(text.parse().map_err(|_| MmioSlotError)?)
    }
}

impl TryFrom<String> for MmioSlot {
    type Error = MmioSlotError;

    fn try_from(text: String) -> Result<Self, MmioSlotError> {
        text.parse()
    }
}

impl fmt::Display for MmioSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
