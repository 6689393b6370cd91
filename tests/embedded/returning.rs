//! A guest's frontend goes and comes back: its driver is loaded anew, or another kernel is started.

use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, NVME};
use xenbus::sim::{Frontend, Variant};
use xenbus::{PciDevice, XenbusState};

use crate::house::{House, LONG, at, until};

const FIRST: PciDevice = at(0, 0);

/// The device is as it was, and takes interrupts.
fn works(house: &House, frontend: &mut Frontend) {
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    assert!(house.bus.raise_interrupt(NVME, 1));
    assert!(frontend.wait_for_interrupt(FIRST, 1, LONG).unwrap());
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
}

#[test]
fn a_frontend_that_closes_in_order_sees_the_backend_follow_and_is_connected_again() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    for _ in 0..3 {
        works(&house, &mut frontend);
        frontend.close(LONG).unwrap();
        assert_eq!(house.machine.mapped_grants(domain), 0);
        assert_eq!(house.phase(NVME), Some(Phase::Assigned));
        house.until_node(domain, "state", "4");
        frontend = house.connected(domain);
    }
    works(&house, &mut frontend);
    assert_eq!(house.machine.mapped_grants(domain), 1);
    assert_eq!(house.pirqs(domain), 2);
}

#[test]
fn a_driver_that_is_loaded_anew_at_once_is_connected_again() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    works(&house, &mut frontend);
    let before = house.guest_line(domain).unwrap();
    for round in 0..10 {
        frontend.unload().unwrap();
        // Either before the backend has taken note of it, or just after.
        if round % 2 == 0 {
            until("the page is let go", || {
                house.machine.mapped_grants(domain) == 0
            });
        }
        // It closes for good when it finds the backend closed.
        frontend = house.connected(domain);
        works(&house, &mut frontend);
    }
    assert_eq!(house.guest_line(domain).unwrap().devices, before.devices);
}

#[test]
fn a_driver_that_is_unloaded_while_devices_come_is_connected_again_with_them() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    for _ in 0..3 {
        // The frontend has not answered the toolstack's 7 yet when it goes.
        house.attach(domain, INTX_ONLY).unwrap();
        frontend.unload().unwrap();
        house.until_node(domain, "state-1", "3");
        frontend = house.connected(domain);
        // It may have found the 7, and look for devices when its answer has been seen.
        while frontend.state() != XenbusState::Connected {
            assert!(frontend.follow(LONG).unwrap().is_some());
        }
        assert_eq!(frontend.functions().count(), 2);
        house.while_following(&mut frontend, || house.detach(domain, INTX_ONLY));
        assert_eq!(frontend.functions().count(), 1);
    }
}

#[test]
fn a_kernel_that_is_started_by_kexec_is_connected_from_the_beginning() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    works(&house, &mut frontend);
    frontend.close(LONG).unwrap();
    // The new kernel brings a frontend that was closed back to its start, and waits until the backend has followed.
    frontend.write_state("1").unwrap();
    house.until_node(domain, "state", "3");
    frontend.connect(LONG).unwrap();
    works(&house, &mut frontend);
}

#[test]
fn a_kernel_that_crashed_with_its_interrupts_enabled_has_a_successor_that_enables_them_again() {
    let house = House::new(&[NVME]);
    let (domain, mut crashed) = house.boot(&[NVME]);
    works(&house, &mut crashed);
    // It says nothing any more, and its successor waits for nothing.
    for state in ["5", "6", "1"] {
        crashed.write_state(state).unwrap();
    }
    house.until_node(domain, "state", "3");
    let mut frontend = house.frontend(domain, Variant::Linux);
    frontend.connect(LONG).unwrap();
    works(&house, &mut frontend);
    assert_eq!(house.pirqs(domain), 2);
}

#[test]
fn a_frontend_that_lies_once_is_told_and_may_try_again() {
    let house = House::new(&[NVME]);
    let domain = house.guest(&[NVME]);
    let mut frontend = house.frontend(domain, Variant::Linux);
    let lies = [
        xenbus::sim::Lies {
            magic: "8".into(),
            ..Default::default()
        },
        xenbus::sim::Lies {
            reference: "4711".into(),
            ..Default::default()
        },
        xenbus::sim::Lies {
            port: "none".into(),
            ..Default::default()
        },
    ];
    for lie in lies {
        house.until_node(domain, "state", "3");
        frontend.publish_with(&lie).unwrap();
        house.until_node(domain, "state", "5");
        let error = format!("/local/domain/0/error/backend/pci/{domain}/0/error");
        assert!(house.machine.xenstore_nodes().contains_key(&error));
        assert_eq!(house.machine.mapped_grants(domain), 0);
        frontend.write_state("6").unwrap();
        house.until_node(domain, "state", "6");
        frontend.write_state("1").unwrap();
    }
    house.until_node(domain, "state", "3");
    frontend.connect(LONG).unwrap();
    assert_eq!(frontend.state(), XenbusState::Connected);
}
