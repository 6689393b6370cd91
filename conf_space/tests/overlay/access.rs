//! Which accesses there are, and how they are taken apart (C-1 to C-5, C-7).

use conf_space::access::AccessError;
use conf_space::overlay::{DroppedWrite, Effect, OpError};
use conf_space::{ConfigSize, Width};

use crate::device::{self, Broken, VPD};
use crate::{Guest, ORDINARY, PERMISSIVE, guest};

#[test]
fn c1_sizes_other_than_one_two_and_four_are_invalid() {
    let mut guest = guest(PERMISSIVE);
    for size in [0, 3, 5, 8, -1, -4, i32::MIN, i32::MAX, 0x1_0001] {
        let read = guest.overlay.read(&guest.device, 0, size);
        assert_eq!(read, Err(OpError::InvalidOffset), "{size}");
        assert_eq!(
            guest.try_write(0x40, size, 0),
            Err(OpError::InvalidOffset),
            "{size}"
        );
    }
    assert_eq!(OpError::InvalidOffset.code(), -2);
}

#[test]
fn c1_accesses_across_their_alignment_are_invalid() {
    let guest = guest(ORDINARY);
    for (offset, size) in [(1, 2), (3, 2), (1, 4), (2, 4), (3, 4), (4095, 2), (4094, 4)] {
        let read = guest.overlay.read(&guest.device, offset, size);
        assert_eq!(read, Err(OpError::InvalidOffset), "{offset} {size}");
    }
}

#[test]
fn c2_negative_offsets_do_not_alias_registers() {
    let mut guest = guest(PERMISSIVE);
    for offset in [
        -4,
        -4096 + 0x10,
        -256,
        i32::MIN,
        0x1_0000 + 0x10,
        i32::MAX - 3,
    ] {
        let read = guest.overlay.read(&guest.device, offset, 4);
        assert_eq!(read, Err(OpError::InvalidOffset), "{offset}");
        let write = guest
            .overlay
            .write(&guest.device, offset, 4, 0, &PERMISSIVE);
        assert_eq!(write, Err(OpError::InvalidOffset), "{offset}");
    }
    assert_eq!(guest.device.reads(), 0);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn c2_offsets_beyond_the_space_are_invalid() {
    let extended = guest(PERMISSIVE);
    assert!(extended.overlay.read(&extended.device, 4092, 4).is_ok());
    let beyond = extended.overlay.read(&extended.device, 4096, 4);
    assert_eq!(beyond, Err(OpError::InvalidOffset));

    let identity = conf_space::overlay::Identity {
        config_size: ConfigSize::Conventional,
        ..device::identity()
    };
    let mut conventional = Guest::of(&identity, device::nic(), PERMISSIVE);
    assert!(
        conventional
            .overlay
            .read(&conventional.device, 252, 4)
            .is_ok()
    );
    let beyond = conventional.overlay.read(&conventional.device, 256, 4);
    assert_eq!(beyond, Err(OpError::InvalidOffset));
    assert_eq!(
        conventional.try_write(256, 1, 0),
        Err(OpError::InvalidOffset)
    );
}

#[test]
fn c3_one_read_merges_what_the_device_and_the_overlay_hold() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0x0102);
    // Command from the overlay, status from the device.
    assert_eq!(guest.read(0x04, 4), 0x0010_0102);
    assert_eq!(guest.read(0x05, 1), 0x01);
    assert_eq!(guest.read(0x06, 2), 0x0010);
    assert_eq!(guest.read(0x07, 1), 0x00);
    // Interrupt line from the overlay, pin from the device.
    assert_eq!(guest.read(0x3c, 4), 0x0000_012a);
}

#[test]
fn c3_a_read_costs_at_most_one_hardware_access() {
    let guest = guest(ORDINARY);
    for offset in (0..4096).step_by(4) {
        guest.read(offset, 4);
        assert!(guest.device.reads() <= 1, "{offset:#x}");
    }
    guest.read(0x00, 4);
    guest.read(0x10, 4);
    assert_eq!(
        guest.device.reads(),
        0,
        "the overlay knows IDs and BARs by itself"
    );
}

#[test]
fn c4_bytes_that_a_write_leaves_out_keep_their_value() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0x0546);
    guest.write(0x05, 1, 0x01);
    assert_eq!(guest.read(0x04, 2), 0x0146);
    guest.write(0x04, 1, 0x07);
    assert_eq!(guest.read(0x04, 2), 0x0107);
}

#[test]
fn c4_bytes_beside_a_claimed_register_are_dropped_even_if_permissive() {
    let mut guest = guest(PERMISSIVE);
    guest.device.space.set(0x06, Width::Two, 0xf910);
    let effect = guest.write(0x04, 4, 0xffff_0007);
    assert_eq!(effect.dropped, None, "a rule has handled the write");
    assert_eq!(guest.hardware(0x06, Width::Two), 0xf910);
    guest.write(0x06, 2, 0xf900);
    assert_eq!(
        guest.hardware(0x06, Width::Two),
        0x0010,
        "alone, it reaches the device"
    );
}

#[test]
fn c5_writes_without_a_rule_are_dropped_and_reported() {
    let mut guest = guest(ORDINARY);
    for (offset, size) in [
        (0x06, 2),
        (0x28, 4),
        (0x2c, 2),
        (0x88, 2),
        (0x84, 4),
        (0x104, 4),
    ] {
        let effect = guest.write(offset, size, 0xffff_ffff);
        assert_eq!(
            effect,
            Effect {
                dropped: Some(DroppedWrite {
                    offset,
                    width: Width::from_bytes(size as u32).unwrap(),
                    value: (1u64 << (8 * size)).wrapping_sub(1) as u32,
                }),
                ..Effect::default()
            }
        );
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn c5_writes_without_a_rule_reach_the_device_if_permissive() {
    let mut guest = guest(PERMISSIVE);
    assert_eq!(guest.write(0x88, 2, 0xdead_5936), Effect::default());
    assert_eq!(guest.device.writes(), [(0x88, Width::Two, 0x5936)]);
    guest.write(0xfff, 1, 0xab);
    assert_eq!(guest.device.writes(), [(0xfff, Width::One, 0xab)]);
}

#[test]
fn c7_failures_have_the_numbers_of_the_shared_page() {
    let mut guest = guest(PERMISSIVE);
    for (error, expected, code) in [
        (AccessError::Gone, OpError::DeviceNotFound, -1),
        (AccessError::Denied, OpError::AccessDenied, -3),
        (
            AccessError::Failed { errno: 22 },
            OpError::Failed { errno: 22 },
            -5,
        ),
    ] {
        let broken = Broken(error);
        assert_eq!(guest.overlay.read(&broken, 0x08, 4), Err(expected));
        for offset in [0x04, 0x0c, i32::from(VPD) + 2, 0x40] {
            let write = guest.overlay.write(&broken, offset, 1, 1, &PERMISSIVE);
            assert_eq!(write, Err(expected), "{offset:#x}");
        }
        assert_eq!(expected.code(), code);
    }
    assert_eq!(
        guest.read(0x04, 2),
        0x0003,
        "what failed has left nothing behind"
    );
    assert_eq!(
        guest.overlay.read(&Broken(AccessError::Gone), 0x00, 4),
        Ok(0x10d3_8086)
    );
}
