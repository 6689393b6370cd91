//! The guest's memory in our address space, mapped as it is touched.
//!
//! [`GuestRam`] is what a guest's devices share. It hands out [`View`]s: a view never loses a page
//! that it has, so a request under way keeps what it works on, whatever happens meanwhile. A page
//! that is not there - ballooned out, device memory, beyond the end - is an error and never a fault.
//!
//! When a guest gives pages back, Xen has its CPU wait until we have answered an INVALIDATE request. So
//! what the driver makes available after that must be looked up in a view from after it: an older one
//! may have a page that was there before, and is nobody's now. The rule for a request's pages is: first
//! its entry in the ring is seen, then [`GuestRam::renew`] is called, then its addresses are looked up.
//! [`Queue::take`](crate::queue::Queue::take) does that for all devices. A request that was taken before keeps
//! its view until it is given back, and with that the pages.

mod budget;
mod buffer;
mod memfd;
mod ring;
mod view;
mod words;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use xenbus::device_model::{DeviceModel, ForeignMapping};
use xenbus::types::DomId;

pub use budget::{Budget, Exhausted, Share};
pub use buffer::{Buffer, Direction, Reader, TooShort, Writer};
pub use memfd::Memfd;
pub(crate) use ring::{Done, Outcome, Ring, Transfer};
pub use view::{MemoryError, View};
pub use words::Words;
#[cfg(test)]
pub(crate) use words::kill;

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
    share: Arc<Share>,
    /// How often what is mapped was forgotten.
    generation: AtomicU64,
    view: RwLock<Arc<View>>,
}

impl GuestRam {
    /// The memory of a guest that has `chunks` pieces of 2 MiB for itself: some more than it has memory. A
    /// guest can scatter its pages over all its address space, and each piece costs the host's kernel a
    /// mapping.
    pub fn new(mapper: Arc<dyn PageMapper>, chunks: usize) -> Self {
        Self::with_share(mapper, Share::alone(chunks))
    }

    /// The same of one among several guests.
    pub fn with_share(mapper: Arc<dyn PageMapper>, share: Share) -> Self {
        let share = Arc::new(share);
        let view = Arc::new(View::new(Arc::clone(&mapper), Arc::clone(&share), 0));
        Self {
            mapper,
            share,
            generation: AtomicU64::new(0),
            view: RwLock::new(view),
        }
    }

    /// The memory as it is now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes of `view` the memory as it is now. Costs next to nothing if that is what it was.
    pub fn renew(&self, view: &mut Arc<View>) {
        if view.generation() != self.generation.load(Ordering::Acquire) {
            *view = self.view();
        }
    }

    /// Frames of the guest may be others than before (Xen's INVALIDATE request): what is mapped is
    /// forgotten, and unmapped when the last request that uses it is done.
    pub fn invalidate(&self) {
        let old = {
            let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
            let generation = view.generation().wrapping_add(1);
            let empty = View::new(
                Arc::clone(&self.mapper),
                Arc::clone(&self.share),
                generation,
            );
            let old = std::mem::replace(&mut *view, Arc::new(empty));
            self.generation.store(generation, Ordering::Release);
            old
        };
        // Unmapping takes time, so not under the lock.
        drop(old);
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").finish_non_exhaustive()
    }
}
