//! One operation of a guest, from the request to the reply. Everything in the request is hostile; it is a private copy and does not change.
//!
//! This is the path that must be fast: no allocation, no lock, no waiting but for the device itself.

use std::error::Error;

use conf_space::address::Bdf;
use conf_space::overlay::OpError;
use log::{info, warn};
use msi::{Answer, Refusal, Vectors};
use xenbus::DomId;
use xenbus::pciif::{Command, PciError, PciOp};

use super::exports::{Export, Exports};
use crate::rate_limit::RateLimit;
use crate::text::chain;

/// What goes back to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Result.
    pub error: PciError,
    /// Value read, PIRQ, or as `error` demands.
    pub value: u32,
    /// The PIRQs of an enabled MSI-X.
    pub vectors: Option<Vectors>,
    /// The host's device, if the guest has one where it asked.
    pub device: Option<Bdf>,
    /// How it ended, in an operator's eyes.
    pub outcome: Outcome,
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// As the guest wished.
    Done = 0,
    /// It was a write to what guests may not write: it succeeded, and did not reach the device.
    Dropped = 1,
    /// The guest has no device there.
    Absent = 2,
    /// It is against the rules.
    Refused = 3,
    /// The device, the kernel or Xen failed.
    Failed = 4,
}

impl Outcome {
    /// The inverse of `as u8`; of another number: failed.
    pub fn from_number(number: u8) -> Self {
        [Self::Done, Self::Dropped, Self::Absent, Self::Refused]
            .into_iter()
            .find(|outcome| *outcome as u8 == number)
            .unwrap_or(Self::Failed)
    }

    /// The outcome in a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Dropped => "dropped",
            Self::Absent => "absent",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    fn of(error: OpError) -> Self {
        match error {
            OpError::InvalidOffset | OpError::AccessDenied => Self::Refused,
            OpError::DeviceNotFound | OpError::Failed { .. } => Self::Failed,
        }
    }

    fn of_refusal(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Unspeakable { .. }
            | Refusal::Xen(_)
            | Refusal::Cleanup(_)
            | Refusal::Config(_) => Self::Failed,
            _ => Self::Refused,
        }
    }
}

impl Reply {
    fn new(outcome: Outcome, error: PciError, value: u32) -> Self {
        Self {
            error,
            value,
            vectors: None,
            device: None,
            outcome,
        }
    }

    fn done(value: u32) -> Self {
        Self::new(Outcome::Done, PciError::SUCCESS, value)
    }
}

/// Carries out one operation. What is refused is logged as often as `limit` allows.
pub fn serve(exports: &mut Exports, op: &PciOp, limit: &mut RateLimit) -> Reply {
    let domain = exports.domain();
    match exports.find(op.domain, op.bus, op.devfn) {
        Some(export) => Reply {
            device: Some(export.device.bdf),
            ..carry_out(domain, export, op, limit)
        },
        None => Reply::new(Outcome::Absent, PciError::DEV_NOT_FOUND, op.value),
    }
}

fn carry_out(domain: DomId, export: &mut Export, op: &PciOp, limit: &mut RateLimit) -> Reply {
    match op.command() {
        Some(Command::ConfRead) => {
            match export
                .overlay
                .read(&*export.device.config, op.offset, op.size)
            {
                Ok(value) => Reply::done(value),
                Err(error) => Reply::new(Outcome::of(error), PciError(error.code()), 0),
            }
        }
        Some(Command::ConfWrite) => match write(export, op) {
            Ok(outcome) => Reply::new(outcome, PciError::SUCCESS, op.value),
            Err(error) => Reply::new(Outcome::of(error), PciError(error.code()), op.value),
        },
        Some(command @ (Command::EnableMsi | Command::EnableMultiMsi)) => {
            let count = if command == Command::EnableMsi {
                1
            } else {
                op.info
            };
            match export.interrupts.enable_msi(count) {
                Ok(pirq) => Reply::done(pirq.0),
                Err(refusal) => refused(domain, export, &refusal, refusal.msi_answer(), limit),
            }
        }
        Some(Command::EnableMsix) => {
            match export.interrupts.enable_msix(&op.msix_entries, op.value) {
                Ok(vectors) => Reply {
                    vectors: Some(vectors),
                    ..Reply::done(0)
                },
                Err(refusal) => refused(
                    domain,
                    export,
                    &refusal,
                    refusal.msix_answer(op.value),
                    limit,
                ),
            }
        }
        // Newer Linux frontends send disable_msi for MSI-X as well: whichever is on goes off.
        Some(Command::DisableMsi | Command::DisableMsix) => {
            let disabled = export.interrupts.disable();
            if let Err(error) = &disabled
                && limit.allow()
            {
                warn!(
                    "domain {domain}: {} is disabled, but {}",
                    export.device.bdf,
                    chain(error)
                );
            }
            let outcome = disabled.map_or(Outcome::Failed, |()| Outcome::Done);
            Reply::new(outcome, PciError::SUCCESS, export.interrupts.legacy())
        }
        None => Reply::new(Outcome::Refused, PciError::NOT_IMPLEMENTED, op.value),
    }
}

fn refused(
    domain: DomId,
    export: &Export,
    refusal: &Refusal,
    answer: Answer,
    limit: &mut RateLimit,
) -> Reply {
    if limit.allow() {
        let why: &dyn Error = refusal;
        warn!(
            "domain {domain}: {} gets no interrupts: {}",
            export.device.bdf,
            chain(why)
        );
    }
    Reply::new(Outcome::of_refusal(refusal), answer.error, answer.value)
}

fn write(export: &mut Export, op: &PciOp) -> Result<Outcome, OpError> {
    let policy = export.policy();
    let written = export.overlay.write(
        &*export.device.config,
        op.offset,
        op.size,
        op.value,
        &policy,
    );
    if let Ok(effect) = written {
        if let Some(change) = effect.power.filter(|change| change.configuration_lost) {
            export.restore(change.settle_time());
        }
        if let Some(dropped) = effect.dropped {
            export.device.record.count_dropped(dropped);
            tell_of_dropped_write(export, dropped.offset);
        }
    }
    // Once its effects are complete and before the guest knows: a daemon that is killed in between does the operation again. After a
    // failure too, which may have come half-way.
    export
        .device
        .record
        .set_overlay(export.overlay.state().to_bits());
    written.map(|effect| effect.dropped.map_or(Outcome::Done, |_| Outcome::Dropped))
}

fn tell_of_dropped_write(export: &mut Export, offset: u16) {
    if !std::mem::replace(&mut export.told_of_dropped_write, true) {
        let bdf = export.device.bdf;
        info!(
            "{bdf}: dropped its guest's write at offset {offset:#x}, which guests may not write; if its driver does not work: pciback show {bdf} --dropped"
        );
    }
}
