//! What a BAR of an emulated function decodes.

use crate::resource::{Resource, ResourceFlags};

/// Number of BARs of an endpoint.
pub const BARS: usize = 6;

/// Type bits of a BAR (PCI Express Base Specification 6.0, section 7.5.1.2.1).
const IO_SPACE: u32 = 1 << 0;
const MEMORY_64: u32 = 1 << 2;
/// Bits below the address.
const IO_TYPE: u32 = 0x3;
const MEMORY_TYPE: u32 = 0xf;
/// Behind the last I/O port of an x86 machine.
const IO_END: u64 = 0x1_0000;

/// Kind of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next BAR for the upper half of its address. Not prefetchable: here
    /// are registers, whose reads have side effects.
    Memory64,
}

/// A BAR: what it decodes, and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Kind.
    pub kind: BarKind,
    /// Size in bytes or ports: a power of two, at least 4 ports or 16 bytes.
    pub size: u64,
}

impl Bar {
    /// Whether a BAR can have this size.
    pub(super) const fn is_possible(&self) -> bool {
        let (least, most) = match self.kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 => (16, 1 << 63),
        };
        self.size.is_power_of_two() && self.size >= least && self.size <= most
    }

    /// Whether the next BAR is its upper half.
    pub(super) const fn is_wide(&self) -> bool {
        matches!(self.kind, BarKind::Memory64)
    }

    /// What its register holds besides the address.
    pub(super) const fn type_bits(&self) -> u32 {
        match self.kind {
            BarKind::Io => IO_SPACE,
            BarKind::Memory32 => 0,
            BarKind::Memory64 => MEMORY_64,
        }
    }

    /// Address bits that a guest can write: those of the register, and of the next one.
    pub(super) const fn writable(&self) -> (u32, u32) {
        let mask = self.size.wrapping_neg();
        let (low, high) = ((mask & 0xffff_ffff) as u32, (mask >> 32) as u32);
        match self.kind {
            BarKind::Io => (low & !IO_TYPE, 0),
            BarKind::Memory32 => (low & !MEMORY_TYPE, 0),
            BarKind::Memory64 => (low & !MEMORY_TYPE, high),
        }
    }

    /// What it decodes with these values in its register and the next one, if decode is on for its
    /// kind. Nothing, if no address is set, or a guest is just asking for the size.
    ///
    /// A guest asks by writing all ones, and reads back ones wherever the BAR has address bits. A
    /// register that holds that decodes nothing. So a BAR cannot lie in the last slot of its size
    /// below a multiple of 4 GiB, where no firmware and no operating system puts one; in return
    /// sizing leaves no state behind, and never maps.
    pub(super) const fn decoded(&self, low: u32, high: u32) -> Option<Resource> {
        let (low_mask, high_mask) = self.writable();
        let (low, high) = (low & low_mask, high & high_mask);
        if low_mask != 0 && low == low_mask || high_mask != 0 && high == high_mask {
            return None;
        }
        let start = (high as u64) << 32 | low as u64;
        if start == 0 {
            return None;
        }
        let flags = match self.kind {
            BarKind::Io if start >= IO_END => return None,
            BarKind::Io => ResourceFlags::IO,
            BarKind::Memory32 => ResourceFlags::MEMORY,
            BarKind::Memory64 => ResourceFlags::MEMORY.union(ResourceFlags::MEMORY_64),
        };
        Some(Resource {
            start,
            size: self.size,
            flags,
        })
    }
}
