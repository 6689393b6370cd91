//! The network device (virtio 1.3, section 5.1) over a tap of the host.
//!
//! Each pair of queues has a thread and a descriptor of the tap. Packets have the same header on both
//! sides, so checksums and segmentation are left to whoever does them best: the header goes through as it
//! is, and the host's kernel checks it.

mod control;
mod link;
mod pair;

use std::sync::{Arc, Mutex};

use crate::device::{Activation, Device, DeviceKind, read_bytes};
use crate::features::Features;
use crate::memory::Words;
use crate::queue::Queue;
use crate::served::{Served, lock};
use control::{Chosen, Control};
use pair::{Lane, Pair};

pub use link::{Link, LinkError};

/// Feature bits of the type (section 5.1.3).
pub mod feature {
    use crate::features::Features;

    /// The device takes packets whose checksum is still to be computed.
    pub const CSUM: Features = Features::from_bits_retain(1 << 0);
    /// So does the driver.
    pub const GUEST_CSUM: Features = Features::from_bits_retain(1 << 1);
    /// The device has an address.
    pub const MAC: Features = Features::from_bits_retain(1 << 5);
    /// The driver takes unsegmented TCP packets, over IPv4.
    pub const GUEST_TSO4: Features = Features::from_bits_retain(1 << 7);
    /// Over IPv6.
    pub const GUEST_TSO6: Features = Features::from_bits_retain(1 << 8);
    /// With congestion notification.
    pub const GUEST_ECN: Features = Features::from_bits_retain(1 << 9);
    /// The device takes unsegmented TCP packets, over IPv4.
    pub const HOST_TSO4: Features = Features::from_bits_retain(1 << 11);
    /// Over IPv6.
    pub const HOST_TSO6: Features = Features::from_bits_retain(1 << 12);
    /// With congestion notification.
    pub const HOST_ECN: Features = Features::from_bits_retain(1 << 13);
    /// A packet for the driver may be spread over several of its buffers.
    pub const MRG_RXBUF: Features = Features::from_bits_retain(1 << 15);
    /// The configuration has the state of the link.
    pub const STATUS: Features = Features::from_bits_retain(1 << 16);
    /// There is a control queue.
    pub const CTRL_VQ: Features = Features::from_bits_retain(1 << 17);
    /// It takes the driver's wishes as to what is received.
    pub const CTRL_RX: Features = Features::from_bits_retain(1 << 18);
    /// There is more than one pair of queues.
    pub const MQ: Features = Features::from_bits_retain(1 << 22);
    /// The control queue sets the address.
    pub const CTRL_MAC_ADDR: Features = Features::from_bits_retain(1 << 23);
}

/// Work that is left to whoever does it best: offered unless the operator has forbidden it.
const OFFLOADS: Features = feature::CSUM
    .union(feature::GUEST_CSUM)
    .union(feature::GUEST_TSO4)
    .union(feature::GUEST_TSO6)
    .union(feature::GUEST_ECN)
    .union(feature::HOST_TSO4)
    .union(feature::HOST_TSO6)
    .union(feature::HOST_ECN);

/// What every device offers. Packets keep their order anyway, and with them their buffers.
const FEATURES: Features = Features::IN_ORDER
    .union(feature::MAC)
    .union(feature::MRG_RXBUF)
    .union(feature::STATUS)
    .union(feature::CTRL_VQ)
    .union(feature::CTRL_RX)
    .union(feature::CTRL_MAC_ADDR);

/// Descriptors of each queue of packets.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;

/// VIRTIO_NET_S_LINK_UP: the link is always up, as a tap is that somebody holds.
const LINK_UP: u16 = 1;

/// What carries out commands, without a link. For the fuzz target.
pub(crate) fn fuzz_control() -> Control {
    Control::new(0, Arc::new(Chosen::new([0; 6])))
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    chosen: Arc<Chosen>,
    /// Each with its thread; none, if this only stands in.
    pairs: Vec<Arc<Served<Pair>>>,
    count: u16,
    queue_sizes: Vec<u16>,
    features: Features,
    /// The driver knows of more than one pair.
    multiqueue: bool,
}

impl Net {
    /// A card with this address and a pair of queues for each link, at least one; not active.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn new(links: Vec<Link>, mac: [u8; 6]) -> std::io::Result<Self> {
        let links: Arc<[Link]> = links.into();
        let mut net = Self::without_links(links.len() as u16, mac);
        for index in 0..net.count {
            let control = (index == 0).then(|| Control::new(net.count, Arc::clone(&net.chosen)));
            let pair = Pair::new(index, Arc::clone(&links), control);
            // Used for every packet from the host, and too large for a stack.
            let mut packet = pair::packet();
            let links = Arc::clone(&links);
            let step = move |pair: &Mutex<Pair>| {
                loop {
                    let job = lock(pair).job();
                    let Some(job) = job else { break };
                    let done = job.run(index, &links);
                    lock(pair).done(job, done);
                }
                lock(pair).step(&mut packet)
            };
            net.pairs
                .push(Served::start(format!("virtio-net{index}"), pair, step)?);
        }
        Ok(net)
    }

    /// What can be seen of a card with so many pairs of queues. It does nothing with them: see [`crate::late`].
    pub fn without_links(count: u16, mac: [u8; 6]) -> Self {
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(count).saturating_mul(2)];
        queue_sizes.push(CONTROL_SIZE);
        let mut features = FEATURES | OFFLOADS;
        if count > 1 {
            features |= feature::MQ;
        }
        Self {
            chosen: Arc::new(Chosen::new(mac)),
            pairs: Vec::new(),
            count,
            queue_sizes,
            features,
            multiqueue: false,
        }
    }

    /// The same with every packet whole and its checksum computed, in both directions.
    #[must_use]
    pub fn without_offloads(mut self) -> Self {
        self.features.remove(OFFLOADS);
        self
    }

    /// Which thread has a queue, and what the queue is there (section 5.1.2): pairs of receive and transmit,
    /// then control, which is the first thread's. For a driver that has not negotiated MQ there is one pair.
    fn lane(&self, queue: u16) -> Option<(&Arc<Served<Pair>>, Lane)> {
        let pair = usize::from(queue / 2);
        let pairs = if self.multiqueue { self.pairs.len() } else { 1 };
        if pair >= pairs {
            let control = pair == pairs && queue.is_multiple_of(2);
            return control.then_some((self.pairs.first()?, Lane::Control));
        }
        let lane = if queue.is_multiple_of(2) {
            Lane::Receive
        } else {
            Lane::Transmit
        };
        Some((self.pairs.get(pair)?, lane))
    }

    fn set_queue(&self, index: u16, queue: Option<Queue>) {
        if let Some((pair, lane)) = self.lane(index) {
            pair.lock().set_queue(lane, index, queue);
            pair.wake();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for pair in &self.pairs {
            pair.end(Pair::deactivate);
        }
    }
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> Features {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Address, state of the link, the most pairs (section 5.1.4).
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let [s0, s1] = LINK_UP.to_le_bytes();
        let [p0, p1] = self.count.to_le_bytes();
        let [m0, m1, m2, m3, m4, m5] = self.chosen.mac();
        let config = [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1];
        read_bytes(&config, offset, data);
    }

    /// Legacy drivers write the address.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut mac = self.chosen.mac();
        for (place, byte) in mac.iter_mut().skip(offset).zip(data) {
            *place = *byte;
        }
        self.chosen.set_mac(mac);
    }

    fn kept_words(&self) -> usize {
        Chosen::WORDS
    }

    fn keep(&mut self, words: Words) {
        self.chosen.keep(words);
    }

    fn activate(&mut self, activation: Activation) {
        self.multiqueue = activation.features.contains(feature::MQ);
        for pair in &self.pairs {
            let Activation {
                ram,
                events,
                features,
                ..
            } = &activation;
            pair.lock()
                .activate(Arc::clone(ram), Arc::clone(events), *features);
            pair.wake();
        }
        for (index, queue) in activation.queues {
            self.set_queue(index, Some(queue));
        }
    }

    fn notify(&self, queue: u16) {
        if let Some((pair, _)) = self.lane(queue) {
            pair.wake();
        }
    }

    fn reset(&mut self) {
        for pair in &self.pairs {
            pair.lock().deactivate();
        }
        self.chosen.forget();
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        self.set_queue(queue, None);
    }

    fn is_queue_reset(&self, _queue: u16) -> bool {
        true
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.set_queue(index, Some(queue));
    }
}
