//! A pair of queues, and packets on their way.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::control::{Control, attach};
use super::{Link, feature};
use crate::device::Events;
use crate::features::Features;
use crate::memory::GuestRam;
use crate::queue::{Chain, Queue, RingError};
use crate::served::Next;
use crate::turn::{Progress, Turn};

/// The header of a packet (virtio 1.3, section 5.1.6), with `num_buffers` at its end.
const HEADER: usize = 12;
/// Without, as legacy drivers have it that do not merge buffers.
const SHORT_HEADER: usize = 10;
/// Where `num_buffers` is.
const NUM_BUFFERS: usize = 10;
/// The longest packet, with its header: what segmentation offload makes of a 64 KiB segment.
const MAX_PACKET: usize = HEADER + 14 + 65535 + 8;

/// Packets in one direction before the other has its turn.
const BATCH: usize = 64;

/// Room for a packet.
pub(super) fn packet() -> Box<[u8]> {
    vec![0; MAX_PACKET].into()
}

/// Which of the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Receive,
    Transmit,
    Control,
}

/// See the module.
pub(super) struct Pair {
    index: u16,
    links: Arc<[Link]>,
    control: Option<Control>,
    queues: [Option<(u16, Queue)>; 3],
    live: Option<Live>,
    /// How often the device was activated.
    life: u64,
    chain: Chain,
    arriving: Arriving,
}

struct Live {
    ram: Arc<GuestRam>,
    events: Arc<dyn Events>,
    features: Features,
    /// The tap does what was agreed on.
    is_set_up: bool,
}

/// What the kernel does as soon as others leave network devices alone: nobody who needs the pair waits for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Job {
    /// Of which life of the device, or of its control queue.
    life: u64,
    task: Task,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Has the tap do what was agreed on, and pass packets to so many pairs.
    SetUp {
        features: Features,
        pairs: Option<u16>,
    },
    /// Has it pass packets to so many pairs.
    Attach { pairs: u16 },
}

impl Job {
    /// Does it, which may take a while.
    ///
    /// # Errors
    /// The kernel's.
    pub fn run(&self, index: u16, links: &[Link]) -> io::Result<()> {
        match self.task {
            Task::SetUp { features, pairs } => {
                if let Some(link) = links.get(usize::from(index)) {
                    link.configure(header(features), features)?;
                }
                // As many as can be had: packets come by the first in any case.
                let _ = pairs.map(|pairs| attach(links, pairs));
                Ok(())
            }
            Task::Attach { pairs } => attach(links, pairs),
        }
    }
}

/// A packet on its way to the driver.
#[derive(Debug, Default)]
struct Arriving {
    /// Bytes of it, header and all, that lie in the thread's buffer; 0: there is none.
    len: usize,
    /// How many of them the driver has got.
    done: usize,
    /// Buffers that are full, but not given back yet: how many there are is in the first of them.
    first: Option<(Chain, usize)>,
    others: Vec<(Chain, usize)>,
    /// To be used again.
    spare: Vec<Chain>,
    /// The link gave an error: it is down, or the kernel uses other queues.
    failed: bool,
    /// Packets that were too long for all of the driver's buffers together.
    too_long: u64,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("index", &self.index)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// What the thread waits for.
pub(super) struct Waiting {
    links: Arc<[Link]>,
    index: u16,
    /// A link that gives errors is tried after a while: nothing tells when it is up again.
    next: Next,
    packets: bool,
}

impl crate::served::Waiting for Waiting {
    fn next(&self) -> Next {
        self.next
    }

    fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let link = self.links.get(usize::from(self.index));
        let link = link.filter(|_| self.packets);
        link.into_iter()
            .map(|link| (link.as_fd(), PollFlags::POLLIN))
    }
}

impl Pair {
    pub fn new(index: u16, links: Arc<[Link]>, control: Option<Control>) -> Self {
        Self {
            index,
            links,
            control,
            queues: [None, None, None],
            live: None,
            life: 0,
            chain: Chain::default(),
            arriving: Arriving::default(),
        }
    }

    pub fn activate(&mut self, ram: Arc<GuestRam>, events: Arc<dyn Events>, features: Features) {
        self.life = self.life.wrapping_add(1);
        self.live = Some(Live {
            ram,
            events,
            features,
            is_set_up: false,
        });
    }

    /// What is to be done first, without the pair.
    pub fn job(&self) -> Option<Job> {
        let live = self.live.as_ref()?;
        let control = self.control.as_ref();
        let task = if live.is_set_up {
            let pairs = control?.wanted_pairs()?;
            Task::Attach { pairs }
        } else {
            let features = live.features;
            let pairs = control.map(Control::pairs);
            Task::SetUp { features, pairs }
        };
        let life = self.life;
        Some(Job { life, task })
    }

    /// It is done. Nobody wants to know any more if the device was reset meanwhile.
    pub fn done(&mut self, job: Job, done: io::Result<()>) {
        let Some(live) = self.live.as_mut().filter(|_| job.life == self.life) else {
            return;
        };
        match (job.task, done) {
            (Task::SetUp { .. }, Ok(())) => live.is_set_up = true,
            (Task::SetUp { .. }, Err(error)) => {
                let events = Arc::clone(&live.events);
                self.deactivate();
                events.needs_reset(&format_args!(
                    "the tap does not do what was agreed on: {error}"
                ));
            }
            (Task::Attach { .. }, done) => {
                if let Some(control) = &mut self.control {
                    control.attached(done.is_ok());
                }
            }
        }
    }

    pub fn deactivate(&mut self) {
        self.live = None;
        self.queues = [None, None, None];
        self.arriving = Arriving::default();
        if let Some(control) = &mut self.control {
            control.forget();
        }
        // It holds the guest's memory if the driver broke its ring in the middle of a packet.
        self.chain.clear();
    }

    pub fn set_queue(&mut self, lane: Lane, index: u16, queue: Option<Queue>) {
        match (lane, &mut self.control) {
            (Lane::Receive, _) => self.arriving = Arriving::default(),
            (Lane::Control, Some(control)) => {
                // What the kernel is at answers nobody.
                control.forget();
                self.life = self.life.wrapping_add(1);
            }
            _ => {}
        }
        let [receive, transmit, control] = &mut self.queues;
        let place = match lane {
            Lane::Receive => receive,
            Lane::Transmit => transmit,
            Lane::Control => control,
        };
        *place = queue.map(|queue| (index, queue));
    }

    /// Does all that can be done now. `packet` is where a packet from the host lies.
    pub fn step(&mut self, packet: &mut [u8]) -> Waiting {
        let mut waiting = Waiting {
            links: Arc::clone(&self.links),
            index: self.index,
            next: Next::default(),
            packets: false,
        };
        let Some(live) = self.live.as_ref().filter(|live| live.is_set_up) else {
            return waiting;
        };
        let (ram, events) = (Arc::clone(&live.ram), Arc::clone(&live.events));
        if let Err(error) = self.serve(live.features, &ram, &*events, packet, &mut waiting) {
            self.deactivate();
            events.needs_reset(&error);
        }
        waiting
    }

    fn serve(
        &mut self,
        features: Features,
        ram: &GuestRam,
        events: &dyn Events,
        packet: &mut [u8],
        waiting: &mut Waiting,
    ) -> Result<(), RingError> {
        let [receive, transmit, control] = &mut self.queues;
        let Some(link) = self.links.get(usize::from(self.index)) else {
            return Ok(());
        };
        if let (Some(handler), Some((index, queue))) = (&mut self.control, control) {
            let mut turn = Turn::new(queue, *index, ram, events);
            waiting.next.more |= handler.serve(&mut turn, features)? == Progress::More;
        }
        if let Some((index, queue)) = transmit {
            let mut turn = Turn::new(queue, *index, ram, events);
            waiting.next.more |= transmit_all(link, &mut turn, &mut self.chain)? == Progress::More;
            self.chain.clear();
        }
        if let Some((index, queue)) = receive {
            let mut turn = Turn::new(queue, *index, ram, events);
            let progress = self.arriving.receive(link, &mut turn, features, packet)?;
            waiting.next.more |= progress == Progress::More;
            waiting.next.look = self.arriving.failed;
            waiting.packets = progress == Progress::Host && !waiting.next.look;
        }
        Ok(())
    }
}

/// How long the header of each packet is.
fn header(features: Features) -> usize {
    if features.intersects(Features::VERSION_1 | feature::MRG_RXBUF) {
        HEADER
    } else {
        SHORT_HEADER
    }
}

/// From the driver to the host.
fn transmit_all(
    link: &Link,
    turn: &mut Turn<'_>,
    chain: &mut Chain,
) -> Result<Progress, RingError> {
    for _ in 0..BATCH {
        if !turn.pop(chain)? {
            return turn.end();
        }
        let mut packet = chain.reader();
        if packet.len() <= MAX_PACKET {
            // A packet that the kernel has no room for, or finds fault with, is lost as packets are.
            let _ = packet.send(link);
        }
        turn.complete(chain, 0)?;
    }
    turn.announce()?;
    Ok(Progress::More)
}

impl Arriving {
    /// From the host to the driver.
    fn receive(
        &mut self,
        link: &Link,
        turn: &mut Turn<'_>,
        features: Features,
        packet: &mut [u8],
    ) -> Result<Progress, RingError> {
        let merge = features.contains(feature::MRG_RXBUF);
        for _ in 0..BATCH {
            if self.len == 0 {
                let received = link.receive(packet);
                self.failed = received.as_ref().is_err_and(|error| {
                    !matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    )
                });
                match received {
                    Ok(len) if len > 0 => self.len = len,
                    _ => {
                        turn.announce()?;
                        return Ok(Progress::Host);
                    }
                }
                (self.done, self.first) = (0, None);
            }
            let bytes = packet.get(..self.len).unwrap_or_default();
            match self.place(turn, bytes, merge, header(features))? {
                Some(Progress::More) => continue,
                Some(waiting) => return Ok(waiting),
                None => self.len = 0,
            }
        }
        turn.announce()?;
        Ok(Progress::More)
    }

    /// Puts the packet into buffers. `None`: all of it is there, and given to the driver.
    fn place(
        &mut self,
        turn: &mut Turn<'_>,
        bytes: &[u8],
        merge: bool,
        header: usize,
    ) -> Result<Option<Progress>, RingError> {
        while self.done < bytes.len() {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !turn.pop(&mut chain)? {
                chain.clear();
                self.spare.push(chain);
                if self.first.is_some() && turn.is_exhausted() {
                    self.lose(turn, bytes.len())?;
                    return Ok(None);
                }
                return turn.end().map(Some);
            }
            let rest = bytes.get(self.done..).unwrap_or_default();
            let mut writer = chain.writer();
            let fits = if merge { header } else { bytes.len() } <= writer.len();
            // A buffer in which nothing fits goes back empty, and the packet is lost.
            let written = if fits || self.first.is_some() {
                writer.write(rest)
            } else {
                0
            };
            self.done = self.done.saturating_add(written);
            match self.first {
                None if written == 0 => {
                    self.give_back(turn, chain, 0)?;
                    self.done = bytes.len();
                }
                None => self.first = Some((chain, written)),
                // Even one without room waits for its turn.
                Some(_) => self.others.push((chain, written)),
            }
        }
        let Some((first, written)) = self.first.take() else {
            return Ok(None);
        };
        if header == HEADER {
            let count = self.others.len().saturating_add(1) as u16;
            let mut writer = first.writer();
            writer.take(NUM_BUFFERS);
            writer.write(&count.to_le_bytes());
        }
        self.give_back(turn, first, written)?;
        // In their order.
        let mut others = std::mem::take(&mut self.others);
        for (chain, written) in others.drain(..) {
            self.give_back(turn, chain, written)?;
        }
        self.others = others;
        Ok(None)
    }

    /// Gives up a packet for which the driver has no buffers, and can have none.
    fn lose(&mut self, turn: &mut Turn<'_>, len: usize) -> Result<(), RingError> {
        self.too_long = self.too_long.saturating_add(1);
        turn.complain(&format_args!(
            "a packet of {len} bytes is lost, as all buffers that the driver can have for packets have no room for it; that were {} by now",
            self.too_long
        ));
        let mut held = std::mem::take(&mut self.others);
        for (chain, _) in self.first.take().into_iter().chain(held.drain(..)) {
            self.give_back(turn, chain, 0)?;
        }
        self.others = held;
        Ok(())
    }

    fn give_back(
        &mut self,
        turn: &mut Turn<'_>,
        mut chain: Chain,
        written: usize,
    ) -> Result<(), RingError> {
        turn.complete(&chain, written)?;
        chain.clear();
        self.spare.push(chain);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::super::control::Chosen;
    use super::*;
    use crate::rings::{BUFFERS, Driver, Guest, Nobody, readable, writable};

    /// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (virtio 1.3, section 5.1.6.5.5).
    const SET_PAIRS: [u8; 2] = [4, 0];

    fn ask(guest: &Guest, driver: &mut Driver, pairs: u8) {
        guest.write(BUFFERS, &[SET_PAIRS[0], SET_PAIRS[1], pairs, 0]);
        let parts = [readable(BUFFERS, 4), writable(BUFFERS + 0x100, 1)];
        driver.offer(guest, &parts, None).unwrap();
    }

    #[test]
    fn a_control_queue_that_is_reset_while_the_kernel_works_begins_anew() {
        let guest = Guest::default();
        let features = feature::MQ | feature::CTRL_VQ;
        let link = || {
            let (ours, _) = UnixDatagram::pair().unwrap();
            Link::of_socket(ours.into()).unwrap()
        };
        let links: Arc<[Link]> = [link(), link()].into();
        let chosen = Arc::new(Chosen::new([0; 6]));
        let control = Control::new(2, chosen);
        let mut pair = Pair::new(0, Arc::clone(&links), Some(control));
        pair.activate(Arc::clone(&guest.ram), Arc::new(Nobody), features);
        let set_up = pair.job().unwrap();
        pair.done(set_up, Ok(()));
        let mut packet = packet();
        let mut begin = |pair: &mut Pair, pairs| {
            let mut driver = Driver::new(4, 64, features);
            pair.set_queue(Lane::Control, 4, Some(driver.queue(&guest)));
            ask(&guest, &mut driver, pairs);
            pair.step(&mut packet);
            (driver, pair.job().unwrap())
        };
        let (_, late) = begin(&mut pair, 2);
        pair.set_queue(Lane::Control, 4, None);
        let (mut driver, job) = begin(&mut pair, 1);
        pair.done(late, Ok(()));
        assert_eq!(pair.job(), Some(job));
        pair.done(job, Ok(()));
        pair.step(&mut super::packet());
        assert!(driver.used(&guest).is_some());
    }
}
