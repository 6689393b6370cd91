//! The console device (virtio 1.3, section 5.3): ports of bytes, each joined to a pseudo-terminal or a
//! socket of the host.
//!
//! One thread serves all ports. Nothing in it waits but for descriptors, so taking a queue from it is a
//! matter of a lock.

mod control;
mod endpoint;
mod engine;
mod port;
mod progress;

use std::sync::Arc;

use crate::device::{Activation, Device, DeviceKind, read_bytes};
use crate::features::Features;
use crate::memory::Words;
use crate::queue::Queue;
use crate::served::{Served, lock};
use engine::Engine;
use port::PortState;

pub use endpoint::{Endpoint, Keeper};

/// Feature bits of the type (section 5.3.3).
pub mod feature {
    use crate::features::Features;

    /// There can be more than one port, and control queues.
    pub const MULTIPORT: Features = Features::from_bits_retain(1 << 1);
}

/// A port: what the guest calls it, and where its bytes go.
#[derive(Debug)]
pub struct Port {
    /// `/dev/virtio-ports/NAME` in a Linux guest. The first port is a console, and needs none.
    pub name: String,
    /// The host's end.
    pub endpoint: Endpoint,
}

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;

/// A console device.
#[derive(Debug)]
pub struct Console {
    engine: Arc<Served<Engine>>,
    queue_sizes: Vec<u16>,
    ports: u32,
}

/// The queues of port `port`: to the guest, and from it (section 5.3.2).
fn queues_of_port(port: usize) -> (u16, u16) {
    let first = match port {
        0 => 0,
        port => port.saturating_mul(2).saturating_add(2) as u16,
    };
    (first, first.saturating_add(1))
}

/// Control messages to the guest.
const CONTROL_RECEIVE: u16 = 2;
/// Control messages from the guest.
const CONTROL_TRANSMIT: u16 = 3;

impl Console {
    /// A device with these ports, at least one, not active.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn new(ports: Vec<Port>) -> std::io::Result<Self> {
        let count = ports.len();
        Self::with(count, ports)
    }

    /// What can be seen of a device with so many ports. It does nothing with its queues: see [`crate::late`].
    ///
    /// # Errors
    /// As [`Console::new`].
    pub fn without_ports(count: usize) -> std::io::Result<Self> {
        Self::with(count, Vec::new())
    }

    fn with(count: usize, ports: Vec<Port>) -> std::io::Result<Self> {
        let (_, last) = queues_of_port(count.saturating_sub(1));
        let queues = usize::from(last.max(CONTROL_TRANSMIT)).saturating_add(1);
        let engine = Engine::new(ports, queues);
        Ok(Self {
            engine: Served::start("virtio-console".into(), engine, |engine| {
                lock(engine).step()
            })?,
            queue_sizes: vec![QUEUE_SIZE; queues],
            ports: count as u32,
        })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.engine.end(Engine::deactivate);
    }
}

impl Device for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> Features {
        feature::MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Columns and rows, which mean nothing without the feature, and the most ports.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let [p0, p1, p2, p3] = self.ports.to_le_bytes();
        let config = [0, 0, 0, 0, p0, p1, p2, p3];
        read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn kept_words(&self) -> usize {
        PortState::WORDS.saturating_mul(self.ports as usize)
    }

    fn keep(&mut self, words: Words) {
        self.engine.lock().keep(&words);
    }

    fn activate(&mut self, activation: Activation) {
        self.engine.lock().activate(activation);
        self.engine.wake();
    }

    fn notify(&self, _queue: u16) {
        self.engine.wake();
    }

    fn reset(&mut self) {
        self.engine.lock().reset();
    }

    fn is_reset(&self) -> bool {
        true
    }

    fn reset_queue(&mut self, queue: u16) {
        self.engine.lock().set_queue(queue, None);
    }

    fn is_queue_reset(&self, _queue: u16) -> bool {
        true
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.engine.lock().set_queue(index, Some(queue));
        self.engine.wake();
    }
}
