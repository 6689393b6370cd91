//! Recovery of a guest's devices from errors (PCI Express Advanced Error Reporting).
//!
//! | module | holds |
//! |---|---|
//! | this one | what a session does: asks its guest, has devices reset, restores them |
//! | [`recovery`] | the course of a recovery, as a state machine |
//!
//! The session's thread never waits here: a guest that recovers accesses the configuration space meanwhile, which the same thread serves.

pub mod recovery;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use log::{error, info, warn};
use xenbus::pciif::{AerCommand, AerResult};

use self::recovery::{Action, Failure, Recovery, State};
use super::Session;
use super::exports::Export;
use super::link::Link;
use crate::config::{Commands, OnFailure};
use crate::host::devices::for_xen;
use crate::rate_limit::RateLimit;

/// Recoveries of one device in a row, and how soon there may be another: a guest can make its device report errors without end.
const IN_A_ROW: u32 = 5;
const ANOTHER_AFTER: Duration = Duration::from_secs(120);

/// What this process knows of a device's recovery, beyond what is written down.
#[derive(Debug)]
pub struct Work {
    background: Option<Arc<Progress>>,
    /// The guest was asked by this process, and is to have answered by then.
    deadline: Option<Instant>,
    limit: RateLimit,
    /// This process has begun to do what the policy says about the failure.
    policy_begun: bool,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            background: None,
            deadline: None,
            limit: RateLimit::new(IN_A_ROW, ANOTHER_AFTER),
            policy_begun: false,
        }
    }
}

/// How something is getting on that was begun in the background.
#[derive(Debug, Default)]
struct Progress(AtomicU8);

impl Progress {
    const UNDER_WAY: u8 = 0;
    const WORKS: u8 = 1;
    const FAILED: u8 = 2;

    fn finish(&self, works: bool) {
        let result = if works { Self::WORKS } else { Self::FAILED };
        self.0.store(result, Ordering::Release);
    }

    fn result(self: &Arc<Self>) -> Option<bool> {
        // Looked at before the result, which whoever is at it leaves behind.
        let nobody_is_at_it = Arc::strong_count(self) == 1;
        fence(Ordering::Acquire);
        match self.0.load(Ordering::Acquire) {
            // No thread could be started.
            Self::UNDER_WAY if nobody_is_at_it => Some(false),
            Self::UNDER_WAY => None,
            result => Some(result == Self::WORKS),
        }
    }
}

impl Export {
    /// How its recovery is going.
    pub fn recovery(&self) -> Recovery {
        Recovery::from_bits(self.device.record.errors().recovery())
    }

    fn keep(&self, recovery: Recovery) {
        self.device.record.errors().set_recovery(recovery.to_bits());
    }

    /// Whether there is nothing to do: nothing to recover from, nothing more than the policy does, or nobody to do it for.
    fn is_quiet(&self) -> bool {
        let recovery = self.recovery();
        let policy_begun =
            matches!(recovery.state, State::Failed(_)) && self.recovery_work.policy_begun;
        let nothing_new = self.device.record.errors().reported().is_none();
        self.is_revoked() || nothing_new && (recovery.is_quiet() || policy_begun)
    }

    /// Whether its guest has been asked about it, and is to answer.
    fn is_asked(&self) -> bool {
        !self.is_revoked() && matches!(self.recovery().state, State::Asked(_))
    }
}

impl Session {
    /// Takes the recovery of every device as far as it goes without waiting. Returns when to come back, if nothing happens before.
    pub(super) fn recover(&mut self) -> Option<Instant> {
        self.withdraw_orphan();
        if self.exports.iter().all(Export::is_quiet) {
            return None;
        }
        // The end of one step may be what another device waits for: there is one slot for all of them in the guest's page.
        while (0..self.exports.len()).any(|index| self.advance(index)) {}
        self.exports
            .iter()
            .filter_map(|export| export.recovery_work.deadline)
            .min()
    }

    /// When a connection is taken up: the page may ask about a device that has left the guest while no daemon ran.
    pub(super) fn withdraw_stale(&self, link: &mut Link) {
        let Some(asked) = link.pending_aer() else {
            return;
        };
        let about = (asked.domain, asked.bus, asked.devfn);
        let waits_for_it = |export: &Export| {
            let at = export.seen_as;
            let under_way = matches!(export.recovery().state, State::Asking(_) | State::Asked(_));
            under_way && (at.segment().into(), at.bus().into(), at.devfn().into()) == about
        };
        if !self.exports.iter().any(waits_for_it) {
            link.withdraw_aer();
        }
    }

    /// A device that has left its guest takes with it what the guest was asked about it: the answer would pass for another device's.
    fn withdraw_orphan(&mut self) {
        if let Some(link) = &mut self.link
            && link.aer_asked()
            && !self.exports.iter().any(Export::is_asked)
        {
            link.withdraw_aer();
        }
    }

    /// One step of the device of that index. False when it cannot get further now.
    fn advance(&mut self, index: usize) -> bool {
        let domain = self.setup.domain;
        let slot_is_free = !self.exports.iter().any(Export::is_asked);
        let Some(export) = self
            .exports
            .get_mut(index)
            .filter(|export| !export.is_quiet())
        else {
            return false;
        };
        let bdf = export.device.bdf;
        let policy = self.setup.devices.settings(&export.device).aer;
        let mut recovery = export.recovery();
        if let Some(severity) = export.device.record.errors().reported() {
            recovery.report(severity);
            export.keep(recovery);
            export.device.record.errors().take(severity);
        }
        let before = recovery;
        let mut action = match recovery.state {
            State::Quiet => Action::Wait,
            State::Settling | State::Resetting => in_background(export, &mut recovery),
            State::Asking(_) if !can_be_asked(self.link.as_ref()) => {
                recovery.fail(Failure::NobodyToAsk)
            }
            State::Asking(_) => {
                if slot_is_free && let Some(link) = &mut self.link {
                    ask(export, &mut recovery, link);
                    export.recovery_work.deadline = Instant::now().checked_add(policy.timeout);
                }
                Action::Wait
            }
            State::Asked(step) => {
                let answer = take_answer(export, self.link.as_mut(), policy.timeout);
                match answer {
                    Answer::Outstanding => Action::Wait,
                    Answer::Given(answer) => recovery.answered(answer, policy.mmio_enabled),
                    Answer::Overdue => {
                        if self.log_limit.allow() {
                            warn!("domain {domain}: {bdf}: no answer to {}", name(step));
                        }
                        recovery.fail(Failure::NoAnswer)
                    }
                    Answer::Lost => {
                        recovery.abandon();
                        Action::Wait
                    }
                }
            }
            State::Failed(failure) if !export.recovery_work.policy_begun => Action::Fail(failure),
            State::Failed(_) => Action::Wait,
        };
        if action == Action::Wait && recovery == before {
            let limit = &mut export.recovery_work.limit;
            action = recovery.begin(|| limit.allow());
            // Recoveries are limited themselves: nothing else that the guest makes us say is to keep one from being told.
            let is_limited = !matches!(action, Action::Fail(_));
            if recovery != before && (is_limited || self.log_limit.allow()) {
                warn!("domain {domain}: {bdf} has reported an error");
            }
        }
        if action == Action::Restore {
            // First, as it is done again if it is not written down.
            export.restore(Duration::ZERO);
            export.device.clear_errors();
        }
        export.keep(recovery);
        self.act(index, action, policy.on_failure);
        let after = self.exports.get_mut(index).map(|export| export.recovery());
        after.is_some_and(|after| after != before)
    }

    fn act(&mut self, index: usize, action: Action, on_failure: OnFailure) {
        let domain = self.setup.domain;
        // The toolstack deals with that as the guest's configuration says: to reboot it, for one, which 'kill' would prevent.
        if matches!(action, Action::Fail(_)) && self.guest_has_stopped() {
            return;
        }
        let Some(export) = self.exports.get_mut(index) else {
            return;
        };
        let bdf = export.device.bdf;
        match action {
            Action::Wait | Action::Restore => {}
            Action::Clear => export.device.clear_errors(),
            Action::Settle | Action::Reset => {
                let progress = Arc::new(Progress::default());
                let done = {
                    let progress = Arc::clone(&progress);
                    move |works| progress.finish(works)
                };
                export.recovery_work.background = Some(progress);
                let (devices, device) = (&self.setup.devices, &export.device);
                if action == Action::Settle {
                    devices.await_link_reset(device, domain, export.command(), done);
                } else {
                    devices.reset_for_guest(device, domain, done);
                }
            }
            Action::Done => {
                export.device.clear_errors();
                info!("domain {domain}: {bdf} has recovered from its error");
            }
            Action::Fail(failure) => {
                let reason = failure.reason();
                let what = match on_failure {
                    OnFailure::Ignore => {
                        let mut recovery = export.recovery();
                        recovery.ignore();
                        export.keep(recovery);
                        "nothing is done about it, as configured"
                    }
                    OnFailure::Detach => "it is taken from the guest",
                    OnFailure::Kill => "the guest is destroyed",
                };
                // A guest can bring about any number of those that are ignored. Of the others there is one, which is not to be missed.
                if on_failure != OnFailure::Ignore || self.log_limit.allow() {
                    error!("domain {domain}: {bdf} does not recover: {reason}; {what}");
                }
                export.recovery_work.policy_begun = on_failure != OnFailure::Ignore;
                self.carry_out(on_failure, bdf);
            }
        }
    }

    /// Whether the guest that has the devices, be it by its stub domain, has shut down or crashed, or is being destroyed.
    fn guest_has_stopped(&self) -> bool {
        let asked = self.setup.xen.domain_info(self.exports.guest());
        // Not being able to ask is no reason to let the policy be.
        asked.is_ok_and(|info| info.is_none_or(|info| info.gone))
    }

    /// The frontend has gone, and with it whatever it was asked.
    pub(super) fn abandon_recoveries(&mut self) {
        for export in self.exports.iter_mut() {
            let mut recovery = export.recovery();
            recovery.abandon();
            export.keep(recovery);
            export.recovery_work.deadline = None;
        }
    }

    /// Does what is configured for a device that does not recover.
    fn carry_out(&self, on_failure: OnFailure, device: Bdf) {
        let config = self.setup.devices.config().get();
        let commands = &config.commands;
        let command = match on_failure {
            OnFailure::Detach => &commands.detach,
            OnFailure::Kill => &commands.kill,
            OnFailure::Ignore => return,
        };
        let domain = self.exports.guest();
        crate::command::in_background(Commands::fill(command, domain, device), domain, device);
    }
}

/// Looks after what was begun in the background; by an earlier daemon, if this one knows nothing of it.
fn in_background(export: &mut Export, recovery: &mut Recovery) -> Action {
    let settling = recovery.state == State::Settling;
    let Some(progress) = &export.recovery_work.background else {
        return if settling {
            Action::Settle
        } else {
            Action::Reset
        };
    };
    let Some(works) = progress.result() else {
        return Action::Wait;
    };
    export.recovery_work.background = None;
    if settling {
        recovery.settled(works)
    } else {
        recovery.was_reset(works)
    }
}

fn can_be_asked(link: Option<&Link>) -> bool {
    link.is_some_and(Link::handles_aer)
}

fn ask(export: &Export, recovery: &mut Recovery, link: &mut Link) {
    let Some((step, state)) = recovery.to_ask() else {
        return;
    };
    if let Err(error) = link.ask_aer(step, state, for_xen(export.seen_as)) {
        warn!(
            "{}: its guest may not see {}: {error}",
            export.device.bdf,
            name(step)
        );
    }
    recovery.asked();
}

enum Answer {
    Outstanding,
    Given(AerResult),
    Overdue,
    /// Whoever was asked is gone.
    Lost,
}

fn take_answer(export: &mut Export, link: Option<&mut Link>, timeout: Duration) -> Answer {
    let Some(link) = link else {
        return Answer::Lost;
    };
    let deadline = &mut export.recovery_work.deadline;
    if deadline.is_none() {
        // Asked by an earlier daemon; the answer may be there.
        *deadline = Instant::now().checked_add(timeout);
        if let Err(error) = link.resume_aer() {
            warn!("{}: {error}", export.device.bdf);
        }
    }
    if let Some(answer) = link.take_aer_answer() {
        *deadline = None;
        return Answer::Given(answer);
    }
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        *deadline = None;
        link.withdraw_aer();
        return Answer::Overdue;
    }
    Answer::Outstanding
}

fn name(step: AerCommand) -> &'static str {
    match step {
        AerCommand::Detected => "the report of the error",
        AerCommand::MmioEnabled => "the news that registers can be accessed",
        AerCommand::SlotReset => "the news of the reset",
        AerCommand::Resume => "the request to resume",
    }
}
