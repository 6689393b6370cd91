//! Whose a device is, what it shares with others', and what of one guest reaches the next: XSA-302 and its kin, XSA-461, and what has no number.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use conf_space::registers::header;
use conf_space::{Bdf, Width};
use pcibackd::control::protocol::Request;
use pcibackd::host::devices::for_xen;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{FunctionBuilder, MSI_ONLY, NVME};
use xenbus::DomId;
use xenbus::pciif::Command;
use xenbus::xenstore::Store;

use crate::guest::{
    Guest, destroy, grant_everything, nothing_is_granted, op, owner, until_quarantined,
};
use crate::house::{House, at};
use crate::mortal::Deed;

/// Fails when `hand_to_xen` in host/devices/hide.rs does not quarantine, and when `give_back` there undoes before it resets.
#[test]
fn xsa_302_a_hidden_devices_dma_is_never_dom0s_until_it_was_reset_for_dom0() {
    let house = House::new(&[NVME]);
    let (dom0s, returned) = (Arc::new(Mutex::new(Vec::new())), AtomicBool::new(false));
    let watch = |returned: AtomicBool| {
        let (machine, notes) = (house.machine.clone(), Arc::clone(&dom0s));
        house.life().witness(move |deed| {
            if *deed == Deed::Deassign(DomId::IO, for_xen(NVME)) {
                returned.store(true, Ordering::Relaxed);
            }
            let owner = machine.device_owner(for_xen(NVME)).unwrap();
            let returned = returned.load(Ordering::Relaxed);
            if owner == DomId::DOM0 && !returned || returned && *deed == Deed::Reset(NVME) {
                notes.lock().unwrap().push(*deed);
            }
        });
    };
    watch(returned);
    assert_eq!(owner(&house, NVME), DomId::IO);
    let guest = Guest::connected(&house, &[NVME]);
    assert_eq!(owner(&house, NVME), guest.domain);
    destroy(&house, guest.domain, &[NVME]);
    until_quarantined(&house, NVME);
    house.restart();
    watch(AtomicBool::new(false));
    let guest = Guest::connected(&house, &[NVME]);
    house.machine.domain_shut_down(guest.domain).unwrap();
    house.detach(guest.domain, NVME).unwrap();
    house.until_free(NVME);
    let resets = house.bus.resets(NVME);
    house.unhide(NVME);
    assert_eq!(house.bus.resets(NVME), resets + 1);
    assert_eq!(owner(&house, NVME), DomId::DOM0);
    assert_eq!(*dom0s.lock().unwrap(), []);
}

/// Fails when `admit` in session/exports.rs takes no notice of pages, and when `unhide` in host/devices/hide.rs does not ask `check_pages`.
#[test]
fn xsa_461_nobody_gets_a_device_that_has_registers_in_a_page_with_a_guests() {
    let house = House::impatient(&[]);
    let [first, second] = [0, 1].map(|function| Bdf::from_devfn(0, 8, function));
    house.bus.pack_bars();
    for bdf in [first, second] {
        let device = FunctionBuilder::new(bdf, 0x8086, 0x2930, 0x0c_0500);
        house.bus.add(device.memory_bar(0, 0x100));
    }
    house.hide(&[first, second]);
    let guest = Guest::connected(&house, &[first]);
    let other = house.guest(&[second]);
    house.until_node(other, "state-0", "6");
    let why = house.node(other, "error-0").unwrap();
    assert!(why.contains(&first.to_string()), "{why}");
    assert_eq!(house.phase(second), Some(Phase::Hidden));
    let unhide = Request::Unhide {
        devices: vec![second.to_string()],
        force: false,
    };
    let answer = house.ask(&unhide);
    assert_eq!(
        house.phase_if_any(second),
        Some(Phase::Hidden),
        "{answer:?}"
    );
    destroy(&house, guest.domain, &[first]);
    house.unhide(second);
}

/// Fails when `admit` in session/exports.rs says of every line that it is usable.
#[test]
fn xsa_461_a_guest_cannot_have_its_device_raise_a_line_that_dom0_uses() {
    let house = House::new(&[]);
    let dom0s = Bdf::from_devfn(0, 0x61, 0);
    let device = FunctionBuilder::new(dom0s, 0x8086, 0x293a, 0x0c_0320);
    house.bus.add(device.intx(20).driver("ehci-pci"));
    house.hide(&[MSI_ONLY]);
    let guest = Guest::connected(&house, &[MSI_ONLY]);
    let command = || {
        let command = house.config(MSI_ONLY).read(4, Width::Two).unwrap();
        command & u32::from(header::command::INTX_DISABLE)
    };
    for value in [0, 7, 0xfbff] {
        guest.write_config(at(0, 0), 4, 2, value);
        assert_ne!(command(), 0, "{value:#x}");
    }
    let line = guest.read(at(0, 0), 0x3c, 2);
    assert_eq!(line.value, 0);
    // Its own go on, and leave it no line when they go off.
    assert_eq!(
        guest
            .operate(&op(Command::EnableMsi, at(0, 0), 0, 0, 0))
            .err,
        0
    );
    let off = guest.operate(&op(Command::DisableMsi, at(0, 0), 0, 0, 0));
    assert_eq!((off.err, off.value), (0, 0));
    assert_ne!(command(), 0);
}

/// Fails when `release` in host/devices/guest.rs does not clear the grants, and when `claim` there keeps the overlay's state as it was.
#[test]
fn nothing_that_a_guest_was_granted_or_wrote_reaches_the_next() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    let address = guest.read(at(0, 0), 0x10, 4).value;
    let command = guest.read(at(0, 0), 4, 2).value;
    grant_everything(&house, NVME);
    guest.write_config(at(0, 0), 4, 2, 0xf946);
    guest.write_config(at(0, 0), 0x10, 4, u32::MAX);
    guest.write_config(at(0, 0), 0x0c, 1, 0x20);
    guest.write_config(at(0, 0), 0x2c, 4, 0xdead_beef);
    guest.write_config(at(0, 0), 0x44, 2, 3);
    destroy(&house, guest.domain, &[NVME]);
    assert!(nothing_is_granted(&house, NVME));
    let guest = Guest::connected(&house, &[NVME]);
    assert_eq!(guest.read(at(0, 0), 0x10, 4).value, address);
    assert_eq!(guest.read(at(0, 0), 4, 2).value, command);
    assert_eq!(guest.read(at(0, 0), 0x0c, 1).value, 0);
    assert_eq!(guest.read(at(0, 0), 0x44, 2).value & 3, 0);
}

/// The kernel's list of quirks is searched by vendor and device ID when one of two cards is released.
///
/// Fails when `release` in host/devices/guest.rs clears the grants of every device with the same IDs.
#[test]
fn of_two_cards_of_a_kind_each_has_what_it_was_granted() {
    let house = House::new(&[]);
    let cards = [0x23, 0x24].map(|bus| Bdf::from_devfn(0, bus, 0));
    for card in cards {
        house.bus.add(
            FunctionBuilder::new(card, 0x8086, 0x10d3, 0x02_0000)
                .memory_bar(0, 0x1000)
                .express(),
        );
    }
    house.hide(&cards);
    let [first, second] = cards.map(|card| Guest::connected(&house, &[card]));
    for card in cards {
        grant_everything(&house, card);
    }
    destroy(&house, first.domain, &cards[..1]);
    assert!(nothing_is_granted(&house, cards[0]));
    assert!(!nothing_is_granted(&house, cards[1]));
    assert_eq!(second.read(at(0, 0), 0, 4).err, 0);
}

/// Fails when `parse_decimal` in xenbus/src/types.rs keeps the low 32 bits of a longer number.
#[test]
fn a_number_in_a_guests_node_is_that_number_and_no_other() {
    let house = House::new(&[NVME]);
    let domain = house.guest(&[NVME]);
    for told in [
        |reference| format!("{}", u64::from(reference) + (1 << 32)),
        |reference: u32| format!("{}", i64::from(reference) - (1 << 32)),
        |reference| format!("{reference} "),
        |reference| format!("{reference:#x}"),
        |_| String::new(),
    ] {
        house.until_node(domain, "state", "3");
        let guest = Guest::publishing(&house, domain, told);
        house.until_node(domain, "state", "5");
        assert_eq!(house.machine.mapped_grants(domain), 0);
        // It may try again.
        let mut store = guest.store;
        store.write("device/pci/0/state", "6").unwrap();
        house.until_node(domain, "state", "6");
        store.write("device/pci/0/state", "1").unwrap();
    }
    house.until_node(domain, "state", "3");
}

/// Fails when `find` in session/exports.rs compares only the low bits.
#[test]
fn a_guest_reaches_no_device_but_its_own() {
    let house = House::new(&[NVME]);
    let other = Bdf::from_devfn(0, 0x25, 0);
    house
        .bus
        .add(FunctionBuilder::new(other, 0x1234, 0x5678, 0x02_0000).memory_bar(0, 0x1000));
    house.hide(&[other]);
    let guest = Guest::connected(&house, &[NVME]);
    let _other = Guest::connected(&house, &[other]);
    let command = house.config(other).read(4, Width::Two).unwrap();
    for (domain, bus, devfn) in [
        (0u32, 0x25u32, 0u32),
        (0, 0, 8),
        (0x1_0000, 0, 0),
        (0, 0x100, 0),
        (0, 0, 0x100),
        (1 << 31, 0, 0),
    ] {
        for cmd in 0..=11 {
            let mut request = op(Command::ConfRead, at(0, 0), 4, 2, 0);
            (request.cmd, request.domain, request.bus, request.devfn) = (cmd, domain, bus, devfn);
            assert_eq!(guest.operate(&request).err, -1, "{domain} {bus} {devfn}");
        }
    }
    assert_eq!(house.config(other).read(4, Width::Two).unwrap(), command);
}
