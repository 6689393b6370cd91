//! A guest's IOREQ servers, and which of them a request goes to (Xen `common/ioreq.c`).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::ranges::Ranges;
use crate::device_model::{IoRange, IoSpace, IoreqServerId};
use crate::ioreq::{Flags, Ioreq, IoreqPage, Kind, SLOTS, State};
use crate::sim::evtchn::{GuestEnd, Ports, signal};
use crate::sim::grants::{MappedPage, new_page};
use crate::types::{DomId, Port};

/// Servers that a guest can have.
const MOST_SERVERS: usize = 8;

/// The bit of port 0xcf8 that makes 0xcfc an access to configuration space.
const CONFIG_ENABLED: u32 = 1 << 31;

/// The page of requests, once somebody has asked for it.
#[derive(Debug)]
struct Page {
    file: OwnedFd,
    /// Xen's own view.
    view: Arc<IoreqPage>,
}

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    pub enabled: bool,
    ports: Vec<Arc<GuestEnd>>,
    /// [`IoSpace`] is the index.
    ranges: [Ranges; 3],
    page: Option<Page>,
}

/// A CPU's part of a server: what it needs to wait for an answer.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub page: Arc<IoreqPage>,
    pub index: usize,
    pub port: Arc<GuestEnd>,
}

/// All servers. A server's number is its place.
#[derive(Debug, Default)]
pub(super) struct Servers([Option<Server>; MOST_SERVERS]);

impl Servers {
    /// Makes one.
    ///
    /// # Errors
    /// ENOSPC when there are as many as there may be.
    pub fn create(&mut self, vcpus: u32, ports: &mut Ports) -> Result<IoreqServerId, Errno> {
        let free = self
            .0
            .iter_mut()
            .zip(0..)
            .find(|(server, _)| server.is_none());
        let (place, id) = free.ok_or(Errno::ENOSPC)?;
        let ports: Result<_, _> = (0..vcpus)
            .map(|_| ports.alloc_unbound(DomId::DOM0).map(Arc::new))
            .collect();
        *place = Some(Server {
            enabled: false,
            ports: ports?,
            ranges: Default::default(),
            page: None,
        });
        Ok(IoreqServerId(id))
    }

    /// Ends one. CPUs that wait for it go on.
    ///
    /// # Errors
    /// ENOENT.
    pub fn destroy(&mut self, id: IoreqServerId, ports: &mut Ports) -> Result<(), Errno> {
        let place = self.0.get_mut(usize::from(id.0)).ok_or(Errno::ENOENT)?;
        let server = place.take().ok_or(Errno::ENOENT)?;
        server.end();
        for end in &server.ports {
            ports.close(end.port)?;
        }
        Ok(())
    }

    /// Ends all, with their guest.
    pub fn clear(&mut self) {
        for server in &mut self.0 {
            if let Some(server) = server.take() {
                server.end();
            }
        }
    }

    /// # Errors
    /// ENOENT.
    pub fn get_mut(&mut self, id: IoreqServerId) -> Result<&mut Server, Errno> {
        let place = self.0.get_mut(usize::from(id.0)).ok_or(Errno::ENOENT)?;
        place.as_mut().ok_or(Errno::ENOENT)
    }

    /// # Errors
    /// ENOENT.
    pub fn get(&self, id: IoreqServerId) -> Result<&Server, Errno> {
        let place = self.0.get(usize::from(id.0)).ok_or(Errno::ENOENT)?;
        place.as_ref().ok_or(Errno::ENOENT)
    }

    /// The server that a request goes to: of those that have claimed all of it the one with the highest number. An access to port 0xcfc
    /// becomes one to configuration space for a server that has claimed the function.
    pub fn select(&self, request: &mut Ioreq, config_address: u32) -> Option<&Server> {
        let config = config_access(request, config_address);
        let range = match config {
            Some(address) => IoRange {
                space: IoSpace::Config,
                first: address >> 32,
                last: address >> 32,
            },
            None => accessed(request)?,
        };
        let server = self.enabled().rfind(|server| server.claims(&range))?;
        if let Some(address) = config {
            request.kind = Kind::Config as u8;
            request.addr = address;
        }
        Some(server)
    }

    /// Those that broadcasts go to.
    pub fn enabled(&self) -> impl DoubleEndedIterator<Item = &Server> {
        self.0.iter().flatten().filter(|server| server.enabled)
    }
}

/// The address of an access to configuration space: function in bits 63:32, register in bits 31:0.
fn config_access(request: &Ioreq, config_address: u32) -> Option<u64> {
    let is_data = request.kind == Kind::Port as u8 && request.addr & !3 == 0xcfc;
    if !is_data || config_address & CONFIG_ENABLED == 0 {
        return None;
    }
    let function = u64::from(config_address >> 8 & 0xffff);
    let register = u64::from(config_address & 0xfc) | (request.addr & 3);
    Some(function << 32 | register)
}

/// All addresses that a request is about. `None`: they do not exist.
fn accessed(request: &Ioreq) -> Option<IoRange> {
    let size = u64::from(request.size);
    let (space, first, bytes) = match Kind::from_wire(request.kind)? {
        Kind::Port => (IoSpace::Port, request.addr, size),
        Kind::Memory => {
            let following = u64::from(request.count).checked_sub(1)?.checked_mul(size)?;
            let first = if request.flags().contains(Flags::DESCENDING) {
                request.addr.checked_sub(following)?
            } else {
                request.addr
            };
            (IoSpace::Memory, first, following.checked_add(size)?)
        }
        _ => return None,
    };
    let last = first.checked_add(bytes.checked_sub(1)?)?;
    Some(IoRange { space, first, last })
}

impl Server {
    pub fn ranges(&mut self, space: IoSpace) -> Option<&mut Ranges> {
        self.ranges.get_mut(space as usize)
    }

    fn claims(&self, range: &IoRange) -> bool {
        let ranges = self.ranges.get(range.space as usize);
        ranges.is_some_and(|ranges| ranges.contain(range.first, range.last))
    }

    /// What it has claimed.
    pub fn claimed(&self) -> Vec<IoRange> {
        let spaces = [IoSpace::Port, IoSpace::Memory, IoSpace::Config];
        let ranges = spaces.into_iter().zip(&self.ranges);
        let each = ranges.flat_map(|(space, ranges)| {
            ranges
                .iter()
                .map(move |(first, last)| IoRange { space, first, last })
        });
        each.collect()
    }

    /// Xen puts the numbers of ports into the page. Only into one that is there.
    pub fn enable(&mut self) {
        self.enabled = true;
        let Some(page) = &self.page else { return };
        for (index, end) in self.ports.iter().enumerate() {
            page.view.set_port(index, end.port);
        }
    }

    /// Maps the page, which is made now if it is not there yet.
    ///
    /// # Errors
    /// EPERM: the server was enabled without, so that Xen has given it another page. ENOMEM.
    pub fn map_page(&mut self) -> Result<MappedPage, Errno> {
        let page = match &mut self.page {
            Some(page) => page,
            None if self.enabled => return Err(Errno::EPERM),
            None => {
                let file = new_page().map_err(|_| Errno::ENOMEM)?;
                let view = MappedPage::new(&file).map_err(|_| Errno::ENOMEM)?;
                let view = Arc::new(IoreqPage::new(Box::new(view)));
                self.page.insert(Page { file, view })
            }
        };
        MappedPage::new(&page.file).map_err(|_| Errno::ENOMEM)
    }

    /// A CPU's slot. `None` when the server can take no requests.
    pub fn slot(&self, vcpu: u32) -> Option<Slot> {
        let index = usize::try_from(vcpu).ok()?;
        Some(Slot {
            page: Arc::clone(&self.page.as_ref()?.view),
            index,
            port: Arc::clone(self.ports.get(index)?),
        })
    }

    fn end(&self) {
        if let Some(page) = &self.page {
            for index in 0..SLOTS {
                page.view.set_state(index, State::None);
            }
        }
        for end in &self.ports {
            // Whoever waits finds its slot empty.
            let _ = signal(&end.event);
        }
    }
}

impl Slot {
    /// Hands a request to the server. False: the slot is not as Xen left it, or is still in use.
    pub fn send(&self, request: &Ioreq) -> bool {
        let Self { page, index, port } = self;
        let as_left = page.state(*index) == Some(State::None) && page.port(*index) == self.number();
        if as_left {
            page.put(*index, request);
            page.set_state(*index, State::Ready);
            // An eventfd of ours.
            let _ = signal(&port.notify);
        }
        as_left
    }

    fn number(&self) -> Port {
        self.port.port
    }
}
