//! A device as a guest of the embedded platform has it: by the page it shares with pcibackd, and by the machine's socket
//! (`docs/embedded-platform.md`).

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use xenbus::pciif::{AerCommand, AerResult};
use xenbus::sim::{
    BarSpace, DmaMemory, EndEvent, Frontend, GuestPlatform, SocketGuest, SocketToolstack, Variant,
    WindowAccess,
};
use xenbus::xenstore::Store;
use xenbus::{DomId, PciDevice, Pirq, XenbusState};

use super::memory::{self, map};
use super::window::{Area, Door, Window};
use super::{Device, PATIENCE, Recovery, Result, Signal, until};
use crate::memory::Memory;

/// How long one look at the backend's state waits for a change of it.
const A_LOOK: Duration = Duration::from_millis(100);

/// See the module.
pub struct Embedded {
    guest: Rc<Guest>,
    function: PciDevice,
    line: Option<Pirq>,
    end: Option<EndEvent>,
}

/// What a guest's devices have in common: their frontend, and the memory that all of them reach.
pub struct Guest {
    xen: SocketGuest,
    frontend: RefCell<Frontend>,
    memory: Memory,
}

fn socket(run_dir: &str) -> String {
    format!("{run_dir}/machine.sock")
}

impl Guest {
    /// Gives the memory, and loads the frontend.
    pub fn open(run_dir: &str, domain: DomId) -> Result<Rc<Self>> {
        let xen = SocketGuest::connect(socket(run_dir), domain)?;
        let (memory, file) = memory::shared()?;
        // What another program gave, as the same guest, that did not come to its end.
        let _ = xen.take_memory(memory::ADDRESS);
        xen.give_memory(DmaMemory {
            address: memory.physical(0),
            size: memory::SIZE,
            file,
            offset: 0,
        })?;
        until_backend_is_ready(&xen)?;
        let mut frontend = Frontend::new(
            SocketGuest::connect(socket(run_dir), domain)?,
            Variant::Linux,
        )?;
        frontend.connect(PATIENCE)?;
        Ok(Rc::new(Self {
            xen,
            frontend: RefCell::new(frontend),
            memory,
        }))
    }

    /// Its device of that number, from 1, in the order in which they were given.
    pub fn device(self: &Rc<Self>, number: usize) -> Result<Embedded> {
        let frontend = self.frontend.borrow();
        let function = frontend.functions().nth(number.saturating_sub(1));
        let function = function.ok_or("the guest has no such device")?.address;
        Ok(Embedded {
            guest: Rc::clone(self),
            function,
            line: None,
            end: None,
        })
    }

    /// Its device with this device ID, in the higher half, and vendor ID.
    pub fn find(self: &Rc<Self>, ids: u32) -> Result<Embedded> {
        let number = self.number_of(ids);
        self.device(number.ok_or("the guest has no such device")?)
    }

    fn number_of(&self, ids: u32) -> Option<usize> {
        let frontend = self.frontend.borrow();
        let found = frontend.functions().position(|function| {
            u32::from(function.device) << 16 | u32::from(function.vendor) == ids
        })?;
        Some(found.saturating_add(1))
    }

    /// Follows the backend until the guest has that device, or has it no more.
    pub fn await_device(&self, ids: u32, there: bool) -> Result<()> {
        until("a device comes or goes", || {
            self.frontend.borrow_mut().follow(A_LOOK)?;
            Ok(self.number_of(ids).is_some() == there)
        })
    }
}

/// Waits while the backend closes after the program before this one.
fn until_backend_is_ready(xen: &SocketGuest) -> Result<()> {
    let mut store = xen.connect_xenstore()?;
    let backend = store.read_string("device/pci/0/backend")?;
    until("the backend has closed", || {
        let state = store.read_state(&format!("{backend}/state"))?;
        Ok(!matches!(state, XenbusState::Closing | XenbusState::Closed))
    })
}

impl Drop for Guest {
    fn drop(&mut self) {
        // As a driver that is unloaded: the next program of this guest loads it again.
        let closed = self.frontend.get_mut().close(PATIENCE);
        let taken = self.xen.take_memory(memory::ADDRESS);
        if let Err(error) = closed {
            eprintln!("lab-guest: closing: {error}");
        }
        if let Err(error) = taken {
            eprintln!("lab-guest: taking memory back: {error}");
        }
    }
}

/// What is not mapped.
struct Trapped(Box<dyn WindowAccess>);

impl Door for Trapped {
    fn read(&self, offset: u64, width: u8) -> Result<u64> {
        Ok(self.0.read(offset, width)?)
    }

    fn write(&self, offset: u64, width: u8, value: u64) -> Result<()> {
        Ok(self.0.write(offset, width, value)?)
    }
}

impl Device for Embedded {
    fn config_read(&mut self, offset: u16, width: u8) -> Result<u32> {
        let mut frontend = self.guest.frontend.borrow_mut();
        Ok(frontend.conf_read(self.function, offset, width)?)
    }

    fn config_write(&mut self, offset: u16, width: u8, value: u32) -> Result<()> {
        let mut frontend = self.guest.frontend.borrow_mut();
        Ok(frontend.conf_write(self.function, offset, width, value)?)
    }

    fn window(&mut self, bar: u8) -> Result<Window> {
        let frontend = self.guest.frontend.borrow();
        let function = frontend.function(self.function).ok_or("no function")?;
        let bar = function.bars.iter().find(|found| found.index == bar);
        let bar = bar.ok_or("no such BAR")?;
        let window = self.guest.xen.open_window(bar.kind.space(), bar.address)?;
        let mut areas = Vec::new();
        for area in window.areas {
            areas.push(Area {
                start: area.start,
                size: area.size,
                base: map(&area.file, area.offset, usize::try_from(area.size)?)?,
            });
        }
        let door = Box::new(Trapped(window.access));
        Ok(Window { areas, door })
    }

    fn interrupts(&mut self, signal: Signal, count: u32) -> Result<()> {
        let mut frontend = self.guest.frontend.borrow_mut();
        frontend.release_interrupts(self.function)?;
        self.line = None;
        match signal {
            Signal::Line => self.line = Some(frontend.enable_intx(self.function)?),
            Signal::Msi if count == 1 => drop(frontend.enable_msi(self.function)?),
            Signal::Msi => drop(frontend.enable_multi_msi(self.function, count)?),
            Signal::Msix => {
                let entries: Vec<u16> = (0..u16::try_from(count)?).collect();
                frontend.enable_msix(self.function, &entries)?;
            }
        }
        Ok(())
    }

    fn wait(&mut self, vector: usize, patience: Duration) -> Result<bool> {
        let frontend = self.guest.frontend.borrow();
        Ok(frontend.wait_for_interrupt(self.function, vector, patience)?)
    }

    fn end_of_interrupt(&mut self) -> Result<()> {
        match (self.line, &self.end) {
            (Some(_), Some(end)) => Ok(end.end_of_interrupt()?),
            (Some(pirq), None) => Ok(self.guest.xen.end_of_interrupt(pirq)?),
            (None, _) => Ok(()),
        }
    }

    fn end_by_event(&mut self) -> Result<()> {
        let pirq = self
            .line
            .ok_or("there is no line whose interrupts could end")?;
        self.end = Some(self.guest.xen.end_event(pirq)?);
        Ok(())
    }

    fn recovery_step(&mut self, patience: Duration) -> Result<Option<Recovery>> {
        let mut frontend = self.guest.frontend.borrow_mut();
        let Some(request) = frontend.next_aer(patience)? else {
            return Ok(None);
        };
        let (step, answer) = match request.command.ok_or("a step of recovery that is none")? {
            AerCommand::Detected => (Recovery::Detected, AerResult::NeedReset),
            AerCommand::MmioEnabled => (Recovery::MmioEnabled, AerResult::NeedReset),
            AerCommand::SlotReset => (Recovery::SlotReset, AerResult::Recovered),
            AerCommand::Resume => (Recovery::Resume, AerResult::None),
        };
        frontend.answer_aer(answer)?;
        Ok(Some(step))
    }

    fn memory(&self) -> &Memory {
        &self.guest.memory
    }
}

/// Opens, as a guest, what one of its devices has at an address, and reads there.
pub fn look(run_dir: &str, domain: DomId, space: &str, address: &str, width: u8) -> Result<()> {
    let xen = SocketGuest::connect(socket(run_dir), domain)?;
    let space = match space {
        "memory" => BarSpace::Memory,
        "io" => BarSpace::Io,
        _ => return Err(format!("there is no address space '{space}'").into()),
    };
    let address = u64::from_str_radix(address.trim_start_matches("0x"), 16)?;
    let window = xen.open_window(space, address)?;
    let offset = address.saturating_sub(window.address);
    println!("{:#x}", window.access.read(offset, width)?);
    Ok(())
}

/// Gives a guest's devices memory that nobody has touched, above what [`Embedded`] gives.
pub fn give(run_dir: &str, domain: DomId, mib: u64) -> Result<()> {
    const ADDRESS: u64 = 4 << 30;
    let size = mib.checked_mul(1 << 20).ok_or("so much is not")?;
    let xen = SocketGuest::connect(socket(run_dir), domain)?;
    Ok(xen.give_memory(DmaMemory {
        address: ADDRESS,
        size,
        file: memory::sealed(size)?,
        offset: 0,
    })?)
}

/// Plays a toolstack. `create` prints the new domain's id.
pub fn toolstack(run_dir: &str, command: &[&str]) -> Result<()> {
    let toolstack = SocketToolstack::connect(socket(run_dir))?;
    match command {
        ["create", name, devices @ ..] => {
            let domain = toolstack.create_domain(name)?;
            if let Err(error) = start(&toolstack, domain, devices) {
                // As xl does: nothing of it is left. Why it could not be is what counts.
                if let Err(error) = toolstack.destroy_domain(domain) {
                    eprintln!("lab-guest: domain {domain} is left behind: {error}");
                }
                return Err(error);
            }
            println!("{domain}");
        }
        ["attach", domain, device] => toolstack.pci_attach(domain.parse()?, device.parse()?)?,
        ["detach", domain, device] => toolstack.pci_detach(domain.parse()?, device.parse()?)?,
        ["destroy", domain] => toolstack.destroy_domain(domain.parse()?)?,
        _ => return Err("the toolstack does: create, attach, detach, destroy".into()),
    }
    Ok(())
}

fn start(toolstack: &SocketToolstack, domain: DomId, devices: &[&str]) -> Result<()> {
    for device in devices {
        toolstack.pci_attach(domain, device.parse()?)?;
    }
    Ok(toolstack.unpause_domain(domain)?)
}
