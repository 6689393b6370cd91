//! BARs and the ROM (section 4.4).

use conf_space::overlay::Effect;
use conf_space::{Resource, ResourceFlags, Width};

use crate::device;
use crate::{Guest, ORDINARY, PERMISSIVE, guest};

const ONES: u32 = 0xffff_ffff;

#[test]
fn a_guest_reads_the_hosts_addresses_and_types() {
    let guest = guest(ORDINARY);
    let bars = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].map(|offset| guest.read(offset, 4));
    assert_eq!(
        bars,
        [
            0xfebc_0000,
            0,
            0x0000_c001,
            0,
            0xfe00_000c,
            0x0000_0038,
            0xfeb8_0000
        ]
    );
}

#[test]
fn all_ones_make_a_bar_read_its_size_until_it_is_written_again() {
    let mut guest = guest(ORDINARY);
    for (offset, size) in [
        (0x10, 0xfffe_0000),
        (0x18, 0xffff_ffe1),
        (0x20, 0x0000_000c),
        (0x24, 0xffff_fffe),
        (0x30, 0xfffc_0000),
    ] {
        let address = guest.read(offset, 4);
        assert_eq!(guest.write(offset, 4, ONES), Effect::default());
        assert_eq!(guest.read(offset, 4), size, "{offset:#x}");
        guest.write(offset, 4, address);
        assert_eq!(guest.read(offset, 4), address, "{offset:#x}");
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn type_and_control_bits_do_not_matter_for_sizing_except_in_an_upper_half() {
    let mut guest = guest(ORDINARY);
    for (offset, value, sizes) in [
        (0x10, 0xffff_fff0, true),
        (0x10, 0xffff_ffe0, false),
        (0x18, 0xffff_fffc, true),
        (0x18, 0xffff_fff8, false),
        (0x24, 0xffff_ffff, true),
        (0x24, 0xffff_fffe, false),
        (0x30, 0xffff_f800, true),
        (0x30, 0xffff_f000, false),
        (0x30, 0xffff_fffe, true),
    ] {
        let address = guest.read(offset, 4);
        guest.write(offset, 4, value);
        assert_eq!(
            guest.read(offset, 4) != address,
            sizes,
            "{offset:#x} {value:#x}"
        );
        guest.write(offset, 4, address);
    }
}

#[test]
fn a_guest_cannot_move_a_bar_even_if_permissive() {
    let mut guest = guest(PERMISSIVE);
    for offset in [0x10, 0x18, 0x20, 0x24, 0x30] {
        let before = guest.read(offset, 4);
        for value in [0, 0x1000_0000, 0x8000_0001] {
            assert_eq!(guest.write(offset, 4, value), Effect::default());
            assert_eq!(guest.read(offset, 4), before);
        }
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn writing_the_address_restores_a_device_that_lost_it() {
    let mut guest = guest(ORDINARY);
    for (offset, value) in [(0x10, 0xfebc_0000), (0x24, 0x38), (0x30, 0xfeb8_0000)] {
        guest.write(offset, 4, value);
        assert_eq!(guest.device.writes(), [], "it is there already");
        guest.device.space.set(offset, Width::Four, 0);
        guest.write(offset, 4, value);
        assert_eq!(guest.device.writes(), [(offset, Width::Four, value)]);
    }
}

#[test]
fn only_its_own_address_restores_a_device() {
    let mut guest = guest(ORDINARY);
    for offset in [0x10, 0x18, 0x20, 0x24, 0x30] {
        guest.device.space.set(offset, Width::Four, 0);
        guest.write(offset, 4, 0x1234_5000);
        guest.write(offset, 4, 0);
        guest.write(offset, 4, ONES);
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn bits_below_an_address_are_the_type_whatever_the_host_says() {
    let mut identity = device::identity();
    for resource in &mut identity.resources {
        resource.start |= 1;
    }
    let guest = Guest::of(&identity, device::nic(), ORDINARY);
    let bars = [0x10, 0x18, 0x20, 0x30].map(|offset| guest.read(offset, 4));
    assert_eq!(bars, [0xfebc_0000, 0x0000_c001, 0xfe00_000c, 0xfeb8_0000]);
}

#[test]
fn a_guest_cannot_switch_its_rom_on() {
    let mut guest = guest(PERMISSIVE);
    guest.write(0x30, 4, 0xfeb8_0001);
    guest.write(0x30, 1, 0x01);
    assert_eq!(guest.read(0x30, 4), 0xfeb8_0000);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn absent_bars_read_zero_whatever_is_written() {
    let mut guest = guest(PERMISSIVE);
    guest.device.space.set(0x14, Width::Four, 0x1234_5678);
    for value in [ONES, 0, 0x1000] {
        guest.write(0x14, 4, value);
        assert_eq!(guest.read(0x14, 4), 0);
    }
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn sizing_one_half_leaves_the_other() {
    let mut guest = guest(ORDINARY);
    guest.write(0x24, 4, ONES);
    assert_eq!(guest.read(0x20, 4), 0xfe00_000c);
    assert_eq!(guest.read(0x24, 4), 0xffff_fffe);
}

#[test]
fn parts_of_a_bar_can_be_read_and_are_merged_when_written() {
    let mut guest = guest(ORDINARY);
    assert_eq!(guest.read(0x12, 2), 0xfebc);
    assert_eq!(guest.read(0x13, 1), 0xfe);
    guest.write(0x12, 2, 0xffff);
    assert_eq!(
        guest.read(0x10, 4),
        0xfebc_0000,
        "half of the ones is no sizing"
    );
}

#[test]
fn a_64_bit_resource_in_the_last_bar_has_no_upper_half() {
    let mut identity = device::identity();
    identity.resources[5] = device::WIDE_BAR;
    identity.resources[4] = Resource::ABSENT;
    let guest = Guest::of(&identity, device::nic(), ORDINARY);
    assert_eq!(guest.read(0x24, 4), 0xfe00_000c);
    assert_eq!(guest.read(0x30, 4), 0xfeb8_0000, "the ROM is itself");
}

#[test]
fn a_resource_of_no_kind_is_absent() {
    let mut identity = device::identity();
    identity.resources[0] = Resource {
        start: 1,
        size: 1,
        flags: ResourceFlags::empty(),
    };
    let mut guest = Guest::of(&identity, device::nic(), ORDINARY);
    guest.write(0x10, 4, ONES);
    assert_eq!(guest.read(0x10, 4), 0);
}
