//! The memory of the guest that the drivers run in, one for the whole process, as the drivers find
//! it by static functions.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};

use virtio::memory::{GuestRam, Memfd, PAGE_SIZE, PageMapper};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use xenbus::device_model::ForeignMapping;

const PAGES: usize = 4096;

struct Memory {
    memfd: Memfd,
    mapping: Box<dyn ForeignMapping>,
    /// For each page, whether a driver has it. Nobody gets page 0.
    taken: Mutex<Vec<bool>>,
}

fn memory() -> &'static Memory {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let memfd = Memfd::new(PAGES).unwrap();
        let mapping = memfd.map(0, PAGES).unwrap();
        let mut taken = vec![false; PAGES];
        taken[0] = true;
        Memory {
            memfd,
            mapping,
            taken: Mutex::new(taken),
        }
    })
}

/// The guest's memory, as a device gets it.
pub fn ram() -> Arc<GuestRam> {
    crate::common::ram(&memory().memfd)
}

pub struct GuestHal;

fn pages(len: usize) -> usize {
    len.div_ceil(PAGE_SIZE)
}

// SAFETY: what is handed out lies in a mapping that lives as long as the process, belongs to nobody
// else until it is given back, and is zeroed.
unsafe impl Hal for GuestHal {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let memory = memory();
        let mut taken = memory.taken.lock().unwrap();
        let first = taken
            .windows(count)
            .position(|pages| pages.iter().all(|taken| !taken))
            .expect("the test's guest has enough memory");
        taken[first..first + count].fill(true);
        let offset = first * PAGE_SIZE;
        // SAFETY: the mapping has PAGES pages, and these are among them and nobody's.
        let address = unsafe { memory.mapping.base().add(offset) };
        // SAFETY: as above.
        unsafe { address.write_bytes(0, count * PAGE_SIZE) };
        (offset as PhysAddr, address)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _: NonNull<u8>, count: usize) -> i32 {
        let first = usize::try_from(paddr).unwrap() / PAGE_SIZE;
        memory().taken.lock().unwrap()[first..first + count].fill(false);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are reached through the machine")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (paddr, copy) = Self::dma_alloc(pages(buffer.len()), direction);
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller lends the buffer, and the copy is as long.
            unsafe { copy.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        paddr
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let offset = usize::try_from(paddr).unwrap();
        // SAFETY: `paddr` came from `share`, so it lies in the mapping.
        let copy = unsafe { memory().mapping.base().add(offset) };
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller lends the buffer, and the copy is as long.
            unsafe { buffer.cast().copy_from_nonoverlapping(copy, buffer.len()) };
        }
        // SAFETY: as `share` allocated it.
        unsafe { Self::dma_dealloc(paddr, copy, pages(buffer.len())) };
    }
}
