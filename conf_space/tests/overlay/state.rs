//! What outlives the daemon, and what does not outlive the guest.

use conf_space::Width;
use conf_space::overlay::{Overlay, OverlayState};

use crate::device;
use crate::{Guest, ORDINARY, PERMISSIVE, guest};

#[test]
fn a_restart_in_the_middle_of_sizing_goes_unnoticed() {
    let mut guest = guest(ORDINARY);
    guest.write(0x04, 2, 0x0546);
    guest.write(0x10, 4, 0xffff_ffff);
    guest.write(0x30, 4, 0xffff_f800);
    let stored = guest.overlay.state().to_bits();

    guest.overlay = Overlay::new(&device::identity(), &guest.device).unwrap();
    assert_eq!(
        guest.read(0x10, 4),
        0xfebc_0000,
        "without its state it would be noticed"
    );
    guest.overlay.set_state(OverlayState::from_bits(stored));
    assert_eq!(guest.read(0x10, 4), 0xfffe_0000);
    assert_eq!(guest.read(0x30, 4), 0xfffc_0000);
    assert_eq!(guest.read(0x04, 2), 0x0546);
    assert!(
        !guest.write(0x04, 2, 0x0006).decode_enabled,
        "it was on already"
    );
}

#[test]
fn nothing_reaches_the_next_guest() {
    let mut guest = guest(PERMISSIVE);
    let space: Vec<u32> = (0..64).map(|dword| guest.read(dword * 4, 4)).collect();
    let state = guest.overlay.state();
    for offset in [0x04, 0x10, 0x18, 0x20, 0x24, 0x30, device::PM + 4] {
        guest.write(offset, 4, 0xffff_ffff);
    }
    assert_ne!(guest.overlay.state(), state);

    guest.overlay.release();
    let hardware = device::nic();
    hardware.set(device::PM + 4, Width::Two, 0x2000);
    let next = Guest {
        device: device::Recorder::new(hardware),
        ..guest
    };
    assert_eq!(next.overlay.state(), state);
    let seen: Vec<u32> = (0..64).map(|dword| next.read(dword * 4, 4)).collect();
    assert_eq!(seen, space);
}

#[test]
fn intx_that_was_off_for_a_guest_with_msi_is_not_what_the_next_one_finds() {
    let space = device::nic();
    space.set(0x04, Width::Two, 0x0406);
    let mut guest = Guest::of(&device::identity(), space, ORDINARY);
    guest.overlay.release();
    assert_eq!(guest.read(0x04, 2), 0x0006);
}
