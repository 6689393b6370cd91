//! Virtqueues: what a driver configures, the rings, and the requests that are taken from them.
//!
//! A [`QueueConfig`] is what the driver has written so far. By [`QueueConfig::activate`] it becomes a
//! [`Queue`], which a device takes [`Chain`]s from and completes, whichever of the two ring
//! formats the driver chose.

mod chain;
mod config;
mod in_flight;
mod packed;
mod record;
mod split;

use std::sync::Arc;

use crate::memory::{GuestRam, MemoryError, View};

pub use chain::Chain;
pub use config::{LegacyLayout, QueueConfig, QueueError};
pub use record::Record;

/// The largest size of a queue (virtio 1.3, section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// The driver broke the rules of its ring. The queue is of no use any more, and the device needs a
/// reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A part of the ring, of an indirect table or of a buffer cannot be accessed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More buffers are said to be available than the ring has room for.
    #[error("the driver says that more buffers are available than the ring of {size} has room for")]
    TooManyAvailable {
        /// The size of the queue.
        size: u16,
    },
    /// A descriptor that the ring or the table does not have.
    #[error("descriptor {index} is beyond the {count} that there are")]
    NoSuchDescriptor {
        /// Its number, or the buffer's.
        index: u16,
        /// How many there are.
        count: u32,
    },
    /// A buffer was made available that the device has not given back yet.
    #[error("buffer {head} is made available while the device still has it")]
    AlreadyInFlight {
        /// Its number.
        head: u16,
    },
    /// A chain is longer than it may be; perhaps it is a loop.
    #[error("the chain of descriptors is longer than {limit}, or a loop")]
    ChainTooLong {
        /// The most descriptors.
        limit: u32,
    },
    /// A descriptor without bytes.
    #[error("a descriptor has length 0")]
    ZeroLength,
    /// More than 2^32 bytes in one chain.
    #[error("the buffers of a chain have more than 2^32 bytes together")]
    TooManyBytes,
    /// What the device reads has to come before what it writes.
    #[error("a descriptor for reading comes after one for writing")]
    ReadableAfterWritable,
    /// A table whose length is not that of a number of descriptors, or is zero.
    #[error("an indirect table of {len} bytes")]
    IndirectLength {
        /// Its length in bytes.
        len: u32,
    },
    /// A table in a table, a table in the middle of a chain, or one although the feature was not
    /// negotiated.
    #[error("an indirect descriptor where none may be")]
    IndirectMisplaced,
    /// A buffer is given back that the device does not have: a mistake of ours, not the driver's.
    #[error("buffer {head} is completed, but not in flight")]
    NotInFlight {
        /// Its number.
        head: u16,
    },
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub enum Queue {
    /// Three areas: descriptors, available ring, used ring (virtio 1.3, section 2.7).
    Split(split::SplitQueue),
    /// One ring for both ways (section 2.8).
    Packed(packed::PackedQueue),
}

macro_rules! either {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Queue::Split($ring) => $call,
            Queue::Packed($ring) => $call,
        }
    };
}

impl Queue {
    /// Takes the next chain, if there is one, from the guest's memory as it is when the chain is there,
    /// which `view` becomes.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn take(
        &mut self,
        ram: &GuestRam,
        view: &mut Arc<View>,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        if !self.has_next(view)? {
            return Ok(false);
        }
        ram.renew(view);
        self.pop(view, chain)
    }

    /// Takes the next chain, if there is one. After a restart those come first that were in flight. The
    /// view is not to be older than the chain: see [`Queue::take`].
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn pop(&mut self, view: &Arc<View>, chain: &mut Chain) -> Result<bool, RingError> {
        either!(self, ring => ring.pop(view, chain))
    }

    /// Gives a chain back to the driver, with how many bytes were written to it from its beginning.
    ///
    /// # Errors
    /// The ring is not accessible any more, or `head` is not in flight.
    pub fn complete(&mut self, view: &View, head: u16, written: u32) -> Result<(), RingError> {
        either!(self, ring => ring.complete(view, head, written))
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked.
    ///
    /// # Errors
    /// The ring is not accessible any more.
    pub fn should_notify(&mut self, view: &View) -> Result<bool, RingError> {
        either!(self, ring => ring.should_notify(view))
    }

    /// Tells the driver that it need not notify, as the queue is being looked at anyway.
    ///
    /// # Errors
    /// The ring is not accessible any more.
    pub fn disable_notify(&mut self, view: &View) -> Result<(), RingError> {
        either!(self, ring => ring.disable_notify(view))
    }

    /// Asks the driver to notify from the next chain on. True: there is one already, for which it
    /// may not have notified.
    ///
    /// # Errors
    /// The ring is not accessible any more.
    pub fn enable_notify(&mut self, view: &View) -> Result<bool, RingError> {
        either!(self, ring => ring.enable_notify(view))
    }

    /// Whether [`Queue::pop`] would find a chain.
    ///
    /// # Errors
    /// The ring is not accessible any more.
    pub fn has_next(&self, view: &View) -> Result<bool, RingError> {
        either!(self, ring => ring.has_next(view))
    }

    /// It goes on where another process left it.
    pub fn is_resumed(&self) -> bool {
        either!(self, ring => ring.chains().is_resumed())
    }

    /// How many descriptors its ring has.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.chains().size())
    }

    /// The driver can make nothing available: all descriptors of its ring are part of chains that the device
    /// has taken.
    pub fn is_exhausted(&self) -> bool {
        either!(self, ring => ring.chains().slots() >= self.size().into())
    }

    /// How many chains the device has taken and not yet completed.
    pub fn in_flight(&self) -> u16 {
        either!(self, ring => ring.chains().count())
    }
}
