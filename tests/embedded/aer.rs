//! Errors that devices report, and guests that recover from them, or do not.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use conf_space::registers::error_reporting;
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::control::protocol::{DeviceErrors, Request, Response};
use pcibackd::host::errors::Severity::{self, Fatal, NonFatal};
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{INTX_ONLY, NIC, NIC_VF0, NVME};
use pcibackd::session::aer::recovery::{Failure, Outcome, Recovery, State};
use tempfile::TempDir;
use xenbus::pciif::AerCommand::{self, Detected, MmioEnabled, Resume, SlotReset};
use xenbus::pciif::{AerResult, ChannelState, Flags};
use xenbus::sim::{AerRequest, DomainKind, Frontend, MachineOptions, Variant};
use xenbus::{DomId, PciDevice, XenbusState};

use crate::house::{House, LONG, at, until};

const FIRST: PciDevice = at(0, 0);
/// Where the page holds the flags and the result of a step (pciif.h).
const FLAGS: usize = 0;
const AER_ERROR: usize = 556;

/// A house whose policy leaves files behind instead of running xl.
struct Setup {
    house: House,
    traces: TempDir,
}

impl Setup {
    fn new(hidden: &[Bdf], aer: &str) -> Self {
        let traces = tempfile::tempdir().unwrap();
        let path = traces.path().display();
        let file = traces.path().join("pcibackd.toml");
        let text = format!(
            "[defaults]\naer = {{ {aer} }}\n[commands]\ndetach = [\"touch\", \"{path}/detach-{{domain}}-{{device}}\"]\n\
             kill = [\"touch\", \"{path}/kill-{{domain}}\"]\n"
        );
        fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file)).unwrap();
        let options = MachineOptions {
            toolstack_timeout: Duration::from_secs(8),
            ..MachineOptions::default()
        };
        let house = House::with(config, options, hidden);
        Self { house, traces }
    }

    fn detached(&self, domain: DomId, bdf: Bdf) -> PathBuf {
        self.traces.path().join(format!("detach-{domain}-{bdf}"))
    }

    fn until_detached(&self, domain: DomId, bdf: Bdf) {
        let file = self.detached(domain, bdf);
        until("the policy's command has run", || file.exists());
    }

    /// No command has run.
    fn is_untouched(&self) -> bool {
        let only = |path: &Path| path.file_name().unwrap() == "pcibackd.toml";
        let mut files = fs::read_dir(self.traces.path()).unwrap();
        files.all(|file| only(&file.unwrap().path()))
    }

    fn report(&self, severity: Severity) {
        self.house.bus.report_error(NVME, severity);
    }

    fn recovery(&self, bdf: Bdf) -> Recovery {
        Recovery::from_bits(self.house.record(bdf).errors().recovery())
    }

    fn until_recovered(&self, bdf: Bdf) {
        until("it has recovered", || {
            let recovery = self.recovery(bdf);
            recovery.is_quiet() && recovery.outcome == Outcome::Recovered
        });
    }

    fn until_failed(&self, bdf: Bdf, failure: Failure) {
        until(format!("{failure:?}"), || {
            self.recovery(bdf).state == State::Failed(failure)
        });
    }

    fn logged_errors(&self) -> u32 {
        let register = &error_reporting::UNCORRECTABLE_STATUS;
        let config = self.house.config(NVME);
        config.read(0x100 + register.offset, Width::Four).unwrap()
    }
}

/// With a guest whose NVMe drive is at work.
fn working(aer: &str) -> (Setup, DomId, Frontend) {
    let setup = Setup::new(&[NVME], aer);
    let (domain, mut frontend) = setup.house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    (setup, domain, frontend)
}

#[track_caller]
fn expect(frontend: &mut Frontend, command: AerCommand, state: ChannelState) {
    let request = frontend.next_aer(LONG).unwrap();
    let expected = AerRequest {
        command: Some(command),
        state: state as i32,
        function: FIRST,
    };
    assert_eq!(request, Some(expected));
}

#[track_caller]
fn takes_interrupts(setup: &Setup, frontend: &Frontend) {
    for vector in [0, 1] {
        assert!(setup.house.bus.raise_interrupt(NVME, vector));
        assert!(
            frontend
                .wait_for_interrupt(FIRST, vector.into(), LONG)
                .unwrap()
        );
    }
}

fn reset_and_resume(setup: &Setup, frontend: &mut Frontend) {
    frontend.answer_aer(AerResult::NeedReset).unwrap();
    expect(frontend, SlotReset, ChannelState::Normal);
    takes_interrupts(setup, frontend);
    frontend.answer_aer(AerResult::Recovered).unwrap();
    expect(frontend, Resume, ChannelState::Normal);
    frontend.answer_aer(AerResult::None).unwrap();
    setup.until_recovered(NVME);
}

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
    setup.report(Fatal);
    until("it is as before", || {
        setup.house.phase(NVME) == Some(Phase::Hidden) && read() == before
    });
    let (_, mut frontend) = setup.house.boot(&[NVME]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_msix(FIRST, &[0, 1]).unwrap();
    takes_interrupts(&setup, &frontend);
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
fn a_frontend_that_answers_nothing_does_not_keep_its_failed_device() {
    let (setup, domain, _frontend) = working("timeout = 1");
    setup.report(NonFatal);
    setup.until_detached(domain, NVME);
    // What `xl pci-detach` does; the frontend never answers.
    setup.house.detach(domain, NVME).unwrap();
    setup.house.until_free(NVME);
    let (_, frontend) = setup.house.boot(&[NVME]);
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
    setup.house.until_node(domain, "state", "6");
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
