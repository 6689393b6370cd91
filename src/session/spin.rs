//! Waiting for a guest's next operation by looking at the page, for a short and adaptive time.
//!
//! Operations come in bursts: a driver that probes reads and writes dozens of registers in a row. Going to sleep and being woken costs
//! more than the gap between two of them.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// Never longer than this at a time.
const MAX: Duration = Duration::from_micros(200);
/// Never shorter than this: otherwise a guest that was slow once would never be found fast again.
const MIN: Duration = Duration::from_micros(10);

/// How long it is worth waiting.
#[derive(Debug)]
pub struct Spin {
    /// A running mean of the gaps that were seen; one that was longer than the wait counts as [`MAX`].
    gap: Duration,
}

impl Default for Spin {
    fn default() -> Self {
        Self { gap: MAX }
    }
}

impl Spin {
    /// Waits until `ready`, or until waiting is not worth while any longer. Returns what `ready` said last.
    pub fn wait_for(&mut self, ready: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        let limit = self.limit();
        loop {
            // The clock costs more than the look.
            for _ in 0..32 {
                if ready() {
                    self.saw(start.elapsed());
                    return true;
                }
                spin_loop();
            }
            if start.elapsed() >= limit {
                self.saw(MAX);
                return false;
            }
        }
    }

    /// Twice the usual gap, if that is short enough to be waited for at all.
    fn limit(&self) -> Duration {
        let twice = self.gap.saturating_mul(2);
        if twice > MAX.saturating_mul(2) {
            MIN
        } else {
            twice.clamp(MIN, MAX)
        }
    }

    fn saw(&mut self, gap: Duration) {
        self.gap = self
            .gap
            .saturating_mul(7)
            .saturating_add(gap)
            .checked_div(8)
            .unwrap_or(MAX);
    }
}
