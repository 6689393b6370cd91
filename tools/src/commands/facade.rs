//! `pciback facade`: lays the facade for a daemon that cannot do so itself, since it runs in a mount namespace of its own.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pcibackd::control::client;
use pcibackd::control::protocol::{Request, Response};
use pcibackd::facade::Outside;

use crate::daemon::{self, understand};
use crate::outcome::{CommandError, Outcome};

/// What `pciback facade` takes.
#[derive(Debug, Args)]
pub struct Facade {}

/// How long until a daemon that is not there is looked for again, in milliseconds. Guests' operations do not wait for this.
const ABSENT: u16 = 50;
/// How long until a daemon whose configuration wants no facade for everybody is asked again.
const UNWANTED: u16 = 2000;

/// Keeps the facade in place while the daemon runs, and takes it away the moment that it does not, until told to stop.
pub fn run(run_dir: &Path) -> Result<Outcome, CommandError> {
    let stop = signals().map_err(CommandError::Wait)?;
    let mut ready = Some(sd_notify::NotifyState::Ready);
    loop {
        let (laid, patience) = match lay(run_dir) {
            Ok(Some(laid)) => (Some(laid), PollTimeout::NONE),
            Ok(None) => (None, UNWANTED.into()),
            Err(CommandError::Client(_)) => (None, ABSENT.into()),
            Err(error) => return Err(error),
        };
        // Also without a daemon: it may not start for long, and nobody is to wait for a facade then.
        if let Some(ready) = ready.take() {
            // Without systemd there is nobody to tell.
            let _ = sd_notify::notify(&[ready]);
        }
        let daemon = laid.as_ref().map(|(_, daemon)| daemon);
        let end = wait(&stop, daemon, patience)?;
        if let Some((facade, _)) = laid {
            facade.take_away(end != End::OfTheDaemon)?;
        }
        if end == End::Told {
            return Ok(Outcome::Done);
        }
    }
}

/// Lays a facade if the configuration wants one for everybody. The connection that comes with it ends with the daemon.
fn lay(run_dir: &Path) -> Result<Option<(Outside, UnixStream)>, CommandError> {
    let status = daemon::ask(run_dir, &Request::Status, |response| match response {
        Response::Status(status) => Some(status),
        _ => None,
    })?;
    if status.facade != "global" {
        return Ok(None);
    }
    let (facade, fuse) = Outside::lay()?;
    let served = |response| match response {
        Response::Served => Some(()),
        _ => None,
    };
    let result = client::ask_to_serve(run_dir, fuse.as_fd())
        .map_err(CommandError::from)
        .and_then(|(response, daemon)| understand(response, served).map(|()| daemon));
    match result {
        Ok(daemon) => Ok(Some((facade, daemon))),
        Err(error) => {
            facade.take_away(false)?;
            Err(error)
        }
    }
}

/// Why a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// We are told to stop.
    Told,
    /// The daemon is there, and may want something else now.
    OfTheWait,
    /// The daemon is gone.
    OfTheDaemon,
}

/// Waits until it is told to stop, until the daemon hangs up or says that it wants no facade any more, or for as long as there is patience.
fn wait(
    stop: &SignalFd,
    daemon: Option<&UnixStream>,
    patience: PollTimeout,
) -> Result<End, CommandError> {
    let mut watched = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    watched.extend(daemon.map(|daemon| PollFd::new(daemon.as_fd(), PollFlags::POLLIN)));
    match poll(&mut watched, patience) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(CommandError::Wait(errno.into())),
    }
    // One that lives closes its direction of the connection only.
    let hung_up = watched
        .get(1)
        .and_then(PollFd::revents)
        .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
    let signal = stop.read_signal();
    let signal = signal.map_err(|errno| CommandError::Wait(errno.into()))?;
    Ok(match signal {
        Some(_) => End::Told,
        None if hung_up => End::OfTheDaemon,
        None => End::OfTheWait,
    })
}

fn signals() -> io::Result<SignalFd> {
    let mask: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    mask.thread_block()?;
    Ok(SignalFd::with_flags(
        &mask,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    #[test]
    fn a_daemon_that_wants_no_facade_any_more_is_told_from_one_that_has_died() {
        let stop = SignalFd::with_flags(&SigSet::empty(), SfdFlags::SFD_NONBLOCK).unwrap();
        let (theirs, ours) = UnixStream::pair().unwrap();
        let look = |patience: u16| wait(&stop, Some(&ours), patience.into()).unwrap();
        assert_eq!(look(1), End::OfTheWait);
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!(look(10_000), End::OfTheWait);
        drop(theirs);
        assert_eq!(look(10_000), End::OfTheDaemon);
    }
}
