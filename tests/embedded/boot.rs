//! Devices that were reserved at boot, before the daemon ran.

use conf_space::Bdf;
use pcibackd::control::protocol::{DeviceLine, Request, Response};
use pcibackd::host::Bus;
use pcibackd::host::devices::RESERVED_FOR;
use pcibackd::host::sim::{INTX_ONLY, NVME};

use crate::house::House;

/// As `driver_override` does when it is written before the driver is loaded.
pub fn reserve(house: &House, bdf: Bdf) {
    house
        .bus
        .set_driver_override(bdf, Some(RESERVED_FOR))
        .unwrap();
    house.bus.unbind(bdf).unwrap();
}

fn line(house: &House, bdf: Bdf) -> DeviceLine {
    let Response::Devices { devices } = house.ask(&Request::List) else {
        panic!("no list");
    };
    let mut lines = devices.into_iter();
    lines.find(|line| line.device == bdf).unwrap()
}

#[test]
fn a_device_that_is_reserved_at_boot_is_hidden_when_the_daemon_starts() {
    let house = House::new(&[]);
    house.kill();
    reserve(&house, NVME);
    house.start();
    assert_eq!(line(&house, NVME).state, "hidden");
    assert_eq!(line(&house, INTX_ONLY).state, "dom0");
    house.unhide(NVME);
    assert_eq!(house.bus.driver_override(NVME).unwrap(), None);
}

#[test]
fn a_reserved_device_that_cannot_be_hidden_does_not_become_dom0s() {
    let house = House::new(&[]);
    house.kill();
    reserve(&house, NVME);
    house.bus.vanish(NVME, true);
    house.start();
    assert_ne!(line(&house, NVME).state, "hidden");
    house.bus.vanish(NVME, false);
    assert_eq!(house.bus.describe(NVME).unwrap().driver, None);
    assert_eq!(
        house.bus.driver_override(NVME).unwrap().as_deref(),
        Some(RESERVED_FOR)
    );
}

#[test]
fn a_device_with_a_driver_is_left_to_it_whatever_it_is_reserved_for() {
    let house = House::new(&[]);
    house.kill();
    let driver = house.bus.describe(NVME).unwrap().driver;
    house
        .bus
        .set_driver_override(NVME, Some(RESERVED_FOR))
        .unwrap();
    house.start();
    assert_eq!(house.bus.describe(NVME).unwrap().driver, driver);
}
