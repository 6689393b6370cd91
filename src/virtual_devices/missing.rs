//! Devices of a guest that runs, of which what they are made of cannot be opened after a restart: an image or a bridge is gone. The guest
//! is served without them: what its drivers read of such a device is as it was, and their requests wait, as for
//! storage that does not answer, until a thread of its own has opened it.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info};
use virtio::late::Supply;

use super::backends;
use super::kept::KeptFds;
use super::place::At;
use super::session::{FIRST_PAUSE, LONGEST_PAUSE, Setup, Shared};
use super::terminals::announce;
use crate::config::Model;
use crate::text::chain;

/// What is there again so soon is not worth a line in the log: the kernel may still be at the requests of a daemon that was killed, and keep
/// their image locked.
const GRACE: Duration = Duration::from_secs(1);

const STACK: usize = 256 * 1024;

/// One of them.
#[derive(Debug)]
pub(super) struct Missing {
    pub at: At,
    pub model: Model,
    /// Where it is given.
    pub supply: Supply,
    /// Why it is missing.
    pub why: String,
}

/// Looks for devices that are missing. Dropping this ends it; nobody waits for that.
#[derive(Debug)]
pub(super) struct Search {
    _goes_on: Sender<Infallible>,
}

impl Search {
    /// Begins it, if anything is missing.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(
        setup: &Setup,
        shared: &Arc<Shared>,
        missing: Vec<Missing>,
    ) -> io::Result<Option<Self>> {
        shared.set_missing(&missing);
        if missing.is_empty() {
            return Ok(None);
        }
        let (goes_on, ended) = mpsc::channel();
        let (setup, shared) = (setup.clone(), Arc::clone(shared));
        thread::Builder::new()
            .name(format!("missing {}", setup.domain))
            .stack_size(STACK)
            .spawn(move || search(&setup, &shared, missing, &ended))?;
        Ok(Some(Self { _goes_on: goes_on }))
    }
}

fn search(setup: &Setup, shared: &Shared, mut missing: Vec<Missing>, ended: &Receiver<Infallible>) {
    let domain = setup.domain;
    let begun = Instant::now();
    let mut is_told = false;
    let mut pause = FIRST_PAUSE;
    while !missing.is_empty() && ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        let before = std::mem::take(&mut missing);
        let still = before.into_iter().filter_map(|device| {
            // Another session may be at it by now, or the guest gone.
            if ended.try_recv() == Err(TryRecvError::Disconnected) {
                return None;
            }
            let (at, kind) = (device.at, device.model.name());
            let still = look(setup, shared, device);
            if still.is_none() && is_told {
                info!("domain {domain}: the {kind} device in {at} is there again, and goes on");
            }
            still
        });
        missing = still.collect();
        if ended.try_recv() == Err(TryRecvError::Disconnected) {
            return;
        }
        shared.set_missing(&missing);
        if !is_told && begun.elapsed() > GRACE {
            is_told = true;
            for device in &missing {
                error!(
                    "domain {domain}: the {} device in {} has to wait, and so has who uses it in the guest, until this is put right: {}",
                    device.model.name(),
                    device.at,
                    device.why
                );
            }
        }
    }
}

/// Opens a device; `None`: it is there.
fn look(setup: &Setup, shared: &Shared, missing: Missing) -> Option<Missing> {
    let at = missing.at;
    let kept = KeptFds::new(&setup.fds, setup.domain, &setup.record, at);
    match backends::open(&missing.model, setup.domain, &setup.name, &kept) {
        Ok(backend) => {
            missing.supply.give(backend.device);
            let terminals = backend.terminals.into_iter();
            let terminals: Vec<_> = terminals.map(|terminal| (at, terminal)).collect();
            announce(&*setup.xen, setup.domain, &terminals);
            shared.add_terminals(terminals);
            None
        }
        Err(error) => Some(Missing {
            why: chain(&error),
            ..missing
        }),
    }
}
