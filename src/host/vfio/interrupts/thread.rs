//! The thread that passes a device's interrupts on.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use conf_space::address::Bdf;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use xenbus::Gsi;
use xenbus::sim::Machine;

use super::super::lock;
use super::{Listener, Message, Mode, State};

/// Who has signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    MsiX(u16),
    Msi(u16),
    Line,
    Error,
    Request,
    Stop,
}

impl Source {
    pub fn token(self) -> u64 {
        let (kind, index) = match self {
            Self::MsiX(entry) => (0, entry),
            Self::Msi(vector) => (1, vector),
            Self::Line => (2, 0),
            Self::Error => (3, 0),
            Self::Request => (4, 0),
            Self::Stop => (5, 0),
        };
        (kind << 16) | u64::from(index)
    }

    fn of(token: u64) -> Option<Self> {
        let [low, high, ..] = token.to_le_bytes();
        let index = u16::from_le_bytes([low, high]);
        Some(match token >> 16 {
            0 => Self::MsiX(index),
            1 => Self::Msi(index),
            2 => Self::Line,
            3 => Self::Error,
            4 => Self::Request,
            5 => Self::Stop,
            _ => return None,
        })
    }
}

/// What the thread and those who wire the interrupts share.
#[derive(Debug)]
pub(super) struct Inner {
    pub bdf: Bdf,
    pub device: Arc<File>,
    pub machine: Machine,
    /// What the INTx line is to the machine; `None`: the device has none, or is not to use it.
    pub line: Option<Gsi>,
    pub listener: Arc<dyn Listener>,
    pub epoll: Epoll,
    /// The line was raised, and is masked by the kernel until it is unmasked.
    pub raised: AtomicBool,
    pub state: Mutex<State>,
    /// Errors, requests, and the end: signalled as long as the device is open.
    pub standing: [EventFd; 3],
}

impl Inner {
    pub fn listen(&self, event: &EventFd, source: Source) -> io::Result<()> {
        let wanted = EpollEvent::new(EpollFlags::EPOLLIN, source.token());
        Ok(self.epoll.add(event, wanted)?)
    }

    /// The thread: until the device is closed.
    pub fn pass_on(&self) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => {
                    return log::error!("{}: its interrupts are lost: {error}", self.bdf);
                }
            };
            for event in events.iter().take(count) {
                match Source::of(event.data()) {
                    Some(Source::Stop) => return,
                    Some(source) => self.serve(source),
                    None => {}
                }
            }
        }
    }

    fn serve(&self, source: Source) {
        let [errors, requests, _] = &self.standing;
        match source {
            Source::MsiX(entry) => {
                let message = lock(&self.state)
                    .vectors
                    .get(&entry)
                    .filter(|vector| vector.event.read().is_ok())
                    .map(|vector| vector.message);
                self.send(message, 0);
            }
            Source::Msi(vector) => {
                let message = {
                    let state = lock(&self.state);
                    let event = state.events.get(usize::from(vector));
                    let fired =
                        state.mode == Mode::Msi && event.is_some_and(|event| event.read().is_ok());
                    state.msi.filter(|_| fired)
                };
                self.send(message, vector);
            }
            Source::Line => {
                let fired = {
                    let state = lock(&self.state);
                    state.mode == Mode::Line
                        && state.events.iter().any(|event| event.read().is_ok())
                };
                if let Some(line) = self.line.filter(|_| fired) {
                    self.raised.store(true, Ordering::Release);
                    self.machine.raise_gsi(line);
                }
            }
            Source::Error => {
                let _ = errors.read();
                self.listener.error(self.bdf);
            }
            Source::Request => {
                let _ = requests.read();
                self.listener.requested(self.bdf);
            }
            Source::Stop => {}
        }
    }

    /// A device with several MSI vectors puts the vector's number into the lowest bits of the data.
    fn send(&self, message: Option<Message>, vector: u16) {
        if let Some(Message { address, data }) = message {
            self.machine.deliver_msi(address, data | u32::from(vector));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_is_told_by_its_token() {
        let all = [
            Source::MsiX(0),
            Source::MsiX(2047),
            Source::Msi(31),
            Source::Line,
            Source::Error,
            Source::Request,
            Source::Stop,
        ];
        for source in all {
            assert_eq!(Source::of(source.token()), Some(source));
        }
        assert_eq!(Source::of(u64::MAX), None);
    }
}
