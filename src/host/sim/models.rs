//! What lies behind the BARs of the example devices: as much as a driver needs to find them alive
//! and be interrupted.

use super::memory::Model;

/// An NVMe controller (NVM Express 1.4, section 3.1): it becomes ready when enabled, and interrupts
/// on each doorbell.
#[derive(Debug, Default)]
pub(super) struct Nvme {
    configuration: u32,
    queues: [u32; 5],
}

/// Controller capabilities: queues of up to 64 entries, contiguous, ready within 500 ms, NVM
/// command set, pages of 4096 bytes.
const CAP: [u32; 2] = [0x0101_003f, 0x0000_0020];
const CAP_LOW: u64 = 0x00;
const CAP_HIGH: u64 = 0x04;
const VERSION: u64 = 0x08;
const VERSION_1_4: u32 = 0x0001_0400;
const CONFIGURATION: u64 = 0x14;
const CONFIGURATION_ENABLE: u32 = 1;
const STATUS: u64 = 0x1c;
/// Admin queue attributes, and the addresses of both admin queues.
const QUEUES: u64 = 0x24;
const QUEUES_END: u64 = 0x38;
/// Doorbells: 8 bytes for each queue, submission then completion.
const DOORBELLS: u64 = 0x1000;
const DOORBELLS_END: u64 = 0x1020;
const NVME_BAR: u8 = 0;

impl Nvme {
    /// Ready is what it is as soon as it is enabled: there is nothing to wait for.
    fn status(&self) -> u32 {
        self.configuration & CONFIGURATION_ENABLE
    }

    fn queue(&mut self, offset: u64) -> Option<&mut u32> {
        let index = offset.checked_sub(QUEUES)? >> 2;
        self.queues.get_mut(usize::try_from(index).ok()?)
    }
}

impl Model for Nvme {
    fn read(&mut self, bar: u8, offset: u64) -> u32 {
        if bar != NVME_BAR {
            return 0;
        }
        let [cap_low, cap_high] = CAP;
        match offset {
            CAP_LOW => cap_low,
            CAP_HIGH => cap_high,
            VERSION => VERSION_1_4,
            CONFIGURATION => self.configuration,
            STATUS => self.status(),
            QUEUES..QUEUES_END => self.queue(offset).map_or(0, |queue| *queue),
            _ => 0,
        }
    }

    fn write(&mut self, bar: u8, offset: u64, value: u32) -> Option<u16> {
        if bar != NVME_BAR {
            return None;
        }
        match offset {
            CONFIGURATION => self.configuration = value,
            QUEUES..QUEUES_END => {
                if let Some(queue) = self.queue(offset) {
                    *queue = value;
                }
            }
            DOORBELLS..DOORBELLS_END if self.status() != 0 => {
                let doorbell = offset.wrapping_sub(DOORBELLS);
                let is_submission = doorbell & 4 == 0;
                return is_submission.then_some(u16::try_from(doorbell >> 3).unwrap_or(0));
            }
            _ => {}
        }
        None
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// A network card of Intel's 82576 family, physical or virtual function: its link is up, and a
/// driver can make it interrupt.
#[derive(Debug, Default)]
pub(super) struct Network {
    causes: u32,
    /// The register that the ports reach.
    selected: u32,
}

/// Device status: full duplex, link up, 1000 Mb/s.
const LINK: u64 = 0x0008;
const LINK_UP: u32 = 0x0000_0083;
/// Extended interrupt causes: written to set (a driver's self-test), read to see and clear.
const CAUSE_SET: u64 = 0x1520;
const CAUSE: u64 = 0x1580;
const NETWORK_BAR: u8 = 0;
/// Ports, by which a driver without access to the memory reaches the same: which register, and its value.
const PORTS_BAR: u8 = 2;
const PORT_REGISTER: u64 = 0x00;
const PORT_VALUE: u64 = 0x04;

impl Model for Network {
    fn read(&mut self, bar: u8, offset: u64) -> u32 {
        match (bar, offset) {
            (NETWORK_BAR, LINK) => LINK_UP,
            (NETWORK_BAR, CAUSE) => std::mem::take(&mut self.causes),
            (PORTS_BAR, PORT_REGISTER) => self.selected,
            (PORTS_BAR, PORT_VALUE) => self.read(NETWORK_BAR, self.selected.into()),
            _ => 0,
        }
    }

    fn write(&mut self, bar: u8, offset: u64, value: u32) -> Option<u16> {
        match (bar, offset) {
            (NETWORK_BAR, CAUSE_SET) if value != 0 => {
                self.causes |= value;
                u16::try_from(value.trailing_zeros()).ok()
            }
            (PORTS_BAR, PORT_REGISTER) => {
                self.selected = value;
                None
            }
            (PORTS_BAR, PORT_VALUE) => self.write(NETWORK_BAR, self.selected.into(), value),
            _ => None,
        }
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}
