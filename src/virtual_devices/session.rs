//! One guest: a thread that answers its CPUs.
//!
//! It shares nothing with another guest's, and nobody waits for it but who asks how it is: what takes time when it begins, as opening an
//! image on slow storage, holds up its own guest alone. What takes time later is done by the devices' own threads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use virtio::inspect::DeviceView;
use virtio::ioreq::{Problem, Server, ServerError};
use virtio::memory::{Budget, DomainMemory, Exhausted, GuestRam};
use xenbus::{DomId, Xen};

use super::assembly::{AssemblyError, assemble, open_backends};
use super::backends::Terminal;
use super::kept;
use super::missing::{Missing, Search};
use super::place::{At, settled};
use super::record::Record;
use super::terminals::announce;
use crate::config::VirtioDevice;
use crate::fdstore::FdStore;
use crate::rate_limit::RateLimit;
use crate::text::{chain, printable};

/// CPUs have the tokens below.
const WAKE: Token = Token(usize::MAX >> 1);

/// After a failure the guest's CPUs wait for so long, and twice as long each time: what has failed several times will mostly fail again.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A session that does not tell how its devices are within this time is in the middle of something.
const PATIENCE: Duration = Duration::from_secs(1);

/// So long a session that ends waits for requests under way.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(1);

/// A request's path is short.
const STACK: usize = 256 * 1024;

/// What a session needs.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub xen: Arc<dyn Xen>,
    pub domain: DomId,
    /// The guest's name.
    pub name: String,
    /// What the configuration says. It counts for a guest that is new.
    pub configured: Vec<VirtioDevice>,
    /// Pieces of 2 MiB of its memory that may be mapped.
    pub chunks: usize,
    /// Of all guests.
    pub budget: Arc<Budget>,
    /// Where its files are.
    pub record: PathBuf,
    /// What of its devices is kept open over a restart.
    pub fds: Arc<FdStore>,
    /// It has not started yet, and can do without. One that had devices before is served as soon as
    /// that is possible: its CPUs wait.
    pub is_new: bool,
    /// If it is new and cannot have its devices, its files are removed: it starts without, and is not to get them later.
    pub forgets: bool,
}

/// A session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("it was told to end")]
    Stopped,
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("not enough of its memory can be mapped")]
    Memory(#[from] Exhausted),
    #[error(
        "Xen does not send here what the guest asks of its devices; `xl dmesg` may say why, and with fewer devices it may"
    )]
    Claim(#[source] Problem),
    #[error("cannot wait for its CPUs")]
    Poll(#[source] io::Error),
    #[error("there is no thread to look for those of its devices that are missing")]
    Search(#[source] io::Error),
    #[error("cannot keep its records in {path}")]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What a session is at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
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
pub(super) struct Shared {
    /// Here, for what it has woken is only seen as long as it is there.
    waker: Waker,
    phase: Mutex<Phase>,
    changed: Condvar,
    stop: AtomicBool,
    /// What the devices are made of is open: nothing waits for storage any more.
    is_open: Mutex<bool>,
    /// Requests have not ended with it.
    is_left_busy: AtomicBool,
    terminals: Mutex<Vec<(At, Terminal)>>,
    /// Devices that are still to be opened, and why they are not.
    missing: Mutex<BTreeMap<At, String>>,
    questions: Mutex<Vec<mpsc::Sender<Answer>>>,
}

/// What a session says of itself.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// In the order in which they were placed.
    pub devices: Vec<DeviceView>,
}

/// How a session has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing of it goes on.
    Quiet,
    /// It waits for storage, which does not answer. It will do nothing more to the guest but end the requests that were under way.
    Busy,
}

impl Shared {
    fn set(&self, phase: Phase) {
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

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Has it end. True: it does so without waiting for storage.
    fn stop(&self) -> bool {
        let is_open = lock(&self.is_open);
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            error!("cannot wake a session: {error}");
        }
        *is_open
    }

    /// What takes time begins. False: it is to end, and whoever waits for that is not to wait for storage.
    fn begin_open(&self) -> bool {
        let mut is_open = lock(&self.is_open);
        let goes_on = !self.is_stopping();
        if goes_on {
            *is_open = false;
        }
        goes_on
    }

    /// What takes time is done. False: it is to end, and may not do anything to the guest, for another session may be there by now.
    fn go_on(&self) -> bool {
        let mut is_open = lock(&self.is_open);
        *is_open = !self.is_stopping();
        *is_open
    }

    fn ask(&self) -> Option<Answer> {
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
pub(super) struct Handle {
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
pub(super) struct Watched(Arc<Shared>);

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

struct Session {
    setup: Setup,
    poll: Poll,
    shared: Arc<Shared>,
    log_limit: RateLimit,
}

impl Drop for Session {
    /// Whoever waits for it is not to wait for nothing, whatever it has ended with.
    fn drop(&mut self) {
        if !matches!(*lock(&self.shared.phase), Phase::Failed(_)) {
            let why = "its thread has ended".to_owned();
            self.shared.set(Phase::Failed(why));
        }
        lock(&self.shared.questions).clear();
    }
}

impl Session {
    fn run(mut self) {
        let domain = self.setup.domain;
        let mut pause = FIRST_PAUSE;
        let mut server = None;
        while !self.shared.is_stopping() {
            let failed = match self.open() {
                Ok((opened, search)) => {
                    self.setup.is_new = false;
                    self.shared.set(Phase::Serving);
                    let opened = server.insert(opened);
                    let begun = Instant::now();
                    let served = self.serve(opened);
                    drop(search);
                    if begun.elapsed() > LONGEST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    let Err(error) = served else { break };
                    error
                }
                // What it has kept is its successor's by now, or was forgotten.
                Err(_) if self.shared.is_stopping() => return,
                Err(error) if self.setup.is_new => {
                    self.give_up(&error);
                    return;
                }
                Err(error) => error,
            };
            let why = chain(&failed);
            if self.log_limit.allow() {
                error!(
                    "domain {domain}: its virtio devices are not served for now, and its CPUs wait: {why}"
                );
            }
            self.shared.set(Phase::Waiting(why));
            self.pause(pause);
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
            // What the former devices have begun would be done twice, and could be done late.
            while server.as_mut().is_some_and(|server| !server.halt()) && !self.shared.is_stopping()
            {
                self.pause(FIRST_PAUSE);
            }
            if self.shared.is_stopping() {
                break;
            }
            server = None;
        }
        if let Some(server) = &mut server {
            self.end(server);
        }
    }

    /// Waits until nothing of the devices goes on: what they have begun the next ones would do a second time. Requests whose storage does not
    /// answer keep their device's record locked, for which the next session waits.
    fn end(&self, server: &mut Server) {
        let begun = Instant::now();
        while !server.halt() {
            if begun.elapsed() >= LAST_REQUESTS {
                self.shared.is_left_busy.store(true, Ordering::Release);
                error!(
                    "domain {}: requests to its virtio devices have not ended, as their storage does not answer: they may still read and write",
                    self.setup.domain
                );
                return;
            }
            thread::sleep(LOOK);
        }
    }

    /// The guest is new, and has none.
    fn give_up(&self, error: &SessionError) {
        let why = chain(error);
        error!(
            "domain {} ({}): it has no virtio devices: {why}",
            self.setup.domain,
            printable(&self.setup.name),
        );
        kept::forget_guest(&self.setup.fds, &self.setup.record);
        if self.setup.forgets {
            self.remove_record();
        }
        self.shared.set(Phase::Failed(why));
    }

    fn remove_record(&self) {
        match fs::remove_dir_all(&self.setup.record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                error!("{}: {error}", self.setup.record.display());
            }
            _ => {}
        }
    }

    /// Woken when it is told to stop.
    fn pause(&mut self, length: Duration) {
        let _ = self.poll.poll(&mut Events::with_capacity(1), Some(length));
    }

    /// First what can fail: what the devices are made of, and Xen's side. Only then the devices come to life.
    fn open(&self) -> Result<(Server, Option<Search>), SessionError> {
        let setup = &self.setup;
        if !self.shared.begin_open() {
            return Err(SessionError::Stopped);
        }
        let failed = |source| SessionError::Record {
            path: setup.record.clone(),
            source,
        };
        let record = Record::open(setup.record.clone()).map_err(failed)?;
        let mut devices = match record.devices().map_err(failed)? {
            Some(devices) => devices,
            None => {
                let devices = settled(&setup.configured).map_err(AssemblyError::from)?;
                record.set_devices(&devices).map_err(failed)?;
                devices
            }
        };
        devices.extend(record.disks().map_err(failed)?.into_values());
        let (xen, domain) = (&setup.xen, setup.domain);
        let info = xen.domain_info(domain).ok().flatten();
        let runs = !setup.is_new && info.is_some_and(|info| info.has_run);
        let is_wanted = || !self.shared.is_stopping();
        let (opened, missing) = open_backends(setup, runs, &devices, is_wanted)?;
        if !self.shared.go_on() {
            return Err(SessionError::Stopped);
        }
        let memory = DomainMemory::new(Arc::clone(xen) as _, domain);
        let share = setup.budget.share(setup.chunks)?;
        let ram = Arc::new(GuestRam::with_share(Arc::new(memory), share));
        let ledger = record.ledger().map_err(failed)?;
        let mut server = Server::open(Arc::clone(xen), domain, Arc::clone(&ram), ledger)?;
        let assembled = assemble(xen, domain, &ram, &record, opened);
        let placed = assembled.map_err(SessionError::from).and_then(|assembled| {
            announce(&**xen, domain, &assembled.terminals);
            *lock(&self.shared.terminals) = assembled.terminals;
            server.place(assembled.targets);
            match server.take_problem() {
                Some(problem) if setup.is_new => Err(SessionError::Claim(problem)),
                Some(problem) => {
                    warn!("domain {domain}: {}", chain(&problem));
                    Ok(())
                }
                None => Ok(()),
            }
        });
        match placed {
            Ok(()) => {
                let search = Search::start(setup, &self.shared, missing);
                Ok((server, search.map_err(SessionError::Search)?))
            }
            // The guest is to have nothing of it.
            Err(error) if setup.is_new => {
                server.destroy()?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Answers CPUs until it is told to stop.
    fn serve(&mut self, server: &mut Server) -> Result<(), SessionError> {
        let fds: Vec<_> = server.fds().map(|fd| fd.as_raw_fd()).collect();
        for (index, fd) in fds.iter().enumerate() {
            let registry = self.poll.registry();
            registry
                .register(&mut SourceFd(fd), Token(index), Interest::READABLE)
                .map_err(SessionError::Poll)?;
        }
        info!(
            "domain {}: answering for its virtio devices, as IOREQ server {}",
            self.setup.domain,
            server.id()
        );
        // They may have been waiting.
        server.serve_all()?;
        let mut events = Events::with_capacity(8);
        while !self.shared.is_stopping() {
            let pause = server.is_holding().then_some(LOOK);
            match self.poll.poll(&mut events, pause) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(SessionError::Poll)?,
            }
            for event in &events {
                if event.token() == WAKE {
                    self.answer_questions(server);
                } else {
                    server.serve(event.token().0)?;
                }
            }
            server.go_on()?;
            if let Some(problem) = server.take_problem()
                && self.log_limit.allow()
            {
                warn!("domain {}: {}", self.setup.domain, chain(&problem));
            }
        }
        Ok(())
    }

    fn answer_questions(&self, server: &Server) {
        let questions = std::mem::take(&mut *lock(&self.shared.questions));
        for question in questions {
            // Who has asked may have given up.
            let _ = question.send(Answer {
                devices: server.inspect(),
            });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
