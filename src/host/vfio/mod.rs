//! The machine's own PCI devices through VFIO, for guests of the embedded Xen: on any Linux that uses the IOMMU itself.
//!
//! A hidden device is bound to vfio-pci and open, in a container of its own with nothing mapped in it, which is what quarantine is to Xen. A
//! guest's devices are all in one container, in which its memory is mapped. Everything else is sysfs's: how devices are found and described,
//! reserved, and given back ([`super::sysfs`]).
//!
//! | module | holds |
//! |---|---|
//! | this one | the bus |
//! | `bus` | it as everybody uses it ([`super::Bus`]) |
//! | `hardware` | it as Xen uses it ([`xenbus::sim::Hardware`]) |
//! | `hands` | how devices and their groups change hands: nobody's, a guest's |
//! | `binding` | to vfio-pci, and from it |
//! | `space` | containers, and guests' memory in them |
//! | `dma` | that a guest's memory comes and goes |
//! | `device` | an open device |
//! | `windows` | what guests reach of its BARs |
//! | `movable` | that it is closed and opened again when it changes hands |
//! | `config` | its configuration space |
//! | `regions` | what of its memory may be mapped |
//! | `interrupts` | its interrupts |
//! | `reset` | resetting it with others |
//! | `errors` | errors that it reports |
//! | `ioctl`, `info` | VFIO's system calls, and what they answer |

mod binding;
mod bus;
mod config;
mod device;
mod dma;
mod errors;
mod hands;
mod hardware;
mod info;
mod interrupts;
mod ioctl;
mod movable;
mod regions;
mod reset;
mod space;
mod windows;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use conf_space::Bdf;
use xenbus::DomId;
use xenbus::sim::Machine;

use self::device::Slot;
use self::errors::Reported;
use self::hands::Hands;
use self::interrupts::Listener;
use self::space::Space;
use super::HostError;
use super::sysfs::Sysfs;
use crate::rate_limit::RateLimit;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The kernel's driver that gives devices to user space.
pub(super) const DRIVER: &str = "vfio-pci";

/// What a guest can make us say: so much, and no more.
#[derive(Debug)]
struct Complaints(Mutex<RateLimit>);

impl Complaints {
    fn new() -> Self {
        Self(Mutex::new(RateLimit::new(10, Duration::from_secs(10))))
    }

    fn warn(&self, text: impl FnOnce() -> String) {
        if lock(&self.0).allow() {
            log::warn!("{}", text());
        }
    }
}

/// What the threads of the devices reach as well.
#[derive(Debug)]
struct Shared {
    slots: RwLock<BTreeMap<Bdf, Arc<Slot>>>,
    /// Devices may have come or gone.
    changed: EventFd,
    errors: Reported,
}

impl Shared {
    fn slot(&self, bdf: Bdf) -> Option<Arc<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&bdf).cloned()
    }

    fn slots(&self) -> Vec<Arc<Slot>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.values().cloned().collect()
    }
}

impl Listener for Shared {
    fn error(&self, bdf: Bdf) {
        self.errors.add(bdf);
    }

    fn requested(&self, bdf: Bdf) {
        // The kernel goes on asking.
        let first = self.slot(bdf).is_some_and(|slot| slot.set_gone());
        if first {
            log::warn!("{bdf} is wanted back by the kernel: it is pulled out, or unbound by hand");
        }
        let _ = self.changed.write(1);
    }
}

/// The bus, plugged into an embedded machine.
#[derive(Debug)]
pub struct VfioBus {
    sysfs: Sysfs,
    machine: Machine,
    shared: Arc<Shared>,
    /// Held while devices are opened, closed, and change hands.
    hands: Mutex<Hands>,
    /// The memory of guests that have devices.
    guests: Mutex<BTreeMap<DomId, Arc<Space>>>,
    /// What the INTx lines of devices are to the machine: each has one of its own, as the kernel tells devices on one line apart.
    lines: Mutex<BTreeMap<Bdf, u8>>,
    /// Those that are to be reset with their bus, though the kernel itself would not.
    by_bus: Mutex<BTreeSet<Bdf>>,
}

/// The lowest line that is none of the ISA bus.
const FIRST_LINE: u8 = 16;

/// Lines of an embedded machine with real devices: as many as the register has numbers for.
pub const LINES: u32 = 255;

impl VfioBus {
    /// The machine's own bus, which is plugged into `machine` in the place of any other.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn new(sysfs: Sysfs, machine: &Machine) -> io::Result<Arc<Self>> {
        let bus = Arc::new(Self {
            sysfs,
            machine: machine.clone(),
            shared: Arc::new(Shared {
                slots: RwLock::default(),
                changed: new_event()?,
                errors: Reported::new(new_event()?),
            }),
            hands: Mutex::default(),
            guests: Mutex::default(),
            lines: Mutex::default(),
            by_bus: Mutex::default(),
        });
        machine.set_hardware(Arc::new(hardware::Plugged(Arc::downgrade(&bus))));
        Ok(bus)
    }

    fn slot(&self, bdf: Bdf) -> Option<Arc<Slot>> {
        self.shared.slot(bdf)
    }

    /// What the INTx line of a device with a pin is to the machine; 0 when there are no more.
    fn line(&self, bdf: Bdf) -> u8 {
        let mut lines = lock(&self.lines);
        if let Some(line) = lines.get(&bdf) {
            return *line;
        }
        let taken: Vec<u8> = lines.values().copied().collect();
        let free = (FIRST_LINE..u8::MAX).find(|line| !taken.contains(line));
        if let Some(line) = free {
            lines.insert(bdf, line);
        }
        free.unwrap_or(0)
    }
}

fn new_event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?)
}

fn refused(
    bdf: Bdf,
    action: impl Into<String>,
    remedy: &'static str,
) -> impl FnOnce(io::Error) -> HostError {
    let action = action.into();
    move |source| HostError::Refused {
        bdf,
        action,
        remedy,
        source,
    }
}

/// Locks, also after a panic elsewhere: what is under these locks is consistent after every single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
