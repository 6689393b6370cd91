//! The daemon is killed and started again, and guests do not notice.

use std::thread;
use std::time::Duration;

use conf_space::Width;
use pcibackd::config::Config;
use pcibackd::host::Bus;
use pcibackd::host::devices::for_xen;
use pcibackd::host::record::{Flags, Phase};
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC_VF0, NVME};
use xenbus::pciif::{Command, PciOp};
use xenbus::sim::{MachineOptions, Variant};
use xenbus::{PciDevice, XenbusState};

use crate::house::{House, LONG, at, until};

const FIRST: PciDevice = at(0, 0);

#[test]
fn a_device_that_an_earlier_daemon_left_to_lose_its_power_keeps_it_from_now_on() {
    let house = House::new(&[NVME]);
    house.kill();
    // As a pcibackd did that knew nothing of that.
    house.record(NVME).clear(Flags::COULD_LOSE_POWER);
    house.bus.set_may_lose_power(NVME, true).unwrap();
    house.start();
    assert!(!house.bus.may_lose_power(NVME).unwrap());
    house.unhide(NVME);
    assert!(house.bus.may_lose_power(NVME).unwrap());
}

#[test]
fn hidden_devices_stay_hidden() {
    let devices = [NIC_VF0, NVME, INTX_ONLY];
    let house = House::new(&devices);
    let resets = devices.map(|bdf| house.bus.resets(bdf));
    house.restart();
    assert_eq!(house.records(), devices);
    assert_eq!(devices.map(|bdf| house.bus.resets(bdf)), resets);
    for bdf in devices {
        house.unhide(bdf);
    }
    assert!(house.records().is_empty());
}

#[test]
fn in_the_middle_of_sizing_a_bar() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    let address = frontend.conf_read(FIRST, 0x10, 4).unwrap();
    frontend.conf_write(FIRST, 0x10, 4, u32::MAX).unwrap();
    house.restart();
    assert_eq!(frontend.conf_read(FIRST, 0x10, 4).unwrap(), !0x3fff | 0xc);
    house.restart();
    frontend.conf_write(FIRST, 0x10, 4, address).unwrap();
    assert_eq!(frontend.conf_read(FIRST, 0x10, 4).unwrap(), address);
}

#[test]
fn with_msix_enabled() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    let pirqs = frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    house.kill();
    // An interrupt never comes through the daemon.
    assert!(house.bus.raise_interrupt(NVME, 1));
    assert!(frontend.wait_for_interrupt(FIRST, 1, LONG).unwrap());
    house.start();
    frontend.conf_read(FIRST, 0, 4).unwrap();
    let mapped = house.machine.mapped_pirqs(domain);
    assert!(pirqs.iter().all(|pirq| mapped.contains(pirq)));
    assert!(house.bus.raise_interrupt(NVME, 0));
    assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
    frontend.release_interrupts(FIRST).unwrap();
    assert_eq!(house.pirqs(domain), 0);
    frontend.enable_msix(FIRST, &[0, 1, 2]).unwrap();
    assert_eq!(house.pirqs(domain), 3);
}

#[test]
fn with_several_msi_vectors_enabled() {
    let house = House::new(&[MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[MSI_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_multi_msi(FIRST, 4).unwrap();
    house.restart();
    assert!(house.bus.raise_interrupt(MSI_ONLY, 3));
    assert!(frontend.wait_for_interrupt(FIRST, 3, LONG).unwrap());
    frontend.release_interrupts(FIRST).unwrap();
    assert_eq!(house.pirqs(domain), 0);
}

#[test]
fn with_an_operation_in_flight() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    let read = PciOp {
        cmd: Command::ConfRead as u32,
        size: 4,
        ..PciOp::default()
    };
    for _ in 0..5 {
        house.kill();
        thread::scope(|scope| {
            let guest = scope.spawn(|| frontend.operate(&read).unwrap());
            house.start();
            let answer = guest.join().unwrap();
            assert_eq!((answer.err, answer.value), (0, 0x0010_1b36));
        });
    }
}

#[test]
fn while_the_frontend_is_closed() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.close(LONG).unwrap();
    house.until_node(domain, "state", "6");
    house.restart();
    frontend.publish().unwrap();
    house.until_node(domain, "state", "4");
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
    // And its session knows whose device it is.
    assert_eq!(house.guest_line(domain).unwrap().devices.len(), 1);
}

#[test]
fn while_a_driver_is_loaded_anew() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    house.kill();
    frontend.unload().unwrap();
    frontend.publish().unwrap();
    house.start();
    until("the new page is served", || {
        frontend.conf_read(FIRST, 0, 4).is_ok()
    });
}

#[test]
fn while_the_toolstack_takes_a_device_away() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    let (nvme, other) = (house.seen_as(NVME), house.seen_as(INTX_ONLY));
    frontend.enable_device(nvme).unwrap();
    frontend.enable_msix(nvme, &[0, 1]).unwrap();
    house.kill();
    // It gives up waiting, and leaves the nodes.
    assert!(house.detach(domain, NVME).is_err());
    house.start();
    while frontend.state() != XenbusState::Connected || frontend.function(nvme).is_some() {
        frontend.follow(LONG).unwrap();
    }
    house.until_free(NVME);
    assert_eq!(house.pirqs(domain), 0);
    assert!(frontend.conf_read(other, 0, 4).is_ok());
    assert!(frontend.conf_read(nvme, 0, 4).is_err());
}

#[test]
fn while_the_toolstack_adds_a_device() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    house.kill();
    house.attach(domain, INTX_ONLY).unwrap();
    house.start();
    while frontend.functions().count() < 2 {
        frontend.follow(LONG).unwrap();
    }
    house.until_node(domain, "state", "4");
}

#[test]
fn while_its_guest_is_destroyed() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    let nvme = house.seen_as(NVME);
    frontend.enable_device(nvme).unwrap();
    frontend.enable_msix(nvme, &[0, 1]).unwrap();
    house.kill();
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.start();
    house.until_gone(domain);
    house.until_free(NVME);
    house.until_free(INTX_ONLY);
    let (_, frontend) = house.boot(&[NVME]);
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn while_its_guest_is_destroyed_and_its_nodes_are_removed() {
    let house = House::impatient(&[NVME]);
    let (domain, frontend) = house.boot(&[NVME]);
    house.kill();
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    let backend = format!("/local/domain/0/backend/pci/{domain}");
    xenbus::xenstore::Store::rm(&mut house.store(), &backend).unwrap();
    house.start();
    house.until_free(NVME);
}

#[test]
fn while_a_device_is_being_reset() {
    let house = House::new(&[NVME]);
    house.kill();
    let record = house.record(NVME);
    record.set_phase(Phase::Releasing);
    let config = house.config(NVME);
    config.write(0x0c, Width::One, 0x40).unwrap();
    let resets = house.bus.resets(NVME);
    house.start();
    house.until_free(NVME);
    assert_eq!(house.bus.resets(NVME), resets + 1);
    assert_eq!(config.read(0x0c, Width::One).unwrap(), 0);
}

#[test]
fn a_hidden_device_that_was_pulled_out_meanwhile_is_forgotten() {
    let house = House::new(&[NVME, INTX_ONLY]);
    house.kill();
    house.bus.remove(NVME);
    house.start();
    assert_eq!(house.records(), [INTX_ONLY]);
}

#[test]
fn the_restarted_daemon_goes_on_serving_every_guest() {
    let house = House::new(&[NVME, INTX_ONLY, MSI_ONLY, NIC_VF0]);
    let devices = [NVME, INTX_ONLY, MSI_ONLY, NIC_VF0];
    let mut guests: Vec<_> = devices
        .into_iter()
        .map(|bdf| (bdf, house.boot(&[bdf]).1))
        .collect();
    for _ in 0..5 {
        house.restart();
        for (bdf, frontend) in &mut guests {
            let owner = house.record(*bdf).owner().map(|owner| owner.domain);
            let address = house.seen_as(*bdf);
            assert!(frontend.conf_read(address, 0, 4).is_ok(), "{bdf}");
            assert_eq!(house.machine.device_owner(for_xen(*bdf)), owner);
        }
    }
}

#[test]
fn other_systems_frontends_do_not_notice_either() {
    for variant in Variant::ALL {
        let house = House::new(&[NVME]);
        let domain = house.guest(&[NVME]);
        let mut frontend = house.frontend(domain, variant);
        frontend.connect(LONG).unwrap();
        let address = frontend.functions().next().unwrap().address;
        house.restart();
        let id = frontend.conf_read(address, 0, 4).unwrap();
        assert_eq!(id, 0x0010_1b36, "{variant:?}");
    }
}

#[test]
fn guests_that_start_while_devices_are_hidden_at_start_do_not_wait_for_that() {
    let config = Config {
        hide: vec![NVME.to_string()],
        ..Config::default()
    };
    let house = House::with(config, MachineOptions::default(), &[INTX_ONLY]);
    house.unhide(NVME);
    house.bus.set_reset_time(NVME, Duration::from_millis(500));
    thread::scope(|scope| {
        let restart = scope.spawn(|| house.restart());
        until("it is being hidden", || {
            house.phase_if_any(NVME) == Some(Phase::Hiding)
        });
        let (_, frontend) = house.boot(&[INTX_ONLY]);
        assert_eq!(frontend.functions().count(), 1);
        assert_eq!(house.phase(NVME), Some(Phase::Hiding));
        // Who counts on the device waits.
        assert!(!restart.is_finished());
    });
    assert_eq!(house.phase(NVME), Some(Phase::Hidden));
}

#[test]
fn a_device_that_cannot_be_taken_up_again_is_free_when_it_is_detached() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    house.kill();
    house.bus.vanish(NVME, true);
    house.start();
    house.until_node(domain, "state-0", "6");
    house.bus.vanish(NVME, false);
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
    house.while_following(&mut frontend, || house.detach(domain, NVME));
    house.until_free(NVME);
    let address = house.seen_as(INTX_ONLY);
    assert!(frontend.conf_read(address, 0, 4).is_ok());
}
