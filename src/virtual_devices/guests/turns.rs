//! Who changes a guest's devices: one at a time for each guest, whether that is the toolstack, the operator, or a guest that has come.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use xenbus::DomId;

use super::lock;

/// So long the end waits for those that are under way.
const LAST: Duration = Duration::from_secs(2);

/// Which guests' devices are being changed.
#[derive(Debug, Default)]
pub(in crate::virtual_devices) struct Turns {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The guests, each with whether there is something to look at again.
    under_way: BTreeMap<DomId, bool>,
    closed: bool,
}

/// Nobody else changes this guest's devices until it is dropped.
#[derive(Debug)]
pub(in crate::virtual_devices) struct Turn {
    turns: Arc<Turns>,
    domain: DomId,
    has_ended: bool,
}

impl Turns {
    /// Begins a turn. `None`: one is under way, at whose end is looked again, or there are to be no more.
    pub fn begin(self: &Arc<Self>, domain: DomId) -> Option<Turn> {
        let mut state = lock(&self.state);
        if state.closed {
            return None;
        }
        if let Some(again) = state.under_way.get_mut(&domain) {
            *again = true;
            return None;
        }
        state.under_way.insert(domain, false);
        Some(self.turn(domain))
    }

    /// Begins a turn when the one under way has ended, for which it waits for so long.
    pub fn wait(self: &Arc<Self>, domain: DomId, patience: Duration) -> Option<Turn> {
        let begun = Instant::now();
        let mut state = lock(&self.state);
        while state.under_way.contains_key(&domain) {
            let left = patience.checked_sub(begun.elapsed())?;
            state = self
                .ended
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if state.closed {
            return None;
        }
        state.under_way.insert(domain, false);
        Some(self.turn(domain))
    }

    fn turn(self: &Arc<Self>, domain: DomId) -> Turn {
        let turns = Arc::clone(self);
        Turn {
            turns,
            domain,
            has_ended: false,
        }
    }

    /// No turn begins any more. Those that wait for storage are not waited for: what they do later they do to nobody.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let ended = self
            .ended
            .wait_timeout_while(state, LAST, |state| !state.under_way.is_empty());
        drop(ended);
    }

    /// Whether no turn begins any more.
    pub fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }
}

impl Turn {
    /// Whose devices.
    pub fn domain(&self) -> DomId {
        self.domain
    }

    /// Ends it. `Some`: it goes on, as there is something to look at again.
    pub fn end(mut self) -> Option<Self> {
        let turns = Arc::clone(&self.turns);
        let mut state = lock(&turns.state);
        let again = state.under_way.get_mut(&self.domain);
        if again.is_some_and(std::mem::take) {
            return Some(self);
        }
        // Under the same lock: what comes from now on begins a turn of its own.
        state.under_way.remove(&self.domain);
        self.has_ended = true;
        turns.ended.notify_all();
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.has_ended {
            lock(&self.turns.state).under_way.remove(&self.domain);
            self.turns.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn a_guest_has_one_turn_at_a_time_and_others_have_theirs() {
        let turns = Arc::new(Turns::default());
        let first = turns.begin(DomId(1)).unwrap();
        assert!(turns.wait(DomId(1), SHORT).is_none());
        assert!(turns.begin(DomId(2)).is_some());
        drop(first);
        assert!(turns.begin(DomId(1)).is_some());
    }

    #[test]
    fn who_comes_during_a_turn_is_seen_to_at_its_end() {
        let turns = Arc::new(Turns::default());
        let turn = turns.begin(DomId(1)).unwrap();
        assert!(turns.begin(DomId(1)).is_none());
        assert!(turns.begin(DomId(1)).is_none());
        let again = turn.end().unwrap();
        assert!(turns.wait(DomId(1), SHORT).is_none());
        assert!(again.end().is_none());
        assert!(turns.begin(DomId(1)).is_some());
    }

    #[test]
    fn who_waits_comes_next() {
        let turns = Arc::new(Turns::default());
        let turn = turns.begin(DomId(1)).unwrap();
        std::thread::scope(|scope| {
            let next = scope.spawn(|| turns.wait(DomId(1), Duration::from_secs(30)).is_some());
            std::thread::sleep(SHORT);
            assert!(!next.is_finished());
            assert!(turn.end().is_none());
            assert!(next.join().unwrap());
        });
    }

    #[test]
    fn no_turn_begins_at_the_end() {
        let turns = Arc::new(Turns::default());
        turns.close();
        assert!(turns.begin(DomId(1)).is_none());
        assert!(turns.wait(DomId(1), SHORT).is_none());
        assert!(turns.is_closed());
    }
}
