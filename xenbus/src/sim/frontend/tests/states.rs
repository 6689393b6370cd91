//! Frontends follow their backend's states, and devices come and go.

use std::sync::{Arc, Mutex};

use super::*;

/// The states that a frontend goes through, its own.
fn watch_states(frontend: &mut Frontend) -> Arc<Mutex<Vec<XenbusState>>> {
    let states = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&states);
    frontend.observe(move |step| {
        if let Step::State(state) = step {
            seen.lock().unwrap().push(*state);
        }
    });
    states
}

#[test]
fn a_device_is_plugged_in_and_out_while_the_guest_runs() {
    for variant in [Variant::Linux, Variant::LinuxOld, Variant::MiniOs] {
        let setup = setup();
        let mut frontend = setup.connected(variant);
        setup
            .machine
            .pci_attach(setup.guest, address(1), &PciOptions::default())
            .unwrap();
        frontend
            .wait_for_backend(XenbusState::Reconfigured, LONG)
            .unwrap();
        assert_eq!(frontend.functions().count(), 2, "{variant:?}");
        frontend
            .wait_for_backend(XenbusState::Connected, LONG)
            .unwrap();

        std::thread::scope(|scope| {
            let detach = scope.spawn(|| setup.machine.pci_detach(setup.guest, address(0)));
            frontend
                .wait_for_backend(XenbusState::Reconfigured, LONG)
                .unwrap();
            detach.join().unwrap().unwrap();
        });
        if variant != Variant::MiniOs {
            let left: Vec<_> = frontend
                .functions()
                .map(|function| function.address)
                .collect();
            assert_eq!(left, [PciDevice { devfn: 8, ..FIRST }]);
        }
    }
}

#[test]
fn when_the_last_device_is_unplugged_the_backend_is_gone() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    std::thread::scope(|scope| {
        let detach = scope.spawn(|| setup.machine.pci_detach(setup.guest, address(0)));
        frontend
            .wait_for_backend(XenbusState::Unknown, LONG)
            .unwrap();
        detach.join().unwrap().unwrap();
    });
    assert_eq!(frontend.functions().count(), 0);
}

#[test]
fn a_linux_that_missed_that_the_backend_was_connected_catches_up() {
    let setup = setup();
    let mut frontend = setup.frontend(Variant::Linux);
    frontend.publish().unwrap();
    frontend
        .await_backend(XenbusState::Connected, LONG, |state| {
            state == XenbusState::Connected
        })
        .unwrap();
    setup
        .machine
        .pci_attach(setup.guest, address(1), &PciOptions::default())
        .unwrap();
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    assert_eq!(frontend.functions().count(), 2);
}

#[test]
fn a_frontend_that_does_not_answer_makes_the_toolstack_wait_in_vain() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.set_answers_reconfiguring(false);
    setup
        .machine
        .pci_attach(setup.guest, address(1), &PciOptions::default())
        .unwrap();
    frontend
        .wait_for_backend(XenbusState::Reconfiguring, LONG)
        .unwrap();
    assert_eq!(frontend.state(), XenbusState::Connected);
    assert!(matches!(
        frontend.wait_for_backend(XenbusState::Connected, SHORT),
        Err(FrontendError::BackendState { .. })
    ));
}

#[test]
fn a_netbsd_panics_when_the_backend_reconfigures() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::NetBsd);
    setup
        .machine
        .pci_attach(setup.guest, address(1), &PciOptions::default())
        .unwrap();
    let error = frontend
        .wait_for_backend(XenbusState::Reconfigured, LONG)
        .unwrap_err();
    assert!(matches!(
        error,
        FrontendError::Panicked(XenbusState::Reconfiguring)
    ));
}

#[test]
fn a_driver_reload_comes_with_a_fresh_page_and_leaves_nothing_of_the_old_one() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.enable_msix(FIRST, &[0]).unwrap();
    let old = frontend.link().unwrap().reference;
    frontend.unload().unwrap();
    assert_eq!(frontend.functions().count(), 0);
    frontend
        .await_backend(XenbusState::Initialised, LONG, |state| {
            state == XenbusState::Initialised
        })
        .unwrap();
    assert_eq!(setup.machine.mapped_grants(setup.guest), 0);
    frontend.connect(LONG).unwrap();
    assert_ne!(frontend.link().unwrap().reference, old);
    assert_eq!(setup.machine.mapped_grants(setup.guest), 1);
    frontend.enable_msix(FIRST, &[0]).unwrap();
}

#[test]
fn closing_goes_through_the_states_of_the_variant() {
    for (variant, expected) in [(Variant::Linux, &[5, 6][..]), (Variant::MiniOs, &[5, 6, 1])] {
        let setup = setup();
        let mut frontend = setup.connected(variant);
        let states = watch_states(&mut frontend);
        frontend.close(LONG).unwrap();
        let states: Vec<_> = states
            .lock()
            .unwrap()
            .iter()
            .map(|state| state.number())
            .collect();
        assert_eq!(states, expected, "{variant:?}");
        assert_eq!(setup.machine.mapped_grants(setup.guest), 0);
        assert!(matches!(
            frontend.conf_read(FIRST, 0, 4),
            Err(FrontendError::NotPublished | FrontendError::Missing { .. })
        ));
    }
}

#[test]
fn when_the_backend_closes_each_variant_answers_in_its_way() {
    for (variant, expected) in [
        (Variant::Linux, &[6][..]),
        (Variant::NetBsd, &[6]),
        (Variant::FreeBsd, &[5]),
    ] {
        let setup = setup();
        let mut frontend = setup.connected(variant);
        let states = watch_states(&mut frontend);
        let mut dom0 = crate::platform::Xen::connect_xenstore(&setup.machine).unwrap();
        dom0.write("/local/domain/0/backend/pci/1/0/state", "5")
            .unwrap();
        frontend
            .wait_for_backend(XenbusState::Closing, LONG)
            .unwrap();
        let states: Vec<_> = states
            .lock()
            .unwrap()
            .iter()
            .map(|state| state.number())
            .collect();
        assert_eq!(states, expected, "{variant:?}");
    }
}

#[test]
fn a_backend_that_sees_through_lies_closes() {
    let lies = [
        Lies {
            magic: "8".into(),
            ..Lies::default()
        },
        Lies {
            magic: Node::Missing,
            ..Lies::default()
        },
        Lies {
            reference: "4096".into(),
            ..Lies::default()
        },
        Lies {
            port: "no number".into(),
            ..Lies::default()
        },
    ];
    for lie in lies {
        let setup = setup();
        let mut frontend = setup.frontend(Variant::Linux);
        frontend.publish_with(&lie).unwrap();
        let error = frontend
            .wait_for_backend(XenbusState::Connected, LONG)
            .unwrap_err();
        assert!(
            matches!(error, FrontendError::BackendState { .. }),
            "{lie:?}"
        );
        assert_eq!(frontend.state(), XenbusState::Closed, "{lie:?}");
    }
}

#[test]
fn a_guest_that_shuts_down_says_closing_first() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.shut_down_guest().unwrap();
    assert_eq!(frontend.state(), XenbusState::Closing);
    assert!(
        crate::platform::Xen::domain_info(&setup.machine, setup.guest)
            .unwrap()
            .unwrap()
            .gone
    );
}
