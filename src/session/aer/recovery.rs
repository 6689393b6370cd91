//! The course of recovery of one device, as a state machine. Pure.
//!
//! The steps and what a driver's answers mean are those of Linux (`Documentation/PCI/pci-error-recovery.rst`), which every frontend's
//! drivers are written for:
//!
//! ```text
//! non-fatal ------------------------+
//! fatal -> the kernel resets        v
//!          the link, settled -> detected --- can recover --> (MMIO enabled) --+
//!                                   |                              |         v
//!                                   +-- needs a reset --> reset <--+      resume -> done
//!                                                           v                ^
//!                                                       slot reset ----------+
//! ```
//!
//! Everything that a restarted daemon needs is in the number that [`Recovery::to_bits`] makes, which is written down after each step.

use xenbus::pciif::{AerCommand, AerResult, ChannelState};

use crate::host::errors::Severity;

/// Where the recovery of a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is nothing to recover from.
    Quiet,
    /// The kernel is resetting the link. The device's configuration is to be restored afterwards.
    Settling,
    /// The guest is to be asked to take this step as soon as its page is free.
    Asking(AerCommand),
    /// The guest has been asked.
    Asked(AerCommand),
    /// The device is being reset because the guest's driver wants it.
    Resetting,
    /// It failed, and the policy takes its course. The end, until the device has left its guest.
    Failed(Failure),
}

/// Why a recovery failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The guest did not answer in time.
    NoAnswer,
    /// Its driver cannot recover the device, or there is none, or the answer made no sense.
    GivenUp,
    /// The guest cannot be asked: its frontend is not connected, or does not handle errors.
    NobodyToAsk,
    /// The device does not work after its reset.
    NotBack,
    /// It had too many errors in a short time.
    TooOften,
}

impl Failure {
    const ALL: [Self; 5] = [
        Self::NoAnswer,
        Self::GivenUp,
        Self::NobodyToAsk,
        Self::NotBack,
        Self::TooOften,
    ];

    /// In an operator's words.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NoAnswer => "its guest did not answer in time",
            Self::GivenUp => "its guest's driver gave it up, or there is none",
            Self::NobodyToAsk => "its guest has no frontend that handles errors",
            Self::NotBack => "it did not come back from its reset",
            Self::TooOften => "it had too many errors in a short time",
        }
    }
}

/// How the last recovery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// There was none.
    None,
    /// The guest uses the device again.
    Recovered,
    /// It failed, and the policy says that nothing is done about that.
    Ignored(Failure),
    /// The frontend went away meanwhile, so that there was nothing to recover any more.
    Abandoned,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing, until something happens.
    Wait,
    /// Clear the device's error registers.
    Clear,
    /// Wait in the background until the kernel has reset the link.
    Settle,
    /// Restore the device's configuration and interrupts.
    Restore,
    /// Reset the device in the background.
    Reset,
    /// Tell that it works again.
    Done,
    /// Do as the policy says.
    Fail(Failure),
}

/// One device's recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    /// Where it is.
    pub state: State,
    /// The error that is being recovered from; none when the frontend has gone meanwhile.
    severity: Option<Severity>,
    /// A further one, reported meanwhile: its turn comes.
    pending: Option<Severity>,
    /// How the one before ended.
    pub outcome: Outcome,
}

impl Default for Recovery {
    fn default() -> Self {
        Self {
            state: State::Quiet,
            severity: None,
            pending: None,
            outcome: Outcome::None,
        }
    }
}

impl Recovery {
    /// Whether there is nothing to recover from.
    pub fn is_quiet(&self) -> bool {
        self.state == State::Quiet && self.pending.is_none()
    }

    /// An error was reported. It is taken up by [`Recovery::begin`].
    pub fn report(&mut self, severity: Severity) {
        if !matches!(self.state, State::Failed(_)) {
            self.pending = self.pending.max(Some(severity));
        }
    }

    /// Takes up what was reported, if now is the time. A fatal error interrupts a recovery wherever it is, except that an answer that is
    /// due is waited for; a non-fatal one waits for the end.
    /// `allowed`: whether the device has not had too many of them.
    pub fn begin(&mut self, allowed: impl FnOnce() -> bool) -> Action {
        let Some(severity) = self.pending else {
            return Action::Wait;
        };
        let now = match self.state {
            State::Quiet => true,
            State::Asking(_) => severity == Severity::Fatal,
            State::Settling | State::Asked(_) | State::Resetting | State::Failed(_) => false,
        };
        if !now {
            return Action::Wait;
        }
        self.pending = None;
        self.severity = Some(severity);
        match severity {
            _ if !allowed() => self.fail(Failure::TooOften),
            Severity::Fatal => {
                self.state = State::Settling;
                Action::Settle
            }
            Severity::NonFatal => {
                self.state = State::Asking(AerCommand::Detected);
                Action::Clear
            }
        }
    }

    /// The kernel has reset the link and is done with it; `works`: the device answers again.
    pub fn settled(&mut self, works: bool) -> Action {
        if self.state != State::Settling {
            return Action::Wait;
        }
        self.after_reset(works, AerCommand::Detected)
    }

    /// The reset that the guest's driver wanted is done.
    pub fn was_reset(&mut self, works: bool) -> Action {
        if self.state != State::Resetting {
            return Action::Wait;
        }
        self.after_reset(works, AerCommand::SlotReset)
    }

    fn after_reset(&mut self, works: bool, next: AerCommand) -> Action {
        if !works {
            return self.fail(Failure::NotBack);
        }
        // What the device complained of on the way is over.
        if self.pending == Some(Severity::NonFatal) {
            self.pending = None;
        }
        if self.severity.is_some() {
            self.state = State::Asking(next);
        } else {
            self.quiet(Outcome::Abandoned);
        }
        Action::Restore
    }

    /// The step that the guest is to be asked to take, and the state of the way to the device.
    pub fn to_ask(&self) -> Option<(AerCommand, ChannelState)> {
        let State::Asking(step) = self.state else {
            return None;
        };
        let state = match (step, self.severity) {
            (AerCommand::Detected, Some(Severity::Fatal)) => ChannelState::Frozen,
            _ => ChannelState::Normal,
        };
        Some((step, state))
    }

    /// The guest has been asked.
    pub fn asked(&mut self) {
        if let State::Asking(step) = self.state {
            self.state = State::Asked(step);
        }
    }

    /// The guest has answered. `tell_mmio`: drivers are told that registers can be accessed again, if they recover without a reset.
    pub fn answered(&mut self, answer: AerResult, tell_mmio: bool) -> Action {
        let State::Asked(step) = self.state else {
            return Action::Wait;
        };
        if self.pending == Some(Severity::Fatal) {
            // The answer is about a device that has been reset since.
            self.state = State::Quiet;
            return Action::Wait;
        }
        use AerCommand::{Detected, MmioEnabled, Resume, SlotReset};
        let next = match (step, answer) {
            (Detected, AerResult::CanRecover) if tell_mmio => MmioEnabled,
            (Detected, AerResult::CanRecover | AerResult::Recovered)
            | (MmioEnabled | SlotReset, AerResult::Recovered) => Resume,
            (Detected | MmioEnabled, AerResult::NeedReset) => {
                self.state = State::Resetting;
                return Action::Reset;
            }
            // Frontends answer nothing of meaning.
            (Resume, _) => {
                self.quiet(Outcome::Recovered);
                return Action::Done;
            }
            _ => return self.fail(Failure::GivenUp),
        };
        self.state = State::Asking(next);
        Action::Wait
    }

    /// It comes to nothing.
    pub fn fail(&mut self, failure: Failure) -> Action {
        self.state = State::Failed(failure);
        self.pending = None;
        Action::Fail(failure)
    }

    /// Nothing is done about a failure: the next error begins anew.
    pub fn ignore(&mut self) {
        if let State::Failed(failure) = self.state {
            self.quiet(Outcome::Ignored(failure));
        }
    }

    fn quiet(&mut self, outcome: Outcome) {
        *self = Self {
            pending: self.pending,
            outcome,
            ..Self::default()
        };
    }

    /// The frontend has gone: whoever comes next starts with the device from the beginning, and is not asked. A reset that is under way is
    /// waited for, and the device restored.
    pub fn abandon(&mut self) {
        match self.state {
            State::Asking(_) | State::Asked(_) => self.quiet(Outcome::Abandoned),
            State::Settling | State::Resetting => {
                (self.state, self.severity) = (State::Settling, None);
            }
            State::Quiet | State::Failed(_) => {}
        }
    }

    /// In an operator's words; `None` when there never was one.
    pub fn describe(self) -> Option<String> {
        Some(match (self.state, self.outcome) {
            (State::Quiet, Outcome::None) => return None,
            (State::Quiet, Outcome::Recovered) => "recovered".to_owned(),
            (State::Quiet, Outcome::Ignored(failure)) => {
                format!("not recovered ({}), which is ignored", failure.reason())
            }
            (State::Quiet, Outcome::Abandoned) => {
                "its guest's frontend went away meanwhile".to_owned()
            }
            (State::Settling, _) => "the kernel resets its link".to_owned(),
            (State::Resetting, _) => "it is being reset".to_owned(),
            (State::Asking(_) | State::Asked(_), _) => "its guest is recovering".to_owned(),
            (State::Failed(failure), _) => format!("not recovered: {}", failure.reason()),
        })
    }

    /// As a number, for keeping.
    pub fn to_bits(self) -> u32 {
        let (state, detail) = match self.state {
            State::Quiet => (0, 0),
            State::Settling => (1, 0),
            State::Asking(step) => (2, step as u32),
            State::Asked(step) => (3, step as u32),
            State::Resetting => (4, 0),
            State::Failed(failure) => (5, failure as u32),
        };
        let (outcome, why) = match self.outcome {
            Outcome::None => (0, 0),
            Outcome::Recovered => (1, 0),
            Outcome::Ignored(failure) => (2, failure as u32),
            Outcome::Abandoned => (3, 0),
        };
        let severity = |severity: Option<Severity>| severity.map_or(0, |found| found as u32);
        state
            | detail << 4
            | severity(self.severity) << 8
            | severity(self.pending) << 12
            | outcome << 16
            | why << 20
    }

    /// From that number. What makes no sense is nothing.
    pub fn from_bits(bits: u32) -> Self {
        let field = |shift: u32| bits.checked_shr(shift).unwrap_or(0) & 0xf;
        let failure = |number| {
            Failure::ALL
                .into_iter()
                .find(|failure| *failure as u32 == number)
        };
        let step = || AerCommand::from_number(field(4));
        let state = match field(0) {
            1 => Some(State::Settling),
            2 => step().map(State::Asking),
            3 => step().map(State::Asked),
            4 => Some(State::Resetting),
            5 => failure(field(4)).map(State::Failed),
            _ => None,
        };
        let outcome = match field(16) {
            1 => Some(Outcome::Recovered),
            2 => failure(field(20)).map(Outcome::Ignored),
            3 => Some(Outcome::Abandoned),
            _ => None,
        };
        Self {
            state: state.unwrap_or(State::Quiet),
            severity: Severity::from_number(field(8)),
            pending: Severity::from_number(field(12)),
            outcome: outcome.unwrap_or(Outcome::None),
        }
    }
}

#[cfg(test)]
mod tests;
