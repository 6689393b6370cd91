//! The host's end of a port.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// Where the bytes of a port go to and come from. Nobody need be there: what the guest sends then is
/// lost, as on a serial line that ends nowhere.
#[derive(Debug)]
pub struct Endpoint(Kind);

#[derive(Debug)]
enum Kind {
    /// Our end of a pseudo-terminal.
    Pty(Arc<File>),
    /// One connection at a time.
    Socket {
        listener: Arc<UnixListener>,
        stream: Option<Arc<UnixStream>>,
        keeper: Option<Box<dyn Keeper>>,
    },
}

/// Who has a connection outlive this process.
pub trait Keeper: fmt::Debug + Send + Sync {
    /// Somebody has come. Before the guest knows. Does not wait.
    fn keep(&self, connection: BorrowedFd<'_>);

    /// He is gone.
    fn forget(&self);
}

/// A descriptor that can be waited for while its endpoint is used.
pub(super) trait Descriptor: AsFd + fmt::Debug + Send + Sync {}
impl<T: AsFd + fmt::Debug + Send + Sync> Descriptor for T {}

impl Endpoint {
    /// A new pseudo-terminal, and the path of its other end.
    ///
    /// # Errors
    /// The host has none left.
    pub fn pty() -> io::Result<(Self, PathBuf)> {
        let pty = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
        grantpt(&pty)?;
        unlockpt(&pty)?;
        let path = PathBuf::from(ptsname_r(&pty)?);
        // Nothing of what passes is changed or sent back.
        let mut attributes = tcgetattr(&pty)?;
        cfmakeraw(&mut attributes);
        tcsetattr(&pty, SetArg::TCSANOW, &attributes)?;
        // Linux says that nobody is there only after somebody has been.
        let other = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&path)?;
        drop(other);
        Self::of_pty(pty.into())
    }

    /// The master of a pseudo-terminal that [`Endpoint::pty`] has made before, and the path of its other end.
    ///
    /// # Errors
    /// It is none, or its flags cannot be changed.
    pub fn of_pty(master: OwnedFd) -> io::Result<(Self, PathBuf)> {
        let mut number: libc::c_uint = 0;
        // SAFETY: TIOCGPTN writes an unsigned int.
        let got = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let path = PathBuf::from(format!("/dev/pts/{number}"));
        Ok((Self(Kind::Pty(Arc::new(master.into()))), path))
    }

    /// A socket at `path`, which is to be free.
    ///
    /// # Errors
    /// There is something at the path, or no way to it.
    pub fn listen(path: &Path) -> io::Result<Self> {
        Self::of_listener(UnixListener::bind(path)?.into(), None)
    }

    /// A socket that [`Endpoint::listen`] has made before, and who is connected to it.
    ///
    /// # Errors
    /// Their flags cannot be changed.
    pub fn of_listener(listener: OwnedFd, connection: Option<OwnedFd>) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let stream = connection.map(UnixStream::from);
        if let Some(stream) = &stream {
            stream.set_nonblocking(true)?;
        }
        Ok(Self(Kind::Socket {
            listener: Arc::new(listener),
            stream: stream.map(Arc::new),
            keeper: None,
        }))
    }

    /// The same, with somebody who keeps connections that come. A pseudo-terminal has none.
    #[must_use]
    pub fn with_keeper(mut self, new: Box<dyn Keeper>) -> Self {
        if let Kind::Socket { keeper, .. } = &mut self.0 {
            *keeper = Some(new);
        }
        self
    }

    /// Somebody is at the other end. May let the next one in.
    pub(super) fn is_open(&mut self, let_in: bool) -> bool {
        match &mut self.0 {
            Kind::Pty(master) => {
                let mut fds = [PollFd::new(master.as_fd(), PollFlags::empty())];
                let polled = poll(&mut fds, PollTimeout::ZERO);
                let [fd] = fds;
                // Hung up: nobody has the other end open.
                polled.is_ok() && !fd.any().unwrap_or(true)
            }
            Kind::Socket {
                listener,
                stream,
                keeper,
            } => {
                // The guest may have no buffers, by which that would be seen.
                if stream.as_ref().is_some_and(|stream| is_at_end(stream)) {
                    self.close();
                    return false;
                }
                if stream.is_none()
                    && let_in
                    && let Ok((accepted, _)) = listener.accept()
                    && accepted.set_nonblocking(true).is_ok()
                {
                    if let Some(keeper) = keeper {
                        keeper.keep(accepted.as_fd());
                    }
                    *stream = Some(Arc::new(accepted));
                }
                stream.is_some()
            }
        }
    }

    /// There is something to read, or an error or end to be seen by reading.
    pub(super) fn is_readable(&self) -> bool {
        let fd = match &self.0 {
            Kind::Pty(master) => master.as_fd(),
            Kind::Socket {
                stream: Some(stream),
                ..
            } => stream.as_fd(),
            Kind::Socket { .. } => return false,
        };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// What to wait for, for bytes or for somebody to come. `None`: for that, nothing can be waited for.
    pub(super) fn descriptor(&self, open: bool) -> Option<Arc<dyn Descriptor>> {
        match &self.0 {
            Kind::Pty(master) => open.then(|| Arc::clone(master) as Arc<dyn Descriptor>),
            Kind::Socket {
                listener, stream, ..
            } => Some(match stream {
                Some(stream) => Arc::clone(stream) as Arc<dyn Descriptor>,
                None => Arc::clone(listener) as Arc<dyn Descriptor>,
            }),
        }
    }

    /// The other end is gone.
    pub(super) fn close(&mut self) {
        if let Kind::Socket { stream, keeper, .. } = &mut self.0
            && let Some(stream) = stream.take()
        {
            // Others have it open, too. He may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
            if let Some(keeper) = keeper {
                keeper.forget();
            }
        }
    }

    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Pty(master) => (&**master).read(data),
            Kind::Socket { stream, .. } => {
                let stream = stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
                (&**stream).read(data)
            }
        }
    }

    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Pty(master) => (&**master).write(data),
            Kind::Socket { stream, .. } => {
                let stream = stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
                (&**stream).write(data)
            }
        }
    }
}

/// What is there for as long as somebody has it open: a pseudo-terminal, or a socket at its path.
impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Pty(master) => master.as_fd(),
            Kind::Socket { listener, .. } => listener.as_fd(),
        }
    }
}

/// Whoever was there is gone, and all that he has sent is read.
fn is_at_end(stream: &UnixStream) -> bool {
    match recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK) {
        Ok(read) => read == 0,
        Err(error) => !matches!(error, Errno::EAGAIN | Errno::EINTR),
    }
}
