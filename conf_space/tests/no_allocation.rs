//! The operation path allocates nothing: neither reads nor writes nor looking a device up.

#![allow(clippy::arithmetic_side_effects, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use conf_space::Bdf;
use conf_space::overlay::{Overlay, Policy};
use conf_space::topology::{Placement, Topology, TopologyKind};

#[path = "overlay/device.rs"]
#[allow(dead_code)]
mod device;

/// Counts the allocations of the current thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(action: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    action();
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(
        allocations_of(|| drop(std::hint::black_box(Box::new(1)))),
        1
    );
}

#[test]
fn reads_and_writes_of_the_whole_space_allocate_nothing() {
    let space = device::nic();
    let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
    let mut results = 0u64;
    let count = allocations_of(|| {
        for permissive in [false, true] {
            let policy = Policy {
                permissive: permissive.into(),
                allow_interrupt_control: permissive,
            };
            for offset in -8..4104 {
                for size in [1, 2, 4] {
                    let read = overlay.read(&space, offset, size);
                    results += u64::from(read.unwrap_or(0));
                    let write = overlay.write(&space, offset, size, u32::MAX, &policy);
                    results += u64::from(write.is_ok());
                }
            }
        }
        overlay.release();
    });
    assert!(results > 0);
    assert_eq!(count, 0);
}

#[test]
fn looking_a_device_up_allocates_nothing() {
    for kind in [TopologyKind::Vpci, TopologyKind::Passthrough] {
        let mut topology = Topology::new(kind);
        let bdf = Bdf::new(0, 3, 0, 0).unwrap();
        let device = Placement {
            bdf,
            is_virtual_function: false,
            hint: None,
        };
        let address = topology.place(device).unwrap();
        let count = allocations_of(|| {
            let (bus, devfn) = (u32::from(address.bus()), u32::from(address.devfn()));
            assert_eq!(topology.find(0, bus, devfn), Some(bdf));
            assert_eq!(topology.find(1, u32::MAX, 256), None);
        });
        assert_eq!(count, 0);
    }
}
