//! The bytes' way to xenstored and back: a unix socket, or the kernel's device.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};

use super::wire::{HEADER_SIZE, PAYLOAD_MAX};

/// Which of the two it is. They differ in writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Socket,
    /// `/dev/xen/xenbus`. Takes a message in one write, and never says that it can be written to.
    /// Requests that the kernel itself refuses fail in that write.
    Device,
}

/// An open, non-blocking connection.
#[derive(Debug)]
pub(super) struct Transport {
    fd: OwnedFd,
    pub(super) kind: Kind,
    /// Path of the socket or device, for messages.
    pub(super) peer: String,
}

impl Transport {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let peer = path.display().to_string();
        let file_type = std::fs::metadata(path)?.file_type();
        if file_type.is_socket() {
            return Self::from_stream(UnixStream::connect(path)?, peer);
        }
        if !file_type.is_char_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a socket nor a device",
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        Ok(Self {
            fd: file.into(),
            kind: Kind::Device,
            peer,
        })
    }

    pub(super) fn from_stream(stream: UnixStream, peer: String) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            fd: stream.into(),
            kind: Kind::Socket,
            peer,
        })
    }

    /// The longest message, header included, in bytes.
    pub(super) fn longest_message(&self) -> usize {
        match self.kind {
            Kind::Socket => HEADER_SIZE.saturating_add(PAYLOAD_MAX),
            // The kernel's buffer is as long as the longest payload, but holds the header too.
            Kind::Device => PAYLOAD_MAX,
        }
    }

    /// Writes what fits; `WouldBlock` when nothing does.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let result = match self.kind {
                Kind::Socket => send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL),
                Kind::Device => nix::unistd::write(&self.fd, bytes),
            };
            match result {
                Err(Errno::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Reads what is there; `WouldBlock` when nothing is, 0 at the end of the stream.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::read(&self.fd, buffer) {
                Err(Errno::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Waits until there is something to read, or (`writing`) space to write; false when the
    /// deadline has passed.
    pub(super) fn wait(&self, writing: bool, deadline: Instant) -> io::Result<bool> {
        let flags = if writing {
            PollFlags::POLLIN | PollFlags::POLLOUT
        } else {
            PollFlags::POLLIN
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // Rounded up, so that the last fraction of a millisecond is not spent spinning.
            let left = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), flags)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
