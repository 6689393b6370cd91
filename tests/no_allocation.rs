//! A guest's configuration accesses allocate nothing, from the copied request to the reply.

#![allow(clippy::arithmetic_side_effects, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use conf_space::Bdf;
use conf_space::topology::TopologyKind;
use pcibackd::host::devices::{Devices, Quarantine, for_xen};
use pcibackd::host::sim::{MSI_ONLY, NIC_VF0, NVME, SimBus};
use pcibackd::rate_limit::RateLimit;
use pcibackd::session::exports::Exports;
use pcibackd::session::operation;
use pcibackd::session::telemetry::Telemetry;
use xenbus::Xen;
use xenbus::pciif::{Command, PciOp};
use xenbus::sim::{DomainKind, Machine, PciOptions};

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

#[test]
fn reads_and_writes_of_every_register_allocate_nothing() {
    const POWER_CONTROL: u8 = 0x01;
    let devices = [NVME, MSI_ONLY, NIC_VF0];
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(directory.path()).unwrap();
    let xen: Arc<dyn Xen> = Arc::new(machine.clone());
    let bus = SimBus::with_example_devices(&machine);
    let hidden = Devices::open(
        bus,
        Arc::clone(&xen),
        Arc::default(),
        directory.path().join("devices"),
    )
    .unwrap();
    let domain = machine.create_domain("guest", DomainKind::Pv).unwrap();
    let mut exports = Exports::new(domain, TopologyKind::Vpci, Arc::clone(&hidden), xen);
    let mut place = |bdf: Bdf| {
        hidden.hide(bdf, false, Quarantine::Ours).unwrap();
        machine
            .pci_attach(domain, for_xen(bdf), &PciOptions::default())
            .unwrap();
        exports.add(bdf, None).unwrap()
    };
    let places = devices.map(&mut place);
    let mut limit = RateLimit::new(10, Duration::from_secs(10));

    // Waking up restores what the device lost, which is no access like others.
    let mut power = [None; 3];
    for (place, power) in places.iter().zip(&mut power) {
        *power = capability(&mut exports, *place, &mut limit, POWER_CONTROL);
    }
    // Counting and tracing, too.
    let telemetry = Telemetry::default();
    let mut listener = telemetry.tap.listen();
    let before = ALLOCATIONS.get();
    let (mut read, mut written) = (0u32, 0u32);
    for cmd in [Command::ConfRead as u32, Command::ConfWrite as u32] {
        for (place, power) in places.iter().zip(power) {
            for offset in -4..4100i32 {
                if power.is_some_and(|base| (base..base + 8).contains(&(offset + 3))) {
                    continue;
                }
                for size in [1, 2, 3, 4] {
                    let op = PciOp {
                        cmd,
                        devfn: place.devfn().into(),
                        offset,
                        size,
                        value: 0x0107_0107,
                        ..PciOp::default()
                    };
                    let reply = operation::serve(&mut exports, &op, &mut limit);
                    telemetry.record(&op, &reply, Duration::from_micros(1));
                    let done = u32::from(reply.error.0 == 0);
                    if cmd == Command::ConfRead as u32 {
                        read += done;
                    } else {
                        written += done;
                    }
                }
            }
        }
    }
    let absent = PciOp {
        devfn: 0xff,
        ..PciOp::default()
    };
    operation::serve(&mut exports, &absent, &mut limit);
    let after = ALLOCATIONS.get();
    assert!(read > 1000 && written > 1000, "{read} {written}");
    assert_eq!(after - before, 0);
    let mut events = Vec::new();
    assert!(listener.take(&mut events) > 0 && !events.is_empty());
}

fn capability(exports: &mut Exports, place: Bdf, limit: &mut RateLimit, wanted: u8) -> Option<i32> {
    let mut byte = |offset: i32| {
        let op = PciOp {
            cmd: Command::ConfRead as u32,
            devfn: place.devfn().into(),
            offset,
            size: 1,
            ..PciOp::default()
        };
        operation::serve(exports, &op, limit).value
    };
    let mut next = byte(0x34);
    while next != 0 {
        let base = i32::try_from(next).unwrap();
        if byte(base) == u32::from(wanted) {
            return Some(base);
        }
        next = byte(base + 1);
    }
    None
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}
