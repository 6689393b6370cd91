//! Drivers of the lab's devices in this program, and what they reach a device through: written once, they run on a guest's view of it and on
//! bare VFIO, with which the guest's is compared.

mod bare;
mod both;
mod edu;
mod embedded;
mod function;
mod igb;
mod memory;
mod nvme;
mod rtl8139;
mod vga;
mod window;
mod xhci;

use std::error::Error;
use std::time::{Duration, Instant};

use crate::memory::Memory;
use embedded::Guest;
use window::Window;

pub use embedded::{give, look, toolstack};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Nothing takes that long, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);

/// Offset of the vendor ID, with the device ID behind it (PCI 3.0, 6.2.1), and of the command register.
const VENDOR: u16 = 0x00;
const COMMAND: u16 = 0x04;
/// Of the command register: I/O decode; memory decode, bus mastering.
const COMMAND_IO: u32 = 1 << 0;
const COMMAND_ON: u32 = 1 << 1 | 1 << 2;

/// How a device interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Line,
    Msi,
    Msix,
}

/// A step of recovery from an error that a guest's driver is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    Detected,
    MmioEnabled,
    SlotReset,
    Resume,
}

impl std::fmt::Display for Recovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Detected => "error detected",
            Self::MmioEnabled => "memory enabled",
            Self::SlotReset => "slot reset",
            Self::Resume => "resume",
        })
    }
}

/// A function that is this program's.
pub trait Device {
    fn config_read(&mut self, offset: u16, width: u8) -> Result<u32>;

    fn config_write(&mut self, offset: u16, width: u8, value: u32) -> Result<()>;

    /// What a BAR decodes.
    fn window(&mut self, bar: u8) -> Result<Window>;

    /// Sets up so many interrupts, in place of those that there were.
    fn interrupts(&mut self, signal: Signal, count: u32) -> Result<()>;

    /// Waits for one of them, and takes it; false when none came in time.
    fn wait(&mut self, vector: usize, patience: Duration) -> Result<bool>;

    /// The device has been served: its line may interrupt again.
    fn end_of_interrupt(&mut self) -> Result<()>;

    /// Has [`Device::end_of_interrupt`] write to an eventfd from now on, with nobody between it and the kernel.
    fn end_by_event(&mut self) -> Result<()>;

    /// Waits until a step of recovery from an error is asked for, and answers as a driver that wants its device reset; `None` when none is in time.
    fn recovery_step(&mut self, patience: Duration) -> Result<Option<Recovery>>;

    /// What the device reaches by DMA, at [`memory::ADDRESS`], and nothing else.
    fn memory(&self) -> &Memory;
}

/// Opens a device and has it decode memory and master the bus. `vfio:BDF`: through VFIO, without anybody between; `RUN_DIR:DOMID`: as that guest of
/// the embedded platform, whose first device it is, or `RUN_DIR:DOMID:NUMBER`.
fn open(place: &str) -> Result<Box<dyn Device>> {
    match place.split_once(':') {
        Some(("vfio", bdf)) => switched_on(bare::Bare::open(bdf)?),
        Some((run_dir, guest)) => {
            let (domain, number) = guest.split_once(':').unwrap_or((guest, "1"));
            let guest = Guest::open(run_dir, domain.parse()?)?;
            switched_on(guest.device(number.parse()?)?)
        }
        None => Err(format!("'{place}' is no place of a device").into()),
    }
}

/// Has a device decode memory and master the bus.
fn switched_on(mut device: impl Device + 'static) -> Result<Box<dyn Device>> {
    let command = device.config_read(COMMAND, 2)?;
    device.config_write(COMMAND, 2, command | COMMAND_ON)?;
    Ok(Box::new(device))
}

/// Plays a driver: what it is to do, one after the other.
pub fn drive(driver: &str, place: &str, steps: &[&str]) -> Result<()> {
    if driver == "both" {
        let (run_dir, domain) = place.split_once(':').ok_or("it is for guests")?;
        return both::drive(&Guest::open(run_dir, domain.parse()?)?, steps);
    }
    let device = open(place)?;
    match driver {
        "edu" => edu::drive(device, steps),
        "nvme" => nvme::drive(device, steps),
        "igb" => igb::drive_physical(device, steps),
        "igbvf" => igb::drive_virtual(device, steps),
        "xhci" => xhci::drive(device, steps),
        "rtl8139" => rtl8139::drive(device, steps),
        "vga" => vga::drive(device, steps),
        "function" => function::drive(device, steps),
        _ => Err(format!("there is no driver '{driver}'").into()),
    }
}

/// What an I/O BAR decodes, switched on.
fn ports(device: &mut dyn Device, bar: u8) -> Result<Window> {
    let command = device.config_read(COMMAND, 2)?;
    device.config_write(COMMAND, 2, command | COMMAND_IO)?;
    device.window(bar)
}

/// Waits for an error of a device, which it says, and recovers from it as it is asked to.
fn recover(device: &mut dyn Device) -> Result<()> {
    println!("waiting");
    loop {
        let step = device.recovery_step(PATIENCE)?;
        let step = step.ok_or("nobody asks to recover")?;
        println!("{step}");
        if step == Recovery::Resume {
            return Ok(());
        }
    }
}

/// Waits until something is so.
fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !condition()? {
        if begin.elapsed() > PATIENCE {
            return Err(format!("in vain: {what}").into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// That two values are the same.
fn same<T: PartialEq + std::fmt::LowerHex>(what: &str, found: T, expected: T) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: {found:#x} instead of {expected:#x}").into())
    }
}
