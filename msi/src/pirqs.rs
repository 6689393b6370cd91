//! Mapping and unmapping PIRQs, and the search for those that nobody knows of.

use xenbus::{MsiRequest, Pirq, XenError};

/// The PIRQs of one device in one domain. Both are bound into it.
pub trait Pirqs {
    /// Maps, see `PHYSDEVOP_map_pirq`.
    ///
    /// # Errors
    /// Xen's.
    fn map(&self, request: MsiRequest) -> Result<Pirq, XenError>;

    /// Unmaps, see `PHYSDEVOP_unmap_pirq`.
    ///
    /// # Errors
    /// Xen's.
    fn unmap(&self, pirq: Pirq) -> Result<(), XenError>;
}

/// Not mapped.
const EINVAL: i32 = 22;
/// No such domain.
const ESRCH: i32 = 3;

/// Unmaps; a PIRQ that is not mapped, or whose domain is gone, is as good as unmapped. Returns
/// whether it was mapped.
pub(crate) fn unmap<P: Pirqs + ?Sized>(pirqs: &P, pirq: Pirq) -> Result<bool, XenError> {
    match pirqs.unmap(pirq) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.errno(), Some(EINVAL | ESRCH)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Unmaps every candidate that nobody claims, and returns how many had been mapped. What Xen
/// refuses to unmap stays.
///
/// `claimed` must know *everything* the domain has a right to: the PIRQs in the ledgers of all its
/// devices, and the legacy interrupts that the toolstack mapped for it (for a PV guest, PIRQ and
/// GSI have the same number).
///
/// Xen hands out PIRQs for messages from the top of a domain's range downwards, and answers EINVAL
/// for those beyond the range, so any generous range will do.
pub fn sweep<P: Pirqs + ?Sized>(
    pirqs: &P,
    candidates: impl IntoIterator<Item = Pirq>,
    claimed: impl Fn(Pirq) -> bool,
) -> usize {
    candidates
        .into_iter()
        .filter(|pirq| !claimed(*pirq))
        .filter(|pirq| unmap(pirqs, *pirq).unwrap_or(false))
        .count()
}
