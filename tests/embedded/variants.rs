//! Frontends of other systems.

use pcibackd::config::Config;
use pcibackd::host::sim::{INTX_ONLY, NVME};
use xenbus::sim::{MachineOptions, Variant};

use crate::house::{House, LONG, until};

#[test]
fn every_systems_frontend_finds_its_device_and_uses_it() {
    for variant in Variant::ALL {
        let house = House::new(&[INTX_ONLY]);
        let domain = house.guest(&[INTX_ONLY]);
        let mut frontend = house.frontend(domain, variant);
        frontend.connect(LONG).unwrap();
        let function = frontend.functions().next().unwrap();
        assert_eq!(
            (function.vendor, function.device),
            (0x10ec, 0x8139),
            "{variant:?}"
        );
        let address = function.address;
        frontend.enable_device(address).unwrap();
        frontend.enable_intx(address).unwrap();
        assert!(house.bus.raise_interrupt(INTX_ONLY, 0), "{variant:?}");
        assert!(
            frontend.wait_for_interrupt(address, 0, LONG).unwrap(),
            "{variant:?}"
        );
    }
}

#[test]
fn every_system_that_knows_msix_enables_and_disables_it_in_its_own_way() {
    for variant in [Variant::Linux, Variant::LinuxOld, Variant::MiniOs] {
        let house = House::new(&[NVME]);
        let domain = house.guest(&[NVME]);
        let mut frontend = house.frontend(domain, variant);
        frontend.connect(LONG).unwrap();
        let address = frontend.functions().next().unwrap().address;
        frontend.enable_device(address).unwrap();
        for vectors in [&[0][..], &[0, 1], &[3, 1, 2]] {
            frontend.enable_msix(address, vectors).unwrap();
            assert_eq!(house.pirqs(domain), vectors.len(), "{variant:?}");
            frontend.release_interrupts(address).unwrap();
            assert_eq!(house.pirqs(domain), 0, "{variant:?}");
        }
    }
}

#[test]
fn systems_that_know_hot_plug_see_devices_come_and_go() {
    for variant in [Variant::Linux, Variant::LinuxOld, Variant::MiniOs] {
        let house = House::new(&[INTX_ONLY, NVME]);
        let domain = house.guest(&[INTX_ONLY]);
        let mut frontend = house.frontend(domain, variant);
        frontend.connect(LONG).unwrap();
        house.while_following(&mut frontend, || house.attach(domain, NVME));
        assert_eq!(frontend.functions().count(), 2, "{variant:?}");
        house.while_following(&mut frontend, || house.detach(domain, INTX_ONLY));
        house.until_free(INTX_ONLY);
        assert!(
            frontend
                .functions()
                .any(|function| function.vendor == 0x1b36),
            "{variant:?}"
        );
    }
}

#[test]
fn every_systems_guest_can_be_destroyed() {
    let options = || MachineOptions {
        toolstack_timeout: std::time::Duration::from_millis(20),
        ..MachineOptions::default()
    };
    for variant in Variant::ALL {
        let house = House::with(Config::default(), options(), &[NVME]);
        let domain = house.guest(&[NVME]);
        let mut frontend = house.frontend(domain, variant);
        frontend.connect(LONG).unwrap();
        frontend.shut_down_guest().unwrap();
        until("its end is seen", || {
            house.node(domain, "state").as_deref() == Some("4")
        });
        house.machine.destroy_domain(domain).unwrap();
        house.until_gone(domain);
        house.until_free(NVME);
    }
}
