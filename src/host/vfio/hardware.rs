//! The bus as the embedded Xen uses it.

use std::io;
use std::sync::{Arc, Weak};

use conf_space::{Bdf, ConfigSpace, Width};
use nix::errno::Errno;
use xenbus::sim::{DmaMemory, Hardware, MsiTarget, Window, WindowArea};
use xenbus::{DomId, Gsi, PciDevice};

use super::VfioBus;
use super::config::{VfioConfig, closed};
use super::device::{Open, Slot};

/// The bus, plugged into a machine.
#[derive(Debug)]
pub(super) struct Plugged(pub Weak<VfioBus>);

fn bdf_of(device: PciDevice) -> Bdf {
    Bdf::from_devfn(device.segment, device.bus, device.devfn)
}

impl Plugged {
    fn bus(&self) -> io::Result<Arc<VfioBus>> {
        Ok(self.0.upgrade().ok_or(Errno::ENODEV)?)
    }

    /// Only of a device that is hidden: others are not the embedded Xen's.
    fn slot(&self, device: PciDevice) -> io::Result<Arc<Slot>> {
        Ok(self.bus()?.slot(bdf_of(device)).ok_or(Errno::ENODEV)?)
    }

    fn with<T>(
        &self,
        device: PciDevice,
        action: impl FnOnce(&Open) -> io::Result<T>,
    ) -> io::Result<T> {
        self.slot(device)?.with(action)
    }

    /// Tells what failed, of what a guest may have asked for.
    fn tell(&self, device: PciDevice, what: &str, result: io::Result<()>) {
        // One that is closed has nothing on, and is reset when it is opened.
        if let Err(error) = result
            && let Ok(slot) = self.slot(device)
            && !slot.is_gone()
            && slot.open.is_open()
        {
            slot.complaints
                .warn(|| format!("{}: {what}: {error}", slot.bdf));
        }
    }

    fn config(&self, device: PciDevice) -> Option<VfioConfig> {
        self.slot(device).ok().map(VfioConfig)
    }
}

impl Hardware for Plugged {
    fn config_read(&self, device: PciDevice, offset: u16, width: u8) -> u32 {
        let Some(width) = Width::from_bytes(u32::from(width)) else {
            return u32::MAX;
        };
        let Ok(slot) = self.slot(device) else {
            return width.mask();
        };
        if slot.is_gone() {
            return width.mask();
        }
        match slot.open.get() {
            Ok(open) => open.config.read(offset, width).unwrap_or(width.mask()),
            // It is there. Xen holds its lock, and does not wait.
            Err(_) => {
                let identity = &slot.identity;
                closed([identity.vendor, identity.device], offset, width)
            }
        }
    }

    fn config_write(&self, device: PciDevice, offset: u16, width: u8, value: u32) {
        if let (Some(width), Some(config)) =
            (Width::from_bytes(u32::from(width)), self.config(device))
        {
            let done = config.write(offset, width, value);
            let done = done.map_err(super::device::from_access);
            self.tell(device, "its configuration cannot be written", done);
        }
    }

    fn program_msi(&self, device: PciDevice, target: MsiTarget) -> io::Result<()> {
        let wired = self.with(device, |open| open.wiring.program(target));
        if let (Err(error), Ok(slot)) = (&wired, self.slot(device)) {
            let bdf = slot.bdf;
            slot.complaints.warn(|| match target.entry {
                Some(entry) => format!(
                    "{bdf}: its guest does not get interrupt {entry} of MSI-X: {error}. Where the host has fewer interrupts left than the device can have, \
                     Linux before 6.5 makes no more than are in use when MSI-X is enabled: have the guest's driver use fewer"
                ),
                None => format!("{bdf}: its guest does not get MSI: {error}"),
            });
        }
        wired
    }

    fn clear_msi(&self, device: PciDevice, entry: Option<u16>) {
        let done = self.with(device, |open| open.wiring.clear(entry));
        self.tell(device, "an interrupt cannot be cleared", done);
    }

    fn reset(&self, device: PciDevice) {
        let done = self.with(device, |open| {
            if open.resets {
                super::ioctl::reset(&open.file)
            } else {
                Ok(())
            }
        });
        self.tell(device, "it cannot be reset", done);
    }

    fn assign(&self, domain: DomId, device: PciDevice, memory: &[DmaMemory]) -> io::Result<()> {
        self.bus()?.assign(domain, bdf_of(device), memory)
    }

    fn deassign(&self, domain: DomId, device: PciDevice) {
        if let Ok(bus) = self.bus() {
            bus.deassign(domain, bdf_of(device));
        }
    }

    fn map_dma(&self, domain: DomId, memory: &DmaMemory) -> io::Result<()> {
        self.bus()?.map_dma(domain, memory)
    }

    fn unmap_dma(&self, domain: DomId, address: u64) -> io::Result<()> {
        self.bus()?.unmap_dma(domain, address)
    }

    fn end_of_interrupt(&self, domain: DomId, gsi: Gsi) {
        let Ok(bus) = self.bus() else { return };
        for slot in bus.shared.slots() {
            if slot.owner() == Some(domain) && slot.line == Some(gsi) {
                let _ = slot.with(|open| {
                    open.wiring.end_of_interrupt();
                    Ok(())
                });
            }
        }
    }

    fn windows(&self, device: PciDevice) -> Vec<Window> {
        self.slot(device)
            .map(|slot| slot.windows())
            .unwrap_or_default()
    }

    fn areas(&self, domain: DomId, device: PciDevice, bar: u8) -> io::Result<Vec<WindowArea>> {
        self.slot(device)?.areas(domain, bar)
    }

    fn window_read(
        &self,
        domain: DomId,
        device: PciDevice,
        bar: u8,
        offset: u64,
        width: u8,
    ) -> io::Result<u64> {
        let slot = self.slot(device)?;
        slot.window_read(domain, bar, offset, width)
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
        let slot = self.slot(device)?;
        slot.window_write(domain, bar, offset, width, value)
    }
}
