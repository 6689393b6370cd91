//! One guest: a thread that answers its CPUs.
//!
//! It shares nothing with another guest's, and nobody waits for it but who asks how it is: what takes time when it begins, as opening an
//! image on slow storage, holds up its own guest alone. What takes time later is done by the devices' own threads.

mod handle;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use virtio::ioreq::{Problem, Server, ServerError};
use virtio::memory::{Budget, DomainMemory, Exhausted, GuestRam};
use xenbus::{DomId, Xen};

use super::assembly::{AssemblyError, assemble, open_backends};
use super::kept;
use super::missing::Search;
use super::place::settled;
use super::record::Record;
use super::terminals::announce;
use crate::config::VirtioDevice;
use crate::fdstore::FdStore;
use crate::rate_limit::RateLimit;
use crate::text::{chain, printable};

pub(super) use handle::{Answer, End, Handle, Phase, Shared, Watched};

/// CPUs have the tokens below.
const WAKE: Token = Token(usize::MAX >> 1);

/// After a failure the guest's CPUs wait for so long, and twice as long each time: what has failed several times will mostly fail again.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// So long a session that ends waits for requests under way.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(1);

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
