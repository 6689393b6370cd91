//! The backend's view of the shared page.

use std::sync::atomic::Ordering;

use super::Flags;
use super::aer::{AerCommand, AerOp, AerResult, ChannelState};
use super::op::{PciError, PciOp};
use super::page::Page;
use crate::platform::PageMapping;
use crate::types::PciDevice;

/// A frontend's page as its backend sees it. Whatever is read from it may change at any time: read
/// it once, and trust nothing.
#[derive(Debug)]
pub struct SharedInfo {
    page: Page,
}

impl SharedInfo {
    /// Wraps a mapped page. Changes nothing in it.
    pub fn new(mapping: Box<dyn PageMapping>) -> Self {
        Self {
            page: Page::new(mapping),
        }
    }

    /// Whether an operation waits.
    pub fn active(&self) -> bool {
        self.page.flags().contains(Flags::OP_ACTIVE)
    }

    /// Copies the operation, each field of it exactly once; `msix_entries` only for
    /// [`super::Command::EnableMsix`], and zeros otherwise. Meaningful after
    /// [`SharedInfo::active`] said true.
    pub fn fetch(&self) -> PciOp {
        self.page.shared().op.load()
    }

    /// Whether the page still holds the request that `op` is a copy of. A frontend that gave a
    /// request up after its two seconds may have put another one there.
    pub fn header_matches(&self, op: &PciOp) -> bool {
        self.page.shared().op.asks_for(op)
    }

    /// Answers the operation: writes its result, `value` and, for a successful
    /// [`super::Command::EnableMsix`], the PIRQs of the first entries, and hands the slot back.
    /// Nothing else in the page changes. The frontend is not notified: that is the event channel's
    /// part.
    pub fn publish(&self, result: PciError, value: u32, vectors: Option<&[u16]>) {
        let op = &self.page.shared().op;
        op.err.store(result.0, Ordering::Relaxed);
        op.value.store(value, Ordering::Relaxed);
        if let Some(vectors) = vectors {
            op.store_vectors(vectors);
        }
        self.page.clear(Flags::OP_ACTIVE);
    }

    /// Whether the frontend says that it handles AER.
    pub fn frontend_handles_aer(&self) -> bool {
        self.page.flags().contains(Flags::AER_HANDLER)
    }

    /// Asks the frontend's driver to take a step of recovery for the function at a *virtual*
    /// address. The frontend is not notified here.
    pub fn post_aer(&self, command: AerCommand, state: ChannelState, function: PciDevice) {
        self.page.shared().aer_op.store(&AerOp {
            cmd: command as u32,
            err: state as i32,
            domain: function.segment.into(),
            bus: function.bus.into(),
            devfn: function.devfn.into(),
        });
        self.page.set(Flags::AER_ACTIVE);
    }

    /// Whether the frontend has yet to answer [`SharedInfo::post_aer`].
    pub fn aer_pending(&self) -> bool {
        self.page.flags().contains(Flags::AER_ACTIVE)
    }

    /// The step that the frontend has yet to answer, as it lies in the page: the frontend can have written it.
    pub fn pending_aer(&self) -> Option<AerOp> {
        self.aer_pending().then(|| self.page.shared().aer_op.load())
    }

    /// The frontend's answer; `None` while it is pending. Read once and checked.
    pub fn take_aer_result(&self) -> Option<AerResult> {
        if self.aer_pending() {
            return None;
        }
        let answer = self.page.shared().aer_op.err.load(Ordering::Relaxed);
        Some(AerResult::from_wire(answer))
    }

    /// Takes an unanswered step back, so that a late answer is not waited for.
    pub fn withdraw_aer(&self) {
        self.page.clear(Flags::AER_ACTIVE);
    }
}
