//! An NVMe disk (NVM Express 1.4): the admin queue, and one I/O queue, each with an MSI-X vector of its own.

use std::io::Write;

use super::function::{self, Msix};
use super::window::Window;
use super::{Device, PAGE, PATIENCE, Result, Signal, same, until};
use crate::memory::Memory;

/// Registers of the controller (3.1).
mod register {
    pub const CAPABILITIES: u64 = 0x00;
    pub const CONFIGURATION: u64 = 0x14;
    pub const STATUS: u64 = 0x1c;
    pub const ADMIN_QUEUES: u64 = 0x24;
    pub const ADMIN_SUBMISSION: u64 = 0x28;
    pub const ADMIN_COMPLETION: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

/// Of the configuration register: on, with submission entries of 2^6 and completion entries of 2^4 bytes.
const ENABLE: u32 = 1 | 6 << 16 | 4 << 20;
const READY: u32 = 1 << 0;
/// Of a completion's last double word: the phase, and behind it the status.
const PHASE: u32 = 1 << 16;
const STATUS_SHIFT: u32 = 17;

/// Operations of the admin queue (5) and of I/O queues (6).
mod admin {
    pub const CREATE_SUBMISSION: u32 = 0x01;
    pub const CREATE_COMPLETION: u32 = 0x05;
    pub const IDENTIFY: u32 = 0x06;
}
mod io {
    pub const WRITE: u32 = 0x01;
    pub const READ: u32 = 0x02;
}

/// Entries of each queue.
const ENTRIES: u32 = 16;
const SUBMISSION_SIZE: u64 = 64;
const COMPLETION_SIZE: u64 = 16;
/// Where in the memory what is.
const QUEUES: u64 = 0;
const BUFFER: u64 = 0x8000;
const SECOND_BUFFER: u64 = 0x9000;

/// Blocks of the lab's disk, which a page has 8 of.
const BLOCK: u64 = 512;
const BLOCKS_OF_A_PAGE: u32 = 8;
/// Where on the disk the driver writes: the first MiB stays.
const WRITTEN: u32 = 4096;

/// A submission queue and its completion queue, of the same number; it interrupts by the vector of that number.
struct Queue {
    number: u32,
    submitted: u32,
    completed: u32,
    phase: u32,
}

impl Queue {
    fn new(number: u32) -> Self {
        Self {
            number,
            submitted: 0,
            completed: 0,
            phase: PHASE,
        }
    }

    /// Where in the memory submissions are; completions are a page behind.
    fn submissions(&self) -> u64 {
        QUEUES.saturating_add(u64::from(self.number).saturating_mul(PAGE.saturating_mul(2)))
    }

    fn completions(&self) -> u64 {
        self.submissions().saturating_add(PAGE)
    }
}

/// A command, of which all that is not said is 0.
#[derive(Default)]
struct Command {
    operation: u32,
    namespace: u32,
    buffer: u64,
    words: [u32; 3],
}

/// Device and vendor ID of QEMU's.
pub(super) const IDS: u32 = 0x0010_1b36;

pub(super) struct Nvme {
    device: Box<dyn Device>,
    registers: Window,
    stride: u64,
    admin: Queue,
    io: Queue,
}

pub fn drive(device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    let mut nvme = Nvme::start(device)?;
    for step in steps {
        match *step {
            "identify" => nvme.identify()?,
            "write" => nvme.write()?,
            "first" => nvme.first()?,
            "table" => nvme.table()?,
            _ => return Err(format!("nvme cannot '{step}'").into()),
        }
    }
    nvme.stop()
}

impl Nvme {
    /// Brings the disk up.
    pub fn start(mut device: Box<dyn Device>) -> Result<Self> {
        let registers = device.window(0)?;
        let mut nvme = Self {
            device,
            registers,
            stride: 0,
            admin: Queue::new(0),
            io: Queue::new(1),
        };
        nvme.start_controller()?;
        Ok(nvme)
    }

    pub fn memory(&self) -> &Memory {
        self.device.memory()
    }

    /// Looks at the MSI-X table, which on bare VFIO is not to be read: the entries that are in use have a message, the others are masked.
    fn table(&mut self) -> Result<()> {
        const IN_USE: u32 = 2;
        let msix = Msix::find(&mut *self.device)?;
        let window = self.device.window(msix.table.bar)?;
        let mut at = msix.table.offset;
        for entry in 0..msix.vectors {
            let (message, mask) = (window.read32(at)?, window.read32(at.saturating_add(12))?);
            let expected = u32::from(entry >= IN_USE);
            same("mask", mask, expected)?;
            same("message", u32::from(message == 0), expected)?;
            at = at.saturating_add(function::ENTRY);
        }
        Ok(())
    }

    pub fn stop(&self) -> Result<()> {
        self.registers.write32(register::CONFIGURATION, 0)?;
        until("the controller stops", || {
            Ok(self.registers.read32(register::STATUS)? & READY == 0)
        })
    }

    /// Brings the controller up with its admin queue, and makes the I/O queue.
    fn start_controller(&mut self) -> Result<()> {
        self.stop()?;
        let capabilities = self.registers.read64(register::CAPABILITIES)?;
        self.stride = 4u64.wrapping_shl((capabilities >> 32 & 0xf) as u32);
        self.device.interrupts(Signal::Msix, 2)?;
        let last = ENTRIES.saturating_sub(1);
        let (submissions, completions) = (self.admin.submissions(), self.admin.completions());
        let place = |offset| self.memory().physical(offset);
        self.registers
            .write32(register::ADMIN_QUEUES, last << 16 | last)?;
        self.registers
            .write64(register::ADMIN_SUBMISSION, place(submissions))?;
        self.registers
            .write64(register::ADMIN_COMPLETION, place(completions))?;
        self.registers.write32(register::CONFIGURATION, ENABLE)?;
        until("the controller starts", || {
            Ok(self.registers.read32(register::STATUS)? & READY != 0)
        })?;
        let (submissions, completions) = (self.io.submissions(), self.io.completions());
        let number = last << 16 | 1;
        // Contiguous, and interrupts by vector 1.
        self.ask(Command {
            operation: admin::CREATE_COMPLETION,
            buffer: self.memory().physical(completions),
            words: [number, 1 << 16 | 1 << 1 | 1, 0],
            ..Command::default()
        })?;
        // Contiguous, and completes to queue 1.
        self.ask(Command {
            operation: admin::CREATE_SUBMISSION,
            buffer: self.memory().physical(submissions),
            words: [number, 1 << 16 | 1, 0],
            ..Command::default()
        })
    }

    fn ask(&mut self, command: Command) -> Result<()> {
        run(
            &mut *self.device,
            &self.registers,
            self.stride,
            &mut self.admin,
            &command,
        )
    }

    fn transfer(&mut self, operation: u32, block: u32, buffer: u64) -> Result<()> {
        let command = Command {
            operation,
            namespace: 1,
            buffer: self.memory().physical(buffer),
            words: [block, 0, BLOCKS_OF_A_PAGE.saturating_sub(1)],
        };
        run(
            &mut *self.device,
            &self.registers,
            self.stride,
            &mut self.io,
            &command,
        )
    }

    /// What the controller says of itself, and of its namespace.
    fn identify(&mut self) -> Result<()> {
        let identify = |namespace, which| Command {
            operation: admin::IDENTIFY,
            namespace,
            buffer: super::memory::ADDRESS.saturating_add(BUFFER),
            words: [which, 0, 0],
        };
        self.ask(identify(0, 1))?;
        let serial = self.memory().bytes(BUFFER.saturating_add(4), 20);
        let serial = String::from_utf8_lossy(&serial);
        if serial.trim() != "nvme" {
            return Err(format!("the disk's serial number is '{serial}'").into());
        }
        self.ask(identify(1, 0))?;
        let blocks = self.memory().get32(BUFFER);
        same("blocks", blocks, 8 * 2048)
    }

    /// Writes a page of blocks that say which they are, and reads it back into another.
    pub fn write(&mut self) -> Result<()> {
        for round in 0..20 {
            let block = WRITTEN.saturating_add(BLOCKS_OF_A_PAGE.saturating_mul(round));
            for (number, place) in (block..).zip((0..PAGE).step_by(BLOCK as usize)) {
                let text = format!("written by lab-guest: block {number}\n");
                let padded = text
                    .bytes()
                    .chain(std::iter::repeat(0))
                    .take(BLOCK as usize);
                self.memory().fill(BUFFER.saturating_add(place), padded);
            }
            self.memory().fill(SECOND_BUFFER, [0xff; PAGE as usize]);
            self.transfer(io::WRITE, block, BUFFER)?;
            self.transfer(io::READ, block, SECOND_BUFFER)?;
            if self.memory().bytes(BUFFER, PAGE) != self.memory().bytes(SECOND_BUFFER, PAGE) {
                return Err(format!("block {block}: what was read is not what was written").into());
            }
        }
        Ok(())
    }

    /// Writes a page of the memory to the disk, and reads it back into another.
    pub fn through(&mut self, from: u64, to: u64) -> Result<()> {
        self.transfer(io::WRITE, WRITTEN, from)?;
        self.transfer(io::READ, WRITTEN, to)
    }

    fn first(&mut self) -> Result<()> {
        for block in (0..2048).step_by(BLOCKS_OF_A_PAGE as usize) {
            self.transfer(io::READ, block, BUFFER)?;
            std::io::stdout().write_all(&self.memory().bytes(BUFFER, PAGE))?;
        }
        Ok(())
    }
}

/// Has a command carried out, and waits for its interrupt.
fn run(
    device: &mut dyn Device,
    registers: &Window,
    stride: u64,
    queue: &mut Queue,
    command: &Command,
) -> Result<()> {
    let at = |index: u32, size: u64| u64::from(index).saturating_mul(size);
    let next = |index: u32| index.wrapping_add(1) % ENTRIES;
    let place = queue
        .submissions()
        .saturating_add(at(queue.submitted, SUBMISSION_SIZE));
    let memory = device.memory();
    memory.fill(place, [0; SUBMISSION_SIZE as usize]);
    memory.set32(place, command.operation | queue.submitted << 16);
    memory.set32(place.saturating_add(4), command.namespace);
    memory.set64(place.saturating_add(24), command.buffer);
    for (word, offset) in command.words.iter().zip((40u64..).step_by(4)) {
        memory.set32(place.saturating_add(offset), *word);
    }
    let doorbell = |index: u32| register::DOORBELLS.saturating_add(at(index, stride));
    queue.submitted = next(queue.submitted);
    registers.write32(doorbell(queue.number << 1), queue.submitted)?;
    let place = queue
        .completions()
        .saturating_add(at(queue.completed, COMPLETION_SIZE));
    let place = place.saturating_add(12);
    if !device.wait(queue.number as usize, PATIENCE)? {
        return Err(format!("no interrupt of queue {}", queue.number).into());
    }
    let status = device.memory().get32(place);
    same("the phase of a completion", status & PHASE, queue.phase)?;
    same("the status of a completion", status >> STATUS_SHIFT, 0)?;
    queue.completed = next(queue.completed);
    if queue.completed == 0 {
        queue.phase ^= PHASE;
    }
    registers.write32(doorbell(queue.number << 1 | 1), queue.completed)
}
