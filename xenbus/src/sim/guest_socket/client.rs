//! The guest's end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::connection::{Answer, Connection, Details, malformed};
use super::protocol::{Extent, RequestKind};
use crate::platform::XenError;
use crate::sim::evtchn::GuestEnd;
use crate::sim::grants::{MappedPage, check_page};
use crate::sim::guest::{
    EndEvent, GrantedPage, GuestPlatform, GuestPort, GuestWindow, WindowAccess,
};
use crate::sim::windows::opening;
use crate::sim::{BarSpace, DmaMemory, WindowArea};
use crate::types::{DomId, GrantRef, Pirq, Port};
use crate::xenstore;

/// A guest in a process of its own.
#[derive(Debug)]
pub struct SocketGuest {
    connection: Arc<Connection>,
    domain: DomId,
}

impl SocketGuest {
    /// Connects to a machine's `machine.sock` and becomes one of its domains.
    ///
    /// # Errors
    /// ESRCH when the machine has no such domain; otherwise why it could not be reached.
    pub fn connect(machine_sock: impl AsRef<Path>, domain: DomId) -> Result<Self, XenError> {
        let connection = Arc::new(Connection::open(machine_sock.as_ref(), domain)?);
        Ok(Self { connection, domain })
    }

    fn request(
        &self,
        kind: RequestKind,
        argument: u32,
        operation: impl Fn() -> String,
    ) -> Result<Answer, XenError> {
        self.connection.request(kind, argument, operation)
    }
}

/// A window that this guest has open.
#[derive(Debug)]
struct SocketWindow {
    connection: Arc<Connection>,
    number: u32,
}

impl WindowAccess for SocketWindow {
    fn read(&self, offset: u64, width: u8) -> io::Result<u64> {
        let words = [offset, width.into()];
        let details = Details {
            argument: self.number,
            more: words.as_bytes(),
            descriptor: None,
        };
        let answer = self.connection.ask(RequestKind::ReadWindow, details)?;
        u64::read_from_bytes(&answer.more).map_err(|_| malformed("no value in a reply"))
    }

    fn write(&self, offset: u64, width: u8, value: u64) -> io::Result<()> {
        let words = [offset, width.into(), value];
        let details = Details {
            argument: self.number,
            more: words.as_bytes(),
            descriptor: None,
        };
        self.connection
            .ask(RequestKind::WriteWindow, details)
            .map(drop)
    }
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
        let stream = answer.and_then(|answer| exactly::<1>(answer.descriptors, operation));
        let [stream] = stream.map_err(|error| xenstore::Error::Unreachable {
            tried: "the machine's socket".to_owned(),
            source: io::Error::other(error),
        })?;
        xenstore::Client::from_stream(UnixStream::from(stream))
    }

    fn grant_page(&self, to: DomId) -> Result<GrantedPage, XenError> {
        let operation = || format!("granting a page to domain {to}");
        let answer = self.request(RequestKind::GrantPage, to.0.into(), operation)?;
        let [page] = exactly(answer.descriptors, operation)?;
        let mapped = check_page(page.as_fd()).and_then(|()| MappedPage::new(&page));
        let page = mapped.map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        Ok(GrantedPage {
            reference: GrantRef(answer.value),
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
        let answer = self.request(RequestKind::AllocUnbound, remote.0.into(), operation)?;
        let [event, notify] = exactly(answer.descriptors, operation)?;
        Ok(GuestPort(GuestEnd {
            port: Port(answer.value),
            event,
            notify,
        }))
    }

    fn bind_pirq(&self, pirq: Pirq) -> Result<GuestPort, XenError> {
        let operation = || format!("EVTCHNOP_bind_pirq of PIRQ {pirq}");
        let answer = self.request(RequestKind::BindPirq, pirq.0, operation)?;
        let [event] = exactly(answer.descriptors, operation)?;
        let notify = event.try_clone().map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        Ok(GuestPort(GuestEnd {
            port: Port(answer.value),
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

    fn end_of_interrupt(&self, pirq: Pirq) -> Result<(), XenError> {
        self.request(RequestKind::EndOfInterrupt, pirq.0, || {
            format!("PHYSDEVOP_eoi of PIRQ {pirq}")
        })
        .map(drop)
    }

    fn end_event(&self, pirq: Pirq) -> Result<EndEvent, XenError> {
        let operation = || format!("an eventfd for the ends of PIRQ {pirq}");
        let answer = self.request(RequestKind::EndEvent, pirq.0, operation)?;
        let [event] = exactly(answer.descriptors, operation)?;
        Ok(EndEvent(event))
    }

    fn give_memory(&self, memory: DmaMemory) -> Result<(), XenError> {
        let words = [memory.address, memory.size, memory.offset];
        let details = Details {
            more: words.as_bytes(),
            descriptor: Some(memory.file.as_fd()),
            ..Details::default()
        };
        let operation = || format!("giving memory for DMA at {:#x}", memory.address);
        let kind = RequestKind::GiveMemory;
        self.connection
            .request_with(kind, details, operation)
            .map(drop)
    }

    fn take_memory(&self, address: u64) -> Result<(), XenError> {
        let details = Details {
            more: address.as_bytes(),
            ..Details::default()
        };
        let operation = || format!("taking memory for DMA at {address:#x} back");
        let kind = RequestKind::TakeMemory;
        self.connection
            .request_with(kind, details, operation)
            .map(drop)
    }

    fn open_window(&self, space: BarSpace, address: u64) -> Result<GuestWindow, XenError> {
        let details = Details {
            argument: space as u32,
            more: address.as_bytes(),
            descriptor: None,
        };
        let operation = || opening(space, address);
        let kind = RequestKind::OpenWindow;
        let answer = self.connection.request_with(kind, details, operation)?;
        let access = SocketWindow {
            connection: Arc::clone(&self.connection),
            number: answer.value,
        };
        let window = areas(&answer.more, answer.descriptors);
        let (window, areas) = window.map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })?;
        Ok(GuestWindow {
            address: window.start,
            size: window.size,
            areas,
            access: Box::new(access),
        })
    }

    fn shut_down(&self) -> Result<(), XenError> {
        self.request(RequestKind::ShutDown, 0, || "SCHEDOP_shutdown".to_owned())
            .map(drop)
    }
}

/// A window, and which areas of it may be mapped.
fn areas(more: &[u8], descriptors: Vec<OwnedFd>) -> io::Result<(Extent, Vec<WindowArea>)> {
    let (chunks, rest) = more.as_chunks::<{ size_of::<Extent>() }>();
    let extents: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| Extent::read_from_bytes(chunk).ok())
        .collect();
    if !rest.is_empty() {
        return Err(malformed("not a window"));
    }
    let (window, parts) = extents.split_first().ok_or(malformed("no window"))?;
    if parts.len() != descriptors.len() {
        return Err(malformed("a window whose areas are without descriptors"));
    }
    let area = |(part, file): (&Extent, OwnedFd)| WindowArea {
        start: part.start,
        size: part.size,
        file,
        offset: part.offset,
    };
    Ok((*window, parts.iter().zip(descriptors).map(area).collect()))
}
