//! The memory of one request: pieces of guest memory that the device reads, and pieces that it writes.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, VolatileSlice};

use super::{MemoryError, View};

/// A piece of guest memory that lies together in our address space. Valid as long as the view it is
/// of, which is why only [`Buffer`], which keeps that view, holds any.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Segment(libc::iovec);

// SAFETY: a segment is an address of guest memory, which all threads may access by volatile accesses.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    fn of(slice: &VolatileSlice<'_>) -> Self {
        Self(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }
}

/// What a request says, and where the answer goes. Its vectors are kept when it is used again, so
/// taking a request allocates nothing in the long run.
#[derive(Default)]
pub struct Buffer {
    /// What the segments are part of.
    view: Option<Arc<View>>,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

/// Which way the bytes of a descriptor go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them.
    Readable,
    /// The device writes them.
    Writable,
}

impl Buffer {
    /// Forgets all pieces; the next are of `view`.
    pub fn restart(&mut self, view: &Arc<View>) {
        self.readable.clear();
        self.writable.clear();
        if !self.view.as_ref().is_some_and(|old| Arc::ptr_eq(old, view)) {
            self.view = Some(Arc::clone(view));
        }
    }

    /// Forgets all pieces, and lets go of the memory.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.view = None;
    }

    /// Adds `len` bytes at guest address `address`.
    ///
    /// # Errors
    /// A part of them is not accessible. The buffer then has the pieces before it.
    pub fn push(
        &mut self,
        direction: Direction,
        address: u64,
        len: usize,
    ) -> Result<(), MemoryError> {
        let Some(view) = &self.view else {
            return Err(MemoryError::NotThere { address });
        };
        let segments = match direction {
            Direction::Readable => &mut self.readable,
            Direction::Writable => &mut self.writable,
        };
        for run in view.runs(address, len) {
            segments.push(Segment::of(&run?));
        }
        Ok(())
    }

    /// What the device reads, from the beginning.
    pub fn reader(&self) -> Reader<'_> {
        Reader(Cursor::new(&self.readable))
    }

    /// What the device writes, from the beginning.
    pub fn writer(&self) -> Writer<'_> {
        Writer(Cursor::new(&self.writable))
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("readable", &self.reader().len())
            .field("writable", &self.writer().len())
            .finish()
    }
}

/// A place in a list of segments, and how far it goes from there.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    segments: &'a [Segment],
    /// Within the first segment.
    offset: usize,
    left: usize,
    /// The segments are memory that the buffer, which `'a` borrows, keeps mapped.
    memory: PhantomData<&'a Buffer>,
}

/// Pieces that go to the kernel in one call.
const IOVECS: usize = 256;

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment]) -> Self {
        Self {
            segments,
            offset: 0,
            left: segments
                .iter()
                .fold(0, |sum, segment| sum.saturating_add(segment.0.iov_len)),
            memory: PhantomData,
        }
    }

    /// What is left of the first segment.
    fn first(&self) -> Option<VolatileSlice<'a>> {
        let segment = self.segments.first()?;
        let len = segment.0.iov_len.checked_sub(self.offset)?.min(self.left);
        // SAFETY: the segment is memory of the view that the buffer keeps for as long as `'a`;
        // `offset` plus `len` is within it. Others write to it only as guests do, and are expected
        // to.
        Some(unsafe { VolatileSlice::new(segment.0.iov_base.cast::<u8>().add(self.offset), len) })
    }

    fn advance(&mut self, bytes: usize) {
        let bytes = bytes.min(self.left);
        self.left = self.left.saturating_sub(bytes);
        self.offset = self.offset.saturating_add(bytes);
        while let Some((first, rest)) = self.segments.split_first()
            && self.offset >= first.0.iov_len
        {
            self.offset = self.offset.saturating_sub(first.0.iov_len);
            self.segments = rest;
        }
    }

    fn split_off(&mut self, len: usize) -> Self {
        let mut front = *self;
        front.left = len.min(self.left);
        self.advance(len);
        front
    }

    /// Copies as much as there is by `copy`, which is given a piece of guest memory and how many
    /// bytes came before it, and returns how many it copied: none is the end.
    fn copy(
        &mut self,
        len: usize,
        mut copy: impl FnMut(VolatileSlice<'a>, usize) -> usize,
    ) -> usize {
        let mut done = 0usize;
        while done < len {
            let Some(piece) = self.first().filter(|piece| !piece.is_empty()) else {
                break;
            };
            let bytes = copy(piece, done);
            if bytes == 0 {
                break;
            }
            self.advance(bytes);
            done = done.saturating_add(bytes);
        }
        done
    }

    /// The pieces as the kernel takes them, up to as many as fit.
    fn iovecs(&self, iovecs: &mut [libc::iovec; IOVECS]) -> usize {
        let mut rest = *self;
        let mut count = 0usize;
        for iovec in iovecs {
            let Some(piece) = rest.first().filter(|piece| !piece.is_empty()) else {
                break;
            };
            *iovec = Segment::of(&piece).0;
            rest.advance(piece.len());
            count = count.saturating_add(1);
        }
        count
    }

    /// Adds all of the pieces to `pieces`. Returns how many bytes they have.
    fn pieces(mut self, pieces: &mut Vec<libc::iovec>) -> usize {
        let bytes = self.left;
        while let Some(piece) = self.first().filter(|piece| !piece.is_empty()) {
            pieces.push(Segment::of(&piece).0);
            self.advance(piece.len());
        }
        bytes
    }

    /// Has `call` move all bytes between the pieces and a file. Returns how many were moved; fewer
    /// than there are when `call` says that nothing is left.
    fn transfer(
        &mut self,
        mut offset: u64,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<usize> {
        let mut done = 0usize;
        while self.left > 0 {
            let mut iovecs = [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; IOVECS];
            let count = self.iovecs(&mut iovecs);
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let Ok(bytes) = usize::try_from(call(iovecs.as_ptr(), count as libc::c_int, at)) else {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                }
            };
            if bytes == 0 {
                break;
            }
            self.advance(bytes);
            done = done.saturating_add(bytes);
            offset = offset.saturating_add(bytes as u64);
        }
        Ok(done)
    }
}

/// Reads what the driver wrote, from front to back.
#[derive(Clone, Copy)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.0.left
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.left == 0
    }

    /// Copies as many bytes as `data` takes and there are, and returns how many.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        self.0.copy(data.len(), |piece, done| {
            data.get_mut(done..)
                .map_or(0, |rest| piece.read(rest, 0).unwrap_or(0))
        })
    }

    /// Fills `data`.
    ///
    /// # Errors
    /// There are not so many bytes left.
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), TooShort> {
        if self.read(data) == data.len() {
            Ok(())
        } else {
            Err(TooShort)
        }
    }

    /// The next `len` bytes, or all that are left, as a reader of their own; this one goes on after
    /// them.
    pub fn take(&mut self, len: usize) -> Self {
        Self(self.0.split_off(len))
    }

    /// Adds what is left to `pieces`, for the kernel. Returns how many bytes that is.
    pub(super) fn pieces(self, pieces: &mut Vec<libc::iovec>) -> usize {
        self.0.pieces(pieces)
    }

    /// Writes all that is left to `file` at `offset`. Returns how many bytes that was, fewer than
    /// were left if the file takes no more.
    ///
    /// # Errors
    /// Those of pwritev(2).
    pub fn write_to(&mut self, file: &File, offset: u64) -> io::Result<usize> {
        let fd = file.as_raw_fd();
        self.0.transfer(offset, |iovecs, count, at| {
            // SAFETY: there are `count` iovecs, each of which is guest memory that stays mapped
            // while the buffer is borrowed. The kernel reads it.
            unsafe { libc::pwritev(fd, iovecs, count, at) }
        })
    }

    /// Writes all that is left to a descriptor that has no offsets (a tap, a socket, a pty), in one
    /// call, so that a packet stays one.
    ///
    /// # Errors
    /// Those of writev(2), and InvalidInput when there are more pieces than one call takes.
    pub fn send(&mut self, fd: &impl AsRawFd) -> io::Result<usize> {
        let fd = fd.as_raw_fd();
        self.0.once(|iovecs, count| {
            // SAFETY: as in `write_to`.
            unsafe { libc::writev(fd, iovecs, count) }
        })
    }
}

/// Writes what the driver reads, from front to back.
#[derive(Clone, Copy)]
pub struct Writer<'a>(Cursor<'a>);

impl<'a> Writer<'a> {
    /// How many bytes there is room for.
    pub fn len(&self) -> usize {
        self.0.left
    }

    /// There is no room left.
    pub fn is_empty(&self) -> bool {
        self.0.left == 0
    }

    /// Copies as much of `data` as there is room for, and returns how much.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.0.copy(data.len(), |piece, done| {
            data.get(done..)
                .map_or(0, |rest| piece.write(rest, 0).unwrap_or(0))
        })
    }

    /// Copies all of `data`.
    ///
    /// # Errors
    /// There is not so much room.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), TooShort> {
        if self.write(data) == data.len() {
            Ok(())
        } else {
            Err(TooShort)
        }
    }

    /// The next `len` bytes, or all that are left, as a writer of their own; this one goes on after
    /// them.
    pub fn take(&mut self, len: usize) -> Self {
        Self(self.0.split_off(len))
    }

    /// Adds what is left to `pieces`, for the kernel. Returns how many bytes that is.
    pub(super) fn pieces(self, pieces: &mut Vec<libc::iovec>) -> usize {
        self.0.pieces(pieces)
    }

    /// Fills what is left from `file` at `offset`. Returns how many bytes were read, fewer than
    /// there is room for when the file ends.
    ///
    /// # Errors
    /// Those of preadv(2).
    pub fn read_from(&mut self, file: &File, offset: u64) -> io::Result<usize> {
        let fd = file.as_raw_fd();
        self.0.transfer(offset, |iovecs, count, at| {
            // SAFETY: there are `count` iovecs, each of which is guest memory that stays mapped and
            // writable while the buffer is borrowed; nothing but the guest's accesses expects it
            // not to change.
            unsafe { libc::preadv(fd, iovecs, count, at) }
        })
    }
}

impl Cursor<'_> {
    fn once(
        &mut self,
        call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        let mut iovecs = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; IOVECS];
        let count = self.iovecs(&mut iovecs);
        let whole = iovecs
            .iter()
            .take(count)
            .fold(0usize, |sum, iovec| sum.saturating_add(iovec.iov_len));
        if whole < self.left {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = usize::try_from(call(iovecs.as_ptr(), count as libc::c_int))
            .map_err(|_| io::Error::last_os_error())?;
        self.advance(bytes);
        Ok(bytes)
    }
}

/// A request has fewer bytes than its type needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request is too short")]
pub struct TooShort;
