//! Where on the guest's first bus a device is.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A slot of the guest's first bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Slot(u8);

/// A text is not a slot that can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Not a number.
    #[error("a slot is a hexadecimal number from 02 to 1f")]
    Form,
    /// The chipset is there.
    #[error(
        "slots 0 and 1 are the chipset's: choose one from 02 to 1f, 1f downwards to be clear of QEMU's devices"
    )]
    Chipset,
}

impl Slot {
    /// All that are not the chipset's.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (2..=0x1f).map(Self)
    }

    /// A slot with this number.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn new(number: u8) -> Result<Self, SlotError> {
        match number {
            0 | 1 => Err(SlotError::Chipset),
            2..=0x1f => Ok(Self(number)),
            _ => Err(SlotError::Form),
        }
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl FromStr for Slot {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        let number = u8::from_str_radix(text, 16).map_err(|_| SlotError::Form)?;
        Self::new(number)
    }
}

impl TryFrom<String> for Slot {
    type Error = SlotError;

    fn try_from(text: String) -> Result<Self, SlotError> {
        text.parse()
    }
}

impl From<Slot> for String {
    fn from(slot: Slot) -> Self {
        format!("{:02x}", slot.number())
    }
}
