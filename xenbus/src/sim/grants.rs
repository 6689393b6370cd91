//! Grants as shared memory: a page is a memfd that its domain and dom0 both map.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

use crate::types::{DomId, GrantRef};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// The first reference that a grant gets. Xen's own use, and Linux reserves, those below.
const FIRST_REFERENCE: u32 = 8;

/// Makes a page. It is sealed: nobody who gets hold of its descriptor can shrink it under another's mapping.
pub(super) fn new_page() -> io::Result<OwnedFd> {
    let page = memfd_create(
        c"xen-guest-page",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?;
    ftruncate(&page, i64::try_from(PAGE_SIZE).unwrap_or(i64::MAX))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&page, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(page)
}

/// Whether a page that came from another process is one that [`new_page`] made: it can be mapped without fear that it shrinks.
pub(super) fn check_page(page: BorrowedFd<'_>) -> io::Result<()> {
    let seals = SealFlag::from_bits_retain(fcntl(page, FcntlArg::F_GET_SEALS)?);
    let size = nix::sys::stat::fstat(page)?.st_size;
    if seals.contains(SealFlag::F_SEAL_SHRINK) && usize::try_from(size) == Ok(PAGE_SIZE) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a sealed page of 4096 bytes",
        ))
    }
}

/// A page mapped into this process, readable and writable. Unmapped on drop.
#[derive(Debug)]
pub struct MappedPage {
    base: NonNull<c_void>,
}

// SAFETY: the mapping belongs to the process, not to a thread; all accesses through its address are the business of whoever makes them.
unsafe impl Send for MappedPage {}

impl MappedPage {
    pub(super) fn new(page: impl AsFd) -> io::Result<Self> {
        let length = NonZeroUsize::new(PAGE_SIZE).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, page, 0) }?;
        Ok(Self { base })
    }

    /// Where it is: 4096 bytes, aligned to 4096, that others write to at any time.
    pub fn base(&self) -> NonNull<u8> {
        self.base.cast()
    }
}

impl Drop for MappedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing else unmaps it; who uses its address holds this value.
        if let Err(errno) = unsafe { munmap(self.base, PAGE_SIZE) } {
            log::error!("cannot unmap a page: {errno}");
        }
    }
}

/// A page that its domain lets another one map.
#[derive(Debug)]
struct Grant {
    page: OwnedFd,
    to: DomId,
}

/// One domain's grants.
#[derive(Debug, Default)]
pub(super) struct GrantTable {
    grants: BTreeMap<GrantRef, Grant>,
    /// How often each is mapped by dom0. Outlives the grant.
    mapped: BTreeMap<GrantRef, usize>,
}

impl GrantTable {
    /// Grants a page to a domain.
    ///
    /// # Errors
    /// ENOSPC when there is no reference left.
    pub fn grant(&mut self, page: OwnedFd, to: DomId) -> Result<GrantRef, Errno> {
        let free = |reference: &u32| {
            !self.grants.contains_key(&GrantRef(*reference))
                && !self.mapped.contains_key(&GrantRef(*reference))
        };
        let reference = (FIRST_REFERENCE..1024)
            .find(free)
            .map(GrantRef)
            .ok_or(Errno::ENOSPC)?;
        self.grants.insert(reference, Grant { page, to });
        Ok(reference)
    }

    /// Takes a grant back.
    ///
    /// # Errors
    /// EINVAL when there is none, EBUSY while it is mapped.
    pub fn end(&mut self, reference: GrantRef) -> Result<(), Errno> {
        if self.mapped.contains_key(&reference) {
            return Err(Errno::EBUSY);
        }
        self.grants
            .remove(&reference)
            .map(drop)
            .ok_or(Errno::EINVAL)
    }

    /// Maps a granted page for `domain`.
    ///
    /// # Errors
    /// EINVAL when the reference is not one that was granted to `domain`.
    pub fn map(&mut self, reference: GrantRef, domain: DomId) -> Result<MappedPage, Errno> {
        let grant = self
            .grants
            .get(&reference)
            .filter(|grant| grant.to == domain)
            .ok_or(Errno::EINVAL)?;
        let page = MappedPage::new(&grant.page).map_err(|_| Errno::ENOMEM)?;
        let count = self.mapped.entry(reference).or_default();
        *count = count.saturating_add(1);
        Ok(page)
    }

    /// Takes note that a mapping has gone.
    pub fn unmapped(&mut self, reference: GrantRef) {
        if let Some(count) = self.mapped.get_mut(&reference) {
            *count = count.saturating_sub(1);
        }
        self.mapped.retain(|_, count| *count > 0);
    }

    /// Forgets all grants: the domain is gone. Mappings stay until they are unmapped.
    pub fn clear(&mut self) {
        self.grants.clear();
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.mapped
            .values()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }
}
