//! A simulated PCI bus for the embedded platform: devices with registers that behave as hardware
//! does, and dom0's kernel as a device's other owner.
//!
//! | module | holds |
//! |---|---|
//! | this one | the bus, and what a test or a demonstration does to its devices |
//! | `builder`, `assembly` | how a device is described, and what becomes of that |
//! | `examples` | the devices of the embedded platform |
//! | `virtual_functions` | SR-IOV: virtual functions come and go |
//! | `function` | one function's hardware: configuration space, reset, power |
//! | `interrupts` | its interrupts, from the device's side |
//! | `memory`, `models` | what lies behind its BARs |
//! | `errors` | AER: errors that a test injects, and what the kernel does about them |
//! | `dom0` | drivers, `driver_override`, enabling and resetting: the kernel's side ([`Bus`](super::Bus)) |
//! | `xen` | the hypervisor's side ([`Hardware`](xenbus::sim::Hardware)) |

mod assembly;
mod builder;
mod dom0;
mod errors;
mod examples;
mod function;
mod interrupts;
mod memory;
mod models;
mod sriov_capability;
mod virtual_functions;
mod xen;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use conf_space::Bdf;
use xenbus::sim::Machine;

pub use builder::{FunctionBuilder, VirtualFunctions};
pub use examples::{
    BOOT_CONTROLLER, BRIDGE, BROKEN, INTX_ONLY, MSI_ONLY, NIC, NIC_VF0, NIC_VF1, NVME,
};
pub use function::Reach;
pub use memory::Model;

use crate::host::devices::for_xen;
use assembly::Placement;
use function::{Function, Presence};

/// A simulated bus, plugged into an embedded machine.
#[derive(Debug)]
pub struct SimBus {
    machine: Machine,
    functions: Mutex<BTreeMap<Bdf, Arc<Function>>>,
    placement: Mutex<Placement>,
    listeners: Mutex<Vec<UnixDatagram>>,
    errors: Arc<errors::Reported>,
    orphaned: AtomicUsize,
    groups: Mutex<Vec<Vec<Bdf>>>,
}

impl SimBus {
    /// An empty bus. It takes the place of any other that the machine had.
    pub fn new(machine: &Machine) -> Arc<Self> {
        let bus = Arc::new(Self {
            machine: machine.clone(),
            functions: Mutex::default(),
            placement: Mutex::default(),
            listeners: Mutex::default(),
            errors: Arc::default(),
            orphaned: AtomicUsize::new(0),
            groups: Mutex::default(),
        });
        // Weak: otherwise bus and machine would keep each other alive.
        machine.set_hardware(Arc::new(xen::Plugged(Arc::downgrade(&bus))));
        bus
    }

    /// A bus with the devices of `examples`.
    pub fn with_example_devices(machine: &Machine) -> Arc<Self> {
        let bus = Self::new(machine);
        examples::add_all(&bus);
        bus
    }

    /// Plugs a device in, with its virtual functions: places its BARs, and binds its driver. One
    /// that is there already is replaced.
    pub fn add(&self, device: FunctionBuilder) {
        let (bdf, count) = (device.bdf, device.enabled_functions());
        let function = device.build(&mut lock(&self.placement));
        lock(&self.functions).insert(bdf, Arc::new(function));
        self.make_virtual_functions(bdf, count);
    }

    /// From now on small BARs are placed close to each other, several in a page, as some firmware does.
    pub fn pack_bars(&self) {
        /// The smallest memory BAR (PCIe 7.5.1.2.1).
        const SMALLEST: u64 = 16;
        lock(&self.placement).least = SMALLEST;
    }

    /// Pulls a device out: it is no longer there, and whoever still has it open is told so.
    pub fn remove(&self, bdf: Bdf) {
        let removed = lock(&self.functions).remove(&bdf);
        if let Some(function) = removed {
            self.take_virtual_functions(&function);
            function.set_presence(Presence::Removed);
            let orphaned = self.machine.device_removed(for_xen(bdf));
            self.orphaned.fetch_add(orphaned, Ordering::Relaxed);
            self.announce();
        }
    }

    /// Interrupts that guests still had mapped when their device was removed. A real Xen may not survive one.
    pub fn orphaned_interrupts(&self) -> usize {
        self.orphaned.load(Ordering::Relaxed)
    }

    /// Lets a device vanish from under the kernel: it is listed as before, but all its registers
    /// read as ones. Or lets it come back, as after a power cycle.
    pub fn vanish(&self, bdf: Bdf, gone: bool) {
        let presence = if gone {
            Presence::Silent
        } else {
            Presence::There
        };
        self.with(bdf, |function| function.set_presence(presence));
    }

    /// From now on dom0 reaches the device so.
    pub fn set_reach(&self, bdf: Bdf, reach: Reach) {
        self.with(bdf, |function| lock(&function.faults).reach = reach);
    }

    /// From now on these devices are in one IOMMU group, as the kernel has them where it uses the IOMMU itself: either dom0's drivers have devices
    /// of a group, or guests.
    pub fn put_together(&self, devices: &[Bdf]) {
        lock(&self.groups).push(devices.to_vec());
    }

    /// From now on every access to the device's configuration space takes that long.
    pub fn set_access_time(&self, bdf: Bdf, time: Duration) {
        self.with(bdf, |function| lock(&function.faults).access_time = time);
    }

    /// From now on a reset of the device takes that long.
    pub fn set_reset_time(&self, bdf: Bdf, time: Duration) {
        self.with(bdf, |function| lock(&function.faults).reset_time = time);
    }

    /// From now on a reset of the device fails, and the device does not come back from it. Only a reset of its bus revives it.
    pub fn set_reset_fails(&self, bdf: Bdf, fails: bool) {
        self.with(bdf, |function| lock(&function.faults).reset_fails = fails);
    }

    /// From now on the kernel's first way of resetting the link above the device fails, as with a port whose link does not come up in time. The
    /// device is reset by it, and by the second.
    pub fn set_link_reset_fails(&self, bdf: Bdf, fails: bool) {
        self.with(bdf, |function| {
            lock(&function.faults).link_reset_fails = fails
        });
    }

    /// From now on the device's driver leaves virtual functions behind when it goes, as few do.
    pub fn set_leaves_functions(&self, bdf: Bdf) {
        self.with(bdf, |function| {
            lock(&function.faults).leaves_functions = true;
        });
    }

    /// How often the device has been reset.
    pub fn resets(&self, bdf: Bdf) -> usize {
        self.with(bdf, |function| lock(&function.faults).resets)
            .unwrap_or(0)
    }

    /// The method by which dom0's kernel reset the device last.
    pub fn last_reset(&self, bdf: Bdf) -> Option<String> {
        self.with(bdf, |function| lock(&function.faults).last_reset.clone())
            .flatten()
    }

    /// How often the device is enabled in dom0's kernel.
    pub fn enable_count(&self, bdf: Bdf) -> u32 {
        self.with(bdf, |function| lock(&function.kernel).enabled)
            .unwrap_or(0)
    }

    /// The device has something to say: it sends the MSI or MSI-X message of that vector, or raises
    /// its line, as it is configured. True when that interrupted a guest.
    pub fn raise_interrupt(&self, bdf: Bdf, vector: u16) -> bool {
        self.with(bdf, |function| function.raise(&self.machine, vector))
            .unwrap_or(false)
    }

    /// The device's driver has seen to it: the line, if it was raised, is lowered.
    pub fn lower_interrupt(&self, bdf: Bdf) {
        self.with(bdf, Function::lower);
    }

    fn get(&self, bdf: Bdf) -> Option<Arc<Function>> {
        lock(&self.functions).get(&bdf).cloned()
    }

    /// Does something with a device, if it is there. Without the list's lock: a device may take its
    /// time.
    fn with<T>(&self, bdf: Bdf, action: impl FnOnce(&Function) -> T) -> Option<T> {
        self.get(bdf).map(|function| action(&function))
    }

    /// The others of a device's IOMMU group.
    fn others_of_group(&self, bdf: Bdf) -> Vec<Arc<Function>> {
        let group = lock(&self.groups)
            .iter()
            .find(|group| group.contains(&bdf))
            .cloned()
            .unwrap_or_default();
        let others = group.into_iter().filter(|other| *other != bdf);
        others.filter_map(|other| self.get(other)).collect()
    }

    fn all(&self) -> Vec<Arc<Function>> {
        lock(&self.functions).values().cloned().collect()
    }

    /// The function that decides whether this one decodes memory: itself, or its physical function.
    fn decoder(&self, function: &Arc<Function>) -> Option<Arc<Function>> {
        match function.physical() {
            Some(physical) => self.get(physical),
            None => Some(Arc::clone(function)),
        }
    }
}

/// A bus that whoever holds it does not keep alive.
type WeakBus = Weak<SimBus>;

/// Locks, also after a panic elsewhere: what is under these locks is consistent after every single
/// step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
