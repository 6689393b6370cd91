//! The guest: its CPU, and its memory as its drivers find it.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Arc;

use conf_space::Width;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use xenbus::DomId;
use xenbus::device_model::{ForeignMapping, IoRange, IoSpace, IoreqServerId};
use xenbus::sim::{self, HvmGuest, Vcpu};

const PAGES: usize = 4096;

/// The function that the drivers look for.
const FUNCTION: u16 = 0xf8;

/// A guest, as its drivers reach their device.
#[derive(Debug, Clone)]
pub struct Machine {
    machine: sim::Machine,
    guest: HvmGuest,
    vcpu: Arc<Vcpu>,
}

impl Machine {
    /// The guest whose drivers run on this thread from now on.
    pub fn new(machine: &sim::Machine, domain: DomId) -> Self {
        let guest = machine.hvm_guest(domain);
        if let Ok(mapping) = guest.map(0, PAGES) {
            let mut taken = vec![false; PAGES];
            // Nobody gets page 0.
            taken[0] = true;
            MEMORY.set(Some(Memory { mapping, taken }));
        }
        Self {
            machine: machine.clone(),
            vcpu: Arc::new(guest.vcpu(0)),
            guest,
        }
    }

    pub fn guest(&self) -> &HvmGuest {
        &self.guest
    }

    pub fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    /// The guest's drivers are done with its memory.
    pub fn let_go(&self) {
        MEMORY.set(None);
    }

    fn claimed(&self) -> Vec<IoRange> {
        self.machine.claimed(self.guest.domain(), IoreqServerId(0))
    }

    /// Whether somebody answers for any device.
    pub fn is_served(&self) -> bool {
        !self.claimed().is_empty()
    }

    /// What is decoded of the BARs.
    pub fn claims(&self) -> Vec<IoRange> {
        let mut claimed = self.claimed();
        claimed.retain(|range| range.space != IoSpace::Config && !is_mmio(range));
        claimed
    }

    /// The row of slots of virtio-mmio.
    pub fn row(&self) -> Vec<IoRange> {
        let mut claimed = self.claimed();
        claimed.retain(is_mmio);
        claimed
    }

    pub fn read_config(&self, offset: u64, width: Width) -> u32 {
        let register = u8::try_from(offset).unwrap();
        let size = width.bytes().into();
        self.vcpu.config_read(FUNCTION, register, size).unwrap()
    }

    pub fn write_config(&self, offset: u64, width: Width, value: u32) {
        let register = u8::try_from(offset).unwrap();
        let size = width.bytes().into();
        let written = self.vcpu.config_write(FUNCTION, register, size, value);
        written.unwrap();
    }

    pub fn read(&self, space: IoSpace, address: u64, width: Width) -> u32 {
        let size = width.bytes().into();
        match space {
            IoSpace::Port => {
                let port = u16::try_from(address).unwrap();
                self.vcpu.port_read(port, size).unwrap()
            }
            _ => self.vcpu.memory_read(address, size).unwrap() as u32,
        }
    }

    pub fn write(&self, space: IoSpace, address: u64, width: Width, value: u32) {
        let size = width.bytes().into();
        match space {
            IoSpace::Port => {
                let port = u16::try_from(address).unwrap();
                self.vcpu.port_write(port, size, value).unwrap();
            }
            _ => {
                let value = value.into();
                self.vcpu.memory_write(address, size, value).unwrap();
            }
        }
    }
}

fn is_mmio(range: &IoRange) -> bool {
    range.space == IoSpace::Memory && (0xfe70_0000..0xfe80_0000).contains(&range.first)
}

struct Memory {
    mapping: Box<dyn ForeignMapping>,
    /// For each page, whether a driver has it.
    taken: Vec<bool>,
}

thread_local! {
    /// Drivers find it by static functions; each test is a thread with a guest of its own.
    static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
}

fn with_memory<T>(body: impl FnOnce(&mut Memory) -> T) -> T {
    MEMORY.with_borrow_mut(|memory| body(memory.as_mut().unwrap()))
}

pub struct GuestHal;

// SAFETY: what is handed out lies in a mapping that lives until the test lets go of it, belongs to nobody else
// until it is given back, and is zeroed.
unsafe impl Hal for GuestHal {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        with_memory(|memory| {
            let mut runs = memory.taken.windows(count);
            let first = runs.position(|pages| pages.iter().all(|taken| !taken));
            let first = first.expect("the test's guest has enough memory");
            memory.taken[first..first + count].fill(true);
            let offset = first * PAGE_SIZE;
            // SAFETY: the mapping has PAGES pages, and these are among them and nobody's.
            let address = unsafe { memory.mapping.base().add(offset) };
            // SAFETY: as above.
            unsafe { address.write_bytes(0, count * PAGE_SIZE) };
            (offset as PhysAddr, address)
        })
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _: NonNull<u8>, count: usize) -> i32 {
        let first = usize::try_from(paddr).unwrap() / PAGE_SIZE;
        with_memory(|memory| memory.taken[first..first + count].fill(false));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are reached through the CPU")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (paddr, copy) = Self::dma_alloc(buffer.len().div_ceil(PAGE_SIZE), direction);
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller lends the buffer, and the copy is as long.
            unsafe { copy.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        paddr
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let offset = usize::try_from(paddr).unwrap();
        // SAFETY: `paddr` came from `share`, so it lies in the mapping.
        let copy = with_memory(|memory| unsafe { memory.mapping.base().add(offset) });
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller lends the buffer, and the copy is as long.
            unsafe { buffer.cast().copy_from_nonoverlapping(copy, buffer.len()) };
        }
        // SAFETY: as `share` allocated it.
        unsafe { Self::dma_dealloc(paddr, copy, buffer.len().div_ceil(PAGE_SIZE)) };
    }
}
