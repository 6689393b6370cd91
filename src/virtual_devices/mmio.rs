//! Where the slots of virtio-mmio are in an HVM guest's memory, and which interrupt lines they have. The guest learns
//! of both by an ACPI table of its own (`pciback acpi`).

use virtio::transport::mmio::{Board, SLOT_BYTES};
use xenbus::device_model::IntxPin;

use crate::config::MmioSlot;

/// The first slot's guest-physical address: where hvmloader leaves a guest room for what it does not know of
/// (`GUEST_RESERVED_START`, Xen `tools/firmware/hvmloader/config.h`).
const BASE: u32 = 0xfe70_0000;

/// Bytes of a slot.
pub const LENGTH: u32 = SLOT_BYTES as u32;

/// A slot's guest-physical address.
pub fn address(slot: MmioSlot) -> u32 {
    let offset = u32::from(slot.number()).saturating_mul(LENGTH);
    BASE.saturating_add(offset)
}

/// A slot's interrupt line, level-triggered. Lines of the ISA bus, which Linux would like as much, are few, and Xen
/// does not repeat one that is still up when its event channel is done. So it is a PCI pin: one of those of the two
/// chipset devices, for these drive none of them but INTD of the second, the USB controller's. Each line is also
/// that of another device's pin; a driver of virtio-mmio shares.
pub fn line(slot: MmioSlot) -> IntxPin {
    IntxPin {
        device: slot.number() >> 2,
        pin: slot.number() & 3,
    }
}

/// A guest's slots, all of them empty.
pub(super) fn board() -> Board {
    Board::new(BASE.into(), MmioSlot::COUNT.into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn slots_lie_in_the_guest_s_reserve_and_have_lines_of_their_own() {
        let lines: BTreeSet<_> = MmioSlot::all().map(|slot| line(slot).gsi()).collect();
        assert_eq!(lines, (16..=22).collect());
        let ends = MmioSlot::all().map(|slot| address(slot) + LENGTH);
        assert!(ends.into_iter().all(|end| end <= 0xfe80_0000));
        assert_eq!(MmioSlot::all().map(address).min(), Some(0xfe70_0000));
    }
}
