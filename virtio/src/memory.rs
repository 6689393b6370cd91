//! The guest's memory in our address space, mapped as it is touched.
//!
//! [`GuestRam`] is what a guest's devices share. It hands out [`View`]s: a view never loses a page
//! that it has, so a request under way keeps what it works on, whatever happens meanwhile. A page
//! that is not there - ballooned out, device memory, beyond the end - is an error and never a fault.

mod buffer;
mod memfd;

mod view;
mod words;

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use xenbus::device_model::{DeviceModel, ForeignMapping};
use xenbus::types::DomId;

pub use buffer::{Buffer, Direction, Reader, TooShort, Writer};
pub use memfd::Memfd;
pub use view::{MemoryError, View};
pub use words::Words;

/// The size of a page of guest memory, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// Pages that are mapped at once: 2 MiB, what a hypervisor keeps together if it can.
pub const CHUNK_PAGES: usize = 512;

/// Where a guest's memory comes from.
pub trait PageMapper: Send + Sync {
    /// Maps `count` pages beginning with guest frame `first`. Pages that are not there are absent from the
    /// mapping.
    ///
    /// # Errors
    /// Nothing could be mapped at all.
    fn map(&self, first: u64, count: usize) -> io::Result<Box<dyn ForeignMapping>>;
}

/// The memory of an HVM guest on Xen.
#[derive(Debug, Clone)]
pub struct DomainMemory {
    xen: Arc<dyn DeviceModel>,
    domain: DomId,
}

impl DomainMemory {
    /// That of `domain`.
    pub fn new(xen: Arc<dyn DeviceModel>, domain: DomId) -> Self {
        Self { xen, domain }
    }
}

impl PageMapper for DomainMemory {
    fn map(&self, first: u64, count: usize) -> io::Result<Box<dyn ForeignMapping>> {
        self.xen.map_foreign(self.domain, first, count)
    }
}

/// The memory of one guest, shared by its devices.
pub struct GuestRam {
    mapper: Arc<dyn PageMapper>,
    chunks: usize,
    view: RwLock<Arc<View>>,
}

impl GuestRam {
    /// `chunks` is how many pieces of 2 MiB may be mapped at a time: some more than the guest has
    /// memory. A guest can scatter its pages over all its address space, and each piece costs the
    /// host's kernel a mapping, of which a process has 65530.
    pub fn new(mapper: Arc<dyn PageMapper>, chunks: usize) -> Self {
        let view = Arc::new(View::new(Arc::clone(&mapper), chunks));
        Self {
            mapper,
            chunks,
            view: RwLock::new(view),
        }
    }

    /// The memory as it is now. To be taken anew for each batch of requests.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Frames of the guest may be others than before (Xen's INVALIDATE request): what is mapped is
    /// forgotten, and unmapped when the last request that uses it is done.
    pub fn invalidate(&self) {
        let empty = Arc::new(View::new(Arc::clone(&self.mapper), self.chunks));
        let old = std::mem::replace(
            &mut *self.view.write().unwrap_or_else(PoisonError::into_inner),
            empty,
        );
        // Unmapping takes time, so not under the lock.
        drop(old);
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").finish_non_exhaustive()
    }
}
