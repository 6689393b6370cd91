//! A limit on what a guest can make us do: so many at once, and so many per second in the long run.

use std::time::{Duration, Instant};

/// A token bucket.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    left: u32,
    refilled: Instant,
}

impl RateLimit {
    /// Allows `burst` at once, and one more every `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            left: burst,
            refilled: Instant::now(),
        }
    }

    /// Whether one more may be now.
    pub fn allow(&mut self) -> bool {
        self.allow_at(Instant::now())
    }

    /// As [`RateLimit::allow`], at a given time.
    pub fn allow_at(&mut self, now: Instant) -> bool {
        self.refill(now);
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// When the next one may be.
    pub fn next(&self, now: Instant) -> Instant {
        if self.left > 0 {
            now
        } else {
            self.refilled.checked_add(self.interval).unwrap_or(now)
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled);
        let tokens = passed
            .as_nanos()
            .checked_div(self.interval.as_nanos())
            .unwrap_or(0);
        if tokens > 0 {
            self.left = self
                .left
                .saturating_add(u32::try_from(tokens).unwrap_or(u32::MAX))
                .min(self.burst);
            self.refilled = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_per_interval() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut limit = RateLimit {
            burst: 3,
            interval: second,
            left: 3,
            refilled: start,
        };
        assert_eq!((0..5).filter(|_| limit.allow_at(start)).count(), 3);
        assert_eq!(limit.next(start), start + second);
        assert!(!limit.allow_at(start + second / 2));
        assert!(limit.allow_at(start + second));
        assert!(!limit.allow_at(start + second));
        assert_eq!(
            (0..9)
                .filter(|_| limit.allow_at(start + 60 * second))
                .count(),
            3
        );
    }
}
