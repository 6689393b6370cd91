//! The block device (virtio 1.3, section 5.2) over a file or a block device of the host.

mod config;
mod direct;
mod image;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use zerocopy::IntoBytes;

use crate::device::{Activation, Device, DeviceKind, read_bytes};
use crate::features::Features;
use crate::memory::{TooShort, Words};
use crate::queue::{Chain, Queue};
use crate::worker::{Handler, Service, Workers};
use config::Config;
use request::Executor;

use image::Geometry;

pub use image::{Image, ImageError};

/// Feature bits of the type (section 5.2.3).
pub mod feature {
    use crate::features::Features;

    /// A request has at most as many buffers as the configuration says.
    pub const SEG_MAX: Features = Features::from_bits_retain(1 << 2);
    /// The disk is read-only.
    pub const RO: Features = Features::from_bits_retain(1 << 5);
    /// The configuration has the block size.
    pub const BLK_SIZE: Features = Features::from_bits_retain(1 << 6);
    /// There is a cache, and a request that writes it back.
    pub const FLUSH: Features = Features::from_bits_retain(1 << 9);
    /// The configuration says what the best sizes of requests are.
    pub const TOPOLOGY: Features = Features::from_bits_retain(1 << 10);
    /// The driver can switch the cache between writing back and writing through.
    pub const CONFIG_WCE: Features = Features::from_bits_retain(1 << 11);
    /// There is more than one queue.
    pub const MQ: Features = Features::from_bits_retain(1 << 12);
    /// Sectors can be told to be of no use any more.
    pub const DISCARD: Features = Features::from_bits_retain(1 << 13);
    /// Sectors can be zeroed without sending zeroes.
    pub const WRITE_ZEROES: Features = Features::from_bits_retain(1 << 14);
}

/// The unit of capacity and of requests, whatever the block size.
pub const SECTOR: u64 = 512;

/// What a disk is like, besides its image.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many queues, at least one. Linux uses one for each vCPU if there are as many.
    pub queues: u16,
    /// Descriptors of each queue, a power of two.
    pub queue_size: u16,
    /// What the guest sees as the disk's serial number: the first 20 bytes of it.
    pub serial: String,
    /// The kernel works on requests meanwhile (io_uring), where that is possible.
    pub io_uring: bool,
    /// Elsewhere: how many requests of a queue are worked on at a time when the storage is slow.
    pub threads: usize,
    /// The longest time for which an empty queue is looked at before its threads sleep.
    pub poll: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            serial: String::new(),
            io_uring: true,
            threads: 8,
            poll: Duration::from_micros(32),
        }
    }
}

/// What requests need to know of the device as it is now.
#[derive(Debug)]
struct Negotiated {
    features: AtomicU64,
    /// What the driver has set of the cache (CONFIG_WCE).
    cache: AtomicU8,
}

/// The driver has set nothing.
const CACHE_DEFAULT: u8 = 0;
const CACHE_WRITE_THROUGH: u8 = 1;
const CACHE_WRITE_BACK: u8 = 2;

/// The words that a disk keeps: what the driver has set of the cache, and what the image is like, which is still to be seen when that is missing.
const KEPT_CACHE: usize = 0;
const KEPT_SECTORS: usize = 1;
const KEPT_BLOCK_SIZE: usize = 2;

impl Default for Negotiated {
    /// Until it is agreed on, a driver is taken to know how to flush.
    fn default() -> Self {
        Self {
            features: AtomicU64::new(feature::FLUSH.bits()),
            cache: AtomicU8::new(CACHE_DEFAULT),
        }
    }
}

impl Negotiated {
    fn has(&self, feature: Features) -> bool {
        Features::from_bits_retain(self.features.load(Ordering::Relaxed)).contains(feature)
    }

    /// The field of the configuration. At first a driver that cannot flush has no cache (section 5.2.5.2).
    fn writeback(&self) -> bool {
        match self.cache.load(Ordering::Relaxed) {
            CACHE_WRITE_THROUGH => false,
            CACHE_WRITE_BACK => true,
            _ => self.has(feature::FLUSH),
        }
    }

    /// Writes may stay in the host's cache until the driver flushes it. A driver that cannot flush
    /// counts on their not doing so (section 5.2.6.2).
    fn is_writeback(&self) -> bool {
        if self.has(feature::CONFIG_WCE) {
            self.writeback()
        } else {
            self.has(feature::FLUSH)
        }
    }
}

/// What carries out requests, on a disk of 64 sectors in memory. For the fuzz target.
pub(crate) fn fuzz_handler() -> Option<Arc<dyn Handler>> {
    let negotiated = Arc::new(Negotiated::default());
    negotiated.features.store(u64::MAX, Ordering::Relaxed);
    let image = Arc::new(Image::in_memory(64)?);
    Some(Arc::new(Executor::new(
        image,
        negotiated,
        &Options::default(),
    )))
}

/// Carries out nothing.
struct Nobody;

impl Handler for Nobody {
    fn handle(&self, _: &Chain) -> Result<u32, TooShort> {
        Err(TooShort)
    }
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    geometry: Geometry,
    /// This only stands in: the geometry is what is kept.
    is_missing: bool,
    negotiated: Arc<Negotiated>,
    kept: Option<Words>,
    queue_sizes: Vec<u16>,
    workers: Workers,
}

impl Blk {
    /// A disk of `image`, not active.
    pub fn new(image: Image, options: &Options) -> Self {
        let geometry = image.geometry();
        let negotiated = Arc::new(Negotiated::default());
        let executor = Executor::new(Arc::new(image), Arc::clone(&negotiated), options);
        Self::with(geometry, negotiated, Arc::new(executor), options)
    }

    /// What can be seen of a disk whose image is missing now: it is as large as what it keeps says. It does nothing with its queues: see
    /// [`crate::late`].
    pub fn without_image(read_only: bool, options: &Options) -> Self {
        let geometry = Geometry {
            sectors: 0,
            block_size: SECTOR as u32,
            read_only,
        };
        let mut disk = Self::with(geometry, Arc::default(), Arc::new(Nobody), options);
        disk.is_missing = true;
        disk
    }

    fn with(
        geometry: Geometry,
        negotiated: Arc<Negotiated>,
        handler: Arc<dyn Handler>,
        options: &Options,
    ) -> Self {
        let service = Service {
            threads: options.threads,
            poll: options.poll,
        };
        Self {
            geometry,
            is_missing: false,
            negotiated,
            kept: None,
            queue_sizes: vec![options.queue_size; options.queues.max(1).into()],
            workers: Workers::new(handler, service),
        }
    }

    fn config(&self) -> Config {
        let queue_size = self.queue_sizes.first().copied().unwrap_or(0);
        Config::new(
            &self.geometry,
            queue_size,
            self.queue_sizes.len() as u16,
            self.negotiated.writeback(),
        )
    }

    fn set_cache(&self, cache: u8) {
        if let Some(kept) = &self.kept {
            kept.set(KEPT_CACHE, cache.into());
        }
        self.negotiated.cache.store(cache, Ordering::Relaxed);
    }
}

impl Device for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> Features {
        let mut features =
            feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        if self.geometry.read_only {
            features |= feature::RO;
        } else {
            features |= feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES;
        }
        if self.queue_sizes.len() > 1 {
            features |= feature::MQ;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_bytes(self.config().as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == Config::WRITEBACK
            && let [value] = *data
        {
            self.set_cache(if value == 0 {
                CACHE_WRITE_THROUGH
            } else {
                CACHE_WRITE_BACK
            });
        }
    }

    fn kept_words(&self) -> usize {
        3
    }

    fn keep(&mut self, words: Words) {
        if self.is_missing {
            self.geometry.sectors = words.get(KEPT_SECTORS);
            self.geometry.block_size = (words.get(KEPT_BLOCK_SIZE) & 0xffff_ffff) as u32;
        } else {
            words.set(KEPT_SECTORS, self.geometry.sectors);
            words.set(KEPT_BLOCK_SIZE, self.geometry.block_size.into());
        }
        let cache = (words.get(KEPT_CACHE) & 0xff) as u8;
        self.negotiated.cache.store(cache, Ordering::Relaxed);
        self.kept = Some(words);
    }

    fn agree(&mut self, features: Features) {
        let features = features.bits();
        self.negotiated.features.store(features, Ordering::Relaxed);
    }

    fn activate(&mut self, activation: Activation) {
        self.agree(activation.features);
        self.workers.activate(activation);
    }

    fn notify(&self, queue: u16) {
        self.workers.notify(queue);
    }

    fn reset(&mut self) {
        self.workers.reset();
        self.set_cache(CACHE_DEFAULT);
        self.agree(feature::FLUSH);
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
