//! The bus as everybody uses it: sysfs's, but for what VFIO does otherwise.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use conf_space::Bdf;
use conf_space::registers::header;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xenbus::DomId;

use super::config::VfioConfig;
use super::errors::Errors;
use super::{DRIVER, VfioBus, binding, lock};
use crate::host::errors::ErrorReports;
use crate::host::group::Group;
use crate::host::reset::VFIO_BUS;
use crate::host::sharing::Occupancy;
use crate::host::{Backend, Bus, Config, Description, HostError};

impl VfioBus {
    fn has_pin(&self, bdf: Bdf) -> bool {
        let pin = &header::INTERRUPT_PIN;
        let config = self.sysfs.open(bdf);
        config.is_ok_and(|config| {
            config
                .read(pin.offset, pin.width)
                .is_ok_and(|pin| matches!(pin, 1..=4))
        })
    }

    /// The driver that is bound to it, ours included.
    fn driver(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        Ok(self.sysfs.describe(bdf)?.driver)
    }
}

impl Bus for VfioBus {
    fn backend(&self) -> Backend {
        Backend::Vfio
    }

    fn list(&self) -> Result<Vec<Bdf>, HostError> {
        self.sysfs.list()
    }

    fn changes(&self) -> io::Result<OwnedFd> {
        let kernels = self.sysfs.changes()?;
        let shared = Arc::clone(&self.shared);
        let ours = shared.changed.as_fd().try_clone_to_owned()?;
        // Both as one descriptor, which is what the caller waits for.
        thread::Builder::new()
            .name("changes of devices".into())
            .spawn(move || {
                let mut buffer = [0; 8192];
                loop {
                    let mut fds = [PollFd::new(kernels.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(error) => {
                            return log::error!("devices that go are not noticed: {error}");
                        }
                    }
                    while nix::unistd::read(&kernels, &mut buffer).is_ok() {}
                    let _ = shared.changed.write(1);
                }
            })?;
        Ok(ours)
    }

    fn describe(&self, bdf: Bdf) -> Result<Description, HostError> {
        let mut description = self.sysfs.describe(bdf)?;
        if !binding::is_ours(&self.sysfs, bdf, description.driver.as_deref()) {
            return Ok(description);
        }
        // To everybody else it has none, as with sysfs.
        description.driver = None;
        let line = if self.has_pin(bdf) { self.line(bdf) } else { 0 };
        description.irq = u32::from(line);
        description.identity.interrupt_line = line;
        let offered = &mut description.reset_methods;
        if !offered.iter().any(|method| method == "bus") && self.can_reset_bus(bdf) {
            offered.push(VFIO_BUS.to_owned());
        }
        Ok(description)
    }

    fn survey(&self) -> Result<Vec<Occupancy>, HostError> {
        let mut found = self.sysfs.survey()?;
        for occupancy in &mut found {
            // The kernel tells devices on one line apart, or refuses to give us the line.
            occupancy.irq = lock(&self.lines)
                .get(&occupancy.bdf)
                .copied()
                .map_or(0, u32::from);
            occupancy.driver.take_if(|driver| driver == DRIVER);
            occupancy.uses_line &= occupancy.driver.is_some();
        }
        Ok(found)
    }

    fn open(&self, bdf: Bdf) -> Result<Config, HostError> {
        let driver = self.driver(bdf)?;
        if binding::is_ours(&self.sysfs, bdf, driver.as_deref()) {
            Ok(Arc::new(VfioConfig(self.opened(bdf)?)))
        } else {
            // A physical function that dom0 has, above a virtual one.
            self.sysfs.open(bdf)
        }
    }

    fn unbind(&self, bdf: Bdf) -> Result<(), HostError> {
        if self.driver(bdf)?.as_deref() == Some(DRIVER) {
            self.let_go(bdf)
        } else {
            self.sysfs.unbind(bdf)
        }
    }

    fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        binding::reserve(&self.sysfs, bdf, driver)
    }

    fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        binding::reserved_for(&self.sysfs, bdf)
    }

    fn bind(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        self.sysfs.bind(bdf, driver)
    }

    fn enable(&self, bdf: Bdf, on: bool) -> Result<(), HostError> {
        let bound = self.driver(bdf)?.as_deref() == Some(DRIVER);
        match (on, bound) {
            (true, false) => binding::bind(&self.sysfs, bdf),
            (false, true) => {
                lock(&self.by_bus).remove(&bdf);
                self.let_go(bdf)
            }
            _ => Ok(()),
        }
    }

    fn may_lose_power(&self, bdf: Bdf) -> Result<bool, HostError> {
        self.sysfs.may_lose_power(bdf)
    }

    fn set_may_lose_power(&self, bdf: Bdf, may: bool) -> Result<(), HostError> {
        self.sysfs.set_may_lose_power(bdf, may)
    }

    fn reset(&self, bdf: Bdf) -> Result<(), HostError> {
        self.reset_device(bdf)
    }

    fn set_virtual_functions(&self, physical: Bdf, count: u16) -> Result<(), HostError> {
        self.sysfs.set_virtual_functions(physical, count)
    }

    fn are_functions_probed(&self, physical: Bdf) -> Result<bool, HostError> {
        self.sysfs.are_functions_probed(physical)
    }

    fn set_functions_probed(&self, physical: Bdf, probed: bool) -> Result<(), HostError> {
        self.sysfs.set_functions_probed(physical, probed)
    }

    fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<(), HostError> {
        if methods == [VFIO_BUS] {
            lock(&self.by_bus).insert(bdf);
            return Ok(());
        }
        lock(&self.by_bus).remove(&bdf);
        // The kernel takes all of a list or none.
        let mut kernels = methods.to_vec();
        kernels.retain(|method| *method != VFIO_BUS);
        self.sysfs.set_reset_methods(bdf, &kernels)
    }

    fn beside(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.sysfs.beside(bdf)
    }

    fn ports_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        self.sysfs.ports_above(bdf)
    }

    fn error_reports(&self) -> Result<Box<dyn ErrorReports>, HostError> {
        let traced = self.sysfs.error_reports()?;
        let errors = Errors::new(Arc::clone(&self.shared), self.sysfs.clone(), traced);
        Ok(Box::new(
            errors.map_err(|source| HostError::NoErrors { source })?,
        ))
    }

    fn correctable_errors(&self, bdf: Bdf) -> Option<u64> {
        self.sysfs.correctable_errors(bdf)
    }

    fn keep_virtual_functions(&self, physical: Bdf, keep: bool) -> Result<(), HostError> {
        self.sysfs.keep_virtual_functions(physical, keep)
    }

    fn needed_by_dom0(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        self.sysfs.needed_by_dom0(bdf)
    }

    fn group(&self, bdf: Bdf) -> Option<Group> {
        self.sysfs.group(bdf)
    }

    fn together(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        let group = self.group(bdf).ok_or(HostError::NoIommu { bdf })?;
        Ok(group.endpoints().collect())
    }

    fn check_together(&self, bdf: Bdf, taken: &[Bdf]) -> Result<(), HostError> {
        let group = self.group(bdf).ok_or(HostError::NoIommu { bdf })?;
        group
            .check(taken)
            .map_err(|others| HostError::NotViable { bdf, others })?;
        self.check_unused(bdf, &group)
    }

    fn check_return(&self, bdf: Bdf) -> Result<(), HostError> {
        self.check_let_go(bdf)
    }

    fn give_line(&self, bdf: Bdf, domain: DomId) -> io::Result<()> {
        self.slot(bdf).ok_or(Errno::ENODEV)?.give_line(domain)
    }

    fn forget(&self, bdf: Bdf) {
        // First the guest's memory, which can be unmapped as long as the group is there.
        self.machine
            .device_removed(crate::host::devices::for_xen(bdf));
        self.close_removed(bdf);
        lock(&self.by_bus).remove(&bdf);
        lock(&self.lines).remove(&bdf);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use xenbus::sim::Machine;

    use super::*;
    use crate::host::sysfs::Sysfs;

    const BDF: Bdf = Bdf::from_devfn(0, 3, 0);

    struct Setup {
        bus: Arc<VfioBus>,
        directory: tempfile::TempDir,
    }

    impl Setup {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let machine = Machine::new(directory.path().join("run")).unwrap();
            let bus = VfioBus::new(Sysfs::to_look_at(directory.path()), &machine).unwrap();
            let setup = Self { bus, directory };
            fs::create_dir_all(setup.device()).unwrap();
            setup
        }

        fn device(&self) -> PathBuf {
            let devices = self.directory.path().join("bus/pci/devices");
            devices.join(BDF.to_string())
        }

        /// What the kernel is told.
        fn told(&self, methods: &[&str]) -> String {
            let file = self.device().join("reset_method");
            fs::write(&file, "").unwrap();
            self.bus.set_reset_methods(BDF, methods).unwrap();
            fs::read_to_string(file).unwrap()
        }

        fn is_by_bus(&self) -> bool {
            lock(&self.bus.by_bus).contains(&BDF)
        }
    }

    #[test]
    fn the_kernel_is_told_of_its_own_reset_methods_only() {
        let setup = Setup::new();
        for (methods, told) in [
            (&["flr"][..], "flr"),
            (&[VFIO_BUS], ""),
            (&["flr", "pm", VFIO_BUS], "flr pm"),
            (&[], "default"),
        ] {
            assert_eq!(setup.told(methods), told, "{methods:?}");
            assert_eq!(setup.is_by_bus(), methods == [VFIO_BUS]);
        }
    }

    #[test]
    fn nothing_that_was_chosen_for_a_device_that_was_pulled_out_holds_for_the_next_one() {
        let setup = Setup::new();
        setup.bus.set_reset_methods(BDF, &[VFIO_BUS]).unwrap();
        fs::remove_dir(setup.device()).unwrap();
        // The reset is over.
        let gone = setup.bus.set_reset_methods(BDF, &["flr", VFIO_BUS]);
        assert!(matches!(gone, Err(HostError::NoDevice { .. })), "{gone:?}");
        assert!(!setup.is_by_bus());
        setup.bus.set_reset_methods(BDF, &[VFIO_BUS]).unwrap();
        let line = setup.bus.line(BDF);
        setup.bus.forget(BDF);
        assert!(!setup.is_by_bus());
        let other = Bdf::from_devfn(0, 4, 0);
        assert_eq!(setup.bus.line(other), line);
    }
}
