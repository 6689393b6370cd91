//! The real `/sys/bus/pci/drivers`, for those who live behind the facade.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use conf_space::address::Bdf;
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::FacadeError;
use super::mount;

/// Where Linux has the PCI drivers.
pub const DRIVERS: &str = "/sys/bus/pci/drivers";

/// The real directory of PCI drivers, open from before the facade was laid over it: whatever is reached through it never meets the facade. A process that
/// serves the facade must not walk into `/sys/bus/pci/drivers` by path, for it would wait for itself. It may read the link `driver` of a device (the name
/// is all it needs), and not follow it.
#[derive(Debug, Clone)]
pub struct RealDrivers(Arc<Directories>);

#[derive(Debug)]
struct Directories {
    path: PathBuf,
    drivers: OwnedFd,
    devices: OwnedFd,
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub name: OsString,
    pub kind: Option<Type>,
    pub inode: u64,
}

impl RealDrivers {
    /// Opens `/sys/bus/pci/drivers`. A facade whose daemon is dead is taken away first.
    ///
    /// # Errors
    /// [`FacadeError::Served`] when another process serves a facade there, [`FacadeError::Unmount`] when a dead one stays, [`FacadeError::Open`] without sysfs.
    pub fn open() -> Result<Self, FacadeError> {
        Self::open_at(Path::new(DRIVERS))
    }

    /// As [`RealDrivers::open`], for a directory elsewhere that has a sibling `devices`.
    ///
    /// # Errors
    /// As [`RealDrivers::open`].
    pub fn open_at(path: &Path) -> Result<Self, FacadeError> {
        let drivers = mount::open_beneath_dead_facades(path)?;
        let devices_path = path.with_file_name("devices");
        let devices = mount::open_path(&devices_path).map_err(|source| FacadeError::Open {
            path: devices_path,
            source,
        })?;
        Ok(Self(Arc::new(Directories {
            path: path.to_owned(),
            drivers,
            devices,
        })))
    }

    /// The path that it was opened by, and that a facade is mounted over.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A path that leads to the real directory, facade or not.
    #[cfg(test)]
    pub(super) fn behind(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        Path::new("/proc/self/fd").join(self.0.drivers.as_raw_fd().to_string())
    }

    /// Whether the kernel has a driver of this name now.
    pub fn exists(&self, driver: &str) -> bool {
        component(driver)
            .and_then(|driver| self.stat(driver))
            .is_ok()
    }

    /// The devices that a driver holds now.
    ///
    /// # Errors
    /// ENOENT when there is no such driver.
    pub fn list_devices(&self, driver: &str) -> Result<Vec<Bdf>, Errno> {
        let entries = self.list(component(driver)?)?;
        Ok(entries
            .iter()
            .filter_map(|entry| entry.name.to_str()?.parse().ok())
            .collect())
    }

    /// Writes to an attribute of a driver, in one write: `unbind`, `bind`, `new_id`.
    ///
    /// # Errors
    /// ENOENT when there is no such driver or attribute, and what the kernel answers to the write.
    pub fn write_attribute(
        &self,
        driver: &str,
        attribute: &str,
        bytes: &[u8],
    ) -> Result<(), Errno> {
        let path = component(driver)?.join(component(attribute)?);
        let file = self.open_file(&path, OFlag::O_WRONLY)?;
        match file.write_at(bytes, 0) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::EIO),
            Err(error) => Err(errno(&error)),
        }
    }

    /// Attributes of something below the directory; of the directory itself for the empty path. Links are not followed.
    pub(super) fn stat(&self, path: &Path) -> Result<FileStat, Errno> {
        if path.as_os_str().is_empty() {
            fstat(&self.0.drivers)
        } else {
            fstatat(&self.0.drivers, path, AtFlags::AT_SYMLINK_NOFOLLOW)
        }
    }

    /// All PCI devices that the kernel has now.
    pub(super) fn all_devices(&self) -> Vec<Bdf> {
        let entries = names(&self.0.devices, Path::new(".")).unwrap_or_default();
        entries
            .iter()
            .filter_map(|entry| entry.name.to_str()?.parse().ok())
            .collect()
    }

    /// The names in a directory, without `.` and `..`.
    pub(super) fn list(&self, path: &Path) -> Result<Vec<Entry>, Errno> {
        names(
            &self.0.drivers,
            if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            },
        )
    }

    /// What a link says.
    pub(super) fn read_link(&self, path: &Path) -> Result<OsString, Errno> {
        readlinkat(&self.0.drivers, path)
    }

    /// What the link of a device under `devices` says: `../../../devices/pci0000:00/0000:00:05.0`.
    pub(super) fn device_link(&self, device: Bdf) -> Result<OsString, Errno> {
        readlinkat(&self.0.devices, device.to_string().as_str())
    }

    /// Opens a file; `flags` is an access mode.
    pub(super) fn open_file(&self, path: &Path, flags: OFlag) -> Result<File, Errno> {
        let file = openat(
            &self.0.drivers,
            path,
            flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(file.into())
    }
}

/// The names in a directory below another, without `.` and `..`.
fn names(directory: &OwnedFd, path: &Path) -> Result<Vec<Entry>, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut directory = Dir::from_fd(openat(directory, path, flags, Mode::empty())?)?;
    let mut entries = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            entries.push(Entry {
                name: OsStr::from_bytes(name).to_owned(),
                kind: entry.file_type(),
                inode: entry.ino(),
            });
        }
    }
    Ok(entries)
}

/// A single file name: nothing that leads elsewhere.
fn component(name: &str) -> Result<&Path, Errno> {
    let path = Path::new(name);
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(path),
        _ => Err(Errno::EINVAL),
    }
}

/// The errno of an error that came from a system call.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn machine() -> (tempfile::TempDir, RealDrivers) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("devices")).unwrap();
        fs::create_dir_all(dir.path().join("drivers/e1000e")).unwrap();
        fs::write(dir.path().join("drivers/e1000e/unbind"), "").unwrap();
        std::os::unix::fs::symlink(
            "../../devices/0000:00:05.0",
            dir.path().join("drivers/e1000e/0000:00:05.0"),
        )
        .unwrap();
        let real = RealDrivers::open_at(&dir.path().join("drivers")).unwrap();
        (dir, real)
    }

    #[test]
    fn drivers_and_their_devices_are_seen() {
        let (_dir, real) = machine();
        assert!(real.exists("e1000e"));
        assert!(!real.exists("igb"));
        assert_eq!(
            real.list_devices("e1000e").unwrap(),
            ["0000:00:05.0".parse().unwrap()]
        );
        assert_eq!(real.list_devices("igb"), Err(Errno::ENOENT));
    }

    #[test]
    fn an_attribute_is_written_in_one_go() {
        let (dir, real) = machine();
        real.write_attribute("e1000e", "unbind", b"0000:00:05.0")
            .unwrap();
        assert_eq!(
            fs::read_to_string(dir.path().join("drivers/e1000e/unbind")).unwrap(),
            "0000:00:05.0"
        );
        assert_eq!(
            real.write_attribute("e1000e", "bind", b"0000:00:05.0"),
            Err(Errno::ENOENT)
        );
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let (_dir, real) = machine();
        for name in [
            "",
            ".",
            "..",
            "/",
            "e1000e/",
            "e1000e/unbind",
            "../drivers",
            "/sys",
        ] {
            assert!(!real.exists(name), "{name:?}");
            assert_eq!(
                real.write_attribute(name, "unbind", b""),
                Err(Errno::EINVAL),
                "{name:?}"
            );
            assert_eq!(
                real.write_attribute("e1000e", name, b""),
                Err(Errno::EINVAL),
                "{name:?}"
            );
        }
    }
}
