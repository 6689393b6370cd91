//! What each answer and each error leads to.

use AerCommand::{Detected, MmioEnabled, Resume, SlotReset};

use super::*;

const ANSWERS: [AerResult; 6] = [
    AerResult::None,
    AerResult::CanRecover,
    AerResult::NeedReset,
    AerResult::Disconnect,
    AerResult::Recovered,
    AerResult::NoDriver,
];
const STEPS: [AerCommand; 4] = [Detected, MmioEnabled, SlotReset, Resume];

fn begun(severity: Severity) -> Recovery {
    let mut recovery = Recovery::default();
    recovery.report(severity);
    recovery.begin(|| true);
    recovery
}

fn asked(step: AerCommand) -> Recovery {
    Recovery {
        state: State::Asked(step),
        severity: Some(Severity::NonFatal),
        ..Recovery::default()
    }
}

#[test]
fn what_each_answer_to_each_step_leads_to() {
    for step in STEPS {
        for answer in ANSWERS {
            for tell_mmio in [false, true] {
                let mut recovery = asked(step);
                let action = recovery.answered(answer, tell_mmio);
                let expected = match (step, answer) {
                    (Detected, AerResult::CanRecover) if tell_mmio => State::Asking(MmioEnabled),
                    (Detected, AerResult::CanRecover) => State::Asking(Resume),
                    (Detected | MmioEnabled | SlotReset, AerResult::Recovered) => {
                        State::Asking(Resume)
                    }
                    (Detected | MmioEnabled, AerResult::NeedReset) => State::Resetting,
                    (Resume, _) => State::Quiet,
                    _ => State::Failed(Failure::GivenUp),
                };
                assert_eq!(recovery.state, expected, "{step:?} {answer:?}");
                assert_eq!(action == Action::Done, step == Resume);
                assert_eq!(
                    matches!(action, Action::Fail(_)),
                    matches!(expected, State::Failed(_))
                );
            }
        }
    }
}

#[test]
fn only_the_report_of_a_fatal_error_says_that_the_way_is_frozen() {
    let mut fatal = begun(Severity::Fatal);
    assert_eq!(fatal.state, State::Settling);
    assert_eq!(fatal.settled(true), Action::Restore);
    assert_eq!(fatal.to_ask(), Some((Detected, ChannelState::Frozen)));
    fatal.asked();
    fatal.answered(AerResult::NeedReset, false);
    assert_eq!(fatal.was_reset(true), Action::Restore);
    assert_eq!(fatal.to_ask(), Some((SlotReset, ChannelState::Normal)));
    let non_fatal = begun(Severity::NonFatal);
    assert_eq!(non_fatal.to_ask(), Some((Detected, ChannelState::Normal)));
}

#[test]
fn whatever_a_guest_answers_it_is_asked_four_times_at_most() {
    for choice in 0..ANSWERS.len().pow(4) {
        let mut recovery = begun(Severity::NonFatal);
        let mut steps = 0;
        while recovery.to_ask().is_some() {
            recovery.asked();
            let answer = ANSWERS[choice / ANSWERS.len().pow(steps) % ANSWERS.len()];
            if recovery.answered(answer, true) == Action::Reset {
                recovery.was_reset(true);
            }
            steps += 1;
            assert!(steps <= 4);
        }
        assert!(matches!(recovery.state, State::Quiet | State::Failed(_)));
    }
}

#[test]
fn a_fatal_error_goes_before_and_a_non_fatal_one_waits() {
    let mut recovery = begun(Severity::NonFatal);
    recovery.report(Severity::NonFatal);
    assert_eq!(recovery.begin(|| true), Action::Wait);
    recovery.report(Severity::Fatal);
    assert_eq!(recovery.begin(|| true), Action::Settle);
    // While it is being asked for, an answer is waited for.
    let mut recovery = asked(Detected);
    recovery.report(Severity::Fatal);
    assert_eq!(recovery.begin(|| true), Action::Wait);
    recovery.answered(AerResult::Disconnect, false);
    assert_eq!(recovery.begin(|| true), Action::Settle);
}

#[test]
fn what_a_device_complained_of_before_its_reset_is_over_with_it() {
    let mut recovery = begun(Severity::Fatal);
    recovery.report(Severity::NonFatal);
    recovery.settled(true);
    for _ in 0..2 {
        recovery.asked();
        recovery.answered(AerResult::Recovered, false);
    }
    assert!(recovery.is_quiet());
    let mut recovery = begun(Severity::Fatal);
    recovery.report(Severity::Fatal);
    recovery.settled(true);
    assert_eq!(recovery.begin(|| true), Action::Settle);
}

#[test]
fn a_frontend_that_goes_ends_the_asking_but_not_the_restoring() {
    for step in STEPS {
        let mut recovery = asked(step);
        recovery.abandon();
        assert!(recovery.is_quiet());
    }
    let mut recovery = asked(Detected);
    recovery.answered(AerResult::NeedReset, false);
    recovery.abandon();
    assert_eq!(recovery.settled(true), Action::Restore);
    assert!(recovery.is_quiet());
    assert_eq!(recovery.outcome, Outcome::Abandoned);
}

#[test]
fn a_failure_stays_until_it_is_ignored() {
    let mut recovery = begun(Severity::NonFatal);
    recovery.fail(Failure::NoAnswer);
    recovery.report(Severity::Fatal);
    assert_eq!(recovery.begin(|| true), Action::Wait);
    recovery.abandon();
    assert_eq!(recovery.state, State::Failed(Failure::NoAnswer));
    recovery.ignore();
    assert_eq!(recovery.outcome, Outcome::Ignored(Failure::NoAnswer));
    assert!(recovery.is_quiet());
}

#[test]
fn all_of_it_is_kept_in_a_number() {
    let severities = [None, Some(Severity::NonFatal), Some(Severity::Fatal)];
    let mut states = vec![State::Quiet, State::Settling, State::Resetting];
    states.extend(STEPS.map(State::Asking));
    states.extend(STEPS.map(State::Asked));
    states.extend(Failure::ALL.map(State::Failed));
    let mut outcomes = vec![Outcome::None, Outcome::Recovered, Outcome::Abandoned];
    outcomes.extend(Failure::ALL.map(Outcome::Ignored));
    for state in states {
        for severity in severities {
            for pending in severities {
                for outcome in &outcomes {
                    let recovery = Recovery {
                        state,
                        severity,
                        pending,
                        outcome: *outcome,
                    };
                    assert_eq!(Recovery::from_bits(recovery.to_bits()), recovery);
                }
            }
        }
    }
    assert_eq!(Recovery::from_bits(0), Recovery::default());
    assert!(Recovery::from_bits(u32::MAX).is_quiet());
}
