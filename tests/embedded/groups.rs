//! Devices that only go together: an IOMMU group, where Linux has the IOMMU.

use std::thread;
use std::time::Duration;

use conf_space::Bdf;
use pcibackd::control::protocol::Request;
use pcibackd::host::Bus;
use pcibackd::host::devices::{RESERVED_FOR, for_xen};
use pcibackd::host::record::{Flags, Phase};
use pcibackd::host::sim::{MSI_ONLY, NVME, Reach};
use xenbus::DomId;

use crate::boot::reserve;
use crate::house::{House, LONG, until};
use crate::killed::at_each_step;

/// The devices of the group, with their drivers.
const GROUP: [(Bdf, &str); 2] = [(NVME, "nvme"), (MSI_ONLY, "ahci")];

fn with_group() -> House {
    let house = House::new(&[]);
    house.bus.put_together(&GROUP.map(|(bdf, _)| bdf));
    house
}

fn hide() -> Request {
    let devices = vec![NVME.to_string()];
    let force = false;
    Request::HideGroup { devices, force }
}

fn unhide() -> Request {
    let devices = vec![NVME.to_string()];
    Request::UnhideGroup { devices }
}

fn are_hidden(house: &House) -> bool {
    let hidden = |(bdf, _)| house.phase_if_any(bdf) == Some(Phase::Hidden);
    GROUP.into_iter().all(hidden)
}

/// dom0 has all of it as in the beginning.
fn as_before(house: &House, step: usize) {
    for (bdf, driver) in GROUP {
        let found = house.bus.describe(bdf).unwrap().driver;
        assert_eq!(found.as_deref(), Some(driver), "{bdf}, step {step}");
        assert_eq!(house.bus.enable_count(bdf), 1, "{bdf}, step {step}");
        assert_eq!(house.bus.driver_override(bdf).unwrap(), None);
        assert!(house.bus.may_lose_power(bdf).unwrap(), "{bdf}, step {step}");
        let owner = house.machine.device_owner(for_xen(bdf));
        assert_eq!(owner, Some(DomId::DOM0), "{bdf}, step {step}");
    }
}

/// All of it is hidden, and is given back, or dom0 has all of it.
fn ends_whole(house: &House, step: usize) {
    until(("all or none", step), || {
        house.records().is_empty() || are_hidden(house)
    });
    if !house.records().is_empty() {
        let back = house.entry(&unhide());
        assert!(back.ok, "{back:?}, step {step}");
    }
    as_before(house, step);
}

#[test]
fn a_group_is_hidden_and_given_back_as_a_whole() {
    let house = with_group();
    let alone = house.entry(&Request::Hide {
        devices: vec![NVME.to_string()],
        force: false,
    });
    assert!(!alone.ok, "{alone:?}");
    as_before(&house, 0);
    assert!(house.entry(&hide()).ok);
    assert!(are_hidden(&house));
    assert!(house.entry(&unhide()).ok);
    as_before(&house, 0);
}

#[test]
fn a_group_whose_daemon_is_killed_while_it_is_hidden_is_hidden_as_a_whole_or_not_at_all() {
    at_each_step(with_group, |house, step| {
        let died = house.surviving(step, || {
            // Whoever asked is told nothing by a daemon that is killed.
            let _ = house.try_ask(&hide());
        });
        ends_whole(house, step);
        died
    });
}

#[test]
fn a_group_whose_daemon_is_killed_while_it_is_given_back_is_dom0s_as_a_whole_or_stays_hidden() {
    at_each_step(with_group, |house, step| {
        let hidden = house.entry(&hide());
        assert!(hidden.ok, "{hidden:?}, step {step}");
        let died = house.surviving(step, || {
            let _ = house.try_ask(&unhide());
        });
        ends_whole(house, step);
        died
    });
}

#[test]
fn a_device_that_was_being_hidden_and_cannot_be_after_a_restart_is_dom0s_again() {
    let house = with_group();
    house.kill();
    // As a daemon leaves it that is killed after the first of the group has lost its driver: the other one has its own still.
    let (bdf, driver) = GROUP[0];
    let record = house.record(bdf);
    record.set_driver(Some(driver));
    record.set_phase(Phase::Hiding);
    drop(record);
    reserve(&house, bdf);
    house.start();
    until("it is dom0's", || house.records().is_empty());
    as_before(&house, 0);
}

#[test]
fn devices_of_a_group_that_were_hidden_go_back_with_one_that_cannot_follow_after_a_restart() {
    let house = with_group();
    assert!(house.entry(&hide()).ok);
    house.kill();
    // Killed before the second was ready, which is dead by now.
    for (bdf, _) in GROUP {
        house.record(bdf).insert(Flags::WITH_GROUP);
    }
    house.record(MSI_ONLY).set_phase(Phase::Hiding);
    house.bus.vanish(MSI_ONLY, true);
    house.start();
    until("they are dom0's", || house.records().is_empty());
    let (nvme, driver) = GROUP[0];
    let found = house.bus.describe(nvme).unwrap().driver;
    assert_eq!(found.as_deref(), Some(driver));
}

#[test]
fn a_group_that_had_arrived_when_the_daemon_was_killed_is_not_on_its_way_for_ever() {
    let house = with_group();
    assert!(house.entry(&hide()).ok);
    house.kill();
    for (bdf, _) in GROUP {
        house.record(bdf).insert(Flags::WITH_GROUP);
    }
    house.start();
    for (bdf, _) in GROUP {
        assert_eq!(house.phase(bdf), Some(Phase::Hidden));
        assert!(!house.record(bdf).flags().contains(Flags::WITH_GROUP));
    }
}

/// As at boot, of a device whose driver is not loaded: it is alone in the group with something to do.
fn hidden_beside_one_without_driver() -> House {
    let house = with_group();
    house.bus.unbind(MSI_ONLY).unwrap();
    house.hide(&[NVME]);
    house
}

#[test]
fn a_device_that_was_hidden_long_before_stays_so_if_another_one_cannot_follow_after_a_restart() {
    let house = hidden_beside_one_without_driver();
    house.kill();
    house.record(MSI_ONLY).set_phase(Phase::Hiding);
    house.bus.vanish(MSI_ONLY, true);
    house.start();
    until("the other one is dom0's", || house.records() == [NVME]);
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
    let (_, mut frontend) = house.boot(&[NVME]);
    frontend.close(LONG).unwrap();
}

fn without_drivers() -> House {
    let house = with_group();
    for (bdf, _) in GROUP {
        house.bus.unbind(bdf).unwrap();
    }
    house
}

/// The daemon is killed at each step while the group is hidden, and one of it dies before the next one is started.
fn one_dies_while_no_daemon_runs(begin: fn() -> House) {
    at_each_step(begin, |house, step| {
        house.life().end_at(step);
        let _ = house.try_ask(&hide());
        let died = house.life().has_ended();
        house.kill();
        house.bus.vanish(MSI_ONLY, true);
        house.start();
        until(("all or none", step), || {
            house.records().is_empty() || are_hidden(house)
        });
        *house = begin();
        died
    });
}

#[test]
fn a_group_is_hidden_as_a_whole_or_not_at_all_if_one_dies_while_no_daemon_runs() {
    one_dies_while_no_daemon_runs(with_group);
}

#[test]
fn a_group_without_drivers_is_hidden_as_a_whole_or_not_at_all_if_one_dies_while_no_daemon_runs() {
    one_dies_while_no_daemon_runs(without_drivers);
}

#[test]
fn devices_that_were_reserved_stay_reserved_if_their_group_cannot_be_hidden() {
    let house = with_group();
    for (bdf, _) in GROUP {
        reserve(&house, bdf);
    }
    // The second: when it is found out, the first one has arrived.
    house.bus.vanish(MSI_ONLY, true);
    assert!(!house.entry(&hide()).ok);
    assert_eq!(house.records(), []);
    for (bdf, _) in GROUP {
        let reserved = house.bus.driver_override(bdf).unwrap();
        assert_eq!(reserved.as_deref(), Some(RESERVED_FOR), "{bdf}");
        assert_eq!(house.bus.describe(bdf).unwrap().driver, None, "{bdf}");
    }
}

#[test]
fn a_guest_waits_for_a_device_whose_return_to_dom0_is_refused() {
    let house = with_group();
    assert!(house.entry(&hide()).ok);
    house.bus.set_reach(MSI_ONLY, Reach::Moving);
    thread::scope(|scope| {
        let refused = scope.spawn(|| house.entry(&unhide()));
        until("the first is on its way back", || {
            house.phase(NVME) == Some(Phase::Returning)
        });
        let guest = scope.spawn(|| house.boot(&[NVME]));
        // Time to be turned away.
        thread::sleep(Duration::from_millis(20));
        house.bus.set_reach(MSI_ONLY, Reach::Elsewhere);
        let refused = refused.join().unwrap();
        assert!(!refused.ok, "{refused:?}");
        let (domain, mut frontend) = guest.join().unwrap();
        assert_eq!(house.record(NVME).owner().unwrap().domain, domain);
        frontend.close(LONG).unwrap();
    });
}

#[test]
fn a_guest_that_waits_for_a_device_on_its_way_back_to_dom0_is_told_when_it_has_gone() {
    let house = House::new(&[NVME]);
    house.bus.set_reset_time(NVME, Duration::from_millis(200));
    thread::scope(|scope| {
        let back = scope.spawn(|| house.unhide(NVME));
        until("it is on its way back", || {
            house.phase_if_any(NVME) == Some(Phase::Returning)
        });
        let domain = house.guest(&[NVME]);
        back.join().unwrap();
        until("it is told", || house.node(domain, "error-0").is_some());
    });
}
