//! The thread that moves bytes between the clients' sockets and the core.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::core::{ConnectionId, Core};
use crate::sim::lock;
use crate::types::DomId;
use crate::xenstore::wire::Decoder;

/// A client that has more than this to read is not served until it has read.
const OUTBOX_FULL: usize = 64 * 1024;
/// A client that lets this much pile up (only watch events can, once it is not served) is disconnected.
const OUTBOX_LIMIT: usize = 4 * 1024 * 1024;

/// What the thread shares with the rest of the machine.
#[derive(Debug)]
struct Shared {
    core: Mutex<Core>,
    /// Connections made in this process that the thread has not taken in yet.
    newcomers: Mutex<Vec<(UnixStream, DomId)>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Shared {
    fn wake(&self) {
        if let Err(errno) = self.wake.write(1) {
            log::error!("cannot wake the embedded xenstored: {errno}");
        }
    }
}

/// The running xenstored. Dropping it ends it.
#[derive(Debug)]
pub(in crate::sim) struct Xenstored {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl Xenstored {
    /// Starts to serve. Whoever connects to `listener`, bound to `socket`, is dom0.
    ///
    /// # Errors
    /// When the system has no thread or eventfd left.
    pub fn start(listener: UnixListener, socket: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let core = Mutex::new(Core::new());
        let shared = Arc::new(Shared {
            core,
            newcomers: Mutex::new(Vec::new()),
            wake,
            stop: AtomicBool::new(false),
        });
        let server = Server {
            shared: Arc::clone(&shared),
            listener,
            clients: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("sim-xenstored".to_owned())
            .spawn(move || server.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
            socket: socket.to_owned(),
        })
    }

    /// Connects as `domain`.
    ///
    /// # Errors
    /// When the system has no file descriptor left.
    pub fn connect_as(&self, domain: DomId) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        lock(&self.shared.newcomers).push((ours, domain));
        self.shared.wake();
        Ok(theirs)
    }

    /// Tells the watches of `@releaseDomain`: a domain has shut down or is gone.
    pub fn domain_released(&self) {
        lock(&self.shared.core).domain_released();
        self.shared.wake();
    }

    /// A domain is gone: ends its connections, and tells the watches of `@releaseDomain`.
    pub fn domain_destroyed(&self, domain: DomId) {
        let mut core = lock(&self.shared.core);
        for id in core.connections_of(domain) {
            core.disconnect(id);
        }
        core.forget(domain);
        core.domain_released();
        drop(core);
        self.shared.wake();
    }

    /// Every path with its value.
    pub fn values(&self) -> BTreeMap<String, Vec<u8>> {
        lock(&self.shared.core).values()
    }
}

impl Drop for Xenstored {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the embedded xenstored has panicked");
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            log::debug!("{}: {error}", self.socket.display());
        }
    }
}

/// A client's socket and what came in so far of its next message.
struct Client {
    stream: UnixStream,
    decoder: Decoder,
}

struct Server {
    shared: Arc<Shared>,
    listener: UnixListener,
    clients: BTreeMap<ConnectionId, Client>,
}

impl Server {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.send_all();
            match self.wait() {
                Ok(readable) => {
                    self.take_newcomers();
                    self.accept();
                    for id in readable {
                        if let Err(error) = self.serve(id) {
                            log::debug!("embedded xenstored: a client has gone: {error}");
                            self.drop_client(id);
                        }
                    }
                }
                Err(error) => {
                    log::error!("the embedded xenstored cannot poll its clients, ending: {error}");
                    return;
                }
            }
        }
    }

    /// Waits until there is something to do. Gives the clients that have something for us.
    fn wait(&self) -> io::Result<Vec<ConnectionId>> {
        let mut core = lock(&self.shared.core);
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let ids: Vec<_> = self.clients.keys().copied().collect();
        for (id, client) in &self.clients {
            let waiting = core.outbox(*id).map_or(0, |outbox| outbox.len());
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, waiting < OUTBOX_FULL);
            flags.set(PollFlags::POLLOUT, waiting > 0);
            fds.push(PollFd::new(client.stream.as_fd(), flags));
        }
        drop(core);
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let readable = |fd: &PollFd<'_>| {
            fd.revents()
                .is_some_and(|events| events.intersects(!PollFlags::POLLOUT))
        };
        Ok(ids
            .into_iter()
            .zip(fds.iter().skip(2))
            .filter(|(_, fd)| readable(fd))
            .map(|(id, _)| id)
            .collect())
    }

    fn take_newcomers(&mut self) {
        // An error means that nobody has woken us.
        let _ = self.shared.wake.read();
        let newcomers = std::mem::take(&mut *lock(&self.shared.newcomers));
        for (stream, domain) in newcomers {
            self.add(stream, domain);
        }
        let mut core = lock(&self.shared.core);
        self.clients.retain(|id, _| core.outbox(*id).is_some());
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.add(stream, DomId::DOM0);
        }
    }

    fn add(&mut self, stream: UnixStream, domain: DomId) {
        if let Err(error) = stream.set_nonblocking(true) {
            log::error!("embedded xenstored: cannot serve a client: {error}");
            return;
        }
        let id = lock(&self.shared.core).connect(domain);
        self.clients.insert(
            id,
            Client {
                stream,
                decoder: Decoder::default(),
            },
        );
    }

    fn drop_client(&mut self, id: ConnectionId) {
        self.clients.remove(&id);
        lock(&self.shared.core).disconnect(id);
    }

    /// Reads once from a client and carries out what is complete.
    fn serve(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else {
            return Ok(());
        };
        let mut buffer = [0; 8192];
        let count = match client.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        client.decoder.feed(buffer.get(..count).unwrap_or_default());
        let mut core = lock(&self.shared.core);
        while let Some(message) = client.decoder.next_message().map_err(io::Error::other)? {
            core.handle(id, &message);
        }
        Ok(())
    }

    /// Sends to each client what it will take.
    fn send_all(&mut self) {
        let mut core = lock(&self.shared.core);
        let mut lost = Vec::new();
        for (id, client) in &mut self.clients {
            let Some(outbox) = core.outbox(*id) else {
                continue;
            };
            while !outbox.is_empty() {
                match client.stream.write(outbox) {
                    Ok(count) => drop(outbox.drain(..count.min(outbox.len()))),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => {
                        lost.push(*id);
                        break;
                    }
                }
            }
            if outbox.len() > OUTBOX_LIMIT {
                log::warn!(
                    "embedded xenstored: a client does not read its watch events; disconnected"
                );
                lost.push(*id);
            }
        }
        drop(core);
        for id in lost {
            self.drop_client(id);
        }
    }
}
