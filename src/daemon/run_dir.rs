//! The run directory: root's alone, and one daemon's at a time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::DaemonError;

/// Makes the directory if it is missing, and locks it. The lock goes with the process.
///
/// # Errors
/// [`DaemonError::RunDir`], also when others may write to it: they could put a control socket or records of their own there.
/// [`DaemonError::Running`].
pub(super) fn take(run_dir: &Path) -> Result<Flock<File>, DaemonError> {
    let error = |source| DaemonError::RunDir {
        path: run_dir.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .map_err(error)?;
    check(run_dir).map_err(error)?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        // Whoever can open it can lock it, and keep the daemon from starting.
        .mode(0o600)
        .open(run_dir.join("lock"))
        .map_err(error)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => DaemonError::Running {
            path: run_dir.to_owned(),
        },
        errno => error(errno.into()),
    })
}

fn check(run_dir: &Path) -> io::Result<()> {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let found = fs::metadata(run_dir)?;
    let (owner, mode) = (found.uid(), found.mode());
    if owner == geteuid().as_raw() && mode & WRITABLE_BY_OTHERS == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "others than its owner, user {owner}, may write to it (mode {:o}), or that is not this user; \
         make it this user's alone (chown root, chmod 700) or choose another with --run-dir",
        mode & 0o7777
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::text::chain;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn it_is_made_for_its_user_alone() {
        let parent = tempfile::tempdir().unwrap();
        let run_dir = parent.path().join("run");
        let _lock = take(&run_dir).unwrap();
        assert_eq!(mode(&run_dir), 0o700);
        assert_eq!(mode(&run_dir.join("lock")), 0o600);
        assert!(matches!(take(&run_dir), Err(DaemonError::Running { .. })));
    }

    #[test]
    fn one_that_others_may_write_to_is_refused_with_the_remedy() {
        let run_dir = tempfile::tempdir().unwrap();
        for others in [0o777, 0o1777, 0o770] {
            let permissions = fs::Permissions::from_mode(others);
            fs::set_permissions(run_dir.path(), permissions).unwrap();
            let error = chain(&take(run_dir.path()).unwrap_err());
            assert!(error.contains("chmod 700"), "{error}");
            assert!(!run_dir.path().join("lock").exists());
        }
    }
}
