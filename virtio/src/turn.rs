//! A queue while a thread serves it that must not wait: what is taken, given back and announced.

use std::fmt::Display;
use std::sync::Arc;

use crate::device::Events;
use crate::memory::{GuestRam, View};
use crate::queue::{Chain, Queue, RingError};

/// How far it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There is more to be done at once.
    More,
    /// The guest has to do something first, and will notify.
    Guest,
    /// The host's end has to do something first.
    Host,
}

/// A queue while it is being served.
pub(crate) struct Turn<'a> {
    queue: &'a mut Queue,
    index: u16,
    ram: &'a GuestRam,
    view: Arc<View>,
    events: &'a dyn Events,
    completed: bool,
}

impl<'a> Turn<'a> {
    pub fn new(
        queue: &'a mut Queue,
        index: u16,
        ram: &'a GuestRam,
        events: &'a dyn Events,
    ) -> Self {
        Self {
            queue,
            index,
            ram,
            view: ram.view(),
            events,
            completed: false,
        }
    }

    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.queue.take(self.ram, &mut self.view, chain)
    }

    pub fn complete(&mut self, chain: &Chain, written: usize) -> Result<(), RingError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.complete(&self.view, chain.head(), written)?;
        self.completed = true;
        Ok(())
    }

    /// The driver cannot make anything available before something is completed.
    pub fn is_exhausted(&self) -> bool {
        self.queue.is_exhausted()
    }

    /// Tells the operator.
    pub fn complain(&self, what: &dyn Display) {
        self.events.complain(what);
    }

    /// Tells the driver what was completed, if it wants to hear of it.
    pub fn announce(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.completed) && self.queue.should_notify(&self.view)? {
            self.events.used(self.index);
        }
        Ok(())
    }

    /// The queue is empty: asks to be notified.
    pub fn end(&mut self) -> Result<Progress, RingError> {
        self.announce()?;
        Ok(if self.queue.enable_notify(&self.view)? {
            Progress::More
        } else {
            Progress::Guest
        })
    }
}
