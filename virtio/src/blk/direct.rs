//! Access to an image past the host's cache (O_DIRECT).
//!
//! Storage takes only memory that is aligned, which a guest's buffers need not be, and none that belongs to another domain of Xen's
//! (privcmd's pages: EFAULT). So everything goes through memory of the thread's own.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::memory::{Reader, Writer};

/// As aligned as any storage needs it.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// The memory of a thread: so much goes in one call.
const PAGES: usize = 64;

thread_local! {
    static MEMORY: RefCell<Vec<Page>> = const { RefCell::new(Vec::new()) };
}

/// Runs `access` with the thread's memory, which is made the first time.
fn with_memory<T>(access: impl FnOnce(&mut [u8]) -> io::Result<T>) -> io::Result<T> {
    MEMORY.with_borrow_mut(|memory| {
        if memory.is_empty() {
            *memory = vec![Page([0; 4096]); PAGES];
        }
        access(memory.as_mut_bytes())
    })
}

/// Fills `data` from `offset` on. Returns how many bytes were read, fewer than there is room for when the file ends.
///
/// # Errors
/// Those of pread(2); InvalidInput when the access begins or ends within a block of the storage's.
pub(super) fn read(file: &File, mut data: Writer<'_>, offset: u64) -> io::Result<usize> {
    with_memory(|memory| {
        let mut done = 0usize;
        while !data.is_empty() {
            let most = memory.len().min(data.len());
            let piece = memory.get_mut(..most).unwrap_or_default();
            let read = file.read_at(piece, offset.saturating_add(done as u64))?;
            data.write(piece.get(..read).unwrap_or_default());
            done = done.saturating_add(read);
            if read < most {
                break;
            }
        }
        Ok(done)
    })
}

/// Writes all of `data` at `offset`. Returns how many bytes that was, fewer than there are if the file takes no more.
///
/// # Errors
/// Those of pwrite(2); InvalidInput when the access begins or ends within a block of the storage's.
pub(super) fn write(file: &File, mut data: Reader<'_>, offset: u64) -> io::Result<usize> {
    with_memory(|memory| {
        let mut done = 0usize;
        while !data.is_empty() {
            let filled = data.read(memory);
            let piece = memory.get(..filled).unwrap_or_default();
            let written = file.write_at(piece, offset.saturating_add(done as u64))?;
            done = done.saturating_add(written);
            if written < filled {
                break;
            }
        }
        Ok(done)
    })
}
