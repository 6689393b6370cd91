//! Keeping others from changing how many virtual functions a device has: its `sriov_numvfs` is mounted over itself, read-only.
//!
//! The kernel's own backend marks a device that a guest has, and drivers of physical functions leave marked devices alone. User space cannot
//! mark them. A mount outlives us, as the guests do.
//!
//! A service of systemd's has mounts of its own, which nobody else sees, and its sandbox keeps it from making any. There systemd runs mount(8)
//! for us. What is mounted on the host, the service sees, too.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::command;

/// Makes a file read-only for everybody, or takes that back. What is so already stays so.
pub(super) fn keep(file: &Path, keep: bool) -> io::Result<()> {
    keep_by(
        if command::is_service() {
            by_systemd
        } else {
            here
        },
        file,
        keep,
    )
}

fn keep_by(change: fn(&Path, bool) -> io::Result<()>, file: &Path, keep: bool) -> io::Result<()> {
    // Mounts are known by the path that no link is in.
    let file = match fs::canonicalize(file) {
        // The mount goes with the file.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !keep => return Ok(()),
        other => other?,
    };
    if is_mounted(&file)? == keep {
        return Ok(());
    }
    change(&file, keep)
}

fn by_systemd(file: &Path, keep: bool) -> io::Result<()> {
    command::on_the_host_to_its_end(&program(file, keep))
}

fn program(file: &Path, keep: bool) -> Vec<String> {
    let file = file.to_string_lossy();
    let words: &[&str] = if keep {
        &["mount", "--bind", "-o", "ro", &file, &file]
    } else {
        &["umount", "--lazy", &file]
    };
    words.iter().map(|&word| word.to_owned()).collect()
}

fn here(file: &Path, keep: bool) -> io::Result<()> {
    if !keep {
        return Ok(umount2(file, MntFlags::MNT_DETACH)?);
    }
    let bind = |source: Option<&Path>, flags| {
        mount(
            source,
            file,
            None::<&str>,
            MsFlags::MS_BIND | flags,
            None::<&str>,
        )
    };
    bind(Some(file), MsFlags::empty())?;
    // A bind mount takes no other flags at first.
    Ok(bind(None, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?)
}

fn is_mounted(file: &Path) -> io::Result<bool> {
    // proc(5), /proc/PID/mountinfo: the mount point is the fifth field.
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.any(|point| Path::new(point) == file))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use nix::sched::{CloneFlags, unshare};

    /// What systemd runs for a service.
    fn by_program(file: &Path, keep: bool) -> io::Result<()> {
        let words = program(file, keep);
        let status = Command::new(&words[0]).args(&words[1..]).status()?;
        assert!(status.success());
        Ok(())
    }

    #[test]
    fn a_kept_file_is_read_only_until_it_is_let_go() {
        let own_mounts = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        });
        if let Err(error) = own_mounts {
            eprintln!("SKIPPED: no mount namespace here ({error}); run as root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sriov_numvfs");
        fs::write(&file, "2").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        let through_link = link.join("sriov_numvfs");
        for change in [here, by_program] {
            for _ in 0..2 {
                keep_by(change, &through_link, true).unwrap();
                let error = fs::write(&file, "0").unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EROFS));
                assert_eq!(fs::read_to_string(&file).unwrap(), "2");
            }
            for _ in 0..2 {
                keep_by(change, &file, false).unwrap();
                fs::write(&file, "2").unwrap();
            }
        }
    }
}
