//! From one guest to the next, at awkward moments.

use std::time::Duration;

use pcibackd::config::{Config, Topology};
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC_VF0, NVME};
use xenbus::sim::ToolstackError;

use crate::house::{House, until};

/// The guest that has it goes, and its reset takes a while.
fn in_reset(house: &House, time: Duration) {
    let (domain, frontend) = house.boot(&[NVME]);
    house.bus.set_reset_time(NVME, time);
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    until("it is being reset", || {
        house.phase(NVME) == Some(Phase::Releasing)
    });
}

#[test]
fn what_the_next_guest_is_granted_while_the_device_is_reset_stays() {
    let house = House::new(&[NVME]);
    in_reset(&house, Duration::from_millis(200));
    house.make_permissive(NVME);
    house.until_free(NVME);
    assert!(house.is_permissive(NVME));
}

#[test]
fn a_guest_is_connected_once_all_its_devices_are_there() {
    let house = House::new(&[NVME, INTX_ONLY]);
    in_reset(&house, Duration::from_millis(200));
    let (_, frontend) = house.boot(&[INTX_ONLY, NVME]);
    assert_eq!(frontend.functions().count(), 2);
}

#[test]
fn a_running_guest_that_waits_for_a_device_uses_its_others_meanwhile() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[INTX_ONLY]);
    let address = house.seen_as(INTX_ONLY);
    in_reset(&house, Duration::from_millis(400));
    house.while_following(&mut frontend, || house.attach(domain, NVME));
    // The attach is through when the reset is, and until then every look at the other device was answered.
    assert!(frontend.conf_read(address, 0, 4).is_ok());
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
}

#[test]
fn a_node_that_was_left_behind_takes_nobody_elses_device_away() {
    let house = House::impatient(&[NVME, INTX_ONLY, MSI_ONLY, NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    let place = house.seen_as(NVME);
    frontend.set_answers_reconfiguring(false);
    assert!(matches!(
        house.detach(domain, NVME),
        Err(ToolstackError::BackendNotReady { .. })
    ));
    frontend.set_answers_reconfiguring(true);
    until("it is done, late", || {
        frontend.write_state("7").unwrap();
        house.phase(NVME) == Some(Phase::Hidden)
    });
    frontend.write_state("4").unwrap();
    house.until_node(domain, "state", "4");
    assert_eq!(house.node(domain, "dev-0"), Some(NVME.to_string()));

    house.while_following(&mut frontend, || house.attach(domain, MSI_ONLY));
    assert_eq!(house.seen_as(MSI_ONLY), place);
    house.while_following(&mut frontend, || house.attach(domain, NIC_VF0));
    assert_eq!(house.phase(MSI_ONLY), Some(Phase::Assigned));
    house.restart();
    assert_eq!(house.phase(MSI_ONLY), Some(Phase::Assigned));
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
    assert!(frontend.conf_read(place, 0, 4).is_ok());
}

#[test]
fn a_detach_that_the_guest_does_not_live_to_answer_is_done() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.set_answers_reconfiguring(false);
    assert!(matches!(
        house.detach(domain, NVME),
        Err(ToolstackError::BackendNotReady { .. })
    ));
    house.machine.domain_shut_down(domain).unwrap();
    house.until_free(NVME);
    house.until_node(domain, "state", "4");
}

#[test]
fn another_topology_in_the_configuration_is_for_guests_to_come() {
    let mut house = House::new(&[NVME, INTX_ONLY]);
    let (_, mut frontend) = house.boot(&[NVME]);
    let address = house.seen_as(NVME);
    house.restart_with(Config {
        topology: Topology::Passthrough,
        ..Config::default()
    });
    assert!(frontend.conf_read(address, 0, 4).is_ok());
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
}
