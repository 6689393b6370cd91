//! The machine's end: one thread for all guests.

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen,
    sendmsg, socket,
};
use zerocopy::{FromBytes, IntoBytes};

use super::protocol::{Reply, Request, RequestKind};
use crate::platform::XenError;
use crate::sim::machine::{Inner, Machine, only_for_this_user};
use crate::types::{DomId, GrantRef, Pirq, Port};

/// What the thread and its owner share.
#[derive(Debug)]
struct Control {
    wake: EventFd,
    stop: AtomicBool,
}

/// The thread that serves guests. Dropping it ends it.
#[derive(Debug)]
pub(in crate::sim) struct GuestServer {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl GuestServer {
    /// Starts to serve guests of `machine` that connect to `path`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(path: &Path, machine: Weak<Inner>) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let descriptor = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
        only_for_this_user(path)?;
        listen(&descriptor, Backlog::new(16)?)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let control = Arc::new(Control {
            wake,
            stop: AtomicBool::new(false),
        });
        let server = Server {
            control: Arc::clone(&control),
            listener: descriptor.into(),
            machine,
            guests: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("sim-guests".to_owned())
            .spawn(move || server.run())?;
        Ok(Self {
            control,
            thread: Some(thread),
            path: path.to_owned(),
        })
    }
}

impl Drop for GuestServer {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        if let Err(errno) = self.control.wake.write(1) {
            log::error!("cannot wake the embedded machine's guest server: {errno}");
        }
        // The machine may end on that very thread, if the last handle to it was the one that a request used.
        let thread = self
            .thread
            .take()
            .filter(|thread| thread.thread().id() != std::thread::current().id());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the embedded machine's guest server has panicked");
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

/// A connected guest.
struct Guest {
    stream: UnixStream,
    /// Which domain it has said to be.
    domain: Option<DomId>,
}

struct Server {
    control: Arc<Control>,
    listener: UnixListener,
    machine: Weak<Inner>,
    guests: Vec<Guest>,
}

/// What a reply holds besides success: a number and descriptors.
type Outcome = Result<(u32, Vec<OwnedFd>), XenError>;

impl Server {
    fn run(mut self) {
        while !self.control.stop.load(Ordering::Acquire) {
            if let Err(error) = self.wait() {
                log::error!("the embedded machine cannot poll its guests, ending: {error}");
                return;
            }
            while let Ok((stream, _)) = self.listener.accept() {
                match stream.set_nonblocking(true) {
                    Ok(()) => self.guests.push(Guest {
                        stream,
                        domain: None,
                    }),
                    Err(error) => log::error!("cannot serve a guest: {error}"),
                }
            }
            let machine = &self.machine;
            self.guests.retain_mut(|guest| match serve(machine, guest) {
                Ok(()) => true,
                Err(error) => {
                    log::debug!("a guest has gone: {error}");
                    false
                }
            });
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![
            PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.guests
                .iter()
                .map(|guest| PollFd::new(guest.stream.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Serves what a guest has asked for by now. An error means that it is gone, or does not take its replies.
fn serve(machine: &Weak<Inner>, guest: &mut Guest) -> io::Result<()> {
    // One byte more than a request has, to notice longer ones.
    let mut packet = [0; size_of::<Request>() + 1];
    loop {
        let count = match guest.stream.read(&mut packet) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let request = packet
            .get(..count)
            .and_then(|bytes| Request::read_from_bytes(bytes).ok());
        let inner = machine.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let outcome = match request {
            Some(request) => carry_out(&Machine { inner }, &mut guest.domain, request),
            None => Err(XenError::from_errno("reading a request", libc::EINVAL)),
        };
        let (reply, descriptors) = match outcome {
            Ok((value, descriptors)) => (Reply { errno: 0, value }, descriptors),
            Err(error) => (
                Reply {
                    errno: error.errno().unwrap_or(libc::EIO),
                    value: 0,
                },
                Vec::new(),
            ),
        };
        send(&guest.stream, reply, &descriptors)?;
    }
}

fn carry_out(machine: &Machine, domain: &mut Option<DomId>, request: Request) -> Outcome {
    let refused =
        |errno| XenError::from_errno(format!("request {} of a guest", request.kind), errno);
    let kind = RequestKind::from_number(request.kind).ok_or_else(|| refused(libc::ENOSYS))?;
    let argument = request.argument;
    let as_domain = |number: u32| {
        u16::try_from(number)
            .map(DomId)
            .map_err(|_| refused(libc::EINVAL))
    };
    if kind == RequestKind::Become {
        if domain.is_some() {
            return Err(refused(libc::EISCONN));
        }
        let wanted = as_domain(argument)?;
        machine.check_alive(wanted)?;
        *domain = Some(wanted);
        return Ok((argument, Vec::new()));
    }
    let domain = domain.ok_or_else(|| refused(libc::ENOTCONN))?;
    let number = |()| (0, Vec::new());
    match kind {
        RequestKind::Become => Err(refused(libc::EISCONN)),
        RequestKind::ConnectXenstore => {
            machine.check_alive(domain)?;
            let stream = machine
                .stream_as(domain)
                .map_err(|_| refused(libc::EMFILE))?;
            Ok((0, vec![stream.into()]))
        }
        RequestKind::GrantPage => {
            let (reference, page) = machine.grant_page(domain, as_domain(argument)?)?;
            Ok((reference.0, vec![page]))
        }
        RequestKind::EndGrant => machine.end_grant(domain, GrantRef(argument)).map(number),
        RequestKind::AllocUnbound => {
            let end = machine.alloc_unbound(domain, as_domain(argument)?)?;
            Ok((end.port.0, vec![end.event, end.notify]))
        }
        RequestKind::BindPirq => {
            let end = machine.bind_pirq(domain, Pirq(argument))?;
            Ok((end.port.0, vec![end.event]))
        }
        RequestKind::ClosePort => machine.close_port(domain, Port(argument)).map(number),
        RequestKind::ShutDown => machine.domain_shut_down(domain).map(number),
    }
}

/// Sends a reply. A guest that takes none of its replies is given up.
fn send(stream: &UnixStream, reply: Reply, descriptors: &[OwnedFd]) -> io::Result<()> {
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(reply.as_bytes())],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
