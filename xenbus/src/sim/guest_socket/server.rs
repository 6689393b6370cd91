//! The machine's end: a thread that waits for guests, and one for each that is connected, so that one that maps much memory keeps nobody waiting.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, bind, listen, recvmsg, sendmsg, socket,
};
use zerocopy::IntoBytes;

use super::protocol::{LONGEST_REQUEST, Reply};
use super::requests::{Answer, Client, Packet};
use crate::platform::XenError;
use crate::sim::machine::{Inner, Machine, only_for_this_user};

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

struct Server {
    control: Arc<Control>,
    listener: UnixListener,
    machine: Weak<Inner>,
    /// The connections, each with a thread of its own, to end them by.
    guests: Vec<(Arc<UnixStream>, JoinHandle<()>)>,
}

impl Server {
    fn run(mut self) {
        while !self.control.stop.load(Ordering::Acquire) {
            if let Err(error) = self.wait() {
                log::error!("the embedded machine cannot wait for guests, ending: {error}");
                break;
            }
            self.guests.retain(|(_, thread)| !thread.is_finished());
            while let Ok((stream, _)) = self.listener.accept() {
                if let Err(error) = self.welcome(stream) {
                    log::error!("cannot serve a guest: {error}");
                }
            }
        }
        // Nobody waits for the threads: the machine may end on one of them.
        for (stream, _) in &self.guests {
            if let Err(error) = stream.shutdown(Shutdown::Both) {
                log::debug!("a guest has gone already: {error}");
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream) -> io::Result<()> {
        // Whether a socket that was accepted blocks depends on the system.
        stream.set_nonblocking(false)?;
        let stream = Arc::new(stream);
        let (theirs, machine) = (Arc::clone(&stream), self.machine.clone());
        let thread = std::thread::Builder::new()
            .name("sim-guest".to_owned())
            .spawn(move || {
                if let Err(error) = serve(&machine, &theirs) {
                    log::debug!("a guest has gone: {error}");
                }
            })?;
        self.guests.push((stream, thread));
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Serves a guest until it goes. An error means that it is gone, or does not take its replies.
fn serve(machine: &Weak<Inner>, stream: &UnixStream) -> io::Result<()> {
    let mut client = Client::default();
    // One byte more than a request has, to notice longer ones.
    let mut bytes = [0; LONGEST_REQUEST + 1];
    loop {
        let (count, descriptor) = match receive(stream, &mut bytes) {
            Ok((0, _)) => return Ok(()),
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let inner = machine.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let packet = bytes
            .get(..count)
            .filter(|bytes| bytes.len() <= LONGEST_REQUEST)
            .and_then(|bytes| Packet::new(bytes, descriptor));
        let outcome = match packet {
            Some(packet) => client.carry_out(&Machine { inner }, packet),
            None => Err(XenError::from_errno("reading a request", libc::EINVAL)),
        };
        let answer = outcome.map_err(|error| {
            // A guest can have that said as often as it likes.
            log::debug!("the embedded machine refuses a guest: {error}");
            error.errno().unwrap_or(libc::EIO)
        });
        send(stream, &answer)?;
    }
}

/// The next packet's length, and the descriptor that came with it, if it was one.
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut descriptor = None;
    // The kernel gives no more than there is room for.
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            for raw in received {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                descriptor = Some(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, descriptor))
}

/// Sends a reply.
fn send(stream: &UnixStream, answer: &Result<Answer, i32>) -> io::Result<()> {
    let (head, more, descriptors) = match answer {
        Ok(answer) => (
            Reply {
                errno: 0,
                value: answer.value,
            },
            answer.more.as_slice(),
            answer.descriptors.as_slice(),
        ),
        Err(errno) => (
            Reply {
                errno: *errno,
                value: 0,
            },
            &[][..],
            &[][..],
        ),
    };
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(head.as_bytes()), IoSlice::new(more)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
