//! A platform whose daemon can be killed between any two things that it does.
//!
//! Whatever a daemon asks of Xen, of xenstore or of the host's devices is a step, and so is each answer. At the step at which its life ends,
//! the thread that makes it unwinds, every other does at its own next step, and all connections to xenstore are cut. What was mapped is
//! unmapped and what was open is closed as the threads end, as the kernel does; nothing else is cleaned up.

use std::fmt::{self, Debug};
use std::io::{self, Read, Write};
use std::net::Shutdown;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread;

use conf_space::{AccessError, Bdf, ConfigSpace, Width};
use pcibackd::host::errors::ErrorReports;
use pcibackd::host::sharing::Occupancy;
use pcibackd::host::{Backend, Bus, Config, Description, HostError};
use xenbus::device_model::{DeviceModel, ForeignMapping, IntxPin, IoRange, IoreqServerId};
use xenbus::xenstore::{self, Client};
use xenbus::{
    DomId, DomainInfo, EventPort, GrantRef, MsiRequest, PageMapping, PciDevice, Pirq, Port, Xen,
    XenError, sim,
};

const NEVER: usize = usize::MAX;

/// What a daemon does to Xen, to xenstore or to the host's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// A request to xenstored.
    Request,
    /// Lets the next event of a guest through.
    Unmask,
    MapMsi(DomId, PciDevice, MsiRequest),
    UnmapPirq(DomId, Pirq),
    PrepareMsix(PciDevice),
    Assign(DomId, PciDevice),
    Deassign(DomId, PciDevice),
    Read(Bdf, u16),
    Write(Bdf, u16, Width, u32),
    Reset(Bdf),
    /// The number of virtual functions is kept as it is, or let go.
    Keep(Bdf, bool),
}

type Witness = Box<dyn Fn(&Deed) + Send + Sync>;

/// One daemon's life.
pub struct Life {
    ended: AtomicBool,
    left: AtomicUsize,
    sockets: Mutex<Vec<UnixStream>>,
    witness: RwLock<Option<Witness>>,
}

impl Debug for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Life")
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Life {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            ended: AtomicBool::new(false),
            left: AtomicUsize::new(NEVER),
            sockets: Mutex::default(),
            witness: RwLock::default(),
        })
    }

    /// Has `witness` called with each deed from now on, before it is done and on the thread that does it.
    pub fn witness(&self, witness: impl Fn(&Deed) + Send + Sync + 'static) {
        *self.witness.write().unwrap() = Some(Box::new(witness));
    }

    fn tell(&self, deed: Deed) {
        if let Some(witness) = &*self.witness.read().unwrap() {
            witness(&deed);
        }
    }

    fn doing<T>(&self, deed: Deed, action: impl FnOnce() -> T) -> T {
        self.around(|| {
            self.tell(deed);
            action()
        })
    }

    pub fn end(&self) {
        let sockets = self.sockets.lock().unwrap();
        self.ended.store(true, Ordering::SeqCst);
        for socket in &*sockets {
            // Ended before.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends at the `step`th step from now, counted from 1.
    pub fn end_at(&self, step: usize) {
        self.left.store(step, Ordering::SeqCst);
    }

    pub fn never_end(&self) {
        self.left.store(NEVER, Ordering::SeqCst);
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Counts a step. False: it is not made any more.
    fn lives_on(&self) -> bool {
        let down = |left: usize| (left != NEVER && left > 0).then(|| left - 1);
        let before = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, down);
        if before == Ok(1) {
            self.end();
        }
        !self.has_ended()
    }

    fn step(&self) {
        self.lives_on();
        self.be_alive();
    }

    fn be_alive(&self) {
        if self.has_ended() {
            // No message: nothing went wrong.
            resume_unwind(Box::new("killed"));
        }
    }

    fn around<T>(&self, action: impl FnOnce() -> T) -> T {
        self.step();
        let result = action();
        self.step();
        result
    }
}

/// Carries whole requests from the daemon to xenstored.
fn relay(life: &Life, mut from: UnixStream, mut to: UnixStream) {
    let mut header = [0; 16];
    while from.read_exact(&mut header).is_ok() {
        let length = u32::from_le_bytes(header[12..].try_into().unwrap());
        let mut message = header.to_vec();
        message.resize(header.len() + length as usize, 0);
        let read = from.read_exact(&mut message[header.len()..]).is_ok();
        life.tell(Deed::Request);
        if !(read && life.lives_on() && to.write_all(&message).is_ok() && life.lives_on()) {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Xen, as a daemon with such a life sees it.
#[derive(Debug)]
pub struct Machine {
    machine: sim::Machine,
    life: Arc<Life>,
}

impl Machine {
    pub fn new(machine: &sim::Machine, life: &Arc<Life>) -> Self {
        Self {
            machine: machine.clone(),
            life: Arc::clone(life),
        }
    }
}

impl Xen for Machine {
    fn connect_xenstore(&self) -> Result<Client, xenstore::Error> {
        self.life.step();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let xenstored = UnixStream::connect(self.machine.run_dir().join("xenstored.sock")).unwrap();
        {
            let mut sockets = self.life.sockets.lock().unwrap();
            sockets.push(theirs.try_clone().unwrap());
            sockets.push(xenstored.try_clone().unwrap());
        }
        let life = Arc::clone(&self.life);
        let (from, to) = (theirs.try_clone().unwrap(), xenstored.try_clone().unwrap());
        thread::spawn(move || relay(&life, from, to));
        thread::spawn(move || {
            let (mut from, mut to) = (xenstored, theirs);
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        if self.life.has_ended() {
            self.life.end();
        }
        Client::from_stream(ours)
    }

    fn map_page(
        &self,
        domain: DomId,
        reference: GrantRef,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        self.life
            .around(|| self.machine.map_page(domain, reference))
    }

    fn bind_interdomain(&self, domain: DomId, port: Port) -> Result<Box<dyn EventPort>, XenError> {
        let port = self
            .life
            .around(|| self.machine.bind_interdomain(domain, port))?;
        let life = Arc::clone(&self.life);
        Ok(Box::new(OpenPort { port, life }))
    }

    fn domain_info(&self, domain: DomId) -> Result<Option<DomainInfo>, XenError> {
        self.life.around(|| self.machine.domain_info(domain))
    }

    fn map_msi(
        &self,
        domain: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, XenError> {
        self.life.doing(Deed::MapMsi(domain, device, request), || {
            self.machine.map_msi(domain, device, request)
        })
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError> {
        self.life.doing(Deed::UnmapPirq(domain, pirq), || {
            self.machine.unmap_pirq(domain, pirq)
        })
    }

    fn prepare_msix(&self, device: PciDevice) -> Result<(), XenError> {
        self.life.doing(Deed::PrepareMsix(device), || {
            self.machine.prepare_msix(device)
        })
    }

    fn release_msix(&self, device: PciDevice) -> Result<(), XenError> {
        self.life.around(|| self.machine.release_msix(device))
    }

    fn restore_msi(&self, device: PciDevice) -> Result<(), XenError> {
        self.life.around(|| self.machine.restore_msi(device))
    }

    fn assign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.life.doing(Deed::Assign(domain, device), || {
            self.machine.assign_device(domain, device)
        })
    }

    fn deassign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.life.doing(Deed::Deassign(domain, device), || {
            self.machine.deassign_device(domain, device)
        })
    }
}

impl DeviceModel for Machine {
    fn create_ioreq_server(&self, domain: DomId) -> Result<IoreqServerId, XenError> {
        self.life
            .around(|| self.machine.create_ioreq_server(domain))
    }

    fn destroy_ioreq_server(&self, domain: DomId, server: IoreqServerId) -> Result<(), XenError> {
        let machine = &self.machine;
        self.life
            .around(|| machine.destroy_ioreq_server(domain, server))
    }

    fn map_ioreq_page(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        let machine = &self.machine;
        self.life.around(|| machine.map_ioreq_page(domain, server))
    }

    fn map_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let machine = &self.machine;
        self.life
            .around(|| machine.map_io_range(domain, server, range))
    }

    fn unmap_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let machine = &self.machine;
        self.life
            .around(|| machine.unmap_io_range(domain, server, range))
    }

    fn set_ioreq_server_state(
        &self,
        domain: DomId,
        server: IoreqServerId,
        enabled: bool,
    ) -> Result<(), XenError> {
        let machine = &self.machine;
        self.life
            .around(|| machine.set_ioreq_server_state(domain, server, enabled))
    }

    fn vcpu_count(&self, domain: DomId) -> Result<u32, XenError> {
        self.life.around(|| self.machine.vcpu_count(domain))
    }

    fn set_pci_intx_level(&self, domain: DomId, pin: IntxPin, level: bool) -> Result<(), XenError> {
        let machine = &self.machine;
        self.life
            .around(|| machine.set_pci_intx_level(domain, pin, level))
    }

    fn set_isa_irq_level(&self, domain: DomId, irq: u8, level: bool) -> Result<(), XenError> {
        self.life
            .around(|| self.machine.set_isa_irq_level(domain, irq, level))
    }

    fn inject_msi(&self, domain: DomId, address: u64, data: u32) -> Result<(), XenError> {
        self.life
            .around(|| self.machine.inject_msi(domain, address, data))
    }

    fn map_foreign(
        &self,
        domain: DomId,
        first: u64,
        count: usize,
    ) -> io::Result<Box<dyn ForeignMapping>> {
        self.life
            .around(|| self.machine.map_foreign(domain, first, count))
    }
}

#[derive(Debug)]
struct OpenPort {
    port: Box<dyn EventPort>,
    life: Arc<Life>,
}

impl EventPort for OpenPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.port.fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        self.port.take()
    }

    fn unmask(&mut self) -> io::Result<()> {
        self.life.tell(Deed::Unmask);
        self.port.unmask()
    }

    fn notify(&self) -> io::Result<()> {
        self.port.notify()
    }
}

/// The host's devices, as a daemon with such a life sees them.
#[derive(Debug)]
pub struct Host {
    bus: Arc<dyn Bus>,
    /// Where errors are heard of.
    errors: Arc<dyn Bus>,
    life: Arc<Life>,
}

impl Host {
    pub fn new(bus: Arc<dyn Bus>, errors: Arc<dyn Bus>, life: &Arc<Life>) -> Self {
        let life = Arc::clone(life);
        Self { bus, errors, life }
    }
}

impl Bus for Host {
    fn backend(&self) -> Backend {
        self.bus.backend()
    }

    fn list(&self) -> Result<Vec<Bdf>, HostError> {
        self.bus.list()
    }

    fn changes(&self) -> std::io::Result<OwnedFd> {
        self.bus.changes()
    }

    fn describe(&self, bdf: Bdf) -> Result<Description, HostError> {
        self.life.around(|| self.bus.describe(bdf))
    }

    fn survey(&self) -> Result<Vec<Occupancy>, HostError> {
        self.bus.survey()
    }

    fn open(&self, bdf: Bdf) -> Result<Config, HostError> {
        let config = self.bus.open(bdf)?;
        let life = Arc::clone(&self.life);
        Ok(Arc::new(OpenConfig { bdf, config, life }))
    }

    fn unbind(&self, bdf: Bdf) -> Result<(), HostError> {
        self.life.around(|| self.bus.unbind(bdf))
    }

    fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        self.life
            .around(|| self.bus.set_driver_override(bdf, driver))
    }

    fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        self.life.around(|| self.bus.driver_override(bdf))
    }

    fn bind(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        self.life.around(|| self.bus.bind(bdf, driver))
    }

    fn enable(&self, bdf: Bdf, on: bool) -> Result<(), HostError> {
        self.life.around(|| self.bus.enable(bdf, on))
    }

    fn may_lose_power(&self, bdf: Bdf) -> Result<bool, HostError> {
        self.bus.may_lose_power(bdf)
    }

    fn set_may_lose_power(&self, bdf: Bdf, may: bool) -> Result<(), HostError> {
        self.life.around(|| self.bus.set_may_lose_power(bdf, may))
    }

    fn reset(&self, bdf: Bdf) -> Result<(), HostError> {
        self.life.doing(Deed::Reset(bdf), || self.bus.reset(bdf))
    }

    fn set_virtual_functions(&self, physical: Bdf, count: u16) -> Result<(), HostError> {
        self.life
            .around(|| self.bus.set_virtual_functions(physical, count))
    }

    fn are_functions_probed(&self, physical: Bdf) -> Result<bool, HostError> {
        self.bus.are_functions_probed(physical)
    }

    fn set_functions_probed(&self, physical: Bdf, probed: bool) -> Result<(), HostError> {
        self.life
            .around(|| self.bus.set_functions_probed(physical, probed))
    }

    fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<(), HostError> {
        self.life
            .around(|| self.bus.set_reset_methods(bdf, methods))
    }

    fn beside(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.bus.beside(bdf)
    }

    fn ports_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.bus.ports_above(bdf)
    }

    fn error_reports(&self) -> Result<Box<dyn ErrorReports>, HostError> {
        self.errors.error_reports()
    }

    fn correctable_errors(&self, bdf: Bdf) -> Option<u64> {
        self.bus.correctable_errors(bdf)
    }

    fn keep_virtual_functions(&self, physical: Bdf, keep: bool) -> Result<(), HostError> {
        self.life.doing(Deed::Keep(physical, keep), || {
            self.bus.keep_virtual_functions(physical, keep)
        })
    }

    fn needed_by_dom0(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        self.bus.needed_by_dom0(bdf)
    }

    fn together(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.bus.together(bdf)
    }

    fn check_return(&self, bdf: Bdf) -> Result<(), HostError> {
        self.bus.check_return(bdf)
    }

    fn check_together(&self, bdf: Bdf, taken: &[Bdf]) -> Result<(), HostError> {
        self.bus.check_together(bdf, taken)
    }
}

#[derive(Debug)]
struct OpenConfig {
    bdf: Bdf,
    config: Config,
    life: Arc<Life>,
}

impl ConfigSpace for OpenConfig {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        // Changes nothing, so no step of its own: to be killed here is to be killed at the next.
        self.life.be_alive();
        self.life.tell(Deed::Read(self.bdf, offset));
        self.config.read(offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        self.life
            .doing(Deed::Write(self.bdf, offset, width, value), || {
                self.config.write(offset, width, value)
            })
    }
}
