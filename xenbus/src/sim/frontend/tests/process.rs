//! The same frontend in a process of its own.

use std::process::{Child, Command as Process, Stdio};
use std::time::Instant;

use super::*;
use crate::platform::Xen;
use crate::sim::SocketGuest;

/// What tells this test's own program that it is to be the guest: the path of `machine.sock`.
const MACHINE: &str = "XENBUS_TEST_GUEST_OF";
/// Nodes of the guest's by which it talks to the test.
const READY: &str = "/local/domain/1/data/ready";
const RESULT: &str = "/local/domain/1/data/result";

#[test]
#[ignore = "the guest's side of the test below, which starts it"]
fn guest() {
    let Some(socket) = std::env::var_os(MACHINE) else {
        return;
    };
    let platform = SocketGuest::connect(socket, DomId(1)).unwrap();
    let mut frontend = Frontend::new(platform, Variant::Linux).unwrap();
    frontend.connect(LONG).unwrap();
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0]).unwrap();
    frontend.store().write("data/ready", "1").unwrap();
    let interrupted = frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap();
    let id = frontend.conf_read(FIRST, 0, 4).unwrap();
    frontend.close(LONG).unwrap();
    frontend
        .store()
        .write("data/result", format!("{interrupted} {id:08x}"))
        .unwrap();
}

/// Waits until the guest has written a node.
fn await_node(store: &mut Client, path: &str, guest: &mut Child) -> String {
    let start = Instant::now();
    loop {
        if let Ok(value) = store.read_string(path) {
            return value;
        }
        let ended = guest
            .try_wait()
            .unwrap()
            .is_some_and(|status| !status.success());
        assert!(
            !ended && start.elapsed() < LONG * 2,
            "the guest has not written {path}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_guest_in_another_process_uses_its_device() {
    let setup = setup();
    let mut guest = Process::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "sim::frontend::tests::process::guest",
            "--ignored",
        ])
        .env(MACHINE, setup.machine.run_dir().join("machine.sock"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut store = setup.machine.connect_xenstore().unwrap();
    await_node(&mut store, READY, &mut guest);
    assert_eq!(setup.machine.mapped_grants(setup.guest), 1);
    let (address_, data) = setup
        .bus
        .with(address(0), |device| device.messages[&Some(0)]);
    assert!(setup.machine.deliver_msi(address_, data));
    assert_eq!(await_node(&mut store, RESULT, &mut guest), "true 10d38086");
    assert!(guest.wait().unwrap().success());
    assert_eq!(setup.machine.mapped_grants(setup.guest), 0);
}
