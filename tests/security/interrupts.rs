//! Interrupts: XSA-157 in the backend, and the advisories of Xen that a backend can avoid to come near to.

use std::sync::{Arc, Mutex};

use conf_space::registers::{header, msi, msix};
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::host::Bus;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::{FunctionBuilder, NVME};
use xenbus::pciif::{Command, MsixEntry, PciOp};
use xenbus::sim::MachineOptions;
use xenbus::{DomId, MsiRequest};

use crate::guest::{Diary, Guest, destroy, op, owner};
use crate::house::{House, at, until};
use crate::mortal::Deed;

/// A card that has both MSI and MSI-X.
const BOTH: Bdf = Bdf::from_devfn(0, 0x21, 0);
const MSI: u16 = 0x05;
const MSIX: u16 = 0x11;

fn with_both() -> (House, Guest) {
    let house = House::new(&[]);
    house.bus.add(
        FunctionBuilder::new(BOTH, 0x8086, 0x10d3, 0x02_0000)
            .memory_bar(0, 0x4000)
            .power_management(false)
            .msi(1, true)
            .msix(4, 0, 0x2000)
            .express(),
    );
    house.hide(&[BOTH]);
    let guest = Guest::connected(&house, &[BOTH]);
    guest.write_config(at(0, 0), 4, 2, 6);
    (house, guest)
}

fn msix_op(count: u16) -> PciOp {
    let mut request = op(Command::EnableMsix, at(0, 0), 0, 0, count.into());
    for (slot, entry) in request.msix_entries.iter_mut().zip(0..count) {
        *slot = MsixEntry { vector: 0, entry };
    }
    request
}

/// The control word of a capability, and where it is.
fn control(house: &House, bdf: Bdf, id: u16) -> (u16, u16) {
    let config = house.config(bdf);
    let mut offset = config.read(0x34, Width::One).unwrap() as u16;
    while config.read(offset, Width::One).unwrap() as u16 != id {
        offset = config.read(offset + 1, Width::One).unwrap() as u16;
        assert_ne!(offset, 0);
    }
    let value = config.read(offset + msi::CONTROL.offset, Width::Two);
    (offset + msi::CONTROL.offset, value.unwrap() as u16)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Nothing,
    Msi,
    MsiX(u16),
}

/// What the hardware has on, and whether the guest has as many PIRQs.
fn on(house: &House, domain: DomId) -> On {
    let msi = control(house, BOTH, MSI).1 & msi::control::ENABLE != 0;
    let msix = control(house, BOTH, MSIX).1 & msix::control::ENABLE != 0;
    let pirqs = house.pirqs(domain);
    match (msi, msix) {
        (false, false) if pirqs == 0 => On::Nothing,
        (true, false) if pirqs == 1 => On::Msi,
        (false, true) => On::MsiX(pirqs as u16),
        other => panic!("MSI and MSI-X: {other:?}, {pirqs} PIRQs"),
    }
}

/// Every sequence of four operations: twice enabled, enabled across, disabled without having been enabled.
///
/// Fails when `check_none_is_on_but` in msi/src/operations.rs lets everything pass, and when `begin` there does not undo what is held.
#[test]
fn xsa_157_no_sequence_of_enabling_and_disabling_confuses_the_backend() {
    let (house, guest) = with_both();
    let disable = |command| op(command, at(0, 0), 0, 0, 0);
    let operations = [
        op(Command::EnableMsi, at(0, 0), 0, 0, 0),
        msix_op(1),
        msix_op(3),
        disable(Command::DisableMsi),
        disable(Command::DisableMsix),
    ];
    for sequence in 0..5usize.pow(4) {
        let mut expected = On::Nothing;
        for position in 0..4 {
            let request = &operations[sequence / 5usize.pow(position) % 5];
            let err = guest.operate(request).err;
            let (done, refused) = match (request.command().unwrap(), expected) {
                (Command::EnableMsi, On::MsiX(_)) => (expected, true),
                (Command::EnableMsi, _) => (On::Msi, false),
                (Command::EnableMsix, On::Msi) => (expected, true),
                (Command::EnableMsix, _) => (On::MsiX(request.value as u16), false),
                _ => (On::Nothing, false),
            };
            assert_eq!(err != 0, refused, "{sequence} {position}: {err}");
            expected = done;
            assert_eq!(on(&house, guest.domain), expected, "{sequence} {position}");
        }
        guest.operate(&disable(Command::DisableMsi));
    }
}

/// Fails when `enable_msix` in msi/src/operations.rs does not ask for memory decode first.
#[test]
fn xsa_157_msix_is_not_touched_while_the_device_decodes_no_memory() {
    let (house, guest) = with_both();
    let config = house.config(BOTH);
    let command = config.read(4, Width::Two).unwrap();
    let off = command & !u32::from(header::command::MEMORY);
    config.write(4, Width::Two, off).unwrap();
    let diary = Diary::of(&house);
    assert_eq!(guest.operate(&msix_op(1)).err, -6);
    let touched = |deed: &Deed| matches!(deed, Deed::MapMsi(..) | Deed::Write(..));
    assert!(!diary.take().iter().any(touched));
    config.write(4, Width::Two, command).unwrap();
    assert_eq!(guest.operate(&msix_op(1)).err, 0);
}

/// Fails when `disable_msi` in msi/src/operations.rs undoes whatever the ledger says, as if something were held.
#[test]
fn xsa_157_disabling_what_is_not_enabled_touches_nothing() {
    let (house, guest) = with_both();
    let diary = Diary::of(&house);
    for command in [Command::DisableMsi, Command::DisableMsix] {
        assert_eq!(guest.operate(&op(command, at(0, 0), 0, 0, 0)).err, 0);
    }
    assert_eq!(diary.take(), []);
}

/// Fails when `Mapping::map` in host/interrupts.rs maps for dom0.
#[test]
fn xsa_237_interrupts_are_mapped_for_the_guest_and_for_its_own_device() {
    let (house, guest) = with_both();
    let diary = Diary::of(&house);
    assert_eq!(guest.operate(&msix_op(2)).err, 0);
    // Wherever it says that the device is.
    for (domain, bus, devfn) in [(0, 0, 8), (0, 2, 0), (1, 0, 0), (0x1_0000, 0, 0)] {
        let mut request = msix_op(1);
        (request.domain, request.bus, request.devfn) = (domain, bus, devfn);
        assert_eq!(guest.operate(&request).err, -1);
    }
    let mapped: Vec<Deed> = diary
        .take()
        .into_iter()
        .filter(|deed| matches!(deed, Deed::MapMsi(..)))
        .collect();
    let table_base = house.bus.describe(BOTH).unwrap().identity.resources[0].start;
    let expected = [0, 1].map(|entry| {
        let request = MsiRequest::MsiX { entry, table_base };
        Deed::MapMsi(guest.domain, for_xen(BOTH), request)
    });
    assert_eq!(mapped, expected);
}

/// Fails when `hand_to_xen` in host/devices/hide.rs leaves the preparing to `claim` in host/devices/guest.rs.
#[test]
fn xsa_337_the_msix_table_is_recorded_before_any_guest_has_the_device() {
    let house = Arc::new(House::new(&[]));
    let prepared = Arc::new(Mutex::new(Vec::new()));
    let watch = || {
        let (machine, prepared) = (house.machine.clone(), Arc::clone(&prepared));
        house.life().witness(move |deed| {
            if let Deed::PrepareMsix(device) = deed {
                let owner = machine.device_owner(*device);
                prepared.lock().unwrap().push(owner.unwrap());
            }
        });
    };
    watch();
    house.hide(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    guest.write_config(at(0, 0), 4, 2, 6);
    assert_eq!(guest.operate(&msix_op(1)).err, 0);
    house.restart();
    watch();
    assert_eq!(guest.operate(&msix_op(2)).err, 0);
    destroy(&house, guest.domain, &[NVME]);
    let prepared = prepared.lock().unwrap();
    assert!(!prepared.is_empty());
    let by_a_guest = |owner: &&DomId| **owner != DomId::DOM0 && **owner != DomId::IO;
    assert_eq!(prepared.iter().find(by_a_guest), None);
}

/// Fails when `undo_on_error` in msi/src/operations.rs undoes nothing.
#[test]
fn xsa_360_failing_over_and_over_leaks_no_vector() {
    let options = MachineOptions {
        extra_pirqs: 3,
        ..MachineOptions::default()
    };
    let house = House::with(Config::default(), options, &[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    guest.write_config(at(0, 0), 4, 2, 6);
    for _ in 0..20 {
        assert_eq!(guest.operate(&msix_op(4)).err, -28);
        assert_eq!(house.pirqs(guest.domain), 0);
    }
    assert_eq!(guest.operate(&msix_op(3)).err, 0);
}

/// Fails when `reset_in_background` in host/devices/reset.rs resets before it takes the interrupts, or does not take them.
#[test]
fn xsa_458_a_device_that_leaves_a_living_guest_leaves_no_pirq_behind() {
    let (house, guest) = with_both();
    assert_eq!(guest.operate(&msix_op(3)).err, 0);
    let diary = Diary::of(&house);
    // The guest is gone as far as its toolstack is concerned, and holds on to its interrupts.
    house.machine.domain_shut_down(guest.domain).unwrap();
    house.detach(guest.domain, BOTH).unwrap();
    house.until_free(BOTH);
    until("no PIRQ is left", || house.pirqs(guest.domain) == 0);
    let deeds = diary.take();
    let unmapped = |deed: &Deed| matches!(deed, Deed::UnmapPirq(..));
    let reset = deeds.iter().position(|deed| *deed == Deed::Reset(BOTH));
    let before = &deeds[..reset.unwrap()];
    assert_eq!(before.iter().filter(|deed| unmapped(deed)).count(), 3);
    assert_eq!(owner(&house, BOTH), DomId::IO);
}
