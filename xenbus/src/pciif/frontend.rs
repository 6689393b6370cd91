//! The frontend's view of the shared page: for simulated guests, and programs that play a guest.

use std::sync::atomic::Ordering;

use super::Flags;
use super::aer::{AerOp, AerResult};
use super::op::PciOp;
use super::page::Page;
use crate::platform::PageMapping;

/// A page as the frontend that owns it sees it.
#[derive(Debug)]
pub struct Frontend {
    page: Page,
}

impl Frontend {
    /// Wraps the page to be shared. Changes nothing in it.
    pub fn new(mapping: Box<dyn PageMapping>) -> Self {
        Self {
            page: Page::new(mapping),
        }
    }

    /// The flags as they are now.
    pub fn flags(&self) -> Flags {
        self.page.flags()
    }

    /// Sets flags atomically: [`Flags::AER_HANDLER`] at the beginning, as Linux's frontend does.
    pub fn set_flags(&self, flags: Flags) {
        self.page.set(flags);
    }

    /// Clears flags atomically: [`Flags::OP_ACTIVE`] to give up an operation that is not answered.
    pub fn clear_flags(&self, flags: Flags) {
        self.page.clear(flags);
    }

    /// Puts an operation into the page and hands it to the backend. The backend is not notified:
    /// that is the event channel's part.
    pub fn submit(&self, op: &PciOp) {
        self.page.shared().op.store(op);
        self.page.set(Flags::OP_ACTIVE);
    }

    /// Whether the backend has yet to answer.
    pub fn pending(&self) -> bool {
        self.flags().contains(Flags::OP_ACTIVE)
    }

    /// The operation with its answer.
    pub fn answer(&self) -> PciOp {
        self.page.shared().op.load()
    }

    /// The step of recovery that the backend asks for; `None` when it asks for none.
    pub fn aer_request(&self) -> Option<AerOp> {
        self.flags()
            .contains(Flags::AER_ACTIVE)
            .then(|| self.page.shared().aer_op.load())
    }

    /// Answers a step of recovery. The backend is not notified here.
    pub fn answer_aer(&self, result: AerResult) {
        let err = &self.page.shared().aer_op.err;
        err.store(result as i32, Ordering::Relaxed);
        self.page.clear(Flags::AER_ACTIVE);
    }

    /// Writes any word of the page, as a hostile guest can. `offset` is in bytes and a multiple
    /// of 4; elsewhere nothing happens.
    pub fn scribble(&self, offset: usize, word: u32) {
        self.page.scribble(offset, word);
    }
}
