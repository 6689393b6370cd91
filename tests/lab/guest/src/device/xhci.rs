//! An xHCI USB controller (eXtensible Host Controller Interface for USB 1.2, 5): of all it can do, only that each of its interrupters has an MSI
//! vector of its own.

use std::time::Duration;

use super::window::Window;
use super::{Device, PATIENCE, Result, Signal, same, until};

/// Registers of BAR 0 (5.3): the length of these in the lowest byte, and where the runtime registers are.
const LENGTH: u64 = 0x00;
const RUNTIME: u64 = 0x18;

/// Operational registers, behind those (5.4).
const COMMAND: u64 = 0x00;
const RESET: u32 = 1 << 1;
const INTERRUPTS_ON: u32 = 1 << 2;

/// Of an interrupter, in the runtime registers (5.5.2).
mod interrupter {
    pub const FIRST: u64 = 0x20;
    pub const SIZE: u64 = 0x20;
    pub const MANAGEMENT: u64 = 0x00;
    pub const SEGMENTS: u64 = 0x08;
    pub const TABLE: u64 = 0x10;
    pub const DEQUEUE: u64 = 0x18;
}
/// It has interrupted (written: has been served), and is to interrupt.
const PENDING: u32 = 1 << 0;
const ENABLED: u32 = 1 << 1;
/// Of the dequeue pointer: events have been handled (written: to be cleared).
const BUSY: u32 = 1 << 3;

const VECTORS: u32 = 4;
/// Bytes of an event; how many a ring has; where in the memory the tables of segments and the rings are.
const EVENT: u64 = 16;
const EVENTS: u32 = 16;
const TABLES: u64 = 0;
const RINGS: u64 = 0x1000;
const APART: u64 = 0x100;

/// Long enough for an interrupt that is not to come.
const A_WHILE: Duration = Duration::from_millis(100);

pub fn drive(mut device: Box<dyn Device>, steps: &[&str]) -> Result<()> {
    let registers = device.window(0)?;
    for step in steps {
        match *step {
            "msi" => vectors(&mut *device, &registers)?,
            _ => return Err(format!("xhci cannot '{step}'").into()),
        }
    }
    Ok(())
}

/// Has each interrupter interrupt, and nobody else at the same time.
fn vectors(device: &mut dyn Device, registers: &Window) -> Result<()> {
    let operational = u64::from(registers.read32(LENGTH)? & 0xff);
    let runtime = u64::from(registers.read32(RUNTIME)? & !0x1f);
    let command = operational.saturating_add(COMMAND);
    registers.write32(command, RESET)?;
    until("the controller is reset", || {
        Ok(registers.read32(command)? & RESET == 0)
    })?;
    device.interrupts(Signal::Msi, VECTORS)?;
    registers.write32(command, INTERRUPTS_ON)?;
    for vector in 0..VECTORS {
        let apart = APART.saturating_mul(vector.into());
        let (table, ring) = (TABLES.saturating_add(apart), RINGS.saturating_add(apart));
        let memory = device.memory();
        memory.set64(table, memory.physical(ring));
        memory.set64(table.saturating_add(8), EVENTS.into());
        let base = interrupter::SIZE
            .saturating_mul(vector.into())
            .saturating_add(interrupter::FIRST)
            .saturating_add(runtime);
        let write =
            |register: u64, value: u32| registers.write32(base.saturating_add(register), value);
        let low = |address: u64| (address & u64::from(u32::MAX)) as u32;
        write(interrupter::MANAGEMENT, ENABLED)?;
        write(interrupter::SEGMENTS, 1)?;
        write(interrupter::TABLE, low(memory.physical(table)))?;
        write(interrupter::TABLE.saturating_add(4), 0)?;
        // Not where the ring is: so there are events, for all that the controller knows.
        let other = memory.physical(ring).saturating_add(EVENT);
        write(interrupter::DEQUEUE.saturating_add(4), 0)?;
        write(interrupter::DEQUEUE, low(other) | BUSY)?;
        if !device.wait(vector as usize, PATIENCE)? {
            return Err(format!("no interrupt by vector {vector}").into());
        }
        for other in 0..VECTORS {
            let came = device.wait(other as usize, A_WHILE)?;
            same("another interrupt", u32::from(came), 0)?;
        }
        let write =
            |register: u64, value: u32| registers.write32(base.saturating_add(register), value);
        write(interrupter::MANAGEMENT, PENDING)?;
    }
    Ok(())
}
