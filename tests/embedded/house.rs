//! A machine with a daemon on it, and how tests use both.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use conf_space::Bdf;
use conf_space::overlay::Permissive;
use pcibackd::config::Config;
use pcibackd::control::client::{self, Answers};
use pcibackd::control::protocol::{DaemonStatus, Entry, GuestLine, Request, Response};
use pcibackd::daemon::Background;
use pcibackd::host::devices::for_xen;
use pcibackd::host::record::{Phase, Record, RunTime};
use pcibackd::host::sim::SimBus;
use pcibackd::host::{Bus, Config as DeviceConfig};
use tempfile::TempDir;
use xenbus::sim::{
    DomainKind, Frontend, Machine, MachineOptions, PciOptions, ToolstackError, Variant,
};
use xenbus::xenstore::{Client, Store};
use xenbus::{DomId, PciDevice, Xen, XenbusState};

use crate::mortal::{self, Life};

/// Nothing takes that long, unless it never happens.
pub const LONG: Duration = Duration::from_secs(30);

/// A machine with the example devices, and a daemon.
pub struct House {
    pub machine: Machine,
    pub bus: Arc<SimBus>,
    config: Config,
    /// Where daemons hear of errors.
    errors: Arc<dyn Bus>,
    daemon: Mutex<Option<Background>>,
    life: Mutex<Arc<Life>>,
    directory: TempDir,
}

/// Waits for something to become true.
#[track_caller]
pub fn until(what: impl Debug, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "in vain: {what:?}");
        thread::sleep(Duration::from_micros(300));
    }
}

/// The toolstack of the machine that the tests run on is none of ours.
fn without_commands() -> Config {
    let mut config = Config::default();
    let none = vec!["false".to_owned()];
    (config.commands.detach, config.commands.kill) = (none.clone(), none);
    config
}

/// A function's address in a guest.
pub const fn at(slot: u8, function: u8) -> PciDevice {
    PciDevice {
        segment: 0,
        bus: 0,
        devfn: slot << 3 | function,
    }
}

pub fn entries(response: Response) -> Result<Vec<Entry>, String> {
    match response {
        Response::Entries { entries } => Ok(entries),
        Response::Failed { message } => Err(message),
        other => panic!("{other:?}"),
    }
}

impl House {
    /// With these devices hidden.
    pub fn new(hidden: &[Bdf]) -> Self {
        Self::with(without_commands(), MachineOptions::default(), hidden)
    }

    /// Whose toolstack soon gives up waiting for a backend.
    pub fn impatient(hidden: &[Bdf]) -> Self {
        let options = MachineOptions {
            toolstack_timeout: Duration::from_millis(50),
            ..MachineOptions::default()
        };
        Self::with(without_commands(), options, hidden)
    }

    pub fn with(config: Config, options: MachineOptions, hidden: &[Bdf]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::with_options(directory.path(), options).unwrap();
        let bus = SimBus::with_example_devices(&machine);
        let house = Self {
            machine,
            errors: Arc::clone(&bus) as Arc<dyn Bus>,
            bus,
            config,
            daemon: Mutex::new(None),
            life: Mutex::new(Life::new()),
            directory,
        };
        house.start();
        house.hide(hidden);
        house
    }

    /// The life of the daemon that runs now.
    pub fn life(&self) -> Arc<Life> {
        Arc::clone(&self.life.lock().unwrap())
    }

    /// The configuration of the daemons that are started from now on.
    pub fn configure(&mut self, config: Config) {
        self.config = config;
    }

    pub fn start(&self) {
        self.start_with(Life::new());
    }

    /// Starts a daemon whose life may have a witness from its beginning.
    pub fn start_with(&self, life: Arc<Life>) {
        let xen = mortal::Machine::new(&self.machine, &life);
        let bus = Arc::clone(&self.bus) as Arc<dyn Bus>;
        let bus = mortal::Host::new(bus, Arc::clone(&self.errors), &life);
        let path = self.directory.path().to_owned();
        *self.life.lock().unwrap() = life;
        let daemon = Background::start(Arc::new(xen), Arc::new(bus), path, self.config.clone());
        *self.daemon.lock().unwrap() = Some(daemon.unwrap());
    }

    /// Ends the daemon as `kill -9` does: nothing is given back, nothing is written down. Returns when none of its threads runs any more.
    pub fn kill(&self) {
        let life = std::mem::replace(&mut *self.life.lock().unwrap(), Life::new());
        life.end();
        let daemon = self
            .daemon
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // What it ends with is of no interest: it was killed.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            daemon.map(Background::stop).map(drop)
        }));
        // Each of them holds it.
        until("all threads of the daemon are gone", || {
            Arc::strong_count(&life) == 1
        });
    }

    /// Starts the daemon anew with another configuration.
    pub fn restart_with(&mut self, config: Config) {
        self.kill();
        self.config = config;
        self.start();
    }

    /// Starts the daemon anew, which hears of errors from that bus.
    pub fn restart_hearing_of_errors_by(&mut self, errors: Arc<dyn Bus>) {
        self.kill();
        self.errors = errors;
        self.start();
    }

    /// Has the daemon read its configuration file again.
    pub fn reload(&self) {
        let daemon = self.daemon.lock().unwrap();
        daemon.as_ref().unwrap().reload().unwrap();
    }

    pub fn restart(&self) {
        self.kill();
        self.start();
    }

    /// Has something done while the daemon is killed after its `step`th step from now, and started again. True when it came to that.
    pub fn surviving(&self, step: usize, action: impl FnOnce() + Send) -> bool {
        self.life().end_at(step);
        let died = thread::scope(|scope| {
            let actor = scope.spawn(action);
            let mut died = false;
            while !actor.is_finished() {
                if !died && self.life().has_ended() {
                    died = true;
                    self.restart();
                }
                thread::sleep(Duration::from_micros(200));
            }
            actor.join().unwrap();
            died
        });
        self.life().never_end();
        // It may have been in the last step.
        if !died && self.life().has_ended() {
            self.restart();
            return true;
        }
        died
    }

    pub fn ask(&self, request: &Request) -> Response {
        client::ask(self.directory.path(), request).unwrap()
    }

    /// What comes of a request that is about one device.
    pub fn entry(&self, request: &Request) -> Entry {
        entries(self.ask(request)).unwrap().remove(0)
    }

    /// As [`House::ask`], of a daemon that may be killed before it answers.
    pub fn try_ask(&self, request: &Request) -> Option<Response> {
        client::ask(self.directory.path(), request).ok()
    }

    pub fn ask_for_many(&self, request: &Request) -> Answers {
        client::ask_for_many(self.directory.path(), request).unwrap()
    }

    /// Hides devices through the control socket.
    pub fn hide(&self, devices: &[Bdf]) {
        let devices = devices.iter().map(Bdf::to_string).collect();
        let force = false;
        let Response::Entries { entries } = self.ask(&Request::Hide { devices, force }) else {
            panic!("not hidden");
        };
        for entry in entries {
            assert!(entry.ok, "{entry:?}");
        }
    }

    pub fn unhide(&self, bdf: Bdf) {
        let devices = vec![bdf.to_string()];
        let Response::Entries { entries } = self.ask(&Request::Unhide {
            devices,
            force: false,
        }) else {
            panic!("not given back");
        };
        for entry in entries {
            assert!(entry.ok, "{entry:?}");
        }
    }

    pub fn status(&self) -> DaemonStatus {
        match self.ask(&Request::Status) {
            Response::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the daemon has a session for a guest; `None` when there is no daemon to ask.
    fn serves(&self, domain: DomId) -> Option<bool> {
        match client::ask(self.directory.path(), &Request::Status) {
            Ok(Response::Status(status)) => {
                Some(status.guests.iter().any(|guest| guest.domain == domain.0))
            }
            _ => None,
        }
    }

    /// What the daemon says of a guest.
    pub fn guest_line(&self, domain: DomId) -> Option<GuestLine> {
        let mut guests = self.status().guests.into_iter();
        guests.find(|guest| guest.domain == domain.0)
    }

    /// Makes a running guest with these devices.
    pub fn guest(&self, devices: &[Bdf]) -> DomId {
        self.named_guest("guest", devices)
    }

    pub fn named_guest(&self, name: &str, devices: &[Bdf]) -> DomId {
        let domain = self.machine.create_domain(name, DomainKind::Pv).unwrap();
        for bdf in devices {
            self.attach(domain, *bdf).unwrap();
        }
        self.machine.unpause_domain(domain).unwrap();
        domain
    }

    pub fn attach(&self, domain: DomId, bdf: Bdf) -> Result<(), ToolstackError> {
        self.machine
            .pci_attach(domain, for_xen(bdf), &PciOptions::default())
    }

    pub fn detach(&self, domain: DomId, bdf: Bdf) -> Result<(), ToolstackError> {
        self.machine.pci_detach(domain, for_xen(bdf))
    }

    pub fn frontend(&self, domain: DomId, variant: Variant) -> Frontend {
        Frontend::new(self.machine.guest(domain), variant).unwrap()
    }

    /// A guest's frontend, connected.
    pub fn connected(&self, domain: DomId) -> Frontend {
        let mut frontend = self.frontend(domain, Variant::Linux);
        frontend.connect(LONG).unwrap();
        frontend
    }

    /// Makes a running guest and its frontend.
    pub fn boot(&self, devices: &[Bdf]) -> (DomId, Frontend) {
        let domain = self.guest(devices);
        let frontend = self.connected(domain);
        (domain, frontend)
    }

    /// As [`Frontend::follow`], until a change of devices is through.
    pub fn while_following(
        &self,
        frontend: &mut Frontend,
        action: impl FnOnce() -> Result<(), ToolstackError> + Send,
    ) {
        thread::scope(|scope| {
            let actor = scope.spawn(action);
            while !actor.is_finished() {
                frontend.follow(Duration::from_millis(1)).unwrap();
            }
            actor.join().unwrap().unwrap();
            // An attach returns before the guest has the device.
            let start = Instant::now();
            while frontend.backend_state().unwrap() == XenbusState::Reconfiguring
                || frontend.state() == XenbusState::Reconfiguring
                || frontend.backend_state().unwrap() == XenbusState::Reconfigured
            {
                assert!(start.elapsed() < LONG);
                frontend.follow(Duration::from_millis(1)).unwrap();
            }
        });
    }

    pub fn store(&self) -> Client {
        self.machine.connect_xenstore().unwrap()
    }

    pub fn backend(&self, domain: DomId, node: &str) -> String {
        format!("/local/domain/0/backend/pci/{domain}/0/{node}")
    }

    /// One of the backend's nodes.
    pub fn node(&self, domain: DomId, node: &str) -> Option<String> {
        self.store().read_string(&self.backend(domain, node)).ok()
    }

    pub fn until_node(&self, domain: DomId, node: &str, value: &str) {
        until(format!("{node} = {value}"), || {
            self.node(domain, node).as_deref() == Some(value)
        });
    }

    /// What is written down of a hidden device.
    pub fn record(&self, bdf: Bdf) -> Record {
        Record::open(&self.directory.path().join("devices"), bdf).unwrap()
    }

    /// Sets something for a device at run time.
    pub fn set(&self, bdf: Bdf, change: impl FnOnce(&mut RunTime)) {
        self.record(bdf).update_settings(change);
    }

    pub fn make_permissive(&self, bdf: Bdf) {
        self.set(bdf, |settings| settings.permissive = Some(Permissive::Yes));
    }

    pub fn is_permissive(&self, bdf: Bdf) -> bool {
        self.record(bdf).settings().permissive == Some(Permissive::Yes)
    }

    pub fn records(&self) -> Vec<Bdf> {
        Record::list(&self.records_directory()).unwrap()
    }

    pub fn run_dir(&self) -> &Path {
        self.directory.path()
    }

    pub fn records_directory(&self) -> PathBuf {
        self.directory.path().join("devices")
    }

    pub fn phase(&self, bdf: Bdf) -> Option<Phase> {
        self.record(bdf).phase()
    }

    /// Waits until a device is nobody's.
    pub fn until_free(&self, bdf: Bdf) {
        until(format!("{bdf} is free"), || {
            self.phase(bdf) == Some(Phase::Hidden)
        });
    }

    pub fn config(&self, bdf: Bdf) -> DeviceConfig {
        self.bus.open(bdf).unwrap()
    }

    /// What a domain has of the machine, besides the lines of its devices.
    pub fn pirqs(&self, domain: DomId) -> usize {
        let all = self.machine.mapped_pirqs(domain);
        all.iter()
            .filter(|pirq| pirq.0 >= MachineOptions::default().gsis)
            .count()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if thread::panicking() {
            // So that a test that fails says why, instead of waiting for a daemon that is in any state.
            std::mem::forget(self.daemon.lock().map(|mut daemon| daemon.take()).ok());
        }
    }
}

impl House {
    /// Where a device's guest sees it.
    pub fn seen_as(&self, bdf: Bdf) -> PciDevice {
        for_xen(self.record(bdf).owner().unwrap().seen_as)
    }

    /// Waits until a guest has nothing of the machine any more.
    pub fn until_gone(&self, domain: DomId) {
        let left = || {
            let ours = [
                format!("/local/domain/0/backend/pci/{domain}"),
                format!("/local/domain/0/error/backend/pci/{domain}"),
            ];
            let nodes = self.machine.xenstore_nodes().into_keys();
            let is_ours = |path: &String| {
                let mut ours = ours.iter();
                ours.any(|root| path == root || path.starts_with(&format!("{root}/")))
            };
            (
                nodes.filter(is_ours).collect::<Vec<_>>(),
                self.machine.mapped_grants(domain),
                self.serves(domain),
            )
        };
        let start = Instant::now();
        while left() != (vec![], 0, Some(false)) {
            assert!(start.elapsed() < LONG, "domain {domain}: {:?}", left());
            thread::sleep(Duration::from_micros(300));
        }
    }
}

impl House {
    /// As [`House::phase`], of a device that may not be hidden.
    pub fn phase_if_any(&self, bdf: Bdf) -> Option<pcibackd::host::record::Phase> {
        self.records().contains(&bdf).then(|| self.phase(bdf))?
    }
}
