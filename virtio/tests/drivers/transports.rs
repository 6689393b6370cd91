//! The transports of the drivers, written from the specification as a guest would, over a
//! [`Machine`].

use conf_space::Width::{self, Four, One, Two};
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, PciRoot,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PAGE_SIZE, PhysAddr, Result};
use xenbus::device_model::IoSpace;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::common::Machine;

/// The function is alone on its bus.
pub const FUNCTION: DeviceFunction = DeviceFunction {
    bus: 0,
    device: 0x1f,
    function: 0,
};

impl ConfigurationAccess for Machine {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        if function == FUNCTION {
            self.read_config(offset.into(), Four)
        } else {
            u32::MAX
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        assert_eq!(function, FUNCTION);
        self.write_config(offset.into(), Four, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

/// What firmware does: gives each BAR an address, and switches the function on.
pub fn place_bars(machine: &Machine) -> Vec<Option<BarInfo>> {
    let mut root = PciRoot::new(machine.clone());
    root.set_command(FUNCTION, Command::empty());
    let (mut port, mut memory) = (0xc000u32, 0xf000_0000u32);
    let bars = root.bars(FUNCTION).unwrap();
    for (index, bar) in (0u8..).zip(&bars) {
        match bar {
            Some(BarInfo::IO { size, .. }) => {
                port = port.next_multiple_of(*size);
                root.set_bar_32(FUNCTION, index, port);
                port += size;
            }
            Some(BarInfo::Memory { size, .. }) => {
                let size = u32::try_from(*size).unwrap();
                memory = memory.next_multiple_of(size);
                root.set_bar_32(FUNCTION, index, memory);
                memory += size;
            }
            None => {}
        }
    }
    assert_eq!(machine.claims(), [], "nothing decodes before it is told to");
    let on = Command::IO_SPACE | Command::MEMORY_SPACE | Command::BUS_MASTER;
    root.set_command(FUNCTION, on);
    root.bars(FUNCTION).unwrap().into_iter().collect()
}

/// A register block, and how it is reached.
#[derive(Clone)]
pub struct Block {
    machine: Machine,
    door: Door,
}

#[derive(Debug, Clone, Copy)]
enum Door {
    Address {
        space: IoSpace,
        base: u64,
    },
    /// By the capability at this offset of the configuration space.
    Window {
        at: u64,
        bar: u8,
        base: u32,
    },
}

impl Block {
    pub fn new(machine: &Machine, space: IoSpace, base: u64) -> Self {
        Self {
            machine: machine.clone(),
            door: Door::Address { space, base },
        }
    }

    /// Sets the window up, and is where its data is.
    fn look(&self, at: u64, bar: u8, offset: u64, width: Width) -> u64 {
        self.machine.write_config(at + 4, One, bar.into());
        self.machine.write_config(at + 8, Four, offset as u32);
        self.machine
            .write_config(at + 12, Four, width.bytes().into());
        at + 16
    }

    pub fn read(&self, offset: u64, width: Width) -> u32 {
        match self.door {
            Door::Address { space, base } => self.machine.read(space, base + offset, width),
            Door::Window { at, bar, base } => {
                let data = self.look(at, bar, u64::from(base) + offset, width);
                self.machine.read_config(data, width)
            }
        }
    }

    pub fn write(&self, offset: u64, width: Width, value: u32) {
        match self.door {
            Door::Address { space, base } => {
                self.machine.write(space, base + offset, width, value);
            }
            Door::Window { at, bar, base } => {
                let data = self.look(at, bar, u64::from(base) + offset, width);
                self.machine.write_config(data, width, value & width.mask());
            }
        }
    }

    fn write_address(&self, low: u64, high: u64, address: PhysAddr) {
        self.write(low, Four, address as u32);
        self.write(high, Four, (address >> 32) as u32);
    }

    fn read_value<T: FromBytes + IntoBytes>(&self, start: u64) -> T {
        let mut value = T::new_zeroed();
        for (offset, byte) in (start..).zip(value.as_mut_bytes()) {
            *byte = self.read(offset, One) as u8;
        }
        value
    }

    fn write_value<T: IntoBytes + Immutable>(&self, start: u64, value: &T) {
        for (offset, byte) in (start..).zip(value.as_bytes()) {
            self.write(offset, One, (*byte).into());
        }
    }
}

fn status_bits(status: DeviceStatus) -> u32 {
    status.bits()
}

/// Virtio 1.3, section 4.1, found by the capability list.
pub struct Modern {
    pub common: Block,
    pub notify: Block,
    pub multiplier: u32,
    pub isr: Block,
    pub device: Block,
    kind: DeviceType,
}

/// How a modern driver reaches the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Bars,
    /// By the configuration space alone.
    Window,
}

impl Modern {
    pub fn find(machine: &Machine, kind: DeviceType, reach: Reach) -> Self {
        let bars = match reach {
            Reach::Bars => place_bars(machine),
            Reach::Window => Vec::new(),
        };
        let root = PciRoot::new(machine.clone());
        let found: Vec<_> = root.capabilities(FUNCTION).collect();
        let type_of = |private_header: u16| usize::from(private_header >> 8);
        let window = found
            .iter()
            .find(|found| found.id == 0x09 && type_of(found.private_header) == 5)
            .unwrap();
        let word = |offset| machine.read_word(FUNCTION, offset);
        let mut blocks: [Option<Block>; 6] = Default::default();
        let mut multiplier = 0;
        for capability in &found {
            let block = type_of(capability.private_header);
            if capability.id != 0x09 || block == 5 || blocks[block].is_some() {
                continue;
            }
            let bar = word(capability.offset + 4) as u8;
            let base = word(capability.offset + 8);
            let door = match (reach, bars.get(usize::from(bar))) {
                (Reach::Window, _) => Door::Window {
                    at: window.offset.into(),
                    bar,
                    base,
                },
                (Reach::Bars, Some(Some(BarInfo::IO { address, .. }))) => Door::Address {
                    space: IoSpace::Port,
                    base: u64::from(*address + base),
                },
                (Reach::Bars, Some(Some(BarInfo::Memory { address, .. }))) => Door::Address {
                    space: IoSpace::Memory,
                    base: address + u64::from(base),
                },
                _ => panic!("a capability points to a BAR that is not there"),
            };
            let machine = machine.clone();
            blocks[block] = Some(Block { machine, door });
            if block == 2 {
                multiplier = word(capability.offset + 16);
            }
        }
        let [_, common, notify, isr, device, _] = blocks;
        Self {
            common: common.unwrap(),
            notify: notify.unwrap(),
            multiplier,
            isr: isr.unwrap(),
            device: device.unwrap(),
            kind,
        }
    }
}

impl Transport for Modern {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        let half = |select| {
            self.common.write(0x00, Four, select);
            u64::from(self.common.read(0x04, Four))
        };
        half(0) | half(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.common.write(0x08, Four, select);
            self.common.write(0x0c, Four, half);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.common.write(0x16, Two, queue.into());
        self.common.read(0x18, Two)
    }

    fn notify(&mut self, queue: u16) {
        self.common.write(0x16, Two, queue.into());
        let offset = self.common.read(0x1e, Two) * self.multiplier;
        self.notify.write(offset.into(), Two, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.common.read(0x14, One))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.common.write(0x14, One, status_bits(status));
        while status.is_empty() && !self.get_status().is_empty() {
            std::thread::yield_now();
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.common.write(0x16, Two, queue.into());
        self.common.write(0x18, Two, size);
        self.common.write_address(0x20, 0x24, descriptors);
        self.common.write_address(0x28, 0x2c, driver);
        self.common.write_address(0x30, 0x34, device);
        self.common.write(0x1c, Two, 1);
    }

    fn queue_unset(&mut self, _: u16) {
        // A modern PCI driver cannot: it resets the device.
        self.set_status(DeviceStatus::empty());
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.common.write(0x16, Two, queue.into());
        self.common.read(0x1c, Two) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.isr.read(0, One))
    }

    fn read_config_generation(&self) -> u32 {
        self.common.read(0x15, One)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        Ok(self.device.read_value(offset as u64))
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.device.write_value(offset as u64, &value);
        Ok(())
    }
}

/// Virtio 0.9.5 on PCI.
pub struct Legacy {
    pub block: Block,
    kind: DeviceType,
    config: u64,
}

impl Legacy {
    /// `msix`: the driver has switched MSI-X on, which moves the device configuration.
    pub fn new(block: Block, kind: DeviceType, msix: bool) -> Self {
        let config = if msix { 24 } else { 20 };
        Self {
            block,
            kind,
            config,
        }
    }
}

impl Transport for Legacy {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.block.read(0, Four).into()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.block.write(4, Four, features as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.block.write(14, Two, queue.into());
        self.block.read(12, Two)
    }

    fn notify(&mut self, queue: u16) {
        self.block.write(16, Two, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.block.read(18, One))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.block.write(18, One, status_bits(status));
    }

    fn set_guest_page_size(&mut self, size: u32) {
        assert_eq!(size, 4096);
    }

    fn requires_legacy_layout(&self) -> bool {
        true
    }

    fn queue_set(&mut self, queue: u16, size: u32, base: PhysAddr, _: PhysAddr, _: PhysAddr) {
        assert_eq!(size, self.max_queue_size(queue), "the device decides");
        let page = u32::try_from(base / PAGE_SIZE as u64).unwrap();
        self.block.write(8, Four, page);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.block.write(14, Two, queue.into());
        self.block.write(8, Four, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.block.write(14, Two, queue.into());
        self.block.read(8, Four) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.block.read(19, One))
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        Ok(self.block.read_value(self.config + offset as u64))
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.block.write_value(self.config + offset as u64, &value);
        Ok(())
    }
}

/// Virtio 1.3, section 4.2.
pub struct Mmio(pub Block);

impl Mmio {
    fn is_legacy(&self) -> bool {
        self.0.read(0x004, Four) == 1
    }

    fn select(&self, queue: u16) {
        self.0.write(0x030, Four, queue.into());
    }
}

impl Transport for Mmio {
    fn device_type(&self) -> DeviceType {
        self.0.read(0x008, Four).try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        let half = |select| {
            self.0.write(0x014, Four, select);
            u64::from(self.0.read(0x010, Four))
        };
        half(0) | half(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        let halves = [(0, features as u32), (1, (features >> 32) as u32)];
        let count = if self.is_legacy() { 1 } else { 2 };
        for (select, half) in halves.into_iter().take(count) {
            self.0.write(0x024, Four, select);
            self.0.write(0x020, Four, half);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        self.0.read(0x034, Four)
    }

    fn notify(&mut self, queue: u16) {
        self.0.write(0x050, Four, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.0.read(0x070, Four))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.0.write(0x070, Four, status_bits(status));
    }

    fn set_guest_page_size(&mut self, size: u32) {
        if self.is_legacy() {
            self.0.write(0x028, Four, size);
        }
    }

    fn requires_legacy_layout(&self) -> bool {
        self.is_legacy()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.select(queue);
        self.0.write(0x038, Four, size);
        if self.is_legacy() {
            let page = PAGE_SIZE as u64;
            self.0.write(0x03c, Four, page as u32);
            let number = u32::try_from(descriptors / page).unwrap();
            self.0.write(0x040, Four, number);
            return;
        }
        self.0.write_address(0x080, 0x084, descriptors);
        self.0.write_address(0x090, 0x094, driver);
        self.0.write_address(0x0a0, 0x0a4, device);
        self.0.write(0x044, Four, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.select(queue);
        let register = if self.is_legacy() { 0x040 } else { 0x044 };
        self.0.write(register, Four, 0);
        while self.queue_used(queue) {
            std::thread::yield_now();
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.select(queue);
        let register = if self.is_legacy() { 0x040 } else { 0x044 };
        self.0.read(register, Four) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.0.read(0x060, Four);
        self.0.write(0x064, Four, status);
        InterruptStatus::from_bits_retain(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.0.read(0x0fc, Four)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        Ok(self.0.read_value(0x100 + offset as u64))
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.0.write_value(0x100 + offset as u64, &value);
        Ok(())
    }
}
