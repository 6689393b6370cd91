//! Which guests have virtio devices of ours: a session for each.

mod disks;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, error, info};
use virtio::memory::Budget;
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, Xen};

use super::record;
use super::session::{Handle, SessionError, Setup};
use super::xl_disk;
use crate::config::{Live, VirtioDevice};
use crate::session::nodes::optional;
use crate::text::{chain, printable};

/// Where xenstore has its domains.
const DOMAINS: &str = "/local/domain";

/// Pieces of 2 MiB that are mapped of a guest beyond its memory: holes and the like.
const MORE_CHUNKS: usize = 64;
/// Of a guest whose memory is not known: 16 GiB.
const UNKNOWN_CHUNKS: usize = 8192;
/// KiB of a piece.
const CHUNK_KIB: usize = 2048;

/// All sessions of guests with virtio devices.
#[derive(Debug)]
pub struct VirtualGuests {
    xen: Arc<dyn Xen>,
    config: Arc<Live>,
    /// How much of their memory may be mapped.
    budget: Arc<Budget>,
    /// Their records.
    directory: PathBuf,
    sessions: Mutex<BTreeMap<DomId, Handle>>,
    /// Guests that are not served, of which that has been said.
    refused: Mutex<BTreeSet<DomId>>,
}

impl VirtualGuests {
    /// None yet. Their records are in `directory`.
    pub fn new(xen: Arc<dyn Xen>, config: Arc<Live>, directory: PathBuf) -> Self {
        Self {
            xen,
            config,
            budget: Budget::of_process(),
            directory,
            sessions: Mutex::default(),
            refused: Mutex::default(),
        }
    }

    /// Starts to watch, and a session for each guest that is there.
    ///
    /// # Errors
    /// xenstore's.
    pub fn watch(&self) -> Result<Client, StoreError> {
        let mut store = self.xen.connect_xenstore()?;
        store.watch("@introduceDomain", "domains")?;
        store.watch("@releaseDomain", "domains")?;
        store.watch(xl_disk::BACKENDS, "disks")?;
        self.scan(&mut store)?;
        Ok(store)
    }

    /// Follows what has changed since the last call.
    ///
    /// # Errors
    /// xenstore's.
    pub fn follow(&self, store: &mut Client) -> Result<(), StoreError> {
        // Until there is nothing: events that come during a scan are read with its answers, and nothing wakes us for them again.
        while store.next_event()?.is_some() {
            while store.next_event()?.is_some() {}
            self.scan(store)?;
        }
        Ok(())
    }

    /// Ends all sessions, and waits for it. The guests' CPUs wait for the next daemon.
    pub fn end_sessions(&self) {
        drop(std::mem::take(&mut *lock(&self.sessions)));
    }

    /// The guests that are served.
    pub fn list(&self) -> Vec<DomId> {
        lock(&self.sessions).keys().copied().collect()
    }

    fn scan(&self, store: &mut Client) -> Result<(), StoreError> {
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
        lock(&self.refused).retain(|domain| !self.is_gone(*domain));
        if let Err(error) = self.remove_records() {
            error!("{}: {error}", self.directory.display());
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

    /// What there is to know of a guest. `None`: it is none that could have virtio devices.
    fn look(&self, store: &mut Client, domain: DomId) -> Result<Option<Guest>, StoreError> {
        let info = match self.xen.domain_info(domain) {
            Ok(Some(info)) if info.hvm && !info.gone => info,
            _ => return Ok(None),
        };
        let home = format!("{DOMAINS}/{domain}");
        let mut node = |name| optional(store.read_string(&format!("{home}/{name}")));
        let name = node("name")?.unwrap_or_default();
        let vm = node("vm")?.unwrap_or_default();
        let uuid = vm.rsplit('/').next().unwrap_or_default();
        let config = self.config.get();
        let configured = config.guest.get(&name);
        Ok(Some(Guest {
            is_paused: info.paused,
            record: record::directory(&self.directory, domain, uuid),
            chunks: chunks(node("memory/static-max")?.as_deref()),
            configured: configured.map_or_else(Vec::new, |guest| guest.virtio.clone()),
            name,
        }))
    }

    /// Starts a session for a guest that has virtio devices, and none yet.
    fn ensure(&self, store: &mut Client, domain: DomId) -> Result<(), StoreError> {
        if lock(&self.sessions).contains_key(&domain) || lock(&self.refused).contains(&domain) {
            return Ok(());
        }
        let Some(guest) = self.look(store, domain)? else {
            return Ok(());
        };
        let new = guest.is_new();
        if guest.configured.is_empty() && new {
            return Ok(());
        }
        let name = printable(&guest.name);
        if !guest.is_paused && new {
            error!(
                "domain {domain} ({name}): it runs already, so its firmware would not find the virtio devices that it is to have: it gets \
                 none. Shut it down and create it anew"
            );
            lock(&self.refused).insert(domain);
            return Ok(());
        }
        if let Err(error) = self.start(domain, &guest, new) {
            error!(
                "domain {domain} ({name}): it has no virtio devices: {}",
                chain(&error)
            );
            // It starts without, and is not to get them later.
            if new && let Err(error) = fs::remove_dir_all(&guest.record) {
                error!("{}: {error}", guest.record.display());
            }
            lock(&self.refused).insert(domain);
        }
        Ok(())
    }

    fn start(&self, domain: DomId, guest: &Guest, is_new: bool) -> Result<(), SessionError> {
        let session = Handle::start(Setup {
            xen: Arc::clone(&self.xen),
            domain,
            name: guest.name.clone(),
            configured: guest.configured.clone(),
            chunks: guest.chunks,
            budget: Arc::clone(&self.budget),
            record: guest.record.clone(),
            is_new,
        })?;
        lock(&self.sessions).insert(domain, session);
        Ok(())
    }
}

/// A guest that has virtio devices, or could have.
#[derive(Debug)]
struct Guest {
    name: String,
    is_paused: bool,
    /// Where its files are.
    record: PathBuf,
    /// Pieces of its memory that may be mapped.
    chunks: usize,
    /// The devices that the configuration says it has.
    configured: Vec<VirtioDevice>,
}

impl Guest {
    /// None of its devices stands in a record.
    fn is_new(&self) -> bool {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
