//! What goes between the daemon and the store: messages of a `SOCK_SEQPACKET` socket. Each is a letter and a name, and may
//! bring descriptors along.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};
use nix::unistd::geteuid;

use crate::rights;

/// To the store: keep these descriptors under this name, instead of those that it has.
pub(super) const KEEP: u8 = b'k';
/// To the store: close all whose names begin so.
pub(super) const FORGET: u8 = b'f';
/// To the store: say when all so far is done.
pub(super) const SYNC: u8 = b's';
/// To the store: give everything, and then say that this is all.
pub(super) const TAKE: u8 = b't';

/// From the store: these are kept under this name.
pub(super) const KEPT: u8 = b'=';
/// From the store: what was to be kept under this name is not, for want of descriptors.
pub(super) const FULL: u8 = b'-';
/// From the store: all is done.
pub(super) const DONE: u8 = b'+';

/// The longest message.
const MOST_BYTES: usize = 256;

/// One message.
#[derive(Debug)]
pub(super) struct Message {
    pub kind: u8,
    pub name: String,
    pub fds: Vec<OwnedFd>,
}

/// Sends a message. When this returns the descriptors are safe: what the other end has not read yet outlives this one.
pub(super) fn send(
    socket: &UnixStream,
    kind: u8,
    name: &str,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if name.len() >= MOST_BYTES || fds.len() > rights::MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let kind = [kind];
    let bytes = [IoSlice::new(&kind), IoSlice::new(name.as_bytes())];
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights: &[_] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(socket.as_raw_fd(), &bytes, rights, flags, None) {
            Err(Errno::EINTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// The next message; `None`: the other end is gone.
pub(super) fn receive(socket: &UnixStream) -> io::Result<Option<Message>> {
    let mut buffer = [0; MOST_BYTES];
    let (len, fds) = loop {
        match rights::receive(socket, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It ended without reading all that it was told, which is said once and first: what it has told comes after that, and then its end.
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {}
            other => break other?,
        }
    };
    let Some((kind, name)) = buffer.get(..len).and_then(<[u8]>::split_first) else {
        return Ok(None);
    };
    let name = String::from_utf8_lossy(name).into_owned();
    Ok(Some(Message {
        kind: *kind,
        name,
        fds,
    }))
}

/// Whether the process at the other end is the same user's.
pub(super) fn is_own(socket: &UnixStream) -> bool {
    getsockopt(&socket.as_fd(), sockopt::PeerCredentials)
        .is_ok_and(|peer| peer.uid() == geteuid().as_raw())
}
