//! What a guest's writes leave behind in an overlay.

use super::bar::BarIndex;
use super::power::PowerState;

/// All that a guest's writes have left behind in an overlay: small, of fixed size, to be kept where
/// it outlives the daemon. If it is stored before an operation is answered, a restart of the daemon
/// goes unnoticed even between the two halves of sizing a BAR.
///
/// | bits of the number | |
/// |---|---|
/// | 0-15 | the command register as the guest wrote it |
/// | 16 | the guest has switched the device on |
/// | 17-18 | power state: 0 D0 to 3 D3hot |
/// | 24-30 | BAR 0 to 5 and the ROM: reads give its size |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverlayState {
    /// The command register as the guest wrote it.
    pub(super) command: u16,
    /// Whether a decode bit was set in what the guest wrote last.
    pub(super) enabled: bool,
    /// The power state that the guest has put the device in.
    pub(super) power: PowerState,
    /// A bit for each BAR that reads as its size.
    sizing: u8,
}

const ENABLED: u64 = 1 << 16;
const POWER_SHIFT: u32 = 17;
const SIZING_SHIFT: u32 = 24;
const SIZING: u8 = 0x7f;

impl OverlayState {
    /// As a number, for a file.
    pub const fn to_bits(self) -> u64 {
        self.command as u64
            | if self.enabled { ENABLED } else { 0 }
            | (self.power.to_bits() as u64) << POWER_SHIFT
            | (self.sizing as u64) << SIZING_SHIFT
    }

    /// From such a number. Bits without a meaning are ignored: every number is a state.
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            command: (bits & 0xffff) as u16,
            enabled: bits & ENABLED != 0,
            power: PowerState::from_bits((bits >> POWER_SHIFT) as u16),
            sizing: (bits >> SIZING_SHIFT) as u8 & SIZING,
        }
    }

    /// The state of a device that no guest has touched, with this command register.
    pub(super) const fn untouched(command: u16) -> Self {
        Self::from_bits(command as u64)
    }

    pub(super) const fn is_sizing(&self, bar: BarIndex) -> bool {
        self.sizing & bar.bit() != 0
    }

    pub(super) const fn set_sizing(&mut self, bar: BarIndex, sizing: bool) {
        if sizing {
            self.sizing |= bar.bit();
        } else {
            self.sizing &= !bar.bit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_being_stored_as_a_number() {
        for bits in [
            0,
            0xffff,
            ENABLED,
            0x2_0000,
            0x6_0000,
            0x0100_0000,
            0x4000_0000,
            0x7f07_ffff,
        ] {
            assert_eq!(OverlayState::from_bits(bits).to_bits(), bits, "{bits:#x}");
        }
    }

    #[test]
    fn a_damaged_number_is_still_a_state() {
        assert_eq!(OverlayState::from_bits(u64::MAX).to_bits(), 0x7f07_ffff);
    }
}
