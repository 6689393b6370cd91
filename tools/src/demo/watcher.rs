//! Looks on as backend devices change their states in xenstore.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcibackd::text::chain;
use xenbus::XenbusState::{
    self, Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured,
    Reconfiguring, Unknown,
};
use xenbus::xenstore::{Client, Error, Store};

use super::timeline::{Timeline, Who};

/// Backend devices, whose states are worth a look.
const ROOT: &str = "/local/domain/0/backend/pci";
/// How often the thread looks whether it is to end, in milliseconds.
const LOOK: u16 = 20;

/// A thread that tells of each state as it sees it. A state that is there for a moment only may go unseen.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts to look on.
    pub fn start(mut store: Client, timeline: Timeline) -> Result<Self, Error> {
        store.watch(ROOT, "states")?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                if let Err(error) = look_on(&mut store, &timeline, &stop) {
                    timeline.tell(
                        Who::Daemon,
                        &format!("nobody looks on: {}", chain(&error)),
                        "",
                    );
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look_on(store: &mut Client, timeline: &Timeline, stop: &AtomicBool) -> Result<(), Error> {
    let mut seen = BTreeMap::new();
    while !stop.load(Ordering::Acquire) {
        while let Some(event) = store.next_event()? {
            // Not the states of single devices, `state-N`.
            if event.path.ends_with("/state") {
                let state = store.read_state(&event.path)?;
                let before = seen.insert(event.path, state);
                if before != Some(state) {
                    let meaning = meaning(before, state);
                    timeline.tell(writer(state), &format!("backend: {state}"), meaning);
                }
            }
        }
        let mut fds = [PollFd::new(store.as_fd(), PollFlags::POLLIN)];
        // Interrupted, if anything: then it looks at once.
        let _ = poll(&mut fds, PollTimeout::from(LOOK));
    }
    Ok(())
}

/// Who brings a backend to that state.
fn writer(state: XenbusState) -> Who {
    match state {
        Initialising | Reconfiguring | Unknown => Who::Toolstack,
        _ => Who::Daemon,
    }
}

fn meaning(before: Option<XenbusState>, state: XenbusState) -> &'static str {
    match state {
        Initialising => "a backend device for the guest, with the list of its PCI devices",
        InitWait => "pcibackd has found it",
        Initialised => "its devices have their places on the guest's bus",
        Connected if matches!(before, Some(Reconfiguring | Reconfigured | Closing)) => {
            "done: the toolstack may go on"
        }
        Connected => "pcibackd serves the guest's operations",
        Reconfiguring => "the list of devices has changed",
        Reconfigured => "devices have come or gone: the guest may look",
        Closing => "on its way out",
        Closed => "no device is the guest's any more",
        Unknown => "the nodes are gone",
    }
}
