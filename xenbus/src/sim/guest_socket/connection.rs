//! The client's end of a connection: requests and their replies.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, socket,
};
use zerocopy::{FromBytes, IntoBytes};

use super::protocol::{LONGEST_REPLY, MOST_DESCRIPTORS, Reply, Request, RequestKind};
use crate::platform::XenError;
use crate::sim::lock;
use crate::types::DomId;

/// A connection to a machine.
#[derive(Debug)]
pub struct Connection {
    socket: Mutex<OwnedFd>,
}

/// What a reply holds.
pub struct Answer {
    pub value: u32,
    pub more: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// What a request says besides its kind.
#[derive(Default)]
pub struct Details<'a> {
    pub argument: u32,
    pub more: &'a [u8],
    pub descriptor: Option<BorrowedFd<'a>>,
}

impl Connection {
    /// Connects, and becomes a domain.
    ///
    /// # Errors
    /// ESRCH when the machine has no such domain; otherwise why it could not be reached.
    pub fn open(path: &Path, domain: DomId) -> Result<Self, XenError> {
        let open = || -> io::Result<OwnedFd> {
            let socket = socket(
                AddressFamily::Unix,
                SockType::SeqPacket,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        };
        let socket = open().map_err(|source| XenError::Failed {
            operation: format!("connecting to the machine at {}", path.display()),
            source,
        })?;
        let connection = Self {
            socket: Mutex::new(socket),
        };
        connection.request(RequestKind::Become, domain.0.into(), || {
            format!("becoming domain {domain}")
        })?;
        Ok(connection)
    }

    /// Asks for something that takes an argument at most.
    ///
    /// # Errors
    /// The machine's, or the connection's.
    pub fn request(
        &self,
        kind: RequestKind,
        argument: u32,
        operation: impl Fn() -> String,
    ) -> Result<Answer, XenError> {
        let details = Details {
            argument,
            ..Details::default()
        };
        self.request_with(kind, details, operation)
    }

    /// Asks for something.
    ///
    /// # Errors
    /// As [`Connection::request`].
    pub fn request_with(
        &self,
        kind: RequestKind,
        details: Details<'_>,
        operation: impl Fn() -> String,
    ) -> Result<Answer, XenError> {
        self.ask(kind, details).map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })
    }

    /// As [`Connection::request_with`], without words.
    ///
    /// # Errors
    /// As [`Connection::request`].
    pub fn ask(&self, kind: RequestKind, details: Details<'_>) -> io::Result<Answer> {
        let head = Request {
            kind: kind as u32,
            argument: details.argument,
        };
        let socket = lock(&self.socket);
        send(&socket, head, &details)?;
        loop {
            match receive(&socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

fn send(socket: &OwnedFd, head: Request, details: &Details<'_>) -> io::Result<()> {
    let raw: Vec<_> = details.descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let parts = [IoSlice::new(head.as_bytes()), IoSlice::new(details.more)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    while let Err(errno) = sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, control, flags, None) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    Ok(())
}

/// A reply that is not as it should be.
pub fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn receive(socket: &OwnedFd) -> io::Result<Answer> {
    let mut packet = [0; LONGEST_REPLY];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; MOST_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            descriptors.extend(
                received
                    .into_iter()
                    .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
            );
        }
    }
    let count = message.bytes;
    if count == 0 {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let reply = packet
        .get(..count)
        .and_then(|bytes| Reply::read_from_prefix(bytes).ok());
    let (reply, more) = reply.ok_or(malformed("not a reply of an embedded machine"))?;
    match reply.errno {
        0 => Ok(Answer {
            value: reply.value,
            more: more.to_vec(),
            descriptors,
        }),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
