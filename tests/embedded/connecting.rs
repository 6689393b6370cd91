//! A guest boots and finds its devices.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use conf_space::{Bdf, Width};
use pcibackd::config::{Config, Guest, Topology};
use pcibackd::host::Bus;
use pcibackd::host::devices::for_xen;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{BOOT_CONTROLLER, BROKEN, INTX_ONLY, MSI_ONLY, NIC_VF0, NIC_VF1, NVME};
use xenbus::XenbusState;
use xenbus::pciif::{Command, PciError};
use xenbus::sim::{DomainKind, MachineOptions, Step, Variant};
use xenbus::xenstore::Store;

use crate::house::{House, LONG, at, until};

const PRESENT: [Bdf; 4] = [NVME, INTX_ONLY, MSI_ONLY, NIC_VF0];

#[test]
fn a_guest_boots_up_to_connected() {
    let house = House::new(&[NVME]);
    let domain = house.guest(&[NVME]);
    house.until_node(domain, "state", "3");
    let frontend = house.connected(domain);
    assert_eq!(frontend.state(), XenbusState::Connected);
    for (node, value) in [
        ("state", "4"),
        ("state-0", "3"),
        ("vdev-0", "0000:00:00.00"),
        ("root_num", "1"),
        ("root-0", "0000:00"),
    ] {
        assert_eq!(house.node(domain, node).as_deref(), Some(value), "{node}");
    }
    let line = house.guest_line(domain).unwrap();
    assert_eq!((line.devices.len(), line.failed.len()), (1, 0));
}

#[test]
fn a_frontend_that_is_faster_than_its_backend_is_connected_all_the_same() {
    let house = House::new(&[NVME]);
    house.kill();
    let domain = house.guest(&[NVME]);
    let mut frontend = house.frontend(domain, Variant::Linux);
    frontend.publish().unwrap();
    house.start();
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x0010_1b36);
}

#[test]
fn devices_that_come_one_by_one_while_the_guest_is_built_are_all_there() {
    let house = House::new(&PRESENT);
    let domain = house.machine.create_domain("slow", DomainKind::Pv).unwrap();
    for (n, bdf) in PRESENT.into_iter().enumerate() {
        house.attach(domain, bdf).unwrap();
        house.until_node(domain, &format!("state-{n}"), "3");
        house.until_node(domain, "state", "3");
    }
    house.machine.unpause_domain(domain).unwrap();
    let frontend = house.connected(domain);
    assert_eq!(frontend.functions().count(), PRESENT.len());
}

#[test]
fn a_scan_of_all_functions_finds_the_guests_devices_and_nothing_else() {
    let house = House::new(&PRESENT);
    let domain = house.guest(&PRESENT);
    let mut frontend = house.frontend(domain, Variant::Linux);
    let probed = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&probed);
    frontend.observe(move |step| {
        if let Step::Operation(operation) = step
            && (operation.command, operation.offset) == (Command::ConfRead as u32, 0)
        {
            seen.lock()
                .unwrap()
                .push((operation.function, operation.result));
        }
    });
    frontend.connect(LONG).unwrap();
    let probed = probed.lock().unwrap();
    assert_eq!(probed.len(), 256);
    let found = |(_, result): &&(_, Option<PciError>)| *result == Some(PciError::SUCCESS);
    assert_eq!(probed.iter().filter(found).count(), PRESENT.len());
    let absent = |(_, result): &&(_, Option<PciError>)| *result == Some(PciError::DEV_NOT_FOUND);
    assert_eq!(probed.iter().filter(absent).count(), 256 - PRESENT.len());
    for bdf in PRESENT {
        let identity = house.bus.describe(bdf).unwrap().identity;
        let function = frontend.function(house.seen_as(bdf)).unwrap();
        assert_eq!(
            (function.vendor, function.device),
            (identity.vendor, identity.device),
            "{bdf}"
        );
    }
}

#[test]
fn a_guest_sizes_every_bar_and_changes_none() {
    let house = House::new(&PRESENT);
    let hardware = |bdf: Bdf| {
        let config = house.config(bdf);
        let read = |offset| config.read(offset, Width::Four).unwrap();
        (0x10..0x34).step_by(4).map(read).collect::<Vec<_>>()
    };
    let before: Vec<_> = PRESENT.into_iter().map(hardware).collect();
    let (_, frontend) = house.boot(&PRESENT);
    for bdf in PRESENT {
        let resources = house.bus.describe(bdf).unwrap().identity.resources;
        let there = resources.iter().filter(|resource| resource.is_present());
        let expected: Vec<_> = there
            .map(|resource| (resource.start, resource.size))
            .collect();
        let function = frontend.function(house.seen_as(bdf)).unwrap();
        let found: Vec<_> = function
            .bars
            .iter()
            .map(|bar| (bar.address, bar.size))
            .collect();
        assert_eq!(found, expected, "{bdf}");
    }
    assert_eq!(
        PRESENT.into_iter().map(hardware).collect::<Vec<_>>(),
        before
    );
}

#[test]
fn one_device_that_nobody_can_have_does_not_spoil_the_others() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house
        .machine
        .create_domain("mixed", DomainKind::Pv)
        .unwrap();
    // The second one was never hidden, and of the third somebody has mistyped the address.
    for bdf in [NVME, BOOT_CONTROLLER, MSI_ONLY, INTX_ONLY] {
        house.attach(domain, bdf).unwrap();
        if bdf == MSI_ONLY {
            let path = house.backend(domain, "dev-2");
            house.store().write(&path, "0000:0g:00.0").unwrap();
        }
    }
    house.machine.unpause_domain(domain).unwrap();
    let frontend = house.connected(domain);
    assert_eq!(frontend.functions().count(), 2);
    for (n, state) in ["3", "6", "6", "3"].into_iter().enumerate() {
        let node = format!("state-{n}");
        assert_eq!(house.node(domain, &node).as_deref(), Some(state), "{node}");
    }
    let why = house.node(domain, "error-1").unwrap();
    assert!(why.contains(&BOOT_CONTROLLER.to_string()), "{why}");
    let why = house.node(domain, "error-2").unwrap();
    assert!(why.contains("PCI address"), "{why}");
    assert_eq!(house.node(domain, "error-0"), None);
    assert_eq!(house.guest_line(domain).unwrap().failed.len(), 2);
}

#[test]
fn two_guests_never_share_a_device() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (first, mut frontend) = house.boot(&[NVME]);
    let second = house.guest(&[INTX_ONLY]);
    // A toolstack that has lost its mind.
    let path = house.backend(second, "dev-0");
    house.until_node(second, "state", "3");
    let mut store = house.store();
    for (node, value) in [
        ("dev-1", NVME.to_string()),
        ("state-1", "1".to_owned()),
        ("num_devs", "2".to_owned()),
    ] {
        store.write(&path.replace("dev-0", node), value).unwrap();
    }
    house.until_node(second, "state-1", "6");
    assert_eq!(house.connected(second).functions().count(), 1);
    assert_eq!(house.record(NVME).owner().unwrap().domain, first);
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x0010_1b36);
}

#[test]
fn a_broken_device_is_used_as_far_as_it_works() {
    let house = House::new(&[BROKEN]);
    let (_, mut frontend) = house.boot(&[BROKEN]);
    let address = house.seen_as(BROKEN);
    assert_eq!(frontend.conf_read(address, 0, 4).unwrap(), 0x0005_1b36);
    let operation = xenbus::pciif::PciOp {
        cmd: Command::EnableMsix as u32,
        value: 1,
        ..Default::default()
    };
    assert!(frontend.operate(&operation).unwrap().err < 0);
}

#[test]
fn a_device_that_is_being_hidden_is_waited_for() {
    let house = House::new(&[]);
    house.bus.set_reset_time(NVME, Duration::from_millis(100));
    thread::scope(|scope| {
        scope.spawn(|| house.hide(&[NVME]));
        until("hiding has begun", || house.phase_if_any(NVME).is_some());
        let (_, frontend) = house.boot(&[NVME]);
        assert_eq!(frontend.functions().count(), 1);
    });
}

#[test]
fn a_device_that_is_being_reset_is_waited_for_and_then_free_of_its_last_guest() {
    let house = House::new(&[NVME]);
    let (domain, frontend) = house.boot(&[NVME]);
    house.bus.set_reset_time(NVME, Duration::from_millis(100));
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    let (_, frontend) = house.boot(&[NVME]);
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn an_hvm_guest_has_its_nodes_though_nobody_answers() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house.machine.create_domain("hvm", DomainKind::Hvm).unwrap();
    house.attach(domain, NVME).unwrap();
    house.until_node(domain, "state", "4");
    assert_eq!(house.node(domain, "state-0").as_deref(), Some("3"));
    house.machine.unpause_domain(domain).unwrap();
    house.attach(domain, INTX_ONLY).unwrap();
    house.until_node(domain, "state-1", "3");
    house.until_node(domain, "state", "4");
    house.detach(domain, NVME).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(NVME);
    house.until_free(INTX_ONLY);
}

#[test]
fn each_guest_has_the_topology_that_is_configured_for_it() {
    let mut config = Config::default();
    let physical = Guest {
        topology: Some(Topology::Passthrough),
        ..Guest::default()
    };
    config.guest.insert("physical".into(), physical);
    let devices = [NVME, INTX_ONLY, NIC_VF0, NIC_VF1];
    let house = House::with(config, MachineOptions::default(), &devices);
    let first = house.named_guest("physical", &[NVME, NIC_VF1]);
    let second = house.named_guest("virtual", &[INTX_ONLY, NIC_VF0]);
    let found = |frontend: &xenbus::sim::Frontend| {
        let all = frontend.functions().map(|function| function.address);
        all.collect::<Vec<_>>()
    };
    let mut expected = vec![for_xen(NVME), for_xen(NIC_VF1)];
    expected.sort();
    assert_eq!(found(&house.connected(first)), expected);
    assert_eq!(house.node(first, "root_num").as_deref(), Some("2"));
    assert_eq!(found(&house.connected(second)), [at(0, 0), at(1, 0)]);
    assert_eq!(house.node(second, "root-0").as_deref(), Some("0000:00"));
}

#[test]
fn a_guest_that_is_destroyed_leaves_nothing_behind() {
    let house = House::impatient(&PRESENT);
    for _ in 0..3 {
        let (domain, mut frontend) = house.boot(&PRESENT);
        frontend.enable_device(house.seen_as(NVME)).unwrap();
        frontend.enable_msix(house.seen_as(NVME), &[0, 1]).unwrap();
        house.machine.domain_shut_down(domain).unwrap();
        house.machine.destroy_domain(domain).unwrap();
        house.until_gone(domain);
        for bdf in PRESENT {
            house.until_free(bdf);
        }
    }
    let mut expected = PRESENT.to_vec();
    expected.sort();
    assert_eq!(house.records(), expected);
    for bdf in PRESENT {
        house.unhide(bdf);
        assert!(house.bus.describe(bdf).unwrap().driver.is_some(), "{bdf}");
    }
    assert!(house.records().is_empty());
}

#[test]
fn a_guest_that_does_not_answer_its_destruction_leaves_nothing_behind_either() {
    let house = House::impatient(&[NVME]);
    let (domain, _frontend) = house.boot(&[NVME]);
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(NVME);
}

#[test]
fn a_device_that_does_not_come_back_from_its_reset_is_given_to_nobody() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let (domain, _frontend) = house.boot(&[NVME]);
    house.bus.set_reset_fails(NVME, true);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    until("it is found dead", || {
        house.phase(NVME) == Some(Phase::Dead)
    });
    let (next, frontend) = house.boot(&[INTX_ONLY]);
    drop(frontend);
    let mut store = house.store();
    for (node, value) in [
        ("dev-1", NVME.to_string()),
        ("state-1", "1".to_owned()),
        ("num_devs", "2".to_owned()),
        ("state", "3".to_owned()),
    ] {
        store.write(&house.backend(next, node), value).unwrap();
    }
    house.until_node(next, "state-1", "6");
}
