//! Guests that run no frontend, or whose frontend does not answer: the toolstack is kept waiting no longer than needed.

use std::time::{Duration, Instant};

use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, NVME};
use xenbus::sim::{ToolstackError, Variant};
use xenbus::xenstore::Store;
use xenbus::{DomId, XenbusState};

use crate::house::{House, LONG, until};

/// Far below the 10 s that libxl would wait each time.
const SOON: Duration = Duration::from_secs(3);

fn in_time(action: impl FnOnce()) {
    let start = Instant::now();
    action();
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
}

#[test]
fn a_guest_that_is_destroyed_before_its_frontend_is_there_is_not_waited_for() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house.guest(&[NVME, INTX_ONLY]);
    in_time(|| house.machine.destroy_domain(domain).unwrap());
    house.until_gone(domain);
    house.until_free(NVME);
    house.until_free(INTX_ONLY);
}

#[test]
fn devices_come_to_a_guest_and_go_before_its_frontend_is_there() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house.guest(&[NVME]);
    in_time(|| house.attach(domain, INTX_ONLY).unwrap());
    house.until_node(domain, "state-1", "3");
    in_time(|| house.detach(domain, NVME).unwrap());
    let frontend = house.connected(domain);
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn a_guest_whose_driver_was_unloaded_loses_its_devices_at_once() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    frontend.close(LONG).unwrap();
    in_time(|| house.detach(domain, NVME).unwrap());
    house.until_free(NVME);
    in_time(|| house.machine.destroy_domain(domain).unwrap());
    house.until_gone(domain);
}

#[test]
fn a_driver_that_is_loaded_a_while_after_it_was_unloaded_finds_the_backend_connected() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.close(LONG).unwrap();
    // 6, which xen-pcifront would answer by closing again, does not stay.
    house.until_node(domain, "state", "4");
    let frontend = house.connected(domain);
    assert_eq!(frontend.functions().count(), 1);
    assert_eq!(house.machine.mapped_grants(domain), 1);
}

#[test]
fn a_guest_that_is_being_built_is_not_shown_connected() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let kind = xenbus::sim::DomainKind::Pv;
    let domain = house.machine.create_domain("slow", kind).unwrap();
    house.attach(domain, NVME).unwrap();
    house.until_node(domain, "state", "3");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(house.node(domain, "state").as_deref(), Some("3"));
    house.attach(domain, INTX_ONLY).unwrap();
    house.until_node(domain, "state-1", "3");
    house.machine.unpause_domain(domain).unwrap();
    assert_eq!(house.connected(domain).functions().count(), 2);
}

#[test]
fn a_stub_domain_is_shown_connected_when_it_is() {
    let house = House::new(&[NVME]);
    let kind = xenbus::sim::DomainKind::Pv;
    let domain = house.machine.create_domain("stub", kind).unwrap();
    let target = format!("/local/domain/{domain}/target");
    house.store().write(&target, "7").unwrap();
    house.attach(domain, NVME).unwrap();
    house.machine.unpause_domain(domain).unwrap();
    house.until_node(domain, "state", "3");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(house.node(domain, "state").as_deref(), Some("3"));
    assert_eq!(house.connected(domain).functions().count(), 1);
}

#[test]
fn an_hvm_guest_that_is_built_has_all_of_its_devices_and_they_go_as_fast() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let kind = xenbus::sim::DomainKind::Hvm;
    let domain = house.machine.create_domain("hvm", kind).unwrap();
    house.attach(domain, NVME).unwrap();
    house.until_node(domain, "state", "4");
    house.attach(domain, INTX_ONLY).unwrap();
    house.until_node(domain, "state-1", "3");
    house.machine.unpause_domain(domain).unwrap();
    assert!(house.record(NVME).owner().is_some());
    in_time(|| house.detach(domain, INTX_ONLY).unwrap());
    house.until_free(INTX_ONLY);
    in_time(|| house.machine.destroy_domain(domain).unwrap());
    house.until_gone(domain);
    house.until_free(NVME);
}

/// As libxl gives up: the device's interrupts and memory are taken back, its nodes stay.
fn detach_in_vain(house: &House, domain: DomId) {
    assert!(matches!(
        house.detach(domain, NVME),
        Err(ToolstackError::BackendNotReady { .. })
    ));
}

#[test]
fn a_guest_that_never_lets_a_device_go_cannot_use_it_and_nobody_else_gets_it() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    let (nvme, nic) = (house.seen_as(NVME), house.seen_as(INTX_ONLY));
    frontend.enable_device(nvme).unwrap();
    frontend.enable_msix(nvme, &[0, 1]).unwrap();
    frontend.set_answers_reconfiguring(false);
    detach_in_vain(&house, domain);
    assert!(frontend.conf_read(nvme, 0, 4).is_ok());
    // Longer than libxl waits.
    let start = Instant::now();
    while house.pirqs(domain) > 0 {
        assert!(start.elapsed() < 2 * LONG, "it keeps its interrupts");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(frontend.conf_read(nvme, 0, 4).is_err());
    assert!(frontend.conf_read(nic, 0, 4).is_ok());
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
    house.restart();
    assert!(frontend.conf_read(nvme, 0, 4).is_err());
    assert!(frontend.conf_read(nic, 0, 4).is_ok());
    // When it answers after all, everything goes its way.
    drop(frontend);
    let mut awake = house.frontend(domain, Variant::Linux);
    awake.write_state("7").unwrap();
    house.until_free(NVME);
    awake.write_state("4").unwrap();
    house.until_node(domain, "state", "4");
}

#[test]
fn a_backend_of_another_number_is_refused_and_told_so() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let second = format!("/local/domain/0/backend/pci/{domain}/1");
    let mut store = house.store();
    let dev = format!("{second}/dev-0");
    store.write(&dev, NVME.to_string()).unwrap();
    store.write(&format!("{second}/state"), "1").unwrap();
    let state = format!("{second}/state");
    until("it is refused", || {
        house.store().read_state(&state).unwrap() == XenbusState::Closed
    });
    let error = format!("/local/domain/0/error/backend/pci/{domain}/1/error");
    assert!(house.store().read_string(&error).is_ok());
    assert!(frontend.conf_read(house.seen_as(NVME), 0, 4).is_ok());
    assert_eq!(house.status().guests.len(), 1);
}
