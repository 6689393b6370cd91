//! What an access of a guest's driver to a register costs us, from the request to the device and back.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use conf_space::Width::{self, Four, One, Two};
use criterion::{Criterion, criterion_group, criterion_main};
use virtio::Features;
use virtio::device::{Activation, Device, DeviceKind};
use virtio::ioreq::{Target, Window};
use virtio::memory::{GuestRam, Memfd, Words};
use virtio::pci::{Layout, Mode, Shape, VirtioFunction};
use virtio::queue::Queue;
use virtio::transport::{InterruptSink, Notes, Parts, RING_FEATURES};

const QUEUE_SIZES: [u16; 4] = [256; 4];

/// A device that does nothing.
struct Nothing;

impl Device for Nothing {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, _: Activation) {}

    fn notify(&self, queue: u16) {
        black_box(queue);
    }

    fn reset(&mut self) {}

    fn is_reset(&self) -> bool {
        true
    }

    fn reset_queue(&mut self, _: u16) {}

    fn is_queue_reset(&self, _: u16) -> bool {
        true
    }

    fn enable_queue(&mut self, _: u16, _: Queue) {}
}

#[derive(Debug)]
struct Nowhere;

impl InterruptSink for Nowhere {
    fn msi(&self, _: u64, _: u32) {}

    fn intx(&self, _: bool) {}
}

/// A live transitional function in QEMU's layout.
fn function() -> VirtioFunction {
    let memory = Memfd::new(64).unwrap();
    let words = Words::volatile(Notes::words(&Nothing)).unwrap();
    let parts = Parts {
        name: "bench".into(),
        device: Box::new(Nothing),
        features: RING_FEATURES,
        ram: Arc::new(GuestRam::new(Arc::new(memory), 1)),
        sink: Arc::new(Nowhere),
        notes: Notes::new(words, &Nothing).unwrap(),
    };
    let shape = Shape {
        mode: Mode::Transitional,
        layout: Layout::Qemu,
        legacy_in_memory: true,
    };
    let mut function = VirtioFunction::new(parts, &shape).unwrap();
    for (offset, width, value) in [
        (0x14, One, 3),
        (0x08, Four, 1),
        (0x0c, Four, 1),
        (0x14, One, 0xb),
        (0x20, Four, 0x1000),
        (0x28, Four, 0x2000),
        (0x30, Four, 0x3000),
        (0x1c, Two, 1),
        (0x14, One, 0xf),
    ] {
        function.write(Window::Region(4), offset, width, value);
    }
    assert_eq!(function.read(Window::Region(4), 0x14, One), 0xf);
    function
}

fn registers(criterion: &mut Criterion) {
    let mut function = function();
    let mut write = |name: &str, window, offset: u64, width: Width, value| {
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| function.write(window, black_box(offset), width, black_box(value)));
        });
    };
    write("notify by port", Window::Region(2), 0, Two, 0);
    write("notify in memory", Window::Region(4), 0x3000, Two, 0);
    write("notify, legacy register", Window::Region(0), 16, Two, 0);
    write("write queue_select", Window::Region(4), 0x16, Two, 1);
    write("write feature select", Window::Region(4), 0x00, Four, 1);
    write("write command register", Window::Config, 0x04, Two, 7);
    let mut read = |name: &str, window, offset: u64, width: Width| {
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| function.read(window, black_box(offset), width));
        });
    };
    read("read ISR status", Window::Region(4), 0x1000, One);
    read("read device_status", Window::Region(4), 0x14, One);
    read("read queue_notify_off", Window::Region(4), 0x1e, Two);
    read("read legacy ISR status", Window::Region(0), 19, One);
    read("read device configuration", Window::Region(4), 0x2000, Four);
    read("read vendor and device ID", Window::Config, 0x00, Four);
}

criterion_group!(benches, registers);
criterion_main!(benches);
