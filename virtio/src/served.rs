//! State that a thread of its own serves. While it has the state it never waits for anything, so whoever
//! else needs the state waits for no more than a lock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How often that is looked at which nothing tells us of.
const LOOK_MILLISECONDS: u16 = 200;

/// When to go on if nothing happens.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Next {
    /// At once.
    pub more: bool,
    /// After a while.
    pub look: bool,
}

/// What the thread waits for.
pub(crate) trait Waiting {
    /// When to go on if nothing happens.
    fn next(&self) -> Next;

    /// The descriptors, and what of them is of interest.
    fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)>;
}

/// The state, and how its thread is woken and ended.
#[derive(Debug)]
pub(crate) struct Served<T> {
    state: Mutex<T>,
    wake: EventFd,
    stop: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<T: Send + 'static> Served<T> {
    /// Starts the thread. `step` does all that can be done. What waits for anything, it does without the lock.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start<W: Waiting>(
        name: String,
        state: T,
        mut step: impl FnMut(&Mutex<T>) -> W + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let served = Arc::new(Self {
            state: Mutex::new(state),
            wake: EventFd::from_value_and_flags(0, flags)?,
            stop: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let shared = Arc::clone(&served);
        let thread = thread::Builder::new().name(name).spawn(move || {
            while !shared.stop.load(Ordering::SeqCst) {
                let waiting = step(&shared.state);
                shared.wait(&waiting);
            }
        })?;
        *served.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(served)
    }

    /// The state, between two steps.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        lock(&self.state)
    }

    /// Has the thread take another step.
    pub fn wake(&self) {
        // Fails when the counter is full, and then the thread wakes anyway.
        let _ = self.wake.write(1);
    }

    /// Has the thread end, and waits for it, so that its descriptors are free for whoever comes next. Before it ends it finds the state as `let_go` leaves it. Not to be called by that thread.
    pub fn end(&self, let_go: impl FnOnce(&mut T)) {
        self.stop.store(true, Ordering::SeqCst);
        let_go(&mut self.lock());
        self.wake();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("a thread that served a virtio device has panicked; please report this");
        }
    }

    fn wait(&self, waiting: &impl Waiting) {
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let others = waiting.descriptors();
        fds.extend(others.map(|(fd, flags)| PollFd::new(fd, flags)));
        let timeout = match waiting.next() {
            Next { more: true, .. } => PollTimeout::ZERO,
            Next { look: true, .. } => PollTimeout::from(LOOK_MILLISECONDS),
            Next { .. } => PollTimeout::NONE,
        };
        // Interrupted or not, everything is looked at next.
        let _ = poll(&mut fds, timeout);
        let _ = self.wake.read();
    }
}

/// The state, for a step.
pub(crate) fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
