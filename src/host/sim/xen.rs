//! The hypervisor's side of the bus: it reaches hardware directly, waits for nobody, and programs
//! interrupts.

use std::io;
use std::sync::Arc;

use conf_space::registers::header;
use conf_space::{Bdf, Width};
use nix::errno::Errno;
use xenbus::sim::{DmaMemory, Hardware, MsiTarget, Window};
use xenbus::{DomId, PciDevice};

use super::function::Function;
use super::{WeakBus, lock};
use crate::host::devices::for_xen;

/// The bus, plugged into a machine.
#[derive(Debug)]
pub(super) struct Plugged(pub WeakBus);

impl Plugged {
    fn with<T>(
        &self,
        device: PciDevice,
        action: impl FnOnce(&super::SimBus, &Arc<Function>) -> T,
    ) -> Option<T> {
        let bus = self.0.upgrade()?;
        let function = bus.get(Bdf::from_devfn(device.segment, device.bus, device.devfn))?;
        Some(action(&bus, &function))
    }

    /// Does something with a device for a guest, whose it stays meanwhile.
    fn with_for<T>(
        &self,
        domain: DomId,
        device: PciDevice,
        action: impl FnOnce(&super::SimBus, &Arc<Function>) -> io::Result<T>,
    ) -> io::Result<T> {
        let done = self.with(device, |bus, function| {
            let owner = lock(&function.owner);
            if *owner != Some(domain) {
                return Err(Errno::EPERM.into());
            }
            action(bus, function)
        });
        done.unwrap_or_else(|| Err(Errno::ENODEV.into()))
    }
}

impl Hardware for Plugged {
    fn config_read(&self, device: PciDevice, offset: u16, width: u8) -> u32 {
        let Some(width) = Width::from_bytes(u32::from(width)) else {
            return u32::MAX;
        };
        let read = self.with(device, |_, function| {
            // Xen knows of a virtual function because dom0 has told it, not from its vendor id,
            // which reads as if there were none.
            if function.physical().is_some()
                && offset == header::VENDOR_ID.offset
                && !function.is_gone()
            {
                return Some(u32::from(function.fixed.identity.vendor));
            }
            function.read(offset, width).ok()
        });
        read.flatten().unwrap_or(width.mask())
    }

    fn config_write(&self, device: PciDevice, offset: u16, width: u8, value: u32) {
        if let Some(width) = Width::from_bytes(u32::from(width)) {
            self.with(device, |bus, function| {
                let _ = function.write(&bus.machine, offset, width, value);
            });
        }
    }

    fn program_msi(&self, device: PciDevice, target: MsiTarget) -> io::Result<()> {
        let programmed = self.with(device, |bus, function| {
            function.program(&bus.machine, target);
        });
        programmed.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn clear_msi(&self, device: PciDevice, entry: Option<u16>) {
        self.with(device, |_, function| function.clear(entry));
    }

    fn physical_function(&self, device: PciDevice) -> Option<PciDevice> {
        self.with(device, |_, function| function.physical())
            .flatten()
            .map(for_xen)
    }

    fn reset(&self, device: PciDevice) {
        // Called under the machine's lock, so at once, however long the device takes otherwise.
        self.with(device, |_, function| {
            if !function.fixed.reset_methods.is_empty() {
                function.reset();
            }
        });
    }

    fn assign(&self, domain: DomId, device: PciDevice, _memory: &[DmaMemory]) -> io::Result<()> {
        self.with(device, |_, function| *lock(&function.owner) = Some(domain));
        Ok(())
    }

    fn deassign(&self, domain: DomId, device: PciDevice) {
        self.with(device, |_, function| {
            lock(&function.owner).take_if(|owner| *owner == domain);
        });
    }

    fn windows(&self, device: PciDevice) -> Vec<Window> {
        self.with(device, |_, function| function.windows())
            .unwrap_or_default()
    }

    fn window_read(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        offset: u64,
        width: u8,
    ) -> io::Result<u64> {
        self.with_for(domain, device, |bus, function| {
            bus.window_read(function, bar, offset, width)
        })
    }

    fn window_write(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        offset: u64,
        width: u8,
        value: u64,
    ) -> io::Result<()> {
        self.with_for(domain, device, |bus, function| {
            bus.window_write(function, bar, offset, width, value)
        })
    }
}
