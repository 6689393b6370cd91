//! A page of this process's own in place of a granted one.

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::platform::PageMapping;

#[derive(Debug)]
#[repr(C, align(4096))]
struct Bytes(UnsafeCell<[u8; 4096]>);

// SAFETY: nothing here reads or writes the bytes; whoever does so through `base` uses atomic
// operations, as on a page shared with a guest.
unsafe impl Sync for Bytes {}

/// A page of zeros in this process's memory. Clones are further mappings of the same page: one for
/// each end, to test them on each other.
#[derive(Debug, Clone)]
pub struct LocalPage(Arc<Bytes>);

impl Default for LocalPage {
    fn default() -> Self {
        Self::new([0; 4096])
    }
}

impl LocalPage {
    /// A page with this content.
    pub fn new(content: [u8; 4096]) -> Self {
        Self(Arc::new(Bytes(UnsafeCell::new(content))))
    }
}

// SAFETY: the Arc keeps the 4096 bytes, aligned by their type, alive and in place for as long as
// this value lives.
unsafe impl PageMapping for LocalPage {
    fn base(&self) -> NonNull<u8> {
        NonNull::from(&self.0.0).cast()
    }
}
