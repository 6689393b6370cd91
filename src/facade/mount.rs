//! Mounting, and telling one mount from another.
//!
//! A mount of ours must be found again by a process that did not make it (the keeper; the daemon's next life), and never be taken for a newer one on the
//! same directory. Mount IDs and device numbers cannot tell them apart, Linux hands out the lowest free one again at once. So each mount has a name, its
//! source in `/proc/self/mountinfo`, and is only unmounted through a file descriptor of its root: what the descriptor pins cannot change between the look at
//! its name and the unmount.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use super::FacadeError;

/// The file system's type, with ours as the subtype.
const TYPE: &str = "fuse.pciback";

/// Who made a mount: process, the process's start in clock ticks since boot (for process numbers come again), and a count. Unique in one boot.
///
/// Its text is the mount's source: `pcibackd:PROCESS:START:COUNT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MountName {
    process: u32,
    start: u64,
    count: u32,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl MountName {
    /// A name for a mount that this process is going to make.
    pub fn new() -> Self {
        let process = process::id();
        let start = running_since(process).unwrap_or_default();
        Self {
            process,
            start,
            count: COUNT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The process that made it, if it runs. One that died but hangs in the kernel does not.
    pub(super) fn owner(self) -> Option<u32> {
        (running_since(self.process) == Some(self.start)).then_some(self.process)
    }
}

impl std::fmt::Display for MountName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pcibackd:{}:{}:{}", self.process, self.start, self.count)
    }
}

/// The text is not a mount's name.
#[derive(Debug)]
pub(super) struct NotAName;

impl FromStr for MountName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let mut parts = text.strip_prefix("pcibackd:").ok_or(NotAName)?.split(':');
        let mut next = || parts.next().ok_or(NotAName);
        let (process, start, count) = (next()?, next()?, next()?);
        if parts.next().is_some() {
            return Err(NotAName);
        }
        let number = |_| NotAName;
        Ok(Self {
            process: process.parse().map_err(number)?,
            start: start.parse().map_err(number)?,
            count: count.parse().map_err(number)?,
        })
    }
}

/// When a process started; `None` if it does not run.
fn running_since(process: u32) -> Option<u64> {
    start_in(&fs::read_to_string(format!("/proc/{process}/stat")).ok()?)
}

/// Field 22 of `/proc/PID/stat`, unless field 3 says zombie or dead. The name in field 2 can hold blanks and parentheses.
fn start_in(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Type and source of a mount, from `/proc/self/mountinfo` (see proc_pid_mountinfo(5)).
fn in_mountinfo(mountinfo: &str, id: u64) -> Option<(&str, &str)> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if mount.split(' ').next()?.parse::<u64>().ok()? != id {
            return None;
        }
        let mut fields = filesystem.split(' ');
        Some((fields.next()?, fields.next()?))
    })
}

/// The number of the mount that an open file lives in, from its `/proc/self/fdinfo`.
fn in_fdinfo(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

/// The name of the facade that an open directory belongs to. `None` if it belongs to something else, or to what was unmounted meanwhile.
pub(super) fn facade_of(directory: &OwnedFd) -> std::io::Result<Option<MountName>> {
    let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", directory.as_raw_fd()))?;
    // a thread can have a mount namespace of its own
    let mountinfo = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let found = in_fdinfo(&fdinfo).and_then(|id| in_mountinfo(&mountinfo, id));
    Ok(found.and_then(|(kind, source)| {
        if kind == TYPE {
            source.parse().ok()
        } else {
            None
        }
    }))
}

/// A descriptor that only names a directory. Opening it asks nothing of the file system, so a dead one does not matter.
pub(super) fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// Opens what is at `path`, once dead facades are taken from it.
pub(super) fn open_beneath_dead_facades(path: &Path) -> Result<OwnedFd, FacadeError> {
    // dead mounts could lie on one another, and a keeper be at work on the same one; but not for ever
    const ATTEMPTS: u32 = 100;
    let mut last = Errno::EBUSY;
    for _ in 0..ATTEMPTS {
        let directory = open_path(path).map_err(|source| FacadeError::Open {
            path: path.to_owned(),
            source,
        })?;
        let facade = facade_of(&directory).map_err(FacadeError::Proc)?;
        let Some(name) = facade else {
            return Ok(directory);
        };
        if let Some(process) = name.owner() {
            return Err(FacadeError::Served {
                path: path.to_owned(),
                process,
            });
        }
        log::info!(
            "facade: taking away what process {} left over {}",
            name.process,
            path.display()
        );
        if let Err(error) = detach(&directory, Waiters::Fail) {
            last = error;
        }
    }
    Err(FacadeError::Unmount {
        path: path.to_owned(),
        source: last,
    })
}

/// What becomes of those who wait for an answer of a file system that is being unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiters {
    /// They get it.
    Wait,
    /// They get an error at once.
    Fail,
}

fn detach(directory: &OwnedFd, waiters: Waiters) -> Result<(), Errno> {
    let flags = match waiters {
        Waiters::Wait => MntFlags::MNT_DETACH,
        Waiters::Fail => MntFlags::MNT_DETACH | MntFlags::MNT_FORCE,
    };
    match umount2(
        format!("/proc/self/fd/{}", directory.as_raw_fd()).as_str(),
        flags,
    ) {
        // somebody else unmounted it since it was looked at
        Err(Errno::EINVAL) => Ok(()),
        result => result,
    }
}

/// Unmounts the facade of this name, if it is what lies uppermost on `path`.
pub(super) fn unmount(path: &Path, name: MountName, waiters: Waiters) -> Result<(), FacadeError> {
    let directory = open_path(path).map_err(|source| FacadeError::Open {
        path: path.to_owned(),
        source,
    })?;
    if facade_of(&directory).map_err(FacadeError::Proc)? != Some(name) {
        return Ok(());
    }
    detach(&directory, waiters).map_err(|source| FacadeError::Unmount {
        path: path.to_owned(),
        source,
    })
}

/// Mounts a FUSE file system on `path`; whoever holds the descriptor serves it, and once all who do are gone it is dead.
pub(super) fn attach(path: &Path, name: MountName) -> Result<OwnedFd, FacadeError> {
    let device = Path::new("/dev/fuse");
    let fuse = open(device, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(FacadeError::NoFuse)?;
    // every user may look, and the kernel checks the modes, as in sysfs
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        fuse.as_fd().as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some(name.to_string().as_str()),
        path,
        Some(TYPE),
        flags,
        Some(options.as_str()),
    )
    .map_err(|source| match source {
        Errno::ENODEV => FacadeError::NoFuse(source),
        _ => FacadeError::Mount {
            path: PathBuf::from(path),
            source,
        },
    })?;
    Ok(fuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_who_made_the_mount() {
        let name = MountName::new();
        assert_eq!(name.to_string().parse::<MountName>().unwrap(), name);
        assert_eq!(name.owner(), Some(process::id()));
        assert_ne!(MountName::new(), name);
    }

    #[test]
    fn a_process_number_that_came_again_is_somebody_else() {
        let name = MountName::new();
        let earlier = MountName {
            start: name.start - 1,
            ..name
        };
        assert_eq!(earlier.owner(), None);
    }

    #[test]
    fn other_mounts_have_other_names() {
        for text in [
            "sysfs",
            "pcibackd",
            "pcibackd:1",
            "pcibackd:1:2",
            "pcibackd:1:2:3:4",
            "pcibackd:1:2:x",
            "other:1:2:3",
        ] {
            assert!(text.parse::<MountName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_zombie_does_not_run() {
        let rest = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 9 10";
        assert_eq!(start_in(&format!("12 (a) b (c) S {rest}")), Some(777));
        assert_eq!(start_in(&format!("12 (a) b (c) D {rest}")), Some(777));
        assert_eq!(start_in(&format!("12 (a) b (c) Z {rest}")), None);
        assert_eq!(start_in("12 (a"), None);
    }

    #[test]
    fn mounts_are_found_by_number() {
        let mountinfo = "22 28 0:20 / /sys rw,relatime shared:7 - sysfs sysfs rw\n\
            57 22 0:44 / /sys/bus/pci/drivers rw,nosuid master:1 shared:9 - fuse.pciback pcibackd:1:2:3 rw,user_id=0\n";
        assert_eq!(in_mountinfo(mountinfo, 57), Some((TYPE, "pcibackd:1:2:3")));
        assert_eq!(in_mountinfo(mountinfo, 22), Some(("sysfs", "sysfs")));
        assert_eq!(in_mountinfo(mountinfo, 5), None);
        assert_eq!(
            in_fdinfo("pos:\t0\nflags:\t012100000\nmnt_id:\t57\nino:\t1\n"),
            Some(57)
        );
        assert_eq!(in_fdinfo("pos:\t0\n"), None);
    }
}
