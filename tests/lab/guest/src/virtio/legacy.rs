//! A driver of the legacy interface (virtio 1.3, section 4.1.4.10) that reaches its registers through two BARs: ports, and the same in memory.

use std::error::Error;
use std::io::{self, Write};

use super::function::{Bar, Function};
use super::memory;
use super::ring::{DATA, IN, OUT, RING, Ring, SECTOR};

const PORTS: usize = 0;
const IN_MEMORY: usize = 3;

/// A register: offset, and width in bytes.
type Register = (usize, usize);

const DEVICE_FEATURES: Register = (0, 4);
const DRIVER_FEATURES: Register = (4, 4);
const QUEUE_ADDRESS: Register = (8, 4);
const QUEUE_SIZE: Register = (12, 2);
const QUEUE_SELECT: Register = (14, 2);
const QUEUE_NOTIFY: Register = (16, 2);
const STATUS: Register = (18, 1);
const ISR: Register = (19, 1);
/// Without MSI-X the device configuration begins here: the capacity.
const CONFIG: usize = 20;
/// The registers, and more of the device configuration than any disk has.
const END: usize = 124;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;

const PAGE: u64 = 4096;
/// Sectors in one request.
const SECTORS: u64 = 64;

struct Doors {
    ports: Bar,
    memory: Bar,
}

impl Doors {
    fn open(bdf: &str) -> Result<Self, Box<dyn Error>> {
        let function = Function::open(bdf)?;
        let (ports, _) = function.bar(PORTS)?;
        let (memory, _) = function.bar(IN_MEMORY)?;
        match (&ports, &memory) {
            (Bar::Ports(_), Bar::Memory { .. }) => Ok(Self { ports, memory }),
            _ => Err("BAR 0 is not of ports, or BAR 3 not of memory".into()),
        }
    }

    /// What both doors show.
    fn read(&self, (offset, width): Register) -> Result<u32, Box<dyn Error>> {
        let (ports, memory) = (
            self.ports.read(offset, width)?,
            self.memory.read(offset, width)?,
        );
        if ports != memory {
            return Err(format!(
                "{width} bytes at {offset}: {ports:#x} by port, {memory:#x} in memory"
            )
            .into());
        }
        Ok(ports)
    }

    /// Writes through each door in turn what the other one is then to show.
    fn exchange(&self, register: Register, values: &[u32]) -> Result<(), Box<dyn Error>> {
        let (offset, width) = register;
        for (value, door) in values
            .iter()
            .zip([&self.ports, &self.memory].iter().cycle())
        {
            door.write(offset, width, *value)?;
            let shown = self.read(register)?;
            if shown != *value {
                return Err(format!(
                    "at {offset}: {value:#x} was written, and {shown:#x} is there"
                )
                .into());
            }
        }
        Ok(())
    }

    fn compare_all(&self) -> Result<usize, Box<dyn Error>> {
        let mut count = 0usize;
        for width in [1, 2, 4] {
            for offset in (0..END).step_by(width) {
                self.read((offset, width))?;
                count = count.saturating_add(1);
            }
        }
        Ok(count)
    }
}

/// Reads all registers through both BARs, in every width, and writes through one what the other shows.
pub fn compare(bdf: &str) -> Result<(), Box<dyn Error>> {
    let doors = Doors::open(bdf)?;
    doors.exchange(STATUS, &[0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER])?;
    let mut count = doors.compare_all()?;
    let offered = doors.read(DEVICE_FEATURES)?;
    doors.exchange(
        DRIVER_FEATURES,
        &[0, offered, offered & 0x5555_5555, offered & 0x2aaa_aaaa, 0],
    )?;
    doors.exchange(QUEUE_SELECT, &[1, 0xffff, 0x100, 2, 0, 0])?;
    doors.exchange(QUEUE_ADDRESS, &[1, 0x0fed_cba9, 0x80, 0])?;
    count = count.saturating_add(doors.compare_all()?);
    // A register by its bytes.
    let (offset, _) = QUEUE_SELECT;
    doors.exchange((offset.saturating_add(1), 1), &[2, 3, 0, 0])?;
    doors.exchange(STATUS, &[ACKNOWLEDGE | DRIVER, 0, 0])?;
    let sectors = doors.read((CONFIG, 4))?;
    println!("{count} accesses the same by both, {sectors} sectors");
    Ok(())
}

/// Copies `count` sectors from sector `from` to sector `to`, and their bytes to the standard output. The device is driven through the BAR in memory, but
/// every other request is announced by port.
pub fn copy(bdf: &str, from: u64, to: u64, count: u64) -> Result<(), Box<dyn Error>> {
    let doors = Doors::open(bdf)?;
    let memory = memory::large_page()?;
    let write = |(offset, width): Register, value| doors.memory.write(offset, width, value);
    write(STATUS, 0)?;
    write(STATUS, ACKNOWLEDGE)?;
    write(STATUS, ACKNOWLEDGE | DRIVER)?;
    write(DRIVER_FEATURES, 0)?;
    write(QUEUE_SELECT, 0)?;
    let size = u16::try_from(doors.read(QUEUE_SIZE)?)?;
    let mut ring = Ring::new(&memory, size);
    write(QUEUE_ADDRESS, u32::try_from(memory.physical(RING) / PAGE)?)?;
    write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)?;

    let bytes = SECTORS.saturating_mul(SECTOR);
    for at in (0..count).step_by(SECTORS as usize) {
        for (kind, first, door) in [(IN, from, &doors.memory), (OUT, to, &doors.ports)] {
            ring.put_request(0, kind, first.saturating_add(at), u32::try_from(bytes)?);
            ring.offer(0);
            let (offset, width) = QUEUE_NOTIFY;
            door.write(offset, width, 0)?;
            if !ring.wait() {
                return Err("a request does not end".into());
            }
            if ring.status() != 0 {
                return Err(format!("a request failed with status {}", ring.status()).into());
            }
        }
        io::stdout().write_all(&memory.bytes(DATA, bytes))?;
    }
    // Reading it through one door clears it for both.
    let (offset, width) = ISR;
    let (first, second) = (
        doors.memory.read(offset, width)?,
        doors.ports.read(offset, width)?,
    );
    if (first, second) != (1, 0) {
        return Err(format!("ISR status reads {first} in memory, then {second} by port").into());
    }
    write(STATUS, 0)
}
