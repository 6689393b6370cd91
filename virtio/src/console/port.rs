//! One port: bytes from the guest to the host's end and back, as far as both take them.

use std::io;
use std::sync::Arc;

use nix::poll::PollFlags;

use super::Port;
use super::endpoint::Descriptor;
use crate::queue::{Chain, RingError};
use crate::turn::{Progress, Turn};

/// Bytes that are moved at a time.
const PIECE: usize = 4096;
/// Pieces and chains that are moved before the other ports have their turn.
pub(super) const BATCH: usize = 32;

/// A port and what is on its way.
pub(super) struct PortState {
    pub port: Port,
    /// Somebody was at the host's end when it was last looked.
    pub open: bool,
    /// The driver is ready for it.
    pub ready: bool,
    /// What the driver was told of `open`; `None` after a restart, as it was not us who told it.
    pub told: Option<bool>,
    /// From the guest: taken from its queue, and sent as far as `sent` says.
    sending: Option<Sending>,
    /// From the host, not yet taken by the guest.
    incoming: Vec<u8>,
    /// Used again and again.
    spare: Chain,
}

struct Sending {
    chain: Chain,
    sent: usize,
}

impl PortState {
    pub fn new(port: Port) -> Self {
        Self {
            port,
            open: false,
            ready: false,
            told: Some(false),
            sending: None,
            incoming: Vec::new(),
            spare: Chain::default(),
        }
    }

    /// The guest has started over.
    pub fn reset(&mut self) {
        (self.ready, self.open, self.told) = (false, false, Some(false));
        self.sending = None;
        self.spare.clear();
    }

    /// The guest has taken back the queue to the host.
    pub fn forget_sending(&mut self) {
        self.sending = None;
    }

    /// From the guest.
    pub fn transmit(&mut self, turn: &mut Turn<'_>) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            let mut sending = match self.sending.take() {
                Some(sending) => sending,
                None => {
                    let mut chain = std::mem::take(&mut self.spare);
                    if !turn.pop(&mut chain)? {
                        chain.clear();
                        self.spare = chain;
                        return turn.end();
                    }
                    Sending { chain, sent: 0 }
                }
            };
            match self.send(&mut sending) {
                Sent::All => {
                    turn.complete(&sending.chain, 0)?;
                    self.spare = sending.chain;
                }
                Sent::Part => self.sending = Some(sending),
                Sent::Blocked => {
                    self.sending = Some(sending);
                    turn.announce()?;
                    return Ok(Progress::Host);
                }
            }
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    /// The next piece.
    fn send(&mut self, sending: &mut Sending) -> Sent {
        let mut reader = sending.chain.reader();
        reader.take(sending.sent);
        if !self.open || reader.is_empty() {
            return Sent::All;
        }
        let mut bytes = [0; PIECE];
        let len = reader.read(&mut bytes);
        match self
            .port
            .endpoint
            .write(bytes.get(..len).unwrap_or_default())
        {
            Ok(written) if written > 0 => {
                sending.sent = sending.sent.saturating_add(written);
                Sent::Part
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Sent::Part,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
            Ok(_) | Err(_) => {
                self.port.endpoint.close();
                Sent::All
            }
        }
    }

    /// To the guest.
    pub fn receive(&mut self, turn: &mut Turn<'_>) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            if self.incoming.is_empty() && !self.fetch() {
                turn.announce()?;
                return Ok(Progress::Host);
            }
            if !turn.pop(&mut self.spare)? {
                match turn.end()? {
                    Progress::More => continue,
                    waiting => return Ok(waiting),
                }
            }
            let written = self.spare.writer().write(&self.incoming);
            self.incoming.drain(..written.min(self.incoming.len()));
            turn.complete(&self.spare, written)?;
            self.spare.clear();
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    /// Whether there was something from the host.
    fn fetch(&mut self) -> bool {
        if !self.open {
            return false;
        }
        let mut bytes = [0; PIECE];
        match self.port.endpoint.read(&mut bytes) {
            Ok(read) if read > 0 => {
                let bytes = bytes.get(..read).unwrap_or_default();
                self.incoming.extend_from_slice(bytes);
                true
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                false
            }
            // A pseudo-terminal that nobody has open says EIO.
            Ok(_) | Err(_) => {
                self.port.endpoint.close();
                false
            }
        }
    }

    /// What to wait for at the host's end; `None` if that is for nothing, or if it has to be looked at now
    /// and then.
    pub fn watch(
        &self,
        transmit: Progress,
        receive: Progress,
    ) -> Option<(Arc<dyn Descriptor>, PollFlags)> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLOUT, transmit == Progress::Host);
        // Somebody who comes is waited for as something to read.
        wanted.set(PollFlags::POLLIN, receive == Progress::Host || !self.open);
        let descriptor = self.port.endpoint.descriptor(self.open)?;
        (!wanted.is_empty()).then_some((descriptor, wanted))
    }
}

/// What became of a piece.
enum Sent {
    /// That was the last one, or nobody is there for it.
    All,
    Part,
    Blocked,
}
