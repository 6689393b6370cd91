//! Configuration space through VFIO.
//!
//! Most of it the kernel passes on or keeps for us. What it leaves to other calls, the enable bits of MSI and MSI-X, is brought there, so
//! that nobody above has to know; and a device that no guest has stays off the bus as a master.

use std::sync::Arc;

use conf_space::overlay::Identity;
use conf_space::registers::header::{self, command};
use conf_space::registers::{msi, msix, power_management};
use conf_space::{AccessError, ConfigSpace, Width};

use super::device::{Controls, Open, Slot};
use super::interrupts::Wiring;

/// A device's configuration space. While the device is closed, accesses fail: EBUSY when it changes hands, or why it could not be opened.
#[derive(Debug)]
pub(super) struct VfioConfig(pub Arc<Slot>);

/// Whether an access reaches a 16-bit register.
fn reaches(register: u16, offset: u16, width: Width) -> bool {
    offset < register.saturating_add(2) && register < offset.saturating_add(width.bytes())
}

/// What a 16-bit register holds after a write that may reach only a part of it.
fn merged(register: u16, before: u16, offset: u16, width: Width, value: u32) -> u16 {
    let value = value.to_le_bytes();
    let mut bytes = before.to_le_bytes();
    for (byte, at) in bytes.iter_mut().zip(register..) {
        let index = at
            .checked_sub(offset)
            .filter(|index| *index < width.bytes());
        if let Some(new) = index.and_then(|index| value.get(usize::from(index))) {
            *byte = *new;
        }
    }
    u16::from_le_bytes(bytes)
}

/// How many vectors an MSI control word enables.
fn msi_vectors(control: u16) -> u16 {
    if control & msi::control::ENABLE == 0 {
        return 0;
    }
    msi::used_vectors(control)
}

fn read_word(open: &Open, offset: u16) -> Result<u16, AccessError> {
    let [low, high, ..] = open.config.read(offset, Width::Two)?.to_le_bytes();
    Ok(u16::from_le_bytes([low, high]))
}

fn failed(error: std::io::Error) -> AccessError {
    AccessError::Failed {
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    }
}

impl VfioConfig {
    fn with<T>(
        &self,
        action: impl FnOnce(&Open) -> Result<T, AccessError>,
    ) -> Result<T, AccessError> {
        if self.0.is_gone() {
            return Err(AccessError::Gone);
        }
        let open = self.0.open.get().map_err(|away| failed(away.into()))?;
        action(&open)
    }

    /// Writes to the open device, whose interrupts nobody resets meanwhile.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_to(
        &self,
        open: &Open,
        wiring: &Wiring,
        offset: u16,
        width: Width,
        value: u32,
    ) -> Result<(), AccessError> {
        let write = || -> Result<bool, AccessError> {
            let switched = switch(open, wiring, offset, width, value)?;
            let concerns_ports = concerns_ports(&open.controls, offset, width);
            let _silent = concerns_ports.then(|| open.silence_ports());
            open.config.write(offset, width, value)?;
            Ok(switched)
        };
        let switched = write();
        // Also when MSI cannot be had, for which the line was switched off.
        let concerns_line =
            reaches(header::COMMAND.offset, offset, width) || !matches!(switched, Ok(false));
        if concerns_line {
            self.0.settle_line(open, wiring);
        }
        switched.map(drop)
    }
}

/// What a device that is closed, or is being reset, reads as to who cannot wait: it is there, has its line, and nothing is on in it.
pub(super) fn closed(identity: &Identity, offset: u16, width: Width) -> u32 {
    let [vendor, vendor_high] = identity.vendor.to_le_bytes();
    let [device, device_high] = identity.device.to_le_bytes();
    let line = identity.interrupt_line;
    let mut value = [0; 4];
    let places = (offset..offset.saturating_add(width.bytes())).zip(&mut value);
    for (at, byte) in places {
        *byte = match at {
            0 => vendor,
            1 => vendor_high,
            2 => device,
            3 => device_high,
            _ if at == header::INTERRUPT_LINE.offset => line,
            _ if at == header::INTERRUPT_PIN.offset => u8::from(line != 0),
            _ => 0,
        };
    }
    u32::from_le_bytes(value)
}

/// Does what a write says to a control word of MSI or MSI-X. `false`: it reaches none. The kernel sets the enable bit of MSI only when it has
/// set MSI up, so this comes before the write; that of MSI-X it sets itself.
fn switch(
    open: &Open,
    wiring: &Wiring,
    offset: u16,
    width: Width,
    value: u32,
) -> Result<bool, AccessError> {
    let control = |register: Option<u16>| -> Result<Option<u16>, AccessError> {
        let Some(register) = register.filter(|register| reaches(*register, offset, width)) else {
            return Ok(None);
        };
        let before = read_word(open, register)?;
        Ok(Some(merged(register, before, offset, width, value)))
    };
    if let Some(control) = control(open.controls.msix)? {
        let on = control & msix::control::ENABLE != 0;
        wiring.set_msix(on).map_err(failed)?;
        return Ok(true);
    }
    if let Some(control) = control(open.controls.msi)? {
        wiring.set_msi(msi_vectors(control)).map_err(failed)?;
        return Ok(true);
    }
    Ok(false)
}

/// Whether a write can have the device stop answering at its I/O ports.
fn concerns_ports(controls: &Controls, offset: u16, width: Width) -> bool {
    let power = controls
        .power
        .and_then(|base| base.checked_add(power_management::CONTROL.offset));
    let mut registers = [Some(header::COMMAND.offset), power].into_iter().flatten();
    registers.any(|register| reaches(register, offset, width))
}

/// Changes bits of the command register.
///
/// # Errors
/// The kernel's.
pub(super) fn change_command(open: &Open, clear: u16, set: u16) -> std::io::Result<()> {
    let register = &header::COMMAND;
    let change = || {
        let before = open.config.read(register.offset, register.width)?;
        let after = before & !u32::from(clear) | u32::from(set);
        if after == before {
            return Ok(());
        }
        open.config.write(register.offset, register.width, after)
    };
    change().map_err(super::device::from_access)
}

impl ConfigSpace for VfioConfig {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        self.with(|open| open.config.read(offset, width))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        let write =
            |value| self.with(|open| self.write_to(open, &open.wiring(), offset, width, value));
        if offset != header::COMMAND.offset {
            return write(value);
        }
        // Whose it is does not change meanwhile: nobody's device stays off the bus.
        let owner = self.0.held_owner();
        match *owner {
            None => write(value & !u32::from(command::BUS_MASTER)),
            Some(_) => write(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_reaches_a_control_word_as_a_whole_in_part_or_not() {
        let merged = |offset, width, value| {
            reaches(0x52, offset, width).then(|| merged(0x52, 0x0180, offset, width, value))
        };
        assert_eq!(merged(0x52, Width::Two, 0x8001), Some(0x8001));
        assert_eq!(merged(0x50, Width::Four, 0x8001_1105), Some(0x8001));
        assert_eq!(merged(0x53, Width::One, 0x80), Some(0x8080));
        assert_eq!(merged(0x52, Width::One, 0x81), Some(0x0181));
        assert_eq!(merged(0x54, Width::Four, u32::MAX), None);
        assert_eq!(merged(0x50, Width::Two, u32::MAX), None);
    }

    #[test]
    fn a_write_that_can_switch_ports_off_is_told_from_others() {
        let controls = Controls {
            power: Some(0x40),
            ..Controls::default()
        };
        let concerns = |offset, width| concerns_ports(&controls, offset, width);
        assert!(concerns(0x04, Width::One) && concerns(0x04, Width::Four));
        assert!(concerns(0x44, Width::Two) && concerns(0x44, Width::Four));
        assert!(!concerns(0x06, Width::Two) && !concerns(0x40, Width::Four));
        let controls = Controls::default();
        assert!(!concerns_ports(&controls, 0x44, Width::Two));
    }

    #[test]
    fn a_closed_device_is_there_with_its_line_and_has_nothing_on() {
        let slot = crate::host::vfio::device::tests::slot("03:00.0".parse().unwrap());
        let identity = Identity {
            interrupt_line: 17,
            ..slot.identity
        };
        let read = |offset, width| closed(&identity, offset, width);
        assert_eq!(read(0, Width::Four), 0x11e8_1234);
        assert_eq!(read(2, Width::Two), 0x11e8);
        assert_eq!(read(1, Width::One), 0x12);
        assert_eq!(read(header::INTERRUPT_LINE.offset, Width::Two), 0x0111);
        for offset in [header::COMMAND.offset, 0x06, 0x34, 0x52] {
            assert_eq!(read(offset, Width::Two), 0);
        }
    }

    #[test]
    fn an_msi_control_word_says_how_many_vectors_are_on() {
        assert_eq!(msi_vectors(0x0180), 0);
        assert_eq!(msi_vectors(0x0181), 1);
        assert_eq!(msi_vectors(0x01d1), 32);
        // Reserved.
        assert_eq!(msi_vectors(0x01f1), 32);
    }
}
