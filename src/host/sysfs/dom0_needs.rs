//! What dom0 lives on: the disks it has mounted, and its only network card.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Stacked block devices (partition on RAID on encryption on LVM ...) are followed this deep.
const MAX_DEPTH: usize = 8;

/// Why dom0 needs the device whose sysfs directory is `device`; `None`: it does not.
///
/// `sys` is where sysfs is, `root` the directory that `proc` and `dev` are in.
pub(super) fn reason(sys: &Path, root: &Path, device: &Path) -> Option<String> {
    let device = fs::canonicalize(device).ok()?;
    holds_a_disk(sys, root, &device).or_else(|| is_the_only_network(sys, &device))
}

fn holds_a_disk(sys: &Path, root: &Path, device: &Path) -> Option<String> {
    mounts(root).into_iter().find_map(|(number, use_)| {
        let block = fs::canonicalize(sys.join("dev/block").join(number)).ok()?;
        with_its_peers(sys, block)
            .iter()
            .any(|block| stands_on(block, device, MAX_DEPTH))
            .then(|| format!("dom0 has a disk of it in use ({use_})"))
    })
}

/// Block devices in use: their `major:minor`, and what for.
fn mounts(root: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // Format: proc(5), /proc/PID/mountinfo.
    for line in fs::read_to_string(root.join("proc/self/mountinfo"))
        .unwrap_or_default()
        .lines()
    {
        let mut words = line.split_whitespace();
        let (Some(number), Some(point)) = (words.nth(2), words.nth(1)) else {
            continue;
        };
        let use_ = format!("mounted at {point}");
        if !number.starts_with("0:") {
            found.push((number.to_owned(), use_));
        } else if let Some(number) = words
            .skip_while(|word| *word != "-")
            .nth(2)
            .and_then(|source| number_of(root, source))
        {
            // File systems with several disks (btrfs) have no block device number of their own, but name one as their source.
            found.push((number, use_));
        }
    }
    for line in fs::read_to_string(root.join("proc/swaps"))
        .unwrap_or_default()
        .lines()
        .skip(1)
    {
        if let Some(number) = line
            .split_whitespace()
            .next()
            .and_then(|path| number_of(root, path))
        {
            found.push((number, "swap".to_owned()));
        }
    }
    found
}

fn number_of(root: &Path, path: &str) -> Option<String> {
    let metadata = fs::metadata(root.join(path.strip_prefix('/')?)).ok()?;
    let number = metadata.rdev();
    (number != 0).then(|| {
        format!(
            "{}:{}",
            nix::sys::stat::major(number),
            nix::sys::stat::minor(number)
        )
    })
}

/// A block device, and the others of the btrfs that it is one of.
fn with_its_peers(sys: &Path, block: PathBuf) -> Vec<PathBuf> {
    let members = |system: PathBuf| -> Vec<PathBuf> {
        let devices = directories(&system.join("devices")).into_iter();
        devices
            .filter_map(|device| fs::canonicalize(device).ok())
            .collect()
    };
    let mut systems = directories(&sys.join("fs/btrfs")).into_iter().map(members);
    systems
        .find(|members| members.contains(&block))
        .unwrap_or_else(|| vec![block])
}

/// The devices that a block device is made of, as links: of one that is stacked, and of an NVMe namespace with several ways to it, whose
/// directory is in that of its subsystem, beside links to the controllers.
fn beneath(block: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // A partition's parent is the disk, which holds the links.
    for directory in block.ancestors().take(2) {
        found.extend(directories(&directory.join("slaves")));
    }
    let name_begins = |path: &Path, with: &str| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(with))
    };
    let mut above = block.ancestors().take(3);
    if let Some(subsystem) = above.find(|directory| name_begins(directory, "nvme-subsys")) {
        let mut entries = directories(subsystem);
        entries.retain(|entry| entry.is_symlink() && name_begins(entry, "nvme"));
        found.extend(entries);
    }
    found
}

/// Whether `block` (a directory below `/sys/devices`) is on `device`, directly or through the devices it is made of.
fn stands_on(block: &Path, device: &Path, depth: usize) -> bool {
    if block.starts_with(device) {
        return true;
    }
    let Some(depth) = depth.checked_sub(1) else {
        return false;
    };
    beneath(block)
        .into_iter()
        .any(|below| fs::canonicalize(below).is_ok_and(|below| stands_on(&below, device, depth)))
}

fn is_the_only_network(sys: &Path, device: &Path) -> Option<String> {
    let (mut ours, mut others) = (None, false);
    for interface in directories(&sys.join("class/net")) {
        // Only hardware has a `device`; bridges, loopback and guests' interfaces do not count.
        let Ok(hardware) = fs::canonicalize(interface.join("device")) else {
            continue;
        };
        if !is_up(&interface) {
            continue;
        }
        if hardware.starts_with(device) {
            ours = interface
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
        } else {
            others = true;
        }
    }
    ours.filter(|_| !others)
        .map(|name| format!("it is dom0's only network card ({name})"))
}

fn is_up(interface: &Path) -> bool {
    const IFF_UP: u32 = 1;
    let text = fs::read_to_string(interface.join("flags")).unwrap_or_default();
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16)
        .is_ok_and(|flags| flags & IFF_UP != 0)
}

fn directories(path: &Path) -> Vec<PathBuf> {
    fs::read_dir(path)
        .map(|entries| {
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with a disk controller at 02.0 that holds `/` through LVM, and network cards at 03.0 and 04.0.
    struct Machine {
        dir: tempfile::TempDir,
    }

    impl Machine {
        fn new(cards_up: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let at = |path: &str| dir.path().join(path);
            let make = |path: &str| fs::create_dir_all(at(path)).unwrap();
            make("sys/devices/pci/0000:00:02.0/ata1/block/sda/sda1");
            make("sys/devices/virtual/block/dm-0/slaves");
            make("sys/dev/block");
            make("proc/self");
            symlink(
                at("sys/devices/pci/0000:00:02.0/ata1/block/sda/sda1"),
                at("sys/devices/virtual/block/dm-0/slaves/sda1"),
            )
            .unwrap();
            symlink(
                at("sys/devices/virtual/block/dm-0"),
                at("sys/dev/block/253:0"),
            )
            .unwrap();
            fs::write(at("proc/self/mountinfo"), "22 1 0:20 / /proc rw - proc proc rw\n28 1 253:0 / / rw,relatime - ext4 /dev/mapper/root rw\n").unwrap();
            for card in ["0000:00:03.0", "0000:00:04.0"] {
                let name = format!("net{card}");
                make(&format!("sys/devices/pci/{card}/net/{name}"));
                make(&format!("sys/class/net/{name}"));
                symlink(
                    at(&format!("sys/devices/pci/{card}")),
                    at(&format!("sys/class/net/{name}/device")),
                )
                .unwrap();
                let flags = if cards_up.contains(&card) {
                    "0x1003"
                } else {
                    "0x1002"
                };
                fs::write(at(&format!("sys/class/net/{name}/flags")), flags).unwrap();
            }
            Self { dir }
        }

        fn reason(&self, bdf: &str) -> Option<String> {
            let root = self.dir.path();
            reason(
                &root.join("sys"),
                root,
                &root.join("sys/devices/pci").join(bdf),
            )
        }
    }

    #[test]
    fn the_controller_of_the_root_disk_is_needed_even_below_lvm() {
        assert!(
            Machine::new(&[])
                .reason("0000:00:02.0")
                .unwrap()
                .contains("mounted at /")
        );
    }

    #[test]
    fn both_controllers_of_an_nvme_disk_with_two_ways_to_it_are_needed() {
        let machine = Machine::new(&[]);
        let at = |path: &str| machine.dir.path().join(path);
        let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
        let partition = at(&format!("{subsystem}/nvme0n1/nvme0n1p1"));
        fs::create_dir_all(&partition).unwrap();
        symlink(partition, at("sys/dev/block/259:1")).unwrap();
        for (controller, name) in [("0000:00:05.0", "nvme0"), ("0000:00:06.0", "nvme1")] {
            let directory = at(&format!("sys/devices/pci/{controller}/nvme/{name}"));
            fs::create_dir_all(&directory).unwrap();
            symlink(directory, at(&format!("{subsystem}/{name}"))).unwrap();
        }
        let mounts = "28 1 259:1 / /srv rw,relatime - ext4 /dev/nvme0n1p1 rw\n";
        fs::write(at("proc/self/mountinfo"), mounts).unwrap();
        for controller in ["0000:00:05.0", "0000:00:06.0"] {
            let reason = machine.reason(controller).unwrap();
            assert!(reason.contains("mounted at /srv"), "{reason}");
        }
        assert_eq!(machine.reason("0000:00:02.0"), None);
    }

    #[test]
    fn every_disk_of_a_btrfs_is_needed() {
        let machine = Machine::new(&[]);
        let at = |path: &str| machine.dir.path().join(path);
        let devices = at("sys/fs/btrfs/6ad0f57c/devices");
        fs::create_dir_all(&devices).unwrap();
        for (controller, name) in [("0000:00:05.0", "sdb"), ("0000:00:06.0", "sdc")] {
            let directory = at(&format!("sys/devices/pci/{controller}/ata2/block/{name}"));
            fs::create_dir_all(&directory).unwrap();
            symlink(directory, devices.join(name)).unwrap();
        }
        symlink(devices.join("sdb"), at("sys/dev/block/8:16")).unwrap();
        let mounts = "28 1 8:16 / /srv rw - btrfs /dev/sdb rw\n";
        fs::write(at("proc/self/mountinfo"), mounts).unwrap();
        assert!(machine.reason("0000:00:06.0").is_some());
        assert_eq!(machine.reason("0000:00:02.0"), None);
    }

    #[test]
    fn the_only_network_card_in_use_is_needed() {
        let machine = Machine::new(&["0000:00:03.0"]);
        assert!(
            machine
                .reason("0000:00:03.0")
                .unwrap()
                .contains("only network card")
        );
        assert_eq!(machine.reason("0000:00:04.0"), None);
    }

    #[test]
    fn one_of_two_network_cards_is_not() {
        assert_eq!(
            Machine::new(&["0000:00:03.0", "0000:00:04.0"]).reason("0000:00:03.0"),
            None
        );
    }
}
