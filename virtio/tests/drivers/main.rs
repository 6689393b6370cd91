//! The drivers of the crate `virtio-drivers` as a guest's, over every face of our transports.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing
)]

#[path = "../common/mod.rs"]
mod common;
mod devices;
mod entropy;
mod memory;
mod transports;

use std::sync::Arc;

use conf_space::Width::{Four, One, Two};
use virtio::pci::{Layout, Mode, Shape, VirtioFunction};
use virtio::transport::mmio::{Board, MmioDevice, SLOT_BYTES, Version};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::pci::bus::{BarInfo, Command, ConfigurationAccess, PciRoot};
use virtio_drivers::transport::{DeviceType, InterruptStatus, Transport};
use xenbus::device_model::IoSpace;

use common::{Machine, Notes, Sink, parts};
use entropy::{Entropy, expected};
use memory::{GuestHal, ram};
use transports::{Block, FUNCTION, Legacy, Mmio, Modern, Reach, place_bars};

const SHAPE: Shape = Shape {
    mode: Mode::Modern,
    layout: Layout::Qemu,
    legacy_in_memory: false,
};

/// What a legacy driver of `virtio-drivers` takes for granted: it asks for 8 descriptors, where the
/// device decides.
const LEGACY_QUEUE: u16 = 8;

fn function(shape: Shape) -> (Machine, Arc<Sink>) {
    let sink = Arc::new(Sink::default());
    let size = if shape.mode.has_legacy() {
        LEGACY_QUEUE
    } else {
        64
    };
    let parts = parts(Entropy::new(size), ram(), sink.clone());
    let function = VirtioFunction::new(parts, &shape).unwrap();
    (Machine::new(function), sink)
}

/// Takes bytes from the device, and sees that they are the device's.
fn request_entropy<T: Transport>(transport: T) -> VirtIORng<GuestHal, T> {
    let mut driver = VirtIORng::<GuestHal, T>::new(transport).unwrap();
    for length in [1, 100, 4096, 10_000] {
        let mut data = vec![0; length];
        assert_eq!(driver.request_entropy(&mut data).unwrap(), length);
        let all = data.iter().enumerate();
        assert!(all.into_iter().all(|(at, byte)| *byte == expected(at)));
    }
    driver
}

/// Uses the device as a driver does, with its interrupt line.
fn use_entropy<T: Transport>(transport: T, sink: &Sink) {
    let mut driver = request_entropy(transport);
    driver.disable_interrupts();
    driver.request_entropy(&mut [0; 10]).unwrap();
    let _ = driver.ack_interrupt();
    assert!(!sink.seen().line, "all is acknowledged");
    driver.enable_interrupts();
    driver.request_entropy(&mut [0; 10]).unwrap();
    assert!(sink.seen().line);
    assert!(driver.ack_interrupt() == InterruptStatus::QUEUE_INTERRUPT);
    assert!(!sink.seen().line);
}

#[test]
fn a_modern_driver_finds_its_way_in_every_layout() {
    for layout in [Layout::Qemu, Layout::Compact] {
        for mode in [Mode::Modern, Mode::Transitional] {
            let shape = Shape {
                mode,
                layout,
                ..SHAPE
            };
            let (machine, sink) = function(shape);
            let kind = DeviceType::EntropySource;
            use_entropy(Modern::find(&machine, kind, Reach::Bars), &sink);
            // A second driver finds the device as the first did.
            use_entropy(Modern::find(&machine, kind, Reach::Bars), &sink);
        }
    }
}

#[test]
fn a_modern_driver_needs_nothing_but_configuration_space() {
    for layout in [Layout::Qemu, Layout::Compact] {
        let (machine, sink) = function(Shape { layout, ..SHAPE });
        let kind = DeviceType::EntropySource;
        use_entropy(Modern::find(&machine, kind, Reach::Window), &sink);
        assert_eq!(machine.claims(), [], "no BAR was ever set");
    }
}

fn legacy_block(machine: &Machine, bar: usize) -> Block {
    match place_bars(machine)[bar] {
        Some(BarInfo::IO { address, .. }) => Block::new(machine, IoSpace::Port, address.into()),
        Some(BarInfo::Memory { address, .. }) => Block::new(machine, IoSpace::Memory, address),
        None => panic!("there is no BAR {bar}"),
    }
}

#[test]
fn a_legacy_driver_works_by_port_and_by_memory() {
    for mode in [Mode::Legacy, Mode::Transitional] {
        for layout in [Layout::Qemu, Layout::Compact] {
            let (machine, sink) = function(Shape {
                mode,
                layout,
                legacy_in_memory: true,
            });
            for bar in [0, 3] {
                let block = legacy_block(&machine, bar);
                let kind = DeviceType::EntropySource;
                use_entropy(Legacy::new(block, kind, false), &sink);
            }
        }
    }
}

#[test]
fn a_transitional_device_serves_a_legacy_driver_and_then_a_modern_one() {
    let (machine, sink) = function(Shape {
        mode: Mode::Transitional,
        ..SHAPE
    });
    let kind = DeviceType::EntropySource;
    for _ in 0..2 {
        use_entropy(Legacy::new(legacy_block(&machine, 0), kind, false), &sink);
        use_entropy(Modern::find(&machine, kind, Reach::Bars), &sink);
    }
}

#[test]
fn drivers_of_both_versions_work_in_any_slot_of_virtio_mmio() {
    const BASE: u64 = 0xfe70_0000;
    for version in [Version::One, Version::Two] {
        let sink = Arc::new(Sink::default());
        let mut board = Board::new(BASE, 4);
        let device = || parts(Entropy::new(64), ram(), sink.clone());
        for slot in [0, 3] {
            board
                .plug(slot, MmioDevice::new(device(), version))
                .unwrap();
        }
        let taken = board.plug(3, MmioDevice::new(device(), version));
        assert!(taken.is_err());
        let machine = Machine::new(board);
        for slot in [0, 3] {
            let block = Block::new(&machine, IoSpace::Memory, BASE + slot * SLOT_BYTES);
            assert_eq!(block.read(0, Four), 0x7472_6976);
            use_entropy(Mmio(block), &sink);
        }
        let empty = Block::new(&machine, IoSpace::Memory, BASE + SLOT_BYTES);
        assert_eq!(empty.read(0, Four), 0x7472_6976);
        assert_eq!(empty.read(8, Four), 0, "a slot without a device");
    }
}

/// A machine where the function goes and comes back before each access, as if killed.
fn restarting_function(shape: Shape) -> Machine {
    let notes = Notes::default();
    Machine::restarting(Box::new(move || {
        let device = Entropy::new(LEGACY_QUEUE);
        let parts = notes.parts(device, ram(), Arc::new(Sink::default()));
        Box::new(VirtioFunction::new(parts, &shape).unwrap())
    }))
}

#[test]
fn a_driver_on_pci_does_not_notice_restarts_between_any_two_accesses() {
    for layout in [Layout::Qemu, Layout::Compact] {
        let shape = Shape {
            mode: Mode::Transitional,
            layout,
            legacy_in_memory: true,
        };
        let machine = restarting_function(shape);
        let kind = DeviceType::EntropySource;
        for bar in [0, 3] {
            let block = legacy_block(&machine, bar);
            request_entropy(Legacy::new(block, kind, false));
        }
        request_entropy(Modern::find(&machine, kind, Reach::Bars));
        request_entropy(Modern::find(&machine, kind, Reach::Window));
    }
}

#[test]
fn a_driver_of_virtio_mmio_does_not_notice_restarts_between_any_two_accesses() {
    const BASE: u64 = 0xfe70_0000;
    for version in [Version::One, Version::Two] {
        let notes = Notes::default();
        let machine = Machine::restarting(Box::new(move || {
            let parts = notes.parts(Entropy::new(64), ram(), Arc::new(Sink::default()));
            let mut board = Board::new(BASE, 1);
            board.plug(0, MmioDevice::new(parts, version)).unwrap();
            Box::new(board)
        }));
        for _ in 0..2 {
            request_entropy(Mmio(Block::new(&machine, IoSpace::Memory, BASE)));
        }
    }
}

#[test]
fn after_a_restart_all_interrupts_are_repeated() {
    let notes = Notes::default();
    let sink = Arc::new(Sink::default());
    let restart = {
        let (notes, sink) = (notes.clone(), sink.clone());
        move || {
            let parts = notes.parts(Entropy::new(64), ram(), sink.clone());
            VirtioFunction::new(parts, &SHAPE).unwrap()
        }
    };
    let machine = Machine::new(restart());
    let kind = DeviceType::EntropySource;
    let mut driver = request_entropy(Modern::find(&machine, kind, Reach::Bars));
    let _ = driver.ack_interrupt();
    drop(restart());
    assert!(sink.seen().line, "by line");
    let entry = |vector: u64| {
        let bars = PciRoot::new(machine.clone()).bars(FUNCTION).unwrap();
        let (address, _) = bars[1].as_ref().unwrap().memory_address_size().unwrap();
        Block::new(&machine, IoSpace::Memory, address + 16 * vector)
    };
    for vector in 0..2u32 {
        let entry = entry(vector.into());
        for (offset, value) in [(0, 0xfee0_1000), (8, 0x40 + vector), (12, 0)] {
            entry.write(offset, Four, value);
        }
    }
    machine.write_config(0x42, Two, 0x8000);
    let modern = Modern::find(&machine, kind, Reach::Bars);
    modern.common.write(0x10, Two, 0);
    modern.common.write(0x16, Two, 0);
    modern.common.write(0x1a, Two, 1);
    drop(restart());
    let messages = sink.seen().messages;
    assert_eq!(messages, [(0xfee0_1000, 0x41), (0xfee0_1000, 0x40)]);
    assert!(!sink.seen().line);
}

#[test]
fn a_driver_with_msix_gets_messages_and_no_line() {
    for (layout, bar, table) in [(Layout::Qemu, 1, 0), (Layout::Compact, 4, 0x8000)] {
        let (machine, sink) = function(Shape { layout, ..SHAPE });
        let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
        let bars = PciRoot::new(machine.clone()).bars(FUNCTION).unwrap();
        let (address, _) = bars[bar].as_ref().unwrap().memory_address_size().unwrap();
        let entry = Block::new(&machine, IoSpace::Memory, address + table + 16);
        for (offset, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x4041), (12, 0)] {
            entry.write(offset, Four, value);
        }
        // MSI-X is the first capability: function mask off, on.
        machine.write_config(0x42, Two, 0x8000);
        modern.common.write(0x16, Two, 0);
        let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
        driver.enable_interrupts();
        driver.request_entropy(&mut [0; 10]).unwrap();
        assert_eq!(sink.seen().messages, [], "the queue has no vector yet");
        drop(driver);

        let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
        let vector = |common: &Block, vector: u32| {
            common.write(0x1a, Two, vector);
            common.read(0x1a, Two)
        };
        let common = modern.common.clone();
        let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
        assert_eq!(vector(&common, 2), 0xffff, "there are two vectors");
        assert_eq!(vector(&common, 1), 1);
        driver.enable_interrupts();
        driver.request_entropy(&mut [0; 10]).unwrap();
        assert_eq!(sink.seen().messages, [(0xfee0_1000, 0x4041)]);
        assert!(!sink.seen().line);
        assert!(driver.ack_interrupt() == InterruptStatus::empty());
    }
}

#[test]
fn msix_moves_the_device_configuration_of_a_legacy_device() {
    let (machine, _) = function(Shape {
        mode: Mode::Legacy,
        ..SHAPE
    });
    let block = legacy_block(&machine, 0);
    block.write(20, Two, 1);
    assert_eq!(block.read(20, Two), 0, "that is device configuration");
    machine.write_config(0x42, Two, 0x8000);
    block.write(20, Two, 1);
    assert_eq!(block.read(20, Two), 1, "that is the configuration vector");
    block.write(22, Two, 7);
    assert_eq!(block.read(22, Two), 0xffff, "there is no such vector");
}

#[test]
fn a_driver_carries_on_when_its_bar_is_moved() {
    let (machine, _) = function(SHAPE);
    let mut modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let mut root = PciRoot::new(machine.clone());
    let at = 0x12_3456_0000;
    root.set_command(FUNCTION, Command::empty());
    assert_eq!(machine.claims(), []);
    assert_eq!(modern.common.read(0x12, Two), 0xffff, "nobody answers");
    root.set_bar_64(FUNCTION, 4, at);
    root.set_command(FUNCTION, Command::MEMORY_SPACE | Command::IO_SPACE);
    assert_eq!(
        modern.common.read(0x12, Two),
        0xffff,
        "nobody answers there"
    );
    let place = |offset| Block::new(&machine, IoSpace::Memory, at + offset);
    modern.common = place(0);
    modern.isr = place(0x1000);
    modern.device = place(0x2000);
    let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
    assert_eq!(driver.request_entropy(&mut [0; 10]).unwrap(), 10);
}

#[test]
fn a_driver_resets_one_queue_and_enables_it_again() {
    let (machine, _) = function(SHAPE);
    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let common = modern.common.clone();
    common.write(0x14, One, 3);
    for (select, features) in [(0, 0), (1, 1 | 1 << 8)] {
        common.write(0x08, Four, select);
        common.write(0x0c, Four, features);
    }
    common.write(0x14, One, 0xb);
    assert_eq!(common.read(0x14, One), 0xb);
    let enable = || {
        for (register, page) in [(0x20, 0x10), (0x28, 0x11), (0x30, 0x12)] {
            common.write(register, Four, page << 12);
        }
        common.write(0x1c, Two, 1);
    };
    enable();
    common.write(0x14, One, 0xf);
    assert_eq!(common.read(0x1c, Two), 1);
    common.write(0x3a, Two, 1);
    assert_eq!(common.read(0x3a, Two), 0, "the reset is done");
    assert_eq!(common.read(0x1c, Two), 0);
    assert_eq!(common.read(0x20, Four), 0);
    enable();
    assert_eq!(common.read(0x1c, Two), 1);
    assert_eq!(common.read(0x14, One), 0xf);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (machine, _) = function(SHAPE);
    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let common = modern.common;
    common.write(0x14, One, 3);
    for (high, status) in [(1 | 1 << 2, 3), (0, 3), (1, 0xb)] {
        common.write(0x08, Four, 1);
        common.write(0x0c, Four, high);
        common.write(0x14, One, 0xb);
        assert_eq!(common.read(0x14, One), status, "{high:#x}");
    }
}

#[test]
fn a_queue_outside_of_memory_makes_the_device_need_a_reset() {
    let (machine, sink) = function(SHAPE);
    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let common = modern.common;
    let begin = || {
        common.write(0x14, One, 3);
        common.write(0x08, Four, 1);
        common.write(0x0c, Four, 1);
        common.write(0x14, One, 0xb);
    };
    begin();
    common.write(0x24, Four, 0x7fff_ffff);
    common.write(0x1c, Two, 1);
    common.write(0x14, One, 0xf);
    assert_eq!(common.read(0x14, One), 0x4f);
    assert!(sink.seen().line);
    assert_eq!(modern.isr.read(0, One), 2);
    // Notifications do no harm.
    modern.notify.write(0, Two, 0);
    common.write(0x14, One, 0);
    assert_eq!(common.read(0x14, One), 0);
    begin();
    assert_eq!(common.read(0x14, One), 0xb);
}

#[test]
fn a_function_says_what_it_is() {
    for (mode, id, subsystem, revision) in [
        (Mode::Modern, 0x1044, 0x1100, 1),
        (Mode::Transitional, 0x1005, 4, 0),
        (Mode::Legacy, 0x1005, 4, 0),
    ] {
        let (machine, _) = function(Shape { mode, ..SHAPE });
        assert_eq!(machine.read_word(FUNCTION, 0), id << 16 | 0x1af4);
        assert_eq!(machine.read_config(0x08, One), revision);
        assert_eq!(machine.read_word(FUNCTION, 0x2c), subsystem << 16 | 0x1af4);
    }
}
