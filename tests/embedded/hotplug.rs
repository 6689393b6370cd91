//! Devices come to a running guest, and go.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use conf_space::Bdf;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC_VF0, NVME};
use xenbus::XenbusState;
use xenbus::sim::{DomainKind, PciOptions, ToolstackError, Variant};

use crate::house::{House, LONG, until};
use crate::mortal::Deed;

#[test]
fn a_device_comes_and_goes_twenty_times_and_nothing_is_left_of_it() {
    let house = House::new(&[INTX_ONLY, NVME]);
    let (domain, mut frontend) = house.boot(&[INTX_ONLY]);
    let nodes = || {
        let nodes = house.machine.xenstore_nodes().into_keys();
        let ours = nodes.filter(|path| path.starts_with("/local/"));
        ours.collect::<Vec<_>>()
    };
    let (before, records) = (nodes(), house.records());
    for round in 0..20 {
        house.while_following(&mut frontend, || house.attach(domain, NVME));
        let address = house.seen_as(NVME);
        assert!(frontend.function(address).is_some(), "{round}");
        frontend.enable_device(address).unwrap();
        frontend.enable_msix(address, &[0, 1, 2]).unwrap();
        assert!(house.bus.raise_interrupt(NVME, 2));
        assert!(frontend.wait_for_interrupt(address, 2, LONG).unwrap());
        house.while_following(&mut frontend, || house.detach(domain, NVME));
        assert!(frontend.function(address).is_none(), "{round}");
        assert_eq!(house.pirqs(domain), 0, "{round}");
        assert_eq!(house.machine.mapped_grants(domain), 1);
        house.until_free(NVME);
    }
    assert_eq!(nodes(), before);
    assert_eq!(house.records(), records);
    // The other device never noticed.
    let address = house.seen_as(INTX_ONLY);
    assert_eq!(frontend.conf_read(address, 0, 4).unwrap(), 0x8139_10ec);
}

#[test]
fn devices_are_known_by_their_addresses_however_the_toolstack_renumbers() {
    let devices = [NVME, INTX_ONLY, MSI_ONLY, NIC_VF0];
    let house = House::new(&devices);
    let (domain, mut frontend) = house.boot(&devices);
    let places: Vec<_> = devices.map(|bdf| house.seen_as(bdf)).into();
    let expect = |frontend: &mut xenbus::sim::Frontend, there: &[Bdf]| {
        for (bdf, place) in devices.into_iter().zip(&places) {
            let read = frontend.conf_read(*place, 0, 4);
            assert_eq!(read.is_ok(), there.contains(&bdf), "{bdf}");
            assert_eq!(frontend.function(*place).is_some(), there.contains(&bdf));
        }
    };
    house.while_following(&mut frontend, || house.detach(domain, NVME));
    expect(&mut frontend, &[INTX_ONLY, MSI_ONLY, NIC_VF0]);
    house.while_following(&mut frontend, || house.detach(domain, MSI_ONLY));
    expect(&mut frontend, &[INTX_ONLY, NIC_VF0]);
    house.until_free(NVME);
    house.while_following(&mut frontend, || house.attach(domain, NVME));
    expect(&mut frontend, &[NVME, INTX_ONLY, NIC_VF0]);
    house.while_following(&mut frontend, || house.detach(domain, INTX_ONLY));
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    expect(&mut frontend, &[NVME]);
    assert_eq!(house.guest_line(domain).unwrap().devices.len(), 1);
}

#[test]
fn when_its_last_device_goes_a_guest_has_no_backend_and_may_have_one_again() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    for _ in 0..2 {
        house.while_following(&mut frontend, || house.detach(domain, NVME));
        house.until_gone(domain);
        house.until_free(NVME);
        house.attach(domain, NVME).unwrap();
        frontend = house.connected(domain);
        assert_eq!(frontend.functions().count(), 1);
    }
}

#[test]
fn a_running_guest_that_had_none_gets_its_first_device() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house.machine.create_domain("bare", DomainKind::Pv).unwrap();
    house.machine.unpause_domain(domain).unwrap();
    house.attach(domain, NVME).unwrap();
    let mut frontend = house.connected(domain);
    house.while_following(&mut frontend, || house.attach(domain, INTX_ONLY));
    assert_eq!(frontend.functions().count(), 2);
}

#[test]
fn a_device_that_fails_at_hot_plug_does_not_disturb_those_in_use() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    // Never hidden.
    house.while_following(&mut frontend, || house.attach(domain, MSI_ONLY));
    assert_eq!(frontend.state(), XenbusState::Connected);
    house.until_node(domain, "state-1", "6");
    assert_eq!(frontend.functions().count(), 1);
    assert!(frontend.conf_read(house.seen_as(NVME), 0, 4).is_ok());
}

#[test]
fn a_failure_is_told_beside_its_device_as_long_as_that_is_on_the_list() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let failed = |house: &House| house.guest_line(domain).unwrap().failed;
    // Never hidden.
    house.while_following(&mut frontend, || house.attach(domain, MSI_ONLY));
    house.until_node(domain, "state-1", "6");
    let told = house.node(domain, "error-1").unwrap();
    assert!(told.contains(&MSI_ONLY.to_string()), "{told}");
    assert_eq!(failed(&house).len(), 1);
    house.while_following(&mut frontend, || house.attach(domain, INTX_ONLY));
    assert_eq!(frontend.functions().count(), 2);
    // The toolstack renumbers.
    house.while_following(&mut frontend, || house.detach(domain, NVME));
    house.until_node(domain, "error-0", &told);
    assert_eq!(house.node(domain, "error-1"), None);
    // Another daemon knows as well.
    house.restart();
    until("the failure is known", || failed(&house).len() == 1);
    // And the device that has its index next is not blamed for it.
    house.while_following(&mut frontend, || house.detach(domain, MSI_ONLY));
    until("it is told no more", || {
        house.node(domain, "error-0").is_none()
    });
    assert_eq!(house.node(domain, "state-0").as_deref(), Some("3"));
    until("it is forgotten", || failed(&house).is_empty());
    house.while_following(&mut frontend, || house.detach(domain, INTX_ONLY));
    house.until_gone(domain);
}

#[test]
fn a_guest_that_does_not_answer_keeps_its_device_until_it_does() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    frontend.set_answers_reconfiguring(false);
    assert!(matches!(
        house.detach(domain, NVME),
        Err(ToolstackError::BackendNotReady { .. })
    ));
    assert!(frontend.conf_read(house.seen_as(NVME), 0, 4).is_ok());
    frontend.set_answers_reconfiguring(true);
    let mut awake = house.frontend(domain, Variant::Linux);
    drop(frontend);
    awake.write_state("7").unwrap();
    house.until_free(NVME);
    awake.write_state("4").unwrap();
    house.until_node(domain, "state", "4");
}

#[test]
fn a_device_that_comes_while_the_guests_last_one_is_being_forgotten_is_taken() {
    for step in 0..24 {
        let house = House::new(&[NVME, INTX_ONLY]);
        let (domain, mut frontend) = house.boot(&[NVME]);
        let state = format!("/local/domain/0/backend/pci/{domain}/0/state");
        let there = {
            let machine = house.machine.clone();
            move || machine.xenstore_nodes().contains_key(&state)
        };
        let went = Arc::new(AtomicBool::new(false));
        let came = Arc::new(Mutex::new(false));
        house.life().witness({
            let (machine, went, came) =
                (house.machine.clone(), Arc::clone(&went), Arc::clone(&came));
            let requests = AtomicUsize::new(0);
            move |deed| {
                let mut came = came.lock().unwrap();
                if *deed != Deed::Request || *came || there() {
                    return;
                }
                // The toolstack does one thing after the other.
                until("it has gone", || went.load(Ordering::SeqCst));
                if requests.fetch_add(1, Ordering::SeqCst) == step {
                    *came = true;
                    machine
                        .pci_attach(domain, for_xen(INTX_ONLY), &PciOptions::default())
                        .unwrap();
                }
            }
        });
        house.while_following(&mut frontend, || {
            house.detach(domain, NVME).unwrap();
            went.store(true, Ordering::SeqCst);
            Ok(())
        });
        drop(frontend);
        house.until_free(NVME);
        let came = std::mem::replace(&mut *came.lock().unwrap(), true);
        if !came {
            house.attach(domain, INTX_ONLY).unwrap();
        }
        let mut frontend = house.connected(domain);
        let address = house.seen_as(INTX_ONLY);
        let read = frontend.conf_read(address, 0, 4);
        assert_eq!(read.unwrap(), 0x8139_10ec, "after {step} requests");
    }
}
