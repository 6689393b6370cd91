//! What guests reach of a device's BARs: memory, I/O ports, the expansion ROM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLockWriteGuard};

use conf_space::registers::header::command;
use conf_space::{Bdf, Resource};
use nix::errno::Errno;
use xenbus::DomId;
use xenbus::sim::{BarSpace, Window, WindowArea};

use super::device::{Open, Slot};
use super::ioctl::{self, RegionInfo};
use super::regions::{self, Kept, Span};
use crate::host::config_state;
use crate::host::window::{space, window};

/// BARs 0 to 5 and, last, the expansion ROM. The kernel numbers its regions so, too.
pub(super) const WINDOWS: usize = 7;

/// A BAR, or the expansion ROM, as the kernel offers it.
#[derive(Debug, Default)]
pub(super) struct Region {
    info: RegionInfo,
    mappable: Vec<Span>,
}

/// What the kernel offers of a device, without what is kept.
///
/// # Errors
/// The kernel's.
pub(super) fn regions(bdf: Bdf, device: &File, kept: &[Kept]) -> io::Result<[Region; WINDOWS]> {
    let mut regions: [Region; WINDOWS] = Default::default();
    for (slot, bar) in regions.iter_mut().zip(0u8..) {
        let info = ioctl::region_info(device, u32::from(bar))?;
        let mappable = regions::mappable(&info, bar, kept).unwrap_or_else(|broken| {
            log::warn!("{bdf}: no guest can map its BAR {bar}: {broken}");
            Vec::new()
        });
        *slot = Region { info, mappable };
    }
    Ok(regions)
}

impl Open {
    /// Whether it answers at its I/O ports.
    fn has_ports_on(&self) -> bool {
        let on = u32::from(command::IO);
        let sleeps = |base| config_state::sleeps(&self.config, base);
        self.command().is_some_and(|command| command & on != 0)
            && !self.controls.power.is_some_and(sleeps)
    }

    /// Does an access while the device answers: one that nobody answers can bring the host down (XSA-120). The kernel sees to that for memory,
    /// and not for ports.
    fn while_it_answers(
        &self,
        space: BarSpace,
        access: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if space == BarSpace::Memory {
            return access();
        }
        let _still = self.ports.read().unwrap_or_else(PoisonError::into_inner);
        if !self.has_ports_on() {
            // As the kernel says of memory.
            return Err(Errno::EIO.into());
        }
        access()
    }

    /// Keeps everybody from its I/O ports, until that is dropped, while it may stop answering there.
    pub fn silence_ports(&self) -> RwLockWriteGuard<'_, ()> {
        self.ports.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&self, bar: u8) -> Option<&Region> {
        self.regions.get(usize::from(bar))
    }

    /// Where in the device's file an access to a window goes.
    fn place(&self, bar: u8, offset: u64, width: u8) -> io::Result<u64> {
        let info = self.region(bar).map(|region| &region.info);
        info.filter(|info| {
            let resource = Resource {
                size: info.size,
                ..Resource::ABSENT
            };
            regions::is_within(&resource, offset, width)
        })
        .and_then(|info| info.offset.checked_add(offset))
        .ok_or_else(|| Errno::EINVAL.into())
    }

    /// Reads 1, 2, 4 or 8 bytes of a window. The kernel keeps the MSI-X table to itself: it is as it was programmed here.
    ///
    /// # Errors
    /// EINVAL beyond it; EIO while the device does not answer; the kernel's.
    fn read_region(&self, space: BarSpace, bar: u8, offset: u64, width: u8) -> io::Result<u64> {
        let at = self.place(bar, offset, width)?;
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..usize::from(width)).ok_or(Errno::EINVAL)?;
        self.while_it_answers(space, || self.file.read_exact_at(part, at))?;
        if let Some(table) = self.controls.table.filter(|table| table.bar == bar) {
            let wiring = self.wiring();
            regions::read_table(table.span, offset, part, |entry| wiring.entry(entry));
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes 1, 2, 4 or 8 bytes of a window. The kernel drops what is for an MSI-X table.
    ///
    /// # Errors
    /// As [`Open::read_region`].
    fn write_region(
        &self,
        space: BarSpace,
        bar: u8,
        offset: u64,
        width: u8,
        value: u64,
    ) -> io::Result<()> {
        let at = self.place(bar, offset, width)?;
        let bytes = value.to_le_bytes();
        let part = bytes.get(..usize::from(width)).ok_or(Errno::EINVAL)?;
        self.while_it_answers(space, || self.file.write_all_at(part, at))
    }

    /// The parts of a window that a guest may map.
    fn areas(&self, bar: u8) -> io::Result<Vec<WindowArea>> {
        let Some(Region { info, mappable }) = self.region(bar) else {
            return Ok(Vec::new());
        };
        mappable
            .iter()
            .map(|span| {
                let offset = info.offset.checked_add(span.start);
                Ok(WindowArea {
                    start: span.start,
                    size: span.size(),
                    file: self.file.try_clone()?.into(),
                    offset: offset.ok_or(Errno::EPROTO)?,
                })
            })
            .collect()
    }
}

impl Slot {
    /// What its BARs decode, of what the kernel offers.
    pub fn windows(&self) -> Vec<Window> {
        let Ok(open) = self.open.get() else {
            return Vec::new();
        };
        (0u8..)
            .zip(&self.identity.resources)
            .filter_map(|(bar, resource)| window(bar, resource))
            .filter(|window| {
                open.region(window.bar)
                    .is_some_and(|region| region.info.size != 0)
            })
            .collect()
    }

    fn space(&self, bar: u8) -> BarSpace {
        let resource = self.identity.resources.get(usize::from(bar));
        resource.map_or(BarSpace::Memory, space)
    }

    /// Reads in a window, for a guest.
    ///
    /// # Errors
    /// EIO while the device does not answer; EINVAL beyond it; as [`Slot::with_for`]; the kernel's.
    pub fn window_read(&self, domain: DomId, bar: u8, offset: u64, width: u8) -> io::Result<u64> {
        let space = self.space(bar);
        self.with_for(domain, |open| open.read_region(space, bar, offset, width))
    }

    /// Writes in a window, for a guest.
    ///
    /// # Errors
    /// As [`Slot::window_read`].
    pub fn window_write(
        &self,
        domain: DomId,
        bar: u8,
        offset: u64,
        width: u8,
        value: u64,
    ) -> io::Result<()> {
        let space = self.space(bar);
        self.with_for(domain, |open| {
            open.write_region(space, bar, offset, width, value)
        })
    }

    /// The parts of a window that a guest may map, while it interrupts by its line too: the embedded Xen is told when the line was served.
    ///
    /// # Errors
    /// As [`Slot::with_for`]; when descriptors have run out.
    pub fn areas(&self, domain: DomId, bar: u8) -> io::Result<Vec<WindowArea>> {
        self.with_for(domain, |open| {
            self.set_lent();
            open.areas(bar)
        })
    }
}
