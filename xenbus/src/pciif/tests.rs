//! Both ends on one page.

use std::sync::atomic::{AtomicU8, Ordering};

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::platform::PageMapping;
use crate::types::PciDevice;

fn both_ends() -> (Frontend, SharedInfo, LocalPage) {
    let page = LocalPage::default();
    let frontend = Frontend::new(Box::new(page.clone()));
    (frontend, SharedInfo::new(Box::new(page.clone())), page)
}

fn bytes(page: &LocalPage) -> Vec<u8> {
    let byte = |offset| {
        // SAFETY: within the page, which lives as long as it is borrowed.
        unsafe { AtomicU8::from_ptr(page.base().as_ptr().add(offset)) }.load(Ordering::Relaxed)
    };
    (0..4096).map(byte).collect()
}

fn word(page: &LocalPage, offset: usize) -> u32 {
    u32::from_le_bytes(bytes(page)[offset..offset + 4].try_into().unwrap())
}

fn op(command: Command) -> PciOp {
    PciOp {
        cmd: command as u32,
        domain: 0x10,
        bus: 0x20,
        devfn: 0x30,
        offset: -1,
        size: 4,
        value: 3,
        ..PciOp::default()
    }
}

#[test]
fn an_operation_lies_in_the_page_where_the_header_says() {
    let (frontend, _, page) = both_ends();
    let mut request = op(Command::EnableMsix);
    request.msix_entries[127].entry = 0xabcd;
    frontend.submit(&request);
    assert_eq!(word(&page, 0), 1, "flags");
    assert_eq!(word(&page, 4), 4, "cmd");
    assert_eq!(word(&page, 12), 0x10, "domain");
    assert_eq!(word(&page, 16), 0x20, "bus");
    assert_eq!(word(&page, 20), 0x30, "devfn");
    assert_eq!(word(&page, 24), 0xffff_ffff, "offset");
    assert_eq!(word(&page, 28), 4, "size");
    assert_eq!(word(&page, 32), 3, "value");
    assert_eq!(word(&page, 548), 0xabcd_0000, "msix_entries[127]");
}

#[test]
fn an_operation_goes_to_the_backend_and_its_answer_comes_back() {
    let (frontend, backend, _) = both_ends();
    assert!(!backend.active());
    let request = op(Command::ConfRead);
    frontend.submit(&request);
    assert!(backend.active() && frontend.pending());
    assert_eq!(backend.fetch(), request);
    backend.publish(PciError::SUCCESS, 0x8086_10d3, None);
    assert!(!backend.active() && !frontend.pending());
    let answer = frontend.answer();
    assert_eq!((answer.err, answer.value), (0, 0x8086_10d3));
}

#[test]
fn pirqs_are_written_beside_the_entries_that_asked_for_them() {
    let (frontend, backend, _) = both_ends();
    let mut request = op(Command::EnableMsix);
    for (entry, number) in request.msix_entries.iter_mut().zip(10..) {
        *entry = MsixEntry {
            vector: 0xffff,
            entry: number,
        };
    }
    frontend.submit(&request);
    assert_eq!(backend.fetch(), request);
    backend.publish(PciError::SUCCESS, 0, Some(&[55, 54, 53]));
    let answer = frontend.answer();
    let start = [(55, 10), (54, 11), (53, 12), (0xffff, 13)];
    for (entry, (vector, number)) in answer.msix_entries.iter().zip(start) {
        assert_eq!(
            *entry,
            MsixEntry {
                vector,
                entry: number
            }
        );
    }
}

#[test]
fn more_pirqs_than_entries_stay_within_the_entries() {
    let (_, backend, page) = both_ends();
    backend.publish(PciError::SUCCESS, 0, Some(&[0xffff; 4096]));
    assert_eq!(word(&page, 548), 0x0000_ffff, "the last entry");
    assert_eq!(word(&page, 552), 0, "the AER slot");
}

#[test]
fn entries_are_copied_only_for_the_command_that_has_them() {
    let (frontend, backend, _) = both_ends();
    let mut request = op(Command::ConfWrite);
    request.msix_entries[0].entry = 7;
    frontend.submit(&request);
    assert_eq!(backend.fetch().msix_entries[0], MsixEntry::default());
}

#[test]
fn a_request_that_took_the_place_of_another_is_noticed() {
    let (frontend, backend, _) = both_ends();
    let request = op(Command::ConfRead);
    frontend.submit(&request);
    let fetched = backend.fetch();
    assert!(backend.header_matches(&fetched));
    let others = [
        PciOp { cmd: 1, ..request },
        PciOp {
            domain: 0,
            ..request
        },
        PciOp { bus: 0, ..request },
        PciOp {
            devfn: 0,
            ..request
        },
        PciOp {
            offset: 0,
            ..request
        },
        PciOp { size: 2, ..request },
        PciOp {
            value: 9,
            ..request
        },
    ];
    for other in others {
        frontend.clear_flags(Flags::OP_ACTIVE);
        frontend.submit(&other);
        assert!(!backend.header_matches(&fetched), "{:?}", other.command());
    }
}

#[test]
fn recovery_and_operations_do_not_disturb_each_other() {
    let (frontend, backend, page) = both_ends();
    assert!(!backend.frontend_handles_aer());
    frontend.set_flags(Flags::AER_HANDLER);
    assert!(backend.frontend_handles_aer());
    let function = PciDevice {
        segment: 1,
        bus: 2,
        devfn: 0x18,
    };
    backend.post_aer(AerCommand::Detected, ChannelState::Frozen, function);
    assert_eq!(word(&page, 0), 0b110, "flags");
    assert_eq!(
        [552, 556, 560, 564, 568].map(|at| word(&page, at)),
        [6, 2, 1, 2, 0x18]
    );
    assert!(backend.aer_pending() && backend.take_aer_result().is_none());

    frontend.submit(&op(Command::ConfRead));
    backend.publish(PciError::SUCCESS, 1, None);
    assert!(backend.aer_pending() && !backend.active());

    let asked = frontend.aer_request().unwrap();
    assert_eq!(
        AerCommand::from_number(asked.cmd),
        Some(AerCommand::Detected)
    );
    frontend.answer_aer(AerResult::NeedReset);
    assert!(frontend.aer_request().is_none());
    assert_eq!(backend.take_aer_result(), Some(AerResult::NeedReset));
}

#[test]
fn an_answer_that_is_none_costs_the_frontend_its_device() {
    for number in [i32::MIN, -1, 0, 7, i32::MAX] {
        assert_eq!(AerResult::from_wire(number), AerResult::Disconnect);
    }
    for number in 1..=6 {
        assert_eq!(AerResult::from_wire(number) as i32, number);
    }
}

#[test]
fn a_step_that_is_taken_back_is_not_pending() {
    let (frontend, backend, _) = both_ends();
    let function = PciDevice {
        segment: 0,
        bus: 0,
        devfn: 0,
    };
    backend.post_aer(AerCommand::Resume, ChannelState::Normal, function);
    backend.withdraw_aer();
    assert!(!backend.aer_pending() && frontend.aer_request().is_none());
}

#[test]
fn commands_and_errors_have_the_headers_numbers() {
    let numbers: Vec<u32> = (0..20)
        .filter(|n| Command::from_number(*n).is_some())
        .collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 10]);
    for number in numbers {
        assert_eq!(
            Command::from_number(number).map(|command| command as u32),
            Some(number)
        );
    }
    let steps: Vec<u32> = (0..20)
        .filter(|n| AerCommand::from_number(*n).is_some())
        .collect();
    assert_eq!(steps, [6, 7, 8, 9]);
}

#[test]
fn an_errno_never_reads_as_one_of_the_named_errors() {
    for errno in [i32::MIN, -22, 0, 1, 5, 4096, i32::MAX] {
        assert_eq!(PciError::from_errno(errno), PciError::OP_FAILED);
    }
    assert_eq!(PciError::from_errno(libc::EINVAL), PciError(-22));
}

#[test]
fn scribbling_outside_the_page_does_nothing() {
    let (frontend, _, page) = both_ends();
    for offset in [1, 2, 4094, 4096, usize::MAX - 3] {
        frontend.scribble(offset, u32::MAX);
    }
    assert!(bytes(&page).iter().all(|byte| *byte == 0));
    frontend.scribble(4092, u32::MAX);
    assert_eq!(word(&page, 4092), u32::MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_a_guest_writes_is_fetched_byte_for_byte(
        content in prop::collection::vec(any::<u8>(), 4096),
    ) {
        let page = LocalPage::new(content.clone().try_into().unwrap());
        let backend = SharedInfo::new(Box::new(page));
        let op = backend.fetch();
        let copied = if op.command() == Some(Command::EnableMsix) { 548 } else { 36 };
        prop_assert_eq!(&op.as_bytes()[..copied], &content[4..4 + copied]);
        prop_assert!(backend.header_matches(&op));
    }
}
