//! QEMU's standard VGA (QEMU, docs/specs/standard-vga.rst): its frame buffer, and the registers of Bochs' display interface in memory. Of VGA itself
//! it has ports and memory at fixed addresses, which are no BAR's.

use super::window::Window;
use super::{Device, PAGE, Result, VENDOR, same};

/// Device and vendor ID.
const IDS: u32 = 0x1111_1234;

const FRAME_BUFFER: u8 = 0;
const REGISTERS: u8 = 2;

/// Where Bochs' registers are, 2 bytes each, by their numbers.
const BOCHS: u64 = 0x500;
mod bochs {
    pub const ID: u64 = 0;
    pub const WIDTH: u64 = 1;
    pub const HEIGHT: u64 = 2;
    pub const DEPTH: u64 = 3;
    pub const ENABLE: u64 = 4;
}
/// The versions of the interface; the last figure is 0 to 5.
const VERSIONS: u64 = 0xb0c0;
/// On, with a frame buffer that is one piece.
const ENABLED: u64 = 0x41;

struct Vga {
    frame_buffer: Window,
    registers: Window,
}

pub fn drive(mut device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    same("vendor and device", device.config_read(VENDOR, 4)?, IDS)?;
    let vga = Vga {
        frame_buffer: device.window(FRAME_BUFFER)?,
        registers: device.window(REGISTERS)?,
    };
    for step in steps {
        match *step {
            "mode" => vga.mode()?,
            "draw" => vga.draw()?,
            "mapped" => vga.mapped()?,
            _ => return Err(format!("vga cannot '{step}'").into()),
        }
    }
    Ok(())
}

fn register(number: u64) -> u64 {
    BOCHS.saturating_add(number.saturating_mul(2))
}

impl Vga {
    /// Sets a mode.
    fn mode(&self) -> Result<()> {
        let registers = &self.registers.door;
        let version = registers.read(register(bochs::ID), 2)?;
        same("the interface", version & !0xf, VERSIONS)?;
        registers.write(register(bochs::ENABLE), 2, 0)?;
        let mode = [
            (bochs::WIDTH, 800),
            (bochs::HEIGHT, 600),
            (bochs::DEPTH, 32),
            (bochs::ENABLE, ENABLED),
        ];
        for (number, value) in mode {
            registers.write(register(number), 2, value)?;
        }
        for (number, value) in mode {
            let found = registers.read(register(number), 2)?;
            same("a register of the mode", found, value)?;
        }
        Ok(())
    }

    /// Writes to the first pages of the frame buffer, and reads all of it.
    fn draw(&self) -> Result<()> {
        let pixel = |offset: u64| (offset as u32).wrapping_mul(0x9e37_79b9);
        let places = || (0..8 * PAGE).step_by(256);
        for offset in places() {
            self.frame_buffer.write32(offset, pixel(offset))?;
        }
        for offset in places() {
            same("a pixel", self.frame_buffer.read32(offset)?, pixel(offset))?;
            // The same by an access that somebody else does, if it is mapped.
            let trapped = self.frame_buffer.door.read(offset, 4)?;
            same("a pixel", trapped, pixel(offset).into())?;
        }
        Ok(())
    }

    /// That the frame buffer is mapped, in one piece.
    fn mapped(&self) -> Result<()> {
        match self.frame_buffer.areas.as_slice() {
            [area] if area.start == 0 && area.size >= 8 * PAGE => Ok(()),
            _ => Err("the frame buffer is not mapped".into()),
        }
    }
}
