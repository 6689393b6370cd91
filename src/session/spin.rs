//! Waiting for a guest's next operation by looking at the page, for a short and adaptive time.
//!
//! Operations come in bursts: a driver that probes reads and writes dozens of registers in a row. Going to sleep and being woken costs
//! more than the gap between two of them.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// Gaps longer than this are not waited for: sleeping costs less.
const MAX: Duration = Duration::from_micros(500);

/// How long it is worth waiting: twice the usual gap between an answer and the next operation.
#[derive(Debug)]
pub struct Spin {
    /// A running mean of the gaps, however the operation after each was noticed.
    gap: Duration,
    answered: Option<Instant>,
}

impl Default for Spin {
    fn default() -> Self {
        Self {
            gap: MAX,
            answered: None,
        }
    }
}

impl Spin {
    /// An operation was found at this time.
    pub fn found(&mut self, now: Instant) {
        if let Some(answered) = self.answered.take() {
            // A pause between two bursts says little about the gaps within them.
            let gap = now
                .saturating_duration_since(answered)
                .min(MAX.saturating_mul(2));
            let sum = self.gap.saturating_mul(7).saturating_add(gap);
            self.gap = sum.checked_div(8).unwrap_or(MAX);
        }
    }

    /// It was answered at this time.
    pub fn answered(&mut self, now: Instant) {
        self.answered = Some(now);
    }

    /// How long to wait for the next one; zero: not at all.
    fn limit(&self) -> Duration {
        if self.gap > MAX {
            Duration::ZERO
        } else {
            self.gap.saturating_mul(2).min(MAX)
        }
    }

    /// Waits until `ready`, or until waiting is not worth while any longer. Returns what `ready` said last.
    pub fn wait_for(&self, ready: impl Fn() -> bool) -> bool {
        let (start, limit) = (Instant::now(), self.limit());
        if limit.is_zero() {
            return false;
        }
        loop {
            // The clock costs more than the look.
            for _ in 0..32 {
                if ready() {
                    return true;
                }
                spin_loop();
            }
            if start.elapsed() >= limit {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After operations with these gaps between them.
    fn after(gaps: impl IntoIterator<Item = Duration>) -> Spin {
        let mut spin = Spin::default();
        let mut now = Instant::now();
        for gap in gaps {
            spin.answered(now);
            now += gap;
            spin.found(now);
        }
        spin
    }

    #[test]
    fn the_next_operation_of_a_burst_is_waited_for_twice_the_usual_gap() {
        let spin = after([Duration::from_micros(20); 50]);
        let limit = spin.limit();
        assert!(limit >= Duration::from_micros(40) && limit < Duration::from_micros(60));
    }

    #[test]
    fn a_guest_that_asks_now_and_then_is_not_waited_for() {
        let spin = after([Duration::from_secs(1); 20]);
        assert_eq!(spin.limit(), Duration::ZERO);
        assert!(!spin.wait_for(|| true));
    }

    #[test]
    fn a_pause_between_two_bursts_does_not_end_the_waiting() {
        let burst = [Duration::from_micros(20); 50];
        let spin = after(burst.into_iter().chain([Duration::from_secs(60)]));
        assert!(spin.limit() > Duration::from_micros(40));
    }

    #[test]
    fn a_guest_that_becomes_busy_is_waited_for_again() {
        let slow = [Duration::from_secs(1); 20];
        let spin = after(slow.into_iter().chain([Duration::from_micros(100); 20]));
        assert!(!spin.limit().is_zero());
    }
}
