//! How a queue's threads are woken.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Condvar, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// What threads sleep on. Being woken before going to sleep counts, once.
#[derive(Debug)]
pub(super) enum Wake {
    /// Of one thread, which the kernel wakes, too.
    Descriptor(EventFd),
    /// Of several, of which each call wakes one. A descriptor would wake them all.
    Threads {
        /// One is to go on.
        called: Mutex<bool>,
        /// It became so.
        changed: Condvar,
    },
}

impl Wake {
    /// Of one thread and the kernel.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn descriptor() -> io::Result<Self> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        Ok(Self::Descriptor(event))
    }

    /// Of any number of threads.
    pub fn threads() -> Self {
        Self::Threads {
            called: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// Wakes one.
    pub fn one(&self) {
        match self {
            // Fails when the counter is full, and then the thread is woken anyway.
            Self::Descriptor(event) => drop(event.write(1)),
            Self::Threads { called, changed } => {
                *called.lock().unwrap_or_else(PoisonError::into_inner) = true;
                changed.notify_one();
            }
        }
    }

    /// Until the next call.
    pub fn sleep(&self) {
        match self {
            // Only an interrupting signal ends it early, which does no harm.
            Self::Descriptor(event) => drop(event.read()),
            Self::Threads { called, changed } => {
                let called = called.lock().unwrap_or_else(PoisonError::into_inner);
                let mut called = changed
                    .wait_while(called, |called| !*called)
                    .unwrap_or_else(PoisonError::into_inner);
                *called = false;
            }
        }
    }

    /// What the kernel is to write to.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Descriptor(event) => Some(event.as_raw_fd()),
            Self::Threads { .. } => None,
        }
    }
}

#[cfg(test)]
#[allow(missing_docs, clippy::arithmetic_side_effects)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::rings::PATIENCE;

    #[test]
    fn one_call_wakes_one_thread_and_a_call_ahead_counts() {
        let (wake, awake) = (Arc::new(Wake::threads()), Arc::new(AtomicUsize::new(0)));
        wake.one();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (wake, awake) = (Arc::clone(&wake), Arc::clone(&awake));
                std::thread::spawn(move || {
                    wake.sleep();
                    awake.fetch_add(1, Ordering::SeqCst);
                })
            })
            .collect();
        for woken in 1..=4 {
            let until = Instant::now() + PATIENCE;
            while awake.load(Ordering::SeqCst) < woken {
                assert!(Instant::now() < until);
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(awake.load(Ordering::SeqCst), woken);
            wake.one();
        }
        for thread in threads {
            assert!(thread.join().is_ok());
        }
    }
}
