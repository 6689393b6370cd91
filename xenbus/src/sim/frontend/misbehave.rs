//! What a hostile or broken guest can do to its backend.

use std::time::{Duration, Instant};

use super::{Frontend, FrontendError};
use crate::pciif::{self, PciOp};

/// What is written into a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Node {
    /// What belongs there.
    #[default]
    True,
    /// Nothing: there is no such node.
    Missing,
    /// This.
    Text(String),
}

impl Node {
    pub(super) fn text(&self, truth: &str) -> Option<String> {
        match self {
            Self::True => Some(truth.to_owned()),
            Self::Missing => None,
            Self::Text(text) => Some(text.clone()),
        }
    }
}

impl From<&str> for Node {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// What a frontend publishes instead of the truth.
#[derive(Debug, Clone, Default)]
pub struct Lies {
    /// `pci-op-ref`.
    pub reference: Node,
    /// `event-channel`.
    pub port: Node,
    /// `magic`.
    pub magic: Node,
    /// `state`.
    pub state: Node,
}

/// Fills a page from `start` on with words that look random and are the same each time (xorshift).
pub(super) fn fill(page: &pciif::Frontend, start: usize, seed: u32) {
    let mut word = seed | 1;
    for offset in (start..4096).step_by(4) {
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        page.scribble(offset, word);
    }
}

impl Frontend {
    /// Fills the whole page with garbage, its flags included, and notifies the backend. The same `seed` gives the same garbage.
    ///
    /// # Errors
    /// [`FrontendError::NotPublished`], [`FrontendError::Port`].
    pub fn scribble(&mut self, seed: u32) -> Result<(), FrontendError> {
        let link = self.link()?;
        // The flags last: they hand the rest over.
        fill(&link.page, 4, seed);
        link.page.scribble(0, seed | 1);
        Ok(link.port.notify()?)
    }

    /// Writes one word of the page: `offset` in bytes, a multiple of 4.
    ///
    /// # Errors
    /// [`FrontendError::NotPublished`].
    pub fn scribble_word(&mut self, offset: usize, word: u32) -> Result<(), FrontendError> {
        self.link()?.page.scribble(offset, word);
        Ok(())
    }

    /// Notifies the backend, with nothing to tell it.
    ///
    /// # Errors
    /// [`FrontendError::NotPublished`], [`FrontendError::Port`].
    pub fn flood(&mut self, count: usize) -> Result<(), FrontendError> {
        let link = self.link()?;
        (0..count).try_for_each(|_| link.port.notify())?;
        Ok(())
    }

    /// Hands an operation over and keeps writing others over it until it is answered.
    ///
    /// # Errors
    /// As [`Frontend::operate`].
    pub fn operate_while_changing(
        &mut self,
        op: &PciOp,
        others: &[PciOp],
    ) -> Result<PciOp, FrontendError> {
        let start = Instant::now();
        let limit = self.op_timeout.unwrap_or(Duration::from_secs(2));
        let link = self.link()?;
        link.page.submit(op);
        link.port.notify()?;
        for other in others.iter().cycle() {
            if !link.page.pending() || start.elapsed() > limit {
                break;
            }
            overwrite(&link.page, other);
        }
        self.finish(op)
    }
}

/// Writes an operation into the page without handing it over.
fn overwrite(page: &pciif::Frontend, op: &PciOp) {
    let words: [u32; size_of::<PciOp>() / 4] = zerocopy::transmute!(*op);
    for (offset, word) in (4..).step_by(4).zip(words) {
        page.scribble(offset, word);
    }
}
