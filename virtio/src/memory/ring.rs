//! Transfers between a file and the memory of requests that the kernel carries out on its own, many
//! at a time (io_uring): one system call begins all that were found together.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use crate::queue::Chain;

/// What the kernel is to do for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Fills the first `len` bytes of what the device writes.
    Read {
        /// Bytes.
        len: usize,
        /// Where they are in the file.
        offset: u64,
    },
    /// Writes what the device reads, but for its first `skip` bytes.
    Write {
        /// Bytes.
        skip: usize,
        /// Where the others go in the file.
        offset: u64,
        /// They are on stable storage when it is done.
        durable: bool,
    },
    /// What was written is on stable storage when it is done.
    Flush,
}

/// A request that the kernel is done with.
#[derive(Debug)]
pub(crate) struct Done {
    /// The request.
    pub chain: Chain,
    /// What it was to do.
    pub transfer: Transfer,
    /// What became of it.
    pub outcome: Outcome,
}

/// What the kernel has done of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All of it.
    Whole,
    /// An unknown part of it, or it cannot do it. It may be done again from the beginning.
    Part,
    /// Something that was to be on stable storage is not. It must not be done again: Linux tells that once for each open file,
    /// and the next time all seems to be well.
    Lost,
}

impl Outcome {
    fn of(transfer: Transfer, bytes: usize, result: i32) -> Self {
        let durable = match transfer {
            Transfer::Flush => true,
            Transfer::Write { durable, .. } => durable,
            Transfer::Read { .. } => false,
        };
        match result.checked_neg() {
            _ if usize::try_from(result) == Ok(bytes) => Self::Whole,
            // Not begun.
            Some(libc::EINTR | libc::EAGAIN | libc::EINVAL | libc::EOPNOTSUPP) => Self::Part,
            Some(error) if error > 0 && durable => Self::Lost,
            _ => Self::Part,
        }
    }
}

/// What the kernel has of a request.
struct Flying {
    /// Keeps the memory mapped.
    chain: Chain,
    transfer: Transfer,
    bytes: usize,
}

/// Bytes that the kernel moves in about the time that it takes to tell the driver of it.
const ENOUGH_BYTES: usize = 256 << 10;
/// Requests to begin by one system call, which is no great part of their cost then.
const ENOUGH: usize = 16;

/// How long to wait before the kernel, short of memory, is asked again.
const SHORTAGE: Duration = Duration::from_millis(1);

/// Requests of one queue that the kernel is at.
pub(crate) struct Ring {
    uring: IoUring,
    file: File,
    slots: Vec<Option<Flying>>,
    /// The pieces of each slot's memory. The kernel looks at them while it takes the request.
    pieces: Vec<Vec<libc::iovec>>,
    /// Slots without a request.
    free: Vec<usize>,
    /// Chains to be used again.
    spare: Vec<Chain>,
    /// Bytes of what was started and not submitted.
    bytes: usize,
}

// SAFETY: the pieces lead to guest memory, which all threads may access; the rest may be sent.
unsafe impl Send for Ring {}

impl Ring {
    /// For up to `depth` requests for `file` at a time. `wake`, an eventfd, becomes readable
    /// when one is done.
    ///
    /// # Errors
    /// The kernel has no io_uring, or it is forbidden.
    pub fn new(file: &File, wake: RawFd, depth: usize) -> io::Result<Self> {
        let entries = u32::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        let uring = IoUring::builder().dontfork().build(entries)?;
        uring.submitter().register_eventfd(wake)?;
        Ok(Self {
            uring,
            file: file.try_clone()?,
            slots: (0..depth).map(|_| None).collect(),
            pieces: vec![Vec::new(); depth],
            free: (0..depth).collect(),
            spare: Vec::new(),
            bytes: 0,
        })
    }

    /// Whether the kernel can begin a read of `file` without waiting for storage. Where it cannot,
    /// it has io_uring's requests wait in threads of its own, which is no gain over ours.
    pub fn suits(file: &File) -> bool {
        let mut byte = [0u8; 1];
        let piece = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: byte.len(),
        };
        // SAFETY: one piece, of memory that is ours.
        let read = unsafe { libc::preadv2(file.as_raw_fd(), &piece, 1, 0, libc::RWF_NOWAIT) };
        read >= 0 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
    }

    /// How many requests the kernel has.
    pub fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// A chain for the next request; `None`: the kernel has as many as it may have.
    pub fn chain(&mut self) -> Option<Chain> {
        (!self.free.is_empty()).then(|| self.spare.pop().unwrap_or_default())
    }

    /// The kernel has as many requests as it may have.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a chain back that the kernel has no part in.
    pub fn recycle(&mut self, mut chain: Chain) {
        chain.clear();
        self.spare.push(chain);
    }

    /// Has the kernel begin with the next [`Ring::submit`].
    ///
    /// # Errors
    /// There is no room: the chain is given back.
    pub fn start(&mut self, chain: Chain, transfer: Transfer) -> Result<(), Chain> {
        let Some(slot) = self.free.pop() else {
            return Err(chain);
        };
        let Some(pieces) = self.pieces.get_mut(slot) else {
            return Err(chain);
        };
        pieces.clear();
        let bytes = match transfer {
            Transfer::Read { len, .. } => chain.writer().take(len).pieces(pieces),
            Transfer::Write { skip, .. } => {
                let mut reader = chain.reader();
                reader.take(skip);
                reader.pieces(pieces)
            }
            Transfer::Flush => 0,
        };
        let entry = entry(self.file.as_raw_fd(), transfer, pieces).user_data(slot as u64);
        // SAFETY: the pieces stay where they are until the slot is used again, and the memory that they
        // lead to is mapped as long as the chain lives: both until the kernel is done, for `drop`
        // waits for it. The kernel accesses it as guests do.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.free.push(slot);
            return Err(chain);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Flying {
                chain,
                transfer,
                bytes,
            });
        }
        Ok(())
    }

    /// Whether it is time for [`Ring::submit`]: were more begun at once, the driver would wait for the
    /// first of it until the last is done.
    pub fn has_enough(&mut self) -> bool {
        self.bytes >= ENOUGH_BYTES || self.uring.submission().len() >= ENOUGH
    }

    /// Begins what was started. What needs no waiting is done on return.
    ///
    /// # Errors
    /// The kernel does not take requests any more.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            self.enter(0)?;
        }
        self.bytes = 0;
        Ok(())
    }

    /// Waits until one is done, if there are any.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn wait(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 && !self.has_done() {
            self.enter(1)?;
        }
        Ok(())
    }

    fn enter(&self, want: usize) -> io::Result<()> {
        match self.uring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => Ok(()),
                Some(libc::EAGAIN | libc::EBUSY) => {
                    thread::sleep(SHORTAGE);
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    /// Whether there is one for [`Ring::next_done`].
    pub fn has_done(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// One that is done.
    pub fn next_done(&mut self) -> Option<Done> {
        let completed = self.uring.completion().next()?;
        let slot = usize::try_from(completed.user_data()).ok()?;
        let flying = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(Done {
            chain: flying.chain,
            transfer: flying.transfer,
            outcome: Outcome::of(flying.transfer, flying.bytes, completed.result()),
        })
    }
}

impl Drop for Ring {
    /// Waits for the kernel, which still accesses the memory.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // It stays mapped for ever rather than being somebody else's when it is written to.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(std::mem::take(&mut self.pieces));
                return;
            }
            while self.next_done().is_some() {}
        }
    }
}

fn entry(file: RawFd, transfer: Transfer, pieces: &[libc::iovec]) -> squeue::Entry {
    let file = types::Fd(file);
    let (first, count) = (pieces.as_ptr(), pieces.len() as u32);
    match transfer {
        Transfer::Read { offset, .. } => opcode::Readv::new(file, first, count)
            .offset(offset)
            .build(),
        Transfer::Write {
            offset, durable, ..
        } => opcode::Writev::new(file, first, count)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Transfer::Flush => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_what_was_to_be_durable_is_final_and_all_else_may_be_done_again() {
        let write = |durable| Transfer::Write {
            skip: 16,
            offset: 0,
            durable,
        };
        let read = Transfer::Read {
            len: 512,
            offset: 0,
        };
        for (transfer, bytes, result, outcome) in [
            (Transfer::Flush, 0, 0, Outcome::Whole),
            (Transfer::Flush, 0, -libc::EIO, Outcome::Lost),
            (Transfer::Flush, 0, -libc::EINTR, Outcome::Part),
            (write(true), 512, 512, Outcome::Whole),
            (write(true), 512, -libc::ENOSPC, Outcome::Lost),
            (write(true), 512, 100, Outcome::Part),
            (write(true), 512, -libc::EOPNOTSUPP, Outcome::Part),
            (write(false), 512, -libc::EIO, Outcome::Part),
            (read, 512, -libc::EIO, Outcome::Part),
            (read, 512, 0, Outcome::Part),
            (read, 512, i32::MIN, Outcome::Part),
        ] {
            assert_eq!(
                Outcome::of(transfer, bytes, result),
                outcome,
                "{transfer:?} {result}"
            );
        }
    }
}
