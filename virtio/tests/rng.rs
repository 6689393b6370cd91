//! The entropy device, from its queue.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use std::collections::HashSet;

use rings::{BUFFERS, Driver, Guest, Live, readable, writable};
use virtio::Features;
use virtio::device::Device;
use virtio::rng::Rng;

fn live() -> (Guest, Driver, Live<Rng>) {
    let guest = Guest::default();
    let driver = Driver::new(0, 8, Features::EVENT_IDX);
    let device = Live::new(Rng::new().unwrap(), &guest, &[&driver]);
    (guest, driver, device)
}

#[test]
fn buffers_are_filled_with_bytes_that_are_all_different() {
    let (guest, mut driver, device) = live();
    let mut seen = HashSet::new();
    for _ in 0..50 {
        let parts = [writable(BUFFERS, 20), writable(BUFFERS + 0x1000, 12)];
        let head = driver.offer(&guest, &parts, None).unwrap();
        device.notify(0);
        assert_eq!(device.used(&mut driver, &guest), (head, 32));
        let mut bytes = guest.read(BUFFERS, 20);
        bytes.extend(guest.read(BUFFERS + 0x1000, 12));
        assert!(seen.insert(bytes));
    }
}

#[test]
fn a_huge_buffer_gets_some_bytes_and_nobody_waits_for_the_rest() {
    let (guest, mut driver, device) = live();
    driver.offer(&guest, &[writable(BUFFERS, 0x20_0000)], None);
    device.notify(0);
    let (_, len) = device.used(&mut driver, &guest);
    assert_eq!(len, 0x1_0000);
}

#[test]
fn a_request_without_room_needs_a_reset_after_which_all_is_well() {
    let (guest, mut driver, mut device) = live();
    driver.offer(&guest, &[readable(BUFFERS, 4)], None);
    device.notify(0);
    assert_eq!(device.broken(), "the request is too short");
    device.reset();
    let mut driver = Driver::again(&guest, 0, 8, Features::EVENT_IDX);
    device.activate(&guest, &[&driver]);
    let head = driver.offer(&guest, &[writable(BUFFERS, 4)], None).unwrap();
    device.device.notify(0);
    assert_eq!(device.used(&mut driver, &guest), (head, 4));
}
