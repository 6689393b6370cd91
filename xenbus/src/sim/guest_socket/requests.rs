//! What a connection may ask for, carried out.

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, IntoBytes};

use super::protocol::{Extent, LONGEST_NAME, MOST_DESCRIPTORS, Request, RequestKind, space};
use crate::platform::XenError;
use crate::sim::guest::WindowAccess;
use crate::sim::windows::OpenWindow;
use crate::sim::{BarSpace, DmaMemory, DomainKind, Machine, PciOptions, ToolstackError};
use crate::types::{DomId, GrantRef, PciDevice, Pirq, Port};

/// Windows that a connection may have open: more than a guest's devices have BARs.
const MOST_WINDOWS: usize = 256;

/// What a reply holds besides success: a number, further bytes, and descriptors.
#[derive(Default)]
pub struct Answer {
    pub value: u32,
    pub more: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Answer {
    fn number(value: u32) -> Self {
        Self {
            value,
            ..Self::default()
        }
    }

    fn with(value: u32, descriptors: Vec<OwnedFd>) -> Self {
        Self {
            value,
            descriptors,
            ..Self::default()
        }
    }
}

/// Whose a connection is, and what it has opened.
#[derive(Default)]
pub struct Client {
    domain: Option<DomId>,
    windows: Vec<OpenWindow>,
}

/// A request as it came: its head, what followed, and the descriptor that came with it.
pub struct Packet<'a> {
    head: Request,
    more: &'a [u8],
    descriptor: Option<OwnedFd>,
}

impl<'a> Packet<'a> {
    /// `None` for what is shorter than a head.
    pub fn new(bytes: &'a [u8], descriptor: Option<OwnedFd>) -> Option<Self> {
        let (head, more) = Request::read_from_prefix(bytes).ok()?;
        Some(Self {
            head,
            more,
            descriptor,
        })
    }

    fn refused(&self, errno: i32) -> XenError {
        XenError::from_errno(format!("request {} of a guest", self.head.kind), errno)
    }

    /// The numbers that follow the head: as many as the request has, and the rest 0.
    fn numbers(&self, kind: RequestKind) -> Result<[u64; 3], XenError> {
        let mut numbers = [0; 3];
        let (words, rest) = self.more.as_chunks();
        if words.len() != kind.numbers() || !rest.is_empty() {
            return Err(self.refused(libc::EINVAL));
        }
        for (number, word) in numbers.iter_mut().zip(words) {
            *number = u64::from_ne_bytes(*word);
        }
        Ok(numbers)
    }

    fn domain(&self, number: u32) -> Result<DomId, XenError> {
        u16::try_from(number)
            .map(DomId)
            .map_err(|_| self.refused(libc::EINVAL))
    }
}

impl Client {
    /// Carries a request out.
    ///
    /// # Errors
    /// Its errno is the reply's.
    pub fn carry_out(
        &mut self,
        machine: &Machine,
        mut packet: Packet<'_>,
    ) -> Result<Answer, XenError> {
        let kind = RequestKind::from_number(packet.head.kind)
            .ok_or_else(|| packet.refused(libc::ENOSYS))?;
        if kind == RequestKind::Become {
            return self.become_domain(machine, &packet);
        }
        let domain = self.domain.ok_or_else(|| packet.refused(libc::ENOTCONN))?;
        if kind.is_toolstacks() {
            if domain != DomId::DOM0 {
                return Err(packet.refused(libc::EPERM));
            }
            return toolstack(machine, kind, &packet);
        }
        let numbers = packet.numbers(kind)?;
        let [first, second, third] = numbers;
        let argument = packet.head.argument;
        match kind {
            RequestKind::ConnectXenstore => {
                if domain != DomId::DOM0 {
                    machine.check_alive(domain)?;
                }
                let stream = machine
                    .stream_as(domain)
                    .map_err(|_| packet.refused(libc::EMFILE))?;
                Ok(Answer::with(0, vec![stream.into()]))
            }
            RequestKind::GrantPage => {
                let (reference, page) = machine.grant_page(domain, packet.domain(argument)?)?;
                Ok(Answer::with(reference.0, vec![page]))
            }
            RequestKind::EndGrant => done(machine.end_grant(domain, GrantRef(argument))),
            RequestKind::AllocUnbound => {
                let end = machine.alloc_unbound(domain, packet.domain(argument)?)?;
                Ok(Answer::with(end.port.0, vec![end.event, end.notify]))
            }
            RequestKind::BindPirq => {
                let end = machine.bind_pirq(domain, Pirq(argument))?;
                Ok(Answer::with(end.port.0, vec![end.event]))
            }
            RequestKind::ClosePort => done(machine.close_port(domain, Port(argument))),
            RequestKind::ShutDown => done(machine.domain_shut_down(domain)),
            RequestKind::EndOfInterrupt => done(machine.end_of_interrupt(domain, Pirq(argument))),
            RequestKind::EndEvent => {
                let event = machine.end_event(domain, Pirq(argument))?;
                Ok(Answer::with(0, vec![event]))
            }
            RequestKind::GiveMemory => {
                let file = packet.descriptor.take();
                let memory = DmaMemory {
                    address: first,
                    size: second,
                    offset: third,
                    file: file.ok_or_else(|| packet.refused(libc::EINVAL))?,
                };
                done(machine.give_memory(domain, memory))
            }
            RequestKind::TakeMemory => done(machine.take_memory(domain, first)),
            RequestKind::OpenWindow => {
                let space = space(argument).ok_or_else(|| packet.refused(libc::EINVAL))?;
                self.open_window(machine, domain, space, first)
            }
            RequestKind::ReadWindow => {
                let window = self.window(&packet)?;
                let value = window.read(first, width(second)).map_err(failed)?;
                Ok(Answer {
                    more: value.as_bytes().to_vec(),
                    ..Answer::default()
                })
            }
            RequestKind::WriteWindow => {
                let window = self.window(&packet)?;
                done(window.write(first, width(second), third).map_err(failed))
            }
            RequestKind::Become
            | RequestKind::CreateDomain
            | RequestKind::AttachDevice
            | RequestKind::DetachDevice
            | RequestKind::Unpause
            | RequestKind::Destroy => Err(packet.refused(libc::EINVAL)),
        }
    }

    fn become_domain(
        &mut self,
        machine: &Machine,
        packet: &Packet<'_>,
    ) -> Result<Answer, XenError> {
        packet.numbers(RequestKind::Become)?;
        if self.domain.is_some() {
            return Err(packet.refused(libc::EISCONN));
        }
        let wanted = packet.domain(packet.head.argument)?;
        if wanted != DomId::DOM0 {
            machine.check_alive(wanted)?;
        }
        self.domain = Some(wanted);
        Ok(Answer::number(packet.head.argument))
    }

    fn window(&self, packet: &Packet<'_>) -> Result<&OpenWindow, XenError> {
        let number = usize::try_from(packet.head.argument).ok();
        let window = number.and_then(|number| self.windows.get(number));
        window.ok_or_else(|| packet.refused(libc::EINVAL))
    }

    fn open_window(
        &mut self,
        machine: &Machine,
        domain: DomId,
        space: BarSpace,
        address: u64,
    ) -> Result<Answer, XenError> {
        let open = machine.open_window(domain, space, address)?;
        let known = self.windows.iter().position(|other| other.is_same(&open));
        let number = known.unwrap_or(self.windows.len());
        if number >= MOST_WINDOWS {
            return Err(failed(std::io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        let mut areas = open.areas().map_err(failed)?;
        // What is left out is reached all the same, one access at a time.
        areas.truncate(MOST_DESCRIPTORS);
        let window = Extent {
            start: open.window.address,
            size: open.window.size,
            offset: 0,
        };
        let mut more = window.as_bytes().to_vec();
        for area in &areas {
            let extent = Extent {
                start: area.start,
                size: area.size,
                offset: area.offset,
            };
            more.extend_from_slice(extent.as_bytes());
        }
        if known.is_none() {
            self.windows.push(open);
        }
        Ok(Answer {
            value: u32::try_from(number).unwrap_or(u32::MAX),
            more,
            descriptors: areas.into_iter().map(|area| area.file).collect(),
        })
    }
}

/// dom0's requests.
fn toolstack(
    machine: &Machine,
    kind: RequestKind,
    packet: &Packet<'_>,
) -> Result<Answer, XenError> {
    if kind == RequestKind::CreateDomain {
        let name = std::str::from_utf8(packet.more).ok();
        let is_plain = |name: &&str| {
            (1..=LONGEST_NAME).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_graphic() && byte != b'/')
        };
        let name = name.filter(is_plain);
        let name = name.ok_or_else(|| packet.refused(libc::EINVAL))?;
        let domain = machine.create_domain(name, DomainKind::Pv);
        return Ok(Answer::number(domain.map_err(toolstack_failed)?.0.into()));
    }
    let [device, ..] = packet.numbers(kind)?;
    let [devfn, bus, segment @ ..] = device.to_le_bytes();
    let [low, high, rest @ ..] = segment;
    if rest != [0; 4] {
        return Err(packet.refused(libc::EINVAL));
    }
    let device = PciDevice {
        segment: u16::from_le_bytes([low, high]),
        bus,
        devfn,
    };
    let domain = packet.domain(packet.head.argument)?;
    let result = match kind {
        RequestKind::AttachDevice => machine.pci_attach(domain, device, &PciOptions::default()),
        RequestKind::DetachDevice => machine.pci_detach(domain, device),
        RequestKind::Unpause => machine.unpause_domain(domain),
        RequestKind::Destroy => machine.destroy_domain(domain),
        _ => return Err(packet.refused(libc::ENOSYS)),
    };
    done(result.map_err(toolstack_failed))
}

fn done(result: Result<(), XenError>) -> Result<Answer, XenError> {
    result.map(|()| Answer::default())
}

/// No width is that large: where it matters, a width is checked.
fn width(number: u64) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

fn failed(source: std::io::Error) -> XenError {
    XenError::Failed {
        operation: "reaching what a device's BAR decodes".to_owned(),
        source,
    }
}

/// The errno that says best what a toolstack says in words.
fn toolstack_failed(error: ToolstackError) -> XenError {
    log::info!("the embedded machine's toolstack: {error}");
    match error {
        ToolstackError::Xen(error) => error,
        ToolstackError::Attached { .. } => XenError::from_errno("attaching", libc::EBUSY),
        ToolstackError::NotAttached { .. } => XenError::from_errno("detaching", libc::ENODEV),
        ToolstackError::BackendNotReady { .. } | ToolstackError::DiskNotReady { .. } => {
            XenError::from_errno("waiting for the backend", libc::ETIMEDOUT)
        }
        ToolstackError::Xenstore(_) => XenError::from_errno("using xenstore", libc::EIO),
    }
}
