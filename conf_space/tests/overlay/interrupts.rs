//! The MSI and MSI-X control words (section 4.5, XSA-157), and the interrupt line.

use conf_space::Width;
use conf_space::overlay::{Effect, OpError, Permissive, Policy};
use conf_space::registers::header::command::{INTX_DISABLE, MEMORY};

use crate::device::{MSI, MSIX};
use crate::{ORDINARY, PERMISSIVE, STUB_DOMAIN, guest};

const MSI_ON: u32 = 0x0081;
const MSIX_ON: u32 = 0x8004;

#[test]
fn only_the_permission_opens_the_enable_bits() {
    for policy in [ORDINARY, PERMISSIVE] {
        let mut guest = guest(policy);
        assert_eq!(
            guest.try_write(MSI + 2, 2, MSI_ON),
            Err(OpError::AccessDenied)
        );
        assert_eq!(
            guest.try_write(MSIX + 2, 2, MSIX_ON),
            Err(OpError::AccessDenied)
        );
        assert_eq!(
            guest.try_write(MSI, 4, MSI_ON << 16),
            Err(OpError::AccessDenied)
        );
        assert_eq!(guest.device.writes(), []);
    }
    let mut guest = guest(STUB_DOMAIN);
    guest.write(MSI + 2, 2, MSI_ON);
    assert_eq!(guest.device.writes(), [(MSI + 2, Width::Two, MSI_ON)]);
}

#[test]
fn an_unchanged_word_is_accepted_from_everyone() {
    let mut guest = guest(ORDINARY);
    assert_eq!(guest.write(MSI + 2, 2, 0x0080), Effect::default());
    assert_eq!(guest.write(MSIX + 2, 2, 0x0004), Effect::default());
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn only_enable_and_function_mask_can_change() {
    let mut guest = guest(Policy {
        permissive: Permissive::Yes,
        allow_interrupt_control: true,
    });
    assert_eq!(
        guest.try_write(MSI + 2, 2, MSI_ON | 0x0010),
        Err(OpError::AccessDenied)
    );
    assert_eq!(
        guest.try_write(MSIX + 2, 2, MSIX_ON | 1),
        Err(OpError::AccessDenied)
    );
    guest.write(MSIX + 2, 2, MSIX_ON | 0x4000);
    guest.write(MSIX + 2, 2, MSIX_ON);
    assert_eq!(guest.read(MSIX + 2, 2), MSIX_ON);
}

#[test]
fn hardware_is_written_with_two_bytes_whatever_the_guest_wrote() {
    let mut guest = guest(STUB_DOMAIN);
    guest.write(MSIX, 4, MSIX_ON << 16);
    guest.write(MSIX + 3, 1, 0x00);
    let control = MSIX + 2;
    let expected = [
        (control, Width::Two, MSIX_ON),
        (control, Width::Two, 0x0004),
    ];
    assert_eq!(guest.device.writes(), expected);
}

#[test]
fn xsa_157_msi_and_msix_are_never_on_together() {
    let mut guest = guest(STUB_DOMAIN);
    guest.write(MSI + 2, 2, MSI_ON);
    assert_eq!(
        guest.try_write(MSIX + 2, 2, MSIX_ON),
        Err(OpError::AccessDenied)
    );
    // Masking needs nothing; turning the one off frees the way for the other.
    guest.write(MSIX + 2, 2, 0x4004);
    guest.write(MSI + 2, 2, 0x0080);
    guest.write(MSIX + 2, 2, MSIX_ON);
    assert_eq!(
        guest.try_write(MSI + 2, 2, MSI_ON),
        Err(OpError::AccessDenied)
    );
    guest.write(MSIX + 2, 2, 0x0004);
    guest.write(MSI + 2, 2, MSI_ON);
}

#[test]
fn addresses_and_data_are_the_hosts_business_whatever_the_policy() {
    for permissive in [false, true] {
        let mut guest = guest(Policy {
            permissive: permissive.into(),
            allow_interrupt_control: true,
        });
        assert_eq!(guest.read(MSI + 4, 4), 0xfee0_1000);
        // Not told as dropped: nothing that an operator can allow would let it through.
        assert_eq!(guest.write(MSI + 4, 4, 0xfee0_2000).dropped, None);
        assert_eq!(guest.write(MSIX + 4, 4, 0).dropped, None);
        assert_eq!(guest.device.writes(), []);
    }
}

#[test]
fn c11_without_its_line_a_function_has_none_and_no_guest_brings_it_back() {
    for policy in [ORDINARY, PERMISSIVE, STUB_DOMAIN] {
        let mut guest = guest(policy);
        guest.device.space.set(0x3d, Width::One, 1);
        guest.overlay = guest.overlay.without_intx();
        assert_eq!(guest.read(0x3c, 2), 0);
        guest.write(0x3c, 4, u32::MAX);
        assert_eq!(guest.read(0x3c, 2), 0);
        let on = u32::from(INTX_DISABLE | MEMORY);
        for value in [on, u32::from(MEMORY), on, 0] {
            guest.write(0x04, 2, value);
            assert_eq!(guest.read(0x04, 2) & 0x402, value);
            let hardware = guest.hardware(0x04, Width::Two);
            assert_ne!(hardware & u32::from(INTX_DISABLE), 0, "{value:#x}");
        }
        let restored = guest.overlay.command_to_restore(0);
        assert_ne!(restored & INTX_DISABLE, 0);
    }
}
