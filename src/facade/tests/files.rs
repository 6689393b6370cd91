//! The other drivers' directories: as if there were no facade.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use super::*;

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Errno {
    Errno::from_raw(result.unwrap_err().raw_os_error().unwrap())
}

#[test]
fn a_driver_has_the_same_path_with_and_without_the_facade() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let driver = machine.path("bus/pci/devices/0000:00:05.0/driver");
    let without = fs::canonicalize(&driver).unwrap();
    let (_memory, served) = machine.facade();
    assert!(is_mounted(&machine.drivers()));
    assert_eq!(fs::canonicalize(&driver).unwrap(), without);
    assert_eq!(
        without,
        fs::canonicalize(machine.drivers()).unwrap().join("e1000e")
    );
    fs::write(without.join("unbind"), "0000:00:05.0").unwrap();
    drop(served);
    assert!(!is_mounted(&machine.drivers()));
    assert_eq!(
        fs::read_to_string(without.join("unbind")).unwrap(),
        "0000:00:05.0"
    );
}

#[test]
fn names_links_and_attributes_are_the_real_ones() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let real = [
        fs::metadata(machine.drivers().join("e1000e/unbind")).unwrap(),
        fs::metadata(machine.drivers().join("e1000e")).unwrap(),
    ];
    let (_memory, _served) = machine.facade();
    let seen = [
        fs::metadata(machine.drivers().join("e1000e/unbind")).unwrap(),
        fs::metadata(machine.drivers().join("e1000e")).unwrap(),
    ];
    for (real, seen) in real.iter().zip(&seen) {
        assert_eq!(
            (real.mode(), real.uid(), real.len(), real.nlink()),
            (seen.mode(), seen.uid(), seen.len(), seen.nlink())
        );
        assert_eq!(real.modified().unwrap(), seen.modified().unwrap());
    }
    let mut names: Vec<_> = fs::read_dir(machine.drivers())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["e1000e", "igb", "pciback"]);
    let link = machine.drivers().join("e1000e/0000:00:05.0");
    assert_eq!(
        fs::read_link(&link).unwrap(),
        Path::new("../../../../devices/pci0000:00/0000:00:05.0")
    );
    assert_eq!(
        fs::canonicalize(&link).unwrap(),
        fs::canonicalize(machine.path("devices/pci0000:00/0000:00:05.0")).unwrap()
    );
}

#[test]
fn a_driver_that_comes_or_goes_is_seen_at_once() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, served) = machine.facade();
    let real = served.real.behind();
    assert!(!machine.drivers().join("nvme").exists());
    for _ in 0..3 {
        fs::create_dir(real.join("nvme")).unwrap();
        fs::write(real.join("nvme/module"), "first").unwrap();
        assert_eq!(
            fs::read_to_string(machine.drivers().join("nvme/module")).unwrap(),
            "first"
        );
        fs::remove_dir_all(real.join("nvme")).unwrap();
        assert_eq!(
            fs::metadata(machine.drivers().join("nvme"))
                .unwrap_err()
                .kind(),
            ErrorKind::NotFound
        );
    }
    symlink("elsewhere", real.join("nvme")).unwrap();
    assert!(
        fs::symlink_metadata(machine.drivers().join("nvme"))
            .unwrap()
            .is_symlink()
    );
}

#[test]
fn a_driver_of_the_same_name_is_hidden() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    machine.add_driver("pciback");
    fs::write(machine.drivers().join("pciback/theirs"), "").unwrap();
    let (_memory, _served) = machine.facade();
    assert_eq!(
        fs::read_dir(machine.drivers())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name() == "pciback")
            .count(),
        1
    );
    assert!(!machine.pciback("theirs").exists());
    assert!(machine.pciback("slots").exists());
}

#[test]
fn reading_and_writing_go_through_byte_for_byte() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let path = machine.drivers().join("e1000e/large");
    let text: Vec<u8> = (0..20_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(&path, &text).unwrap();
    let (_memory, _served) = machine.facade();
    assert_eq!(fs::read(&path).unwrap(), text);
    let mut file = File::options().read(true).write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(70_000)).unwrap();
    file.write_all(b"here").unwrap();
    file.seek(SeekFrom::Start(69_998)).unwrap();
    let mut part = [0; 8];
    file.read_exact(&mut part).unwrap();
    assert_eq!(&part[2..6], b"here");
    assert_eq!(
        (part[..2].to_vec(), part[6..].to_vec()),
        (text[69_998..70_000].to_vec(), text[70_004..70_006].to_vec())
    );
}

#[test]
fn a_device_that_guests_depend_on_keeps_its_driver() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (memory, _served) = machine.facade();
    let device: Bdf = "0000:00:05.0".parse().unwrap();
    memory.lists.lock().unwrap().kept.insert(device);
    let unbind = machine.path("bus/pci/drivers/e1000e/unbind");
    let write = |text: &str| {
        let file = fs::File::options().write(true).open(&unbind).unwrap();
        (&file).write_all(text.as_bytes())
    };
    for text in ["0000:00:05.0", "0000:00:05.0\n"] {
        assert_eq!(errno(write(text)), Errno::EBUSY);
    }
    write("0000:00:06.0").unwrap();
    write("anything").unwrap();
    memory.lists.lock().unwrap().kept.clear();
    write("0000:00:05.0").unwrap();
}

#[test]
fn nothing_is_made_or_removed() {
    if !fuse_is_there() {
        return;
    }
    let machine = Machine::new();
    let (_memory, _served) = machine.facade();
    let (drivers, new) = (machine.drivers(), machine.drivers().join("e1000e/new"));
    assert_eq!(errno(fs::write(&new, "")), Errno::EACCES);
    assert_eq!(errno(fs::write(machine.pciback("new"), "")), Errno::EACCES);
    assert_eq!(errno(fs::create_dir(&new)), Errno::EPERM);
    assert_eq!(errno(symlink("a", &new)), Errno::EPERM);
    assert_eq!(
        errno(fs::hard_link(drivers.join("e1000e/bind"), &new)),
        Errno::EPERM
    );
    assert_eq!(
        errno(fs::rename(drivers.join("e1000e"), drivers.join("igb2"))),
        Errno::EPERM
    );
    assert_eq!(
        errno(fs::remove_file(drivers.join("e1000e/bind"))),
        Errno::EPERM
    );
    assert_eq!(errno(fs::remove_dir(machine.pciback(""))), Errno::EPERM);
}

#[test]
fn the_real_sysfs_answers_the_same_through_the_facade() {
    if !fuse_is_there() {
        return;
    }
    let drivers = Path::new(DRIVERS);
    let Some(driver) = fs::read_dir(drivers)
        .ok()
        .and_then(|mut drivers| drivers.next())
    else {
        eprintln!("SKIPPED: no PCI drivers in this machine's sysfs");
        return;
    };
    let driver = driver.unwrap().path();
    // a device that does not exist, a text that is none, a file that cannot be read, one that does not exist, one that cannot be made
    let answers = || {
        [
            errno(
                File::options()
                    .write(true)
                    .open(driver.join("unbind"))
                    .unwrap()
                    .write(b"ffff:ff:1f.7"),
            ),
            errno(
                File::options()
                    .write(true)
                    .open(driver.join("new_id"))
                    .unwrap()
                    .write(b"nonsense"),
            ),
            errno(File::open(driver.join("bind"))),
            errno(File::open(driver.join("none"))),
            errno(fs::write(driver.join("none"), "")),
            errno(fs::create_dir(driver.join("none"))),
            errno(fs::read_dir(driver.join("bind"))),
        ]
    };
    let list = || {
        let mut names: Vec<_> = fs::read_dir(&driver)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let without = (answers(), list(), fs::canonicalize(&driver).unwrap());
    let memory = Arc::new(Memory::default());
    let real = RealDrivers::open().unwrap();
    let name = MountName::new();
    let fuse = mount::attach(real.path(), name).unwrap();
    let _served = Served {
        server: serve(fuse, memory, real.clone()).unwrap(),
        real,
        name,
    };
    assert!(is_mounted(drivers));
    assert_eq!(
        (answers(), list(), fs::canonicalize(&driver).unwrap()),
        without
    );
    assert_eq!(without.0[0], Errno::ENODEV);
    assert_eq!(
        fs::read_to_string(drivers.join("pciback/slots")).unwrap(),
        ""
    );
}
