//! Which functions get an overlay, and what broken ones are.

use conf_space::access::AccessError;
use conf_space::capabilities::{CapabilityId, ListFault};
use conf_space::overlay::{BuildError, OpError, Overlay};
use conf_space::{Width, memory::MemorySpace, registers::msix, registers::power_management as pm};

use crate::device::{self, Broken};
use crate::{Guest, ORDINARY, PERMISSIVE};

fn build_with_header_type(header_type: u32) -> Result<Overlay, BuildError> {
    let space = device::nic();
    space.set(0x0e, Width::One, header_type);
    Overlay::new(&device::identity(), &space)
}

#[test]
fn bridges_are_refused_with_the_reason() {
    for header_type in [1, 2] {
        let bdf = device::identity().bdf;
        let error = build_with_header_type(u32::from(header_type) | 0x80).unwrap_err();
        assert_eq!(error, BuildError::Bridge { bdf, header_type });
        assert!(
            error.to_string().contains("0000:03:00.0 is a bridge"),
            "{error}"
        );
    }
}

#[test]
fn functions_of_multi_function_devices_are_accepted() {
    assert!(build_with_header_type(0x80).is_ok());
}

#[test]
fn dead_and_unknown_devices_are_refused() {
    let bdf = device::identity().bdf;
    let dead = build_with_header_type(0xff).unwrap_err();
    assert_eq!(dead, BuildError::NoAnswer { bdf });
    let unknown = build_with_header_type(0x03).unwrap_err();
    assert_eq!(
        unknown,
        BuildError::UnknownHeader {
            bdf,
            header_type: 3
        }
    );
    let source = AccessError::Denied;
    let denied = Overlay::new(&device::identity(), &Broken(source)).unwrap_err();
    assert_eq!(denied, BuildError::Access { bdf, source });
}

#[test]
fn a_looping_capability_list_is_served_as_far_as_it_goes() {
    let space = device::nic();
    space.set(device::VPD + 1, Width::One, u32::from(device::MSI));
    let guest = Guest::of(&device::identity(), space, ORDINARY);
    let capabilities = guest.overlay.capabilities();
    assert_eq!(
        capabilities.faults,
        [ListFault::Loop {
            pointer: device::MSI
        }]
    );
    assert_eq!(capabilities.find(CapabilityId::VPD), Some(device::VPD));
}

/// A device whose MSI-X capability starts in the middle of its power management capability.
fn overlapping() -> MemorySpace {
    let mut space = device::nic();
    space.set(device::PM + 1, Width::One, u32::from(device::PM) + 4);
    space.make_writable(device::PM + 4, Width::Four, 0xffff_ffff);
    space.set(device::PM + 4, Width::Four, 0x0000_0011);
    space
}

#[test]
fn of_overlapping_capabilities_the_first_keeps_its_rules() {
    let mut guest = Guest::of(&device::identity(), overlapping(), PERMISSIVE);
    let control = device::PM + 4 + msix::CONTROL.offset;
    assert_eq!(
        guest.overlay.capabilities().find(CapabilityId::MSI_X),
        Some(device::PM + 4)
    );
    assert_eq!(control, pm::BRIDGE_EXTENSIONS.at(device::PM).offset);
    guest.write(control, 2, 0x8000);
    assert_eq!(
        guest.device.writes(),
        [],
        "read-only, as power management has it"
    );
    guest.write(device::PM + 4, 2, 0x0013);
    assert_eq!(guest.hardware(device::PM + 4, Width::Two), 0x0013);
}

#[test]
fn a_capability_that_reaches_beyond_the_space_has_rules_only_within() {
    let space = device::nic();
    space.set(0x34, Width::One, 0xfc);
    space.set(0xfc, Width::Four, 0x0002_0001);
    space.set(0x100, Width::Four, 0x0103_0103);
    let mut guest = Guest::of(&device::identity(), space, ORDINARY);
    assert_eq!(guest.read(0xfc, 4), 0x0002_0001);
    assert_eq!(guest.read(0x100, 4), 0x0103_0103);
    assert_eq!(
        guest.write(0x100, 2, 3).dropped.map(|write| write.offset),
        Some(0x100)
    );
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn a_second_msi_capability_is_as_closed_as_the_first() {
    let space = device::nic();
    space.set(device::VPD + 1, Width::One, 0x50);
    space.set(0x50, Width::Four, 0x0000_0005);
    let mut guest = Guest::of(&device::identity(), space, PERMISSIVE);
    assert_eq!(guest.try_write(0x52, 2, 1), Err(OpError::AccessDenied));
}
