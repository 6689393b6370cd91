//! A lazily filled table from guest-physical addresses to ours.

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, Permissions, VolatileSlice,
};
use xenbus::device_model::ForeignMapping;

use super::budget::{Piece, Share};
use super::{CHUNK_PAGES, PAGE_SIZE, PageMapper};

const CHUNK_SIZE: u64 = (PAGE_SIZE * CHUNK_PAGES) as u64;
/// Chunks in a leaf of the table: 1 GiB.
const LEAF_CHUNKS: usize = 512;
/// Leaves: 1 TiB, more than a guest of Xen's has by default.
const LEAVES: usize = 1024;
/// Words of a chunk's bitmap of pages.
const WORDS: usize = CHUNK_PAGES / WORD_BITS;
const WORD_BITS: usize = u64::BITS as usize;
/// Bytes of a page, as addresses count.
const PAGE: u64 = PAGE_SIZE as u64;

/// Guest memory that cannot be accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Ballooned out, not populated, another guest's, or a device's.
    #[error("no memory at guest address {address:#x}")]
    NotThere {
        /// The first byte that is missing.
        address: u64,
    },
    /// Nothing can be there.
    #[error("guest address {address:#x} is beyond what a guest can have")]
    BeyondEnd {
        /// Where the access begins, or leaves what is possible.
        address: u64,
    },
    /// The guest uses more pieces of its address space than it has memory to fill.
    #[error(
        "the guest's memory is scattered over more than {limit} pieces of 2 MiB, which is all that are mapped for it"
    )]
    Scattered {
        /// How many pieces may be mapped.
        limit: usize,
    },
    /// The host could not map it.
    #[error("mapping guest memory at {address:#x} failed")]
    Mapping {
        /// Guest address of the first page.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<MemoryError> for GuestMemoryError {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::NotThere { address } | MemoryError::BeyondEnd { address } => {
                Self::InvalidGuestAddress(GuestAddress(address))
            }
            MemoryError::Scattered { .. } | MemoryError::Mapping { .. } => {
                Self::IOError(io::Error::other(error))
            }
        }
    }
}

/// 2 MiB of guest memory.
struct Chunk {
    base: NonNull<u8>,
    /// Pages that are there, one bit each. Bits are only ever set.
    there: [AtomicU64; WORDS],
    mapping: Box<dyn ForeignMapping>,
    /// Given back when the mapping is gone.
    _piece: Piece,
}

// SAFETY: `base` points into `mapping`, which itself may go to other threads, and is used for volatile and
// atomic accesses alone.
unsafe impl Send for Chunk {}
// SAFETY: as above; `mapping` may be shared.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(mapping: Box<dyn ForeignMapping>, piece: Piece) -> Self {
        let there: [AtomicU64; WORDS] = Default::default();
        for (page, present) in mapping.present().iter().enumerate() {
            if *present && let Some(word) = there.get(page / WORD_BITS) {
                word.fetch_or(bit(page), Ordering::Relaxed);
            }
        }
        Self {
            base: mapping.base(),
            there,
            mapping,
            _piece: piece,
        }
    }

    fn has(&self, page: usize) -> bool {
        self.there
            .get(page / WORD_BITS)
            .is_some_and(|word| word.load(Ordering::Acquire) & bit(page) != 0)
    }

    fn set(&self, page: usize) {
        if let Some(word) = self.there.get(page / WORD_BITS) {
            word.fetch_or(bit(page), Ordering::Release);
        }
    }
}

/// The bit of `page` within its word.
fn bit(page: usize) -> u64 {
    1u64.wrapping_shl(page as u32 % u64::BITS)
}

fn chunk_start(address: u64) -> u64 {
    address & !(CHUNK_SIZE - 1)
}

type Leaf = [OnceLock<Chunk>; LEAF_CHUNKS];

/// A guest's memory. What it has mapped stays so until it is dropped. Reading the table takes no
/// lock; filling it takes one of the guest's own.
pub struct View {
    mapper: Arc<dyn PageMapper>,
    leaves: Box<[OnceLock<Box<Leaf>>]>,
    share: Arc<Share>,
    generation: u64,
    /// Held while the table changes.
    filling: Mutex<()>,
}

impl View {
    pub(super) fn new(mapper: Arc<dyn PageMapper>, share: Arc<Share>, generation: u64) -> Self {
        Self {
            mapper,
            leaves: (0..LEAVES).map(|_| OnceLock::new()).collect(),
            share,
            generation,
            filling: Mutex::new(()),
        }
    }

    /// How often the guest's memory was forgotten before this.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The longest part of `len` bytes at `address`, from its beginning, that lies together in our
    /// address space: up to the next multiple of 2 MiB. `len` is not zero, or the part is empty.
    ///
    /// # Errors
    /// The first byte is not accessible, or another one of that part.
    pub fn run(&self, address: u64, len: usize) -> Result<VolatileSlice<'_>, MemoryError> {
        let chunk = self.chunk(address)?;
        let offset = address % CHUNK_SIZE;
        let len = len.min(CHUNK_SIZE.saturating_sub(offset) as usize);
        let last = offset.saturating_add(len.saturating_sub(1) as u64);
        for page in offset / PAGE..=last / PAGE {
            if !chunk.has(page as usize) {
                self.fill_hole(chunk, page as usize, address)?;
            }
        }
        // SAFETY: `offset` plus `len` is within the chunk, whose mapping is CHUNK_SIZE long and lives as
        // long as the view, and all of its pages that the range touches are there. The guest
        // writes at any time, so all accesses are volatile or atomic.
        Ok(unsafe { VolatileSlice::new(chunk.base.as_ptr().add(offset as usize), len) })
    }

    /// Which pages of the whole range are there does not matter to the iterator until it comes to them.
    pub(crate) fn runs(&self, address: u64, len: usize) -> Runs<'_> {
        Runs {
            view: self,
            address,
            left: len,
        }
    }

    fn chunk(&self, address: u64) -> Result<&Chunk, MemoryError> {
        let index = usize::try_from(address / CHUNK_SIZE).unwrap_or(usize::MAX);
        let leaf = self
            .leaves
            .get(index / LEAF_CHUNKS)
            .ok_or(MemoryError::BeyondEnd { address })?;
        match leaf
            .get()
            .and_then(|leaf| leaf.get(index % LEAF_CHUNKS)?.get())
        {
            Some(chunk) => Ok(chunk),
            None => self.fill(leaf, index % LEAF_CHUNKS, address),
        }
    }

    /// A leaf is made when there is something for it: looking where nothing is costs the host no memory.
    #[cold]
    fn fill<'a>(
        &self,
        leaf: &'a OnceLock<Box<Leaf>>,
        slot: usize,
        address: u64,
    ) -> Result<&'a Chunk, MemoryError> {
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = leaf.get().and_then(|leaf| leaf.get(slot)?.get()) {
            return Ok(chunk);
        }
        let piece = self.share.take().ok_or(MemoryError::Scattered {
            limit: self.share.size(),
        })?;
        let start = chunk_start(address);
        let mapping = self
            .mapper
            .map(start / PAGE, CHUNK_PAGES)
            .map_err(|source| MemoryError::Mapping {
                address: start,
                source,
            })?;
        // A chunk with nothing in it is not kept: there are more of them than could be.
        if mapping.present().len() < CHUNK_PAGES || !mapping.present().contains(&true) {
            return Err(MemoryError::NotThere { address });
        }
        let leaf = leaf.get_or_init(|| Box::new([const { OnceLock::new() }; LEAF_CHUNKS]));
        let slot = leaf.get(slot).ok_or(MemoryError::BeyondEnd { address })?;
        Ok(slot.get_or_init(|| Chunk::new(mapping, piece)))
    }

    /// The guest may have got the page since the chunk was mapped.
    #[cold]
    fn fill_hole(&self, chunk: &Chunk, page: usize, address: u64) -> Result<(), MemoryError> {
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk.has(page) {
            return Ok(());
        }
        let start = chunk_start(address).saturating_add(PAGE.saturating_mul(page as u64));
        match chunk.mapping.retry(page) {
            Ok(true) => {
                chunk.set(page);
                Ok(())
            }
            Ok(false) => Err(MemoryError::NotThere {
                address: start.max(address),
            }),
            Err(source) => Err(MemoryError::Mapping {
                address: start,
                source,
            }),
        }
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").finish_non_exhaustive()
    }
}

/// The parts of a range of guest memory, each of which lies together in our address space.
pub struct Runs<'a> {
    view: &'a View,
    address: u64,
    left: usize,
}

impl<'a> Iterator for Runs<'a> {
    type Item = Result<VolatileSlice<'a>, MemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let run = self.view.run(self.address, self.left).and_then(|run| {
            self.left = self.left.saturating_sub(run.len());
            // At the very end of the address space there is no address after the last.
            match self.address.checked_add(run.len() as u64) {
                Some(next) => self.address = next,
                None if self.left == 0 => {}
                None => {
                    return Err(MemoryError::BeyondEnd {
                        address: self.address,
                    });
                }
            }
            Ok(run)
        });
        if run.is_err() {
            self.left = 0;
        }
        Some(run)
    }
}

impl FusedIterator for Runs<'_> {}

/// The same for `vm-memory`.
struct Slices<'a>(Runs<'a>);

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|run| run.map_err(GuestMemoryError::from))
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

impl GuestMemory for View {
    type PhysicalMemory = GuestRegionCollection<NoRegion>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.runs(addr.0, count).all(|run| run.is_ok())
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>, GuestMemoryError> {
        Ok(Slices(self.runs(addr.0, count)))
    }
}

/// `vm-memory` wants the type of the regions that a view is made of. It is made of none.
#[derive(Debug)]
pub enum NoRegion {}

impl GuestMemoryRegionBytes for NoRegion {}

impl GuestMemoryRegion for NoRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        match *self {}
    }

    fn start_addr(&self) -> GuestAddress {
        match *self {}
    }

    fn bitmap(&self) {
        match *self {}
    }
}
