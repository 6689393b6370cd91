//! The command register (section 4.3, XSA-120).

use conf_space::Width;
use conf_space::overlay::{Permissive, Policy};
use conf_space::registers::header::command::*;

use crate::device::{self, IO_BAR, MEMORY_BAR};
use crate::{Guest, ORDINARY, PERMISSIVE, STUB_DOMAIN, guest};

const ALL: [Policy; 4] = [
    ORDINARY,
    PERMISSIVE,
    STUB_DOMAIN,
    Policy {
        permissive: Permissive::Yes,
        allow_interrupt_control: true,
    },
];

fn hardware_command<S: conf_space::ConfigSpace>(guest: &Guest<S>) -> u16 {
    guest.hardware(0x04, Width::Two) as u16
}

#[test]
fn reads_are_the_devices_where_it_decides_and_the_guests_own_elsewhere() {
    let mut guest = guest(ORDINARY);
    guest.device.space.set(0x04, Width::Two, 0x02bf);
    guest.write(0x04, 2, 0xfd43);
    guest.device.space.set(0x04, Width::Two, 0x02bf);
    assert_eq!(guest.read(0x04, 2), 0xffff & (0xfd43 | 0x02bc));
}

#[test]
fn reserved_bits_read_back_as_written() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0xf800);
    assert_eq!(guest.read(0x04, 2), 0xf800);
    assert_eq!(hardware_command(&guest) & 0xf800, 0);
}

#[test]
fn switching_on_decodes_what_the_device_has() {
    for (resources, decode) in [
        (&[MEMORY_BAR, IO_BAR][..], IO | MEMORY),
        (&[MEMORY_BAR][..], MEMORY),
        (&[IO_BAR][..], IO),
        (&[][..], 0),
    ] {
        let mut identity = device::identity();
        identity.resources = Default::default();
        identity.resources[..resources.len()].copy_from_slice(resources);
        let space = device::nic();
        space.set(0x04, Width::Two, 0);
        let mut guest = Guest::of(&identity, space, ORDINARY);
        // Either bit switches both on.
        assert!(guest.write(0x04, 2, u32::from(IO)).decode_enabled);
        assert_eq!(hardware_command(&guest), decode, "{resources:?}");
        assert_eq!(
            guest.read(0x04, 2),
            u32::from(IO),
            "the guest reads what it wrote"
        );
    }
}

#[test]
fn switching_on_is_reported_once_until_switched_off() {
    let mut guest = guest(ORDINARY);
    assert!(guest.write(0x04, 2, 0x0002).decode_enabled);
    assert!(!guest.write(0x04, 2, 0x0007).decode_enabled);
    assert!(!guest.write(0x04, 2, 0x0000).decode_enabled);
    assert!(guest.write(0x04, 2, 0x0001).decode_enabled);
}

#[test]
fn xsa_120_no_policy_lets_a_guest_turn_decode_off() {
    for policy in ALL {
        let mut guest = guest(policy);
        guest.write(0x04, 2, 0x0007);
        for (offset, size, value) in [(0x04, 2, 0), (0x04, 1, 0), (0x04, 4, 0), (0x04, 2, 0x0400)] {
            guest.write(offset, size, value);
            assert_eq!(
                hardware_command(&guest) & (IO | MEMORY),
                IO | MEMORY,
                "{policy:?}"
            );
        }
        assert_eq!(guest.read(0x04, 2) & 3, 0, "the guest believes it is off");
    }
}

#[test]
fn no_policy_lets_a_guest_change_parity_and_system_errors() {
    let kept = PARITY_ERROR_RESPONSE | SERR;
    for policy in ALL {
        for before in [0, kept] {
            let mut guest = guest(policy);
            guest.device.space.set(0x04, Width::Two, u32::from(before));
            guest.write(0x04, 2, u32::from(!before));
            assert_eq!(hardware_command(&guest) & kept, before, "{policy:?}");
        }
    }
}

#[test]
fn bus_master_follows_the_guest() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0x0006);
    assert_eq!(hardware_command(&guest), IO | MEMORY | BUS_MASTER);
    guest.write(0x04, 2, 0x0002);
    assert_eq!(hardware_command(&guest), IO | MEMORY);
    guest.write(0x04, 1, 0x04);
    assert_eq!(hardware_command(&guest), IO | MEMORY | BUS_MASTER);
    // Switching off turns it off too.
    guest.write(0x04, 2, 0);
    assert_eq!(hardware_command(&guest), IO | MEMORY);
}

#[test]
fn an_unchanged_word_is_not_written_to_the_device() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0x0006);
    guest.device.writes();
    guest.write(0x04, 2, 0x0006);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn write_and_invalidate_needs_a_cache_line_size() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, u32::from(WRITE_INVALIDATE));
    assert_eq!(
        hardware_command(&guest) & WRITE_INVALIDATE,
        WRITE_INVALIDATE
    );
    guest.write(0x04, 2, 0);
    assert_eq!(hardware_command(&guest) & WRITE_INVALIDATE, 0);

    guest.device.space.set(0x0c, Width::One, 0);
    guest.write(0x04, 2, u32::from(WRITE_INVALIDATE));
    assert_eq!(
        guest.hardware(0x0c, Width::One),
        0x10,
        "the device takes the host's"
    );
    assert_eq!(
        hardware_command(&guest) & WRITE_INVALIDATE,
        WRITE_INVALIDATE
    );
}

#[test]
fn write_and_invalidate_is_refused_silently_without_a_cache_line_size() {
    for policy in [ORDINARY, PERMISSIVE] {
        let (mut space, identity) = (
            conf_space::memory::MemorySpace::new(conf_space::ConfigSize::Extended),
            device::identity(),
        );
        space.make_writable(0x04, Width::Two, 0x07ff);
        let mut guest = Guest::of(&identity, space, policy);
        guest.write(0x04, 2, 0x0016);
        assert_eq!(guest.read(0x04, 2), 0x0006);
        assert_eq!(hardware_command(&guest), IO | MEMORY | BUS_MASTER);
    }
}

#[test]
fn other_bits_of_the_device_are_written_only_if_permissive() {
    let bits = SPECIAL_CYCLES | VGA_PALETTE_SNOOP | IDSEL_STEPPING | FAST_BACK_TO_BACK;
    for (policy, reached) in [(ORDINARY, 0), (PERMISSIVE, bits)] {
        let mut space = device::nic();
        space.make_writable(0x04, Width::Two, 0xffff);
        let mut guest = Guest::of(&device::identity(), space, policy);
        guest.write(0x04, 2, 0xffff);
        assert_eq!(hardware_command(&guest) & bits, reached);
        guest.write(0x04, 2, 0x0003);
        assert_eq!(hardware_command(&guest) & bits, 0);
    }
}

#[test]
fn intx_is_turned_off_only_with_interrupt_control() {
    for (policy, reached) in [(ORDINARY, 0), (PERMISSIVE, 0), (STUB_DOMAIN, INTX_DISABLE)] {
        let mut guest = guest(policy);
        guest.write(0x04, 2, u32::from(INTX_DISABLE));
        assert_eq!(
            hardware_command(&guest) & INTX_DISABLE,
            reached,
            "{policy:?}"
        );
        assert_eq!(guest.read(0x04, 2) as u16 & INTX_DISABLE, INTX_DISABLE);
        guest.write(0x04, 2, 0);
        assert_eq!(hardware_command(&guest) & INTX_DISABLE, 0);
    }
}

#[test]
fn intx_that_the_daemon_has_turned_off_stays_off() {
    for policy in ALL {
        let mut guest = guest(policy);
        guest
            .device
            .space
            .set(0x04, Width::Two, u32::from(INTX_DISABLE | MEMORY));
        guest.write(0x04, 2, 0x0007);
        assert_eq!(
            hardware_command(&guest) & INTX_DISABLE,
            INTX_DISABLE,
            "{policy:?}"
        );
    }
}

#[test]
fn a_restored_device_decodes_and_masters_the_bus_as_its_guest_wants() {
    let mut guest = guest(ORDINARY);
    assert_eq!(guest.overlay.command_to_restore(0x0140), 0x0143);
    guest.write(0x04, 2, 0x0406);
    assert_eq!(guest.overlay.command_to_restore(0x0000), 0x0007);
    guest.write(0x04, 2, 0x0000);
    assert_eq!(guest.overlay.command_to_restore(0x0414), 0x0403);
}
