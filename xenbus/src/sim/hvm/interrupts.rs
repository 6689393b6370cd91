//! Interrupts that a guest's device models have sent it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::device_model::IntxPin;
use crate::sim::lock;

/// A message-signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// Its address.
    pub address: u64,
    /// Its data.
    pub data: u32,
}

#[derive(Debug, Default)]
struct Pending {
    messages: VecDeque<Message>,
    pins: BTreeMap<IntxPin, bool>,
    isa: [bool; 16],
}

/// What has come in, for the guest's driver to take.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    pending: Mutex<Pending>,
    changed: Condvar,
}

impl Interrupts {
    fn change(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut lock(&self.pending));
        self.changed.notify_all();
    }

    pub fn send(&self, message: Message) {
        self.change(|pending| pending.messages.push_back(message));
    }

    pub fn set_pin(&self, pin: IntxPin, level: bool) {
        self.change(|pending| {
            pending.pins.insert(pin, level);
        });
    }

    pub fn set_isa(&self, irq: u8, level: bool) {
        self.change(|pending| {
            if let Some(line) = pending.isa.get_mut(usize::from(irq)) {
                *line = level;
            }
        });
    }

    /// Waits until `find` finds something.
    fn wait<T>(
        &self,
        timeout: Duration,
        mut find: impl FnMut(&mut Pending) -> Option<T>,
    ) -> Option<T> {
        let mut found = None;
        let pending = lock(&self.pending);
        let waited = self
            .changed
            .wait_timeout_while(pending, timeout, |pending| {
                found = find(pending);
                found.is_none()
            });
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        found
    }

    /// Takes the first message that is one of the wanted.
    pub fn take(&self, timeout: Duration, wanted: impl Fn(&Message) -> bool) -> Option<Message> {
        self.wait(timeout, |pending| {
            let index = pending.messages.iter().position(&wanted)?;
            pending.messages.remove(index)
        })
    }

    pub fn wait_pin(&self, pin: IntxPin, level: bool, timeout: Duration) -> bool {
        let is = |pending: &mut Pending| {
            (pending.pins.get(&pin).copied().unwrap_or(false) == level).then_some(())
        };
        self.wait(timeout, is).is_some()
    }

    pub fn wait_isa(&self, irq: u8, level: bool, timeout: Duration) -> bool {
        let is = |pending: &mut Pending| {
            (pending.isa.get(usize::from(irq)).copied() == Some(level)).then_some(())
        };
        self.wait(timeout, is).is_some()
    }
}
