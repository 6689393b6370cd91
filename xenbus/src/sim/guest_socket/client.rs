//! The guest's end.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};
use zerocopy::{FromBytes, IntoBytes};

use super::protocol::{MOST_DESCRIPTORS, Reply, Request, RequestKind};
use crate::platform::XenError;
use crate::sim::evtchn::GuestEnd;
use crate::sim::grants::{MappedPage, check_page};
use crate::sim::guest::{GrantedPage, GuestPlatform, GuestPort};
use crate::sim::lock;
use crate::types::{DomId, GrantRef, Pirq, Port};
use crate::xenstore;

/// A guest in a process of its own.
#[derive(Debug)]
pub struct SocketGuest {
    socket: Mutex<OwnedFd>,
    domain: DomId,
}

/// A reply's number and descriptors.
type Answer = (u32, Vec<OwnedFd>);

impl SocketGuest {
    /// Connects to a machine's `machine.sock` and becomes one of its domains.
    ///
    /// # Errors
    /// ESRCH when the machine has no such domain; otherwise why it could not be reached.
    pub fn connect(machine_sock: impl AsRef<Path>, domain: DomId) -> Result<Self, XenError> {
        let path = machine_sock.as_ref();
        let operation = || format!("connecting to the machine at {}", path.display());
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
            operation: operation(),
            source,
        })?;
        let guest = Self {
            socket: Mutex::new(socket),
            domain,
        };
        guest.request(RequestKind::Become, domain.0.into(), || {
            format!("becoming domain {domain}")
        })?;
        Ok(guest)
    }

    fn request(
        &self,
        kind: RequestKind,
        argument: u32,
        operation: impl Fn() -> String,
    ) -> Result<Answer, XenError> {
        let socket = lock(&self.socket);
        let request = Request {
            kind: kind as u32,
            argument,
        };
        let exchanged = exchange(&socket, request).map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        let (reply, descriptors) = exchanged;
        match reply.errno {
            0 => Ok((reply.value, descriptors)),
            errno => Err(XenError::from_errno(operation(), errno)),
        }
    }
}

fn exchange(socket: &OwnedFd, request: Request) -> io::Result<(Reply, Vec<OwnedFd>)> {
    while let Err(errno) = send(
        socket.as_raw_fd(),
        request.as_bytes(),
        MsgFlags::MSG_NOSIGNAL,
    ) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    loop {
        match receive(socket) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn receive(socket: &OwnedFd) -> io::Result<(Reply, Vec<OwnedFd>)> {
    let mut packet = [0; size_of::<Reply>()];
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
        .and_then(|bytes| Reply::read_from_bytes(bytes).ok());
    let reply = reply.ok_or(io::Error::new(
        io::ErrorKind::InvalidData,
        "not a reply of an embedded machine",
    ))?;
    Ok((reply, descriptors))
}

/// The descriptors that a reply has to come with.
fn exactly<const N: usize>(
    descriptors: Vec<OwnedFd>,
    operation: impl Fn() -> String,
) -> Result<[OwnedFd; N], XenError> {
    descriptors.try_into().map_err(|_| {
        let source = io::Error::new(
            io::ErrorKind::InvalidData,
            "the machine's reply came without its descriptors",
        );
        XenError::Failed {
            operation: operation(),
            source,
        }
    })
}

impl GuestPlatform for SocketGuest {
    fn domain(&self) -> DomId {
        self.domain
    }

    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error> {
        let operation = || "connecting to xenstored".to_owned();
        let answer = self.request(RequestKind::ConnectXenstore, 0, operation);
        let stream = answer.and_then(|(_, descriptors)| exactly::<1>(descriptors, operation));
        let [stream] = stream.map_err(|error| xenstore::Error::Unreachable {
            tried: "the machine's socket".to_owned(),
            source: io::Error::other(error),
        })?;
        xenstore::Client::from_stream(UnixStream::from(stream))
    }

    fn grant_page(&self, to: DomId) -> Result<GrantedPage, XenError> {
        let operation = || format!("granting a page to domain {to}");
        let (reference, descriptors) =
            self.request(RequestKind::GrantPage, to.0.into(), operation)?;
        let [page] = exactly(descriptors, operation)?;
        let mapped = check_page(page.as_fd()).and_then(|()| MappedPage::new(&page));
        let page = mapped.map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        Ok(GrantedPage {
            reference: GrantRef(reference),
            page,
        })
    }

    fn end_grant(&self, reference: GrantRef) -> Result<(), XenError> {
        self.request(RequestKind::EndGrant, reference.0, || {
            format!("ending grant {reference}")
        })
        .map(drop)
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<GuestPort, XenError> {
        let operation = || format!("EVTCHNOP_alloc_unbound for domain {remote}");
        let (port, descriptors) =
            self.request(RequestKind::AllocUnbound, remote.0.into(), operation)?;
        let [event, notify] = exactly(descriptors, operation)?;
        Ok(GuestPort(GuestEnd {
            port: Port(port),
            event,
            notify,
        }))
    }

    fn bind_pirq(&self, pirq: Pirq) -> Result<GuestPort, XenError> {
        let operation = || format!("EVTCHNOP_bind_pirq of PIRQ {pirq}");
        let (port, descriptors) = self.request(RequestKind::BindPirq, pirq.0, operation)?;
        let [event] = exactly(descriptors, operation)?;
        let notify = event.try_clone().map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        Ok(GuestPort(GuestEnd {
            port: Port(port),
            event,
            notify,
        }))
    }

    fn close_port(&self, port: Port) -> Result<(), XenError> {
        self.request(RequestKind::ClosePort, port.0, || {
            format!("EVTCHNOP_close of port {port}")
        })
        .map(drop)
    }

    fn shut_down(&self) -> Result<(), XenError> {
        self.request(RequestKind::ShutDown, 0, || "SCHEDOP_shutdown".to_owned())
            .map(drop)
    }
}
