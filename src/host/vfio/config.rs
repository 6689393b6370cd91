//! Configuration space through VFIO.
//!
//! Most of it the kernel passes on or keeps for us. What it leaves to other calls, the enable bits of MSI and MSI-X, is brought there, so
//! that nobody above has to know; and a device that no guest has stays off the bus as a master.

use std::sync::Arc;

use conf_space::registers::header::{self, command};
use conf_space::registers::{msi, msix};
use conf_space::{AccessError, ConfigSpace, Width};

use super::device::{Open, Slot};

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
    let field = msi::control::MULTIPLE_ENABLE;
    let log = (control & field) >> field.trailing_zeros();
    1u16.wrapping_shl(u32::from(log.min(5)))
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
}

/// What a device that is closed reads as to who cannot wait until it is open: it is there, and nothing is on in it.
pub(super) fn closed([vendor, device]: [u16; 2], offset: u16, width: Width) -> u32 {
    let [low, high] = vendor.to_le_bytes();
    let [device_low, device_high] = device.to_le_bytes();
    let known = [low, high, device_low, device_high];
    let mut value = [0; 4];
    let places = (offset..offset.saturating_add(width.bytes())).zip(&mut value);
    for (at, byte) in places {
        *byte = known.get(usize::from(at)).copied().unwrap_or(0);
    }
    u32::from_le_bytes(value)
}

/// Does what a write says to a control word of MSI or MSI-X. `false`: it reaches none. The kernel sets the enable bit of MSI only when it has
/// set MSI up, so this comes before the write; that of MSI-X it sets itself.
fn switch(open: &Open, offset: u16, width: Width, value: u32) -> Result<bool, AccessError> {
    let control = |register: Option<u16>| -> Result<Option<u16>, AccessError> {
        let Some(register) = register.filter(|register| reaches(*register, offset, width)) else {
            return Ok(None);
        };
        let before = read_word(open, register)?;
        Ok(Some(merged(register, before, offset, width, value)))
    };
    if let Some(control) = control(open.controls.msix)? {
        let on = control & msix::control::ENABLE != 0;
        open.wiring.set_msix(on).map_err(failed)?;
        return Ok(true);
    }
    if let Some(control) = control(open.controls.msi)? {
        open.wiring.set_msi(msi_vectors(control)).map_err(failed)?;
        return Ok(true);
    }
    Ok(false)
}

/// Keeps the device from reading and writing memory.
pub(super) fn stop_dma(open: &Open) -> std::io::Result<()> {
    let register = &header::COMMAND;
    let stop = || {
        let value = open.config.read(register.offset, register.width)?;
        let value = value & !u32::from(command::BUS_MASTER);
        open.config.write(register.offset, register.width, value)
    };
    stop().map_err(super::device::from_access)
}

impl ConfigSpace for VfioConfig {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        self.with(|open| open.config.read(offset, width))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        let stays_off = offset == header::COMMAND.offset && self.0.owner().is_none();
        let value = if stays_off {
            value & !u32::from(command::BUS_MASTER)
        } else {
            value
        };
        let switched = self.with(|open| {
            let switched = switch(open, offset, width, value)?;
            open.config.write(offset, width, value)?;
            Ok(switched)
        });
        // Also when MSI cannot be had, for which the line was switched off.
        let concerns_line =
            reaches(header::COMMAND.offset, offset, width) || !matches!(switched, Ok(false));
        if concerns_line && !self.0.is_gone() {
            self.0.settle_line();
        }
        switched.map(drop)
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
    fn a_closed_device_is_there_and_has_nothing_on() {
        let read = |offset, width| closed([0x8086, 0x10d3], offset, width);
        assert_eq!(read(0, Width::Four), 0x10d3_8086);
        assert_eq!(read(2, Width::Two), 0x10d3);
        assert_eq!(read(1, Width::One), 0x80);
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
