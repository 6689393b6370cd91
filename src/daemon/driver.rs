//! The driver that the facade shows: what toolstacks ask of `/sys/bus/pci/drivers/pciback`, done with our devices.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use conf_space::address::Bdf;
use conf_space::overlay::Permissive;
use conf_space::overlay::quirk::DeviceQuirk;
use log::{error, info};
use nix::errno::Errno;
use xenbus::xenstore::Store;
use xenbus::{DomId, Xen};

use super::lock_of;
use crate::config::{DeviceSettings, InterruptControl};
use crate::facade::Driver;
use crate::host::HostError;
use crate::host::devices::{Device, DeviceError, Devices, Quarantine, Rebind};
use crate::host::record::{Phase, RunTime};
use crate::text::chain;

/// The hidden devices, and the slots: addresses that a toolstack announced (`new_slot`) and will bind next.
#[derive(Debug)]
pub struct SlotDriver {
    devices: Arc<Devices>,
    xen: Arc<dyn Xen>,
    announced: Mutex<BTreeSet<Bdf>>,
}

/// More announced slots than there are functions on a few buses are a mistake.
const MAX_SLOTS: usize = 4096;

impl SlotDriver {
    /// With nothing announced.
    pub fn new(devices: Arc<Devices>, xen: Arc<dyn Xen>) -> Self {
        Self {
            devices,
            xen,
            announced: Mutex::default(),
        }
    }

    fn with(&self, is: impl Fn(&DeviceSettings) -> bool) -> Vec<Bdf> {
        self.devices
            .list()
            .into_iter()
            .filter(|device| is(&self.devices.settings(device)))
            .map(|device| device.bdf)
            .collect()
    }

    /// Sets something for the guest that has the device, or else for the one that it is about to be given to.
    fn grant(
        &self,
        bdf: Bdf,
        what: &str,
        change: impl FnOnce(&mut RunTime) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let device = self.devices.get(bdf).ok_or(Errno::ENODEV)?;
        let meant_for = match device.record.phase() {
            Some(Phase::Assigned) => None,
            _ => self.meant_for(bdf),
        };
        device.record.change_settings(|settings| {
            if settings.meant_for.is_some() && settings.meant_for != meant_for {
                // Left behind by a guest that never got the device.
                *settings = RunTime::default();
            }
            settings.meant_for = meant_for;
            change(settings)
        })?;
        match meant_for {
            Some(domain) => info!("{bdf}: {what}, for domain {domain}"),
            None => info!("{bdf}: {what}, until its guest gives it back"),
        }
        Ok(())
    }

    /// The guest that libxl is giving the device to: it says so before it writes here. Should that fail half-way, what was granted is not for the
    /// next guest.
    fn meant_for(&self, bdf: Bdf) -> Option<DomId> {
        let (segment, bus) = (bdf.segment(), bdf.bus());
        let (device, function) = (bdf.device(), bdf.function());
        let node = format!("/libxl/pci/{segment:04x}-{bus:02x}-{device:02x}-{function:x}/domid");
        let mut store = self.xen.connect_xenstore().ok()?;
        store.read_string(&node).ok()?.parse().ok()
    }
}

/// The writer gets a number only, so the reason goes to the log.
fn told(error: DeviceError) -> Errno {
    error!("{}", chain(&error));
    match error {
        DeviceError::Host(HostError::Refused { source, .. }) => {
            source.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
        }
        DeviceError::Host(HostError::NoDevice { .. }) | DeviceError::NotHidden { .. } => {
            Errno::ENODEV
        }
        DeviceError::Needed { .. }
        | DeviceError::HasVirtualFunctions { .. }
        | DeviceError::FunctionsInGuests { .. }
        | DeviceError::NotVacated { .. }
        | DeviceError::SharedPage { .. }
        | DeviceError::Together { .. }
        | DeviceError::Busy { .. }
        | DeviceError::InUse { .. } => Errno::EBUSY,
        DeviceError::Bridge { .. } | DeviceError::Functions(_) => Errno::EINVAL,
        DeviceError::NoSuchReset { .. } => Errno::ENOTTY,
        DeviceError::Host(_)
        | DeviceError::Record(_)
        | DeviceError::Xen { .. }
        | DeviceError::Dead { .. } => Errno::EIO,
    }
}

impl Driver for SlotDriver {
    fn seized(&self) -> Vec<Bdf> {
        let usable = |phase| {
            matches!(
                phase,
                Some(Phase::Hidden | Phase::Assigned | Phase::Releasing)
            )
        };
        self.devices
            .list()
            .into_iter()
            .filter(|device| usable(device.record.phase()))
            .map(|device| device.bdf)
            .collect()
    }

    fn slots(&self) -> Vec<Bdf> {
        let mut slots = lock_of(&self.announced).clone();
        slots.extend(self.seized());
        slots.into_iter().collect()
    }

    fn new_slot(&self, device: Bdf) -> Result<(), Errno> {
        let mut announced = lock_of(&self.announced);
        if announced.len() >= MAX_SLOTS {
            return Err(Errno::ENOMEM);
        }
        announced.insert(device);
        Ok(())
    }

    /// xl takes a device away with this alone, as it finds no driver to unbind it from.
    fn remove_slot(&self, device: Bdf) -> Result<(), Errno> {
        let announced = lock_of(&self.announced).remove(&device);
        if self.devices.get(device).is_some() {
            return self.devices.unhide(device, Rebind::Nothing).map_err(told);
        }
        if announced {
            Ok(())
        } else {
            Err(Errno::ENOENT)
        }
    }

    fn bind(&self, device: Bdf) -> Result<(), Errno> {
        // As the kernel's: a device in no slot is not its own. xl quarantines what it binds, and what it asks for is not second-guessed:
        // it has unbound dom0's driver already.
        if !self.slots().contains(&device) {
            return Err(Errno::ENODEV);
        }
        self.devices
            .hide(device, true, Quarantine::Callers)
            .map_err(told)?;
        Ok(())
    }

    fn unbind(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.unhide(device, Rebind::Nothing).map_err(told)?;
        self.new_slot(device)
    }

    fn permissive(&self) -> Vec<Bdf> {
        self.with(|settings| settings.permissive == Permissive::Yes)
    }

    fn set_permissive(&self, device: Bdf) -> Result<(), Errno> {
        self.grant(device, "its guest may write every register", |settings| {
            settings.permissive = Some(Permissive::Yes);
            Ok(())
        })
    }

    fn interrupt_control(&self) -> Vec<Bdf> {
        self.with(|settings| settings.allow_interrupt_control == InterruptControl::Yes)
    }

    fn allow_interrupt_control(&self, device: Bdf) -> Result<(), Errno> {
        self.grant(
            device,
            "its guest may set the interrupt enable bits",
            |settings| {
                settings.allow_interrupt_control = Some(true);
                Ok(())
            },
        )
    }

    /// As the kernel lists them, but for the fields that no quirk has made.
    fn quirks(&self) -> String {
        let mut text = String::new();
        for device in self.devices.list() {
            let names = device.description.names();
            let bdf = device.bdf;
            let (subvendor, subdevice) = names.subsystem;
            let fields = self.devices.settings(&device).quirks;
            let fields: String = fields
                .iter()
                .map(|quirk| format!("\t\t{quirk}\n"))
                .collect();
            text += &format!(
                "{:02x}:{:02x}.{:x}\n\t{:04x}:{:04x}:{subvendor:04x}:{subdevice:04x}\n{fields}",
                bdf.bus(),
                bdf.device(),
                bdf.function(),
                names.vendor,
                names.device,
            );
        }
        text
    }

    fn add_quirk(&self, quirk: DeviceQuirk) -> Result<(), Errno> {
        let DeviceQuirk { device, quirk } = quirk;
        self.grant(device, &format!("quirk {quirk}"), |settings| {
            settings.quirks.insert(quirk).map_err(|error| {
                error!("{device}: {error}");
                Errno::ENOMEM
            })
        })
    }

    /// In the kernel's form. Xen delivers a guest's interrupts itself: no handler here has anything to acknowledge.
    fn irq_handlers(&self) -> String {
        let line = |device: &Arc<Device>| {
            let state = match device.record.settings().irq_handler {
                true => "on",
                false => "off",
            };
            format!("{}:{state}:not acking:0\n", device.bdf)
        };
        self.devices.list().iter().map(line).collect()
    }

    fn turn_irq_handler(&self, device: Bdf) -> Result<(), Errno> {
        let device = self.devices.get(device).ok_or(Errno::ENOENT)?;
        device.record.change_settings(|settings| {
            settings.irq_handler = !settings.irq_handler;
            Ok(())
        })?;
        Ok(())
    }

    fn may_unbind_other(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.check_functions(device).map_err(told)
    }

    fn reset(&self, device: Bdf) -> Result<(), Errno> {
        self.devices.reset(device).map_err(told)
    }
}

#[cfg(test)]
mod tests {
    use xenbus::sim::Machine;

    use super::*;
    use crate::host::record::Owner;
    use crate::host::sim::{INTX_ONLY, NVME, SimBus};

    struct House {
        driver: SlotDriver,
        machine: Machine,
        _records: tempfile::TempDir,
    }

    fn house() -> House {
        let records = tempfile::tempdir().unwrap();
        let machine = Machine::new(records.path()).unwrap();
        let bus = SimBus::with_example_devices(&machine);
        let xen: Arc<dyn Xen> = Arc::new(machine.clone());
        let path = records.path().join("devices");
        let devices = Devices::open(bus, Arc::clone(&xen), Arc::default(), path).unwrap();
        let driver = SlotDriver::new(devices, xen);
        driver.new_slot(NVME).unwrap();
        driver.bind(NVME).unwrap();
        House {
            driver,
            machine,
            _records: records,
        }
    }

    #[test]
    fn what_is_written_to_a_file_is_listed_in_it_and_gone_with_the_guest() {
        let house = house();
        let driver = &house.driver;
        driver.set_permissive(NVME).unwrap();
        driver.allow_interrupt_control(NVME).unwrap();
        driver
            .add_quirk("02:00.0-e8:2:00ff".parse().unwrap())
            .unwrap();
        driver.turn_irq_handler(NVME).unwrap();
        assert_eq!(driver.permissive(), [NVME]);
        assert_eq!(driver.interrupt_control(), [NVME]);
        assert_eq!(
            driver.quirks(),
            "02:00.0\n\t1b36:0010:1b36:0010\n\t\t000000e8:2:000000ff\n"
        );
        assert_eq!(driver.irq_handlers(), "0000:02:00.0:on:not acking:0\n");

        let device = driver.devices.get(NVME).unwrap();
        let owner = Owner {
            domain: DomId(3),
            seen_as: NVME,
        };
        device.record.set_owner(owner);
        device.record.set_phase(Phase::Assigned);
        driver.devices.release(&device);
        assert_eq!(driver.permissive(), []);
        assert_eq!(driver.interrupt_control(), []);
        assert_eq!(driver.quirks(), "02:00.0\n\t1b36:0010:1b36:0010\n");
        assert_eq!(driver.irq_handlers(), "0000:02:00.0:off:not acking:0\n");
    }

    #[test]
    fn a_device_that_is_not_held_has_the_kernels_errno() {
        let house = house();
        let driver = &house.driver;
        assert_eq!(driver.set_permissive(INTX_ONLY), Err(Errno::ENODEV));
        assert_eq!(
            driver.allow_interrupt_control(INTX_ONLY),
            Err(Errno::ENODEV)
        );
        assert_eq!(driver.turn_irq_handler(INTX_ONLY), Err(Errno::ENOENT));
        let quirk = "03:00.0-e8:2:00ff".parse().unwrap();
        assert_eq!(driver.add_quirk(quirk), Err(Errno::ENODEV));
    }

    #[test]
    fn there_is_an_end_to_the_quirks_of_a_device() {
        let house = house();
        let driver = &house.driver;
        let quirk = |offset: u16| format!("02:00.0-{offset:x}:1:01").parse().unwrap();
        for offset in 0xc0..0xd0 {
            driver.add_quirk(quirk(offset)).unwrap();
        }
        assert_eq!(driver.add_quirk(quirk(0xd0)), Err(Errno::ENOMEM));
    }

    #[test]
    fn what_a_toolstack_asks_for_is_for_the_guest_that_it_names_in_xenstore() {
        let house = house();
        let (driver, machine) = (&house.driver, &house.machine);
        let mut store = machine.connect_xenstore().unwrap();
        let settings = || driver.devices.get(NVME).unwrap().record.settings();
        store.write("/libxl/pci/0000-02-00-0/domid", "7").unwrap();
        driver.set_permissive(NVME).unwrap();
        assert_eq!(settings().meant_for, Some(DomId(7)));
        // The attach failed; the next guest's toolstack asks for something else.
        store.write("/libxl/pci/0000-02-00-0/domid", "8").unwrap();
        driver.allow_interrupt_control(NVME).unwrap();
        assert_eq!(settings().meant_for, Some(DomId(8)));
        assert_eq!(driver.permissive(), []);
        // By hand.
        store.rm("/libxl/pci/0000-02-00-0").unwrap();
        driver.set_permissive(NVME).unwrap();
        assert_eq!(settings().meant_for, None);
        assert_eq!(driver.interrupt_control(), []);
    }
}
