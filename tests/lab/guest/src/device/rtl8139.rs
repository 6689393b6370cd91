//! Realtek's RTL8139 (its datasheet, 5): registers of all widths, at I/O ports and in memory. Of all it can do, only that both are the same.

use super::window::Window;
use super::{Device, Result, VENDOR, ports, same};

/// Device and vendor ID.
const IDS: u32 = 0x8139_10ec;

const PORTS_BAR: u8 = 0;
const MEMORY_BAR: u8 = 1;

/// The network address, of 6 bytes; 8 bytes that select multicasts; of a word, which interrupts there are; the version, among what is for sending.
const ADDRESS: u64 = 0x00;
const MULTICAST: u64 = 0x08;
const INTERRUPT_MASK: u64 = 0x3c;
const SENDING: u64 = 0x40;

pub fn drive(mut device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    same("vendor and device", device.config_read(VENDOR, 4)?, IDS)?;
    let ports = ports(&mut *device, PORTS_BAR)?;
    let memory = device.window(MEMORY_BAR)?;
    for step in steps {
        match *step {
            "ports" => widths(&ports, &memory)?,
            _ => return Err(format!("rtl8139 cannot '{step}'").into()),
        }
    }
    Ok(())
}

/// Reads by every width what memory has, too, and writes what memory has then, and nothing beside it.
fn widths(ports: &Window, memory: &Window) -> Result<()> {
    let equal = |offset, width| {
        let expected = memory.door.read(offset, width)?;
        same("a register", ports.door.read(offset, width)?, expected)
    };
    for offset in ADDRESS..6 {
        equal(offset, 1)?;
    }
    equal(ADDRESS, 2)?;
    equal(ADDRESS, 4)?;
    equal(SENDING, 4)?;
    same("an address", ports.door.read(ADDRESS, 2)?, 0x5452)?;
    let write = |within: u64, width, value| {
        let offset = MULTICAST.saturating_add(within);
        ports.door.write(offset, width, value)
    };
    write(0, 4, 0x1122_3344)?;
    write(4, 4, 0x5566_7788)?;
    write(1, 1, 0xaa)?;
    write(6, 2, 0xbbcc)?;
    let first = memory.door.read(MULTICAST, 4)?;
    let second = memory.door.read(MULTICAST.saturating_add(4), 4)?;
    same("the first half", first, 0x1122_aa44)?;
    same("the second half", second, 0xbbcc_7788)?;
    ports.door.write(INTERRUPT_MASK, 2, 0x0005)?;
    same("the mask", memory.door.read(INTERRUPT_MASK, 2)?, 0x0005)?;
    ports.door.write(INTERRUPT_MASK, 2, 0)
}
