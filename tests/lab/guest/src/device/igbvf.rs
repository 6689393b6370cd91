//! A virtual function of Intel's 82576 (its datasheet, 7.8.2 and 8.26: what virtual functions have), and its mailbox to the physical one.

use super::window::Window;
use super::{Device, PATIENCE, Result, Signal, VENDOR, same, until};

/// Device and vendor ID, which the function itself does not have: its physical one says them.
const IDS: u32 = 0x10ca_8086;

/// Registers of BAR 0.
mod register {
    pub const CONTROL: u64 = 0x0000;
    pub const MAILBOX_MEMORY: u64 = 0x0800;
    pub const MAILBOX: u64 = 0x0c40;
    pub const INTERRUPT_SET: u64 = 0x1520;
    pub const INTERRUPT_ENABLE: u64 = 0x1524;
    pub const INTERRUPT_DISABLE: u64 = 0x1528;
    pub const INTERRUPT_CAUSE: u64 = 0x1580;
}

const CONTROL_RESET: u32 = 1 << 26;

/// Of the mailbox: a message for the physical function; its answer was taken; the buffer is mine; the physical function has written; it has
/// taken what was sent; it resets itself; it is done with that.
const REQUEST: u32 = 1 << 0;
const TAKEN: u32 = 1 << 1;
const MINE: u32 = 1 << 2;
const WRITTEN: u32 = 1 << 4;
const ACCEPTED: u32 = 1 << 5;
const IN_RESET: u32 = 1 << 6;
const RESET_DONE: u32 = 1 << 7;

/// The message that a function which was reset begins with, and the mark of one that was granted.
const RESET_MESSAGE: u32 = 1;
const GRANTED: u32 = 1 << 31;

const VECTORS: u32 = 3;
/// Where in BAR 3 the pending bits are.
const PENDING: u64 = 0x2000;

struct Function {
    device: Box<dyn Device>,
    registers: Window,
}

pub fn drive(mut device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    let registers = device.window(0)?;
    let mut function = Function { device, registers };
    for step in steps {
        match *step {
            "identify" => function.identify()?,
            "msix" => function.msix()?,
            "reset" => function.reset()?,
            _ => return Err(format!("igbvf cannot '{step}'").into()),
        }
    }
    Ok(())
}

impl Function {
    fn identify(&mut self) -> Result<()> {
        same(
            "vendor and device",
            self.device.config_read(VENDOR, 4)?,
            IDS,
        )?;
        // The other BAR holds the MSI-X table, which is nobody's to look at, and behind it the pending bits.
        let pending = self.device.window(3)?.read32(PENDING)?;
        same("pending interrupts", pending, 0)
    }

    /// Has the device interrupt by each of its vectors.
    fn msix(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Msix, VECTORS)?;
        let all = (1u32 << VECTORS).wrapping_sub(1);
        self.registers.write32(register::INTERRUPT_DISABLE, all)?;
        self.registers.read32(register::INTERRUPT_CAUSE)?;
        self.registers.write32(register::INTERRUPT_ENABLE, all)?;
        for vector in 0..VECTORS {
            self.registers
                .write32(register::INTERRUPT_SET, 1 << vector)?;
            if !self.device.wait(vector as usize, PATIENCE)? {
                return Err(format!("no interrupt by vector {vector}").into());
            }
            self.registers
                .write32(register::INTERRUPT_CAUSE, 1 << vector)?;
            self.registers.write32(register::INTERRUPT_ENABLE, all)?;
        }
        Ok(())
    }

    /// Resets itself, tells the physical function's driver, and gets its network address from it, which is printed.
    fn reset(&self) -> Result<()> {
        let registers = &self.registers;
        registers.write32(register::CONTROL, CONTROL_RESET)?;
        until("the physical function is done with the reset", || {
            Ok(registers.read32(register::MAILBOX)? & (IN_RESET | RESET_DONE) == 0)
        })?;
        // Reading the mailbox takes its events away: each is looked for once.
        registers.write32(register::MAILBOX, MINE)?;
        same(
            "the mailbox's owner",
            registers.read32(register::MAILBOX)? & MINE,
            MINE,
        )?;
        registers.write32(register::MAILBOX_MEMORY, RESET_MESSAGE)?;
        registers.write32(register::MAILBOX, REQUEST)?;
        let mut seen = 0;
        until("the physical function answers", || {
            seen |= registers.read32(register::MAILBOX)?;
            Ok(seen & WRITTEN != 0 && seen & ACCEPTED != 0)
        })?;
        same(
            "the answer",
            registers.read32(register::MAILBOX_MEMORY)?,
            RESET_MESSAGE | GRANTED,
        )?;
        let mut address = Vec::new();
        for word in [4, 8] {
            let word = registers.read32(register::MAILBOX_MEMORY.saturating_add(word))?;
            address.extend(word.to_le_bytes());
        }
        registers.write32(register::MAILBOX, TAKEN)?;
        let address: Vec<_> = address
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        println!("address {}", address.join(":"));
        Ok(())
    }
}
