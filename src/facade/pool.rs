//! Threads for what may take long.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// As many threads as there are things to do, up to a limit; they come when needed and go after a while. What is beyond the limit waits its turn.
#[derive(Debug, Clone)]
pub(super) struct Pool(Arc<Shared>);

struct Shared {
    limit: usize,
    rest: Duration,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    /// Each is the request of one waiting process, so the queue is as short as the list of those.
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// What the facade's jobs do is a system call or a request to the driver.
const STACK: usize = 256 * 1024;

impl Pool {
    /// At most `limit` threads; each ends when it had nothing to do for `rest`.
    pub fn new(limit: usize, rest: Duration) -> Self {
        Self(Arc::new(Shared {
            limit,
            rest,
            state: Mutex::default(),
            wake: Condvar::new(),
        }))
    }

    /// Runs a job on one of the threads, as soon as one is free. On a machine that cannot make even one thread, runs it here.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads >= self.0.limit {
            drop(state);
            self.0.wake.notify_one();
            return;
        }
        let shared = self.0.clone();
        let thread = thread::Builder::new()
            .name("facade-pool".into())
            .stack_size(STACK)
            .spawn(move || shared.work());
        match thread {
            Ok(_) => state.threads = state.threads.saturating_add(1),
            Err(error) if state.threads == 0 => {
                log::error!(
                    "facade: cannot start a thread: {error}; a slow request now holds up the others"
                );
                let job = state.jobs.pop_back();
                drop(state);
                if let Some(job) = job {
                    job();
                }
            }
            Err(error) => log::warn!(
                "facade: cannot start another thread: {error}; the request waits for one of {}",
                state.threads
            ),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            state.idle = state.idle.saturating_add(1);
            let (waited, timeout) = self
                .wake
                .wait_timeout(state, self.rest)
                .unwrap_or_else(PoisonError::into_inner);
            state = waited;
            state.idle = state.idle.saturating_sub(1);
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads = state.threads.saturating_sub(1);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_slow_job_does_not_hold_up_the_next() {
        let pool = Pool::new(2, SOON);
        let (let_go, gate) = mpsc::channel::<()>();
        let (done, seen) = mpsc::channel();
        let slow = done.clone();
        pool.run(move || {
            gate.recv_timeout(SOON).unwrap();
            slow.send("slow").unwrap();
        });
        pool.run(move || done.send("quick").unwrap());
        assert_eq!(seen.recv_timeout(SOON), Ok("quick"));
        let_go.send(()).unwrap();
        assert_eq!(seen.recv_timeout(SOON), Ok("slow"));
    }

    #[test]
    fn jobs_beyond_the_limit_wait_and_are_done_in_order() {
        let pool = Pool::new(1, SOON);
        let (let_go, gate) = mpsc::channel::<()>();
        let (done, seen) = mpsc::channel();
        pool.run(move || gate.recv_timeout(SOON).unwrap());
        for number in 0..100 {
            let done = done.clone();
            pool.run(move || done.send(number).unwrap());
        }
        assert_eq!(pool.0.lock().threads, 1);
        assert!(seen.try_recv().is_err());
        let_go.send(()).unwrap();
        let order: Vec<i32> = (0..100).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        assert_eq!(order, (0..100).collect::<Vec<i32>>());
    }

    #[test]
    fn threads_with_nothing_to_do_end_and_come_again() {
        let pool = Pool::new(4, Duration::from_millis(5));
        for _ in 0..3 {
            let (done, seen) = mpsc::channel();
            pool.run(move || done.send(()).unwrap());
            seen.recv_timeout(SOON).unwrap();
            let start = std::time::Instant::now();
            while pool.0.lock().threads > 0 {
                assert!(start.elapsed() < SOON);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
