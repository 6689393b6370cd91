//! Intel's 82576: a physical function, or a virtual one (its datasheet, 7.8.2 and 8.26: what virtual functions have) with its mailbox to the
//! physical one. Both have the same interrupt registers.

use std::time::Instant;

use super::function::{D0, D3_HOT, set_power};
use super::window::Window;
use super::{Device, PATIENCE, Result, Signal, VENDOR, ports, same, until};

/// Device and vendor ID.
const PHYSICAL: u32 = 0x10c9_8086;
/// What the function itself does not have: its physical one says them.
const VIRTUAL: u32 = 0x10ca_8086;

/// Registers of BAR 0.
mod register {
    pub const CONTROL: u64 = 0x0000;
    pub const STATUS: u64 = 0x0008;
    pub const MAILBOX_MEMORY: u64 = 0x0800;
    pub const MAILBOX: u64 = 0x0c40;
    pub const INTERRUPT_MODE: u64 = 0x1514;
    pub const INTERRUPT_SET: u64 = 0x1520;
    pub const INTERRUPT_ENABLE: u64 = 0x1524;
    pub const INTERRUPT_DISABLE: u64 = 0x1528;
    pub const INTERRUPT_CAUSE: u64 = 0x1580;
}

const CONTROL_RESET: u32 = 1 << 26;
/// Of the physical function's interrupt mode: a vector for each cause. A virtual function has no other.
const MODE_MSIX: u32 = 1 << 4;

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

/// I/O ports of the physical function's BAR 2: which register, and its value.
const PORTS_BAR: u8 = 2;
const PORT_REGISTER: u64 = 0x00;
const PORT_VALUE: u64 = 0x04;

const VECTORS: u32 = 3;
/// Where in BAR 3 the pending bits are.
const PENDING: u64 = 0x2000;

struct Function {
    device: Box<dyn Device>,
    registers: Window,
    ids: u32,
}

pub fn drive_physical(device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    drive(device, PHYSICAL, steps)
}

pub fn drive_virtual(device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    drive(device, VIRTUAL, steps)
}

fn drive(mut device: Box<dyn Device>, ids: u32, steps: &[&str]) -> Result<()> {
    let registers = device.window(0)?;
    let mut function = Function {
        device,
        registers,
        ids,
    };
    for step in steps {
        match *step {
            "identify" => function.identify()?,
            "msix" => function.msix()?,
            "recover" => function.recover()?,
            "deaf" => function.deaf(),
            "ports" if ids == PHYSICAL => function.ports()?,
            "asleep" if ids == PHYSICAL => function.asleep()?,
            "last" if ids == PHYSICAL => function.last()?,
            "reset" if ids == VIRTUAL => function.reset()?,
            _ => return Err(format!("igb cannot '{step}'").into()),
        }
    }
    Ok(())
}

impl Function {
    fn identify(&mut self) -> Result<()> {
        same(
            "vendor and device",
            self.device.config_read(VENDOR, 4)?,
            self.ids,
        )?;
        // The other BAR holds the MSI-X table, which is nobody's to look at, and behind it the pending bits.
        let pending = self.device.window(3)?.read32(PENDING)?;
        same("pending interrupts", pending, 0)
    }

    /// Has the device interrupt by each of its vectors.
    fn msix(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Msix, VECTORS)?;
        self.vectors()
    }

    fn vectors(&mut self) -> Result<()> {
        let all = (1u32 << VECTORS).wrapping_sub(1);
        if self.ids == PHYSICAL {
            self.registers
                .write32(register::INTERRUPT_MODE, MODE_MSIX)?;
        }
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

    /// Waits for an error of the device, which it says, recovers from it as it is asked to, and uses the interrupts that it had before.
    fn recover(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Msix, VECTORS)?;
        super::recover(&mut *self.device)?;
        self.identify()?;
        self.vectors()?;
        println!("recovered");
        Ok(())
    }

    /// Has the device, and hears of nothing.
    fn deaf(&self) {
        println!("waiting");
        std::thread::sleep(PATIENCE);
    }

    /// Reads and writes through ports what is in memory, too.
    fn ports(&mut self) -> Result<()> {
        let ports = ports(&mut *self.device, PORTS_BAR)?;
        let registers = &self.registers;
        let select = |register: u64| ports.write32(PORT_REGISTER, register as u32);
        for register in [register::CONTROL, register::STATUS] {
            select(register)?;
            same(
                "the register selected",
                ports.read32(PORT_REGISTER)?,
                register as u32,
            )?;
            let expected = registers.read32(register)?;
            same("a register", ports.read32(PORT_VALUE)?, expected)?;
        }
        select(register::INTERRUPT_MODE)?;
        let before = registers.read32(register::INTERRUPT_MODE)?;
        for mode in [before ^ MODE_MSIX, before] {
            ports.write32(PORT_VALUE, mode)?;
            let found = registers.read32(register::INTERRUPT_MODE)?;
            same("what was written", found, mode)?;
        }
        Ok(())
    }

    /// While it sleeps it answers neither in memory nor at ports.
    fn asleep(&mut self) -> Result<()> {
        let ports = ports(&mut *self.device, PORTS_BAR)?;
        set_power(&mut *self.device, D3_HOT)?;
        for window in [&self.registers, &ports] {
            fails(window, libc::EIO)?;
        }
        set_power(&mut *self.device, D0)?;
        ports.read32(PORT_REGISTER).map(drop)
    }

    /// Uses the ports until they are the guest's no more, and says so.
    fn last(&mut self) -> Result<()> {
        let ports = ports(&mut *self.device, PORTS_BAR)?;
        println!("using");
        let begin = Instant::now();
        while ports.read32(PORT_REGISTER).is_ok() {
            if begin.elapsed() > PATIENCE {
                return Err("the device has not gone".into());
            }
        }
        fails(&ports, libc::EPERM)?;
        println!("gone");
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

/// That an access fails, for that reason.
fn fails(window: &Window, errno: i32) -> Result<()> {
    let error = window.door.read(0, 4).err().ok_or("it answers")?;
    let error = error.downcast::<std::io::Error>()?;
    same("the error", error.raw_os_error().unwrap_or(0), errno)
}
