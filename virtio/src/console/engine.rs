//! What the thread of a console does when something has happened: whatever can be done without waiting.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollFlags;
use zerocopy::FromBytes;

use super::control::{DEVICE_READY, Message, PORT_OPEN, PORT_READY};
use super::endpoint::Descriptor;
use super::port::{BATCH, News, PortState};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, Port, feature, queues_of_port};
use crate::device::{Activation, Events};
use crate::features::Features;
use crate::memory::{GuestRam, Words};
use crate::queue::{Chain, Queue, RingError};
use crate::served::Next;
use crate::turn::{Progress, Turn};

/// All ports, and the queues while the device is active.
pub(super) struct Engine {
    ports: Vec<PortState>,
    queues: Vec<Option<Queue>>,
    live: Option<Live>,
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
        }
    }

    /// Takes on what the ports keep, and keeps it there from now on.
    pub fn keep(&mut self, words: &Words) {
        let places = (0..).step_by(PortState::WORDS);
        for (port, place) in self.ports.iter_mut().zip(places) {
            port.keep(words.part(place, PortState::WORDS));
        }
    }

    pub fn activate(&mut self, activation: Activation) {
        self.live = Some(Live {
            ram: activation.ram,
            events: activation.events,
            features: activation.features,
        });
        for (index, queue) in activation.queues {
            self.set_queue(index, Some(queue));
        }
    }

    /// Lets go of the guest.
    pub fn deactivate(&mut self) {
        self.live = None;
        self.queues.fill_with(|| None);
        for port in &mut self.ports {
            port.let_go();
        }
    }

    /// Forgets what the guest has said, too.
    pub fn reset(&mut self) {
        self.deactivate();
        for port in &mut self.ports {
            port.reset();
        }
    }

    pub fn set_queue(&mut self, index: u16, queue: Option<Queue>) {
        for (port, state) in self.ports.iter_mut().enumerate() {
            let (receive, transmit) = queues_of_port(port);
            // What is noted of a chain means something while it is in flight.
            let has_chain = queue.as_ref().is_some_and(|queue| queue.in_flight() > 0);
            if index == transmit {
                state.sending.begin(has_chain);
            } else if index == receive {
                state.receiving.begin(has_chain);
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
        for state in &mut self.ports {
            state.look();
        }
        if multiport {
            self.give_messages(ram, events)?;
        }
        for (port, state) in self.ports.iter_mut().enumerate() {
            let (receive, transmit) = queues_of_port(port);
            let open = state.open;
            let mut progress = [Progress::Guest; 2];
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(transmit)) {
                progress[0] = state.transmit(&mut Turn::new(queue, transmit, ram, events))?;
            }
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(receive)) {
                progress[1] =
                    state.receive(&mut Turn::new(queue, receive, ram, events), multiport)?;
            }
            let [transmit, receive] = progress;
            // Somebody has gone: the driver is to be told.
            waiting.next.more |= progress.contains(&Progress::More) || open != state.open;
            match state.watch(transmit, receive) {
                Some(watched) => waiting.descriptors.push(watched),
                // Nobody tells that whoever is there has gone while nothing is wanted of him.
                None => waiting.next.look = true,
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
            // Noted before the message is given back. That it may be heard twice does no harm.
            if whole && let Ok(message) = Message::read_from_bytes(&bytes) {
                hear(&mut self.ports, message);
            }
            turn.complete(&chain, 0)?;
            turn.announce()?;
        }
        Ok(true)
    }

    fn give_messages(&mut self, ram: &GuestRam, events: &dyn Events) -> Result<(), RingError> {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(CONTROL_RECEIVE)) else {
            return Ok(());
        };
        let mut turn = Turn::new(queue, CONTROL_RECEIVE, ram, events);
        let mut chain = Chain::default();
        for (port, state) in self.ports.iter_mut().enumerate() {
            while let Some(news) = state.news() {
                if !turn.pop(&mut chain)? {
                    if turn.end()? == Progress::More {
                        continue;
                    }
                    return Ok(());
                }
                let message = state.message(port, news);
                let written = chain.writer().write(&message);
                // That the driver may be told twice does no harm, but it must not believe for ever that somebody is
                // there: who was there when we are killed is gone with us.
                let coming = news == News::Open(true);
                if coming {
                    state.is_told(news);
                }
                turn.complete(&chain, written)?;
                if !coming {
                    state.is_told(news);
                }
            }
        }
        turn.announce()
    }
}

/// What the driver says.
fn hear(ports: &mut [PortState], message: Message) {
    let port = ports.get_mut(message.port.get() as usize);
    let value = message.value.get() == 1;
    match message.event.get() {
        DEVICE_READY if value => {
            for port in ports {
                port.add();
            }
        }
        PORT_READY if value => {
            if let Some(port) = port {
                port.begin(message.port.get() == 0);
            }
        }
        PORT_OPEN => {
            if let Some(port) = port {
                port.set_guest_open(value);
            }
        }
        // A port that the driver has failed to set up stays as it is.
        _ => {}
    }
}
