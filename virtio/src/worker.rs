//! Threads that serve queues of requests: each takes a chain, works on it, and gives it back.
//!
//! The threads of a queue share it behind a lock that they hold for taking and giving back, never for
//! the work. Whoever finds the queue empty looks at it a little longer, as the next request is often
//! near, and a driver that is being looked at need not notify, which costs its vCPU a long way. Other
//! threads take part only when the work is slow enough to be worth waking them.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{Activation, Events};
use crate::memory::{GuestRam, TooShort, View};
use crate::queue::{Chain, Queue, RingError};

/// What a device does with a request.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Works on `chain`. Returns how many bytes were written to it from its beginning.
    ///
    /// # Errors
    /// It is no request, and there is no place in it to say so.
    fn handle(&self, chain: &Chain) -> Result<u32, TooShort>;

    /// Whether that takes long by its nature: what was done before it is announced first.
    fn takes_long(&self, _chain: &Chain) -> bool {
        false
    }
}

/// How a queue is served.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Service {
    /// How many threads.
    pub threads: usize,
    /// The longest time for which an empty queue is looked at before the thread sleeps.
    pub poll: Duration,
}

/// Work this long is worth another thread.
const SLOW: Duration = Duration::from_micros(50);
/// Chains given back before the driver is asked whether it wants to hear of them, if there are more.
const BATCH: u32 = 16;
/// The first time for which an empty queue is looked at, once it seems worth it.
const POLL_START: Duration = Duration::from_micros(4);

/// The threads of one queue.
#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    /// Threads that have not let go of everything yet.
    threads: Arc<AtomicUsize>,
}

struct Shared {
    index: u16,
    ram: Arc<GuestRam>,
    events: Arc<dyn Events>,
    handler: Arc<dyn Handler>,
    service: Service,
    lane: Mutex<Lane>,
    /// Wakes one thread.
    wake: EventFd,
    stop: AtomicBool,
    /// Nanoseconds that work took lately.
    pace: AtomicU32,
}

/// The queue, and what goes with it.
#[derive(Debug)]
struct Lane {
    queue: Queue,
    /// Chains given back since the driver was asked whether it wants to hear of it.
    unannounced: u32,
    /// A thread is looking at the empty queue, and sees to what comes.
    watched: bool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("index", &self.index)
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// Serves queue `index` from now on, beginning with what is in it.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(
        index: u16,
        queue: Queue,
        ram: &Arc<GuestRam>,
        events: &Arc<dyn Events>,
        handler: &Arc<dyn Handler>,
        service: Service,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            index,
            ram: Arc::clone(ram),
            events: Arc::clone(events),
            handler: Arc::clone(handler),
            service,
            lane: Mutex::new(Lane {
                queue,
                unannounced: 0,
                watched: false,
            }),
            wake: EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
            pace: AtomicU32::new(0),
        });
        let worker = Self {
            shared,
            threads: Arc::new(AtomicUsize::new(0)),
        };
        for _ in 0..service.threads.max(1) {
            let shared = Arc::clone(&worker.shared);
            let running = Arc::clone(&worker.threads);
            running.fetch_add(1, Ordering::SeqCst);
            let spawned = std::thread::Builder::new()
                .name(format!("virtio-queue{index}"))
                .spawn(move || {
                    shared.serve();
                    // The next one is woken to end, too.
                    shared.wake_one();
                    drop(shared);
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            if let Err(error) = spawned {
                worker.threads.fetch_sub(1, Ordering::SeqCst);
                // On drop those that run are told to stop.
                return Err(error);
            }
        }
        Ok(worker)
    }

    /// There may be something in the queue.
    pub fn notify(&self) {
        self.shared.wake_one();
    }

    /// Has the threads end after the requests that they work on.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_one();
    }

    /// All threads have ended, and hold neither guest memory nor anything of the device.
    pub fn is_stopped(&self) -> bool {
        self.threads.load(Ordering::SeqCst) == 0
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn wake_one(&self) {
        // Fails when the counter is full, and then somebody is woken anyway.
        let _ = self.wake.write(1);
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut chain = Chain::default();
        if let Err(error) = self.serve_chains(&mut chain) {
            // Once for all threads.
            if !self.stop.swap(true, Ordering::SeqCst) {
                self.events.needs_reset(&error);
            }
        }
    }

    fn serve_chains(&self, chain: &mut Chain) -> Result<(), ServeError> {
        let mut patience = Patience(Duration::ZERO);
        let mut written = None;
        while !self.is_stopping() {
            if self.exchange(written.take(), chain)? {
                let begun = Instant::now();
                written = Some(self.handler.handle(chain)?);
                self.note_pace(begun.elapsed());
            } else {
                chain.clear();
                self.wait(&mut patience)?;
            }
        }
        // What is done is given back even though there will be no more.
        if let Some(bytes) = written {
            let view = self.ram.view();
            let lane = &mut *self.lane();
            lane.queue.complete(&view, chain.head(), bytes)?;
            lane.unannounced = lane.unannounced.saturating_add(1);
            self.announce(lane, &view)?;
        }
        Ok(())
    }

    /// Gives back the last chain, and takes the next, if there is one.
    fn exchange(&self, written: Option<u32>, chain: &mut Chain) -> Result<bool, RingError> {
        let slow = self.service.threads > 1 && self.is_slow();
        let mut view = self.ram.view();
        let mut guard = self.lane();
        let lane = &mut *guard;
        if let Some(bytes) = written {
            lane.queue.complete(&view, chain.head(), bytes)?;
            lane.unannounced = lane.unannounced.saturating_add(1);
            if slow || lane.unannounced >= BATCH {
                self.announce(lane, &view)?;
            }
        }
        if !lane.queue.take(&self.ram, &mut view, chain)? {
            self.announce(lane, &view)?;
            return Ok(false);
        }
        if lane.unannounced > 0 && self.handler.takes_long(chain) {
            self.announce(lane, &view)?;
        }
        // While this thread works, others see to what is there and to what comes.
        let more = slow && !lane.watched && lane.queue.enable_notify(&view)?;
        drop(guard);
        if more {
            self.wake_one();
        }
        Ok(true)
    }

    fn announce(&self, lane: &mut Lane, view: &View) -> Result<(), RingError> {
        if std::mem::take(&mut lane.unannounced) > 0 && lane.queue.should_notify(view)? {
            self.events.used(self.index);
        }
        Ok(())
    }

    /// Looks at the empty queue for a while, then asks to be notified and sleeps until then. On
    /// return there may be something.
    fn wait(&self, patience: &mut Patience) -> Result<(), RingError> {
        let mut lane = self.lane();
        if lane.watched {
            // Who is looking at it finds what comes.
            drop(lane);
            self.sleep();
            return Ok(());
        }
        if patience.0 > Duration::ZERO {
            lane.watched = true;
            lane.queue.disable_notify(&self.ram.view())?;
            drop(lane);
            let found = self.watch(patience.0);
            lane = self.lane();
            lane.watched = false;
            if found? {
                return Ok(());
            }
        }
        let more = lane.queue.enable_notify(&self.ram.view())?;
        drop(lane);
        if !more {
            let asleep = Instant::now();
            self.sleep();
            patience.slept(asleep.elapsed(), self.service.poll);
        }
        Ok(())
    }

    fn watch(&self, time: Duration) -> Result<bool, RingError> {
        let begun = Instant::now();
        while begun.elapsed() < time && !self.is_stopping() {
            if self.lane().queue.has_next(&self.ram.view())? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    fn sleep(&self) {
        if !self.is_stopping() {
            // Only an interrupting signal ends it early, which does no harm.
            let _ = self.wake.read();
        }
    }

    fn is_slow(&self) -> bool {
        u128::from(self.pace.load(Ordering::Relaxed)) >= SLOW.as_nanos()
    }

    /// The mean of the time that work takes, the last one counting for an eighth.
    fn note_pace(&self, took: Duration) {
        let took = u32::try_from(took.as_nanos()).unwrap_or(u32::MAX) / 8;
        let before = self.pace.load(Ordering::Relaxed);
        let now = before.saturating_sub(before / 8).saturating_add(took);
        self.pace.store(now, Ordering::Relaxed);
    }
}

/// How long to look at an empty queue: longer when the next chain came soon after going to sleep,
/// not at all when it did not.
struct Patience(Duration);

impl Patience {
    fn slept(&mut self, slept: Duration, most: Duration) {
        self.0 = if slept < most {
            self.0.saturating_mul(2).max(POLL_START).min(most)
        } else {
            Duration::ZERO
        };
    }
}

/// Why a queue is served no more.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Request(#[from] TooShort),
}

/// The workers of all queues of a device, for devices whose queues all work alike.
pub(crate) struct Workers {
    handler: Arc<dyn Handler>,
    service: Service,
    live: Option<(Arc<GuestRam>, Arc<dyn Events>)>,
    /// Also those that are ending.
    workers: Vec<(u16, Worker)>,
}

impl Workers {
    pub fn new(handler: Arc<dyn Handler>, service: Service) -> Self {
        Self {
            handler,
            service,
            live: None,
            workers: Vec::new(),
        }
    }

    pub fn activate(&mut self, activation: Activation) {
        self.live = Some((activation.ram, activation.events));
        for (index, queue) in activation.queues {
            self.enable_queue(index, queue);
        }
    }

    pub fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.workers.retain(|(_, worker)| !worker.is_stopped());
        let Some((ram, events)) = &self.live else {
            return;
        };
        match Worker::start(index, queue, ram, events, &self.handler, self.service) {
            Ok(worker) => self.workers.push((index, worker)),
            Err(error) => events.needs_reset(&format_args!("queue {index} has no thread: {error}")),
        }
    }

    pub fn notify(&self, queue: u16) {
        for (_, worker) in self.of_queue(queue) {
            worker.notify();
        }
    }

    pub fn reset(&mut self) {
        self.live = None;
        for (_, worker) in &self.workers {
            worker.stop();
        }
    }

    pub fn is_reset(&self) -> bool {
        self.live.is_none() && self.workers.iter().all(|(_, worker)| worker.is_stopped())
    }

    pub fn reset_queue(&mut self, queue: u16) {
        for (_, worker) in self.of_queue(queue) {
            worker.stop();
        }
    }

    pub fn is_queue_reset(&self, queue: u16) -> bool {
        self.of_queue(queue).all(|(_, worker)| worker.is_stopped())
    }

    fn of_queue(&self, queue: u16) -> impl Iterator<Item = &(u16, Worker)> {
        self.workers
            .iter()
            .filter(move |(index, _)| *index == queue)
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers")
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]
mod tests {
    use super::*;
    use crate::features::Features;
    use crate::rings::{BUFFERS, Driver, Guest, PATIENCE, readable, writable};

    struct Nobody;

    impl Events for Nobody {
        fn used(&self, _: u16) {}
        fn config_changed(&self) {}
        fn needs_reset(&self, why: &dyn fmt::Display) {
            panic!("{why}");
        }
    }

    /// Takes its time, and notes how many take theirs with it.
    #[derive(Default)]
    struct Slow {
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Handler for Slow {
        fn handle(&self, _: &Chain) -> Result<u32, TooShort> {
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(3));
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(1)
        }
    }

    /// Chains to be read take long, and all wait for the test.
    #[derive(Default)]
    struct Flushes {
        begun: AtomicBool,
        go_on: AtomicBool,
    }

    impl Handler for Flushes {
        fn handle(&self, chain: &Chain) -> Result<u32, TooShort> {
            if self.takes_long(chain) {
                self.begun.store(true, Ordering::SeqCst);
                wait_for(&self.go_on);
            }
            Ok(0)
        }

        fn takes_long(&self, chain: &Chain) -> bool {
            !chain.reader().is_empty()
        }
    }

    #[derive(Default)]
    struct Announced(AtomicBool);

    impl Events for Announced {
        fn used(&self, _: u16) {
            self.0.store(true, Ordering::SeqCst);
        }
        fn config_changed(&self) {}
        fn needs_reset(&self, why: &dyn fmt::Display) {
            panic!("{why}");
        }
    }

    fn wait_for(flag: &AtomicBool) {
        let until = Instant::now() + PATIENCE;
        while !flag.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "it does not come");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_was_quick_is_announced_before_what_takes_long() {
        let guest = Guest::default();
        let mut driver = Driver::new(0, 8, Features::empty());
        driver.offer(&guest, &[writable(BUFFERS, 1)], None).unwrap();
        driver.offer(&guest, &[readable(BUFFERS, 1)], None).unwrap();
        let (flushes, announced) = (Arc::new(Flushes::default()), Arc::new(Announced::default()));
        let worker = Worker::start(
            0,
            driver.queue(&guest),
            &guest.ram,
            &(Arc::clone(&announced) as Arc<dyn Events>),
            &(Arc::clone(&flushes) as Arc<dyn Handler>),
            Service {
                threads: 1,
                poll: Duration::ZERO,
            },
        )
        .unwrap();
        wait_for(&flushes.begun);
        let told = announced.0.load(Ordering::SeqCst);
        flushes.go_on.store(true, Ordering::SeqCst);
        assert!(told, "the first waits for the second");
        drop(worker);
    }

    #[test]
    fn slow_work_is_shared_by_the_threads_and_each_chain_given_back_once() {
        for events in [Features::empty(), Features::EVENT_IDX] {
            let guest = Guest::default();
            let mut driver = Driver::new(0, 64, events);
            let slow = Arc::new(Slow::default());
            let worker = Worker::start(
                0,
                driver.queue(&guest),
                &guest.ram,
                &(Arc::new(Nobody) as Arc<dyn Events>),
                &(Arc::clone(&slow) as Arc<dyn Handler>),
                Service {
                    threads: 4,
                    poll: Duration::from_micros(50),
                },
            )
            .unwrap();
            let mut open = Vec::new();
            let until = Instant::now() + PATIENCE;
            for _ in 0..6 {
                for _ in 0..20 {
                    open.push(driver.offer(&guest, &[writable(BUFFERS, 1)], None).unwrap());
                }
                worker.notify();
                while !open.is_empty() {
                    match driver.used(&guest) {
                        Some((head, 1)) => open.retain(|open| *open != head),
                        Some(other) => panic!("{other:?}"),
                        None => assert!(Instant::now() < until, "{} are missing", open.len()),
                    }
                    std::thread::yield_now();
                }
            }
            assert!(slow.most.load(Ordering::SeqCst) > 1);
            worker.stop();
            while !worker.is_stopped() {
                assert!(Instant::now() < until, "the threads do not end");
                std::thread::yield_now();
            }
        }
    }
}
