//! The configuration that holds now.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Config;

/// The configuration that holds now. What was read again (SIGHUP) takes its place at once, also for guests that are being served.
#[derive(Debug, Default)]
pub struct Live {
    current: Mutex<Arc<Config>>,
    version: AtomicU32,
}

impl Live {
    /// With this one.
    pub fn new(config: Config) -> Self {
        Self {
            current: Mutex::new(Arc::new(config)),
            version: AtomicU32::new(0),
        }
    }

    /// The one that holds.
    pub fn get(&self) -> Arc<Config> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
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
