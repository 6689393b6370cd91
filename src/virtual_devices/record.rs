//! What the next daemon has to know of a guest's devices: `RUN_DIR/virtual/DOMID-UUID/`. Mapped files: a store
//! survives `kill -9`, and costs no system call.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use virtio::device::Device;
use virtio::ioreq::Ledger;
use virtio::memory::Words;
use virtio::transport::{Notes, NotesError};
use xenbus::DomId;

use super::place::At;
use crate::config::VirtioDevice;

/// The list of devices.
const DEVICES: &str = "devices.json";
/// Those that are disks of xl's configuration, by its numbers of them.
const DISKS: &str = "disks.json";

/// A guest's files. Dropping this leaves them.
#[derive(Debug)]
pub(super) struct Record {
    directory: PathBuf,
}

/// Where a guest's files are. Its UUID is part of the name, for Xen gives a number again after some
/// thousand guests.
pub(super) fn directory(below: &Path, domain: DomId, uuid: &str) -> PathBuf {
    let plain: String = uuid
        .chars()
        .filter(|letter| letter.is_ascii_hexdigit() || *letter == '-')
        .collect();
    below.join(format!("{domain}-{plain}"))
}

/// Whether a guest's devices stand there. Without them all else means nothing.
pub(super) fn is_kept(directory: &Path) -> bool {
    directory.join(DEVICES).exists()
}

/// The devices of a guest whose files are there: those of the configuration and of the operator, then disks of xl's.
pub(super) fn devices_of(directory: &Path) -> Vec<VirtioDevice> {
    let Ok(record) = Record::open(directory.to_owned()) else {
        return Vec::new();
    };
    let mut devices = record.devices().ok().flatten().unwrap_or_default();
    devices.extend(record.disks().unwrap_or_default().into_values());
    devices
}

/// Whose files a directory of this name has.
pub(super) fn owner(name: &str) -> Option<DomId> {
    name.split_once('-')?.0.parse().ok()
}

impl Record {
    /// Opens a guest's files, which are made if they are not there.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    fn file(&self, name: &str) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.directory.join(name))
    }

    /// The devices that the guest has; `None`: it is a new one.
    ///
    /// # Errors
    /// When what stands there cannot be read.
    pub fn devices(&self) -> io::Result<Option<Vec<VirtioDevice>>> {
        self.read(DEVICES)
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> io::Result<Option<T>> {
        match fs::read(self.directory.join(file)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => Ok(Some(serde_json::from_slice(&other?)?)),
        }
    }

    /// All of it or nothing.
    fn write(&self, file: &str, value: &impl Serialize) -> io::Result<()> {
        let path = self.directory.join(file);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(value)?)?;
        fs::rename(new, path)
    }

    /// Writes down which devices a new guest has. All of it or nothing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_devices(&self, devices: &[VirtioDevice]) -> io::Result<()> {
        self.write(DEVICES, &devices)
    }

    /// The disks that it has from xl's configuration, each with its slot.
    ///
    /// # Errors
    /// When what stands there cannot be read.
    pub fn disks(&self) -> io::Result<BTreeMap<u32, VirtioDevice>> {
        Ok(self.read(DISKS)?.unwrap_or_default())
    }

    /// Writes down which disks it has. All of it or nothing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_disks(&self, disks: &BTreeMap<u32, VirtioDevice>) -> io::Result<()> {
        self.write(DISKS, disks)
    }

    /// Forgets what stands of a device, which the guest has no more.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn forget(&self, at: At) -> io::Result<()> {
        match fs::remove_file(self.directory.join(device_file(at))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The IOREQ server's.
    ///
    /// # Errors
    /// When the file cannot be mapped, or another version has written it.
    pub fn ledger(&self) -> io::Result<Ledger> {
        let words = Words::of_file(self.file("server")?, Ledger::WORDS)?;
        Ledger::new(words).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// What the device in a place has noted.
    ///
    /// # Errors
    /// When the file cannot be mapped, or another version's device has written it.
    pub fn device(&self, at: At, device: &dyn Device) -> io::Result<Notes> {
        let file = self.file(&device_file(at))?;
        Notes::of_file(file, device).map_err(|error| match error {
            NotesError::Words(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        })
    }
}

/// The file with the record of the device in a place.
fn device_file(at: At) -> String {
    match at {
        At::Pci(slot) => format!("slot-{:02x}", slot.number()),
        At::Mmio(slot) => format!("mmio-{slot}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_guest_s_whatever_its_uuid_says() {
        let path = directory(Path::new("/run"), DomId(7), "../0a-1b");
        assert_eq!(path, Path::new("/run/7-0a-1b"));
        assert_eq!(owner("7-0a-1b"), Some(DomId(7)));
        assert_eq!(owner("x-1"), None);
    }

    #[test]
    fn the_devices_stay_those_that_the_guest_was_made_with() {
        let run_dir = tempfile::tempdir().unwrap();
        let record = Record::open(run_dir.path().to_owned()).unwrap();
        assert_eq!(record.devices().unwrap(), None);
        let config: crate::config::Config = "[[guest.web.virtio]]
            type = \"rng\"
            slot = \"1d\"
            mode = \"legacy\"
            layout = \"compact\"
            legacy_in_memory = true
            [[guest.web.virtio]]
            type = \"blk\"
            path = \"/disk\"
            read_only = true
            queues = 3
            serial = \"a\"
            mode = \"modern\"
            packed = true
            [[guest.web.virtio]]
            type = \"rng\"
            transport = \"mmio\"
            slot = \"6\"
            version = 1
            [[guest.web.virtio]]
            type = \"net\"
            bridge = \"xenbr0\"
            mac = \"00:16:3e:01:02:03\"
            queues = 2
            offloads = false
            [[guest.web.virtio]]
            type = \"net\"
            tap = \"web0\"
            [[guest.web.virtio]]
            type = \"console\"
            socket = \"/run/a\"
            ports = [{ name = \"a\" }, { name = \"b\", socket = \"/run/b\" }]"
            .parse()
            .unwrap();
        let devices = config.guest["web"].virtio.clone();
        record.set_devices(&devices).unwrap();
        assert_eq!(record.devices().unwrap(), Some(devices));
        fs::write(run_dir.path().join(DEVICES), "[{").unwrap();
        assert!(record.devices().is_err());
    }

    #[test]
    fn each_queue_has_its_own_words_and_the_server_too() {
        let run_dir = tempfile::tempdir().unwrap();
        let record = Record::open(run_dir.path().join("a/b")).unwrap();
        assert_eq!(record.ledger().unwrap().server(), None);
        record
            .ledger()
            .unwrap()
            .set_server(Some(xenbus::device_model::IoreqServerId(3)));
        assert!(record.ledger().unwrap().server().is_some());
        let rng = virtio::rng::Rng::new().unwrap();
        let slot = At::Pci(crate::config::Slot::new(0x1f).unwrap());
        assert!(record.device(slot, &rng).is_ok());
        let path = run_dir.path().join("a/b/slot-1f");
        let words = Notes::words(&rng);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 * words as u64);
        // As a daemon from before this layout left it.
        fs::write(&path, [b"virtio 1", &[0; 4096][..]].concat()).unwrap();
        let refused = record.device(slot, &rng).unwrap_err().to_string();
        assert!(refused.contains("another version"), "{refused}");
        fs::write(run_dir.path().join("a/b/server"), [1; 16]).unwrap();
        let refused = record.ledger().unwrap_err().to_string();
        assert!(refused.contains("another version"), "{refused}");
    }
}
