//! Base address registers and the expansion ROM.
//!
//! What the guest reads comes from the host's resources, since the registers of a virtual function
//! read as zero. A guest sizes a BAR by writing all ones and reading back; neither reaches the
//! device. It cannot move a BAR. Writing the address that it reads puts that address back into a
//! device that has lost it.

use super::{OpError, Operation, OverlayState};
use crate::access::{ConfigSpace, Width};
use crate::registers::Register;
use crate::registers::header::{BARS, EXPANSION_ROM};
use crate::resource::{Resource, ResourceFlags};

/// Type bits of a BAR (PCI Express Base Specification 6.0, section 7.5.1.2.1).
const IO_SPACE: u32 = 1 << 0;
const MEMORY_64: u32 = 1 << 2;
const PREFETCHABLE: u32 = 1 << 3;

/// Low bits that need not be ones in a write that asks for the size.
const IO_TYPE: u32 = 0x3;
const MEMORY_TYPE: u32 = 0xf;
const ROM_CONTROL: u32 = 0x7ff;

/// Number of a BAR: 0 to 5, and 6 for the expansion ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BarIndex(u8);

impl BarIndex {
    /// The BAR's bit in a set of BARs.
    pub(super) const fn bit(self) -> u8 {
        1u8.wrapping_shl(self.0 as u32)
    }
}

/// What one BAR register shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bar {
    index: BarIndex,
    /// Its address, and type bits.
    address: u32,
    /// All ones in the address bits that it decodes, and type bits. 0: there is no such BAR.
    size: u32,
    /// Bits that need not be ones in a write that asks for the size.
    ignored: u32,
}

impl Bar {
    /// Whether there is such a BAR.
    pub(super) const fn is_present(&self) -> bool {
        self.size != 0
    }

    /// What the guest reads.
    pub(super) const fn value(&self, state: &OverlayState) -> u32 {
        if state.is_sizing(self.index) {
            self.size
        } else {
            self.address
        }
    }

    pub(super) fn write<C: ConfigSpace + ?Sized>(
        &self,
        operation: &mut Operation<'_, C>,
        offset: u16,
        value: u32,
    ) -> Result<(), OpError> {
        if !self.is_present() {
            return Ok(());
        }
        let sizing = value | self.ignored == u32::MAX;
        // A virtual function's registers hold no address that could be lost.
        if !sizing
            && value == self.address
            && !operation.is_virtual_function
            && operation.space.read(offset, Width::Four)? != self.address
        {
            operation.space.write(offset, Width::Four, self.address)?;
        }
        operation.state.set_sizing(self.index, sizing);
        Ok(())
    }
}

/// The BARs and the ROM with their registers.
pub(super) fn all(resources: &[Resource; 7]) -> impl Iterator<Item = (&'static Register, Bar)> {
    let registers = BARS.iter().chain(std::iter::once(&EXPANSION_ROM));
    let mut upper_of: Option<Resource> = None;
    (0u8..)
        .map(BarIndex)
        .zip(registers)
        .zip(resources)
        .map(move |((index, register), resource)| {
            let bar = match upper_of.take() {
                Some(lower) if register.offset != EXPANSION_ROM.offset => upper_half(index, &lower),
                _ if register.offset == EXPANSION_ROM.offset => rom(index, resource),
                _ => {
                    upper_of = resource.is_64_bit().then_some(*resource);
                    lower_half(index, resource)
                }
            };
            (register, bar)
        })
}

const fn absent(index: BarIndex) -> Bar {
    Bar {
        index,
        address: 0,
        size: 0,
        ignored: 0,
    }
}

fn lower_half(index: BarIndex, resource: &Resource) -> Bar {
    let flag = |flag, bit| {
        if resource.flags.contains(flag) {
            bit
        } else {
            0
        }
    };
    let (kind, ignored) = if resource.is_io() {
        (IO_SPACE, IO_TYPE)
    } else if resource.is_memory() {
        let wide = flag(ResourceFlags::MEMORY_64, MEMORY_64);
        (
            wide | flag(ResourceFlags::PREFETCHABLE, PREFETCHABLE),
            MEMORY_TYPE,
        )
    } else {
        return absent(index);
    };
    let (start, size) = (low(resource.start), low(resource.size.wrapping_neg()));
    Bar {
        index,
        address: (start & !ignored) | kind,
        size: (size & !ignored) | kind,
        ignored,
    }
}

/// The upper half of a 64-bit BAR whose number is one less.
const fn upper_half(index: BarIndex, lower: &Resource) -> Bar {
    Bar {
        index,
        address: high(lower.start),
        size: high(lower.size.wrapping_neg()),
        ignored: 0,
    }
}

/// The ROM, whose enable bit a guest cannot set.
fn rom(index: BarIndex, resource: &Resource) -> Bar {
    if !resource.is_memory() {
        return absent(index);
    }
    let (address, size) = (low(resource.start), low(resource.size.wrapping_neg()));
    Bar {
        index,
        address: address & !ROM_CONTROL,
        size: size & !ROM_CONTROL,
        ignored: ROM_CONTROL,
    }
}

const fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

const fn high(value: u64) -> u32 {
    low(value >> 32)
}
