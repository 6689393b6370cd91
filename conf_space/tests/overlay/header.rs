//! The simple registers of the header and of the vital product data (C-6, section 4.2).

use conf_space::Width;
use conf_space::overlay::{Effect, OpError};

use crate::device::{MSI, MSIX, PM, VPD};
use crate::{ORDINARY, PERMISSIVE, guest};

#[test]
fn identity_is_the_hosts_and_cannot_be_written() {
    let mut guest = guest(PERMISSIVE);
    guest.device.space.set(0x00, Width::Four, 0xffff_ffff);
    assert_eq!(guest.write(0x00, 4, 0), Effect::default());
    assert_eq!(guest.read(0x00, 4), 0x10d3_8086);
    assert_eq!(guest.read(0x01, 1), 0x80);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn cache_line_size_reaches_the_device_and_latency_timer_does_not() {
    let mut guest = guest(ORDINARY);
    guest.write(0x0c, 1, 0x20);
    guest.write(0x0d, 1, 0x40);
    assert_eq!(guest.read(0x0c, 2), 0x0020);
    assert_eq!(guest.device.writes(), [(0x0c, Width::One, 0x20)]);
}

#[test]
fn a_self_test_can_be_started_and_nothing_else_changed() {
    let mut guest = guest(PERMISSIVE);
    guest.device.space.set(0x0f, Width::One, 0x80);
    for (value, reaches) in [
        (0x40, true),
        (0xc0, true),
        (0x80, true),
        (0x00, false),
        (0xc1, false),
    ] {
        guest.device.space.set(0x0f, Width::One, 0x80);
        guest.write(0x0f, 1, value);
        assert_eq!(!guest.device.writes().is_empty(), reaches, "{value:#x}");
    }
}

#[test]
fn interrupt_line_is_the_hosts_and_pin_the_devices() {
    let mut guest = guest(PERMISSIVE);
    guest.write(0x3c, 2, 0xffff);
    assert_eq!(guest.read(0x3c, 1), 0x2a);
    assert_eq!(guest.read(0x3d, 1), 0x01);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn vital_product_data_can_be_read_but_not_written() {
    let mut guest = guest(PERMISSIVE);
    guest.write(VPD + 2, 2, 0x0010);
    assert_eq!(guest.device.writes(), [(VPD + 2, Width::Two, 0x0010)]);
    assert_eq!(guest.read(VPD + 4, 4), 0x1234_5678);
    assert_eq!(
        guest.try_write(VPD + 2, 2, 0x8010),
        Err(OpError::AccessDenied)
    );
    assert_eq!(
        guest.try_write(VPD, 4, 0x8010_0000),
        Err(OpError::AccessDenied)
    );
    assert_eq!(guest.write(VPD + 4, 4, 0), Effect::default());
    assert_eq!(guest.device.writes(), []);
    assert_eq!(OpError::AccessDenied.code(), -3);
}

#[test]
fn capability_headers_cannot_be_written_even_if_permissive() {
    let mut guest = guest(PERMISSIVE);
    for capability in [VPD, MSIX, PM, MSI] {
        let before = guest.read(capability, 2);
        assert_eq!(guest.write(capability, 2, 0xffff), Effect::default());
        assert_eq!(guest.read(capability, 2), before);
    }
    assert_eq!(guest.device.writes(), []);
}
