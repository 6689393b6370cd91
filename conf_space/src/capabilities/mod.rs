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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::MemorySpace;

    /// A space with a capability list that starts at `first`, of (offset, id, next).
    fn standard(first: u32, list: &[(u16, u32, u32)]) -> MemorySpace {
        let space = MemorySpace::new(ConfigSize::Extended);
        space.set(0x06, Width::Two, 0x0010);
        space.set(0x34, Width::One, first);
        for (offset, id, next) in list {
            space.set(*offset, Width::Two, id | next << 8);
        }
        space
    }

    /// A space with an extended list of (offset, id, next).
    fn extended(list: &[(u16, u32, u32)]) -> MemorySpace {
        let space = MemorySpace::new(ConfigSize::Extended);
        for (offset, id, next) in list {
            space.set(*offset, Width::Four, id | 0x1_0000 | next << 20);
        }
        space
    }

    fn walk(space: &MemorySpace) -> Capabilities {
        Capabilities::walk(space, ConfigSize::Extended).unwrap()
    }

    fn offsets(found: &Capabilities) -> Vec<u16> {
        found
            .standard
            .iter()
            .map(|capability| capability.offset)
            .collect()
    }

    #[test]
    fn finds_both_lists_in_order() {
        let space = standard(0x50, &[(0x50, 0x01, 0x40), (0x40, 0x11, 0)]);
        space.set(0x100, Width::Four, 0x1402_0001);
        space.set(0x140, Width::Four, 0x0001_0003);
        let found = walk(&space);
        assert_eq!(
            found.standard,
            [
                Capability {
                    id: CapabilityId::POWER_MANAGEMENT,
                    offset: 0x50
                },
                Capability {
                    id: CapabilityId::MSI_X,
                    offset: 0x40
                },
            ]
        );
        assert_eq!(
            found.extended,
            [
                ExtendedCapability {
                    id: ExtendedCapabilityId::AER,
                    version: 2,
                    offset: 0x100
                },
                ExtendedCapability {
                    id: ExtendedCapabilityId::SERIAL_NUMBER,
                    version: 1,
                    offset: 0x140
                },
            ]
        );
        assert_eq!(found.faults, []);
        assert_eq!(found.find(CapabilityId::MSI_X), Some(0x40));
        assert_eq!(found.find(CapabilityId::MSI), None);
        assert_eq!(
            found.find_extended(ExtendedCapabilityId::SERIAL_NUMBER),
            Some(0x140)
        );
    }

    #[test]
    fn without_the_status_bit_there_is_no_list() {
        let space = standard(0x40, &[(0x40, 0x01, 0)]);
        space.set(0x06, Width::Two, 0);
        assert_eq!(walk(&space), Capabilities::default());
    }

    #[test]
    fn a_conventional_space_has_no_extended_list() {
        let space = extended(&[(0x100, 0x0001, 0)]);
        let found = Capabilities::walk(&space, ConfigSize::Conventional).unwrap();
        assert_eq!(found.extended, []);
    }

    #[test]
    fn an_extended_space_that_is_empty_or_does_not_answer_is_no_fault() {
        for header in [0, u32::MAX] {
            let space = MemorySpace::new(ConfigSize::Extended);
            space.set(0x100, Width::Four, header);
            assert_eq!(walk(&space), Capabilities::default());
        }
    }

    #[test]
    fn loops_are_cut_where_they_close() {
        let found = walk(&standard(0x40, &[(0x40, 1, 0x48), (0x48, 5, 0x40)]));
        assert_eq!(offsets(&found), [0x40, 0x48]);
        assert_eq!(found.faults, [ListFault::Loop { pointer: 0x40 }]);
        let found = walk(&extended(&[(0x100, 1, 0x200), (0x200, 3, 0x200)]));
        assert_eq!(found.extended.len(), 2);
        assert_eq!(found.faults, [ListFault::Loop { pointer: 0x200 }]);
    }

    #[test]
    fn pointers_into_the_header_end_the_list() {
        let found = walk(&standard(0x40, &[(0x40, 1, 0x3c)]));
        assert_eq!(offsets(&found), [0x40]);
        assert_eq!(found.faults, [ListFault::OutOfPlace { pointer: 0x3c }]);
        let found = walk(&extended(&[(0x100, 1, 0x40)]));
        assert_eq!(found.faults, [ListFault::OutOfPlace { pointer: 0x40 }]);
    }

    #[test]
    fn unaligned_pointers_are_followed_without_their_low_bits() {
        let found = walk(&standard(0x42, &[(0x40, 1, 0x51), (0x50, 5, 0)]));
        assert_eq!(offsets(&found), [0x40, 0x50]);
        assert_eq!(
            found.faults,
            [
                ListFault::Unaligned { pointer: 0x42 },
                ListFault::Unaligned { pointer: 0x51 }
            ]
        );
    }

    #[test]
    fn a_capability_that_does_not_answer_ends_the_list() {
        let found = walk(&standard(0x40, &[(0x40, 1, 0x50), (0x50, 0xff, 0xff)]));
        assert_eq!(offsets(&found), [0x40]);
        assert_eq!(found.faults, [ListFault::NoAnswer { pointer: 0x50 }]);
    }

    #[test]
    fn the_longest_list_is_found_whole() {
        let list: Vec<(u16, u32, u32)> = (0x10u16..0x40)
            .map(|dword| (dword * 4, 9, (u32::from(dword + 1) * 4) & 0xff))
            .collect();
        let found = walk(&standard(0x40, &list));
        assert_eq!((found.standard.len(), found.faults), (48, vec![]));
    }

    #[test]
    fn ids_have_names() {
        assert_eq!(CapabilityId::MSI_X.to_string(), "MSI-X");
        assert_eq!(CapabilityId(0xee).to_string(), "capability 0xee");
        assert_eq!(ExtendedCapabilityId::SR_IOV.name(), Some("SR-IOV"));
    }

    proptest! {
        // A device that fails has much to shrink.
        #![proptest_config(ProptestConfig { max_shrink_time: 5000, ..ProptestConfig::default() })]

        #[test]
        fn any_space_is_walked_to_an_end(
            image in prop::collection::vec(any::<u8>(), 4096),
            aligned in any::<bool>(),
        ) {
            let space = MemorySpace::new(ConfigSize::Extended);
            for (offset, byte) in (0u16..).zip(&image) {
                // With aligned bytes everywhere, lists get long before they break.
                let byte = if aligned { byte & 0xfc } else { *byte };
                space.set(offset, Width::One, u32::from(byte));
            }
            space.set(0x06, Width::One, 0x10);
            let found = walk(&space);
            prop_assert!(found.standard.len() <= 48 && found.extended.len() <= 960);
            for capability in &found.standard {
                prop_assert!((0x40..0x100).contains(&capability.offset));
                prop_assert_eq!(capability.offset % 4, 0);
            }
            for capability in &found.extended {
                prop_assert!((0x100..0x1000).contains(&capability.offset));
                prop_assert_eq!(capability.offset % 4, 0);
            }
        }
    }
}
