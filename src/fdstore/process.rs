//! The process that keeps the descriptors.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs, thread};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, socket};

use super::wire::{self, DONE, FORGET, FULL, KEEP, KEPT, Message, SYNC, TAKE};
use crate::{outlive, rights};

/// What it is called in a list of processes. Its unit has it, too.
pub(super) const NAME: &str = "pcibackd-fdstore";

/// Descriptors besides those kept: the sockets, and what a message may bring along.
const ROOM: usize = rights::MOST + 16;

/// When nobody can be let in that is tried again after this time.
const RETRY: Duration = Duration::from_millis(100);

/// Runs the store if this process was started as one, with its listening socket as standard input: to be asked first of all in `main`,
/// before there is a thread. `None`: this is none.
pub fn run_if_store() -> Option<ExitCode> {
    if env::args_os().next()? != NAME {
        return None;
    }
    let run = || {
        outlive::settle(c"pciback-fdstore")?;
        let listener = io::stdin().as_fd().try_clone_to_owned()?;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        serve(listener)
    };
    Some(match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {error}; it runs as a part of pcibackd only");
            ExitCode::FAILURE
        }
    })
}

/// The socket that a store serves, for its user alone. One that is there is taken away: nobody may be listening at it.
///
/// # Errors
/// It cannot be made there.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Until it listens nobody can connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// Keeps descriptors for one daemon after the other. Returns when nothing is kept and the last daemon is gone.
///
/// # Errors
/// The socket is none that listens.
pub fn serve(listener: OwnedFd) -> io::Result<()> {
    let listener = UnixListener::from(listener);
    let mut kept = BTreeMap::new();
    loop {
        let daemon = match listener.accept() {
            Ok((daemon, _)) => daemon,
            Err(error) if is_no_listener(&error) => return Err(error),
            // What is kept is not to be lost because the host is short of something.
            Err(_) => {
                thread::sleep(RETRY);
                continue;
            }
        };
        if wire::is_own(&daemon) {
            // What ends a connection is of no interest: the next daemon makes another.
            let _ = converse(&daemon, &mut kept);
        }
        if kept.is_empty() {
            return Ok(());
        }
    }
}

fn is_no_listener(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTSOCK | libc::EINVAL | libc::EOPNOTSUPP | libc::EBADF)
    )
}

fn converse(daemon: &UnixStream, kept: &mut BTreeMap<String, Vec<OwnedFd>>) -> io::Result<()> {
    let mut refused = Vec::new();
    while let Some(Message { kind, name, fds }) = wire::receive(daemon)? {
        match kind {
            KEEP => {
                kept.remove(&name);
                if fds.len() <= room(kept) {
                    kept.insert(name, fds);
                } else {
                    refused.push(name);
                }
            }
            FORGET => kept.retain(|known, _| !known.starts_with(&name)),
            SYNC | TAKE => {
                for name in refused.drain(..) {
                    wire::send(daemon, FULL, &name, &[])?;
                }
                let asked = kept.iter().filter(|_| kind == TAKE);
                for (name, fds) in asked {
                    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    wire::send(daemon, KEPT, name, &fds)?;
                }
                wire::send(daemon, DONE, "", &[])?;
            }
            // Of a daemon of another version.
            _ => {}
        }
    }
    Ok(())
}

/// How many more descriptors can be kept, so that there is always room for those of a message.
fn room(kept: &BTreeMap<String, Vec<OwnedFd>>) -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(now, _)| now);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let used = kept
        .values()
        .map(Vec::len)
        .fold(ROOM, usize::saturating_add);
    limit.saturating_sub(used)
}
