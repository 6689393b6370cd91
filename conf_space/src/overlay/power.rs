//! Power management: states, and the control and status register.

use std::time::Duration;

use super::{OpError, Operation};
use crate::access::{AccessError, ConfigSpace, Width};
use crate::registers::power_management::{CONTROL, capabilities, control};

/// Power state of a function (PCI Bus Power Management Interface Specification 1.2, section 3.2.4).
/// Orders from most power to least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PowerState {
    /// Fully on.
    D0,
    /// Light sleep.
    D1,
    /// Deeper sleep.
    D2,
    /// Off but for the configuration space.
    D3Hot,
}

impl PowerState {
    /// As in the lowest two bits of the control and status register; the others are not looked at.
    pub const fn from_bits(bits: u16) -> Self {
        match bits & control::POWER_STATE {
            0 => Self::D0,
            1 => Self::D1,
            2 => Self::D2,
            _ => Self::D3Hot,
        }
    }

    pub(super) const fn to_bits(self) -> u16 {
        match self {
            Self::D0 => 0,
            Self::D1 => 1,
            Self::D2 => 2,
            Self::D3Hot => 3,
        }
    }
}

/// A change of power state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerChange {
    /// State before.
    pub from: PowerState,
    /// State now.
    pub to: PowerState,
    /// The device has lost its configuration on the way (D3hot to D0 without No_Soft_Reset):
    /// restore configuration and MSI, after [`PowerChange::settle_time`].
    pub configuration_lost: bool,
}

impl PowerChange {
    /// How long nobody may access the device after the change (PCI Express Base Specification
    /// 6.0, section 5.9).
    pub fn settle_time(&self) -> Duration {
        match self.from.max(self.to) {
            PowerState::D3Hot => Duration::from_millis(10),
            PowerState::D2 => Duration::from_micros(200),
            PowerState::D0 | PowerState::D1 => Duration::ZERO,
        }
    }
}

/// The control and status register of one function.
#[derive(Debug, Clone, Copy)]
pub(super) struct PowerControl {
    offset: u16,
    has_d1: bool,
    has_d2: bool,
}

impl PowerControl {
    pub(super) const fn new(base: u16, capabilities: u16) -> Self {
        Self {
            offset: CONTROL.at(base).offset,
            has_d1: capabilities & capabilities::D1 != 0,
            has_d2: capabilities & capabilities::D2 != 0,
        }
    }

    pub(super) fn disable_pme<C: ConfigSpace + ?Sized>(
        &self,
        space: &C,
    ) -> Result<(), AccessError> {
        let enable = u32::from(control::PME_ENABLE);
        let value = space.read(self.offset, Width::Two)?;
        if value & enable == 0 {
            return Ok(());
        }
        space.write(
            self.offset,
            Width::Two,
            value & !enable & !u32::from(control::PME_STATUS),
        )
    }

    /// The guest controls the power state, what the data register shows, and can clear PME_Status.
    pub(super) fn write<C: ConfigSpace + ?Sized>(
        &self,
        operation: &mut Operation<'_, C>,
        value: u16,
    ) -> Result<(), OpError> {
        let guests = control::POWER_STATE | control::DATA_SELECT | control::PME_STATUS;
        let hardware = operation.read_word(self.offset)?;
        // If the daemon died between waking the device and restoring its configuration, only the
        // stored state still tells that there is something to restore.
        let from = operation.state.power.max(PowerState::from_bits(hardware));
        let to = PowerState::from_bits(value);
        if !self.can_change(from, to) {
            return Err(OpError::AccessDenied);
        }
        let wanted = (hardware & !guests) | (value & guests);
        if wanted != hardware & !control::PME_STATUS {
            operation.write_word(self.offset, wanted)?;
        }
        operation.state.power = to;
        if from != to {
            let configuration_lost = from == PowerState::D3Hot
                && to == PowerState::D0
                && hardware & control::NO_SOFT_RESET == 0;
            operation.effect.power = Some(PowerChange {
                from,
                to,
                configuration_lost,
            });
        }
        Ok(())
    }

    /// Puts a device that the guest has sent to sleep into D0.
    pub(super) fn wake<C: ConfigSpace + ?Sized>(
        &self,
        operation: &mut Operation<'_, C>,
    ) -> Result<(), OpError> {
        if operation.state.power == PowerState::D0 {
            return Ok(());
        }
        let hardware = operation.read_word(self.offset)?;
        self.write(
            operation,
            (hardware & control::DATA_SELECT) | PowerState::D0.to_bits(),
        )
    }

    /// Any state can be left for D0, and D0 or a lighter sleep for a deeper one that there is.
    fn can_change(&self, from: PowerState, to: PowerState) -> bool {
        match to {
            PowerState::D0 => true,
            _ if from == to => true,
            _ if from > to => false,
            PowerState::D1 => self.has_d1,
            PowerState::D2 => self.has_d2,
            PowerState::D3Hot => true,
        }
    }
}
