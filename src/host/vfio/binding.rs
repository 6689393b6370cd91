//! Binding devices to vfio-pci, and taking them from it.
//!
//! A device stays reserved for `pciback` while vfio-pci has it, so that no driver takes it between two steps, and that whoever comes later
//! knows whose it is.

use std::io;

use conf_space::Bdf;

use super::{DRIVER, refused};
use crate::host::devices::RESERVED_FOR;
use crate::host::sysfs::Sysfs;
use crate::host::{Bus, HostError};

const LOAD: &str = "load VFIO's driver first: modprobe vfio-pci";

/// Whether kernels let a driver be chosen for one device (since Linux 3.16).
fn has_override(sysfs: &Sysfs, bdf: Bdf) -> bool {
    sysfs.device(bdf).join("driver_override").exists()
}

/// Reserves the device, or takes that back. A kernel that cannot reserve one does nothing.
pub(super) fn reserve(sysfs: &Sysfs, bdf: Bdf, name: Option<&str>) -> Result<(), HostError> {
    if has_override(sysfs, bdf) {
        sysfs.set_driver_override(bdf, name)
    } else {
        Ok(())
    }
}

/// The name that it is reserved for.
pub(super) fn reserved_for(sysfs: &Sysfs, bdf: Bdf) -> Result<Option<String>, HostError> {
    if has_override(sysfs, bdf) {
        sysfs.driver_override(bdf)
    } else {
        Ok(None)
    }
}

/// Whether vfio-pci has it for us.
pub(super) fn is_ours(sysfs: &Sysfs, bdf: Bdf, driver: Option<&str>) -> bool {
    driver == Some(DRIVER)
        && (!has_override(sysfs, bdf)
            || reserved_for(sysfs, bdf).is_ok_and(|name| name.as_deref() == Some(RESERVED_FOR)))
}

/// Binds a device without a driver to vfio-pci.
///
/// # Errors
/// The kernel's; it has no driver then, and is reserved as before.
pub(super) fn bind(sysfs: &Sysfs, bdf: Bdf) -> Result<(), HostError> {
    if !sysfs.has_driver(DRIVER) {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        return Err(refused(bdf, "bind it to vfio-pci", LOAD)(missing));
    }
    if has_override(sysfs, bdf) {
        sysfs.set_driver_override(bdf, Some(DRIVER))?;
        let bound = tell(sysfs, bdf, "bind");
        // Also when it failed.
        let reserved = sysfs.set_driver_override(bdf, Some(RESERVED_FOR));
        return bound.and(reserved);
    }
    // It is told to take all devices of this kind; those that have a driver keep it.
    let description = sysfs.describe(bdf)?;
    let kind = format!(
        "{:04x} {:04x}",
        description.identity.vendor, description.identity.device
    );
    let told = sysfs.tell_driver(DRIVER, "new_id", &kind);
    if let Err(error) = told
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(refused(bdf, "have vfio-pci know its kind (new_id)", LOAD)(
            error,
        ));
    }
    let bound = match sysfs.describe(bdf)?.driver.as_deref() {
        Some(DRIVER) => Ok(()),
        _ => tell(sysfs, bdf, "bind"),
    };
    if let Err(error) = sysfs.tell_driver(DRIVER, "remove_id", &kind) {
        log::warn!("vfio-pci goes on taking devices of the kind {kind}: {error}");
    }
    bound
}

/// Takes a device from vfio-pci. The kernel waits for whoever has it open.
///
/// # Errors
/// The kernel's.
pub(super) fn unbind(sysfs: &Sysfs, bdf: Bdf) -> Result<(), HostError> {
    tell(sysfs, bdf, "unbind")
}

fn tell(sysfs: &Sysfs, bdf: Bdf, attribute: &'static str) -> Result<(), HostError> {
    const REMEDY: &str = "see the kernel's log (dmesg); a bridge and a device that another driver has are not for vfio-pci";
    sysfs
        .tell_driver(DRIVER, attribute, &bdf.to_string())
        .map_err(refused(bdf, format!("{attribute} it (vfio-pci)"), REMEDY))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::facade::RealDrivers;

    /// sysfs with a device and vfio-pci, whose attributes keep what is written to them.
    struct Tree(tempfile::TempDir);

    const BDF: Bdf = Bdf::from_devfn(0, 3, 0);

    impl Tree {
        fn new(files: &[&str]) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            let device = tree.path(&format!("bus/pci/devices/{BDF}"));
            fs::create_dir_all(&device).unwrap();
            for (name, text) in [
                ("vendor", "0x8086"),
                ("device", "0x10d3"),
                ("subsystem_vendor", "0x8086"),
                ("subsystem_device", "0"),
                ("class", "0x020000"),
                ("irq", "16"),
                ("config", ""),
                ("resource", &"0x0 0x0 0x0\n".repeat(7)),
            ] {
                fs::write(device.join(name), text).unwrap();
            }
            fs::create_dir_all(tree.path("bus/pci/drivers")).unwrap();
            for file in files {
                let path = tree.path(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
            tree
        }

        fn path(&self, below: &str) -> std::path::PathBuf {
            Path::new(self.0.path()).join(below)
        }

        fn sysfs(&self) -> Sysfs {
            let drivers = RealDrivers::open_at(&self.path("bus/pci/drivers")).unwrap();
            Sysfs::new(self.0.path(), drivers)
        }

        fn read(&self, file: &str) -> String {
            fs::read_to_string(self.path(file)).unwrap()
        }
    }

    const OVERRIDE: &str = "bus/pci/devices/0000:03:00.0/driver_override";
    const BIND: &str = "bus/pci/drivers/vfio-pci/bind";

    #[test]
    fn a_device_is_bound_by_its_override_and_stays_reserved_for_us() {
        let tree = Tree::new(&[OVERRIDE, BIND]);
        bind(&tree.sysfs(), BDF).unwrap();
        assert_eq!(tree.read(BIND), "0000:03:00.0");
        assert!(tree.read(OVERRIDE).starts_with(RESERVED_FOR));
    }

    #[test]
    fn a_device_that_somebody_else_has_bound_to_vfio_pci_is_not_ours() {
        let tree = Tree::new(&[OVERRIDE, BIND]);
        let ours = |reserved: &str, driver| {
            fs::write(tree.path(OVERRIDE), reserved).unwrap();
            is_ours(&tree.sysfs(), BDF, Some(driver))
        };
        assert!(ours("pciback\n", DRIVER));
        assert!(!ours("vfio-pci\n", DRIVER));
        assert!(!ours("pciback\n", "e1000e"));
    }

    #[test]
    fn an_older_kernel_is_told_the_kind_of_the_device_and_to_forget_it_again() {
        let (new, remove) = (
            "bus/pci/drivers/vfio-pci/new_id",
            "bus/pci/drivers/vfio-pci/remove_id",
        );
        let tree = Tree::new(&[BIND, new, remove]);
        reserve(&tree.sysfs(), BDF, Some(RESERVED_FOR)).unwrap();
        bind(&tree.sysfs(), BDF).unwrap();
        assert_eq!(tree.read(new), "8086 10d3");
        assert_eq!(tree.read(BIND), "0000:03:00.0");
        assert_eq!(tree.read(remove), "8086 10d3");
        assert_eq!(reserved_for(&tree.sysfs(), BDF).unwrap(), None);
    }

    #[test]
    fn without_the_driver_the_remedy_is_told_and_the_device_stays_as_it_was() {
        let tree = Tree::new(&[OVERRIDE]);
        let error = bind(&tree.sysfs(), BDF).unwrap_err();
        assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
        assert_eq!(tree.read(OVERRIDE), "");
    }
}
