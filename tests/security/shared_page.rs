//! XSA-155: the page may change at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pcibackd::host::sim::NVME;
use xenbus::MsiRequest;
use xenbus::pciif::{Command, Flags, MsixEntry, PciError};

use crate::guest::{Diary, ENTRIES, Guest, OFFSET, op};
use crate::house::{House, at};
use crate::mortal::Deed;

/// Of the NVMe drive, and 0x40 bytes of capabilities further.
const CLASS: u32 = 0x0108_0200;
const VENDOR: u32 = 0x0010_1b36;

fn entries(wanted: &[u16]) -> [MsixEntry; 128] {
    let mut entries = [MsixEntry {
        vector: 0xbeef,
        entry: 0xdead,
    }; 128];
    for (slot, entry) in entries.iter_mut().zip(wanted) {
        slot.entry = *entry;
    }
    entries
}

/// Fails when `SharedInfo::fetch` in xenbus/src/pciif/shared_info.rs gives a reference into the page instead of a copy.
#[test]
fn xsa_155_msix_entries_that_change_after_the_check_are_mapped_as_they_were_checked() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    guest.write_config(at(0, 0), 4, 2, 6);
    let (page, meddled) = (Arc::clone(&guest.page), AtomicBool::new(false));
    let diary = Diary::default();
    house.life().witness({
        let diary = diary.clone();
        move |deed| {
            diary.note(deed);
            // All were checked before the first is mapped.
            if matches!(deed, Deed::MapMsi(..)) && !meddled.swap(true, Ordering::Relaxed) {
                for entry in 0..4 {
                    let page = page.lock().unwrap();
                    page.scribble(ENTRIES + 4 * entry, 3 << 16);
                }
            }
        }
    });
    let mut request = op(Command::EnableMsix, at(0, 0), 0, 0, 3);
    request.msix_entries = entries(&[2, 0, 1]);
    let answer = guest.operate(&request);
    assert_eq!(answer.err, 0);
    let mapped: Vec<u16> = diary
        .take()
        .iter()
        .filter_map(|deed| match deed {
            Deed::MapMsi(_, _, MsiRequest::MsiX { entry, .. }) => Some(*entry),
            _ => None,
        })
        .collect();
    assert_eq!(mapped, [2, 0, 1]);
}

/// Fails when `serve_one` in session/link.rs does not compare the page with its copy before it answers.
#[test]
fn xsa_155_a_request_that_takes_the_place_of_another_is_not_answered_with_its_result() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    let page = Arc::clone(&guest.page);
    house.life().witness(move |deed| {
        if *deed == Deed::Read(NVME, 8) {
            page.lock().unwrap().scribble(OFFSET, 0);
        }
    });
    let answer = guest.read(at(0, 0), 8, 4);
    assert_eq!((answer.err, answer.value), (0, VENDOR));
    house.life().witness(|_| {});
    assert_eq!(guest.read(at(0, 0), 8, 4).value, CLASS);
}

/// Fails when `SharedInfo::publish` in xenbus/src/pciif/shared_info.rs writes back more than error, value and the PIRQs that were asked
/// for: the whole operation, all 128 entries, or the flags as a word.
#[test]
fn xsa_155_an_answer_changes_nothing_in_the_page_that_is_not_the_backends() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    guest.write_config(at(0, 0), 4, 2, 6);
    let others = 0xffff_fff8;
    guest.set_flags(others);
    let mut request = op(Command::EnableMsix, at(0, 0), -7, i32::MAX, 2);
    (request.err, request.info) = (77, 0x1234_5678);
    request.msix_entries = entries(&[1, 3]);
    let answer = guest.operate(&request);
    assert_eq!(answer.err, 0);
    let mut expected = request;
    (expected.err, expected.value) = (0, 0);
    for (slot, answered) in expected
        .msix_entries
        .iter_mut()
        .zip(&answer.msix_entries)
        .take(2)
    {
        assert_ne!(answered.vector, 0xbeef);
        slot.vector = answered.vector;
    }
    assert_eq!(answer, expected);
    assert_eq!(guest.page().flags(), Flags::from_bits_retain(others));
}

/// Fails when `check_entries` in msi/src/operations.rs does not look for entries that are there twice or beyond the table, or when
/// `enable_msix` there takes as many entries as the page has instead of refusing more.
#[test]
fn xsa_155_counts_and_entries_of_a_request_are_checked() {
    let house = House::new(&[NVME]);
    let guest = Guest::connected(&house, &[NVME]);
    guest.write_config(at(0, 0), 4, 2, 6);
    let diary = Diary::of(&house);
    for (count, wanted) in [
        (0, &[][..]),
        (2, &[1, 1]),
        (1, &[4]),
        (2, &[0, u16::MAX]),
        (5, &[0, 1, 2, 3, 4]),
        (129, &[0, 1]),
        (0x8000_0001, &[0]),
        (0x1_0000, &[0]),
        (u32::MAX, &[0]),
    ] {
        let mut request = op(Command::EnableMsix, at(0, 0), 0, 0, count);
        request.msix_entries = entries(wanted);
        let answer = guest.operate(&request);
        assert_ne!(answer.err, PciError::SUCCESS.0, "{count} {wanted:?}");
    }
    let mapped = |deed: &Deed| matches!(deed, Deed::MapMsi(..));
    assert!(!diary.take().iter().any(mapped));
}
