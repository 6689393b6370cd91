//! One guest's session: a thread of its own that walks the xenbus states, exports the guest's devices and serves its operations.
//!
//! A session owns its connection to xenstore, its page, its port and its devices. It shares no lock with another on the path of an
//! operation, and whatever its guest does costs this thread's time only.

pub mod aer;
mod connection;
pub mod exports;
mod failures;
mod handle;
pub mod link;
pub mod meter;
pub mod nodes;
pub mod operation;
mod policy;
mod reconfigure;
mod spin;
pub mod states;
pub mod tap;
pub mod telemetry;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use conf_space::topology::TopologyKind;
use log::{debug, info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, GrantRef, Port, Xen, XenbusState};

pub use self::handle::{Handle, Status};

use self::exports::Exports;
use self::failures::Failures;
use self::handle::Shared;
use self::link::{Link, Served};
use self::nodes::{Paths, optional};
use self::states::{Peer, Step, View};
use crate::host::devices::Devices;
use crate::rate_limit::RateLimit;
use crate::text::{chain, printable};

const STORE: Token = Token(0);
const PORT: Token = Token(1);
const WAKE: Token = Token(2);

/// Changes of state in a row that are followed at once. The machine comes to rest in fewer; a guest that writes its state without end is
/// looked at again when its next event is due.
const STEPS_IN_A_ROW: u32 = 16;

/// What a session needs.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The platform.
    pub xen: Arc<dyn Xen>,
    /// The host's devices.
    pub devices: Arc<Devices>,
    /// The guest.
    pub domain: DomId,
}

/// A failure that ends what a session was about to do.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

struct Session {
    setup: Setup,
    poll: Poll,
    shared: Arc<Shared>,
    store: Client,
    paths: Paths,
    exports: Exports,
    link: Option<Link>,
    /// What the frontend offered for it.
    linked_to: Option<(GrantRef, Port)>,
    hvm: bool,
    /// It runs the device model of an HVM guest.
    stub_domain: bool,
    /// The states that both ends showed last, and since when.
    shown: [(XenbusState, Instant); 2],
    failures: Failures,
    log_limit: RateLimit,
    looks: RateLimit,
    /// A device is not free yet: look again when it is.
    waiting_for_device: bool,
}

impl Session {
    fn new(setup: Setup, poll: Poll, shared: Arc<Shared>) -> Result<Self, SessionError> {
        let mut store = setup.xen.connect_xenstore()?;
        let paths = Paths::find(&mut store, setup.domain)?;
        store.watch(&paths.backend, "backend")?;
        store.watch(&paths.theirs("state"), "frontend")?;
        store.watch("@releaseDomain", "domains")?;
        poll.registry().register(
            &mut SourceFd(&store.as_fd().as_raw_fd()),
            STORE,
            Interest::READABLE,
        )?;
        let name = optional(store.read_string(&paths.own("domain")))?.unwrap_or_default();
        let stub_domain = store.exists(&format!("/local/domain/{}/target", setup.domain))?;
        let kind = topology_of(&setup, &name);
        let hvm = setup
            .xen
            .domain_info(setup.domain)
            .ok()
            .flatten()
            .is_some_and(|info| info.hvm);
        shared
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .name = printable(&name);
        let exports = Exports::new(
            setup.domain,
            kind,
            Arc::clone(&setup.devices),
            Arc::clone(&setup.xen),
        )
        .on_behalf_of(nodes::target_of(&mut store, setup.domain)?);
        Ok(Self {
            poll,
            shared,
            store,
            paths,
            exports,
            link: None,
            linked_to: None,
            hvm,
            stub_domain,
            shown: [(XenbusState::Unknown, Instant::now()); 2],
            failures: Failures::default(),
            log_limit: RateLimit::new(10, Duration::from_secs(10)),
            looks: RateLimit::new(50, Duration::from_millis(50)),
            waiting_for_device: false,
            setup,
        })
    }

    fn run(mut self) -> Result<(), SessionError> {
        self.restore_exports()?;
        let mut events = Events::with_capacity(8);
        // Whether to look at the nodes, and at the page.
        let (mut look, mut serve) = (true, false);
        let mut unmask: Option<Instant> = None;
        let mut patience: Option<Instant> = None;
        while !self.shared.stop.load(Ordering::Acquire) {
            look |= patience.is_some_and(|until| until <= Instant::now());
            if look && self.looks.allow() {
                let linked = self.link.is_some();
                let Some(view) = self.look()? else {
                    return Ok(());
                };
                look = false;
                patience = states::patience(view).and_then(|time| Instant::now().checked_add(time));
                // An operation may have been waiting since before the link was there.
                serve |= !linked && self.link.is_some();
            }
            if serve || unmask.is_some_and(|at| at <= Instant::now()) {
                (serve, unmask) = (false, None);
                match self.serve() {
                    Served::Idle => {}
                    Served::More => serve = true,
                    Served::Throttled(until) => unmask = Some(until),
                }
            }
            let recovery = self.recover();
            // Events may have come in with the replies to our own requests: those make no descriptor readable.
            look |= self.take_store_events()?;
            let now = Instant::now();
            let until = if serve {
                Some(now)
            } else {
                let look = look.then(|| self.looks.next(now));
                [look, unmask, patience, recovery]
                    .into_iter()
                    .flatten()
                    .min()
            };
            match self.poll.poll(
                &mut events,
                until.map(|until| until.saturating_duration_since(now)),
            ) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            for event in &events {
                match event.token() {
                    PORT => serve = true,
                    WAKE => {
                        look |=
                            self.waiting_for_device || self.exports.withdrawn().next().is_some();
                    }
                    _ => {}
                }
            }
            look |= self.take_store_events()?;
        }
        Ok(())
    }

    /// Whether any node that we watch has changed.
    fn take_store_events(&mut self) -> Result<bool, SessionError> {
        let mut any = false;
        while let Some(event) = self.store.next_event()? {
            debug!(
                "domain {}: {} changed",
                self.setup.domain,
                printable(&event.path)
            );
            any = true;
        }
        Ok(any)
    }

    fn serve(&mut self) -> Served {
        let Some(link) = &mut self.link else {
            return Served::Idle;
        };
        let telemetry = &self.shared.telemetry;
        match link.serve(&mut self.exports, &mut self.log_limit, telemetry) {
            Ok(served) => served,
            Err(error) => {
                if self.log_limit.allow() {
                    warn!(
                        "domain {}: its event channel is beyond use: {error}",
                        self.setup.domain
                    );
                }
                Served::Idle
            }
        }
    }

    /// Takes steps until there is nothing to do, and returns what it looks like then. `None`: the session is over.
    fn look(&mut self) -> Result<Option<View>, SessionError> {
        self.waiting_for_device = false;
        self.lose_withdrawn()?;
        let mut view = self.view()?;
        for _ in 0..STEPS_IN_A_ROW {
            if states::adds_silently(view) {
                self.reconfigure()?;
            }
            let step = states::next(view);
            debug!("domain {}: {view:?} -> {step:?}", self.setup.domain);
            match step {
                Step::Wait => break,
                Step::Show(state) => self.show(view.backend, state)?,
                Step::Export(state) | Step::Reconfigure(state) => {
                    self.reconfigure()?;
                    if self.waiting_for_device {
                        break;
                    }
                    self.show(view.backend, state)?;
                }
                // The frontend would not ask for a device that comes after it has connected.
                Step::Connect if self.waiting_for_device => break,
                Step::Connect => match self.connect() {
                    Ok(()) => self.show(view.backend, XenbusState::Connected)?,
                    Err(error) => self.fail(view.backend, &error)?,
                },
                Step::Relink => match self.connect() {
                    Ok(()) => {
                        if self.log_limit.allow() {
                            info!("domain {}: serving again", self.setup.domain);
                        }
                    }
                    Err(error) => self.fail(view.backend, &error)?,
                },
                Step::Disconnect(state) => {
                    self.disconnect();
                    self.show(view.backend, state)?;
                }
                Step::Release => {
                    self.disconnect();
                    self.exports.clear();
                    self.show(view.backend, XenbusState::Closed)?;
                }
                Step::End => {
                    self.disconnect();
                    self.exports.clear();
                    self.remove_nodes(view.peer)?;
                    return Ok(None);
                }
            }
            view = self.view()?;
        }
        if states::is_unanswered(view) {
            self.revoke_unanswered()?;
        }
        self.settle_failures()?;
        self.publish_status(view);
        Ok(Some(view))
    }

    fn view(&mut self) -> Result<View, SessionError> {
        let info = self
            .setup
            .xen
            .domain_info(self.setup.domain)
            .unwrap_or_else(|error| {
                // Not being able to ask is no reason to take a guest's devices away.
                debug!("domain {}: {}", self.setup.domain, chain(&error));
                Some(xenbus::DomainInfo {
                    hvm: self.hvm,
                    paused: false,
                    has_run: true,
                    gone: false,
                })
            });
        let peer = match info {
            None => Peer::Gone,
            Some(info) if info.gone || info.hvm => Peer::Nobody,
            Some(info) if info.paused || self.stub_domain => Peer::Expected,
            Some(_) => Peer::Frontend,
        };
        // Before the frontend's: a step is taken only if this has not changed by then, so what is seen of the frontend belongs to it. The other
        // way round, a frontend that is gone could be seen with the backend of the next.
        let backend = self.store.read_state(&self.paths.own("state"))?;
        let frontend = self.store.read_state(&self.paths.theirs("state"))?;
        // A frontend that was loaded anew before its closing was seen offers another page.
        let offers_another = frontend == XenbusState::Initialised
            && self.link.is_some()
            && self
                .offer()
                .is_ok_and(|offer| Some(offer) != self.linked_to);
        Ok(View {
            backend,
            frontend,
            since: self.since(backend, frontend),
            online: optional(self.store.read(&self.paths.own("online")))?
                .is_some_and(|value| value == b"1"),
            peer,
            linked: self.link.is_some() && !offers_another,
        })
    }

    /// How long both ends have shown these states.
    fn since(&mut self, backend: XenbusState, frontend: XenbusState) -> (Duration, Duration) {
        let now = Instant::now();
        let [ours, theirs] = &mut self.shown;
        let since = |shown: &mut (XenbusState, Instant), state| {
            if shown.0 != state {
                *shown = (state, now);
            }
            now.saturating_duration_since(shown.1)
        };
        (since(ours, backend), since(theirs, frontend))
    }

    fn show(&mut self, current: XenbusState, state: XenbusState) -> Result<(), SessionError> {
        let switched = self
            .store
            .switch_state(&self.paths.backend, current, state)?;
        // A guest can make us do this again and again.
        if current != state && self.log_limit.allow() {
            info!("domain {}: {current} -> {state}", self.setup.domain);
        }
        debug!("domain {}: {switched:?}", self.setup.domain);
        Ok(())
    }

    /// Removes what is ours, and what a toolstack left behind of a domain that is no more. Nobody else does.
    fn remove_nodes(&mut self, peer: Peer) -> Result<(), SessionError> {
        nodes::remove(&mut self.store, &self.paths.error)?;
        if peer == Peer::Gone {
            nodes::remove(&mut self.store, &self.paths.backend)?;
        }
        Ok(())
    }

    fn publish_status(&mut self, view: View) {
        let mut status = self
            .shared
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        status.states = Some((view.backend, view.frontend));
        status.devices = self
            .exports
            .iter()
            .map(|export| (export.device.bdf, export.seen_as))
            .collect();
        status.failed = self.failures.list().to_vec();
    }
}

/// How the guest sees its devices: as it has seen them until now, whatever the configuration says meanwhile.
fn topology_of(setup: &Setup, name: &str) -> TopologyKind {
    let configured = setup.devices.config().topology_of(name);
    let held: Vec<_> = setup
        .devices
        .list()
        .iter()
        .filter_map(|device| Some((device.bdf, device.held_by(setup.domain)?.seen_as)))
        .collect();
    let on_the_virtual_bus = |at: &Bdf| at.segment() == 0 && at.bus() == 0;
    if held.iter().any(|(bdf, seen_as)| bdf != seen_as) {
        TopologyKind::Vpci
    } else if held.iter().all(|(_, seen_as)| on_the_virtual_bus(seen_as)) {
        configured
    } else {
        TopologyKind::Passthrough
    }
}
