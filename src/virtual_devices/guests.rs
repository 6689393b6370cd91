//! Which guests have virtio devices of ours: a session for each.

mod change;
mod conflicts;
mod disks;
mod turns;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use mio::Waker;
use virtio::memory::Budget;
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, Xen};

use super::kept;
use super::record;
use super::session::{End, Handle, Phase, Setup, Watched};
use super::xl_disk;
use crate::config::{Live, VirtioDevice};
use crate::control::virtio::VirtioGuest;
use crate::fdstore::FdStore;
use crate::session::nodes::optional;
use crate::text::{chain, printable};

/// Where xenstore has its domains.
pub(super) const DOMAINS: &str = "/local/domain";

/// Pieces of 2 MiB that are mapped of a guest beyond its memory: holes and the like.
const MORE_CHUNKS: usize = 64;
/// Of a guest whose memory is not known: 16 GiB.
const UNKNOWN_CHUNKS: usize = 8192;
/// KiB of a piece.
const CHUNK_KIB: usize = 2048;

/// What could not be done for want of descriptors or the like is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);

pub(super) use change::ChangeError;
pub(super) use turns::Turn;
use turns::Turns;

/// So long at most an operator waits for devices to be opened. Storage that takes longer will not answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// All sessions of guests with virtio devices.
#[derive(Debug)]
pub struct VirtualGuests {
    pub(super) xen: Arc<dyn Xen>,
    config: Arc<Live>,
    /// How much of their memory may be mapped.
    budget: Arc<Budget>,
    /// Their records.
    directory: PathBuf,
    /// What of their devices is kept open over a restart.
    fds: Arc<FdStore>,
    pub(super) sessions: Mutex<BTreeMap<DomId, Session>>,
    /// Whose devices are being changed. Never waited for under another lock.
    pub(super) turns: Arc<Turns>,
    /// Guests that ran when they were found, and are not served: that has been said.
    pub(super) refused: Mutex<BTreeMap<DomId, VirtioGuest>>,
    /// Guests that see a device of QEMU's where one of ours is to be: which.
    pub(super) conflicts: Mutex<BTreeMap<DomId, String>>,
    /// When to look again, if nothing is announced.
    retry: Mutex<Option<Instant>>,
    /// Wakes who calls [`VirtualGuests::follow`].
    waker: Arc<Waker>,
}

/// A guest that is served.
#[derive(Debug)]
pub(super) struct Session {
    pub name: String,
    /// Where its files are.
    pub record: PathBuf,
    pub handle: Handle,
}

/// A guest's devices are not there.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No session could be begun.
    #[error("the host has no thread or descriptor left for it")]
    Host(#[source] io::Error),
    /// They cannot be made.
    #[error("{0}")]
    Failed(String),
    /// Storage or a tap does not answer.
    #[error("storage or a tap has not answered within {} s", .0.as_secs())]
    TooLong(Duration),
}

impl VirtualGuests {
    /// None yet. Their records are in `directory`. `waker` wakes who follows, when there is another time for that.
    pub fn new(
        xen: Arc<dyn Xen>,
        config: Arc<Live>,
        directory: PathBuf,
        fds: Arc<FdStore>,
        waker: Arc<Waker>,
    ) -> Self {
        Self {
            xen,
            config,
            budget: Budget::of_process(),
            directory,
            fds,
            sessions: Mutex::default(),
            turns: Arc::default(),
            refused: Mutex::default(),
            conflicts: Mutex::default(),
            retry: Mutex::default(),
            waker,
        }
    }

    /// Starts to watch, and a session for each guest that is there.
    ///
    /// # Errors
    /// xenstore's.
    pub fn watch(self: &Arc<Self>) -> Result<Client, StoreError> {
        let mut store = self.xen.connect_xenstore()?;
        store.watch("@introduceDomain", "domains")?;
        store.watch("@releaseDomain", "domains")?;
        store.watch(xl_disk::BACKENDS, "disks")?;
        self.take_fds();
        self.scan(&mut store)?;
        Ok(store)
    }

    /// Follows what has changed since the last call, and tries again what is due.
    ///
    /// # Errors
    /// xenstore's.
    pub fn follow(self: &Arc<Self>, store: &mut Client) -> Result<(), StoreError> {
        if self.next_scan().is_some_and(|due| due <= Instant::now()) {
            self.scan(store)?;
        }
        // Until there is nothing: events that come during a scan are read with its answers, and nothing wakes us for them again.
        while store.next_event()?.is_some() {
            while store.next_event()?.is_some() {}
            self.scan(store)?;
        }
        Ok(())
    }

    /// When [`VirtualGuests::follow`] is to be called although nothing has changed.
    pub fn next_scan(&self) -> Option<Instant> {
        *lock(&self.retry)
    }

    fn try_again(&self) {
        *lock(&self.retry) = Instant::now().checked_add(RETRY);
        if let Err(error) = self.waker.wake() {
            error!("cannot wake the main loop: {error}");
        }
    }

    /// Ends all sessions, and waits for it. The guests' CPUs wait for the next daemon.
    pub fn end_sessions(&self) {
        self.turns.close();
        let mut sessions = std::mem::take(&mut *lock(&self.sessions));
        // All at once: some may wait for requests under way.
        sessions.values().for_each(|session| session.handle.stop());
        for session in sessions.values_mut() {
            session.handle.end();
        }
        // Whoever still waits for storage must not hold up the next daemon, which the store hears when this one has gone.
        self.fds.leave();
    }

    fn scan(self: &Arc<Self>, store: &mut Client) -> Result<(), StoreError> {
        *lock(&self.retry) = None;
        self.release();
        for domain in optional(store.directory(DOMAINS))?.unwrap_or_default() {
            if let Ok(domain) = domain.parse::<DomId>() {
                self.ensure(store, domain)?;
            }
        }
        self.scan_disks(store)
    }

    /// Whether nobody runs in it any more. Not when Xen cannot be asked.
    fn is_gone(&self, domain: DomId) -> bool {
        match self.xen.domain_info(domain) {
            Ok(info) => info.is_none_or(|info| info.gone),
            Err(error) => {
                debug!("domain {domain}: {}", chain(&error));
                self.try_again();
                false
            }
        }
    }

    /// Lets go of guests that are gone: as long as something of them is mapped, Xen cannot forget them.
    fn release(&self) {
        let gone: Vec<_> = {
            let mut sessions = lock(&self.sessions);
            let gone = sessions.extract_if(.., |domain, _| self.is_gone(*domain));
            gone.collect()
        };
        for (domain, session) in gone {
            drop(session);
            info!("domain {domain} is gone, and with it its virtio devices");
        }
        lock(&self.refused).retain(|domain, _| !self.is_gone(*domain));
        lock(&self.conflicts).retain(|domain, _| !self.is_gone(*domain));
        // Waited for: the next guest may want the same tap or socket.
        self.fds
            .retain(|name| record::owner(name).is_none_or(|domain| !self.is_gone(domain)));
        if let Err(error) = self.remove_records() {
            error!("{}: {error}", self.directory.display());
        }
    }

    /// What is kept open of guests that went away while no daemon was there to see it is to be seen before they are forgotten.
    fn take_fds(&self) {
        let has_records = fs::read_dir(&self.directory).is_ok_and(|mut all| all.next().is_some());
        if has_records && let Err(error) = self.fds.open() {
            warn!(
                "taps and consoles of guests are made anew: {}",
                chain(&error)
            );
        }
    }

    /// Also those of guests that went away while no daemon was there to see it.
    fn remove_records(&self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let owner = entry.file_name().to_str().and_then(record::owner);
            if owner.is_some_and(|domain| self.is_gone(domain)) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// What there is to know of a guest.
    ///
    /// # Errors
    /// xenstore's.
    pub(super) fn look(&self, store: &mut Client, domain: DomId) -> Result<Seen, StoreError> {
        let info = match self.xen.domain_info(domain) {
            Ok(Some(info)) if info.hvm && !info.gone => info,
            Ok(_) => return Ok(Seen::NotHvm),
            Err(error) => {
                warn!(
                    "domain {domain}: cannot tell whether it has virtio devices, trying again: {}",
                    chain(&error)
                );
                self.try_again();
                return Ok(Seen::Unknown);
            }
        };
        let home = format!("{DOMAINS}/{domain}");
        let mut node = |name| optional(store.read_string(&format!("{home}/{name}")));
        let name = node("name")?.unwrap_or_default();
        let vm = node("vm")?.unwrap_or_default();
        let uuid = vm.rsplit('/').next().unwrap_or_default();
        let config = self.config.get();
        let configured = config.guest.get(&name);
        Ok(Seen::Guest(Guest {
            has_run: info.has_run,
            record: record::directory(&self.directory, domain, uuid),
            chunks: chunks(node("memory/static-max")?.as_deref()),
            configured: configured.map_or_else(Vec::new, |guest| guest.virtio.clone()),
            name,
        }))
    }

    /// Starts a session for a guest that has virtio devices, and none yet. Where its devices are being changed, whoever does that sees to it.
    fn ensure(self: &Arc<Self>, store: &mut Client, domain: DomId) -> Result<(), StoreError> {
        let is_known =
            lock(&self.sessions).contains_key(&domain) || lock(&self.refused).contains_key(&domain);
        if is_known {
            return Ok(());
        }
        if let Some(turn) = self.turns.begin(domain) {
            self.ensure_in(&turn, store)?;
            self.end_turn(turn);
        }
        Ok(())
    }

    /// As [`VirtualGuests::ensure`].
    pub(super) fn ensure_in(
        self: &Arc<Self>,
        turn: &Turn,
        store: &mut Client,
    ) -> Result<(), StoreError> {
        let domain = turn.domain();
        if lock(&self.sessions).contains_key(&domain)
            || lock(&self.refused).contains_key(&domain)
            // Else it is still being built, and what is seen of it is half of it.
            || !store.is_introduced(domain)?
        {
            return Ok(());
        }
        let Seen::Guest(guest) = self.look(store, domain)? else {
            return Ok(());
        };
        let is_new = guest.is_new();
        if guest.configured.is_empty() && is_new {
            return Ok(());
        }
        if guest.has_run && is_new {
            let why = "it runs already, so its firmware would not find the virtio devices that it is to have: it gets none. Shut it down \
                       and create it anew";
            error!("domain {domain} ({}): {why}", printable(&guest.name));
            let refused = VirtioGuest {
                domain: domain.0,
                name: guest.name,
                state: "refused".to_owned(),
                reason: Some(why.to_owned()),
                devices: Vec::new(),
            };
            lock(&self.refused).insert(domain, refused);
            return Ok(());
        }
        if let Err(error) = self.begin(domain, &guest, is_new, true) {
            error!("domain {domain}: no session for its virtio devices, trying again: {error}");
            self.try_again();
        } else if is_new {
            self.look_for_conflicts(domain);
        }
        Ok(())
    }

    /// Begins a session, unless there is one.
    fn begin(&self, domain: DomId, guest: &Guest, is_new: bool, forgets: bool) -> io::Result<()> {
        let mut sessions = lock(&self.sessions);
        if sessions.contains_key(&domain) || self.turns.is_closed() {
            return Ok(());
        }
        let handle = Handle::start(Setup {
            xen: Arc::clone(&self.xen),
            domain,
            name: guest.name.clone(),
            configured: guest.configured.clone(),
            chunks: guest.chunks,
            budget: Arc::clone(&self.budget),
            record: guest.record.clone(),
            fds: Arc::clone(&self.fds),
            is_new,
            forgets,
        })?;
        let session = Session {
            name: guest.name.clone(),
            record: guest.record.clone(),
            handle,
        };
        sessions.insert(domain, session);
        Ok(())
    }

    /// Begins a session for a guest that has not run, and waits until its devices are there. Its files stay whatever becomes of it; one that
    /// fails is none.
    fn start(&self, domain: DomId, guest: &Guest, patience: Duration) -> Result<(), StartError> {
        self.begin(domain, guest, true, false)
            .map_err(StartError::Host)?;
        let Some(watched) = self.watched(domain) else {
            return Err(StartError::Failed("the daemon ends".to_owned()));
        };
        let error = match watched.wait(patience) {
            Phase::Serving => return Ok(()),
            Phase::Waiting(why) | Phase::Failed(why) => StartError::Failed(why),
            Phase::Opening => StartError::TooLong(patience),
        };
        self.end(domain);
        // The next session may be to have others.
        kept::forget_guest(&self.fds, &guest.record);
        Err(error)
    }

    /// Begins a session for a guest that had devices before. Nobody waits for it.
    fn resume(&self, domain: DomId, guest: &Guest) -> io::Result<()> {
        self.begin(domain, guest, false, false)
    }

    /// Ends a guest's session, and waits for it: it has the images open. `None`: there is none.
    fn end(&self, domain: DomId) -> Option<End> {
        let session = lock(&self.sessions).remove(&domain);
        session.map(|mut session| session.handle.end())
    }

    /// A guest's session, to be looked at without holding up the others.
    pub(super) fn watched(&self, domain: DomId) -> Option<Watched> {
        let sessions = lock(&self.sessions);
        let session = sessions.get(&domain)?;
        Some(session.handle.watched())
    }

    /// Where the files of a guest that is served are.
    pub(super) fn record_of(&self, domain: DomId) -> Option<PathBuf> {
        let sessions = lock(&self.sessions);
        Some(sessions.get(&domain)?.record.clone())
    }

    /// Whether nobody in it has looked for devices yet.
    fn may_be_equipped(&self, domain: DomId) -> bool {
        let info = self.xen.domain_info(domain);
        info.is_ok_and(|info| info.is_some_and(|info| !info.has_run && !info.gone))
    }

    /// Ends a turn, if nobody else has it.
    pub(super) fn let_go(self: &Arc<Self>, turn: Arc<Turn>) {
        if let Some(turn) = Arc::into_inner(turn) {
            self.end_turn(turn);
        }
    }

    /// Ends a turn. What others have left to it is done next.
    fn end_turn(self: &Arc<Self>, turn: Turn) {
        if self.is_gone(turn.domain()) {
            self.release();
        }
        if let Some(turn) = turn.end() {
            self.see_to(turn);
        }
    }

    /// Does for a guest, on a thread of its own, all that there is to do.
    fn see_to(self: &Arc<Self>, turn: Turn) {
        let (guests, domain) = (Arc::clone(self), turn.domain());
        let work = move || {
            let turn = Arc::new(turn);
            let done = guests.xen.connect_xenstore().and_then(|mut store| {
                guests.ensure_in(&turn, &mut store)?;
                guests.see_to_disks(&mut store, &turn)
            });
            if let Err(error) = done {
                error!(
                    "domain {domain}: its virtio disks, trying again: {}",
                    chain(&error)
                );
                guests.try_again();
            }
            guests.let_go(turn);
        };
        let thread = thread::Builder::new().name(format!("virtio change {domain}"));
        if let Err(error) = thread.spawn(work) {
            error!("domain {domain}: no thread for its virtio disks, trying again: {error}");
            self.try_again();
        }
    }
}

/// A domain that was looked at.
#[derive(Debug)]
pub(super) enum Seen {
    /// It could have virtio devices.
    Guest(Guest),
    /// It is none that could, or is gone.
    NotHvm,
    /// Xen could not be asked. That was said, and is tried again.
    Unknown,
}

/// A guest that has virtio devices, or could have.
#[derive(Debug)]
pub(super) struct Guest {
    pub name: String,
    /// It runs, or has before it was paused.
    pub has_run: bool,
    /// Where its files are.
    pub record: PathBuf,
    /// Pieces of its memory that may be mapped.
    chunks: usize,
    /// The devices that the configuration says it has.
    pub configured: Vec<VirtioDevice>,
}

impl Guest {
    /// None of its devices stands in a record.
    pub fn is_new(&self) -> bool {
        !record::is_kept(&self.record)
    }
}

/// Pieces of a guest's memory that may be mapped, where it has so many KiB.
fn chunks(memory: Option<&str>) -> usize {
    let kib = memory.and_then(|kib| kib.trim().parse::<usize>().ok());
    kib.map_or(UNKNOWN_CHUNKS, |kib| {
        kib.div_ceil(CHUNK_KIB).saturating_add(MORE_CHUNKS)
    })
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
