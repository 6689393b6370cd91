//! A driver of the modern interface of a disk whose device has the layout `compact` (docs/virtio.md), without interrupts.

use std::error::Error;
use std::time::{Duration, Instant};

use super::function::{Bar, Function};
use super::ring::{DATA, IN, RING, Ring, SECTOR};
use crate::memory::Memory;

const BAR: usize = 4;

/// Of the common configuration (virtio 1.3, section 4.1.4.3): offset, and width in bytes.
pub type Register = (usize, usize);
const DRIVER_FEATURE_SELECT: Register = (8, 4);
const DRIVER_FEATURE: Register = (12, 4);
pub const STATUS: Register = (20, 1);
pub const QUEUE_SELECT: Register = (22, 2);
pub const QUEUE_SIZE: Register = (24, 2);
pub const QUEUE_ENABLE: Register = (28, 2);
pub const QUEUE_ADDRESSES: [usize; 3] = [32, 40, 48];
pub const QUEUE_RESET: Register = (58, 2);
/// The other blocks.
const ISR: usize = 0x2000;
pub const DEVICE_CONFIG: usize = 0x4000;
pub const NOTIFY: usize = 0x6000;
pub const NOTIFY_END: usize = 0x8000;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
/// The status of a device that works.
pub const WORKS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
/// In ISR status: the configuration has changed, which is how the device says that it needs a reset.
const CONFIG_CHANGED: u32 = 2;

/// The features that are asked for, in the low and the high word: INDIRECT_DESC; VERSION_1, RING_RESET.
const FEATURES: [u32; 2] = [1 << 28, 1 | 1 << 8];

/// Descriptors of the ring.
pub const RING_SIZE: u16 = 16;
/// Bytes that an honest request reads.
const HONEST: u64 = 8 * SECTOR;
const PATIENCE: Duration = Duration::from_secs(10);

/// How the ring is told to the device.
pub struct Queue {
    pub size: u16,
    /// Of the descriptors, the available ring, the used ring.
    pub addresses: [u64; 3],
}

pub struct Device<'a> {
    pub function: Function,
    pub bar: Bar,
    /// Where the guest has the BAR.
    pub address: u64,
    memory: &'a Memory,
    /// What an honest request has read.
    honest: Option<Vec<u8>>,
}

impl<'a> Device<'a> {
    pub fn open(bdf: &str, memory: &'a Memory) -> Result<Self, Box<dyn Error>> {
        let function = Function::open(bdf)?;
        let (bar, address) = function.bar(BAR)?;
        Ok(Self {
            function,
            bar,
            address,
            memory,
            honest: None,
        })
    }

    pub fn read(&self, (offset, width): Register) -> Result<u32, Box<dyn Error>> {
        self.bar.read(offset, width)
    }

    pub fn write(&self, (offset, width): Register, value: u32) -> Result<(), Box<dyn Error>> {
        self.bar.write(offset, width, value)
    }

    pub fn write_address(&self, register: usize, address: u64) -> Result<(), Box<dyn Error>> {
        self.write((register, 4), (address & 0xffff_ffff) as u32)?;
        self.write((register.saturating_add(4), 4), (address >> 32) as u32)
    }

    pub fn notify(&self, queue: usize) -> Result<(), Box<dyn Error>> {
        self.bar.write(
            NOTIFY.saturating_add(queue.saturating_mul(4)),
            4,
            queue as u32,
        )
    }

    /// Waits for a status.
    fn wait(&self, what: &str, is_so: impl Fn(u32) -> bool) -> Result<(), Box<dyn Error>> {
        let begin = Instant::now();
        loop {
            let status = self.read(STATUS)?;
            if is_so(status) {
                return Ok(());
            }
            if begin.elapsed() > PATIENCE {
                return Err(format!("{what}: the status is {status:#x}").into());
            }
            std::thread::yield_now();
        }
    }

    pub fn reset(&self) -> Result<(), Box<dyn Error>> {
        self.write(STATUS, 0)?;
        self.wait("it is not reset", |status| status == 0)
    }

    /// Brings the device from reset to work, with an empty ring, which `setup` may tell wrongly.
    pub fn start(&self, setup: &dyn Fn(&mut Queue)) -> Result<Ring<'a>, Box<dyn Error>> {
        self.reset()?;
        self.write(STATUS, ACKNOWLEDGE | DRIVER)?;
        for (word, features) in (0..).zip(FEATURES) {
            self.write(DRIVER_FEATURE_SELECT, word)?;
            self.write(DRIVER_FEATURE, features)?;
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        self.wait("it refuses the features", |status| {
            status & FEATURES_OK != 0
        })?;
        let ring = Ring::new(self.memory, RING_SIZE);
        let addresses =
            [RING, ring.driver(), ring.device()].map(|offset| self.memory.physical(offset));
        let mut queue = Queue {
            size: RING_SIZE,
            addresses,
        };
        setup(&mut queue);
        self.write(QUEUE_SELECT, 0)?;
        self.write(QUEUE_SIZE, queue.size.into())?;
        for (register, address) in QUEUE_ADDRESSES.into_iter().zip(queue.addresses) {
            self.write_address(register, address)?;
        }
        self.write(QUEUE_ENABLE, 1)?;
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)?;
        Ok(ring)
    }

    /// The device is to need a reset afterwards, and to say so by an interrupt.
    pub fn make_mistake(
        &self,
        setup: &dyn Fn(&mut Queue),
        chain: &dyn Fn(&mut Ring<'_>),
    ) -> Result<(), Box<dyn Error>> {
        let mut ring = self.start(setup)?;
        chain(&mut ring);
        self.notify(0)?;
        self.wait("it needs no reset", |status| status & NEEDS_RESET != 0)?;
        match self.bar.read(ISR, 1)? & CONFIG_CHANGED {
            0 => Err("there was no interrupt for it".into()),
            _ => Ok(()),
        }
    }

    /// Reads the disk's first sectors.
    pub fn serve_honestly(&mut self) -> Result<(), Box<dyn Error>> {
        let mut ring = self.start(&|_| ())?;
        for place in (DATA..DATA.saturating_add(HONEST)).step_by(8) {
            self.memory.set64(place, 0);
        }
        ring.put_request(0, IN, 0, HONEST as u32);
        ring.offer(0);
        self.notify(0)?;
        if !ring.wait() || ring.status() != 0 {
            let status = self.read(STATUS)?;
            return Err(format!(
                "an honest request is not served, the device's status is {status:#x}"
            )
            .into());
        }
        let data = self.memory.bytes(DATA, HONEST);
        if *self.honest.get_or_insert_with(|| data.clone()) != data {
            return Err("an honest request reads something else than before".into());
        }
        Ok(())
    }
}
