//! The configuration space: XSA-120 and what followed, XSA-126 and its kin, and offsets that alias others.

use std::sync::{Arc, Mutex};

use conf_space::registers::header::command;
use conf_space::{Bdf, Width};
use pcibackd::host::Bus;
use pcibackd::host::sim::{FunctionBuilder, INTX_ONLY, NVME};
use xenbus::pciif::PciError;

use crate::guest::{Diary, Guest, destroy, grant_everything};
use crate::house::{House, at};
use crate::mortal::Deed;

/// A card with MSI that can be masked.
const CARD: Bdf = Bdf::from_devfn(0, 0x22, 0);
const DECODE: u32 = (command::IO | command::MEMORY) as u32;

fn with_card() -> (House, Guest) {
    let house = House::new(&[]);
    house.bus.add(
        FunctionBuilder::new(CARD, 0x8086, 0x10d3, 0x02_0000)
            .memory_bar(0, 0x4000)
            .io_bar(1, 0x20)
            .power_management(false)
            .msi(2, true)
            .msix(4, 0, 0x2000)
            .express(),
    );
    house.hide(&[CARD]);
    let guest = Guest::connected(&house, &[CARD]);
    (house, guest)
}

/// Has every write to a command register that takes decode away noted.
fn decode_taken_away(house: &House) -> Arc<Mutex<Vec<Deed>>> {
    let found = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&found);
    let bus = Arc::downgrade(&house.bus);
    house.life().witness(move |deed| {
        if let (Deed::Write(bdf, 4 | 5, _, value), Some(bus)) = (deed, bus.upgrade()) {
            let before = bus.open(*bdf).unwrap().read(4, Width::Two).unwrap();
            if before & DECODE & !value != 0 {
                notes.lock().unwrap().push(*deed);
            }
        }
    });
    found
}

/// Fails when `write` in conf_space/src/overlay/command.rs lets the decode bits follow the guest.
#[test]
fn xsa_120_no_guest_turns_decode_off() {
    let (house, guest) = with_card();
    let taken_away = decode_taken_away(&house);
    for granted in [false, true] {
        if granted {
            grant_everything(&house, CARD);
        }
        guest.write_config(at(0, 0), 4, 2, 0x7);
        for value in [0, 1, 2, 4, 0x400, 0xfffc, 0xffff] {
            for (offset, size) in [(4, 2), (4, 1), (4, 4)] {
                guest.write_config(at(0, 0), offset, size, value);
                let hardware = house.config(CARD).read(4, Width::Two).unwrap();
                assert_eq!(hardware & DECODE, DECODE, "{value:#x} {size}");
            }
        }
    }
    assert_eq!(*taken_away.lock().unwrap(), []);
}

/// Fails when `restore` in host/config_state.rs clears the command register before it writes the rest, and when `restore` in
/// host/devices/reset.rs restores it to 0.
#[test]
fn cve_2015_8553_decode_stays_on_from_one_guest_to_the_next() {
    let cards = [NVME, INTX_ONLY];
    let house = House::new(&cards);
    let taken_away = decode_taken_away(&house);
    for _ in 0..2 {
        let guest = Guest::connected(&house, &cards);
        for slot in [0, 1] {
            guest.write_config(at(slot, 0), 4, 2, 0x7);
            guest.write_config(at(slot, 0), 4, 2, 0);
            // To sleep and awake again, which loses the configuration.
            guest.write_config(at(slot, 0), 0x44, 2, 3);
            guest.write_config(at(slot, 0), 0x44, 2, 0);
        }
        destroy(&house, guest.domain, &cards);
        for (bdf, decode) in [(NVME, 2), (INTX_ONLY, 3)] {
            let hardware = house.config(bdf).read(4, Width::Two).unwrap();
            assert_eq!(hardware & DECODE, decode, "{bdf}");
        }
    }
    assert_eq!(*taken_away.lock().unwrap(), []);
}

/// Fails when `PASSED` in conf_space/src/overlay/command.rs has more bits.
#[test]
fn xsa_126_error_reporting_and_reserved_command_bits_are_the_hosts() {
    let (house, guest) = with_card();
    grant_everything(&house, CARD);
    let before = house.config(CARD).read(4, Width::Two).unwrap();
    let hosts = u32::from(command::PARITY_ERROR_RESPONSE | command::SERR) | 0xf800;
    for value in [0xffff, 0x0140, 0] {
        guest.write_config(at(0, 0), 4, 2, value);
        let now = house.config(CARD).read(4, Width::Two).unwrap();
        assert_eq!(now & hosts, before & hosts, "{value:#x}");
    }
}

/// Fails when `add_rest_read_only` in conf_space/src/overlay/claim.rs claims nothing.
#[test]
fn xsa_128_and_129_message_address_data_and_mask_are_the_hosts_even_for_a_permissive_guest() {
    let (house, guest) = with_card();
    grant_everything(&house, CARD);
    let msi = capability(&guest, 0x05);
    let msix = capability(&guest, 0x11);
    let diary = Diary::of(&house);
    for offset in (msi + 4..msi + 0x18).chain(msix + 4..msix + 12) {
        for size in [1, 2, 4].into_iter().filter(|size| offset % size == 0) {
            guest.write_config(at(0, 0), offset, size, u32::MAX);
        }
    }
    let written = |deed: &Deed| matches!(deed, Deed::Write(..));
    assert_eq!(diary.take().iter().find(|deed| written(deed)), None);
}

/// Fails when `carry_out` in conf_space/src/overlay/mod.rs writes what no rule covers.
#[test]
fn xsa_131_registers_without_a_rule_are_not_written() {
    let (house, guest) = with_card();
    let header = [0x04, 0x0c, 0x0f];
    let diary = Diary::of(&house);
    for offset in 0..4096 {
        guest.write_config(at(0, 0), offset, 1, 0xff);
    }
    let power = capability(&guest, 0x01) as u16 + 4;
    for deed in diary.take() {
        if let Deed::Write(_, offset, ..) = deed {
            let ruled = header.contains(&offset) || offset == power;
            assert!(ruled || (0x10..0x28).contains(&offset), "{deed:?}");
        }
    }
}

fn capability(guest: &Guest, id: u32) -> i32 {
    let mut offset = guest.read(at(0, 0), 0x34, 1).value;
    while guest.read(at(0, 0), offset as i32, 1).value != id {
        offset = guest.read(at(0, 0), offset as i32 + 1, 1).value;
        assert_ne!(offset, 0);
    }
    offset as i32
}

/// Fails when `Access::new` in conf_space/src/overlay/mod.rs takes the low 12 bits of the offset.
#[test]
fn negative_and_distant_offsets_reach_no_register() {
    let (house, guest) = with_card();
    grant_everything(&house, CARD);
    let diary = Diary::of(&house);
    for offset in [
        -4,
        0x10 - 4096,
        0x10 - 256,
        0x10 - 0x1_0000,
        i32::MIN,
        i32::MIN + 0x10,
        0x1010,
        0x1_0010,
        0x7fff_fff0,
    ] {
        for size in [1, 2, 4] {
            let answer = guest.write_config(at(0, 0), offset, size, 0);
            assert_eq!(answer.err, PciError::INVALID_OFFSET.0, "{offset} {size}");
            let answer = guest.read(at(0, 0), offset, size);
            assert_eq!(answer.err, PciError::INVALID_OFFSET.0, "{offset} {size}");
            assert_eq!(answer.value, 0);
        }
    }
    assert_eq!(diary.take(), []);
}
