//! The guests: a session for each whose backend the toolstack makes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use mio::Waker;
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, Xen, XenbusState};

use super::lock_of;
use crate::host::devices::Devices;
use crate::host::record::Phase;
use crate::session::nodes::{self, BACKENDS, ERRORS, Paths, optional};
use crate::session::{Handle, Setup, Status};
use crate::text::chain;
use crate::trace::Source;

/// A session that failed is started again after a pause, which doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A pause before a guest's next session.
#[derive(Debug, Clone, Copy)]
struct Pause {
    length: Duration,
    until: Instant,
}

/// All sessions. A guest has one, for the backend device of number 0: toolstacks make no other.
#[derive(Debug)]
pub struct Guests {
    xen: Arc<dyn Xen>,
    devices: Arc<Devices>,
    waker: Arc<Waker>,
    sessions: Mutex<BTreeMap<DomId, Handle>>,
    /// Guests whose last session failed.
    pauses: Mutex<BTreeMap<DomId, Pause>>,
}

impl Guests {
    /// None yet. `waker` is woken when a session has ended.
    pub fn new(xen: Arc<dyn Xen>, devices: Arc<Devices>, waker: Arc<Waker>) -> Arc<Self> {
        Arc::new(Self {
            xen,
            devices,
            waker,
            sessions: Mutex::default(),
            pauses: Mutex::default(),
        })
    }

    /// Starts to watch, and a session for each guest that is there.
    ///
    /// # Errors
    /// xenstore's.
    pub fn watch(&self) -> Result<Client, StoreError> {
        let mut store = self.xen.connect_xenstore()?;
        store.watch(BACKENDS, "guests")?;
        self.scan(&mut store)?;
        Ok(store)
    }

    /// Follows what has changed since the last call.
    ///
    /// # Errors
    /// xenstore's.
    pub fn follow(&self, store: &mut Client) -> Result<(), StoreError> {
        while let Some(event) = store.next_event()? {
            match numbers(&event.path) {
                Some((domain, Some(device))) => self.ensure(store, domain, device)?,
                // A change above: anything may be new.
                Some((_, None)) | None => self.scan(store)?,
            }
        }
        Ok(())
    }

    fn scan(&self, store: &mut Client) -> Result<(), StoreError> {
        for domain in optional(store.directory(BACKENDS))?.unwrap_or_default() {
            let Ok(domain) = domain.parse::<DomId>() else {
                continue;
            };
            for device in
                optional(store.directory(&format!("{BACKENDS}/{domain}")))?.unwrap_or_default()
            {
                if let Ok(device) = device.parse() {
                    self.ensure(store, domain, device)?;
                }
            }
        }
        Ok(())
    }

    /// Starts a session where there is a backend device and none yet.
    fn ensure(&self, store: &mut Client, domain: DomId, device: u32) -> Result<(), StoreError> {
        let mut sessions = lock_of(&self.sessions);
        // One that has ended is swept first, which knows whether the next is to wait, and comes back here.
        if device == 0 && sessions.contains_key(&domain) {
            return Ok(());
        }
        let backend = Paths::backend(domain, device);
        let state = store.read_state(&format!("{backend}/state"))?;
        if state == XenbusState::Unknown {
            return Ok(());
        }
        if device != 0 {
            return refuse(store, domain, device, state);
        }
        let paused = |pause: &Pause| pause.until > Instant::now();
        if lock_of(&self.pauses).get(&domain).is_some_and(paused) {
            return Ok(());
        }
        let setup = Setup {
            xen: Arc::clone(&self.xen),
            devices: Arc::clone(&self.devices),
            domain,
        };
        let waker = Arc::clone(&self.waker);
        let ended = move || {
            if let Err(error) = waker.wake() {
                error!("cannot wake the daemon: {error}");
            }
        };
        match Handle::start(setup, ended) {
            Ok(session) => {
                info!("domain {domain}: serving its PCI devices");
                sessions.insert(domain, session);
            }
            Err(error) => error!(
                "domain {domain}: cannot serve its PCI devices: {error}; restart pcibackd when memory is free again"
            ),
        }
        Ok(())
    }

    /// Forgets sessions that have ended, and starts those that are due: where the toolstack made a device anew at that very moment, or
    /// where the last one failed and its pause is over.
    pub fn sweep(&self) {
        let ended: Vec<_> = {
            let mut sessions = lock_of(&self.sessions);
            sessions
                .extract_if(.., |_, session| session.has_ended())
                .collect()
        };
        {
            let mut pauses = lock_of(&self.pauses);
            for (domain, session) in &ended {
                if session.has_failed() {
                    let last = pauses.get(domain).map(|pause| pause.length);
                    pauses.insert(*domain, Pause::after(last, session.age()));
                } else {
                    pauses.remove(domain);
                }
            }
            if ended.is_empty() && pauses.is_empty() {
                return;
            }
        }
        debug!("{} sessions have ended", ended.len());
        let scan = self
            .xen
            .connect_xenstore()
            .and_then(|mut store| self.scan(&mut store));
        if let Err(error) = scan {
            error!("{}", chain(&error));
        }
        // Of a guest that is gone meanwhile.
        let sessions = lock_of(&self.sessions);
        let now = Instant::now();
        lock_of(&self.pauses)
            .retain(|domain, pause| pause.until > now || sessions.contains_key(domain));
    }

    /// When [`Guests::sweep`] is to be called although no session has ended.
    pub fn next_sweep(&self) -> Option<Instant> {
        let sessions = lock_of(&self.sessions);
        let pauses = lock_of(&self.pauses);
        pauses
            .iter()
            .filter(|(domain, _)| !sessions.contains_key(domain))
            .map(|(_, pause)| pause.until)
            .min()
    }

    /// Takes devices from guests that went away while no daemon was there to see it.
    ///
    /// # Errors
    /// xenstore's.
    pub fn release_orphans(&self, store: &mut Client) -> Result<(), StoreError> {
        for device in self.devices.list() {
            let Some(owner) = device.record.owner() else {
                continue;
            };
            let backend = format!("{}/state", Paths::backend(owner.domain, 0));
            // Not whether it has a session: one that could not be started is no reason to reset the device under its guest.
            if device.record.phase() == Some(Phase::Assigned)
                && store.read_state(&backend)? == XenbusState::Unknown
            {
                info!("{}: domain {} is gone", device.bdf, owner.domain);
                self.devices.release(&device);
            }
        }
        for domain in optional(store.directory(ERRORS))?.unwrap_or_default() {
            if !store.exists(&format!("{BACKENDS}/{domain}"))? {
                nodes::remove(store, &format!("{ERRORS}/{domain}"))?;
            }
        }
        Ok(())
    }

    /// Ends all sessions, and waits for it. The guests keep their devices.
    pub fn end_sessions(&self) {
        let sessions = std::mem::take(&mut *lock_of(&self.sessions));
        drop(sessions);
    }

    /// Where each session's operations can be listened to.
    pub fn sources(&self) -> Vec<Source> {
        lock_of(&self.sessions)
            .iter()
            .map(|(domain, session)| Source {
                domain: *domain,
                name: session.status().name,
                tap: Arc::clone(&session.telemetry().tap),
            })
            .collect()
    }

    /// What each session is doing.
    pub fn status(&self) -> Vec<(DomId, Status)> {
        lock_of(&self.sessions)
            .iter()
            .map(|(domain, session)| (*domain, session.status()))
            .collect()
    }
}

impl Pause {
    /// After a session that failed at this age. One that served for long begins anew.
    fn after(last: Option<Duration>, age: Duration) -> Self {
        let length = last
            .filter(|_| age < LONGEST_PAUSE)
            .map_or(FIRST_PAUSE, |last| {
                last.saturating_mul(2).min(LONGEST_PAUSE)
            });
        let now = Instant::now();
        Self {
            length,
            until: now.checked_add(length).unwrap_or(now),
        }
    }
}

/// A second backend of a guest would have its devices in a session of their own, and both would answer for all of them.
fn refuse(
    store: &mut Client,
    domain: DomId,
    device: u32,
    state: XenbusState,
) -> Result<(), StoreError> {
    if state != XenbusState::Initialising {
        return Ok(());
    }
    let why = format!(
        "PCI backend {device} is not served: a guest has one, of number 0, with all its devices"
    );
    warn!("domain {domain}: {why}");
    store.write(
        &Paths::error(domain, device),
        format!("{} {why}", libc::EINVAL),
    )?;
    store.switch_state(&Paths::backend(domain, device), state, XenbusState::Closed)?;
    Ok(())
}

/// Domain and device number in a path below [`BACKENDS`].
fn numbers(path: &str) -> Option<(DomId, Option<u32>)> {
    let mut words = path.strip_prefix(BACKENDS)?.strip_prefix('/')?.split('/');
    let domain = words.next()?.parse().ok()?;
    Some((domain, words.next().and_then(|word| word.parse().ok())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_before_the_next_session_grows_while_sessions_fail_at_once() {
        let mut pauses = vec![Pause::after(None, Duration::ZERO).length];
        for _ in 0..9 {
            let last = pauses.last().copied();
            pauses.push(Pause::after(last, Duration::ZERO).length);
        }
        assert_eq!(pauses[..3], [250, 500, 1000].map(Duration::from_millis));
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));
        let served = Pause::after(Some(LONGEST_PAUSE), LONGEST_PAUSE);
        assert_eq!(served.length, FIRST_PAUSE);
    }

    #[test]
    fn a_path_names_a_guest_and_its_device() {
        assert_eq!(
            numbers("/local/domain/0/backend/pci/7/0/state"),
            Some((DomId(7), Some(0)))
        );
        assert_eq!(
            numbers("/local/domain/0/backend/pci/7"),
            Some((DomId(7), None))
        );
        for path in [
            "/local/domain/0/backend/pci",
            "/local/domain/0/backend/pcix/7/0",
            "/local/domain/0/backend/pci/x/0",
        ] {
            assert_eq!(numbers(path), None);
        }
    }
}
