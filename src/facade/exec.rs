//! A command in a mount namespace of its own, with the facade.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mount::{MountName, attach};
use super::{DRIVERS, FacadeError};

/// Why a command was not run with the facade.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No mount namespace of our own.
    #[error(
        "cannot make a mount namespace of its own for the command; that takes root (CAP_SYS_ADMIN)"
    )]
    Namespace(#[source] Errno),
    /// The facade could not be mounted in it.
    #[error(transparent)]
    Facade(#[from] FacadeError),
    /// The daemon did not take the facade over.
    #[error("the daemon did not take over the facade")]
    HandOver(#[source] io::Error),
    /// The command itself.
    #[error("cannot run '{command}'")]
    Command {
        /// Its program.
        command: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Mounts a facade over `/sys/bus/pci/drivers` in the caller's mount namespace. Whoever gets the descriptor serves it, see [`super::serve`]; until
/// then all who look into the directory wait.
///
/// # Errors
/// [`FacadeError::NoFuse`] and [`FacadeError::Mount`].
pub fn mount_here() -> Result<OwnedFd, FacadeError> {
    attach(Path::new(DRIVERS), MountName::new())
}

/// Becomes `command`, in a mount namespace of its own in which the facade lies over `/sys/bus/pci/drivers`. `hand_over` brings the descriptor to the daemon
/// and returns once it is served. As the process stays the same, the command's exit code and signals are the caller's. To be called with a single thread.
///
/// What is mounted outside later on is seen inside, and what is unmounted outside is not held: a guest that `xl` starts in there lives on for long.
///
/// # Errors
/// Returns only if the command could not be run.
pub fn exec(
    command: Command,
    hand_over: impl FnOnce(OwnedFd) -> io::Result<()>,
) -> Result<Infallible, ExecError> {
    exec_at(Path::new(DRIVERS), command, hand_over)
}

pub(super) fn exec_at(
    path: &Path,
    mut command: Command,
    hand_over: impl FnOnce(OwnedFd) -> io::Result<()>,
) -> Result<Infallible, ExecError> {
    enter_namespace().map_err(ExecError::Namespace)?;
    hand_over(attach(path, MountName::new())?).map_err(ExecError::HandOver)?;
    let source = command.exec();
    Err(ExecError::Command {
        command: command.get_program().display().to_string(),
        source,
    })
}

fn enter_namespace() -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
}
