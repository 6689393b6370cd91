//! What the toolstack writes, in which order, and what it waits for. The backend is played by hand.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::{PciOptions, ToolstackError};
use crate::platform::Xen;
use crate::sim::test_bus::{TestBus, address};
use crate::sim::{DomainKind, GuestPlatform, Machine, MachineOptions};
use crate::types::{DomId, Pirq};
use crate::xenstore::{Client, Error, Store};

struct Setup {
    machine: Machine,
    bus: Arc<TestBus>,
    store: Client,
    guest: DomId,
    _run_dir: tempfile::TempDir,
}

/// A machine with three devices and one paused guest.
fn setup_with(kind: DomainKind, timeout: Duration) -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let options = MachineOptions {
        toolstack_timeout: timeout,
        ..MachineOptions::default()
    };
    let machine = Machine::with_options(run_dir.path(), options).unwrap();
    let bus = TestBus::new();
    (0..3).for_each(|number| bus.add(address(number)));
    machine.set_hardware(bus.clone());
    let guest = machine.create_domain("guest", kind).unwrap();
    let store = machine.connect_xenstore().unwrap();
    Setup {
        machine,
        bus,
        store,
        guest,
        _run_dir: run_dir,
    }
}

fn setup() -> Setup {
    setup_with(DomainKind::Pv, Duration::from_secs(10))
}

const BACKEND: &str = "/local/domain/0/backend/pci/1/0";
const FRONTEND: &str = "/local/domain/1/device/pci/0";

impl Setup {
    fn attach(&self, number: u8) -> Result<(), ToolstackError> {
        self.machine
            .pci_attach(self.guest, address(number), &PciOptions::default())
    }

    fn value(&mut self, path: &str) -> String {
        self.store.read_string(path).unwrap()
    }

    fn backend(&mut self, node: &str) -> String {
        self.value(&format!("{BACKEND}/{node}"))
    }

    fn set_backend(&mut self, node: &str, value: &str) {
        self.store
            .write(&format!("{BACKEND}/{node}"), value)
            .unwrap();
    }

    /// A backend that answers 7 with 4 once.
    fn answering_backend(&self) -> JoinHandle<()> {
        let mut store = self.machine.connect_xenstore().unwrap();
        std::thread::spawn(move || {
            let path = format!("{BACKEND}/state");
            while store.read(&path).unwrap() != b"7" {
                std::thread::sleep(Duration::from_millis(1));
            }
            store.write(&path, "4").unwrap();
        })
    }
}

#[test]
fn a_new_domain_has_its_nodes_and_may_write_its_own_only() {
    let mut setup = setup();
    assert_eq!(setup.value("/local/domain/1/name"), "guest");
    assert_eq!(setup.value("/local/domain/1/domid"), "1");
    let mut guest = setup.machine.guest(setup.guest).connect_xenstore().unwrap();
    assert_eq!(guest.read("name").unwrap(), b"guest");
    guest.write("data/x", "1").unwrap();
    guest
        .write("error/device/pci/0/error", "12 out of memory")
        .unwrap();
    assert!(matches!(guest.write("name", "x"), Err(Error::Denied(_))));
    assert!(matches!(
        guest.write("device/pci/0/state", "3"),
        Err(Error::Denied(_))
    ));
    assert!(matches!(guest.read("/libxl/1"), Err(Error::Denied(_))));
}

#[test]
fn attaching_before_the_start_makes_both_ends() {
    let mut setup = setup();
    let options = PciOptions {
        virtual_devfn: Some(0x28),
        permissive: true,
        ..PciOptions::default()
    };
    setup
        .machine
        .pci_attach(setup.guest, address(0), &options)
        .unwrap();
    for (node, value) in [
        ("frontend", FRONTEND),
        ("frontend-id", "1"),
        ("online", "1"),
        ("state", "1"),
        ("domain", "guest"),
        ("num_devs", "1"),
        ("key-0", "0000:03:00.0"),
        ("dev-0", "0000:03:00.0"),
        ("vdevfn-0", "28"),
        (
            "opts-0",
            "msitranslate=0,power_mgmt=0,permissive=1,rdm_policy=strict",
        ),
        ("state-0", "1"),
    ] {
        assert_eq!(setup.backend(node), value, "{node}");
    }
    assert_eq!(setup.value("/libxl/pci/0000-03-00-0/domid"), "1");
    assert_eq!(setup.machine.device_owner(address(0)), Some(setup.guest));
    assert_eq!(setup.bus.with(address(0), |device| device.resets), 1);
    assert_eq!(setup.machine.mapped_pirqs(setup.guest), [Pirq(17)]);

    let mut guest = setup.machine.connect_as(setup.guest).unwrap();
    assert_eq!(
        guest.read("device/pci/0/backend").unwrap(),
        BACKEND.as_bytes()
    );
    assert_eq!(
        guest.read(&format!("{BACKEND}/dev-0")).unwrap(),
        b"0000:03:00.0"
    );
    guest.write("device/pci/0/state", "3").unwrap();
    assert!(matches!(
        guest.write("device/pci/0/backend", "/evil"),
        Err(Error::Denied(_))
    ));
    assert!(matches!(
        guest.write(&format!("{BACKEND}/state"), "4"),
        Err(Error::Denied(_))
    ));
}

#[test]
fn further_devices_before_the_start_wait_for_nobody_and_announce_nothing() {
    let mut setup = setup();
    setup.attach(0).unwrap();
    setup.set_backend("state", "3");
    setup.attach(1).unwrap();
    assert_eq!(setup.backend("num_devs"), "2");
    assert_eq!(setup.backend("dev-1"), "0000:03:01.0");
    assert_eq!(setup.backend("state"), "3");
    assert_eq!(
        setup.machine.pci_list(setup.guest).unwrap(),
        [address(0), address(1)]
    );
}

#[test]
fn attaching_to_a_running_guest_waits_for_4_and_writes_7() {
    let mut setup = setup();
    setup.attach(0).unwrap();
    setup.machine.unpause_domain(setup.guest).unwrap();
    setup.set_backend("state", "4");
    setup.attach(1).unwrap();
    assert_eq!(setup.backend("state"), "7");
    assert_eq!(setup.backend("state-1"), "1");
    assert_eq!(setup.backend("num_devs"), "2");
}

#[test]
fn a_backend_that_never_connects_costs_the_wait_and_the_device_is_not_announced() {
    let mut setup = setup_with(DomainKind::Pv, Duration::from_millis(20));
    setup.attach(0).unwrap();
    setup.machine.unpause_domain(setup.guest).unwrap();
    assert!(matches!(
        setup.attach(1),
        Err(ToolstackError::BackendNotReady { .. })
    ));
    assert_eq!(setup.backend("num_devs"), "1");
    assert!(!setup.store.exists("/libxl/pci/0000-03-01-0/domid").unwrap());
}

#[test]
fn a_device_is_attached_to_one_domain_at_a_time() {
    let setup = setup();
    setup.attach(0).unwrap();
    let other = setup
        .machine
        .create_domain("other", DomainKind::Pv)
        .unwrap();
    let again = setup
        .machine
        .pci_attach(other, address(0), &PciOptions::default());
    assert!(matches!(again, Err(ToolstackError::Attached { .. })));
    let missing = setup
        .machine
        .pci_attach(other, address(9), &PciOptions::default());
    assert!(matches!(missing, Err(ToolstackError::Xen(_))));
}

#[test]
fn detaching_moves_the_later_devices_down() {
    let mut setup = setup();
    (0..3).for_each(|number| setup.attach(number).unwrap());
    setup.set_backend("state", "4");
    setup.set_backend("vdev-1", "0000:00:01.00");
    setup.set_backend("vdev-2", "0000:00:02.00");
    let backend = setup.answering_backend();
    setup.machine.pci_detach(setup.guest, address(0)).unwrap();
    backend.join().unwrap();
    assert_eq!(setup.backend("num_devs"), "2");
    assert_eq!(setup.backend("dev-0"), "0000:03:01.0");
    assert_eq!(setup.backend("vdev-0"), "0000:00:01.00");
    assert_eq!(setup.backend("vdev-1"), "0000:00:02.00");
    assert!(!setup.store.exists(&format!("{BACKEND}/dev-2")).unwrap());
    assert_eq!(setup.machine.device_owner(address(0)), Some(DomId::IO));
    assert_eq!(setup.bus.with(address(0), |device| device.resets), 2);
    assert!(!setup.store.exists("/libxl/pci/0000-03-00-0/domid").unwrap());
    let again = setup.machine.pci_detach(setup.guest, address(0));
    assert!(matches!(again, Err(ToolstackError::NotAttached { .. })));
}

#[test]
fn detaching_the_last_device_removes_both_ends() {
    let mut setup = setup();
    setup.attach(0).unwrap();
    setup.set_backend("state", "4");
    let backend = setup.answering_backend();
    setup.machine.pci_detach(setup.guest, address(0)).unwrap();
    backend.join().unwrap();
    assert!(!setup.store.exists(BACKEND).unwrap());
    assert!(!setup.store.exists(FRONTEND).unwrap());
    let empty = BACKEND.strip_suffix("/0").unwrap();
    assert!(!setup.store.exists(empty).unwrap());
    assert!(setup.store.exists("/local/domain/1/name").unwrap());
}

#[test]
fn a_guest_that_does_not_answer_loses_the_device_and_the_nodes_stay() {
    let mut setup = setup_with(DomainKind::Pv, Duration::from_millis(20));
    setup.attach(0).unwrap();
    setup.set_backend("state", "4");
    let result = setup.machine.pci_detach(setup.guest, address(0));
    assert!(matches!(
        result,
        Err(ToolstackError::BackendNotReady { .. })
    ));
    assert_eq!(setup.machine.device_owner(address(0)), Some(DomId::IO));
    assert_eq!(setup.backend("state"), "7");
    assert_eq!(setup.backend("state-0"), "5");
}

#[test]
fn an_hvm_guests_backend_is_not_waited_for() {
    let mut setup = setup_with(DomainKind::Hvm, Duration::from_millis(20));
    assert!(setup.machine.domain_info(setup.guest).unwrap().unwrap().hvm);
    setup.attach(0).unwrap();
    setup.machine.unpause_domain(setup.guest).unwrap();
    setup.attach(1).unwrap();
    assert_eq!(setup.backend("state"), "7");
    setup.machine.pci_detach(setup.guest, address(0)).unwrap();
    assert_eq!(setup.backend("dev-0"), "0000:03:01.0");
}

#[test]
fn a_shutdown_is_told_and_a_destroyed_domain_leaves_nothing_but_what_the_backend_holds() {
    let mut setup = setup_with(DomainKind::Pv, Duration::from_millis(20));
    setup.attach(0).unwrap();
    setup.machine.unpause_domain(setup.guest).unwrap();
    setup.machine.request_shutdown(setup.guest).unwrap();
    assert_eq!(setup.value("/local/domain/1/control/shutdown"), "poweroff");
    setup.store.watch("@releaseDomain", "gone").unwrap();
    while setup.store.next_event().unwrap().is_none() {}

    setup.machine.guest(setup.guest).shut_down().unwrap();
    assert!(
        setup
            .machine
            .domain_info(setup.guest)
            .unwrap()
            .unwrap()
            .gone
    );
    setup.store.exists("none").unwrap();
    assert_eq!(
        setup.store.next_event().unwrap().unwrap().path,
        "@releaseDomain"
    );

    setup.machine.destroy_domain(setup.guest).unwrap();
    setup.store.exists("none").unwrap();
    assert_eq!(
        setup.store.next_event().unwrap().unwrap().path,
        "@releaseDomain"
    );
    assert_eq!(setup.machine.domain_info(setup.guest).unwrap(), None);
    assert_eq!(setup.machine.device_owner(address(0)), Some(DomId::IO));
    assert!(!setup.store.exists("/local/domain/1").unwrap());
    assert!(setup.machine.destroy_domain(setup.guest).is_err());
    // libxl leaves these when the backend did not answer in time.
    assert_eq!(setup.backend("state"), "1");
}
