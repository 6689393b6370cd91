//! Threads that serve queues of requests: each takes a chain, works on it, and gives it back.
//!
//! Where the kernel can do the work meanwhile (io_uring), a queue has one thread, which begins all that
//! it finds with one system call ([`ringed`]). Elsewhere a queue's threads share it behind a lock that
//! they hold for taking and giving back, never for the work; all but one take part only when the work
//! waits for something. Whoever finds the queue empty looks at it a little longer, as the next request
//! is often near, and a driver that is being looked at need not notify, which costs its vCPU a long way.

mod patience;
mod ringed;
mod wake;
mod workers;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

use crate::device::Events;
use crate::memory::{GuestRam, Ring, TooShort, Transfer, View};
use crate::queue::{Chain, Queue, RingError};
use patience::Patience;
use wake::Wake;

pub(crate) use workers::Workers;

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

    /// The file for which the kernel can do requests meanwhile, if there is one.
    fn file(&self) -> Option<&File> {
        None
    }

    /// What the kernel can do of `chain` meanwhile. `None`: all of it is to be done by
    /// [`Handler::handle`], and so is what the kernel does not do whole.
    fn transfer(&self, _chain: &Chain) -> Option<Transfer> {
        None
    }

    /// Works on the rest of `chain`, of which the kernel has done `transfer`. Returns and fails as
    /// [`Handler::handle`] does.
    ///
    /// # Errors
    /// As there.
    fn finish(&self, chain: &Chain, _transfer: Transfer) -> Result<u32, TooShort> {
        self.handle(chain)
    }

    /// Tells the driver that `chain` has failed. Returns and fails as [`Handler::handle`] does.
    ///
    /// # Errors
    /// As there.
    fn fail(&self, chain: &Chain) -> Result<u32, TooShort> {
        self.handle(chain)
    }
}

/// How a queue is served.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Service {
    /// How many threads, where the kernel cannot do the work meanwhile.
    pub threads: usize,
    /// The longest time for which an empty queue is looked at before the thread sleeps.
    pub poll: Duration,
}

/// Of so many works in a row one is seen to wait or not.
const SAMPLE: u32 = 16;
/// Chains given back before the driver is asked whether it wants to hear of them, if there are more.
const BATCH: u32 = 16;

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
    wake: Wake,
    stop: AtomicBool,
    /// Work waited for something lately, which is worth another thread.
    waits: AtomicBool,
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
        let (mut ring, wake) = match ringed::ring(&**handler, queue.size()) {
            Some((ring, wake)) => (Some(ring), wake),
            None => (None, Wake::threads()),
        };
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
            wake,
            stop: AtomicBool::new(false),
            waits: AtomicBool::new(false),
        });
        let worker = Self {
            shared,
            threads: Arc::new(AtomicUsize::new(0)),
        };
        let threads = if ring.is_some() {
            1
        } else {
            service.threads.max(1)
        };
        for _ in 0..threads {
            let shared = Arc::clone(&worker.shared);
            let ring = ring.take();
            let running = Arc::clone(&worker.threads);
            running.fetch_add(1, Ordering::SeqCst);
            let spawned = std::thread::Builder::new()
                .name(format!("virtio-queue{index}"))
                .spawn(move || {
                    shared.serve(ring);
                    // The next one is woken to end, too.
                    shared.wake.one();
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
        self.shared.wake.one();
    }

    /// Has the threads end after the requests that they work on.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake.one();
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
    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, ring: Option<Ring>) {
        let served = match ring {
            Some(mut ring) => self.serve_by(&mut ring),
            None => self.serve_chains(&mut Chain::default()),
        };
        if let Err(error) = served {
            // Once for all threads.
            if !self.stop.swap(true, Ordering::SeqCst) {
                self.events.needs_reset(&error);
            }
        }
    }

    fn serve_chains(&self, chain: &mut Chain) -> Result<(), ServeError> {
        let mut patience = Patience::new(self.service.poll);
        let mut written = None;
        let mut count = 0u32;
        while !self.is_stopping() {
            if self.exchange(written.take(), chain)? {
                written = Some(self.work(chain, count)?);
                count = count.wrapping_add(1);
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

    fn work(&self, chain: &Chain, count: u32) -> Result<u32, TooShort> {
        let seen = self.service.threads > 1
            && (self.waits.load(Ordering::Relaxed) || count.is_multiple_of(SAMPLE));
        let before = seen.then(waits);
        let written = self.handler.handle(chain)?;
        if let Some(before) = before {
            self.waits.store(waits() != before, Ordering::Relaxed);
        }
        Ok(written)
    }

    /// Gives back the last chain, and takes the next, if there is one.
    fn exchange(&self, written: Option<u32>, chain: &mut Chain) -> Result<bool, RingError> {
        let slow = self.waits.load(Ordering::Relaxed);
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
            self.wake.one();
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
        if patience.is_curious() {
            lane.watched = true;
            lane.queue.disable_notify(&self.ram.view())?;
            drop(lane);
            let found = patience.look(|| self.has_work());
            lane = self.lane();
            lane.watched = false;
            if found? {
                return Ok(());
            }
        }
        let more = lane.queue.enable_notify(&self.ram.view())?;
        drop(lane);
        if !more {
            patience.sleep(|| self.sleep());
        }
        Ok(())
    }

    /// There is a chain to be taken, or the threads are to end.
    fn has_work(&self) -> Result<bool, RingError> {
        Ok(self.is_stopping() || self.lane().queue.has_next(&self.ram.view())?)
    }

    fn sleep(&self) {
        if !self.is_stopping() {
            self.wake.sleep();
        }
    }
}

/// How often this thread has waited for something.
fn waits() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// Why a queue is served no more.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Request(#[from] TooShort),
    #[error("the kernel takes no requests for the image any more")]
    Kernel(#[from] io::Error),
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::features::Features;
    use crate::rings::{BUFFERS, Driver, Guest, Nobody, PATIENCE, readable, writable};

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
