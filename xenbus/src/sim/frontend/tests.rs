//! Frontends against a backend that does no more than it must.

mod process;
mod states;

use std::sync::Arc;
use std::time::Duration;

use super::test_backend::TestBackend;
use super::*;
use crate::pciif::{AerCommand, AerResult, Command, PciError, PciOp};
use crate::sim::test_bus::{TestBus, address};
use crate::sim::{DomainKind, Machine, MachineOptions, PciOptions};
use crate::types::Gsi;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(5);
/// Where the first device is for the guest.
const FIRST: PciDevice = PciDevice {
    segment: 0,
    bus: 0,
    devfn: 0,
};

struct Setup {
    backend: TestBackend,
    machine: Machine,
    bus: Arc<TestBus>,
    guest: DomId,
    _run_dir: tempfile::TempDir,
}

/// A running guest with device 3:00.0, and a backend.
fn setup() -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::with_options(
        run_dir.path(),
        MachineOptions {
            toolstack_timeout: LONG,
            ..Default::default()
        },
    )
    .unwrap();
    let bus = TestBus::new();
    (0..3).for_each(|number| bus.add(address(number)));
    machine.set_hardware(bus.clone());
    let guest = machine.create_domain("guest", DomainKind::Pv).unwrap();
    machine
        .pci_attach(guest, address(0), &PciOptions::default())
        .unwrap();
    machine.unpause_domain(guest).unwrap();
    let backend = TestBackend::start(&machine, &bus, guest);
    Setup {
        backend,
        machine,
        bus,
        guest,
        _run_dir: run_dir,
    }
}

impl Setup {
    fn frontend(&self, variant: Variant) -> Frontend {
        Frontend::new(self.machine.guest(self.guest), variant).unwrap()
    }

    fn connected(&self, variant: Variant) -> Frontend {
        let mut frontend = self.frontend(variant);
        frontend.connect(LONG).unwrap();
        frontend
    }

    fn commands(&self) -> Vec<Option<Command>> {
        self.backend
            .take_operations()
            .iter()
            .map(PciOp::command)
            .collect()
    }
}

#[test]
fn linux_finds_the_function_and_all_that_it_has() {
    let setup = setup();
    let frontend = setup.connected(Variant::Linux);
    assert_eq!(frontend.state(), XenbusState::Connected);
    let function = frontend.function(FIRST).unwrap();
    assert_eq!(
        (function.vendor, function.device, function.class),
        (0x8086, 0x10d3, 0x02_0000)
    );
    assert_eq!(
        function.bars,
        [
            Bar {
                index: 0,
                kind: BarKind::Memory32,
                address: 0xfe00_0000,
                size: 0x2_0000
            },
            Bar {
                index: 1,
                kind: BarKind::Io,
                address: 0xc000,
                size: 0x20
            }
        ]
    );
    assert_eq!(function.capabilities, [(0x05, 0x50), (0x11, 0x70)]);
    assert_eq!(function.interrupt_pin, 1);
    assert_eq!(frontend.functions().count(), 1);
    // Sizing left everything as it was.
    assert_eq!(setup.bus.with(address(0), |device| device.config[4]), 3);
    assert_eq!(
        setup.bus.with(address(0), |device| device.config[0x13]),
        0xfe
    );
}

#[test]
fn every_variant_finds_the_device_and_reads_it() {
    for variant in Variant::ALL {
        let setup = setup();
        let mut frontend = setup.connected(variant);
        assert_eq!(frontend.state(), XenbusState::Connected, "{variant:?}");
        let found = frontend
            .functions()
            .next()
            .map(|function| function.address)
            .unwrap();
        assert_eq!(
            found,
            if variant == Variant::MiniOs {
                address(0)
            } else {
                FIRST
            },
            "{variant:?}"
        );
        assert_eq!(
            frontend.conf_read(found, 2, 2).unwrap(),
            0x10d3,
            "{variant:?}"
        );
    }
}

#[test]
fn linux_scans_every_function_and_freebsd_every_slot() {
    let setup = setup();
    let probes = |ops: Vec<PciOp>, offset| {
        ops.iter()
            .filter(|op| op.command() == Some(Command::ConfRead) && op.offset == offset)
            .count()
    };
    setup.connected(Variant::Linux);
    assert_eq!(probes(setup.backend.take_operations(), 0), 256);
    let setup = self::setup();
    setup.connected(Variant::FreeBsd);
    let operations = setup.backend.take_operations();
    assert_eq!(probes(operations.clone(), 0), 1);
    assert_eq!(probes(operations, 0x0e), 33);
}

#[test]
fn netbsd_makes_accesses_of_4_bytes_only_and_turns_decoding_on() {
    let setup = setup();
    let mut frontend = setup.frontend(Variant::NetBsd);
    frontend
        .await_backend(XenbusState::Initialised, LONG, |state| {
            state == XenbusState::Initialised
        })
        .unwrap();
    setup.bus.with(address(0), |device| device.config[4] = 0);
    frontend.connect(LONG).unwrap();
    frontend.conf_write(FIRST, 0x3d, 1, 2).unwrap();
    assert_eq!(
        setup.bus.with(address(0), |device| (
            device.config[0x3c],
            device.config[0x3d]
        )),
        (17, 2)
    );
    assert!(
        setup
            .backend
            .take_operations()
            .iter()
            .all(|op| op.size == 4 && op.offset % 4 == 0)
    );
    assert_eq!(setup.bus.with(address(0), |device| device.config[4]), 3);
}

#[test]
fn a_driver_enables_its_device_and_takes_msix_interrupts() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.enable_device(FIRST).unwrap();
    assert_eq!(setup.bus.with(address(0), |device| device.config[4]), 7);
    let pirqs = frontend.enable_msix(FIRST, &[0, 3]).unwrap();
    assert_eq!(setup.machine.mapped_pirqs(setup.guest).len(), 3); // the line too
    assert_eq!(pirqs.len(), 2);
    let (address_, data) = setup
        .bus
        .with(address(0), |device| device.messages[&Some(3)]);
    assert!(
        !frontend
            .wait_for_interrupt(FIRST, 1, Duration::ZERO)
            .unwrap()
    );
    assert!(setup.machine.deliver_msi(address_, data));
    assert!(frontend.wait_for_interrupt(FIRST, 1, LONG).unwrap());
    assert!(
        !frontend
            .wait_for_interrupt(FIRST, 0, Duration::ZERO)
            .unwrap()
    );
    assert!(matches!(
        frontend.wait_for_interrupt(FIRST, 2, Duration::ZERO),
        Err(FrontendError::Missing { .. })
    ));
}

#[test]
fn msix_is_disabled_by_the_operation_that_the_variant_uses() {
    for (variant, command) in [
        (Variant::Linux, Command::DisableMsi),
        (Variant::LinuxOld, Command::DisableMsix),
        (Variant::MiniOs, Command::DisableMsix),
    ] {
        let setup = setup();
        let mut frontend = setup.connected(variant);
        let function = frontend.functions().next().unwrap().address;
        frontend.enable_msix(function, &[0]).unwrap();
        setup.commands();
        frontend.release_interrupts(function).unwrap();
        assert_eq!(setup.commands().last(), Some(&Some(command)), "{variant:?}");
        frontend.enable_msix(function, &[0, 1]).unwrap();
    }
}

#[test]
fn msi_with_one_vector_and_with_several() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    let pirq = frontend.enable_msi(FIRST).unwrap();
    assert!(setup.machine.mapped_pirqs(setup.guest).contains(&pirq));
    frontend.release_interrupts(FIRST).unwrap();
    assert!(!setup.machine.mapped_pirqs(setup.guest).contains(&pirq));
    let pirqs = frontend.enable_multi_msi(FIRST, 4).unwrap();
    assert_eq!(pirqs.len(), 4);
    let (address_, data) = setup.bus.with(address(0), |device| device.messages[&None]);
    assert!(setup.machine.deliver_msi(address_, data + 2));
    assert!(frontend.wait_for_interrupt(FIRST, 2, LONG).unwrap());
}

#[test]
fn a_bsd_uses_the_interrupt_line() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::FreeBsd);
    assert!(matches!(
        frontend.enable_msi(FIRST),
        Err(FrontendError::Missing { .. })
    ));
    frontend.enable_intx(FIRST).unwrap();
    assert_eq!(setup.machine.raise_gsi(Gsi(17)), 1);
    assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
}

#[test]
fn an_operation_that_nobody_answers_is_given_up_and_taken_back() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.set_op_timeout(Some(SHORT));
    setup.backend.set_deaf(true);
    assert!(matches!(
        frontend.conf_read(FIRST, 0, 4),
        Err(FrontendError::NoAnswer { command: 0, .. })
    ));
    assert!(!frontend.link().unwrap().page.pending());
    setup.backend.set_deaf(false);
    assert_eq!(frontend.conf_read(FIRST, 0, 2).unwrap(), 0x8086);
    let error = frontend
        .conf_read(PciDevice { devfn: 8, ..FIRST }, 0, 4)
        .unwrap_err();
    assert_eq!(error.pci_error(), Some(PciError::DEV_NOT_FOUND));
}

#[test]
fn garbage_floods_and_races_are_what_the_backend_gets_to_see() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    frontend.set_op_timeout(Some(SHORT));
    frontend.flood(1000).unwrap();
    setup.backend.take_operations();
    setup.backend.set_deaf(true);
    frontend.scribble(0xbad).unwrap();
    frontend.scribble_word(8, 0x1234_5678).unwrap();
    assert_eq!(frontend.link().unwrap().page.answer().err, 0x1234_5678);
    assert!(frontend.link().unwrap().page.pending());

    let read = super::operations::operation(Command::ConfRead, FIRST);
    let other = PciOp {
        offset: 0x44,
        ..super::operations::operation(
            Command::ConfRead,
            PciDevice {
                devfn: 0xff,
                ..FIRST
            },
        )
    };
    let result = frontend.operate_while_changing(&PciOp { size: 4, ..read }, &[other]);
    assert!(matches!(result, Err(FrontendError::NoAnswer { .. })));
    assert_eq!(frontend.link().unwrap().page.answer().offset, 0x44);
}

#[test]
fn recovery_is_asked_for_and_answered_with_accesses_in_between() {
    let setup = setup();
    let mut frontend = setup.connected(Variant::Linux);
    assert_eq!(frontend.next_aer(Duration::ZERO).unwrap(), None);
    setup.backend.ask_aer(AerCommand::SlotReset, FIRST);
    let request = frontend.next_aer(LONG).unwrap().unwrap();
    assert_eq!(
        request,
        AerRequest {
            command: Some(AerCommand::SlotReset),
            state: 2,
            function: FIRST
        }
    );
    assert_eq!(frontend.conf_read(FIRST, 0, 2).unwrap(), 0x8086);
    assert_eq!(setup.backend.aer_result(), None);
    frontend.answer_aer(AerResult::Recovered).unwrap();
    while setup.backend.aer_result() != Some(AerResult::Recovered) {
        std::thread::yield_now();
    }
}
