//! A guest's frontend goes and comes back: its driver is loaded anew, or another kernel is started.

use std::time::Duration;

use pcibackd::host::record::Phase;
use pcibackd::host::sim::NVME;
use xenbus::sim::{Frontend, Variant};
use xenbus::{DomId, PciDevice, XenbusState};

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

/// The driver that is loaded next. It does not look at the backend before that serves its page.
fn loaded(house: &House, domain: DomId) -> Frontend {
    let mut frontend = house.frontend(domain, Variant::Linux);
    frontend.publish().unwrap();
    frontend.set_op_timeout(Some(Duration::from_millis(20)));
    until("the new page is served", || {
        frontend.conf_read(FIRST, 0, 4).is_ok()
    });
    frontend.set_op_timeout(Some(LONG));
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    frontend
}

#[test]
fn a_frontend_that_closes_in_order_is_connected_again() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    for _ in 0..3 {
        works(&house, &mut frontend);
        frontend.close(LONG).unwrap();
        house.until_node(domain, "state", "6");
        assert_eq!(house.machine.mapped_grants(domain), 0);
        assert_eq!(house.phase(NVME), Some(Phase::Assigned));
        frontend = loaded(&house, domain);
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
    // 6 and 3 come so fast that the backend may see the latter only.
    for _ in 0..10 {
        frontend.unload().unwrap();
        frontend = loaded(&house, domain);
        works(&house, &mut frontend);
    }
    assert_eq!(house.guest_line(domain).unwrap().devices, before.devices);
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
