//! The bus as the embedded Xen uses it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use conf_space::{Bdf, ConfigSpace, Width};
use nix::errno::Errno;
use xenbus::sim::{DmaMemory, Hardware, MsiTarget, Window, WindowArea};
use xenbus::{DomId, Gsi, PciDevice};

use super::VfioBus;
use super::config::{VfioConfig, closed};
use super::device::{Open, Slot};
use super::interrupts::Wiring;

/// The bus, plugged into a machine.
#[derive(Debug)]
pub(super) struct Plugged(pub Weak<VfioBus>);

fn bdf_of(device: PciDevice) -> Bdf {
    Bdf::from_devfn(device.segment, device.bus, device.devfn)
}

/// As [`Plugged::tell`].
fn tell(slot: &Slot, what: &str, result: io::Result<()>) {
    // One that is closed has nothing on, and is reset when it is opened. What is not cleared in one that is being reset, nobody hears but the
    // guest that had it, until it is programmed anew or the guest has the device no more.
    if let Err(error) = result
        && error.raw_os_error() != Some(libc::EBUSY)
        && !slot.is_gone()
        && slot.open.is_open()
    {
        slot.complaints
            .warn(|| format!("{}: {what}: {error}", slot.bdf));
    }
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

    /// As [`Plugged::with`], for what Xen does with its lock held: it does not wait while the device is reset.
    fn at_once<T>(
        &self,
        device: PciDevice,
        action: impl FnOnce(&Open, &Wiring) -> io::Result<T>,
    ) -> io::Result<T> {
        self.with(device, |open| action(open, &*open.wiring_at_once()?))
    }

    /// Tells what failed, of what a guest may have asked for.
    fn tell(&self, device: PciDevice, what: &str, result: io::Result<()>) {
        if let Ok(slot) = self.slot(device) {
            tell(&slot, what, result);
        }
    }

    /// Does something with the interrupts of the device that a guest has on a line: each has one of its own.
    fn of_line<T>(
        &self,
        domain: DomId,
        gsi: Gsi,
        action: impl FnOnce(&Wiring) -> io::Result<T>,
    ) -> Option<(Arc<Slot>, io::Result<T>)> {
        let slots = self.bus().ok()?.shared.slots();
        let mut slots = slots.into_iter();
        let slot = slots.find(|slot| slot.line == Some(gsi) && slot.owner() == Some(domain))?;
        let done = slot.with_for(domain, |open| action(&open.wiring()));
        Some((slot, done))
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
        let now = slot.open.get();
        let read = now.map(|open| match open.wiring_at_once() {
            Ok(_awake) => Some(open.config.read(offset, width).unwrap_or(width.mask())),
            Err(_) => None,
        });
        // It is there. Xen holds its lock, and does not wait.
        read.ok()
            .flatten()
            .unwrap_or_else(|| closed(&slot.identity, offset, width))
    }

    fn config_write(&self, device: PciDevice, offset: u16, width: u8, value: u32) {
        if let (Some(width), Some(config)) =
            (Width::from_bytes(u32::from(width)), self.config(device))
        {
            let done = self.at_once(device, |open, wiring| {
                let done = config.write_to(open, wiring, offset, width, value);
                done.map_err(super::device::from_access)
            });
            self.tell(device, "its configuration cannot be written", done);
        }
    }

    fn program_msi(&self, device: PciDevice, target: MsiTarget) -> io::Result<()> {
        let wired = self.at_once(device, |_, wiring| wiring.program(target));
        if let (Err(error), Ok(slot)) = (&wired, self.slot(device)) {
            let bdf = slot.bdf;
            slot.complaints.warn(|| match target.entry {
                _ if error.raw_os_error() == Some(libc::EBUSY) => format!(
                    "{bdf}: its guest was refused an interrupt, as the device is being reset or changes hands: its driver may try again"
                ),
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
        let done = self.at_once(device, |_, wiring| wiring.clear(entry));
        self.tell(device, "an interrupt cannot be cleared", done);
    }

    fn reset(&self, device: PciDevice) {
        let done = self.with(device, Open::reset);
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
        let ended = self.of_line(domain, gsi, |wiring| wiring.end_of_interrupt());
        if let Some((slot, result)) = ended {
            tell(&slot, "its interrupt line stays masked", result);
        }
    }

    fn end_event(&self, domain: DomId, gsi: Gsi) -> io::Result<OwnedFd> {
        let event = self.of_line(domain, gsi, Wiring::end_event);
        event.map_or(Err(Errno::EOPNOTSUPP.into()), |(_, event)| event)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use conf_space::registers::header::COMMAND;
    use xenbus::Xen;
    use xenbus::sim::{DomainKind, GuestPlatform, Machine};

    use super::super::device::tests::slot;
    use super::super::interrupts::Listener;
    use super::*;
    use crate::host::sysfs::Sysfs;

    #[test]
    fn xen_does_not_touch_a_device_that_is_being_reset_and_so_does_not_wait_for_that() {
        let directory = tempfile::tempdir().unwrap();
        let sysfs = Sysfs::to_look_at(directory.path());
        let machine = Machine::new(directory.path().join("run")).unwrap();
        let bus = VfioBus::new(sysfs, &machine).unwrap();

        // It decodes memory, and has MSI-X at 0x40.
        let config = tempfile::tempfile().unwrap();
        config.write_all_at(&[0; 256], 0).unwrap();
        config
            .write_all_at(&[0x34, 0x12, 0xe8, 0x11, 2, 0, 0x10], 0)
            .unwrap();
        config.write_all_at(&[0x40], 0x34).unwrap();
        config.write_all_at(&[0x11, 0, 7, 0], 0x40).unwrap();
        let bdf: Bdf = "03:00.0".parse().unwrap();
        let device = crate::host::devices::for_xen(bdf);
        let listener: Arc<dyn Listener> = Arc::clone(&bus.shared) as _;
        let held = config.try_clone().unwrap();
        let slot = Arc::new(slot(bdf));
        let open = Open::made_up(bdf, held, &machine, &listener);
        slot.open.arrive(Ok(open)).unwrap();
        bus.shared
            .slots
            .write()
            .unwrap()
            .insert(bdf, Arc::clone(&slot));
        let guest = machine.create_domain("guest", DomainKind::Pv).unwrap();
        let command = || {
            let mut bytes = [0; 2];
            config
                .read_exact_at(&mut bytes, COMMAND.offset.into())
                .unwrap();
            u16::from_le_bytes(bytes)
        };
        let plugged = Plugged(Arc::downgrade(&bus));
        let target = MsiTarget {
            domain: guest,
            entry: None,
            address: 0xfee0_0000,
            data: 0x30,
        };

        let open = slot.get().unwrap();
        let reset = open.hold();
        assert_eq!(
            machine.prepare_msix(device).unwrap_err().errno(),
            Some(libc::ENODEV)
        );
        let programmed = plugged.program_msi(device, target);
        assert_eq!(programmed.unwrap_err().raw_os_error(), Some(libc::EBUSY));
        plugged.clear_msi(device, None);
        plugged.config_write(device, COMMAND.offset, 2, 6);
        assert_eq!(command(), 2);
        assert!(machine.device_owner(device).is_some());
        machine.guest(guest).alloc_unbound(DomId::DOM0).unwrap();

        drop(reset);
        machine.prepare_msix(device).unwrap();
        plugged.program_msi(device, target).unwrap();
    }
}
