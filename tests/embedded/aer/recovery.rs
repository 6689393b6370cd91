//! Guests that recover, in whatever comes between.

use std::time::Duration;

use conf_space::Width;
use pcibackd::control::protocol::DeviceErrors;
use pcibackd::host::errors::Severity::{Fatal, NonFatal};
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, NIC, NIC_VF0, NVME};
use pcibackd::session::aer::recovery::{Outcome, Recovery, State};
use xenbus::XenbusState;
use xenbus::pciif::AerCommand::{Detected, MmioEnabled, Resume, SlotReset};
use xenbus::pciif::{AerResult, ChannelState};
use xenbus::xenstore::Store;

use super::{FIRST, Setup, expect, reset_and_resume, takes_interrupts, working};
use crate::house::{LONG, until};

#[test]
fn a_driver_that_goes_on_after_a_non_fatal_error_is_told_to_resume() {
    let (setup, _, mut frontend) = working("");
    let resets = setup.house.bus.resets(NVME);
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    assert_eq!(setup.logged_errors(), 0);
    // Its driver looks at the device before it answers.
    assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    expect(&mut frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(NVME);
    assert_eq!(setup.house.bus.resets(NVME), resets);
    takes_interrupts(&setup, &frontend);
    assert!(setup.is_untouched());
    setup.house.bus.report_correctable_error(NVME);
    let told = DeviceErrors {
        correctable: Some(1),
        non_fatal: 1,
        fatal: 0,
        recovery: Some("recovered".into()),
        stopped_dma: 0,
    };
    assert_eq!(setup.house.status().device_errors, [(NVME, told)]);
}

#[test]
fn a_driver_that_wants_to_know_is_told_that_registers_can_be_accessed() {
    let (setup, _, mut frontend) = working("mmio_enabled = true");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    expect(&mut frontend, MmioEnabled, ChannelState::Normal);
    reset_and_resume(&setup, &mut frontend);
}

#[test]
fn a_driver_that_needs_it_gets_its_device_reset_with_its_interrupts() {
    let (setup, _, mut frontend) = working("");
    let resets = setup.house.bus.resets(NVME);
    setup
        .house
        .bus
        .set_reset_time(NVME, Duration::from_millis(50));
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    reset_and_resume(&setup, &mut frontend);
    assert_eq!(setup.house.bus.resets(NVME), resets + 1);
}

#[test]
fn after_a_fatal_error_the_device_is_restored_before_its_driver_is_asked() {
    let (setup, _, mut frontend) = working("");
    let command = setup.house.config(NVME).read(4, Width::Two).unwrap();
    setup
        .house
        .bus
        .set_reset_time(NVME, Duration::from_millis(50));
    setup.report(Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    assert_eq!(
        setup.house.config(NVME).read(4, Width::Two).unwrap(),
        command
    );
    assert_eq!(setup.logged_errors(), 0);
    takes_interrupts(&setup, &frontend);
    reset_and_resume(&setup, &mut frontend);
    assert_eq!(setup.house.record(NVME).errors().counted(Fatal), 1);
}

#[test]
fn where_the_kernel_resets_the_link_twice_the_device_is_restored_after_the_second_time() {
    let (setup, _, mut frontend) = working("");
    let config = setup.house.config(NVME);
    let read = || [4, 0x10, 0x14].map(|offset| config.read(offset, Width::Four).unwrap());
    let before = read();
    let bus = &setup.house.bus;
    bus.set_reset_time(NVME, Duration::from_millis(50));
    bus.set_link_reset_fails(NVME, true);
    setup.report(Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    assert_eq!(read(), before);
    takes_interrupts(&setup, &frontend);
    reset_and_resume(&setup, &mut frontend);
}

#[test]
fn a_fatal_error_of_one_function_is_recovered_from_by_all_on_its_link() {
    let setup = Setup::new(&[NIC_VF0], "");
    let (_, mut frontend) = setup.house.boot(&[NIC_VF0]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0]).unwrap();
    setup.house.bus.report_error(NIC, Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    assert!(setup.house.bus.raise_interrupt(NIC_VF0, 0));
    assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
    // A non-fatal one is its own affair.
    frontend.answer_aer(AerResult::Recovered).unwrap();
    expect(&mut frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(NIC_VF0);
    setup.house.bus.report_error(NIC, NonFatal);
    assert_eq!(frontend.next_aer(Duration::from_millis(50)).unwrap(), None);
}

#[test]
fn a_device_that_no_guest_has_is_made_ready_again_after_a_fatal_error() {
    let setup = Setup::new(&[NVME], "");
    let config = setup.house.config(NVME);
    let read = || [4, 0x10, 0x14].map(|offset| config.read(offset, Width::Four).unwrap());
    let before = read();
    let resets = setup.house.bus.resets(NVME);
    setup.report(Fatal);
    until("it is as before", || {
        setup.house.phase(NVME) == Some(Phase::Hidden) && read() == before
    });
    until("its log of errors is empty", || setup.logged_errors() == 0);
    // The kernel has reset it. Another reset may be the next error.
    assert_eq!(setup.house.bus.resets(NVME), resets);
    let (_, mut frontend) = setup.house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    takes_interrupts(&setup, &frontend);
}

#[test]
fn two_devices_of_a_guest_recover_one_after_the_other() {
    let setup = Setup::new(&[NVME, INTX_ONLY], "");
    let (_, mut frontend) = setup.house.boot(&[NVME, INTX_ONLY]);
    setup.house.bus.report_error(NVME, NonFatal);
    setup.house.bus.report_error(INTX_ONLY, NonFatal);
    let mut asked = Vec::new();
    for _ in 0..6 {
        let request = frontend.next_aer(LONG).unwrap().unwrap();
        asked.push((request.function, request.command.unwrap()));
        let answer = match request.command {
            Some(Detected) => AerResult::NeedReset,
            _ => AerResult::Recovered,
        };
        frontend.answer_aer(answer).unwrap();
    }
    for bdf in [NVME, INTX_ONLY] {
        setup.until_recovered(bdf);
        let function = setup.house.seen_as(bdf);
        let of_it = asked.iter().filter(|(asked, _)| *asked == function);
        let steps: Vec<_> = of_it.map(|(_, step)| *step).collect();
        assert_eq!(steps, [Detected, SlotReset, Resume]);
    }
}

#[test]
fn what_a_guest_was_asked_about_a_device_that_left_it_is_not_answered_for_another() {
    let setup = Setup::new(&[NVME, INTX_ONLY], "");
    let house = &setup.house;
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    house.while_following(&mut frontend, || house.detach(domain, NVME));
    house.bus.report_error(INTX_ONLY, NonFatal);
    let other = house.seen_as(INTX_ONLY);
    until("it is asked about the other", || {
        let request = frontend.next_aer(Duration::ZERO).unwrap();
        request.is_some_and(|request| request.function == other)
    });
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    until("it is told to resume", || {
        let request = frontend.next_aer(Duration::ZERO).unwrap();
        request.is_some_and(|request| request.command == Some(Resume))
    });
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(INTX_ONLY);
}

#[test]
fn what_a_guest_was_asked_about_a_device_that_left_it_without_a_daemon_is_withdrawn() {
    let setup = Setup::new(&[NVME, INTX_ONLY], "");
    let house = &setup.house;
    let (domain, mut frontend) = house.boot(&[NVME, INTX_ONLY]);
    let first = house.seen_as(NVME);
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    house.kill();
    // As a toolstack does that does not wait for anybody.
    for node in ["dev-0", "state-0", "vdev-0"] {
        house.store().rm(&house.backend(domain, node)).unwrap();
    }
    house.start();
    until("it is not asked any more", || {
        frontend.next_aer(Duration::ZERO).unwrap().is_none()
    });
    house.bus.report_error(INTX_ONLY, NonFatal);
    let request = frontend.next_aer(LONG).unwrap().unwrap();
    assert_eq!(request.function, house.seen_as(INTX_ONLY));
    assert_ne!(request.function, first);
}

#[test]
fn a_fatal_error_in_the_middle_begins_a_new_recovery_once_the_guest_has_answered() {
    let (setup, _, mut frontend) = working("");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    setup.report(Fatal);
    let record = setup.house.record(NVME);
    until("it has been heard of", || {
        record.errors().counted(Fatal) == 1 && record.errors().reported().is_none()
    });
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    expect(&mut frontend, Detected, ChannelState::Frozen);
    takes_interrupts(&setup, &frontend);
    reset_and_resume(&setup, &mut frontend);
}

#[test]
fn a_non_fatal_error_in_the_middle_is_recovered_from_afterwards() {
    let (setup, _, mut frontend) = working("");
    for _ in 0..2 {
        setup.report(NonFatal);
        expect(&mut frontend, Detected, ChannelState::Normal);
    }
    frontend.answer_aer(AerResult::CanRecover).unwrap();
    expect(&mut frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    expect(&mut frontend, Detected, ChannelState::Normal);
    reset_and_resume(&setup, &mut frontend);
}

#[test]
fn a_guest_that_dies_in_the_middle_leaves_a_device_that_the_next_one_can_use() {
    for step in [Detected, SlotReset] {
        let (setup, domain, mut frontend) = working("");
        setup.report(Fatal);
        expect(&mut frontend, Detected, ChannelState::Frozen);
        if step == SlotReset {
            setup
                .house
                .bus
                .set_reset_time(NVME, Duration::from_millis(100));
            frontend.answer_aer(AerResult::NeedReset).unwrap();
        }
        drop(frontend);
        let house = &setup.house;
        house.machine.domain_shut_down(domain).unwrap();
        house.machine.destroy_domain(domain).unwrap();
        house.until_gone(domain);
        house.until_free(NVME);
        let (_, mut frontend) = house.boot(&[NVME]);
        frontend.enable_device(FIRST).unwrap();
        frontend.enable_msix(FIRST, &[0, 1]).unwrap();
        takes_interrupts(&setup, &frontend);
        assert_eq!(setup.recovery(NVME), Recovery::default());
        assert_eq!(frontend.next_aer(Duration::from_millis(20)).unwrap(), None);
    }
}

#[test]
fn a_driver_that_is_loaded_anew_in_the_middle_is_not_asked_what_its_predecessor_was() {
    let (setup, domain, mut frontend) = working("");
    setup.report(Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    frontend.unload().unwrap();
    setup.house.until_node(domain, "state", "4");
    frontend.write_state("1").unwrap();
    setup.house.until_node(domain, "state", "3");
    frontend.publish().unwrap();
    setup.house.until_node(domain, "state", "4");
    frontend
        .wait_for_backend(XenbusState::Connected, LONG)
        .unwrap();
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    takes_interrupts(&setup, &frontend);
    assert_eq!(frontend.next_aer(Duration::from_millis(20)).unwrap(), None);
    assert_eq!(setup.recovery(NVME).outcome, Outcome::Abandoned);
    assert!(setup.is_untouched());
}

#[test]
fn a_restart_in_the_middle_is_not_noticed_by_the_guest() {
    let (setup, _, mut frontend) = working("");
    setup.report(Fatal);
    expect(&mut frontend, Detected, ChannelState::Frozen);
    // Unanswered.
    setup.house.restart();
    expect(&mut frontend, Detected, ChannelState::Frozen);
    // Answered while there is no daemon.
    setup.house.kill();
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    setup.house.start();
    expect(&mut frontend, SlotReset, ChannelState::Normal);
    takes_interrupts(&setup, &frontend);
    setup.house.kill();
    frontend.answer_aer(AerResult::Recovered).unwrap();
    setup.house.start();
    expect(&mut frontend, Resume, ChannelState::Normal);
    setup.house.kill();
    frontend.answer_aer(AerResult::None).unwrap();
    setup.house.start();
    setup.until_recovered(NVME);
    assert_eq!(frontend.next_aer(Duration::from_millis(20)).unwrap(), None);
}

#[test]
fn a_daemon_that_is_killed_while_the_device_is_reset_has_it_reset_again() {
    let (setup, _, mut frontend) = working("");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    setup
        .house
        .bus
        .set_reset_time(NVME, Duration::from_millis(100));
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    until("it is being reset", || {
        setup.recovery(NVME).state == State::Resetting
    });
    setup.house.restart();
    expect(&mut frontend, SlotReset, ChannelState::Normal);
    takes_interrupts(&setup, &frontend);
}

#[test]
fn what_was_reported_while_no_daemon_ran_is_recovered_from_afterwards() {
    let (setup, _, mut frontend) = working("");
    setup.house.kill();
    setup.report(Fatal);
    setup.house.start();
    expect(&mut frontend, Detected, ChannelState::Frozen);
    reset_and_resume(&setup, &mut frontend);
}
