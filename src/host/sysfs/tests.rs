//! The bus in a tree of files that a test made.

use std::os::unix::fs::symlink;

use super::*;

#[test]
fn a_device_that_is_not_there_is_said_not_to_be_there() {
    let directory = tempfile::tempdir().unwrap();
    let drivers = directory.path().join("bus/pci/drivers");
    fs::create_dir_all(&drivers).unwrap();
    fs::create_dir_all(directory.path().join("bus/pci/devices")).unwrap();
    let bus = Sysfs::new(directory.path(), RealDrivers::open_at(&drivers).unwrap());
    let bdf = Bdf::from_devfn(0, 2, 0x80);
    let error = bus.describe(bdf).unwrap_err();
    assert!(matches!(error, HostError::NoDevice { .. }), "{error}");
}

#[test]
fn l17_devices_on_segments_that_xen_does_not_know_are_not_listed() {
    let tree = Tree::new();
    let known = tree.bus().list().unwrap();
    // As Linux names what is behind VMD.
    let directory = tree.path("devices/pci0000:00/10000:e1:00.0");
    fs::create_dir_all(&directory).unwrap();
    symlink(&directory, tree.path("bus/pci/devices/10000:e1:00.0")).unwrap();
    assert_eq!(tree.bus().list().unwrap().len(), known.len());
    let error = "10000:e1:00.0".parse::<Bdf>().unwrap_err();
    assert!(error.to_string().contains("VMD"), "{error}");
}

/// A card of two functions behind a bridge, and a device on the root bus.
struct Tree(tempfile::TempDir);

const ROOT_DEVICE: Bdf = Bdf::from_devfn(0, 0, 5 << 3);
const BRIDGE: Bdf = Bdf::from_devfn(0, 0, 9 << 3);
const CARD: [Bdf; 2] = [Bdf::from_devfn(0, 1, 0), Bdf::from_devfn(0, 1, 1)];

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(tree.path("bus/pci/devices")).unwrap();
        fs::create_dir_all(tree.path("bus/pci/drivers/e1000e")).unwrap();
        let bridge = format!("devices/pci0000:00/{BRIDGE}");
        tree.add("devices/pci0000:00", ROOT_DEVICE);
        tree.add("devices/pci0000:00", BRIDGE);
        for function in CARD {
            tree.add(&bridge, function);
        }
        tree
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    fn add(&self, parent: &str, bdf: Bdf) {
        let directory = self.path(&format!("{parent}/{bdf}"));
        fs::create_dir_all(&directory).unwrap();
        let start = 0xfeb0_0000 + (u64::from(bdf.bus()) << 12) + (u64::from(bdf.function()) << 8);
        let end = start + 0xff;
        let resource = format!("{start:#018x} {end:#018x} 0x0000000000040200\n");
        fs::write(directory.join("resource"), resource).unwrap();
        fs::write(directory.join("irq"), "19\n").unwrap();
        fs::write(directory.join("reset_method"), "flr pm\n").unwrap();
        symlink(directory, self.device(bdf)).unwrap();
    }

    fn device(&self, bdf: Bdf) -> PathBuf {
        self.path("bus/pci/devices").join(bdf.to_string())
    }

    fn bind(&self, bdf: Bdf) {
        let driver = self.path("bus/pci/drivers/e1000e");
        symlink(driver, self.device(bdf).join("driver")).unwrap();
    }

    fn bus(&self) -> Sysfs {
        Sysfs::to_look_at(self.0.path())
    }
}

#[test]
fn beside_a_device_are_the_others_behind_its_bridge() {
    let tree = Tree::new();
    let bus = tree.bus();
    assert_eq!(bus.beside(CARD[0]).unwrap(), [CARD[1]]);
    assert_eq!(bus.beside(CARD[1]).unwrap(), [CARD[0]]);
    assert_eq!(bus.beside(ROOT_DEVICE).unwrap(), []);
    assert!(matches!(
        bus.beside(Bdf::from_devfn(0, 7, 0)),
        Err(HostError::NoDevice { .. })
    ));
}

#[test]
fn chosen_reset_methods_are_written_as_the_kernel_wants_them_and_none_is_its_default() {
    let tree = Tree::new();
    let bus = tree.bus();
    let chosen = || fs::read_to_string(tree.device(CARD[0]).join("reset_method")).unwrap();
    bus.set_reset_methods(CARD[0], &["pm"]).unwrap();
    assert!(chosen().starts_with("pm"));
    bus.set_reset_methods(CARD[0], &["flr", "pm"]).unwrap();
    assert_eq!(chosen(), "flr pm\n");
    bus.set_reset_methods(CARD[0], &[]).unwrap();
    assert_eq!(chosen(), "default");
    // Before Linux 5.15.
    fs::remove_file(tree.device(CARD[0]).join("reset_method")).unwrap();
    let error = bus.set_reset_methods(CARD[0], &["pm"]).unwrap_err();
    assert!(error.to_string().contains("Linux 5.15"), "{error}");
}

#[test]
fn a_device_may_lose_its_power_if_the_kernel_knows_such_a_thing_and_nobody_forbids_it() {
    let tree = Tree::new();
    let bus = tree.bus();
    assert!(!bus.may_lose_power(CARD[0]).unwrap());
    let file = tree.device(CARD[0]).join("d3cold_allowed");
    fs::write(&file, "1\n").unwrap();
    assert!(bus.may_lose_power(CARD[0]).unwrap());
    bus.set_may_lose_power(CARD[0], false).unwrap();
    assert!(!bus.may_lose_power(CARD[0]).unwrap());
    let nowhere = bus.set_may_lose_power(Bdf::from_devfn(0, 7, 0), false);
    assert!(matches!(nowhere, Err(HostError::NoDevice { .. })));
}

#[test]
fn a_driver_uses_the_line_unless_it_has_messages() {
    let tree = Tree::new();
    tree.bind(CARD[0]);
    tree.bind(ROOT_DEVICE);
    let messages = tree.device(ROOT_DEVICE).join("msi_irqs");
    fs::create_dir(&messages).unwrap();
    fs::write(messages.join("24"), "msix\n").unwrap();
    let survey = tree.bus().survey().unwrap();
    let found: Vec<_> = survey
        .iter()
        .map(|found| (found.bdf, found.irq, found.uses_line))
        .collect();
    assert_eq!(
        found,
        [
            (ROOT_DEVICE, 19, false),
            (BRIDGE, 19, false),
            (CARD[0], 19, true),
            (CARD[1], 19, false)
        ]
    );
    assert_eq!(survey[2].driver.as_deref(), Some("e1000e"));
    assert_eq!(survey[3].resources[0].start, 0xfeb0_1100);
}

#[test]
fn who_only_looks_binds_no_driver() {
    let tree = Tree::new();
    tree.bind(CARD[0]);
    let bus = tree.bus();
    assert!(bus.unbind(CARD[0]).is_err());
    assert!(bus.bind(CARD[0], Some("e1000e")).is_err());
}
