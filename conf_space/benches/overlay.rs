//! The pure part of a guest's configuration access: through the overlay to a device in memory.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use conf_space::overlay::{Overlay, Policy};
use criterion::{Criterion, criterion_group, criterion_main};

#[path = "../tests/overlay/device.rs"]
#[allow(dead_code)]
mod device;

fn overlay(criterion: &mut Criterion) {
    let space = device::nic();
    let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
    let policy = Policy::default();
    for (name, offset, size) in [
        ("read 4 bytes of command and status", 0x04, 4),
        ("read 4 bytes of BAR 0", 0x10, 4),
        ("read 4 bytes without a rule", 0x88, 4),
    ] {
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| overlay.read(&space, black_box(offset), black_box(size)));
        });
    }
    criterion.bench_function("write 2 bytes of command", |bencher| {
        bencher.iter(|| overlay.write(&space, black_box(0x04), black_box(2), 0x0006, &policy));
    });
    criterion.bench_function("build an overlay", |bencher| {
        bencher.iter(|| Overlay::new(black_box(&device::identity()), &space));
    });
}

criterion_group!(benches, overlay);
criterion_main!(benches);
