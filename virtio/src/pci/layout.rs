//! Where a function has its register blocks.

use conf_space::emulated::{Bar, BarKind, ENTRY_BYTES, MsixLocation};

use super::capability::Kind;
use crate::transport::{common, legacy, notify};

/// Which interfaces a function offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// That of virtio 0.9.5 alone.
    Legacy,
    /// Both; what the driver does decides.
    Transitional,
    /// That of virtio 1.0 and later alone.
    Modern,
}

impl Mode {
    /// Whether there is a legacy register block.
    pub const fn has_legacy(self) -> bool {
        matches!(self, Self::Legacy | Self::Transitional)
    }

    /// Whether there are capabilities that lead to modern ones.
    pub const fn has_modern(self) -> bool {
        matches!(self, Self::Modern | Self::Transitional)
    }
}

/// How the modern blocks and MSI-X lie in BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// As QEMU has them: MSI-X in BAR 1, notifications by port in BAR 2, and in BAR 4 a page for
    /// each block.
    Qemu,
    /// All in BAR 4.
    Compact,
}

/// A function's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Which interfaces.
    pub mode: Mode,
    /// Where the modern ones are.
    pub layout: Layout,
    /// Whether the legacy block of BAR 0, in I/O, is also in BAR 3, in memory. Drivers look for it in
    /// BAR 0 alone, so this is for those that were told.
    pub legacy_in_memory: bool,
}

/// The legacy block in I/O (virtio 1.3, section 4.1.4.10).
const LEGACY_BAR: u8 = 0;
const QEMU_MSIX_BAR: u8 = 1;
const QEMU_NOTIFY_BAR: u8 = 2;
/// The legacy block in memory.
const LEGACY_MEMORY_BAR: u8 = 3;
/// The modern blocks.
const MODERN_BAR: u8 = 4;

/// Memory is decoded by the page.
const PAGE: u32 = 0x1000;

/// What a region of a BAR holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Legacy,
    Common,
    Isr,
    Device,
    Notify { multiplier: u32 },
    MsixTable,
    MsixPending,
}

impl Content {
    /// What its capability is; `None`: drivers find it otherwise.
    pub const fn kind(self) -> Option<Kind> {
        match self {
            Self::Common => Some(Kind::Common),
            Self::Isr => Some(Kind::Isr),
            Self::Device => Some(Kind::Device),
            Self::Notify { .. } => Some(Kind::Notify),
            Self::Legacy | Self::MsixTable | Self::MsixPending => None,
        }
    }
}

/// A part of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub bar: u8,
    pub offset: u32,
    pub length: u32,
    pub content: Content,
}

impl Region {
    const fn new(bar: u8, offset: u32, length: u32, content: Content) -> Self {
        Self {
            bar,
            offset,
            length,
            content,
        }
    }
}

/// All of a function's BARs and what is in them, capabilities in the order of preference.
#[derive(Debug)]
pub(super) struct Plan {
    pub bars: Vec<(u8, Bar)>,
    pub regions: Vec<Region>,
    pub msix_table: MsixLocation,
    pub msix_pending: MsixLocation,
}

impl Plan {
    /// For a device with so many queues and MSI-X vectors.
    pub fn new(shape: &Shape, queues: u16, vectors: u16) -> Self {
        let mut plan = match shape.layout {
            Layout::Qemu => Self::qemu(shape.mode, queues, vectors),
            Layout::Compact => Self::compact(shape.mode, queues),
        };
        if shape.mode.has_legacy() {
            let length = legacy::BYTES as u32;
            plan.add_bar(LEGACY_BAR, BarKind::Io, length);
            let region = Region::new(LEGACY_BAR, 0, length, Content::Legacy);
            plan.regions.push(region);
            if shape.legacy_in_memory {
                plan.add_bar(LEGACY_MEMORY_BAR, BarKind::Memory32, PAGE);
                let bar = LEGACY_MEMORY_BAR;
                plan.regions.push(Region { bar, ..region });
            }
        }
        let (table, pending) = (plan.msix_table, plan.msix_pending);
        let table_length = u32::from(vectors).saturating_mul(ENTRY_BYTES.into());
        plan.regions.extend([
            Region::new(table.bar, table.offset, table_length, Content::MsixTable),
            Region::new(
                pending.bar,
                pending.offset,
                pending_bytes(vectors),
                Content::MsixPending,
            ),
        ]);
        plan
    }

    fn qemu(mode: Mode, queues: u16, vectors: u16) -> Self {
        // Half of the BAR for the table, half for the pending bits.
        let table = u32::from(vectors)
            .saturating_mul(ENTRY_BYTES.into())
            .max(PAGE / 2)
            .checked_next_power_of_two()
            .unwrap_or(u32::MAX);
        let mut plan = Self::with_msix(QEMU_MSIX_BAR, 0, table);
        plan.add_bar(QEMU_MSIX_BAR, BarKind::Memory32, table.saturating_mul(2));
        if mode.has_modern() {
            plan.add_bar(QEMU_NOTIFY_BAR, BarKind::Io, 4);
            let ports = Content::Notify { multiplier: 0 };
            // By port first: Xen need not emulate the instruction.
            plan.regions.push(Region::new(QEMU_NOTIFY_BAR, 0, 4, ports));
            plan.add_modern(queues, [0, PAGE, 2 * PAGE, 3 * PAGE], 4 * PAGE);
        }
        plan
    }

    fn compact(mode: Mode, queues: u16) -> Self {
        let mut plan = Self::with_msix(MODERN_BAR, 0x8000, 0x4_8000);
        let places = [0, 0x2000, 0x4000, 0x6000];
        if mode.has_modern() {
            plan.add_modern(queues, places, 0x8_0000);
        } else {
            plan.add_bar(MODERN_BAR, MEMORY, 0x8_0000);
        }
        plan
    }

    fn with_msix(bar: u8, table: u32, pending: u32) -> Self {
        let at = |offset| MsixLocation { bar, offset };
        Self {
            bars: Vec::new(),
            regions: Vec::new(),
            msix_table: at(table),
            msix_pending: at(pending),
        }
    }

    fn add_bar(&mut self, index: u8, kind: BarKind, size: u32) {
        let size = size.into();
        self.bars.push((index, Bar { kind, size }));
    }

    /// The modern blocks at these offsets: common, ISR, device, notifications.
    fn add_modern(&mut self, queues: u16, places: [u32; 4], size: u32) {
        let [common, isr, device, notify] = places;
        let multiplier = notify::MULTIPLIER;
        let notify_length = u32::from(queues.max(1)).saturating_mul(multiplier);
        self.add_bar(MODERN_BAR, MEMORY, size);
        self.regions.extend([
            Region::new(
                MODERN_BAR,
                common,
                common::TABLE.length().into(),
                Content::Common,
            ),
            Region::new(MODERN_BAR, isr, 1, Content::Isr),
            Region::new(MODERN_BAR, device, PAGE, Content::Device),
            Region::new(
                MODERN_BAR,
                notify,
                notify_length,
                Content::Notify { multiplier },
            ),
        ]);
    }
}

const MEMORY: BarKind = BarKind::Memory64;

/// A bit for each vector, in groups of 64.
fn pending_bytes(vectors: u16) -> u32 {
    u32::from(vectors.div_ceil(64)).saturating_mul(8)
}
