//! The daemon is killed at each of its steps in turn, in the middle of all that it does, and started again.

use std::thread;

use pcibackd::control::client;
use pcibackd::control::protocol::Request;
use pcibackd::host::Bus;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC, NIC_VF0, NIC_VF1, NVME};
use xenbus::sim::{DomainKind, Frontend};
use xenbus::{DomId, Gsi, PciDevice, Pirq, XenbusState};

use crate::house::{House, LONG, at, until};
use crate::sriov;

const FIRST: PciDevice = at(0, 0);

/// So many machines share the steps, since each of them mostly waits.
const MACHINES: usize = 4;

/// Tries with a daemon that is killed at its first step, its second, and so on, until it gets to the end before it is killed.
pub fn at_each_step<S>(
    begin: impl Fn() -> S + Sync,
    attempt: impl Fn(&mut S, usize) -> bool + Sync,
) {
    thread::scope(|scope| {
        for first in 1..=MACHINES {
            let (begin, attempt) = (&begin, &attempt);
            scope.spawn(move || {
                let mut state = begin();
                let mut step = first;
                while attempt(&mut state, step) {
                    step += MACHINES;
                }
                // Otherwise nothing was tried.
                assert!(step > MACHINES, "not killed once");
            });
        }
    });
}

/// The guest has its device whole, and so has the next one.
fn end(house: &House, domain: DomId, frontend: Frontend) {
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(NVME);
}

fn takes_interrupts(house: &House, frontend: &Frontend, vectors: &[u16]) {
    for (index, vector) in vectors.iter().enumerate() {
        assert!(house.bus.raise_interrupt(NVME, *vector));
        assert!(frontend.wait_for_interrupt(FIRST, index, LONG).unwrap());
    }
}

/// The line of a device that is not hidden.
fn house_line() -> u32 {
    let house = House::new(&[]);
    house.bus.describe(MSI_ONLY).unwrap().irq
}

/// A guest with a device that is switched on.
fn with_nvme() -> (House, DomId, Frontend) {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    (house, domain, frontend)
}

#[test]
fn while_a_guest_boots() {
    let begin = || House::new(&[NVME]);
    at_each_step(begin, |house, step| {
        let domain = house.machine.create_domain("guest", DomainKind::Pv);
        let domain = domain.unwrap();
        let mut frontend = None;
        let died = house.surviving(step, || {
            house.attach(domain, NVME).unwrap();
            house.machine.unpause_domain(domain).unwrap();
            frontend = Some(house.connected(domain));
        });
        let mut frontend = frontend.unwrap();
        assert_eq!(frontend.functions().count(), 1, "step {step}");
        until(("its page alone is mapped", step), || {
            house.machine.mapped_grants(domain) == 1
        });
        assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
        assert_eq!(house.node(domain, "root_num").as_deref(), Some("1"));
        end(house, domain, frontend);
        died
    });
}

#[test]
fn while_a_guest_enables_and_disables_msix() {
    // It also has the line of a device that is dom0's: `irqs=` in its configuration.
    let line = Gsi(house_line());
    let begin = || {
        let (house, domain, frontend) = with_nvme();
        house.machine.grant_irq(domain, line).unwrap();
        (house, domain, frontend)
    };
    at_each_step(begin, |(house, domain, frontend), step| {
        let domain = *domain;
        let died = house.surviving(step, || {
            frontend.enable_msix(FIRST, &[0]).unwrap();
            frontend.release_interrupts(FIRST).unwrap();
            frontend.enable_msix(FIRST, &[0, 1]).unwrap();
        });
        assert_eq!(house.pirqs(domain), 2, "step {step}");
        takes_interrupts(house, frontend, &[0, 1]);
        frontend.release_interrupts(FIRST).unwrap();
        assert_eq!(house.pirqs(domain), 0, "step {step}");
        let lines = house.machine.mapped_pirqs(domain);
        assert!(lines.contains(&Pirq(line.0)), "step {step}");
        died
    });
}

#[test]
fn while_a_guest_sizes_a_bar_and_puts_its_device_to_sleep() {
    let begin = || {
        let (house, _, mut frontend) = with_nvme();
        frontend.enable_msix(FIRST, &[0, 1]).unwrap();
        (house, frontend)
    };
    at_each_step(begin, |(house, frontend), step| {
        let power = frontend.function(FIRST).unwrap().capability(1).unwrap() + 4;
        let before = frontend.conf_read(FIRST, 0x10, 4).unwrap();
        let died = house.surviving(step, || {
            frontend.conf_write(FIRST, 0x10, 4, u32::MAX).unwrap();
            assert_eq!(frontend.conf_read(FIRST, 0x10, 4).unwrap(), !0x3fff | 0xc);
            frontend.conf_write(FIRST, 0x10, 4, before).unwrap();
            frontend.conf_write(FIRST, power, 2, 3).unwrap();
            frontend.conf_write(FIRST, power, 2, 0).unwrap();
        });
        assert_eq!(frontend.conf_read(FIRST, 0x10, 4).unwrap(), before);
        let hardware = house.config(NVME).read(0x10, conf_space::Width::Four);
        assert_eq!(hardware.unwrap(), before, "step {step}");
        takes_interrupts(house, frontend, &[0, 1]);
        died
    });
}

#[test]
fn while_devices_come_and_go() {
    let begin = || {
        let house = House::new(&[INTX_ONLY, NVME]);
        let (domain, frontend) = house.boot(&[INTX_ONLY]);
        (house, domain, frontend)
    };
    at_each_step(begin, |(house, domain, frontend), step| {
        let domain = *domain;
        let died = house.surviving(step, || {
            house.while_following(frontend, || house.attach(domain, NVME));
            assert_eq!(frontend.functions().count(), 2, "step {step}");
            house.while_following(frontend, || house.detach(domain, NVME));
        });
        house.until_free(NVME);
        assert_eq!(frontend.functions().count(), 1, "step {step}");
        until(("its page alone is mapped", step), || {
            house.machine.mapped_grants(domain) == 1
        });
        died
    });
}

#[test]
fn while_a_frontend_closes_and_comes_back() {
    at_each_step(with_nvme, |(house, domain, frontend), step| {
        let domain = *domain;
        let died = house.surviving(step, || {
            frontend.close(LONG).unwrap();
            house.until_node(domain, "state", "6");
            frontend.publish().unwrap();
            house.until_node(domain, "state", "4");
            let connected = XenbusState::Connected;
            frontend.wait_for_backend(connected, LONG).unwrap();
        });
        assert_eq!(frontend.functions().count(), 1, "step {step}");
        assert_eq!(house.phase(NVME), Some(Phase::Assigned));
        until(("its page alone is mapped", step), || {
            house.machine.mapped_grants(domain) == 1
        });
        died
    });
}

#[test]
fn while_a_guest_is_destroyed() {
    let begin = || House::impatient(&[NVME]);
    at_each_step(begin, |house, step| {
        let (domain, mut frontend) = house.boot(&[NVME]);
        frontend.enable_device(FIRST).unwrap();
        frontend.enable_msix(FIRST, &[0, 1]).unwrap();
        house.make_permissive(NVME);
        let died = house.surviving(step, || end(house, domain, frontend));
        house.until_free(NVME);
        assert!(!house.is_permissive(NVME));
        died
    });
}

#[test]
fn while_a_device_is_hidden() {
    let begin = || House::new(&[]);
    at_each_step(begin, |house, step| {
        let died = house.surviving(step, || {
            let request = Request::Hide {
                devices: vec![NVME.to_string()],
                force: false,
            };
            // Whoever asked is told nothing by a daemon that is killed.
            let _ = client::ask(house.machine.run_dir(), &request);
        });
        // Otherwise nothing was begun.
        if !house.records().is_empty() {
            house.until_free(NVME);
            let description = house.bus.describe(NVME).unwrap();
            assert_eq!(description.driver, None, "step {step}");
            house.unhide(NVME);
        }
        as_before(house, step);
        died
    });
}

#[test]
fn while_a_device_is_given_back() {
    let begin = || House::new(&[]);
    at_each_step(begin, |house, step| {
        house.hide(&[NVME]);
        let died = house.surviving(step, || {
            let devices = vec![NVME.to_string()];
            let _ = client::ask(
                house.machine.run_dir(),
                &Request::Unhide {
                    devices,
                    force: false,
                },
            );
        });
        // Not begun, or still under way.
        until("it is given back", || {
            let devices = vec![NVME.to_string()];
            house.records().is_empty() || {
                house.ask(&Request::Unhide {
                    devices,
                    force: false,
                });
                false
            }
        });
        as_before(house, step);
        died
    });
}

/// The device is dom0's as it was in the beginning.
fn as_before(house: &House, step: usize) {
    until("dom0 has it", || house.records().is_empty());
    let description = house.bus.describe(NVME).unwrap();
    assert_eq!(description.driver.as_deref(), Some("nvme"), "step {step}");
    assert_eq!(house.bus.enable_count(NVME), 1, "step {step}");
    assert_eq!(house.bus.driver_override(NVME).unwrap(), None);
    assert!(house.bus.may_lose_power(NVME).unwrap(), "step {step}");
    let owner = house
        .machine
        .device_owner(pcibackd::host::devices::for_xen(NVME));
    assert_eq!(owner, Some(DomId::DOM0), "step {step}");
}

#[test]
fn while_virtual_functions_are_taken_away_by_force() {
    at_each_step(
        || (),
        |(), step| {
            let house = House::new(&[NIC_VF0, NIC_VF1]);
            let (domain, mut frontend) = house.boot(&[NIC_VF0]);
            sriov::interrupts(&house, &mut frontend);
            let died = house.surviving(step, || {
                let physical = NIC;
                let force = true;
                let request = Request::DestroyVirtualFunctions { physical, force };
                let _ = client::ask(house.machine.run_dir(), &request);
            });
            until("they are taken away", || {
                sriov::destroy(&house, true).is_ok()
            });
            assert_eq!(house.bus.orphaned_interrupts(), 0, "step {step}");
            assert_eq!(house.pirqs(domain), 0, "step {step}");
            assert_eq!(house.records(), [], "step {step}");
            assert!(!house.bus.list().unwrap().contains(&NIC_VF0));
            died
        },
    );
}

#[test]
fn while_virtual_functions_are_made_that_no_driver_is_to_see() {
    let begin = || House::new(&[]);
    at_each_step(begin, |house, step| {
        sriov::destroy(house, false).unwrap();
        let died = house.surviving(step, || {
            let (physical, count, hide) = (NIC, 2, true);
            let request = Request::CreateVirtualFunctions {
                physical,
                count,
                hide,
            };
            let _ = client::ask(house.machine.run_dir(), &request);
        });
        assert!(
            house.bus.are_functions_probed(NIC).unwrap(),
            "those that are made next have drivers, step {step}"
        );
        until("they are made and hidden", || {
            let made = sriov::create(house, 2, true);
            made.is_ok_and(|made| made.iter().all(|entry| entry.ok))
        });
        assert_eq!(house.record(NIC_VF0).driver(), None, "step {step}");
        assert_eq!(house.records(), [NIC_VF0, NIC_VF1]);
        let files = std::fs::read_dir(house.records_directory()).unwrap();
        assert_eq!(files.count(), 2, "step {step}");
        died
    });
}
