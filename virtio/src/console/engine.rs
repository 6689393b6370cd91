//! What the thread of a console does when something has happened: whatever can be done without waiting.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollFlags;
use zerocopy::{FromBytes, IntoBytes};

use super::control::{
    CONSOLE_PORT, DEVICE_READY, Message, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY,
};
use super::endpoint::Descriptor;
use super::port::{BATCH, PortState};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, Port, feature, queues_of_port};
use crate::device::{Activation, Events};
use crate::features::Features;
use crate::memory::GuestRam;
use crate::queue::{Chain, Queue, RingError};
use crate::served::Next;
use crate::turn::{Progress, Turn};

/// Control messages that wait for the driver. One that never takes any gets no more.
const MAX_MESSAGES: usize = 1024;

/// All ports, and the queues while the device is active.
pub(super) struct Engine {
    ports: Vec<PortState>,
    queues: Vec<Option<Queue>>,
    live: Option<Live>,
    /// For the driver, not taken yet.
    messages: VecDeque<Vec<u8>>,
}

struct Live {
    ram: Arc<GuestRam>,
    events: Arc<dyn Events>,
    features: Features,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// What the thread waits for.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    descriptors: Vec<(Arc<dyn Descriptor>, PollFlags)>,
    /// Whether somebody has opened a pseudo-terminal is looked at after a while: nothing tells us.
    next: Next,
}

impl crate::served::Waiting for Waiting {
    fn next(&self) -> Next {
        self.next
    }

    fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let descriptors = self.descriptors.iter();
        descriptors.map(|(fd, flags)| (fd.as_fd(), *flags))
    }
}

impl Engine {
    pub fn new(ports: Vec<Port>, queues: usize) -> Self {
        Self {
            ports: ports.into_iter().map(PortState::new).collect(),
            queues: (0..queues).map(|_| None).collect(),
            live: None,
            messages: VecDeque::new(),
        }
    }

    pub fn activate(&mut self, activation: Activation) {
        self.live = Some(Live {
            ram: activation.ram,
            events: activation.events,
            features: activation.features,
        });
        for (index, queue) in activation.queues {
            // Before the restart the driver has said all that it says only once.
            if index == CONTROL_TRANSMIT && queue.is_resumed() {
                for port in &mut self.ports {
                    (port.ready, port.told) = (true, None);
                }
            }
            self.set_queue(index, Some(queue));
        }
    }

    pub fn deactivate(&mut self) {
        self.live = None;
        self.queues.fill_with(|| None);
        self.messages.clear();
        for port in &mut self.ports {
            port.reset();
        }
    }

    pub fn set_queue(&mut self, index: u16, queue: Option<Queue>) {
        for (port, state) in self.ports.iter_mut().enumerate() {
            if queues_of_port(port).1 == index {
                state.forget_sending();
            }
        }
        if let Some(place) = self.queues.get_mut(usize::from(index)) {
            *place = queue;
        }
    }

    /// Does all that can be done now.
    pub fn step(&mut self) -> Waiting {
        let Some(live) = &self.live else {
            return Waiting::default();
        };
        let (ram, events) = (Arc::clone(&live.ram), Arc::clone(&live.events));
        let multiport = live.features.contains(feature::MULTIPORT);
        match self.serve(multiport, &ram, &*events) {
            Ok(waiting) => waiting,
            Err(error) => {
                self.deactivate();
                events.needs_reset(&error);
                Waiting::default()
            }
        }
    }

    fn serve(
        &mut self,
        multiport: bool,
        ram: &GuestRam,
        events: &dyn Events,
    ) -> Result<Waiting, RingError> {
        let mut waiting = Waiting::default();
        if multiport {
            waiting.next.more |= self.take_messages(ram, events)?;
        }
        self.note_openings();
        if multiport {
            self.give_messages(ram, events)?;
        }
        for (port, state) in self.ports.iter_mut().enumerate() {
            let (receive, transmit) = queues_of_port(port);
            let mut progress = [Progress::Guest; 2];
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(transmit)) {
                progress[0] = state.transmit(&mut Turn::new(queue, transmit, ram, events))?;
            }
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(receive)) {
                progress[1] = state.receive(&mut Turn::new(queue, receive, ram, events))?;
            }
            let [transmit, receive] = progress;
            waiting.next.more |= progress.contains(&Progress::More);
            match state.watch(transmit, receive) {
                Some(watched) => waiting.descriptors.push(watched),
                None => waiting.next.look |= !state.open,
            }
        }
        Ok(waiting)
    }

    /// Takes what the driver says. True: there may be more.
    fn take_messages(&mut self, ram: &GuestRam, events: &dyn Events) -> Result<bool, RingError> {
        let mut chain = Chain::default();
        for _ in 0..BATCH {
            let Some(Some(queue)) = self.queues.get_mut(usize::from(CONTROL_TRANSMIT)) else {
                return Ok(false);
            };
            let mut turn = Turn::new(queue, CONTROL_TRANSMIT, ram, events);
            if !turn.pop(&mut chain)? {
                return Ok(turn.end()? == Progress::More);
            }
            let mut bytes = [0; size_of::<Message>()];
            let whole = chain.reader().read_exact(&mut bytes).is_ok();
            turn.complete(&chain, 0)?;
            turn.announce()?;
            if whole && let Ok(message) = Message::read_from_bytes(&bytes) {
                self.answer(message);
            }
        }
        Ok(true)
    }

    fn answer(&mut self, message: Message) {
        let port = message.port.get() as usize;
        match message.event.get() {
            DEVICE_READY if message.value.get() == 1 => {
                for port in 0..self.ports.len() {
                    self.say(Message::new(port, PORT_ADD, true), &[]);
                }
            }
            PORT_READY if message.value.get() == 1 => {
                let Some(state) = self.ports.get_mut(port) else {
                    return;
                };
                (state.ready, state.told) = (true, Some(false));
                let name = state.port.name.clone();
                if port == 0 {
                    self.say(Message::new(port, CONSOLE_PORT, true), &[]);
                }
                if !name.is_empty() {
                    self.say(Message::new(port, PORT_NAME, true), name.as_bytes());
                }
            }
            // Who has opened the port in the guest, or failed to, changes nothing here.
            _ => {}
        }
    }

    /// Looks which ports have somebody at the host's end, and tells the driver.
    fn note_openings(&mut self) {
        for port in 0..self.ports.len() {
            let Some(state) = self.ports.get_mut(port) else {
                continue;
            };
            let open = state.port.endpoint.is_open();
            state.open = open;
            if state.ready && state.told != Some(open) {
                state.told = Some(open);
                self.say(Message::new(port, PORT_OPEN, open), &[]);
            }
        }
    }

    fn say(&mut self, message: Message, text: &[u8]) {
        if self.messages.len() < MAX_MESSAGES {
            let mut bytes = message.as_bytes().to_vec();
            bytes.extend_from_slice(text);
            self.messages.push_back(bytes);
        }
    }

    fn give_messages(&mut self, ram: &GuestRam, events: &dyn Events) -> Result<(), RingError> {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(CONTROL_RECEIVE)) else {
            return Ok(());
        };
        let mut turn = Turn::new(queue, CONTROL_RECEIVE, ram, events);
        let mut chain = Chain::default();
        while let Some(message) = self.messages.front() {
            if !turn.pop(&mut chain)? {
                if turn.end()? == Progress::More {
                    continue;
                }
                break;
            }
            let written = chain.writer().write(message);
            turn.complete(&chain, written)?;
            self.messages.pop_front();
        }
        turn.announce()
    }
}
