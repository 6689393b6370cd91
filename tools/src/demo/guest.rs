//! The guest: its frontend, and what its kernel does with each device.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use conf_space::capabilities::CapabilityId;
use conf_space::registers::msix;
use xenbus::sim::{DomainKind, Frontend, Machine, ToolstackError, Variant};
use xenbus::{DomId, PciDevice, Pirq};

use super::checks::Checks;
use super::drivers::Driver;
use super::operations::Observer;
use super::stage::{PATIENCE, Stage};
use super::timeline::{Who, duration, median};
use super::{DemoError, tree};

/// Interrupts of each vector.
const INTERRUPTS: usize = 100;
/// How long one of them may take.
const INTERRUPT_PATIENCE: Duration = Duration::from_secs(1);

/// A guest that is running.
pub struct Guest {
    /// Its number.
    pub domain: DomId,
    /// Its frontend.
    pub frontend: Frontend,
    /// Who looks on at its operations.
    pub observer: Observer,
    /// The PIRQs of each function's vectors.
    pirqs: BTreeMap<PciDevice, Vec<Pirq>>,
}

impl Guest {
    /// Makes a domain. `attach` gives it its devices before it starts; then its frontend connects.
    pub fn start(
        stage: &Stage,
        name: &str,
        attach: impl FnOnce(DomId) -> Result<(), DemoError>,
    ) -> Result<Self, DemoError> {
        let machine = stage.machine();
        let domain = machine.create_domain(name, DomainKind::Pv)?;
        let what = format!("makes domain {domain}, '{name}'");
        stage.timeline.tell(Who::Toolstack, &what, "a PV guest");
        attach(domain)?;
        machine.unpause_domain(domain)?;

        let observer = Observer::new(stage.timeline.clone());
        let mut frontend = Frontend::new(machine.guest(domain), Variant::Linux)?;
        frontend.observe({
            let observer = observer.clone();
            move |step| observer.saw(step)
        });
        let start = Instant::now();
        frontend.connect(PATIENCE)?;
        let what = format!("is connected {} later", duration(start.elapsed()));
        stage.timeline.tell(Who::Guest, &what, "");
        Ok(Self {
            domain,
            frontend,
            observer,
            pirqs: BTreeMap::new(),
        })
    }

    /// The addresses of the functions that it knows.
    pub fn functions(&self) -> Vec<PciDevice> {
        let functions = self.frontend.functions();
        functions.map(|function| function.address).collect()
    }

    /// Prints its buses.
    pub fn show(&self, stage: &Stage) {
        stage.timeline.heading("The guest's PCI buses");
        for bus in tree::guest(self.frontend.functions()) {
            stage.timeline.print(&bus.render());
        }
    }

    /// The PIRQs of a function that it has let go.
    pub fn forget_pirqs(&mut self, address: PciDevice) -> Vec<Pirq> {
        self.pirqs.remove(&address).unwrap_or_default()
    }

    /// Follows the backend while the toolstack does something in which both have a part.
    pub fn follow_while(
        &mut self,
        machine: &Machine,
        act: impl FnOnce(&Machine, DomId) -> Result<(), ToolstackError> + Send,
    ) -> Result<(), DemoError> {
        let domain = self.domain;
        std::thread::scope(|scope| {
            let toolstack = scope.spawn(move || act(machine, domain));
            while !toolstack.is_finished() {
                self.frontend.follow(Duration::from_millis(10))?;
            }
            Ok(toolstack.join().map_err(|_| DemoError::Panicked)??)
        })
    }

    /// What a driver does when it finds its device: switches it on, asks for its interrupts, uses it.
    pub fn use_device(
        &mut self,
        stage: &Stage,
        checks: &mut Checks,
        address: PciDevice,
    ) -> Result<(), DemoError> {
        self.frontend.enable_device(address)?;
        self.observer.tell_operations("switches the device on");
        let count = self.vectors(address)?;
        let entries: Vec<u16> = (0..count).collect();
        let pirqs = self.frontend.enable_msix(address, &entries)?;
        self.observer.tell_operations("prepares its interrupts");
        let numbers: Vec<String> = pirqs.iter().map(Pirq::to_string).collect();
        let what = format!("{address}: MSI-X by PIRQs {}", numbers.join(", "));
        let comment = "Xen delivers these interrupts, without pcibackd";
        stage.timeline.tell(Who::Guest, &what, comment);
        let mapped = stage.machine().mapped_pirqs(self.domain);
        let mapped: BTreeSet<Pirq> = mapped.into_iter().collect();
        checks.is(
            &format!("Xen has mapped the {count} interrupts of {address}"),
            !pirqs.is_empty() && pirqs.iter().all(|pirq| mapped.contains(pirq)),
        );
        self.pirqs.insert(address, pirqs);

        let driver = self.frontend.function(address).and_then(Driver::of);
        let started = driver.and_then(|driver| driver.start(stage.bus()));
        let what = format!("{address}: its driver starts it");
        let result = started.as_deref().unwrap_or("it does not work");
        stage.timeline.tell(Who::Guest, &what, result);
        checks.is(&format!("{address} works"), started.is_some());
        self.take_interrupts(stage, checks, address)
    }

    /// How many vectors a function's MSI-X table has, as the guest reads it.
    fn vectors(&mut self, address: PciDevice) -> Result<u16, DemoError> {
        let function = self.frontend.function(address);
        let base = function.and_then(|function| function.capability(CapabilityId::MSI_X.0));
        let Some(base) = base else { return Ok(0) };
        let offset = base.saturating_add(msix::CONTROL.offset);
        let control = self.frontend.conf_read(address, offset, 2)?;
        let last = u16::try_from(control).unwrap_or(0) & msix::control::TABLE_SIZE;
        Ok(last.saturating_add(1))
    }

    /// Makes a device interrupt by each of its vectors, and counts what arrives.
    pub fn take_interrupts(
        &self,
        stage: &Stage,
        checks: &mut Checks,
        address: PciDevice,
    ) -> Result<(), DemoError> {
        let driver = self.frontend.function(address).and_then(Driver::of);
        let pirqs = self.pirqs.get(&address).map_or(&[][..], Vec::as_slice);
        let mut arrived = 0usize;
        for (vector, pirq) in (0u16..).zip(pirqs) {
            let Some(driver) = driver else { break };
            let mut delays = self.interrupt(stage, driver, address, vector)?;
            arrived = arrived.saturating_add(delays.len());
            let what = format!("{address}: {} interrupts by vector {vector}", delays.len());
            let median = duration(median(&mut delays));
            let comment = format!("driver {}; PIRQ {pirq} fires {median} later", driver.how());
            stage.timeline.tell(Who::Device, &what, &comment);
        }
        checks.equal(
            &format!("every interrupt of {address} arrives"),
            &arrived,
            &INTERRUPTS.saturating_mul(pirqs.len()),
        );
        Ok(())
    }

    /// The time that each interrupt took from the driver's access to the guest. It ends with the first that does not arrive.
    fn interrupt(
        &self,
        stage: &Stage,
        driver: Driver,
        address: PciDevice,
        vector: u16,
    ) -> Result<Vec<Duration>, DemoError> {
        let mut delays = Vec::new();
        for _ in 0..INTERRUPTS {
            let start = Instant::now();
            driver.ring(stage.bus(), vector);
            let index = usize::from(vector);
            let wait = self
                .frontend
                .wait_for_interrupt(address, index, INTERRUPT_PATIENCE);
            if !wait? {
                break;
            }
            delays.push(start.elapsed());
        }
        Ok(delays)
    }
}
