//! A network card in memory, much like an 82574, for tests and benchmarks.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use conf_space::access::{AccessError, ConfigSize, ConfigSpace, Width};
use conf_space::memory::MemorySpace;
use conf_space::overlay::Identity;
use conf_space::registers::{Block, express, header, msi, msix, power_management as pm, vpd};
use conf_space::{Bdf, Resource, ResourceFlags};

pub const PM: u16 = 0xc8;
pub const MSI: u16 = 0xd0;
pub const EXPRESS: u16 = 0x80;
pub const MSIX: u16 = 0x60;
pub const VPD: u16 = 0x70;
pub const AER: u16 = 0x100;

pub const MEMORY_BAR: Resource = Resource {
    start: 0xfebc_0000,
    size: 0x2_0000,
    flags: ResourceFlags::MEMORY,
};
pub const IO_BAR: Resource = Resource {
    start: 0xc000,
    size: 0x20,
    flags: ResourceFlags::IO,
};
pub const WIDE_BAR: Resource = Resource {
    start: 0x38_fe00_0000,
    size: 0x2_0000_0000,
    flags: ResourceFlags::MEMORY
        .union(ResourceFlags::MEMORY_64)
        .union(ResourceFlags::PREFETCHABLE),
};
pub const ROM: Resource = Resource {
    start: 0xfeb8_0000,
    size: 0x4_0000,
    flags: ResourceFlags::MEMORY,
};

/// BAR 0 memory, BAR 2 I/O, BARs 4 and 5 one of 64 bits, ROM.
pub fn identity() -> Identity {
    let mut resources = [Resource::ABSENT; 7];
    resources[0] = MEMORY_BAR;
    resources[2] = IO_BAR;
    resources[4] = WIDE_BAR;
    resources[6] = ROM;
    Identity {
        bdf: Bdf::new(0, 3, 0, 0).unwrap(),
        vendor: 0x8086,
        device: 0x10d3,
        is_virtual_function: false,
        interrupt_line: 0x2a,
        resources,
        config_size: ConfigSize::Extended,
    }
}

/// The card's registers, as the host has left them: decode on, bus master off.
pub fn nic() -> MemorySpace {
    let mut space = MemorySpace::new(ConfigSize::Extended);
    for register in header::TYPE_0.registers {
        space.add_register(0, register);
    }
    space.set(0x00, Width::Four, 0x10d3_8086);
    space.set(0x04, Width::Four, 0x0010_0003);
    space.set(0x08, Width::Four, 0x0200_0000);
    space.set(0x0c, Width::One, 0x10);
    space.set(0x10, Width::Four, 0xfebc_0000);
    space.set(0x18, Width::Four, 0x0000_c001);
    space.set(0x20, Width::Four, 0xfe00_000c);
    space.set(0x24, Width::Four, 0x0000_0038);
    space.set(0x2c, Width::Four, 0xa01f_8086);
    space.set(0x30, Width::Four, 0xfeb8_0000);
    space.set(0x34, Width::One, u32::from(PM));
    space.set(0x3c, Width::Two, 0x010b);
    add(&mut space, PM, &pm::BLOCK, 0x01, MSI);
    space.set(PM + 2, Width::Two, 0xfa23);
    space.set(PM + 4, Width::Two, 0x2100);
    add(
        &mut space,
        MSI,
        msi::block(msi::control::ADDRESS_64),
        0x05,
        EXPRESS,
    );
    space.set(MSI + 2, Width::Two, 0x0080);
    space.set(MSI + 4, Width::Four, 0xfee0_1000);
    add(&mut space, EXPRESS, express::block(2), 0x10, MSIX);
    space.set(EXPRESS + 2, Width::Two, 0x0002);
    add(&mut space, MSIX, &msix::BLOCK, 0x11, VPD);
    space.set(MSIX + 2, Width::Two, 0x0004);
    add(&mut space, VPD, &vpd::BLOCK, 0x03, 0);
    space.set(VPD + 4, Width::Four, 0x1234_5678);
    space.set(AER, Width::Four, 0x0001_0001);
    space
}

fn add(space: &mut MemorySpace, base: u16, block: &Block, id: u32, next: u16) {
    for register in block.registers {
        space.add_register(base, register);
    }
    space.set(base, Width::Two, id | u32::from(next) << 8);
}

/// A virtual function: IDs, BARs and the memory bit read as hardware has them there.
pub fn virtual_function() -> (MemorySpace, Identity) {
    let mut space = MemorySpace::new(ConfigSize::Extended);
    space.set(0x00, Width::Four, 0xffff_ffff);
    space.make_writable(0x04, Width::Two, 0x0004);
    let mut identity = identity();
    identity.device = 0x10ed;
    identity.is_virtual_function = true;
    identity.interrupt_line = 0;
    identity.resources = [Resource::ABSENT; 7];
    identity.resources[0] = WIDE_BAR;
    (space, identity)
}

/// A device that writes down every access.
pub struct Recorder<S> {
    pub space: S,
    writes: Mutex<Vec<(u16, Width, u32)>>,
    reads: AtomicUsize,
}

impl<S> Recorder<S> {
    pub fn new(space: S) -> Self {
        Self {
            space,
            writes: Mutex::default(),
            reads: AtomicUsize::new(0),
        }
    }

    /// The writes since this was asked last.
    pub fn writes(&self) -> Vec<(u16, Width, u32)> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }

    /// Number of reads since this was asked last.
    pub fn reads(&self) -> usize {
        self.reads.swap(0, Ordering::Relaxed)
    }
}

impl<S: ConfigSpace> ConfigSpace for Recorder<S> {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.space.read(offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        self.writes.lock().unwrap().push((offset, width, value));
        self.space.write(offset, width, value)
    }
}

/// A device that answers nothing but an error.
pub struct Broken(pub AccessError);

impl ConfigSpace for Broken {
    fn read(&self, _offset: u16, _width: Width) -> Result<u32, AccessError> {
        Err(self.0)
    }

    fn write(&self, _offset: u16, _width: Width, _value: u32) -> Result<(), AccessError> {
        Err(self.0)
    }
}
