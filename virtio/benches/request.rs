//! Requests from a driver to a device and back, without a transport: the queue, the worker, the image.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing
)]

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio::Features;
use virtio::blk::{Blk, Image, Options, feature};
use virtio::device::{Activation, Device, Events};
use virtio::memory::{GuestRam, Memfd, View};
use virtio::queue::{Chain, QueueConfig, Record};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 128;
const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const BUFFERS: u64 = 0x10_0000;
/// The most requests at a time, of three descriptors each.
const DEPTH: u16 = 32;

struct Nobody;

impl Events for Nobody {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &dyn Display) {
        panic!("{why}");
    }
}

/// A driver that makes the same reads of 4 KiB available again and again.
struct Driver {
    view: Arc<View>,
    ram: Arc<GuestRam>,
    available: u16,
}

impl Driver {
    fn new() -> Self {
        let memory = Memfd::new(1024).unwrap();
        let ram = Arc::new(GuestRam::new(Arc::new(memory), 8));
        let view = ram.view();
        for request in 0..u64::from(DEPTH) {
            let header = BUFFERS + request * 0x4000;
            view.write_slice(&(request * 8).to_le_bytes(), GuestAddress(header + 8))
                .unwrap();
            let first = request as u16 * 3;
            let parts = [
                (header, 16, 1, first + 1),
                (header + 0x1000, 4096, 3, first + 2),
                (header + 0x2000, 1, 2, 0),
            ];
            for (index, (address, len, flags, next)) in parts.into_iter().enumerate() {
                let at = DESCRIPTORS + (u64::from(first) + index as u64) * 16;
                let mut bytes = u64::to_le_bytes(address).to_vec();
                bytes.extend(u32::to_le_bytes(len));
                bytes.extend(u16::to_le_bytes(flags));
                bytes.extend(u16::to_le_bytes(next));
                view.write_slice(&bytes, GuestAddress(at)).unwrap();
            }
        }
        Self {
            view,
            ram,
            available: 0,
        }
    }

    fn config(&self) -> QueueConfig {
        let mut config = QueueConfig::new(SIZE);
        config.descriptors = DESCRIPTORS;
        config.driver = AVAILABLE;
        config.device = USED;
        config.ready = true;
        config
    }

    fn offer(&mut self, count: u16) {
        for request in 0..count {
            let at = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
            let head = (request * 3).to_le_bytes();
            self.view.write_slice(&head, GuestAddress(at)).unwrap();
            self.available = self.available.wrapping_add(1);
        }
        let index = GuestAddress(AVAILABLE + 2);
        self.view
            .store(self.available, index, Ordering::Release)
            .unwrap();
    }

    fn wait(&self) {
        let index = GuestAddress(USED + 2);
        while self.view.load::<u16>(index, Ordering::Acquire).unwrap() != self.available {
            std::hint::spin_loop();
        }
    }
}

fn queue(criterion: &mut Criterion) {
    let mut driver = Driver::new();
    let record = Record::volatile(SIZE).unwrap();
    let mut queue = driver
        .config()
        .activate(&driver.view, Features::EVENT_IDX, record)
        .unwrap();
    let mut chain = Chain::default();
    criterion.bench_function(
        "a chain of three descriptors taken and given back",
        |bencher| {
            bencher.iter(|| {
                driver.offer(1);
                queue.pop(&driver.view, &mut chain).unwrap();
                queue.complete(&driver.view, chain.head(), 1).unwrap();
                queue.should_notify(&driver.view).unwrap()
            });
        },
    );
}

fn blk(criterion: &mut Criterion) {
    for io_uring in [true, false] {
        reads(criterion, io_uring);
    }
}

fn reads(criterion: &mut Criterion, io_uring: bool) {
    // Not in /tmp, which may be memory: the kernel works on requests for storage only.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let image = Image::open(file.path(), false, false).unwrap();
    let options = Options {
        io_uring,
        ..Options::default()
    };
    let mut device = Blk::new(image, &options);
    let mut driver = Driver::new();
    let features = Features::EVENT_IDX | Features::VERSION_1 | feature::FLUSH;
    let record = Record::volatile(SIZE).unwrap();
    let queue = driver
        .config()
        .activate(&driver.view, features, record)
        .unwrap();
    device.activate(Activation {
        ram: Arc::clone(&driver.ram),
        queues: vec![(0, queue)],
        features,
        events: Arc::new(Nobody),
    });
    let by = if io_uring { "the kernel" } else { "threads" };
    let mut group =
        criterion.benchmark_group(format!("reads of 4 KiB from a file in the cache, by {by}"));
    for depth in [1, DEPTH] {
        group.throughput(Throughput::Elements(depth.into()));
        group.bench_function(format!("{depth} at a time"), |bencher| {
            bencher.iter(|| {
                driver.offer(depth);
                device.notify(0);
                driver.wait();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, queue, blk);
criterion_main!(benches);
