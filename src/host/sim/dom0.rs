//! dom0's kernel: drivers, `driver_override`, enabling and resetting.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use conf_space::registers::header::{self, command};
use conf_space::registers::power_management;
use conf_space::{AccessError, Bdf, ConfigSpace, Width};
use xenbus::DomId;
use xenbus::sim::Machine;

use super::errors::port_above;
use super::function::{Function, Kernel, Presence, Reach};
use super::{BRIDGE, SimBus, lock};
use crate::host::devices::for_xen;
use crate::host::errors::ErrorReports;
use crate::host::group::NotViable;
use crate::host::sharing::Occupancy;
use crate::host::{Backend, Bus, Config, Description, HostError};

/// How often it is looked whether a device has come back, and for how long.
const LOOK: Duration = Duration::from_micros(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// A device's configuration space as dom0 reaches it.
#[derive(Debug)]
struct OpenConfig {
    function: Arc<Function>,
    machine: Machine,
}

impl OpenConfig {
    fn begin(&self) -> Result<(), AccessError> {
        self.function.wait();
        match *lock(&self.function.presence) {
            Presence::Removed => Err(AccessError::Gone),
            Presence::There | Presence::Silent if self.function.reach() == Reach::Here => Ok(()),
            Presence::There | Presence::Silent => Err(AccessError::Failed { errno: libc::EBUSY }),
        }
    }
}

impl ConfigSpace for OpenConfig {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        self.begin()?;
        self.function.read(offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        self.begin()?;
        self.function.write(&self.machine, offset, width, value)
    }
}

pub(super) fn refused(
    bdf: Bdf,
    action: impl Into<String>,
    remedy: &'static str,
    errno: i32,
) -> HostError {
    HostError::Refused {
        bdf,
        action: action.into(),
        remedy,
        source: io::Error::from_raw_os_error(errno),
    }
}

impl Function {
    /// Decode, interrupt routing, full power: what `pci_enable_device` does.
    fn switch_on(&self) {
        if let Some(base) = self.fixed.power {
            let control = u32::from(self.register(base, &power_management::CONTROL));
            let awake = control & !u32::from(power_management::control::POWER_STATE);
            self.set_register(base, &power_management::CONTROL, awake);
        }
        let resources = &self.fixed.identity.resources;
        let mut decode = self.command();
        if resources.iter().any(|resource| resource.is_memory()) {
            decode |= command::MEMORY;
        }
        if resources.iter().any(|resource| resource.is_io()) {
            decode |= command::IO;
        }
        self.set_command(decode);
    }

    /// Through the register's mask: what a virtual function does not have stays off.
    fn set_command(&self, value: u16) {
        let _ = self.space.write(
            header::COMMAND.offset,
            header::COMMAND.width,
            u32::from(value),
        );
    }

    /// A driver takes the device: enables it and lets it master the bus.
    pub(super) fn probe(&self, kernel: &mut Kernel, driver: &str) {
        self.raise_enable_count(kernel);
        self.set_command(self.command() | command::BUS_MASTER);
        kernel.driver = Some(driver.to_owned());
    }

    /// The device is found, and its driver takes it.
    pub(super) fn probe_first(&mut self) {
        if let Some(driver) = self.fixed.native_driver.clone() {
            self.probe(&mut lock(&self.kernel), &driver);
        }
    }

    fn raise_enable_count(&self, kernel: &mut Kernel) {
        if kernel.enabled == 0 {
            self.switch_on();
        }
        kernel.enabled = kernel.enabled.saturating_add(1);
    }

    /// Takes one enabling back. The kernel leaves decode on: it only takes bus mastering away.
    fn lower_enable_count(&self, kernel: &mut Kernel) -> bool {
        let was_enabled = kernel.enabled > 0;
        kernel.enabled = kernel.enabled.saturating_sub(1);
        if was_enabled && kernel.enabled == 0 {
            self.set_command(self.command() & !command::BUS_MASTER);
        }
        was_enabled
    }
}

impl Function {
    fn wait_for_reach(&self) -> Result<(), HostError> {
        let begin = Instant::now();
        while self.reach() == Reach::Moving && begin.elapsed() < PATIENCE {
            thread::sleep(LOOK);
        }
        let remedy = match self.reach() {
            Reach::Here => return Ok(()),
            Reach::Moving => "it is changing hands still",
            Reach::Elsewhere => "a guest that had it has not let go of it",
        };
        Err(refused(self.bdf(), "open it", remedy, libc::EBUSY))
    }
}

impl SimBus {
    /// Devices have come or gone.
    pub(super) fn announce(&self) {
        // One that has not read the last one yet knows enough; one that is closed is gone.
        lock(&self.listeners).retain(|listener| match listener.send(b"change") {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        });
    }

    pub(super) fn known(&self, bdf: Bdf) -> Result<Arc<Function>, HostError> {
        self.get(bdf).ok_or(HostError::NoDevice { bdf })
    }

    /// Whether dom0's drivers can use the device: Xen lets its DMA through, and it answers.
    fn is_usable(&self, function: &Function) -> bool {
        let owner = self.machine.device_owner(for_xen(function.bdf()));
        !function.is_gone() && owner == Some(DomId::DOM0)
    }
}

impl Bus for SimBus {
    fn backend(&self) -> Backend {
        Backend::Simulated
    }

    fn list(&self) -> Result<Vec<Bdf>, HostError> {
        Ok(lock(&self.functions).keys().copied().collect())
    }

    fn changes(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixDatagram::pair()?;
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true)?;
        }
        lock(&self.listeners).push(ours);
        Ok(theirs.into())
    }

    fn describe(&self, bdf: Bdf) -> Result<Description, HostError> {
        let function = self.known(bdf)?;
        let driver = lock(&function.kernel).driver.clone();
        Ok(Description {
            identity: function.fixed.identity.clone(),
            subsystem: function.fixed.subsystem,
            path: Some(function.fixed.path.clone()),
            class: function.fixed.class,
            function: self.sriov_function(&function),
            irq: u32::from(function.fixed.gsi),
            driver,
            reset_methods: function.reset_methods(),
        })
    }

    fn survey(&self) -> Result<Vec<Occupancy>, HostError> {
        let look = |function: &Arc<Function>| {
            let driver = lock(&function.kernel).driver.clone();
            let fixed = &function.fixed;
            // dom0's drivers use messages where there are any.
            let messages = fixed.msi.is_some() || fixed.msix.is_some();
            Occupancy {
                bdf: function.bdf(),
                irq: fixed.gsi.into(),
                uses_line: driver.is_some() && !messages,
                driver,
                resources: fixed.identity.resources,
            }
        };
        Ok(self.all().iter().map(look).collect())
    }

    fn open(&self, bdf: Bdf) -> Result<Config, HostError> {
        let function = self.known(bdf)?;
        function.wait_for_reach()?;
        Ok(Arc::new(OpenConfig {
            function,
            machine: self.machine.clone(),
        }))
    }

    fn unbind(&self, bdf: Bdf) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        // As most drivers of physical functions do on their way out.
        if !lock(&function.faults).leaves_functions {
            self.take_virtual_functions(&function);
        }
        let mut kernel = lock(&function.kernel);
        if kernel.driver.take().is_some() {
            function.lower_enable_count(&mut kernel);
        }
        Ok(())
    }

    fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        lock(&function.kernel).driver_override = driver.map(str::to_owned);
        Ok(())
    }

    fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        Ok(lock(&self.known(bdf)?.kernel).driver_override.clone())
    }

    fn bind(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        let native = function.fixed.native_driver.as_deref();
        // Asked before the kernel's lock is taken: Xen takes its own, and reads the device under
        // it.
        let usable = self.is_usable(&function);
        let is_guests = |other: &Arc<Function>| {
            let kernel = lock(&other.kernel);
            kernel.driver.is_none() && kernel.enabled > 0
        };
        let is_held = self.others_of_group(bdf).iter().any(is_guests);
        let mut kernel = lock(&function.kernel);
        let matching = native.filter(|native| {
            kernel
                .driver_override
                .as_deref()
                .is_none_or(|reserved| reserved == *native)
        });
        let found = match (driver, matching) {
            (None, None) => return Ok(()),
            (None, _) if kernel.driver.is_some() => return Ok(()),
            (Some(wanted), Some(native)) if wanted != native => None,
            (_, matching) => matching,
        };
        let action = || match driver {
            Some(driver) => format!("bind its driver {driver}"),
            None => "find a driver for it".to_owned(),
        };
        let found = found.ok_or_else(|| {
            refused(
                bdf,
                action(),
                "no such driver takes this device",
                libc::ENODEV,
            )
        })?;
        if kernel.driver.is_some() {
            return Err(refused(
                bdf,
                action(),
                "it has a driver already",
                libc::EBUSY,
            ));
        }
        if is_held {
            return Err(refused(
                bdf,
                action(),
                "another device of its IOMMU group is a guest's",
                libc::EBUSY,
            ));
        }
        if !usable {
            return Err(refused(
                bdf,
                action(),
                "the driver's probe failed: Xen gives the device to somebody else, or it is dead",
                libc::EIO,
            ));
        }
        function.probe(&mut kernel, found);
        Ok(())
    }

    fn enable(&self, bdf: Bdf, on: bool) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        if on {
            self.check_together(bdf, &[bdf])?;
        }
        let mut kernel = lock(&function.kernel);
        if kernel.driver.is_some() {
            return Err(refused(
                bdf,
                "switch it on or off",
                "a driver is bound to it: unbind it first",
                libc::EBUSY,
            ));
        }
        if on {
            function.raise_enable_count(&mut kernel);
        } else if !function.lower_enable_count(&mut kernel) {
            return Err(refused(bdf, "switch it off", "it was not on", libc::EIO));
        }
        Ok(())
    }

    fn may_lose_power(&self, bdf: Bdf) -> Result<bool, HostError> {
        Ok(!lock(&self.known(bdf)?.kernel).stays_powered)
    }

    fn set_may_lose_power(&self, bdf: Bdf, may: bool) -> Result<(), HostError> {
        lock(&self.known(bdf)?.kernel).stays_powered = !may;
        Ok(())
    }

    fn reset(&self, bdf: Bdf) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        let methods = function.reset_methods();
        let Some(method) = methods.first() else {
            return Err(refused(
                bdf,
                "reset it",
                "it has no way to be reset",
                libc::ENOTTY,
            ));
        };
        if function.reset_in_time(method) {
            Ok(())
        } else {
            Err(refused(
                bdf,
                "reset it",
                "it did not come back: power-cycle the machine",
                libc::ENOTTY,
            ))
        }
    }

    fn set_virtual_functions(&self, physical: Bdf, count: u16) -> Result<(), HostError> {
        self.change_virtual_functions(physical, count)
    }

    fn are_functions_probed(&self, physical: Bdf) -> Result<bool, HostError> {
        Ok(!lock(&self.known(physical)?.kernel).leaves_functions_alone)
    }

    fn set_functions_probed(&self, physical: Bdf, probed: bool) -> Result<(), HostError> {
        lock(&self.known(physical)?.kernel).leaves_functions_alone = !probed;
        Ok(())
    }

    fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<(), HostError> {
        let function = self.known(bdf)?;
        let has = |method: &&str| function.fixed.reset_methods.iter().any(|own| own == method);
        if !methods.iter().all(has) {
            return Err(refused(
                bdf,
                "choose how it is reset",
                "it has no such method",
                libc::EINVAL,
            ));
        }
        lock(&function.kernel).reset_methods = (!methods.is_empty())
            .then(|| methods.iter().map(|&method| method.to_owned()).collect());
        Ok(())
    }

    fn beside(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.known(bdf)?;
        // Bus 0 is the root bus, and every other one is behind a bridge of its own.
        let functions = lock(&self.functions);
        Ok(functions
            .keys()
            .copied()
            .filter(|other| *other != bdf && bdf.bus() != 0)
            .filter(|other| (other.segment(), other.bus()) == (bdf.segment(), bdf.bus()))
            .collect())
    }

    fn ports_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.known(bdf)?;
        Ok(if bdf.bus() == BRIDGE.bus() {
            Vec::new()
        } else {
            vec![port_above(bdf.bus())]
        })
    }

    fn error_reports(&self) -> Result<Box<dyn ErrorReports>, HostError> {
        self.watch_errors()
    }

    fn correctable_errors(&self, bdf: Bdf) -> Option<u64> {
        self.with(bdf, |function| lock(&function.faults).correctable_errors)
    }

    fn keep_virtual_functions(&self, physical: Bdf, keep: bool) -> Result<(), HostError> {
        lock(&self.known(physical)?.kernel).kept = keep;
        Ok(())
    }

    fn needed_by_dom0(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        Ok(self.known(bdf)?.fixed.needed_by_dom0.clone())
    }

    fn together(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        let others = self.others_of_group(bdf);
        let mut group: Vec<Bdf> = others.iter().map(|other| other.bdf()).collect();
        group.push(bdf);
        group.sort();
        Ok(group)
    }

    fn check_together(&self, bdf: Bdf, taken: &[Bdf]) -> Result<(), HostError> {
        let driven = |other: Arc<Function>| {
            let driver = lock(&other.kernel).driver.clone();
            driver.map(|driver| (other.bdf(), driver))
        };
        let others = self.others_of_group(bdf).into_iter();
        let others: Vec<_> = others
            .filter(|other| !taken.contains(&other.bdf()))
            .filter_map(driven)
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        let others = NotViable { number: 0, others };
        Err(HostError::NotViable { bdf, others })
    }

    fn check_return(&self, bdf: Bdf) -> Result<(), HostError> {
        self.known(bdf)?.wait_for_reach()
    }
}
