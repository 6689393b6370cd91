//! A guest's PCI frontend: what Linux's `xen-pcifront` and its relatives do, step by step.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use xenbus::sim::{Frontend, FrontendError, Machine, Variant};
//! # fn guest(machine: Machine, domain: xenbus::DomId) -> Result<(), FrontendError> {
//! let mut frontend = Frontend::new(machine.guest(domain), Variant::Linux)?;
//! frontend.connect(Duration::from_secs(5))?; // publishes, waits for the backend, scans
//! for function in frontend.functions() {
//!     println!("{} is {:04x}:{:04x}", function.address, function.vendor, function.device);
//! }
//! # Ok(())
//! # }
//! ```

mod aer;
mod error;
mod hotplug;
mod interrupts;
mod misbehave;
mod operations;
mod scan;
mod variant;

#[cfg(test)]
mod test_backend;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use aer::AerRequest;
pub use error::FrontendError;
pub use misbehave::{Lies, Node};
pub use operations::Operation;
pub use scan::{Bar, BarKind, Function};
pub use variant::Variant;

use super::guest::{GuestPlatform, GuestPort, wait_readable};
use crate::pciif::{self, Flags, MAGIC};
use crate::state::XenbusState;
use crate::types::{DomId, GrantRef, PciDevice};
use crate::xenstore::{self, Client, Store};
use std::os::fd::AsFd;

/// The frontend's directory, in its domain's own.
const DIRECTORY: &str = "device/pci/0";

/// What a frontend does, for those who look on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It has taken note of the backend's state.
    Backend(XenbusState),
    /// It has changed its own state.
    State(XenbusState),
    /// It has carried an operation out, or given it up.
    Operation(Operation),
}

/// Called with each step.
type Observer = Box<dyn FnMut(&Step) + Send>;

/// What the frontend shares with its backend.
#[derive(Debug)]
struct Link {
    page: pciif::Frontend,
    reference: GrantRef,
    port: GuestPort,
}

/// A frontend, and the functions that it has found.
pub struct Frontend {
    platform: Arc<dyn GuestPlatform>,
    variant: Variant,
    store: Client,
    backend: String,
    backend_id: DomId,
    state: XenbusState,
    link: Option<Link>,
    functions: BTreeMap<PciDevice, Function>,
    op_timeout: Option<Duration>,
    answers_reconfiguring: bool,
    observer: Option<Observer>,
}

impl Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend")
            .field("domain", &self.platform.domain())
            .field("variant", &self.variant)
            .field("state", &self.state)
            .field("functions", &self.functions.keys())
            .finish_non_exhaustive()
    }
}

impl Frontend {
    /// Takes the frontend of a domain whose toolstack has made one. Changes nothing yet.
    ///
    /// # Errors
    /// [`FrontendError::Xenstore`], when there is none too.
    pub fn new(
        platform: impl GuestPlatform + 'static,
        variant: Variant,
    ) -> Result<Self, FrontendError> {
        let mut store = platform.connect_xenstore()?;
        let backend = store.read_string(&format!("{DIRECTORY}/backend"))?;
        let backend_id = store.read_number(&format!("{DIRECTORY}/backend-id"))?;
        let state = store.read_state(&format!("{DIRECTORY}/state"))?;
        store.watch(&format!("{backend}/state"), "backend")?;
        Ok(Self {
            platform: Arc::new(platform),
            variant,
            store,
            backend,
            backend_id,
            state,
            link: None,
            functions: BTreeMap::new(),
            op_timeout: variant.traits().op_timeout,
            answers_reconfiguring: true,
            observer: None,
        })
    }

    /// Has a function called with each step that the frontend takes from now on.
    pub fn observe(&mut self, observer: impl FnMut(&Step) + Send + 'static) {
        self.observer = Some(Box::new(observer));
    }

    fn report(&mut self, step: Step) {
        if let Some(observer) = &mut self.observer {
            observer(&step);
        }
    }

    /// The state that it was last brought to.
    pub fn state(&self) -> XenbusState {
        self.state
    }

    /// The functions that it knows.
    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.functions.values()
    }

    /// One of them, by its address: virtual, but physical for [`Variant::MiniOs`].
    pub fn function(&self, address: PciDevice) -> Option<&Function> {
        self.functions.get(&address)
    }

    /// xenstore, as its domain sees it.
    pub fn store(&mut self) -> &mut Client {
        &mut self.store
    }

    /// The backend's state as it is now; unknown when there is none, which a guest may not even be told.
    ///
    /// # Errors
    /// [`FrontendError::Xenstore`].
    pub fn backend_state(&mut self) -> Result<XenbusState, FrontendError> {
        match self.store.read_state(&format!("{}/state", self.backend)) {
            Err(xenstore::Error::Denied(_)) => Ok(XenbusState::Unknown),
            other => Ok(other?),
        }
    }

    fn set_state(&mut self, state: XenbusState) -> Result<(), FrontendError> {
        self.store.switch_state(DIRECTORY, self.state, state)?;
        self.state = state;
        self.report(Step::State(state));
        Ok(())
    }

    /// Shares a fresh page and a fresh event channel with the backend, and goes to state 3.
    ///
    /// # Errors
    /// [`FrontendError::Xen`], [`FrontendError::Xenstore`].
    pub fn publish(&mut self) -> Result<(), FrontendError> {
        self.publish_with(&Lies::default())
    }

    /// Takes a page and a port for the backend.
    fn make_link(&self) -> Result<Link, FrontendError> {
        let granted = self.platform.grant_page(self.backend_id)?;
        let port = self.platform.alloc_unbound(self.backend_id)?;
        let page = pciif::Frontend::new(Box::new(granted.page));
        let traits = self.variant.traits();
        if !traits.clears_page {
            misbehave::fill(&page, 4, 0x5eed);
        }
        if traits.handles_aer {
            page.set_flags(Flags::AER_HANDLER);
        }
        Ok(Link {
            page,
            reference: granted.reference,
            port,
        })
    }

    fn link(&self) -> Result<&Link, FrontendError> {
        self.link.as_ref().ok_or(FrontendError::NotPublished)
    }

    /// Publishes, waits until the backend is connected, finds the functions, and goes to state 4.
    ///
    /// # Errors
    /// [`FrontendError::BackendState`] when the backend does not get there in time, or fails; and those of the single steps.
    pub fn connect(&mut self, timeout: Duration) -> Result<(), FrontendError> {
        if self.variant == Variant::MiniOs {
            self.await_backend(XenbusState::Connected, timeout, |state: XenbusState| {
                (1..=4).contains(&state.number())
            })?;
        }
        self.publish()?;
        self.wait_for_backend(XenbusState::Connected, timeout)
    }

    /// What the frontend does when it first sees the backend connected.
    fn connected(&mut self) -> Result<(), FrontendError> {
        if self.variant.traits().connected_before_scan {
            self.set_state(XenbusState::Connected)?;
            self.scan()
        } else {
            self.scan()?;
            self.set_state(XenbusState::Connected)
        }
    }

    /// Waits until the backend's state is one that `done` accepts, and reacts to none of its changes. `awaited` is for the error.
    ///
    /// # Errors
    /// [`FrontendError::BackendState`] when it does not get there in time.
    pub fn await_backend(
        &mut self,
        awaited: XenbusState,
        timeout: Duration,
        done: impl Fn(XenbusState) -> bool,
    ) -> Result<XenbusState, FrontendError> {
        let start = Instant::now();
        loop {
            let state = self.backend_state()?;
            let waited = start.elapsed();
            if done(state) {
                return Ok(state);
            }
            if waited >= timeout {
                return Err(FrontendError::BackendState {
                    awaited,
                    state,
                    waited,
                });
            }
            // What came with the answer above does not show at the descriptor any more.
            if self.store.next_event()?.is_none() {
                self.wait_for_event(timeout.saturating_sub(waited))?;
            }
        }
    }

    /// Waits until xenstore has something to tell, or the time is over.
    fn wait_for_event(&self, timeout: Duration) -> Result<(), FrontendError> {
        Ok(wait_readable(self.store.as_fd(), timeout)?)
    }

    /// Lets page and port go. The grant stays if the backend still maps it, as a guest's kernel then keeps the page.
    fn unlink(&mut self) {
        let Some(link) = self.link.take() else { return };
        if let Err(error) = self.platform.close_port(link.port.number()) {
            log::debug!("frontend of domain {}: {error}", self.platform.domain());
        }
        if let Err(error) = self.platform.end_grant(link.reference) {
            log::debug!("frontend of domain {}: {error}", self.platform.domain());
        }
    }

    /// Closes in order: 5, waits for the backend, 6, waits again. [`Variant::MiniOs`] then goes to 1 and waits for the backend to be
    /// ready for another start.
    ///
    /// # Errors
    /// [`FrontendError::BackendState`] when the backend does not follow in time.
    pub fn close(&mut self, timeout: Duration) -> Result<(), FrontendError> {
        self.forget_functions();
        for state in [XenbusState::Closing, XenbusState::Closed] {
            self.set_state(state)?;
            self.await_backend(state, timeout, |backend| {
                backend == XenbusState::Unknown || backend.number() >= state.number()
            })?;
        }
        if self.variant == Variant::MiniOs {
            self.set_state(XenbusState::Initialising)?;
            let ready = |backend: XenbusState| (2..6).contains(&backend.number());
            self.await_backend(XenbusState::InitWait, timeout, ready)?;
            self.store.rm(&format!("{DIRECTORY}/event-channel"))?;
        }
        self.unlink();
        Ok(())
    }

    /// The driver is unloaded, as for a reload: page and port go, then the state is 6, and nobody is waited for. [`Frontend::publish`]
    /// or [`Frontend::connect`] loads it again, with a fresh page.
    ///
    /// # Errors
    /// [`FrontendError::Xenstore`].
    pub fn unload(&mut self) -> Result<(), FrontendError> {
        self.forget_functions();
        self.unlink();
        self.set_state(XenbusState::Closed)
    }

    /// The guest shuts down: Linux's xenbus then brings each device to 5 and goes on after a while, whatever the backend does. The domain
    /// does nothing any more afterwards.
    ///
    /// # Errors
    /// [`FrontendError::Xenstore`], [`FrontendError::Xen`].
    pub fn shut_down_guest(&mut self) -> Result<(), FrontendError> {
        self.set_state(XenbusState::Closing)?;
        Ok(self.platform.shut_down()?)
    }

    /// Stops using the functions, as their drivers do when they are unbound.
    fn forget_functions(&mut self) {
        let addresses: Vec<_> = self.functions.keys().copied().collect();
        for address in addresses {
            self.remove_function(address);
        }
    }

    /// Stops using a function.
    fn remove_function(&mut self, address: PciDevice) {
        if let Err(error) = self.release_interrupts(address) {
            log::debug!("frontend of domain {}: {error}", self.platform.domain());
        }
        self.functions.remove(&address);
    }

    /// Writes what the backend needs to know: the truth, but for the lies.
    ///
    /// # Errors
    /// As [`Frontend::publish`].
    pub fn publish_with(&mut self, lies: &Lies) -> Result<(), FrontendError> {
        self.unlink();
        let link = self.make_link()?;
        let nodes = [
            (
                "pci-op-ref",
                lies.reference.text(&link.reference.to_string()),
            ),
            (
                "event-channel",
                lies.port.text(&link.port.number().to_string()),
            ),
            ("magic", lies.magic.text(MAGIC)),
        ];
        let in_transaction = self.variant.traits().state_in_transaction;
        let state = lies
            .state
            .text(&XenbusState::Initialised.number().to_string());
        self.store.transaction(|t| {
            for (node, value) in &nodes {
                put(t, node, value.as_deref())?;
            }
            if in_transaction {
                put(t, "state", state.as_deref())
            } else {
                Ok(())
            }
        })?;
        self.link = Some(link);
        if !in_transaction {
            put(&mut self.store, "state", state.as_deref())?;
        }
        self.state = XenbusState::Initialised;
        self.report(Step::State(self.state));
        Ok(())
    }
}

/// Writes a node of the frontend's, or removes it.
fn put(store: &mut impl Store, node: &str, value: Option<&str>) -> Result<(), xenstore::Error> {
    let path = format!("{DIRECTORY}/{node}");
    match value {
        Some(value) => store.write(&path, value),
        None => store.rm(&path),
    }
}
