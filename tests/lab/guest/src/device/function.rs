//! What all functions have (PCI Local Bus Specification 3.0, 6; PCI Bus Power Management Interface Specification 1.2, 3.2), whatever they are.

use std::io::Write;
use std::time::Duration;

use super::{COMMAND, COMMAND_ON, Device, Result, VENDOR, same};

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u32 = 1 << 4;
const ROM: u16 = 0x30;
const ROM_ENABLE: u32 = 1 << 0;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_PIN: u16 = 0x3d;

/// The number that the expansion ROM has among the BARs.
const ROM_BAR: u8 = 6;
/// What an expansion ROM begins with, and behind it its size in blocks.
const ROM_SIGNATURE: u32 = 0xaa55;
const ROM_BLOCK: u32 = 512;

const POWER_MANAGEMENT: u32 = 0x01;
/// Of that capability: control and status, in which the state is.
const POWER_CONTROL: u16 = 4;
const POWER_STATE: u32 = 0b11;
pub(super) const D0: u32 = 0;
pub(super) const D3_HOT: u32 = 3;
/// Nobody looks at a function for so long after a change of its state (5.6.1).
const SETTLE: Duration = Duration::from_millis(20);

pub fn drive(mut device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    for step in steps {
        match *step {
            "ids" => println!("{:08x}", device.config_read(VENDOR, 4)?),
            "answers" => answers(&mut *device)?,
            "nopin" => same("the pin", device.config_read(INTERRUPT_PIN, 1)?, 0)?,
            "rom" => rom(&mut *device)?,
            "sleep" => set_power(&mut *device, D3_HOT)?,
            "wake" => set_power(&mut *device, D0)?,
            _ => return Err(format!("a function cannot '{step}'").into()),
        }
    }
    Ok(())
}

/// That its first register is one.
fn answers(device: &mut dyn Device) -> Result<()> {
    match device.window(0)?.read32(0)? {
        u32::MAX => Err("its first register reads as if nobody were there".into()),
        _ => Ok(()),
    }
}

/// Writes what is in the expansion ROM to the standard output.
fn rom(device: &mut dyn Device) -> Result<()> {
    let window = device.window(ROM_BAR)?;
    let register = device.config_read(ROM, 4)?;
    // As a driver does. What comes of it is the host's affair.
    device.config_write(ROM, 4, register | ROM_ENABLE)?;
    let first = window.read32(0)?;
    same("the ROM's signature", first & 0xffff, ROM_SIGNATURE)?;
    let size = (first >> 16 & 0xff).saturating_mul(ROM_BLOCK);
    let mut content = Vec::new();
    for offset in (0..u64::from(size)).step_by(8) {
        content.extend(window.read64(offset)?.to_le_bytes());
    }
    std::io::stdout().write_all(&content)?;
    device.config_write(ROM, 4, register)
}

fn capability(device: &mut dyn Device, id: u32) -> Result<u16> {
    if device.config_read(STATUS, 2)? & STATUS_CAPABILITIES == 0 {
        return Err("it has no capabilities".into());
    }
    let mut at = device.config_read(CAPABILITIES, 1)?;
    while at != 0 {
        let offset = u16::try_from(at)?;
        let header = device.config_read(offset, 2)?;
        if header & 0xff == id {
            return Ok(offset);
        }
        at = header >> 8;
    }
    Err(format!("it has no capability {id:#x}").into())
}

/// Changes the power state. A function that is awake decodes memory and masters the bus as before.
pub(super) fn set_power(device: &mut dyn Device, state: u32) -> Result<()> {
    let register = capability(device, POWER_MANAGEMENT)?.saturating_add(POWER_CONTROL);
    let control = device.config_read(register, 2)?;
    device.config_write(register, 2, control & !POWER_STATE | state)?;
    std::thread::sleep(SETTLE);
    let found = device.config_read(register, 2)? & POWER_STATE;
    same("the power state", found, state)?;
    if state == D0 {
        let command = device.config_read(COMMAND, 2)?;
        same("the command register", command & COMMAND_ON, COMMAND_ON)?;
    }
    Ok(())
}
