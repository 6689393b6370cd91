//! Memory that outlives the process: a mapped file, seen as 64-bit words. A store survives a kill at
//! any moment and costs no system call.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::posix_fallocate;

/// Words of a mapped file, or of memory that nobody else has. Clones are the same words.
#[derive(Debug, Clone)]
pub struct Words {
    mapping: Arc<Mapping>,
    first: usize,
    count: usize,
}

#[derive(Debug)]
struct Mapping {
    base: NonNull<AtomicU64>,
    words: usize,
    /// Locked as long as anybody has the words.
    _file: Option<File>,
}

// SAFETY: the mapping belongs to the process, and all access to it is atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Words {
    /// `count` words that are gone with the process, all zero.
    ///
    /// # Errors
    /// Out of memory.
    pub fn volatile(count: usize) -> io::Result<Self> {
        Self::map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, count)
    }

    /// The first `count` words of `file`, which is made that long if it is shorter. The file is not
    /// to become shorter meanwhile. It is locked until nobody has the words any more: a request that
    /// goes on has them, whatever has become of its device and of its process.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when somebody else has its words. The file cannot be made longer, or mapped.
    pub fn of_file(file: File, count: usize) -> io::Result<Self> {
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(
                io::ErrorKind::WouldBlock,
                "requests from before have not ended: their storage does not answer",
            ),
            TryLockError::Error(error) => error,
        })?;
        let bytes = count.saturating_mul(size_of::<u64>());
        let len = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        // A hole for which there is no room when it is written to kills the process.
        posix_fallocate(&file, 0, len)?;
        Self::map(libc::MAP_SHARED, Some(file), count)
    }

    fn map(flags: libc::c_int, file: Option<File>, count: usize) -> io::Result<Self> {
        let fd = file.as_ref().map_or(-1, File::as_raw_fd);
        let bytes = count
            .max(1)
            .checked_mul(size_of::<u64>())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            mapping: Arc::new(Mapping {
                base,
                words: count,
                _file: file,
            }),
            first: 0,
            count,
        })
    }

    /// `count` of these words from `first` on, fewer if there are not so many.
    #[must_use]
    pub fn part(&self, first: usize, count: usize) -> Self {
        let skipped = first.min(self.count);
        Self {
            mapping: Arc::clone(&self.mapping),
            first: self.first.saturating_add(skipped),
            count: count.min(self.count.saturating_sub(skipped)),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    fn all(&self) -> &[AtomicU64] {
        debug_assert!(self.first.saturating_add(self.count) <= self.mapping.words);
        // SAFETY: `first` plus `count` is never more than the words mapped, which stay so as long as the
        // value lives, and are accessed atomically alone. A page is aligned for any word.
        unsafe {
            std::slice::from_raw_parts(self.mapping.base.as_ptr().add(self.first), self.count)
        }
    }

    /// The word at `index`; zero beyond the end.
    pub fn get(&self, index: usize) -> u64 {
        self.all()
            .get(index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Changes the word at `index`. Beyond the end nothing happens. A process that finds the new
    /// value also finds what was stored before it.
    pub fn set(&self, index: usize, value: u64) {
        #[cfg(test)]
        kill::before_store();
        if let Some(word) = self.all().get(index) {
            word.store(value, Ordering::Release);
        }
    }

    /// The same values, in words that are gone with the process.
    ///
    /// # Errors
    /// Out of memory.
    pub fn copy(&self) -> io::Result<Self> {
        let copy = Self::volatile(self.count)?;
        for index in 0..self.count {
            copy.set(index, self.get(index));
        }
        Ok(copy)
    }

    /// Makes all of them zero, from the last to the first.
    pub fn clear(&self) {
        for index in (0..self.count).rev() {
            self.set(index, 0);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bytes = self.words.max(1).saturating_mul(size_of::<u64>());
        // SAFETY: this is what `map` mapped, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), bytes) };
    }
}

/// A test's way to kill the process before any store: what is stored stays as it is.
#[cfg(test)]
pub(crate) mod kill {
    use std::cell::Cell;

    thread_local! {
        /// Stores until then.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// What a killed thread unwinds with.
    pub struct Killed;

    /// Runs `body`, or as much of it as `stores` allow: `None`, it was killed. With what it left of them.
    pub fn after<T>(stores: usize, body: impl FnOnce() -> T) -> Option<(T, usize)> {
        LEFT.set(Some(stores));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let left = LEFT.take().unwrap_or(0);
        match done {
            Ok(value) => Some((value, left)),
            Err(killed) if killed.is::<Killed>() => None,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    pub fn before_store() {
        match LEFT.get() {
            Some(0) => {
                // What happens while it unwinds does not count.
                LEFT.set(None);
                std::panic::resume_unwind(Box::new(Killed));
            }
            Some(left) => LEFT.set(Some(left.saturating_sub(1))),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_found_by_who_opens_the_file_next() {
        let file = tempfile::tempfile().unwrap();
        let of_file = || Words::of_file(file.try_clone().unwrap(), 10).unwrap();
        of_file().part(3, 4).set(1, 0x1234);
        let found = of_file();
        assert_eq!(found.get(4), 0x1234);
        found.clear();
        assert_eq!(found.get(4), 0);
    }

    #[test]
    fn a_file_is_locked_until_nobody_has_any_of_its_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || Words::of_file(file.reopen().unwrap(), 10);
        let part = open().unwrap().part(3, 1);
        let refused = open().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(part);
        assert!(open().is_ok());
    }

    #[test]
    fn a_file_has_room_for_all_words_before_the_first_is_written() {
        use std::os::unix::fs::MetadataExt;
        for before in [0, 8, 1 << 20] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(before).unwrap();
            Words::of_file(file.try_clone().unwrap(), 8192).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), before.max(65536));
            assert!(metadata.blocks() * 512 >= 65536, "there are holes");
        }
    }

    #[test]
    fn parts_end_where_the_whole_ends() {
        let words = Words::volatile(8).unwrap();
        let part = words.part(6, 100);
        assert_eq!(part.count(), 2);
        part.set(2, 1);
        assert_eq!(part.get(2), 0);
        assert_eq!(words.part(100, 1).count(), 0);
        assert_eq!(words.part(7, 1).part(1, 1).count(), 0);
    }
}
