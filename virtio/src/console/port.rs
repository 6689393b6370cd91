//! One port: bytes from the guest to the host's end and back, as far as both take them.

use std::io;
use std::sync::Arc;

use nix::poll::PollFlags;
use zerocopy::IntoBytes;

use super::Port;
use super::control::{CONSOLE_PORT, Message, PORT_ADD, PORT_NAME, PORT_OPEN};
use super::endpoint::Descriptor;
use super::progress::Moving;
use crate::memory::Words;
use crate::queue::RingError;
use crate::turn::{Progress, Turn};

/// Bytes that are moved at a time.
const PIECE: usize = 4096;
/// Pieces and chains that are moved before the other ports have their turn.
pub(super) const BATCH: usize = 32;

bitflags::bitflags! {
    /// What the driver has said of a port, and what it is to be told. Kept over a restart.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Control: u64 {
        /// The driver is ready for the port.
        const READY = 1 << 0;
        /// It believes that somebody is at the host's end.
        const BELIEVED_OPEN = 1 << 1;
        /// It is to be told that there is the port.
        const ADD = 1 << 2;
        /// It is to be told that the port is a console.
        const CONSOLE = 1 << 3;
        /// It is to be told the port's name.
        const NAME = 1 << 4;
        /// Somebody in the guest has the port open.
        const GUEST_OPEN = 1 << 5;
    }
}

/// Something that the driver is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    Added,
    Console,
    Name,
    Open(bool),
}

/// A port and what is on its way.
pub(super) struct PortState {
    pub port: Port,
    /// Somebody was at the host's end when it was last looked.
    pub open: bool,
    control: Control,
    kept: Option<Words>,
    /// From the guest.
    pub sending: Moving,
    /// To the guest.
    pub receiving: Moving,
}

impl PortState {
    /// Words that it keeps.
    pub const WORDS: usize = 3;

    pub fn new(port: Port) -> Self {
        Self {
            port,
            open: false,
            control: Control::empty(),
            kept: None,
            sending: Moving::default(),
            receiving: Moving::default(),
        }
    }

    pub fn keep(&mut self, words: Words) {
        self.control = Control::from_bits_truncate(words.get(0));
        self.sending.keep(words.part(1, 1));
        self.receiving.keep(words.part(2, 1));
        self.kept = Some(words);
    }

    fn set(&mut self, control: Control, value: bool) {
        self.control.set(control, value);
        if let Some(kept) = &self.kept {
            kept.set(0, self.control.bits());
        }
    }

    /// The guest has started over.
    pub fn reset(&mut self) {
        self.open = false;
        self.set(Control::all(), false);
        self.sending.begin(false);
        self.receiving.begin(false);
    }

    /// Nothing of the guest's memory is held any more.
    pub fn let_go(&mut self) {
        self.sending.let_go();
        self.receiving.let_go();
    }

    /// The driver is ready for ports.
    pub fn add(&mut self) {
        self.set(Control::ADD, true);
    }

    /// The driver is ready for this port, and takes it for closed.
    pub fn begin(&mut self, console: bool) {
        let named = !self.port.name.is_empty();
        self.control
            .remove(Control::BELIEVED_OPEN | Control::GUEST_OPEN);
        self.control.set(Control::CONSOLE, console);
        self.control.set(Control::NAME, named);
        self.set(Control::READY, true);
    }

    /// Somebody in the guest has opened the port, or closed it.
    pub fn set_guest_open(&mut self, open: bool) {
        self.set(Control::GUEST_OPEN, open);
    }

    /// Looks whether somebody is at the host's end. Nobody is let in before the driver has been told that
    /// the last one is gone.
    pub fn look(&mut self) {
        let let_in = self.lets_in();
        self.open = self.port.endpoint.is_open(let_in);
    }

    fn lets_in(&self) -> bool {
        !self.control.contains(Control::BELIEVED_OPEN)
    }

    /// What the driver is to be told next.
    pub fn news(&self) -> Option<News> {
        let believed = self.control.contains(Control::BELIEVED_OPEN);
        if self.control.contains(Control::ADD) {
            Some(News::Added)
        } else if self.control.contains(Control::CONSOLE) {
            Some(News::Console)
        } else if self.control.contains(Control::NAME) {
            Some(News::Name)
        } else if self.control.contains(Control::READY) && believed != self.open {
            Some(News::Open(self.open))
        } else {
            None
        }
    }

    /// How it is said of port `port`.
    pub fn message(&self, port: usize, news: News) -> Vec<u8> {
        let (event, value) = match news {
            News::Added => (PORT_ADD, true),
            News::Console => (CONSOLE_PORT, true),
            News::Name => (PORT_NAME, true),
            News::Open(open) => (PORT_OPEN, open),
        };
        let mut bytes = Message::new(port, event, value).as_bytes().to_vec();
        if news == News::Name {
            bytes.extend_from_slice(self.port.name.as_bytes());
        }
        bytes
    }

    /// The driver knows.
    pub fn is_told(&mut self, news: News) {
        match news {
            News::Added => self.set(Control::ADD, false),
            News::Console => self.set(Control::CONSOLE, false),
            News::Name => self.set(Control::NAME, false),
            News::Open(open) => self.set(Control::BELIEVED_OPEN, open),
        }
    }

    /// From the guest.
    pub fn transmit(&mut self, turn: &mut Turn<'_>) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            if !self.sending.take(turn)? {
                return turn.end();
            }
            match self.send() {
                Sent::All => self.sending.finish(turn, 0)?,
                Sent::Part => {}
                Sent::Blocked => {
                    turn.announce()?;
                    return Ok(Progress::Host);
                }
            }
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    /// The next piece.
    fn send(&mut self) -> Sent {
        let mut reader = self.sending.chain().reader();
        reader.take(self.sending.done());
        if !self.open || reader.is_empty() {
            return Sent::All;
        }
        let mut bytes = [0; PIECE];
        let len = reader.read(&mut bytes);
        let bytes = bytes.get(..len).unwrap_or_default();
        match self.port.endpoint.write(bytes) {
            Ok(written) if written > 0 => {
                self.sending.advance(written);
                Sent::Part
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Sent::Part,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
            Ok(_) | Err(_) => {
                self.close();
                Sent::All
            }
        }
    }

    /// To the guest. Bytes are read from the host's end when there is a buffer to put them into, so that
    /// none are anywhere that a restart does not find. With several ports the driver tells when one is open
    /// in the guest. As long as it is not, the bytes wait at the host's end, for the driver would drop them.
    pub fn receive(&mut self, turn: &mut Turn<'_>, multiport: bool) -> Result<Progress, RingError> {
        for _ in 0..BATCH {
            // What was read before a restart goes first.
            let rest = self.receiving.is_under_way();
            if !rest && multiport && !self.control.contains(Control::GUEST_OPEN) {
                turn.announce()?;
                return Ok(Progress::Guest);
            }
            let more = self.open && self.port.endpoint.is_readable();
            if !(rest || more) {
                turn.announce()?;
                return Ok(Progress::Host);
            }
            if !self.receiving.take(turn)? {
                match turn.end()? {
                    Progress::More => continue,
                    waiting => return Ok(waiting),
                }
            }
            if self.receiving.done() == 0 && !self.fetch() {
                turn.announce()?;
                return Ok(Progress::Host);
            }
            let done = self.receiving.done();
            self.receiving.finish(turn, done)?;
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    /// Whether there was something from the host, and the guest has room for it.
    fn fetch(&mut self) -> bool {
        let mut writer = self.receiving.chain().writer();
        let mut bytes = [0; PIECE];
        let room = writer.len().min(PIECE);
        let Some(place) = bytes.get_mut(..room).filter(|place| !place.is_empty()) else {
            // A buffer without room goes back as it is.
            return true;
        };
        match self.port.endpoint.read(place) {
            Ok(read) if read > 0 => {
                writer.write(place.get(..read).unwrap_or_default());
                self.receiving.advance(read);
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
                self.close();
                false
            }
        }
    }

    fn close(&mut self) {
        self.port.endpoint.close();
        self.open = false;
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
        let comes = !self.open && self.lets_in();
        wanted.set(
            PollFlags::POLLIN,
            receive == Progress::Host && self.open || comes,
        );
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
