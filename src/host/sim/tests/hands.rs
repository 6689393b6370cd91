//! A device's way from dom0 to hidden and back, on this bus.

use super::*;
use crate::host::devices::{DeviceError, Devices, Quarantine, Rebind};
use crate::host::record::{Phase, Record};

#[test]
fn what_is_hidden_and_returned_is_dom0s_as_before() {
    let host = host();
    let records = tempfile::tempdir().unwrap();
    let xen = Arc::new(host.machine.clone());
    let bus: Arc<dyn Bus> = host.bus.clone();
    let devices = Devices::open(bus, xen, Arc::default(), records.path().to_owned()).unwrap();
    host.bus.set_may_lose_power(INTX_ONLY, false).unwrap();
    for bdf in [NIC_VF0, NIC_VF1, NVME, INTX_ONLY, MSI_ONLY, BROKEN] {
        let before = host.bus.describe(bdf).unwrap();
        let command = host.word(bdf, 0x04);
        let enabled = host.bus.enable_count(bdf);
        let could_lose_power = host.bus.may_lose_power(bdf).unwrap();
        devices.hide(bdf, false, Quarantine::Ours).unwrap();
        assert_eq!(host.bus.describe(bdf).unwrap().driver, None);
        assert!(!host.bus.may_lose_power(bdf).unwrap());
        devices.unhide(bdf, Rebind::Driver).unwrap();
        let after = host.bus.describe(bdf).unwrap();
        assert_eq!(before.driver, after.driver, "{bdf}");
        // The kernel never takes decode back from a device that it has switched on.
        let decode = if before.driver.is_none() { 0x2 } else { 0 };
        assert_eq!(host.word(bdf, 0x04), command | decode, "{bdf}");
        assert_eq!(host.bus.enable_count(bdf), enabled, "{bdf}");
        assert_eq!(host.bus.driver_override(bdf).unwrap(), None);
        assert_eq!(host.bus.may_lose_power(bdf).unwrap(), could_lose_power);
        assert_eq!(host.machine.device_owner(for_xen(bdf)), Some(DomId::DOM0));
    }
    for bdf in [BRIDGE, BOOT_CONTROLLER, NIC] {
        devices.hide(bdf, false, Quarantine::Ours).unwrap_err();
        assert!(host.bus.describe(bdf).unwrap().driver.is_some(), "{bdf}");
    }
}

#[test]
fn a_guest_goes_on_waiting_for_a_device_that_a_daemon_was_killed_while_hiding() {
    for _ in 0..50 {
        let host = host();
        let records = tempfile::tempdir().unwrap();
        Record::open(records.path(), NVME)
            .unwrap()
            .set_phase(Phase::Hiding);
        let xen = Arc::new(host.machine.clone());
        let bus: Arc<dyn Bus> = host.bus.clone();
        let devices = Devices::open(bus, xen, Arc::default(), records.path().to_owned()).unwrap();
        match devices.find(NVME) {
            Ok(_) | Err(DeviceError::Busy { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        while devices.phase(NVME) != Some(Phase::Hidden) {
            std::thread::yield_now();
        }
    }
}
