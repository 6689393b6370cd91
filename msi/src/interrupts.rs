//! What a device has, read once from its configuration space.

use conf_space::capabilities::{Capabilities, CapabilityId};
use conf_space::registers::{header, msi, msix, power_management};
use conf_space::{AccessError, ConfigSize, ConfigSpace, Resource, Width};
use thiserror::Error;

use crate::ledger::Ledger;
use crate::operations::Operations;
use crate::pirqs::Pirqs;

/// The MSI capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Offset in configuration space.
    pub offset: u16,
    /// The most vectors it can have: 1, 2, 4, 8, 16 or 32.
    pub vectors: u8,
}

/// The MSI-X capability, its table found sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiX {
    /// Offset in configuration space.
    pub offset: u16,
    /// Length of the table, 1 to 2048.
    pub vectors: u16,
    /// Host address of the BAR that holds the table: what Xen wants to know when it maps an entry.
    pub table_base: u64,
}

/// What is wrong with an MSI-X capability. The device is used without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BrokenMsiX {
    /// The capability reaches beyond the space for capabilities.
    #[error("its capability at {offset:#04x} reaches beyond the first 256 bytes")]
    CutOff {
        /// Where it starts.
        offset: u16,
    },
    /// The BAR that is to hold the table is none, has no memory, or is placed nowhere.
    #[error("its table is in BAR {bar}, which is not one with memory")]
    NoBar {
        /// The number, 0 to 7.
        bar: u8,
    },
    /// The table does not lie within its BAR.
    #[error(
        "its table, {length:#x} bytes at {start:#x}, reaches beyond the {size:#x} bytes of BAR {bar}"
    )]
    BeyondBar {
        /// Number of the BAR.
        bar: u8,
        /// Where in the BAR the table starts, in bytes.
        start: u64,
        /// Its length in bytes.
        length: u64,
        /// The BAR's size in bytes.
        size: u64,
    },
}

/// What a device has of MSI and MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interrupts {
    pub(crate) msi: Option<Msi>,
    pub(crate) msix: Option<Result<MsiX, BrokenMsiX>>,
    /// Offset of the power management control register.
    pub(crate) power: Option<u16>,
}

/// The largest binary logarithm of a number of MSI vectors; larger ones are reserved.
const MOST_VECTORS: u16 = 5;

impl Interrupts {
    /// Reads what the device has. `resources` are what BARs 0 to 5 decode, as the host knows it;
    /// what follows is not looked at.
    ///
    /// # Errors
    /// When configuration space cannot be read.
    pub fn discover<C: ConfigSpace + ?Sized>(
        config: &C,
        resources: &[Resource],
    ) -> Result<Self, AccessError> {
        let capabilities = Capabilities::walk(config, ConfigSize::Conventional)?;
        let mut found = Self::default();
        if let Some(offset) = capabilities
            .find(CapabilityId::MSI)
            .filter(|offset| has_room(*offset, msi::DATA_32.end()))
        {
            let control = read_word(config, offset, msi::CONTROL.offset)?;
            let most = field(control, msi::control::MULTIPLE_CAPABLE);
            // A reserved number is no promise of anything.
            let bits = if most > MOST_VECTORS { 0 } else { most };
            found.msi = Some(Msi {
                offset,
                vectors: 1u8.wrapping_shl(u32::from(bits)),
            });
        }
        if let Some(offset) = capabilities.find(CapabilityId::MSI_X) {
            found.msix = Some(if has_room(offset, msix::PENDING.end()) {
                let control = read_word(config, offset, msix::CONTROL.offset)?;
                let table = config.read(offset.wrapping_add(msix::TABLE.offset), Width::Four)?;
                check_table(offset, control, table, resources)
            } else {
                Err(BrokenMsiX::CutOff { offset })
            });
        }
        found.power = capabilities
            .find(CapabilityId::POWER_MANAGEMENT)
            .filter(|offset| has_room(*offset, power_management::CONTROL.end()))
            .map(|offset| offset.wrapping_add(power_management::CONTROL.offset));
        Ok(found)
    }

    /// MSI, if the device has it.
    pub fn msi(&self) -> Option<Msi> {
        self.msi
    }

    /// MSI-X, if the device has it, or what is wrong with it.
    pub fn msix(&self) -> Option<Result<MsiX, BrokenMsiX>> {
        self.msix
    }

    /// Lends what is needed to act on the device's interrupts: its configuration space, its PIRQs,
    /// and the ledger that belongs to it while it is this domain's.
    pub fn operate<'a>(
        &'a self,
        config: &'a dyn ConfigSpace,
        pirqs: &'a dyn Pirqs,
        ledger: &'a dyn Ledger,
    ) -> Operations<'a> {
        Operations::new(self, config, pirqs, ledger)
    }
}

/// Whether a capability with registers up to `end` fits where capabilities are.
fn has_room(offset: u16, end: u16) -> bool {
    offset
        .checked_add(end)
        .is_some_and(|end| end <= ConfigSize::Conventional.bytes() && offset >= header::END)
}

/// The value of a field of a register.
fn field(value: u16, mask: u16) -> u16 {
    (value & mask).wrapping_shr(mask.trailing_zeros())
}

fn read_word<C: ConfigSpace + ?Sized>(
    config: &C,
    base: u16,
    register: u16,
) -> Result<u16, AccessError> {
    let value = config.read(base.wrapping_add(register), Width::Two)?;
    let [low, high, ..] = value.to_le_bytes();
    Ok(u16::from_le_bytes([low, high]))
}

fn check_table(
    offset: u16,
    control: u16,
    table: u32,
    resources: &[Resource],
) -> Result<MsiX, BrokenMsiX> {
    let msix::Place { bar, start, size } = msix::table(control, table);
    let resource = resources
        .get(usize::from(bar))
        .filter(|resource| {
            usize::from(bar) < header::BARS.len() && resource.is_memory() && resource.start != 0
        })
        .ok_or(BrokenMsiX::NoBar { bar })?;
    if start.saturating_add(size) > resource.size {
        return Err(BrokenMsiX::BeyondBar {
            bar,
            start,
            length: size,
            size: resource.size,
        });
    }
    Ok(MsiX {
        offset,
        vectors: msix::vectors(control),
        table_base: resource.start,
    })
}

#[cfg(test)]
mod tests {
    use conf_space::ResourceFlags;
    use conf_space::memory::MemorySpace;

    use super::*;

    fn space(capabilities: &[(u16, u8)]) -> MemorySpace {
        let space = MemorySpace::new(ConfigSize::Conventional);
        space.set(0x06, Width::Two, 0x10);
        let mut pointer = 0x34;
        for (offset, id) in capabilities {
            space.set(pointer, Width::One, u32::from(*offset));
            space.set(*offset, Width::One, u32::from(*id));
            pointer = offset + 1;
        }
        space
    }

    fn memory(start: u64, size: u64) -> Resource {
        Resource {
            start,
            size,
            flags: ResourceFlags::MEMORY,
        }
    }

    fn msix(control: u32, table: u32, resources: &[Resource]) -> Result<MsiX, BrokenMsiX> {
        let space = space(&[(0x70, 0x11)]);
        space.set(0x72, Width::Two, control);
        space.set(0x74, Width::Four, table);
        Interrupts::discover(&space, resources)
            .unwrap()
            .msix()
            .unwrap()
    }

    #[test]
    fn a_device_without_capabilities_has_neither() {
        let found = Interrupts::discover(&space(&[]), &[]).unwrap();
        assert_eq!(found, Interrupts::default());
    }

    #[test]
    fn msi_has_as_many_vectors_as_its_control_word_says() {
        for (control, vectors) in [
            (0x0, 1),
            (0x2, 2),
            (0xa, 32),
            (0x184, 4),
            (0xc, 1),
            (0xe, 1),
        ] {
            let space = space(&[(0x50, 0x05)]);
            space.set(0x52, Width::Two, control);
            let found = Interrupts::discover(&space, &[]).unwrap();
            assert_eq!(
                found.msi(),
                Some(Msi {
                    offset: 0x50,
                    vectors
                }),
                "{control:#x}"
            );
        }
    }

    #[test]
    fn msix_knows_the_base_of_the_bar_that_holds_its_table() {
        let resources = [Resource::ABSENT, memory(0xfe00_0000, 0x4000)];
        let expected = MsiX {
            offset: 0x70,
            vectors: 5,
            table_base: 0xfe00_0000,
        };
        assert_eq!(msix(4, 0x2001, &resources), Ok(expected));
    }

    #[test]
    fn a_table_may_end_where_its_bar_ends_but_not_behind() {
        let resources = [memory(0xfe00_0000, 0x1000)];
        assert!(msix(3, 0x0fc0, &resources).is_ok());
        assert_eq!(
            msix(4, 0x0fc0, &resources),
            Err(BrokenMsiX::BeyondBar {
                bar: 0,
                start: 0x0fc0,
                length: 0x50,
                size: 0x1000
            })
        );
        assert!(matches!(
            msix(0x7ff, 0xffff_fff8, &resources),
            Err(BrokenMsiX::BeyondBar { .. })
        ));
    }

    #[test]
    fn a_table_in_no_memory_bar_is_broken() {
        let io = Resource {
            flags: ResourceFlags::IO,
            ..memory(0xc000, 0x1000)
        };
        let rom = memory(0xfeb0_0000, 0x1000);
        let resources = [
            io,
            memory(0, 0x1000),
            Resource::ABSENT,
            Resource::ABSENT,
            Resource::ABSENT,
            Resource::ABSENT,
            rom,
        ];
        for bar in 0..8 {
            assert_eq!(
                msix(0, u32::from(bar), &resources),
                Err(BrokenMsiX::NoBar { bar })
            );
        }
    }

    #[test]
    fn capabilities_that_are_cut_off_at_the_end_are_not_used() {
        let found = Interrupts::discover(&space(&[(0xf8, 0x05), (0xfc, 0x01)]), &[]).unwrap();
        assert_eq!(found, Interrupts::default());
        let found = Interrupts::discover(&space(&[(0xf8, 0x11)]), &[]).unwrap();
        assert_eq!(found.msix(), Some(Err(BrokenMsiX::CutOff { offset: 0xf8 })));
    }
}
