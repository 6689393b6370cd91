//! Keeping others from taking virtual functions away while guests have them, which may take a while: under systemd it is done by systemd.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pcibackd::host::Bus;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{NIC, NIC_VF0, NIC_VF1, NVME};
use xenbus::sim::Frontend;
use xenbus::xenstore::Store;

use crate::house::{House, at, until};
use crate::mortal::{Deed, Life};

/// What keeps virtual functions, systemd for one, takes its time: until the gate is opened.
struct Gate {
    reached: AtomicBool,
    open: AtomicBool,
}

impl Gate {
    fn before(life: &Life, keep: bool) -> Arc<Self> {
        let gate = Arc::new(Self {
            reached: AtomicBool::new(false),
            open: AtomicBool::new(false),
        });
        let at_it = Arc::clone(&gate);
        life.witness(move |deed| {
            if *deed == Deed::Keep(NIC, keep) {
                at_it.reached.store(true, Ordering::SeqCst);
                until("the gate is open", || at_it.open.load(Ordering::SeqCst));
            }
        });
        gate
    }

    fn is_reached(&self) -> bool {
        self.reached.load(Ordering::SeqCst)
    }

    /// The guest is told that devices come, and gets as far as that.
    fn until_reached_by(&self, frontend: &mut Frontend) {
        until("the gate is reached", || {
            frontend.follow(Duration::from_millis(1)).unwrap();
            self.is_reached()
        });
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_guest_gets_a_virtual_function_only_once_nobody_else_can_take_it_away() {
    let house = House::new(&[NVME, NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let gate = Gate::before(&house.life(), true);
    house.attach(domain, NIC_VF0).unwrap();
    gate.until_reached_by(&mut frontend);
    assert_eq!(house.phase(NIC_VF0), Some(Phase::Assigned));
    // The guest's session does not wait for it.
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x0010_1b36);
    assert_eq!(house.node(domain, "vdev-1"), None);
    // Nor does the guest reach what it may guess to be there.
    assert!(frontend.conf_read(at(1, 0), 0, 4).is_err());
    gate.open();
    house.while_following(&mut frontend, || Ok(()));
    assert!(house.bus.set_virtual_functions(NIC, 2).is_err());
    assert_eq!(frontend.conf_read(at(1, 0), 0, 4).unwrap(), 0x10ca_8086);
}

#[test]
fn a_daemon_that_is_killed_before_a_virtual_function_is_kept_hands_it_out_after_that() {
    let house = House::new(&[NVME, NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let gate = Gate::before(&house.life(), true);
    house.attach(domain, NIC_VF0).unwrap();
    gate.until_reached_by(&mut frontend);
    house.life().end();
    gate.open();
    house.kill();
    let life = Life::new();
    let gate = Gate::before(&life, true);
    house.start_with(life);
    gate.until_reached_by(&mut frontend);
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x0010_1b36);
    assert_eq!(house.node(domain, "vdev-1"), None);
    assert!(frontend.conf_read(at(1, 0), 0, 4).is_err());
    gate.open();
    house.while_following(&mut frontend, || Ok(()));
    assert_eq!(frontend.conf_read(at(1, 0), 0, 4).unwrap(), 0x10ca_8086);
}

#[test]
fn the_start_does_not_wait_until_virtual_functions_can_be_taken_away_again() {
    let house = House::new(&[NVME, NIC_VF0]);
    let (domain, frontend) = house.boot(&[NIC_VF0]);
    house.kill();
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.store().rm("/local/domain/0/backend/pci").unwrap();
    let life = Life::new();
    let gate = Gate::before(&life, false);
    house.start_with(life);
    until("the gate is reached", || gate.is_reached());
    house.until_free(NIC_VF0);
    let (_, mut frontend) = house.boot(&[NVME]);
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x0010_1b36);
    gate.open();
    until("the number can be changed", || {
        house.bus.set_virtual_functions(NIC, 0).is_ok()
    });
}

#[test]
fn nobody_else_changes_their_number_while_a_guest_has_one() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let change = || house.bus.set_virtual_functions(NIC, 0);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    let same = || house.bus.set_virtual_functions(NIC, 2);
    until("the number is kept", || same().is_err());
    assert!(change().is_err());
    house.restart();
    assert!(change().is_err());
    house.kill();
    assert!(change().is_err(), "it outlives the daemon");
    house.start();
    let (other, mut other_frontend) = house.boot(&[NIC_VF1]);
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    house.until_free(NIC_VF0);
    assert!(change().is_err(), "another guest has the other");
    house.while_following(&mut other_frontend, || house.detach(other, NIC_VF1));
    house.until_free(NIC_VF1);
    until("the number can be changed", || change().is_ok());
    until("they are forgotten", || !house.records().contains(&NIC_VF1));
}
