//! The client: requests, transactions and watches over one connection.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::connection::Connection;
use super::error::{Error, Request};
use super::events::WatchEvent;
use super::store::Store;
use super::transaction::Transaction;
use super::transport::Transport;
use super::wire::MessageType;

/// How often [`Client::transaction`] tries.
pub const TRANSACTION_TRIES: usize = 64;

/// A connection to xenstored.
///
/// It is polled through [`AsFd`], readable meaning that [`Client::next_event`] should be called
/// until it gives `None`. A request reads what comes before its reply, watch events included, and
/// keeps those: with an edge-triggered poller **call `next_event` until `None` after requests as
/// well**, or a kept event waits until the next one comes.
///
/// Dropping it ends its watches and open transactions.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
}

impl Client {
    /// Connects to this host's xenstored: at `$XENSTORED_PATH` if that is set, otherwise at
    /// `/run/xenstored/socket`, `/var/run/xenstored/socket` or `/dev/xen/xenbus`, the first that
    /// works.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn connect() -> Result<Self, Error> {
        if let Some(path) = std::env::var_os("XENSTORED_PATH") {
            return Self::connect_to(path);
        }
        let candidates = [
            "/run/xenstored/socket",
            "/var/run/xenstored/socket",
            "/dev/xen/xenbus",
        ];
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
        let transport = Transport::from_stream(stream, tried.clone())
            .map_err(|source| Error::Unreachable { tried, source })?;
        Ok(Self::new(transport))
    }

    fn new(transport: Transport) -> Self {
        let connection = Connection::new(transport);
        Self { connection }
    }

    /// Sets how long a request waits for its reply.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.connection.timeout = timeout;
    }

    /// Runs `body` in a transaction and commits it: all of its changes happen, or none. When others
    /// changed the same nodes meanwhile, `body` runs again, up to [`TRANSACTION_TRIES`] times; so
    /// it must have no effect besides. An error from `body` aborts.
    ///
    /// # Errors
    /// `body`'s; [`Error::Again`] after the last try.
    pub fn transaction<T>(
        &mut self,
        mut body: impl FnMut(&mut Transaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..TRANSACTION_TRIES {
            let mut transaction = Transaction::start(&mut self.connection)?;
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

    /// Watches a node and all below it. One event for the node itself follows at once. `path` may
    /// also be `@introduceDomain` or `@releaseDomain`. `token` comes back with each event; two
    /// watches may share one, but see [`Client::unwatch`].
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NoSpace`], [`Error::Invalid`].
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        Self::check_token(MessageType::Watch, path, token)?;
        // Known before it exists: its first event may come before the reply, into a full queue.
        let added = self.connection.events.add_watch(path, token);
        let result = self.request(MessageType::Watch, path, &[token.as_bytes(), b"\0"]);
        if added && result.is_err() {
            self.connection.events.remove_watch(path, token);
        }
        result.map(drop)
    }

    /// Ends a watch. No event with its token is given afterwards, unless another watch has the same
    /// token.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such watch.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(MessageType::Unwatch, path, &[token.as_bytes(), b"\0"])?;
        self.connection.events.remove_watch(path, token);
        Ok(())
    }

    /// Takes the next watch event; `None` when there is none at present and the fd was read until
    /// it would block.
    ///
    /// Events are kept once for each path and token. When [`super::EVENTS_KEPT`] wait already, a
    /// further one is replaced by an event for the watched path itself: as with a watch's first
    /// event, look at everything below that path again.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Protocol`].
    pub fn next_event(&mut self) -> Result<Option<WatchEvent>, Error> {
        self.connection.next_event()
    }

    /// Refuses a token that would not come back as it was sent.
    fn check_token(kind: MessageType, path: &str, token: &str) -> Result<(), Error> {
        if token.contains('\0') {
            let path = path.to_owned();
            return Err(Error::Invalid(Request { kind, path }));
        }
        Ok(())
    }
}

impl Store for Client {
    fn request(&mut self, kind: MessageType, path: &str, rest: &[&[u8]]) -> Result<Vec<u8>, Error> {
        self.connection.request(kind, 0, path, rest)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.transport.as_fd()
    }
}
