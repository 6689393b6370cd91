//! The guests: a session for each backend device that the toolstack makes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use log::{debug, error, info};
use mio::Waker;
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, Xen, XenbusState};

use super::lock_of;
use crate::host::devices::Devices;
use crate::host::record::Phase;
use crate::session::nodes::{Paths, optional};
use crate::session::{Handle, Setup, Status};
use crate::text::chain;
use crate::trace::Source;

const ROOT: &str = "/local/domain/0/backend/pci";

/// All sessions, by domain and the toolstack's number of the device.
#[derive(Debug)]
pub struct Guests {
    xen: Arc<dyn Xen>,
    devices: Arc<Devices>,
    waker: Arc<Waker>,
    sessions: Mutex<BTreeMap<(DomId, u32), Handle>>,
}

impl Guests {
    /// None yet. `waker` is woken when a session has ended.
    pub fn new(xen: Arc<dyn Xen>, devices: Arc<Devices>, waker: Arc<Waker>) -> Arc<Self> {
        Arc::new(Self {
            xen,
            devices,
            waker,
            sessions: Mutex::default(),
        })
    }

    /// Starts to watch, and a session for each guest that is there.
    ///
    /// # Errors
    /// xenstore's.
    pub fn watch(&self) -> Result<Client, StoreError> {
        let mut store = self.xen.connect_xenstore()?;
        store.watch(ROOT, "guests")?;
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
        for domain in optional(store.directory(ROOT))?.unwrap_or_default() {
            let Ok(domain) = domain.parse::<DomId>() else {
                continue;
            };
            for device in
                optional(store.directory(&format!("{ROOT}/{domain}")))?.unwrap_or_default()
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
        if sessions
            .get(&(domain, device))
            .is_some_and(|session| !session.has_ended())
        {
            return Ok(());
        }
        if store.read_state(&format!("{}/state", Paths::backend(domain, device)))?
            == XenbusState::Unknown
        {
            return Ok(());
        }
        let setup = Setup {
            xen: Arc::clone(&self.xen),
            devices: Arc::clone(&self.devices),
            domain,
            device,
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
                sessions.insert((domain, device), session);
            }
            Err(error) => error!(
                "domain {domain}: cannot serve its PCI devices: {error}; restart pcibackd when memory is free again"
            ),
        }
        Ok(())
    }

    /// Forgets sessions that have ended. Where the toolstack made a device anew at that very moment, its session starts now.
    pub fn sweep(&self) {
        let ended: Vec<_> = {
            let mut sessions = lock_of(&self.sessions);
            sessions
                .extract_if(.., |_, session| session.has_ended())
                .collect()
        };
        if ended.is_empty() {
            return;
        }
        debug!("{} sessions have ended", ended.len());
        let scan = self
            .xen
            .connect_xenstore()
            .and_then(|mut store| self.scan(&mut store));
        if let Err(error) = scan {
            error!("{}", chain(&error));
        }
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
            .map(|((domain, _), session)| Source {
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
            .map(|((domain, _), session)| (*domain, session.status()))
            .collect()
    }
}

/// Domain and device number in a path below [`ROOT`].
fn numbers(path: &str) -> Option<(DomId, Option<u32>)> {
    let mut words = path.strip_prefix(ROOT)?.strip_prefix('/')?.split('/');
    let domain = words.next()?.parse().ok()?;
    Some((domain, words.next().and_then(|word| word.parse().ok())))
}

#[cfg(test)]
mod tests {
    use super::*;

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
