//! How long to look at an empty queue before going to sleep.

use std::time::{Duration, Instant};

/// The first time for which a queue is looked at, once it seems worth it.
const START: Duration = Duration::from_micros(4);
/// The most sleeps after which another look is tried.
const MOST_SKIPPED: u32 = 64;
/// Looks between two at the clock, which may cost a system call.
const LOOKS: u32 = 16;

/// Longer when the next request came soon after going to sleep, not at all when it did not.
///
/// And hardly ever when looking is in vain although requests come soon: then the guest needs the very
/// CPU that looks.
#[derive(Debug)]
pub(super) struct Patience {
    most: Duration,
    time: Duration,
    /// Sleeps before the next look.
    skip: u32,
    /// As many as that were after the last look that was in vain.
    skipped: u32,
}

impl Patience {
    /// Looks last `most` at the longest.
    pub fn new(most: Duration) -> Self {
        Self {
            most,
            time: Duration::ZERO,
            skip: 0,
            skipped: 0,
        }
    }

    /// Whether looking is worth it now.
    pub fn is_curious(&self) -> bool {
        self.skip == 0 && !self.time.is_zero()
    }

    /// Looks until `ready`, or until it is not worth it any longer. Returns what `ready` said last.
    pub fn look<E>(&mut self, mut ready: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        let begun = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if ready()? {
                    self.skipped = 0;
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() >= self.time {
                self.skipped = self.skipped.saturating_mul(2).clamp(1, MOST_SKIPPED);
                self.skip = self.skipped;
                return Ok(false);
            }
        }
    }

    /// Has `sleep` sleep, and learns from how long that took.
    pub fn sleep(&mut self, sleep: impl FnOnce()) {
        if self.skip > 0 || self.most.is_zero() {
            self.skip = self.skip.saturating_sub(1);
            sleep();
            return;
        }
        let begun = Instant::now();
        sleep();
        self.time = if begun.elapsed() < self.most {
            self.time.saturating_mul(2).max(START).min(self.most)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const MOST: Duration = Duration::from_millis(20);

    fn sleeps(patience: &mut Patience, time: Duration) {
        patience.sleep(|| std::thread::sleep(time));
    }

    /// How often it looks in so many turns, in each of which it may look, finding something or not, and
    /// sleeps for a moment if it found nothing.
    fn looks(patience: &mut Patience, turns: u32, finds: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..turns {
            if patience.is_curious() {
                looks += 1;
                if patience.look(|| Ok::<_, Infallible>(finds)).unwrap() {
                    continue;
                }
            }
            sleeps(patience, Duration::ZERO);
        }
        looks
    }

    #[test]
    fn a_queue_that_is_asked_soon_again_is_looked_at() {
        let mut patience = Patience::new(MOST);
        assert!(!patience.is_curious());
        sleeps(&mut patience, Duration::ZERO);
        assert_eq!(looks(&mut patience, 100, true), 100);
    }

    #[test]
    fn a_queue_that_is_asked_now_and_then_is_not() {
        let mut patience = Patience::new(MOST);
        sleeps(&mut patience, Duration::ZERO);
        sleeps(&mut patience, MOST);
        assert!(!patience.is_curious());
    }

    #[test]
    fn who_looks_in_vain_does_so_ever_more_seldom() {
        let mut patience = Patience::new(Duration::from_millis(1));
        sleeps(&mut patience, Duration::ZERO);
        assert!(looks(&mut patience, 100, false) <= 7);
        assert!(looks(&mut patience, 650, false) <= 11);
        assert!(
            looks(&mut patience, 200, true) > 100,
            "and begins anew when it is not in vain"
        );
    }
}
