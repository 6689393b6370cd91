//! A guest's devices interrupt it.

use conf_space::overlay::Permissive;
use conf_space::registers::{msi, msix};
use conf_space::{Bdf, Width};
use pcibackd::host::record::RunTime;
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC_VF0, NVME};
use xenbus::PciDevice;
use xenbus::pciif::{Command, PciError, PciOp};
use xenbus::sim::Frontend;
use xenbus::xenstore::Store;

use crate::house::{House, LONG, at};

const FIRST: PciDevice = at(0, 0);
const MSIX: u8 = 0x11;
const MSI: u8 = 0x05;
const POWER: u8 = 0x01;

/// A capability's register in hardware.
fn hardware(house: &House, bdf: Bdf, frontend: &Frontend, id: u8, register: u16) -> u32 {
    let base = frontend.function(FIRST).unwrap().capability(id).unwrap();
    let config = house.config(bdf);
    config.read(base + register, Width::Two).unwrap()
}

fn interrupts(house: &House, bdf: Bdf, frontend: &Frontend, vectors: &[u16]) {
    for (index, vector) in vectors.iter().enumerate() {
        assert!(house.bus.raise_interrupt(bdf, *vector), "{bdf} {vector}");
        assert!(frontend.wait_for_interrupt(FIRST, index, LONG).unwrap());
    }
}

fn operation(command: Command, value: u32) -> PciOp {
    PciOp {
        cmd: command as u32,
        value,
        ..PciOp::default()
    }
}

#[test]
fn nvme_first_takes_one_vector_and_then_two() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    for round in 0..3 {
        for vectors in [&[0][..], &[0, 1]] {
            frontend.enable_msix(FIRST, vectors).unwrap();
            let control = hardware(&house, NVME, &frontend, MSIX, msix::CONTROL.offset);
            assert_ne!(control & u32::from(msix::control::ENABLE), 0, "{round}");
            assert_eq!(house.pirqs(domain), vectors.len(), "{round}");
            interrupts(&house, NVME, &frontend, vectors);
            // By the operation for MSI, as Linux does it.
            frontend.release_interrupts(FIRST).unwrap();
            let control = hardware(&house, NVME, &frontend, MSIX, msix::CONTROL.offset);
            assert_eq!(control & u32::from(msix::control::ENABLE), 0, "{round}");
            assert_eq!(house.pirqs(domain), 0, "{round}");
        }
    }
}

#[test]
fn a_virtual_function_takes_msix_interrupts() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[2, 0]).unwrap();
    interrupts(&house, NIC_VF0, &frontend, &[2, 0]);
    frontend.release_interrupts(FIRST).unwrap();
    assert_eq!(house.pirqs(domain), 0);
}

#[test]
fn msi_with_one_vector_and_with_several() {
    let house = House::new(&[MSI_ONLY]);
    let (domain, mut frontend) = house.boot(&[MSI_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    for count in [1, 2, 4, 1] {
        let pirqs = if count == 1 {
            vec![frontend.enable_msi(FIRST).unwrap()]
        } else {
            frontend.enable_multi_msi(FIRST, count).unwrap()
        };
        assert_eq!(house.pirqs(domain), pirqs.len());
        let vectors: Vec<u16> = (0..pirqs.len() as u16).collect();
        interrupts(&house, MSI_ONLY, &frontend, &vectors);
        frontend.release_interrupts(FIRST).unwrap();
        let control = hardware(&house, MSI_ONLY, &frontend, MSI, msi::CONTROL.offset);
        assert_eq!(control & u32::from(msi::control::ENABLE), 0);
        assert_eq!(house.pirqs(domain), 0);
    }
    for count in [0, 3, 8, 32, u32::MAX] {
        let op = PciOp {
            info: count,
            ..operation(Command::EnableMultiMsi, 0)
        };
        assert_eq!(frontend.operate(&op).unwrap().err, PciError::OP_FAILED.0);
    }
    assert_eq!(house.pirqs(domain), 0);
}

#[test]
fn enabling_what_is_enabled_sets_it_up_anew() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    for vectors in [&[0][..], &[0, 1, 2, 3], &[3], &[1, 2]] {
        frontend.enable_msix(FIRST, vectors).unwrap();
        assert_eq!(house.pirqs(domain), vectors.len());
        interrupts(&house, NVME, &frontend, vectors);
    }
}

#[test]
fn what_cannot_be_enabled_is_refused_and_leaves_nothing() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    for (command, count, error) in [
        (Command::EnableMsi, 0, PciError::OP_FAILED.0),
        (Command::EnableMsix, 0, -22),
        (Command::EnableMsix, 5, -28),
        (Command::EnableMsix, 129, -22),
        (Command::EnableMsix, u32::MAX, -22),
        // Entries that are all zero are the same entry.
        (Command::EnableMsix, 2, -22),
    ] {
        let answer = frontend.operate(&operation(command, count)).unwrap();
        assert_eq!(answer.err, error, "{command} {count}");
        assert_eq!(house.pirqs(domain), 0, "{command} {count}");
    }
    for command in [Command::DisableMsi, Command::DisableMsix] {
        let answer = frontend.operate(&operation(command, 0)).unwrap();
        assert_eq!(answer.err, 0, "{command}");
    }
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0]).unwrap();
}

#[test]
fn a_line_interrupts_the_guest() {
    let house = House::new(&[INTX_ONLY]);
    let (_, mut frontend) = house.boot(&[INTX_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    let pirq = frontend.enable_intx(FIRST).unwrap();
    assert_eq!(pirq.0, 19);
    for _ in 0..3 {
        interrupts(&house, INTX_ONLY, &frontend, &[0]);
        house.bus.lower_interrupt(INTX_ONLY);
    }
}

#[test]
fn a_device_that_slept_has_its_configuration_and_its_interrupts_again() {
    let house = House::new(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    let function = frontend.function(FIRST).unwrap();
    let control = function.capability(POWER).unwrap() + 4;
    let bar = function.bars[0].address as u32;
    let before: Vec<u32> = (0..16)
        .map(|word| frontend.conf_read(FIRST, word * 4, 4).unwrap())
        .collect();
    frontend.conf_write(FIRST, control, 2, 3).unwrap();
    assert!(!house.bus.raise_interrupt(NVME, 0));
    frontend.conf_write(FIRST, control, 2, 0).unwrap();
    let after: Vec<u32> = (0..16)
        .map(|word| frontend.conf_read(FIRST, word * 4, 4).unwrap())
        .collect();
    assert_eq!(after, before);
    let low = house.config(NVME).read(0x10, Width::Four).unwrap();
    assert_eq!(low & !0xf, bar);
    interrupts(&house, NVME, &frontend, &[0, 1]);
    assert_eq!(house.pirqs(domain), 2);
}

#[test]
fn the_next_guest_gets_a_clean_device() {
    let house = House::impatient(&[NVME]);
    let before = house.config(NVME).read(4, Width::Two).unwrap();
    let (domain, mut frontend) = house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    house.set(NVME, |settings| {
        settings.permissive = Some(Permissive::Yes);
        settings.allow_interrupt_control = Some(true);
    });
    // A BAR in the middle of being sized, and a register that only a permissive guest may write.
    frontend.conf_write(FIRST, 0x10, 4, u32::MAX).unwrap();
    frontend.conf_write(FIRST, 0x0d, 1, 0x40).unwrap();
    let command = frontend.conf_read(FIRST, 4, 2).unwrap();
    frontend.conf_write(FIRST, 4, 2, command | 0x400).unwrap();
    assert_ne!(house.record(NVME).overlay(), 0);
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(NVME);
    assert_eq!(house.config(NVME).read(4, Width::Two).unwrap(), before);

    let resets = house.bus.resets(NVME);
    assert!(resets >= 2);
    let (_, mut frontend) = house.boot(&[NVME]);
    assert_eq!(house.record(NVME).settings(), RunTime::default());
    let bars = &frontend.function(FIRST).unwrap().bars;
    assert_eq!(bars.len(), 1);
    assert_eq!(frontend.conf_read(FIRST, 0x0d, 1).unwrap(), 0);
    assert_eq!(frontend.conf_read(FIRST, 4, 2).unwrap() & 0x404, 0);
    let control = hardware(&house, NVME, &frontend, MSIX, msix::CONTROL.offset);
    assert_eq!(control & u32::from(msix::control::ENABLE), 0);
    assert!(house.store().read("/local/domain/0/error").is_err());
}
