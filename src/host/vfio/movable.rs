//! What is open, and is closed for a while when it changes hands.
//!
//! Whoever uses it does so without a lock: a reset may take a minute, and closing a device does one. Whoever closes it waits for those first:
//! the kernel opens no device twice.

use std::io;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::lock;

/// Longer than the kernel lets a reset take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why it cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Away {
    /// It changes hands, and is open again in a moment.
    Moving,
    /// It could not be opened, for this reason.
    Closed(Errno),
}

impl From<Away> for io::Error {
    fn from(away: Away) -> Self {
        match away {
            Away::Moving => Errno::EBUSY,
            Away::Closed(errno) => errno,
        }
        .into()
    }
}

/// The errno of an error; EIO if it has none.
pub(super) fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Open, or not.
#[derive(Debug)]
pub(super) struct Movable<T> {
    state: Mutex<Result<Arc<T>, Away>>,
    /// The state has changed, or somebody has ended using what is open.
    changed: Condvar,
    patience: Duration,
}

/// What is open, as long as somebody uses it.
#[derive(Debug)]
pub(super) struct InUse<'a, T> {
    // Dropped in this order.
    open: Arc<T>,
    _use: Use<'a, T>,
}

impl<T> Deref for InUse<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.open
    }
}

#[derive(Debug)]
struct Use<'a, T>(&'a Movable<T>);

impl<T> Drop for Use<'_, T> {
    fn drop(&mut self) {
        // Only who closes it waits for that, and has either seen that it is not used any more, or hears of it. To say so is a system call.
        if lock(&self.0.state).is_err() {
            self.0.changed.notify_all();
        }
    }
}

impl<T> Movable<T> {
    /// Not open yet.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(Err(Away::Closed(Errno::ENODEV))),
            changed: Condvar::new(),
            patience: PATIENCE,
        }
    }

    /// What is open, for use now.
    ///
    /// # Errors
    /// [`Away`], at once.
    pub fn get(&self) -> Result<InUse<'_, T>, Away> {
        let state = lock(&self.state);
        let open = Arc::clone(state.as_ref().map_err(|away| *away)?);
        let _use = Use(self);
        Ok(InUse { open, _use })
    }

    /// Whether it is open now.
    pub fn is_open(&self) -> bool {
        lock(&self.state).is_ok()
    }

    /// Waits while it is on its way, but not for ever.
    ///
    /// # Errors
    /// [`Away`].
    pub fn settled(&self) -> Result<(), Away> {
        let state = lock(&self.state);
        let is_moving = |state: &mut Result<Arc<T>, Away>| matches!(state, Err(Away::Moving));
        let waited = self
            .changed
            .wait_timeout_while(state, self.patience, is_moving);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.as_ref().map(drop).map_err(|away| *away)
    }

    /// From now on it is on its way, and nobody begins to use it. What was open is to be closed ([`Movable::close`]).
    pub fn begin_to_move(&self) -> Option<Arc<T>> {
        self.replace(Err(Away::Moving)).ok()
    }

    /// Closes what was open, when nobody uses it any more.
    pub fn close(&self, open: Arc<T>) {
        let begin = Instant::now();
        let mut state = lock(&self.state);
        while Arc::strong_count(&open) > 1 {
            let left = self.patience.saturating_sub(begin.elapsed());
            if left.is_zero() {
                // Whoever is last closes it.
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        drop(open);
    }

    /// It is where it was to go, or cannot be opened there.
    ///
    /// # Errors
    /// That of `opened`, which is told to whoever wants to use it as well.
    pub fn arrive(&self, opened: io::Result<T>) -> io::Result<()> {
        let (state, result) = match opened {
            Ok(open) => (Ok(Arc::new(open)), Ok(())),
            Err(error) => (Err(Away::Closed(errno(&error))), Err(error)),
        };
        // Dropped here, without the lock.
        drop(self.replace(state));
        result
    }

    fn replace(&self, state: Result<Arc<T>, Away>) -> Result<Arc<T>, Away> {
        let before = std::mem::replace(&mut *lock(&self.state), state);
        self.changed.notify_all();
        before
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    /// Says whether it is closed, and takes its time for that.
    struct Device<'a> {
        closed: &'a AtomicBool,
        takes: Duration,
    }

    impl Drop for Device<'_> {
        fn drop(&mut self) {
            thread::sleep(self.takes);
            self.closed.store(true, Ordering::Release);
        }
    }

    const A_WHILE: Duration = Duration::from_millis(30);

    fn device(closed: &AtomicBool) -> Device<'_> {
        let takes = Duration::ZERO;
        Device { closed, takes }
    }

    #[test]
    fn it_is_closed_when_nobody_uses_it_any_more() {
        let closed = AtomicBool::new(false);
        let place = Movable::new();
        place.arrive(Ok(device(&closed))).unwrap();
        thread::scope(|scope| {
            let used = place.get().unwrap();
            let mover = scope.spawn(|| {
                let open = place.begin_to_move().unwrap();
                place.close(open);
                closed.load(Ordering::Acquire)
            });
            // Somebody is resetting it, say.
            while place.is_open() {
                thread::yield_now();
            }
            thread::sleep(A_WHILE);
            assert!(!closed.load(Ordering::Acquire));
            assert_eq!(place.get().err(), Some(Away::Moving));
            drop(used);
            assert!(mover.join().unwrap());
        });
    }

    #[test]
    fn nobody_waits_for_it_to_be_closed_but_who_closes_it() {
        let closed = AtomicBool::new(false);
        let place = Movable::new();
        let (takes, closed) = (A_WHILE * 10, &closed);
        place.arrive(Ok(Device { closed, takes })).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| place.begin_to_move().map(|open| place.close(open)));
            while place.is_open() {
                thread::yield_now();
            }
            assert_eq!(place.get().err(), Some(Away::Moving));
            assert!(!closed.load(Ordering::Acquire));
        });
        assert!(closed.load(Ordering::Acquire));
    }

    #[test]
    fn whoever_waits_for_one_that_moves_has_it_when_it_has_arrived() {
        let (before, after) = (AtomicBool::new(false), AtomicBool::new(false));
        let place = Movable::new();
        place.arrive(Ok(device(&before))).unwrap();
        drop(place.begin_to_move());
        thread::scope(|scope| {
            let waiter = scope.spawn(|| place.settled());
            thread::sleep(A_WHILE);
            assert!(!waiter.is_finished());
            place.arrive(Ok(device(&after))).unwrap();
            assert_eq!(waiter.join().unwrap(), Ok(()));
        });
        assert!(place.get().is_ok());
    }

    #[test]
    fn one_that_could_not_be_opened_says_why_and_can_be_tried_again() {
        let closed = AtomicBool::new(false);
        let place = Movable::new();
        let failed = place.arrive(Err(Errno::EBUSY.into()));
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EBUSY));
        assert_eq!(place.settled(), Err(Away::Closed(Errno::EBUSY)));
        place.arrive(Ok(device(&closed))).unwrap();
        assert!(place.is_open());
    }

    #[test]
    fn nobody_waits_for_ever() {
        let closed = AtomicBool::new(false);
        let mut place = Movable::new();
        place.patience = A_WHILE;
        place.arrive(Ok(device(&closed))).unwrap();
        let used = place.get().unwrap();
        let open = place.begin_to_move().unwrap();
        place.close(open);
        assert_eq!(place.settled(), Err(Away::Moving));
        // It is closed with its last user.
        assert!(!closed.load(Ordering::Acquire));
        drop(used);
        assert!(closed.load(Ordering::Acquire));
    }
}
