//! The client: requests, transactions and watches over one connection.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::{Error, Request};
use super::events::{EventQueue, WatchEvent};
use super::store::Store;
use super::transport::{Kind, Transport};
use super::wire::{self, Decoder, Message, MessageType};
use crate::state::XenbusState;

/// How long a request waits for its reply unless [`Client::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Watch events kept until they are taken; see [`Client::next_event`].
pub const EVENTS_KEPT: usize = 256;

/// How often [`Client::transaction`] tries.
pub const TRANSACTION_TRIES: usize = 64;

/// Reads per [`Client::next_event`], so that a storm cannot keep it from returning.
const READS_AT_ONCE: usize = 16;

/// A connection to xenstored.
///
/// It is polled through [`AsFd`], readable meaning that [`Client::next_event`] should be called until it gives `None`. A request reads what
/// comes before its reply, watch events included, and keeps those: with an edge-triggered poller **call `next_event` until `None` after
/// requests as well**, or a kept event waits until the next one comes.
///
/// Dropping it ends its watches and open transactions.
#[derive(Debug)]
pub struct Client {
    transport: Transport,
    decoder: Decoder,
    events: EventQueue,
    last_id: u32,
    timeout: Duration,
    /// Set when the stream of messages is cut: no request can work any more.
    broken: bool,
}

impl Client {
    /// Connects to this host's xenstored: at `$XENSTORED_PATH` if that is set, otherwise at `/run/xenstored/socket`,
    /// `/var/run/xenstored/socket` or `/dev/xen/xenbus`, the first that works.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn connect() -> Result<Self, Error> {
        if let Some(path) = std::env::var_os("XENSTORED_PATH") {
            return Self::connect_to(path);
        }
        let candidates = ["/run/xenstored/socket", "/var/run/xenstored/socket", "/dev/xen/xenbus"];
        let mut first_failure = None;
        for path in candidates {
            match Transport::open(Path::new(path)) {
                Ok(transport) => return Ok(Self::new(transport)),
                Err(error) => {
                    log::debug!("no xenstored at {path}: {error}");
                    first_failure.get_or_insert(error);
                }
            }
        }
        let source = first_failure.unwrap_or_else(|| io::ErrorKind::NotFound.into());
        Err(Error::Unreachable {
            tried: candidates.join(", "),
            source,
        })
    }

    /// Connects to the socket, or opens the device, at `path`.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn connect_to(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let transport = Transport::open(path).map_err(|source| Error::Unreachable {
            tried: path.display().to_string(),
            source,
        })?;
        Ok(Self::new(transport))
    }

    /// Uses a connected socket.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when the socket cannot be made non-blocking.
    pub fn from_stream(stream: UnixStream) -> Result<Self, Error> {
        let tried = "a connected socket".to_owned();
        let transport = Transport::from_stream(stream, tried.clone()).map_err(|source| Error::Unreachable { tried, source })?;
        Ok(Self::new(transport))
    }

    fn new(transport: Transport) -> Self {
        let events = EventQueue::new(EVENTS_KEPT);
        Self {
            transport,
            decoder: Decoder::default(),
            events,
            last_id: 0,
            timeout: DEFAULT_TIMEOUT,
            broken: false,
        }
    }

    /// Sets how long a request waits for its reply.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs `body` in a transaction and commits it: all of its changes happen, or none. When others changed the same nodes meanwhile,
    /// `body` runs again, up to [`TRANSACTION_TRIES`] times; so it must have no effect besides. An error from `body` aborts.
    ///
    /// # Errors
    /// `body`'s; [`Error::Again`] after the last try.
    pub fn transaction<T>(&mut self, mut body: impl FnMut(&mut Transaction<'_>) -> Result<T, Error>) -> Result<T, Error> {
        for _ in 0..TRANSACTION_TRIES {
            let mut transaction = Transaction::start(self)?;
            let result = match body(&mut transaction) {
                Ok(value) => transaction.end(true).map(|()| value),
                Err(error) => {
                    if let Err(abort) = transaction.end(false) {
                        log::debug!("aborting after '{error}': {abort}");
                    }
                    Err(error)
                }
            };
            if !matches!(result, Err(Error::Again(_))) {
                return result;
            }
        }
        Err(Error::Again(Request {
            kind: MessageType::TransactionEnd,
            path: String::new(),
        }))
    }

    /// Watches a node and all below it. One event for the node itself follows at once. `path` may also be `@introduceDomain` or
    /// `@releaseDomain`. `token` comes back with each event; two watches may share one, but see [`Client::unwatch`].
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NoSpace`], [`Error::Invalid`].
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(MessageType::Watch, path, &[token.as_bytes(), b"\0"])?;
        self.events.add_watch(path, token);
        Ok(())
    }

    /// Ends a watch. No event with its token is given afterwards, unless another watch has the same token.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such watch.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(MessageType::Unwatch, path, &[token.as_bytes(), b"\0"])?;
        self.events.remove_watch(path, token);
        Ok(())
    }

    /// Takes the next watch event; `None` when there is none at present and the fd was read until it would block.
    ///
    /// Events are kept once for each path and token. When [`EVENTS_KEPT`] wait already, a further one is replaced by an event for the
    /// watched path itself: as with a watch's first event, look at everything below that path again.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Protocol`].
    pub fn next_event(&mut self) -> Result<Option<WatchEvent>, Error> {
        while self.events.is_empty() {
            let mut drained = false;
            for _ in 0..READS_AT_ONCE {
                drained = !self.receive()?;
                self.sort_messages(None)?;
                if drained {
                    break;
                }
            }
            if drained {
                break;
            }
        }
        Ok(self.events.pop())
    }

    /// Changes a device's `state` node as xenbus drivers do. `current` is the state that the caller last wrote or took note of. Nothing is
    /// written when the node has vanished (a removed device must not come back), when it holds `target` already, or when somebody has
    /// made the device anew (it holds [`XenbusState::Initialising`] and `current` is another).
    ///
    /// # Errors
    /// Those of a transaction.
    pub fn switch_state(&mut self, directory: &str, current: XenbusState, target: XenbusState) -> Result<Switched, Error> {
        let path = format!("{directory}/state");
        self.transaction(|transaction| {
            let stored = match transaction.read(&path) {
                Ok(value) => XenbusState::parse(&value),
                Err(Error::NotFound(_)) => return Ok(Switched::Vanished),
                Err(error) => return Err(error),
            };
            if stored == target {
                return Ok(Switched::Already);
            }
            if stored == XenbusState::Initialising && current != XenbusState::Initialising {
                return Ok(Switched::Recreated);
            }
            transaction.write(&path, target.number().to_string())?;
            Ok(Switched::Written)
        })
    }

    fn next_id(&mut self) -> u32 {
        self.last_id = match self.last_id.wrapping_add(1) {
            0 => 1, // watch events have 0
            id => id,
        };
        self.last_id
    }

    fn gone(&mut self, source: Option<io::Error>) -> Error {
        self.broken = true;
        Error::Gone {
            peer: self.transport.peer.clone(),
            source,
        }
    }

    fn protocol(&mut self, what: String) -> Error {
        self.broken = true;
        Error::Protocol {
            peer: self.transport.peer.clone(),
            what,
        }
    }

    /// Reads once into the decoder; false when there is nothing to read.
    fn receive(&mut self) -> Result<bool, Error> {
        if self.broken {
            return Err(self.gone(None));
        }
        let mut buffer = [0; 4096];
        match self.transport.read(&mut buffer) {
            Ok(0) => Err(self.gone(None)),
            Ok(count) => {
                self.decoder.feed(buffer.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(self.gone(Some(error))),
        }
    }

    /// Takes all complete messages: events into the queue, the reply to `awaited` out. Replies to requests that were given up are dropped.
    fn sort_messages(&mut self, awaited: Option<(u32, MessageType)>) -> Result<Option<Message>, Error> {
        let mut reply = None;
        loop {
            let message = match self.decoder.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(reply),
                Err(error) => return Err(self.protocol(error.to_string())),
            };
            match message.kind() {
                Some(MessageType::WatchEvent) => self.queue_event(&message.payload)?,
                Some(kind) if awaited.is_some_and(|(id, request)| self.answers(&message, kind, id, request)) => {
                    reply = Some(message);
                }
                _ if self.is_late(message.header.req_id, awaited) => {
                    log::debug!("dropped a late reply from xenstored, request {}", message.header.req_id);
                }
                _ => return Err(self.protocol(format!("a reply to nothing: {:?}", message.header))),
            }
        }
    }

    /// Whether a message answers a request. The kernel's device answers WATCH and UNWATCH by itself, with request number 0.
    fn answers(&self, message: &Message, kind: MessageType, id: u32, request: MessageType) -> bool {
        let by_kernel = self.transport.kind == Kind::Device
            && message.header.req_id == 0
            && matches!(request, MessageType::Watch | MessageType::Unwatch);
        (message.header.req_id == id || by_kernel) && (kind == request || kind == MessageType::Error)
    }

    /// Whether a request number was used before the one that is awaited.
    fn is_late(&self, id: u32, awaited: Option<(u32, MessageType)>) -> bool {
        let current = awaited.map(|(id, _)| id);
        id != 0 && Some(id) != current && self.last_id.wrapping_sub(id) < u32::MAX / 2
    }

    fn queue_event(&mut self, payload: &[u8]) -> Result<(), Error> {
        let mut fields = wire::strings(payload);
        let (Some(path), Some(token)) = (fields.next(), fields.next()) else {
            return Err(self.protocol("a watch event without path and token".to_owned()));
        };
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        self.events.push(WatchEvent {
            path: text(path),
            token: text(token),
        });
        Ok(())
    }

    fn send(&mut self, request: &Request, bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        let mut left = bytes;
        while !left.is_empty() {
            match self.transport.write(left) {
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // xenstored may itself be waiting for us to read.
                    while self.receive()? {
                        self.sort_messages(None)?;
                    }
                    if !self.wait(self.transport.kind == Kind::Socket, deadline)? {
                        // A request that is cut off in its middle cannot be taken back.
                        self.broken |= left.len() != bytes.len();
                        return Err(Error::TimedOut {
                            request: request.clone(),
                            waited: self.timeout,
                        });
                    }
                }
                Err(error) if self.transport.kind == Kind::Device => return Err(refused_by_kernel(request, error)),
                Err(error) => return Err(self.gone(Some(error))),
            }
        }
        Ok(())
    }

    fn wait(&mut self, writing: bool, deadline: Instant) -> Result<bool, Error> {
        self.transport.wait(writing, deadline).map_err(|error| self.gone(Some(error)))
    }

    /// One request and its reply.
    fn exchange(&mut self, kind: MessageType, tx_id: u32, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error> {
        let request = Request {
            kind,
            path: path.to_owned(),
        };
        if self.broken {
            return Err(self.gone(None));
        }
        let id = self.next_id();
        let mut parts = Vec::with_capacity(rest.len().saturating_add(2));
        parts.extend([path.as_bytes(), b"\0"]);
        parts.extend_from_slice(rest);
        let Ok(bytes) = wire::encode(kind, id, tx_id, &parts) else {
            return Err(Error::TooBig(request));
        };
        let now = Instant::now();
        let deadline = now.checked_add(self.timeout).unwrap_or(now);
        self.send(&request, &bytes, deadline)?;
        let reply = self.await_reply(&request, id, deadline)?;
        if reply.kind() == Some(MessageType::Error) {
            let code = wire::strings(&reply.payload).next().unwrap_or_default();
            return Err(Error::from_code(request, code));
        }
        Ok(reply.payload)
    }

    fn await_reply(&mut self, request: &Request, id: u32, deadline: Instant) -> Result<Message, Error> {
        loop {
            while self.receive()? {
                if let Some(reply) = self.sort_messages(Some((id, request.kind)))? {
                    return Ok(reply);
                }
            }
            if !self.wait(false, deadline)? {
                return Err(Error::TimedOut {
                    request: request.clone(),
                    waited: self.timeout,
                });
            }
        }
    }
}

/// The kernel refuses some requests in `write`, with the errno that xenstored would have sent by name.
fn refused_by_kernel(request: &Request, error: io::Error) -> Error {
    let request = request.clone();
    match error.raw_os_error() {
        Some(libc::ENOENT) => Error::NotFound(request),
        Some(libc::EACCES | libc::EPERM) => Error::Denied(request),
        Some(libc::EEXIST) => Error::Exists(request),
        Some(libc::EINVAL | libc::EILSEQ) => Error::Invalid(request),
        Some(libc::ENOSPC) => Error::NoSpace(request),
        Some(libc::E2BIG) => Error::TooBig(request),
        _ => Error::Refused {
            request,
            code: error.to_string(),
        },
    }
}

/// Refuses what would not arrive as it was meant: a NUL ends a path on the wire.
fn check_path(kind: MessageType, path: &str) -> Result<(), Error> {
    let limit = if path.starts_with('/') {
        wire::ABSOLUTE_PATH_MAX
    } else {
        wire::RELATIVE_PATH_MAX
    };
    if path.is_empty() || path.len() > limit || path.contains('\0') {
        let path = path.escape_debug().take(64).collect();
        return Err(Error::Invalid(Request { kind, path }));
    }
    Ok(())
}

impl Store for Client {
    fn request(&mut self, kind: MessageType, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error> {
        check_path(kind, path)?;
        self.exchange(kind, 0, path, rest)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

/// What [`Client::switch_state`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switched {
    /// Wrote the state.
    Written,
    /// Nothing: the node holds this state already.
    Already,
    /// Nothing: there is no such node any more.
    Vanished,
    /// Nothing: the device was removed and made anew.
    Recreated,
}

/// A transaction under way: reads see its own changes, nobody else does. See [`Client::transaction`].
#[derive(Debug)]
pub struct Transaction<'a> {
    client: &'a mut Client,
    id: u32,
}

impl<'a> Transaction<'a> {
    fn start(client: &'a mut Client) -> Result<Self, Error> {
        let reply = client.exchange(MessageType::TransactionStart, 0, "", &[])?;
        let text = wire::strings(&reply).next().unwrap_or_default();
        let id = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        match id {
            Some(id) if id != 0 => Ok(Self { client, id }),
            _ => Err(client.protocol(format!("'{}' as a transaction's number", text.escape_ascii()))),
        }
    }

    fn end(self, commit: bool) -> Result<(), Error> {
        let flag = if commit { "T" } else { "F" };
        self.client.exchange(MessageType::TransactionEnd, self.id, flag, &[]).map(drop)
    }
}

impl Store for Transaction<'_> {
    fn request(&mut self, kind: MessageType, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error> {
        check_path(kind, path)?;
        self.client.exchange(kind, self.id, path, rest)
    }
}
