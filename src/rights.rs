//! Descriptors that come with the messages of a unix socket (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// The most descriptors that Linux lets come with one message (`SCM_MAX_FD`).
pub(crate) const MOST: usize = 253;

/// The next bytes, and the descriptors that have come with them; no bytes at the end of the connection.
///
/// # Errors
/// The socket's; ENOBUFS: this process may not open as many descriptors.
pub(crate) fn receive(
    socket: &impl AsRawFd,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MOST]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for raw in fds {
                // SAFETY: the kernel has just made this descriptor for us; nobody else knows of it.
                received.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, received))
}
