//! What a device model is to the transport that carries it. A device knows its queues, its
//! configuration and its feature bits; registers, interrupts and the life of the status field are
//! the transport's.

use std::fmt::Display;
use std::sync::Arc;

use crate::features::Features;
use crate::memory::{GuestRam, Words};
use crate::queue::Queue;

/// The device types offered here, by their numbers (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
}

impl DeviceKind {
    /// The number in the device id register.
    pub const fn id(self) -> u16 {
        self as u16
    }
}

/// A device model. The transport calls it from the thread that answers the guest's accesses, while
/// a vCPU of the guest waits, so nothing here blocks: the work is done by threads of the device's
/// own.
///
/// Its life: `activate` when the driver is ready, then `notify`s, then `reset`, and from the moment
/// that `is_reset` is true it may be activated again. When it is dropped its queues stop as by a reset, but
/// what it keeps stays for the next process.
pub trait Device: Send {
    /// Which type it is.
    fn kind(&self) -> DeviceKind;

    /// The feature bits of the device type itself. Those of rings and transports (bits 24 to 41) are
    /// the transport's to offer.
    fn features(&self) -> Features;

    /// The largest size of each queue. Also says how many queues there are.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the device configuration at `offset`. What lies beyond the configuration
    /// reads as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// A write to the device configuration. What is not writable stays as it is.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// How many words it has to keep over a restart, besides its queues.
    fn kept_words(&self) -> usize {
        0
    }

    /// Where it keeps them, before anything else is asked of it: as many as that, all zero, or as the same
    /// device left them. From now on whatever a driver sets of the device stands there before anybody
    /// can see that it is set; a reset forgets it.
    fn keep(&mut self, _words: Words) {}

    /// Driver and device have agreed on these features. Comes before `activate`.
    fn agree(&mut self, _features: Features) {}

    /// The driver is ready: the queues are the device's until it is reset. What goes wrong from here
    /// on is told through [`Events::needs_reset`].
    fn activate(&mut self, activation: Activation);

    /// The driver has made buffers available in `queue`. Wakes whoever serves it.
    fn notify(&self, queue: u16);

    /// Stops all queues. Requests that are under way at the host end first, which may be after this
    /// returns; none of the others is begun. A device that is not active is reset already.
    fn reset(&mut self);

    /// Nothing of what was before `reset` touches the guest's memory any more. Until then the status
    /// register of a modern device reads as not yet zero.
    fn is_reset(&self) -> bool;

    /// Stops one queue, as `reset` stops them all (VIRTIO_F_RING_RESET).
    fn reset_queue(&mut self, queue: u16);

    /// `queue` is as `is_reset` says of all of them.
    fn is_queue_reset(&self, queue: u16) -> bool;

    /// The driver has enabled a queue again that was reset while the device was live.
    fn enable_queue(&mut self, index: u16, queue: Queue);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// The queues that the driver has enabled, by index. The others are never used.
    pub queues: Vec<(u16, Queue)>,
    /// The features agreed on.
    pub features: Features,
    /// How the device makes itself heard.
    pub events: Arc<dyn Events>,
}

/// What a device tells its driver through the transport. Called from any thread; never blocks for
/// long.
pub trait Events: Send + Sync {
    /// Buffers of `queue` were used, and the driver wants to hear of it: an interrupt.
    fn used(&self, queue: u16);

    /// The device configuration changed: a new generation, and an interrupt.
    fn config_changed(&self);

    /// Something that the operator should know, in a line of the log, unless there was one a moment ago.
    fn complain(&self, _what: &dyn Display) {}

    /// The device cannot go on, by the driver's fault or by its own: DEVICE_NEEDS_RESET, and one line
    /// in the log.
    fn needs_reset(&self, why: &dyn Display);
}

/// Reads a device's configuration from `offset` on. Zero behind its end.
pub(crate) fn read_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    let mut bytes = config.get(offset..).unwrap_or_default().iter();
    data.fill_with(|| bytes.next().copied().unwrap_or(0));
}
