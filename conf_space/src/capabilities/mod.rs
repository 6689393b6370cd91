//! The walk of the standard and of the extended capability list.
//!
//! Lists come from hardware, and some hardware is broken: a list may loop, leave the space or point
//! into the header. The walk always ends, keeps what it found up to the fault, and says what is
//! wrong.

mod ids;

use thiserror::Error;

pub use ids::{CapabilityId, ExtendedCapabilityId};

use crate::access::{AccessError, ConfigSize, ConfigSpace, Width};
use crate::registers::header;

/// Offset of the first extended capability.
const EXTENDED_START: u16 = 0x100;
/// Lowest bits of a pointer to a capability; reserved, so to be ignored.
const POINTER_RESERVED: u16 = 0x3;

/// A capability in the first 256 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub id: CapabilityId,
    /// Where it starts: a multiple of 4, from 0x40 to 0xfc. Its registers may still reach beyond
    /// the space.
    pub offset: u16,
}

/// A capability in extended configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is.
    pub id: ExtendedCapabilityId,
    /// Version of its layout.
    pub version: u8,
    /// Where it starts: a multiple of 4, from 0x100 to 0xffc. Its registers may still reach beyond
    /// the space.
    pub offset: u16,
}

/// What is wrong with a capability list. `at` is the offset of the pointer or capability concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ListFault {
    /// The pointer's reserved low bits are set; they were ignored.
    #[error(
        "the capability pointer {pointer:#05x} is not a multiple of 4; its low bits are ignored"
    )]
    Unaligned {
        /// The pointer.
        pointer: u16,
    },
    /// The pointer leads out of the part of the space that holds capabilities.
    #[error("the capability pointer {pointer:#05x} leads into the header; the list ends there")]
    OutOfPlace {
        /// The pointer.
        pointer: u16,
    },
    /// The list leads back into itself.
    #[error("the capability list loops back to {pointer:#05x}; it is cut there")]
    Loop {
        /// The pointer.
        pointer: u16,
    },
    /// All bits of a capability's header are ones: nothing answers there.
    #[error("nothing answers at {pointer:#05x}, where a capability should be; the list ends there")]
    NoAnswer {
        /// The pointer.
        pointer: u16,
    },
}

/// What the walk found, in the order of the lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The standard list.
    pub standard: Vec<Capability>,
    /// The extended list; empty if the space has 256 bytes.
    pub extended: Vec<ExtendedCapability>,
    /// What is wrong with the lists. Empty for a sound device.
    pub faults: Vec<ListFault>,
}

impl Capabilities {
    /// Walks both lists of a function.
    ///
    /// # Errors
    /// The first access that fails.
    pub fn walk<C: ConfigSpace + ?Sized>(space: &C, size: ConfigSize) -> Result<Self, AccessError> {
        let mut found = Self::default();
        found.walk_standard(space)?;
        if size == ConfigSize::Extended {
            found.walk_extended(space)?;
        }
        Ok(found)
    }

    /// Offset of the first standard capability with this id.
    pub fn find(&self, id: CapabilityId) -> Option<u16> {
        self.standard
            .iter()
            .find(|capability| capability.id == id)
            .map(|capability| capability.offset)
    }

    /// Offset of the first extended capability with this id.
    pub fn find_extended(&self, id: ExtendedCapabilityId) -> Option<u16> {
        self.extended
            .iter()
            .find(|capability| capability.id == id)
            .map(|capability| capability.offset)
    }

    fn walk_standard<C: ConfigSpace + ?Sized>(&mut self, space: &C) -> Result<(), AccessError> {
        let status = space.read(header::STATUS.offset, Width::Two)?;
        if status & u32::from(header::status::CAPABILITIES_LIST) == 0 {
            return Ok(());
        }
        let first = space.read(header::CAPABILITIES_POINTER.offset, Width::One)?;
        let mut pointer = (first & 0xff) as u16;
        let mut visited = Visited::default();
        while let Some(offset) = self.follow(pointer, header::END, &mut visited) {
            let word = space.read(offset, Width::Two)?;
            if word & 0xffff == 0xffff {
                self.faults.push(ListFault::NoAnswer { pointer: offset });
                break;
            }
            let [id, next, ..] = word.to_le_bytes();
            self.standard.push(Capability {
                id: CapabilityId(id),
                offset,
            });
            pointer = u16::from(next);
        }
        Ok(())
    }

    fn walk_extended<C: ConfigSpace + ?Sized>(&mut self, space: &C) -> Result<(), AccessError> {
        let mut pointer = EXTENDED_START;
        let mut visited = Visited::default();
        while let Some(offset) = self.follow(pointer, EXTENDED_START, &mut visited) {
            let header = space.read(offset, Width::Four)?;
            // A function without extended capabilities has an all-zero header in the first place;
            // one behind a bridge that cannot forward extended accesses answers all ones there.
            if offset == EXTENDED_START && (header == 0 || header == u32::MAX) {
                break;
            }
            if header == u32::MAX {
                self.faults.push(ListFault::NoAnswer { pointer: offset });
                break;
            }
            let id = ExtendedCapabilityId((header & 0xffff) as u16);
            let version = ((header >> 16) & 0xf) as u8;
            self.extended.push(ExtendedCapability {
                id,
                version,
                offset,
            });
            pointer = ((header >> 20) & 0xfff) as u16;
        }
        Ok(())
    }

    /// The offset that `pointer` leads to; `None` at the end of the list and at a fault that ends
    /// it.
    fn follow(&mut self, pointer: u16, start: u16, visited: &mut Visited) -> Option<u16> {
        let offset = pointer & !POINTER_RESERVED;
        if offset == 0 {
            return None;
        }
        if offset != pointer {
            self.faults.push(ListFault::Unaligned { pointer });
        }
        if offset < start {
            self.faults.push(ListFault::OutOfPlace { pointer });
            return None;
        }
        if !visited.insert(offset) {
            self.faults.push(ListFault::Loop { pointer: offset });
            return None;
        }
        Some(offset)
    }
}

/// The double words that a walk has been at: one bit each. As it never visits one twice, it ends.
#[derive(Default)]
struct Visited([u64; 16]);

impl Visited {
    /// Whether `offset` is new, and lies within 4096 bytes.
    fn insert(&mut self, offset: u16) -> bool {
        let dword = offset >> 2;
        let bit = 1u64.wrapping_shl(u32::from(dword & 63));
        match self.0.get_mut(usize::from(dword >> 6)) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }
}
