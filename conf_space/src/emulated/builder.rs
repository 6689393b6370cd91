//! Puts an emulated function together.

use thiserror::Error;

use super::bar::{BARS, Bar};
use super::msix::{ENTRY_BYTES, MAX_VECTORS};
use super::{Function, SIZE};
use crate::capabilities::CapabilityId;
use crate::memory::MemorySpace;
use crate::registers::header::{self, command, status};
use crate::registers::{Block, Register, capability, msix};

/// Command bits of every emulated function, beside those that its BARs ask for.
const COMMAND: u16 = command::BUS_MASTER | command::PARITY_ERROR_RESPONSE | command::SERR;

/// What an emulated function says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
}

/// Where the MSI-X table or the pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLocation {
    /// Number of the BAR, 0 to 5.
    pub bar: u8,
    /// Offset from the start of what it decodes; a multiple of 8.
    pub offset: u32,
}

/// Why a function cannot be built. All of these are mistakes of a program, not of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BuildError {
    /// There is no such BAR, it is taken, or the upper half of the one before it.
    #[error("BAR {index} is taken, or there is no such BAR")]
    NoSuchBar {
        /// Number.
        index: usize,
    },
    /// A BAR cannot have this size.
    #[error("BAR {index} cannot have {size:#x} bytes")]
    BarSize {
        /// Number.
        index: usize,
        /// Size in bytes or ports.
        size: u64,
    },
    /// The capability does not fit into the space.
    #[error("no room for the {id} capability of {bytes} bytes at {offset:#04x}")]
    NoRoom {
        /// Which.
        id: CapabilityId,
        /// Its length.
        bytes: u16,
        /// Where it was to go.
        offset: u16,
    },
    /// The MSI-X table or the pending bits do not lie within the BAR.
    #[error("{what} at {offset:#x} of BAR {bar} is not within the BAR")]
    OutsideOfBar {
        /// The table, or the pending bits.
        what: &'static str,
        /// Number of the BAR.
        bar: u8,
        /// Offset.
        offset: u32,
    },
    /// The MSI-X table and the pending bits overlap.
    #[error("the MSI-X table and the MSI-X PBA overlap in BAR {bar}")]
    Overlap {
        /// Number of the BAR.
        bar: u8,
    },
    /// A number of vectors that MSI-X does not have.
    #[error("MSI-X has 1 to {MAX_VECTORS} vectors, not {vectors}")]
    Vectors {
        /// The number.
        vectors: u16,
    },
}

/// Puts an emulated function together: BARs first, then capabilities, which go one behind the other
/// in the order of their list.
#[derive(Debug)]
pub struct Builder {
    space: MemorySpace,
    bars: [Option<Bar>; BARS],
    command: u16,
    /// Where the next capability goes.
    next: u16,
    /// The pointer that leads there.
    link: Register,
    msix: Option<u16>,
}

impl Builder {
    /// A function without BARs, capabilities and interrupt.
    pub fn new(identity: &Identity) -> Self {
        let mut space = MemorySpace::new(SIZE);
        for register in [&header::CACHE_LINE_SIZE, &header::LATENCY_TIMER] {
            space.add_register(0, register);
        }
        let [base, sub, interface] = identity.class;
        for (register, value) in [
            (&header::VENDOR_ID, identity.vendor),
            (&header::DEVICE_ID, identity.device),
            (&header::SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor),
            (&header::SUBSYSTEM_ID, identity.subsystem),
            (&header::BASE_CLASS, base.into()),
            (&header::SUB_CLASS, sub.into()),
            (&header::PROGRAMMING_INTERFACE, interface.into()),
            (&header::REVISION_ID, identity.revision.into()),
        ] {
            space.set(register.offset, register.width, value.into());
        }
        Self {
            space,
            bars: [None; BARS],
            command: COMMAND,
            next: header::END,
            link: header::CAPABILITIES_POINTER,
            msix: None,
        }
    }

    /// Adds BAR `index`.
    ///
    /// # Errors
    /// It is taken, there is none, or it cannot have this size.
    pub fn bar(mut self, index: usize, bar: Bar) -> Result<Self, BuildError> {
        let taken = BuildError::NoSuchBar { index };
        let upper_of = |at: usize| {
            self.bars
                .get(at)
                .copied()
                .flatten()
                .map(|bar| bar.is_wide())
        };
        let behind_wide = index.checked_sub(1).and_then(upper_of) == Some(true);
        let next = index.saturating_add(1);
        if bar.is_wide() && (next >= BARS || upper_of(next).is_some()) || behind_wide {
            return Err(taken);
        }
        if !bar.is_possible() {
            let size = bar.size;
            return Err(BuildError::BarSize { index, size });
        }
        let slot = self.bars.get_mut(index).ok_or(taken)?;
        if slot.replace(bar).is_some() {
            return Err(taken);
        }
        let (low, high) = bar.writable();
        if let Some(register) = header::BARS.get(index) {
            let register = register.rw(low).reset(bar.type_bits());
            self.space.add_register(0, &register);
        }
        if let Some(register) = header::BARS.get(next).filter(|_| bar.is_wide()) {
            self.space.add_register(0, &register.rw(high));
        }
        self.command |= match bar.kind {
            super::BarKind::Io => command::IO,
            super::BarKind::Memory32 | super::BarKind::Memory64 => command::MEMORY,
        };
        Ok(self)
    }

    /// Gives it an interrupt line: INTA.
    pub fn interrupt(mut self) -> Self {
        self.space.add_register(0, &header::INTERRUPT_LINE);
        self.space.set(
            header::INTERRUPT_PIN.offset,
            header::INTERRUPT_PIN.width,
            header::interrupt_pin::INTA,
        );
        self.command |= command::INTX_DISABLE;
        self
    }

    /// Adds a capability with the registers of `block`, and `values` in some of them. Its offset is
    /// the second result.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn capability(
        mut self,
        id: CapabilityId,
        block: &Block,
        values: &[(&Register, u32)],
    ) -> Result<(Self, u16), BuildError> {
        let offset = self.next;
        let bytes = block.registers.iter().map(|register| register.end()).max();
        let bytes = bytes.unwrap_or(0).max(capability::NEXT.end());
        let end = offset
            .saturating_add(bytes)
            .checked_next_multiple_of(4)
            .filter(|end| *end <= SIZE.bytes())
            .ok_or(BuildError::NoRoom { id, bytes, offset })?;
        for register in block.registers {
            self.space.add_register(offset, register);
        }
        self.put(&capability::ID.at(offset), id.0.into());
        for (register, value) in values {
            self.put(&register.at(offset), *value);
        }
        let link = self.link;
        self.put(&link, offset.into());
        self.link = capability::NEXT.at(offset);
        self.next = end;
        Ok((self, offset))
    }

    /// Adds the MSI-X capability. The table and the pending bits are for the owner of the BAR to
    /// serve, with an [`super::Msix`].
    ///
    /// # Errors
    /// There is no room for it, or the table or the pending bits lie outside of their BARs, which
    /// are to be there before.
    pub fn msix(
        self,
        vectors: u16,
        table: MsixLocation,
        pending: MsixLocation,
    ) -> Result<Self, BuildError> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(BuildError::Vectors { vectors });
        }
        let table_bytes = u64::from(vectors).saturating_mul(ENTRY_BYTES.into());
        let pending_bytes = u64::from(vectors.div_ceil(64)).saturating_mul(8);
        self.check(&table, "the MSI-X table", table_bytes)?;
        self.check(&pending, "the MSI-X PBA", pending_bytes)?;
        let starts_within = |first: &MsixLocation, bytes: u64, other: &MsixLocation| {
            other.offset >= first.offset
                && u64::from(other.offset) < u64::from(first.offset).saturating_add(bytes)
        };
        if table.bar == pending.bar
            && (starts_within(&table, table_bytes, &pending)
                || starts_within(&pending, pending_bytes, &table))
        {
            return Err(BuildError::Overlap { bar: table.bar });
        }
        let at = |place: &MsixLocation| {
            (place.offset & msix::location::OFFSET) | (u32::from(place.bar) & msix::location::BAR)
        };
        let (mut built, offset) = self.capability(
            CapabilityId::MSI_X,
            &msix::BLOCK,
            &[
                (&msix::CONTROL, u32::from(vectors.saturating_sub(1))),
                (&msix::TABLE, at(&table)),
                (&msix::PENDING, at(&pending)),
            ],
        )?;
        built.msix = Some(offset);
        Ok(built)
    }

    /// The function.
    pub fn build(mut self) -> Function {
        let command = header::COMMAND.rw(self.command.into());
        self.space.add_register(0, &command);
        if self.link != header::CAPABILITIES_POINTER {
            self.put(&header::STATUS, status::CAPABILITIES_LIST.into());
        }
        Function {
            space: self.space,
            bars: self.bars,
            msix: self.msix,
        }
    }

    fn put(&mut self, register: &Register, value: u32) {
        self.space.set(register.offset, register.width, value);
    }

    fn check(
        &self,
        place: &MsixLocation,
        what: &'static str,
        bytes: u64,
    ) -> Result<(), BuildError> {
        let MsixLocation { bar, offset } = *place;
        let size = self.bars.get(usize::from(bar)).copied().flatten();
        let end = u64::from(offset).saturating_add(bytes);
        if offset & !msix::location::OFFSET != 0 || size.is_none_or(|bar| end > bar.size) {
            return Err(BuildError::OutsideOfBar { what, bar, offset });
        }
        Ok(())
    }
}
