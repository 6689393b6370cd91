//! A running session, as the daemon holds it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use log::{debug, error};
use mio::{Poll, Waker};
use xenbus::XenbusState;

use super::meter::Counts;
use super::telemetry::Telemetry;
use super::{Session, Setup, WAKE};
use crate::text::chain;

/// A session's stack. Its deepest path copies a few kilobytes.
const STACK: usize = 256 * 1024;

/// What is known of a session from outside.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The guest's name, as the toolstack wrote it.
    pub name: String,
    /// The states of backend and frontend.
    pub states: Option<(XenbusState, XenbusState)>,
    /// The devices: address on the host and in the guest.
    pub devices: Vec<(Bdf, Bdf)>,
    /// Devices that could not be given to the guest, and why.
    pub failed: Vec<(String, String)>,
    /// Its operations, counted since the session began.
    pub counts: Counts,
    /// Somebody listens to its operations.
    pub traced: bool,
}

/// What a session and its owner share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) stop: AtomicBool,
    ended: AtomicBool,
    failed: AtomicBool,
    pub(super) status: Mutex<Status>,
    pub(super) telemetry: Telemetry,
}

/// A running session.
#[derive(Debug)]
pub struct Handle {
    shared: Arc<Shared>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    started: Instant,
}

impl Handle {
    /// Starts a session. `ended` is called at its end, on its thread.
    ///
    /// # Errors
    /// When there is no memory or file descriptor for it.
    pub fn start(setup: Setup, ended: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let shared = Arc::new(Shared::default());
        let domain = setup.domain;
        setup.devices.set_waker(domain, {
            let waker = Arc::clone(&waker);
            Box::new(move || wake(&waker))
        });
        let thread = thread::Builder::new()
            .name(format!("domain {domain}"))
            .stack_size(STACK)
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let devices = Arc::clone(&setup.devices);
                    match Session::new(setup, poll, Arc::clone(&shared)).map(Session::run) {
                        Ok(Ok(())) => debug!("domain {domain}: session ended"),
                        Ok(Err(error)) | Err(error) => {
                            error!(
                                "domain {domain}: its PCI devices are not served for now: {}",
                                chain(&error)
                            );
                            shared.failed.store(true, Ordering::Release);
                        }
                    }
                    devices.forget_waker(domain);
                    shared.ended.store(true, Ordering::Release);
                    ended();
                }
            })?;
        Ok(Self {
            shared,
            waker,
            thread: Some(thread),
            started: Instant::now(),
        })
    }

    /// Whether it has come to its end.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Its operations, counted and to be listened to.
    pub fn telemetry(&self) -> &Telemetry {
        &self.shared.telemetry
    }

    /// Whether that was a failure: its guest may still need one.
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// How long ago it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        let counts = self.shared.telemetry.meter.read();
        let traced = self.shared.telemetry.tap.is_open();
        let known = self.shared.status.lock();
        let known = known.unwrap_or_else(PoisonError::into_inner).clone();
        Status {
            counts,
            traced,
            ..known
        }
    }
}

impl Drop for Handle {
    /// Ends the session's thread. The guest keeps its devices: the next daemon goes on.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        wake(&self.waker);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("a session's thread has panicked; please report this");
        }
    }
}

fn wake(waker: &Waker) {
    if let Err(error) = waker.wake() {
        error!("cannot wake a session: {error}");
    }
}
