//! Guests that do not recover, and what the policy does about them.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use pcibackd::control::protocol::{Request, Response};
use pcibackd::host::errors::Severity::{Fatal, NonFatal};
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, NVME};
use pcibackd::session::aer::recovery::{Failure, Outcome, Recovery, State};
use xenbus::DomId;
use xenbus::pciif::AerCommand::{Detected, SlotReset};
use xenbus::pciif::{AerResult, ChannelState, Flags};
use xenbus::sim::{DomainKind, Variant};
use xenbus::xenstore::Store;

use super::{FIRST, Setup, expect, reset_and_resume, working};
use crate::house::{House, LONG, until};

/// Where the page holds the flags and the result of a step (pciif.h).
const FLAGS: usize = 0;
const AER_ERROR: usize = 556;

#[test]
fn a_device_that_does_not_come_back_from_the_link_reset_is_given_up() {
    let (setup, domain, mut frontend) = working("");
    setup.house.bus.vanish(NVME, true);
    setup.report(Fatal);
    setup.until_failed(NVME, Failure::NotBack);
    setup.until_detached(domain, NVME);
    // Its guest reads what there is, and is not asked.
    assert_eq!(frontend.next_aer(Duration::from_millis(20)).unwrap(), None);
    assert!(frontend.conf_read(FIRST, 0x40, 4).is_ok());
}

#[test]
fn a_guest_that_does_not_answer_in_time_loses_its_device() {
    let (setup, domain, mut frontend) = working("timeout = 1");
    let begin = Instant::now();
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
    let waited = begin.elapsed();
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    assert!(waited < Duration::from_secs(4), "{waited:?}");
    setup.until_failed(NVME, Failure::NoAnswer);
    // It is not expected to answer any more.
    assert_eq!(frontend.next_aer(Duration::ZERO).unwrap(), None);
    // Further errors change nothing.
    setup.report(NonFatal);
    assert_eq!(frontend.next_aer(Duration::from_millis(20)).unwrap(), None);
}

#[test]
fn a_frontend_that_answers_nothing_cannot_use_its_failed_device_and_nobody_else_gets_it() {
    let (setup, domain, mut frontend) = working("timeout = 1");
    let house = &setup.house;
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
    // What `xl pci-detach` does; the frontend never answers. Its driver may be at work on the device's memory.
    assert!(house.detach(domain, NVME).is_err());
    until("its interrupts are taken", || house.pirqs(domain) == 0);
    assert!(frontend.conf_read(FIRST, 0, 4).is_err());
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(NVME);
    let (_, frontend) = house.boot(&[NVME]);
    assert_eq!(frontend.functions().count(), 1);
    assert_eq!(setup.recovery(NVME), Recovery::default());
}

#[test]
fn a_frontend_that_answers_gives_its_failed_device_back_in_order() {
    let (setup, domain, mut frontend) = working("");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::Disconnect).unwrap();
    setup.until_detached(domain, NVME);
    let begin = Instant::now();
    let house = &setup.house;
    house.while_following(&mut frontend, || house.detach(domain, NVME));
    assert!(begin.elapsed() < Duration::from_secs(4));
    house.until_free(NVME);
}

#[test]
fn answers_that_are_none_cost_the_guest_its_device() {
    for answer in [0, 1, 4, 6, 7, 99, -1, i32::MIN, i32::MAX] {
        let (setup, domain, mut frontend) = working("");
        setup.report(NonFatal);
        expect(&mut frontend, Detected, ChannelState::Normal);
        frontend
            .scribble_word(AER_ERROR, answer.cast_unsigned())
            .unwrap();
        let flags = Flags::AER_HANDLER.bits();
        frontend.scribble_word(FLAGS, flags).unwrap();
        frontend.flood(1).unwrap();
        setup.until_failed(NVME, Failure::GivenUp);
        setup.until_detached(domain, NVME);
    }
}

#[test]
fn an_answer_that_does_not_fit_the_step_costs_the_guest_its_device() {
    let (setup, domain, mut frontend) = working("");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    expect(&mut frontend, SlotReset, ChannelState::Normal);
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    setup.until_detached(domain, NVME);
}

#[test]
fn a_guest_without_a_handler_loses_its_device_at_once() {
    let setup = Setup::new(&[NVME], "timeout = 3600");
    let domain = setup.house.guest(&[NVME]);
    let mut frontend = setup.house.frontend(domain, Variant::NetBsd);
    frontend.connect(LONG).unwrap();
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
    setup.until_failed(NVME, Failure::NobodyToAsk);
}

#[test]
fn a_guest_that_is_not_connected_loses_its_device_at_once() {
    let setup = Setup::new(&[NVME], "timeout = 3600");
    let domain = setup.house.guest(&[NVME]);
    setup.house.until_node(domain, "state", "3");
    setup.report(Fatal);
    setup.until_detached(domain, NVME);
    setup.until_failed(NVME, Failure::NobodyToAsk);
}

#[test]
fn an_hvm_guest_loses_its_device_at_once() {
    let setup = Setup::new(&[NVME], "timeout = 3600");
    let domain = setup.house.machine.create_domain("hvm", DomainKind::Hvm);
    let domain = domain.unwrap();
    setup.house.attach(domain, NVME).unwrap();
    until("it is assigned", || {
        setup.house.phase(NVME) == Some(Phase::Assigned)
    });
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
}

#[test]
fn what_is_done_to_a_stub_domain_is_done_to_its_guest() {
    let setup = Setup::new(&[NVME], "");
    let house = &setup.house;
    let (guest, stub) = with_stub_domain(house);
    setup.report(NonFatal);
    setup.until_detached(guest, NVME);
    assert!(!setup.detached(stub, NVME).exists());
}

/// An HVM guest, and its stub domain, which has the device on its behalf.
fn with_stub_domain(house: &House) -> (DomId, DomId) {
    let guest = house.machine.create_domain("hvm", DomainKind::Hvm).unwrap();
    let stub = house.machine.create_domain("stub", DomainKind::Pv).unwrap();
    let mut store = house.store();
    let target = format!("/local/domain/{stub}/target");
    store.write(&target, guest.to_string()).unwrap();
    let device_model = format!("/local/domain/{guest}/image/device-model-domid");
    store.write(&device_model, stub.to_string()).unwrap();
    house.attach(stub, NVME).unwrap();
    house.until_node(stub, "state-0", "3");
    (guest, stub)
}

#[test]
fn a_guest_that_has_stopped_while_its_stub_domain_runs_is_left_to_the_toolstack() {
    let setup = Setup::new(&[NVME], "on_failure = \"kill\"");
    let (guest, _) = with_stub_domain(&setup.house);
    setup.house.machine.domain_shut_down(guest).unwrap();
    setup.report(NonFatal);
    until("its error is seen", || {
        matches!(setup.recovery(NVME).state, State::Failed(_))
    });
    thread::sleep(Duration::from_millis(100));
    assert!(setup.is_untouched());
}

#[test]
fn the_policy_may_be_to_destroy_the_guest() {
    let (setup, domain, mut frontend) = working("on_failure = \"kill\"");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::Disconnect).unwrap();
    let file = setup.traces.path().join(format!("kill-{domain}"));
    until("the policy's command has run", || file.exists());
    assert!(!setup.detached(domain, NVME).exists());
}

#[test]
fn the_policy_may_be_to_do_nothing() {
    let (setup, _, mut frontend) = working("on_failure = \"ignore\"");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::Disconnect).unwrap();
    let ignored = Outcome::Ignored(Failure::GivenUp);
    until("it is ignored", || setup.recovery(NVME).outcome == ignored);
    // The next error is another matter.
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    reset_and_resume(&setup, &mut frontend);
    assert!(setup.is_untouched());
}

#[test]
fn a_policy_that_is_set_at_run_time_is_the_one_that_is_carried_out() {
    let (setup, _, mut frontend) = working("on_failure = \"kill\"");
    let request = Request::Set {
        device: NVME.to_string(),
        assignments: vec!["aer.on_failure=ignore".into()],
    };
    let Response::Settings(shown) = setup.house.ask(&request) else {
        panic!("not set");
    };
    let aer = shown.settings.last().unwrap();
    assert_eq!(aer.from, "set at run time");
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    frontend.answer_aer(AerResult::Disconnect).unwrap();
    let ignored = Outcome::Ignored(Failure::GivenUp);
    until("it is ignored", || setup.recovery(NVME).outcome == ignored);
    assert!(setup.is_untouched());
}

#[test]
fn a_device_with_errors_without_end_is_given_up() {
    let (setup, domain, mut frontend) = working("");
    let mut recovered = 0;
    while !setup.detached(domain, NVME).exists() {
        setup.report(NonFatal);
        for answer in [AerResult::CanRecover, AerResult::None] {
            if frontend
                .next_aer(Duration::from_millis(100))
                .unwrap()
                .is_some()
            {
                frontend.answer_aer(answer).unwrap();
                recovered += 1;
            }
        }
        assert!(recovered < 100);
    }
    setup.until_failed(NVME, Failure::TooOften);
    assert!(recovered >= 10, "{recovered}");
}

#[test]
fn a_policy_that_was_not_carried_out_is_after_a_restart() {
    let (setup, domain, _frontend) = working("timeout = 1");
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
    fs::remove_file(setup.detached(domain, NVME)).unwrap();
    setup.house.restart();
    setup.until_detached(domain, NVME);
}

#[test]
fn a_guest_that_answers_without_being_asked_is_not_heard() {
    let (setup, _, mut frontend) = working("");
    let handler = Flags::AER_HANDLER.bits();
    let active = handler | Flags::AER_ACTIVE.bits();
    for round in 0..500u32 {
        frontend.scribble_word(FLAGS, active).unwrap();
        frontend.scribble_word(AER_ERROR, round % 8).unwrap();
        frontend.scribble_word(FLAGS, handler).unwrap();
        frontend.flood(1).unwrap();
    }
    assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
    assert_eq!(setup.recovery(NVME), Recovery::default());
    // And when it is asked, it is heard.
    setup.report(NonFatal);
    expect(&mut frontend, Detected, ChannelState::Normal);
    reset_and_resume(&setup, &mut frontend);
}

#[test]
fn a_guest_that_plays_with_the_flag_while_it_is_asked_harms_itself_alone() {
    let setup = Setup::new(&[NVME, INTX_ONLY], "timeout = 1");
    let (bad_domain, mut bad) = setup.house.boot(&[NVME]);
    let (_, mut good) = setup.house.boot(&[INTX_ONLY]);
    setup.report(NonFatal);
    expect(&mut bad, Detected, ChannelState::Normal);
    let done = setup.detached(bad_domain, NVME);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0u32.. {
                if done.exists() {
                    break;
                }
                bad.scribble_word(FLAGS, (round % 8) & !1).unwrap();
                bad.flood(1).unwrap();
            }
        });
        while !done.exists() {
            assert!(good.conf_read(FIRST, 0, 4).is_ok());
        }
    });
    assert_eq!(setup.recovery(INTX_ONLY), Recovery::default());
}

#[test]
fn a_guest_that_has_stopped_is_left_to_the_toolstack() {
    for policy in ["detach", "kill"] {
        let (setup, domain, frontend) = working(&format!("on_failure = \"{policy}\""));
        drop(frontend);
        setup.house.machine.domain_shut_down(domain).unwrap();
        until("its page is given back", || {
            setup.house.machine.mapped_grants(domain) == 0
        });
        // It may be about to be started anew, which destroying it would prevent.
        setup.report(NonFatal);
        until("its error is seen", || {
            matches!(setup.recovery(NVME).state, State::Failed(_))
        });
        thread::sleep(Duration::from_millis(100));
        assert!(setup.is_untouched());
    }
}
