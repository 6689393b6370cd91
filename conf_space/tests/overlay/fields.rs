//! The listing of the whole space.

use conf_space::overlay::{Field, Treatment};
use conf_space::{ConfigSize, Width};

use crate::device::{self, EXPRESS, MSI, MSIX, PM, VPD};
use crate::{Guest, ORDINARY, guest};

fn assert_covers(fields: &[Field], size: u16) {
    let mut next = 0;
    for field in fields {
        assert_eq!(field.offset, next, "{field:?}");
        assert!(field.length > 0);
        next += field.length;
    }
    assert_eq!(next, size);
}

#[test]
fn covers_every_byte_once() {
    assert_covers(&guest(ORDINARY).overlay.fields().collect::<Vec<_>>(), 4096);
    let mut identity = device::identity();
    identity.config_size = ConfigSize::Conventional;
    let guest = Guest::of(&identity, device::nic(), ORDINARY);
    assert_covers(&guest.overlay.fields().collect::<Vec<_>>(), 256);
}

#[test]
fn names_registers_and_says_what_becomes_of_them() {
    let fields: Vec<Field> = guest(ORDINARY).overlay.fields().collect();
    for (offset, block, name, treatment) in [
        (0x00, "Header", "Vendor ID", Treatment::Emulated),
        (0x04, "Header", "Command", Treatment::Filtered),
        (0x06, "Header", "Status", Treatment::Dropped),
        (0x0c, "Header", "Cache Line Size", Treatment::Passed),
        (0x0d, "Header", "Latency Timer", Treatment::ReadOnly),
        (0x10, "Header", "BAR 0", Treatment::Emulated),
        (0x14, "Header", "BAR 1", Treatment::Hidden),
        (0x24, "Header", "BAR 5", Treatment::Emulated),
        (0x35, "", "", Treatment::Dropped),
        (
            PM + 2,
            "Power Management",
            "Power Management Capabilities",
            Treatment::Filtered,
        ),
        (MSI + 2, "MSI", "MSI Message Control", Treatment::Filtered),
        (
            MSI + 8,
            "MSI",
            "MSI Message Upper Address",
            Treatment::ReadOnly,
        ),
        (
            EXPRESS + 8,
            "PCI Express",
            "Device Control",
            Treatment::Dropped,
        ),
        (MSIX, "MSI-X", "Capability ID", Treatment::ReadOnly),
        (
            VPD + 4,
            "Vital Product Data",
            "VPD Data",
            Treatment::ReadOnly,
        ),
        (
            0x100,
            "Advanced Error Reporting",
            "Extended Capability Header",
            Treatment::Dropped,
        ),
    ] {
        let field = fields.iter().find(|field| field.offset == offset).unwrap();
        assert_eq!(
            (field.block, field.name, field.treatment),
            (block, name, treatment)
        );
        assert_eq!(field.spec.is_empty(), name.is_empty());
    }
}

#[test]
fn a_capability_that_reaches_beyond_the_standard_space_names_nothing_there() {
    let space = device::nic();
    space.set(VPD + 1, Width::One, 0xe0);
    space.set(0xe0, Width::Four, 0x0002_0010);
    let guest = Guest::of(&device::identity(), space, ORDINARY);
    let fields: Vec<Field> = guest.overlay.fields().collect();
    assert_covers(&fields, 4096);
    let last = fields
        .iter()
        .rfind(|field| field.block == "PCI Express")
        .unwrap();
    assert_eq!((last.offset, last.name), (0xfe, "Root Capabilities"));
}

#[test]
fn of_overlapping_capabilities_the_one_with_rules_is_named() {
    // PCI Express, without rules, overlaps power management, which has some.
    let space = device::nic();
    space.set(VPD + 1, Width::One, 0xc0);
    space.set(0xc0, Width::Four, 0x0002_0010);
    let guest = Guest::of(&device::identity(), space, ORDINARY);
    let fields: Vec<Field> = guest.overlay.fields().collect();
    assert_covers(&fields, 4096);
    let control = fields.iter().find(|field| field.offset == PM + 4).unwrap();
    assert_eq!(
        (control.block, control.treatment),
        ("Power Management", Treatment::Filtered)
    );
}
