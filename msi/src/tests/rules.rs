//! One test for each rule of enabling and disabling.

use super::machine::{GSI, MSI, MSIX, Machine, POWER, TABLE_BASE};
use crate::ledger::Phase;
use crate::{Held, Kind, Recovered, Refusal};
use conf_space::{ConfigSpace, Width};
use xenbus::MsiRequest;
use xenbus::pciif::MsixEntry;

fn answer(refusal: &Refusal, count: u32) -> i32 {
    refusal.msix_answer(count).error.0
}

#[test]
fn msi_is_mapped_switched_on_and_written_down() {
    let machine = Machine::new();
    let pirq = machine.operate(|it| it.enable_msi(1)).unwrap();
    assert_eq!(pirq.0, 47);
    assert_eq!(machine.requests(), [MsiRequest::Msi]);
    assert_eq!(machine.control(MSI), 0x5);
    assert!(machine.intx_is_disabled());
    assert_eq!(machine.held(), [47]);
}

#[test]
fn several_msi_vectors_are_one_block_and_the_device_is_told_how_many() {
    let machine = Machine::new();
    let pirq = machine.operate(|it| it.enable_msi(4)).unwrap();
    assert_eq!(pirq.0, 44);
    assert_eq!(machine.requests(), [MsiRequest::MultiMsi { count: 4 }]);
    assert_eq!(machine.control(MSI), 0x25);
    assert_eq!(machine.held(), [44, 45, 46, 47]);
    // One vector afterwards: the field goes back.
    machine.operate(|it| it.enable_msi(1)).unwrap();
    assert_eq!(machine.control(MSI), 0x05);
    assert_eq!(machine.mapped(), [47]);
}

#[test]
fn a_number_of_vectors_that_the_device_cannot_have_is_refused_with_one_it_can() {
    let machine = Machine::new();
    for (count, fewer) in [(0, 0), (3, 2), (8, 4), (u32::MAX, 4), (256, 4)] {
        let refusal = machine.operate(|it| it.enable_msi(count)).unwrap_err();
        let answer = refusal.msi_answer();
        assert_eq!((answer.error.0, answer.value), (-5, fewer), "{count}");
    }
    assert!(machine.requests().is_empty());
}

#[test]
fn msix_maps_each_entry_in_the_order_asked_for() {
    let machine = Machine::new();
    machine
        .space
        .set(MSIX + 2, Width::Two, machine.control(MSIX) | 0x4000);
    let vectors = machine.enable_msix(&[5, 0, 2]).unwrap();
    assert_eq!(vectors, [47, 46, 45]);
    let request = |entry| MsiRequest::MsiX {
        entry,
        table_base: TABLE_BASE,
    };
    assert_eq!(machine.requests(), [request(5), request(0), request(2)]);
    assert_eq!(machine.control(MSIX), 0x8005, "on, and nothing masked");
    assert!(machine.intx_is_disabled());
    assert_eq!(machine.held(), [45, 46, 47]);
}

#[test]
fn more_entries_than_an_operation_has_are_refused_whatever_the_device() {
    let machine = Machine::new();
    let entries = [MsixEntry::default(); 128];
    for count in [129, 65536, u32::MAX] {
        let refusal = machine
            .operate(|it| it.enable_msix(&entries, count, || Ok(true)))
            .unwrap_err();
        let answer = refusal.msix_answer(count);
        assert_eq!((answer.error.0, answer.value), (-22, count));
    }
}

#[test]
fn entries_that_are_none_or_twice_or_beyond_the_table_are_refused() {
    let machine = Machine::new();
    for entries in [&[][..], &[1, 1], &[0, 5, 0], &[6], &[0, 0xffff]] {
        let refusal = machine.enable_msix(entries).unwrap_err();
        assert_eq!(answer(&refusal, 1), -22, "{entries:?}");
    }
    let refusal = machine.enable_msix(&[0, 1, 2, 3, 4, 5, 6]).unwrap_err();
    assert_eq!(answer(&refusal, 7), -28);
    assert!(machine.requests().is_empty());
}

#[test]
fn msix_needs_memory_decode() {
    let machine = Machine::new();
    machine.space.write(0x04, Width::Two, 0).unwrap();
    let refusal = machine.enable_msix(&[0]).unwrap_err();
    assert_eq!(answer(&refusal, 1), -6);
    // MSI does not.
    machine.operate(|it| it.enable_msi(1)).unwrap();
}

#[test]
fn neither_is_enabled_while_the_device_sleeps() {
    let machine = Machine::new();
    machine.space.write(POWER + 4, Width::Two, 3).unwrap();
    assert_eq!(answer(&machine.enable_msix(&[0]).unwrap_err(), 1), -22);
    let refusal = machine.operate(|it| it.enable_msi(1)).unwrap_err();
    assert_eq!(refusal.msi_answer().error.0, -5);
}

#[test]
fn neither_is_enabled_while_the_other_is_on() {
    let machine = Machine::new();
    machine.operate(|it| it.enable_msi(1)).unwrap();
    assert_eq!(answer(&machine.enable_msix(&[0]).unwrap_err(), 1), -6);
    assert!(machine.msi_is_on() && !machine.msix_is_on());
    machine.operate(|it| it.disable_msi()).unwrap();
    machine.enable_msix(&[0]).unwrap();
    let refusal = machine.operate(|it| it.enable_msi(1)).unwrap_err();
    assert_eq!(refusal.msi_answer().error.0, -5);
    assert!(!machine.msi_is_on() && machine.msix_is_on());
}

#[test]
fn what_somebody_else_switched_on_is_left_alone_until_release() {
    let machine = Machine::new();
    machine.space.write(MSIX + 2, Width::Two, 0x8000).unwrap();
    assert_eq!(answer(&machine.enable_msix(&[0]).unwrap_err(), 1), -114);
    let refusal = machine.operate(|it| it.enable_msi(1)).unwrap_err();
    assert_eq!(refusal.msi_answer().error.0, -5);
    machine.operate(|it| it.disable_msix()).unwrap();
    machine.operate(|it| it.disable_msi()).unwrap();
    assert!(machine.msix_is_on());
    machine.operate(|it| it.release()).unwrap();
    assert!(!machine.msix_is_on());
}

#[test]
fn enabling_what_is_on_sets_it_up_anew() {
    let machine = Machine::new();
    machine.enable_msix(&[0]).unwrap();
    assert_eq!(machine.enable_msix(&[0, 1]).unwrap(), [47, 46]);
    assert_eq!(machine.mapped(), [46, 47]);
    assert_eq!(machine.held(), [46, 47]);
    assert!(machine.msix_is_on());
}

#[test]
fn a_request_that_is_not_even_tried_leaves_what_is_on() {
    let machine = Machine::new();
    machine.enable_msix(&[0]).unwrap();
    machine.enable_msix(&[7]).unwrap_err();
    assert!(machine.msix_is_on());
    assert_eq!(machine.mapped(), [47]);
    assert_eq!(machine.held(), [47]);
}

#[test]
fn disable_msi_disables_msix_when_that_is_what_is_on() {
    let machine = Machine::new();
    machine.enable_msix(&[0, 1]).unwrap();
    machine.operate(|it| it.disable_msi()).unwrap();
    assert!(!machine.msix_is_on());
    assert!(!machine.intx_is_disabled());
    assert!(machine.mapped().is_empty());
    machine.enable_msix(&[0, 1, 2]).unwrap();
}

#[test]
fn disable_msix_leaves_msi_alone() {
    let machine = Machine::new();
    machine.operate(|it| it.enable_msi(2)).unwrap();
    machine.operate(|it| it.disable_msix()).unwrap();
    assert!(machine.msi_is_on());
    assert_eq!(machine.mapped().len(), 2);
}

#[test]
fn disabling_what_is_off_does_nothing() {
    let machine = Machine::new();
    let before = machine.steps();
    machine.operate(|it| it.disable_msi()).unwrap();
    machine.operate(|it| it.disable_msix()).unwrap();
    assert_eq!(machine.steps(), before);
}

#[test]
fn intx_that_was_off_before_stays_off_afterwards() {
    let machine = Machine::new();
    machine.space.write(0x04, Width::Two, 0x402).unwrap();
    machine.operate(|it| it.enable_msi(1)).unwrap();
    machine.operate(|it| it.disable_msi()).unwrap();
    assert!(machine.intx_is_disabled());
}

#[test]
fn when_xen_has_no_more_pirqs_those_mapped_so_far_are_given_back() {
    let machine = Machine::new();
    // The fourth map: three steps before the first one are its preparations.
    let mut failed = 0;
    for step in 0.. {
        machine.fail_at(&[step]);
        let steps = machine.steps();
        let result = machine.enable_msix(&[0, 1, 2, 3]);
        let whole = machine.steps() - steps;
        if let Err(refusal) = result {
            failed += 1;
            assert!(machine.mapped().is_empty(), "step {step}: {refusal}");
            assert!(!machine.msix_is_on(), "step {step}");
            assert_eq!(Held::read(&machine), None, "step {step}");
        } else {
            machine.fail_at(&[]);
            machine.operate(|it| it.release()).unwrap();
        }
        if step > whole {
            break;
        }
    }
    assert!(
        failed > 8,
        "four maps and the reads and writes before and after them: {failed}"
    );
}

#[test]
fn a_pirq_that_cannot_be_told_is_given_back() {
    let machine = Machine::new();
    machine.offset.set(0x1_0000);
    let refusal = machine.enable_msix(&[0]).unwrap_err();
    assert_eq!(answer(&refusal, 1), -28);
    assert!(machine.mapped().is_empty());
}

#[test]
fn what_xen_does_not_take_back_stays_in_the_ledger_and_is_tried_again() {
    let machine = Machine::new();
    machine.enable_msix(&[0, 1]).unwrap();
    // State, control read and write, then the first unmap.
    machine.fail_at(&[3]);
    machine.operate(|it| it.disable_msix()).unwrap_err();
    assert!(!machine.msix_is_on());
    assert_eq!(machine.mapped(), [47]);
    assert_eq!(machine.held(), [47]);
    machine.operate(|it| it.enable_msi(1)).unwrap();
    assert_eq!(machine.mapped(), machine.held());
}

#[test]
fn a_release_forgets_even_what_xen_does_not_take_back() {
    let machine = Machine::new();
    machine.operate(|it| it.enable_msi(1)).unwrap();
    machine.fail_at(&[3]);
    machine.operate(|it| it.release()).unwrap_err();
    assert_eq!(Held::read(&machine), None);
    assert!(!machine.msi_is_on());
}

#[test]
fn what_a_release_gave_up_is_not_taken_from_the_next_guest() {
    let machine = Machine::new();
    machine.operate(|it| it.enable_msi(1)).unwrap();
    machine.fail_at(&[3]);
    machine.operate(|it| it.release()).unwrap_err();
    // Killed as soon as the ledger says that something is about to be mapped.
    let begun = (0..20).any(|step| {
        machine.killed_at(step, || drop(machine.operate(|it| it.enable_msi(1))));
        Held::read(&machine).is_some()
    });
    assert!(begun);
    assert!(
        machine.held().is_empty(),
        "the last guest's PIRQ 47 may be in use by now"
    );
}

#[test]
fn after_a_reset_the_enable_bits_come_back() {
    let machine = Machine::new();
    assert_eq!(machine.operate(|it| it.reprogram()), Ok(None));
    machine.operate(|it| it.enable_msi(4)).unwrap();
    machine.space.set(MSI + 2, Width::Two, 0x4);
    machine.space.set(0x04, Width::Two, 0x6);
    assert_eq!(machine.operate(|it| it.reprogram()), Ok(Some(Kind::Msi)));
    assert_eq!(machine.control(MSI), 0x25);
    assert!(machine.intx_is_disabled());
}

#[test]
fn a_device_that_does_not_answer_is_neither_enabled_nor_in_the_way() {
    let machine = Machine::new();
    machine.enable_msix(&[0, 1]).unwrap();
    for offset in (0..0x100).step_by(4) {
        machine.space.set(offset, Width::Four, u32::MAX);
    }
    machine.enable_msix(&[0]).unwrap_err();
    machine.operate(|it| it.disable_msix()).unwrap();
    assert!(machine.mapped().is_empty());
    assert!(machine.operate(|it| it.enable_msi(1)).is_err());
    machine.operate(|it| it.release()).unwrap();
}

#[test]
fn a_restart_keeps_what_is_on() {
    let machine = Machine::new();
    machine.enable_msix(&[0, 1]).unwrap();
    let found = machine.operate(|it| it.recover((0..100).map(xenbus::Pirq), |pirq| pirq == GSI));
    assert_eq!(found.unwrap(), Recovered::Enabled(Kind::MsiX));
    assert_eq!(machine.mapped(), [46, 47]);
    assert!(machine.msix_is_on());
}

#[test]
fn killed_before_the_answer_of_a_map_was_written_down_its_pirq_is_found() {
    let machine = Machine::new();
    for step in 0.. {
        let killed = machine.killed_at(step, || {
            let _ = machine.enable_msix(&[0, 1]);
        });
        assert!(
            killed,
            "two are mapped and one is in the ledger at some step"
        );
        if machine.mapped().len() == 2 && machine.held().len() == 1 {
            break;
        }
        machine
            .operate(|it| it.recover((0..100).map(xenbus::Pirq), |pirq| pirq == GSI))
            .unwrap();
    }
    assert_eq!(Held::read(&machine).unwrap().phase, Phase::Mapping);
    let found = machine.operate(|it| it.recover((0..100).map(xenbus::Pirq), |pirq| pirq == GSI));
    assert_eq!(found.unwrap(), Recovered::Undone { swept: 1 });
    assert!(machine.mapped().is_empty());
    assert!(machine.gsi_is_mapped());
}
