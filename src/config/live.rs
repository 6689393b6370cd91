//! The configuration that holds now.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conf_space::topology::TopologyKind;

use super::{Config, Topology};

/// The configuration that holds now. What was read again (SIGHUP) takes its place at once, also for guests that are being served.
#[derive(Debug, Default)]
pub struct Live {
    current: Mutex<Arc<Config>>,
    version: AtomicU32,
    /// What was set at run time for guests of these names.
    topologies: Mutex<BTreeMap<String, Topology>>,
}

impl Live {
    /// With this one.
    pub fn new(config: Config) -> Self {
        Self {
            current: Mutex::new(Arc::new(config)),
            ..Self::default()
        }
    }

    /// The one that holds.
    pub fn get(&self) -> Arc<Config> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The topologies that were set at run time, by the guests' names.
    pub fn topologies(&self) -> BTreeMap<String, Topology> {
        self.at_run_time().clone()
    }

    /// Sets them all anew.
    pub fn set_topologies(&self, topologies: BTreeMap<String, Topology>) {
        *self.at_run_time() = topologies;
    }

    fn at_run_time(&self) -> MutexGuard<'_, BTreeMap<String, Topology>> {
        let topologies = self.topologies.lock();
        topologies.unwrap_or_else(PoisonError::into_inner)
    }

    /// How a guest that starts now sees its devices.
    pub fn topology_of(&self, guest: &str) -> TopologyKind {
        let at_run_time = self.at_run_time().get(guest).copied();
        at_run_time.map_or_else(|| self.get().topology_of(guest), TopologyKind::from)
    }

    /// Puts another in its place.
    pub fn replace(&self, config: Config) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Changes with each [`Live::replace`]; for whoever keeps what it has derived, without taking the lock.
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }
}
