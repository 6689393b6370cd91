//! Virtual functions (C-10).

use conf_space::Width;

use crate::device;
use crate::{Guest, ORDINARY};

#[test]
fn c10_identity_and_bars_come_from_the_host() {
    let (space, identity) = device::virtual_function();
    let mut guest = Guest::of(&identity, space, ORDINARY);
    assert_eq!(guest.read(0x00, 4), 0x10ed_8086);
    assert_eq!(guest.read(0x10, 4), 0xfe00_000c);
    assert_eq!(guest.read(0x14, 4), 0x0000_0038);
    guest.write(0x10, 4, 0xffff_ffff);
    assert_eq!(guest.read(0x10, 4), 0x0000_000c);
}

#[test]
fn c10_the_memory_bit_is_emulated() {
    let (space, identity) = device::virtual_function();
    let mut guest = Guest::of(&identity, space, ORDINARY);
    assert_eq!(guest.read(0x04, 2), 0);
    assert!(guest.write(0x04, 2, 0x0006).decode_enabled);
    assert_eq!(guest.read(0x04, 2), 0x0006);
    assert_eq!(guest.hardware(0x04, Width::Two), 0x0004);
    assert_eq!(guest.device.writes(), [(0x04, Width::Two, 0x0004)]);
}

#[test]
fn c10_writing_an_address_does_not_touch_bars_that_are_not_there() {
    let (space, identity) = device::virtual_function();
    let mut guest = Guest::of(&identity, space, ORDINARY);
    guest.write(0x10, 4, 0xfe00_000c);
    guest.write(0x14, 4, 0x0000_0038);
    assert_eq!(guest.device.writes(), []);
    assert_eq!(guest.device.reads(), 0);
}
