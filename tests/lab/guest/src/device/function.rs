//! What all functions have (PCI Local Bus Specification 3.0, 6; PCI Bus Power Management Interface Specification 1.2, 3.2), whatever they are.

use std::io::Write;
use std::time::Duration;

use super::{COMMAND, COMMAND_ON, Device, PAGE, Result, VENDOR, same};

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

/// Ids of capabilities (PCI 3.0, appendix H).
const MSIX: u32 = 0x11;
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
            "split" => split(&mut *device)?,
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

/// A place in a BAR, as a register says it (PCI 3.0, 6.8.2.4).
pub(super) struct Place {
    pub bar: u8,
    pub offset: u64,
}

impl Place {
    fn read(device: &mut dyn Device, register: u16) -> Result<Self> {
        let location = device.config_read(register, 4)?;
        Ok(Self {
            bar: u8::try_from(location & 7)?,
            offset: u64::from(location & !7),
        })
    }
}

/// Bytes of an entry of the MSI-X table.
pub(super) const ENTRY: u64 = 16;

/// What the MSI-X capability says.
pub(super) struct Msix {
    pub vectors: u32,
    pub table: Place,
    pub pending: Place,
}

impl Msix {
    pub fn find(device: &mut dyn Device) -> Result<Self> {
        let base = capability(device, MSIX)?;
        let control = device.config_read(base.saturating_add(2), 2)?;
        Ok(Self {
            vectors: (control & 0x7ff).saturating_add(1),
            table: Place::read(device, base.saturating_add(4))?,
            pending: Place::read(device, base.saturating_add(8))?,
        })
    }
}

/// That registers are mapped, but neither the MSI-X table nor its pending bits, nor what shares a page with them.
fn split(device: &mut dyn Device) -> Result<()> {
    let Msix {
        vectors,
        table,
        pending,
    } = Msix::find(device)?;
    let vectors = u64::from(vectors);
    let kept = [
        (table, vectors.saturating_mul(ENTRY)),
        // 64 of them at a time.
        (pending, vectors.div_ceil(64).saturating_mul(8)),
    ];
    for (place, size) in kept {
        let window = device.window(place.bar)?;
        if window.areas.is_empty() {
            return Err(format!("nothing of BAR {} is mapped", place.bar).into());
        }
        let end = place.offset.saturating_add(size);
        let kept = place.offset / PAGE..end.div_ceil(PAGE);
        for area in &window.areas {
            let pages = area.start / PAGE..area.start.saturating_add(area.size).div_ceil(PAGE);
            if pages.start < kept.end && kept.start < pages.end {
                return Err(format!(
                    "of BAR {}, the pages {pages:?} are mapped, and {kept:?} are MSI-X's",
                    place.bar
                )
                .into());
            }
        }
    }
    if device.window(0)?.areas.is_empty() {
        return Err("no register is mapped".into());
    }
    Ok(())
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
