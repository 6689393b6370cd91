//! Devices that dom0 does not reach for a while, as through VFIO when they change hands.

use std::thread;
use std::time::Duration;

use pcibackd::control::protocol::{Entry, Request};
use pcibackd::host::Bus;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{NVME, Reach};

use crate::house::{House, LONG, at, until};

fn reset(house: &House) -> Entry {
    house.entry(&Request::Reset {
        devices: vec![NVME.to_string()],
        method: None,
        force: false,
    })
}

fn hide(house: &House) -> Entry {
    house.entry(&Request::Hide {
        devices: vec![NVME.to_string()],
        force: false,
    })
}

fn unhide(house: &House) -> Entry {
    house.entry(&Request::Unhide {
        devices: vec![NVME.to_string()],
        force: false,
    })
}

#[test]
fn a_reset_that_ends_while_its_device_changes_hands_waits_for_it() {
    let house = House::new(&[NVME]);
    house.bus.set_reach(NVME, Reach::Moving);
    let before = house.bus.resets(NVME);
    thread::scope(|scope| {
        let asked = scope.spawn(|| reset(&house));
        until("it was reset", || house.bus.resets(NVME) > before);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(house.phase(NVME), Some(Phase::Releasing));
        house.bus.set_reach(NVME, Reach::Here);
        let reset = asked.join().unwrap();
        assert!(reset.ok, "{reset:?}");
    });
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
}

#[test]
fn a_device_that_changes_hands_when_its_guest_ends_is_free_when_it_has_done_so() {
    let house = House::new(&[NVME]);
    let (domain, frontend) = house.boot(&[NVME]);
    drop(frontend);
    house.bus.set_reach(NVME, Reach::Moving);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    until("it is on its way", || {
        house.phase(NVME) == Some(Phase::Releasing)
    });
    thread::sleep(Duration::from_millis(20));
    assert_eq!(house.phase(NVME), Some(Phase::Releasing));
    house.bus.set_reach(NVME, Reach::Here);
    house.until_free(NVME);
}

#[test]
fn a_device_that_a_former_guest_has_not_let_go_of_says_so_until_it_has() {
    let house = House::new(&[NVME]);
    let (domain, frontend) = house.boot(&[NVME]);
    drop(frontend);
    house.bus.set_reach(NVME, Reach::Elsewhere);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    // Not dead: nobody has looked at it.
    house.until_free(NVME);
    for refused in [reset(&house), hide(&house), unhide(&house)] {
        assert!(!refused.ok, "{refused:?}");
        assert!(
            refused.message.contains("has not let go of it"),
            "{refused:?}"
        );
    }
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
    house.bus.set_reach(NVME, Reach::Here);
    let hidden = hide(&house);
    assert!(hidden.ok, "{hidden:?}");
    let (_, mut frontend) = house.boot(&[NVME]);
    let identity = frontend.conf_read(at(0, 0), 0, 4).unwrap();
    assert_eq!(identity, 0x0010_1b36);
    frontend.close(LONG).unwrap();
}

#[test]
fn a_device_whose_guest_ended_without_a_daemon_is_hidden_anew_once_that_guest_lets_go_of_it() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_msix(at(0, 0), &[0, 1]).unwrap();
    drop(frontend);
    house.kill();
    house.bus.set_reach(NVME, Reach::Elsewhere);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    for _ in 0..2 {
        house.start();
        let refused = hide(&house);
        assert!(!refused.ok, "{refused:?}");
        assert!(!refused.message.contains("domain"), "{refused:?}");
        // Not given to dom0's driver either.
        assert_eq!(house.records(), [NVME]);
        assert_eq!(house.bus.describe(NVME).unwrap().driver, None);
        house.kill();
    }
    house.start();
    house.bus.set_reach(NVME, Reach::Here);
    let hidden = hide(&house);
    assert!(hidden.ok, "{hidden:?}");
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_msix(at(0, 0), &[0]).unwrap();
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_free(NVME);
    assert!(unhide(&house).ok);
    let driver = house.bus.describe(NVME).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("nvme"));
}
