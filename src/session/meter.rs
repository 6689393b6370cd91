//! What is counted of a guest's operations: how many of which kind, how they ended, how long they took.
//!
//! The guest's own thread alone writes, others read at any time: plain stores into atomics, no lock and no read-modify-write. Its kind is
//! counted last and read first, so that an operation that shows there shows in all other counters.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use xenbus::pciif::Command;

use super::operation::Outcome;

/// The commands that are counted, in the order of their counters; behind them one for all that are no commands.
pub const COMMANDS: [Command; 7] = [
    Command::ConfRead,
    Command::ConfWrite,
    Command::EnableMsi,
    Command::DisableMsi,
    Command::EnableMsix,
    Command::DisableMsix,
    Command::EnableMultiMsi,
];
/// How a command is called that is none.
pub const UNKNOWN: &str = "unknown";
const KINDS: usize = COMMANDS.len() + 1;

/// Binary logarithm of the first bucket's upper bound in nanoseconds: about a microsecond.
const FIRST: u32 = 10;
/// Number of buckets with an upper bound; the last one's is 2^33 ns, about 8.6 s.
const BOUNDED: usize = 24;
const BUCKETS: usize = BOUNDED + 1;

/// The counters of one guest. They begin with its session.
#[derive(Debug, Default)]
pub struct Meter {
    kinds: [AtomicU64; KINDS],
    dropped: AtomicU64,
    absent: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    latency: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    max: AtomicU64,
}

/// Where a command is counted.
fn kind(command: Option<Command>) -> usize {
    COMMANDS
        .iter()
        .position(|counted| Some(*counted) == command)
        .unwrap_or(COMMANDS.len())
}

/// The bucket whose upper bound is the smallest that is not below `nanoseconds`.
fn bucket(nanoseconds: u64) -> usize {
    let bits = u64::BITS.saturating_sub(nanoseconds.saturating_sub(1).leading_zeros());
    (bits.saturating_sub(FIRST) as usize).min(BOUNDED)
}

/// For the only thread that writes.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Release);
}

fn count_at(counters: &[AtomicU64], index: usize) {
    if let Some(counter) = counters.get(index) {
        add(counter, 1);
    }
}

impl Meter {
    /// Counts an operation. To be called by one thread only.
    pub fn count(&self, command: Option<Command>, outcome: Outcome, took: Duration) {
        match outcome {
            Outcome::Done => {}
            Outcome::Dropped => add(&self.dropped, 1),
            Outcome::Absent => add(&self.absent, 1),
            Outcome::Refused => add(&self.refused, 1),
            Outcome::Failed => add(&self.failed, 1),
        }
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        count_at(&self.latency, bucket(nanoseconds));
        add(&self.sum, nanoseconds);
        if nanoseconds > self.max.load(Relaxed) {
            self.max.store(nanoseconds, Relaxed);
        }
        count_at(&self.kinds, kind(command));
    }

    /// What has been counted until now.
    pub fn read(&self) -> Counts {
        let all = |counters: &[AtomicU64]| {
            counters
                .iter()
                .map(|counter| counter.load(Acquire))
                .collect()
        };
        Counts {
            kinds: all(&self.kinds),
            dropped: self.dropped.load(Relaxed),
            absent: self.absent.load(Relaxed),
            refused: self.refused.load(Relaxed),
            failed: self.failed.load(Relaxed),
            latency: all(&self.latency),
            sum: Duration::from_nanos(self.sum.load(Relaxed)),
            max: Duration::from_nanos(self.max.load(Relaxed)),
        }
    }
}

/// What was counted of a guest's operations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    kinds: Vec<u64>,
    /// Writes that succeeded and did not reach the device, as no rule lets them.
    pub dropped: u64,
    /// Asked of functions that the guest does not have. Every Linux guest probes all of them when it starts.
    pub absent: u64,
    /// Refused by the rules: out of bounds, no such command, an interrupt that cannot be had.
    pub refused: u64,
    /// Failed in the device, the kernel or Xen.
    pub failed: u64,
    latency: Vec<u64>,
    /// How long all took together, from being found in the page to the guest's being told.
    pub sum: Duration,
    /// How long the longest took.
    pub max: Duration,
}

impl Counts {
    /// All operations.
    pub fn total(&self) -> u64 {
        self.kinds
            .iter()
            .fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// How many of each kind, by the command's name; last, of what is no command.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = COMMANDS.iter().map(|command| command.name());
        names
            .chain([UNKNOWN])
            .zip(self.kinds.iter().copied().chain(std::iter::repeat(0)))
    }

    /// How long it took at most for this share of the operations, in per cent: as exactly as the buckets tell.
    pub fn percentile(&self, per_cent: u64) -> Duration {
        let wanted = self.total().saturating_mul(per_cent).div_ceil(100);
        let mut until = 0u64;
        for (bound, count) in self.latency() {
            until = until.saturating_add(count);
            if until >= wanted {
                return bound.unwrap_or(self.max).min(self.max);
            }
        }
        self.max
    }

    /// How many took how long: upper bound of each bucket, and the operations between the bound before and this one. The last has no bound.
    pub fn latency(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        (0..BUCKETS)
            .zip(self.latency.iter().copied().chain(std::iter::repeat(0)))
            .map(|(bucket, count)| {
                let power = FIRST.saturating_add(u32::try_from(bucket).unwrap_or(u32::MAX));
                let bound = 1u64.checked_shl(power).map(Duration::from_nanos);
                (bound.filter(|_| bucket < BOUNDED), count)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_in_the_bucket_with_the_next_bound() {
        for (nanoseconds, bound) in [
            (0, Some(1 << 10)),
            (1024, Some(1 << 10)),
            (1025, Some(1 << 11)),
            (2048, Some(1 << 11)),
            (1_000_000, Some(1 << 20)),
            (1 << 33, Some(1 << 33)),
            ((1 << 33) + 1, None),
            (u64::MAX, None),
        ] {
            let meter = Meter::default();
            meter.count(None, Outcome::Done, Duration::from_nanos(nanoseconds));
            let counts = meter.read();
            let found: Vec<_> = counts.latency().filter(|(_, count)| *count > 0).collect();
            assert_eq!(
                found,
                [(bound.map(Duration::from_nanos), 1)],
                "{nanoseconds}"
            );
            assert_eq!(counts.max, Duration::from_nanos(nanoseconds));
        }
    }

    #[test]
    fn percentiles_are_bounds_of_buckets_and_never_more_than_the_longest() {
        let meter = Meter::default();
        let count = |micros| meter.count(None, Outcome::Done, Duration::from_micros(micros));
        assert_eq!(meter.read().percentile(99), Duration::ZERO);
        for _ in 0..98 {
            count(3);
        }
        count(5000);
        count(7000);
        let counts = meter.read();
        assert_eq!(counts.percentile(50), Duration::from_nanos(1 << 12));
        assert_eq!(counts.percentile(98), Duration::from_nanos(1 << 12));
        assert_eq!(counts.percentile(99), Duration::from_micros(7000));
        count(20_000_000);
        assert_eq!(meter.read().percentile(100), Duration::from_secs(20));
    }

    #[test]
    fn every_command_and_every_outcome_has_its_own_counter() {
        let meter = Meter::default();
        let commands = COMMANDS.into_iter().map(Some).chain([None]);
        for (n, command) in (1..).zip(commands) {
            for _ in 0..n {
                meter.count(command, Outcome::Done, Duration::from_micros(1));
            }
        }
        let counts = meter.read();
        assert_eq!(
            counts.kinds().map(|(_, n)| n).collect::<Vec<_>>(),
            (1..=8).collect::<Vec<_>>()
        );
        assert_eq!(counts.kinds().last(), Some((UNKNOWN, 8)));
        assert_eq!(
            (counts.total(), counts.sum),
            (36, Duration::from_micros(36))
        );
        let errors =
            |counts: &Counts| [counts.dropped, counts.absent, counts.refused, counts.failed];
        assert_eq!(errors(&counts), [0; 4]);
        for outcome in [
            Outcome::Dropped,
            Outcome::Absent,
            Outcome::Refused,
            Outcome::Failed,
        ] {
            meter.count(None, outcome, Duration::ZERO);
        }
        assert_eq!(errors(&meter.read()), [1; 4]);
    }
}
