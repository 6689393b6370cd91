//! Power management (section 4.2, C-8, C-9).

use std::time::Duration;

use conf_space::overlay::{Effect, OpError, PowerChange, PowerState};
use conf_space::{AccessError, ConfigSpace, Width};

use crate::device::PM;
use crate::{ORDINARY, PERMISSIVE, guest};

const PMC: u16 = PM + 2;
const PMCSR: u16 = PM + 4;

fn change(from: PowerState, to: PowerState, configuration_lost: bool) -> Effect {
    let power = Some(PowerChange {
        from,
        to,
        configuration_lost,
    });
    Effect {
        power,
        ..Effect::default()
    }
}

#[test]
fn no_guest_sees_that_the_device_could_signal_pme() {
    let mut guest = guest(PERMISSIVE);
    assert_eq!(guest.hardware(PMC, Width::Two), 0xfa23);
    assert_eq!(guest.read(PMC, 2), 0x0223);
    guest.write(PMC, 2, 0xffff);
    assert_eq!(guest.device.writes(), []);
}

#[test]
fn building_turns_pme_off_without_losing_its_status() {
    let space = crate::device::nic();
    space.set(PMCSR, Width::Two, 0xa108);
    let guest = crate::Guest::of(&crate::device::identity(), space, ORDINARY);
    assert_eq!(guest.hardware(PMCSR, Width::Two), 0xa008);
}

#[test]
fn no_guest_turns_pme_on() {
    let mut guest = guest(PERMISSIVE);
    guest.write(PMCSR, 2, 0x0100);
    assert_eq!(guest.hardware(PMCSR, Width::Two) & 0x0100, 0);
}

#[test]
fn c8_a_guest_can_clear_pme_status() {
    let mut guest = guest(ORDINARY);
    guest.device.space.set(PMCSR, Width::Two, 0x8000);
    guest.write(PMCSR, 2, 0x8000);
    assert_eq!(guest.hardware(PMCSR, Width::Two), 0);
}

#[test]
fn c8_pme_status_is_not_cleared_by_accident() {
    let mut guest = guest(ORDINARY);
    guest.device.space.set(PMCSR, Width::Two, 0x8000);
    guest.write(PMCSR, 2, 0x0200);
    guest.write(PMCSR, 1, 0x03);
    assert_eq!(guest.hardware(PMCSR, Width::Two), 0x8203);
}

#[test]
fn the_guest_selects_what_the_data_register_shows() {
    let mut guest = guest(ORDINARY);
    guest.write(PMCSR, 2, 0x1e00);
    assert_eq!(guest.hardware(PMCSR, Width::Two), 0x3e00);
    assert_eq!(guest.read(PMCSR, 2), 0x3e00);
}

#[test]
fn c9_d3hot_and_back_loses_the_configuration() {
    let mut guest = guest(ORDINARY);
    let asleep = guest.write(PMCSR, 2, 0x0003);
    assert_eq!(asleep, change(PowerState::D0, PowerState::D3Hot, false));
    assert_eq!(guest.hardware(PMCSR, Width::Two) & 3, 3);
    assert_eq!(guest.write(PMCSR, 2, 0x0003), Effect::default());
    let awake = guest.write(PMCSR, 1, 0x00);
    assert_eq!(awake, change(PowerState::D3Hot, PowerState::D0, true));
    assert_eq!(guest.hardware(PMCSR, Width::Two) & 3, 0);
    assert_eq!(
        awake.power.unwrap().settle_time(),
        Duration::from_millis(10)
    );
}

#[test]
fn c9_a_device_without_soft_reset_keeps_its_configuration() {
    let mut guest = guest(ORDINARY);
    guest.device.space.set(PMCSR, Width::Two, 0x0008);
    guest.write(PMCSR, 2, 0x0003);
    let awake = guest.write(PMCSR, 2, 0x0000);
    assert_eq!(awake, change(PowerState::D3Hot, PowerState::D0, false));
}

#[test]
fn states_that_the_device_lacks_are_denied() {
    let mut guest = guest(PERMISSIVE);
    let d1 = guest.write(PMCSR, 2, 0x0001);
    assert_eq!(d1, change(PowerState::D0, PowerState::D1, false));
    assert_eq!(
        guest.try_write(PMCSR, 2, 0x0002),
        Err(OpError::AccessDenied)
    );
    assert_eq!(guest.hardware(PMCSR, Width::Two) & 3, 1);
}

#[test]
fn a_deep_sleep_is_left_only_for_d0() {
    let mut guest = guest(ORDINARY);
    guest.write(PMCSR, 2, 0x0003);
    assert_eq!(
        guest.try_write(PMCSR, 2, 0x0001),
        Err(OpError::AccessDenied)
    );
    assert_eq!(guest.hardware(PMCSR, Width::Two) & 3, 3);
}

#[test]
fn switching_the_device_on_wakes_it() {
    let mut guest = guest(ORDINARY);
    guest.write(PMCSR, 2, 0x1203);
    let effect = guest.write(0x04, 2, 0x0002);
    assert!(effect.decode_enabled);
    assert_eq!(
        effect.power,
        change(PowerState::D3Hot, PowerState::D0, true).power
    );
    assert_eq!(guest.hardware(PMCSR, Width::Two), 0x3200);
}

#[test]
fn a_wake_up_whose_restoring_the_daemon_did_not_live_to_see_is_reported_again() {
    let mut guest = guest(ORDINARY);
    guest.write(PMCSR, 2, 0x0003);
    let stored = guest.overlay.state();
    guest.write(PMCSR, 2, 0x0000);
    // Restart: the state was not stored, the operation not answered, so it is taken again.
    guest.overlay.set_state(stored);
    let again = guest.write(PMCSR, 2, 0x0000);
    assert_eq!(again, change(PowerState::D3Hot, PowerState::D0, true));
}

/// A device whose command register fails.
struct Failing<'a>(&'a dyn ConfigSpace);

impl ConfigSpace for Failing<'_> {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        if offset == 0x04 {
            Err(AccessError::Gone)
        } else {
            self.0.read(offset, width)
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        self.0.write(offset, width, value)
    }
}

#[test]
fn a_wake_up_within_a_write_that_fails_is_reported_by_the_next() {
    let mut guest = guest(ORDINARY);
    guest.write(PMCSR, 2, 0x0003);
    let failing = Failing(&guest.device);
    let failed = guest.overlay.write(&failing, 0x04, 2, 0x0002, &ORDINARY);
    assert_eq!(failed, Err(OpError::DeviceNotFound));
    let effect = guest.write(0x04, 2, 0x0002);
    assert_eq!(
        effect.power,
        change(PowerState::D3Hot, PowerState::D0, true).power
    );
}
