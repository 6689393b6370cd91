//! Guests' memory, mapped for the DMA of the devices that they have.

use std::io;

use nix::errno::Errno;
use xenbus::DomId;
use xenbus::sim::DmaMemory;

use super::space::{self, Space};
use super::{VfioBus, lock};

impl VfioBus {
    /// Maps more memory of a guest that has devices.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn map_dma(&self, domain: DomId, memory: &DmaMemory) -> io::Result<()> {
        let space = lock(&self.guests).get(&domain).cloned();
        let space = space.ok_or(Errno::ESRCH)?;
        map(&space, domain, memory)
    }

    /// Unmaps a part of a guest's memory.
    ///
    /// # Errors
    /// The kernel's; its devices reach it still.
    pub(super) fn unmap_dma(&self, domain: DomId, address: u64) -> io::Result<()> {
        let space = lock(&self.guests).get(&domain).cloned();
        let Some(space) = space else { return Ok(()) };
        space.unmap(address).inspect_err(|error| {
            space.complaints.warn(|| {
                format!(
                    "domain {domain}'s memory at {address:#x} cannot be taken back, and its devices reach it still ({error}): if that stays so, destroy \
                     the domain"
                )
            });
        })
    }
}

/// Maps memory of a guest; what keeps it from that is logged.
///
/// # Errors
/// The kernel's.
pub(super) fn map(space: &Space, domain: DomId, memory: &DmaMemory) -> io::Result<()> {
    let (address, size) = (memory.address, memory.size);
    let result = match space.obstacle(memory) {
        Some(why) => Err((Errno::EINVAL.into(), why)),
        None => space.map(memory).map_err(|error| {
            let why = space::explain(&error, size);
            (error, why)
        }),
    };
    result.map_err(|(error, why)| {
        space.complaints.warn(|| {
            format!("domain {domain}'s memory at {address:#x} ({size} bytes) cannot be mapped for DMA ({error}): {why}")
        });
        error
    })
}
