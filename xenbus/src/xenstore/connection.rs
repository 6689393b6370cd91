//! One request at a time over a stream of messages, with watch events in between.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::error::{Error, Request};
use super::events::{EventQueue, WatchEvent};
use super::transport::{Kind, Transport};
use super::wire::{self, Decoder, Message, MessageType};

/// How long a request waits for its reply unless [`super::Client::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Watch events kept until they are taken; see [`super::Client::next_event`].
pub const EVENTS_KEPT: usize = 256;

/// Reads without a look at what they brought, so that a storm of events cannot keep
/// [`Connection::next_event`] from returning.
const READS_AT_ONCE: usize = 16;

/// What [`super::Client`] and [`super::Transaction`] share.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) transport: Transport,
    decoder: Decoder,
    pub(super) events: EventQueue,
    last_id: u32,
    pub(super) timeout: Duration,
    /// Set when the stream of messages is cut: no request can work any more.
    broken: bool,
}

impl Connection {
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            decoder: Decoder::default(),
            events: EventQueue::new(EVENTS_KEPT),
            last_id: 0,
            timeout: DEFAULT_TIMEOUT,
            broken: false,
        }
    }

    /// See [`super::Client::next_event`].
    pub(super) fn next_event(&mut self) -> Result<Option<WatchEvent>, Error> {
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

    /// One request about a node.
    pub(super) fn request(
        &mut self,
        kind: MessageType,
        tx_id: u32,
        path: &str,
        rest: &[&[u8]],
    ) -> Result<Vec<u8>, Error> {
        check_path(kind, path)?;
        self.exchange(kind, tx_id, path, rest)
    }

    /// One request, which begins with a string, and its reply.
    pub(super) fn exchange(
        &mut self,
        kind: MessageType,
        tx_id: u32,
        path: &str,
        rest: &[&[u8]],
    ) -> Result<Vec<u8>, Error> {
        let request = Request {
            kind,
            path: path.to_owned(),
        };
        if self.broken {
            return Err(self.gone(None));
        }
        let id = self.next_id();
        let parts = [&[path.as_bytes(), b"\0"], rest].concat();
        let bytes = match wire::encode(kind, id, tx_id, &parts) {
            Ok(bytes) if bytes.len() <= self.transport.longest_message() => bytes,
            _ => return Err(Error::TooBig(request)),
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

    pub(super) fn protocol(&mut self, what: String) -> Error {
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

    /// Takes all complete messages: events into the queue, the reply to `awaited` out. Replies to
    /// requests that were given up are dropped.
    fn sort_messages(
        &mut self,
        awaited: Option<(u32, MessageType)>,
    ) -> Result<Option<Message>, Error> {
        let mut reply = None;
        loop {
            let message = match self.decoder.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(reply),
                Err(error) => return Err(self.protocol(error.to_string())),
            };
            let answers = |(id, request)| {
                let kinds = [Some(request), Some(MessageType::Error)];
                message.header.req_id == id && kinds.contains(&message.kind())
            };
            if message.kind() == Some(MessageType::WatchEvent) {
                self.queue_event(&message.payload)?;
            } else if awaited.is_some_and(answers) {
                reply = Some(message);
            } else if self.is_late(message.header.req_id, awaited) {
                log::debug!(
                    "dropped a late reply to xenstore request {}",
                    message.header.req_id
                );
            } else {
                return Err(self.protocol(format!("a reply to nothing: {:?}", message.header)));
            }
        }
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
                Err(error) if self.transport.kind == Kind::Device => {
                    return Err(refused_by_kernel(request, &error));
                }
                Err(error) => return Err(self.gone(Some(error))),
            }
        }
        Ok(())
    }

    fn wait(&mut self, writing: bool, deadline: Instant) -> Result<bool, Error> {
        self.transport
            .wait(writing, deadline)
            .map_err(|error| self.gone(Some(error)))
    }

    fn await_reply(
        &mut self,
        request: &Request,
        id: u32,
        deadline: Instant,
    ) -> Result<Message, Error> {
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

/// The kernel refuses some requests in `write`, with the errno that xenstored would have sent by
/// name.
fn refused_by_kernel(request: &Request, error: &io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
    Error::from_code(request.clone(), format!("{errno:?}").as_bytes())
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
