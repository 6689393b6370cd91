//! One guest: a thread that answers its CPUs.
//!
//! It shares nothing with another guest's, and waits for nothing: what takes time is done by the devices'
//! own threads.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{error, info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use virtio::ioreq::{Server, ServerError};
use virtio::memory::{Budget, DomainMemory, Exhausted, GuestRam};
use xenbus::xenstore::Store;
use xenbus::{DomId, Xen};

use super::assembly::{AssemblyError, assemble};
use super::backends::Terminal;
use super::place::{At, settled};
use super::record::Record;
use crate::config::VirtioDevice;
use crate::rate_limit::RateLimit;
use crate::text::chain;

/// CPUs have the tokens below.
const WAKE: Token = Token(usize::MAX >> 1);

/// After a failure the guest's CPUs wait for so long at most: what has failed once mostly fails again.
const PAUSE: Duration = Duration::from_secs(1);

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
    /// It has not started yet, and can do without. One that had devices before is served as soon as
    /// that is possible: its CPUs wait.
    pub is_new: bool,
}

/// A session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("not enough of its memory can be mapped")]
    Memory(#[from] Exhausted),
    #[error("cannot wait for its CPUs")]
    Poll(#[source] io::Error),
    #[error("cannot keep its records in {path}")]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A running session. Dropping it ends it, and leaves the server and its records to the next one.
#[derive(Debug)]
pub(super) struct Handle {
    stop: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Makes the devices, has Xen send the guest's accesses here, and starts to answer.
    ///
    /// # Errors
    /// [`SessionError`]; of a guest that is not new only when there is no thread for it.
    pub fn start(setup: Setup) -> Result<Self, SessionError> {
        let poll = Poll::new().map_err(SessionError::Poll)?;
        let waker = Waker::new(poll.registry(), WAKE).map_err(SessionError::Poll)?;
        let stop = Arc::new(AtomicBool::new(false));
        let session = Session {
            poll,
            stop: Arc::clone(&stop),
            log_limit: RateLimit::new(10, Duration::from_secs(10)),
            setup,
        };
        // The thread first: a server that nobody answers for would hang the guest.
        let (tell, told) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("virtio {}", session.setup.domain))
            .stack_size(STACK)
            .spawn(move || {
                // Whoever started us waits for what is told.
                match open(&session.setup) {
                    Err(error) if session.setup.is_new => {
                        let _ = tell.send(Err(error));
                    }
                    opened => {
                        let _ = tell.send(Ok(()));
                        session.run(opened);
                    }
                }
            })
            .map_err(SessionError::Poll)?;
        let handle = Self {
            stop,
            waker,
            thread: Some(thread),
        };
        match told.recv() {
            Ok(opened) => opened.map(|()| handle),
            Err(_) => Err(SessionError::Poll(io::ErrorKind::Interrupted.into())),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            error!("cannot wake a session: {error}");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("a session's thread has panicked; please report this");
        }
    }
}

fn open(setup: &Setup) -> Result<Server, SessionError> {
    let failed = |source| SessionError::Record {
        path: setup.record.clone(),
        source,
    };
    let record = Record::open(setup.record.clone()).map_err(failed)?;
    let ledger = record.ledger().map_err(failed)?;
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
    let memory = DomainMemory::new(Arc::clone(xen) as _, domain);
    let share = setup.budget.share(setup.chunks)?;
    let ram = Arc::new(GuestRam::with_share(Arc::new(memory), share));
    let assembled = assemble(xen, domain, &setup.name, &ram, &record, &devices)?;
    announce(setup, &assembled.terminals);
    Ok(Server::open(
        Arc::clone(xen),
        domain,
        ram,
        ledger,
        assembled.targets,
    )?)
}

/// Tells `xl console -t serial -n NUMBER` where a console is. Nobody needs it to have the console, so a failure is only logged.
fn announce(setup: &Setup, terminals: &[(At, Terminal)]) {
    let domain = setup.domain;
    for (at, terminal) in terminals {
        let path = terminal.path.display();
        let Some(port) = &terminal.port else {
            info!("domain {domain}: the console in {at} is at {path}");
            let node = format!("/local/domain/{domain}/serial/{}/tty", at.number());
            let written = setup
                .xen
                .connect_xenstore()
                .and_then(|mut store| store.write(&node, path.to_string()));
            if let Err(error) = written {
                warn!(
                    "domain {domain}: xl console does not know of it: {}",
                    chain(&error)
                );
            }
            continue;
        };
        info!("domain {domain}: the port {port} in {at} is at {path}");
    }
}

struct Session {
    setup: Setup,
    poll: Poll,
    stop: Arc<AtomicBool>,
    log_limit: RateLimit,
}

impl Session {
    fn run(mut self, mut opened: Result<Server, SessionError>) {
        let domain = self.setup.domain;
        loop {
            if let Err(error) = opened.and_then(|server| self.serve(server)) {
                if self.log_limit.allow() {
                    error!(
                        "domain {domain}: its virtio devices are not served for now, and its CPUs wait: {}",
                        chain(&error)
                    );
                }
                // Woken when it is told to stop.
                let _ = self.poll.poll(&mut Events::with_capacity(1), Some(PAUSE));
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            opened = open(&self.setup);
        }
    }

    /// Answers CPUs until it is told to stop.
    fn serve(&mut self, mut server: Server) -> Result<(), SessionError> {
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
        while !self.stop.load(Ordering::Acquire) {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(SessionError::Poll)?,
            }
            for event in &events {
                if event.token() != WAKE {
                    server.serve(event.token().0)?;
                }
            }
            if let Some(problem) = server.take_problem()
                && self.log_limit.allow()
            {
                warn!("domain {}: {}", self.setup.domain, chain(&problem));
            }
        }
        Ok(())
    }
}
