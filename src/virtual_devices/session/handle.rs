//! A session as others see it: what it is at, how its devices are, and its end.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::error;
use mio::{Poll, Waker};
use virtio::inspect::DeviceView;

use super::{Session, Setup, WAKE, lock};
use crate::rate_limit::RateLimit;
use crate::virtual_devices::backends::Terminal;
use crate::virtual_devices::missing::Missing;
use crate::virtual_devices::place::At;

/// A session that does not tell how its devices are within this time is in the middle of something.
const PATIENCE: Duration = Duration::from_secs(1);

/// A request's path is short.
const STACK: usize = 256 * 1024;

/// What a session is at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::virtual_devices) enum Phase {
    /// It opens what the devices are made of.
    Opening,
    /// It answers.
    Serving,
    /// The guest's CPUs wait: why.
    Waiting(String),
    /// The guest is new, and has none: why.
    Failed(String),
}

/// What the session's thread and others have in common.
#[derive(Debug)]
pub(in crate::virtual_devices) struct Shared {
    /// Here, for what it has woken is only seen as long as it is there.
    pub(super) waker: Waker,
    pub(super) phase: Mutex<Phase>,
    pub(super) changed: Condvar,
    pub(super) stop: AtomicBool,
    /// What the devices are made of is open: nothing waits for storage any more.
    pub(super) is_open: Mutex<bool>,
    /// Requests have not ended with it.
    pub(super) is_left_busy: AtomicBool,
    pub(super) terminals: Mutex<Vec<(At, Terminal)>>,
    /// Devices that are still to be opened, and why they are not.
    pub(super) missing: Mutex<BTreeMap<At, String>>,
    pub(super) questions: Mutex<Vec<mpsc::Sender<Answer>>>,
}

/// What a session says of itself.
#[derive(Debug, Clone)]
pub(in crate::virtual_devices) struct Answer {
    /// In the order in which they were placed.
    pub devices: Vec<DeviceView>,
}

/// How a session has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtual_devices) enum End {
    /// Nothing of it goes on.
    Quiet,
    /// It waits for storage, which does not answer. It will do nothing more to the guest but end the requests that were under way.
    Busy,
}

impl Shared {
    pub(super) fn set(&self, phase: Phase) {
        *lock(&self.phase) = phase;
        self.changed.notify_all();
    }

    pub fn set_missing(&self, missing: &[Missing]) {
        let reasons = missing.iter().map(|device| (device.at, device.why.clone()));
        *lock(&self.missing) = reasons.collect();
    }

    pub fn add_terminals(&self, terminals: Vec<(At, Terminal)>) {
        lock(&self.terminals).extend(terminals);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Has it end. True: it does so without waiting for storage.
    pub(super) fn stop(&self) -> bool {
        let is_open = lock(&self.is_open);
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            error!("cannot wake a session: {error}");
        }
        *is_open
    }

    /// What takes time begins. False: it is to end, and whoever waits for that is not to wait for storage.
    pub(super) fn begin_open(&self) -> bool {
        let mut is_open = lock(&self.is_open);
        let goes_on = !self.is_stopping();
        if goes_on {
            *is_open = false;
        }
        goes_on
    }

    /// What takes time is done. False: it is to end, and may not do anything to the guest, for another session may be there by now.
    pub(super) fn go_on(&self) -> bool {
        let mut is_open = lock(&self.is_open);
        *is_open = !self.is_stopping();
        *is_open
    }

    pub(super) fn ask(&self) -> Option<Answer> {
        if *lock(&self.phase) != Phase::Serving {
            return None;
        }
        let (sender, answer) = mpsc::channel();
        lock(&self.questions).push(sender);
        self.waker.wake().ok()?;
        answer.recv_timeout(PATIENCE).ok()
    }
}

/// A running session. Dropping it ends it, and leaves the server and its records to the next one; nobody waits for that.
#[derive(Debug)]
pub(in crate::virtual_devices) struct Handle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Begins to make the devices, to have Xen send the guest's accesses here, and to answer.
    ///
    /// # Errors
    /// The host has no thread or descriptor left for it.
    pub fn start(setup: Setup) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let shared = Arc::new(Shared {
            waker,
            phase: Mutex::new(Phase::Opening),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            is_open: Mutex::new(false),
            is_left_busy: AtomicBool::new(false),
            terminals: Mutex::default(),
            missing: Mutex::default(),
            questions: Mutex::default(),
        });
        let session = Session {
            poll,
            shared: Arc::clone(&shared),
            log_limit: RateLimit::new(10, Duration::from_secs(10)),
            setup,
        };
        let thread = thread::Builder::new()
            .name(format!("virtio {}", session.setup.domain))
            .stack_size(STACK)
            .spawn(move || session.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Tells it to end. Nobody waits.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Has it end, and waits for that, unless it waits for storage.
    pub fn end(&mut self) -> End {
        let is_open = self.shared.stop();
        if let Some(thread) = self.thread.take() {
            if !is_open && !thread.is_finished() {
                return End::Busy;
            }
            if thread.join().is_err() {
                error!("a session's thread has panicked; please report this");
            }
        }
        match self.shared.is_left_busy.load(Ordering::Acquire) {
            true => End::Busy,
            false => End::Quiet,
        }
    }

    /// To wait for it without holding it.
    pub fn watched(&self) -> Watched {
        Watched(Arc::clone(&self.shared))
    }
}

/// A session that is looked at.
#[derive(Debug)]
pub(in crate::virtual_devices) struct Watched(Arc<Shared>);

impl Watched {
    /// What it is at.
    pub fn phase(&self) -> Phase {
        lock(&self.0.phase).clone()
    }

    /// Where the ports of its consoles are, with their slots.
    pub fn terminals(&self) -> Vec<(At, Terminal)> {
        lock(&self.0.terminals).clone()
    }

    /// The devices that wait for what they are made of, and why.
    pub fn missing(&self) -> BTreeMap<At, String> {
        lock(&self.0.missing).clone()
    }

    /// How its devices are; `None`: it does not serve them now.
    pub fn ask(&self) -> Option<Answer> {
        self.0.ask()
    }

    /// Waits until it serves, or for so long: some of what keeps it from that passes.
    pub fn wait_until_served(&self, patience: Duration) -> Phase {
        let unserved = |phase: &Phase| matches!(phase, Phase::Opening | Phase::Waiting(_));
        self.wait_while(patience, unserved)
    }

    /// Waits until it is not opening any more, or for so long.
    pub fn wait(&self, patience: Duration) -> Phase {
        self.wait_while(patience, |phase| *phase == Phase::Opening)
    }

    fn wait_while(&self, patience: Duration, unsettled: impl Fn(&Phase) -> bool) -> Phase {
        let begun = Instant::now();
        let mut phase = lock(&self.0.phase);
        while unsettled(&phase) {
            let Some(left) = patience.checked_sub(begun.elapsed()) else {
                break;
            };
            phase = self
                .0
                .changed
                .wait_timeout(phase, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        phase.clone()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}
