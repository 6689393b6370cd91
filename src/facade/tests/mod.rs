//! The facade with the real FUSE, over a small sysfs of our own in a mount namespace of our own.

mod files;
mod mounting;
mod pciback;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use conf_space::overlay::quirk::DeviceQuirk;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);

/// Whether this machine lets us mount FUSE. Moves the calling thread into a mount namespace of its own.
fn fuse_is_there() -> bool {
    let namespace = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
    });
    if let Err(error) = namespace {
        eprintln!("SKIPPED: no mount namespace here ({error}); run as root");
        return false;
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/fuse") {
        eprintln!("SKIPPED: no /dev/fuse here ({error}); `modprobe fuse`");
        return false;
    }
    true
}

/// Waits for something that another thread or process brings about.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "not within {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A directory tree as sysfs has it: an e1000e at 0000:00:05.0 and the driver that holds it, an igb at 0000:00:06.0 and .1 with none.
struct Machine {
    sys: TempDir,
}

impl Machine {
    fn new() -> Self {
        let sys = tempfile::tempdir().unwrap();
        fs::set_permissions(sys.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let machine = Self { sys };
        fs::create_dir_all(machine.path("bus/pci/devices")).unwrap();
        for device in ["0000:00:05.0", "0000:00:06.0", "0000:00:06.1"] {
            fs::create_dir_all(machine.path("devices/pci0000:00").join(device)).unwrap();
            symlink(
                format!("../../../devices/pci0000:00/{device}"),
                machine.path("bus/pci/devices").join(device),
            )
            .unwrap();
        }
        machine.add_driver("e1000e");
        machine.add_driver("igb");
        symlink(
            "../../../../devices/pci0000:00/0000:00:05.0",
            machine.drivers().join("e1000e/0000:00:05.0"),
        )
        .unwrap();
        symlink(
            "../../../bus/pci/drivers/e1000e",
            machine.path("devices/pci0000:00/0000:00:05.0/driver"),
        )
        .unwrap();
        machine
    }

    fn path(&self, below: &str) -> PathBuf {
        self.sys.path().join(below)
    }

    fn drivers(&self) -> PathBuf {
        self.path("bus/pci/drivers")
    }

    fn pciback(&self, name: &str) -> PathBuf {
        self.drivers().join("pciback").join(name)
    }

    /// What the kernel does when a driver's module is loaded.
    fn add_driver(&self, name: &str) {
        let directory = self.drivers().join(name);
        fs::create_dir_all(&directory).unwrap();
        for file in ["bind", "unbind"] {
            fs::write(directory.join(file), "").unwrap();
            fs::set_permissions(directory.join(file), fs::Permissions::from_mode(0o200)).unwrap();
        }
    }

    /// Lays the facade, served by this process, with no keeper. Dropping the result takes it away.
    fn facade(&self) -> (Arc<Memory>, Served) {
        let memory = Arc::new(Memory::default());
        let real = RealDrivers::open_at(&self.drivers()).unwrap();
        let name = MountName::new();
        let fuse = mount::attach(real.path(), name).unwrap();
        let server = serve(fuse, memory.clone(), real.clone()).unwrap();
        (memory, Served { real, name, server })
    }
}

struct Served {
    real: RealDrivers,
    name: MountName,
    server: Server,
}

impl Drop for Served {
    fn drop(&mut self) {
        mount::unmount(self.real.path(), self.name, Waiters::Fail).unwrap();
    }
}

/// Whether a facade lies over a directory, as this thread sees it.
fn is_mounted(path: &Path) -> bool {
    let mountinfo = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mountinfo.lines().any(|line| {
        line.contains(&format!(" {} ", path.display()))
            && line.contains(" - fuse.pciback pcibackd:")
    })
}

/// A backend that keeps devices in lists.
#[derive(Default)]
pub(super) struct Memory {
    lists: Mutex<Lists>,
    changed: Condvar,
}

#[derive(Default)]
struct Lists {
    slots: BTreeSet<Bdf>,
    seized: BTreeSet<Bdf>,
    permissive: BTreeSet<Bdf>,
    interrupt_control: BTreeSet<Bdf>,
    quirks: Vec<DeviceQuirk>,
    handlers: BTreeSet<Bdf>,
    resets: Vec<Bdf>,
    /// These must not lose their driver.
    kept: BTreeSet<Bdf>,
    /// A reset of these takes until they are taken from here, or very long.
    slow: BTreeSet<Bdf>,
    waiting: usize,
}

impl Memory {
    fn seized_only(&self, device: Bdf, action: impl FnOnce(&mut Lists)) -> Result<(), Errno> {
        let mut lists = self.lists.lock().unwrap();
        if !lists.seized.contains(&device) {
            return Err(Errno::ENODEV);
        }
        action(&mut lists);
        Ok(())
    }

    fn waiting(&self) -> usize {
        self.lists.lock().unwrap().waiting
    }

    fn let_go(&self) {
        self.lists.lock().unwrap().slow.clear();
        self.changed.notify_all();
    }
}

impl Driver for Memory {
    fn seized(&self) -> Vec<Bdf> {
        self.lists.lock().unwrap().seized.iter().copied().collect()
    }

    fn slots(&self) -> Vec<Bdf> {
        self.lists.lock().unwrap().slots.iter().copied().collect()
    }

    fn new_slot(&self, device: Bdf) -> Result<(), Errno> {
        self.lists.lock().unwrap().slots.insert(device);
        Ok(())
    }

    fn remove_slot(&self, device: Bdf) -> Result<(), Errno> {
        if self.lists.lock().unwrap().slots.remove(&device) {
            Ok(())
        } else {
            Err(Errno::ENOENT)
        }
    }

    fn bind(&self, device: Bdf) -> Result<(), Errno> {
        let mut lists = self.lists.lock().unwrap();
        if !lists.slots.contains(&device) {
            return Err(Errno::ENODEV);
        }
        if lists.seized.insert(device) {
            Ok(())
        } else {
            Err(Errno::EBUSY)
        }
    }

    fn unbind(&self, device: Bdf) -> Result<(), Errno> {
        self.seized_only(device, |lists| {
            lists.seized.remove(&device);
        })
    }

    fn permissive(&self) -> Vec<Bdf> {
        self.lists
            .lock()
            .unwrap()
            .permissive
            .iter()
            .copied()
            .collect()
    }

    fn set_permissive(&self, device: Bdf) -> Result<(), Errno> {
        self.seized_only(device, |lists| {
            lists.permissive.insert(device);
        })
    }

    fn interrupt_control(&self) -> Vec<Bdf> {
        self.lists
            .lock()
            .unwrap()
            .interrupt_control
            .iter()
            .copied()
            .collect()
    }

    fn allow_interrupt_control(&self, device: Bdf) -> Result<(), Errno> {
        self.seized_only(device, |lists| {
            lists.interrupt_control.insert(device);
        })
    }

    fn quirks(&self) -> String {
        let lists = self.lists.lock().unwrap();
        lists
            .quirks
            .iter()
            .map(|quirk| format!("{}\n\t\t{}\n", quirk.device, quirk.quirk))
            .collect()
    }

    fn add_quirk(&self, quirk: DeviceQuirk) -> Result<(), Errno> {
        self.seized_only(quirk.device, |lists| lists.quirks.push(quirk))
    }

    fn may_unbind_other(&self, device: Bdf) -> Result<(), Errno> {
        if self.lists.lock().unwrap().kept.contains(&device) {
            return Err(Errno::EBUSY);
        }
        Ok(())
    }

    fn irq_handlers(&self) -> String {
        let lists = self.lists.lock().unwrap();
        lists
            .handlers
            .iter()
            .map(|device| format!("{device}:on\n"))
            .collect()
    }

    fn turn_irq_handler(&self, device: Bdf) -> Result<(), Errno> {
        self.seized_only(device, |lists| {
            if !lists.handlers.remove(&device) {
                lists.handlers.insert(device);
            }
        })
        .map_err(|_| Errno::ENOENT)
    }

    fn reset(&self, device: Bdf) -> Result<(), Errno> {
        let mut lists = self.lists.lock().unwrap();
        lists.waiting += 1;
        let still = |lists: &mut Lists| lists.slow.contains(&device);
        let (mut lists, waited) = self.changed.wait_timeout_while(lists, LONG, still).unwrap();
        lists.waiting -= 1;
        if waited.timed_out() {
            return Err(Errno::ETIMEDOUT);
        }
        lists.resets.push(device);
        Ok(())
    }
}
