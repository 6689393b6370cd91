//! QEMU's `edu` (QEMU, docs/specs/edu.rst): it inverts a number, computes factorials, copies between memory and a buffer of its own, and
//! interrupts when told to and when it is done.

use std::time::{Duration, Instant};

use super::window::Window;
use super::{COMMAND, Device, PATIENCE, Result, Signal, VENDOR, same, until};
use crate::config::{print, timed};

/// Device and vendor ID.
pub(super) const IDS: u32 = 0x11e8_1234;

/// Registers of BAR 0.
mod register {
    pub const IDENTIFICATION: u64 = 0x00;
    pub const LIVENESS: u64 = 0x04;
    pub const FACTORIAL: u64 = 0x08;
    pub const STATUS: u64 = 0x20;
    pub const INTERRUPT_STATUS: u64 = 0x24;
    pub const RAISE: u64 = 0x60;
    pub const ACKNOWLEDGE: u64 = 0x64;
    pub const DMA_SOURCE: u64 = 0x80;
    pub const DMA_DESTINATION: u64 = 0x88;
    pub const DMA_COUNT: u64 = 0x90;
    pub const DMA_COMMAND: u64 = 0x98;
}

/// Of the status register: it computes; it is to interrupt when it has.
const COMPUTING: u32 = 1 << 0;
const INTERRUPT_AFTER: u32 = 1 << 7;
/// Of the DMA command: go, which is set until it is done; from the device to memory; interrupt afterwards.
const DMA_START: u64 = 1 << 0;
const DMA_TO_MEMORY: u64 = 1 << 1;
const DMA_INTERRUPT: u64 = 1 << 2;
/// What the device says that it interrupted for.
const FOR_FACTORIAL: u32 = 1;
const FOR_DMA: u32 = 0x100;

/// The device's buffer, of 4 KiB, as DMA addresses it.
const BUFFER: u64 = 0x4_0000;
/// Less than it has, since QEMU 7.2 refuses to copy up to its end.
pub(super) const BUFFER_SIZE: u64 = 4092;

/// Long enough for an interrupt that is not to come.
const A_WHILE: Duration = Duration::from_millis(300);

pub(super) struct Edu {
    device: Box<dyn Device>,
    registers: Window,
}

pub fn drive(device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    let mut edu = Edu::new(device)?;
    for step in steps {
        match *step {
            "identify" => edu.identify()?,
            "factorial" => edu.factorial()?,
            "dma" => edu.dma()?,
            "intx" => edu.interrupts(Signal::Line)?,
            "endevent" => edu.end_by_event()?,
            "listen" => edu.listen()?,
            "endless" => edu.end_without_end()?,
            "msi" => edu.interrupts(Signal::Msi)?,
            "recover" => edu.recover()?,
            "stray" => edu.stray()?,
            "bench" => edu.bench()?,
            "mapped" => edu.mapped()?,
            "trapped" => edu.bench_trapped()?,
            "last" => edu.last()?,
            _ => return Err(format!("edu cannot '{step}'").into()),
        }
    }
    Ok(())
}

impl Edu {
    pub fn new(mut device: Box<dyn Device>) -> Result<Self> {
        same("vendor and device", device.config_read(VENDOR, 4)?, IDS)?;
        let registers = device.window(0)?;
        Ok(Self { device, registers })
    }

    fn identify(&self) -> Result<()> {
        let found = self.registers.read32(register::IDENTIFICATION)?;
        same("identification", found & 0xffff, 0x00ed)?;
        for number in [0, 0x1234_5678, u32::MAX] {
            self.registers.write32(register::LIVENESS, number)?;
            same(
                "inverse",
                self.registers.read32(register::LIVENESS)?,
                !number,
            )?;
        }
        Ok(())
    }

    fn factorial(&self) -> Result<()> {
        for number in 0..=12 {
            self.registers.write32(register::FACTORIAL, number)?;
            until("a factorial", || {
                Ok(self.registers.read32(register::STATUS)? & COMPUTING == 0)
            })?;
            let expected = (1..=number).fold(1u32, u32::wrapping_mul);
            same(
                "factorial",
                self.registers.read32(register::FACTORIAL)?,
                expected,
            )?;
        }
        Ok(())
    }

    /// Starts a copy.
    fn start(&self, from: u64, to: u64, count: u64, command: u64) -> Result<()> {
        self.registers.write64(register::DMA_SOURCE, from)?;
        self.registers.write64(register::DMA_DESTINATION, to)?;
        self.registers.write64(register::DMA_COUNT, count)?;
        self.registers
            .write64(register::DMA_COMMAND, command | DMA_START)
    }

    fn is_copied(&self) -> Result<bool> {
        Ok(self.registers.read64(register::DMA_COMMAND)? & DMA_START == 0)
    }

    fn copy(&self, from: u64, to: u64, count: u64, command: u64) -> Result<()> {
        self.start(from, to, count, command)?;
        until("DMA", || self.is_copied())
    }

    /// Has the device carry as much of the memory as it can elsewhere in it.
    pub fn carry(&self, from: u64, to: u64) -> Result<()> {
        let memory = self.device.memory();
        self.copy(memory.physical(from), BUFFER, BUFFER_SIZE, 0)?;
        self.copy(BUFFER, memory.physical(to), BUFFER_SIZE, DMA_TO_MEMORY)
    }

    /// Fills a page, has the device fetch it and write it to another, and looks at both.
    fn dma(&self) -> Result<()> {
        let memory = self.device.memory();
        let (first, second) = (memory.physical(0), memory.physical(0x8000));
        // Of a prime length, so that no page repeats another.
        let pattern: Vec<u8> = (0..251).cycle().take(BUFFER_SIZE as usize).collect();
        memory.fill(0, pattern.iter().copied());
        memory.fill(0x8000, [0; BUFFER_SIZE as usize]);
        self.copy(first, BUFFER, BUFFER_SIZE, 0)?;
        if memory
            .bytes(0x8000, BUFFER_SIZE)
            .iter()
            .any(|byte| *byte != 0)
        {
            return Err("the device wrote before it was told to".into());
        }
        self.copy(BUFFER, second, BUFFER_SIZE, DMA_TO_MEMORY)?;
        if memory.bytes(0x8000, BUFFER_SIZE) != pattern || memory.bytes(0, BUFFER_SIZE) != pattern {
            return Err("what came back is not what was sent".into());
        }
        Ok(())
    }

    /// Takes the next interrupt, which is to be for that.
    fn take(&mut self, reason: u32) -> Result<()> {
        // A line may interrupt once more than there is reason to, as drivers know.
        let mut status = 0;
        while status == 0 {
            if !self.device.wait(0, PATIENCE)? {
                return Err(format!("no interrupt for {reason:#x}").into());
            }
            status = self.registers.read32(register::INTERRUPT_STATUS)?;
            if status == 0 {
                self.device.end_of_interrupt()?;
            }
        }
        same("interrupt", status, reason)?;
        self.registers.write32(register::ACKNOWLEDGE, reason)?;
        self.device.end_of_interrupt()
    }

    pub fn interrupts(&mut self, signal: Signal) -> Result<()> {
        self.device.interrupts(signal, 1)?;
        self.events(signal)
    }

    /// Has MSI on, waits for an error, recovers from it, and uses the interrupt that it had before.
    fn recover(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Msi, 1)?;
        super::recover(&mut *self.device)?;
        self.identify()?;
        self.events(Signal::Msi)?;
        println!("recovered");
        Ok(())
    }

    fn events(&mut self, signal: Signal) -> Result<()> {
        for reason in [1, 0x8000_0000, 6] {
            self.registers.write32(register::RAISE, reason)?;
            self.take(reason)?;
        }
        self.registers.write32(register::STATUS, INTERRUPT_AFTER)?;
        self.registers.write32(register::FACTORIAL, 5)?;
        self.take(FOR_FACTORIAL)?;
        self.registers.write32(register::STATUS, 0)?;
        let page = self.device.memory().physical(0);
        self.start(page, BUFFER, BUFFER_SIZE, DMA_INTERRUPT)?;
        self.take(FOR_DMA)?;
        if signal == Signal::Line {
            self.still_raised()?;
        }
        if self.device.wait(0, A_WHILE)? {
            return Err("an interrupt for nothing".into());
        }
        Ok(())
    }

    /// A line that is still raised when it has been served interrupts again; while it is not served, it does not.
    fn still_raised(&mut self) -> Result<()> {
        self.registers.write32(register::RAISE, 2)?;
        if !self.device.wait(0, PATIENCE)? {
            return Err("no interrupt".into());
        }
        if self.device.wait(0, A_WHILE)? {
            return Err("an interrupt before the last one was served".into());
        }
        self.device.end_of_interrupt()?;
        self.take(2)
    }

    /// Has interrupts by the line and says by an eventfd that they were served: many in a row, none of which is lost, and also when the line was off.
    fn end_by_event(&mut self) -> Result<()> {
        const MANY: u32 = 500;
        self.device.interrupts(Signal::Line, 1)?;
        self.device.end_by_event()?;
        self.events(Signal::Line)?;
        for number in 1..=MANY {
            self.registers.write32(register::RAISE, number)?;
            self.take(number)?;
        }
        for signal in [Signal::Msi, Signal::Line] {
            self.interrupts(signal)?;
        }
        // Ends without a beginning do no harm.
        for _ in 0..MANY {
            self.device.end_of_interrupt()?;
        }
        self.events(Signal::Line)
    }

    /// Waits for a message, and says so.
    fn listen(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Msi, 1)?;
        println!("listening");
        while !self.device.wait(0, PATIENCE)? {}
        println!("heard");
        Ok(())
    }

    /// Says that the line was served, again and again, until somebody stops it.
    fn end_without_end(&mut self) -> Result<()> {
        self.device.interrupts(Signal::Line, 1)?;
        self.device.end_by_event()?;
        println!("at it");
        loop {
            self.device.end_of_interrupt()?;
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Uses the device until it goes, and says so.
    fn last(&self) -> Result<()> {
        println!("using");
        let begin = Instant::now();
        while self.identify().is_ok() {
            if begin.elapsed() > PATIENCE {
                return Err("the device has not gone".into());
            }
        }
        println!("gone");
        Ok(())
    }

    /// Times a read of configuration space and one of a register, and how long it takes from the register that makes the device interrupt until
    /// the interrupt was served: by MSI, and by the line.
    fn bench(&mut self) -> Result<()> {
        /// Reads that are timed as one: a single one takes no longer than looking at the clock does.
        const ACCESSES: u32 = 100;
        let config = timed(2000, || self.device.config_read(COMMAND, 4).map(drop))?;
        print("config_read", config)?;
        let accesses = timed(200, || -> Result<()> {
            for _ in 0..ACCESSES {
                self.registers.read32(register::LIVENESS)?;
            }
            Ok(())
        })?;
        let one = accesses
            .into_iter()
            .filter_map(|time| time.checked_div(ACCESSES));
        print("register_read", one.collect())?;
        for (signal, name) in [(Signal::Msi, "interrupt"), (Signal::Line, "line")] {
            self.device.interrupts(signal, 1)?;
            if signal == Signal::Line {
                self.device.end_by_event()?;
            }
            let interrupts = timed(500, || {
                self.registers.write32(register::RAISE, 1)?;
                self.take(1)
            })?;
            print(name, interrupts)?;
        }
        Ok(())
    }

    /// That the registers are mapped.
    fn mapped(&self) -> Result<()> {
        if self.registers.areas.is_empty() {
            return Err("its registers are not mapped".into());
        }
        Ok(())
    }

    /// Times a read of a register that is not mapped.
    fn bench_trapped(&self) -> Result<()> {
        if self.mapped().is_ok() {
            return Err("its registers are mapped".into());
        }
        let accesses = timed(1000, || self.registers.read32(register::LIVENESS).map(drop))?;
        print("register_trapped", accesses)
    }

    /// Has the device write to memory and read from memory that it was not given. It says nothing of it; the IOMMU does.
    fn stray(&self) -> Result<()> {
        let beyond = self.device.memory().physical(super::memory::SIZE);
        self.copy(BUFFER, beyond, 8, DMA_TO_MEMORY)?;
        self.copy(beyond, BUFFER, 8, 0)
    }
}
