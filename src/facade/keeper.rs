//! The keeper: a small process that unmounts the facade when the daemon dies.
//!
//! It is the daemon's own program, run anew under another name: unlike a fork it has nothing of the daemon's memory, and the daemon can start another one
//! at any time, whatever its threads are doing. A socket ties the two together: each sees in it that the other is gone.

use std::env;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd;

use super::FacadeError;
use super::mount::{self, MountName, Waiters};
use crate::outlive;

/// What the keeper is called in a list of processes.
const NAME: &str = "pcibackd-keeper";
/// What it says once no signal but SIGKILL ends it any more.
const READY: &[u8] = b"+";
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// A running keeper. Its descriptor becomes readable when it dies. Dropping this ends it without unmounting anything.
#[derive(Debug)]
pub(super) struct Keeper {
    child: Child,
    line: UnixStream,
}

impl Keeper {
    /// Starts one for the mount of this name on `path`, which may or may not exist already.
    pub fn start(path: &Path, name: MountName) -> Result<Self, FacadeError> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(path).arg(name.to_string());
        Self::spawn(&mut command).map_err(FacadeError::Keeper)
    }

    /// Runs it, and waits until it keeps.
    fn spawn(command: &mut Command) -> io::Result<Self> {
        let (line, theirs) = UnixStream::pair()?;
        let child = command
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        // the child's end must be its alone, for the line to tell of its death
        command.stdin(Stdio::null());
        let mut keeper = Self { child, line };
        keeper.line.set_read_timeout(Some(START_TIMEOUT))?;
        let mut word = [0; READY.len()];
        keeper.line.read_exact(&mut word)?;
        keeper.line.set_nonblocking(true)?;
        Ok(keeper)
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // it may have died already; either way it is not to stay as a zombie
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the keeper if this process was started as one: to be asked first of all in `main`, before there is a thread. `None`: this is no keeper.
pub fn run_if_keeper() -> Option<ExitCode> {
    let mut arguments = env::args_os();
    if arguments.next()? != NAME {
        return None;
    }
    Some(run(arguments.next(), arguments.next()))
}

fn run(path: Option<OsString>, name: Option<OsString>) -> ExitCode {
    let name = name.and_then(|name| name.to_str()?.parse().ok());
    let (Some(path), Some(name)) = (path, name) else {
        eprintln!("{NAME}: runs as a part of pcibackd only");
        return ExitCode::from(2);
    };
    match keep(Path::new(&path), name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "{NAME}: {error}; `umount -l {}` takes it away by hand",
                path.display()
            );
            ExitCode::FAILURE
        }
    }
}

/// Waits until the daemon is gone, then unmounts.
fn keep(path: &Path, name: MountName) -> Result<(), FacadeError> {
    outlive::settle(c"pciback-keeper").map_err(FacadeError::Keeper)?;
    let line = io::stdin();
    // a daemon that is gone already does not hear it, and is no less gone
    let _ = unistd::write(&line, READY);
    let mut ignored = [0; 16];
    // the daemon never writes: what comes is its end, or ECONNRESET if it did not even hear us
    while !matches!(
        unistd::read(&line, &mut ignored),
        Ok(0) | Err(Errno::ECONNRESET)
    ) {}
    mount::unmount(path, name, Waiters::Fail)
}
