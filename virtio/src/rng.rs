//! The entropy device (virtio 1.3, section 5.4): one queue, whose buffers are filled with random bytes.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::device::{Activation, Device, DeviceKind};
use crate::features::Features;
use crate::memory::TooShort;
use crate::queue::{Chain, Queue};
use crate::worker::{Handler, Service, Workers};

/// The most bytes that one buffer gets. A driver has to be content with fewer than it asked for.
const MOST: usize = 64 << 10;

/// Nobody waits for random numbers for long.
const SERVICE: Service = Service {
    threads: 1,
    poll: Duration::ZERO,
};

/// An entropy device, fed by the host's random number generator.
#[derive(Debug)]
pub struct Rng {
    workers: Workers,
}

impl Rng {
    /// A device that is not active.
    ///
    /// # Errors
    /// The host's random number generator cannot be opened.
    pub fn new() -> io::Result<Self> {
        let source = Source(File::open(SOURCE)?);
        Ok(Self {
            workers: Workers::new(Arc::new(source), SERVICE),
        })
    }
}

/// The host's random number generator. Reads of it neither end nor fail.
const SOURCE: &str = "/dev/urandom";

struct Source(File);

impl Handler for Source {
    fn handle(&self, chain: &Chain) -> Result<u32, TooShort> {
        let mut writer = chain.writer().take(MOST);
        if writer.is_empty() {
            return Err(TooShort);
        }
        Ok(writer.read_from(&self.0, 0).unwrap_or(0) as u32)
    }
}

impl Device for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        self.workers.activate(activation);
    }

    fn notify(&self, queue: u16) {
        self.workers.notify(queue);
    }

    fn reset(&mut self) {
        self.workers.reset();
    }

    fn is_reset(&self) -> bool {
        self.workers.is_reset()
    }

    fn reset_queue(&mut self, queue: u16) {
        self.workers.reset_queue(queue);
    }

    fn is_queue_reset(&self, queue: u16) -> bool {
        self.workers.is_queue_reset(queue)
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.workers.enable_queue(index, queue);
    }
}
