//! SR-IOV: virtual functions in guests, made and taken away while the daemon runs, by its own commands and behind its back.

use conf_space::Bdf;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{NIC, NIC_VF0, NIC_VF1};
use pcibackd::host::{Bus, NewFunctions};
use xenbus::sim::Variant;

use crate::house::{House, LONG, at, until};

/// What somebody else in dom0 does: `echo COUNT > sriov_numvfs`.
fn set(house: &House, count: u16) {
    house
        .bus
        .set_virtual_functions(NIC, count, NewFunctions::Probed)
        .unwrap();
}

fn until_forgotten(house: &House, bdf: Bdf) {
    until(format!("{bdf} is forgotten"), || {
        !house.records().contains(&bdf)
    });
}

#[test]
fn a_guest_drives_its_virtual_function() {
    let house = House::new(&[NIC_VF0]);
    let (_, mut frontend) = house.boot(&[NIC_VF0]);
    let device = at(0, 0);
    let ids = frontend.conf_read(device, 0x00, 4).unwrap();
    assert_eq!(ids, 0x10ca_8086, "its registers read as ones");
    let subsystem = frontend.conf_read(device, 0x2c, 4).unwrap();
    assert_eq!(subsystem, 0x10c9_8086, "which are its own");
    let bars = house.bus.describe(NIC_VF0).unwrap().identity.resources;
    for (register, bar) in [(0x10, bars[0]), (0x1c, bars[3])] {
        let read = frontend.conf_read(device, register, 4).unwrap();
        assert_eq!(u64::from(read), bar.start);
        frontend.conf_write(device, register, 4, u32::MAX).unwrap();
        let size = frontend.conf_read(device, register, 4).unwrap();
        assert_eq!(u64::from(!size + 1), bar.size);
        frontend.conf_write(device, register, 4, read).unwrap();
    }
    assert_eq!(frontend.conf_read(device, 0x04, 2).unwrap() & 2, 0);
    frontend.enable_device(device).unwrap();
    assert_eq!(frontend.conf_read(device, 0x04, 2).unwrap() & 2, 2);
    frontend.enable_msix(device, &[0, 1, 2]).unwrap();
    for vector in 0..3 {
        assert!(house.bus.raise_interrupt(NIC_VF0, vector));
        assert!(
            frontend
                .wait_for_interrupt(device, vector.into(), LONG)
                .unwrap()
        );
    }
}

#[test]
fn hidden_virtual_functions_that_somebody_takes_away_are_forgotten() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    set(&house, 0);
    until_forgotten(&house, NIC_VF0);
    until_forgotten(&house, NIC_VF1);
    // New ones at the same addresses are other devices.
    set(&house, 2);
    let driver = house.bus.describe(NIC_VF1).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("igbvf"));
    house.hide(&[NIC_VF1]);
    let (_, frontend) = house.boot(&[NIC_VF1]);
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn a_virtual_function_that_is_taken_away_under_its_guest_is_gone_for_the_guest_too() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    set(&house, 0);
    until_forgotten(&house, NIC_VF0);
    house.until_node(domain, "state-0", "6");
    let why = house.node(domain, "error-0").unwrap();
    assert!(why.contains("removed from this machine"), "{why}");
    until("the guest has no device", || {
        house.guest_line(domain).unwrap().devices.is_empty()
    });
    let line = house.guest_line(domain).unwrap();
    assert!(line.failed[0].1.contains("removed"), "{:?}", line.failed);
    assert!(frontend.conf_read(at(0, 0), 0, 4).is_err());
    assert!(frontend.conf_write(at(0, 0), 4, 2, 7).is_err());

    // Made anew, it is nobody's but dom0's; the guest that lost it can have it again.
    set(&house, 1);
    assert!(frontend.conf_read(at(0, 0), 0, 4).is_err());
    house.hide(&[NIC_VF0]);
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    house.attach(domain, NIC_VF0).unwrap();
    let mut frontend = house.connected(domain);
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x10ca_8086);
}

#[test]
fn virtual_functions_go_with_their_physical_functions_driver() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, _frontend) = house.boot(&[NIC_VF1]);
    house.bus.unbind(NIC).unwrap();
    until_forgotten(&house, NIC_VF0);
    until_forgotten(&house, NIC_VF1);
    house.until_node(domain, "state-0", "6");
}

#[test]
fn what_is_taken_away_while_no_daemon_runs_is_forgotten_at_its_start() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (_, _frontend) = house.boot(&[NIC_VF1]);
    house.kill();
    set(&house, 0);
    house.start();
    assert_eq!(house.records(), []);
}

#[test]
fn what_was_made_anew_while_no_daemon_ran_is_dom0s() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, _frontend) = house.boot(&[NIC_VF1]);
    house.kill();
    set(&house, 0);
    house
        .bus
        .set_virtual_functions(NIC, 2, NewFunctions::LeftAlone)
        .unwrap();
    house.start();
    assert_eq!(house.records(), []);
    let mut frontend = house.frontend(domain, Variant::Linux);
    frontend.set_op_timeout(Some(LONG));
    house.hide(&[NIC_VF0]);
    assert_eq!(house.phase(NIC_VF0), Some(Phase::Hidden));
}

#[test]
fn one_that_goes_while_it_is_reset_is_forgotten() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    house
        .bus
        .set_reset_time(NIC_VF0, std::time::Duration::from_millis(100));
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    assert_eq!(house.phase(NIC_VF0), Some(Phase::Releasing));
    set(&house, 0);
    until_forgotten(&house, NIC_VF0);
}
