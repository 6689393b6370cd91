//! The guest's drivers: as much of them as it takes to make a device work and interrupt.

use pcibackd::host::sim::SimBus;
use xenbus::sim::{BarKind, Function};

/// Classes: an Ethernet controller, an NVM Express controller.
const ETHERNET: u32 = 0x02_0000;
const NVM_EXPRESS: u32 = 0x01_0802;

/// A driver, with the address behind which its device's registers are.
#[derive(Debug, Clone, Copy)]
pub enum Driver {
    /// For Intel's 82576 and its virtual functions.
    Network(u64),
    /// For NVM Express.
    Nvme(u64),
}

/// The network card's registers (82576 datasheet, 8.2): device status with its bit for "link up", and extended interrupt causes to set.
const NETWORK_STATUS: u64 = 0x0008;
const NETWORK_LINK_UP: u32 = 1 << 1;
const NETWORK_CAUSE_SET: u64 = 0x1520;

/// NVM Express' registers (NVM Express 1.4, section 3.1): version, configuration and status, and the first doorbell.
const NVME_VERSION: u64 = 0x08;
const NVME_CONFIGURATION: u64 = 0x14;
const NVME_ENABLE: u32 = 1;
const NVME_STATUS: u64 = 0x1c;
const NVME_READY: u32 = 1;
const NVME_DOORBELLS: u64 = 0x1000;
const NVME_DOORBELLS_OF_A_QUEUE: u64 = 8;

impl Driver {
    /// The driver for a function that the guest has found.
    pub fn of(function: &Function) -> Option<Self> {
        let memory = |kind| matches!(kind, BarKind::Memory32 | BarKind::Memory64);
        let registers = function.bars.iter().find(|bar| memory(bar.kind))?.address;
        match function.class {
            ETHERNET => Some(Self::Network(registers)),
            NVM_EXPRESS => Some(Self::Nvme(registers)),
            _ => None,
        }
    }

    /// Starts the device. Gives what it says of itself; `None` if it does not work.
    pub fn start(self, bus: &SimBus) -> Option<String> {
        match self {
            Self::Network(base) => {
                let status = bus.memory_read(base.checked_add(NETWORK_STATUS)?);
                let works = status != u32::MAX && status & NETWORK_LINK_UP != 0;
                works.then(|| "the link is up".to_owned())
            }
            Self::Nvme(base) => {
                let version = bus.memory_read(base.checked_add(NVME_VERSION)?);
                bus.memory_write(base.checked_add(NVME_CONFIGURATION)?, NVME_ENABLE);
                let status = bus.memory_read(base.checked_add(NVME_STATUS)?);
                let works = status != u32::MAX && status & NVME_READY != 0;
                let (major, minor) = (version >> 16, version >> 8 & 0xff);
                works.then(|| format!("it is ready, by version {major}.{minor} of the standard"))
            }
        }
    }

    /// Makes the device interrupt by that vector.
    pub fn ring(self, bus: &SimBus, vector: u16) {
        match self {
            Self::Network(base) => {
                let cause = 1u32.wrapping_shl(vector.into());
                bus.memory_write(base.wrapping_add(NETWORK_CAUSE_SET), cause);
            }
            Self::Nvme(base) => {
                let doorbell = u64::from(vector).wrapping_mul(NVME_DOORBELLS_OF_A_QUEUE);
                let address = base.wrapping_add(NVME_DOORBELLS).wrapping_add(doorbell);
                bus.memory_write(address, 1);
            }
        }
    }

    /// How it makes the device interrupt, in words.
    pub fn how(self) -> &'static str {
        match self {
            Self::Network(_) => "sets an interrupt cause",
            Self::Nvme(_) => "rings a queue's doorbell",
        }
    }
}
