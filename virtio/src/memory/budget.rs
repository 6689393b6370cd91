//! How many pieces of guests' memory may be mapped: a process has a number of mappings for all of its
//! guests (`vm.max_map_count`), of which each guest has a share that no other can use up.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Mappings for all else: code, stacks, records.
const ELSE: usize = 4096;
/// The kernel's default, where it does not say.
const DEFAULT_MAPPINGS: usize = 65530;

/// What all guests of a process have together.
#[derive(Debug)]
pub struct Budget {
    total: usize,
    /// Pieces that belong to no share, and that no guest has taken beyond its share.
    free: AtomicUsize,
}

/// There is nothing left for another guest's share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest needs {wanted} mappings of 2 MiB of its memory, but {free} of {total} are left beside those of other guests: allow this process more, as \
     by `sysctl vm.max_map_count=262144`, and start it again"
)]
pub struct Exhausted {
    wanted: usize,
    free: usize,
    total: usize,
}

impl Budget {
    /// So many pieces.
    pub fn new(pieces: usize) -> Arc<Self> {
        Arc::new(Self {
            total: pieces,
            free: AtomicUsize::new(pieces),
        })
    }

    /// What the kernel allows this process.
    pub fn of_process() -> Arc<Self> {
        let allowed = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let allowed = allowed.ok().and_then(|count| count.trim().parse().ok());
        Self::new(allowed.unwrap_or(DEFAULT_MAPPINGS).saturating_sub(ELSE))
    }

    fn take(&self, pieces: usize) -> Result<(), usize> {
        let less = |free: usize| free.checked_sub(pieces);
        let taken = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.map(drop)
    }

    fn give_back(&self, pieces: usize) {
        self.free.fetch_add(pieces, Ordering::Relaxed);
    }

    /// Sets pieces aside for a guest.
    ///
    /// # Errors
    /// There are not so many left.
    pub fn share(self: &Arc<Self>, pieces: usize) -> Result<Share, Exhausted> {
        self.take(pieces).map_err(|free| Exhausted {
            wanted: pieces,
            free,
            total: self.total,
        })?;
        Ok(Share {
            budget: Arc::clone(self),
            size: pieces,
            mapped: Mutex::new(0),
        })
    }
}

/// A guest's part. Its memory may take as much again while nobody else needs that, as when it goes on with requests
/// from before it gave pages back. Not more, however often it does that: others may have to, too.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    size: usize,
    /// By all views of the guest's memory.
    mapped: Mutex<usize>,
}

impl Share {
    /// That of a guest with a process of its own, which gets no more than this.
    pub fn alone(pieces: usize) -> Self {
        Self {
            budget: Budget::new(0),
            size: pieces,
            mapped: Mutex::new(0),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a piece. `None`: neither share nor budget has one left.
    pub(super) fn take(self: &Arc<Self>) -> Option<Piece> {
        let mut mapped = self.lock();
        if *mapped >= self.size.saturating_mul(2) {
            return None;
        }
        if *mapped >= self.size {
            self.budget.take(1).ok()?;
        }
        *mapped = mapped.saturating_add(1);
        Some(Piece(Arc::clone(self)))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.give_back(self.size);
    }
}

/// One that may be mapped, as long as this lives.
#[derive(Debug)]
pub(super) struct Piece(Arc<Share>);

impl Drop for Piece {
    fn drop(&mut self) {
        let mut mapped = self.0.lock();
        *mapped = mapped.saturating_sub(1);
        if *mapped >= self.0.size {
            self.0.budget.give_back(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_takes_what_is_free_but_nothing_of_another_ones_share() {
        let budget = Budget::new(10);
        let greedy = Arc::new(budget.share(3).unwrap());
        let mut pieces: Vec<_> = std::iter::from_fn(|| greedy.take()).collect();
        assert_eq!(
            pieces.len(),
            6,
            "twice its share, though nobody else is there"
        );
        let error = budget.share(5).unwrap_err().to_string();
        assert!(error.contains("max_map_count"), "{error}");
        pieces.truncate(4);
        let other = Arc::new(budget.share(6).unwrap());
        assert!(greedy.take().is_none());
        let others: Vec<_> = std::iter::from_fn(|| other.take()).collect();
        assert_eq!(others.len(), 6);
        drop((pieces, greedy, others, other));
        assert!(budget.share(10).is_ok());
    }
}
