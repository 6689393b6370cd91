//! Event channels as eventfds: one for each direction, so that an event is one system call and passes no third party.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::platform::EventPort;
use crate::types::{DomId, Pirq, Port};

/// Ports that a domain may have.
const MOST_PORTS: u32 = 1024;

pub(super) fn new_eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?)
}

/// Sets an event pending. Pending twice is pending once.
pub(super) fn signal(event: impl AsFd) -> io::Result<()> {
    match nix::unistd::write(event, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a pending event; false when there is none.
pub(super) fn take(event: impl AsFd) -> io::Result<bool> {
    match nix::unistd::read(event, &mut [0; 8]) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A channel between a guest, which made it, and the domain that it is for.
#[derive(Debug)]
pub(super) struct Channel {
    remote: DomId,
    to_guest: EventFd,
    to_remote: EventFd,
    /// The remote end exists.
    bound: AtomicBool,
}

/// What a port of a guest is.
#[derive(Debug)]
enum Use {
    Interdomain(Arc<Channel>),
    Pirq(Pirq),
}

/// What a guest needs of a port that it has made: one descriptor to wait on, and one to notify through.
#[derive(Debug)]
pub(super) struct GuestEnd {
    pub port: Port,
    /// Readable when the other end has notified.
    pub event: OwnedFd,
    /// Written to, to notify the other end. The same as `event` for a PIRQ, which nobody is notified through.
    pub notify: OwnedFd,
}

/// One domain's ports.
#[derive(Debug, Default)]
pub(super) struct Ports {
    ports: BTreeMap<Port, Use>,
}

impl Ports {
    fn free(&self) -> Result<Port, Errno> {
        (1..MOST_PORTS)
            .map(Port)
            .find(|port| !self.ports.contains_key(port))
            .ok_or(Errno::ENOSPC)
    }

    /// `EVTCHNOP_alloc_unbound`: makes a port for `remote` to bind.
    pub fn alloc_unbound(&mut self, remote: DomId) -> Result<GuestEnd, Errno> {
        let port = self.free()?;
        let make = || -> io::Result<_> {
            let (to_guest, to_remote) = (new_eventfd()?, new_eventfd()?);
            let end = GuestEnd {
                port,
                event: to_guest.as_fd().try_clone_to_owned()?,
                notify: to_remote.as_fd().try_clone_to_owned()?,
            };
            Ok((
                Channel {
                    remote,
                    to_guest,
                    to_remote,
                    bound: AtomicBool::new(false),
                },
                end,
            ))
        };
        let (channel, end) = make().map_err(|_| Errno::ENOMEM)?;
        self.ports.insert(port, Use::Interdomain(Arc::new(channel)));
        Ok(end)
    }

    /// `EVTCHNOP_bind_interdomain`, as `domain`.
    ///
    /// # Errors
    /// EINVAL when the port is not one that waits for `domain`.
    pub fn bind_interdomain(&mut self, port: Port, domain: DomId) -> Result<BoundPort, Errno> {
        let Some(Use::Interdomain(channel)) = self.ports.get(&port) else {
            return Err(Errno::EINVAL);
        };
        if channel.remote != domain || channel.bound.swap(true, Ordering::AcqRel) {
            return Err(Errno::EINVAL);
        }
        // From here on the channel is freed again by the drop.
        BoundPort::new(Arc::clone(channel)).map_err(|_| Errno::ENOMEM)
    }

    /// `EVTCHNOP_bind_pirq`'s part here: a port for a PIRQ.
    pub fn bind_pirq(&mut self, pirq: Pirq, event: &OwnedFd) -> Result<GuestEnd, Errno> {
        let port = self.free()?;
        let copy = || event.try_clone().map_err(|_| Errno::ENOMEM);
        let end = GuestEnd {
            port,
            event: copy()?,
            notify: copy()?,
        };
        self.ports.insert(port, Use::Pirq(pirq));
        Ok(end)
    }

    /// `EVTCHNOP_close`. Gives the PIRQ that the port was for.
    ///
    /// # Errors
    /// EINVAL when there is no such port.
    pub fn close(&mut self, port: Port) -> Result<Option<Pirq>, Errno> {
        match self.ports.remove(&port).ok_or(Errno::EINVAL)? {
            Use::Interdomain(_) => Ok(None),
            Use::Pirq(pirq) => Ok(Some(pirq)),
        }
    }
}

/// dom0's end of a channel, with the semantics of `/dev/xen/evtchn`: an event that is taken masks the port.
#[derive(Debug)]
pub(super) struct BoundPort {
    channel: Arc<Channel>,
    /// Holds the eventfd for one shot: what it reports, it reports once until it is armed again. So it is readable exactly when an event is
    /// pending and not masked, and becomes readable by the unmasking of a pending event, for edge-triggered pollers too.
    poller: Epoll,
}

const ARMED: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);

impl BoundPort {
    fn new(channel: Arc<Channel>) -> io::Result<Self> {
        let poller = match Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC) {
            Ok(poller) => poller,
            Err(errno) => {
                channel.bound.store(false, Ordering::Release);
                return Err(errno.into());
            }
        };
        let port = Self { channel, poller };
        port.poller
            .add(&port.channel.to_remote, EpollEvent::new(ARMED, 0))?;
        // Xen does so: the guest may have notified before anybody was there to hear it.
        signal(&port.channel.to_remote)?;
        Ok(port)
    }
}

impl EventPort for BoundPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.poller.0.as_fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        if self
            .poller
            .wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)?
            == 0
        {
            return Ok(false);
        }
        take(&self.channel.to_remote)
    }

    fn unmask(&mut self) -> io::Result<()> {
        Ok(self
            .poller
            .modify(&self.channel.to_remote, &mut EpollEvent::new(ARMED, 0))?)
    }

    fn notify(&self) -> io::Result<()> {
        signal(&self.channel.to_guest)
    }
}

impl Drop for BoundPort {
    fn drop(&mut self) {
        self.channel.bound.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn readable(port: &BoundPort) -> bool {
        poll(
            &mut [PollFd::new(port.fd(), PollFlags::POLLIN)],
            PollTimeout::ZERO,
        )
        .unwrap()
            == 1
    }

    fn bound() -> (Ports, GuestEnd, BoundPort) {
        let mut ports = Ports::default();
        let guest = ports.alloc_unbound(DomId::DOM0).unwrap();
        let port = ports.bind_interdomain(guest.port, DomId::DOM0).unwrap();
        (ports, guest, port)
    }

    #[test]
    fn a_port_that_was_just_bound_is_pending_once() {
        let (_ports, _guest, mut port) = bound();
        assert!(readable(&port));
        assert!(port.take().unwrap());
        port.unmask().unwrap();
        assert!(!readable(&port));
        assert!(!port.take().unwrap());
    }

    #[test]
    fn an_event_while_masked_waits_for_the_unmasking() {
        let (_ports, guest, mut port) = bound();
        assert!(port.take().unwrap());
        signal(&guest.notify).unwrap();
        assert!(!readable(&port));
        assert!(!port.take().unwrap());
        port.unmask().unwrap();
        assert!(readable(&port));
        assert!(port.take().unwrap());
        assert!(!readable(&port));
    }

    #[test]
    fn unmasking_a_pending_event_wakes_an_edge_triggered_poller() {
        let (_ports, guest, mut port) = bound();
        let outer = Epoll::new(EpollCreateFlags::empty()).unwrap();
        outer
            .add(
                port.fd(),
                EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0),
            )
            .unwrap();
        let woken = || {
            outer
                .wait(&mut [EpollEvent::empty(); 4], EpollTimeout::ZERO)
                .unwrap()
        };
        assert_eq!(woken(), 1);
        assert!(port.take().unwrap());
        signal(&guest.notify).unwrap();
        assert_eq!(woken(), 0);
        port.unmask().unwrap();
        assert_eq!(woken(), 1);
    }

    #[test]
    fn only_the_domain_that_a_port_is_for_can_bind_it_and_only_once() {
        let mut ports = Ports::default();
        let guest = ports.alloc_unbound(DomId(3)).unwrap();
        assert_eq!(
            ports.bind_interdomain(guest.port, DomId::DOM0).err(),
            Some(Errno::EINVAL)
        );
        assert_eq!(
            ports.bind_interdomain(Port(99), DomId::DOM0).err(),
            Some(Errno::EINVAL)
        );
        let guest = ports.alloc_unbound(DomId::DOM0).unwrap();
        let port = ports.bind_interdomain(guest.port, DomId::DOM0).unwrap();
        assert_eq!(
            ports.bind_interdomain(guest.port, DomId::DOM0).err(),
            Some(Errno::EINVAL)
        );
        drop(port);
        let mut again = ports.bind_interdomain(guest.port, DomId::DOM0).unwrap();
        assert!(again.take().unwrap());
    }

    #[test]
    fn both_directions_are_independent() {
        let (_ports, guest, mut port) = bound();
        port.notify().unwrap();
        port.notify().unwrap();
        assert!(take(&guest.event).unwrap());
        assert!(!take(&guest.event).unwrap());
        assert!(port.take().unwrap());
    }
}
